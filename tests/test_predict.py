"""``predict``: from photographs of any kind to PNGs, masks and overlays."""

import csv
import os
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_arguments
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

import train_ultimate
from commands.predict import Prediction, save_prediction
from evaluation.figures import overlay
from evaluation.objects import Found
from evaluation.predictor import load_network
from models import CamouflageSegmenter
from train_ultimate import main


@pytest.fixture(scope="module")
def checkpoint(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    assert main(tiny_arguments(tiny_dataset, directory, "--epochs", "2", "--stage1-epochs", "1")) == 0
    return directory / "best_model.pth"


def photograph(path: Path, size: tuple[int, int] = (60, 40), **options: Any) -> Path:
    """Write a photograph of smooth colours, so that its prediction varies over the image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows, columns = np.linspace(0, 255, size[1])[:, None], np.linspace(0, 255, size[0])[None]
    colours = np.stack(np.broadcast_arrays(rows, columns, 255 - rows), axis=2)
    Image.fromarray(colours.astype(np.uint8)).save(path, **options)
    return path


def predict(checkpoint: Path, *argv: str | Path) -> int:
    flags = ("--device", "cpu", "--precision", "fp32")
    return main(["predict", "--checkpoint", str(checkpoint), *flags, *map(str, argv)])


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def levels_of(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.mode == "L"
        return np.array(image)


def nothing_found(image: Path, save_as: Path, overlay: Path | None = None) -> Prediction:
    found = Found(np.zeros((4, 5), dtype=np.uint8), np.zeros((4, 5), dtype=np.bool_))
    return Prediction(found, image, save_as, as_mask=False, overlay=overlay, least=None)


# What is written


def test_probabilities_at_the_photographs_own_size_are_not_stretched(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photograph(tmp_path / "p" / "a.png", (90, 50))
    assert predict(checkpoint, path, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"Predicted: 1 PNG in {tmp_path}/out (probabilities x 255)"
    network = load_network(checkpoint, "cpu", "fp32", img_size=None)
    image = Image.open(path).resize((64, 64), Image.Resampling.BILINEAR)
    with torch.inference_mode():
        logits = network.logits(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255)
    exact = F.interpolate(logits, (50, 90), mode="bilinear")[0, 0].sigmoid().numpy() * 255
    levels = levels_of(tmp_path / "out" / "a.png")
    assert np.abs(levels - exact).max() < 1
    assert levels.max() < 255 or levels.min() > 0


def test_prediction_does_not_depend_on_batches_processes_and_other_images(checkpoint: Path, tmp_path: Path) -> None:
    for number in range(5):
        photograph(tmp_path / "p" / f"{number}.png", (20 + 30 * number, 70 - 10 * number))
    for name, flags in {"a": ("8", "0"), "b": ("2", "2"), "c": ("1", "3")}.items():
        flags = ("--batch-size", flags[0], "--num-workers", flags[1])
        assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / name, *flags) == 0
    for number in range(5):
        first, *others = (levels_of(tmp_path / name / f"{number}.png").astype(int) for name in "abc")
        assert first.shape == (70 - 10 * number, 20 + 30 * number)
        assert all(abs(first - other).max() <= 1 for other in others)


def test_threshold_makes_masks_of_two_values(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph(tmp_path / "p" / "a.png")
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "soft") == 0
    levels = levels_of(tmp_path / "soft" / "a.png")
    middle = float(np.median(levels)) / 255
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "hard", "--threshold", str(middle)) == 0
    mask = levels_of(tmp_path / "hard" / "a.png")
    assert set(np.unique(mask)) == {0, 255}
    sure = np.abs(levels - middle * 255) > 1
    assert np.array_equal(mask[sure] == 255, levels[sure] > middle * 255)
    assert "(masks, 255 from a probability of" in capsys.readouterr().out


def test_the_table_says_of_each_photograph_what_its_prediction_shows(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(3):
        photograph(tmp_path / "p" / f"{number}.png", (60 + 10 * number, 40))
    (tmp_path / "p" / "broken.png").write_bytes(b"no image")
    table = tmp_path / "found.csv"
    flags = ["--csv", table, "--threshold", "0.4", "--least-object", "0"]
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "masks", *flags) == 1
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "soft") == 1
    assert f"listed in {table}" in capsys.readouterr().out
    rows = list(csv.DictReader(table.open()))
    assert [Path(row["file"]).name for row in rows] == ["0.png", "1.png", "2.png"]
    for row in rows:
        name = Path(row["file"]).name
        mask, levels = levels_of(tmp_path / "masks" / name) > 0, levels_of(tmp_path / "soft" / name) / 255
        assert (int(row["height"]), int(row["width"])) == mask.shape
        assert float(row["object_share"]) == pytest.approx(mask.mean(), abs=1e-6)
        assert float(row["presence"]) == pytest.approx(levels.max(), abs=1e-4)
        expected = 1 - 2 * levels[mask].sum() / (mask.sum() + levels.sum()) if mask.any() else levels.max()
        assert float(row["doubt"]) == pytest.approx(expected, abs=1e-4)
        boxes = [list(map(int, box.split())) for box in row["boxes"].split("; ") if box]
        assert len(boxes) == int(row["objects"])
        inside = np.zeros_like(mask)
        for left, top, width, height in boxes:
            inside[top : top + height, left : left + width] = True
        assert not (mask & ~inside).any()

    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "masks", *flags, "--sort", "doubt") == 1
    doubts = [float(row["doubt"]) for row in csv.DictReader(table.open())]
    assert doubts == sorted(doubts, reverse=True)
    table.write_text("mine\n")
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "masks", *flags) == 2
    assert "predict did not write it" in capsys.readouterr().err


def test_overlays_are_written_beside_predictions_and_never_replace_one(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("a.png", "s/b.jpg", "overlays/c.png"):
        photograph(tmp_path / "p" / name)
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "out", "--overlay", "--threshold", "0.001") == 0
    predictions, overlays = ["a.png", "overlays/c.png", "s/b.png"], ["a.jpg", "overlays/c.jpg", "s/b.jpg"]
    assert written(tmp_path / "out") == sorted([*predictions, *(f"overlays-2/{name}" for name in overlays)])
    before, after = Image.open(tmp_path / "p" / "a.png"), Image.open(tmp_path / "out" / "overlays-2" / "a.jpg")
    assert (after.format, after.mode, after.size) == ("JPEG", "RGB", before.size)
    redder = np.array(after).astype(int)[..., 0] - np.array(before).astype(int)[..., 0]
    assert redder.mean() > 20


def test_overlay_tints_the_object_and_outlines_it_outside() -> None:
    mask = np.zeros((30, 40), dtype=bool)
    mask[10:20, 10:30] = True
    mask[25, 5] = True
    pixels = np.array(overlay(Image.new("RGB", (40, 30), (0, 100, 0)), mask))
    mark, tint = (255, 0, 144), (89, 65, 50)
    assert {tuple(pixel) for pixel in pixels[mask]} == {tint}
    assert tuple(pixels[9, 15]) == tuple(pixels[20, 30]) == tuple(pixels[24, 5]) == tuple(pixels[25, 6]) == mark
    assert tuple(pixels[8, 15]) == tuple(pixels[0, 0]) == (0, 100, 0)
    assert np.array_equal(np.array(overlay(Image.new("RGB", (40, 30)), np.zeros_like(mask))), np.zeros((30, 40, 3)))


def test_tta_and_another_size_apply_as_in_evaluate(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = photograph(tmp_path / "p" / "a.png")
    assert predict(checkpoint, path, "--output", tmp_path / "out", "--tta", "--img-size", "96") == 0
    assert "96 px, fp32 on cpu, with mirror images" in capsys.readouterr().out
    mirrored = tmp_path / "p" / "b.png"
    Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(mirrored)
    assert predict(checkpoint, mirrored, "--output", tmp_path / "out", "--tta", "--img-size", "96") == 0
    one, other = (levels_of(tmp_path / "out" / name).astype(int) for name in ("a.png", "b.png"))
    assert abs(one - other[:, ::-1]).max() <= 1


# Thirty ugly inputs

UGLY_SIZES = {  # (W, H) of the predictions
    "1x1.png": (1, 1), "8000x20.png": (8000, 20), "cmyk.jpg": (60, 40), "sixteen-bit.png": (60, 40),
    "palette.png": (60, 40), "palette-transparent.png": (60, 40), "rgba.png": (60, 40), "grey.png": (60, 40),
    "one-bit.png": (60, 40), "animated.gif": (60, 40), "animated.webp": (60, 40), "turned.jpg": (40, 60),
    "png-by-its-bytes.jpg": (60, 40), "UPPER.JPG": (60, 40), "mit Leerzeichen, ünï 写真.jpg": (60, 40),
    "x" * 246 + ".jpg": (60, 40), "link.jpg": (60, 40), "folder.jpg/inside.png": (60, 40), "tagged.tiff": (60, 40),
    "turned.tif": (40, 60), "bitmap.bmp": (60, 40), "float.tif": (60, 40), "grey-and-alpha.png": (60, 40),
    "d1/same.jpg": (60, 40), "d2/same.jpg": (30, 20),
}  # fmt: skip
UGLY_PROBLEMS = {
    "cut-short.jpg": "cannot be decoded (image file is truncated",
    "empty.jpg": "cannot be decoded (not an image)",
    "text.jpg": "cannot be decoded (not an image)",
    "dangling.jpg": "a link to nowhere.jpg, which cannot be read (No such file or directory)",
    "bomb.png": "cannot be decoded (3600 megapixels take 14.4 GB of memory in each process; the limit is 128, to read",
    "pipe.jpg": "not a file but a pipe, socket or device",
    **({"secret.jpg": "Permission denied"} if os.geteuid() else {}),
}
UGLY_PASSED_OVER = (".hidden.jpg", "notes.txt", "loop")


def write_ugly(root: Path) -> None:
    plain = Image.open(photograph(root / "d1" / "same.jpg"))
    photograph(root / "d2" / "same.jpg", (30, 20))
    photograph(root / "1x1.png", (1, 1))
    photograph(root / "8000x20.png", (8000, 20))
    plain.convert("CMYK").save(root / "cmyk.jpg")
    Image.fromarray((np.array(plain.convert("L")).astype(np.uint16)) * 257).save(root / "sixteen-bit.png")
    palette = plain.convert("P", palette=Image.Palette.ADAPTIVE)
    palette.save(root / "palette.png")
    palette.save(root / "palette-transparent.png", transparency=bytes(range(0, 250, 10)))
    for mode, name in {"RGBA": "rgba", "L": "grey", "1": "one-bit", "LA": "grey-and-alpha"}.items():
        plain.convert(mode).save(root / f"{name}.png")
    frames = [plain.transpose(Image.Transpose.ROTATE_180), plain.convert("L").convert("RGB")]
    for suffix in ("gif", "webp"):
        plain.save(root / f"animated.{suffix}", save_all=True, append_images=frames)
    exif = plain.getexif()
    exif[0x0112] = 6
    plain.save(root / "turned.jpg", exif=exif)
    plain.save(root / "turned.tif", exif=exif)
    for name in ("png-by-its-bytes.jpg", ".hidden.jpg", "folder.jpg/inside.png", "secret.jpg"):
        photograph(root / name, format="PNG")
    for name in ("UPPER.JPG", "mit Leerzeichen, ünï 写真.jpg", "x" * 246 + ".jpg", "tagged.tiff", "bitmap.bmp"):
        photograph(root / name)
    (root / "link.jpg").symlink_to("UPPER.JPG")
    (root / "dangling.jpg").symlink_to("nowhere.jpg")
    (root / "loop").symlink_to(root)
    Image.fromarray(np.array(plain.convert("L")).astype(np.float32) / 255).save(root / "float.tif")
    whole = photograph(root / "cut-short.jpg", (300, 200)).read_bytes()
    (root / "cut-short.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "empty.jpg").touch()
    (root / "text.jpg").write_text("no image, although its name says so\n")
    (root / "notes.txt").write_text("not meant to be one\n")
    (root / "secret.jpg").chmod(0)
    if not os.geteuid():
        (root / "secret.jpg").unlink()
    os.mkfifo(root / "pipe.jpg")
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")
    png = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    (root / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(png))


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_each_of_thirty_ugly_inputs_is_predicted_or_named(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], num_workers: str
) -> None:
    root, out = tmp_path / "ugly", tmp_path / "out"
    write_ugly(root)
    assert len(UGLY_SIZES) + len(UGLY_PROBLEMS) + len(UGLY_PASSED_OVER) >= 30
    assert (
        predict(checkpoint, root, root / "bitmap.bmp", "--output", out, "--overlay", "--num-workers", num_workers) == 1
    )
    printed = capfd.readouterr()
    for name, size in UGLY_SIZES.items():
        stem = name.rsplit(".", 1)[0]
        stem = name if stem in ("turned", "animated") else stem  # two of this name in one folder
        with Image.open(out / f"{stem}.png") as prediction, Image.open(out / "overlays" / f"{stem}.jpg") as picture:
            assert (prediction.mode, prediction.size) == ("L", size), name
            assert (picture.mode, picture.size) == ("RGB", size), name
    assert len(written(out)) == 2 * len(UGLY_SIZES)
    lines = [line for line in printed.err.splitlines() if "Not predicted: " in line]
    assert len(lines) == len(UGLY_PROBLEMS)
    for name, reason in UGLY_PROBLEMS.items():
        assert sum(f"Not predicted: {root / name}: {reason}" in line for line in lines) == 1, name
    for leftover in ("Traceback", "Warning"):
        assert leftover not in printed.err
    assert "; 1 named more than once, predicted once; " in printed.out.splitlines()[-1]
    assert printed.out.splitlines()[-1].endswith(f"; {len(UGLY_PROBLEMS)} not predicted, named above")


def test_photographs_are_decoded_as_in_training_whatever_their_encoding(checkpoint: Path, tmp_path: Path) -> None:
    write_ugly(tmp_path / "ugly")
    predict(checkpoint, tmp_path / "ugly", "--output", tmp_path / "out", "--num-workers", "0")
    grey, rgb, *_ = (levels_of(tmp_path / "out" / f"{name}.png").astype(int) for name in ("grey", "tagged"))
    for same in ("sixteen-bit", "float", "grey-and-alpha"):
        assert abs(levels_of(tmp_path / "out" / f"{same}.png") - grey).max() <= 3, same
    assert abs(levels_of(tmp_path / "out" / "rgba.png") - levels_of(tmp_path / "out" / "d1" / "same.png")).max() <= 1
    assert rgb.shape == grey.shape


def test_hidden_and_strangely_named_files_are_tried_if_given_by_name(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hidden, odd = photograph(tmp_path / ".a.jpg"), photograph(tmp_path / "frame.0001", format="PNG")
    (tmp_path / "notes.txt").write_text("hello")
    assert predict(checkpoint, hidden, odd, tmp_path / "notes.txt", "--output", tmp_path / "out") == 1
    assert written(tmp_path / "out") == [".a.png", "frame.png"]
    assert "notes.txt: cannot be decoded (not an image)" in capsys.readouterr().err


@pytest.mark.skipif(os.name != "posix" or sys.platform == "darwin", reason="names must be UTF-8 there")
def test_name_that_is_not_utf_8_is_kept(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p").mkdir()
    name = os.fsdecode(b"caf\xe9")
    photograph(tmp_path / "a.png").rename(tmp_path / "p" / f"{name}.png")
    (tmp_path / "p" / f"{name}2.png").touch()
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "out", "--num-workers", "0") == 1
    assert written(tmp_path / "out") == [f"{name}.png"]


# No existing file is lost


@pytest.mark.parametrize("given", ["p", "p/a.jpg", "p/*.jpg"])
def test_output_among_the_photographs_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    photograph(tmp_path / "p" / "a.jpg")
    (tmp_path / "elsewhere").symlink_to("p")
    for output in ("p", "elsewhere"):
        assert predict(Path(__file__), tmp_path / given, "--output", tmp_path / output) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert "is in a folder that predictions would be written to" in error or "no image found" in error
    assert written(tmp_path / "p") == ["a.jpg"]


def test_output_folder_with_a_linked_photograph_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = photograph(tmp_path / "archive" / "a.png")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "a.png").symlink_to(kept)
    assert predict(Path(__file__), tmp_path / "p", "--output", tmp_path / "archive") == 2
    assert "predictions would be written to" in capsys.readouterr().err


def test_output_below_the_input_is_not_predicted_in_the_next_run(checkpoint: Path, tmp_path: Path) -> None:
    photograph(tmp_path / "p" / "s" / "a.jpg")
    for _ in range(2):
        assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "p" / "out", "--overlay") == 0
    assert written(tmp_path / "p") == ["out/overlays/s/a.jpg", "out/s/a.png", "s/a.jpg"]


def test_files_of_other_programs_are_never_replaced(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image, mask = photograph(tmp_path / "Imgs" / "a.jpg"), photograph(tmp_path / "GT" / "a.png")
    before = mask.read_bytes()
    assert predict(checkpoint, image, "--output", tmp_path / "GT") == 2
    assert "a.png exists already, and predict did not write it" in capsys.readouterr().err
    assert mask.read_bytes() == before
    assert predict(checkpoint, image, "--output", tmp_path / "out", "--overlay") == 0
    photograph(tmp_path / "out" / "overlays" / "a.jpg")  # another program's
    assert predict(checkpoint, image, "--output", tmp_path / "out", "--overlay") == 2
    assert predict(checkpoint, image, "--output", tmp_path / "out") == 0


def test_overlay_that_cannot_be_saved_does_not_cost_the_prediction(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wide = photograph(tmp_path / "wide.png", (65_536, 1))
    assert predict(checkpoint, wide, "--output", tmp_path / "out", "--overlay") == 1
    assert "wide.png: overlay cannot be saved" in capsys.readouterr().err
    assert written(tmp_path / "out") == ["wide.png"]


@pytest.mark.parametrize("memory", [3, 1, 0])
def test_batches_that_exceed_memory_are_halved(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], memory: int
) -> None:
    """The device has memory for ``memory`` images at once."""
    for number in range(7):
        photograph(tmp_path / "p" / f"{number}.jpg", (40 + number, 30))
    argv = (tmp_path / "p", "--batch-size", "7", "--num-workers", "0", "--output")
    assert predict(checkpoint, *argv, tmp_path / "whole") == 0

    def refuse(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(module, CamouflageSegmenter) and len(inputs[0]) > memory and inputs[0].any():
            raise torch.OutOfMemoryError

    hook = register_module_forward_pre_hook(refuse)
    try:
        assert predict(checkpoint, *argv, tmp_path / "parts") == (0 if memory else 2)
    finally:
        hook.remove()
    if memory:
        assert written(tmp_path / "parts") == written(tmp_path / "whole")
        for name in written(tmp_path / "whole"):
            difference = levels_of(tmp_path / "parts" / name).astype(int) - levels_of(tmp_path / "whole" / name)
            assert abs(difference).max() <= 1
    else:
        assert "out of memory with one image" in capsys.readouterr().err


def test_link_with_a_predictions_name_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    kept = photograph(tmp_path / "kept.png")
    before = kept.read_bytes()
    (tmp_path / "a.png").symlink_to(kept)
    assert save_prediction(nothing_found(kept, tmp_path / "a.png")) is None
    assert kept.read_bytes() == before
    assert levels_of(tmp_path / "a.png").shape == (4, 5)


def test_prediction_that_cannot_be_saved_is_named_and_leaves_nothing_behind(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photograph(tmp_path / "p" / "a.jpg")
    photograph(tmp_path / "p" / "b.jpg")
    (tmp_path / "out" / "a.png").mkdir(parents=True)
    assert predict(checkpoint, tmp_path / "p", "--output", tmp_path / "out") == 1
    printed = capsys.readouterr()
    assert "a.jpg: prediction cannot be saved ([Errno 21] Is a directory" in printed.err
    assert "Predicted: 1 PNG in" in printed.out
    assert written(tmp_path / "out") == ["b.png"]


# What a user gets wrong


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["a.jpg", "--output", "out"], "the following arguments are required: --checkpoint"),
        (["--checkpoint", "a.pth", "--output", "out"], "the following arguments are required: INPUT"),
        (["--checkpoint", "a.pth", "a.jpg"], "the following arguments are required: --output"),
        (["--checkpoint", "a", "b", "--output", "c", "--threshold", "0"], "--threshold: must be above 0 and at most 1"),
        (["--checkpoint", "a", "b", "--output", "c", "--img-size", "100"], "--img-size 100 is not a multiple of 32"),
        (["--checkpoint", "a", "b", "--output", "c", "--sort", "doubt"], "--sort and --least-object go with --csv"),
        (["--checkpoint", __file__, "nowhere", "--output", "c"], "no image found; give files, folders or patterns"),
        (["--checkpoint", __file__, "b", "--output", __file__], "is a file; name a folder"),
        (["--checkpoint", __file__, str(Path(__file__).parent / "?.jpg"), "--output", "c"], "no image found"),
    ],
)
def test_mistakes_are_reported_without_torch_and_nothing_is_written(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "evaluation.predictor", None)  # importing it is an ImportError
    assert main(["predict", *argv]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert list(tmp_path.iterdir()) == []


def test_missing_checkpoint_is_reported_before_a_folder_is_created(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(tmp_path / "no.pth", photograph(tmp_path / "a.jpg"), "--output", tmp_path / "out") == 2
    assert "no.pth: no such file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_network_whose_output_is_not_finite_writes_no_prediction(
    checkpoint_of_nan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert predict(checkpoint_of_nan, photograph(tmp_path / "a.jpg"), "--output", tmp_path / "out") == 1
    assert "a.jpg: the network's output is not finite; try --precision fp32" in capsys.readouterr().err
    assert written(tmp_path / "out") == []


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for the processes in /proc")
def test_ctrl_c_ends_it_without_a_traceback_and_without_half_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    first = photograph(tmp_path / "p" / "a.jpg", (900, 700))
    for number in range(3000):
        (tmp_path / "p" / f"{number}.jpg").symlink_to(first)
    argv = ["predict", "--checkpoint", str(checkpoint), str(tmp_path / "p"), "--output", str(tmp_path / "out")]
    command = [sys.executable, train_ultimate.__file__, *argv, "--num-workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    deadline = time.monotonic() + 100
    while not (tmp_path / "out").exists() or len(list((tmp_path / "out").glob("*.png"))) < 3:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(30) == 130
    error = process.stderr.read()
    assert "Traceback" not in error
    assert error.endswith("interrupted\n")
    assert not any(Path(f"/proc/{child}").exists() for child in children)
    for path in (tmp_path / "out").iterdir():
        assert path.suffix == ".png"
        assert levels_of(path).shape == (700, 900)
