"""The step gate: every window gets a verdict before its update reaches a weight.

The device decides in the same step; the host reads the numbers one window later, when they have long arrived. So a gate
on every window costs no host sync.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_

from runtime.machine import LossScaler
from runtime.ranks import Ranks
from training.batchnorm import BufferGuard


class StepVerdict(StrEnum):
    """The verdict on a window (one optimizer step's worth of batches)."""

    APPLIED = "applied"
    OVERFLOW = "overflow"  # the fp16 scale was too large: routine, it is halved and training goes on
    NONFINITE_LOSS = "nonfinite_loss"
    NONFINITE_GRAD = "nonfinite_grad"  # loss scaling does not explain it
    SPIKE = "spike"  # finite, but far outside the gradient norm's own history

    @property
    def label(self) -> str:
        """Words for people: "nonfinite loss"."""
        return self.value.replace("_", " ")


@dataclass(frozen=True)
class WindowOutcome:
    """A window's verdict and numbers, on the host."""

    verdict: StepVerdict
    loss: float
    grad_norm: float  # before clipping
    loss_scale: float
    spike_limit: float = math.inf  # norm above which the window would have been a spike


def should_skip(loss: Tensor, grad_norm: Tensor, found_inf: Tensor, spike: Tensor) -> Tensor:
    """Return 1.0 if the update must not be applied, else 0.0: a scalar on the device, without a host sync.

    The norm is checked beside the scaler's flag: finite gradients can have an infinite norm, clipping by it turns them
    to zeros, and AdamW would then move the weights by momentum only.
    """
    return (_not_finite(loss, grad_norm, found_inf) | (spike > 0)).to(torch.float32)


def _not_finite(loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> Tensor:
    return (found_inf > 0) | ~torch.isfinite(grad_norm) | ~torch.isfinite(loss)


class SpikeDetector:
    """Detector of gradient norms far outside their own history, on the device, window by window.

    Norms are skewed and their level drifts by orders of magnitude during a run, so the statistics are an exponential
    mean and variance of the logarithm. There are two tiers: above ``CLIP_SIGMAS`` a gradient is scaled down to that
    height (Kumar et al., "ZClip", 2025); above ``SKIP_SIGMAS``, and above three times the mean, it is a spike. During
    warm-up, a norm ten times the largest so far is a spike (as in Megatron-LM); in a stage's first windows, a norm a
    hundred times the largest so far, the level before the stage, and the norm of an untrained network.

    A value enters the statistics limited to ``LIMIT_SIGMAS``, so that one spike does not widen them; a value that is
    not finite does not enter at all. Spikes do not come four in a row: then the level has risen, by up to ``MOST_RISE``
    in one step, and the mean moves there at once.
    """

    CLIP_SIGMAS, SKIP_SIGMAS, LIMIT_SIGMAS = 2.5, 3.8, 3.0
    DECAY = 0.99
    WARMUP_WINDOWS = 64  # before these, the comparison is with the largest norm so far
    LEAST_WINDOWS = 4  # before these, the largest norm says little: it may be a spike itself
    LEAST_DEVIATION = 0.05
    LEAST_FACTOR = 3.0  # over the mean: less does no harm, however steady the norms
    FACTOR_OVER_LARGEST, FACTOR_AT_FIRST = 10.0, 100.0
    LEAST_NORM = 0.01  # smaller ones count as this: next to a loss of about 1 they all mean "none"
    UNTRAINED_NORM = 10.0  # 1 to 80 in the first windows of 14 backbones with random weights
    HIGH_IN_A_ROW, HIGH_SIGMAS, HIGH_FACTOR = 4, 2.0, 1.7  # windows above both, in a row: the level has risen
    MOST_RISE = 3000.0  # a larger one is a fault: spike after spike, and in the end a rollback

    def __init__(self, policy: str, device: torch.device) -> None:
        """Start without a history.

        Args:
            policy: skip, clip or off.
            device: of the gradients.
        """
        self.policy = policy
        self._statistics = self._without_history(device)

    def _without_history(self, device: torch.device) -> Tensor:
        """Return count, mean, variance and largest of the logarithms, the level before them, and the last three."""
        least, untrained = math.log(self.LEAST_NORM), math.log(self.UNTRAINED_NORM)
        return torch.tensor([0, 0, 0, least, untrained, *[least] * (self.HIGH_IN_A_ROW - 1)], device=device)

    def reset(self, device: torch.device) -> None:
        """Start again, with the level so far as a hint: from one stage to the next, other parameters have gradients."""
        count, mean, _, _, level_before, *_ = self._statistics.to(device).unbind()
        self._statistics = self._without_history(device)
        level = torch.where(count >= self.LEAST_WINDOWS, mean, level_before)
        self._statistics[4] = level.clamp(min=math.log(self.UNTRAINED_NORM))

    def forget(self) -> None:
        """Start again, where the statistics are."""
        self.reset(self._statistics.device)

    def examine(self, loss: Tensor, grad_norm: Tensor, found_inf: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare a window's norm with those before it, then add it to the history.

        Shape:
            scalars on the device, without a host sync

        Returns:
            spike: 1.0 or 0.0.
            highest: the norm to clip this window's gradient to; infinite during warm-up.
            limit: the norm above which this window is a spike.
        """
        if self.policy == "off":
            infinite = torch.full_like(grad_norm, math.inf)
            return torch.zeros_like(grad_norm), infinite, infinite
        (count, mean, variance, largest, level_before), last = self._statistics[:5].unbind(), self._statistics[5:]
        usable = ~_not_finite(loss, grad_norm, found_inf)
        value = torch.where(usable, grad_norm, 1.0).clamp(min=self.LEAST_NORM).log()
        deviation = variance.sqrt().clamp(min=self.LEAST_DEVIATION)
        warm, at_first = count >= self.WARMUP_WINDOWS, count < self.LEAST_WINDOWS
        center = torch.where(warm, mean, torch.where(at_first, torch.maximum(largest, level_before), largest))
        margin = (self.SKIP_SIGMAS * deviation).clamp(min=math.log(self.LEAST_FACTOR))
        factor = torch.where(at_first, math.log(self.FACTOR_AT_FIRST), math.log(self.FACTOR_OVER_LARGEST))
        margin = torch.where(warm, margin, factor)

        in_a_row = torch.cat([last, value[None]])
        high = mean + (self.HIGH_SIGMAS * deviation).clamp(min=math.log(self.HIGH_FACTOR))
        high = torch.where(warm, high, center + margin)
        highest_level = torch.where(count > 0, mean, level_before) + math.log(self.MOST_RISE)
        risen = usable & (in_a_row.amin() > high) & (in_a_row.amin() < highest_level)
        mean, center = torch.where(risen, in_a_row.mean(), torch.stack([mean, center])).unbind()

        limit = center + margin
        spike = usable & (value > limit)
        highest = torch.where(warm, mean + self.CLIP_SIGMAS * deviation, math.inf).exp()

        reach = self.LIMIT_SIGMAS * deviation
        limited = torch.where(warm, value.clamp(mean - reach, mean + reach), value)
        decay = (1 - 1 / (count + 1)).clamp(max=self.DECAY)
        step = torch.where(count > 0, limited - mean, 0.0)
        mean = torch.where(count > 0, mean, value)
        entered = torch.stack([count + 1, mean + (1 - decay) * step, decay * (variance + (1 - decay) * step.square())])
        entered = torch.where(spike & ~warm, torch.stack([count, mean, variance]), entered)
        largest = torch.maximum(largest, torch.where(spike, center + math.log(2), value))
        updated = torch.cat([entered, torch.stack([largest, level_before]), in_a_row[1:]])
        self._statistics = torch.where(usable, updated, self._statistics)  # never * 0: NaN * 0 is NaN
        skipped = spike if self.policy == "skip" else torch.zeros_like(spike)
        return skipped.to(torch.float32), highest, limit.exp()

    def state_dict(self) -> dict[str, Tensor]:
        return {"statistics": self._statistics.clone()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore the statistics. Older checkpoints have only the first four of them."""
        saved, device = state["statistics"], self._statistics.device
        self._statistics = torch.cat([saved.to(device), self._without_history(device)[len(saved) :]])


@dataclass(frozen=True)
class DeviceVerdict:
    """A window's verdict and numbers while they are on the device: scalars, the same on all ranks."""

    loss: Tensor
    grad_norm: Tensor  # before clipping
    found_inf: Tensor  # 1.0 for an overflow
    spike: Tensor  # 1.0 for a spike
    spike_limit: Tensor
    loss_scale: Tensor
    max_norm: Tensor  # to clip to: --grad-clip, or lower for an outlier
    skip: Tensor  # 1.0 if the update must not be applied
    requests: Tensor | None  # (n,), sums of the ranks' stop requests; None for one rank


class StepGate:
    """Gate before the optimizer: it judges a window's loss and gradient, and undoes the window's mark if it is skipped.

    Args:
        model: in training mode.
        detector: the run's spike detector.
        grad_clip: ``--grad-clip``.
        ranks: the processes that train together.
        requests: returns this rank's stop requests, which travel with the verdict: see ``Signals``.
    """

    def __init__(
        self, model: nn.Module, detector: SpikeDetector, grad_clip: float, ranks: Ranks,
        requests: Callable[[], Sequence[float]],
    ) -> None:  # fmt: skip
        self.guard = BufferGuard(model)
        self._detector = detector
        self._grad_clip = grad_clip
        self._ranks = ranks
        self._requests = requests

    def begin_window(self) -> None:
        self.guard.begin_window()

    def judge(
        self, loss: Tensor, grad_norm: Tensor, scaler: LossScaler, optimizer: torch.optim.Optimizer, num_samples: int
    ) -> DeviceVerdict:
        """Decide on the device whether a window's update is applied, the same on all ranks. No host sync.

        Args:
            loss: this rank's part of the window's loss, a scalar.
            grad_norm: norm of the unscaled gradient, a scalar.
            scaler: the window's loss scaler, after ``unscale_``.
            optimizer: the one it has unscaled.
            num_samples: this rank's samples in the window.
        """
        found_inf, loss_scale = scaler.found_inf(optimizer, loss), scaler.current_scale(loss)
        loss, grad_norm, found_inf, requests = self._ranks.agree(
            loss, grad_norm, found_inf, self._requests(), self.guard.statistics, num_samples
        )
        spike, highest, limit = self._detector.examine(loss, grad_norm, found_inf)
        skip = should_skip(loss, grad_norm, found_inf, spike)
        max_norm = highest.clamp(max=self._grad_clip)
        return DeviceVerdict(loss, grad_norm, found_inf, spike, limit, loss_scale, max_norm, skip, requests)

    def end_window(self, skip: Tensor) -> None:
        self.guard.end_window(skip)


def clip_gradients_(parameters: Iterable[nn.Parameter], verdict: DeviceVerdict, grad_clip: float) -> None:
    """Scale gradients down to ``verdict.max_norm``, which is on the device: as a float it would be a host sync."""
    relative_norm = verdict.grad_norm * (grad_clip / verdict.max_norm)
    clip_grads_with_norm_(parameters, grad_clip, relative_norm, foreach=True)


def gated_step(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
    """Run ``optimizer.step()``, or nothing if ``skip`` is 1: weights, moments and step counts stay bitwise unchanged.

    A fused optimizer decides on the device: this is its contract with GradScaler, used here with our own flag. Other
    optimizers take no flag, so the host must read it (a host sync in each window). Gradients must be unscaled already.
    """
    if not optimizer.defaults.get("fused"):
        if not skip.item():
            optimizer.step()
        return
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()


class PendingOutcome:
    """A window's numbers on their way from the device to the host.

    Attributes:
        requests: the ranks' stop requests on the host, once ``read`` has returned; empty for one rank.
    """

    def __init__(self, verdict: DeviceVerdict) -> None:
        numbers = (verdict.loss, verdict.grad_norm, verdict.found_inf, verdict.spike, verdict.loss_scale,
                   verdict.spike_limit)  # fmt: skip
        packed = torch.stack([value.to(torch.float32) for value in numbers])
        if verdict.requests is not None:
            packed = torch.cat([packed, verdict.requests])
        self.requests: list[float] = []
        self._arrived: torch.cuda.Event | None = None
        if packed.is_cuda:
            self._values = torch.empty(packed.shape, pin_memory=True).copy_(packed, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)
            self._arrived.record()
        else:
            self._values = packed

    def read(self) -> WindowOutcome:
        """Return the numbers and their verdict. Waits for this window's step, not for work queued after it."""
        if self._arrived is not None:
            self._arrived.synchronize()
        loss, grad_norm, found_inf, spike, loss_scale, spike_limit, *self.requests = self._values.tolist()
        verdict = _verdict(loss, grad_norm, found_inf > 0, spike > 0, loss_scale)
        return WindowOutcome(verdict, loss, grad_norm, loss_scale, spike_limit)


def _verdict(loss: float, grad_norm: float, found_inf: bool, spike: bool, loss_scale: float) -> StepVerdict:
    if not math.isfinite(loss):
        return StepVerdict.NONFINITE_LOSS  # losses are computed unscaled: no scale explains it
    if found_inf and loss_scale > 1:
        return StepVerdict.OVERFLOW
    if found_inf or not math.isfinite(grad_norm):
        return StepVerdict.NONFINITE_GRAD
    return StepVerdict.SPIKE if spike else StepVerdict.APPLIED
