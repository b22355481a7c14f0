"""Images and masks that cannot be read: each named once, and an error only where they are many."""

from collections.abc import Callable, Collection, Mapping, Sequence

from tqdm import tqdm

ALWAYS_TOLERATED = 3  # pairs, where 1 % would be fewer: one bad file is 1 % of any data set below 200


class UnreadableDataError(ValueError):
    """More of the data cannot be read than can be made up for."""


class UnreadablePairs:
    """The pairs a run has found it cannot read. One that is met again, or after a resume, does not count again.

    Args:
        reasons: image -> why it or its mask cannot be read, of those known before; new ones are added to it.
        num_pairs: training and validation pairs together, which the 1 % is of.
        validation: the images, by name, that are left out of the scores; the others are replaced in training.
        advice: what the user can do where there are too many.
        event: told of each new one, as ``RunLog.event`` is.
        alone: no other process reads other pairs of the same run.
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
        self.met: dict[str, str] = {}  # since the processes last told each other

    def note(self, problems: Mapping[str, str]) -> None:
        """Report those that are new.

        Args:
            problems: image -> why it or its mask cannot be read.

        Raises:
            UnreadableDataError: there are too many by now.
        """
        for image, reason in problems.items():
            if image not in self.reasons:
                self.reasons[image] = reason
                action = "left out of the scores" if image in self.validation else "replaced by another"
                tqdm.write(f"Unreadable: {reason}; {action}")
                self.event("unreadable", image=image, reason=reason, action=action)
        require_few(self.reasons, self.num_pairs, self.advice)

    def meet(self, problems: Mapping[str, str]) -> None:
        """Note them at once; or, where several processes read, remember them until ``agree``."""
        if self.alone:
            self.note(problems)
        else:
            self.met.update(problems)

    def agree(self, gather: Callable[[dict[str, str]], Sequence[dict[str, str]]]) -> None:
        """Note what each of the processes that read together has met.

        Args:
            gather: from what this one has met to what each one has.

        Raises:
            UnreadableDataError: there are too many by now.
        """
        met = {image: reason for part in gather(self.met) for image, reason in part.items()}
        self.met = {}
        self.note(met)

    def describe(self) -> list[str]:
        """For the run's last lines."""
        if not self.reasons:
            return []
        count = f"{len(self.reasons)} of {self.num_pairs} pairs of image and mask"
        return [f"Unreadable: {count}, replaced in training or left out of validation: {_first(self.reasons)}"]


def require_few(reasons: Mapping[str, str], num_pairs: int, advice: str) -> None:
    """Let 1 % of the pairs be unreadable, three of a small data set.

    Above that it is no longer a few bad files: a copy was cut short, or a disk is going.

    Raises:
        UnreadableDataError: there are more; with the first three by name, and the advice.
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
