"""A run's folder: the names of its files, and the lock that keeps a second run out."""

import fcntl
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from runtime.files import write_text

LOG, CONFIG, INCIDENTS, BEST = "metrics.jsonl", "config.json", "incidents", "best_model.pth"
FOLD = "fold_{}"  # sub-folder of a run of --folds
LEASE = "in-use"  # file of a run's folder where the file system has no locks


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
            FolderLock(directory).release()
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


def folds_begun(directory: Path) -> dict[str, Any] | None:
    """Return the ``config.json`` of ``--folds``, whose runs are in folders below; None if this is no such folder."""
    config = config_begun(directory)
    return config if config and config["settings"].get("folds") and config["settings"].get("fold") is None else None


def folders_of(directory: Path) -> list[Path]:
    """Return the folders of the runs in a folder: those of its folds, in their order, or only itself."""
    folds = [*directory.glob(FOLD.format("*"))]
    return sorted(folds, key=lambda fold: (len(fold.name), fold.name)) or [directory]


def best_weights(directory: Path) -> list[Path]:
    """Return the file with the best weights of the run in a folder; those of all its folds that have one."""
    return [file for folder in folders_of(directory) if (file := folder / BEST).is_file()] or [directory / BEST]


class FolderLostError(RuntimeError):
    """The error of a run whose folder another run has now."""


class FolderLock:
    """Lock that keeps other runs out of a folder for as long as this process lives: a crash leaves none behind.

    Where the file system has no locks, as some network file systems, it is a lease: a file that names host and process,
    and whose time is renewed while the process lives. A process that was suspended for long can lose it.

    Args:
        directory: the run's folder.
        flock: ``fcntl.flock``.

    Raises:
        ValueError: Another process holds the lock.
    """

    def __init__(self, directory: Path, flock: Callable[[int, int], None] = fcntl.flock) -> None:
        self._directory, self._flock = directory, flock
        self._lease: Lease | None = None
        self._descriptor = os.open(directory, os.O_RDONLY)
        _locked.add(self)
        taken = f"{directory}: another run is writing there; wait for it or stop it, or choose another --checkpoint-dir"
        try:
            flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ValueError(taken) from None
        except OSError:
            try:
                self._lease = Lease(directory)
            except (ValueError, OSError) as error:
                self.release()
                raise ValueError(taken if isinstance(error, ValueError) else f"{directory}: {error}") from error

    @property
    def is_lease(self) -> bool:
        return self._lease is not None

    @property
    def still_there(self) -> bool:
        """Whether the path still leads to the folder that was locked. Costs a stat.

        Raises:
            FolderLostError: Another run has taken over the lease.
        """
        if self._lease is not None and self._lease.lost:
            raise FolderLostError(
                f"{self._directory}: another run has taken it over while this one was suspended; nothing more is saved"
            )
        locked = os.fstat(self._descriptor)
        try:
            found = self._directory.stat()
        except OSError:
            return False
        return (found.st_dev, found.st_ino) == (locked.st_dev, locked.st_ino)

    def renewed(self) -> "FolderLock":
        """Lock the folder that the path leads to now, and release the old one.

        Raises:
            FolderLostError: Another run has it.
        """
        self.release()
        try:
            return FolderLock(self._directory, self._flock)
        except ValueError as error:
            raise FolderLostError(str(error)) from error

    def release(self) -> None:
        if self in _locked:
            _locked.remove(self)
            os.close(self._descriptor)
            if self._lease is not None:
                self._lease.release()


_locked: set[FolderLock] = set()


def _release_locks() -> None:
    """Close the locks in a forked process, which would hold them as long as it lives, even if its parent has gone."""
    while _locked:
        os.close(_locked.pop()._descriptor)


os.register_at_fork(after_in_child=_release_locks)


class Lease:
    """File that says which process has a folder, renewed by a thread.

    On the same host the process is looked for. On another one, the file's time tells: it is watched until it is
    renewed, or too old.

    Args:
        directory: the folder.
        beat: seconds between two renewals; four without one, and the holder is gone.

    Raises:
        ValueError: Another process holds it.
        OSError: The file cannot be written.

    Attributes:
        lost: another process has taken it over.
    """

    def __init__(self, directory: Path, beat: float = 15.0) -> None:
        self._path, self._beat = directory / LEASE, beat
        self._token = f"{socket.gethostname()} {os.getpid()} {secrets.token_hex(8)}"
        self.lost = False
        if self._is_held():
            raise ValueError("held")
        write_text(self._path, self._token)
        time.sleep(min(beat, 0.5))  # of two that begin at once, the later writer has it
        if self._read() != self._token:
            raise ValueError("held")
        self._ended = threading.Event()
        threading.Thread(target=self._renew, daemon=True, name="lease").start()

    def release(self) -> None:
        self._ended.set()
        if self._read() == self._token:
            self._path.unlink(missing_ok=True)

    def _read(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8")
        except (OSError, ValueError):
            return ""

    def _is_held(self) -> bool:
        """Return whether a living process holds the lease. Waits for the next renewal by another host."""
        first = self._age()
        host, pid, _ = [*self._read().split(), "", "", ""][:3]
        while (age := self._age()) is not None and age < 4 * self._beat:
            if host == socket.gethostname():
                return _is_alive(pid)
            if first is None or age < first:
                return True  # renewed
            first = age
            time.sleep(self._beat / 15)
        return False

    def _age(self) -> float | None:
        """Return the seconds since the last renewal, by the file system's clock; None if there is no lease."""
        probe = self._path.with_name(f".{LEASE}.{secrets.token_hex(4)}.unfinished")
        try:
            renewed = self._path.stat().st_mtime
            probe.touch()
            return probe.stat().st_mtime - renewed
        except OSError:
            return None
        finally:
            probe.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._ended.wait(self._beat):
            with suppress(OSError):
                if (found := self._read()) not in ("", self._token):
                    self.lost = True
                    return
                if found:
                    os.utime(self._path)
                elif self._path.parent.is_dir():
                    write_text(self._path, self._token)  # somebody has tidied up


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except OSError:  # another user's
        return True
    return int(pid) != os.getpid()
