"""What a user sees if something is wrong: one line for a mistake, a traceback and the next command for a bug."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import Argv, failing, train
from launching import read_events


def test_a_wrong_path_and_an_empty_folder_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = failing(["train", "--dataset-path", str(tmp_path / "nowhere")], capsys)
    assert "no such folder; --dataset-path must name" in nowhere
    assert "no image/mask folders found" in failing(["train", "--dataset-path", str(tmp_path)], capsys)


def test_images_without_masks_are_counted(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_dataset / "TrainDataset", tmp_path / "TrainDataset")
    for mask in (tmp_path / "TrainDataset" / "GT").iterdir():
        mask.unlink()
    assert "22 images in TrainDataset and not one has a mask" in failing(
        ["train", "--dataset-path", str(tmp_path)], capsys
    )


def test_numbers_out_of_range_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--batch-size: must be at least 1" in failing(["train", "--dataset-path", "x", "--batch-size", "0"], capsys)
    assert "--stage1-epochs 200 is more" in failing(["train", "--dataset-path", "x", "--stage1-epochs", "200"], capsys)


def test_a_text_file_and_a_missing_file_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "notes.pth"
    text.write_text("hello")
    assert "notes.pth: not a checkpoint" in failing(["train", "--resume", str(text)], capsys)
    assert "no such file" in failing(["train", "--resume", str(tmp_path / "nowhere.pth")], capsys)


def test_an_unknown_backbone_is_answered_with_similar_names(
    tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "did you mean" in failing(tiny_argv("--backbone", "resnet5"), capsys)


def test_a_command_is_needed_and_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert "COMMAND" in failing([], capsys)
    for argv, expected in (
        (["--help"], "demo"),
        (["train", "--help"], "--grad-clip"),
        (["demo", "--help"], "--epochs"),
    ):
        with pytest.raises(SystemExit) as end:
            train(argv)
        assert end.value.code == 0
        assert expected in capsys.readouterr().out


def test_a_bug_shows_its_traceback_and_how_to_resume(
    tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> dict[str, float]:
        raise ZeroDivisionError("a bug")

    assert train(tiny_argv(), validate=broken) == 1
    error = capsys.readouterr().err
    assert "ZeroDivisionError: a bug" in error
    assert "--resume auto" in error
    assert read_events(tmp_path / "run", "run_end")[0]["exit_code"] == 1
