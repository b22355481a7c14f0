"""train_ultimate.py: whole runs on a tiny data set, and what a user sees when something is wrong."""

import copy
import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import SHARED, Argv, SignalAt, differing_tensors, needs_shared, tiny_arguments
from launching import read_events
from PIL import Image
from safetensors.torch import save_file
from test_metrics import assert_equals_reference
from torch import Tensor
from torch.utils.data import DataLoader

import train_ultimate
import training.window as window_module
from data.dataset import Batch
from data.loading import to_device, training_loader, validation_loader
from losses import deep_supervision_loss
from models.backbone import Backbone, build_backbone
from models.network import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.machine import ScalerSettings
from train_ultimate import main, run_stage, train_epoch
from training import setup as builders
from training.run import Run
from training.setup import prepare
from training.stages import Stage

SCRIPT = Path(train_ultimate.__file__)


def final_state(directory: Path, name: str = "epoch_0004.pth") -> dict[str, Any]:
    """What a resumed run must share with an undisturbed one, bit for bit. Not the best score: that is the folder's."""
    state = read_checkpoint(directory / name)
    for key in ("config", "epoch_stats"):
        del state[key]
    for key in ("best_iou", "best_epoch"):
        del state["progress"][key]
    return state


@pytest.fixture(scope="module")
def finished(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoint directory of an undisturbed run of two stages."""
    directory = tmp_path_factory.mktemp("finished")
    assert main(tiny_arguments(tiny_dataset, directory, "--keep-checkpoints", "9")) == 0
    return directory


# What a run leaves behind


def test_run_leaves_the_files_and_events_of_the_design(finished: Path) -> None:
    epochs = [f"epoch_{epoch:04d}.pth" for epoch in range(1, 5)]
    expected = ["best_model.pth", "config.json", *epochs, "metrics.jsonl", "report.html", "tensorboard"]
    assert sorted(path.name for path in finished.iterdir()) == expected
    events = read_events(finished, "epoch")
    assert [(event["stage"], event["epoch"]) for event in events] == [(1, 1), (1, 2), (2, 3), (2, 4)]
    for event in events:
        assert event["images_per_second"] == pytest.approx(20 / event["seconds"])
    assert set(events[0]) >= {
        *("stage", "epoch", "loss", "iou", "dice", "mae", "s_measure", "grad_norm_avg", "grad_norm_max", "lr"),
        *("backbone_lr", "images_per_second", "skipped", "overflows", "seconds"),
    }
    windows = read_events(finished, "window")
    assert [window["window"] for window in windows] == [1, 2, 3, 4] * 4
    assert {window["verdict"] for window in windows} == {"applied"}
    assert read_events(finished, "run_end")[0]["exit_code"] == 0


def test_config_tells_settings_versions_and_data(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["lr"] == 0.002
    assert config["precision"] == "fp32"
    assert config["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch("[0-9a-f]{16}", config["data"])


def scripted_validation(monkeypatch: pytest.MonkeyPatch, *ious: float) -> None:
    """Validation that returns these IoUs, epoch by epoch."""
    left = iter(ious)

    def scripted(run: Run, loader: Any) -> dict[str, float]:
        return dict.fromkeys(("iou", "dice", "mae", "s_measure"), next(left))

    monkeypatch.setattr(train_ultimate, "validate", scripted)


def test_best_model_is_the_epoch_of_best_iou_and_nan_is_never_best(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_validation(monkeypatch, 0.2, 0.5, float("nan"), 0.4)
    assert main(tiny_argv("--keep-checkpoints", "9")) == 0
    directory = tmp_path / "run"
    progress = read_checkpoint(directory / "best_model.pth")["progress"]
    assert (progress["best_epoch"], progress["best_iou"], progress["epoch"]) == (2, 0.5, 2)
    assert differing_tensors(final_state(directory, "best_model.pth"), final_state(directory, "epoch_0002.pth")) == []


def test_validation_uses_the_averaged_weights_and_images_that_are_not_trained_on(finished: Path) -> None:
    run = prepare_again(finished)
    assert not {pair.image for pair in run.train_pairs} & {pair.image for pair in run.val_pairs}
    seen: list[int] = []
    assert run.state.ema is not None
    run.state.ema.module.register_forward_hook(lambda *_: seen.append(1))
    run.state.model.register_forward_hook(lambda *_: seen.append(2))
    loader = validation_loader(run.val_pairs, 64, 2, num_workers=0, pin_memory=False)
    scores = train_ultimate.validate(run, loader)
    assert set(seen) == {1}
    with torch.no_grad():
        images, masks = to_device(next(iter(loader)), run.device, run.memory_format)
        probabilities = run.state.ema.module.eval()(images)[-1].sigmoid()
    assert scores["mae"] == pytest.approx((probabilities - masks).abs().mean().item(), abs=1 / 510)  # 8 bits


def test_network_whose_output_is_not_finite_has_no_score(finished: Path) -> None:
    run = prepare_again(finished, ema_decay=0)
    run.state.model.register_forward_hook(lambda _module, _inputs, outputs: [outputs[-1] * torch.nan])
    loader = validation_loader(run.val_pairs, 64, 2, num_workers=0, pin_memory=False)
    assert all(math.isnan(score) for score in train_ultimate.validate(run, loader).values())


def test_validation_loader_is_given_the_validation_pairs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_again(finished)
    validated: list[int] = []

    def record(_: Run, loader: DataLoader[Batch]) -> dict[str, float]:
        validated.append(loader.dataset.pairs == run.val_pairs)  # type: ignore[attr-defined]
        return dict.fromkeys(("iou", "dice", "mae", "s_measure"), 0.5)

    monkeypatch.setattr(train_ultimate, "validate", record)
    run_stage(run, run.stages[0])
    assert validated == [True, True]


def test_epoch_lines_have_the_agreed_form(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(tiny_argv("--epochs", "1", "--stage1-epochs", "1", "--grad-clip", "0.0001")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Loss: \d\.\d{4} \| IoU: 0\.\d{4} \| Dice: 0\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^   Gradient norm - Avg: \d+\.\d{3}, Max: \d+\.\d{3}$", out, re.MULTILINE)
    assert "Warning: 4 of 4 windows had a gradient norm above 5 x --grad-clip = 0.0005" in out
    assert re.search(r"^Done: validation IoU 0\.\d{4}, reached at epoch 1$", out, re.MULTILINE)


def test_stage_two_alone_and_stage_one_alone(tiny_argv: Argv, tmp_path: Path) -> None:
    for epochs, expected in ((0, [2]), (1, [1])):
        directory = tmp_path / str(epochs)
        argv = tiny_argv("--epochs", "1", "--stage1-epochs", str(epochs), checkpoint_dir=directory)
        assert main(argv) == 0
        assert [event["stage"] for event in read_events(directory, "epoch")] == expected


# Stages and learning rates


def test_frozen_means_frozen(finished: Path) -> None:
    """After stage 1 every backbone parameter and buffer is bitwise what it was; this backbone has BatchNorm."""
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


def prepare_again(directory: Path, **changes: Any) -> Run:
    """A fresh run with the settings of a finished one, not resumed."""
    settings = {**json.loads((directory / "config.json").read_text())["settings"], **changes}
    fresh = directory.parent / f"{directory.name}-again-{time.monotonic_ns()}"
    flags = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if name in ("command", "resume", "checkpoint_dir", "drill") or value is None:
            continue
        switch = flag if value else "--no-" + flag[2:]
        values = value if isinstance(value, list) else [value]
        flags += [switch] if isinstance(value, bool) else [flag, *map(str, values)]
    return prepare(["train", *flags, "--checkpoint-dir", str(fresh)])


def test_backbone_learns_at_a_tenth_of_the_decoders_rate_in_every_window(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[tuple[int, float, float]] = []
    run = prepare_again(finished)
    original = train_ultimate.gated_step

    def recording(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        lr = {group["part"]: group["lr"] for group in optimizer.param_groups}
        rates.append((run.state.progress.stage, lr["decoder"], lr["backbone"]))
        original(optimizer, skip)

    monkeypatch.setattr(train_ultimate, "gated_step", recording)
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


# Windows


def test_gradients_are_clipped_to_the_norm_asked_for(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare_again(finished, grad_clip=0.25)
    for gradients in gradients_of_first_epoch(run, run.stages[0], monkeypatch):
        assert torch.nn.utils.get_total_norm(gradients).item() == pytest.approx(0.25, rel=1e-3)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_have_the_memory_format_asked_for(finished: Path, channels_last: bool) -> None:
    run = prepare_again(finished, channels_last=channels_last)
    weight = run.state.model.get_parameter("decoder.blocks.3.head.weight")
    assert weight.shape == (1, 16, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_deterministic_asks_torch_for_it(finished: Path) -> None:
    try:
        prepare_again(finished, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def gradients_of_first_epoch(run: Run, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """Gradients, clipped by nothing, of each window of one epoch in which no update is applied."""
    collected: list[list[Tensor]] = []

    def collect(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        collected.append([parameter.grad.clone() for parameter in parameters if parameter.grad is not None])

    monkeypatch.setattr(train_ultimate, "gated_step", collect)
    run.state.model.set_backbone_frozen(stage.freeze_backbone)  # type: ignore[operator]
    loader = training_loader(
        *(run.train_pairs, 64, stage.batch_size, run.args.seed),
        num_workers=0, pin_memory=False, window_size=stage.batch_size * stage.accumulation_steps,
    )  # fmt: skip
    train_epoch(run, stage, loader)
    return collected


def compute_in_double(run: Run) -> None:
    """In float32, rounding puts some activations on the other side of a ReLU's kink, with another gradient: 4e-4 of the
    norm, by the kernels that the processor and torch choose. In float64 two orders of summation differ by 1e-14.
    """
    run.state.model.double()
    run.state.model.register_forward_pre_hook(lambda _module, inputs: (inputs[0].double(), *inputs[1:]))
    run.state.ema = None  # the average stays float32, and nothing here is applied


def assert_same_gradients(gradients: list[Tensor], expected: list[Tensor]) -> None:
    """To 1e-9 of the norm: a batch weighed wrongly changes more than a hundredth of it."""
    for gradient, reference in zip(gradients, expected, strict=True):
        assert gradient.dtype == torch.float64
        assert (gradient - reference).norm() <= 1e-9 * torch.nn.utils.get_total_norm(expected)


@pytest.mark.parametrize("stage_index", [0, 1])
def test_accumulation_of_four_batches_of_two_equals_one_batch_of_eight(
    finished: Path, monkeypatch: pytest.MonkeyPatch, stage_index: int
) -> None:
    """20 images are two windows of 8 and a short one of 4."""
    run = prepare_again(finished, grad_clip=1e9)
    compute_in_double(run)
    assert len(run.train_pairs) == 20
    stage = run.stages[stage_index]
    run.state.model.freeze_norm_statistics = True  # type: ignore[assignment]  # batch statistics differ by design
    by_shape = {}
    for batch_size, steps in ((8, 1), (2, 4), (4, 2)):
        shaped = dataclasses.replace(stage, batch_size=batch_size, accumulation_steps=steps)
        run.state.progress.epoch, run.state.progress.window = shaped.first_epoch, 0
        by_shape[batch_size, steps] = gradients_of_first_epoch(run, shaped, monkeypatch)
    assert [len(gradients) for gradients in by_shape.values()] == [3, 3, 3]
    for shape in ((2, 4), (4, 2)):
        for window, reference in zip(by_shape[shape], by_shape[8, 1], strict=True):
            assert_same_gradients(window, reference)


def test_short_last_batch_counts_by_its_samples(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 images in batches of 3, seven to a window: the last batch has 2 and must not weigh like one of 3."""
    run = prepare_again(finished, grad_clip=1e9)
    compute_in_double(run)
    gradients = {}
    for batch_size, steps in ((20, 1), (3, 7)):
        stage = dataclasses.replace(run.stages[0], batch_size=batch_size, accumulation_steps=steps)
        run.state.progress.window = 0
        (gradients[batch_size],) = gradients_of_first_epoch(run, stage, monkeypatch)
    assert_same_gradients(gradients[3], gradients[20])


# Resume


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_epoch_boundary_resume_ends_in_bitwise_the_same_weights(finished: Path, tmp_path: Path, boundary: int) -> None:
    """Killed after an epoch of stage 1, at the border of the stages, and in stage 2."""
    shutil.copy(finished / f"epoch_{boundary:04d}.pth", tmp_path)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path)]) == 0
    assert differing_tensors(final_state(tmp_path), final_state(finished)) == []
    resumed = {event["epoch"]: event for event in read_events(tmp_path, "epoch")}
    for event in read_events(finished, "epoch")[boundary:]:
        again = resumed[event["epoch"]]
        assert all(again[key] == event[key] for key in ("loss", "iou", "lr", "backbone_lr", "grad_norm_avg"))


def test_resume_with_workers_in_another_number_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    assert main(["train", "--resume", str(tmp_path / "epoch_0003.pth"), "--num-workers", "2"]) == 0
    assert differing_tensors(final_state(tmp_path), final_state(finished)) == []


def test_windows_at_several_scales_come_again_after_a_resume(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[set[int]] = [set(), set()]
    forward = Backbone.forward

    def watched(self: Backbone, images: Tensor) -> list[Tensor]:
        seen[self.training].add(images.shape[-1])
        return forward(self, images)

    monkeypatch.setattr(Backbone, "forward", watched)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(tiny_argv("--multi-scale", "0.5", "1", "1.5", "--stage1-epochs", "0", checkpoint_dir=whole)) == 0
    assert seen[True] == {32, 64, 96}
    cut.mkdir()
    shutil.copy(whole / "epoch_0003.pth", cut)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    assert differing_tensors(final_state(cut), final_state(whole)) == []


def test_frozen_levels_keep_their_weights_and_a_resumed_run_keeps_them_frozen(tiny_argv: Argv, tmp_path: Path) -> None:
    pretrained = build_backbone("test_efficientnet", pretrained=False, weights_file=None, img_size=64).body.state_dict()
    save_file(pretrained, tmp_path / "weights.safetensors")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ("--pretrained", "--backbone-weights", str(tmp_path / "weights.safetensors"), "--frozen-levels", "1")
    assert main(tiny_argv(*flags, checkpoint_dir=whole)) == 0
    cut.mkdir()
    shutil.copy(whole / "epoch_0003.pth", cut)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    assert differing_tensors(final_state(cut), final_state(whole)) == []
    trained = final_state(whole)["model"]
    same = {name for name, weight in pretrained.items() if torch.equal(trained[f"backbone.body.{name}"], weight)}
    assert {"conv_stem.weight", "bn1.weight", "bn1.running_mean", "blocks.1.0.conv_pwl.weight"} <= same
    assert not {"blocks.2.0.conv_exp.weight", "blocks.2.0.bn2.bias", "blocks.4.0.bn2.bias"} & same


def test_fp16_resume_brings_back_the_scale_and_bf16_resume_is_bitwise(tiny_argv: Argv, tmp_path: Path) -> None:
    for precision in ("fp16", "bf16"):
        whole, cut = tmp_path / f"{precision}-whole", tmp_path / f"{precision}-cut"
        flags = ("--precision", precision, "--keep-checkpoints", "9")
        assert main(tiny_argv(*flags, checkpoint_dir=whole)) == 0
        cut.mkdir()
        shutil.copy(whole / "epoch_0003.pth", cut)
        assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
        assert differing_tensors(final_state(cut), final_state(whole)) == []


def test_stage_two_begins_with_its_own_scaler_also_when_resumed_at_the_border(tiny_argv: Argv, tmp_path: Path) -> None:
    assert main(tiny_argv("--precision", "fp16", "--epochs", "3", "--keep-checkpoints", "9")) == 0
    run_dir, cut = tmp_path / "run", tmp_path / "cut"
    assert read_checkpoint(run_dir / "epoch_0002.pth")["scaler"]["scale"] == 2.0**12
    cut.mkdir()
    shutil.copy(run_dir / "epoch_0002.pth", cut)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    for directory in (run_dir, cut):
        scaler = read_checkpoint(directory / "epoch_0003.pth")["scaler"]
        assert scaler["scale"] <= 2.0**10
        assert (scaler["growth_factor"], scaler["growth_interval"]) == (1.5, 1000)


def test_flags_beside_resume_win_and_are_printed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    argv = ["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path), "--lr", "0.001", "--weight-decay", "0.5"]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "lr: 0.002 -> 0.001" in out
    assert read_events(tmp_path, "window")[0]["lr"] <= 0.0005
    groups = read_checkpoint(tmp_path / "epoch_0004.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}


def test_epoch_under_way_goes_on_at_the_same_sample_when_the_window_changes(tiny_argv: Argv, tmp_path: Path) -> None:
    """Stopped after 6 of 20 images; at 2 to a window instead of 6, the epoch has 7 windows left."""
    with pytest.MonkeyPatch.context() as patch:
        SignalAt(patch, "gated_step", 1)
        assert main(tiny_argv()) == 143
    argv = ["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run"), "--accumulation-steps", "1"]
    assert main(argv) == 0
    first_epoch = [window for window in read_events(tmp_path / "run", "window") if window["epoch"] == 1]
    assert [window["window"] for window in first_epoch] == [1, *range(4, 11)]


def test_resume_auto_in_an_empty_folder_starts_from_the_beginning(
    tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    """So that one command line serves the first start and every restart of a pre-emptible job."""
    assert main(tiny_argv("--epochs", "1", "--stage1-epochs", "1", "--resume", "auto")) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_a_finished_run_says_so(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(finished / "epoch_0004.pth", tmp_path)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path)]) == 0
    assert "All 4 epochs are done already" in capsys.readouterr().out


def test_going_back_to_an_older_epoch_sets_the_later_ones_aside(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2, 3):
        shutil.copy(finished / f"epoch_{epoch:04d}.pth", tmp_path)
    assert main(["train", "--resume", str(tmp_path / "epoch_0001.pth"), "--epochs", "2"]) == 0
    assert (tmp_path / "epoch_0003.pth.superseded").exists()
    assert "further on than the checkpoint being resumed" in capsys.readouterr().out


def test_what_goes_back_does_not_touch_the_best_of_the_branch_it_gives_up(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"
    scripted_validation(monkeypatch, 0.2, 0.3, 0.6, 0.5)
    assert main(tiny_argv("--keep-checkpoints", "9")) == 0
    scripted_validation(monkeypatch, 0.1)
    assert main(["train", "--resume", str(directory / "epoch_0001.pth"), "--epochs", "2"]) == 0
    assert read_checkpoint(directory / "best_model.pth.superseded")["progress"]["best_iou"] == 0.6
    assert read_checkpoint(directory / "best_model.pth")["progress"]["best_iou"] == 0.1
    scripted_validation(monkeypatch, 0.1, 0.1)
    assert main(["train", "--resume", str(directory / "epoch_0001.pth"), "--epochs", "3"]) == 0
    assert (directory / "epoch_0002.pth.superseded-2").exists()


def test_going_on_in_another_folder_leaves_a_best_model_there(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert main(["train", "--resume", str(finished / "epoch_0003.pth"), "--checkpoint-dir", str(other)]) == 0
    assert (other / "best_model.pth").exists()


def test_validation_images_stay_the_same_when_a_file_is_gone(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_dataset, root)
    assert main(tiny_argv("--dataset-path", str(root), "--epochs", "1", "--stage1-epochs", "1")) == 0
    directory = tmp_path / "run"
    validation = json.loads((directory / "config.json").read_text())["validation"]
    training = {f"TrainDataset/Imgs/scene_{index:05d}.jpg" for index in range(22)} - set(validation)
    (root / min(training)).unlink()
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(directory), "--epochs", "2"]) == 0
    assert json.loads((directory / "config.json").read_text())["validation"] == validation
    assert "files were added, removed, changed or excluded" in capsys.readouterr().out


def test_only_damaged_checkpoints_are_not_mistaken_for_none(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_0001.pth").write_bytes(b"")
    assert "not one checkpoint is intact" in failing(tiny_argv("--resume", "auto"), capsys)
    (tmp_path / "run" / "epoch_0001.pth").rename(tmp_path / "run" / "foreign.pth")
    assert main(tiny_argv("--resume", "auto", "--epochs", "1", "--stage1-epochs", "1")) == 0


def test_another_number_format_on_resume_is_told(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path), "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "precision in use: fp32 -> bf16" in out
    assert "Device: cpu" in out


def start(argv: list[str], log: Path) -> "subprocess.Popen[bytes]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # as many as the reference has: sums depend on it
    with open(log, "ab") as file:
        command = [sys.executable, str(SCRIPT), *argv]
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[bytes]", timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert process.poll() is None, "the run ended before it could be interrupted"
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.fixture(scope="module")
def undisturbed(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in a process of its own, to compare with interrupted ones."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert start(tiny_arguments(tiny_dataset, directory / "run"), directory / "log").wait(120) == 0
    return directory / "run"


@pytest.mark.slow
def test_killed_with_9_and_resumed_ends_in_the_same_weights(undisturbed: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    directory, log = tmp_path / "killed", tmp_path / "log"
    for after_epoch in (1, 3):
        process = start(tiny_argv("--resume", "auto", checkpoint_dir=directory), log)
        wait_until((directory / f"epoch_{after_epoch:04d}.pth").exists, process)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert start(["train", "--resume", "auto", "--checkpoint-dir", str(directory)], log).wait(120) == 0
    assert differing_tensors(final_state(directory), final_state(undisturbed)) == []


@pytest.mark.parametrize(
    ("signal_number", "exit_code", "after_epoch"),
    [pytest.param(signal.SIGINT, 130, 1, marks=pytest.mark.slow), (signal.SIGTERM, 143, 2)],
)
def test_signal_to_the_process_group_saves_and_exits_and_the_resumed_run_is_bitwise_the_same(
    undisturbed: Path, tiny_argv: Argv, tmp_path: Path, signal_number: int, exit_code: int, after_epoch: int
) -> None:
    """As a terminal, ``timeout`` and Slurm send it: to the loader's workers, too. Once in each stage."""
    directory, log = tmp_path / "stopped", tmp_path / "stopped.log"
    process = start(tiny_argv("--num-workers", "1", checkpoint_dir=directory), log)
    wait_until((directory / f"epoch_{after_epoch:04d}.pth").exists, process)
    os.killpg(process.pid, signal_number)
    assert process.wait(60) == exit_code
    text = log.read_text()
    assert "Traceback" not in text
    assert "Go on with: python" in text
    assert list(directory.glob("step_*.pth"))
    assert start(["train", "--resume", "auto", "--checkpoint-dir", str(directory)], log).wait(120) == 0
    assert differing_tensors(final_state(directory), final_state(undisturbed)) == []


@pytest.mark.parametrize(
    ("name", "call"),
    [("gated_step", 2), ("gated_step", 8), ("gated_step", 9), ("gated_step", 10), ("gated_step", 12), ("validate", 1)],
    ids=["stage 1", "end of stage 1", "start of stage 2", "stage 2", "end of an epoch", "validation"],
)
def test_stopped_anywhere_the_resumed_run_is_bitwise_the_same(
    finished: Path, tiny_argv: Argv, tmp_path: Path, name: str, call: int
) -> None:
    """Stage 2 trains BatchNorm here, whose statistics have moved on by the time a window is settled."""
    with pytest.MonkeyPatch.context() as patch:
        SignalAt(patch, name, call)
        assert main(tiny_argv()) == 143
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert differing_tensors(final_state(tmp_path / "run"), final_state(finished)) == []
    resumed = {event["epoch"]: event for event in read_events(tmp_path / "run", "epoch")}
    for event in read_events(finished, "epoch"):
        assert all(resumed[event["epoch"]][key] == event[key] for key in ("loss", "lr", "backbone_lr", "mae"))


def test_second_signal_stops_at_once(tiny_argv: Argv, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(*args: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on after the second signal")

    monkeypatch.setattr(window_module, "deep_supervision_loss", twice)
    assert main(tiny_argv()) == 130


# Numbers that are not finite


def with_scale(run: Run, scale: float) -> Run:
    run.stages = [dataclasses.replace(stage, scaler=ScalerSettings(init_scale=scale)) for stage in run.stages]
    return run


def test_fp16_overflow_is_survived_where_a_loop_that_raises_would_have_died(finished: Path) -> None:
    """A scale of 2^24 overflows for real, on the CPU, in both stages: windows are skipped until the scale fits."""
    run = with_scale(prepare_again(finished, precision="fp16"), 2.0**24)
    for stage in run.stages:
        run_stage(run, stage)
    windows = read_events(run.store.directory, "window")
    overflows = [window for window in windows if window["verdict"] == "overflow"]
    assert overflows
    assert {window["verdict"] for window in windows} == {"overflow", "applied"}
    assert sum(event["overflows"] for event in read_events(run.store.directory, "epoch")) == len(overflows)
    assert all(torch.isfinite(value).all() for value in run.state.model.state_dict().values())
    raises_at = bare_loop_that_raises(with_scale(prepare_again(finished, precision="fp16"), 2.0**24))
    assert raises_at == (overflows[0]["epoch"], overflows[0]["window"]) == (1, 1)


@pytest.mark.parametrize("policy", ["skip", "clip", "off"])
def test_spike_is_skipped_told_and_leaves_no_trace(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], policy: str
) -> None:
    """A loss 10,000 times too high in epoch 2, window 3: finite, and far above everything before."""
    calls = 0

    def spiking(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return deep_supervision_loss(*args) * (1e4 if calls in (17, 18, 19) else 1)

    states: list[dict[str, Any]] = []
    original = train_ultimate.gated_step

    def watch(optimizer: torch.optim.Optimizer, skip: Tensor) -> None:
        states.append(copy.deepcopy(optimizer.state_dict()["state"]))
        original(optimizer, skip)
        states.append(copy.deepcopy(optimizer.state_dict()["state"]))

    monkeypatch.setattr(window_module, "deep_supervision_loss", spiking)
    monkeypatch.setattr(train_ultimate, "gated_step", watch)
    assert main(tiny_argv("--spike-policy", policy, "--epochs", "2")) == 0
    windows = read_events(tmp_path / "run", "window")
    assert windows[6]["grad_norm"] > 1000
    skips = policy == "skip"
    assert [window["verdict"] for window in windows] == ["applied"] * 6 + ["spike" if skips else "applied", "applied"]
    assert ("Epoch 2, window 3: spike; skipped. See" in capsys.readouterr().out) == skips
    assert (differing_tensors(states[12], states[13]) == []) == skips
    assert read_events(tmp_path / "run", "epoch")[1]["skipped"] == int(skips)
    updates = read_checkpoint(tmp_path / "run" / "epoch_0002.pth")["ema"]["num_updates"]
    assert updates == (7 if skips else 8)


def test_average_takes_in_applied_windows_only(finished: Path) -> None:
    run = with_scale(prepare_again(finished, precision="fp16"), 2.0**24)
    run_stage(run, run.stages[0])
    applied = [window for window in read_events(run.store.directory, "window") if window["verdict"] == "applied"]
    assert run.state.ema is not None
    assert run.state.ema.num_updates == len(applied) < 8


def bare_loop_that_raises(run: Run) -> tuple[int, int]:
    """The usual loop, with ``error_if_nonfinite``: returns (epoch, window) at which it dies."""
    stage = run.stages[0]
    model, optimizer = run.state.model, torch.optim.AdamW(run.state.model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=stage.scaler.init_scale)
    loader = training_loader(run.train_pairs, 64, stage.batch_size, run.args.seed, num_workers=0, pin_memory=False)
    for window, batch in enumerate(loader, start=1):
        images, masks = to_device(batch, torch.device("cpu"), torch.channels_last)
        with run.precision.autocast():
            outputs = model(images)
        scaler.scale(deep_supervision_loss(outputs, masks, 0.0)).backward()
        scaler.unscale_(optimizer)
        try:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5, error_if_nonfinite=True)
        except RuntimeError:
            return 1, window
        scaler.step(optimizer)
        scaler.update()
    raise AssertionError("no window overflowed")


# Memory


def limit_memory(monkeypatch: pytest.MonkeyPatch, images: int) -> None:
    """Networks that run out of memory when they train on more images at once. No CPU raises torch's error."""
    original = builders.build_network

    def refuse(model: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        if model.training and len(inputs[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory")

    def build(*args: Any, **options: Any) -> CamouflageSegmenter:
        model = original(*args, **options)
        model.register_forward_pre_hook(refuse)
        return model

    monkeypatch.setattr(builders, "build_network", build)


def test_run_that_does_not_fit_goes_on_in_smaller_batches_with_the_same_effective_batch(
    finished: Path, tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 2)
    assert main(tiny_argv("--batch-size", "6", "--accumulation-steps", "1")) == 0
    assert capsys.readouterr().out.count("Out of memory: each batch goes through in") == 2  # 6, 3, 2
    ours, fits = (read_events(directory, "window") for directory in (tmp_path / "run", finished))
    assert {entry["verdict"] for entry in ours} == {"applied"}
    for first, second in zip(ours[:8], fits[:8], strict=True):  # stage 1: no statistics of batches
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)


def test_gradient_checkpointing_gives_the_same_run_bitwise(finished: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """Statistics of BatchNorm, which learns in stage 2 of these runs, included."""
    assert main(tiny_argv("--gradient-checkpointing")) == 0
    assert differing_tensors(final_state(tmp_path / "run"), final_state(finished)) == []


def test_zoomed_run_resumes_bitwise_and_its_checkpoint_is_evaluated(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    assert main(tiny_argv("--zoom", "--epochs", "2", "--stage1-epochs", "1")) == 0
    whole = final_state(tmp_path / "run", "epoch_0002.pth")
    assert any(name.startswith("zoom.") for name in whole["model"])
    assert main(["train", "--resume", str(tmp_path / "run" / "epoch_0001.pth")]) == 0
    assert differing_tensors(final_state(tmp_path / "run", "epoch_0002.pth"), whole) == []
    checkpoint = str(tmp_path / "run" / "best_model.pth")
    assert main(["evaluate", "--checkpoint", checkpoint, "--dataset-path", str(tiny_dataset)]) == 0


def test_run_that_fits_in_no_way_is_told_what_needs_less(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limit_memory(monkeypatch, 0)
    assert main(tiny_argv()) == 1
    error = capsys.readouterr().err
    assert "out of memory with the smallest batches; --gradient-checkpointing, a smaller --img-size" in error
    assert "Traceback" not in error
    assert len(list((tmp_path / "run").glob("step_*.pth"))) == 1


# What a user gets wrong


def failing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake is answered with."""
    assert main(argv) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


def test_wrong_path_and_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = failing(["train", "--dataset-path", str(tmp_path / "nowhere")], capsys)
    assert "no such folder; --dataset-path must name" in nowhere
    assert "no image/mask folders found" in failing(["train", "--dataset-path", str(tmp_path)], capsys)


def test_missing_masks(tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(tiny_dataset / "TrainDataset", tmp_path / "TrainDataset")
    for mask in (tmp_path / "TrainDataset" / "GT").iterdir():
        mask.unlink()
    assert "22 images in TrainDataset and not one has a mask" in failing(
        ["train", "--dataset-path", str(tmp_path)], capsys
    )


def test_bad_numbers(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size: must be at least 1" in failing(["train", "--dataset-path", "x", "--batch-size", "0"], capsys)
    assert "--stage1-epochs 200 is more" in failing(["train", "--dataset-path", "x", "--stage1-epochs", "200"], capsys)


def test_resume_of_a_text_file_and_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("hello")
    assert "notes.pth: not a checkpoint" in failing(["train", "--resume", str(text)], capsys)
    assert "no such file" in failing(["train", "--resume", str(tmp_path / "nowhere.pth")], capsys)


def test_a_second_run_does_not_overwrite_the_first(
    finished: Path, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    assert "holds a run already" in failing(tiny_argv(checkpoint_dir=finished), capsys)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


def test_unknown_backbone(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert "did you mean" in failing(tiny_argv("--backbone", "resnet5"), capsys)


def test_command_is_needed_and_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in failing([], capsys)
    for argv, expected in (
        (["--help"], "demo"),
        (["train", "--help"], "--grad-clip"),
        (["demo", "--help"], "--epochs"),
    ):
        with pytest.raises(SystemExit) as end:
            main(argv)
        assert end.value.code == 0
        assert expected in capsys.readouterr().out


def test_an_error_of_the_program_itself_shows_its_traceback_and_the_way_on(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*args: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(train_ultimate, "validate", broken)
    assert main(tiny_argv()) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in error
    assert "--resume auto" in error
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 1


# Where augmentation is done


def test_augmented_on_the_device_a_run_sees_the_same_images_and_resumes_bitwise(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    assert main(tiny_argv("--augment-on", "device", "--keep-checkpoints", "9")) == 0
    ours, loaders = (read_events(directory, "window") for directory in (tmp_path / "run", finished))
    for first, second in zip(ours, loaders, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=0.01)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(tmp_path / "run" / "epoch_0003.pth", cut)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut), "--num-workers", "2"]) == 0
    assert differing_tensors(final_state(cut), final_state(tmp_path / "run")) == []


# Longer runs


@pytest.mark.slow
def test_compiled_run_agrees_with_one_that_is_not_and_resumes_bitwise(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last batch of each epoch is shorter than the others, and goes through as it is."""
    plain, compiled, cut = (tmp_path / name for name in ("plain", "compiled", "cut"))
    flags = ("--epochs", "2", "--stage1-epochs", "0", "--batch-size", "3", "--accumulation-steps", "2")
    assert main(tiny_argv(*flags, checkpoint_dir=plain)) == 0
    assert main(tiny_argv(*flags, "--compile", checkpoint_dir=compiled)) == 0
    assert "Compiled in" in capsys.readouterr().out
    windows = [read_events(directory, "window") for directory in (plain, compiled)]
    for first, second in zip(*windows, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    cut.mkdir()
    shutil.copy(compiled / "epoch_0001.pth", cut)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    name = "epoch_0002.pth"
    assert differing_tensors(final_state(cut, name), final_state(compiled, name)) == []


@pytest.mark.slow
def test_demo_learns_in_minutes(tmp_path: Path) -> None:
    start_time = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(SCRIPT), "demo"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert time.monotonic() - start_time < 240
    match = re.search(r"Done: validation IoU (0\.\d+)", result.stdout)
    assert match is not None
    assert float(match[1]) >= 0.60
    assert "1 skipped (1 spike); 0 rollbacks, 1 sample quarantined" in result.stdout  # the two fire drills
    (report,) = tmp_path.glob("demo-runs/*/report.html")
    assert f"Report: {report.relative_to(tmp_path)}" in result.stdout


@pytest.mark.slow
@needs_shared
def test_photographs_are_learnt_with_a_pretrained_backbone_and_scored_as_the_field_does(tmp_path: Path) -> None:
    """Two epochs of CAMO, one in each stage: nothing non-finite, and an IoU that no untrained decoder reaches.

    Then the predictions for the 124 test images, each score and curve against pysodmetrics.
    """
    camo, weights = SHARED / "data" / "CAMO", SHARED / "weights" / "tf_efficientnet_lite0.safetensors"
    argv = [
        *("train", "--dataset-path", str(camo), "--checkpoint-dir", str(tmp_path / "run")),
        *("--backbone", "tf_efficientnet_lite0", "--backbone-weights", str(weights), "--img-size", "224"),
        *("--batch-size", "8", "--accumulation-steps", "1", "--epochs", "2", "--stage1-epochs", "1"),
    ]
    assert main(argv) == 0
    assert {window["verdict"] for window in read_events(tmp_path / "run", "window")} == {"applied"}
    assert read_events(tmp_path / "run", "epoch")[-1]["iou"] > 0.45
    best, saved = str(tmp_path / "run" / "best_model.pth"), tmp_path / "predictions"
    assert main(["evaluate", "--checkpoint", best, "--dataset-path", str(camo), "--save-predictions", str(saved)]) == 0
    masks = sorted((camo / "TestDataset" / "GT").iterdir())
    assert len(masks) == 124
    for path in masks:
        with Image.open(path) as mask, Image.open(saved / "CAMO" / path.name) as prediction:
            assert_equals_reference(np.array(prediction), np.array(mask) > 128)
