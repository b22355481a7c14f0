"""Requests from outside: SIGINT (Ctrl-C) and SIGTERM end a run after the window under way, SIGUSR1 has it saved."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

_HEARD = b"\nThe window under way is finished, then the state saved; Ctrl-C once more ends the run at once.\n"
_REQUESTS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Signals:
    """While entered, remembers the first SIGINT or SIGTERM instead of dying of it; a second one acts at once.

    Under a launcher, which passes on what it receives itself, a second one changes nothing. Where several processes
    train together, a request to any of them is one to all, and all must act on it at the same window: then what counts
    is not what this process has received, but what ``hear`` has added up.

    Args:
        alone: no other process takes part.
        launched: by a launcher.

    Attributes:
        signal_number: of the SIGINT or SIGTERM to act upon, or None.
        save: SIGUSR1, notice of a pre-emption that may or may not come, is to be acted upon.
    """

    def __init__(self, alone: bool = True, launched: bool = False) -> None:
        self.alone = alone
        self.launched = launched
        self.signal_number: int | None = None
        self.save = False
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}

    def received(self) -> list[float]:
        """What this process has received, for the others: 1 or 0 for each of SIGINT, SIGTERM, SIGUSR1."""
        return [float(number in self._received) for number in _REQUESTS]

    def hear(self, counts: Sequence[float]) -> None:
        """What all processes have received: ``received``, added up; nothing at all where there are no others."""
        for number, count in zip(_REQUESTS, counts, strict=False):
            if count:
                self._act(number)

    def saved(self) -> None:
        self._received.discard(signal.SIGUSR1)
        self.save = False

    def __enter__(self) -> "Signals":
        for number in _REQUESTS:
            self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received.add(number)
        if number != signal.SIGUSR1 and not self.launched:
            self.__exit__()
            if number == signal.SIGINT:
                with suppress(OSError):  # no print: this may have struck in the midst of one
                    os.write(2, _HEARD)
        if self.alone:
            self._act(number)

    def _act(self, number: int) -> None:
        if number == signal.SIGUSR1:
            self.save = True
        elif self.signal_number is None:
            self.signal_number = number
