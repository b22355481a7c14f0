"""Pictures opened only up to a size: decoding takes memory by the pixel, and a file of 25 kB can have 169 million."""

import os
import re
import warnings
from pathlib import Path
from typing import IO

from PIL import Image

# Each process that decodes takes 4 bytes of memory a pixel for an RGB photograph, up to 18 for a colour mask: at this
# limit 0.5 GB and 2.3 GB. Telephones have cameras of 108 megapixels.
MAX_MEGAPIXELS = 128
LIMIT_VARIABLE = "TRAIN_ULTIMATE_MAX_MEGAPIXELS"  # environment variable, so that all processes of a run share it
_BYTES_PER_PIXEL = 4

# Pillow warns above the limit, which is an error here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


def open_picture(source: Path | IO[bytes]) -> Image.Image:
    """Open a picture, without decoding it.

    Raises:
        ValueError: it has more pixels than the limit.
        Exception: of any kind, if it is no picture.
    """
    limit = max_megapixels()
    Image.MAX_IMAGE_PIXELS = round(limit * 1e6)  # Pillow refuses twice as many, also in frames met during decoding
    try:
        image = Image.open(source)
    except Image.DecompressionBombError as error:
        pixels = re.search(r"\d+", str(error))
        raise ValueError(_too_large(int(pixels[0]) if pixels else 2 * limit * 1e6, limit)) from error
    if image.width * image.height > limit * 1e6:
        image.close()
        raise ValueError(_too_large(image.width * image.height, limit))
    return image


def max_megapixels() -> float:
    """Return the limit: the environment variable's, or the default.

    Raises:
        ValueError: the environment variable is no such number.
    """
    text = os.environ.get(LIMIT_VARIABLE, "") or str(MAX_MEGAPIXELS)
    try:
        limit = float(text)
    except ValueError:
        limit = 0
    if not 0 < limit < 1e6:
        raise ValueError(f"{LIMIT_VARIABLE}={text}: not a number of megapixels; try {MAX_MEGAPIXELS}")
    return limit


def _too_large(pixels: float, limit: float) -> str:
    size = -(-pixels // 1e6)
    memory = f"{size * _BYTES_PER_PIXEL / 1e3:.1f} GB of memory in each process"
    return f"{size:.0f} megapixels take {memory}; the limit is {limit:g}, to read it, set {LIMIT_VARIABLE}={size:.0f}"
