"""Decoding of photographs, masks and saved predictions of any mode and depth to arrays of one kind.

The one way from a file to the network's input, for training, evaluation and prediction. Imports only Pillow and NumPy,
so that worker processes start fast.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.opening import open_picture

BoolArray = NDArray[np.bool_]
UInt8Array = NDArray[np.uint8]

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


# Masks and predictions


def decode_mask(path: Path) -> BoolArray:
    """Read a mask as (H, W), True on the object.

    Values above 128 are object, as in the field's evaluation code. A mask whose brightest value is not in 129 to 255 is
    cut at half of that value: 1 in label images, 65,535 with 16 bits, a dark palette colour. The brightest channel of a
    colour counts. A JPEG with no value above 31 is an empty mask: it holds only compression noise.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return binary_mask(*decode_mask_values(path))


def binary_mask(values: NDArray[Any], lossy: bool) -> BoolArray:
    """Threshold what ``decode_mask_values`` returns, as ``decode_mask`` does."""
    if lossy and values.max(initial=0) < 32:
        return np.zeros(values.shape, dtype=np.bool_)
    return values > mask_threshold(values)


def mask_threshold(values: NDArray[Any]) -> float:
    """Return the value above which a mask's pixel is object."""
    brightest = float(values.max(initial=0))
    return 128 if 128 < brightest <= 255 else brightest / 2


def decode_mask_values(path: Path) -> tuple[NDArray[Any], bool]:
    """Read a mask's stored values, (H, W), the brightest channel of a colour; and whether the file is a JPEG.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with open_picture(path) as file:
            return mask_values(ImageOps.exif_transpose(file)), file.format == "JPEG"
    except Exception as error:
        raise ValueError(decode_message(path, error)) from error


def mask_values(mask: Image.Image) -> NDArray[Any]:
    """Return a decoded mask's values, (H, W), whatever its mode: the brightest channel of a colour."""
    grey = mask.mode == "L" or mask.mode.startswith(("I", "F"))
    return np.array(mask) if grey else np.array(mask.convert("RGB")).max(axis=2)


def fixed_size_mask(path: Path, size: int) -> UInt8Array:
    """Read a mask as (1, size, size) of 0 (background) and 1 (object), resized to the nearest neighbour.

    Raises:
        ValueError: the file cannot be decoded.
    """
    binary = Image.fromarray(decode_mask(path).astype(np.uint8))
    return np.array(binary.resize((size, size), Image.Resampling.NEAREST))[np.newaxis]


def decode_prediction(path: Path) -> UInt8Array:
    """Read a prediction saved by any program as grey levels, (H, W).

    Raises:
        ValueError: the file cannot be decoded.
    """
    values, _ = decode_mask_values(path)
    if values.dtype == np.uint8:
        return values
    if values.dtype.kind == "f":
        scale = 255.0 if values.max(initial=0) <= 1 else 1.0
    else:
        scale = 1 / 257 if values.max(initial=0) > 255 else 1.0  # 16 bits
    return (values * scale).clip(0, 255).round().astype(np.uint8)


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
