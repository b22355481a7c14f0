"""What a run leaves in its folder and on the terminal, and what happens to files that are there already."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Argv, differing_tensors, failing, final_state, prepare_run, scripted_validation, train
from launching import read_events

from runtime.checkpoint import read_checkpoint
from train_ultimate import ScriptParts, run_to_its_end, validate


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


def test_config_holds_settings_versions_and_the_datasets_fingerprint(finished: Path) -> None:
    config = json.loads((finished / "config.json").read_text())
    assert config["settings"]["lr"] == 0.002
    assert config["precision"] == "fp32"
    assert config["torch"] == torch.__version__.split("+")[0]
    assert re.fullmatch("[0-9a-f]{16}", config["data"])


def test_epoch_lines_have_the_agreed_form(tiny_argv: Argv, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tiny_argv("--epochs", "1", "--stage1-epochs", "1", "--grad-clip", "0.0001")) == 0
    out = capsys.readouterr().out
    assert re.search(r"^Loss: \d\.\d{4} \| IoU: 0\.\d{4} \| Dice: 0\.\d{4}$", out, re.MULTILINE)
    assert re.search(r"^   Gradient norm - Avg: \d+\.\d{3}, Max: \d+\.\d{3}$", out, re.MULTILINE)
    assert "Warning: 4 of 4 windows had a gradient norm above 5 x --grad-clip = 0.0005" in out
    assert re.search(
        r"^Done: validation IoU 0\.\d{4}, reached at epoch 1 \(95 % interval 0\.\d{3} to 0\.\d{3}\)$", out, re.MULTILINE
    )


def test_best_model_is_the_epoch_of_best_iou_and_nan_is_never_best(tiny_argv: Argv, tmp_path: Path) -> None:
    validate = scripted_validation(0.2, 0.5, float("nan"), 0.4)
    assert train(tiny_argv("--keep-checkpoints", "9"), validate=validate) == 0
    directory = tmp_path / "run"
    progress = read_checkpoint(directory / "best_model.pth")["progress"]
    assert (progress["best_epoch"], progress["best_iou"], progress["epoch"]) == (2, 0.5, 2)
    assert differing_tensors(final_state(directory, "best_model.pth"), final_state(directory, "epoch_0002.pth")) == []


def test_a_second_run_does_not_overwrite_the_first(
    finished: Path, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir())
    assert "holds a run already" in failing(tiny_argv(checkpoint_dir=finished), capsys)
    assert sorted((path.name, path.stat().st_mtime_ns) for path in finished.iterdir()) == before


def test_going_back_to_an_older_epoch_sets_the_later_ones_aside(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for epoch in (1, 2, 3):
        shutil.copy(finished / f"epoch_{epoch:04d}.pth", tmp_path)
    assert train(["train", "--resume", str(tmp_path / "epoch_0001.pth"), "--epochs", "2"]) == 0
    assert (tmp_path / "epoch_0003.pth.superseded").exists()
    assert "further on than the checkpoint being resumed" in capsys.readouterr().out


@pytest.mark.slow
def test_going_back_keeps_the_best_model_of_the_abandoned_branch(tiny_argv: Argv, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    back = ["train", "--resume", str(directory / "epoch_0001.pth")]
    assert train(tiny_argv("--keep-checkpoints", "9"), validate=scripted_validation(0.2, 0.3, 0.6, 0.5)) == 0
    assert train([*back, "--epochs", "2"], validate=scripted_validation(0.1)) == 0
    assert read_checkpoint(directory / "best_model.pth.superseded")["progress"]["best_iou"] == 0.6
    assert read_checkpoint(directory / "best_model.pth")["progress"]["best_iou"] == 0.1
    assert train([*back, "--epochs", "3"], validate=scripted_validation(0.1, 0.1)) == 0
    assert (directory / "epoch_0002.pth.superseded-2").exists()


def test_a_run_resumed_in_another_folder_leaves_a_best_model_there(finished: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    assert train(["train", "--resume", str(finished / "epoch_0003.pth"), "--checkpoint-dir", str(other)]) == 0
    assert (other / "best_model.pth").exists()


@pytest.mark.parametrize("is_replaced", [True, False])
def test_a_folder_removed_in_mid_run_is_made_anew(
    tiny_argv: Argv, tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str], is_replaced: bool
) -> None:
    run, validations = tmp_path / "run", 0

    def removing(*args: Any) -> dict[str, float]:
        nonlocal validations
        validations += 1
        if validations == 3:
            run.rename(tmp_path / "elsewhere")
            if is_replaced:
                run.mkdir()
        return validate(*args)

    assert train(tiny_argv(), validate=removing) == 0
    out = capsys.readouterr().out
    assert f"Warning: {run}: was removed or replaced, and is made anew" in out
    assert {path.name for path in run.iterdir()} >= {"best_model.pth", "epoch_0004.pth", "config.json"}
    assert [event["epoch"] for event in read_events(run, "epoch")] == [3, 4]
    assert read_events(run, "run_start")
    assert json.loads((run / "config.json").read_text()) == json.loads((tmp_path / "elsewhere/config.json").read_text())
    assert differing_tensors(final_state(run), final_state(finished)) == []
    for path in re.findall(r"^Weights: (\S+), curves: (\S+)$", out, re.MULTILINE)[0]:
        assert Path(path).exists()


def test_a_folder_removed_after_the_last_checkpoint_ends_with_exit_code_1_and_the_state_saved(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prepare_run(tiny_argv("--epochs", "1", "--stage1-epochs", "1"))
    saved = run.folder.store.on_saved
    assert saved is not None

    def removing(name: str) -> None:
        saved(name)
        if name == "epoch_0001.pth":
            shutil.rmtree(tmp_path / "run")

    run.folder.store.on_saved = removing
    assert run_to_its_end(run, ScriptParts()) == 1
    error = capsys.readouterr().err
    path = tmp_path / "run" / "step_00000004.pth"
    assert f"the checkpoints in {path.parent} were removed: saved {path}" in error
    assert read_checkpoint(path)["progress"]["epoch"] == 1
