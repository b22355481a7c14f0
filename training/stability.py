"""The step gate: every window gets a verdict before its update reaches a weight.

The decision is made on the device in the same step; the host reads the numbers one window later, when they have long
arrived. So a gate on every window costs no wait on any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn


class StepVerdict(StrEnum):
    """What became of a window (one optimizer step's worth of batches)."""

    APPLIED = "applied"
    OVERFLOW = "overflow"  # fp16 scaling met its ceiling: routine, the scale is halved and training goes on
    NONFINITE_LOSS = "nonfinite_loss"
    NONFINITE_GRAD = "nonfinite_grad"  # loss scaling does not explain it


@dataclass(frozen=True)
class WindowOutcome:
    """A window's numbers, on the host."""

    verdict: StepVerdict
    loss: float
    grad_norm: float  # before clipping
    loss_scale: float


def should_skip(loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> Tensor:
    """1.0 where the update must not be applied, else 0.0; scalars on the device, no host sync.

    The norm is looked at beside the scaler's flag: finite gradients can have an infinite norm, clipping by it turns
    them to zeros, and AdamW would then move the weights by its momentum alone.
    """
    bad = (found_inf > 0) | ~torch.isfinite(grad_norm) | ~torch.isfinite(loss)
    return bad.to(torch.float32)


def gated_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """``optimizer.step()``, or nothing where ``skip`` is 1: weights, moments and step counts stay as they are, bitwise.

    This is the contract between GradScaler and fused optimizers, used here with our own flag. Gradients must be
    unscaled already.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()


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
        self.begin_window()

    @torch.no_grad()
    def begin_window(self) -> None:
        self.at_start = {name: buffer.clone() for name, buffer in self._buffers.items()}

    @torch.no_grad()
    def end_window(self, skip: Tensor) -> None:
        """Put the statistics back where ``skip`` is 1. Chosen on the device: multiplying by 0 would keep a NaN."""
        for name, buffer in self._buffers.items():
            buffer.copy_(torch.where(skip > 0, self.at_start[name], buffer))


class PendingWindow:
    """A window whose numbers are on their way to the host.

    Args:
        loss, grad_norm, found_inf, loss_scale: scalars on the device.
        number: the window's number in its epoch, from 1.
        lr: the decoder's learning rate in it.
        sample_indices: the samples it was made of.
    """

    def __init__(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor, loss_scale: Tensor, number: int, lr: float,
        sample_indices: Sequence[int],
    ) -> None:  # fmt: skip
        self.number = number
        self.lr = lr
        self.sample_indices = sample_indices
        packed = torch.stack([value.to(torch.float32) for value in (loss, grad_norm, found_inf, loss_scale)])
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._values = torch.empty(packed.shape, pin_memory=True).copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()
        else:
            self._values = packed

    def read(self) -> WindowOutcome:
        """The numbers and their verdict. Waits for this window's step alone, not for work queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, found_inf, loss_scale = self._values.tolist()
        return WindowOutcome(_verdict(loss, grad_norm, found_inf > 0, loss_scale), loss, grad_norm, loss_scale)


def _verdict(loss: float, grad_norm: float, found_inf: bool, loss_scale: float) -> StepVerdict:
    if not math.isfinite(loss):
        return StepVerdict.NONFINITE_LOSS  # losses are computed unscaled: no scale explains it
    if found_inf and loss_scale > 1:
        return StepVerdict.OVERFLOW
    if found_inf or not math.isfinite(grad_norm):
        return StepVerdict.NONFINITE_GRAD
    return StepVerdict.APPLIED
