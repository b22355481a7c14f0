"""Whether a difference between two methods means anything: paired over the images that both have predicted.

Scores of one image by two methods depend on each other, because hard images are hard for both. So their differences are
looked at, image by image, never the two means on their own.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]

SIGNIFICANT = 0.05
RESAMPLES = 2000
_BLOCK = 4_000_000  # numbers drawn at once, at most: memory stays flat


@dataclass(frozen=True)
class Difference:
    """Mean difference of a score between two methods, over the images of a set or of several.

    Attributes:
        mean: over images; over several sets, the mean of their means.
        low: lower end of its 95 % interval.
        high: upper end.
        num_higher: images on which the first method's score is higher.
        num_lower: those on which it is lower.
        num_images: all, those with equal scores included.
        p: of Wilcoxon's test that neither method tends to be higher; None without scipy.
    """

    mean: float
    low: float
    high: float
    num_higher: int
    num_lower: int
    num_images: int
    p: float | None


def difference(first: Sequence[FloatArray], second: Sequence[FloatArray], resamples: int = RESAMPLES) -> Difference:
    """Compare the scores of two methods.

    The interval is that of a bootstrap of the images (Efron, 1979), within each set, since a set's size is given. The
    p-value is that of Wilcoxon's signed-rank test (1945) on all images.

    Args:
        first, second: for each set the scores of its images, in the same order.
        resamples: number of draws with replacement; the draws are the same for the same number of images.

    Raises:
        ValueError: the numbers of images differ, or there are none.
    """
    if [len(scores) for scores in first] != [len(scores) for scores in second] or not first or not len(first[0]):
        raise ValueError("two methods can be compared only on the same images, and on at least one")
    by_set = [np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in zip(first, second, strict=True)]
    generator = np.random.default_rng(0)
    means = np.mean([_means_of_draws(values, resamples, generator) for values in by_set], axis=0)
    low, high = np.percentile(means, (2.5, 97.5))
    every = np.concatenate(by_set)
    return Difference(
        float(np.mean([values.mean() for values in by_set])), float(low), float(high),
        int((every > 0).sum()), int((every < 0).sum()), len(every), _signed_rank_p(every),
    )  # fmt: skip


def _means_of_draws(values: FloatArray, resamples: int, generator: np.random.Generator) -> FloatArray:
    """Return the means of draws with replacement, (resamples,)."""
    at_once = max(1, _BLOCK // len(values))
    means = [
        values[generator.integers(len(values), size=(min(at_once, resamples - start), len(values)))].mean(axis=1)
        for start in range(0, resamples, at_once)
    ]
    return np.concatenate(means)


def _signed_rank_p(differences: FloatArray) -> float | None:
    try:
        from scipy.stats import wilcoxon
    except ImportError:
        return None
    if not differences.any():
        return 1.0
    return float(np.asarray(wilcoxon(differences))[1])


def auroc(positives: FloatArray, negatives: FloatArray) -> float:
    """Return how often a positive has a higher score than a negative; equal scores count half.

    That is the area under the ROC curve (Hanley and McNeil, 1982).

    Args:
        positives, negatives: their scores, at least one of each.
    """
    ordered = np.sort(negatives)
    lower, not_higher = (np.searchsorted(ordered, positives, side) for side in ("left", "right"))
    return float((lower + not_higher).mean() / 2 / len(ordered))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for the number of comparisons (Holm, 1979).

    As many comparisons as there are, the chance that any of them is called different by chance stays that of one.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
