"""BatchNorm's running statistics: kept while a window may yet be undone."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BufferGuard:
    """Keeps a window that is not applied from leaving its mark in BatchNorm's running statistics.

    The forward pass has moved them by the time the verdict is known, and a NaN in them would stay for ever. Layers in
    evaluation mode, as in a pretrained backbone, do not move and cost nothing.

    Attributes:
        at_start: name -> value of each statistic when the window under way began.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {
            f"{module_name}.{name}" if module_name else name: buffer
            for module_name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
            for name, buffer in module.named_buffers(recurse=False)
        }
        self.at_start: dict[str, Tensor] = {}

    @property
    def statistics(self) -> list[Tensor]:
        """Running means and variances that learn, as they are now."""
        return [buffer for buffer in self._buffers.values() if buffer.is_floating_point()]

    @property
    def batch_matters(self) -> bool:
        """Whether layers normalise by the statistics of the batch, so that a part of it is another computation."""
        return bool(self._buffers)

    @property
    def least_batch(self) -> int:
        """The least samples a batch must have to be trained on: there is nothing to normalise one by."""
        return 2 if self._buffers else 1

    @torch.no_grad()
    def begin_window(self) -> None:
        self.at_start = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def end_window(self, skip: Tensor) -> None:
        """Put the statistics back where ``skip`` is 1. Chosen on the device: multiplying by 0 would keep a NaN."""
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.where(skip > 0, self.at_start[name], buffer))

    @torch.no_grad()
    def restore(self) -> None:
        """Put the statistics back for a window that is broken off."""
        for name, buffer in self._buffers.items():
            buffer.copy_(self.at_start[name])


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Let windows be run for their numbers alone: the model's buffers are as before afterwards."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics: a part of a batch, of one sample even, is then looked at by itself."""
    layers = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    training = [layer for layer in layers if layer.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """For a backward pass that computes activations again: BatchNorm's statistics have taken in the batch already."""
    guard = BufferGuard(model)
    guard.begin_window()
    try:
        yield
    finally:
        guard.restore()
