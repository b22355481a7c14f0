"""Images as a trained network is to see them, with the sizes its predictions are to have."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.dataset import load_image
from data.decoding import image_size
from data.layouts import Pair
from data.loading import begin_loader_process


@dataclass(frozen=True)
class ImageToScore:
    image: Tensor  # (3, S, S) uint8 RGB; zeros where there is an error
    index: int
    size: tuple[int, int]  # (H, W) of the mask
    error: str  # empty, or why image or mask cannot be read


class BatchToScore(NamedTuple):
    images: Tensor  # (B, 3, S, S) uint8 RGB
    indices: list[int]
    sizes: list[tuple[int, int]]
    errors: list[str]


class _ImagesToScore(Dataset[ImageToScore]):
    def __init__(self, pairs: Sequence[Pair], img_size: int) -> None:
        self.pairs = list(pairs)
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> ImageToScore:
        pair = self.pairs[index]
        try:
            return ImageToScore(load_image(pair.image, self.img_size), index, image_size(pair.mask), "")
        except ValueError as error:
            blank = torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8)
            return ImageToScore(blank, index, (1, 1), str(error))


def images_to_score(
    pairs: Sequence[Pair], img_size: int, batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[BatchToScore]:
    """Batches of every pair's image, once and in order."""
    loader: DataLoader[BatchToScore] = DataLoader(
        _ImagesToScore(pairs, img_size),  # type: ignore[arg-type]  # a loader is typed by its samples, not its batches
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=begin_loader_process,
    )
    return loader


def _collate(samples: Sequence[ImageToScore]) -> BatchToScore:
    return BatchToScore(
        images=torch.stack([sample.image for sample in samples]),
        indices=[sample.index for sample in samples],
        sizes=[sample.size for sample in samples],
        errors=[sample.error for sample in samples],
    )
