"""What commands print and write."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path


def print_lines(lines: Iterable[str], to_stderr: bool = False) -> None:
    """Print, whatever file names hold, and whoever reads along: ``| head`` has seen enough some time."""
    stream = sys.stderr if to_stderr else sys.stdout
    try:
        for line in lines:
            print(line.encode(errors="backslashreplace").decode(), file=stream)  # names that are not UTF-8
        stream.flush()
    except BrokenPipeError:  # what comes now must go somewhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def require_writable(file: Path) -> None:
    """Before minutes of work, not after.

    Raises:
        ValueError: nothing of that name can be written.
    """
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; name a file to write")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: cannot be written, there is no folder {file.parent}; create it first")
    if not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(f"{file}: cannot be written, {file.absolute().parent} is read-only; choose another place")
