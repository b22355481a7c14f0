"""Find photographs that are there twice although their bytes differ, and moments of one scene.

Two steps on grey thumbnails of 32 x 32. A hash of 64 bits from their lowest frequencies picks candidates among all
pairs, mirror images included: one product of matrices. Then the candidates' detail (what is left once the thumbnail's
blurred self is taken away: light above, dark below are too common to tell two photographs apart) is shifted into place
and correlated, in all and in nine blocks. A scene stays the same in most blocks when an animal has moved in it; a
photograph that was scaled, compressed or mirrored is the same in every block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from PIL import Image

FloatArray = NDArray[np.float32]

THUMBNAIL_SIDE = 32
_BLOCK = 8  # pixels of the thumbnail
_SHIFT = 4  # the most that one thumbnail is moved over another, in pixels
_BLUR = 4  # radius
_ROWS = 1024  # of the matrix of distances at a time
_CANDIDATES = 2048  # aligned at a time
_LEAST_DETAIL = 1.5  # deviation in grey levels; a thumbnail with less is flat, and compares noise

# Measured on CAMO, by looking at the pairs: see docs/decisions.md.
_MOST_BITS_APART = 18
_SAME_SCENE, _SAME_SCENE_ON_AVERAGE = 0.5, 0.55  # correlation of all detail and of the median block
_SAME_PHOTOGRAPH, _SAME_IN_EVERY_BLOCK = 0.95, 0.8


@dataclass(frozen=True)
class Likeness:
    """Two photographs, by position, ``first`` < ``second``."""

    first: int
    second: int
    correlation: float  # of their detail
    same_photograph: bool  # else: of one scene
    mirrored: bool


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    """An RGB image of any size as (32, 32) uint8 grey, whatever its aspect ratio."""
    side = (THUMBNAIL_SIDE, THUMBNAIL_SIDE)
    return np.asarray(image.convert("L").resize(side, Image.Resampling.BILINEAR, reducing_gap=3.0))


def find_alike(thumbnails: NDArray[np.uint8]) -> list[Likeness]:
    """All pairs that are one photograph or one scene.

    Args:
        thumbnails: (N, 32, 32), N from 0 on.
    """
    grey = thumbnails.astype(np.float32)
    detail = grey - _blurred(grey)
    has_detail = detail.std(axis=(1, 2)) >= _LEAST_DETAIL
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
    """(N, 64) of -1 and 1: which of a thumbnail's lowest 8 x 8 cosine coefficients are above their median."""
    position, frequency = np.arange(THUMBNAIL_SIDE), np.arange(8)
    cosines = np.cos(np.pi * np.outer(frequency, 2 * position + 1) / (2 * THUMBNAIL_SIDE)).astype(np.float32)
    coefficients = (cosines @ grey @ cosines.T).reshape(len(grey), 64)
    median = np.median(coefficients[:, 1:], axis=1, keepdims=True) if len(grey) else 0  # the first is the brightness
    return np.where(coefficients > median, np.float32(1), np.float32(-1))


def _candidates(
    bits: FloatArray, other_bits: FloatArray, eligible: NDArray[np.bool_]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Positions first < second whose hashes are close, a few thousand at a time."""
    for start in range(0, len(bits), _ROWS):
        rows = bits[start : start + _ROWS]
        distance = (64 - rows @ other_bits[start:].T) / 2
        first, second = np.nonzero(np.triu(distance <= _MOST_BITS_APART, k=1))
        keep = eligible[first + start] & eligible[second + start]
        first, second = first[keep] + start, second[keep] + start
        for at in range(0, len(first), _CANDIDATES):
            yield first[at : at + _CANDIDATES], second[at : at + _CANDIDATES]


def _correlate(here: FloatArray, there: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Correlation of (N, 32, 32) details after the shift that suits them best: (N,), and in blocks (N, 9)."""
    side, span = THUMBNAIL_SIDE, 2 * _SHIFT + 1
    spectrum = np.conj(np.fft.rfft2(here)) * np.fft.rfft2(there)
    by_shift = np.fft.fftshift(np.fft.irfft2(spectrum, s=(side, side)), axes=(1, 2))
    middle = slice(side // 2 - _SHIFT, side // 2 + _SHIFT + 1)
    best = by_shift[:, middle, middle].reshape(len(here), -1).argmax(axis=1)
    down, right = best // span - _SHIFT, best % span - _SHIFT
    window = side - 2 * _SHIFT
    top, left = _SHIFT - down // 2, _SHIFT - right // 2
    a, b = _crop(here, top, left, window), _crop(there, top + down, left + right, window)
    split = (len(here), window // _BLOCK, _BLOCK, window // _BLOCK, _BLOCK)
    blocks = _correlation(a.reshape(split), b.reshape(split), axes=(2, 4))
    return _correlation(a, b, axes=(1, 2)), blocks.reshape(len(here), -1)


def _crop(images: FloatArray, top: NDArray[Any], left: NDArray[Any], side: int) -> FloatArray:
    """A square of each image, from a corner of its own."""
    number, along = np.arange(len(images))[:, None, None], np.arange(side)
    return images[number, top[:, None, None] + along[:, None], left[:, None, None] + along]


def _correlation(a: FloatArray, b: FloatArray, axes: tuple[int, int]) -> FloatArray:
    a, b = a - a.mean(axis=axes, keepdims=True), b - b.mean(axis=axes, keepdims=True)
    # A floor of one grey level: where both are flat they are alike, whatever their noise does.
    power = 1.0 * a.shape[axes[0]] * a.shape[axes[1]]
    return ((a * b).sum(axes) + power) / np.sqrt(((a * a).sum(axes) + power) * ((b * b).sum(axes) + power))


def _blurred(grey: FloatArray) -> FloatArray:
    """(N, 32, 32) averaged over 9 x 9 pixels, the border repeated."""
    for axis in (1, 2):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (_BLUR, _BLUR)
        padded = np.pad(grey, padding, mode="edge")
        grey = sliding_window_view(padded, 2 * _BLUR + 1, axis=axis).mean(axis=-1, dtype=np.float32)
    return grey
