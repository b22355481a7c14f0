"""Fire drills: faults injected on purpose, to see what a run does about them."""

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
_STRIKE_WINDOWS = ("bad-sample", "kill")  # the others strike attempts
_SPIKE_FACTOR = 1e4
_OVERFLOW_FACTOR = 2.0**40


class Drill:
    """One kind of fault, injected into ``count`` attempts in a row from a window of the run on.

    Each run of a window is an attempt: while the count lasts, a window that recovery reruns is struck again.
    "bad-sample" and "kill" strike windows, not attempts.

    Attributes:
        kind: nan-loss: the loss becomes NaN.
            inf-grad: one parameter's gradient becomes infinite.
            spike: gradients become 10,000 times larger, and stay finite.
            overflow: the scaled loss is too large for fp16, and the backward pass really overflows. Nothing happens
                without loss scaling, as in bf16 and fp32.
            nan-weight: a weight becomes NaN during the step, like a bit that flips in memory.
            bad-sample: the pixels of each window's first sample are NaN.
            kill: the process is killed (SIGKILL) before the window.
        rank: the process that is struck; None for all of them.
        window: the first window that is struck, counted over the run from 1.
        left: attempts still to strike.
    """

    def __init__(self, kind: str, window: int, count: int, rank: int | None = None) -> None:
        self.kind = kind
        self.rank = rank
        self.window = window
        self.left = count
        self._last_window = window + count - 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse KIND@WINDOW[xCOUNT][rRANK].

        Raises:
            ValueError: The text does not have this form.
        """
        match = re.fullmatch(r"([a-z-]+)@([1-9]\d*)(?:x([1-9]\d*))?(?:r(\d+))?", text)
        if match is None or match[1] not in KINDS:
            kinds = ", ".join(KINDS)
            raise ValueError(f"--drill {text}: not KIND@WINDOW[xCOUNT][rRANK], where KIND is one of {kinds}")
        return cls(match[1], int(match[2]), int(match[3] or 1), None if match[4] is None else int(match[4]))

    def strikes_attempts(self, window: int) -> bool:
        return self.left > 0 and window >= self.window and self.kind not in _STRIKE_WINDOWS

    def strikes_window(self, window: int) -> bool:
        return self.window <= window <= self._last_window and self.kind in _STRIKE_WINDOWS

    def spoil_images(self, images: Tensor) -> Tensor:
        """Return a window's first batch as floats of the same range, the first image all NaN. "kill" never returns.

        Shape:
            (B, 3, H, W) -> the same
        """
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        spoilt = images.to(torch.float32, copy=True)
        spoilt[0] = math.nan
        return spoilt

    def spoil_loss(self, loss: Tensor, scaled: bool) -> Tensor:
        """Return a batch's loss, spoilt if that is the drill's kind. Call before each backward pass of a window.

        Args:
            loss: the batch's loss, a scalar.
            scaled: Loss scaling is in use.
        """
        if self.kind == "nan-loss":
            return loss * math.nan
        if self.kind == "overflow" and scaled:
            loss = loss.clone()
            loss.register_hook(lambda gradient: gradient * _OVERFLOW_FACTOR)
        return loss

    @torch.no_grad()
    def strike(self, parameters: Iterable[nn.Parameter]) -> None:
        """Spoil an attempt's gradients or weights, and count the attempt. Call once its gradients are complete."""
        self.left -= 1
        struck = [(local(one), local(one.grad)) for one in parameters if one.grad is not None]
        struck = [(weight, gradient) for weight, gradient in struck if weight.numel()]  # a shard can be empty
        if self.kind == "spike":
            for _, gradient in struck:
                gradient *= _SPIKE_FACTOR
        elif self.kind == "inf-grad":
            _, gradient = struck[0]
            gradient[(0,) * gradient.ndim] = math.inf
        elif self.kind == "nan-weight":
            weight, _ = struck[0]
            weight[(0,) * weight.ndim] = math.nan
