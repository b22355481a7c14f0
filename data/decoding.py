"""Decoding of photographs and masks of any mode and depth to arrays of one kind.

The one way from a file to the network's input, for training, evaluation and prediction. Imports only Pillow and NumPy,
so that worker processes start fast.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.masks import ABOVE_HALF, MaskReading, UInt8Array
from data.opening import open_picture

_ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are swapped


# Photographs


def decode_image(path: Path) -> Image.Image:
    """Read an image of any mode as RGB, upright by its EXIF orientation.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with open_picture(path) as file:
            file.load()
            ImageOps.exif_transpose(file, in_place=True)  # a copy of a large photograph takes as much memory again
            return file if file.mode == "RGB" else to_rgb(file)
    except Exception as error:  # Pillow's plug-ins raise anything for a damaged file, TypeError included
        raise ValueError(decode_message(path, error)) from error


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB, turned by its EXIF orientation; of an animation, the current frame.

    Raises:
        Exception: of any kind, if the image's file is damaged.
    """
    return to_rgb(ImageOps.exif_transpose(image))


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; drop transparency.

    Values of more than 8 bits are grey levels of 0 to 65,535 if any is above 255, and floats are shares of white if
    none is above 1: ``convert("RGB")`` would clip the former to white and the latter to black.
    """
    if image.mode.startswith(("I", "F")):
        values = np.nan_to_num(np.array(image, dtype=np.float64))
        highest = values.max(initial=0)
        scale = 257 if highest > 255 else 1 / 255 if image.mode == "F" and highest <= 1 else 1
        image = Image.fromarray((values / scale).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def fixed_size(image: Image.Image, size: int) -> UInt8Array:
    """Resize an RGB image of any aspect ratio to (3, size, size), bilinearly."""
    resized = image.resize((size, size), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.array(resized).transpose(2, 0, 1))


def fixed_size_image(path: Path, size: int) -> UInt8Array:
    """Read an image as (3, size, size) RGB, resized bilinearly.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return fixed_size(decode_image(path), size)


def image_size(path: Path) -> tuple[int, int]:
    """Read (H, W) of an image, upright by its EXIF orientation, from its header.

    Raises:
        ValueError: the file is not an image.
    """
    try:
        with open_picture(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:
        raise ValueError(decode_message(path, error)) from error
    return (width, height) if turned else (height, width)


# Masks


def decode_mask(path: Path, reading: MaskReading = ABOVE_HALF) -> UInt8Array:
    """Read a mask as (H, W) of 0 for background, 1 for object, and IGNORED.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with open_picture(path) as file:
            return reading.read(ImageOps.exif_transpose(file), lossy=file.format == "JPEG")
    except Exception as error:
        raise ValueError(decode_message(path, error)) from error


def fixed_size_mask(path: Path, size: int, reading: MaskReading = ABOVE_HALF) -> UInt8Array:
    """Read a mask as (1, size, size) of 0, 1 and IGNORED, resized to the nearest neighbour.

    Raises:
        ValueError: the file cannot be decoded.
    """
    labels = Image.fromarray(decode_mask(path, reading))
    return np.array(labels.resize((size, size), Image.Resampling.NEAREST))[np.newaxis]


# Files that cannot be decoded


def problem_of(image: Path, mask: Path) -> str:
    """Decode an image and its mask entirely; return why one of them cannot be decoded, "" if both can."""
    try:
        decode_image(image)
        decode_mask(mask)
    except ValueError as error:
        return str(error)
    return ""


def decode_message(path: Path, error: Exception) -> str:
    """Return the error message for a file that Pillow failed on."""
    return f"{path}: cannot be decoded ({decode_reason(error)})"


def decode_reason(error: Exception) -> str:
    """Return Pillow's reason in a few words, without the file's name."""
    return "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
