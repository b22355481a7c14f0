"""``train --folds``: a run for each part of the data, resumed as one, scored on what each has not seen."""

import gc
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, differing_tensors, failing, final_state, tiny_arguments, train

from commands import cli
from commands.folds import SCORES, SHEET, runs_of
from evaluation.predictor import load_network
from runtime.checkpoint import read_checkpoint
from runtime.folder import folders_of
from train_ultimate import main
from training.run import Run
from training.settings import UsageError

SHORT = ("--epochs", "1", "--stage1-epochs", "0")


def fold_arguments(dataset: Path, folder: Path, *extra: str) -> list[str]:
    return tiny_arguments(dataset, folder, "--folds", "2", *SHORT, *extra)


@pytest.fixture(scope="module")
def folds(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of two folds, trained for an epoch each."""
    folder = tmp_path_factory.mktemp("folds") / "run"
    assert train(fold_arguments(tiny_dataset, folder)) == 0
    return folder


def validation_of(folder: Path) -> list[str]:
    return read_checkpoint(folder / "best_model.pth")["config"]["validation"]


def test_every_photograph_is_held_out_by_one_fold_and_trained_on_by_the_others(folds: Path, tiny_dataset: Path) -> None:
    parts = [validation_of(folder) for folder in folders_of(folds)]
    photographs = [f"TrainDataset/Imgs/{path.name}" for path in (tiny_dataset / "TrainDataset" / "Imgs").iterdir()]
    assert sorted(name for part in parts for name in part) == sorted(photographs)
    assert [len(part) for part in parts] == [11, 11]
    for folder in folders_of(folds):
        assert json.loads((folder / "config.json").read_text())["training_pairs"] == 11


def test_out_of_fold_scores_are_those_of_each_network_on_what_it_has_not_seen(
    folds: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    together = json.loads((folds / SCORES).read_text())["sets"]["held-out"]
    apart = {}
    for folder in folders_of(folds):
        flags = ["--dataset-path", str(tiny_dataset), "--held-out", "--json", str(tmp_path / f"{folder.name}.json")]
        assert train(["evaluate", "--checkpoint", str(folder), "--num-workers", "0", *flags]) == 0
        rows = json.loads((tmp_path / f"{folder.name}.json").read_text())["sets"]["held-out"]["images"]
        apart |= {row["name"]: row for row in rows}
    assert together["num_images"] == 22
    assert {row["name"]: row for row in together["images"]} == apart
    assert (folds / SHEET).stat().st_size > 10_000


def test_the_ensemble_averages_the_logits_of_its_networks(folds: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    both, *alone = (
        load_network(path, "cpu", "fp32", None)
        for path in (folds, *(one / "best_model.pth" for one in folders_of(folds)))
    )
    with torch.inference_mode():
        one, other = (network.logits(images) for network in alone)
        torch.testing.assert_close(both.logits(images), (one + other) / 2)
        assert not torch.allclose(one, other, atol=1e-3)
        torch.testing.assert_close(both.members()[1].logits(images), other, rtol=0, atol=0)


def test_folds_without_weights_are_counted(folds: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for number in (1, 2, 3):
        (tmp_path / f"fold_{number}").mkdir()
    for number in (1, 3):
        shutil.copy(folds / "fold_1" / "best_model.pth", tmp_path / f"fold_{number}")
    caplog.clear()
    assert len(load_network(tmp_path, "cpu", "fp32", None).models) == 2
    assert not caplog.messages  # it was trained as one of two
    (tmp_path / "fold_3" / "best_model.pth").unlink()
    assert len(load_network(tmp_path, "cpu", "fp32", None).models) == 1
    assert caplog.messages == [f"{tmp_path}: 1 of 2 folds have weights so far"]


def test_a_runs_folder_is_no_ensemble(finished: Path) -> None:
    assert len(load_network(finished, "cpu", "fp32", None).models) == 1


def test_predict_and_evaluate_take_the_folder(
    folds: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photographs = tiny_dataset / "TestDataset" / "Imgs"
    flags = ["--checkpoint", str(folds), "--num-workers", "0"]
    assert train(["predict", *flags, str(photographs), "--output", str(tmp_path / "found")]) == 0
    assert train(["evaluate", *flags, "--dataset-path", str(tiny_dataset)]) == 0
    assert capsys.readouterr().out.count("2 networks, whose logits are averaged") == 2
    assert len([*(tmp_path / "found").glob("*.png")]) == 3


@pytest.mark.slow
def test_folds_stopped_by_their_time_go_on_where_they_were(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(fold_arguments(tiny_dataset, tmp_path / "run", "--max-hours", "1e-5")) == 0
    out = capsys.readouterr()
    assert f"--resume auto --checkpoint-dir {tmp_path / 'run'}\n" in out.out + out.err
    assert not (tmp_path / "run" / SCORES).exists()
    assert [folder.name for folder in folders_of(tmp_path / "run")] == ["fold_1"]
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / SCORES).read_text())["sets"]["held-out"]["num_images"] == 22
    assert "over 22 photographs, each by the network that has not seen it (95 % interval" in capsys.readouterr().out


@pytest.mark.slow
def test_folds_killed_in_the_second_end_in_the_same_weights(tiny_dataset: Path, folds: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "train_ultimate.py"), *fold_arguments(tiny_dataset, tmp_path / "run")]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: with two, sums have another order
    every_window = [*command, "--checkpoint-every", "1"]
    with subprocess.Popen(every_window, env=one_thread, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not [*(tmp_path / "run" / "fold_2").glob("step_*.pth")] and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    assert not (tmp_path / "run" / SCORES).exists()
    assert train(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    for number in (1, 2):
        one, other = (final_state(folder / f"fold_{number}", "epoch_0001.pth") for folder in (folds, tmp_path / "run"))
        assert not differing_tensors(one, other)


@pytest.mark.slow
def test_one_fold_alone_is_trained_in_its_folder(tiny_dataset: Path, folds: Path, tmp_path: Path) -> None:
    assert train(fold_arguments(tiny_dataset, tmp_path / "run", "--fold", "2")) == 0
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["fold_2"]
    assert validation_of(tmp_path / "run" / "fold_2") == validation_of(folds / "fold_2")
    assert train(fold_arguments(tiny_dataset, tmp_path / "run", "--resume", "auto")) == 0  # the other one, and scores
    assert (tmp_path / "run" / SCORES).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--folds", "2"], "holds the folds of a run already"),
        ([], "holds the folds of a run already"),
        (["--folds", "3", "--resume", "auto"], "holds a run with --folds 2, not 3"),
    ],
)
def test_a_folder_of_folds_takes_no_other_run(
    folds: Path, tiny_dataset: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(path.name for path in folds.iterdir())
    assert message in failing(tiny_arguments(tiny_dataset, folds, *flags), capsys)
    assert sorted(path.name for path in folds.iterdir()) == before


@pytest.mark.slow
def test_a_run_that_has_ended_is_not_kept(tiny_dataset: Path, tmp_path: Path) -> None:
    """It would stay in the GPU's memory beside the next fold. TensorBoard and the report take part."""
    assert main(tiny_arguments(tiny_dataset, tmp_path / "run", *SHORT)) == 0
    gc.collect()
    folder = str(tmp_path / "run")
    assert not [one for one in gc.get_objects() if isinstance(one, Run) and one.settings.checkpoint_dir == folder]


def test_mistakes_are_named(
    tiny_dataset: Path, tmp_path: Path, folds: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def message(*flags: str) -> str:
        return failing(tiny_arguments(tiny_dataset, tmp_path / "run", *flags), capsys)

    assert "--fold 3: there are 2" in message("--folds", "2", "--fold", "3")
    assert "--fold 3: it needs --folds K" in message("--fold", "3")
    assert "--folds: must be at least 2" in message("--folds", "1")
    assert "only 22 photographs; give fewer folds" in message("--folds", "23")
    checkpoint = str(folds / "fold_1" / "epoch_0001.pth")
    assert "goes on with --resume auto" in message("--folds", "2", "--resume", checkpoint)
    assert "2 folds; name one file" in failing(["export", "--checkpoint", str(folds), "--format", "onnx"], capsys)
    assert "2 folds; name one file" in message("--start-from", str(folds))


def test_several_processes_are_refused_unless_they_train_one_fold(
    monkeypatch: pytest.MonkeyPatch, tiny_dataset: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="start each fold by itself"):
        runs_of(cli.parse(fold_arguments(tiny_dataset, tmp_path)))
    (one,) = runs_of(cli.parse(fold_arguments(tiny_dataset, tmp_path, "--fold", "1")))
    assert one.given["checkpoint_dir"] == str(tmp_path / "fold_1")
