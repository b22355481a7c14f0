"""What a run leaves behind to be read: ``metrics.jsonl``, one JSON object a line, and ``config.json``."""

import importlib.metadata
import json
import logging
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, Protocol, TextIO

from runtime.console import write_line
from runtime.files import first_line, json_safe
from runtime.folder import LOG

logger = logging.getLogger("train_ultimate")


class Listener(Protocol):
    """Is told what the log is told. Whatever it raises costs a warning, and it is told no more."""

    def event(self, event: str, fields: dict[str, Any]) -> None: ...

    def close(self) -> None:
        """The run has ended, and all of its lines are written."""
        ...


class RunLog:
    """Appends events to ``metrics.jsonl``.

    Each line is complete and flushed to the operating system when ``event`` returns, so a killed process loses none. A
    resumed run appends: windows it repeats appear twice, the later line counts.

    Args:
        directory: of the run; None for one of several processes that is not the one to write.
        echo: gets the same lines, until it is closed.

    Attributes:
        listeners: told of each event after it is written; none where nothing is.
    """

    def __init__(self, directory: Path | None, echo: TextIO | None = None) -> None:
        self._file: FileIO | None = None
        self._echo = echo
        self.listeners: list[Listener] = []
        if directory is None:
            return
        path = directory / LOG
        # Unbuffered: what a full disk has refused must not be tried again, with the next line or when it is closed.
        self._file = FileIO(str(path), "ab")  # as text: it is in the messages of errors
        self._has_failed = False
        self._in_mid_line = _ends_in_mid_line(path)

    def event(self, event: str, **fields: Any) -> None:
        """Append a line; one that the disk does not take is lost, with a warning the first time."""
        if self._file is None:
            return
        line = json.dumps({"event": event, "time": round(time.time(), 3), **json_safe(fields)}, allow_nan=False)
        if (error := self._append(line.encode() + b"\n")) and not self._has_failed:
            self._has_failed = True
            logger.warning(f"{self._file.name}: cannot be written ({error}); training goes on, its events are lost")
        self._say(line)
        self._tell(lambda listener: listener.event(event, fields))

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._tell(lambda listener: listener.close())

    def _append(self, line: bytes) -> str:
        """Write a line, on a line of its own after one that was cut short; why it cannot be written, or nothing."""
        assert self._file is not None
        data = b"\n" + line if self._in_mid_line else line
        try:
            written = self._file.write(data) or 0
        except OSError as error:
            return str(error)
        if written < len(data):  # the disk was full after so much of it
            self._in_mid_line = written > 0 or self._in_mid_line
            return f"{written} of {len(data)} bytes written"
        self._in_mid_line = False
        return ""

    def _say(self, line: str) -> None:
        if self._echo is not None and not write_line(self._echo, line):
            self._echo = None  # its reader has gone

    def _tell(self, call: Callable[[Listener], None]) -> None:
        for listener in list(self.listeners):
            try:
                call(listener)
            except Exception as error:  # a full disk, a bug in what draws: none of it is worth a run
                self.listeners.remove(listener)
                logger.warning(f"{type(listener).__name__} stopped ({first_line(error)}); training goes on without it")


def environment(program: Path, packages: Sequence[str]) -> dict[str, Any]:
    """Versions and, where the program lies in a git checkout, its commit ("-dirty" with local changes)."""
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


def _ends_in_mid_line(path: Path) -> bool:
    """True where power was lost, or a disk ran full, while a line was being written."""
    with open(path, "rb") as file:
        if file.seek(0, os.SEEK_END) == 0:
            return False
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
