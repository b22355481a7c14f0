"""What a run says where it is not watched: in a pipe, with --quiet, with --json-logs."""

import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Argv
from launching import read_events

import train_ultimate
from runtime.console import LastingStream, OnlyWarnings
from train_ultimate import main

DRILL = ("--drill", "bad-sample@2")
SHORT = ("--epochs", "2", "--stage1-epochs", "1")


def run(*argv: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    command, environment = [sys.executable, train_ultimate.__file__, *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)


def test_in_a_pipe_there_are_lines_alone_and_one_that_names_each_epoch(tiny_argv: Argv) -> None:
    result = run(*tiny_argv(*SHORT))
    assert result.returncode == 0, result.stderr
    assert not {"\r", "\x1b"} & set(result.stdout + result.stderr)
    assert [line for line in result.stdout.splitlines() if line.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]


def test_the_last_line_is_the_next_command_and_it_works(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_argv(*SHORT)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    command = shlex.split(line)
    assert command[3] == "evaluate"
    assert main(command[3:]) == 0


def test_quiet_tells_incidents_and_nothing_else(tiny_argv: Argv) -> None:
    result = run(*tiny_argv(*SHORT, "--quiet", *DRILL))
    assert result.returncode == 0
    assert result.stdout == ""
    assert "Epoch 1, window 2: nonfinite" in result.stderr
    assert "quarantined" in result.stderr
    assert "Loss:" not in result.stderr


def test_json_logs_are_the_lines_of_the_log(tiny_argv: Argv, tmp_path: Path) -> None:
    result = run(*tiny_argv(*SHORT, "--json-logs", *DRILL))
    assert result.returncode == 0
    assert result.stdout == (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(result.stdout.splitlines()[-1])["event"] == "run_end"
    assert "Epoch 1, window 2: nonfinite" in result.stderr


def test_a_reader_of_json_logs_that_has_gone_costs_nothing(tiny_argv: Argv, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = run(*tiny_argv(*SHORT, "--json-logs"), stdout=write)
    os.close(write)
    assert result.returncode == 0, result.stderr
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 0


@pytest.mark.parametrize(
    "redirected",
    [
        pytest.param(">/dev/full", id="full"),
        pytest.param("--quiet 2>/dev/full", id="quiet"),
        pytest.param(">&- 2>&-", id="closed", marks=pytest.mark.slow),
        pytest.param("| head -n 1", id="gone", marks=pytest.mark.slow),
    ],
)
def test_a_terminal_that_takes_nothing_costs_nothing(tiny_argv: Argv, tmp_path: Path, redirected: str) -> None:
    """A log on a full disk, streams that are closed, a reader that goes: an incident and the end are told to nobody."""
    command = shlex.join([sys.executable, train_ultimate.__file__, *tiny_argv(*SHORT, *DRILL)])
    subprocess.run(
        ["/bin/bash", "-c", f"{command} {redirected}; exit ${{PIPESTATUS[0]}}"], check=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 0
    assert (tmp_path / "run" / "epoch_0002.pth").exists()


def test_what_an_encoding_lacks_is_escaped() -> None:
    data = io.BytesIO()
    stream = LastingStream(io.TextIOWrapper(data, encoding="ascii"))
    stream.write("früh\udce9.jpg\n")
    stream.flush()
    assert data.getvalue() == rb"fr\xfch\udce9.jpg" + b"\n"


def test_a_line_that_comes_in_pieces_is_judged_as_one(capsys: pytest.CaptureFixture[str]) -> None:
    for passes in (True, False):
        stream = OnlyWarnings(LastingStream(sys.stderr) if passes else None)
        for piece in ("Warn", "ing: the disk", " is full\nLoss: 1\n   Warning: x\n"):
            stream.write(piece)
        assert capsys.readouterr().err == ("Warning: the disk is full\n   Warning: x\n" if passes else "")
