"""``evaluate``: a checkpoint or a folder of predictions, from the command line to the numbers."""

import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_arguments
from PIL import Image, ImageFilter

import train_ultimate
from commands.scoring import Case, Scored, score_case, scored_cases
from data.decoding import decode_mask
from data.masks import MaskReading
from data.predictions import PredictionReading, decode_prediction, survey_predictions
from evaluation.metrics import score_image
from evaluation.predictor import load_network
from runtime.checkpoint import read_checkpoint, write_checkpoint
from train_ultimate import main

needs_any_name = pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names must be UTF-8 there")


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    assert main(tiny_arguments(tiny_dataset, directory, "--epochs", "2", "--stage1-epochs", "1")) == 0
    return directory / "epoch_0002.pth"


def write_set(root: Path, names: list[str], suffix: str = ".jpg", size: tuple[int, int] = (30, 20)) -> Path:
    """Write ``root/{Imgs,GT}``, each object a little larger than the last."""
    for folder in ("Imgs", "GT"):
        (root / folder).mkdir(parents=True)
    for number, name in enumerate(names, start=1):
        mask = Image.new("L", size)
        mask.paste(255, (2, 2, 4 + number, 4 + number))
        mask.save(root / "GT" / f"{name}.png")
        Image.new("RGB", size, (90, 120, 60)).save(root / "Imgs" / f"{name}{suffix}")
    return root


def write_predictions(masks: Path, folder: Path, blur: int = 1) -> Path:
    folder.mkdir(parents=True)
    for mask in masks.iterdir():
        soft = np.roll(np.array(Image.open(mask)), blur, axis=1) // 2 + 20
        Image.fromarray(soft.astype(np.uint8)).save(folder / mask.name)
    return folder


def failing(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["evaluate", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


# A checkpoint


def test_checkpoint_is_scored_on_its_test_set_and_its_saved_predictions_score_the_same(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, saved = ["--dataset-path", str(tiny_dataset)], str(tmp_path / "saved")
    flags = ["--checkpoint", str(checkpoint), *data, "--json", str(tmp_path / "a.json"), "--save-predictions", saved]
    assert main(["evaluate", *flags]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^tiny +3( +\d\.\d{3}){11}$", out, re.MULTILINE)
    report = json.loads((tmp_path / "a.json").read_text())
    assert report["checkpoint"] == str(checkpoint)
    scores = report["sets"]["tiny"]["scores"]
    masks = tiny_dataset / "TestDataset" / "GT"
    for mask in masks.iterdir():
        prediction = Image.open(tmp_path / "saved" / "tiny" / mask.name)
        assert (prediction.mode, prediction.size) == ("L", Image.open(mask).size)
    for where in (data, ["--masks", str(masks)]):
        again = ["--predictions", str(tmp_path / "saved" / "tiny"), *where, "--json", str(tmp_path / "b.json")]
        assert main(["evaluate", *again]) == 0
        (rescored,) = json.loads((tmp_path / "b.json").read_text())["sets"].values()
        assert rescored["scores"] == scores
        assert rescored["curves"] == report["sets"]["tiny"]["curves"]


def test_averaged_weights_are_used_at_the_training_size(checkpoint: Path) -> None:
    network = load_network(checkpoint, "cpu", "fp32", img_size=None)
    state = read_checkpoint(checkpoint)
    assert not torch.equal(
        state["model"]["decoder.coarse_head.weight"], state["ema"]["model"]["decoder.coarse_head.weight"]
    )
    used = network.models[0].state_dict()
    assert all(torch.equal(used[name], weight) for name, weight in state["ema"]["model"].items())
    assert not network.models[0].training
    assert network.img_size == 64
    assert load_network(checkpoint, "cpu", "fp32", img_size=96).img_size == 96


def test_with_tta_an_image_and_its_mirror_image_have_mirrored_predictions(checkpoint: Path) -> None:
    images = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        once, mirrored = (load_network(checkpoint, "cpu", "fp32", None, tta=tta) for tta in (False, True))
        both = mirrored.logits(images)
        torch.testing.assert_close(mirrored.logits(images.flip(-1)), both.flip(-1))
        torch.testing.assert_close(both, (once.logits(images) + once.logits(images.flip(-1)).flip(-1)) / 2)
        assert not torch.allclose(once.logits(images), both, atol=1e-4)


def test_held_out_images_are_those_that_the_run_was_validated_on(
    tiny_dataset: Path, checkpoint: Path, tmp_path: Path
) -> None:
    flags = ["--dataset-path", str(tiny_dataset), "--held-out", "--precision", "fp32"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *flags, "--json", str(tmp_path / "a.json")]) == 0
    held_out = json.loads((tmp_path / "a.json").read_text())["sets"]["held-out"]
    validation = read_checkpoint(checkpoint)["config"]["validation"]
    assert [image["name"] for image in held_out["images"]] == [f"{Path(name).stem}.png" for name in validation]


def test_missing_held_out_images_are_reported(
    tiny_dataset: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_dataset, tmp_path / "data")
    (name, _) = read_checkpoint(checkpoint)["config"]["validation"]
    (tmp_path / "data" / name).unlink()
    flags = ["--checkpoint", str(checkpoint), "--dataset-path", str(tmp_path / "data"), "--held-out"]
    assert f"1 of the 2 images that the checkpoint's run held out are not there (such as {name})" in failing(
        flags, capsys
    )


def test_evaluate_with_tta_says_so_and_is_for_checkpoints(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--dataset-path", str(tiny_dataset), "--tta"]
    assert main(["evaluate", "--checkpoint", str(checkpoint), *flags, "--json", str(tmp_path / "a.json")]) == 0
    assert "with mirror images" in capsys.readouterr().out
    assert json.loads((tmp_path / "a.json").read_text())["tta"]
    assert "--tta goes with --checkpoint" in failing(["--predictions", str(tmp_path), *flags], capsys)


def test_checkpoint_that_holds_only_weights_is_refused(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(read_checkpoint(checkpoint)["model"], tmp_path / "weights.pth")
    argv = ["--checkpoint", str(tmp_path / "weights.pth"), "--dataset-path", str(tiny_dataset)]
    assert "weights.pth: holds only weights" in failing(argv, capsys)


def test_image_that_cannot_be_read_is_named_and_the_others_are_scored(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", ["a", "b", "c"])
    (root / "Imgs" / "b.jpg").write_text("<html>")
    argv = ["--checkpoint", str(checkpoint), "--dataset-path", str(root), "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *argv]) == 1
    assert "Not scored: " in (error := capsys.readouterr().err)
    assert "b.jpg: cannot be decoded (not an image)" in error
    report = json.loads((tmp_path / "out.json").read_text())
    assert [image["name"] for image in report["sets"]["set"]["images"]] == ["a.png", "c.png"]
    assert len(report["not_scored"]) == 1


# A folder of predictions


def test_scores_do_not_depend_on_the_number_of_processes(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", [f"photo{number}" for number in range(9)])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    reports = []
    for processes in ("0", "1", "2"):
        argv = ["--predictions", str(predictions), "--masks", str(root / "GT"), "--num-workers", processes]
        assert main(["evaluate", *argv, "--json", str(tmp_path / "out.json")]) == 0
        reports.append(json.loads((tmp_path / "out.json").read_text()))
    assert reports[0] == reports[1] == reports[2]
    images = reports[0]["sets"]["set"]["images"]
    assert [image["name"] for image in images] == sorted(image["name"] for image in images)
    for image in images:
        mask = decode_mask(root / "GT" / image["name"])
        expected = score_image(np.array(Image.open(predictions / image["name"])), mask).numbers()
        assert {name: image[name] for name in expected} == expected
        assert image["object_share"] == mask.mean()


def test_several_sets_superclasses_and_thirds_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    aquatic = [f"COD10K-CAM-1-Aquatic-1-Fish-{number}" for number in range(4)]
    flying = [f"COD10K-CAM-2-Flying-5-Moth-{number}" for number in range(4, 6)]
    write_set(tmp_path / "data" / "TestDataset" / "COD10K", aquatic + flying)
    write_set(tmp_path / "data" / "TestDataset" / "CAMO", ["x", "y"])
    write_set(tmp_path / "data" / "TrainDataset", ["never"])
    for name in ("COD10K", "CAMO"):
        write_predictions(tmp_path / "data" / "TestDataset" / name / "GT", tmp_path / "predictions" / name)
    argv = ["--predictions", str(tmp_path / "predictions"), "--dataset-path", str(tmp_path / "data")]
    assert main(["evaluate", *argv, "--json", str(tmp_path / "out.json")]) == 0
    sets = json.loads((tmp_path / "out.json").read_text())["sets"]
    assert {name: report["num_images"] for name, report in sets.items()} == {"CAMO": 2, "COD10K": 6}
    groups = sets["COD10K"]["by_superclass"]
    assert {name: group["num_images"] for name, group in groups.items()} == {"Aquatic": 4, "Flying": 2}
    rows = [row for row in sets["COD10K"]["images"] if row["superclass"] == "Flying"]
    assert groups["Flying"]["s_measure"] == pytest.approx(np.mean([row["s_measure"] for row in rows]))
    thirds = sets["COD10K"]["by_size"]
    assert [group["num_images"] for group in thirds.values()] == [2, 2, 2]
    shares = sorted(row["object_share"] for row in sets["COD10K"]["images"])
    assert list(thirds) == [
        f"{name}, to {shares[last]:.1%}" for name, last in (("small", 1), ("medium", 3), ("large", 5))
    ]
    out = capsys.readouterr().out
    assert "COD10K by superclass" in out
    assert "CAMO by superclass" not in out


def test_mask_without_a_prediction_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "set", ["a", "b", "c"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    (predictions / "b.png").unlink()
    line = failing(["--predictions", str(predictions), "--masks", str(root / "GT")], capsys)
    assert "no prediction for 1 of the 3 masks of set: b.png" in line


def test_predictions_of_another_size_or_kind_are_scored_with_a_warning_about_the_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = write_set(tmp_path / "set", ["a", "b", "c"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    whole = Image.open(predictions / "a.png")
    whole.resize((60, 40)).save(predictions / "a.png")
    Image.fromarray(np.array(Image.open(predictions / "b.png")).astype(np.uint16) * 257).save(predictions / "b.png")
    Image.open(predictions / "c.png").convert("RGBA").save(predictions / "c.png")
    assert main(["evaluate", "--predictions", str(predictions), "--masks", str(root / "GT")]) == 0
    assert "Warning: 1 predictions of set were resized to their masks' size" in capsys.readouterr().out


def test_contact_sheet_has_the_worst_twenty_four(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "set", [f"photo{number:02d}" for number in range(26)], size=(40, 40))
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    argv = ["--predictions", str(predictions), "--dataset-path", str(root), "--contact-sheet", str(tmp_path / "a.png")]
    assert main(["evaluate", *argv]) == 0
    assert "The 24 worst:" in capsys.readouterr().out
    sheet = Image.open(tmp_path / "a.png")
    assert sheet.width > sheet.height / 2.5
    assert sheet.height > 12 * 165
    few = ["--predictions", str(predictions), "--masks", str(root / "GT"), "--contact-sheet", str(tmp_path / "b.png")]
    assert main(["evaluate", *few]) == 0
    assert Image.open(tmp_path / "b.png").width < sheet.width  # without images


def test_few_images_are_in_memory_at_once(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", ["a"])
    taken = 0

    def cases() -> Iterator[Case | str]:
        nonlocal taken
        for number in range(50):
            taken += 1
            yield "a reason" if number == 3 else Case("set", root / "GT" / "a.png", None, root / "GT" / "a.png")

    results: list[Any] = []
    for result in scored_cases(cases(), num_processes=2):
        results.append(result)
        assert taken - len(results) <= 2 * 4
    assert results[3] == "a reason"
    assert all(isinstance(scored, Scored) for _, scored in results[:3] + results[4:])
    assert len(results) == 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_ctrl_c_ends_it_without_a_traceback(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", ["a"], size=(900, 900))
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    for number in range(3000):
        for folder in (root / "GT", predictions):
            (folder / f"{number}.png").symlink_to(folder / "a.png")
    argv = ["--predictions", str(predictions), "--masks", str(root / "GT"), "--contact-sheet", str(tmp_path / "a.png")]
    command = [sys.executable, train_ultimate.__file__, "evaluate", *argv]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    os.set_blocking(process.stderr.fileno(), False)
    time.sleep(0.1)
    deadline = time.monotonic() + 60
    children: list[str] = []
    while len(children) < 2:  # the scoring processes have started
        assert time.monotonic() < deadline
        assert process.poll() is None
        task = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        children = task.read_text().split() if task.exists() else []
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    error = process.stderr.read()
    assert "Traceback" not in error
    assert error.endswith("interrupted\n")
    assert not any(Path(f"/proc/{child}").exists() for child in children)


# Masks and predictions of other kinds


def labels_set(root: Path, number: int = 6) -> Path:
    """Write a set whose masks are label images: 0 background, 1 object, 255 to ignore."""
    write_set(root, [f"m{n}" for n in range(number)], size=(60, 40))
    for path in sorted((root / "GT").iterdir()):
        labels = np.array(Image.open(path)) // 255
        labels[12:, :] = 255
        Image.fromarray(labels).save(path)
    return root


def scores_of(argv: list[str], output: Path) -> dict[str, Any]:
    assert main(["evaluate", *argv, "--json", str(output)]) == 0
    (report,) = json.loads(output.read_text())["sets"].values()
    return report["scores"]


def test_label_images_are_scored_without_their_ignored_pixels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    root, predictions = labels_set(tmp_path / "set"), tmp_path / "predictions"
    predictions.mkdir()
    for number, path in enumerate(sorted((root / "GT").iterdir())):
        labels = np.array(Image.open(path))
        found = np.where(labels == 255, 40 * number, (labels == 1) * 255).astype(np.uint8)  # wrong where ignored
        Image.fromarray(found).save(predictions / path.name)
    argv = ["--predictions", str(predictions), "--masks", str(root / "GT")]
    scores = scores_of([*argv, "--contact-sheet", str(tmp_path / "sheet.png")], tmp_path / "a.json")
    assert "Masks of set: label images with values 0, 1, 255; not 0 is object, 255 is ignored" in caplog.messages
    assert json.loads((tmp_path / "a.json").read_text())["masks"]["set"].startswith(
        "label images with values 0, 1, 255"
    )
    assert (scores["iou"], scores["mae"], scores["s_measure"]) == (1, 0, pytest.approx(1))
    assert scores_of([*argv, "--mask-values", "nonzero"], tmp_path / "b.json")["iou"] < 0.6
    assert scores_of([*argv, "--mask-values", "nonzero-but-255"], tmp_path / "c.json") == scores


def test_a_mask_that_is_all_ignored_is_named_and_not_scored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = labels_set(tmp_path / "set")
    Image.new("L", (60, 40), 255).save(root / "GT" / "m3.png")
    assert main(["evaluate", "--predictions", str(root / "GT"), "--masks", str(root / "GT")]) == 1
    assert f"Not scored: {root / 'GT' / 'm3.png'}: the mask has no pixel that counts" in capsys.readouterr().err


def test_inverted_masks_and_sets_without_objects_are_scored_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "set", ["a", "b", "c", "d"], size=(60, 40))
    truth = write_predictions(root / "GT", tmp_path / "truth", blur=0)
    for path in (root / "GT").iterdir():
        Image.open(path).point(lambda value: 255 - value).save(path)
    argv = ["--predictions", str(truth), "--masks", str(root / "GT")]
    assert scores_of(argv, tmp_path / "a.json")["iou"] == 1
    assert any(message.startswith("masks of set: they look inverted") for message in caplog.messages)
    for path in (root / "GT").iterdir():
        Image.new("L", (60, 40)).save(path)
    caplog.clear()
    assert scores_of(argv, tmp_path / "b.json")["iou"] == 0
    assert any(message.startswith("masks of set: 4 of 4 masks have no object") for message in caplog.messages)


def saved(kind: str, probabilities: np.ndarray, path: Path) -> None:
    """Save a prediction, (H, W) of 0 to 1, as other programs do."""
    grey = (probabilities * 255).round().astype(np.uint8)
    photograph = np.random.default_rng(0).integers(0, 256, (*grey.shape, 3)).astype(np.uint8)
    images = {
        "8 bits": lambda: Image.fromarray(grey),
        "16 bits": lambda: Image.fromarray((probabilities * 65535).astype(np.uint16)),
        "16 bits to 1000": lambda: Image.fromarray((probabilities * 1000).astype(np.uint16)),
        "16 bits to 1": lambda: Image.fromarray((probabilities > 0.5).astype(np.uint16)),
        "0 and 1": lambda: Image.fromarray((probabilities > 0.5).astype(np.uint8)),
        "floats": lambda: Image.fromarray(probabilities.astype(np.float32)),
        "logits": lambda: Image.fromarray(
            np.log(probabilities.clip(1e-3, 0.999) / (1 - probabilities.clip(1e-3, 0.999))).astype(np.float32)
        ),
        "cut-outs": lambda: Image.fromarray(np.dstack([photograph, grey])),
        "grey cut-outs": lambda: Image.fromarray(np.dstack([photograph[:, :, 0], grey])),
        "opaque": lambda: Image.fromarray(grey).convert("RGBA"),
    }
    images[kind]().save(path)


@pytest.mark.parametrize("stretch", [True, False])
@pytest.mark.parametrize(
    ("kind", "named"),
    [
        ("16 bits", ""), ("floats", ""), ("opaque", ""), ("0 and 1", ""), ("16 bits to 1", ""),
        ("16 bits to 1000", "of more than 8 bits, with values up to 1000, read as shares of 1000"),
        ("logits", "read as logits: through the logistic function"),
        ("cut-outs", "their transparency is scored"), ("grey cut-outs", "their transparency is scored"),
    ],
)  # fmt: skip
def test_predictions_of_any_kind_are_scored_like_8_bits(
    kind: str, named: str, stretch: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Without the stretch, one of them is faint: by itself, its values would mean something else."""
    root = write_set(tmp_path / "set", ["a", "b", "c", "d", "e"], size=(60, 40))
    scores = []
    for number, own in enumerate(("8 bits", kind)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for path in sorted((root / "GT").iterdir()):
            probabilities = np.array(Image.open(path).filter(ImageFilter.GaussianBlur(1))) / 255
            probabilities /= probabilities.max()
            if kind in ("0 and 1", "16 bits to 1"):
                probabilities = probabilities.round()
            elif path.stem == "d" and not stretch:
                probabilities *= 0.003
            saved(own, probabilities, folder / f"{path.stem}{'.tif' if own in ('floats', 'logits') else '.png'}")
        argv = ["--predictions", str(folder), "--masks", str(root / "GT"), "--stretch" if stretch else "--no-stretch"]
        scores.append(scores_of(argv, tmp_path / "out.json"))
    assert scores[1]["mae"] == pytest.approx(scores[0]["mae"], abs=3e-3)
    assert scores[1]["iou"] == pytest.approx(scores[0]["iou"], abs=0.01)
    assert (scores[0]["iou"] < 0.9) == (not stretch and kind not in ("0 and 1", "16 bits to 1"))
    warnings = [message for message in caplog.messages if message.startswith("predictions of set: ")]
    assert [named in warning for warning in warnings] == ([True] if named else [])


def test_a_prediction_unlike_the_others_of_its_set_is_named_and_not_scored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / f"{number}.tif" for number in range(60)]
    for number, path in enumerate(files):
        Image.fromarray(np.array([[0.0, 1.0]] * 2, dtype=np.float32) * (1 if number else 255)).save(path)
    reading = PredictionReading(white={"float": 1})
    with pytest.raises(ValueError, match=r"0\.tif: has values from 0 to 255, and the others of its set from 0 to 1"):
        decode_prediction(files[0], reading)
    assert survey_predictions(files[1:]) == reading
    assert decode_prediction(files[1], reading).tolist() == [[0, 255]] * 2


def test_predictions_in_colour_are_named(tmp_path: Path) -> None:
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (20, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    (advice,) = survey_predictions(tmp_path.iterdir()).advice
    assert advice.startswith("they are in colour")


def test_without_the_stretch_a_faint_network_is_scored_as_it_is(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    argv = ["--checkpoint", str(checkpoint), "--dataset-path", str(tiny_dataset), "--precision", "fp32"]
    folder = tmp_path / "saved"
    plain = scores_of([*argv, "--no-stretch", "--save-predictions", str(folder)], tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["stretch"] is False
    assert plain["iou"] != scores_of(argv, tmp_path / "b.json")["iou"]
    again = ["--predictions", str(folder), "--dataset-path", str(tiny_dataset), "--no-stretch"]
    assert scores_of(again, tmp_path / "c.json") == plain
    (first, *_) = sorted((folder / "tiny").iterdir())
    assert np.array(Image.open(first)).max() < 255


def test_held_out_images_are_read_as_the_run_read_them(
    checkpoint: Path, tiny_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    content = read_checkpoint(checkpoint)
    content["config"]["masks"] = MaskReading(threshold=300.0).to_dict()  # by which all masks are empty
    write_checkpoint(tmp_path / "other.pth", content)
    flags = ["--dataset-path", str(tiny_dataset), "--held-out", "--precision", "fp32"]
    scores_of(["--checkpoint", str(tmp_path / "other.pth"), *flags], tmp_path / "a.json")
    (report,) = json.loads((tmp_path / "a.json").read_text())["sets"].values()
    assert [image["object_share"] for image in report["images"]] == [0, 0]
    assert "Masks: as the checkpoint's run read them; above 300 is object" in caplog.messages
    scores_of(["--checkpoint", str(tmp_path / "other.pth"), *flags, "--mask-values", "above-half"], tmp_path / "b.json")
    (report,) = json.loads((tmp_path / "b.json").read_text())["sets"].values()
    assert min(image["object_share"] for image in report["images"]) > 0


# What a user gets wrong


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "evaluate needs --checkpoint or --predictions, one of them"),
        (["--checkpoint", "a", "--predictions", "b"], "one of them"),
        (["--checkpoint", "a"], "--checkpoint goes with --dataset-path"),
        (["--predictions", "b"], "--predictions goes with --masks or --dataset-path"),
        (["--predictions", "b", "--masks", "c", "--dataset-path", "d"], "one of them"),
        (
            ["--predictions", "b", "--masks", "c", "--held-out"],
            "--held-out goes with --checkpoint and one --dataset-path",
        ),
        (["--checkpoint", "a", "--dataset-path", "b", "c", "--held-out"], "--held-out goes with --checkpoint and one"),
        (
            ["--predictions", "b", "--masks", "c", "--save-predictions", "d"],
            "--save-predictions goes with --checkpoint",
        ),
        (["--checkpoint", "a", "--dataset-path", "b", "--img-size", "100"], "--img-size 100 is not a multiple of 32"),
        (["--predictions", "nowhere", "--masks", "c"], "nowhere: no such folder"),
        (["--checkpoint", "nowhere.pth", "--dataset-path", "."], "nowhere.pth: no such file"),
        (
            ["--predictions", ".", "--masks", ".", "--json", "no/where.json"],
            "no/where.json: cannot be written, there is no folder no",
        ),
    ],
)
def test_mistakes_are_reported_in_one_line(
    flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(write_set(tmp_path / "set", ["a"]))
    assert message in failing(flags, capsys)


def test_empty_folders_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    empty = str(tmp_path / "empty")
    assert "no mask (" in failing(["--predictions", empty, "--masks", empty], capsys)
    root = write_set(tmp_path / "set", ["a"])
    shutil.rmtree(root / "GT")
    (root / "GT").mkdir()
    assert "no image there has a mask" in failing(["--predictions", empty, "--dataset-path", str(root)], capsys)


# Found by reviews


def test_sets_of_one_name_are_distinguished(tmp_path: Path) -> None:
    for root, number in (("a", 2), ("b", 3)):
        write_set(tmp_path / root / "TestDataset" / "CAMO", [f"{root}{index}" for index in range(number)])
        write_predictions(tmp_path / root / "TestDataset" / "CAMO" / "GT", tmp_path / "p" / f"{root}-CAMO")
    roots = [str(tmp_path / root / "TestDataset") for root in ("a", "b", "a")]  # one of them twice
    argv = ["--predictions", str(tmp_path / "p"), "--dataset-path", *roots, "--json", str(tmp_path / "out.json")]
    assert main(["evaluate", *argv]) == 0
    sets = json.loads((tmp_path / "out.json").read_text())["sets"]
    assert {name: report["num_images"] for name, report in sets.items()} == {"a-CAMO": 2, "b-CAMO": 3}


def test_set_is_not_named_after_its_image_folder_and_no_prediction_is_written_among_the_data(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_set(tmp_path / "flat", ["x", "y"])
    root = tmp_path / "CAMO-V.1.0"
    (root / "Images").mkdir(parents=True)
    shutil.move(tmp_path / "flat" / "Imgs", root / "Images" / "Test")
    shutil.move(tmp_path / "flat" / "GT", root / "GT")
    argv = ["evaluate", "--checkpoint", str(checkpoint), "--dataset-path", str(root)]
    assert main([*argv, "--save-predictions", str(root)]) == 0
    assert re.search(r"^CAMO-V\.1\.0 +2 ", capsys.readouterr().out, re.MULTILINE)
    assert len(list((root / "CAMO-V.1.0").iterdir())) == 2
    inside = str(root / "Images" / "Test")
    assert "belongs to the dataset; name another folder" in failing([*argv[1:], "--save-predictions", inside], capsys)


def test_network_whose_output_is_not_finite_is_not_scored(
    checkpoint_of_nan: Path, tiny_dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = failing(["--checkpoint", str(checkpoint_of_nan), "--dataset-path", str(tiny_dataset)], capsys)
    assert "the network's output is not finite; try --precision fp32" in line


def test_damaged_photograph_costs_only_its_panel(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", ["a", "b"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    (root / "Imgs" / "b.jpg").write_text("<html>")
    argv = ["--predictions", str(predictions), "--dataset-path", str(root), "--contact-sheet", str(tmp_path / "a.png")]
    assert main(["evaluate", *argv]) == 0
    assert (tmp_path / "a.png").exists()


class KilledReading(MaskReading):
    """A reading that the system kills, as if memory had run out."""

    def read(self, mask: Image.Image, lossy: bool = False) -> Any:
        os.kill(os.getpid(), signal.SIGKILL)


def test_killed_scoring_process_is_reported(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", ["a", "b"])
    case = Case("set", root / "GT" / "a.png", None, root / "GT" / "a.png", mask_reading=KilledReading())
    with pytest.raises(ValueError, match="a process that scores was killed"):
        list(scored_cases([case], num_processes=1))


def test_prediction_that_cannot_be_saved_is_named(tmp_path: Path) -> None:
    root = write_set(tmp_path / "set", ["a"])
    case = Case("set", root / "GT" / "a.png", None, root / "GT" / "a.png", save_as=tmp_path / "nowhere" / "a.png")
    assert "nowhere/a.png: cannot be saved (No such file" in str(score_case(case))


def test_folder_without_a_test_set_is_scored_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_set(tmp_path / "TrainDataset", ["a"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    assert main(["evaluate", "--predictions", str(predictions), "--dataset-path", str(root)]) == 0
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert f"{root}: nothing in its path marks a test set" in warning


@needs_any_name
def test_names_that_are_not_utf_8_are_printed_escaped(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = os.fsdecode(b"caf\xe9")
    odd_checkpoint = tmp_path / f"{name}.pth"
    shutil.copy(checkpoint, odd_checkpoint)
    root = write_set(tmp_path / name, [f"{name}1", f"{name}2"])
    (root / "Imgs" / f"{name}2.jpg").write_text("<html>")
    sheet = ["--contact-sheet", str(tmp_path / f"{name}.png")]
    assert main(["evaluate", "--checkpoint", str(odd_checkpoint), "--dataset-path", str(root), *sheet]) == 1
    printed = capsys.readouterr()
    assert r"caf\udce9.pth" in printed.out
    assert re.search(r"^caf\\udce9 +1 ", printed.out, re.MULTILINE)
    assert r"caf\udce92.jpg: cannot be decoded (not an image)" in printed.err


# Names


def test_masks_of_a_dataset_are_scored_under_its_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("CAMO", "NC4K/TestDataset", "sets/my_masks"):
        root = write_set(tmp_path / folder, ["a", "b", "c"])
        masks = root / "GT" if folder != "sets/my_masks" else (root / "GT").rename(root.with_name("camo masks"))
        predictions = write_predictions(masks, tmp_path / "predictions" / folder)
        assert main(["evaluate", "--predictions", str(predictions), "--masks", str(masks)]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"^(\S.*?)  +3 +\d", out, re.MULTILINE) == ["CAMO", "NC4K", "camo masks"]


def test_predictions_in_the_folder_of_the_masks_name_are_still_found(tmp_path: Path) -> None:
    root = write_set(tmp_path / "CAMO", ["a", "b", "c"])
    write_predictions(root / "GT", tmp_path / "predictions" / "GT")
    assert main(["evaluate", "--predictions", str(tmp_path / "predictions"), "--masks", str(root / "GT")]) == 0


@pytest.mark.parametrize("of_mask", ["{}_mask", "mask_{}", "{}.JPG", "{}"])
@pytest.mark.parametrize("of_prediction", ["{}", "{}_pred"])
def test_predictions_are_found_by_the_rules_for_masks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], of_mask: str, of_prediction: str
) -> None:
    root = write_set(tmp_path / "CAMO", ["a1", "a2", "a3"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions", blur=0)
    for file in list((root / "GT").iterdir()):
        file.rename(file.with_stem(of_mask.format(file.stem)))
    for file in list(predictions.iterdir()):
        file.rename(file.with_stem(of_prediction.format(file.stem)))
    for masks in (["--masks", str(root / "GT")], ["--dataset-path", str(root)]):
        if of_mask == "{}" or of_prediction == "{}" or masks[0] == "--dataset-path":
            assert main(["evaluate", "--predictions", str(predictions), *masks]) == 0
            row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("CAMO   "))
            assert row.split()[-2:] == ["1.000", "1.000"]


def test_a_missing_prediction_is_not_replaced_by_an_overlay(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write_set(tmp_path / "CAMO", ["a", "b", "c"])
    predictions = write_predictions(root / "GT", tmp_path / "predictions")
    write_predictions(root / "GT", predictions / "overlays")
    (predictions / "b.png").unlink()
    line = failing(["--predictions", str(predictions), "--masks", str(root / "GT")], capsys)
    assert "no prediction for 1 of the 3 masks of CAMO: b.png" in line


def test_masks_of_one_name_in_several_folders_keep_their_predictions_apart(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sub-folder for each species, numbers repeated; one of the species has its object elsewhere."""
    for number, animal in enumerate(("frog", "owl")):
        root = write_set(tmp_path / animal, ["1", "2"], size=(64 + number, 64))
        for kind, folder in (("Imgs", "images"), ("GT", "masks")):
            (tmp_path / "data" / folder).mkdir(parents=True, exist_ok=True)
            (root / kind).rename(tmp_path / "data" / folder / animal)
    saved, first, second = tmp_path / "saved", tmp_path / "first.json", tmp_path / "second.json"
    data = ["--dataset-path", str(tmp_path / "data"), "--num-workers", "0"]
    argv = ["evaluate", "--checkpoint", str(checkpoint), *data, "--save-predictions", str(saved), "--json", str(first)]
    assert main(argv) == 0
    assert sorted(path.relative_to(saved).as_posix() for path in saved.rglob("*.png")) == [
        f"data/{animal}/{number}.png" for animal in ("frog", "owl") for number in (1, 2)
    ]
    assert Image.open(saved / "data" / "owl" / "1.png").size == (65, 64)
    assert main(["evaluate", "--predictions", str(saved), *data, "--json", str(second)]) == 0
    sets = [json.loads(file.read_text())["sets"]["data"] for file in (first, second)]
    assert [image["name"] for image in sets[0]["images"]] == ["frog/1.png", "frog/2.png", "owl/1.png", "owl/2.png"]
    assert sets[0]["images"] == sets[1]["images"]
    capsys.readouterr()


@pytest.mark.parametrize("level", [1, 2])
def test_masks_one_or_two_levels_too_high_are_answered_with_the_folder_of_the_masks(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], level: int
) -> None:
    """Photographs below it were taken for masks."""
    masks = tmp_path / "data" / "CAMO" / "GT"
    shutil.copytree(tiny_dataset / "TestDataset", masks.parent)
    above = masks.parents[level - 1]
    line = failing(["--predictions", str(masks), "--masks", str(above)], capsys)
    assert f"--masks {above}: is the folder of a dataset, whose masks are in {masks}; name that folder" in line
    assert f"or give --dataset-path {above}" in line


@pytest.mark.parametrize("stretch", [False, True])
def test_images_without_an_object_are_told_apart_by_predictions_that_are_not_stretched(
    stretch: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of four empty frames has a false alarm, and that one looks more certain than one of the two objects."""
    mask = np.zeros((20, 20), dtype=np.uint8)
    mask[5:10, 5:10] = 255
    for name, value, truth in (
        ("a", 240, mask), ("b", 120, mask), ("c", 10, mask * 0), ("d", 90, mask * 0), ("e", 200, mask * 0),
        ("f", 30, mask * 0),
    ):  # fmt: skip
        for folder, pixels in (("GT", truth), ("found", np.where(mask > 0, value, 0).astype(np.uint8))):
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / folder / f"{name}.png")
    argv = ["--predictions", str(tmp_path / "found"), "--masks", str(tmp_path / "GT"), "--num-workers", "0"]
    assert main(["evaluate", *argv, "--stretch" if stretch else "--no-stretch"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "4 images without an object" in line)
    if stretch:
        assert "--no-stretch says" in line
    else:
        assert "found in 25% of them; AUROC 0.875" in line
