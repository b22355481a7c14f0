"""Joint augmentation of image and mask, as a pure function of a seed: what to do is drawn first, then done in one go.

torchvision's transforms, one after the other, resample a rotated image twice and round it to bytes after every step,
which takes three times as long as all of this. Ranges, order and formulas are those of RandomHorizontalFlip,
RandomResizedCrop, RandomRotation and ColorJitter; but they move the mask of an image that is not rotated by half a
pixel against it.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_AREA = 0.9  # of a crop, as a share of the image
_ASPECT = 1.05  # the most that a crop's sides differ, as a ratio
_TRIES = 10
_ROTATED = 0.5  # share of the images
_LARGEST_ANGLE = 15.0  # degrees
_COLOUR = 0.2  # the most that brightness, contrast and saturation change
_LUMA = (0.2989, 0.587, 0.114)
_COLOUR_STEPS = ("brightness", "contrast", "saturation")


@dataclass(frozen=True)
class Augmentation:
    """What is done to one image and its mask: flip, crop, rotate about the crop's centre, change colours."""

    flip: bool
    top: int  # the crop, in pixels of the flipped image
    left: int
    height: int
    width: int
    angle: float  # degrees, counter-clockwise; 0: none
    colour_steps: tuple[tuple[str, float], ...]  # (brightness, contrast or saturation, factor), in this order


def draw_augmentation(img_size: int, seed: int) -> Augmentation:
    """A horizontal flip, a crop of at most a tenth of the area, a rotation of at most 15 degrees, mild colour.

    Camouflage lives in fine texture and colour: stronger photometric changes or larger crops remove the very evidence
    that separates an object from its background.
    """
    rng = random.Random(seed)
    flip = rng.random() < 0.5
    top, left, height, width = _draw_crop(img_size, rng)
    angle = rng.uniform(-_LARGEST_ANGLE, _LARGEST_ANGLE) if rng.random() < _ROTATED else 0.0
    steps = [(name, rng.uniform(1 - _COLOUR, 1 + _COLOUR)) for name in _COLOUR_STEPS]
    rng.shuffle(steps)
    return Augmentation(flip, top, left, height, width, angle, tuple(steps))


def augment(image: Tensor, mask: Tensor, augmentation: Augmentation) -> tuple[Tensor, Tensor]:
    """Do it, to images bilinearly and to masks by nearest neighbour; what a rotation brings in is 0.

    Shape:
        image (3, S, S) and mask (1, S, S), uint8, and so is what is returned
    """
    size, left = image.shape[-1], augmentation.left
    if augmentation.flip:  # the same crop of the image that is not flipped yet
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
    """As numbers that can go to a device and into a file, for ``augment_batch``: (B, 12) float32."""
    rows = []
    for drawn in augmentations:
        kinds = [_COLOUR_STEPS.index(name) for name, _ in drawn.colour_steps]
        factors = [factor for _, factor in drawn.colour_steps]
        rows.append([drawn.flip, drawn.top, drawn.left, drawn.height, drawn.width, drawn.angle, *kinds, *factors])
    return torch.tensor(rows, dtype=torch.float32)


def augment_batch(images: Tensor, masks: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """What ``augment`` does, for a batch on any device: the same pixels but for rounding. Nothing waits for the device.

    Args:
        images: (B, 3, S, S), 0 to 255, of any type.
        masks: (B, 1, S, S), 0 or 1.
        rows: (B, 12) of ``to_rows``.

    Returns:
        the same shapes and ranges, float32.
    """
    size, pixel = images.shape[-1], torch.arange(images.shape[-1], device=images.device)
    flip, top, left, height, width, angle = (rows[:, column, None, None] for column in range(6))
    flip, upright, radians = flip > 0, angle == 0, torch.deg2rad(angle)

    # Where each output pixel comes from: in the crop, -1 to 1; in pixels of the flipped image; of the image as it is.
    along = (pixel + 0.5) * 2 / size - 1
    x = along * radians.cos() - along[:, None] * radians.sin()
    y = along * radians.sin() + along[:, None] * radians.cos()
    x, y = ((x + 1) * width - 1) / 2, ((y + 1) * height - 1) / 2
    x = left + torch.where(upright, torch.minimum(x.clamp(min=0), width - 1), x)  # no zeros come in without a rotation
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
    for step in range(len(_COLOUR_STEPS)):
        kind, factor = rows[:, 6 + step, None, None, None], rows[:, 9 + step, None, None, None]
        grey = red * pixels[:, :1] + green * pixels[:, 1:2] + blue * pixels[:, 2:]
        mean = grey.mean(dim=(1, 2, 3), keepdim=True)
        end = torch.where(kind == 0, 0, torch.where(kind == 1, mean, grey))  # of brightness, contrast, saturation
        pixels = (factor * pixels + (1 - factor) * end).clamp(0, 255)
    return pixels.round(), labels


def _draw_crop(img_size: int, rng: random.Random) -> tuple[int, int, int, int]:
    """(top, left, height, width); the whole image where no crop of its shape fits."""
    for _ in range(_TRIES):
        area = img_size**2 * rng.uniform(_LEAST_AREA, 1)
        aspect = math.exp(rng.uniform(-math.log(_ASPECT), math.log(_ASPECT)))
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if height <= img_size and width <= img_size:
            return rng.randint(0, img_size - height), rng.randint(0, img_size - width), height, width
    return 0, 0, img_size, img_size


def _rotation_grid(size: int, angle: float, flip: bool) -> Tensor:
    """Where each output pixel comes from, (1, S, S, 2), in [-1, 1] over the crop: separable, so two outer sums."""
    along = (torch.arange(size) + 0.5) * 2 / size - 1
    cosine, sine = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    mirror = -1.0 if flip else 1.0
    grid = torch.empty(1, size, size, 2)
    torch.add(along * (mirror * cosine), (along * (-mirror * sine))[:, None], out=grid[0, :, :, 0])
    torch.add(along * sine, (along * cosine)[:, None], out=grid[0, :, :, 1])
    return grid


def _change_colour(pixels: Tensor, name: str, factor: float) -> None:
    """In place: (3, S, S) float, 0 to 255."""
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
