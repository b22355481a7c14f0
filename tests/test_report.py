"""The ``report`` command, and the report that is written when a run ends."""

import html.parser
import json
import logging
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import Argv, signal_at_step, tiny_arguments
from PIL import Image
from test_history import epoch, log_of, start, window

from reporting.pictures import error_map
from reporting.report import write_final_report
from train_ultimate import main

PROGRAM = Path(__file__).parents[1] / "train_ultimate.py"
VOID = {"meta", "link", "img", "br", "hr", "input"}


@pytest.fixture(scope="module")
def drilled(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run with a drill and its report."""
    directory = tmp_path_factory.mktemp("drilled") / "run"
    assert main(tiny_arguments(tiny_dataset, directory, "--drill", "nan-loss@3")) == 0
    return directory


class Outline(html.parser.HTMLParser):
    """Outline of a page as a screen reader uses it; asserts that tags are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[int] = []
        self.ids: list[str] = []
        self.anchors: list[str] = []
        self.alts: list[str] = []
        self.tables = self.captions = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))
        if "id" in values:
            self.ids.append(values["id"] or "")
        if tag == "a" and (values.get("href") or "").startswith("#"):
            self.anchors.append((values["href"] or "")[1:])
        if tag == "img":
            self.alts.append(values.get("alt") or "")
        self.tables += tag == "table"
        self.captions += tag == "caption"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def outside(text: str) -> list[str]:
    """Return addresses that the page would load from elsewhere."""
    markup = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    return re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?!data:|#)([^"')\s>]+)""", markup)


def failing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["report", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_a_run_ends_with_a_report_that_needs_no_other_file(drilled: Path) -> None:
    text = (drilled / "report.html").read_text()
    outline = Outline(text)
    assert outline.open == []
    assert outline.headings[0] == 1
    assert all(after - before <= 1 for before, after in zip(outline.headings, outline.headings[1:], strict=False))
    assert outline.tables == outline.captions > 5
    assert len(outline.ids) == len(set(outline.ids))
    assert set(outline.anchors) <= set(outline.ids)
    assert outline.alts
    assert all(outline.alts)
    assert outside(text) == []
    assert 'id="incident-000001"' in text
    assert "prefers-color-scheme: dark" in text
    assert "nan-loss" in text
    best = max(
        event["iou"] for event in map(json.loads, (drilled / "metrics.jsonl").open()) if event["event"] == "epoch"
    )
    assert f"{best:.4f}" in text


def test_a_report_can_be_rewritten_at_any_time_for_chosen_epochs(
    drilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(drilled), "--output", str(page), "--epochs", "2", "4", "9"]) == 0
    out = capsys.readouterr().out
    assert re.search(rf"Report: {page} \(\d\.\d MB, \d+\.\d s\)", out)
    assert "There is no epoch_0009.pth; the kept epochs are 2, 3, 4." in out
    text = page.read_text()
    assert "predicted with epoch_0002.pth" in text
    assert text.count('alt="mask, the object covers') == 4  # two validation images an epoch


def test_without_the_dataset_the_report_says_why_it_has_no_pictures(
    drilled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drilled, copy)
    config = json.loads((copy / "config.json").read_text())
    config["settings"]["dataset_path"] = str(tmp_path / "gone")
    (copy / "config.json").write_text(json.dumps(config))
    assert main(["report", str(copy)]) == 0
    assert f"{tmp_path / 'gone'}: no such folder here" in capsys.readouterr().out
    assert "No pictures: the dataset is not available (" in (copy / "report.html").read_text()


def test_a_damaged_checkpoint_costs_only_the_pictures(drilled: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drilled, copy)
    for file in copy.glob("*.pth"):
        file.write_bytes(b"no archive")
    assert main(["report", str(copy)]) == 0
    assert "No pictures" in (copy / "report.html").read_text()


def test_several_runs_are_compared(drilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = log_of(tmp_path / "other", start(lr=0.7), window(1, 1), epoch(1, 0.25))
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(drilled), str(other)]) == 0
    text = (tmp_path / "comparison.html").read_text()
    outline = Outline(text)
    assert len(outline.ids) == len(set(outline.ids))
    assert "Settings, versions and devices that differ" in text
    assert re.search(r'<th scope="row">lr</th><td[^>]*>0.002</td><td[^>]*>0.7</td>', text)


def test_a_run_in_progress_with_half_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = log_of(tmp_path / "run", start(), window(1, 1), window(1, 2), tail='{"event": "wind')
    assert main(["report", str(run)]) == 0
    assert "still going, or killed" in capsys.readouterr().out
    text = (run / "report.html").read_text()
    assert "unfinished: epoch 1, window 2" in text
    assert "1 lines of its log hold no event" in text


def test_a_run_that_has_trained_nothing_yet(tmp_path: Path) -> None:
    run = log_of(tmp_path / "run", start())
    assert main(["report", str(run)]) == 0
    assert "No window has been trained yet" in (run / "report.html").read_text()


def test_mistakes_in_the_command_are_answered_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in failing([str(tmp_path / "empty")], capsys)
    assert "not the folder of a run" in failing([str(tmp_path)], capsys)
    assert "no such folder" in failing([str(tmp_path / "none")], capsys)
    run = log_of(tmp_path / "run", start())
    assert "there is no folder" in failing([str(run), "--output", str(tmp_path / "a" / "b.html")], capsys)
    assert "a report is an HTML page; try" in failing([str(run), "--output", str(run / "best_model.pth")], capsys)
    assert "must be at least 1" in failing([str(run), "--epochs", "0"], capsys)


def test_names_in_the_log_cannot_break_out_of_the_page(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script>"
    incident = {"event": "incident", "folder": "000001", "epoch": 1, "window": 1, "verdict": evil, "action": evil}
    bad = {"event": "unreadable", "image": evil, "reason": evil}
    run = log_of(tmp_path / evil.replace("/", "_"), start(), window(1, 1), window(1, 2), incident, bad)
    assert main(["report", str(run)]) == 0
    assert "<script>alert" not in (run / "report.html").read_text()


def test_a_report_without_pictures_does_not_import_torch(tmp_path: Path) -> None:
    run = log_of(tmp_path / "run", start(), window(1, 1), epoch(1, 0.5))
    code = (
        "import sys, commands\n"
        f"assert commands.answer(['report', {str(run)!r}]) == 0\n"
        "assert not {'torch', 'timm'} & set(sys.modules), 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=PROGRAM.parent, check=True)


def test_without_plotly_the_command_fails_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = log_of(tmp_path / "run", start())
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert "pip install plotly" in failing([str(run)], capsys)


def test_a_run_stopped_by_a_signal_has_its_report_without_pictures(tiny_argv: Argv, tmp_path: Path) -> None:
    with signal_at_step(6):
        assert main(tiny_argv()) == 143
    text = (tmp_path / "run" / "report.html").read_text()
    assert "stopped by SIGTERM" in text
    assert "<img" not in text


def test_a_run_that_diverges_has_its_report(tiny_argv: Argv, tmp_path: Path) -> None:
    assert main(tiny_argv("--drill", "nan-weight@6x20", "--max-rollbacks", "1")) == 3
    assert "diverged, all recoveries spent" in (tmp_path / "run" / "report.html").read_text()


def test_a_final_report_that_cannot_be_written_is_a_warning_of_one_line(
    drilled: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(drilled, copy)
    (copy / "report.html").unlink()
    (copy / "report.html").mkdir()
    write_final_report(copy, with_pictures=False)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.message.startswith("No report written (")
    assert f"report {copy}" in record.message
    assert "\n" not in record.message
    assert not list(copy.glob(".report*"))


def test_an_error_map_colours_false_alarms_and_misses_differently() -> None:
    mask = np.array([[True, True], [False, False]])
    prediction = np.array([[255, 0], [255, 0]], dtype=np.uint8)
    pixels, false_alarm, missed = error_map(Image.new("RGB", (2, 2), (100, 100, 100)), mask, prediction)
    assert (false_alarm, missed) == (0.25, 0.25)
    assert pixels[0, 1].tolist() == [64, 128, 255]
    assert pixels[1, 0].tolist() == [255, 140, 0]
    assert pixels[0, 0].tolist() == pixels[1, 1].tolist() == [35, 35, 35]
