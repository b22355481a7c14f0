"""Unreadable images and masks: each reported once, and an error only if there are many."""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

ALWAYS_TOLERATED = 3  # pairs, if 1 % would be fewer: one bad file is 1 % of any dataset below 200

logger = logging.getLogger("train_ultimate")


class UnreadableDataError(ValueError):
    """Error for a dataset with too many unreadable files to go on."""


class UnreadablePairs:
    """Unreadable pairs of a run. A pair counts once, however often it is met, before or after a resume.

    Args:
        reasons: image -> why it or its mask cannot be read, for pairs already known; new ones are added to it.
        num_pairs: training and validation pairs together, of which 1 % is tolerated.
        validation: names of the validation images. Unreadable ones are left out of the scores; others are replaced.
        advice: what the user can do if there are too many.
        event: called for each new one, as ``RunLog.event`` is.
        alone: whether this is the only process of the run.
    """

    def __init__(
        self, reasons: dict[str, str], num_pairs: int, validation: Collection[str], advice: str,
        event: Callable[..., None], alone: bool = True,
    ) -> None:  # fmt: skip
        self.reasons = reasons
        self.num_pairs = num_pairs
        self.validation = frozenset(validation)
        self.advice = advice
        self.event = event
        self.alone = alone
        self.met: dict[str, str] = {}  # since the last ``agree``

    def note(self, problems: Mapping[str, str]) -> None:
        """Report the problems that are new.

        Args:
            problems: image -> why it or its mask cannot be read.

        Raises:
            UnreadableDataError: there are now too many.
        """
        for image, reason in problems.items():
            if image not in self.reasons:
                self.reasons[image] = reason
                action = "left out of the scores" if image in self.validation else "replaced by another"
                logger.warning(f"Unreadable: {reason}; {action}")
                self.event("unreadable", image=image, reason=reason, action=action)
        require_few(self.reasons, self.num_pairs, self.advice)

    def meet(self, problems: Mapping[str, str]) -> None:
        """Note the problems now or, in a run of several ranks, at the next ``agree``."""
        if self.alone:
            self.note(problems)
        else:
            self.met.update(problems)

    def agree(self, gather: Callable[[dict[str, str]], Sequence[dict[str, str]]]) -> None:
        """Note the problems that any rank has met since the last call.

        Args:
            gather: all-gather: takes this rank's problems, returns every rank's.

        Raises:
            UnreadableDataError: there are now too many.
        """
        met = {image: reason for part in gather(self.met) for image, reason in part.items()}
        self.met = {}
        self.note(met)

    def describe(self) -> list[str]:
        """Return the summary for the end of a run; empty if all files could be read."""
        if not self.reasons:
            return []
        count = f"{len(self.reasons)} of {self.num_pairs} pairs of image and mask"
        return [f"Unreadable: {count}, replaced in training or left out of validation: {_first(self.reasons)}"]


def require_few(reasons: Mapping[str, str], num_pairs: int, advice: str) -> None:
    """Tolerate 1 % of unreadable pairs, or three in a small dataset.

    More than that is no longer a few bad files: a copy was cut short, or a disk is failing.

    Raises:
        UnreadableDataError: there are more; the message names the first three and ends with the advice.
    """
    if len(reasons) > max(ALWAYS_TOLERATED, num_pairs // 100):
        allowed = "1 %" if num_pairs >= 100 * ALWAYS_TOLERATED else f"{ALWAYS_TOLERATED}"
        raise UnreadableDataError(
            f"{len(reasons)} of {num_pairs} pairs of image and mask cannot be read, more than {allowed}: "
            f"{_first(list(reasons.values()))}. {advice}"
        )


def _first(items: Collection[str]) -> str:
    more = f"; and {len(items) - 3} more" if len(items) > 3 else ""
    return "; ".join(list(items)[:3]) + more
