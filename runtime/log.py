"""The log of a run, ``metrics.jsonl``: one JSON object a line, and listeners that follow it."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from runtime.console import write_line
from runtime.files import first_line, json_safe
from runtime.folder import LOG

logger = logging.getLogger("train_ultimate")


class Listener(Protocol):
    """A follower of the log. One that raises any exception is dropped, with a warning."""

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """Take in an event, whose line is written already."""
        ...

    def close(self) -> None:
        """Finish: the run has ended, and all of its lines are written."""
        ...


class RunLog:
    """Log of a run: appends events to ``metrics.jsonl``.

    Each line is complete and handed to the operating system when ``event`` returns, so a killed process loses none. A
    resumed run appends: windows that it repeats appear twice, and the later line counts.

    Args:
        directory: the run's folder; None to write nothing, on ranks other than 0.
        echo: stream that gets the same lines, until it refuses one.

    Attributes:
        listeners: followers of each event; they hear nothing if nothing is written.
    """

    def __init__(self, directory: Path | None, echo: TextIO | None = None) -> None:
        self._file: FileIO | None = None
        self._beginning = b""  # the line that began the run
        self._echo = echo
        self.listeners: list[Listener] = []
        if directory is None:
            return
        path = directory / LOG
        # Unbuffered: what a full disk refuses must not be tried again, with the next line or when the file is closed.
        self._file = FileIO(str(path), "ab")  # as text, for error messages
        self._has_failed = False
        self._is_mid_line = _ends_mid_line(path)

    def event(self, event: str, **fields: Any) -> None:
        """Append a line. If the disk does not take it, it is lost, with a warning the first time."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **json_safe(fields)}, allow_nan=False)
        if event in ("run_start", "resume"):
            self._beginning = line.encode() + b"\n"
        if (error := self._append(line.encode() + b"\n")) and not self._has_failed:
            self._has_failed = True
            logger.warning(f"{self._file.name}: cannot be written ({error}); training goes on, its events are lost")
        if self._echo is not None and not write_line(self._echo, line):
            self._echo = None  # its reader has gone
        self._notify(lambda listener: listener.event(event, fields))

    def reopen(self) -> None:
        """Begin a new file, with the line that began the run, if the old one was removed or replaced.

        Raises:
            OSError: It cannot be created.
        """
        if self._file is None:
            return
        path, mine = Path(str(self._file.name)), os.fstat(self._file.fileno())
        with suppress(FileNotFoundError):
            found = path.stat()
            if (found.st_dev, found.st_ino) == (mine.st_dev, mine.st_ino):
                return
        new = FileIO(str(path), "ab")
        self._file.close()
        self._file, self._has_failed, self._is_mid_line = new, False, _ends_mid_line(path)
        logger.warning(f"{path}: was removed or replaced; it goes on in a new file, without its earlier lines")
        self._append(self._beginning)

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._notify(lambda listener: listener.close())

    def _append(self, line: bytes) -> str:
        """Write a line; return why it cannot be written, else "". After a line that was cut short, begin a new one."""
        assert self._file is not None
        data = b"\n" + line if self._is_mid_line else line
        try:
            written = self._file.write(data) or 0
        except OSError as error:
            return str(error)
        if written < len(data):  # the disk is full
            self._is_mid_line = written > 0 or self._is_mid_line
            return f"{written} of {len(data)} bytes written"
        self._is_mid_line = False
        return ""

    def _notify(self, call: Callable[[Listener], None]) -> None:
        for listener in list(self.listeners):
            try:
                call(listener)
            except Exception as error:  # a full disk, a bug in a plot: not worth a run
                self.listeners.remove(listener)
                _drop_tracebacks(error)
                logger.warning(f"{type(listener).__name__} stopped ({first_line(error)}); training goes on without it")


def _drop_tracebacks(error: BaseException | None) -> None:
    """Free the frames of an error that its raiser may keep.

    Among them is training's own with the loader, whose processes Python would wait for at its exit, for a minute.
    """
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def environment(program: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Return versions of Python and packages, and the program's git commit: "-dirty" with changes, "" without git."""
    try:
        git = ["git", "-C", str(program.parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        commit = subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = ""
    return {"git_commit": commit, "python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a fork installed under another name
        return ""


def _ends_mid_line(path: Path) -> bool:
    """Return whether the last line was cut short, by a loss of power or a full disk."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
