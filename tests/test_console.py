"""Output on the terminal: what is shown in a pipe, with --quiet, with --json-logs, and on streams that are broken."""

import fcntl
import io
import json
import logging
import os
import pty
import shlex
import struct
import subprocess
import sys
import termios
import threading
import unicodedata
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import Argv, train
from hypothesis import given
from hypothesis import strategies as st
from launching import read_events

import train_ultimate
from runtime import console
from runtime.console import ConsoleHandler, configured, write_line

ROOT = Path(train_ultimate.__file__).parent
DRILL = ("--drill", "bad-sample@2")
SHORT = ("--epochs", "2", "--stage1-epochs", "1")
needs_full_disk = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

LINES = """
from runtime import console
with console.configured():
    console.logger.info("one")
    console.logger.warning("two")
    console.logger.error("three")
    for _ in range(2):
        console.progress_bar(total=3).close()
raise SystemExit(7)
"""


def run(*argv: str, stdout: int = subprocess.PIPE) -> "subprocess.CompletedProcess[str]":
    command, environment = [sys.executable, train_ultimate.__file__, *argv], {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False, env=environment)


def run_lines(redirection: str, program: str = LINES) -> "subprocess.CompletedProcess[str]":
    """Run a few lines of Python with a shell's redirection, and with Python's usual buffers."""
    command = f'exec "$0" -c "$1" {redirection}'
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.run(
        ["sh", "-c", command, sys.executable, program], cwd=ROOT, env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip


def run_on_terminal(program: str, stdout: str | None = None) -> tuple[int, str]:
    """Run a few lines of Python whose standard error is a terminal, 80 columns wide, and read what it shows.

    Args:
        program: the lines.
        stdout: a file for standard output; None for the same terminal.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    with open(stdout or os.ttyname(theirs), "w") as out:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdin=theirs, stdout=out, stderr=theirs, env=environment
        )
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # EIO: the last process has closed the terminal
        while part := os.read(ours, 4096):
            shown += part
    os.close(ours)
    return process.wait(), shown.decode()


# --- one line ---


@pytest.mark.parametrize(
    ("encoding", "expected"), [("ascii", rb"f\xfcnf \udce9"), ("utf-8", "fünf ".encode() + rb"\udce9")]
)
def test_characters_that_an_encoding_lacks_are_escaped(encoding: str, expected: bytes) -> None:
    data = io.BytesIO()
    stream = io.TextIOWrapper(data, encoding, newline="\n")
    assert write_line(stream, "fünf " + os.fsdecode(b"\xe9"))
    assert data.getvalue() == expected + b"\n"


def test_control_characters_of_names_and_errors_do_not_reach_the_terminal(caplog: pytest.LogCaptureFixture) -> None:
    r"""Else a file named ``\\x1b[2J`` clears the screen, and one with a carriage return rewrites its own line."""
    stream = io.StringIO()
    for text in ("\x1b[2Ja", "a\rb", "\x9b1A", "\x07", "a\u202eb", "\udce9"):
        with caplog.at_level(logging.INFO, "train_ultimate"):
            console.logger.info("%s: cannot be decoded", text)
        assert write_line(stream, text)
    expected = [r"\x1b[2Ja", r"a\rb", r"\x9b1A", r"\x07", r"a\u202eb", r"\udce9"]
    assert stream.getvalue().splitlines() == expected
    assert caplog.messages == [f"{text}: cannot be decoded" for text in expected]


@given(st.text())
def test_printable_text_is_left_as_it_is(text: str) -> None:
    clean = console.printable(text)
    assert console.printable(clean) == clean
    assert clean == text or any(unicodedata.category(character) in ("Cc", "Cs", "Cf", "Zl", "Zp") for character in text)


def test_line_is_written_at_once(tmp_path: Path) -> None:
    with open(tmp_path / "out", "w") as stream:
        assert write_line(stream, "first")
        assert (tmp_path / "out").read_text() == "first\n"


def closed_stream() -> io.TextIOBase:
    stream = io.StringIO()
    stream.close()
    return stream


def pipe_without_reader() -> io.TextIOBase:
    read, write = os.pipe()
    os.close(read)
    return os.fdopen(write, "w")


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(lambda: None, id="none"),
        pytest.param(closed_stream, id="closed"),
        pytest.param(pipe_without_reader, id="no-reader"),
        pytest.param(lambda: open("/dev/full", "w"), id="full-disk", marks=needs_full_disk),
    ],
)
def test_stream_that_takes_nothing_is_no_error_and_nothing_stays_in_its_buffer(
    broken: Callable[[], io.TextIOWrapper | None],
) -> None:
    stream = broken()
    for _ in range(3):
        assert not write_line(stream, "lost")
    if stream is not None and not stream.closed:
        stream.flush()  # as Python does at exit, and tqdm when a bar begins
        stream.close()


def test_stream_that_has_room_again_takes_the_next_line(tmp_path: Path) -> None:
    """The descriptor is a full disk at first, and a file later; the line lost in between does not come up again."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as stream, open(tmp_path / "out", "wb") as file:
        assert not write_line(stream, "lost")
        os.dup2(file.fileno(), stream.fileno())
        assert write_line(stream, "next")
    assert (tmp_path / "out").read_text() == "next\n"


def test_lost_line_leaves_no_descriptor_open() -> None:
    with pipe_without_reader() as stream:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        for _ in range(5):
            assert not write_line(stream, "lost")  # type: ignore[arg-type]
        assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


# --- levels ---


def log_everything() -> None:
    console.logger.debug("detail")
    console.logger.info("progress")
    console.logger.warning("--exclude gone.txt: no such file; what it named is left out")
    console.logger.warning("   no word at the start says that this is a warning")
    console.logger.error("bad")


WARNINGS = (
    "Warning: --exclude gone.txt: no such file; what it named is left out\n"
    "Warning:    no word at the start says that this is a warning\n"
)


@pytest.mark.parametrize(
    ("options", "out", "err"),
    [
        ({}, "progress\n" + WARNINGS, "error: bad\n"),
        ({"warnings_only": True}, "", WARNINGS + "error: bad\n"),
        ({"silent": True}, "", ""),
        ({"silent": True, "warnings_only": True}, "", ""),
    ],
)
def test_level_of_a_message_decides_where_it_is_shown(
    options: dict[str, bool], out: str, err: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with configured(**options):
        log_everything()
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (out, err)


@pytest.mark.parametrize("silent", [False, True])
def test_logging_is_afterwards_as_it_was_before(silent: bool, capsys: pytest.CaptureFixture[str]) -> None:
    handlers, level = list(console.logger.handlers), console.logger.level
    with configured(silent=silent):
        assert len(console.logger.handlers) == len(handlers) + 1
    with pytest.raises(KeyError), configured(silent=silent):
        raise KeyError
    assert (console.logger.handlers, console.logger.level) == (handlers, level)
    capsys.readouterr()
    console.logger.info("nobody asks for this")
    assert capsys.readouterr() == ("", "")


def test_lines_come_out_once_after_runs_in_one_process(capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(3):
        with configured():
            console.logger.info("once")
        assert capsys.readouterr().out == "once\n"


def test_other_libraries_are_not_shown_and_keep_their_levels(capsys: pytest.CaptureFixture[str]) -> None:
    root, other = logging.getLogger(), logging.getLogger("another.library")
    before = root.level, list(root.handlers), other.level
    with configured():
        other.info("not ours")
        assert (root.level, list(root.handlers), other.level) == before
    assert "not ours" not in "".join(capsys.readouterr())


def test_lines_of_two_threads_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints are written, and complained about, in a thread of their own."""
    with open(tmp_path / "out", "w") as stream, configured():
        monkeypatch.setattr(sys, "stdout", stream)
        threads = [
            threading.Thread(target=lambda letter=letter: [console.logger.info(letter * 50) for _ in range(200)])
            for letter in "ab"
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        monkeypatch.undo()
    assert sorted((tmp_path / "out").read_text().splitlines()) == ["a" * 50] * 200 + ["b" * 50] * 200


# --- broken streams, and the exit code ---


@needs_full_disk
@pytest.mark.parametrize(
    ("redirection", "out", "err"),
    [
        ("", "one\nWarning: two\n", "error: three\n"),
        (">/dev/full", "", "error: three\n"),
        ("2>/dev/full", "one\nWarning: two\n", ""),
        (">&-", "", "error: three\n"),
        ("2>&-", "one\nWarning: two\n", ""),
        (">&- 2>&-", "", ""),
        (">/dev/full 2>/dev/full", "", ""),
    ],
)
def test_broken_stream_changes_neither_the_other_one_nor_the_exit_code(redirection: str, out: str, err: str) -> None:
    process = run_lines(redirection)
    assert (process.returncode, process.stdout, process.stderr) == (7, out, err)


@needs_full_disk
def test_text_that_others_have_printed_changes_no_exit_code_either() -> None:
    process = run_lines(">/dev/full", "from runtime import console\nwith console.configured():\n    print('raw')")
    assert (process.returncode, process.stderr) == (0, "")


def test_reader_that_goes_changes_no_exit_code() -> None:
    program = LINES.replace("two", "two' * 100_000 + '").replace('"', "'")  # more than a pipe holds
    process = subprocess.run(
        ["/bin/bash", "-c", '"$0" -c "$1" 2>/dev/null | head -n 1; exit ${PIPESTATUS[0]}', sys.executable, program],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (7, "one\n")


# --- progress bars ---

BAR = """
from runtime import console
with console.configured({options}):
    console.logger.info("first")
    bar = console.progress_bar(total=4, desc="Epoch 1/2")
    bar.update(2)
    bar.refresh()
    console.logger.warning("spike")
    bar.close()
    console.progress_bar(total=4, desc="Epoch 2/2").close()
"""


def test_messages_are_written_above_the_progress_bar() -> None:
    code, shown = run_on_terminal(BAR.format(options=""))
    assert code == 0
    before, _, after = shown.partition("Warning: spike\r\n")
    assert before.startswith("first\r\n")
    cleared = before.rpartition("\r ")[2]  # blanks over the bar, and back to the start of the line
    assert cleared.strip(" ") == "\r"
    assert "Epoch 1/2:  50%" in before
    assert after.lstrip("\r").startswith("Epoch 1/2:  50%")  # drawn again below


def test_bar_is_hidden_if_only_warnings_are_shown() -> None:
    code, shown = run_on_terminal(BAR.format(options="warnings_only=True"))
    assert (code, shown) == (0, "Warning: spike\r\n")


def test_bar_is_hidden_on_other_ranks() -> None:
    assert run_on_terminal(BAR.format(options="silent=True")) == (0, "")


@needs_full_disk
def test_full_disk_of_redirected_output_does_not_end_the_bar_on_the_terminal() -> None:
    """A bar that begins flushes standard output too, and must find nothing there that cannot be written."""
    code, shown = run_on_terminal(BAR.format(options=""), stdout="/dev/full")
    assert code == 0
    assert "Epoch 2/2" in shown


def test_bar_needs_no_standard_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", None)
    with configured(), console.progress_bar(total=2) as bar:
        bar.update()


def test_handler_writes_to_the_streams_of_the_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    handler, streams = ConsoleHandler(), [io.StringIO(), io.StringIO()]
    for stream in streams:
        monkeypatch.setattr(sys, "stdout", stream)
        handler.handle(logging.LogRecord("train_ultimate", logging.INFO, "", 0, "%d epochs", (3,), None))
    assert [stream.getvalue() for stream in streams] == ["3 epochs\n"] * 2


# --- whole runs ---


@pytest.mark.slow
def test_in_a_pipe_there_are_only_lines_and_one_names_each_epoch(tiny_argv: Argv) -> None:
    result = run(*tiny_argv(*SHORT))
    assert result.returncode == 0, result.stderr
    assert not {"\r", "\x1b"} & set(result.stdout + result.stderr)
    assert [line for line in result.stdout.splitlines() if line.startswith("Epoch")] == ["Epoch 1/2", "Epoch 2/2"]


def test_last_line_is_the_next_command_and_it_works(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_argv(*SHORT)) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: ")]
    command = shlex.split(line)
    assert command[3] == "evaluate"
    assert train_ultimate.main(command[3:]) == 0


@pytest.mark.slow
def test_quiet_shows_incidents_and_nothing_else(tiny_argv: Argv) -> None:
    result = run(*tiny_argv(*SHORT, "--quiet", *DRILL))
    assert result.returncode == 0
    assert result.stdout == ""
    assert "Epoch 1, window 2: nonfinite" in result.stderr
    assert "quarantined" in result.stderr
    assert "Loss:" not in result.stderr
    assert all(line.startswith("Warning: ") for line in result.stderr.splitlines())


def test_quiet_shows_warnings_of_the_start_too(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The file that --exclude names has gone when the run is resumed."""
    exclude = tmp_path / "exclude.txt"
    exclude.write_text("TrainDataset/Imgs/scene_00000.jpg\nnowhere.jpg\n")
    flags = (*SHORT, "--quiet", "--grad-clip", "100", "--exclude", str(exclude))  # no warning of large norms
    assert train(tiny_argv(*flags, "--epochs", "1", "--stage1-epochs", "0")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"Warning: --exclude {exclude}: 1 paths match no training pair, the first: nowhere.jpg\n"
    exclude.unlink()
    assert train(tiny_argv(*flags, "--resume", "auto")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert f"Warning: --exclude {exclude}: no such file; what it named when the checkpoint was" in captured.err
    assert all(line.startswith("Warning: ") for line in captured.err.splitlines())


@pytest.mark.slow
def test_json_logs_are_the_lines_of_the_log(tiny_argv: Argv, tmp_path: Path) -> None:
    result = run(*tiny_argv(*SHORT, "--json-logs", *DRILL))
    assert result.returncode == 0
    assert result.stdout == (tmp_path / "run" / "metrics.jsonl").read_text()
    assert json.loads(result.stdout.splitlines()[-1])["event"] == "run_end"
    assert "Epoch 1, window 2: nonfinite" in result.stderr


@pytest.mark.slow
def test_reader_of_json_logs_that_has_gone_costs_nothing(tiny_argv: Argv, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    result = run(*tiny_argv(*SHORT, "--json-logs"), stdout=write)
    os.close(write)
    assert result.returncode == 0, result.stderr
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "redirected",
    [
        pytest.param(">/dev/full", id="full"),
        pytest.param("--quiet 2>/dev/full", id="quiet", marks=pytest.mark.slow),
        pytest.param(">&- 2>&-", id="closed", marks=pytest.mark.slow),
        pytest.param("| head -n 1", id="gone", marks=pytest.mark.slow),
    ],
)
def test_terminal_that_takes_nothing_costs_nothing(tiny_argv: Argv, tmp_path: Path, redirected: str) -> None:
    """A log on a full disk, closed streams, a reader that goes: nobody hears of an incident and of the end."""
    command = shlex.join([sys.executable, train_ultimate.__file__, *tiny_argv(*SHORT, *DRILL)])
    subprocess.run(
        ["/bin/bash", "-c", f"{command} {redirected}; exit ${{PIPESTATUS[0]}}"], check=True, capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 0
    assert (tmp_path / "run" / "epoch_0002.pth").exists()
