"""The same run by other means: less memory, another place for augmentation, compiled code."""

import shutil
from pathlib import Path

import pytest
from conftest import Argv, differing_tensors, final_state, train
from launching import read_events


def test_gradient_checkpointing_gives_the_same_run_bitwise(finished: Path, tiny_argv: Argv, tmp_path: Path) -> None:
    """The same statistics of BatchNorm too, which learns in stage 2 of these runs."""
    assert train(tiny_argv("--gradient-checkpointing")) == 0
    assert differing_tensors(final_state(tmp_path / "run"), final_state(finished)) == []


@pytest.mark.slow
def test_augmented_on_the_device_a_run_sees_the_same_images_and_resumes_bitwise(
    finished: Path, tiny_argv: Argv, tmp_path: Path
) -> None:
    assert train(tiny_argv("--augment-on", "device", "--keep-checkpoints", "9")) == 0
    ours, loaders = (read_events(directory, "window") for directory in (tmp_path / "run", finished))
    for first, second in zip(ours, loaders, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=0.01)
    cut = tmp_path / "cut"
    cut.mkdir()
    shutil.copy(tmp_path / "run" / "epoch_0003.pth", cut)
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(cut), "--num-workers", "2"]) == 0
    assert differing_tensors(final_state(cut), final_state(tmp_path / "run")) == []


@pytest.mark.slow
def test_compiled_run_agrees_with_an_eager_one_and_resumes_bitwise(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The last batch of each epoch is shorter than the others and runs eagerly."""
    plain, compiled, cut = (tmp_path / name for name in ("plain", "compiled", "cut"))
    flags = ("--epochs", "2", "--stage1-epochs", "0", "--batch-size", "3", "--accumulation-steps", "2")
    assert train(tiny_argv(*flags, checkpoint_dir=plain)) == 0
    assert train(tiny_argv(*flags, "--compile", checkpoint_dir=compiled)) == 0
    assert "Compiled in" in capsys.readouterr().out
    windows = [read_events(directory, "window") for directory in (plain, compiled)]
    for first, second in zip(*windows, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-4)
    cut.mkdir()
    shutil.copy(compiled / "epoch_0001.pth", cut)
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(cut)]) == 0
    name = "epoch_0002.pth"
    assert differing_tensors(final_state(cut, name), final_state(compiled, name)) == []
