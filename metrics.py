"""Scores of one prediction against one mask, as this field defines them.

Every function takes probabilities in [0, 1] and masks of 0 or 1, both (B, 1, H, W) float32, and returns one score per
image, (B,): averages over a data set are means of image scores. Pooling pixels over the set instead would let large
objects speak for small ones.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_EPSILON = float(np.spacing(1))


def iou(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Intersection over union at threshold 0.5; 1 where prediction and mask are both empty."""
    intersection, total = _overlap(probabilities, masks)
    union = total - intersection
    return torch.where(union > 0, intersection / union.clamp(min=1), 1.0)


def dice(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Dice coefficient at threshold 0.5; 1 where prediction and mask are both empty."""
    intersection, total = _overlap(probabilities, masks)
    return torch.where(total > 0, 2 * intersection / total.clamp(min=1), 1.0)


def mae(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Mean absolute error over the pixels."""
    return (probabilities - masks).abs().mean(dim=(1, 2, 3))


def s_measure(probabilities: Tensor, masks: Tensor) -> Tensor:
    """Structure measure with alpha = 0.5 (Fan et al., ICCV 2017): agreement of objects and of four regions.

    Image by image in float64 on the CPU: the regions meet at the mask's centroid, which differs from image to image.
    In NumPy, since flat regions divide rounding errors by each other, and only the same sums give the same score as
    the reference implementation, pysodmetrics.
    """
    pairs = zip(probabilities.double().cpu().numpy(), masks.cpu().numpy() > 0.5, strict=True)
    return torch.tensor([_s_measure(prediction[0], mask[0]) for prediction, mask in pairs], dtype=torch.float64)


def _overlap(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    predicted = (probabilities > 0.5).float()
    return (predicted * masks).sum(dim=(1, 2, 3)), (predicted + masks).sum(dim=(1, 2, 3))


def _s_measure(prediction: FloatArray, mask: BoolArray) -> float:
    share = float(mask.mean())
    if share == 0:
        return 1 - float(prediction.mean())
    if share == 1:
        return float(prediction.mean())
    objects = _object_score(prediction[mask]) * share + _object_score((1 - prediction)[~mask]) * (1 - share)
    return max(0.0, 0.5 * objects + 0.5 * _region_score(prediction, mask))


def _object_score(values: FloatArray) -> float:
    mean = float(values.mean())
    deviation = float(values.std(ddof=1)) if values.size > 1 else 0.0
    return 2 * mean / (mean**2 + 1 + deviation + _EPSILON)


def _region_score(prediction: FloatArray, mask: BoolArray) -> float:
    """Structural similarity of the four rectangles that meet at the mask's centroid, weighted by their areas."""
    row, column = (int(centre) + 1 for centre in np.argwhere(mask).mean(axis=0).round())
    score = 0.0
    for rows in (slice(None, row), slice(row, None)):
        for columns in (slice(None, column), slice(column, None)):
            region = mask[rows, columns]
            if region.size:
                score += _structural_similarity(prediction[rows, columns], region) * region.size / mask.size
    return score


def _structural_similarity(prediction: FloatArray, mask: BoolArray) -> float:
    mean_p, mean_m = prediction.mean(), mask.mean()
    freedom = mask.size - 1 + _EPSILON
    variance_p = np.sum((prediction - mean_p) ** 2) / freedom
    variance_m = np.sum((mask - mean_m) ** 2) / freedom
    covariance = np.sum((prediction - mean_p) * (mask - mean_m)) / freedom
    numerator = 4 * mean_p * mean_m * covariance
    denominator = (mean_p**2 + mean_m**2) * (variance_p + variance_m)
    if numerator != 0:
        return float(numerator / (denominator + _EPSILON))
    return 1.0 if denominator == 0 else 0.0
