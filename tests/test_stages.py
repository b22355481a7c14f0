"""The two stages: learning rates as a pure function, and what each stage trains in a whole run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, prepare_again, train
from hypothesis import given
from hypothesis import strategies as st
from launching import read_events

from runtime.checkpoint import read_checkpoint
from train_ultimate import run_stage
from training.stages import Stage, cosine_ramp, learning_rate


def stage(lr: float = 0.01) -> Stage:
    return Stage(1, 0, 10, batch_size=2, accumulation_steps=4, lr=lr, backbone_lr_scale=0.1, freeze_backbone=True)


@given(num_windows=st.integers(2, 5000))
def test_learning_rate_rises_to_the_peak_once_and_falls_to_exactly_zero(num_windows: int) -> None:
    rates = [learning_rate(stage(), window, num_windows) for window in range(num_windows)]
    peak = rates.index(max(rates))
    assert rates[peak] == pytest.approx(0.01)
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == 0
    assert all(rate > 0 for rate in rates[:-1])


def test_learning_rate_starts_near_zero() -> None:
    assert learning_rate(stage(), 0, 1000) == pytest.approx(0.01 / 100)


def test_a_stage_of_one_window_trains() -> None:
    assert learning_rate(stage(), 0, 1) == 0.01


def test_ramp_runs_from_zero_to_one_and_is_clamped() -> None:
    assert [cosine_ramp(x) for x in (-1, 0, 0.5, 1, 2)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_stage_two_alone_and_stage_one_alone(tiny_argv: Argv, tmp_path: Path) -> None:
    for epochs, expected in ((0, [2]), (1, [1])):
        directory = tmp_path / str(epochs)
        argv = tiny_argv("--epochs", "1", "--stage1-epochs", str(epochs), checkpoint_dir=directory)
        assert train(argv) == 0
        assert [event["stage"] for event in read_events(directory, "epoch")] == expected


def test_stage_one_changes_nothing_in_the_backbone(finished: Path) -> None:
    """Parameters and buffers are bitwise the same; this backbone has BatchNorm."""
    run = prepare_again(finished)
    initial = {key: value for key, value in run.state.model.state_dict().items() if key.startswith("backbone.")}
    assert any("running_mean" in key for key in initial)
    after_stage1 = read_checkpoint(finished / "epoch_0002.pth")
    after_stage2 = read_checkpoint(finished / "epoch_0004.pth")["model"]
    for weights in (after_stage1["model"], after_stage1["ema"]["model"]):
        assert all(torch.equal(weights[key], value) for key, value in initial.items())
    assert not any(torch.equal(after_stage2[key], value) for key, value in initial.items() if "weight" in key)
    assert not torch.equal(
        after_stage1["model"]["decoder.coarse_head.weight"], run.state.model.state_dict()["decoder.coarse_head.weight"]
    )


def test_backbone_learns_at_a_tenth_of_the_decoders_rate_in_every_window(finished: Path) -> None:
    rates: list[tuple[int, float, float]] = []
    run = prepare_again(finished)

    def record(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        lr = {group["part"]: group["lr"] for group in optimizer.param_groups}
        rates.append((run.state.progress.stage, lr["decoder"], lr["backbone"]))

    run.state.optimizer.register_step_pre_hook(record)
    for stage in run.stages:
        run_stage(run, stage)
    for number, peak in ((1, 0.002), (2, 0.001)):
        decoder = [rate for stage, rate, _ in rates if stage == number]
        backbone = [rate for stage, _, rate in rates if stage == number]
        assert len(decoder) == 8
        assert backbone == pytest.approx([0.1 * rate for rate in decoder])
        assert max(decoder) == pytest.approx(peak)
        assert decoder[-1] == backbone[-1] == 0
    events = read_events(finished, "epoch")
    assert [event["backbone_lr"] > 0 for event in events] == [False, False, True, False]
    assert (events[1]["lr"], events[3]["lr"], events[3]["backbone_lr"]) == (0, 0, 0)


def test_stage_two_begins_with_its_own_scaler_even_if_resumed_at_its_start(tiny_argv: Argv, tmp_path: Path) -> None:
    assert train(tiny_argv("--precision", "fp16", "--epochs", "3", "--keep-checkpoints", "9")) == 0
    run_dir, cut = tmp_path / "run", tmp_path / "cut"
    assert read_checkpoint(run_dir / "epoch_0002.pth")["scaler"]["scale"] == 2.0**12
    cut.mkdir()
    shutil.copy(run_dir / "epoch_0002.pth", cut)
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    for directory in (run_dir, cut):
        scaler = read_checkpoint(directory / "epoch_0003.pth")["scaler"]
        assert scaler["scale"] <= 2.0**10
        assert (scaler["growth_factor"], scaler["growth_interval"]) == (1.5, 1000)
