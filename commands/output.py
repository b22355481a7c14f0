"""Output of the commands: lines on the terminal, progress bars, and checks of the files to write."""

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from tqdm import tqdm


def print_lines(lines: Iterable[str], to_stderr: bool = False) -> None:
    """Print lines. Whatever happens to the stream, the command goes on.

    What the stream's encoding lacks (names that are not UTF-8, umlauts on an ASCII terminal) is printed as backslash
    escapes. A stream that fails (full disk, closed pipe) drops this and all later output.
    """
    text = "".join(f"{line}\n" for line in lines)
    stream = sys.stderr if to_stderr else sys.stdout
    if stream is None:  # closed before the program started
        return
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        with suppress(OSError, ValueError), open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), stream.fileno())  # or else Python fails to flush the rest when it exits


def print_error(message: str) -> None:
    """Print the one line on stderr that ends a command."""
    print_lines([f"error: {message}"], to_stderr=True)


def progress_bar(total: int, unit: str, description: str | None = None) -> "tqdm[NoReturn]":
    """Return a progress bar on stderr, which shows only on a terminal."""
    from tqdm import tqdm  # 60 ms that --help need not wait for

    disable: Any = True if sys.stderr is None else None  # None: decided by tqdm
    return tqdm(total=total, unit=unit, desc=description, disable=disable)


def require_writable(file: Path) -> None:
    """Check that a file can be written, before minutes of work.

    Raises:
        ValueError: it is a folder, or its folder is missing or read-only.
    """
    if file.is_dir():
        raise ValueError(f"{file}: is a folder; name a file to write")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file}: cannot be written, there is no folder {file.parent}; create it first")
    if not os.access(file.absolute().parent, os.W_OK):
        raise ValueError(f"{file}: cannot be written, {file.absolute().parent} is read-only; choose another place")
