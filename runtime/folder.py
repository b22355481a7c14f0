"""A run's folder: the names of its files, and the lock that keeps a second run out."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

LOG, CONFIG, INCIDENTS, BEST = "metrics.jsonl", "config.json", "incidents", "best_model.pth"


def read_json(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; an empty one if the file is missing or unreadable: a report leaves it out then."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def require_free(directory: Path) -> None:
    """Check that a run can have a folder, before the data is read. Nothing is written.

    Raises:
        ValueError: Another run is writing there, or the folder cannot be written to.
    """
    try:
        if directory.exists():
            lock = lock_directory(directory)
            if lock is not None:
                unlock_directory(lock)
        if directory.is_symlink() and not directory.exists():
            raise ValueError(
                f"--checkpoint-dir {directory}: a link to {directory.readlink()}, which does not exist; create it"
            )
        parent = next(folder for folder in (directory, *directory.absolute().parents) if folder.exists())
    except OSError as error:
        raise ValueError(f"--checkpoint-dir {directory}: {error.strerror or error}; choose another folder") from error
    if not parent.is_dir():
        raise ValueError(f"--checkpoint-dir {directory}: {parent} is a file; name a folder")
    if not os.access(parent, os.W_OK):
        raise ValueError(f"--checkpoint-dir {directory}: {parent} is read-only; choose another folder")


def config_begun(directory: Path) -> dict[str, Any] | None:
    """Return the ``config.json`` of a run that ended before its first checkpoint; None if there is none."""
    config = read_json(directory / CONFIG)
    return config if isinstance(config.get("settings"), dict) else None


def lock_directory(directory: Path) -> int | None:
    """Keep other runs out of a folder for as long as this process lives: a crash leaves no lock behind.

    Returns:
        the lock's file descriptor, for ``unlock_directory``; None if the file system has no locks.

    Raises:
        ValueError: Another process holds the lock.
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


def _release_locks() -> None:
    """Close the locks in a forked process, which would hold them as long as it lives, even if its parent has gone."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_release_locks)
