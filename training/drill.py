"""Fire drills: faults injected on purpose, so that anyone can see what a run does about them."""

import math
import os
import re
import signal
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from runtime.sharding import local

KINDS = ("nan-loss", "inf-grad", "spike", "overflow", "nan-weight", "bad-sample", "kill")
_SPIKE_FACTOR = 1e4
_OVERFLOW_FACTOR = 2.0**40


class Drill:
    """Injects one kind of fault into ``count`` attempts in a row, from a window of the run on.

    An attempt is one time that a window is run: what recovery runs again is struck again while the count lasts.
    "bad-sample" and "kill" strike windows, not attempts.

    Attributes:
        kind: nan-loss: the loss becomes NaN.
            inf-grad: one parameter's gradient becomes infinite.
            spike: gradients become 10,000 times larger, and stay finite.
            overflow: the scaled loss is too large for fp16, in which the backward pass really overflows. Without loss
                scaling, as in bf16 and fp32, there is nothing to overflow.
            nan-weight: a weight becomes NaN during the step, as from a bit that flips in memory.
            bad-sample: the first sample of each window has pixels that are NaN.
            kill: the process is killed (SIGKILL) before the window.
        rank: of the process it happens to; None for all of them.
    """

    def __init__(self, kind: str, window: int, count: int, rank: int | None = None) -> None:
        self.kind = kind
        self.rank = rank
        self.window = window
        self.left = count
        self._last_window = window + count - 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """From KIND@WINDOW, KIND@WINDOWxCOUNT or either with rRANK behind it, windows counted over the run from 1.

        Raises:
            ValueError: it is not of that form.
        """
        match = re.fullmatch(r"([a-z-]+)@([1-9]\d*)(?:x([1-9]\d*))?(?:r(\d+))?", text)
        if match is None or match[1] not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"--drill {text}: not KIND@WINDOW[xCOUNT][rRANK], where KIND is one of {kinds}")
        return cls(match[1], int(match[2]), int(match[3] or 1), None if match[4] is None else int(match[4]))

    def strikes_attempts(self, window: int) -> bool:
        return self.left > 0 and window >= self.window and self.kind not in ("bad-sample", "kill")

    def strikes_window(self, window: int) -> bool:
        return self.window <= window <= self._last_window and self.kind in ("bad-sample", "kill")

    def spoil_images(self, images: Tensor) -> Tensor:
        """A batch's images as floats of the same range, the first of them all NaN; or no return at all ("kill").

        Shape:
            (B, 3, H, W) -> the same
        """
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        spoilt = images.to(torch.float32, copy=True)
        spoilt[0] = math.nan
        return spoilt

    def spoil_loss(self, loss: Tensor, scaled: bool) -> Tensor:
        """For every batch of a window, before the backward pass."""
        if self.kind == "nan-loss":
            return loss * math.nan
        if self.kind == "overflow" and scaled:
            loss = loss.clone()
            loss.register_hook(lambda gradient: gradient * _OVERFLOW_FACTOR)
        return loss

    @torch.no_grad()
    def strike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Once an attempt, when its gradients are complete; counts it."""
        self.left -= 1
        struck = [(local(one), local(one.grad)) for one in parameters if one.grad is not None]
        # What this rank has of a sharded one can be empty.
        struck = [(weight, gradient) for weight, gradient in struck if weight.numel()]
        if self.kind == "spike":
            for _, gradient in struck:
                gradient *= _SPIKE_FACTOR
        elif self.kind == "inf-grad":
            _, gradient = struck[0]
            gradient[(0,) * gradient.ndim] = math.inf
        elif self.kind == "nan-weight":
            weight, _ = struck[0]
            weight[(0,) * weight.ndim] = math.nan
