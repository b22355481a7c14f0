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
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from runtime.files import first_line, replacing, sync_directory
from runtime.folder import BEST
from runtime.tensors import map_tensors, named_tensors

logger = logging.getLogger("train_ultimate")

FORMAT = "train_ultimate/2"

# Other programs keep weights in one of these entries, averaged ones first, and inside it maybe in another.
_WRAPPERS = (
    "state_dict_ema", "model_ema", "params_ema", "state_dict", "model_state_dict", "model", "net", "network", "params",
    "weights", "module",
)  # fmt: skip
_PIECE = 2**26  # bytes of host memory allocated at once; torch rounds pinned memory up to a power of 2
_DEEPEST = 4  # entries inside each other; a crafted file may contain itself
_PREFIXES = ("module.", "_orig_mod.", "model.")  # of parallel training, torch.compile, Lightning and others


class CheckpointError(ValueError):
    """The error of a file that is no usable checkpoint; the message says why."""


def made_by_modified_copy(where: str | Path, difference: str) -> CheckpointError:
    """Return the error of a file with this program's mark that holds something else than this program writes.

    Args:
        where: the file or folder.
        difference: the first thing that differs, in words.
    """
    return CheckpointError(
        f"{where} was made by a modified copy of this program, or with another version of timm: first difference: "
        f"{difference}. Use that copy and version (config.json of its run names both), or train again"
    )


class CheckpointStore:
    """Checkpoint files of one run, written in the background while training goes on.

    Training waits only for a copy of the state to host memory, and for the previous write. A write that fails costs a
    warning: the older files stay, and the next save is the next attempt.

    Args:
        directory: created by the first save.
        keep: number of ``epoch_NNNN.pth`` to keep.
        on_saved: called by ``report`` and ``wait`` with the name of each file that is complete and verified.
        writes: False on ranks other than 0, which only keep count.
    """

    def __init__(
        self, directory: Path, keep: int, on_saved: Callable[[str], None] | None = None, writes: bool = True
    ) -> None:
        self.directory = directory
        self.writes = writes
        self.keep = keep
        self.on_saved = on_saved
        self.last_window = -1  # windows done in the newest save that was begun
        self.failure: OSError | CheckpointError | None = None  # why the newest save failed
        self._writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: tuple[list[str], Future[None]] | None = None
        self._host = HostCopy()

    def save_epoch(self, epoch: int, payload: dict[str, Any], is_best: bool) -> None:
        """Begin ``epoch_NNNN.pth``; once it is complete, mid-epoch files and the oldest beyond ``keep`` are removed.

        If this is the best epoch, ``best_model.pth`` comes first: after a kill between the two, it is the newest.
        """
        self._begin([*([self.best_path.name] if is_best else []), f"epoch_{epoch:04d}.pth"], payload)

    def save_step(self, global_window: int, payload: dict[str, Any]) -> Path:
        """Begin ``step_NNNNNNNN.pth``, a mid-epoch checkpoint, and return its path; only the newest one is kept."""
        name = f"step_{global_window:08d}.pth"
        self._begin([name], payload)
        return self.directory / name

    @property
    def is_writing(self) -> bool:
        return self._writing is not None and not self._writing[1].done()

    def report(self) -> None:
        """Report a save that has ended. Cheap and without waiting, so it can be called for every window."""
        if self._writing is not None and not self.is_writing:
            self.wait()

    def wait(self) -> None:
        """Wait until the save that was begun is on the disk or has failed, and report it."""
        if self._writing is None:
            return
        (names, future), self._writing = self._writing, None
        try:
            future.result()
        except (OSError, CheckpointError) as error:
            self.failure = error.with_traceback(None)  # a traceback keeps its frames alive, data loaders included
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
        self._writing = names, self._writer.submit(self._write_all, names, host)

    def _write_all(self, names: list[str], payload: Callable[[], dict[str, Any]]) -> None:
        """Write the files, in the writer's thread."""
        for name in names:
            path = self.directory / name
            self.directory.mkdir(parents=True, exist_ok=True)  # it may have been removed
            try:
                write_checkpoint(path, payload())
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._make_room():
                    raise
                write_checkpoint(path, payload())
            self._remove_outdated(path)

    def _make_room(self) -> bool:
        """Remove what is the least loss on a full disk. Return whether there was anything.

        Superseded files go first, and every epoch and mid-epoch file except the furthest checkpoint. The best weights
        stay; if they are the furthest checkpoint, no other is needed.
        """
        steps: dict[Path, int] = {}
        for path in self.files():
            with suppress(CheckpointError):
                steps[path] = _windows_done(path)
        kept = {self.best_path, max(steps, key=lambda path: (steps[path], path == self.best_path), default=None)}
        older = [*self.directory.glob("*.superseded*"), *(path for path in steps if path not in kept)]
        for path in older:
            path.unlink(missing_ok=True)
        if older:
            logger.warning(f"the disk is full; {', '.join(path.name for path in older)} removed to make room")
        return bool(older)

    def _remove_outdated(self, written: Path) -> None:
        """Remove older files, now that the new one is verified."""
        outdated: list[Path] = []
        if written.name.startswith("epoch_"):
            outdated = [*self._numbered("epoch")[: -self.keep], *self._numbered("step")]
        elif written.name.startswith("step_"):
            outdated = [path for path in self._numbered("step") if path != written]
        for path in outdated:
            path.unlink(missing_ok=True)

    def files(self) -> list[Path]:
        """Return the checkpoints in the folder: epochs, then mid-epoch files, each in order, then the best."""
        return [
            *self._numbered("epoch"),
            *self._numbered("step"),
            *([self.best_path] if self.best_path.exists() else []),
        ]

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """Return the furthest checkpoint that verifies, with its content. Log each damaged one that is skipped."""
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
        """Rename checkpoints that are further on to ``*.superseded``: they belong to an abandoned branch of the run."""
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
        """Return the files ``KIND_NUMBER.pth`` by number: as text, epoch_10000 comes before epoch_9999."""
        names = {path: re.fullmatch(kind + r"_(\d+)\.pth", path.name) for path in self.directory.glob(f"{kind}_*.pth")}
        numbers = {path: int(match[1]) for path, match in names.items() if match is not None}
        return sorted(numbers, key=lambda path: (numbers[path], path.name))


class HostCopy:
    """Copier of nested state to host memory, into the same memory each time: fresh pages cost more than the copy.

    From a CUDA device to pinned memory, copies are queued behind the current work, and nothing waits for them here.

    Args:
        pinned: Pin the memory for copies from a CUDA device. It is then no longer free for other programs.
    """

    def __init__(self, pinned: bool = True) -> None:
        self._pinned = pinned
        self._layout: dict[str, Any] = {}  # of the sources
        self._tensors: dict[str, Tensor] = {}

    def take(self, payload: dict[str, Any]) -> Callable[[], dict[str, Any]]:
        """Begin to copy. Return a function that waits for the copy and returns it.

        The next call overwrites this copy.
        """
        sources = dict(named_tensors(payload))
        on_cuda = any(source.is_cuda for source in sources.values())
        layout = {name: (source.shape, source.dtype, source.stride()) for name, source in sources.items()}
        if layout != self._layout:
            self._layout, self._tensors = layout, _host_tensors(sources, self._pinned and on_cuda)
        for name, source in sources.items():
            self._tensors[name].copy_(source.detach(), non_blocking=True)
        copied = map_tensors(payload, lambda name, _: self._tensors[name])
        if not on_cuda:
            return lambda: copied
        arrived = torch.cuda.Event(blocking=True)
        arrived.record()

        def complete() -> dict[str, Any]:
            arrived.synchronize()
            return copied

        return complete


def _host_tensors(sources: dict[str, Tensor], pinned: bool) -> dict[str, Tensor]:
    """Return tensors in host memory, laid out like the sources. Values are arbitrary.

    Memory is allocated in few pieces, because pinning a piece makes the device wait. Each tensor is a storage of its
    own nevertheless, so that a file of a few of them does not hold them all.
    """
    pieces: list[list[str]] = [[]]
    filled = 0
    for name, source in sources.items():
        if filled + _bytes_of(source) > _PIECE and pieces[-1]:
            pieces.append([])
            filled = 0
        pieces[-1].append(name)
        filled += _bytes_of(source)
    tensors: dict[str, Tensor] = {}
    for names in pieces:
        memory = torch.empty(sum(_bytes_of(sources[name]) for name in names), dtype=torch.uint8, pin_memory=pinned)
        start = 0
        for name in names:
            source = sources[name]
            if source.numel():
                flat = torch.frombuffer(memory.numpy(), dtype=source.dtype, count=source.numel(), offset=start)
                tensors[name] = flat.as_strided(source.shape, torch.empty_like(source, device="meta").stride())
            else:
                tensors[name] = torch.empty_like(source, device="cpu", requires_grad=False)
            start += _bytes_of(source)
    return tensors


def _bytes_of(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes, up to where the next one may begin."""
    return -(-tensor.numel() * tensor.element_size() // 64) * 64


def find_checkpoint(requested: str | None, directory: Path) -> tuple[Path | None, dict[str, Any] | None]:
    """Return the path and verified content of the checkpoint to resume; (None, None) to start from the beginning.

    A file that holds only weights, as other programs write them, has the single key "model".

    Args:
        requested: value of ``--resume``: a path or "auto".
        directory: the run's folder, in which "auto" looks.

    Raises:
        CheckpointError: The file is unusable, or every checkpoint in the folder is.
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
    """Write a checkpoint, flush it to the disk, read it back, and only then give the file its name.

    A crash leaves either the old file or the new one, never half of one. A disk that lost or changed bytes is found
    here, while the older checkpoints still exist. Flushing costs about 0.1 s for 250 MB, reading back less.

    Raises:
        OSError: The disk is full, read-only or gone.
        CheckpointError: The file does not verify: bytes have changed, or a tensor is not finite.
    """
    with replacing(path) as unfinished:
        with open(unfinished, "wb") as file:
            _save({"format": FORMAT, **payload}, file)
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fadvise"):  # else the file would be read back from memory, not from the disk
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        read_checkpoint(unfinished)
    sync_directory(path.parent)


def _save(payload: dict[str, Any], file: BinaryIO) -> None:
    """Call ``torch.save``, but raise the disk's own error: torch turns it into a RuntimeError about its container."""
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
        torch.save(payload, Recording())  # type: ignore[arg-type]  # torch calls nothing else of a file
    except RuntimeError as error:
        raise (refused[0] if refused else error) from error


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint to host memory, verified: every byte by its checksum, every tensor finite.

    Weights that another program saved have the single key "model", see ``bare_weights``.

    ``torch.load`` accepts a flipped bit silently, so the zip container's CRC-32 is checked first. Nothing in the file
    is executed (``weights_only``).

    Raises:
        CheckpointError: The file is missing, damaged, not finite, or no checkpoint of this program.
    """
    _require_archive(path)
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # a damaged zip directory raises anything, even UnicodeDecodeError
        raise CheckpointError(f"{path}: damaged ({error})") from error
    if damaged is not None:
        raise CheckpointError(f"{path}: damaged (checksum of {damaged})")
    checkpoint = _load(path, mmap=False)
    try:
        problem = next((f"{name} {found}" for name, tensor in _all_tensors(checkpoint) if (found := _flaw(tensor))), "")
    except Exception as error:  # tensors of other programs raise anything
        raise CheckpointError(f"{path}: not a checkpoint of this program ({first_line(error, 120)})") from error
    if problem:
        raise CheckpointError(f"{path}: {problem}")
    return checkpoint


def read_weights(path: Path) -> dict[str, Any]:
    """Load the weights in a file of any program, ``.safetensors`` or saved by torch, see ``bare_weights``.

    Raises:
        CheckpointError: The file is missing, cannot be read, or holds no weights.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            content = load_file(path)
        except Exception as error:  # safetensors' own errors are no OSErrors
            raise CheckpointError(f"{path}: not readable ({first_line(error, 120)})") from error
    else:
        content = _load_any(path, mmap=False)
    return _weights_of_another_program(path, content)


def bare_weights(content: Any) -> tuple[dict[str, Any], str]:
    """Find the weights in what another program saved.

    Entries such as "state_dict" are opened. Prefixes such as "module." that all names share are dropped.

    Returns:
        weights by name, empty if there are none; and what was dropped, in words.
    """
    dropped: list[str] = []
    for _ in range(_DEEPEST):
        if not isinstance(content, dict) or not content:
            return {}, ""
        if all(isinstance(value, Tensor) for value in content.values()):
            break
        entry = next((name for name in _WRAPPERS if isinstance(content.get(name), dict)), None)
        others = ", ".join(str(name) for name in content if name != entry)
        dropped.append(f"all but its entry {entry}" + (f" ({others[:80]})" if others else ""))
        content = content.get(entry)
    else:
        return {}, ""
    prefix = ""
    while longer := next((p for p in _PREFIXES if all(str(name).startswith(prefix + p) for name in content)), ""):
        prefix += longer
    if prefix:
        dropped.append(f"the prefix {prefix} of all names")
    return {str(name).removeprefix(prefix): weight for name, weight in content.items()}, " and ".join(dropped)


def _weights_of_another_program(path: Path, content: Any, quiet: bool = False) -> dict[str, Any]:
    weights, dropped = bare_weights(content)
    if not weights:
        raise CheckpointError(f"{path}: not a checkpoint of this program (no format mark {FORMAT!r}), and no weights")
    if dropped and not quiet:
        logger.info(f"{path}: weights of another program, without {dropped}")
    return weights


def _all_tensors(checkpoint: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor with its place. A crafted file may refer to itself: each container is walked once."""
    seen: set[int] = set()
    left: list[tuple[str, Any]] = [("", checkpoint)]
    while left:
        name, value = left.pop()
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            seen.add(id(value))
            items = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}" if name else str(key), child) for key, child in items]


def _flaw(tensor: Tensor) -> str:
    """Return what is wrong with a tensor; "" for nothing. Crafted ones claim more elements than their file holds."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
        return "is no ordinary tensor"
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return "has more elements than are stored"
    if (tensor.is_floating_point() or tensor.is_complex()) and not torch.isfinite(tensor).all():
        return "is not finite"
    return ""


def _windows_done(path: Path) -> int:
    """Return how many windows a checkpoint's run had done. With ``mmap``, its tensors are not read."""
    _require_archive(path)
    checkpoint = _load(path, mmap=True)
    if "progress" not in checkpoint:
        raise CheckpointError(f"{path}: holds only weights, no run to go on with")
    progress = checkpoint["progress"]
    windows = progress.get("global_window") if isinstance(progress, dict) else None
    if not isinstance(windows, int):
        raise CheckpointError(f"{path}: not a checkpoint of this program (it does not say how far its run was)")
    return windows


def _require_archive(path: Path) -> None:
    if not path.is_file():
        folder = f" but a folder; --resume auto --checkpoint-dir {path} takes its newest" if path.is_dir() else ""
        raise CheckpointError(f"{path}: no such file{folder}")
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: not a checkpoint, or cut short (no zip archive)")


def _load(path: Path, mmap: bool) -> dict[str, Any]:
    checkpoint = _load_any(path, mmap)
    if isinstance(checkpoint, dict) and isinstance(mark := checkpoint.get("format"), str):
        if mark == FORMAT:
            return checkpoint
        if mark.startswith(FORMAT.partition("/")[0]):
            raise CheckpointError(f"{path}: not a checkpoint of this version (format mark {mark!r}, not {FORMAT!r})")
    return {"model": _weights_of_another_program(path, checkpoint, quiet=mmap)}


def _load_any(path: Path, mmap: bool) -> Any:
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:  # torch maps no file whose name is not UTF-8
        mmap = False
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise CheckpointError(
                f"{path}: refused: it holds more than tensors, numbers and text, and loading that could run code. "
                f"If you trust its origin, save its weights alone: torch.save(model.state_dict(), file)"
            ) from error
        raise CheckpointError(f"{path}: not a readable checkpoint ({first_line(error, 120)})") from error
    except Exception as error:  # damaged archives raise anything from OSError to RuntimeError
        raise CheckpointError(f"{path}: not a readable checkpoint ({first_line(error, 120)})") from error
