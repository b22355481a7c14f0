"""A run's folder: the names of its files, and the lock that keeps a second run out."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

LOG, CONFIG, INCIDENTS, BEST = "metrics.jsonl", "config.json", "incidents", "best_model.pth"


def read_json(path: Path) -> dict[str, Any]:
    """Empty where there is none, or one that cannot be read: a report leaves out what it does not have."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def require_free(directory: Path) -> None:
    """Refuse a folder that cannot be had, before the data is looked at.

    Raises:
        ValueError: another run is writing there, or nobody can.
    """
    try:
        if directory.exists():
            lock = lock_directory(directory)
            if lock is not None:
                unlock_directory(lock)
        parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    except OSError as error:
        raise ValueError(f"--checkpoint-dir {directory}: {error.strerror or error}; choose another folder") from error
    if not parent.is_dir():
        raise ValueError(f"--checkpoint-dir {directory}: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--checkpoint-dir {directory}: {parent} is read-only; choose another folder")


def settings_begun(directory: Path) -> dict[str, Any] | None:
    """Those of a run that ended before its first checkpoint, from its ``config.json``; None where there are none."""
    settings = read_json(directory / CONFIG).get("settings")
    return settings if isinstance(settings, dict) else None


def lock_directory(directory: Path) -> int | None:
    """Make this process the only one that writes there, for as long as it lives: a crash leaves no lock behind.

    Returns:
        a descriptor to be kept open; None where the file system knows no locks.

    Raises:
        ValueError: another process has it.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise ValueError(
            f"{directory}: another run is writing there; wait for it or stop it, or choose another --checkpoint-dir"
        ) from None
    except OSError:  # some network file systems
        os.close(descriptor)
        return None
    _locks.add(descriptor)
    return descriptor


def unlock_directory(descriptor: int) -> None:
    _locks.discard(descriptor)
    os.close(descriptor)


_locks: set[int] = set()


def _give_up_locks() -> None:
    """In a forked process, which would hold them for as long as it lives, even when the one that took them is gone."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_give_up_locks)
