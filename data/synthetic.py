"""Synthetic camouflage: textured scenes with objects that differ from the background only in texture.

Background and object are fractal noise drawn from one palette with the same mean colour and nearly the same contrast;
only the direction and the scale of its texture give the object away. A brightness threshold finds nothing, so a network
that scores well here has learnt texture. Scenes are written in the TrainDataset/TestDataset layout, to go through the
same code as photographs.
"""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.masks import BoolArray, UInt8Array

FloatArray = NDArray[np.float64]

SYNTHETIC = "synthetic"  # stands for a folder's path in ``--dataset-path``
_RECIPE = "recipe.json"
_PARTS = frozenset(("TrainDataset", "TestDataset", _RECIPE))

# Undergrowth, sand, bark, reef, leaf litter, lichen: (dark, light) in RGB.
_PALETTES = (
    ((38, 52, 24), (128, 148, 84)),
    ((120, 98, 66), (214, 190, 148)),
    ((52, 40, 30), (140, 116, 92)),
    ((24, 60, 72), (120, 164, 150)),
    ((70, 46, 22), (176, 128, 70)),
    ((78, 84, 76), (190, 194, 176)),
)


def dataset_folder(dataset_path: str, run_folder: Path) -> Path:
    """Return the folder that ``--dataset-path`` stands for; synthetic scenes are inside the run's folder."""
    return run_folder / SYNTHETIC if dataset_path == SYNTHETIC else Path(dataset_path)


def write_synthetic_dataset(root: Path, num_train: int, num_test: int, img_size: int, seed: int) -> None:
    """Write ``TrainDataset/{Imgs,GT}`` and ``TestDataset/{Imgs,GT}`` below ``root``, unless they exist already.

    The folder gets its name only once it is complete, so an interrupted call leaves no partial dataset behind.

    Raises:
        ValueError: ``root`` contains something else.
    """
    recipe = {"num_train": num_train, "num_test": num_test, "img_size": img_size, "seed": seed, "version": 1}
    if os.path.lexists(root):
        if _recipe_of(root) == recipe:
            return
        raise ValueError(
            f"{root}: contains data made with other settings; remove the folder or choose another --checkpoint-dir"
        )
    unfinished = root.with_name(root.name + ".unfinished")
    if os.path.lexists(unfinished):
        is_own = unfinished.is_dir() and not unfinished.is_symlink()
        if not is_own or not {child.name for child in unfinished.iterdir()} <= _PARTS:
            raise ValueError(f"{unfinished}: in the way of synthetic scenes, and not made by them; move it elsewhere")
        shutil.rmtree(unfinished)
    for stream, (split, count) in enumerate((("TrainDataset", num_train), ("TestDataset", num_test))):
        for folder in ("Imgs", "GT"):
            (unfinished / split / folder).mkdir(parents=True)
        for index in range(count):
            image, mask = camouflage_scene(np.random.default_rng([seed, stream, index]), img_size)
            Image.fromarray(image).save(unfinished / split / "Imgs" / f"scene_{index:05d}.jpg", quality=92)
            Image.fromarray(mask).save(unfinished / split / "GT" / f"scene_{index:05d}.png")
    (unfinished / _RECIPE).write_text(json.dumps(recipe))
    unfinished.rename(root)


def _recipe_of(root: Path) -> Any:
    """Return the settings that a folder's scenes were made with; None if they are not there."""
    try:
        return json.loads((root / _RECIPE).read_text())
    except (OSError, ValueError):
        return None


def camouflage_scene(rng: np.random.Generator, size: int) -> tuple[UInt8Array, UInt8Array]:
    """Draw one scene.

    Returns:
        image (size, size, 3) uint8 RGB and mask (size, size) uint8, 0 or 255, with at least one object pixel.
    """
    angle = rng.uniform(0, math.pi)
    background = _fractal_noise(rng, size, angle, stretch=rng.uniform(1.5, 2.5), roughness=rng.uniform(1.1, 1.5))
    turned = angle + rng.uniform(0.3, 0.7) * math.pi
    surface = _fractal_noise(rng, size, turned, stretch=rng.uniform(1.5, 2.5), roughness=rng.uniform(0.7, 1.1))
    surface = surface * rng.uniform(0.85, 1.1) + rng.uniform(-0.15, 0.15)

    mask = _object_shape(rng, size)
    coverage = _soft_edges(mask)
    texture = background * (1 - coverage) + surface * coverage
    shading = 0.6 * _fractal_noise(rng, size, 0.0, stretch=1.0, roughness=2.2)  # light and shade fall on both alike
    level = 1 / (1 + np.exp(-(texture + shading)))

    dark, light = (np.array(colour, dtype=np.float64) for colour in _PALETTES[rng.integers(len(_PALETTES))])
    image = dark + (light - dark) * level[..., None] + rng.normal(0, 2.0, (size, size, 3))
    return image.clip(0, 255).astype(np.uint8), mask.astype(np.uint8) * 255


def _fractal_noise(rng: np.random.Generator, size: int, angle: float, stretch: float, roughness: float) -> FloatArray:
    """Draw noise with spectrum 1/f^roughness, elongated by ``stretch`` along ``angle``; mean 0, deviation 1."""
    fy, fx = np.meshgrid(np.fft.fftfreq(size), np.fft.rfftfreq(size), indexing="ij")
    along = (fx * math.cos(angle) + fy * math.sin(angle)) * stretch
    across = (-fx * math.sin(angle) + fy * math.cos(angle)) / stretch
    frequency = np.hypot(along, across)
    frequency[0, 0] = np.inf  # no constant component
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal((size, size))) * frequency**-roughness, s=(size, size))
    return noise / noise.std()


def _object_shape(rng: np.random.Generator, size: int) -> BoolArray:
    """Draw one shape, or two in a fifth of the scenes; each covers 3 to 20 % of the scene."""
    shapes: tuple[Callable[..., BoolArray], ...] = (_blob, _animal, _star)
    mask = np.zeros((size, size), dtype=bool)
    for _ in range(2 if rng.random() < 0.2 else 1):
        centre_x, centre_y = rng.uniform(0.25, 0.75, 2) * size
        radius = size * math.sqrt(rng.uniform(0.03, 0.12) / math.pi)
        y, x = np.mgrid[:size, :size].astype(np.float64)
        turn = rng.uniform(0, 2 * math.pi)
        u = ((x - centre_x) * math.cos(turn) + (y - centre_y) * math.sin(turn)) / radius
        v = (-(x - centre_x) * math.sin(turn) + (y - centre_y) * math.cos(turn)) / radius
        mask |= shapes[rng.integers(len(shapes))](rng, u, v)
    return mask


def _blob(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> BoolArray:
    """Draw a closed outline whose radius varies with the direction."""
    direction = np.arctan2(v, u)
    outline = np.ones_like(u)
    for harmonic in range(2, 6):
        outline += rng.normal(0, 0.3 / harmonic) * np.cos(harmonic * direction + rng.uniform(0, 2 * math.pi))
    return np.hypot(u, v / rng.uniform(0.6, 1.0)) < outline


def _star(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> BoolArray:
    """Draw a starfish with five to seven arms."""
    arms = rng.integers(5, 8)
    return np.hypot(u, v) < 1.0 + rng.uniform(0.35, 0.6) * np.cos(arms * np.arctan2(v, u))


def _animal(rng: np.random.Generator, u: FloatArray, v: FloatArray) -> BoolArray:
    """Draw a body, a head and a tail."""
    body = np.hypot(u / 1.3, v / 0.75) < 1
    head_x, head_y = 1.5, rng.uniform(-0.4, 0.4)
    head = np.hypot(u - head_x, v - head_y) < rng.uniform(0.4, 0.55)
    bend = rng.uniform(-0.5, 0.5)
    tail_x = -u - 1.0
    tail = (tail_x > 0) & (tail_x < 1.4) & (np.abs(v - bend * tail_x**2) < 0.28 - 0.15 * tail_x)
    return body | head | tail


def _soft_edges(mask: BoolArray) -> FloatArray:
    """Blur the mask's outline over about two pixels, as a lens would; values in [0, 1]."""
    soft: Any = np.pad(mask.astype(np.float64), 1, mode="edge")
    for axis in (0, 1):
        soft = (np.roll(soft, 1, axis) + 2 * soft + np.roll(soft, -1, axis)) / 4
    return soft[1:-1, 1:-1]
