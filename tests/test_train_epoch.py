"""The steps of ``train_epoch``: accumulation, clipping, and windows that must not be applied."""

import copy
import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, prepare_again, prepare_run
from launching import read_events
from torch import Tensor

import train_ultimate
from data.loading import to_device, training_loader
from losses import deep_supervision_loss
from models import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.machine import ScalerSettings
from train_ultimate import run_stage, train_epoch
from training.run import Run
from training.stages import Stage


class Collector(torch.optim.SGD):
    """An optimizer that keeps each window's gradients and changes no weight."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__([dict(group) for group in optimizer.param_groups], lr=0.0)
        self.collected: list[list[Tensor]] = []

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        self.collected.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])


def gradients_of_first_epoch(run: Run, stage: Stage) -> list[list[Tensor]]:
    """Return the gradients of each window of one epoch in which no update is applied."""
    run.state.optimizer = collector = Collector(run.state.optimizer)
    assert isinstance(run.state.model, CamouflageSegmenter)
    run.state.model.set_backbone_frozen(stage.freeze_backbone)
    loader = training_loader(
        *(run.data.train_pairs, 64, stage.batch_size, run.settings.seed),
        num_workers=0, pin_memory=False, window_size=stage.batch_size * stage.accumulation_steps,
    )  # fmt: skip
    train_epoch(run, stage, loader)
    return collector.collected


def compute_in_double(run: Run) -> None:
    """Compute in float64, where two orders of summation differ by 1e-14.

    In float32, rounding puts some activations on the other side of a ReLU's kink, with another gradient: 4e-4 of the
    norm, depending on the kernels that processor and torch choose.
    """
    run.state.model.double()
    run.state.model.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(), *inputs[1:]))
    run.state.ema = None  # the average stays float32, and nothing here is applied


def assert_same_gradients(gradients: list[Tensor], expected: list[Tensor]) -> None:
    """Compare to 1e-9 of the norm: a batch with a wrong weight changes more than a hundredth of it."""
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float64
        assert (gradient - reference).norm() <= 1e-9 * torch.nn.utils.get_total_norm(expected)


def test_gradients_are_clipped_to_the_norm_asked_for(finished: Path) -> None:
    run = prepare_again(finished, grad_clip=0.25)
    windows = gradients_of_first_epoch(run, run.stages[0])
    assert len(windows) == 4
    for gradients in windows:
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("stage_index", [0, 1])
def test_accumulation_of_four_batches_of_two_equals_one_batch_of_eight(finished: Path, stage_index: int) -> None:
    """20 images are two windows of 8 and a short one of 4."""
    run = prepare_again(finished, grad_clip=1e9)
    compute_in_double(run)
    assert len(run.data.train_pairs) == 20
    stage = run.stages[stage_index]
    run.state.model.freeze_norm_statistics = True  # type: ignore[assignment]  # batch statistics differ by design
    by_shape = {}
    for batch_size, steps in ((8, 1), (2, 4), (4, 2)):
        shaped = dataclasses.replace(stage, batch_size=batch_size, accumulation_steps=steps)
        run.state.progress.epoch, run.state.progress.window = shaped.first_epoch, 0
        by_shape[batch_size, steps] = gradients_of_first_epoch(run, shaped)
    assert [len(gradients) for gradients in by_shape.values()] == [3, 3, 3]
    for shape in ((2, 4), (4, 2)):
        for window, reference in zip(by_shape[shape], by_shape[8, 1], strict=True):
            assert_same_gradients(window, reference)


def test_short_last_batch_counts_by_its_samples(finished: Path) -> None:
    """20 images in batches of 3, seven to a window: the last batch has 2 and must not weigh like one of 3."""
    run = prepare_again(finished, grad_clip=1e9)
    compute_in_double(run)
    gradients = {}
    for batch_size, steps in ((20, 1), (3, 7)):
        stage = dataclasses.replace(run.stages[0], batch_size=batch_size, accumulation_steps=steps)
        run.state.progress.window = 0
        (gradients[batch_size],) = gradients_of_first_epoch(run, stage)
    assert_same_gradients(gradients[3], gradients[20])


def at_scale(stages: Sequence[Stage], scale: float) -> list[Stage]:
    """Return the stages with another loss scale to start from."""
    return [dataclasses.replace(stage, scaler=ScalerSettings(init_scale=scale)) for stage in stages]


def bare_loop_that_raises(run: Run, stage: Stage) -> tuple[int, int]:
    """Run the usual loop, with ``error_if_nonfinite``. Return the epoch and window at which it dies."""
    model, optimizer = run.state.model, torch.optim.AdamW(run.state.model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=stage.scaler.init_scale)
    loader = training_loader(
        run.data.train_pairs, 64, stage.batch_size, run.settings.seed, num_workers=0, pin_memory=False
    )
    for window, batch in enumerate(loader, start=1):
        images, masks = to_device(batch, torch.device("cpu"), torch.channels_last)
        with run.machine.precision.autocast():
            outputs = model(images)
        scaler.scale(deep_supervision_loss(outputs, masks, torch.tensor(0.0))).backward()
        scaler.unscale_(optimizer)
        try:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        except RuntimeError:
            return 1, window
        scaler.step(optimizer)
        scaler.update()
    raise AssertionError("no window overflowed")


def test_fp16_overflow_is_survived_though_a_loop_that_raises_would_have_died(finished: Path) -> None:
    """A scale of 2^24 really overflows, on the CPU, in both stages: windows are skipped until the scale fits."""
    run = prepare_again(finished, precision="fp16")
    for stage in at_scale(run.stages, 2.0**24):
        run_stage(run, stage)
    windows = read_events(run.folder.path, "window")
    overflows = [window for window in windows if window["verdict"] == "overflow"]
    assert overflows
    assert {window["verdict"] for window in windows} == {"overflow", "applied"}
    assert sum(event["overflows"] for event in read_events(run.folder.path, "epoch")) == len(overflows)
    assert all(torch.isfinite(value).all() for value in run.state.model.state_dict().values())
    bare = prepare_again(finished, precision="fp16")
    raises_at = bare_loop_that_raises(bare, at_scale(bare.stages, 2.0**24)[0])
    assert raises_at == (overflows[0]["epoch"], overflows[0]["window"]) == (1, 1)


@pytest.mark.parametrize("policy", ["skip", "clip", "off"])
def test_a_spike_is_skipped_and_reported_and_leaves_no_trace(
    tiny_argv: Argv, tmp_path: Path, caplog: pytest.LogCaptureFixture, policy: str
) -> None:
    """A loss 10,000 times too high in epoch 2, window 3: finite, and far above everything before."""
    calls = 0

    def spiking(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return deep_supervision_loss(*args) * (1e4 if calls in (17, 18, 19) else 1)

    moments: list[dict[str, Any]] = []  # before and after each step

    def watch(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        moments.append(copy.deepcopy(optimizer.state_dict()["state"]))

    run = prepare_run(tiny_argv("--spike-policy", policy, "--epochs", "2"), loss=spiking)
    run.state.optimizer.register_step_pre_hook(watch)
    run.state.optimizer.register_step_post_hook(watch)
    with caplog.at_level(logging.INFO, logger="train_ultimate"):
        train_ultimate.train(run)
    run.folder.store.wait()
    windows = read_events(tmp_path / "run", "window")
    assert windows[6]["grad_norm"] > 1000
    skips = policy == "skip"
    assert [window["verdict"] for window in windows] == ["applied"] * 6 + ["spike" if skips else "applied", "applied"]
    assert ("Epoch 2, window 3: spike; skipped. See" in caplog.text) == skips
    assert len(moments) == 2 * len(windows)
    assert (differing_tensors(moments[12], moments[13]) == []) == skips
    assert read_events(tmp_path / "run", "epoch")[1]["skipped"] == int(skips)
    updates = read_checkpoint(tmp_path / "run" / "epoch_0002.pth")["ema"]["num_updates"]
    assert updates == (7 if skips else 8)


def test_average_takes_in_applied_windows_only(finished: Path) -> None:
    run = prepare_again(finished, precision="fp16")
    run_stage(run, at_scale(run.stages, 2.0**24)[0])
    applied = [window for window in read_events(run.folder.path, "window") if window["verdict"] == "applied"]
    assert run.state.ema is not None
    assert run.state.ema.num_updates == len(applied) < 8
