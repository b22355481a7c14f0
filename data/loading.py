"""Data loaders that outlive their worker processes, and a batch's way from a loader to the device."""

import itertools
import logging
import multiprocessing.queues
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from data.cache import DecodedCache
from data.dataset import Batch, CamouflageDataset, Sample, collate
from data.layouts import Pair
from data.masks import ABOVE_HALF, MaskReading
from data.processes import keep_freed_memory
from data.sampler import EpochBatchSampler, SampleKey, Share
from data.transforms import augment_batch
from data.unreadable import UnreadableDataError

MOST_LOSSES = 3  # times in a row that worker processes die before one batch arrives; then there are none any more
SHARED_MEMORY = Path("/dev/shm")
_HELD_BACK = (signal.SIGINT, signal.SIGTERM)
_PREFETCHED = 2  # batches per worker, torch's default
_LOSSES = (RuntimeError, EOFError, OSError)  # the first from torch, the others from a connection to a dead process
_WINDOWS_KEPT = 3  # the current, the pending and the last applied window hold their batches

logger = logging.getLogger("train_ultimate")


class HandoverError(RuntimeError):
    """A worker process cannot hand its batches to the main process; the message is the reason."""


def training_loader(
    pairs: Sequence[Pair], img_size: int, batch_size: int, seed: int, num_workers: int, pin_memory: bool,
    cache: DecodedCache | None = None, augment_on_device: bool = False,
    window_size: int | None = None, share: Share | None = None, masks: MaskReading = ABOVE_HALF,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a loader of shuffled batches, to be read through ``windows``.

    Batches are augmented, or with ``augment_on_device`` left for ``to_device`` to augment. They are this rank's share
    of windows of ``window_size`` samples over all ranks: see ``EpochBatchSampler``.
    """
    dataset = CamouflageDataset(
        pairs, img_size, augmented=True, seed=seed, cache=cache, on_device=augment_on_device, masks=masks
    )
    sampler = EpochBatchSampler(len(dataset), batch_size, seed, window_size, share)
    return _loader(dataset, sampler, num_workers, pin_memory)


def validation_loader(
    pairs: Sequence[Pair], img_size: int, batch_size: int, num_workers: int, pin_memory: bool,
    cache: DecodedCache | None = None, share: Share | None = None, masks: MaskReading = ABOVE_HALF,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a loader of every pair once, in order, not augmented; unreadable pairs are missing from their batch.

    Ranks share whole batches, the same ones that a single process would make, so that scores are bitwise the same.
    """
    dataset, share = CamouflageDataset(pairs, img_size, cache=cache, masks=masks), share or Share()
    keys = [SampleKey(0, index) for index in range(len(dataset))]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _loader(dataset, batches[share.rank :: share.world_size], num_workers, pin_memory)


def windows(loader: DataLoader[Batch], epoch: int, first_window: int) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each window of an epoch, from ``first_window`` on.

    Earlier windows are not read: the sampler starts at that position.

    Raises:
        UnreadableDataError: a sample could neither be read nor replaced.
    """
    sampler, number = sampler_of(loader), first_window
    while number < sampler.num_windows:
        sampler.set_position(epoch, number)  # again at the same window if worker processes have died
        batches = None
        while number < sampler.num_windows:
            try:
                batches = batches or iter(loader)
                window = list(itertools.islice(batches, sampler.batches_in(number)))
            except _LOSSES as error:
                _recover(loader, error)
                break
            for batch in window:
                if batch.num_missing:
                    first, *others = batch.errors.values()
                    raise UnreadableDataError(
                        f"{first}, and none of {len(others)} other images that could replace it can be read either; "
                        "check that the disk is still there"
                    )
            yield window
            number += 1


def batches_of(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Yield a validation loader's batches, in order; those that worker processes took with them are read again."""
    num_read = 0
    while True:
        try:
            for batch in itertools.islice(loader, num_read, None):
                num_read += 1
                yield batch
        except _LOSSES as error:
            _recover(loader, error)
        else:
            return


def workers_that_fit(num_workers: int, img_size: int, batch_size: int, batches_per_window: int) -> int:
    """Lower a number of worker processes so that the batches in flight fit into shared memory, and warn about it.

    Args:
        num_workers: wanted worker processes.
        img_size: S.
        batch_size: images in a batch, of 4 x S x S bytes each.
        batches_per_window: batches of a window, which stay in memory until its step is settled.
    """
    try:
        free = shutil.disk_usage(SHARED_MEMORY).free
    except OSError:  # no such folder: the system shares memory in another way
        return num_workers
    batch = 4 * img_size**2 * batch_size
    room = free // batch - _WINDOWS_KEPT * batches_per_window - 1
    fitting = max(0, min(num_workers, room // _PREFETCHED))
    if fitting < num_workers:
        logger.warning(
            f"{SHARED_MEMORY} has {free / 2**20:.0f} MB free: --num-workers {fitting} instead of {num_workers}; in a "
            "container, give it more with docker run --shm-size=2g"
        )
    return fitting


def sampler_of(loader: DataLoader[Batch]) -> EpochBatchSampler:
    """Return the sampler that makes a training loader's windows."""
    assert isinstance(loader.batch_sampler, EpochBatchSampler)
    return loader.batch_sampler


def to_device(batch: Batch, device: torch.device, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1], and masks, on the device, float32, augmented if the loader left that to it.

    Bytes are copied, and become floats on the device.

    Shape:
        -> (B, 3, S, S), (B, 1, S, S)
    """
    images, masks = batch.images.to(device, non_blocking=True), batch.masks.to(device, non_blocking=True)
    if batch.augmentations is not None:
        images, masks = augment_batch(images, masks, batch.augmentations.to(device, non_blocking=True))
    return unit_range(images, memory_format), masks.to(torch.float32)


def unit_range(images: Tensor, memory_format: torch.memory_format) -> Tensor:
    """Scale (B, 3, S, S) values of 0 to 255 to the network's input range, float32 of 0 to 1."""
    return images.contiguous(memory_format=memory_format).div(255)


def _loader(
    dataset: CamouflageDataset,
    batch_sampler: EpochBatchSampler | list[list[SampleKey]],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader[Batch]:
    return _Loader(
        dataset,  # type: ignore[arg-type]  # DataLoader is typed by its samples, not by what collate makes of them
        batch_sampler=batch_sampler,  # type: ignore[arg-type]  # keys are SampleKey, not int
        num_workers=num_workers,
        collate_fn=_collate_to_share,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=begin_loader_process,
        generator=torch.Generator(),  # else every epoch would draw a seed from the global generator, as dropout does
    )


class _Loader(DataLoader[Batch]):
    """Data loader whose worker processes start with signals blocked, and whose death is an error of the next batch.

    Signals would kill the processes before their handlers are set. On its own, torch raises the death of a worker
    wherever the main process happens to be, amid an optimizer step for example.
    """

    losses = 0  # deaths of worker processes since the last batch arrived

    def __iter__(self) -> Any:  # torch types an iterator of its own
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        on_child = signal.getsignal(signal.SIGCHLD)
        try:
            batches = super().__iter__()
        except OSError as error:  # no room for semaphores in shared memory, too many processes
            raise HandoverError(str(error)) from error
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, on_child)
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._counted(batches)

    def _counted(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        for batch in batches:
            self.losses = 0
            yield batch

    def stop_workers(self) -> None:
        """End the worker processes. The next iteration starts new ones, unless ``num_workers`` is 0 by then."""
        if self._iterator is not None:
            self._iterator._shutdown_workers()  # type: ignore[attr-defined]  # of torch's iterator with processes
            self._iterator = None


def _end_if_read_hangs(patience: float) -> Callable[[int, FrameType | None], None]:
    """Return a handler of SIGALRM that ends the process if it meets the same read of a sample twice.

    Reads that follow each other are those of a busy process, which the main one still needs.
    """
    last: FrameType | None = None

    def handle(_signal: int, frame: FrameType | None) -> None:
        nonlocal last
        while frame is not None and frame.f_code.co_name != "__getitem__":  # of any dataset
            frame = frame.f_back
        if frame is not None and frame is last:
            os._exit(1)
        last = frame
        signal.setitimer(signal.ITIMER_REAL, patience)

    return handle


def _recover(loader: DataLoader[Batch], error: Exception) -> None:
    """Prepare a loader to go on after worker processes have died, or could not hand over a batch.

    Raises:
        Exception: the error, if it is another one.
    """
    raised_by_worker = str(error).startswith("Caught ")  # torch's first words of an error that a worker has sent
    died = str(error).startswith("DataLoader worker (pid") or isinstance(error, EOFError | OSError)
    died = died and not raised_by_worker and loader.num_workers > 0
    if not isinstance(loader, _Loader) or not (died or isinstance(error, HandoverError)):
        raise error
    loader.stop_workers()
    loader.losses += 1
    if died and loader.losses < MOST_LOSSES:
        logger.warning(f"a loader process died ({_reason(error)}); the loader starts again at the same window")
        return
    loader.num_workers = 0
    logger.warning(
        f"loader processes cannot do their work ({_reason(error)}): this process loads all images from here on, which "
        f"is slower. Give {SHARED_MEMORY} more room (docker run --shm-size=2g), a shorter TMPDIR, or more memory"
    )


def _reason(error: Exception) -> str:
    """Return the last line of an error: the original one, if it comes from a worker's traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]


def _collate_to_share(samples: Sequence[Sample]) -> Batch:
    """Collate, and in a worker process move the batch to shared memory here, where an error reaches the main process.

    Left to the queue, it would be moved in the feeder thread, whose errors are lost, and the main process would wait
    for the batch for ever.
    """
    batch = collate(samples)
    if get_worker_info() is not None:
        try:
            for value in batch:
                if isinstance(value, Tensor):
                    value.share_memory_()
        except (RuntimeError, OSError) as error:
            raise HandoverError(_reason(RuntimeError(error))) from None
    return batch


def begin_loader_process(_worker: int, patience: float = 60) -> None:
    """Set up a loader process to leave signals to the main process, and to keep freed memory.

    Ctrl-C, ``timeout`` and Slurm signal whole process groups, but the main process decides whether the run ends. It may
    need batches to finish its window, so a worker outlives SIGTERM. If one read hangs, the worker ends after
    ``patience`` to twice as many seconds. (A worker whose main process is gone ends by itself.)

    Raises:
        HandoverError: Tensors cannot be handed over; a socket's path in TMPDIR may be too long.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.setitimer(signal.ITIMER_REAL, patience))
    signal.signal(signal.SIGALRM, _end_if_read_hangs(patience))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    # Silences the feeder thread's traceback if the main process exits first.
    sys.excepthook = lambda *_: None
    # A batch that the feeder thread cannot send is lost. The death of the worker is noticed, silence is not.
    multiprocessing.queues.Queue._on_queue_feeder_error = staticmethod(lambda *_: os._exit(1))  # type: ignore[attr-defined]
    keep_freed_memory()
    try:
        ForkingPickler.dumps(torch.zeros(1).share_memory_())  # opens the socket that hands over file descriptors
    except (RuntimeError, OSError) as error:
        raise HandoverError(_reason(RuntimeError(error))) from None
