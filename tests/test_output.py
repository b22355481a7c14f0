"""Output of the commands: neither a broken stream nor a name in a line ends a command with an error."""

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
BUFFERED = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}  # Python's usual streams


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [("", OUT, ERR), ("> /dev/full", "", ERR), (">&-", "", ERR), ("2> /dev/full", OUT, ""), ("2>&-", OUT, "")],
)
def test_full_disk_and_missing_stream_are_no_error(redirection: str, out: str, err: str) -> None:
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirection}', sys.executable, PRINT]
    process = subprocess.run(command, cwd=ROOT, env=BUFFERED, capture_output=True, text=True, check=False)
    assert (process.returncode, process.stdout, process.stderr) == (0, out, err)


def test_closed_pipe_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    process = subprocess.run(
        [sys.executable, "-c", PRINT], cwd=ROOT, env=BUFFERED, stdout=write, stderr=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    os.close(write)
    assert (process.returncode, process.stderr) == (0, ERR)


def test_reader_that_goes_after_the_first_line_changes_no_exit_code() -> None:
    program = "from commands.output import print_lines\nprint_lines(str(n) * 50 for n in range(9000))\nexit(3)"
    process = subprocess.run(
        ["/bin/bash", "-c", '"$0" -c "$1" | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, program],
        cwd=ROOT, env=BUFFERED, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stdout, process.stderr) == (3, "0" * 50 + "\n", "")


def test_no_lines_print_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines([])
    assert capsys.readouterr() == ("", "")


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
