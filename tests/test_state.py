"""The state of a run, saved and loaded again, and an epoch's sums."""

import math

import pytest
import torch
from conftest import differing_tensors
from torch import nn

from runtime.machine import ScalerSettings, resolve_precision
from training.gate import SpikeDetector, StepVerdict, WindowOutcome
from training.optim import Ema, build_optimizer, set_learning_rates
from training.state import EpochStats, Progress, TrainState


def new_state(width: int = 4, ema: bool = True) -> TrainState:
    model = nn.ModuleDict({"decoder": nn.Linear(width, 2), "backbone": nn.Linear(width, 3)})
    optimizer = build_optimizer(model["decoder"], model["backbone"], weight_decay=0.1)
    set_learning_rates(optimizer, 0.1, 0.1)
    scaler = resolve_precision("fp32", torch.device("cpu")).new_scaler(ScalerSettings())
    detector = SpikeDetector("skip", torch.device("cpu"))
    return TrainState(model, optimizer, scaler, detector, Ema(model, 0.9) if ema else None)


def train_a_little(state: TrainState) -> None:
    for _ in range(3):
        state.optimizer.zero_grad()
        sum(module(torch.randn(5, 4)).square().mean() for module in state.model.children()).backward()  # type: ignore
        state.optimizer.step()
        if state.ema is not None:
            state.ema.update(state.model, {})
    state.detector.examine(torch.tensor(1.0), torch.tensor(2.0), torch.tensor(0.0))
    state.ladder.put_in_quarantine("Imgs/a.jpg", epoch=1)
    state.ladder.rolled_back(seconds_undone=1.0)
    state.ladder.next_action(WindowOutcome(StepVerdict.APPLIED, 1.5, 2.0, 1.0), 0, "fp32")
    state.progress = Progress(stage=2, epoch=3, window=1, global_window=17, best_iou=0.5, best_epoch=2)
    state.epoch_stats.add(WindowOutcome(StepVerdict.APPLIED, 1.0, 2.0, 1.0), rerun=False, large_norm=9)


def test_everything_saved_comes_back_bitwise() -> None:
    first, second = new_state(), new_state()
    train_a_little(first)
    saved = first.state_dict()
    second.load_state_dict(saved)
    assert differing_tensors(saved, second.state_dict()) == []
    assert second.ladder == first.ladder


def test_other_networks_weights_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder\.weight has the shape \(2, 5\) in the file, not \(2, 4\)"):
        new_state(width=4).load_state_dict(new_state(width=5).state_dict())


def test_averaging_switched_on_at_resume_starts_from_the_weights() -> None:
    without, with_ema = new_state(ema=False), new_state(ema=True)
    train_a_little(without)
    assert without.model_for_use is without.model
    with_ema.load_state_dict(without.state_dict())
    assert with_ema.ema is not None
    assert with_ema.model_for_use is with_ema.ema.module
    assert differing_tensors(with_ema.ema.module.state_dict(), without.model.state_dict()) == []


def test_epoch_averages_are_over_applied_windows() -> None:
    stats = EpochStats()
    assert math.isnan(stats.loss)
    for verdict, loss, norm, rerun in (
        (StepVerdict.APPLIED, 1.0, 2.0, False),
        (StepVerdict.OVERFLOW, 1.0, math.inf, True),
        (StepVerdict.OVERFLOW, 1.0, math.inf, False),
        (StepVerdict.APPLIED, 3.0, 4.0, False),
    ):
        stats.add(WindowOutcome(verdict, loss, norm, 1024.0), rerun, large_norm=3.0)
    assert (stats.loss, stats.grad_norm_avg, stats.grad_norm_max) == (2.0, 3.0, 4.0)
    assert (stats.num_applied, stats.num_skipped, stats.num_overflows, stats.num_large_norms) == (2, 1, 2, 1)
