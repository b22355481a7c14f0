"""How long a run still takes, from what its windows and epochs have taken."""

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from reporting.history import duration
from training.run import Run
from training.stages import Stage

FEWEST_WINDOWS, FEWEST_SECONDS = 10, 20.0  # before a first forecast: the first windows are slow
LEAST_LEFT = 120.0  # seconds; less is not worth a line
WHOLE_NETWORK = 2.5  # times as long takes a window in which the backbone learns; of operations, 2.9 times for pvt_v2_b2
_BESIDE_WINDOWS = 1.1  # an epoch's validation and save, until one has been seen
_LATEST_EPOCHS = 3  # to average


class Forecast:
    """Forecast of the time left, told by a run's events.

    Args:
        stages: the run's stages.
        num_windows: windows of an epoch.
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(self, stages: Sequence[Stage], num_windows: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._stages = {stage.number: stage for stage in stages}
        self._num_windows = num_windows
        self._clock = clock
        self._began = clock()  # the current epoch
        self._stage = 0
        self._first_window: tuple[int, float] | None = None  # of this stage here: number and time
        self._epochs: list[float] = []  # seconds of this stage's whole epochs
        self._told = False  # this stage's first forecast
        self._is_whole = False  # the current epoch was seen from its first window on

    def window(self, fields: dict[str, Any]) -> float | None:
        """Take in a "window" event. Return the seconds left, once a stage: as soon as its windows tell."""
        now = self._clock()
        if fields["stage"] != self._stage:
            self._stage, self._epochs, self._first_window = fields["stage"], [], None
            self._told = False
        if self._first_window is None:
            self._first_window = fields["global_window"], now
        if fields["window"] == 1:
            self._began, self._is_whole = now, True
        number, since = self._first_window
        seen = fields["global_window"] - number
        if self._told or self._epochs or seen < FEWEST_WINDOWS or now - since < FEWEST_SECONDS:
            return None
        self._told = True
        epoch = (now - since) / seen * self._num_windows * _BESIDE_WINDOWS
        return self._left(epoch, fields["epoch"] - 1 + fields["window"] / self._num_windows)

    def epoch(self, fields: dict[str, Any]) -> float | None:
        """Take in an "epoch" event. Return the seconds left; None if no whole epoch of the stage has been seen."""
        now = self._clock()
        if self._is_whole:
            self._epochs.append(now - self._began)
        self._began = now
        if not self._epochs:
            return None
        latest = self._epochs[-_LATEST_EPOCHS:]
        return self._left(sum(latest) / len(latest), fields["epoch"])

    def _left(self, epoch_seconds: float, done: float) -> float:
        """Return the seconds of the epochs that are left, of which ``done`` are done over both stages."""
        current = self._stages[self._stage]
        left = max(0.0, current.end_epoch - done) * epoch_seconds
        for stage in self._stages.values():
            if stage.number > current.number:
                factor = WHOLE_NETWORK if current.freeze_backbone else 1.0
                left += stage.num_epochs * epoch_seconds * factor
        return left


def forecast_of(run: Run) -> Forecast:
    """Return the forecast of a run that is about to begin."""
    return Forecast(run.stages, math.ceil(len(run.data.train_pairs) / run.data.window_size))


def describe(seconds: float, now: float | None = None) -> str:
    """Return "about 3.1 h left, until 18:40, peak 4.2 GB": memory of the GPU, or of this process.

    Args:
        seconds: the time left.
        now: time.time(), by default.
    """
    end = (time.time() if now is None else now) + seconds
    day = "" if seconds < 20 * 3600 else time.strftime("%a ", time.localtime(end))
    if seconds >= 6 * 86400:
        day = time.strftime("%d %b ", time.localtime(end))
    return f"about {duration(seconds)} left, until {day}{time.strftime('%H:%M', time.localtime(end))}, {_peak()}"


def _peak() -> str:
    if torch.cuda.is_initialized():
        return f"peak {torch.cuda.max_memory_reserved() / 1e9:.1f} GB of the GPU"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB"
