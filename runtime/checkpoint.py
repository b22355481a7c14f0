"""Checkpoint files: written so that a crash leaves the older ones, read so that nothing in them can run."""

import errno
import itertools
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from runtime.files import first_line, replacing, sync_directory
from runtime.folder import BEST
from runtime.tensors import map_tensors, named_tensors

logger = logging.getLogger("train_ultimate")

FORMAT = "train_ultimate/2"


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says why."""


class CheckpointStore:
    """The checkpoint files of one run, written in the background while training goes on.

    What training waits for is a copy of the state to host memory, and a write still under way. A write that fails costs
    a warning: the older files stay, and the next save is the next attempt.

    Args:
        directory: made when something is saved.
        keep: how many ``epoch_NNNN.pth`` to keep.
        on_saved: called by ``tell`` and ``wait``, with the name of a file that is complete and verified by now.
        writes: one of several processes does; the others only keep count.
    """

    def __init__(
        self, directory: Path, keep: int, on_saved: Callable[[str], None] | None = None, writes: bool = True
    ) -> None:
        self.directory = directory
        self.writes = writes
        self.keep = keep
        self.on_saved = on_saved
        self.last_window = -1  # of the run, in the newest save that was begun
        self.failure: OSError | CheckpointError | None = None  # of the newest save
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._under_way: tuple[list[str], Future[None]] | None = None
        self._host = HostCopy()

    def save_epoch(self, epoch: int, payload: dict[str, Any], is_best: bool) -> None:
        """Begin ``epoch_NNNN.pth``; when it is there, the oldest beyond ``keep`` and mid-epoch files go.

        ``best_model.pth`` comes first where this is the best: a kill between the two resumes from that one.
        """
        self._begin([*([self.best_path.name] if is_best else []), f"epoch_{epoch:04d}.pth"], payload)

    def save_step(self, global_window: int, payload: dict[str, Any]) -> Path:
        """Begin ``step_NNNNNNNN.pth``, in mid-epoch; the newest one is kept."""
        name = f"step_{global_window:08d}.pth"
        self._begin([name], payload)
        return self.directory / name

    @property
    def is_writing(self) -> bool:
        return self._under_way is not None and not self._under_way[1].done()

    def report(self) -> None:
        """Report a save that has ended. Cheap and without waiting: called for every window."""
        if self._under_way is not None and not self.is_writing:
            self.wait()

    def wait(self) -> None:
        """Until what has been begun is on the disk, or has failed."""
        if self._under_way is None:
            return
        (names, future), self._under_way = self._under_way, None
        try:
            future.result()
        except (OSError, CheckpointError) as error:
            self.failure = error.with_traceback(None)  # which would keep every frame alive, loaders and all
            logger.warning(f"{' and '.join(names)} could not be saved: {error}. Training goes on; older files stay")
            return
        self.failure = None
        if self.on_saved is not None:
            for name in names:
                self.on_saved(name)

    def _begin(self, names: list[str], payload: dict[str, Any]) -> None:
        self.wait()
        self.last_window = payload["progress"]["global_window"]
        if not self.writes:
            return
        host = self._host.take(payload)
        self._under_way = names, self._writer.submit(self._write_all, names, host)

    def _write_all(self, names: list[str], payload: Callable[[], dict[str, Any]]) -> None:
        """In the writer's thread."""
        for name in names:
            try:
                self._write(name, payload())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room():
                    raise
                self._write(name, payload())
            self._remove_outdated(self.directory / name)

    def _make_room(self) -> bool:
        """Remove the epoch files that are older than the newest; False if there are none."""
        older = self._numbered("epoch")[:-1]
        for path in older:
            path.unlink(missing_ok=True)
        if older:
            logger.warning(f"the disk is full; {', '.join(path.name for path in older)} removed to make room")
        return bool(older)

    def _remove_outdated(self, written: Path) -> None:
        """Only now, with the new one verified."""
        outdated: list[Path] = []
        if written.name.startswith("epoch_"):
            outdated = [*self._numbered("epoch")[: -self.keep], *self._numbered("step")]
        elif written.name.startswith("step_"):
            outdated = [path for path in self._numbered("step") if path != written]
        for path in outdated:
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        return [
            *self._numbered("epoch"),
            *self._numbered("step"),
            *([self.best_path] if self.best_path.exists() else []),
        ]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The furthest checkpoint that verifies; each damaged one met on the way is named with the reason."""
        found: list[tuple[int, Path]] = []
        for path in self.files():
            try:
                found.append((_windows_done(path), path))
            except CheckpointError as error:
                logger.warning(f"skipped {error}")
        for _, path in sorted(found, reverse=True):
            try:
                return path, read_checkpoint(path)
            except CheckpointError as error:
                logger.warning(f"skipped {error}")
        return None

    def set_aside_after(self, global_window: int) -> list[Path]:
        """Rename checkpoints further on than this to ``*.superseded``: they are of a branch that was given up."""
        renamed = []
        for path in self.files():
            try:
                further_on = _windows_done(path) > global_window
            except CheckpointError:
                continue  # damaged: never chosen anyway
            if further_on:
                aside = (path.with_name(path.name + suffix) for suffix in _superseded_suffixes())
                renamed.append(path.rename(next(name for name in aside if not name.exists())))
        return renamed

    @property
    def best_path(self) -> Path:
        return self.directory / BEST

    def _numbered(self, kind: str) -> list[Path]:
        names = {path: re.fullmatch(kind + r"_(\d+)\.pth", path.name) for path in self.directory.glob(f"{kind}_*.pth")}
        numbers = {path: int(match[1]) for path, match in names.items() if match is not None}
        return sorted(numbers, key=lambda path: (numbers[path], path.name))

    def _write(self, name: str, payload: dict[str, Any]) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / name
        write_checkpoint(path, payload)
        return path


class HostCopy:
    """Copies nested state to host memory, into the same memory each time: fresh pages cost more than the copy.

    From a CUDA device the copies are queued behind the work that is under way, and nothing waits for them here.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, payload: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Begin to copy; what is returned waits for the copy to be complete and hands it out.

        It must not be called again before that has been written.
        """
        copied = map_tensors(payload, self._copy)
        if not any(tensor.is_cuda for _, tensor in named_tensors(payload)):
            return lambda: copied
        arrived = torch.cuda.Event()
        arrived.record()

        def complete() -> dict[str, Any]:
            arrived.synchronize()
            return copied

        return complete

    def _copy(self, name: str, value: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        layout = value.shape, value.dtype, value.stride()
        if buffer is None or (buffer.shape, buffer.dtype, buffer.stride()) != layout:
            buffer = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda, requires_grad=False)
            self._buffers[name] = buffer
        return buffer.copy_(value.detach(), non_blocking=True)


def find_checkpoint(requested: str | None, directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The verified checkpoint that ``--resume`` asks for, a path or "auto"; (None, None) for a run from the beginning.

    A file that holds nothing but weights, as other programs write them, has the one key "model".

    Raises:
        CheckpointError: the file is unusable, or every one in the directory is.
    """
    if requested is None:
        return None, None
    if requested != "auto":
        return Path(requested), read_checkpoint(Path(requested))
    store = CheckpointStore(directory, keep=1)
    newest = store.newest()
    if newest is None and store.files():
        raise CheckpointError(f"{directory}: not one checkpoint is intact; move them away to start from the beginning")
    if newest is None:
        logger.info(f"--resume auto: no checkpoint in {directory} yet, starting from the beginning")
    return newest or (None, None)


def _superseded_suffixes() -> Iterator[str]:
    yield ".superseded"
    yield from (f".superseded-{number}" for number in itertools.count(2))


def write_checkpoint(path: Path, payload: dict[str, Any]) -> None:
    """Write, flush to the disk, read back, and only then give the file its name.

    A crash leaves either the old file or the new one, never half of one; a disk that lost or changed bytes is found
    here, while the older checkpoints still stand. Flushing costs about 0.1 s for 250 MB, reading back less.

    Raises:
        OSError: the disk is full, read-only or gone.
        CheckpointError: what came back is not what was written, or a tensor in it is not finite.
    """
    with replacing(path) as unfinished:
        with open(unfinished, "wb") as file:
            _save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        read_checkpoint(unfinished)
    sync_directory(path.parent)


def _save(payload: dict[str, Any], file: BinaryIO) -> None:
    """``torch.save``, with the error of the disk: torch turns it into a RuntimeError about its container."""
    refused: list[OSError] = []

    class Recording:
        def write(self, data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                refused.append(error)
                raise

        def flush(self) -> None:
            file.flush()

    try:
        torch.save(payload, Recording())  # type: ignore[arg-type]  # all that torch asks of a file
    except RuntimeError as error:
        raise (refused[0] if refused else error) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to host memory, verified: every byte by its checksum, every tensor finite.

    ``torch.load`` alone accepts a flipped bit in silence; the zip container's CRC-32 does not. Nothing in the file is
    executed (``weights_only``).

    Raises:
        CheckpointError: missing, damaged, not finite, or no checkpoint of this program.
    """
    _require_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # of a damaged directory zipfile makes anything, UnicodeDecodeError included
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (checksum of {damaged})")
    checkpoint = _load(path, mmap=False)
    for name, tensor in named_tensors(checkpoint):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} is not finite")
    return checkpoint


def _windows_done(path: Path) -> int:
    """How far a checkpoint is, without reading its tensors: with ``mmap`` they stay on disk."""
    _require_archive(path)
    checkpoint = _load(path, mmap=True)
    if "progress" not in checkpoint:
        raise CheckpointError(f"{path}: holds weights alone, no run to go on with")
    return checkpoint["progress"]["global_window"]


def _require_archive(path: Path) -> None:
    if not path.is_file():
        folder = f" but a folder; --resume auto --checkpoint-dir {path} takes its newest" if path.is_dir() else ""
        raise CheckpointError(f"{path}: no such file{folder}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a checkpoint, or cut short (no zip archive)")


def _load(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: refused: it holds more than tensors, numbers and text, and loading that could run code. "
                f"If you trust its origin, save its weights alone: torch.save(model.state_dict(), file)"
            ) from error
        raise CheckpointError(f"{path}: not a readable checkpoint ({first_line(error, 120)})") from error
    except Exception as error:  # damaged archives raise anything from OSError to RuntimeError
        raise CheckpointError(f"{path}: not a readable checkpoint ({first_line(error, 120)})") from error
    if isinstance(checkpoint, dict) and checkpoint and all(isinstance(value, Tensor) for value in checkpoint.values()):
        return {"model": {str(name).removeprefix("module."): weight for name, weight in checkpoint.items()}}
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no format mark {FORMAT!r})")
    return checkpoint
