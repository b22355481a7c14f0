"""Joint augmentation of image and mask as a pure function of a seed: drawn first, then applied in one pass.

Ranges, order and formulas are those of torchvision's RandomHorizontalFlip, RandomResizedCrop, RandomRotation and
ColorJitter. Applied one after the other, those resample a rotated image twice and round to bytes after every step,
which takes three times as long; and if the image is not rotated, they shift its mask by half a pixel.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Value = TypeVar("Value")

_MIN_CROP_AREA = 0.9  # share of the image
_MAX_ASPECT = 1.05  # ratio of a crop's longer side to its shorter one
_CROP_TRIES = 10
_ROTATED = 0.5  # share of the images
_MAX_ANGLE = 15.0  # degrees
_MAX_COLOUR_CHANGE = 0.2  # of brightness, contrast and saturation
_LUMA = (0.2989, 0.587, 0.114)
_COLOUR_STEPS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True)
class Augmentation:
    """One image's augmentation: flip, crop, rotate about the crop's centre, change colours."""

    flip: bool
    top: int  # of the crop, in pixels of the flipped image
    left: int
    height: int
    width: int
    angle: float  # degrees, counter-clockwise; 0 for no rotation
    colour_steps: tuple[tuple[str, float], ...]  # (brightness, contrast or saturation, factor), in this order


class AugmentationRow(NamedTuple, Generic[Value]):
    """An augmentation as 12 numbers: a row of ``to_rows``, or the columns that ``augment_batch`` makes of all rows."""

    flip: Value  # 0 or 1
    top: Value  # pixels
    left: Value
    height: Value
    width: Value
    angle: Value  # degrees
    first_step: Value  # position in _COLOUR_STEPS
    second_step: Value
    third_step: Value
    first_factor: Value
    second_factor: Value
    third_factor: Value


def draw_augmentation(img_size: int, seed: int) -> Augmentation:
    """Draw a flip, a crop of at least 90 % of the area, a rotation of at most 15 degrees and mild colour changes.

    Camouflage lives in fine texture and colour: stronger colour changes or tighter crops would remove the very evidence
    that separates an object from its background.
    """
    rng = random.Random(seed)
    flip = rng.random() < 0.5
    top, left, height, width = _draw_crop(img_size, rng)
    angle = rng.uniform(-_MAX_ANGLE, _MAX_ANGLE) if rng.random() < _ROTATED else 0.0
    steps = [(name, rng.uniform(1 - _MAX_COLOUR_CHANGE, 1 + _MAX_COLOUR_CHANGE)) for name in _COLOUR_STEPS]
    rng.shuffle(steps)
    return Augmentation(flip, top, left, height, width, angle, tuple(steps))


def augment(image: Tensor, mask: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Augment an image (bilinear) and its mask (nearest neighbour); corners that a rotation exposes become 0.

    Shape:
        image (3, S, S) and mask (1, S, S), uint8, in and out
    """
    size, left = image.shape[-1], augmentation.left
    if augmentation.flip:  # crop before the flip: the same pixels
        left = size - left - augmentation.width
    rows = slice(augmentation.top, augmentation.top + augmentation.height)
    columns = slice(left, left + augmentation.width)
    image, mask = image[:, rows, columns], mask[:, rows, columns]
    if augmentation.angle:
        grid = _rotation_grid(size, augmentation.angle, augmentation.flip)
        pixels = F.grid_sample(image[None].float(), grid, mode="bilinear", align_corners=False)[0]
        mask = F.grid_sample(mask[None].float(), grid, mode="nearest", align_corners=False)[0].to(torch.uint8)
    else:
        if augmentation.flip:
            image, mask = image.flip(-1), mask.flip(-1)
        pixels = F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].float()
        mask = F.interpolate(mask[None], (size, size), mode="nearest-exact")[0]  # "nearest" is half a pixel off
    for name, factor in augmentation.colour_steps:
        _change_colour(pixels, name, factor)
    return pixels.round_().to(torch.uint8), mask


def to_rows(augmentations: Sequence[Augmentation]) -> Tensor:
    """Return the augmentations as numbers, for a device or a file: (B, 12) float32, one ``AugmentationRow`` each."""
    rows = []
    for drawn in augmentations:
        steps = [_COLOUR_STEPS.index(name) for name, _ in drawn.colour_steps]
        factors = [factor for _, factor in drawn.colour_steps]
        crop = drawn.top, drawn.left, drawn.height, drawn.width
        rows.append(AugmentationRow(drawn.flip, *crop, drawn.angle, *steps, *factors))
    return torch.tensor(rows, dtype=torch.float32)


def augment_batch(images: Tensor, masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Augment a batch on any device, without a host sync. Pixels are those of ``augment`` up to rounding.

    Args:
        images: (B, 3, S, S), 0 to 255, of any dtype.
        masks: (B, 1, S, S), 0 or 1.
        rows: (B, 12) from ``to_rows``.

    Returns:
        images and masks of the same shapes and ranges, float32.
    """
    size, pixel = images.shape[-1], torch.arange(images.shape[-1], device=images.device)
    row = AugmentationRow(*rows[:, :, None, None].unbind(1))  # each (B, 1, 1)
    flip, upright, radians = row.flip > 0, row.angle == 0, torch.deg2rad(row.angle)
    top, left, height, width = row.top, row.left, row.height, row.width

    # Source of each output pixel: first in the crop, -1 to 1; then in pixels of the flipped image; then of the image.
    along = (pixel + 0.5) * 2 / size - 1
    x = along * radians.cos() - along[:, None] * radians.sin()
    y = along * radians.sin() + along[:, None] * radians.cos()
    x, y = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    x = left + torch.where(upright, torch.minimum(x.clamp(min=0), width - 1), x)  # only a rotation brings in zeros
    y = top + torch.where(upright, torch.minimum(y.clamp(min=0), height - 1), y)
    x = torch.where(flip, size - 1 - x, x)
    grid = torch.stack([(2 * x + 1) / size - 1, (2 * y + 1) / size - 1], dim=-1)

    column = torch.where(flip, size - 1 - pixel, pixel)  # (B, 1, S)
    in_rows = ((pixel >= top) & (pixel < top + height)).mT  # (B, S, 1)
    outside = ~(in_rows & (column >= left) & (column < left + width))[:, None]
    pixels, labels = images.float().masked_fill(outside, 0), masks.float().masked_fill(outside, 0)
    pixels = F.grid_sample(pixels, grid, mode="bilinear", align_corners=False)
    labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)
    red, green, blue = _LUMA
    for step, factor in (
        (row.first_step[:, None], row.first_factor[:, None]),
        (row.second_step[:, None], row.second_factor[:, None]),
        (row.third_step[:, None], row.third_factor[:, None]),
    ):
        grey = red * pixels[:, :1] + green * pixels[:, 1:2] + blue * pixels[:, 2:]
        mean = grey.mean(dim=(1, 2, 3), keepdim=True)
        end = torch.where(step == 0, 0, torch.where(step == 1, mean, grey))  # of brightness, contrast, saturation
        pixels = (factor * pixels + (1 - factor) * end).clamp(0, 255)
    return pixels.round(), labels


def _draw_crop(img_size: int, rng: random.Random) -> tuple[int, int, int, int]:
    """Draw (top, left, height, width); the whole image if no crop of the drawn shapes fits."""
    for _ in range(_CROP_TRIES):
        area = img_size**2 * rng.uniform(_MIN_CROP_AREA, 1)
        aspect = math.exp(rng.uniform(-math.log(_MAX_ASPECT), math.log(_MAX_ASPECT)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if height <= img_size and width <= img_size:
            return rng.randint(0, img_size - height), rng.randint(0, img_size - width), height, width
    return 0, 0, img_size, img_size


def _rotation_grid(size: int, angle: float, flip: bool) -> Tensor:
    """Return the source of each output pixel, (1, S, S, 2), in [-1, 1] over the crop: separable, so two outer sums."""
    along = (torch.arange(size) + 0.5) * 2 / size - 1
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    mirror = -1.0 if flip else 1.0
    grid = torch.empty(1, size, size, 2)
    torch.add(along * (mirror * cosine), (along * (-mirror * sine))[:, None], out=grid[0, :, :, 0])
    torch.add(along * sine, (along * cosine)[:, None], out=grid[0, :, :, 1])
    return grid


def _change_colour(pixels: Tensor, name: str, factor: float) -> None:
    """Apply one colour step in place to (3, S, S) floats of 0 to 255."""
    if name == "brightness":
        pixels.mul_(factor)
    else:
        red, green, blue = _LUMA
        grey = (pixels[0] * red).add_(pixels[1], alpha=green).add_(pixels[2], alpha=blue)
        if name == "contrast":
            pixels.mul_(factor).add_((1 - factor) * grey.mean())
        else:
            pixels.mul_(factor).add_(grey, alpha=1 - factor)
    pixels.clamp_(0, 255)
