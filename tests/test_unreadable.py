"""Training on imperfect data: unreadable files are reported, counted and replaced; too many of them end the run."""

import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Argv, differing_tensors, signal_at_step, tiny_arguments
from launching import read_events

from data.unreadable import UnreadableDataError, UnreadablePairs, require_few
from runtime.checkpoint import read_checkpoint
from train_ultimate import main

TRAINED = ("model", "ema", "optimizer", "scaler", "detector", "progress", "unreadable")


@pytest.mark.parametrize(("num_pairs", "most"), [(4, 3), (399, 3), (400, 4), (996, 9), (4040, 40)])
def test_one_per_cent_is_tolerated_and_three_in_a_small_dataset(num_pairs: int, most: int) -> None:
    names = {f"{number}.jpg": "cut short" for number in range(most + 1)}
    require_few(dict(list(names.items())[:most]), num_pairs, "Do this.")
    with pytest.raises(UnreadableDataError, match=rf"^{most + 1} of {num_pairs} pairs.*and \d+ more\. Do this\.$"):
        require_few(names, num_pairs, "Do this.")


def test_each_is_reported_once_with_its_treatment(caplog: pytest.LogCaptureFixture) -> None:
    events: list[dict[str, str]] = []
    known = {"old.jpg": "old.jpg: gone"}
    pairs = UnreadablePairs(known, 1000, ["v.jpg"], "", lambda name, **fields: events.append({"event": name, **fields}))
    for _ in range(2):
        pairs.note({"t.jpg": "t.jpg: cut short", "v.jpg": "v.png: no image", "old.jpg": "old.jpg: gone"})
    assert caplog.record_tuples == [
        ("train_ultimate", logging.WARNING, "Unreadable: t.jpg: cut short; replaced by another"),
        ("train_ultimate", logging.WARNING, "Unreadable: v.png: no image; left out of the scores"),
    ]
    assert [event["image"] for event in events] == ["t.jpg", "v.jpg"]
    assert known.keys() == {"old.jpg", "t.jpg", "v.jpg"}
    assert "3 of 1000" in pairs.describe()[0]


@pytest.fixture(scope="module")
def validation(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Names of the validation images of a run on the tiny dataset."""
    directory = tmp_path_factory.mktemp("undamaged")
    assert main(tiny_arguments(tiny_dataset, directory, "--epochs", "1", "--stage1-epochs", "1")) == 0
    return read_checkpoint(directory / "epoch_0001.pth")["config"]["validation"]


Damage = Callable[..., Path]


@pytest.fixture
def damage(tiny_dataset: Path, tmp_path: Path, validation: list[str]) -> Damage:
    """Copies of the tiny dataset with the first few training or validation images cut short."""

    def copy(in_training: int, in_validation: int = 0) -> Path:
        root = tmp_path / "damaged"
        shutil.copytree(tiny_dataset / "TrainDataset", root / "TrainDataset")
        images = sorted(path.relative_to(root).as_posix() for path in (root / "TrainDataset" / "Imgs").iterdir())
        training = [name for name in images if name not in validation]
        for name in [*training[:in_training], *validation[:in_validation]]:
            image = root / name
            image.write_bytes(image.read_bytes()[:-300])
        return root

    return copy


def state(directory: Path) -> dict[str, Any]:
    checkpoint = read_checkpoint(directory / "epoch_0004.pth")
    return {key: checkpoint[key] for key in TRAINED}


def test_a_run_goes_on_reports_each_file_once_and_counts(
    damage: Damage, tiny_argv: Argv, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.INFO, logger="train_ultimate")
    assert main(tiny_argv("--dataset-path", str(damage(2, 1)))) == 0
    lines = [line for line in caplog.messages if re.match(r"Unreadable: .*cannot be decoded", line)]
    assert len(lines) == 3
    assert sum(line.endswith("; replaced by another") for line in lines) == 2
    assert sum(line.endswith("; left out of the scores") for line in lines) == 1
    summary = "Unreadable: 3 of 22 pairs of image and mask, replaced in training or left out of validation: "
    assert summary in capsys.readouterr().out + caplog.text
    events = read_events(tmp_path / "run", "unreadable")
    assert len({event["image"] for event in events}) == len(events) == 3
    assert [epoch["unreadable"] for epoch in read_events(tmp_path / "run", "epoch")] == [3] * 4
    assert len(read_events(tmp_path / "run", "run_end")[0]["unreadable"]) == 3


@pytest.mark.slow
def test_weights_do_not_depend_on_workers_or_interruptions(damage: Damage, tiny_argv: Argv, tmp_path: Path) -> None:
    """Nor does the count: in the middle of an epoch, one file is known and the other is still to be found."""
    root = str(damage(2, 1))
    assert main(tiny_argv("--dataset-path", root, checkpoint_dir=tmp_path / "a")) == 0
    assert main(tiny_argv("--dataset-path", root, "--num-workers", "2", checkpoint_dir=tmp_path / "b")) == 0
    assert differing_tensors(state(tmp_path / "a"), state(tmp_path / "b")) == []
    for stop in (1, 3):
        with signal_at_step(stop):
            resume = ("--resume", "auto")
            assert main(tiny_argv("--dataset-path", root, *resume, checkpoint_dir=tmp_path / "c")) == 143
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "c")]) == 0
    assert differing_tensors(state(tmp_path / "a"), state(tmp_path / "c")) == []
    events = read_events(tmp_path / "c", "unreadable")
    assert len({event["image"] for event in events}) == len(events) == 3


@pytest.mark.parametrize("num_workers", ["0", "1"])
def test_too_many_end_the_first_epoch_and_the_run_resumes_once_they_are_repaired(
    tiny_dataset: Path, damage: Damage, tiny_argv: Argv, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    num_workers: str,
) -> None:  # fmt: skip
    root = damage(8)
    assert main(tiny_argv("--dataset-path", str(root), "--num-workers", num_workers)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert re.match(r"error: \d of 22 pairs of image and mask cannot be read, more than 3: .*cannot be decoded", line)
    assert "check-data --dataset-path" in line
    assert "--write-exclude" in line
    assert "--resume auto" in line
    assert read_events(tmp_path / "run", "epoch") == []
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 2
    assert "cannot be read, more than 3" in capsys.readouterr().err

    shutil.copytree(tiny_dataset / "TrainDataset", root / "TrainDataset", dirs_exist_ok=True)
    assert main(["train", "--resume", "auto", "--checkpoint-dir", str(tmp_path / "run")]) == 0
    assert state(tmp_path / "run")["unreadable"] == {}


def test_a_file_that_is_not_an_image_is_reported_before_training_and_replaced(
    damage: Damage, tiny_argv: Argv, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = damage(0)
    (root / "TrainDataset" / "Imgs" / "scene_00004.jpg").write_text("<html>not found</html>")
    assert main(tiny_argv("--dataset-path", str(root))) == 0
    assert sum("scene_00004.jpg: cannot be decoded (not an image)" in message for message in caplog.messages) == 1
    (found,), (first, *_) = (read_events(tmp_path / "run", event) for event in ("unreadable", "window"))
    assert found["time"] < first["time"]


def test_a_run_without_a_readable_validation_image_ends(
    damage: Damage, tiny_argv: Argv, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny_argv("--dataset-path", str(damage(0, 2)))) == 2
    assert "none of the validation images can be read" in capsys.readouterr().err


@pytest.mark.slow
def test_incidents_name_the_replacements(damage: Damage, tiny_argv: Argv, tmp_path: Path) -> None:
    """The unreadable images were not in the batch."""
    root = damage(2)
    assert main(tiny_argv("--dataset-path", str(root), "--drill", "bad-sample@1x7", "--max-rollbacks", "0")) in (0, 3)
    unreadable = {event["image"] for event in read_events(tmp_path / "run", "unreadable")}
    incidents = read_events(tmp_path / "run", "incident")
    assert sum(len(incident["samples"]) for incident in incidents) >= 6
    assert not any(set(incident["samples"]) & unreadable for incident in incidents)
