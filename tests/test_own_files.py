"""No command replaces a file that it did not write; its own earlier ones it does."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import Argv, failing, train
from PIL import Image

from train_ultimate import main

Write = Callable[[Path], list[str]]


@pytest.fixture
def scored(tmp_path: Path) -> Path:
    """A folder of two masks, a copy of them as predictions, and a photograph."""
    for folder in ("CAMO/GT", "CAMO/Imgs", "predictions"):
        (tmp_path / folder).mkdir(parents=True)
    mask = np.zeros((48, 48), dtype=np.uint8)
    mask[10:30, 10:30] = 255
    for name in ("a", "b"):
        Image.fromarray(mask).save(tmp_path / "CAMO" / "GT" / f"{name}.png")
        Image.fromarray(mask).save(tmp_path / "predictions" / f"{name}.png")
        Image.new("RGB", (48, 48)).save(tmp_path / "CAMO" / "Imgs" / f"{name}.jpg")
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("flag", "victims", "own"),
    [
        ("--json", ["CAMO/GT/a.png", "CAMO/Imgs/a.jpg", "notes.json", "link.json"], ["scores.json"]),
        (
            "--contact-sheet",
            ["CAMO/GT/a.png", "CAMO/Imgs/a.jpg", "predictions/a.png"],
            ["sheet.png", "sheet.jpg", "sheet.webp"],
        ),
    ],
)
def test_evaluate_replaces_only_its_own_files(
    scored: Path, capsys: pytest.CaptureFixture[str], flag: str, victims: list[str], own: list[str]
) -> None:
    (scored / "notes.json").write_text(json.dumps({"sets": 1, "mine": True}))
    (scored / "link.json").symlink_to(scored / "CAMO" / "Imgs" / "b.jpg")
    argv = ["evaluate", "--predictions", str(scored / "predictions"), "--masks", str(scored / "CAMO" / "GT")]
    before = contents(scored)
    for victim in [*victims, "/dev/null"]:
        line = failing([*argv, flag, str(scored / victim)], capsys)
        assert f"{flag} {scored / victim}: {scored / victim} exists already, and evaluate did not write it" in line
        assert "choose another name" in line
    assert contents(scored) == before
    for name in own:
        for _ in range(2):
            assert main([*argv, flag, str(scored / name)]) == 0
    assert {name: data for name, data in contents(scored).items() if name in before} == before


def test_saved_predictions_of_another_method_are_kept(
    scored: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "saved"
    argv = ["evaluate", "--checkpoint", str(finished), "--dataset-path", str(scored / "CAMO"), "--num-workers", "0"]
    for _ in range(2):
        assert main([*argv, "--save-predictions", str(saved)]) == 0
    capsys.readouterr()
    (of_another,) = saved.glob("*/a.png")
    Image.new("L", (48, 48)).save(of_another)
    before = of_another.read_bytes()
    assert "a.png exists already, and evaluate did not write it" in failing(
        [*argv, "--save-predictions", str(saved)], capsys
    )
    assert of_another.read_bytes() == before


def test_report_replaces_only_reports(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    page.write_text("<!DOCTYPE html><title>my page</title>")
    argv = ["report", str(finished), "--output", str(page)]
    assert "exists already, and report did not write it" in failing(argv, capsys)
    assert "my page" in page.read_text()
    page.unlink()
    for _ in range(2):
        assert main(argv) == 0


@pytest.mark.slow
def test_export_replaces_only_exported_networks(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network = tmp_path / "network.pt2"
    network.write_bytes(b"another program's")
    argv = ["export", "--checkpoint", str(finished), "--format", "torch", "--output", str(network)]
    assert "exists already, and export did not write it" in failing(argv, capsys)
    assert network.read_bytes() == b"another program's"
    network.unlink()
    for _ in range(2):
        assert main(argv) == 0


@pytest.mark.parametrize("name", ["config.json", "report.html"])
def test_a_new_run_replaces_no_file_of_another_project(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / name).write_text('{"model_type": "bert"}')
    assert f"{name} exists already, and train did not write it" in failing(tiny_argv(), capsys)
    assert (run / name).read_text() == '{"model_type": "bert"}'
    assert list(run.iterdir()) == [run / name]


def test_a_resumed_run_replaces_its_own_damaged_files(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "config.json").write_text('{"sett')
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(run), "--epochs", "5"]) == 0
    assert json.loads((run / "config.json").read_text())["settings"]["epochs"] == 5
