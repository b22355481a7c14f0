"""Requests from outside: SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after the current window, SIGUSR1/2 save it."""

import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

_HEARD = b"\nFinishing the current window and saving; press Ctrl-C again to end the run at once.\n"
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed, the connection lost
_SAVE = (signal.SIGUSR1, signal.SIGUSR2)  # a pre-emption that may or may not come
_REQUESTS = (*_STOP, *_SAVE)


class Signals:
    """Signals that this process has received. While entered, none of them ends the process, in any order and number.

    Only a second SIGINT does, at once, except under a launcher, which forwards every signal it receives. SIGHUP stays
    ignored if it was (``nohup``). If several processes train together, a signal to one of them counts for all, and all
    must act on it at the same window: so they act only on what they ``hear``, the sum over all processes.

    Args:
        alone: the run has a single process.
        launched: a launcher has started this process.

    Attributes:
        signal_number: SIGINT, SIGTERM or SIGHUP, once the run should end; else None.
        save: the run should be saved, and go on.
    """

    def __init__(self, alone: bool = True, launched: bool = False) -> None:
        self.alone = alone
        self.launched = launched
        self.signal_number: int | None = None
        self.save = False
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}

    def received(self) -> list[float]:
        """Return what this process has received: 1 or 0 for each of the signals."""
        return [float(number in self._received) for number in _REQUESTS]

    def hear(self, counts: Sequence[float]) -> None:
        """Act on the sums of ``received`` over all processes; a single process may pass nothing."""
        for number, count in zip(_REQUESTS, counts, strict=False):
            if count:
                self._act(number)

    def saved(self) -> None:
        """Forget the requests to save, now that the run is being saved."""
        self._received.difference_update(_SAVE)
        self.save = False

    def __enter__(self) -> "Signals":
        for number in _REQUESTS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self._received.add(number)
        if number == signal.SIGINT and not self.launched:
            signal.signal(number, self._previous[number])
            with suppress(OSError):  # not print: the signal may have interrupted one
                os.write(2, _HEARD)
        if self.alone:
            self._act(number)

    def _act(self, number: int) -> None:
        if number in _SAVE:
            self.save = True
        elif self.signal_number is None:
            self.signal_number = number
