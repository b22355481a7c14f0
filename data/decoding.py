"""Decode photographs and masks of any encoding to NumPy arrays. Pillow and NumPy alone: worker processes start fast."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

BoolArray = NDArray[np.bool_]
UInt8Array = NDArray[np.uint8]

_ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are swapped


def decode_image(path: Path) -> Image.Image:
    """An image of any mode as RGB, upright by its EXIF orientation.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return upright_rgb(file)
    except Exception as error:  # Pillow's plug-ins raise anything for a damaged file, TypeError included
        raise ValueError(decode_message(path, error)) from error


def decode_mask(path: Path) -> BoolArray:
    """A mask, (H, W), True where the object is.

    Above 128 is object, as the field's evaluation code has it. Masks whose brightest value is another than 129 to 255
    are cut at half of it: 1 in label images, 65,535 with 16 bits, a dark palette colour. In colour masks the brightest
    channel counts. A JPEG with nothing above 31 is an empty mask: what it holds is compression noise.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return binary_mask(*decode_mask_values(path))


def binary_mask(values: NDArray[Any], lossy: bool) -> BoolArray:
    """``decode_mask`` from what ``decode_mask_values`` returns."""
    if lossy and values.max(initial=0) < 32:
        return np.zeros(values.shape, dtype=np.bool_)
    return values > mask_threshold(values)


def mask_threshold(values: NDArray[Any]) -> float:
    """Object is what is above it."""
    brightest = float(values.max(initial=0))
    return 128 if 128 < brightest <= 255 else brightest / 2


def decode_mask_values(path: Path) -> tuple[NDArray[Any], bool]:
    """A mask's values as they are stored, (H, W), the brightest channel of colour; and whether it was a JPEG.

    Raises:
        ValueError: the file cannot be decoded.
    """
    try:
        with Image.open(path) as file:
            return mask_values(ImageOps.exif_transpose(file)), file.format == "JPEG"
    except Exception as error:
        raise ValueError(decode_message(path, error)) from error


def mask_values(mask: Image.Image) -> NDArray[Any]:
    """A decoded mask of any mode as (H, W): its values, or the brightest channel of colour."""
    grey = mask.mode == "L" or mask.mode.startswith(("I", "F"))
    return np.array(mask) if grey else np.array(mask.convert("RGB")).max(axis=2)


def fixed_size_image(path: Path, size: int) -> UInt8Array:
    """An image as (3, size, size) RGB, resized bilinearly.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return fixed_size(decode_image(path), size)


def fixed_size_mask(path: Path, size: int) -> UInt8Array:
    """A mask as (1, size, size) of 0 (background) and 1 (object), resized to the nearest neighbour.

    Raises:
        ValueError: the file cannot be decoded.
    """
    binary = Image.fromarray(decode_mask(path).astype(np.uint8))
    return np.array(binary.resize((size, size), Image.Resampling.NEAREST))[np.newaxis]


def problem_of(image: Path, mask: Path) -> str:
    """Why an image or its mask cannot be decoded, all of it read; "" where both can."""
    try:
        decode_image(image)
        decode_mask(mask)
    except ValueError as error:
        return str(error)
    return ""


def decode_prediction(path: Path) -> UInt8Array:
    """A prediction that any program has saved, as grey levels, (H, W).

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


def image_size(path: Path) -> tuple[int, int]:
    """(H, W) of an image shown upright, from its header.

    Raises:
        ValueError: the file is no image.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(_ORIENTATION, 1) >= 5
    except Exception as error:
        raise ValueError(decode_message(path, error)) from error
    return (width, height) if turned else (height, width)


def decode_message(path: Path, error: Exception) -> str:
    reason = "not an image" if isinstance(error, Image.UnidentifiedImageError) else str(error) or type(error).__name__
    return f"{path}: cannot be decoded ({reason})"


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
