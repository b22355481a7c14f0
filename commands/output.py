"""Output of the commands: lines on the terminal, progress bars, and checks of the files to write."""

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from runtime import console

if TYPE_CHECKING:
    from tqdm import tqdm


def print_lines(lines: Iterable[str], to_stderr: bool = False) -> None:
    """Print lines of a command's result. What the stream does not take is lost, see ``console.write_line``."""
    for line in lines:
        console.write_line(sys.stderr if to_stderr else sys.stdout, line)


def print_error(message: str) -> None:
    """Print the one line on standard error that ends a command."""
    print_lines([f"error: {message}"], to_stderr=True)


def progress_bar(total: int, unit: str, description: str | None = None) -> "tqdm[NoReturn]":
    """Return a progress bar on standard error, see ``console.progress_bar``."""
    return console.progress_bar(total=total, unit=unit, desc=description)


def require_writable(file: Path) -> None:
    """Check that a file can be written, before minutes of work.

    Raises:
        ValueError: It is a folder, or its folder is missing or read-only.
    """
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; name a file to write")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: cannot be written, there is no folder {file.parent}; create it first")
    if not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(f"{file}: cannot be written, {file.absolute().parent} is read-only; choose another place")
