"""Search for duplicate photographs whose files differ, and for several photographs of one scene.

The search has two steps, on grey thumbnails of 32 x 32. First, a 64-bit hash of the lowest frequencies picks candidates
among all pairs, mirror images included, with one matrix product. Then the details of each candidate pair are shifted
into place and correlated, over the whole thumbnail and in nine blocks. Detail is the thumbnail minus its blurred self:
light above and dark below is too common to distinguish two photographs. If an animal has moved, its scene is still the
same in most blocks; a photograph that was scaled, compressed or mirrored is the same in every block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

from data.masks import BoolArray, UInt8Array

FloatArray = NDArray[np.float32]

THUMBNAIL_SIDE = 32
_BLOCK = 8  # pixels of the thumbnail
_MAX_SHIFT = 4  # pixels of the thumbnail
_BLUR = 4  # radius
_ROWS = 1024  # of the distance matrix at a time
_CANDIDATES = 2048  # aligned at a time
_MIN_DETAIL = 1.5  # standard deviation in grey levels; a flatter thumbnail would compare noise

# Chosen on CAMO by looking at the pairs: see docs/decisions.md.
_MAX_DISTANCE = 18  # bits
_SAME_SCENE, _SAME_SCENE_ON_AVERAGE = 0.5, 0.55  # correlation of all detail and of the median block
_SAME_PHOTOGRAPH, _SAME_IN_EVERY_BLOCK = 0.95, 0.8


@dataclass(frozen=True)
class Likeness:
    """Match between two photographs, given by position, ``first`` < ``second``."""

    first: int
    second: int
    correlation: float  # of their detail
    same_photograph: bool  # otherwise the same scene
    mirrored: bool


def thumbnail(image: Image.Image) -> UInt8Array:
    """Shrink an RGB image of any size and aspect ratio to (32, 32) grey levels."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(image.convert("L").resize(side, Image.Resampling.BILINEAR, reducing_gap=3.0))


def find_alike(thumbnails: UInt8Array) -> list[Likeness]:
    """Return all pairs that show the same photograph or the same scene.

    Args:
        thumbnails: (N, 32, 32); N may be 0.
    """
    grey = thumbnails.astype(np.float32)
    detail = grey - _blurred(grey)
    has_detail = detail.std(axis=(1, 2)) >= _MIN_DETAIL
    bits = _hash_bits(grey)
    alike = []
    for mirrored in (False, True):
        other_bits = _hash_bits(grey[:, :, ::-1]) if mirrored else bits
        for first, second in _candidates(bits, other_bits, has_detail):
            there = detail[second][:, :, ::-1] if mirrored else detail[second]
            correlation, blocks = _correlate(detail[first], there)
            overall = np.stack([correlation, np.median(blocks, axis=1)])
            same_scene = (overall.min(axis=0) >= _SAME_SCENE) & (overall.mean(axis=0) >= _SAME_SCENE_ON_AVERAGE)
            same_photograph = (correlation >= _SAME_PHOTOGRAPH) & (blocks.min(axis=1) >= _SAME_IN_EVERY_BLOCK)
            alike += [
                Likeness(int(first[n]), int(second[n]), float(correlation[n]), bool(same_photograph[n]), mirrored)
                for n in np.flatnonzero(same_scene)
            ]
    return alike


def _hash_bits(grey: FloatArray) -> FloatArray:
    """Return (N, 64) of 1 where a thumbnail's 8 x 8 lowest cosine coefficients are above their median, -1 elsewhere."""
    position, frequency = np.arange(THUMBNAIL_SIDE), np.arange(8)
    cosines = np.cos(np.pi * np.outer(frequency, 2 * position + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)
    coefficients = (cosines @ grey @ cosines.T).reshape(len(grey), 64)
    median = np.median(coefficients[:, 1:], axis=1, keepdims=True) if len(grey) else 0  # the first is brightness
    return np.where(coefficients > median, np.float32(1), np.float32(-1))


def _candidates(
    bits: FloatArray, other_bits: FloatArray, eligible: BoolArray
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Yield positions first < second of thumbnails with similar hashes, a few thousand at a time."""
    for start in range(0, len(bits), _ROWS):
        rows = bits[start : start + _ROWS]
        distance = (64 - rows @ other_bits[start:].T) / 2
        first, second = np.nonzero(np.triu(distance <= _MAX_DISTANCE, k=1))
        keep = eligible[first + start] & eligible[second + start]
        first, second = first[keep] + start, second[keep] + start
        for at in range(0, len(first), _CANDIDATES):
            yield first[at : at + _CANDIDATES], second[at : at + _CANDIDATES]


def _correlate(here: FloatArray, there: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return the correlation of (N, 32, 32) details at their best shift: (N,) overall, (N, 9) in blocks."""
    side, span = THUMBNAIL_SIDE, 2 * _MAX_SHIFT + 1
    spectrum = np.conj(np.fft.rfft2(here)) * np.fft.rfft2(there)
    by_shift = np.fft.fftshift(np.fft.irfft2(spectrum, s=(side, side)), axes=(1, 2))
    middle = slice(side // 2 - _MAX_SHIFT, side // 2 + _MAX_SHIFT + 1)
    best = by_shift[:, middle, middle].reshape(len(here), -1).argmax(axis=1)
    down, right = best // span - _MAX_SHIFT, best % span - _MAX_SHIFT
    window = side - 2 * _MAX_SHIFT
    top, left = _MAX_SHIFT - down // 2, _MAX_SHIFT - right // 2
    a, b = _crop(here, top, left, window), _crop(there, top + down, left + right, window)
    split = (len(here), window // _BLOCK, _BLOCK, window // _BLOCK, _BLOCK)
    blocks = _correlation(a.reshape(split), b.reshape(split), axes=(2, 4))
    return _correlation(a, b, axes=(1, 2)), blocks.reshape(len(here), -1)


def _crop(images: FloatArray, top: NDArray[Any], left: NDArray[Any], side: int) -> FloatArray:
    """Cut a square out of each image, at a corner of its own."""
    number, along = np.arange(len(images))[:, None, None], np.arange(side)
    return images[number, top[:, None, None] + along[:, None], left[:, None, None] + along]


def _correlation(a: FloatArray, b: FloatArray, axes: tuple[int, int]) -> FloatArray:
    a, b = a - a.mean(axis=axes, keepdims=True), b - b.mean(axis=axes, keepdims=True)
    # A floor of one grey level, so that two flat areas count as alike whatever their noise.
    power = 1.0 * a.shape[axes[0]] * a.shape[axes[1]]
    return ((a * b).sum(axes) + power) / np.sqrt(((a * a).sum(axes) + power) * ((b * b).sum(axes) + power))


def _blurred(grey: FloatArray) -> FloatArray:
    """Average (N, 32, 32) over 9 x 9 pixels, repeating the border."""
    for axis in (1, 2):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (_BLUR, _BLUR)
        padded = np.pad(grey, padding, mode="edge")
        grey = sliding_window_view(padded, 2 * _BLUR + 1, axis=axis).mean(axis=-1, dtype=np.float32)
    return grey
