"""Sample order as a pure function of (seed, epoch): nothing to save, nothing to fast-forward.

An interrupted epoch goes on at batch k by slicing the same permutation there, without reading what came before.
"""

import hashlib
import struct
from collections.abc import Iterator
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


class EpochBatchSampler(Sampler[list[SampleKey]]):
    """Batches of one epoch, shuffled by (seed, epoch), from any batch on: every sample once, the last batch short.

    ``set_position`` is called in the main process before the loader is iterated.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.first_batch = 0

    def set_position(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches in a whole epoch, wherever it is entered."""
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, self.epoch))
        order = torch.randperm(self.num_samples, generator=generator).tolist()
        for start in range(self.first_batch * self.batch_size, self.num_samples, self.batch_size):
            yield [SampleKey(self.epoch, index) for index in order[start : start + self.batch_size]]
