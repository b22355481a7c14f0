"""Dataset of image/mask pairs as fixed-size uint8 tensors, and the batches made of them."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import DecodedCache
from data.decoding import decode_message, fixed_size_image, fixed_size_mask
from data.layouts import Pair
from data.masks import ABOVE_HALF, MaskReading
from data.opening import open_picture
from data.sampler import SampleKey, derive_seed
from data.transforms import Augmentation, augment, draw_augmentation, to_rows

MAX_REPLACEMENTS = 10  # tried for one unreadable pair: if 1 % is unreadable, all of them fail once in 10^20


@dataclass(frozen=True)
class Sample:
    image: Tensor  # (3, S, S) uint8 RGB
    mask: Tensor  # (1, S, S) uint8, 0 or 1, or IGNORED
    index: int  # of the pair it holds: if the requested one was replaced, the replacement's
    errors: dict[int, str]  # index -> why it cannot be decoded: the requested pair, then replacements that failed
    is_missing: bool = False  # nothing could be decoded: image and mask are zeros
    augmentation: Augmentation | None = None  # for the device to apply


class Batch(NamedTuple):
    """Batch of samples, in uint8: a quarter of the bytes to pin and copy to the device, where they become floats."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    masks: Tensor  # (B, 1, S, S) uint8, 0 or 1, or IGNORED
    indices: Tensor  # (B,) int64, positions in the dataset's list of pairs
    errors: dict[int, str]  # index -> why it cannot be decoded, for pairs that were replaced or left out
    num_missing: int = 0  # samples left out of the batch
    augmentations: Tensor | None = None  # (B, 12) from ``to_rows``, for the device to apply

    def blank(self, size: int) -> "Batch":
        """Return a batch of black images like this one's, for a rank without samples in a window."""
        images, masks = (torch.zeros_like(values[:1]).expand(size, -1, -1, -1) for values in (self.images, self.masks))
        augmentations = None if self.augmentations is None else self.augmentations[:1].expand(size, -1)
        indices = torch.full((size,), -1)
        return self._replace(images=images, masks=masks, indices=indices, augmentations=augmentations)

    def part(self, start: int, end: int) -> "Batch":
        """Return samples ``start`` to ``end - 1``, in the same memory: a part of a pinned batch is pinned."""
        return self._select(slice(start, end))

    def take(self, positions: Sequence[int]) -> "Batch":
        """Return copies of the samples at these positions of the batch, in this order."""
        return self._select(torch.tensor(positions, dtype=torch.int64))

    def _select(self, chosen: slice | Tensor) -> "Batch":
        augmentations = None if self.augmentations is None else self.augmentations[chosen]
        return self._replace(
            images=self.images[chosen],
            masks=self.masks[chosen],
            indices=self.indices[chosen],
            augmentations=augmentations,
        )


class CamouflageDataset(Dataset[Sample]):
    """Dataset of pairs resized to ``img_size`` x ``img_size``, indexed by ``SampleKey(epoch, index)``.

    A file that cannot be decoded is reported in ``errors``: an exception in a worker process would show the user
    nothing but a traceback. If samples are augmented, that is in training, another pair replaces it. Otherwise the
    sample is missing, because a replacement would change a score's meaning. Augmentation and replacement are functions
    of (seed, epoch, index).

    Args:
        pairs: image and mask files.
        img_size: side of the samples in pixels.
        augmented: whether samples are augmented, as in training.
        seed: the run's seed.
        cache: decoded files to read instead.
        on_device: draw augmentations, and leave it to ``to_device`` to apply them.
        masks: how the masks are read.
    """

    def __init__(
        self, pairs: Sequence[Pair], img_size: int, augmented: bool = False, seed: int = 0,
        cache: DecodedCache | None = None, on_device: bool = False, masks: MaskReading = ABOVE_HALF,
    ) -> None:  # fmt: skip
        self.pairs = list(pairs)
        self.img_size = img_size
        self.augmented = augmented
        self.seed = seed
        self.cache = cache
        self.on_device = on_device
        self.masks = masks

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: SampleKey) -> Sample:
        errors: dict[int, str] = {}
        for index in self._candidates(key):
            try:
                image, mask = self._load(self.pairs[index])
            except ValueError as error:
                errors[index] = str(error)
                continue
            if not self.augmented:
                return Sample(image, mask, index, errors)
            drawn = draw_augmentation(self.img_size, derive_seed(self.seed, key.epoch, key.index))
            if self.on_device:
                return Sample(image, mask, index, errors, augmentation=drawn)
            return Sample(*augment(image, mask, drawn), index, errors)
        blank = torch.zeros(4, self.img_size, self.img_size, dtype=torch.uint8)
        return Sample(blank[:3], blank[3:], key.index, errors, is_missing=True)

    def _candidates(self, key: SampleKey) -> Iterator[int]:
        """Yield the requested index and, in training, random replacements for it."""
        yield key.index
        if self.augmented:
            others = [index for index in range(len(self.pairs)) if index != key.index]
            generator = random.Random(derive_seed(self.seed, key.epoch, key.index))
            yield from generator.sample(others, min(MAX_REPLACEMENTS, len(others)))

    def _load(self, pair: Pair) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return load_image(pair.image, self.img_size), load_mask(pair.mask, self.img_size, self.masks)
        image, mask = self.cache.read(pair)
        return torch.from_numpy(image), torch.from_numpy(mask)


def collate(samples: Sequence[Sample]) -> Batch:
    """Batch the samples that are not missing."""
    drawn = [sample.augmentation for sample in samples if sample.augmentation is not None]
    batch = Batch(
        images=torch.stack([sample.image for sample in samples]),
        masks=torch.stack([sample.mask for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        errors={index: reason for sample in samples for index, reason in sample.errors.items()},
        num_missing=sum(sample.is_missing for sample in samples),
    )
    if batch.num_missing:
        batch = batch.take([n for n, sample in enumerate(samples) if not sample.is_missing])
    return batch._replace(augmentations=to_rows(drawn)) if drawn else batch


def load_image(path: Path, size: int) -> Tensor:
    """Read an image as a (3, size, size) uint8 RGB tensor.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return torch.from_numpy(fixed_size_image(path, size))


def load_mask(path: Path, size: int, reading: MaskReading = ABOVE_HALF) -> Tensor:
    """Read a mask as a (1, size, size) uint8 tensor of 0 (background), 1 (object) and IGNORED.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return torch.from_numpy(fixed_size_mask(path, size, reading))


def header_problems(pairs: Sequence[Pair]) -> dict[int, str]:
    """Read every file's header, to find wrong files now and not in epoch 3; about a second for 4,000 pairs.

    Returns:
        position of a pair -> why its image or mask cannot be opened as an image.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        problems = list(pool.map(_header_problem, pairs))
    return {position: problem for position, problem in enumerate(problems) if problem}


def _header_problem(pair: Pair) -> str:
    for path in (pair.image, pair.mask):
        try:
            with open_picture(path):
                pass
        except Exception as error:
            return decode_message(path, error)
    return ""
