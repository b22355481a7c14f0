"""``prepare``: what a run is built from, new or resumed."""

import json
import re
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, failing, prepare_again, prepare_run, train
from launching import read_events

from models.backbone import build_backbone
from models.network import CamouflageSegmenter, build_network
from runtime.checkpoint import read_checkpoint, write_checkpoint


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_have_the_memory_format_asked_for(finished: Path, channels_last: bool) -> None:
    run = prepare_again(finished, channels_last=channels_last)
    weight = run.state.model.get_parameter("decoder.blocks.3.head.weight")
    assert weight.shape == (1, 16, 3, 3)
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last


def test_backbone_weights_come_out_of_the_entry_of_another_programs_checkpoint(
    tiny_argv: Argv, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    body = build_backbone("test_efficientnet", pretrained=False, weights=None, img_size=64).body.state_dict()
    torch.save({"epoch": 3, "net": {f"module.{name}": weight for name, weight in body.items()}}, tmp_path / "other.pth")
    run = prepare_run(tiny_argv("--backbone-weights", str(tmp_path / "other.pth")))
    assert isinstance(run.state.model, CamouflageSegmenter)
    assert differing_tensors(run.state.model.backbone.body.state_dict(), body) == []
    dropped = "all but its entry net (epoch) and the prefix module. of all names"
    assert f"{tmp_path / 'other.pth'}: weights of another program, without {dropped}" in caplog.messages


def test_deterministic_asks_torch_for_deterministic_algorithms(finished: Path) -> None:
    try:
        prepare_again(finished, deterministic=True)
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)


def test_flags_given_with_resume_win_and_are_printed(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    argv = ["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path), "--lr", "0.001", "--weight-decay", "0.5"]
    assert train(argv) == 0
    out = capsys.readouterr().out
    assert "lr: 0.002 -> 0.001" in out
    assert read_events(tmp_path, "window")[0]["lr"] <= 0.0005
    groups = read_checkpoint(tmp_path / "epoch_0004.pth")["optimizer"]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.5, 0.0}


def test_another_number_format_on_resume_is_reported(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(finished / "epoch_0003.pth", tmp_path)
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path), "--precision", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "precision in use: fp32 -> bf16" in out
    assert "Device: cpu" in out


@pytest.mark.slow
def test_auto_precision_on_a_cpu_is_the_one_that_trains_this_network_faster(
    tiny_argv: Argv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A CPU can have bf16 and compute more slowly in it. A resumed run keeps what the first one chose."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    slow = ["bf16"]

    def network(*args: Any) -> CamouflageSegmenter:
        model = build_network(*args)

        def wait(*_: object) -> None:
            if not model.training and torch.is_autocast_enabled("cpu") == (slow == ["bf16"]):
                time.sleep(0.2)

        model.register_forward_pre_hook(wait)
        return model

    argv = tiny_argv("--precision", "auto", "--epochs", "1", "--stage1-epochs", "1", "--batch-size", "8")
    assert train(argv, build_network=network) == 0
    assert re.search(r"precision fp32 \(bf16 is 0.\d+ times as fast as fp32 here\)", capsys.readouterr().out)
    slow[:] = ["fp32"]
    resumed = prepare_run([*argv, "--resume", "auto", "--epochs", "2"], build_network=network)
    assert resumed.config["precision"] == "fp32"
    new = prepare_run(tiny_argv("--precision", "auto", checkpoint_dir=tmp_path / "new"), build_network=network)
    assert new.config["precision"] == "bf16"


def test_saved_settings_out_of_range_are_refused_with_the_flags_name(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read_checkpoint(finished / "epoch_0003.pth")
    checkpoint["config"]["settings"]["lr"] = -1.0
    path = tmp_path / "epoch_0003.pth"
    write_checkpoint(path, checkpoint)
    resume = ["train", "--resume", str(path)]
    assert "--lr must be above 0, not -1" in failing(resume, capsys)
    assert train([*resume, "--lr", "0.002"]) == 0


def test_resume_auto_in_an_empty_folder_starts_from_the_beginning(
    tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    """So one command line serves the first start and every restart of a job that may be pre-empted."""
    assert train(tiny_argv("--epochs", "1", "--stage1-epochs", "1", "--resume", "auto")) == 0
    assert "starting from the beginning" in capsys.readouterr().out


def test_resuming_a_finished_run_says_so(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(finished / "epoch_0004.pth", tmp_path)
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path)]) == 0
    assert "All 4 epochs are done already" in capsys.readouterr().out


def test_validation_images_stay_the_same_if_a_file_is_gone(
    tiny_dataset: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_dataset, root)
    assert train(tiny_argv("--dataset-path", str(root), "--epochs", "1", "--stage1-epochs", "1")) == 0
    directory = tmp_path / "run"
    validation = json.loads((directory / "config.json").read_text())["validation"]
    training = {f"TrainDataset/Imgs/scene_{index:05d}.jpg" for index in range(22)} - set(validation)
    (root / min(training)).unlink()
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(directory), "--epochs", "2"]) == 0
    assert json.loads((directory / "config.json").read_text())["validation"] == validation
    assert "files were added, removed, changed or excluded" in capsys.readouterr().out


def test_a_folder_with_only_damaged_checkpoints_is_not_taken_for_an_empty_one(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "epoch_0001.pth").write_bytes(b"")
    assert "not one checkpoint is intact" in failing(tiny_argv("--resume", "auto"), capsys)
    (tmp_path / "run" / "epoch_0001.pth").rename(tmp_path / "run" / "foreign.pth")
    assert train(tiny_argv("--resume", "auto", "--epochs", "1", "--stage1-epochs", "1")) == 0


def test_threads_are_as_many_as_asked_for(finished: Path) -> None:
    before = torch.get_num_threads()
    try:
        prepare_again(finished, threads=3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
