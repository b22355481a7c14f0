"""The step gate: every window gets a verdict before its update reaches a weight.

The decision is made on the device in the same step; the host reads the numbers one window later, when they have long
arrived. So a gate on every window costs no wait on any.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import torch
from torch import Tensor

from training import spikes


class StepVerdict(StrEnum):
    """What became of a window (one optimizer step's worth of batches)."""

    APPLIED = "applied"
    OVERFLOW = "overflow"  # fp16 scaling met its ceiling: routine, the scale is halved and training goes on
    NONFINITE_LOSS = "nonfinite_loss"
    NONFINITE_GRAD = "nonfinite_grad"  # loss scaling does not explain it
    SPIKE = "spike"  # finite, but far outside the gradient norm's own history


@dataclass(frozen=True)
class WindowOutcome:
    """A window's numbers, on the host."""

    verdict: StepVerdict
    loss: float
    grad_norm: float  # before clipping
    loss_scale: float


def should_skip(loss: Tensor, grad_norm: Tensor, found_inf: Tensor, spike: Tensor) -> Tensor:
    """1.0 where the update must not be applied, else 0.0; scalars on the device, no host sync.

    The norm is looked at beside the scaler's flag: finite gradients can have an infinite norm, clipping by it turns
    them to zeros, and AdamW would then move the weights by its momentum alone.
    """
    return (_not_finite(loss, grad_norm, found_inf) | (spike > 0)).to(torch.float32)


def _not_finite(loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> Tensor:
    return (found_inf > 0) | ~torch.isfinite(grad_norm) | ~torch.isfinite(loss)


class SpikeDetector:
    """Finds gradient norms far outside their own history, on the device, window by window.

    Norms are skewed and their level drifts by orders of magnitude over a run, so the statistics are those of the
    logarithm: an exponential mean and variance. Two tiers: above ``CLIP_SIGMAS`` a gradient is scaled down to that
    height (Kumar et al., "ZClip", 2025); above ``SKIP_SIGMAS`` it is a spike. Until there is a history, a norm ten
    times the largest so far is one (as in Megatron-LM).

    A value enters the statistics limited to ``LIMIT_SIGMAS``, so that one spike does not widen them; one that is not
    finite does not enter at all. A level that has risen for good is accepted within some dozens of windows: each widens
    the variance a little.
    """

    CLIP_SIGMAS, SKIP_SIGMAS, LIMIT_SIGMAS = spikes.CLIP_SIGMAS, spikes.SKIP_SIGMAS, spikes.LIMIT_SIGMAS
    DECAY = spikes.DECAY
    WARMUP_WINDOWS, LEAST_WINDOWS = spikes.WARMUP_WINDOWS, spikes.LEAST_WINDOWS
    LEAST_DEVIATION, FACTOR_OVER_LARGEST = spikes.LEAST_DEVIATION, spikes.FACTOR_OVER_LARGEST

    def __init__(self, policy: Literal["skip", "clip", "off"], device: torch.device) -> None:
        self.policy = policy
        self.reset(device)

    def reset(self, device: torch.device) -> None:
        """Forget: at a stage's border the norm becomes that of other parameters."""
        self._statistics = torch.zeros(4, device=device)  # count, mean, variance and largest of the logarithms

    def examine(self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> tuple[Tensor, Tensor]:
        """Judge a window's norm by those before it, then take it in.

        Shape:
            scalars on the device; nothing waits for them.

        Returns:
            spike: 1.0 or 0.0.
            highest: the norm that this window's gradient should be limited to; infinite without a history.
        """
        if self.policy == "off":
            return torch.zeros_like(grad_norm), torch.full_like(grad_norm, math.inf)
        count, mean, variance, largest = self._statistics.unbind()
        usable = ~_not_finite(loss, grad_norm, found_inf)
        value = torch.where(usable, grad_norm, 1.0).clamp(min=1e-20).log()
        deviation = variance.sqrt().clamp(min=self.LEAST_DEVIATION)
        warm = count >= self.WARMUP_WINDOWS
        over_history = value > mean + self.SKIP_SIGMAS * deviation
        over_largest = value > largest + math.log(self.FACTOR_OVER_LARGEST)
        spike = usable & torch.where(warm, over_history, over_largest & (count >= self.LEAST_WINDOWS))
        highest = torch.where(warm, mean + self.CLIP_SIGMAS * deviation, math.inf).exp()

        reach = self.LIMIT_SIGMAS * deviation
        limited = torch.where(warm, value.clamp(mean - reach, mean + reach), value)
        limited = torch.where(spike & ~warm, largest + math.log(2), limited)
        decay = (1 - 1 / (count + 1)).clamp(max=self.DECAY)
        step = limited - mean
        mean = mean + (1 - decay) * step
        variance = decay * (variance + (1 - decay) * step.square())
        largest = torch.where(count > 0, torch.maximum(largest, limited), limited)
        updated = torch.stack([count + 1, mean, variance, largest])
        self._statistics = torch.where(usable, updated, self._statistics)  # never * 0: NaN * 0 is NaN
        return (spike if self.policy == "skip" else torch.zeros_like(spike)).to(torch.float32), highest

    def state_dict(self) -> dict[str, Tensor]:
        return {"statistics": self._statistics.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self._statistics = state["statistics"].to(self._statistics.device)


def gated_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """``optimizer.step()``, or nothing where ``skip`` is 1: weights, moments and step counts stay as they are, bitwise.

    A fused optimizer decides on the device: this is its contract with GradScaler, used here with our own flag. Any
    other one takes no flag, so the host has to wait for it (a host sync in each window). Gradients must be unscaled
    already.
    """
    if not optimizer.defaults.get("fused"):
        if not skip.item():
            optimizer.step()
        return
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()


class PendingOutcome:
    """A window's numbers on their way to the host.

    Args:
        loss, grad_norm, found_inf, spike, loss_scale: scalars on the device.
        requests: (n,), what other processes ask for; None where there are none.

    Attributes:
        requests: the same on the host, once ``read`` has returned.
    """

    def __init__(
        self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor, spike: Tensor, loss_scale: Tensor,
        requests: Tensor | None = None,
    ) -> None:  # fmt: skip
        packed = torch.stack([value.to(torch.float32) for value in (loss, grad_norm, found_inf, spike, loss_scale)])
        if requests is not None:
            packed = torch.cat([packed, requests])
        self.requests: list[float] = []
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
        loss, grad_norm, found_inf, spike, loss_scale, *self.requests = self._values.tolist()
        verdict = _verdict(loss, grad_norm, found_inf > 0, spike > 0, loss_scale)
        return WindowOutcome(verdict, loss, grad_norm, loss_scale)


def _verdict(loss: float, grad_norm: float, found_inf: bool, spike: bool, loss_scale: float) -> StepVerdict:
    if not math.isfinite(loss):
        return StepVerdict.NONFINITE_LOSS  # losses are computed unscaled: no scale explains it
    if found_inf and loss_scale > 1:
        return StepVerdict.OVERFLOW
    if found_inf or not math.isfinite(grad_norm):
        return StepVerdict.NONFINITE_GRAD
    return StepVerdict.SPIKE if spike else StepVerdict.APPLIED
