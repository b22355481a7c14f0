"""Batches of images for a trained network, each with the size of its prediction."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.decoding import decode_image, fixed_size, image_size
from data.layouts import Pair
from data.loading import begin_loader_process


@dataclass(frozen=True)
class PreparedImage:
    """An image at the network's size, or the reason why it cannot be read."""

    image: Tensor  # (3, S, S) uint8 RGB; zeros if there is an error
    index: int
    size: tuple[int, int]  # (H, W) of its prediction
    error: str  # empty, or why image or mask cannot be read


class PreparedBatch(NamedTuple):
    """Prepared images, stacked."""

    images: Tensor  # (B, 3, S, S) uint8 RGB
    indices: list[int]
    sizes: list[tuple[int, int]]
    errors: list[str]


class _Images(Dataset[PreparedImage]):
    """Images whose predictions get the sizes of their masks, or their own sizes if there are no masks."""

    def __init__(self, images: Sequence[Path], masks: Sequence[Path] | None, img_size: int) -> None:
        self.images = list(images)
        self.masks = masks
        self.img_size = img_size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> PreparedImage:
        try:
            image = decode_image(self.images[index])
            size = (image.height, image.width) if self.masks is None else image_size(self.masks[index])
            return PreparedImage(torch.from_numpy(fixed_size(image, self.img_size)), index, size, "")
        except ValueError as error:
            blank = torch.zeros(3, self.img_size, self.img_size, dtype=torch.uint8)
            return PreparedImage(blank, index, (1, 1), str(error))


def images_to_score(
    pairs: Sequence[Pair], img_size: int, batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[PreparedBatch]:
    """Return batches of the pairs' images, each once and in order, for predictions at the masks' sizes."""
    images = _Images([pair.image for pair in pairs], [pair.mask for pair in pairs], img_size)
    return _loader(images, batch_size, num_workers, pin_memory)


def images_to_predict(
    images: Sequence[Path], img_size: int, batch_size: int, num_workers: int, pin_memory: bool
) -> DataLoader[PreparedBatch]:
    """Return batches of the images, each once and in order, for predictions at their own sizes, upright."""
    return _loader(_Images(images, None, img_size), batch_size, num_workers, pin_memory)


def _loader(images: _Images, batch_size: int, num_workers: int, pin_memory: bool) -> DataLoader[PreparedBatch]:
    loader: DataLoader[PreparedBatch] = DataLoader(
        images,  # type: ignore[arg-type]  # typed by its samples, not its batches
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=pin_memory,
        worker_init_fn=begin_loader_process,
    )
    return loader


def _collate(samples: Sequence[PreparedImage]) -> PreparedBatch:
    return PreparedBatch(
        images=torch.stack([sample.image for sample in samples]),
        indices=[sample.index for sample in samples],
        sizes=[sample.size for sample in samples],
        errors=[sample.error for sample in samples],
    )
