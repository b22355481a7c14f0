"""A new run that starts from a trained network."""

import logging
from pathlib import Path

import pytest
import torch
from conftest import Argv, failing, prepare_run, train
from safetensors.torch import save_file

from data.synthetic import write_synthetic_dataset
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
