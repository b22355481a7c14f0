"""Everything that training changes, in one place, with its way into a checkpoint and back."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from runtime.machine import LossScaler, Precision
from runtime.sharding import load_whole_state
from training.gate import SpikeDetector, StepVerdict, WindowOutcome
from training.ladder import Ladder, LossHistory
from training.optim import Ema, load_optimizer_state
from training.stages import Stage


@dataclass
class Progress:
    """Where a run stands. Plain numbers: with the seed they determine every batch that is still to come."""

    stage: int = 0  # number of the stage under way
    epoch: int = 0  # epochs finished, over both stages
    window: int = 0  # windows finished in the epoch under way, applied or not
    global_window: int = 0  # windows finished since the start of the run
    samples_seen: int = 0
    best_iou: float = -1.0
    best_epoch: int = 0  # 1-based; 0: none yet

    def count(self, window: int, global_window: int, num_samples: int) -> None:
        """A window, numbered from 0 in its epoch and from 1 in the run, has been run for the first time."""
        self.window = window + 1
        self.global_window = global_window
        self.samples_seen += num_samples


@dataclass
class EpochStats:
    """Sums over the windows of the epoch under way; saved too, so that a resumed epoch reports the whole of it."""

    num_applied: int = 0
    num_overflows: int = 0  # attempts, those included that were run again and then applied
    num_skipped: int = 0  # windows given up, whatever the verdict
    loss_sum: float = 0.0
    grad_norm_sum: float = 0.0
    grad_norm_max: float = 0.0
    num_large_norms: int = 0
    num_samples: int = 0
    lr: float = 0.0  # the decoder's in the last window
    seconds: float = 0.0

    def summary(self) -> dict[str, float]:
        """For the log; the learning rate is the last window's."""
        return {
            **{"loss": self.loss, "grad_norm_avg": self.grad_norm_avg, "grad_norm_max": self.grad_norm_max},
            **{"lr": self.lr, "skipped": self.num_skipped, "overflows": self.num_overflows},
            **{"seconds": self.seconds, "images_per_second": self.images_per_second},
        }

    def add(self, outcome: WindowOutcome, run_again: bool, large_norm: float) -> None:
        """Count an attempt; averages are over applied ones."""
        self.num_overflows += outcome.verdict is StepVerdict.OVERFLOW
        if outcome.verdict is StepVerdict.APPLIED:
            self.num_applied += 1
            self.loss_sum += outcome.loss
            self.grad_norm_sum += outcome.grad_norm
            self.grad_norm_max = max(self.grad_norm_max, outcome.grad_norm)
            self.num_large_norms += outcome.grad_norm > large_norm
        elif not run_again:
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
    """Model, optimizer, scaler, spike detector, weight average, recovery ladder and progress of a run; unreadable data.

    Not saved, because settings and progress determine them: the learning rate, the order of samples, augmentation,
    dropout, the stage's scaler settings.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: LossScaler
    detector: SpikeDetector
    ema: Ema | None
    progress: Progress = field(default_factory=Progress)
    epoch_stats: EpochStats = field(default_factory=EpochStats)
    ladder: Ladder = field(default_factory=Ladder)
    unreadable: dict[str, str] = field(default_factory=dict)  # image met so far -> why it or its mask cannot be read

    @property
    def model_for_use(self) -> nn.Module:
        """The weights to validate and to ship: the average, where there is one."""
        return self.ema.module if self.ema is not None else self.model

    def precision_in_use(self, started_in: Precision) -> Precision:
        """fp32 where nothing else has helped."""
        return started_in.full() if self.ladder.full_precision else started_in

    def state_dict(self) -> dict[str, Any]:
        """Tensors, numbers, strings, lists and dicts only, so that it loads with ``weights_only=True``."""
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
        """Restore all but the scaler, whose settings are the stage's: ``resume`` does that.

        Raises:
            ValueError: the weights or moments are those of another network.
        """
        load_weights(self.model, state["model"])
        try:
            load_optimizer_state(self.optimizer, state["optimizer"])
            if self.ema is not None and state["ema"] is not None:
                self.ema.load_state_dict(state["ema"])
            elif self.ema is not None:  # averaging is switched on now: it starts from the weights at hand
                load_whole_state(self.ema.module, state["model"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
            raise ValueError(f"the checkpoint's weights do not fit this network ({reason})") from error
        self.detector.load_state_dict(state["detector"])
        self.progress = Progress(**state["progress"])
        self.epoch_stats = EpochStats(**state["epoch_stats"])
        self.ladder = Ladder(**{**state["ladder"], "losses": LossHistory(**state["ladder"]["losses"])})
        self.unreadable = dict(state.get("unreadable", {}))  # checkpoints from before they were kept have none


def window_size(config: dict[str, Any]) -> int:
    """Samples in an optimizer step, over all processes: as the configuration tells, or from when there was one."""
    settings = config["settings"]
    return config.get("window_size", settings["batch_size"] * settings["accumulation_steps"])


def load_weights(model: nn.Module, weights: dict[str, Any]) -> None:
    """Load weights under this network's own names.

    Raises:
        ValueError: they are those of another network.
    """
    try:
        load_whole_state(model, weights)
    except RuntimeError as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise ValueError(f"the checkpoint's weights do not fit this network ({reason})") from error


def resume(
    state: TrainState, checkpoint: dict[str, Any], config: dict[str, Any], stages: Sequence[Stage], precision: Precision
) -> None:
    """Put a run back where its checkpoint left it, and print what is not as it was.

    At the border of two stages nothing is taken from the first one's scaler: the next brings its own.

    Args:
        state: freshly built.
        checkpoint: a verified one, with the "config" of the run that wrote it.
        config: that of this run: "settings", "precision" in use, fingerprint of the "data".
        stages: of this run.
        precision: of this run.

    Raises:
        ValueError: the weights are those of another network.
    """
    state.load_state_dict(checkpoint)
    for stage in stages:
        if stage.number == state.progress.stage:
            state.scaler = precision.new_scaler(stage.scaler)
            state.scaler.resume(checkpoint["scaler"])
    before, now = checkpoint["config"], config
    # An epoch under way goes on at the same sample, also where a window now holds more of them or fewer.
    size_before, size = window_size(before), window_size(now)
    state.progress.window = state.progress.window * size_before // size
    if before["precision"] != now["precision"]:
        print(f"precision in use: {before['precision']} -> {now['precision']}")
        state.ladder.full_precision = False
    same_images = before["settings"]["img_size"] == now["settings"]["img_size"] and before["data"] == now["data"]
    if size_before != size or not same_images:  # the history of the loss says nothing about others
        state.ladder.losses = LossHistory()
    if state.ladder.lr_factor != 1 and before["settings"]["lr"] != now["settings"]["lr"]:
        print(f"lr is meant as given: the factor {state.ladder.lr_factor:g}, left by rollbacks, is dropped")
        state.ladder.lr_factor = 1.0
    if state.ladder.lr_factor != 1:
        print(f"Learning rates are multiplied by {state.ladder.lr_factor:g}: {state.ladder.num_rollbacks} rollbacks")
    if before["data"] != now["data"]:
        print("Warning: files were added, removed, changed or excluded since the checkpoint was written")
