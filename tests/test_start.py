"""A new run that starts from a trained network."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from conftest import Argv, failing, prepare_run, train
from PIL import Image, ImageOps
from safetensors.torch import save_file

from data.synthetic import write_synthetic_dataset
from reporting.history import read_run
from runtime.checkpoint import read_checkpoint, write_checkpoint
from training.run import Run


def own_network(argv: list[str]) -> list[str]:
    """Return the command line without what decides the network: ``--start-from`` brings it."""
    for flag in ("--backbone", "--decoder-channels"):
        at = argv.index(flag)
        del argv[at : at + 2]
    return argv


@pytest.fixture
def other_data(tmp_path: Path) -> Path:
    write_synthetic_dataset(tmp_path / "other", num_train=12, num_test=1, img_size=96, seed=11)
    return tmp_path / "other"


def averaged(finished: Path) -> dict[str, torch.Tensor]:
    return read_checkpoint(finished / "best_model.pth")["ema"]["model"]


def assert_started_from(run: Run, weights: dict[str, torch.Tensor]) -> None:
    state = run.state.model.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in weights.items())
    assert run.state.ema is not None
    assert all(torch.equal(run.state.ema.module.state_dict()[name], weight) for name, weight in weights.items())
    assert (run.state.progress.global_window, run.state.ema.num_updates) == (0, 0)
    assert not run.state.optimizer.state


def test_checkpoint_starts_a_new_run_at_another_size_on_other_data(
    finished: Path, other_data: Path, tiny_argv: Argv
) -> None:
    """Network and averaged weights are the checkpoint's; progress, moments and schedule are new."""
    argv = own_network(tiny_argv("--dataset-path", str(other_data), "--img-size", "96", "--epochs", "2"))
    run = prepare_run([*argv, "--stage1-epochs", "1", "--start-from", str(finished / "best_model.pth")])
    assert (run.settings.backbone, run.settings.decoder_channels) == ("test_efficientnet", 16)
    assert_started_from(run, averaged(finished))


def test_a_runs_folder_stands_for_its_best_weights(finished: Path, tiny_argv: Argv) -> None:
    assert_started_from(prepare_run(own_network(tiny_argv("--start-from", str(finished)))), averaged(finished))


@pytest.mark.slow
def test_exported_folder_starts_a_run(finished: Path, tmp_path: Path, tiny_argv: Argv) -> None:
    export = "export", "--checkpoint", str(finished / "best_model.pth"), "--format", "safetensors"
    assert train([*export, "--output", str(tmp_path / "exported")]) == 0
    run = prepare_run([*own_network(tiny_argv()), "--start-from", str(tmp_path / "exported")])
    assert_started_from(run, averaged(finished))


@pytest.mark.parametrize(
    "wrapping",
    ["safetensors", "state_dict", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bare", "module"))],
)
def test_files_of_weights_start_a_run_in_any_wrapping(
    wrapping: str, finished: Path, tmp_path: Path, tiny_argv: Argv
) -> None:
    weights, path = averaged(finished), tmp_path / ("w.safetensors" if wrapping == "safetensors" else "w.pth")
    if wrapping == "safetensors":
        save_file({name: weight.contiguous() for name, weight in weights.items()}, path)
    elif wrapping == "state_dict":
        torch.save({"state_dict": {f"_orig_mod.{name}": weight for name, weight in weights.items()}}, path)
    else:
        prefix = "module." if wrapping == "module" else ""
        torch.save({prefix + name: weight for name, weight in weights.items()}, path)
    assert_started_from(prepare_run(tiny_argv("--start-from", str(path))), weights)


@pytest.mark.slow
def test_position_embeddings_are_resized_to_another_image_size(tiny_argv: Argv, tmp_path: Path) -> None:
    vit = "--backbone", "vit_tiny_patch16_224", "--epochs", "1", "--stage1-epochs", "1"
    assert train(tiny_argv(*vit, "--ema-decay", "0", checkpoint_dir=tmp_path / "first")) == 0
    source = tmp_path / "first/epoch_0001.pth"
    run = prepare_run([*own_network(tiny_argv("--img-size", "96")), "--start-from", str(source)])
    before = read_checkpoint(source)["model"]
    after = run.state.model.state_dict()
    name = next(name for name in before if "pos_embed" in name)
    assert before[name].shape[1] == 4 * 4 + 1
    assert after[name].shape[1] == 6 * 6 + 1
    assert torch.allclose(after[name][:, 0], before[name][:, 0])  # the class token's
    assert after[name][:, 1:].mean() == pytest.approx(before[name][:, 1:].mean().item(), abs=1e-3)
    assert all(torch.equal(after[other], before[other]) for other in before if other != name)


def test_decoder_of_another_width_starts_afresh_and_says_so(
    finished: Path, tiny_argv: Argv, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="train_ultimate")
    run = prepare_run(tiny_argv("--start-from", str(finished / "best_model.pth"), "--decoder-channels", "24"))
    (line,) = [entry.getMessage() for entry in caplog.records if "starts afresh" in entry.getMessage()]
    assert "its decoder does not fit and starts afresh (" in line
    backbone = {name: weight for name, weight in averaged(finished).items() if name.startswith("backbone.")}
    assert_started_from(run, backbone)


def test_another_backbone_is_refused_with_the_right_one(
    finished: Path, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failing(tiny_argv("--start-from", str(finished / "best_model.pth"), "--backbone", "test_resnet"), capsys)
    assert "a test_efficientnet: leave --backbone out, or give this one" in line


def test_a_checkpoint_of_a_modified_copy_is_refused(
    finished: Path, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = read_checkpoint(finished / "best_model.pth")
    del checkpoint["config"]["settings"]
    write_checkpoint(tmp_path / "changed.pth", checkpoint)
    line = failing(tiny_argv("--start-from", str(tmp_path / "changed.pth")), capsys)
    assert "was made by a modified copy of this program" in line


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere.pth", "--start-from nowhere.pth: no such file"),
        ("no/such/folder", "no such folder, and no such repository"),
    ],
)
def test_missing_sources_are_named(
    source: str, message: str, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in failing(tiny_argv("--start-from", source), capsys)


@pytest.mark.slow
def test_a_resumed_run_does_not_start_again(finished: Path, tmp_path: Path, tiny_argv: Argv) -> None:
    source = tmp_path / "start.pth"
    source.write_bytes((finished / "best_model.pth").read_bytes())
    short = "--epochs", "2", "--stage1-epochs", "1"
    assert train([*own_network(tiny_argv(*short)), "--start-from", str(source)]) == 0
    source.unlink()
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run"), "--epochs", "3"]) == 0


@pytest.fixture(scope="module")
def two_datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    write_synthetic_dataset(folder / "new", num_train=10, num_test=0, img_size=64, seed=3)
    write_synthetic_dataset(folder / "old", num_train=30, num_test=0, img_size=64, seed=4)
    return folder


REHEARSAL = "--img-size 64 --backbone test_efficientnet --no-pretrained --decoder-channels 16 --num-workers 0"
REHEARSAL += " --batch-size 4 --accumulation-steps 1 --epochs 2 --stage1-epochs 0 --val-fraction 0.2 --precision fp32"


def rehearsing(folder: Path, *flags: str) -> list[str]:
    paths = {"dataset-path": "new", "rehearse": "old", "checkpoint-dir": f"run{len(list(folder.iterdir()))}"}
    named = [text for flag, name in paths.items() for text in (f"--{flag}", str(folder / name))]
    return ["train", *named, *REHEARSAL.split(), *flags]


@pytest.mark.parametrize(("share", "number"), [("0.5", 8), ("0.2", 2), ("0.9", 24)])
def test_rehearsal_mixes_in_a_share_of_the_old_photographs(two_datasets: Path, share: str, number: int) -> None:
    data = prepare_run(rehearsing(two_datasets, "--rehearse-share", share)).data
    assert [name.startswith("../old/") for name in data.images] == [False] * 8 + [True] * number
    assert [name.startswith("../old/") for name in data.validation] == [False] * 2 + [True] * 6
    assert data.num_own_validation == 2
    assert not {*data.images} & {*data.validation}


def test_both_datasets_are_scored_and_the_new_one_chooses_the_best_epoch(two_datasets: Path) -> None:
    argv = rehearsing(two_datasets)
    assert train(argv) == 0
    run = Path(argv[argv.index("--checkpoint-dir") + 1])
    events = read_run(run).epochs
    assert all(0 <= event["rehearsed_iou"] <= 1 and 0 <= event["rehearsed_s_measure"] <= 1 for event in events.values())
    checkpoint = read_checkpoint(run / "best_model.pth")
    assert checkpoint["progress"]["best_iou"] == max(event["iou"] for event in events.values())
    held_out = f"evaluate --checkpoint {run} --dataset-path {argv[2]} --held-out --json {run}/s.json --num-workers 0"
    assert train(held_out.split()) == 0
    assert json.loads((run / "s.json").read_text())["sets"]["held-out"]["num_images"] == 2


@pytest.mark.slow
def test_a_rehearsing_run_resumes_with_the_same_photographs_and_weights(two_datasets: Path) -> None:
    argv = rehearsing(two_datasets)
    assert train(argv) == 0
    whole, again = Path(argv[6]), Path(argv[6] + "-again")
    shutil.copytree(whole, again, ignore=shutil.ignore_patterns("epoch_0002.pth"))
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(again)]) == 0
    first, second = (read_checkpoint(run / "epoch_0002.pth") for run in (whole, again))
    assert first["config"]["validation"] == second["config"]["validation"]
    assert all(torch.equal(first["model"][name], second["model"][name]) for name in first["model"])


def test_rehearsing_the_dataset_itself_or_other_masks_is_refused(two_datasets: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is --dataset-path itself"):
        prepare_run(rehearsing(two_datasets, "--rehearse", str(two_datasets / "new")))
    shutil.copytree(two_datasets / "old", tmp_path / "inverted")
    for path in (tmp_path / "inverted").rglob("GT/*"):
        ImageOps.invert(Image.open(path).convert("L")).save(path)
    with pytest.raises(ValueError, match="read in another way"):
        prepare_run(rehearsing(two_datasets, "--rehearse", str(tmp_path / "inverted"), "--mask-values", "auto"))
