"""BatchNorm's running statistics: kept until a window's verdict is known, and while a window is only examined."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BufferGuard:
    """Copy of BatchNorm's running statistics that undoes the mark of a window that is not applied.

    The forward pass has changed the statistics by the time the verdict is known, and a NaN in them would stay for ever.
    Layers in evaluation mode, as in a pretrained backbone, do not change and cost nothing.

    Attributes:
        at_start: name -> value of each statistic at the start of the current window; empty between windows.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {
            f"{module_name}.{name}" if module_name else name: buffer
            for module_name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.training
            for name, buffer in module.named_buffers(recurse=False)
        }
        self.at_start: dict[str, Tensor] = {}

    @property
    def statistics(self) -> list[Tensor]:
        """Current running means and variances that learn."""
        return [buffer for buffer in self._buffers.values() if buffer.is_floating_point()]

    @property
    def batch_matters(self) -> bool:
        """Whether layers normalise by the batch's statistics, so that a part of the batch is another computation."""
        return bool(self._buffers)

    @property
    def least_batch(self) -> int:
        """Smallest batch to train on: BatchNorm cannot normalise a single sample."""
        return 2 if self._buffers else 1

    @torch.no_grad()
    def begin_window(self) -> None:
        self.at_start = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def end_window(self, skip: Tensor) -> None:
        """Restore the statistics if ``skip`` is 1. Selected on the device: multiplying by 0 would keep a NaN."""
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.where(skip > 0, self.at_start[name], buffer))
        self.at_start = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the statistics of the current window's start. Between windows, they stay as they are."""
        for name, value in self.at_start.items():
            self._buffers[name].copy_(value)


@contextmanager
def statistics_kept(model: nn.Module) -> Iterator[None]:
    """Run passes that must not change BatchNorm's statistics: recomputed activations, windows under examination."""
    guard = BufferGuard(model)
    guard.begin_window()
    try:
        yield
    finally:
        guard.restore()


@contextmanager
def running_statistics(model: nn.Module) -> Iterator[None]:
    """Normalise by the running statistics, so that a part of a batch, even one sample, can be examined by itself."""
    training = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for layer in training:
        layer.eval()
    try:
        yield
    finally:
        for layer in training:
            layer.train()
