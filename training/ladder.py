"""The recovery ladder: what to do about a window that was not applied, or a loss that runs away.

    skip -> run again -> run again in fp32 -> localise and quarantine -> roll back -> fp32 for good -> stop

Policy only: numbers in, action out. The gate has already skipped the window, on the device.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Self

from runtime.machine import PrecisionName
from training.gate import StepVerdict, WindowOutcome

OVERFLOWS_IN_A_ROW = 4  # routine: so loss scaling finds its ceiling
MOST_BAD, BAD_AMONG = 8, 50  # skipped windows among the most recent ones that cause a rollback
SPAN = 40  # applied windows over which losses are averaged
HIGH_LOSS_FACTOR, HIGH_LOSS_DEVIATIONS, HIGH_LOSSES_IN_A_ROW = 2.0, 2.0, 5  # if above both: training runs away
JUMP_FACTOR, JUMP_ERRORS = 1.2, 5.5  # of a span's mean over the span before it: likewise, if above both
RISE_FACTOR, RISE_ERRORS = 1.5, 11.0  # of two spans' mean over the lowest so far: likewise
DRIFT = 1.0001  # of the lowest mean, per window: twice the loss after 7,000 windows is no rise
SOUND = 0.5  # of the rise that is too much; up to it, weights are worth keeping
LEAST_LOSS = 1e-3  # smaller ones count as this
PROGRESS_WINDOWS = 200  # applied after a rollback: it has helped, and the next one counts as the first again
LEAST_LR_FACTOR = 2.0**-10  # ten rollbacks: a run that needs more does not learn
SPIKES_IN_COMMON = 3  # with the same image in their windows: it is at fault
FIRST_QUARANTINE = 2  # epochs; doubled by each further offence
AFTER_QUARANTINE = 3  # attempts: 0 first, 1 again, 2 in fp32, 3 without the samples at fault


class Action(StrEnum):
    """The next rung of the ladder."""

    GO_ON = "go on"
    RETRY = "run again"
    RETRY_FULL_PRECISION = "run again in fp32"
    LOCALISE = "localise"
    ROLL_BACK = "roll back"


@dataclass
class LossHistory:
    """The newest losses, which show training running away in three ways, from fast to slow.

    - Five losses in a row are far above the mean.
    - The mean has jumped: that of the last 40 windows is a fifth above that of the 40 before, and the 40 before those
      were not rising as fast. A fifth is more than it sounds: a network that has collapsed, and no longer finds any
      object, has a loss only a third above that of a good one. The uncertainty loss, whose weight grows all the time,
      adds a third too, but over the whole run.
    - The mean has risen by half over its lowest, however slowly.

    Losses scatter by factors, so all statistics are of their logarithm; some are far off, so means are trimmed; and a
    rise must exceed several of its standard errors (Yuen, "The two-sample trimmed t for unequal population variances",
    1974).
    """

    recent: list[float] = field(default_factory=list)  # logarithms of up to three spans' losses; newest last
    lowest: float = math.inf  # lowest mean of two spans so far, of the logarithms
    rise: float = 0.0  # of the mean, by whichever comparison shows more of it; above 1, training has run away
    high_in_a_row: int = 0

    @classmethod
    def restored(cls, saved: dict[str, Any]) -> Self:
        """Return a saved history. Those of older programs hold other statistics: they begin again."""
        return cls(**saved) if "recent" in saved else cls()

    def add(self, loss: float) -> bool:
        """Add an applied window's loss. Return whether the loss has run away."""
        value = math.log(max(loss, LEAST_LOSS))
        self.high_in_a_row = self.high_in_a_row + 1 if value > self._highest() else 0
        self.recent = [*self.recent[-(3 * SPAN - 1) :], value]
        self.rise = self._rise()
        return self.high_in_a_row >= HIGH_LOSSES_IN_A_ROW or self.rise > 1

    def _highest(self) -> float:
        """Return the logarithm above which a loss is high."""
        if len(self.recent) < SPAN:
            return math.inf
        mean, error = _trimmed_mean(self.recent[-2 * SPAN :])
        deviation = error * math.sqrt(len(self.recent[-2 * SPAN :]))
        return mean + max(math.log(HIGH_LOSS_FACTOR), HIGH_LOSS_DEVIATIONS * deviation)

    def _rise(self) -> float:
        if len(self.recent) < 2 * SPAN:
            return 0.0
        mean, error = _trimmed_mean(self.recent[-2 * SPAN :])
        self.lowest = min(mean, self.lowest + math.log(DRIFT))
        rise = (mean - self.lowest) / max(math.log(RISE_FACTOR), RISE_ERRORS * error)
        if len(self.recent) < 3 * SPAN:
            return rise
        (first, _), (before, error_before), (now, error_now) = (
            _trimmed_mean(self.recent[start : start + SPAN]) for start in (0, SPAN, 2 * SPAN)
        )
        jump = now - before - max(0.0, before - first)
        return max(rise, jump / max(math.log(JUMP_FACTOR), JUMP_ERRORS * math.hypot(error_before, error_now)))

    @property
    def mean(self) -> float:
        """The typical loss of the last windows, 0 without a history."""
        return math.exp(statistics.median(self.recent[-SPAN:])) if self.recent else 0.0

    @property
    def lowest_mean(self) -> float:
        return math.exp(self.lowest)

    @property
    def is_low(self) -> bool:
        """Whether the loss is near its lowest level; true without a history."""
        return self.rise <= SOUND and self.high_in_a_row == 0


@dataclass
class Ladder:
    """A run's position on the ladder. Plain numbers, saved in the checkpoint."""

    recent: list[int] = field(default_factory=list)  # 1 for a skipped window, 0 for an applied one; newest last
    overflows_in_a_row: int = 0
    losses: LossHistory = field(default_factory=LossHistory)
    applied_since_rollback: int = 0
    rollbacks_in_a_row: int = 0  # without progress between them
    lr_factor: float = 1.0  # halved by each rollback
    full_precision: bool = False  # overrides --precision
    quarantine: dict[str, int] = field(default_factory=dict)  # image -> epoch, from 0, in which it returns
    offences: dict[str, int] = field(default_factory=dict)  # image -> number of times it was quarantined
    suspects: dict[str, int] = field(default_factory=dict)  # image -> spikes it was in, none of them explained
    spent: bool = False  # the run has ended with exit code 3
    # For the summary only
    num_applied: int = 0
    skipped: dict[str, int] = field(default_factory=dict)  # verdict -> number of windows
    num_rollbacks: int = 0
    seconds_lost: float = 0.0

    def next_action(self, outcome: WindowOutcome, attempt: int, precision: PrecisionName) -> Action:
        """Count an attempt, and return what to do next.

        Args:
            outcome: the attempt's verdict and numbers.
            attempt: number of earlier attempts at the same window.
            precision: precision of the attempt.
        """
        if outcome.verdict is StepVerdict.APPLIED:
            if precision == "fp16":
                self.overflows_in_a_row = 0
            return self._applied(outcome.loss)
        if outcome.verdict is StepVerdict.OVERFLOW:
            self.overflows_in_a_row += 1
            if attempt == 0 and self.overflows_in_a_row <= OVERFLOWS_IN_A_ROW:
                return self.skip(outcome.verdict, counts_as_bad=False)
            return Action.RETRY if attempt == 0 else Action.RETRY_FULL_PRECISION
        if outcome.verdict is StepVerdict.SPIKE or attempt >= AFTER_QUARANTINE:
            return self.skip(outcome.verdict)
        if attempt == 0:
            return Action.RETRY
        return Action.LOCALISE if precision == "fp32" else Action.RETRY_FULL_PRECISION

    def skip(self, verdict: StepVerdict, counts_as_bad: bool = True) -> Action:
        """Count a window whose update will not be applied, and return what to do next."""
        assert verdict is not StepVerdict.APPLIED
        self.skipped[verdict.value] = self.skipped.get(verdict.value, 0) + 1
        if not counts_as_bad:
            return Action.GO_ON
        self._remember(1)
        return Action.ROLL_BACK if sum(self.recent) >= MOST_BAD else Action.GO_ON

    def rolled_back(self, seconds_undone: float) -> None:
        self.recent.clear()
        self.seconds_lost += seconds_undone
        self.applied_since_rollback = 0
        self.rollbacks_in_a_row += 1
        self.num_rollbacks += 1
        self.lr_factor /= 2

    def put_in_quarantine(self, image: str, epoch: int) -> int:
        """Leave an image out for some epochs. Return the epoch, from 0, in which it returns.

        Not for ever: with other weights, the same image often does no harm (Chowdhery et al., "PaLM", 2022).
        """
        self.offences[image] = self.offences.get(image, 0) + 1
        self.quarantine[image] = epoch + 1 + FIRST_QUARANTINE * 2 ** (self.offences[image] - 1)
        return self.quarantine[image]

    def suspect(self, images: Collection[str]) -> set[str]:
        """Count the images of a window with an unexplained spike. Return those that were in most spikes of all.

        A few spikes with an image in common are no coincidence, unless the dataset is so small that its images meet
        again and again: then others are in as many.
        """
        for image in images:
            self.suspects[image] = self.suspects.get(image, 0) + 1
        most = max(self.suspects.values(), default=0)
        found = {image for image in images if self.suspects[image] == most}
        others = sum(number == most for number in self.suspects.values()) - len(found)
        if most < SPIKES_IN_COMMON or others or 2 * len(found) > len(images):
            return set()
        for image in found:
            del self.suspects[image]
        return found

    def is_quarantined(self, image: str, epoch: int) -> bool:
        return self.quarantine.get(image, 0) > epoch

    @property
    def is_healthy(self) -> bool:
        """Whether the current weights are worth keeping for a rollback."""
        return self.losses.is_low and not any(self.recent[-HIGH_LOSSES_IN_A_ROW:])

    def summary(self) -> dict[str, Any]:
        """Return what became of the run's windows, for the log."""
        return {
            "applied": self.num_applied,
            "skipped": self.skipped,
            "rollbacks": self.num_rollbacks,
            "lr_factor": self.lr_factor,
            "quarantined": self.offences,
            "seconds_lost": round(self.seconds_lost, 1),
        }

    def describe(self) -> list[str]:
        """Return the same as lines for people."""
        verdicts = ", ".join(f"{number} {verdict.replace('_', ' ')}" for verdict, number in self.skipped.items())
        skipped = f"{sum(self.skipped.values())} skipped" + (f" ({verdicts})" if verdicts else "")
        rollbacks = _counted(self.num_rollbacks, "rollback")
        if self.lr_factor != 1:
            rollbacks += f" (learning rates now x {self.lr_factor:g})"
        quarantined = f"{_counted(len(self.offences), 'sample')} quarantined"
        lost = f"{self.seconds_lost:.1f} s lost to recovery"
        return [
            f"Windows: {self.num_applied} applied, {skipped}; {rollbacks}, {quarantined}, {lost}",
            *(f"   Quarantined until epoch {until + 1}: {image}" for image, until in self.quarantine.items()),
        ]

    def _applied(self, loss: float) -> Action:
        self._remember(0)
        self.num_applied += 1
        self.applied_since_rollback += 1
        if self.applied_since_rollback >= PROGRESS_WINDOWS:
            self.rollbacks_in_a_row = 0
        return Action.ROLL_BACK if self.losses.add(loss) else Action.GO_ON

    def _remember(self, bad: int) -> None:
        self.recent = [*self.recent[-(BAD_AMONG - 1) :], bad]


def _trimmed_mean(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean of the middle three fifths of 40 or more values, and its standard error."""
    ordered = sorted(values)
    cut = len(ordered) // 5
    middle = ordered[cut : len(ordered) - cut]
    winsorized = [middle[0]] * cut + middle + [middle[-1]] * cut
    center = sum(winsorized) / len(winsorized)
    squares = sum((value - center) ** 2 for value in winsorized)
    return sum(middle) / len(middle), math.sqrt(squares / (len(middle) * (len(middle) - 1)))


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
