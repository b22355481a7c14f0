"""Looks at single masks and predictions: which values they have, and whether these form regions.

A look counts how often each value occurs, how often inside of regions (in a pixel like its four neighbours), and how
often on the frame of the image. Label images consist of regions; soft outlines and noise do not.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.masks import alpha_of, brightest, has_alpha, to_rgb
from data.opening import open_picture

NOISE = 0.05  # largest difference between neighbours that are the same but for noise, as a share of the range

_SAMPLE = 48  # files; what one file in ten has escapes it once in 150 times
_MAX_PIXELS = 2**20  # looked at in one file: of a larger one, bands of rows
_BAND = 16  # rows
_MAX_VALUES = 1024  # distinct ones; a mask with more is no label image
_MAX_LABELS = 32  # where it is opaque, of a mask with a background of its own
_MAX_BORDERED = 8  # values
_CELL = 8  # side of the cubes in which noisy colours are counted: 32 along each channel

Kind = Literal["byte", "integer", "float"]  # of the stored values
T = TypeVar("T")


@dataclass(frozen=True)
class Levels:
    """Values of a mask in one channel. Colours are packed into one number, 0xRRGGBB.

    Attributes:
        counts: pixels by value; empty if there are more than ``_MAX_VALUES``.
        inside: of these, pixels inside of regions.
        frame: outermost pixels by value.
        flat: pixels that are like their neighbours but for noise, by approximate value.
        borders: unlike neighbours by their two values, the smaller first; empty if there are many values.
        num_pixels: all pixels that were looked at.
        low: smallest value.
        high: largest value.
        num_steps: neighbours that are unlike each other, in masks of five values and more.
        num_small_steps: of these, neighbours without another of the mask's values between theirs.
    """

    counts: Counter[float]
    inside: Counter[float]
    frame: Counter[float]
    flat: Counter[float]
    borders: Counter[tuple[float, float]]
    num_pixels: int
    low: float
    high: float
    num_steps: int = 0
    num_small_steps: int = 0

    @property
    def varies(self) -> bool:
        return self.high > self.low


@dataclass(frozen=True)
class Look:
    """A look at one file."""

    values: Levels  # of the brightest channel
    lossy: bool = False  # a JPEG
    kind: Kind = "byte"
    colours: Levels | None = None  # of colour and palette images
    is_coloured: bool = False  # more than shades of grey, or of one primary colour
    alpha: Levels | None = None  # None: no transparency, or everywhere the same
    has_opaque_background: bool = False  # a few labels where it is opaque, one of them black
    index: Levels | None = None  # of a palette image
    palette: dict[float, float] = field(default_factory=dict)  # packed colour of each index that occurs

    @property
    def varies(self) -> bool:
        channels = (self.values, self.colours, self.alpha, self.index)
        return any(levels is not None and levels.varies for levels in channels)


def map_sample(function: Callable[[Image.Image, bool], T], files: Iterable[Path], most: int = _SAMPLE) -> list[T]:
    """Call a function on 48 images, the same ones each time; of fewer, on all. Return the results.

    Args:
        function: takes an image, upright by its EXIF orientation, and whether the file is a JPEG.
        files: image files. Those that cannot be decoded are left out: whoever uses them reports that.
        most: another number than 48.
    """

    def result(path: Path) -> T | None:
        try:
            if not path.is_file():  # opening a pipe would wait for its other end
                return None
            with open_picture(path) as file:
                return function(ImageOps.exif_transpose(file), file.format == "JPEG")
        except Exception:  # Pillow's plug-ins raise anything for a damaged file
            return None

    ordered = sorted(files)
    sample = ordered if len(ordered) <= most else random.Random("masks").sample(ordered, most)
    with ThreadPoolExecutor(max_workers=4) as pool:
        return [found for found in pool.map(result, sample) if found is not None]


def look_at(image: Image.Image, lossy: bool) -> Look:
    """Look at a mask or a prediction."""
    values = brightest(image)
    rgb = None if image.mode[0] in "LIF1" else np.array(to_rgb(image))
    alpha, has_opaque_background, index, palette = None, False, None, {}
    if has_alpha(image):
        transparency = alpha_of(image)
        levels = levels_of(transparency)
        if levels.varies:
            alpha = levels
            shown = _bands(values) if rgb is None else pack(_bands(rgb))
            labels = np.unique(shown[_bands(transparency) > levels.high / 2])
            has_opaque_background = bool(labels[0] == 0 and 2 <= len(labels) <= _MAX_LABELS)
    if image.mode == "P" and rgb is not None:
        indices = np.array(image)
        index = levels_of(indices)
        found, positions = np.unique(indices, return_index=True)
        palette = dict(zip(found.tolist(), pack(rgb.reshape(1, -1, 3)[:, positions])[0].tolist(), strict=True))
    return Look(
        values=levels_of(values),
        lossy=lossy,
        kind=kind_of(values),
        colours=None if rgb is None else levels_of(rgb),
        is_coloured=rgb is not None and _is_coloured(_bands(rgb)),
        alpha=alpha,
        has_opaque_background=has_opaque_background,
        index=index,
        palette=palette,
    )


def levels_of(pixels: NDArray[Any]) -> Levels:
    """Return the levels of values, (H, W), or of colours, (H, W, 3)."""
    edges = [pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]]
    frame, pixels = np.concatenate(edges), _bands(pixels)
    values = pack(pixels) if pixels.ndim == 3 else pixels
    found = _distinct(values)
    is_few = len(found) <= _MAX_VALUES
    codes = np.searchsorted(found, values).astype(np.int16) if is_few else np.empty(0, dtype=np.int16)
    inside: Counter[float] = Counter()
    num_steps = num_small_steps = 0
    if is_few and len(found) > 2:
        middle = codes[1:-1, 1:-1]
        same = (middle == codes[:-2, 1:-1]) & (middle == codes[2:, 1:-1])
        same &= (middle == codes[1:-1, :-2]) & (middle == codes[1:-1, 2:])
        inside = _counter(found, np.bincount(middle[same], minlength=len(found)))
    if is_few and len(found) > 4:
        steps = np.abs(np.diff(codes, axis=1))
        num_steps, num_small_steps = int((steps > 0).sum()), int((steps == 1).sum())
    return Levels(
        counts=_counter(found, np.bincount(codes.ravel(), minlength=len(found))) if is_few else Counter(),
        inside=inside,
        frame=_counter(*np.unique(pack(frame[None])[0] if frame.ndim == 2 else frame, return_counts=True)),
        flat=_flat(pixels),
        borders=_borders(codes, found) if len(found) <= _MAX_BORDERED else Counter(),
        num_pixels=values.size,
        low=found[0].item(),
        high=found[-1].item(),
        num_steps=num_steps,
        num_small_steps=num_small_steps,
    )


def kind_of(values: NDArray[Any]) -> Kind:
    """Return the kind of an image's stored values: at most 8 bits, more, or floats."""
    if values.dtype.kind == "f":
        return "float"
    return "byte" if values.dtype == np.uint8 else "integer"


def pack(rgb: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Return colours, (H, W, 3), as numbers, (H, W)."""
    red, green, blue = (rgb[:, :, channel].astype(np.int32) for channel in range(3))
    return red << 16 | green << 8 | blue


def unpack(colour: float) -> tuple[int, int, int]:
    """Return red, green and blue of a packed colour."""
    return int(colour) >> 16, int(colour) >> 8 & 255, int(colour) & 255


def _bands(pixels: NDArray[Any]) -> NDArray[Any]:
    """Return all pixels, or of a large image, rows in bands that are spread over it."""
    height, width = pixels.shape[:2]
    if height * width <= _MAX_PIXELS:
        return pixels
    num_bands = max(1, _MAX_PIXELS // (width * _BAND))
    starts = np.linspace(0, max(0, height - _BAND), num_bands).astype(int)
    return np.concatenate([pixels[start : start + _BAND] for start in starts])


def _distinct(values: NDArray[Any]) -> NDArray[Any]:
    """Return the distinct values, sorted. Faster than ``numpy.unique`` for values of at most 16 bits."""
    if values.dtype.kind == "f" or values.min() < 0 or values.max() >= 2**16:
        return np.unique(values)
    return np.flatnonzero(np.bincount(values.ravel()))


def _borders(codes: NDArray[np.int16], found: NDArray[Any]) -> Counter[tuple[float, float]]:
    borders: Counter[tuple[float, float]] = Counter()
    for first, second in ((codes[:, :-1], codes[:, 1:]), (codes[:-1], codes[1:])):
        pairs = np.bincount((first * len(found) + second).ravel(), minlength=len(found) ** 2)
        for pair in np.flatnonzero(pairs):
            low, high = sorted((found[pair // len(found)].item(), found[pair % len(found)].item()))
            if low < high:
                borders[low, high] += int(pairs[pair])
    return borders


def _flat(pixels: NDArray[Any]) -> Counter[float]:
    """Count the pixels that are like their neighbours to the right and below but for noise."""
    signed = pixels.astype(np.int16 if pixels.dtype == np.uint8 else np.float64)
    noise = NOISE * float(signed.max() - signed.min())
    flat = np.ones((pixels.shape[0] - 1, pixels.shape[1] - 1), dtype=np.bool_)
    for plane in [signed] if signed.ndim == 2 else [signed[:, :, channel] for channel in range(3)]:
        flat &= np.abs(np.diff(plane, axis=1))[:-1] <= noise
        flat &= np.abs(np.diff(plane, axis=0))[:, :-1] <= noise
    chosen = pixels[:-1, :-1][flat]
    if not len(chosen):
        return Counter()
    if chosen.ndim == 2:
        red, green, blue = (chosen[:, channel].astype(np.int32) // _CELL for channel in range(3))
        cells = (red * 32 + green) * 32 + blue
        counts = np.bincount(cells)
        occurs = counts > 0
        means = [np.bincount(cells, weights=chosen[:, channel])[occurs] / counts[occurs] for channel in range(3)]
        return _counter(pack(np.stack(means, axis=-1).round().astype(np.uint8)[None])[0], counts[occurs])
    low, high = float(chosen.min()), float(chosen.max())
    if chosen.dtype.kind != "f" and high - low < 256:
        return _counter(*np.unique(chosen, return_counts=True))
    if low == high:
        return Counter({low: len(chosen)})
    counts, ends = np.histogram(chosen, bins=256, range=(low, high))
    sums, _ = np.histogram(chosen, bins=ends, weights=chosen)
    return _counter(sums[counts > 0] / counts[counts > 0], counts[counts > 0])


def _is_coloured(rgb: NDArray[np.uint8]) -> bool:
    """Return whether an image, (H, W, 3), has more than shades of grey, or of one primary colour, and noise."""
    if np.count_nonzero(rgb.any(axis=(0, 1))) <= 1:
        return False
    spread = rgb.max(axis=2) - rgb.min(axis=2)
    return float((spread > NOISE * (int(rgb.max()) - int(rgb.min()))).mean()) > 0.001


def _counter(values: NDArray[Any], counts: NDArray[Any]) -> Counter[float]:
    counter: Counter[float] = Counter()
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if count:
            counter[value] += count
    return counter
