"""Pictures for people: thumbnails, contact sheets, overlays."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

from data.decoding import decode_image

_PANEL = (220, 165)  # width and height in pixels
_GAP, _CAPTION = 6, 22  # pixels
_COLUMNS = 2  # rows of panels side by side
_INK, _PAPER = (20, 20, 20), (245, 245, 242)
_MARK = (255, 0, 144)  # colour of objects; hardly an animal has it
_TINT = 0.35  # its share in the pixels of an object
_THICKEST_OUTLINE = 8  # pixels


def thumbnail(source: Path | NDArray[np.uint8], size: tuple[int, int] = _PANEL) -> Image.Image:
    """Return an image no larger than a panel; small ones keep their size.

    Args:
        source: An image file, or grey levels (H, W).
        size: width and height of the panel.

    Raises:
        ValueError: the file cannot be decoded.
    """
    image = decode_image(source) if isinstance(source, Path) else Image.fromarray(source).convert("RGB")
    image.thumbnail(size, Image.Resampling.BILINEAR)
    return image


def contact_sheet(rows: Sequence[tuple[str, Sequence[Image.Image]]], titles: Sequence[str]) -> Image.Image:
    """Return a sheet of captioned rows of thumbnails, two rows side by side.

    Args:
        rows: (caption, panels); all rows have the same number of panels.
        titles: Titles of the panels. If there are more titles than panels, the last ones count: a row without its
            image has a mask and a prediction.
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
    """Return a photograph with its object tinted and outlined. The outline lies outside, to show even one pixel.

    Args:
        image: RGB photograph of size (W, H).
        mask: (H, W), True on the object.
    """
    width = min(_THICKEST_OUTLINE, max(1, round(max(mask.shape) / 250)))
    grown = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.BoxBlur(width))) > 0
    pixels = np.array(image)
    pixels[mask] = (pixels[mask] * (1 - _TINT) + np.array(_MARK) * _TINT).round().astype(np.uint8)
    pixels[grown & ~mask] = _MARK
    return Image.fromarray(pixels)
