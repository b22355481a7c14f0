"""What a run says on the terminal where it is not to say everything."""

import io
import re
import sys

_WORTH_A_LOOK = re.compile(r"\s*Warning|Unreadable:|Out of memory|Epoch \d+, window \d+:")  # the last: an incident


class OnlyWarnings(io.TextIOBase):
    """Stands in for standard output: passes on warnings and incidents, as lines on standard error, and nothing else.

    Args:
        passes: warnings; without, nothing: of several processes one tells for all.
    """

    def __init__(self, passes: bool = True) -> None:
        self.passes = passes
        self._line = ""

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            if self.passes and _WORTH_A_LOOK.match(line):
                print(line, file=sys.stderr, flush=True)
        return len(text)
