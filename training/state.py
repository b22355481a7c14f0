"""Everything that training changes, and how a checkpoint holds it."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from runtime.files import first_line
from runtime.machine import LossScaler, Precision
from runtime.sharding import load_whole_state
from training.drill import Drill
from training.gate import SpikeDetector, StepVerdict, WindowOutcome
from training.ladder import Ladder, LossHistory
from training.optim import Ema, load_optimizer_state
from training.stages import Stage

logger = logging.getLogger("train_ultimate")


@dataclass
class Progress:
    """Position of a run: plain numbers that, with the seed, determine every batch to come."""

    stage: int = 0  # number of the current stage
    epoch: int = 0  # epochs finished, over both stages
    window: int = 0  # windows finished in the current epoch, applied or not
    global_window: int = 0  # windows finished since the start of the run
    best_iou: float = -1.0
    best_epoch: int = 0  # 1-based; 0: none yet

    def count(self, window: int, global_window: int) -> None:
        """Count a window, numbered from 0 in its epoch and from 1 in the run, at its first run."""
        self.window = window + 1
        self.global_window = global_window

    def return_to(self, window: int, global_window: int) -> None:
        """Count a window, and those after it, as not yet run."""
        self.window = min(self.window, window)
        self.global_window = min(self.global_window, global_window - 1)

    def end_epoch(self, iou: float) -> bool:
        """Move on to the next epoch. Return whether its validation IoU is the best so far.

        Of equal scores the later one is the best: its weights are trained longer. NaN never is.
        """
        self.epoch += 1
        self.window = 0
        is_best = iou >= self.best_iou
        if is_best:
            self.best_iou, self.best_epoch = iou, self.epoch
        return is_best


@dataclass
class EpochStats:
    """Sums over the windows of the current epoch; saved, so that a resumed epoch reports the whole of it."""

    num_applied: int = 0
    num_overflows: int = 0  # attempts, including those whose window was rerun and applied
    num_skipped: int = 0  # windows
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0
    grad_norm_max: float = 0.0
    num_large_norms: int = 0
    num_samples: int = 0
    lr: float = 0.0  # the decoder's, in the last window
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """Return the fields of the epoch's event in the log; the learning rate is the last window's."""
        return {
            "loss": self.loss,
            "grad_norm_avg": self.grad_norm_avg,
            "grad_norm_max": self.grad_norm_max,
            "lr": self.lr,
            "applied": self.num_applied,
            "skipped": self.num_skipped,
            "overflows": self.num_overflows,
            "large_norms": self.num_large_norms,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }

    def add(self, outcome: WindowOutcome, rerun: bool, large_norm: float) -> None:
        """Count an attempt. Averages are over applied windows.

        Args:
            outcome: verdict and numbers of the attempt.
            rerun: The window will be run again, so it is not skipped yet.
            large_norm: gradient norm above which the attempt is counted as large.
        """
        self.num_overflows += outcome.verdict is StepVerdict.OVERFLOW
        if outcome.verdict is StepVerdict.APPLIED:
            self.num_applied += 1
            self.loss_sum += outcome.loss
            self.grad_norm_sum += outcome.grad_norm
            self.grad_norm_max = max(self.grad_norm_max, outcome.grad_norm)
            self.num_large_norms += outcome.grad_norm > large_norm
        elif not rerun:
            self.num_skipped += 1

    @property
    def loss(self) -> float:
        return self.loss_sum / self.num_applied if self.num_applied else math.nan

    @property
    def grad_norm_avg(self) -> float:
        return self.grad_norm_sum / self.num_applied if self.num_applied else math.nan

    @property
    def images_per_second(self) -> float:
        return self.num_samples / self.seconds if self.seconds > 0 else 0.0


@dataclass
class TrainState:
    """Model, optimizer, scaler, spike detector, weight average, recovery ladder, progress and unreadable data of a run.

    Not saved, because settings and progress determine them: the learning rate, the order of samples, augmentation,
    dropout, the stage's scaler settings. Nor what belongs to this process: fire drills, whether a step is half done.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    detector: SpikeDetector
    ema: Ema | None
    progress: Progress = field(default_factory=Progress)
    epoch_stats: EpochStats = field(default_factory=EpochStats)
    ladder: Ladder = field(default_factory=Ladder)
    unreadable: dict[str, str] = field(default_factory=dict)  # image found so far -> why it or its mask cannot be read
    drills: list[Drill] = field(default_factory=list)
    mid_step: bool = False  # A step or a recovery is half done: such a state must not be saved.

    @property
    def model_for_use(self) -> nn.Module:
        """Weights to validate and to ship: the average if there is one."""
        return self.ema.module if self.ema is not None else self.model

    def precision_in_use(self, started_in: Precision) -> Precision:
        """Return the current precision: fp32 if recovery has resorted to it."""
        return started_in.full() if self.ladder.full_precision else started_in

    def state_dict(self) -> dict[str, Any]:
        """Return tensors, numbers, strings, lists and dicts only, which ``torch.load(weights_only=True)`` accepts."""
        return {
            "model": self.model.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "detector": self.detector.state_dict(),
            "progress": asdict(self.progress),
            "epoch_stats": asdict(self.epoch_stats),
            "ladder": asdict(self.ladder),
            "unreadable": dict(self.unreadable),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore everything except the scaler, whose settings are the stage's: see ``resume``.

        Raises:
            ValueError: The weights or moments belong to another network; the message is the first difference.
            KeyError, TypeError, ...: Another program wrote the state.
        """
        load_whole_state(self.model, state["model"])
        load_optimizer_state(self.optimizer, state["optimizer"])
        if self.ema is not None and state["ema"] is not None:
            self.ema.load_state_dict(state["ema"])
        elif self.ema is not None:  # averaging begins now, from these weights
            load_whole_state(self.ema.module, state["model"])
        self.detector.load_state_dict(state["detector"])
        self.progress = Progress(**{key: value for key, value in state["progress"].items() if key != "samples_seen"})
        self.epoch_stats = EpochStats(**state["epoch_stats"])
        self.ladder = Ladder(**{**state["ladder"], "losses": LossHistory.restored(state["ladder"]["losses"])})
        self.unreadable = dict(state.get("unreadable", {}))  # older checkpoints have none


def window_size(config: dict[str, Any]) -> int:
    """Return the samples per optimizer step, over all ranks. Older checkpoints, of one rank, do not name it."""
    settings = config["settings"]
    return config.get("window_size", settings["batch_size"] * settings["accumulation_steps"])


def resume(
    state: TrainState, checkpoint: dict[str, Any], config: dict[str, Any], stages: Sequence[Stage], precision: Precision
) -> None:
    """Restore a run from its checkpoint, and log what has changed since.

    The scaler's state is restored only within its stage: the next stage brings its own.

    Args:
        state: freshly built.
        checkpoint: verified, with the "config" of the run that wrote it.
        config: that of this run: "settings", "precision", "window_size" and fingerprint of the "data".
        stages: stages of this run.
        precision: precision of this run.

    Raises:
        ValueError: A modified copy of this program wrote the checkpoint; the message is the first difference.
    """
    try:
        state.load_state_dict(checkpoint)
    except (RuntimeError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error
    for stage in stages:
        if stage.number == state.progress.stage:
            state.scaler = precision.new_scaler(stage.scaler)
            state.scaler.resume(checkpoint["scaler"])
    before, ladder = checkpoint["config"], state.ladder
    size_before, size = window_size(before), window_size(config)
    state.progress.window = state.progress.window * size_before // size  # continue at the same sample
    if before["precision"] != config["precision"]:
        logger.info(f"precision in use: {before['precision']} -> {config['precision']}")
        ladder.full_precision = False
    same_images = before["settings"]["img_size"] == config["settings"]["img_size"] and before["data"] == config["data"]
    if size_before != size or not same_images:  # losses and norms of other windows or images are not comparable
        ladder.losses = LossHistory()
        state.detector.forget()
    if ladder.lr_factor != 1 and before["settings"]["lr"] != config["settings"]["lr"]:
        logger.warning(f"--lr is used as given: the factor {ladder.lr_factor:g}, left by rollbacks, is dropped")
        ladder.lr_factor = 1.0
    if ladder.lr_factor != 1:
        logger.info(f"Learning rates are multiplied by {ladder.lr_factor:g}, after {ladder.num_rollbacks} rollbacks")
    if before["data"] != config["data"]:
        logger.warning("files were added, removed, changed or excluded since the checkpoint was written")
