"""What was found in a photograph: how much of it, how many objects, where, and how doubtful it is."""

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from evaluation.metrics import BoolArray, ByteArray, IntArray

CSV_COLUMNS = ("file", "width", "height", "object_share", "presence", "objects", "boxes", "doubt")


@dataclass(frozen=True)
class Found:
    """A network's answer for a photograph.

    Attributes:
        levels: (H, W), probabilities times 255.
        mask: (H, W), True where the probability reaches the threshold.
    """

    levels: ByteArray
    mask: BoolArray


@dataclass(frozen=True)
class Finding:
    """The same in numbers.

    Attributes:
        width: of the photograph, in pixels.
        height: likewise.
        object_share: of the photograph's pixels that are object.
        presence: highest probability.
        boxes: left, top, width and height of each object in pixels, the largest object first.
        doubt: 1 minus the Dice score that the probabilities promise for the mask; of an empty mask, the presence.
    """

    width: int
    height: int
    object_share: float
    presence: float
    boxes: tuple[tuple[int, int, int, int], ...]
    doubt: float

    def row(self, file: str) -> list[str]:
        """Return the values of ``CSV_COLUMNS``."""
        boxes = "; ".join(" ".join(map(str, box)) for box in self.boxes)
        shares = f"{self.object_share:.6f}", f"{self.presence:.4f}"
        return [file, str(self.width), str(self.height), *shares, str(len(self.boxes)), boxes, f"{self.doubt:.4f}"]


def describe(found: Found, least: float) -> Finding:
    """Return a finding in numbers.

    Args:
        found: a network's answer.
        least: smallest object, as a share of the photograph's pixels; smaller ones have no box.

    Raises:
        ValueError: scipy is missing.
    """
    mask, size = found.mask, found.mask.size
    height, width = mask.shape
    probability_sum, inside_sum = float(found.levels.sum()) / 255, float(found.levels[mask].sum()) / 255
    num_found, presence = int(np.count_nonzero(mask)), float(found.levels.max()) / 255
    doubt = 1 - 2 * inside_sum / (num_found + probability_sum) if num_found else presence
    areas, places = connected(mask, corners=True)
    boxes = [
        (columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
        for area, (rows, columns) in sorted(zip(areas, places, strict=True), key=lambda entry: -entry[0])
        if area >= least * size
    ]
    return Finding(width, height, num_found / size, presence, tuple(boxes), doubt)


def connected(mask: BoolArray, corners: bool) -> tuple[IntArray, list[tuple[slice, slice]]]:
    """Return the area in pixels of each object, and its rows and columns.

    Args:
        mask: (H, W), True on objects.
        corners: whether pixels that touch at a corner are one object.

    Raises:
        ValueError: scipy is missing.
    """
    ndimage = require_scipy()
    labels, number = ndimage.label(mask, np.ones((3, 3)) if corners else None)
    return np.bincount(labels.ravel(), minlength=number + 1)[1:], ndimage.find_objects(labels)


def require_scipy() -> Any:
    """Return the module that counts objects, which is no requirement.

    Raises:
        ValueError: scipy is missing.
    """
    try:
        return importlib.import_module("scipy.ndimage")
    except ImportError as error:
        raise ValueError("counting objects needs scipy: pip install scipy") from error
