"""Data loaders, and a batch's way from a loader to the device."""

import itertools
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from data.cache import DecodedCache
from data.dataset import Batch, CamouflageDataset, collate
from data.layouts import Pair
from data.processes import keep_freed_memory
from data.sampler import EpochBatchSampler, SampleKey, Share
from data.transforms import augment_batch
from data.unreadable import UnreadableDataError

_HELD_BACK = (signal.SIGINT, signal.SIGTERM)


def training_loader(
    pairs: Sequence[Pair], img_size: int, batch_size: int, seed: int, num_workers: int, pin_memory: bool,
    cache: DecodedCache | None = None, augment_on_device: bool = False,
    window_size: int | None = None, share: Share | None = None,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a loader of shuffled batches, to be read through ``windows``.

    Batches are augmented, or with ``augment_on_device`` left for ``to_device`` to augment. They are this rank's share
    of windows of ``window_size`` samples over all ranks: see ``EpochBatchSampler``.
    """
    dataset = CamouflageDataset(pairs, img_size, augmented=True, seed=seed, cache=cache, on_device=augment_on_device)
    sampler = EpochBatchSampler(len(dataset), batch_size, seed, window_size, share)
    return _loader(dataset, sampler, num_workers, pin_memory)


def validation_loader(
    pairs: Sequence[Pair], img_size: int, batch_size: int, num_workers: int, pin_memory: bool,
    cache: DecodedCache | None = None, share: Share | None = None,
) -> DataLoader[Batch]:  # fmt: skip
    """Return a loader of every pair once, in order, not augmented; unreadable pairs are missing from their batch.

    Ranks share whole batches, the same ones that a single process would make, so that scores are bitwise the same.
    """
    dataset, share = CamouflageDataset(pairs, img_size, cache=cache), share or Share()
    keys = [SampleKey(0, index) for index in range(len(dataset))]
    batches = [keys[start : start + batch_size] for start in range(0, len(keys), batch_size)]
    return _loader(dataset, batches[share.rank :: share.world_size], num_workers, pin_memory)


def windows(loader: DataLoader[Batch], epoch: int, first_window: int) -> Iterator[list[Batch]]:
    """Yield this rank's batches of each window of an epoch, from ``first_window`` on.

    Earlier windows are not read: the sampler starts at that position.

    Raises:
        UnreadableDataError: a sample could neither be read nor replaced.
    """
    sampler = sampler_of(loader)
    sampler.set_position(epoch, first_window)
    batches = iter(loader)
    for number in range(first_window, sampler.num_windows):
        window = list(itertools.islice(batches, sampler.batches_in(number)))
        for batch in window:
            if batch.num_missing:
                first, *others = batch.errors.values()
                raise UnreadableDataError(
                    f"{first}, and none of {len(others)} other images that could replace it can be read either; check "
                    "that the disk is still there"
                )
        yield window


def sampler_of(loader: DataLoader[Batch]) -> EpochBatchSampler:
    """Return the sampler that makes a training loader's windows."""
    assert isinstance(loader.batch_sampler, EpochBatchSampler)
    return loader.batch_sampler


def to_device(batch: Batch, device: torch.device, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """Return images in [0, 1] and masks of 0 and 1 on the device, float32, augmented if the loader left that to it.

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
        collate_fn=collate,
        pin_memory=pin_memory,
        persistent_workers=num_workers > 0,
        worker_init_fn=begin_loader_process,
        generator=torch.Generator(),  # else every epoch would draw a seed from the global generator, as dropout does
    )


class _Loader(DataLoader[Batch]):
    """Data loader whose processes start with signals blocked, which would kill them before their handlers are set."""

    def __iter__(self) -> Any:  # torch types an iterator of its own
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK)
        try:
            return super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def begin_loader_process(_worker: int) -> None:
    """Set up a loader process to leave signals to the main process, and to keep freed memory.

    Ctrl-C, ``timeout`` and Slurm signal whole process groups, but the main process decides whether the run ends. It may
    need batches to finish its window, so a worker outlives SIGTERM by a minute. (A worker whose main process is gone
    ends by itself.)
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(60))
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK)
    # Silences the feeder thread's traceback if the main process exits first. Errors in a batch still reach the main
    # process.
    sys.excepthook = lambda *_: None
    keep_freed_memory()
