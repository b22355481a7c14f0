"""Decode image/mask pairs to fixed-size uint8 tensors and batch them."""

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from data.cache import DecodedCache
from data.decoding import decode_message, fixed_size_image, fixed_size_mask
from data.layouts import Pair
from data.sampler import SampleKey, derive_seed
from data.transforms import Augmentation, augment, draw_augmentation, to_rows

MOST_TRIES = 10  # images drawn to take the place of one: with 1 % unreadable, all of them fail once in 10^20


@dataclass(frozen=True)
class Sample:
    image: Tensor  # (3, S, S) uint8 RGB
    mask: Tensor  # (1, S, S) uint8, 0 or 1
    index: int  # of the pair it holds: not the one asked for where that was replaced
    errors: dict[int, str]  # index -> why it could not be decoded; the pair asked for, then those tried in its place
    is_missing: bool = False  # nothing could be decoded: image and mask are zeros
    augmentation: Augmentation | None = None  # still to be done


class Batch(NamedTuple):
    """uint8 on purpose: a quarter of the bytes to pin and copy to the device, where they become floats."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    masks: Tensor  # (B, 1, S, S) uint8, 0 or 1
    indices: Tensor  # (B,) int64, positions in the data set's list of pairs, of what the batch holds
    errors: dict[int, str]  # index -> why it could not be decoded, of pairs that were replaced or left out
    num_missing: int = 0  # left out: the batch is shorter by so many
    augmentations: Tensor | None = None  # (B, 12) of ``to_rows``, still to be done on the device

    def blank(self, size: int) -> "Batch":
        """Samples that show nothing, like this batch's: for a process that has none of a window's."""
        images, masks = (torch.zeros_like(values[:1]).expand(size, -1, -1, -1) for values in (self.images, self.masks))
        augmentations = None if self.augmentations is None else self.augmentations[:1].expand(size, -1)
        indices = torch.full((size,), -1)
        return self._replace(images=images, masks=masks, indices=indices, augmentations=augmentations)

    def take(self, positions: Sequence[int]) -> "Batch":
        """The samples at these positions of the batch, in this order."""
        where = torch.tensor(positions, dtype=torch.int64)
        augmentations = None if self.augmentations is None else self.augmentations[where]
        return self._replace(
            images=self.images[where],
            masks=self.masks[where],
            indices=self.indices[where],
            augmentations=augmentations,
        )


class CamouflageDataset(Dataset[Sample]):
    """Pairs resized to ``img_size`` x ``img_size``; augmented as a function of (seed, epoch, index) where asked.

    Indexed by ``SampleKey(epoch, index)``. A file that cannot be decoded does not raise here, in a worker process where
    the traceback would be all a user sees: it comes back among ``errors``. With augmentation, that is in training,
    another pair takes its place, drawn and augmented as a function of (seed, epoch, index) of the one it stands in for.
    Without, where that would change a score's meaning, the sample is missing.

    Args:
        pairs: files.
        img_size: S.
        augmented: for training.
        seed: of the run.
        cache: of decoded files.
        on_device: only draw the augmentation; ``to_device`` does it.
    """

    def __init__(
        self, pairs: Sequence[Pair], img_size: int, augmented: bool = False, seed: int = 0,
        cache: DecodedCache | None = None, on_device: bool = False,
    ) -> None:  # fmt: skip
        self.pairs = list(pairs)
        self.img_size = img_size
        self.augmented = augmented
        self.seed = seed
        self.cache = cache
        self.on_device = on_device

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
        """The pair asked for; in training, then others at random."""
        yield key.index
        if self.augmented:
            others = [index for index in range(len(self.pairs)) if index != key.index]
            generator = random.Random(derive_seed(self.seed, key.epoch, key.index))
            yield from generator.sample(others, min(MOST_TRIES, len(others)))

    def _load(self, pair: Pair) -> tuple[Tensor, Tensor]:
        if self.cache is None:
            return load_image(pair.image, self.img_size), load_mask(pair.mask, self.img_size)
        image, mask = self.cache.read(pair)
        return torch.from_numpy(image), torch.from_numpy(mask)


def collate(samples: Sequence[Sample]) -> Batch:
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
    """Decode an image to a (3, size, size) uint8 RGB tensor.

    Raises:
        ValueError: the file cannot be decoded.
    """
    return torch.from_numpy(fixed_size_image(path, size))


def load_mask(path: Path, size: int) -> Tensor:
    """Decode a mask to a (1, size, size) uint8 tensor of 0 (background) and 1 (object).

    Raises:
        ValueError: the file cannot be decoded.
    """
    return torch.from_numpy(fixed_size_mask(path, size))


def header_problems(pairs: Sequence[Pair]) -> dict[int, str]:
    """Read every file's header, so that a wrong one is found now and not at epoch 3; about a second for 4,000 pairs.

    Returns:
        position of a pair -> why its image or its mask is no image.
    """
    with ThreadPoolExecutor(max_workers=8) as pool:
        problems = list(pool.map(_header_problem, pairs))
    return {position: problem for position, problem in enumerate(problems) if problem}


def _header_problem(pair: Pair) -> str:
    for path in (pair.image, pair.mask):
        try:
            with Image.open(path):
                pass
        except Exception as error:
            return decode_message(path, error)
    return ""
