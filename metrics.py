"""Scores of one prediction against one mask, as this field defines them.

Every function takes probabilities in [0, 1] and masks of 0 or 1, both (B, 1, H, W) float32, and returns one score per
image, (B,): averages over a data set are means of image scores. Pooling pixels over the set instead would let large
objects speak for small ones.
"""

import torch
from torch import Tensor

_EPSILON = torch.finfo(torch.float64).eps  # as in the reference implementation, pysodmetrics


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

    Runs image by image on the CPU in float64: the four regions meet at the mask's centroid, which differs per image.
    """
    pairs = zip(probabilities.double().cpu(), masks.cpu() > 0.5, strict=True)
    return torch.stack([_s_measure_of_image(prediction[0], mask[0]) for prediction, mask in pairs])


def _overlap(probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    predicted = (probabilities > 0.5).float()
    return (predicted * masks).sum(dim=(1, 2, 3)), (predicted + masks).sum(dim=(1, 2, 3))


def _s_measure_of_image(prediction: Tensor, mask: Tensor) -> Tensor:
    share = mask.double().mean()
    if share == 0:
        return 1 - prediction.mean()
    if share == 1:
        return prediction.mean()
    objects = share * _object_similarity(prediction[mask]) + (1 - share) * _object_similarity(1 - prediction[~mask])
    return (0.5 * objects + 0.5 * _region_similarity(prediction, mask.double())).clamp(min=0)


def _object_similarity(values: Tensor) -> Tensor:
    mean = values.mean()
    deviation = values.std() if values.numel() > 1 else torch.zeros_like(mean)
    return 2 * mean / (mean.square() + 1 + deviation + _EPSILON)


def _region_similarity(prediction: Tensor, mask: Tensor) -> Tensor:
    """Structural similarity of the four rectangles that meet at the mask's centroid, weighted by their areas."""
    height, width = mask.shape
    rows, columns = mask.nonzero(as_tuple=True)
    split_row = int(rows.double().mean().round()) + 1
    split_column = int(columns.double().mean().round()) + 1
    score = torch.zeros((), dtype=torch.float64)
    for row_span in (slice(0, split_row), slice(split_row, height)):
        for column_span in (slice(0, split_column), slice(split_column, width)):
            region = mask[row_span, column_span]
            if region.numel() > 0:
                similarity = _structural_similarity(prediction[row_span, column_span], region)
                score = score + similarity * region.numel() / (height * width)
    return score


def _structural_similarity(prediction: Tensor, mask: Tensor) -> Tensor:
    count = mask.numel()
    mean_p, mean_m = prediction.mean(), mask.mean()
    variance_p = (prediction - mean_p).square().sum() / max(count - 1, 1)
    variance_m = (mask - mean_m).square().sum() / max(count - 1, 1)
    covariance = ((prediction - mean_p) * (mask - mean_m)).sum() / max(count - 1, 1)
    numerator = 4 * mean_p * mean_m * covariance
    denominator = (mean_p.square() + mean_m.square()) * (variance_p + variance_m)
    if numerator != 0:
        return numerator / (denominator + _EPSILON)
    return torch.ones_like(numerator) if denominator == 0 else torch.zeros_like(numerator)
