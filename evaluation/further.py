"""Measures that few papers name, computed only when asked for: balanced errors, edges, context, objects of any size.

The numbers equal those of pysodmetrics 1.6.2 within 1e-6, where that has a number at all; but it adds up the edges of
multi-scale IoU in 16 bits, and is off by up to 1e-3 for it. Two measures are its own, and need it installed. A pixel
that does not count is background here, in the mask and in the prediction.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.metrics import BoolArray, ByteArray, FloatArray, Protocol, bounding_box, f_measure, values_of
from evaluation.objects import connected

_EPSILON = float(np.spacing(1))
_CONTEXT_SPREAD = 6.0  # pixels: alpha of the context measure
_LEAST_OBJECT = 50  # pixels: smaller ones count for size-invariant measures only if there is no other
_SCALES = 10  # grids of 1, 2, 4, ..., 512 pixels


@dataclass(frozen=True)
class _Image:
    """What a measure sees of an image.

    Attributes:
        values: (H, W) prediction in [0, 1].
        mask: (H, W), True on the object.
        photograph: (H, W, 3) in RGB, or None if there is none.
    """

    values: FloatArray
    mask: BoolArray
    photograph: ByteArray | None

    @property
    def found(self) -> BoolArray:
        return self.values > 0.5


def further_scores(
    names: Sequence[str], prediction: ByteArray, mask: BoolArray | ByteArray, protocol: Protocol,
    photograph: ByteArray | None = None,
) -> dict[str, float]:  # fmt: skip
    """Return the named measures of one image.

    Args:
        names: of ``FURTHER``.
        prediction, mask: see ``evaluation.metrics.score_image``.
        protocol: Of it, only the stretch matters.
        photograph: (H, W, 3) in RGB; ``camouflage_context`` needs it.

    Raises:
        ValueError: a package or the photograph is missing.
    """
    if not names:
        return {}
    values, inside = values_of(prediction, mask, protocol.stretch)
    image = _Image(values, inside, photograph)
    return {name: float(FURTHER[name](image)) for name in names}


def require_packages(names: Sequence[str]) -> None:
    """Check that what the named measures need is installed.

    Raises:
        ValueError: it is not; the message names the pip command.
    """
    for name in names:
        for package, pip_name in _PACKAGES.get(name, {}).items():
            _imported(package, pip_name, name)


def _imported(package: str, pip_name: str, needed_by: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f"--measures {needed_by} needs {pip_name}: pip install {pip_name}") from error


def _balanced_error(image: _Image) -> float:
    """Return the mean share of errors inside and outside the object, at threshold 0.5."""
    found, mask = image.found, image.mask
    num_inside, hits = np.count_nonzero(mask), np.count_nonzero(found & mask)
    found_outside = np.count_nonzero(found) - hits
    num_outside = mask.size - num_inside
    recall = hits / num_inside if num_inside else 0.0
    return 1 - 0.5 * (recall + ((num_outside - found_outside) / num_outside if num_outside else 0.0))


def _multiscale_iou(image: _Image) -> float:
    """Return the share of the mask's edge that is found, over ever coarser grids, at threshold 0.5.

    Ahmadzadeh et al., "Multiscale IOU: a metric for evaluation of salient object detection with fine structures", ICIP
    2021.
    """
    found, wanted = _edge(image.found), _edge(image.mask)
    ratios = []
    for _ in range(_SCALES):
        ratios.append((np.count_nonzero(found & wanted) + 1) / (np.count_nonzero(wanted) + 1))
        found, wanted = _halved(found), _halved(wanted)
    return float(sum(ratios) - (ratios[0] + ratios[-1]) / 2) / (_SCALES - 1)  # area under them, by trapezoids


def _edge(mask: BoolArray) -> BoolArray:
    """Return where Sobel's filter finds a change; outside the image, the mask is empty."""
    padded = np.pad(mask, 1).view(np.int8)
    along_rows, along_columns = padded[:, 2:] - padded[:, :-2], padded[2:] - padded[:-2]
    rows = along_rows[:-2] + 2 * along_rows[1:-1] + along_rows[2:]
    columns = along_columns[:, :-2] + 2 * along_columns[:, 1:-1] + along_columns[:, 2:]
    return (rows != 0) | (columns != 0)


def _halved(mask: BoolArray) -> BoolArray:
    """Return which cells of 2 x 2 pixels, counted from the lower right corner, have any True."""
    height, width = mask.shape
    even = np.pad(mask, ((height % 2, 0), (width % 2, 0)))
    return even[::2, ::2] | even[1::2, ::2] | even[::2, 1::2] | even[1::2, 1::2]


def _context(image: _Image) -> float:
    """Return the context measure, beta 1: errors count less the more of the object is around them.

    Wang et al., "Context-measure: contextualizing metric for camouflage", arXiv 2512.07076, 2025. Where an object's
    pixels lie on a diagonal line, their covariance cannot be inverted; a tiny part of its trace is added to it.
    """
    num_inside = np.count_nonzero(image.mask)
    if not num_inside:
        return 0.0
    kernel = _context_kernel(image.mask)
    box = bounding_box(image.mask, margin=kernel.shape[0] + kernel.shape[1])  # beyond, no pixel sees the object
    values, mask = image.values[box], image.mask[box]
    of_mask, of_values = _filtered((mask.astype(np.float64), values), kernel)
    relevance = float((of_mask * values).sum() / (image.values.sum() + _EPSILON))
    reverse = float((1 - np.exp(-of_values[mask])).sum()) * np.e / (np.e - 1) / num_inside
    return 2 * relevance * reverse / (relevance + reverse + _EPSILON)


def _context_kernel(mask: BoolArray) -> FloatArray:
    """Return a Gaussian window of the object's shape, of sum 1, with odd sides."""
    points = np.argwhere(mask)
    if len(points) <= 1:
        covariance, reach = np.diag([0.25, 0.25]), (1, 1)
    else:
        covariance = np.cov(points, rowvar=False)
        covariance[np.diag_indices(2)] = np.where(np.diag(covariance) == 0, _EPSILON, np.diag(covariance))
        variances = np.diag(covariance)
        total = np.sqrt(variances.sum())
        reach = tuple(round(3 * _CONTEXT_SPREAD * float(np.sqrt(own)) / float(total)) for own in variances)
        covariance = _CONTEXT_SPREAD**2 * covariance / total**2
        if np.linalg.det(covariance) <= 0:
            covariance += np.eye(2) * np.trace(covariance) * 1e-9
    rows, columns = np.meshgrid(*(np.arange(-far, far + 1) for far in reach), indexing="ij")
    offsets = np.stack([rows, columns], axis=-1)
    kernel = np.exp(-0.5 * np.einsum("...i,ij,...j->...", offsets, np.linalg.inv(covariance), offsets))
    return kernel / kernel.sum()


def _filtered(images: Sequence[FloatArray], kernel: FloatArray) -> list[FloatArray]:
    """Correlate images, mirrored at their borders, with a window that is symmetric to its centre."""
    row, column = kernel.shape[0] // 2, kernel.shape[1] // 2
    padded = np.pad(np.stack(images), ((0, 0), (row, row), (column, column)), mode="reflect")
    height, width = padded.shape[1:]
    shape = _next_fast(height), _next_fast(width)
    product = np.fft.rfft2(padded, shape) * np.fft.rfft2(kernel, shape)
    filtered = np.fft.irfft2(product, shape)[:, 2 * row : height, 2 * column : width]
    return list(np.maximum(filtered, 0))  # rounding may leave less


def _next_fast(size: int) -> int:
    """Return the next size that has no prime factor but 2, 3 and 5: others take the Fourier transform longer."""
    while True:
        rest = size
        for factor in (2, 3, 5):
            while rest % factor == 0:
                rest //= factor
        if rest == 1:
            return size
        size += 1


def _size_invariant_f(image: _Image) -> float:
    """Return the mean F over objects and thresholds, each object alone in its box.

    Li et al., "Size-invariance matters: rethinking metrics and losses for imbalanced multi-object salient object
    detection", ICML 2024.
    """
    levels = (image.values * 255).astype(np.uint8)
    boxes = _boxes(image.mask) or [(slice(None), slice(None))]
    means = []
    for box in boxes:
        mask = image.mask[box]
        counts = [np.bincount(levels[box][where], minlength=256)[::-1].cumsum()[::-1] for where in (mask, ~mask)]
        hits, alarms = counts[0], counts[1]
        alarms[0] = mask.size - hits[0] + image.mask.size - mask.size  # all else is 0, and at the lowest threshold
        precision, recall = hits / np.maximum(hits + alarms, 1), hits / max(int(np.count_nonzero(mask)), 1)
        means.append(float(f_measure(precision, recall).mean()))
    return float(np.mean(means))


def _size_invariant_mae(image: _Image) -> float:
    """Return the mean error of each object's box, and of the rest in its proportion (Li et al., ICML 2024)."""
    errors = np.abs(image.values - image.mask)
    boxes = _boxes(image.mask)
    if not boxes:
        return float(errors.mean())
    rest = np.ones(image.mask.shape, dtype=np.bool_)
    for box in boxes:
        rest[box] = False
    num_rest = np.count_nonzero(rest)
    share = num_rest / (rest.size - num_rest)
    of_rest = share * float(errors[rest].mean()) if num_rest else 0.0
    return (of_rest + sum(float(errors[box].mean()) for box in boxes)) / (len(boxes) + share)


def _boxes(mask: BoolArray) -> list[tuple[slice, slice]]:
    """Return the boxes of the objects: connected at the sides, and of some size, or else the largest."""
    areas, boxes = connected(mask, corners=False)
    least = min(_LEAST_OBJECT, areas.max(initial=0))
    return [box for area, box in zip(areas, boxes, strict=True) if area >= least]


def _camouflage_context(image: _Image) -> float:
    """Return the context measure weighted by how well each pixel of the object blends in (Wang et al., 2025)."""
    if image.photograph is None:
        raise ValueError("the camouflage context measure needs the photograph")
    measure = _imported("py_sod_metrics", "pysodmetrics", "camouflage_context").CamouflageContextMeasure()
    measure.step(image.values, image.mask, img=image.photograph, normalize=False)
    return measure.get_results()["ccm"]


def _correction_effort(image: _Image) -> float:
    """Return the human correction effort: how many clicks would mend the mask at threshold 0.5.

    Qin et al., "Highly accurate dichotomous image segmentation", ECCV 2022.
    """
    measure = _imported("py_sod_metrics", "pysodmetrics", "correction_effort").HumanCorrectionEffortMeasure()
    measure.step(image.values, image.mask, normalize=False)
    return measure.get_results()["hce"]


FURTHER: dict[str, Callable[[_Image], float]] = {
    "balanced_error": _balanced_error,
    "multiscale_iou": _multiscale_iou,
    "context": _context,
    "camouflage_context": _camouflage_context,
    "size_invariant_f": _size_invariant_f,
    "size_invariant_mae": _size_invariant_mae,
    "correction_effort": _correction_effort,
}
NEED_PHOTOGRAPHS = frozenset({"camouflage_context"})
_PACKAGES = {  # measure -> package -> what pip calls it
    "size_invariant_f": {"scipy.ndimage": "scipy"},
    "size_invariant_mae": {"scipy.ndimage": "scipy"},
    "camouflage_context": {"py_sod_metrics": "pysodmetrics"},
    "correction_effort": {"py_sod_metrics": "pysodmetrics"},
}
