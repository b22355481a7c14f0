"""Sample order as a pure function of (seed, epoch): nothing to save, nothing to fast-forward.

An interrupted epoch goes on at window k by slicing the same permutation there, without reading what came before. The
order is one for all processes of a run: each takes its slice of every window, so that a run that goes on with more of
them, or fewer, sees the same samples in the same windows.
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
    """What a loader asks a data set for. The epoch travels with the index: worker processes need no telling."""

    epoch: int
    index: int


def derive_seed(*parts: int) -> int:
    """A 63-bit seed from integers, well mixed (neighbouring epochs and indices give unrelated streams)."""
    digest = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def drawn(values: Sequence[float], *parts: int) -> float:
    """One of the values, as a function of the integers."""
    return random.Random(derive_seed(*parts)).choice(values)


@dataclass(frozen=True)
class Share:
    """One process's part of what all processes of a run do together."""

    rank: int = 0
    world_size: int = 1

    def of(self, total: int) -> range:
        """Its slice of positions 0 to ``total - 1``: nearly equal for all ranks, larger for the first."""
        start, end = (-(-rank * total // self.world_size) for rank in (self.rank, self.rank + 1))
        return range(start, end)


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one epoch, shuffled by (seed, epoch), from any window on: every sample once, the last window short.

    ``set_position`` is called in the main process before the loader is iterated.

    Args:
        num_samples: of the data set.
        batch_size: the most samples in a batch.
        seed: of the run.
        window_size: samples that make an optimizer step, over all ranks; by default, a batch.
        share: of this process. Where it has nothing of a window, it gets a batch of that window's first sample, to be
            counted as none: a process that takes part in everything needs something to run.
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
        """In a whole epoch, wherever it is entered."""
        return -(-self.num_samples // self.window_size)

    def samples_in(self, window: int) -> int:
        """Samples of a window, over all ranks."""
        return min(self.window_size, self.num_samples - window * self.window_size)

    def batches_in(self, window: int) -> int:
        """Batches of a window that are this process's; at least one."""
        return max(1, -(-len(self.share.of(self.samples_in(window))) // self.batch_size))

    def most_batches_in(self, window: int) -> int:
        """Batches of a window that the process with the most of them has, which is the first."""
        return -(-len(Share(0, self.share.world_size).of(self.samples_in(window))) // self.batch_size)

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever it is entered."""
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
