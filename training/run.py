"""A training run: its settings, machine, data, state and folder."""

import argparse
import shlex
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.cache import DecodedCache
from data.layouts import Pair, find_subsets
from data.sampler import Share
from data.unreadable import UnreadablePairs
from runtime.checkpoint import CheckpointStore
from runtime.folder import LOG
from runtime.log import RunLog
from runtime.machine import Precision
from runtime.ranks import Ranks
from runtime.sharding import whole_on_first
from runtime.signals import StopRequest
from training.drill import Drill
from training.recovery import Recovery
from training.runner import WindowRunner
from training.stages import Stage
from training.state import TrainState

FEW_WINDOWS = 300  # in which a network learns little, at the default learning rate


@dataclass
class Run:
    """One training run. ``state`` changes; the rest is settled when the run is prepared."""

    args: argparse.Namespace
    config: dict[str, Any]  # the settings and the data's fingerprint, as saved
    device: torch.device
    precision: Precision
    memory_format: torch.memory_format
    stages: list[Stage]
    train_pairs: list[Pair]
    val_pairs: list[Pair]
    cache: DecodedCache | None
    state: TrainState
    store: CheckpointStore
    log: RunLog
    recovery: Recovery
    unreadable: UnreadablePairs
    drills: list[Drill]
    runner: WindowRunner
    stop: StopRequest
    ranks: Ranks  # the processes that train together; this one alone, without a launcher
    share: Share  # of this one
    lock: int | None  # on the checkpoint directory
    consistent: bool = True  # no step is half done: the state could be saved
    norm_warned: bool = False  # of norms far above --grad-clip: once is enough

    def checkpoint(self) -> dict[str, Any]:
        return {"config": self.config, **whole_on_first(self.state.state_dict(), self.ranks.is_first)}

    @property
    def save_is_due(self) -> bool:
        since = self.state.progress.global_window - self.store.last_window
        return self.stop.save or 0 < self.args.checkpoint_every <= since

    def log_end(self, exit_code: int) -> None:
        progress, ladder = self.state.progress, self.state.ladder
        best = {"best_iou": progress.best_iou, "best_epoch": progress.best_epoch}
        unreadable = list(self.unreadable.reasons)
        self.log.event("run_end", exit_code=exit_code, **best, recovery=ladder.summary(), unreadable=unreadable)

    @property
    def resume_command(self) -> str:
        return shlex.join(
            ["python", sys.argv[0], "train", "--resume", "auto", "--checkpoint-dir", self.args.checkpoint_dir]
        )

    @property
    def hides_bars(self) -> bool | None:
        """None: where standard error is no terminal."""
        return True if self.args.quiet or self.args.json_logs or not self.ranks.is_first else None

    def last_lines(self) -> list[str]:
        """What came of it, where it is, and the next command."""
        progress, best = self.state.progress, self.store.best_path
        is_synthetic = self.args.dataset_path == "synthetic"
        data = self.store.directory / "synthetic" if is_synthetic else Path(self.args.dataset_path)
        ends = ["predict", "--checkpoint", str(best), "PHOTOGRAPHS", "--output", "found", "--overlay"]
        with suppress(ValueError, OSError):  # the data set may have gone
            if any(subset.split == "test" for subset in find_subsets(data)):
                ends = ["evaluate", "--checkpoint", str(best), "--dataset-path", str(data)]
        windows = progress.global_window
        few = f"Only {windows} windows (optimizer steps) were trained: docs/recipes.md has settings for small data sets"
        return [
            *([few] if windows < FEW_WINDOWS and not is_synthetic else []),
            f"Done: validation IoU {progress.best_iou:.4f}, reached at epoch {progress.best_epoch}",
            f"Weights: {best}, curves: {self.store.directory / LOG}",
            f"Next: {shlex.join(['python', sys.argv[0], *ends])}",
        ]

    @property
    def precision_in_use(self) -> Precision:
        return self.state.precision_in_use(self.precision)
