"""BatchNorm's running statistics: kept until a window's verdict is known, and while a window is only examined."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class BufferGuard:
    """Copy of BatchNorm's running statistics that undoes the mark of a window that is not applied.

    The forward pass has changed the statistics by the time the verdict is known, and a NaN in them would stay for ever.
    Layers in evaluation mode, as in a pretrained backbone, do not change and cost nothing.

    All statistics are copied by one kernel, chosen by another: there are hundreds of them, each a few bytes.

    Attributes:
        at_start: name -> value of each statistic at the start of the current window; empty between windows. The next
            window overwrites the values.
    """

    def __init__(self, model: nn.Module) -> None:
        self._buffers = {
            f"{module_name}.{name}" if module_name else name: buffer
            for module_name, module in model.named_modules()
            if isinstance(module, _BatchNorm) and module.training
            for name, buffer in module.named_buffers(recurse=False)
        }
        self.at_start: dict[str, Tensor] = {}
        self._copies: dict[str, Tensor] = {}  # views of one tensor per dtype
        self._flat: dict[torch.dtype, Tensor] = {}

    def _allocate(self) -> None:
        """Allocate memory for the copies, at the first window: many guards never see one."""
        for dtype in {buffer.dtype for buffer in self._buffers.values()}:
            alike = {name: buffer for name, buffer in self._buffers.items() if buffer.dtype == dtype}
            sizes = [buffer.numel() for buffer in alike.values()]
            self._flat[dtype] = torch.empty(sum(sizes), dtype=dtype, device=next(iter(alike.values())).device)
            parts = zip(alike.items(), self._flat[dtype].split(sizes), strict=True)
            self._copies |= {name: part.view(buffer.shape) for (name, buffer), part in parts}

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
        if not self._copies:
            self._allocate()
        _copy_all(self._copies, self._buffers)
        self.at_start = self._copies

    @torch.no_grad()
    def end_window(self, skip: Tensor) -> None:
        """Restore the statistics if ``skip`` is 1. Selected on the device: multiplying by 0 would keep a NaN."""
        if self._buffers:
            at_start = {dtype: flat.clone() for dtype, flat in self._flat.items()}
            _copy_all(self._copies, self._buffers)
            for dtype, flat in self._flat.items():
                flat.copy_(torch.where(skip > 0, at_start[dtype], flat))
            _copy_all(self._buffers, self._copies)
        self.at_start = {}

    @torch.no_grad()
    def restore(self) -> None:
        """Restore the statistics of the current window's start. Between windows, they stay as they are."""
        if self.at_start:
            _copy_all(self._buffers, self.at_start)


def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    """Copy tensors to those of the same name."""
    for dtype in {target.dtype for target in targets.values()}:
        names = [name for name, target in targets.items() if target.dtype == dtype]
        torch._foreach_copy_([targets[name] for name in names], [sources[name] for name in names])


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
