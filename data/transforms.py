"""Joint augmentation of image and mask (torchvision.transforms.v2), as a pure function of a seed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode, v2

Augmentation = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[tv_tensors.Image, tv_tensors.Mask]]


def training_augmentation(img_size: int) -> Augmentation:
    """Horizontal flip, a crop of at most 10 % of either side, a rotation of at most 15 degrees, mild colour.

    Camouflage lives in fine texture and colour: stronger photometric changes or larger crops remove the very evidence
    that separates an object from its background. Images are interpolated bilinearly, masks by nearest neighbour.
    """
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(p=0.5),
            v2.RandomResizedCrop(img_size, scale=(0.9, 1.0), ratio=(0.95, 1.05), antialias=True),
            v2.RandomApply([v2.RandomRotation([-15, 15], interpolation=InterpolationMode.BILINEAR)], p=0.5),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        ]
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block with torch's CPU generator at ``seed`` and put its state back.

    v2 transforms draw from the global generator. Without this, augmentation would depend on the worker count, and with
    no workers it would shift the stream that dropout draws from.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed CUDA too
    try:
        yield
    finally:
        torch.set_rng_state(state)
