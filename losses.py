"""Losses for camouflaged-object segmentation.

Shapes: B batch, H W height and width. Logits are unbounded scores before the sigmoid. Masks are 0 for background, 1 for
object, and 2 for pixels that do not count: their weight is 0. Without such pixels, all losses are bitwise those of
masks of 0 and 1. Every loss is computed in float32 with autocast off: sums over H*W pixels exceed fp16's maximum of
65,504.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def boundary_weights(masks: Tensor, kernel_size: int = 31) -> Tensor:
    """Return a weight from 1 to 6 for each pixel, high at outlines and in thin parts.

    w = 1 + 5 * |mean of the mask over kernel_size x kernel_size - mask|  (Wei et al., "F3Net", AAAI 2020)

    The mean comes from differences of running integer sums: exact, and equally fast for any kernel size.

    Shape:
        masks (B, 1, H, W), 0 or 1 -> (B, 1, H, W)
    """
    pad = kernel_size // 2
    counts = F.pad(masks.to(torch.int32), (pad + 1, pad, pad + 1, pad))
    for dim, size in ((-1, masks.shape[-1]), (-2, masks.shape[-2])):
        sums = counts.cumsum(dim, dtype=torch.int32)
        counts = sums.narrow(dim, kernel_size, size) - sums.narrow(dim, 0, size)
    return 1 + 5 * (counts / kernel_size**2 - masks).abs()


def structure_loss(logits: Tensor, masks: Tensor, weights: Tensor) -> Tensor:
    """Return boundary-weighted binary cross-entropy plus IoU loss, averaged over the batch (Wei et al., 2020).

    Each image's cross-entropy is normalised by its own sum of weights. Adding 1 to intersection and union keeps the IoU
    term defined, with a usable gradient, if a mask is empty.

    Shape:
        logits, masks of 0 and 1, weights (0 for pixels that do not count): (B, 1, H, W)

    Returns:
        scalar, >= 0
    """
    logits, masks, weights = logits.flatten(1), masks.flatten(1), weights.flatten(1)
    weighted_masks = weights * masks
    pixelwise = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
    total_weight = weights.sum(dim=1).clamp(min=torch.finfo(weights.dtype).tiny)  # 0 if no pixel of an image counts
    cross_entropy = torch.linalg.vecdot(weights, pixelwise) / total_weight
    probabilities = logits.sigmoid()
    intersection = torch.linalg.vecdot(probabilities, weighted_masks)
    total = torch.linalg.vecdot(probabilities, weights) + weighted_masks.sum(dim=1)
    soft_iou = (intersection + 1) / (total - intersection + 1)
    return (cross_entropy + 1 - soft_iou).mean()


def uncertainty_loss(logits: Tensor, weights: Tensor | float = 1.0) -> Tensor:
    """Return 1 - |2p - 1|^2 averaged over pixels: 1 if all p are 0.5, 0 if all are 0 or 1 (Pang et al., CVPR 2022).

    Shape:
        logits, weights: (B, 1, H, W)

    Returns:
        scalar in [0, 1], if the weights are 1 on average
    """
    return ((1 - (2 * logits.sigmoid() - 1).square()) * weights).mean()


def deep_supervision_loss(side_logits: Sequence[Tensor], masks: Tensor, uncertainty_weight: float | Tensor) -> Tensor:
    """Return the training loss: structure loss of every side output plus uncertainty loss of the finest.

    Side outputs are resized to the masks' size and weighted ..., 1/4, 1/2, 1 from coarse to fine.

    Args:
        side_logits: coarse to fine, each (B, 1, h, w) of any float type and size.
        masks: (B, 1, H, W), 0, 1 or 2.
        uncertainty_weight: factor of the uncertainty loss, meant to rise from 0 to 1 during training: early on, pushing
            probabilities to the extremes would harden guesses.

    Returns:
        scalar, float32
    """
    with torch.autocast(masks.device.type, enabled=False):
        counts = masks < 2
        masks = masks.float() * counts
        weights = boundary_weights(masks) * counts
        num_counting = counts.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
        # Exactly 1 if all pixels count. A division of tensors: of a number by a tensor, torch makes a product.
        mean_weights = counts * (torch.full_like(num_counting, counts[0].numel()) / num_counting)
        loss = torch.zeros((), device=masks.device)
        for level, logits in enumerate(reversed(side_logits)):
            full_size = F.interpolate(logits.float(), size=masks.shape[-2:], mode="bilinear", align_corners=False)
            loss = loss + structure_loss(full_size, masks, weights) / 2**level
            if level == 0:
                loss = loss + uncertainty_weight * uncertainty_loss(full_size, mean_weights)
    return loss
