"""Pictures for people: thumbnails, and sheets of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.decoding import decode_image

_PANEL = (220, 165)  # width and height in pixels
_GAP, _CAPTION = 6, 22
_COLUMNS = 2  # rows of panels side by side
_INK, _PAPER = (20, 20, 20), (245, 245, 242)
_MARK = (255, 0, 144)  # of objects: hardly an animal hides in it
_TINT = 0.35  # share of it within the object
_THICKEST_OUTLINE = 8  # pixels


def thumbnail(source: Path | NDArray[np.uint8]) -> Image.Image:
    """At most a panel's size; nothing is enlarged.

    Args:
        source: an image file, or grey levels (H, W).

    Raises:
        ValueError: the file cannot be decoded.
    """
    image = decode_image(source) if isinstance(source, Path) else Image.fromarray(source).convert("RGB")
    image.thumbnail(_PANEL, Image.Resampling.BILINEAR)
    return image


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str]) -> Image.Image:
    """Rows of thumbnails with a caption above each, two side by side.

    Args:
        rows: (caption, panels); as many panels as the first row has.
        titles: of the panels, from the last one back: without its image, a row has a mask and a prediction.
    """
    num_panels = len(rows[0][1])
    width = num_panels * (_PANEL[0] + _GAP) + 2 * _GAP
    height = _CAPTION + _PANEL[1] + _GAP
    num_lines = -(-len(rows) // _COLUMNS)
    sheet = Image.new("RGB", (min(len(rows), _COLUMNS) * width, _CAPTION + num_lines * height), _PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for number, (caption, panels) in enumerate(rows):
        left, top = (number % _COLUMNS) * width + _GAP, _CAPTION + (number // _COLUMNS) * height
        draw.text((left, top + 3), caption, _INK, font)
        for position, (panel, title) in enumerate(zip(panels, titles[-num_panels:], strict=True)):
            x = left + position * (_PANEL[0] + _GAP)
            if number < _COLUMNS:
                draw.text((x, 3), title, _INK, font)
            corner = x + (_PANEL[0] - panel.width) // 2, top + _CAPTION + (_PANEL[1] - panel.height) // 2
            sheet.paste(panel, corner)
    return sheet


def overlay(image: Image.Image, mask: NDArray[np.bool_]) -> Image.Image:
    """An RGB photograph with the object tinted, and outlined on its outside, so that the smallest can be seen.

    Args:
        image: (W, H).
        mask: (H, W), True where the object is.
    """
    width = min(_THICKEST_OUTLINE, max(1, round(max(mask.shape) / 250)))
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(width))) > 0
    pixels = np.array(image)
    pixels[mask] = (pixels[mask] * (1 - _TINT) + np.array(_MARK) * _TINT).round().astype(np.uint8)
    pixels[grown & ~mask] = _MARK
    return Image.fromarray(pixels)
