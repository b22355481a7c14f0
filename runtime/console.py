"""Output on the terminal while the program works: one logger, one handler, and no broken stream that ends a run.

Every module logs through ``logging.getLogger("train_ultimate")``. Severity is the record's level, never a word of the
message. ``configured`` decides what is shown:

- by default everything: information and warnings on standard output, errors on standard error;
- ``--quiet`` and ``--json-logs``: warnings and errors only, on standard error;
- ranks other than 0: nothing, because rank 0 speaks for all.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

if TYPE_CHECKING:
    from tqdm import tqdm

_PREFIXES = {logging.WARNING: "Warning: ", logging.ERROR: "error: "}
# Names of files and texts of errors come from elsewhere. On a terminal their control characters are commands: they move
# the cursor, hide lines, set its title. Some terminals obey the 8-bit ones, too; bidirectional marks reorder a line.
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """Return the text with control characters and undecodable bytes of names as backslash escapes.

    Line feeds and tabs stay.
    """
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], text)


class _Printable(logging.Filter):
    """Filter that makes messages printable, for every handler: the program's, a notebook's, a test's."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = printable(record.getMessage()), ()
        return True


logger = logging.getLogger("train_ultimate")
logger.addFilter(_Printable("train_ultimate"))


def write_line(stream: TextIO | None, text: str) -> bool:
    """Write a line and flush. Return False, and raise nothing, if the stream does not take it: the line is lost.

    The disk of a redirected log is full, the reader of a pipe has gone, a terminal was closed, there never was a
    stream: none of it is worth a run. Characters that the stream's encoding lacks become backslash escapes, as do
    those that ``printable`` escapes.
    """
    if stream is None:
        return False
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        stream.write(printable(text).encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
    except (OSError, ValueError):  # ValueError: the stream is closed
        _drop_unwritten(stream)
        return False
    return True


def _drop_unwritten(stream: TextIO) -> None:
    """Empty the buffer of a stream that cannot be flushed, by flushing it to the null device.

    Else every later flush fails too, such as tqdm's when a bar begins, and Python's at exit, which changes the exit
    code. The stream itself stays usable: a full disk may have room again.
    """
    with suppress(OSError, ValueError):  # ValueError: the stream is closed, or has no descriptor
        descriptor = stream.fileno()
        kept = os.dup(descriptor)
        try:
            with open(os.devnull, "wb") as null:
                os.dup2(null.fileno(), descriptor)
            stream.flush()
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)


class ConsoleHandler(logging.Handler):
    """Handler that writes records above the progress bars.

    Args:
        warnings_only: drop information, and write warnings to standard error too.
    """

    def __init__(self, warnings_only: bool = False) -> None:
        super().__init__(logging.WARNING if warnings_only else logging.INFO)
        self.warnings_only = warnings_only

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # 30 ms, which --help does not need

        to_stderr = self.warnings_only or record.levelno >= logging.ERROR
        stream = sys.stderr if to_stderr else sys.stdout
        with suppress(OSError, ValueError), tqdm.external_write_mode(file=stream):
            write_line(stream, _PREFIXES.get(record.levelno, "") + self.format(record))


@contextmanager
def configured(warnings_only: bool = False, silent: bool = False) -> Iterator[None]:
    """Show the program's log while the block runs.

    Args:
        warnings_only: show only warnings and errors, for ``--quiet`` and ``--json-logs``.
        silent: show nothing, on ranks other than 0.
    """
    handler = logging.NullHandler() if silent else ConsoleHandler(warnings_only)
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        for stream in filter(None, (sys.stdout, sys.stderr)):  # for text not written by ``write_line``
            try:
                stream.flush()
            except (OSError, ValueError):
                _drop_unwritten(stream)


def progress_bar(**options: Any) -> "tqdm[NoReturn]":
    """Return a tqdm bar on standard error. It is hidden if that is no terminal, or if only warnings are shown."""
    from tqdm import tqdm

    shown = any(isinstance(handler, ConsoleHandler) and not handler.warnings_only for handler in logger.handlers)
    hidden: Any = None if shown and sys.stderr is not None else True  # None: tqdm looks for a terminal
    return tqdm(**options, disable=hidden)
