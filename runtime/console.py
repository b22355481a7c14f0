"""What a run says on the terminal, where it is not to say everything, and where nobody is left to hear it."""

import io
import re
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    pass

_WORTH_A_LOOK = re.compile(  # the last: an incident
    r"\s*Warning|Unreadable:|Out of memory|Passed over |Set aside |Ignored |Epoch \d+, window \d+:"
)


class LastingStream:
    """Standard output or error of a run, which no line of it can end.

    What cannot be written is lost: the disk of a redirected log is full, whoever read the pipe has gone, the stream was
    closed from the start. What its encoding does not have is written as backslash escapes.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

    @classmethod
    def of(cls, stream: Any) -> Any:
        """For ``sys.stdout`` and ``sys.stderr``; a stream that lasts already comes back as it is."""
        return stream if isinstance(stream, cls | OnlyWarnings) else cls(stream)

    def write(self, text: str) -> int:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            with suppress(OSError, ValueError):
                self._stream.flush()

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        """Everything else is the stream's."""
        return getattr(self._stream, name)


class OnlyWarnings(io.TextIOBase):
    """Stands in for standard output: passes on warnings and incidents, as whole lines, and nothing else.

    Args:
        to: standard error, for one; None: nothing is passed on, since of several processes one tells for all.
    """

    def __init__(self, to: LastingStream | None) -> None:
        self._to = to
        self._line = ""
        self._lock = threading.Lock()  # checkpoints are written in another thread, which may have to warn

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
            for line in lines:
                if self._to is not None and _WORTH_A_LOOK.match(line):
                    self._to.write(line + "\n")
                    self._to.flush()
        return len(text)
