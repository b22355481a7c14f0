"""Files that commands write, and the marks by which they know them again: no command replaces any other file."""

import json
import mmap
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from data.opening import open_picture
from runtime.files import replacing

_JPEG_QUALITY = 90
_SOFTWARE = 0x0131  # EXIF tag
_EXCLUDE_FILE = re.compile(rb"#[^\n]*--exclude FILE\. \w+ by check-data\.\r?\n")


def require_own(files: Iterable[Path], is_own: Callable[[Path], bool], command: str, flag: str) -> None:
    """Check that only the command's own files would be replaced, not photographs, masks or other programs' results.

    An empty file holds nothing to lose. (A folder cannot be replaced anyway.)

    Args:
        files: files to write.
        is_own: whether the command wrote a file. Only regular files are asked about.
        command: the command's name.
        flag: the flag that named the files, with its value.

    Raises:
        ValueError: a file to write exists, and something else wrote it.
    """
    foreign = [file for file in files if os.path.lexists(file) and not (file.is_dir() or _may_go(file, is_own))]
    if foreign:
        more = f", nor {len(foreign) - 1} others" if len(foreign) > 1 else ""
        raise ValueError(
            f"{flag}: {foreign[0]} exists already, and {command} did not write it{more}; choose another name, or "
            "remove what is not needed"
        )


def _may_go(file: Path, is_own: Callable[[Path], bool]) -> bool:
    return file.is_file() and (file.stat().st_size == 0 or is_own(file))


def is_json_with(*keys: str) -> Callable[[Path], bool]:
    """Return a function that says whether a file is a JSON object with these keys."""

    def is_own(file: Path) -> bool:
        try:
            content = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError):
            return False
        return isinstance(content, dict) and content.keys() >= set(keys)

    return is_own


def is_exclude_file(file: Path) -> bool:
    """Return whether ``check-data --write-exclude`` wrote a file."""
    try:
        with file.open("rb") as stream:
            return _EXCLUDE_FILE.match(stream.readline(4096)) is not None
    except OSError:
        return False


def contains(text: bytes) -> Callable[[Path], bool]:
    """Return a function that says whether a file contains a text, at any place."""

    def is_own(file: Path) -> bool:
        try:
            with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return content.find(text) >= 0
        except (OSError, ValueError):
            return False

    return is_own


is_report = contains(b'<meta name="generator" content="train_ultimate">')


def save_picture(image: Image.Image, path: Path, mark: str) -> None:
    """Write a PNG, WebP or JPEG, by its ending, with a mark, in one step.

    If its name is a link, the link is replaced, not the file it leads to.
    """
    with replacing(path) as unfinished:
        if path.suffix.lower() == ".png":
            information = PngInfo()
            information.add_text("Software", mark)
            image.save(unfinished, "PNG", pnginfo=information)
        elif path.suffix.lower() == ".webp":
            exif = Image.Exif()
            exif[_SOFTWARE] = mark
            image.save(unfinished, "WEBP", exif=exif)
        else:
            image.save(unfinished, "JPEG", quality=_JPEG_QUALITY, comment=mark)


def is_picture_with(mark: str) -> Callable[[Path], bool]:
    """Return a function that says whether ``save_picture`` wrote a file with this mark."""

    def is_own(file: Path) -> bool:
        try:
            with open_picture(file) as image:
                comment = bytes(image.info.get("comment", b"")).decode(errors="replace")
                return mark in (image.info.get("Software"), comment, image.getexif().get(_SOFTWARE))
        except Exception:  # Pillow's plug-ins raise anything for a damaged file
            return False

    return is_own
