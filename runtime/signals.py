"""Requests from outside: SIGINT (Ctrl-C), SIGTERM and SIGHUP end a run after the current window, SIGUSR1/2 save it.

So does the end of its time, ``--max-hours``: a request like the others, which one rank makes for all.
"""

import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType
from typing import Any

_HEARD = b"\nFinishing the current window and saving; press Ctrl-C again to end the run at once.\n"
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # SIGHUP: the terminal was closed, the connection lost
_SAVE = (signal.SIGUSR1, signal.SIGUSR2)  # a pre-emption that may or may not come
_REQUESTS = (*_STOP, *_SAVE)
# Kept back of a run's time, for its last window, the save and the report: a share, but at least and at most so much.
_KEPT_BACK, _LEAST_KEPT_BACK, _MOST_KEPT_BACK = 0.02, 20.0, 300.0


class Signals:
    """Signals that this process has received. While entered, none of them ends the process, in any order and number.

    Only a second SIGINT does, at once, except under a launcher, which forwards every signal it receives. SIGHUP stays
    ignored if it was (``nohup``). If several processes train together, a signal to one of them counts for all, and all
    must act on it at the same window: so they act only on what they ``hear``, the sum over all processes.

    Args:
        alone: the run has a single process.
        launched: a launcher has started this process.
        began: time.monotonic() when the run's time began to count.
        seconds: its time; None for no limit.

    Attributes:
        signal_number: SIGINT, SIGTERM or SIGHUP, once the run should end by one; else None.
        time_is_up: the run should end, because its time does.
        save: the run should be saved, and go on.
    """

    def __init__(
        self, alone: bool = True, launched: bool = False, began: float = 0.0, seconds: float | None = None
    ) -> None:
        self.alone = alone
        self.launched = launched
        self.signal_number: int | None = None
        self.time_is_up = False
        self.save = False
        self._deadline, self._kept_back = None, 0.0
        if seconds is not None:
            self._deadline = began + seconds
            self._kept_back = min(seconds / 2, max(_LEAST_KEPT_BACK, min(_MOST_KEPT_BACK, _KEPT_BACK * seconds)))
        self._heard_at: float | None = None
        self._longest = 0.0  # seconds from one hearing to the next
        self._received: set[int] = set()
        self._previous: dict[int, Any] = {}

    def received(self) -> list[float]:
        """Return what this process has received: 1 or 0 for each of the signals, then for the end of its time."""
        return [*(float(number in self._received) for number in _REQUESTS), float(self._ends_soon())]

    def hear(self, counts: Sequence[float]) -> None:
        """Act on the sums of ``received`` over all processes; a single process may pass nothing.

        Call at least once a window: two of the longest times between calls are kept back of the run's time.
        """
        now = time.monotonic()
        if self._heard_at is not None:
            self._longest = max(self._longest, now - self._heard_at)
        self._heard_at = now
        *of_signals, of_time = counts or self.received()
        for number, count in zip(_REQUESTS, of_signals, strict=False):
            if count:
                self._act(number)
        self.time_is_up |= of_time > 0

    @property
    def stop(self) -> bool:
        """The run should end, for whichever reason."""
        return self.signal_number is not None or self.time_is_up

    def _ends_soon(self) -> bool:
        if self._deadline is None:
            return False
        return time.monotonic() + max(self._kept_back, 2 * self._longest) > self._deadline

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
