"""Sample order as a pure function of (seed, epoch): nothing to save, nothing to fast-forward.

An interrupted epoch continues at window k by slicing the same permutation there, without reading what came before. All
ranks share one order and each takes its slice of every window, so a run that continues with another world size sees the
same samples in the same windows.
"""

import hashlib
import random
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import Sampler


@dataclass(frozen=True)
class SampleKey:
    """A loader's request for one sample. It carries the epoch, so worker processes need no message about it."""

    epoch: int
    index: int


def derive_seed(*parts: int) -> int:
    """Return a 63-bit seed from integers, well mixed: neighbouring epochs and indices give unrelated streams."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def drawn(values: Sequence[float], *parts: int) -> float:
    """Return one of the values, drawn as a function of the integers."""
    return random.Random(derive_seed(*parts)).choice(values)


@dataclass(frozen=True)
class Share:
    """One rank's part of the samples that all ranks work on together."""

    rank: int = 0
    world_size: int = 1

    def of(self, total: int) -> range:
        """Return this rank's slice of positions 0 to ``total - 1``; slices are nearly equal, the longest on rank 0."""
        start, end = (-(-rank * total // self.world_size) for rank in (self.rank, self.rank + 1))
        return range(start, end)


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one epoch, shuffled by (seed, epoch), from any window on: every sample once, the last window short.

    Call ``set_position`` in the main process before iterating over the loader.

    Args:
        num_samples: length of the dataset.
        batch_size: samples in a batch, at most.
        seed: the run's seed.
        window_size: samples per optimizer step, over all ranks; by default, one batch.
        share: this rank's share. If a window leaves it nothing, it gets a batch of that window's first sample, which
            must count as none: every rank needs something to run to take part in collectives.
    """

    def __init__(
        self, num_samples: int, batch_size: int, seed: int, window_size: int | None = None, share: Share | None = None
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.window_size = window_size or batch_size
        self.share = share or Share()
        self.epoch = 0
        self.first_window = 0

    def set_position(self, epoch: int, first_window: int = 0) -> None:
        self.epoch = epoch
        self.first_window = first_window

    @property
    def num_windows(self) -> int:
        """Windows in a whole epoch, whatever the position."""
        return -(-self.num_samples // self.window_size)

    def samples_in(self, window: int) -> int:
        """Return the number of samples in a window, over all ranks."""
        return min(self.window_size, self.num_samples - window * self.window_size)

    def batches_in(self, window: int) -> int:
        """Return the number of this rank's batches in a window; at least one."""
        return max(1, -(-len(self.share.of(self.samples_in(window))) // self.batch_size))

    def most_batches_in(self, window: int) -> int:
        """Return the largest number of batches that any rank has in a window: rank 0's."""
        return -(-len(Share(0, self.share.world_size).of(self.samples_in(window))) // self.batch_size)

    def __len__(self) -> int:
        """Return the number of this rank's batches in a whole epoch, whatever the position."""
        return sum(self.batches_in(window) for window in range(self.num_windows))

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for window in range(self.first_window, self.num_windows):
            start = window * self.window_size
            mine = self.share.of(self.samples_in(window))
            indices = order[start + mine.start : start + mine.stop] or order[start : start + 1]
            for first in range(0, len(indices), self.batch_size):
                yield [SampleKey(self.epoch, index) for index in indices[first : first + self.batch_size]]
