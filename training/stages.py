"""The stages of a run and their learning rate, as data and as a pure function."""

import argparse
import math
from dataclasses import dataclass, field

from runtime.machine import CONSERVATIVE_SCALER, ScalerSettings


@dataclass(frozen=True)
class Stage:
    """Epochs ``first_epoch`` to ``end_epoch - 1`` (from 0, over the whole run) trained alike."""

    number: int  # 1 or 2
    first_epoch: int
    num_epochs: int
    batch_size: int
    accumulation_steps: int
    lr: float
    backbone_lr_scale: float
    freeze_backbone: bool
    scaler: ScalerSettings = field(default_factory=ScalerSettings)
    warmup_fraction: float = 0.1

    @property
    def end_epoch(self) -> int:
        return self.first_epoch + self.num_epochs


def learning_rate(stage: Stage, window: int, num_windows: int) -> float:
    """The decoder's learning rate at a window of the stage: linear from near 0 to ``stage.lr``, then a cosine to 0.

    A function of its arguments alone. There is no scheduler object to save, to step at the right moment or to leave
    behind when the stage changes. It peaks at the end of the warm-up and is exactly 0 at the last window.

    Args:
        window: 0 to ``num_windows - 1``, counted from the start of the stage.
        num_windows: windows in the whole stage.
    """
    warmup = max(1, round(stage.warmup_fraction * num_windows))
    if window < warmup:
        return stage.lr * (window + 1) / warmup
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (window + 1 - warmup) / (num_windows - warmup)))


def cosine_ramp(fraction: float) -> float:
    """0 at fraction 0, 1 at fraction 1, flat at both ends."""
    return 0.5 * (1 - math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def build_stages(args: argparse.Namespace) -> list[Stage]:
    """Stage 1 trains the decoder, stage 2 everything; a stage without epochs is left out."""
    batch, split = (args.batch_size, args.accumulation_steps), args.stage1_epochs
    lr2, scale = args.lr * args.stage2_lr_scale, args.backbone_lr_scale
    stages = [
        Stage(1, 0, split, *batch, args.lr, scale, freeze_backbone=True),
        Stage(2, split, args.epochs - split, *batch, lr2, scale, freeze_backbone=False, scaler=CONSERVATIVE_SCALER),
    ]
    return [stage for stage in stages if stage.num_epochs > 0]
