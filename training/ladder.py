"""The recovery ladder: what to do about a window that was not applied, or a loss that runs away.

    skip -> run again -> run again in fp32 -> localise and quarantine -> roll back -> fp32 for good -> stop

Policy only: numbers in, action out. The gate has already skipped the window, on the device.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from runtime.machine import PrecisionName
from training.gate import StepVerdict, WindowOutcome

OVERFLOWS_IN_A_ROW = 4  # routine: so loss scaling finds its ceiling
MOST_BAD, BAD_AMONG = 8, 50  # skipped windows among the most recent ones that cause a rollback
LOSS_HISTORY = 50  # windows: the mean's time constant, and the least history to call a loss high
HIGH_LOSS_FACTOR, HIGH_LOSSES_IN_A_ROW = 2.0, 5  # of the mean: training is running away
RISEN_FACTOR, RISEN_DEVIATIONS = 1.2, 1.0  # of the mean over the lowest mean: if both, it has run away for good
SOUND_FACTOR = 1.1  # of the mean over the lowest mean; up to it, weights are worth keeping
FLOOR_GROWTH = 1.0002  # of the lowest mean, per window: a drift over thousands of windows is no rise
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
    """Running statistics of the loss, which show it running away: by a factor of two at once, or by a fifth for long.

    A fifth is more than it sounds: a network that has collapsed, and no longer finds any object, has a loss only a
    third above that of a good one. The rise must also exceed one standard deviation of single windows, which is about
    ten of a mean over fifty.
    """

    mean: float = 0.0
    variance: float = 0.0
    lowest_mean: float = math.inf
    num_losses: int = 0
    high_in_a_row: int = 0

    def add(self, loss: float) -> bool:
        """Add an applied window's loss. Return whether the loss has run away."""
        known = self.num_losses >= LOSS_HISTORY
        if known and loss > HIGH_LOSS_FACTOR * self.mean:  # does not enter the mean it is compared with
            self.high_in_a_row += 1
            return self.high_in_a_row >= HIGH_LOSSES_IN_A_ROW
        self.high_in_a_row = 0
        self.num_losses += 1
        share, step = 1 / min(self.num_losses, LOSS_HISTORY), loss - self.mean
        self.mean += share * step
        self.variance = (1 - share) * (self.variance + share * step**2)
        if known:
            self.lowest_mean = min(self.mean, self.lowest_mean * FLOOR_GROWTH)
        rise = self.mean - self.lowest_mean
        return known and rise > max((RISEN_FACTOR - 1) * self.lowest_mean, RISEN_DEVIATIONS * math.sqrt(self.variance))

    @property
    def is_low(self) -> bool:
        """Whether the loss is near its lowest level; true without a history."""
        low = self.num_losses < LOSS_HISTORY or self.mean <= SOUND_FACTOR * self.lowest_mean
        return low and self.high_in_a_row == 0


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


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
