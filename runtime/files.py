"""Files replaced in one step, and errors shortened to one line."""

import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

UNFINISHED = ".*.unfinished*"  # pattern of what a kill during ``replacing`` leaves behind
_LONGEST_NAME = 180  # bytes; file systems take 255, and ``replacing`` adds to a name


@contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """Yield a temporary path beside ``path``, and rename it onto ``path`` if the block succeeds.

    Readers see the old content or the new, never half of one. If the block fails, what it wrote is removed.

    Args:
        path: the file to write, or the folder, which must not exist yet.
        suffix: ending of the temporary name, for writers that choose a format by it.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    writer = f"{socket.gethostname()[:24]}-{os.getpid()}"  # two processes may write one report
    unfinished = path.with_name(f".{name}.{writer}.unfinished{suffix}")
    try:
        yield unfinished
        os.replace(unfinished, path)
    finally:
        _remove(unfinished)


def remove_leftovers(directory: Path, pattern: str = UNFINISHED) -> None:
    """Remove what killed writers left in a folder. Lock it first: a file being written looks the same."""
    for leftover in directory.glob(pattern):
        _remove(leftover)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_directory(directory: Path) -> None:
    """Flush a folder's entries to the disk, so that a rename survives a loss of power.

    Some network file systems cannot do it and answer with an OSError, which is ignored.
    """
    with suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def first_line(error: BaseException, limit: int = 200) -> str:
    """Return the first line of an error's message, cut to ``limit`` characters; its type if it has no message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:limit]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file in one step. Bytes that were not UTF-8 in a file's name are written unchanged."""
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file in one step."""
    with replacing(path) as unfinished:
        unfinished.write_bytes(content)


def json_safe(value: Any) -> Any:
    """Return nested values with NaN and infinity, which JSON lacks, as the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(child) for child in value]
    return value
