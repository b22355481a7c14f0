"""Windows of random images, and a network that is small enough for them."""

from typing import Any

import torch
from torch import Tensor, nn

from data.dataset import Batch
from runtime.machine import Precision, PrecisionName, ScalerSettings
from training.window import Window, accumulate_gradients


class TinyNetwork(nn.Module):
    """A network of two convolutions without BatchNorm, the same in every test."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Conv2d(3, 4, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        return [self.head(self.dropout(self.body(images * scale).tanh()))]


def batch(first: int, number: int, size: int) -> Batch:
    """Return a batch of random images, samples ``first`` and following, ``size`` pixels wide."""
    generator = torch.Generator().manual_seed(first)
    images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)
    masks = torch.randint(0, 2, (number, 1, size, size), dtype=torch.uint8, generator=generator)
    return Batch(images, masks, torch.arange(first, first + number), {})


def window(
    sizes: tuple[int, ...] = (3, 3, 2), precision: PrecisionName = "fp32", size: int = 32, **changes: Any
) -> Window:
    """Return a window of batches of these sizes, with the attributes in ``changes``."""
    firsts = [sum(sizes[:i]) for i in range(len(sizes))]
    return Window(
        number=4,
        global_number=25,
        batches=[batch(first, number, size) for first, number in zip(firsts, sizes, strict=True)],
        lr=0.1,
        precision=Precision(precision, "cpu"),
        scaler=Precision(precision, "cpu").new_scaler(ScalerSettings(init_scale=8.0)),
        memory_format=torch.channels_last,
        seed=11,
        **{"uncertainty_weight": 0.3, **changes},
    )


def gradients(model: nn.Module, of: Window) -> list[Tensor]:
    """Return copies of the window's gradients."""
    model.zero_grad()
    accumulate_gradients(model, of)
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
