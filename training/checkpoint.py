"""Checkpoint files: written so that a crash leaves the older ones, read so that nothing in them can run."""

import itertools
import os
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FORMAT = "train_ultimate/2"


class CheckpointError(ValueError):
    """A file that is no usable checkpoint; the message says why."""


class CheckpointStore:
    """The checkpoint files of one run.

    Args:
        directory: made when something is saved.
        keep: how many ``epoch_NNNN.pth`` to keep.
    """

    def __init__(self, directory: Path, keep: int) -> None:
        self.directory = directory
        self.keep = keep
        for leftover in directory.glob(".*.pth.unfinished"):  # a write that was killed
            leftover.unlink()

    def save_epoch(self, epoch: int, payload: dict[str, Any]) -> Path:
        """Write ``epoch_NNNN.pth``; only then remove the oldest beyond ``keep`` and the mid-epoch files it outdates."""
        path = self._write(f"epoch_{epoch:04d}.pth", payload)
        for outdated in [*self._numbered("epoch")[: -self.keep], *self._numbered("step")]:
            outdated.unlink(missing_ok=True)
        return path

    def save_step(self, global_window: int, payload: dict[str, Any]) -> Path:
        """Write ``step_NNNNNNNN.pth`` in mid-epoch; the newest one is kept."""
        path = self._write(f"step_{global_window:08d}.pth", payload)
        for outdated in self._numbered("step"):
            if outdated != path:
                outdated.unlink(missing_ok=True)
        return path

    def save_best(self, payload: dict[str, Any]) -> Path:
        return self._write(self.best_path.name, payload)

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
                print(f"Passed over {error}")
        for _, path in sorted(found, reverse=True):
            try:
                return path, read_checkpoint(path)
            except CheckpointError as error:
                print(f"Passed over {error}")
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
        return self.directory / "best_model.pth"

    def _numbered(self, kind: str) -> list[Path]:
        return sorted(
            path for path in self.directory.glob(f"{kind}_*.pth") if re.fullmatch(kind + r"_\d+\.pth", path.name)
        )

    def _write(self, name: str, payload: dict[str, Any]) -> Path:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / name
        write_checkpoint(path, payload)
        return path


def find_checkpoint(requested: str | None, directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """The verified checkpoint that ``--resume`` asks for, a path or "auto"; (None, None) for a run from the beginning.

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
        print(f"--resume auto: no checkpoint in {directory} yet, starting from the beginning")
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
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "wb") as file:
            torch.save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
        read_checkpoint(unfinished)
        os.replace(unfinished, path)
        _sync_directory(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


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
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (checksum of {damaged})")
    checkpoint = _load(path, mmap=False)
    for name, tensor in _named_tensors(checkpoint, ""):
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} is not finite")
    return checkpoint


def _windows_done(path: Path) -> int:
    """How far a checkpoint is, without reading its tensors: with ``mmap`` they stay on disk."""
    _require_archive(path)
    return _load(path, mmap=True)["progress"]["global_window"]


def _require_archive(path: Path) -> None:
    if not path.is_file():
        folder = f" but a folder; --resume auto --checkpoint-dir {path} takes its newest" if path.is_dir() else ""
        raise CheckpointError(f"{path}: no such file{folder}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a checkpoint, or cut short (no zip archive)")


def _load(path: Path, mmap: bool) -> dict[str, Any]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # damaged archives raise anything from OSError to UnpicklingError and RuntimeError
        raise CheckpointError(f"{path}: not a readable checkpoint ({str(error).splitlines()[0][:120]})") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no format mark {FORMAT!r})")
    return checkpoint


def _named_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield from _named_tensors(child, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for index, child in enumerate(value):
            yield from _named_tensors(child, f"{name}[{index}]")


def _sync_directory(directory: Path) -> None:
    """Make a rename survive a power cut. Some network file systems cannot, and say so with an OSError."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)
