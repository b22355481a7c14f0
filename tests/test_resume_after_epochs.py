"""Runs resumed from the checkpoint of an epoch end in bitwise the weights of an undisturbed run."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, final_state, signal_at_step, train
from launching import read_events
from safetensors.torch import save_file

from models import CamouflageSegmenter, build_network
from models.backbone import build_backbone


def resume(directory: Path, *flags: str, **parts: Any) -> int:
    return train(["train", "--resume", "auto", "--checkpoint-dir", str(directory), *flags], **parts)


def resume_copy(checkpoint: Path, directory: Path, *flags: str, **parts: Any) -> Path:
    """Run to the end from a copy of a checkpoint, as after a crash. Return the folder."""
    directory.mkdir(exist_ok=True)
    shutil.copy(checkpoint, directory)
    assert resume(directory, *flags, **parts) == 0
    return directory


@pytest.mark.parametrize("boundary", [1, 2, 3])
def test_resumed_after_an_epoch_a_run_ends_in_bitwise_the_same_weights(
    finished: Path, tmp_path: Path, boundary: int
) -> None:
    """Killed after an epoch of stage 1, at the border of the stages, and in stage 2."""
    resume_copy(finished / f"epoch_{boundary:04d}.pth", tmp_path)
    assert differing_tensors(final_state(tmp_path), final_state(finished)) == []
    resumed = {event["epoch"]: event for event in read_events(tmp_path, "epoch")}
    for event in read_events(finished, "epoch")[boundary:]:
        again = resumed[event["epoch"]]
        assert all(again[key] == event[key] for key in ("loss", "iou", "lr", "backbone_lr", "grad_norm_avg"))


def test_another_number_of_workers_changes_nothing(finished: Path, tmp_path: Path) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    assert train(["train", "--resume", str(tmp_path / "epoch_0003.pth"), "--num-workers", "2"]) == 0
    assert differing_tensors(final_state(tmp_path), final_state(finished)) == []


@pytest.mark.slow
def test_a_resumed_run_draws_the_same_scales_for_its_windows(tiny_argv: Argv, tmp_path: Path) -> None:
    seen: list[set[int]] = [set(), set()]

    def build(*args: Any) -> CamouflageSegmenter:
        model = build_network(*args)
        model.backbone.register_forward_pre_hook(
            lambda backbone, inputs: seen[backbone.training].add(inputs[0].shape[-1])
        )
        return model

    flags = ("--multi-scale", "0.5", "1", "1.5", "--stage1-epochs", "0")
    assert train(tiny_argv(*flags, checkpoint_dir=tmp_path / "whole"), build_network=build) == 0
    assert seen[True] == {32, 64, 96}
    cut = resume_copy(tmp_path / "whole" / "epoch_0003.pth", tmp_path / "cut")
    assert differing_tensors(final_state(cut), final_state(tmp_path / "whole")) == []


@pytest.mark.slow
def test_frozen_levels_keep_their_weights_and_a_resumed_run_keeps_them_frozen(tiny_argv: Argv, tmp_path: Path) -> None:
    pretrained = build_backbone("test_efficientnet", pretrained=False, weights=None, img_size=64).body.state_dict()
    save_file(pretrained, tmp_path / "weights.safetensors")
    whole = tmp_path / "whole"
    flags = ("--pretrained", "--backbone-weights", str(tmp_path / "weights.safetensors"), "--frozen-levels", "1")
    assert train(tiny_argv(*flags, checkpoint_dir=whole)) == 0
    cut = resume_copy(whole / "epoch_0003.pth", tmp_path / "cut")
    assert differing_tensors(final_state(cut), final_state(whole)) == []
    trained = final_state(whole)["model"]
    same = {name for name, weight in pretrained.items() if torch.equal(trained[f"backbone.body.{name}"], weight)}
    assert {"conv_stem.weight", "bn1.weight", "bn1.running_mean", "blocks.1.0.conv_pwl.weight"} <= same
    assert not {"blocks.2.0.conv_exp.weight", "blocks.2.0.bn2.bias", "blocks.4.0.bn2.bias"} & same


@pytest.mark.slow
def test_zoomed_run_resumes_bitwise_and_its_checkpoint_is_evaluated(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    assert train(tiny_argv("--zoom", "--epochs", "2", "--stage1-epochs", "1")) == 0
    whole = final_state(tmp_path / "run", "epoch_0002.pth")
    assert any(name.startswith("zoom.") for name in whole["model"])
    assert train(["train", "--resume", str(tmp_path / "run" / "epoch_0001.pth")]) == 0
    assert differing_tensors(final_state(tmp_path / "run", "epoch_0002.pth"), whole) == []
    checkpoint = str(tmp_path / "run" / "best_model.pth")
    assert train(["evaluate", "--checkpoint", checkpoint, "--dataset-path", str(tiny_dataset)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_run_in_half_precision_resumes_bitwise_with_its_loss_scale(
    tiny_argv: Argv, tmp_path: Path, precision: str
) -> None:
    whole = tmp_path / "whole"
    assert train(tiny_argv("--precision", precision, "--keep-checkpoints", "9", checkpoint_dir=whole)) == 0
    cut = resume_copy(whole / "epoch_0003.pth", tmp_path / "cut")
    assert differing_tensors(final_state(cut), final_state(whole)) == []


def test_an_epoch_goes_on_at_the_same_sample_if_the_window_size_changes(tiny_argv: Argv, tmp_path: Path) -> None:
    """Stopped after 6 of 20 images; at 2 to a window instead of 6, the epoch has 7 windows left."""
    with signal_at_step(1):
        assert train(tiny_argv()) == 143
    assert resume(tmp_path / "run", "--accumulation-steps", "1") == 0
    first_epoch = [window for window in read_events(tmp_path / "run", "window") if window["epoch"] == 1]
    assert [window["window"] for window in first_epoch] == [1, *range(4, 11)]
