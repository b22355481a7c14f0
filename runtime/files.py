"""Files replaced in one step, and errors in one line."""

import json
import math
import os
from pathlib import Path
from typing import Any


def first_line(error: BaseException) -> str:
    """Of its message, or its type where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Replace a JSON file in one step."""
    write_text(path, json.dumps(json_safe(value), indent=2, allow_nan=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a UTF-8 file in one step; bytes of file names that are not UTF-8 are written as they came."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")  # two processes may write one report
    try:
        unfinished.write_text(text, encoding="utf-8", errors="surrogateescape")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def json_safe(value: Any) -> Any:
    """JSON knows no NaN or infinity: they become the strings "nan", "inf" and "-inf"."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: json_safe(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(child) for child in value]
    return value
