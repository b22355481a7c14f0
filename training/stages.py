"""The stages of a run and their learning rate, as data and as a pure function."""

import math
from dataclasses import dataclass, field, replace

from runtime.machine import CONSERVATIVE_SCALER, ScalerSettings
from training.settings import Settings


@dataclass(frozen=True)
class Stage:
    """Epochs ``first_epoch`` to ``end_epoch - 1`` (from 0, over the whole run), trained in the same way."""

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
    """Return the decoder's learning rate at a window of the stage: linear rise to ``stage.lr``, cosine to 0.

    A pure function: no scheduler object to save, to step at the right moment or to replace when the stage changes. It
    peaks at the end of the warm-up and is exactly 0 at the last window.

    Args:
        window: 0 to ``num_windows - 1``, counted from the start of the stage.
        num_windows: windows in the whole stage.
    """
    warmup = max(1, round(stage.warmup_fraction * num_windows))
    if window < warmup:
        return stage.lr * (window + 1) / warmup
    return stage.lr * 0.5 * (1 + math.cos(math.pi * (window + 1 - warmup) / (num_windows - warmup)))


def cosine_ramp(fraction: float) -> float:
    """Return a smooth rise from 0 at fraction 0 to 1 at fraction 1, flat at both ends."""
    return 0.5 * (1 - math.cos(math.pi * min(max(fraction, 0.0), 1.0)))


def build_stages(settings: Settings) -> list[Stage]:
    """Return the stages that have epochs: stage 1 trains the decoder, stage 2 everything."""
    split = settings.stage1_epochs
    first = Stage(
        number=1,
        first_epoch=0,
        num_epochs=split,
        batch_size=settings.batch_size,
        accumulation_steps=settings.accumulation_steps,
        lr=settings.lr,
        backbone_lr_scale=settings.backbone_lr_scale,
        freeze_backbone=True,
    )
    second = replace(
        first,
        number=2,
        first_epoch=split,
        num_epochs=settings.epochs - split,
        lr=settings.lr * settings.stage2_lr_scale,
        freeze_backbone=False,
        scaler=CONSERVATIVE_SCALER,
    )
    return [stage for stage in (first, second) if stage.num_epochs > 0]
