"""Scores of a prediction against a mask, by the protocol of the field.

A prediction is an 8-bit grey image, stretched to its full range before scoring; the score of a dataset is the mean over
its images. The numbers equal those of pysodmetrics 1.6.2 within 1e-6. The papers' MATLAB code has the same S, weighted
F and MAE, but other curves: there, E counts pixels above a threshold, here also those at it, and values are compared
that are not rounded to 8 bits. Over a set, that is about 1e-5 of mean E and max F; ``Protocol`` chooses. Masks may mark
pixels as ignored, which the field's code does not know: these count nowhere, not even for the stretch.

One pass over the pixels suffices for all scores but weighted F: they are functions of how many pixels there are of each
grey level, inside and outside the mask, in the four regions that meet at the mask's centroid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

ByteArray = NDArray[np.uint8]
BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]

_EPSILON = float(np.spacing(1))
_BETA_SQUARED = 0.3  # F-measure: precision counts for more than recall
_REACH = 100  # pixels; farther away, the distance weight of weighted F is below 1e-6
_FAR = 30_000  # stands for any squared distance above _REACH ** 2; twice this still fits 16 bits
_BLUR_RADIUS, _BLUR_SIGMA = 3, 5.0  # pixels
_BLUR_REACH = math.isqrt(2 * _BLUR_RADIUS**2)  # from a pixel of the window to the nearest one inside, at most


CONVENTIONS = ("pysod", "matlab")


@dataclass(frozen=True)
class Protocol:
    """How predictions are scored.

    Attributes:
        stretch: each prediction to its full range, unless all its pixels are equal.
        convention: of ``CONVENTIONS``, which thresholds a pixel passes.
        further: measures of ``evaluation.further`` to compute too.
    """

    stretch: bool = True
    convention: str = "pysod"
    further: tuple[str, ...] = ()


_OF_THE_FIELD = Protocol()


@dataclass(frozen=True)
class ImageScores:
    """Scores of one image. Higher is better except for ``mae``. Curves run over the thresholds 0 to 255.

    As in the reference, E of a 1 x 1 image is unbounded.
    """

    s_measure: float
    weighted_f: float
    mae: float
    iou: float
    dice: float
    adaptive_e: float
    adaptive_f: float
    e_curve: FloatArray  # (256,)
    f_curve: FloatArray  # (256,)
    precision: FloatArray  # (256,)
    recall: FloatArray  # (256,)

    def numbers(self) -> dict[str, float]:
        """Return all scores by name, with the curves of E and F as their means."""
        return {
            "s_measure": self.s_measure,
            "weighted_f": self.weighted_f,
            "mae": self.mae,
            "adaptive_e": self.adaptive_e,
            "mean_e": float(self.e_curve.mean()),
            "adaptive_f": self.adaptive_f,
            "mean_f": float(self.f_curve.mean()),
            "iou": self.iou,
            "dice": self.dice,
        }


@dataclass
class MeanScores:
    """Mean scores of a set of images, in memory that does not grow with their number."""

    num_images: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    curve_sums: FloatArray = field(default_factory=lambda: np.zeros((4, 256)))  # E, F, precision, recall

    def add(self, scores: ImageScores, further: Mapping[str, float] = MappingProxyType({})) -> None:
        """Take in an image.

        Args:
            scores: its scores.
            further: other measures of it, the same ones for every image.
        """
        self.num_images += 1
        for name, value in {**scores.numbers(), **further}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.curve_sums += (scores.e_curve, scores.f_curve, scores.precision, scores.recall)

    def means(self) -> dict[str, float]:
        """Return means over images; ``max_e`` and ``max_f`` are maxima of the mean curves.

        Raises:
            ValueError: no image has been added.
        """
        if not self.num_images:
            raise ValueError("no image has been scored")
        means = {name: total / self.num_images for name, total in self.sums.items()}
        e_curve, f_curve = self.curve_sums[:2] / self.num_images
        return {**means, "max_e": float(e_curve.max()), "max_f": float(f_curve.max())}


class PreparedMask:
    """A mask with all that scores need of it alone: prepared once, it serves the predictions of many methods."""

    def __init__(self, mask: BoolArray | ByteArray) -> None:
        """Prepare a mask.

        Args:
            mask: (H, W), True on the object; or 0 for background, 1 for object, and more for pixels that do not count.
        """
        self.labels = mask
        self.inside = mask == 1
        self.counted: BoolArray | None = mask < 2 if mask.size and mask.max() > 1 else None  # None: every pixel

    @cached_property
    def centroid(self) -> tuple[int, int]:
        """The row and column after the mask's centroid, where the four regions meet; (0, 0) for an empty mask."""
        per_row, per_column = np.count_nonzero(self.inside, axis=1), np.count_nonzero(self.inside, axis=0)
        total = per_row.sum()
        if not total:
            return 0, 0
        row, column = (counts @ np.arange(len(counts)) / total for counts in (per_row, per_column))
        return int(np.round(row)) + 1, int(np.round(column)) + 1

    @cached_property
    def surroundings(self) -> "_Surroundings":
        """How errors around the object weigh; of a mask that is not empty."""
        return _surroundings(self.inside, self.counted)


def score_image(
    prediction: ByteArray, mask: BoolArray | ByteArray | PreparedMask, protocol: Protocol = _OF_THE_FIELD
) -> ImageScores:
    """Return every score of one image.

    Args:
        prediction: (H, W), 0 background to 255 object.
        mask: (H, W), see ``PreparedMask``.
        protocol: how to score.

    Raises:
        ValueError: their sizes differ, or they have no pixel that counts.
    """
    counts = _Counts(prediction, mask if isinstance(mask, PreparedMask) else PreparedMask(mask), protocol.stretch)
    above = "right" if protocol.convention == "matlab" else "left"  # of its threshold, for E: above it, or also at it
    if protocol.convention == "matlab":
        levels, thresholds = counts.levels, _matlab_thresholds()
    else:
        levels, thresholds = (counts.levels * 255).astype(np.int64), np.arange(256.0)
    hits, alarms = counts.from_level_on(np.searchsorted(levels, thresholds))
    e_hits, e_alarms = counts.from_level_on(np.searchsorted(levels, thresholds, above))
    adaptive = counts.adaptive_threshold()
    adaptive_hits, adaptive_alarms = counts.from_level_on(np.searchsorted(counts.levels, [adaptive]))
    precision = hits / np.maximum(hits + alarms, 1)
    recall = hits / max(counts.num_inside, 1)
    adaptive_precision = adaptive_hits / np.maximum(adaptive_hits + adaptive_alarms, 1)
    adaptive_recall = adaptive_hits / max(counts.num_inside, 1)
    return ImageScores(
        s_measure=counts.s_measure(),
        weighted_f=_weighted_f(counts),
        mae=counts.mae(),
        iou=counts.iou(),
        dice=counts.dice(),
        adaptive_e=float(counts.e_measure(*counts.from_level_on(np.searchsorted(counts.levels, [adaptive], above)))[0]),
        adaptive_f=float(f_measure(adaptive_precision, adaptive_recall)[0]),
        e_curve=counts.e_measure(e_hits, e_alarms),
        f_curve=f_measure(precision, recall),
        precision=precision,
        recall=recall,
    )


def values_of(prediction: ByteArray, mask: BoolArray | ByteArray, stretch: bool) -> tuple[FloatArray, BoolArray]:
    """Return a prediction's values in [0, 1] and where the object is, (H, W); a pixel that does not count is 0 in both.

    Args:
        prediction, mask: see ``score_image``.
        stretch: the prediction to its full range.
    """
    if mask.max() < 2:
        return _levels(prediction, stretch).take(prediction), mask == 1
    counted = mask < 2
    return np.where(counted, _levels(prediction[counted], stretch).take(prediction), 0.0), mask == 1


def quick_scores(prediction: ByteArray, mask: BoolArray | ByteArray) -> dict[str, float]:
    """Return IoU, Dice, MAE and S-measure of one image, not stretched: for validation during training.

    If a network finds nothing yet, stretching would score its noise as if it were a prediction.

    Args:
        prediction, mask: see ``score_image``.
    """
    counts = _Counts(prediction, PreparedMask(mask), stretch=False)
    return {"iou": counts.iou(), "dice": counts.dice(), "mae": counts.mae(), "s_measure": counts.s_measure()}


def mean_scores(images: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each score over images; none for no images."""
    return {name: sum(image[name] for image in images) / len(images) for name in (images[0] if images else ())}


def interval_of_mean(values: Sequence[float], resamples: int = 1000) -> tuple[float, float]:
    """Return the ends of the 95 % bootstrap interval of a mean: the same for the same values.

    It says how far chance alone, in the choice of these images, moves the mean: Efron, "Bootstrap methods: another look
    at the jackknife", 1979.

    Args:
        values: one per image, at least one.
        resamples: number of draws with replacement.
    """
    numbers, generator = np.asarray(values, np.float64), np.random.default_rng(0)
    means = [numbers[generator.integers(len(numbers), size=len(numbers))].mean() for _ in range(resamples)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


class _Counts:
    """Numbers of pixels of each grey level, by region, inside and outside the mask."""

    def __init__(self, prediction: ByteArray, mask: PreparedMask, stretch: bool) -> None:
        if prediction.shape != mask.labels.shape or prediction.ndim != 2 or not prediction.size:
            raise ValueError(
                f"a prediction of {prediction.shape} pixels and a mask of {mask.labels.shape} cannot be compared"
            )
        self.prediction, self.mask, self.counted = prediction, mask, mask.counted
        pixels = self.among_counted(prediction)
        if not pixels.size:
            raise ValueError("the mask has no pixel that counts")
        self.size = pixels.size
        self.levels = _levels(pixels, stretch)
        joint = mask.labels.astype(np.uint16)
        if self.counted is not None:
            np.minimum(joint, 2, out=joint)
        joint <<= 8
        joint |= prediction
        row, column = mask.centroid
        self.regions: list[tuple[slice, slice]] = []
        self.region_counts: list[IntArray] = []  # (2, 256) each: outside and inside the mask
        num_kinds = 2 if self.counted is None else 3
        for rows in (slice(0, row), slice(row, None)):
            for columns in (slice(0, column), slice(column, None)):
                self.regions.append((rows, columns))
                of_region = np.bincount(joint[rows, columns].ravel(), minlength=num_kinds * 256)
                self.region_counts.append(of_region.reshape(num_kinds, 256)[:2])
        self.outside, self.inside = np.sum(self.region_counts, axis=0)
        self.num_inside = int(self.inside.sum())

    def among_counted(
        self, values: NDArray[Any], region: tuple[slice, slice] = (slice(None), slice(None))
    ) -> NDArray[Any]:
        """Return an image's values, or a region's, without those of pixels that do not count."""
        return values[region] if self.counted is None else values[region][self.counted[region]]

    def from_level_on(self, first: NDArray[np.int_]) -> tuple[IntArray, IntArray]:
        """Return how many pixels inside and outside the mask have a grey level or a higher one.

        Args:
            first: (n,), grey levels in [0, 256]; none has 256.
        """
        inside, outside = (np.append(np.cumsum(counts[::-1])[::-1], 0)[first] for counts in (self.inside, self.outside))
        return inside, outside

    def adaptive_threshold(self) -> float:
        """Return twice the mean of the prediction, at most 1.

        If it coincides with a grey level, rounding decides on which side that level falls. The pixels are then summed
        in the reference's order.
        """
        threshold = 2 * float((self.inside + self.outside) @ self.levels) / self.size
        if np.abs(self.levels - threshold).min() < 1e-9:
            threshold = 2 * float(self.among_counted(self.levels[self.prediction]).mean())
        return min(threshold, 1.0)

    def mae(self) -> float:
        return float(self.inside @ (1 - self.levels) + self.outside @ self.levels) / self.size

    def iou(self) -> float:
        """Return the score at threshold 0.5; 1 if prediction and mask are both empty."""
        hits, alarms = self._above_half()
        return hits / (alarms + self.num_inside) if alarms + self.num_inside else 1.0

    def dice(self) -> float:
        """Return the score at threshold 0.5; 1 if prediction and mask are both empty."""
        hits, alarms = self._above_half()
        return 2 * hits / (hits + alarms + self.num_inside) if hits + alarms + self.num_inside else 1.0

    def e_measure(self, hits: IntArray, alarms: IntArray) -> FloatArray:
        """Return the enhanced-alignment measure (Fan et al., IJCAI 2018) of n binary predictions, (n,).

        Args:
            hits: (n,), predicted pixels inside the mask.
            alarms: (n,), predicted pixels outside it.
        """
        predicted = hits + alarms
        if self.num_inside in (0, self.size):
            aligned = (predicted if self.num_inside else self.size - predicted).astype(np.float64)
        else:
            misses = self.num_inside - hits
            parts = ((hits, 1, 1), (alarms, 1, 0), (misses, 0, 1), (self.size - predicted - misses, 0, 0))
            mean_predicted, mean_mask = predicted / self.size, self.num_inside / self.size
            aligned = np.zeros(len(hits))
            for number, in_prediction, in_mask in parts:
                first, second = in_prediction - mean_predicted, in_mask - mean_mask
                alignment = 2 * first * second / (first**2 + second**2 + _EPSILON)
                aligned += (alignment + 1) ** 2 / 4 * number
        return aligned / (self.size - 1 + _EPSILON)

    def s_measure(self) -> float:
        """Return the structure measure (Fan et al., ICCV 2017), alpha = 0.5: agreement of objects and of regions."""
        share = self.num_inside / self.size
        if share in (0, 1):
            mean = float((self.inside + self.outside) @ self.levels) / self.size
            return mean if share else 1 - mean
        objects = _object_score(self.inside, self.levels) * share
        objects += _object_score(self.outside, 1 - self.levels) * (1 - share)
        regions = sum(self._similarity(n) * self.region_counts[n].sum() / self.size for n in range(4))
        return max(0.0, 0.5 * objects + 0.5 * float(regions))

    def _similarity(self, region: int) -> float:
        """Return the structural similarity of prediction and mask in a region."""
        outside, inside = self.region_counts[region]
        number, number_inside = int(outside.sum() + inside.sum()), int(inside.sum())
        if not number:
            return 0.0
        both = outside + inside
        mean_p, mean_m = self._mean(region, both, number), number_inside / number
        freedom = number - 1 + _EPSILON
        from_mean = self.levels - mean_p
        variance_p = both @ from_mean**2 / freedom
        variance_m = (number_inside * (1 - mean_m) ** 2 + (number - number_inside) * mean_m**2) / freedom
        covariance = (inside @ from_mean * (1 - mean_m) - outside @ from_mean * mean_m) / freedom
        numerator = 4 * mean_p * mean_m * covariance
        denominator = (mean_p**2 + mean_m**2) * (variance_p + variance_m)
        if numerator != 0:
            return float(numerator / (denominator + _EPSILON))
        return 1.0 if denominator == 0 else 0.0

    def _mean(self, region: int, counts: IntArray, number: int) -> float:
        """Return the mean of the prediction in a region.

        The similarity of a flat region to a flat mask is 1 or 0, depending on whether its mean is exactly its value. So
        the pixels of a flat region are summed in the reference's order.
        """
        if np.count_nonzero(counts) == 1:
            value = float(self.levels[counts.argmax()])
            if value in (0, 1):
                return value
            return float(self.among_counted(self.levels[self.prediction], self.regions[region]).mean())
        return float(counts @ self.levels) / number

    def _above_half(self) -> tuple[int, int]:
        above = self.levels > 0.5
        return int(self.inside[above].sum()), int(self.outside[above].sum())


def _levels(pixels: ByteArray, stretch: bool) -> FloatArray:
    """Return the value of each grey level, (256,): those of the pixels are in [0, 1]."""
    levels = np.arange(256, dtype=np.float64) / 255
    low, high = levels[pixels.min()], levels[pixels.max()]
    if stretch and low != high:  # in the reference's steps, so that ties break the same way
        levels = (levels - low) / (high - low)
    return levels


@cache
def _matlab_thresholds() -> FloatArray:
    """Return MATLAB's ``1:-1/255:0`` in rising order, to the last bit: it counts from both ends to the middle."""
    steps = np.arange(128, dtype=np.float64) * (1 / 255)
    return np.concatenate([steps, (1 - steps)[::-1]])


def _object_score(counts: IntArray, values: FloatArray) -> float:
    number = int(counts.sum())
    mean = float(counts @ values) / number
    deviation = float(np.sqrt(counts @ (values - mean) ** 2 / (number - 1))) if number > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + _EPSILON)


def f_measure(precision: FloatArray, recall: FloatArray) -> FloatArray:
    """Return the F-measure (Achanta et al., CVPR 2009), (n,); 0 where precision and recall are.

    Args:
        precision, recall: (n,), in [0, 1].
    """
    weighted = _BETA_SQUARED * precision + recall
    return (1 + _BETA_SQUARED) * precision * recall / np.where(weighted == 0, 1, weighted)


@dataclass(frozen=True)
class _Surroundings:
    """Weights of errors by where they are.

    Attributes:
        box: rows and columns around the object; beyond them, an error counts twice.
        relief: of the box, how much less than twice an error counts.
        window: rows and columns of the box, around the object as far as the blur reaches.
        inside: of the window, True on the object.
        targets, sources: flat indices in the padded window, of pixels outside and the nearest ones inside.
    """

    box: tuple[slice, slice]
    relief: FloatArray
    window: tuple[slice, slice]
    inside: BoolArray
    targets: IntArray
    sources: IntArray


def _surroundings(inside: BoolArray, counted: BoolArray | None) -> _Surroundings:
    box = bounding_box(inside, margin=_REACH)
    mask = inside[box]
    distances = _squared_distances(mask)
    relief = _distance_relief().take(distances)
    if counted is not None:
        relief[~counted[box]] = 0
    window = bounding_box(mask, margin=_BLUR_RADIUS)
    padded, squared_distances = (np.pad(pixels[window], _BLUR_REACH) for pixels in (mask, distances))
    flat, width, squared_distances = padded.ravel(), padded.shape[1], squared_distances.ravel()
    outside = np.flatnonzero((squared_distances > 0) & (squared_distances <= 2 * _BLUR_RADIUS**2))
    outside_distances = squared_distances[outside]
    targets, sources = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for squared, offsets in _neighbours().items():
        where = outside[outside_distances == squared]
        for row, column in offsets:
            if not len(where):
                break
            nearest = where + row * width + column
            found = flat[nearest]
            targets.append(where[found])
            sources.append(nearest[found])
            where = where[~found]
    return _Surroundings(box, relief, window, mask[window], np.concatenate(targets), np.concatenate(sources))


def _weighted_f(counts: _Counts) -> float:
    """Return the weighted F-measure (Margolin et al., CVPR 2014); 0 for an empty mask.

    An error inside the object is averaged with its neighbours' if that makes it smaller. An error outside weighs more
    the farther it is from the object, up to twice.
    """
    if not counts.num_inside:
        return 0.0
    around, levels = counts.mask.surroundings, counts.levels
    prediction = counts.prediction[around.box]
    error_inside = _error_inside(prediction[around.window], levels, around)
    # Not a dot product: BLAS would start threads for it in each scoring process.
    relief = float((levels.take(prediction) * around.relief).sum())
    error_outside = 2 * float(counts.outside @ levels) - relief
    hits = counts.num_inside - error_inside
    recall = 1 - error_inside / counts.num_inside
    precision = hits / (hits + error_outside + _EPSILON)
    return 2 * recall * precision / (recall + precision + _EPSILON)


@cache
def _distance_relief() -> FloatArray:
    """Return, by squared distance, how much the weight of an error is below 2: 1 to 0; inside the object 0."""
    relief = np.exp(np.log(0.5) / 5 * np.sqrt(np.arange(_FAR + 1)))
    relief[_REACH**2 + 1 :] = relief[0] = 0
    return relief


def bounding_box(mask: BoolArray, margin: int) -> tuple[slice, slice]:
    """Return rows and columns of a mask's bounding box, with a margin, clipped to the image."""
    found = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    rows, columns = (slice(max(0, int(where[0]) - margin), int(where[-1]) + margin + 1) for where in found)
    return rows, columns


def _squared_distances(mask: BoolArray) -> NDArray[np.uint16]:
    """Return the squared distance of each pixel to the nearest one inside the mask; ``_FAR`` beyond ``_REACH``.

    Exact. First along the rows; then along the columns by decomposing the parabola into steps of 1, 3, 5, ... from each
    pixel to the next (Huang and Mitchell, 1994), in blocks of columns that fit the cache.
    """
    height, width = mask.shape
    kind = np.int16 if width + _FAR < 2**15 else np.int32  # 16 bits take half the time
    index = np.arange(width, dtype=kind)[:, None]
    columns = np.ascontiguousarray(mask.T)
    before = np.maximum.accumulate(np.where(columns, index, kind(-_FAR)), axis=0)
    after = np.minimum.accumulate(np.where(columns, index, kind(width + _FAR))[::-1], axis=0)[::-1]
    along_row = np.minimum(np.minimum(index - before, after - index), math.isqrt(_FAR)).astype(np.uint16) ** 2
    distances = np.empty((height, width), dtype=np.uint16)
    columns_per_block = max(1, 65_536 // height)
    for first in range(0, width, columns_per_block):
        block = np.full((height + 2, min(columns_per_block, width - first)), _FAR, dtype=np.uint16)
        above, pixels, below = block[:-2], block[1:-1], block[2:]
        pixels[:] = along_row[first : first + columns_per_block].T
        candidate = np.empty_like(pixels)
        for step in range(1, _REACH + 1):
            np.minimum(above, below, out=candidate)
            np.add(candidate, np.uint16(2 * step - 1), out=candidate)
            np.minimum(pixels, candidate, out=pixels)
            if step % 8 == 0 and pixels.max() <= (step + 1) ** 2:  # no pixel is farther from the object
                break
        distances[:, first : first + columns_per_block] = pixels
    distances[distances > _REACH**2] = _FAR
    return distances


def _error_inside(prediction: ByteArray, levels: FloatArray, around: _Surroundings) -> float:
    """Return the sum of the errors inside the object, each at most the mean error around it.

    The mean is that of a Gaussian window, in which a pixel outside the object has the error of the nearest one inside.

    Args:
        prediction: of the window.
        levels: (256,), value of each grey level.
        around: how errors weigh.
    """
    errors = np.where(around.inside, (1 - levels)[prediction], 0.0)
    padded = np.pad(errors, _BLUR_REACH)
    flat = padded.ravel()
    flat[around.targets] = flat[around.sources]
    trim = slice(_BLUR_REACH - _BLUR_RADIUS, _BLUR_RADIUS - _BLUR_REACH)
    mean_errors = _blur(_blur(padded[trim, trim]).T).T
    return float(np.minimum(errors, mean_errors)[around.inside].sum())


@cache
def _neighbours() -> dict[int, list[tuple[int, int]]]:
    """Return the (row, column) offsets by squared distance, up to that of the blur window's corners.

    Of pixels at the same distance, the reference takes the leftmost, and within a column the topmost.
    """
    furthest = 2 * _BLUR_RADIUS**2
    reach = range(-math.isqrt(furthest), math.isqrt(furthest) + 1)
    by_distance: dict[int, list[tuple[int, int]]] = {}
    for column in reach:
        for row in reach:
            if 0 < row * row + column * column <= furthest:
                by_distance.setdefault(row * row + column * column, []).append((row, column))
    return by_distance


def _blur(padded: FloatArray) -> FloatArray:
    """Blur along the rows with a Gaussian, (H, W) -> (H, W - 6)."""
    offsets = np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1)
    kernel = np.exp(-(offsets**2) / (2 * _BLUR_SIGMA**2))
    kernel /= kernel.sum()
    width = padded.shape[1] - 2 * _BLUR_RADIUS
    blurred = padded[:, _BLUR_RADIUS : _BLUR_RADIUS + width] * kernel[_BLUR_RADIUS]
    for distance in range(1, _BLUR_RADIUS + 1):
        left, right = _BLUR_RADIUS - distance, _BLUR_RADIUS + distance
        blurred += (padded[:, left : left + width] + padded[:, right : right + width]) * kernel[right]
    return blurred
