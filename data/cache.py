"""Cache of decoded pairs in one memory-mapped file: an epoch reads bytes instead of decoding every photograph again.

The file holds N x 4 x S x S bytes, a row for each image's three channels and its mask, then JSON: which rows could not
be decoded, and why. All loader processes, and all runs on the machine, share the operating system's one copy of it.

The file's name is a hash of what it was made from, so an existing file is never out of date. The file gets that name
once it is complete and on disk. The building process holds a lock on the unfinished file, and the lock ends with the
process: an unfinished file without a lock is left from a build that was killed.
"""

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import PIL
from tqdm import tqdm

from data.decoding import fixed_size_image, fixed_size_mask, problem_of
from data.layouts import Pair, name_of, size_and_time
from data.masks import ABOVE_HALF, MaskReading, UInt8Array
from data.processes import process_pool

FORMAT = 1  # raise it whenever the same files give other bytes, or another layout
PAIRS_PER_WORKER = 32  # fewer are not worth another process

NewBar = Callable[..., "tqdm[NoReturn]"]

logger = logging.getLogger("train_ultimate")


class DecodedCache:
    """Reader of a finished cache file, which each process maps into memory at its first read.

    Args:
        path: the cache file.
        images: the image of each row.
        img_size: side of the samples in pixels.
        problems: image -> why it or its mask could not be decoded.
        masks: how the masks are read.
    """

    def __init__(
        self, path: Path, images: Sequence[Path], img_size: int, problems: dict[Path, str],
        masks: MaskReading = ABOVE_HALF,
    ) -> None:  # fmt: skip
        self.path = path
        self.img_size = img_size
        self.problems = problems
        self.masks = masks
        self._row_of = {image: row for row, image in enumerate(images)}
        self._rows: UInt8Array | None = None

    def read(self, pair: Pair) -> tuple[UInt8Array, UInt8Array]:
        """Return copies of image and mask as ``fixed_size_image`` and ``fixed_size_mask`` do: (3, S, S) and (1, S, S).

        Decode them if the cache file has been removed in the meantime.

        Raises:
            ValueError: the image or its mask cannot be decoded.
        """
        if pair.image in self.problems:
            raise ValueError(self.problems[pair.image])
        if self._rows is None:
            shape = len(self._row_of), 4, self.img_size, self.img_size
            try:
                self._rows = np.asarray(np.memmap(self.path, dtype=np.uint8, mode="r", shape=shape))
            except FileNotFoundError:
                return _decoded(pair, self.img_size, self.masks)
        pixels = self._rows[self._row_of[pair.image]].copy()
        return pixels[:3], pixels[3:]

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the mapping: pickled for a loader process, that would be the whole file."""
        return {**self.__dict__, "_rows": None}


def default_directory() -> Path:
    """Return the folder of caches in the user's folder for such files.

    Raises:
        ValueError: the user has no home folder, as in a container that runs with any user's number.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "train_ultimate"
    except RuntimeError as error:
        raise ValueError("--cache: this user has no home folder to put it in; name one with --cache-dir") from error


def open_cache(
    pairs: Sequence[Pair], root: Path, img_size: int, directory: Path, num_workers: int,
    masks: MaskReading = ABOVE_HALF, new_bar: NewBar = tqdm,
) -> DecodedCache:  # fmt: skip
    """Open the cache of these pairs. Build it if it is missing; wait if another process is building it.

    Args:
        pairs: image and mask files, in any order.
        root: the dataset's folder, above all files.
        img_size: side of the samples in pixels.
        directory: folder of the caches.
        num_workers: largest number of decoding processes.
        masks: how the masks are read.
        new_bar: makes the progress bar, of tqdm's options.

    Raises:
        ValueError: the disk is too small, the folder is not writable, or a decoding process was killed.
    """
    ordered = sorted(pairs, key=lambda pair: pair.image)
    path = directory / f"{_key(ordered, root, img_size, masks)}.cache"
    gigabytes = f"{_num_bytes(ordered, img_size) / 1e9:.2f} GB"
    cache, how = _read(path, ordered, root, img_size, masks), "found"
    if cache is None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(directory)
            with _locked(_unfinished(path)) as descriptor:
                if _read(path, ordered, root, img_size, masks) is None:
                    start = time.perf_counter()
                    _build(descriptor, path, ordered, root, img_size, num_workers, masks, new_bar)
                    how = f"built in {time.perf_counter() - start:.1f} s"
        except OSError as error:
            way_out = "choose another folder with --cache-dir, or use --no-cache"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                free = f"{shutil.disk_usage(directory).free / 1e9:.2f} GB"
                raise ValueError(f"{directory}: the cache needs {gigabytes}, {free} is free; {way_out}") from error
            raise ValueError(f"{directory}: the cache cannot be written there ({error}); {way_out}") from error
        cache = _read(path, ordered, root, img_size, masks)
        if cache is None:
            raise ValueError(
                f"{path}: cannot be read back after it was written; check that the disk and the images are still "
                "there, or use --no-cache"
            )
    logger.info(f"Cache: {path}, {gigabytes}, {how}")
    return cache


def _key(pairs: Sequence[Pair], root: Path, img_size: int, masks: MaskReading) -> str:
    """Return 16 hex digits that change with any file's name, size or modification time and with the decoder."""
    digest = hashlib.sha256(f"{FORMAT} {img_size} {PIL.__version__}\n".encode())
    if masks != ABOVE_HALF:  # as all were read before there were others
        digest.update(f"{masks}\n".encode())
    for pair in pairs:
        for path in (pair.image, pair.mask):
            size, modified = size_and_time(path)
            line = f"{name_of(path, root)}\0{size}\0{modified}\n"
            digest.update(line.encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _num_bytes(pairs: Sequence[Pair], img_size: int) -> int:
    return len(pairs) * 4 * img_size**2


def _unfinished(path: Path) -> Path:
    return path.with_name(f".{path.name}.unfinished")


def _read(path: Path, pairs: Sequence[Pair], root: Path, img_size: int, masks: MaskReading) -> DecodedCache | None:
    """Return the cache, or None if it is missing, cut short, or lacks an image that can now be decoded.

    The last happens after a passing fault of a network file system, which must not leave an image out forever.
    """
    try:
        with open(path, "rb") as file:
            file.seek(_num_bytes(pairs, img_size))
            problems = {pairs[int(row)]: f"{root}/{reason}" for row, reason in json.loads(file.read()).items()}
    except (OSError, ValueError):
        return None
    if not all(problem_of(pair.image, pair.mask) for pair in problems):
        return None
    images = [pair.image for pair in pairs]
    return DecodedCache(path, images, img_size, {pair.image: reason for pair, reason in problems.items()}, masks)


def _build(
    descriptor: int, path: Path, pairs: Sequence[Pair], root: Path, img_size: int, num_workers: int, masks: MaskReading,
    new_bar: NewBar,
) -> None:  # fmt: skip
    """Decode all pairs into the locked unfinished file, whatever it holds so far, and give it its final name."""
    num_bytes, unfinished = _num_bytes(pairs, img_size), _unfinished(path)
    os.ftruncate(descriptor, 0)
    if num_bytes > shutil.disk_usage(path.parent).free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):  # not on macOS, where the disk can still fill up during the build
        os.posix_fallocate(descriptor, 0, num_bytes)
    num_workers = min(num_workers, -(-len(pairs) // PAIRS_PER_WORKER))
    problems = _decode(unfinished, pairs, root, img_size, num_workers, masks, new_bar)
    _write(descriptor, json.dumps(problems).encode(), num_bytes)
    os.fsync(descriptor)
    os.replace(unfinished, path)
    with suppress(OSError):  # some network file systems cannot sync a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _decode(
    file: Path, pairs: Sequence[Pair], root: Path, img_size: int, num_workers: int, masks: MaskReading,
    new_bar: NewBar = tqdm,
) -> dict[int, str]:  # fmt: skip
    """Write every row, in several processes; return row -> why it cannot be decoded, with a path relative to ``root``.

    Raises:
        ValueError: a process was killed.
        OSError: a row could not be written.
    """
    problems: dict[int, str] = {}
    way_out = "try again, or use --no-cache"
    with process_pool(num_workers, "decodes for the cache", way_out) as pool:
        written = pool.map(partial(_write_row, file, img_size, masks), range(len(pairs)), pairs, chunksize=4)
        with new_bar(desc="Decoding for the cache", total=len(pairs), unit="image") as bar:
            for row, problem in enumerate(written):
                if problem:
                    problems[row] = problem.removeprefix(f"{root}/")
                bar.update()
    return problems


def _write_row(file: Path, img_size: int, masks: MaskReading, row: int, pair: Pair) -> str:
    """Decode a pair and write its row; return why it cannot be decoded, or an empty string."""
    try:
        pixels = np.concatenate(_decoded(pair, img_size, masks))
    except ValueError as error:
        return str(error)
    descriptor = os.open(file, os.O_WRONLY)
    try:
        _write(descriptor, pixels.tobytes(), row * pixels.nbytes)
    finally:
        os.close(descriptor)
    return ""


def seconds_to_decode(pairs: Sequence[Pair], img_size: int, masks: MaskReading, num_workers: int) -> float:
    """Return how long a pair takes to go into a cache, measured on these pairs; those that are damaged do not count."""
    start, num_decoded = time.perf_counter(), 0
    for pair in pairs:
        with suppress(ValueError):
            _decoded(pair, img_size, masks)
            num_decoded += 1
    return (time.perf_counter() - start) / max(1, num_decoded) / max(1, num_workers)


def _decoded(pair: Pair, img_size: int, masks: MaskReading) -> tuple[UInt8Array, UInt8Array]:
    return fixed_size_image(pair.image, img_size), fixed_size_mask(pair.mask, img_size, masks)


def _write(descriptor: int, data: bytes, offset: int) -> None:
    """Write all of the data with system calls: through a mapping, a full disk would raise SIGBUS."""
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


@contextmanager
def _locked(path: Path) -> Iterator[int]:
    """Yield a descriptor of the file, created if missing, and locked; remove the file afterwards."""
    descriptor = None
    try:
        # If another process renames or removes the file during the wait, the lock is on a file without that name.
        while descriptor is None or not _is_at(descriptor, path):
            if descriptor is not None:
                os.close(descriptor)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info(f"Waiting for another process to build {path.parent / path.stem[1:]}")
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        if descriptor is not None:
            with suppress(BlockingIOError):  # an exception ended the wait, and another process holds the lock
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(descriptor, path):
                    path.unlink()
            os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _remove_leftovers(directory: Path) -> None:
    """Remove unfinished files without a lock: their builds were killed."""
    for leftover in directory.glob(".*.cache.unfinished"):
        with suppress(OSError), ExitStack() as stack:
            descriptor = os.open(leftover, os.O_RDWR)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _is_at(descriptor, leftover):
                leftover.unlink()
