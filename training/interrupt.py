"""Requests from outside: SIGINT (Ctrl-C) and SIGTERM end a run after the window under way, SIGUSR1 has it saved."""

import signal
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, remembers the first SIGINT or SIGTERM instead of dying of it; a second one acts at once.

    Attributes:
        signal_number: of the SIGINT or SIGTERM received, or None.
        save: SIGUSR1 has been received, notice of a pre-emption that may or may not come. Whoever saves sets it back.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self.save = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._receive)
        self._previous[signal.SIGUSR1] = signal.signal(signal.SIGUSR1, self._receive_notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.signal_number = number
        self.__exit__()

    def _receive_notice(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True
