"""Output of the commands: no stream, and no name in a line, ends a command with an error of its own."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from commands.output import print_error, print_lines, progress_bar

ROOT = Path(__file__).parents[1]
PRINT = """
from commands.output import print_error, print_lines
print_lines(["first", "second"])
print_error("third")
print_lines(["fourth"])
"""
OUT, ERR = "first\nsecond\nfourth\n", "error: third\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [("", OUT, ERR), ("> /dev/full", "", ERR), (">&-", "", ERR), ("2> /dev/full", OUT, ""), ("2>&-", OUT, "")],
)
def test_full_disk_and_missing_stream_are_no_error(redirection: str, out: str, err: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PRINT]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, out, err)


def test_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", PRINT], cwd=ROOT, stdout=write, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(write)
    assert (process.returncode, process.stderr) == (0, ERR)


def test_closed_stream_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stdout", stream)
    print_lines(["first"])


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", rb"error: f\xfcnf \udce9"), ("utf-8", b"error: f\xc3\xbcnf " + rb"\udce9")]
)
def test_characters_outside_the_encoding_are_escaped(
    encoding: str, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    buffer = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(buffer, encoding, newline="\n"))
    print_error("fünf " + os.fsdecode(b"\xe9"))
    assert buffer.getvalue() == expected + b"\n"


def test_progress_bar_needs_no_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with progress_bar(2, "file", "Reading") as bar:
        bar.update()
