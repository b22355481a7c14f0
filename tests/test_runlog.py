import errno
import json
import math
import subprocess
from io import FileIO
from pathlib import Path

import pytest

from runtime import log as runlog
from runtime.files import write_json
from runtime.log import RunLog, environment


def test_events_are_lines_of_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.event("window", loss=1.5, grad_norm=math.inf, nested={"values": [math.nan, -math.inf, 2]})
    log.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    event = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert event["event"] == "window"
    assert event["grad_norm"] == "inf"
    assert event["nested"] == {"values": ["nan", "-inf", 2]}


def test_events_reach_the_file_at_once_and_a_new_log_appends(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    first.event("one")
    second = RunLog(tmp_path)  # as after a kill: the first was never closed
    second.event("two")
    assert [json.loads(line)["event"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [
        "one",
        "two",
    ]


def test_half_a_line_left_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "one"}\n{"event": "wind')
    RunLog(tmp_path).event("two")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines[1] == '{"event": "wind'
    assert json.loads(lines[2])["event"] == "two"


def test_a_line_that_a_full_disk_has_cut_short_does_not_spoil_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    room = 20

    class Disk(FileIO):
        def write(self, data: bytes) -> int:  # type: ignore[override]
            written = super().write(data[:room])
            if not written:
                raise OSError(errno.ENOSPC, "No space left on device")
            return written

    monkeypatch.setattr(runlog, "FileIO", Disk)
    log = RunLog(tmp_path)
    log.event("one")
    room = 0
    log.event("two")
    room = 1000
    log.event("three")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1])["event"] == "three"
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_json_file_is_replaced_whole(tmp_path: Path) -> None:
    for value in (1, 2):
        write_json(tmp_path / "config.json", {"value": value})
    assert json.loads((tmp_path / "config.json").read_text()) == {"value": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_environment_names_versions_and_the_commit_where_there_is_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("")
    outside = environment(program, ["torch"])
    assert outside["git_commit"] == ""
    assert outside["torch"][0].isdigit()
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = environment(program, [])["git_commit"]
    assert len(clean) == 40
    program.write_text("changed")
    assert environment(program, [])["git_commit"] == clean + "-dirty"
