"""What training costs: measured in a short trial, and from that the time, memory and disk of a whole run."""

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from data.sampler import drawn
from training.run import Run
from training.settings import Settings
from training.stages import build_stages

_AROUND = 7.0  # seconds that the program's start and the report at its end take
_GROWTH = 1.15  # of a process's memory in the course of a run: 1.1 to 1.2, because what was freed is kept in pieces
_FIRST = 2  # windows of a stage that are no measure: kernels are chosen, memory is taken
_FEWEST = 2  # windows that are one
_CONTEXT = 0.7e9  # bytes of a GPU that CUDA takes beside torch's allocator
_STAGE_1 = 0.4  # cost of a window whose backbone is frozen, of one in which all learns; if it was not measured
_FORWARD = 0.35  # cost of a validation image, of a training image; if it was not measured
# A window on several GPUs, of one on a single GPU: docs/scaling.md models the exchange of gradients.
_EXCHANGE = 1.05


@dataclass(frozen=True)
class Costs:
    """What a trial has measured, in seconds and bytes.

    Attributes:
        start: from the start of ``prepare`` to the first window, without decoding into a cache.
        windows: stage -> of a window, the mean over the scales of ``--multi-scale``.
        epoch: beside windows and validation, per epoch.
        validation: per image.
        precision: number format that was chosen.
        memory: most memory, of the GPU or of the process.
        checkpoint: size of a checkpoint's file.
        decoding: per image, into a cache.
    """

    start: float
    windows: dict[int, float]
    epoch: float
    validation: float
    precision: str
    memory: float
    checkpoint: float
    decoding: float = 0.0


@dataclass(frozen=True)
class RunCosts:
    """Forecast for a whole run, in seconds and bytes."""

    seconds: float
    stages: dict[int, float]
    memory: float
    disk: float


def forecast(settings: Settings, num_images: int, num_validated: int, costs: Costs, num_ranks: int = 1) -> RunCosts:
    """Forecast a run's time, memory and disk.

    Args:
        settings: of the run.
        num_images: photographs to train on.
        num_validated: photographs to validate on.
        costs: measured with these settings, on one rank.
        num_ranks: processes that train together.
    """
    num_windows = math.ceil(num_images / (settings.batch_size * settings.accumulation_steps * num_ranks))
    exchange = _EXCHANGE if num_ranks > 1 else 1.0
    stages = {
        stage.number: stage.num_epochs
        * (
            num_windows * costs.windows[stage.number] * exchange
            + costs.epoch
            + num_validated * costs.validation / num_ranks
        )
        for stage in build_stages(settings)
    }
    total = num_images + num_validated
    decoding = total * costs.decoding if settings.cache else 0.0
    cached = 4 * settings.img_size**2 * total if settings.cache else 0
    files = (settings.keep_checkpoints + 2) * costs.checkpoint  # the best one, and one that is being written
    return RunCosts(_AROUND + costs.start + decoding + sum(stages.values()), stages, costs.memory, files + cached)


class Meter:
    """Listener that times a trial's windows, validation and saves, and ends it.

    Args:
        run: the trial.
        began: when its preparation began, by ``clock``.
        seconds: time for each stage's windows.
        clock: seconds, as ``time.monotonic``.
    """

    def __init__(self, run: Run, began: float, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._clock = run, clock
        self._start, self._seconds = clock() - began, seconds
        self._latest = clock()  # event
        num_images, window_size = len(run.data.images), run.data.window_size
        self._short_window = -(-num_images // window_size) if num_images % window_size else None  # of each epoch
        self._stage_began = math.nan
        self._windows: dict[int, list[tuple[float, float]]] = {}  # stage -> seconds and scale of each
        self._validations: list[float] = []  # seconds per image
        self._epochs: list[float] = []  # seconds between epochs, and a window

    def event(self, event: str, fields: dict[str, Any]) -> None:
        """Take in an event."""
        now, before = self._clock(), self._latest
        if event == "window":
            self._latest = now
            self._window(fields, now - before, now)
        elif event == "epoch":
            self._latest = now
            self._validations.append((now - before) / len(self._run.data.validation))

    def _window(self, fields: dict[str, Any], seconds: float, now: float) -> None:
        of_stage = self._windows.setdefault(fields["stage"], [])
        if not of_stage:
            self._stage_began = now
        scale = drawn(self._run.settings.multi_scale, self._run.settings.seed, fields["global_window"])
        if fields["window"] == 1 and self._validations:
            self._epochs.append(seconds)
        elif fields["window"] != self._short_window:
            of_stage.append((seconds, scale))
        is_last = fields["stage"] == self._run.stages[-1].number
        if is_last and len(of_stage) >= _FIRST + _FEWEST and now - self._stage_began > self._seconds:
            self._run.signals.time_is_up = True

    def close(self) -> None:
        """Do nothing: what was measured is read afterwards."""

    def costs(self, decoding: float, checkpoint: float) -> Costs:
        """Return what the trial cost.

        Args:
            decoding: seconds per photograph that went into its cache; 0 without one.
            checkpoint: bytes of a checkpoint's file.

        Raises:
            ValueError: It ended before enough windows were trained.
        """
        scales = self._run.settings.multi_scale
        windows = {stage: _mean_over(scales, of_stage) for stage, of_stage in self._windows.items() if of_stage}
        last = self._run.stages[-1].number
        if last not in windows:
            raise ValueError("no window was trained in the time for a trial: this machine is too slow for it")
        for stage in self._run.stages:
            windows.setdefault(stage.number, _STAGE_1 * windows[last])
        window = windows[self._run.stages[0].number]
        per_image = window / min(self._run.data.window_size, len(self._run.data.images))
        validation = _steady(self._validations, _FORWARD * per_image)
        epoch = max(0.0, _steady(self._epochs, window) - window)
        start = self._start - decoding * (len(self._run.data.images) + len(self._run.data.validation))
        precision = self._run.machine.precision.name
        return Costs(max(0.0, start), windows, epoch, validation, precision, peak_memory(), checkpoint, decoding)


def _steady(values: list[float], default: float) -> float:
    """Return the median without the first value, which is often no measure; the default if there is none."""
    return statistics.median(values[1:] or values or [default])


def _mean_over(scales: list[float], windows: list[tuple[float, float]]) -> float:
    """Return the mean seconds of a window over all scales, from windows with theirs.

    A scale that was not drawn costs what the others do by its area.
    """
    measured = windows[_FIRST:] if len(windows) >= _FIRST + _FEWEST else windows[-1:]
    rate = sum(seconds for seconds, _ in measured) / sum(scale**2 for _, scale in measured)
    of_scale = {scale: [seconds for seconds, own in measured if own == scale] for scale in scales}
    return statistics.mean(statistics.mean(times or [rate * scale**2]) for scale, times in of_scale.items())


def peak_memory() -> float:
    """Return the most bytes that a run of this process's settings takes, of the GPU if it uses one."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_reserved() + _CONTEXT
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit * _GROWTH)
