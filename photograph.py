"""A decoded photograph of any mode as the network sees it. One way for training, prediction and ``load_model``.

Imports nothing of the program: ``data`` and ``models``, which know nothing of each other, both build on it.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps


def upright_rgb(image: Image.Image) -> Image.Image:
    """Any mode as RGB, turned as EXIF says; of an animation the frame it is at, which is the first when it is opened.

    Raises:
        Exception: of any kind, where the file behind it is damaged.
    """
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as RGB; transparency is dropped.

    Numbers of more than 8 bits are taken for grey levels of 0 to 65,535 where one is above 255, and floats for shares
    of white where none is above 1: ``convert("RGB")`` would clip the former to white, the latter to black.
    """
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.array(image, dtype=np.float64))
        highest = values.max(initial=0)
        scale = 257 if highest > 255 else 1 / 255 if image.mode == "F" and highest <= 1 else 1
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fixed_size(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """An RGB image as (3, size, size), resized bilinearly, whatever its aspect ratio."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.array(resized).transpose(2, 0, 1))
