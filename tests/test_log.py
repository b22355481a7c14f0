"""The log of a run: strict JSON lines, whatever a crash, a full disk, a listener or a reader does."""

import io
import json
import logging
import math
import os
import resource
import subprocess
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from runtime.log import RunLog, environment


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Make the operating system refuse what would make a file larger than this, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def lines_of(directory: Path) -> list[str]:
    return (directory / "metrics.jsonl").read_text().splitlines()


class Recorder:
    """A listener that keeps the names of its events; it raises an error at the one named ``fails_at``."""

    def __init__(self, fails_at: str = "") -> None:
        self.heard: list[str] = []
        self.fails_at = fails_at

    def event(self, event: str, fields: dict[str, Any]) -> None:
        if event == self.fails_at:
            raise RuntimeError("no room\nfor a second line")
        self.heard.append(event)

    def close(self) -> None:
        self.heard.append("closed")


def test_events_are_lines_of_strict_json(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.event("window", loss=1.5, grad_norm=math.inf, nested={"values": [math.nan, -math.inf, 2]})
    log.close()
    (line,) = lines_of(tmp_path)
    event = json.loads(line, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert event["event"] == "window"
    assert event["grad_norm"] == "inf"
    assert event["nested"] == {"values": ["nan", "-inf", 2]}


def test_events_reach_the_file_at_once_and_a_new_log_appends(tmp_path: Path) -> None:
    first = RunLog(tmp_path)
    first.event("one")
    second = RunLog(tmp_path)  # as after a kill: the first was never closed
    second.event("two")
    assert [json.loads(line)["event"] for line in lines_of(tmp_path)] == ["one", "two"]


def test_half_a_line_left_by_a_crash_does_not_spoil_the_next(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"event": "one"}\n{"event": "wind')
    RunLog(tmp_path).event("two")
    lines = lines_of(tmp_path)
    assert lines[1] == '{"event": "wind'
    assert json.loads(lines[2])["event"] == "two"


def test_line_cut_short_by_a_full_disk_does_not_spoil_the_next(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path)
    with room_for(20):
        log.event("one")
        log.event("two")
    log.event("three")
    lines = lines_of(tmp_path)
    assert len(lines) == 2
    assert lines[0] == '{"event": "one", "ti'
    assert json.loads(lines[1])["event"] == "three"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert f"{tmp_path / 'metrics.jsonl'}: cannot be written" in record.getMessage()


def test_a_log_that_was_removed_goes_on_in_a_new_file_with_its_first_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = RunLog(tmp_path)
    log.event("run_start", settings={})
    log.event("window")
    log.reopen()
    assert len(lines_of(tmp_path)) == 2
    (tmp_path / "metrics.jsonl").unlink()
    log.reopen()
    log.event("epoch")
    assert [json.loads(line)["event"] for line in lines_of(tmp_path)] == ["run_start", "epoch"]
    assert "was removed or replaced" in caplog.text
    log.close()


def test_listeners_hear_each_event_once_it_is_written(tmp_path: Path) -> None:
    log, listener = RunLog(tmp_path), Recorder()
    log.listeners.append(listener)
    log.event("one", loss=1.0)
    log.close()
    assert listener.heard == ["one", "closed"]


def test_listener_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log, failing, other = RunLog(tmp_path), Recorder(fails_at="two"), Recorder()
    log.listeners += [failing, other]
    for event in ("one", "two", "three"):
        log.event(event)
    log.close()
    assert failing.heard == ["one"]
    assert other.heard == ["one", "two", "three", "closed"]
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "Recorder stopped (no room); training goes on without it")
    ]
    assert len(lines_of(tmp_path)) == 3


def test_an_error_that_a_listener_keeps_does_not_keep_what_the_caller_holds(tmp_path: Path) -> None:
    """A writer's thread keeps its error. Frames in the traceback would keep loader processes from ending."""

    class Keeping(Recorder):
        def event(self, event: str, fields: dict[str, Any]) -> None:
            try:
                super().event(event, fields)
            except RuntimeError as error:
                self.error = ValueError("again")
                raise self.error from error

    class Loader:
        pass

    log, listener = RunLog(tmp_path), Keeping(fails_at="one")
    log.listeners.append(listener)

    def train() -> weakref.ref[Loader]:
        loader = Loader()
        log.event("one")
        return weakref.ref(loader)

    assert train()() is None
    assert str(listener.error) == "again"


def test_rank_without_a_folder_writes_and_echoes_nothing() -> None:
    echo, listener = io.StringIO(), Recorder()
    log = RunLog(None, echo=echo)
    log.listeners.append(listener)
    log.event("one")
    log.close()
    assert (echo.getvalue(), listener.heard) == ("", [])


def test_echo_gets_the_lines_of_the_file(tmp_path: Path) -> None:
    echo = io.StringIO()
    log = RunLog(tmp_path, echo=echo)
    log.event("one", loss=0.5)
    log.event("two")
    assert echo.getvalue() == (tmp_path / "metrics.jsonl").read_text()


def test_echo_whose_reader_has_gone_gets_no_more_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as echo:
        log = RunLog(tmp_path, echo=echo)
        log.event("one")
        log.event("two")
    assert len(lines_of(tmp_path)) == 2
    assert not caplog.records


def test_environment_has_versions_and_the_commit_if_there_is_one(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("")
    outside = environment(program, ["torch"])
    assert outside["git_commit"] == ""
    assert outside["torch"][0].isdigit()
    assert environment(program, ["no-such-package"])["no-such-package"] == ""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=t", "-c", "user.email=t@example.com"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], check=True)
    clean = environment(program, [])["git_commit"]
    assert len(clean) == 40
    program.write_text("changed")
    assert environment(program, [])["git_commit"] == clean + "-dirty"
