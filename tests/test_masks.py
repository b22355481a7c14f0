"""Masks of every kind that people have: a sample decides how they are read, and they are read as they were meant."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import failing, tiny_arguments, train
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from commands import cli
from data.cache import open_cache
from data.dataset import CamouflageDataset, collate, load_image, load_mask
from data.decoding import decode_mask
from data.layouts import Pair, find_subsets, training_pairs
from data.loading import training_loader, validation_loader, windows
from data.masks import ABOVE_HALF, IGNORED, READINGS, MaskReading, brightest
from data.sampler import SampleKey
from data.survey import MASK_VALUES, MaskSurvey, survey_masks, survey_pairs
from losses import deep_supervision_loss
from runtime.checkpoint import read_checkpoint
from runtime.ranks import Ranks
from train_ultimate import main, validate
from training.run import Run
from training.settings import CHOICES
from training.setup import prepare

Labels = NDArray[Any]
Drawn = Image.Image | tuple[Image.Image, str, int]  # a PNG; or a file's ending, and a JPEG's quality

SIZE = (72, 96)
GREY = [0, 1, 255]  # background, object, ignored


def objects(number: int = 8) -> list[Labels]:
    """Draw masks, (H, W), of 0 for background and the numbers 1 to 3 for the parts of an object."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    masks = []
    for _ in range(number):
        (row, column), radius = rng.uniform(0.35, 0.65, 2) * SIZE, rng.uniform(14, 24)
        inside = np.hypot(y - row, (x - column) * rng.uniform(0.6, 1)) < radius
        masks.append(inside * (1 + (x > column) + (y > row) * (x > column)))
    return masks


def photograph(seed: int) -> NDArray[np.uint8]:
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    smooth = np.array(coarse.resize((SIZE[1], SIZE[0]), Image.Resampling.BICUBIC)).astype(int)
    return (smooth + rng.integers(-20, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def outline(parts: Labels, width: int = 2) -> NDArray[np.bool_]:
    """Return where the pixels within ``width`` of the object's outline are."""
    mask = Image.fromarray((parts > 0).astype(np.uint8) * 255)
    grown, shrunk = (mask.filter(kind(2 * width + 1)) for kind in (ImageFilter.MaxFilter, ImageFilter.MinFilter))
    return (np.array(grown) > 0) & (np.array(shrunk) == 0)


def grey(values: Labels, dtype: Any = np.uint8) -> Image.Image:
    return Image.fromarray(values.astype(dtype))


def table(parts: Labels, values: Any, dtype: Any = np.uint8) -> Image.Image:
    """Return an image of these values, or colours, for background, first part, second part, ..."""
    return Image.fromarray(np.array(values, dtype=dtype)[parts])


def bordered(parts: Labels, border: int = 255) -> Labels:
    return np.where(outline(parts), border, parts)


def soft(parts: Labels, low: float, high: float, dtype: Any = np.uint8) -> Image.Image:
    """Return a mask with soft outlines, of any range."""
    blurred = np.array(grey((parts > 0) * 255).filter(ImageFilter.GaussianBlur(1))).astype(float) / 255
    return Image.fromarray((low + blurred * (high - low)).astype(dtype))


def palette(values: Labels, colours: dict[int, tuple[int, int, int]]) -> Image.Image:
    image = grey(values)
    image.putpalette([part for index in range(256) for part in colours.get(index, (0, 0, 0))])
    return image


def with_alpha(colour: Any, alpha: Labels) -> Image.Image:
    return Image.fromarray(np.dstack([colour, alpha]).astype(np.uint8))


def one_channel(parts: Labels, value: Any, others: int = 0) -> Image.Image:
    pixels = np.full((*SIZE, 3), others, dtype=np.uint8)
    pixels[:, :, 0] = value * (parts > 0)
    return Image.fromarray(pixels)


VOC = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 255: (224, 224, 192)}
PRIMARY = {1: (255, 0, 0), 2: (0, 255, 0), 3: (0, 0, 255)}
DARK = [(0, 0, 0), (90, 0, 0), (0, 255, 0), (0, 0, 60)]
BRIGHT = [(0, 0, 0), (220, 20, 60), (0, 200, 142), (0, 60, 200)]
CITY = [(0, 0, 0), (220, 20, 60), (0, 0, 142), (0, 60, 100)]
ON_WHITE = [(255, 255, 255), *CITY[1:]]

# What a user has -> how it is drawn from the parts of an object. In each, all but the background is object.
KINDS: dict[str, Callable[[Labels, int], Drawn]] = {
    "0 and 1": lambda parts, n: grey(parts > 0),
    "0, 1 and 255 to ignore": lambda parts, n: grey(bordered(parts > 0)),
    "classes and 255 to ignore": lambda parts, n: grey(bordered((parts > 0) * (n % 4 + 5))),
    "0, 1 and 255 to ignore, as RGB": lambda parts, n: grey(bordered(parts > 0)).convert("RGB"),
    "0, 128 to ignore, 255": lambda parts, n: grey(np.where(outline(parts), 128, (parts > 0) * 255)),
    "trimaps of 1, 2 and 3 to ignore": lambda parts, n: grey(np.where(outline(parts), 3, 2 - (parts > 0))),
    "0, 128 and 255": lambda parts, n: table(parts, [0, 128, 255, 128]),
    "0, 85, 170 and 255": lambda parts, n: table(parts, [0, 85, 170, 255]),
    "ids": lambda parts, n: grey(parts),
    "one id in each mask": lambda parts, n: grey((parts > 0) * (n + 1)),
    "ids of 16 bits": lambda parts, n: grey(parts * 1000, np.uint16),
    "small ids of 16 bits": lambda parts, n: grey(parts, np.uint16),
    "16 bits and 65535 to ignore": lambda parts, n: grey(bordered(parts, 65535), np.uint16),
    "ids without a pattern": lambda parts, n: table(parts, [0, *np.random.default_rng(n).integers(1, 256, 3)]),
    "255 as background": lambda parts, n: table(parts, [255, 0, 1, 2]),
    "0 and 1 and 0 and 255": lambda parts, n: grey((parts > 0) * (1 if n % 2 else 255)),
    "black and white, 1 bit": lambda parts, n: Image.fromarray(parts > 0),
    "black and white of 16 bits": lambda parts, n: grey((parts > 0) * 65535, np.uint16),
    "floats of 0 and 1": lambda parts, n: (grey(parts > 0, np.float32), ".tif", 0),
    "a dark palette": lambda parts, n: palette(parts > 0, {1: (64, 0, 0)}),
    "a palette of white and black": lambda parts, n: palette(parts == 0, {0: (255, 255, 255), 1: (0, 0, 0)}),
    "VOC's palette": lambda parts, n: palette(parts, VOC),
    "VOC's palette with borders": lambda parts, n: palette(bordered(parts), VOC),
    "VOC's colours with borders": lambda parts, n: palette(bordered(parts), VOC).convert("RGB"),
    "a palette whose 255 is black": lambda parts, n: palette(bordered(parts), PRIMARY),
    "a palette of one colour": lambda parts, n: palette(parts, {}),
    "a palette for each mask": lambda parts, n: table(parts, np.roll(CITY, n, axis=1)).quantize(8),
    "colours on black": lambda parts, n: table(parts, CITY),
    "colours on white": lambda parts, n: table(parts, ON_WHITE),
    "colours and black on white": lambda parts, n: table(parts, [ON_WHITE[0], (0, 0, 0), *CITY[2:]]),
    "colours on grey": lambda parts, n: table(parts, [(128, 128, 128), *CITY[1:]]),
    "a dark primary colour": lambda parts, n: table(parts, [(0, 0, 0), *[(0, 0, 90)] * 3]),
    "a colour of each mask, some dark": lambda parts, n: table((parts > 0) * (1 + n % 3), DARK),
    "red of 1": lambda parts, n: one_channel(parts, 1),
    "ids in red": lambda parts, n: one_channel(parts, parts),
    "red beside constant channels": lambda parts, n: one_channel(parts, 255, others=255),
    "opaque colours": lambda parts, n: table(parts, CITY).convert("RGBA"),
    "cut-outs": lambda parts, n: with_alpha(photograph(n), (parts > 0) * 255),
    "cut-outs on black": lambda parts, n: with_alpha(photograph(n) * (parts > 0)[..., None], (parts > 0) * 255),
    "grey cut-outs": lambda parts, n: with_alpha(photograph(n)[:, :, 0], (parts > 0) * 255),
    "cut-outs with a palette": lambda parts, n: with_alpha(photograph(n), (parts > 0) * 255).quantize(128, 2),
    "white with transparency": lambda parts, n: with_alpha(np.full((*SIZE, 3), 255), (parts > 0) * 255),
    "half transparent": lambda parts, n: with_alpha(one_channel(parts, 255), (parts > 0) * 128),
    "cut-outs of the background": lambda parts, n: with_alpha(photograph(n), (parts == 0) * 255),
    "inverted": lambda parts, n: grey((parts == 0) * 255),
    "inverted 0 and 1": lambda parts, n: grey(parts == 0),
    "inverted as RGB": lambda parts, n: grey((parts == 0) * 255).convert("RGB"),
    "inverted, 1 bit": lambda parts, n: Image.fromarray(parts == 0),
}  # fmt: skip
NOISY: dict[str, Callable[[Labels, int], Drawn]] = {
    "JPEG of 0 and 1": lambda parts, n: (grey(parts > 0), ".jpg", 100),
    "JPEG of ids": lambda parts, n: (grey(parts * 10), ".jpg", 95),
    "JPEG of 0, 128 and 255": lambda parts, n: (table(parts, [0, 128, 255, 128]), ".jpg", 90),
    "JPEG of 0 and 100": lambda parts, n: (grey((parts > 0) * 100), ".jpg", 85),
    "JPEG of colours on black": lambda parts, n: (table(parts, BRIGHT), ".jpg", 90),
    "JPEG of colours on white": lambda parts, n: (table(parts, ON_WHITE), ".jpg", 90),
    "inverted JPEG": lambda parts, n: (grey((parts == 0) * 255), ".jpg", 75),
}  # fmt: skip
SOFT: dict[str, tuple[float, float, Any]] = {
    "0 to 100": (0, 100, np.uint8), "50 to 200": (50, 200, np.uint8), "16 bits": (0, 65535, np.uint16),
    "16 bits to 1000": (0, 1000, np.uint16), "floats": (0, 1, np.float32), "inverted": (255, 0, np.uint8),
    "0 to 255": (0, 255, np.uint8),
}  # fmt: skip


def save(drawn: Drawn, path: Path) -> Path:
    """Save a drawn mask at a path without ending, and return the path with it."""
    image, ending, quality = drawn if isinstance(drawn, tuple) else (drawn, ".png", 0)
    path = path.with_name(path.name + ending)
    if quality:
        image.save(path, quality=quality, subsampling=0)
    else:
        image.save(path)
    return path


def written(folder: Path, draw: Callable[[Labels, int], Drawn], parts: list[Labels]) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    return [save(draw(mask, number), folder / f"{number:02}") for number, mask in enumerate(parts)]


def overlaps(paths: list[Path], parts: list[Labels], reading: MaskReading) -> list[float]:
    """Return the IoU of each mask with what was meant, over the pixels that count."""
    scores = []
    for path, mask in zip(paths, parts, strict=True):
        labels, meant = decode_mask(path, reading), mask > 0
        counts = labels != IGNORED
        assert counts.mean() > 0.8
        scores.append(float(((labels == 1) & meant)[counts].sum() / ((labels == 1) | meant)[counts].sum()))
    return scores


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_every_kind_are_read_as_they_were_meant(kind: str, tmp_path: Path) -> None:
    parts = objects()
    paths = written(tmp_path, KINDS[kind], parts)
    survey = survey_masks(paths)
    assert overlaps(paths, parts, survey.reading) == [1.0] * len(parts), survey.summary
    has_ignored = any((decode_mask(path, survey.reading) == IGNORED).any() for path in paths)
    assert has_ignored == ("ignore" in kind or "borders" in kind or "255 is black" in kind), survey.summary
    assert survey.is_inverted == ("inverted" in kind or kind == "cut-outs of the background")
    assert bool(survey.advice) == survey.is_inverted


@pytest.mark.parametrize("kind", NOISY)
def test_masks_with_compression_noise_are_read_as_they_were_meant(kind: str, tmp_path: Path) -> None:
    parts = objects()
    paths = written(tmp_path, NOISY[kind], parts)
    survey = survey_masks(paths)
    assert min(overlaps(paths, parts, survey.reading)) > 0.95, survey.summary


@pytest.mark.parametrize("kind", SOFT)
def test_soft_masks_are_cut_at_half_of_the_range_of_all(kind: str, tmp_path: Path) -> None:
    """One mask is darker than the others: by itself, its range would be another."""
    low, high, dtype = SOFT[kind]
    parts = objects()
    darker = [0.4 if number == 2 else 1.0 for number in range(len(parts))]
    ending = ".tif" if dtype == np.float32 else ".png"
    paths = written(
        tmp_path,
        lambda mask, n: (soft(mask, low, low + darker[n] * (high - low) if low < high else high, dtype), ending, 0),
        parts,
    )
    reading = survey_masks(paths).reading
    half = 128 if {low, high} == {0, 255} else (low + high) / 2
    for number, path in enumerate(paths):
        values = np.array(Image.open(path))
        if kind != "0 to 255" or darker[number] == 1:
            assert np.array_equal(decode_mask(path, reading) == 1, values > half if high > low else values <= half)


def ordinary(kind: str) -> Callable[[Labels, int], Drawn]:
    draw: dict[str, Callable[[Labels, int], Drawn]] = {
        "PNG": lambda parts, n: grey((parts > 0) * 255),
        "RGB": lambda parts, n: grey((parts > 0) * 255).convert("RGB"),
        "RGBA": lambda parts, n: grey((parts > 0) * 255).convert("RGBA"),
        "palette": lambda parts, n: palette(parts > 0, {1: (255, 255, 255)}),
        "soft outlines": lambda parts, n: soft(parts, 0, 255),
        "half outlines": lambda parts, n: grey(((parts > 0) * 255 + np.roll(parts > 0, 1, 1) * 255) // 2),
        "JPEG 95": lambda parts, n: (grey((parts > 0) * 255), ".jpg", 95),
        "JPEG 75": lambda parts, n: (grey((parts > 0) * 255), ".jpg", 75),
        "JPEG 30": lambda parts, n: (grey((parts > 0) * 255), ".jpg", 30),
        "JPEG of RGB": lambda parts, n: (grey((parts > 0) * 255).convert("RGB"), ".jpg", 80),
        "some empty": lambda parts, n: grey((parts > 0) * 255 * (n % 3 > 0)),
        "a grey object": lambda parts, n: table(parts, [0, 255, 255, 90 if n == 3 else 255]),
    }  # fmt: skip
    return draw[kind]


ORDINARY = (
    "PNG", "RGB", "RGBA", "palette", "soft outlines", "half outlines", "JPEG 95", "JPEG 75", "JPEG 30", "JPEG of RGB",
    "some empty", "a grey object",
)  # fmt: skip


@pytest.mark.parametrize("kind", ORDINARY)
def test_black_and_white_masks_are_cut_above_half_bit_for_bit(kind: str, tmp_path: Path) -> None:
    """As before there was a decision: values above 128 are object."""
    number = 16 if kind == "a grey object" else 8
    paths = written(tmp_path, ordinary(kind), objects(number))
    survey = survey_masks(paths)
    assert not survey.is_inverted
    assert survey.advice == survey.constant == ""
    for path in paths:
        assert np.array_equal(decode_mask(path, survey.reading) == 1, brightest(Image.open(path)) > 128)
    assert survey.reading == ABOVE_HALF


def test_black_and_white_masks_saved_again_from_jpegs_are_no_labels(tmp_path: Path) -> None:
    parts = objects()
    for quality in (75, 97):
        folder = tmp_path / str(quality)
        jpegs = written(folder, lambda mask, n, q=quality: (grey((mask > 0) * 255), ".jpg", q), parts)
        for jpeg in jpegs:
            Image.open(jpeg).save(jpeg.with_suffix(".png"))
        assert survey_masks([jpeg.with_suffix(".png") for jpeg in jpegs]).reading == ABOVE_HALF


def test_the_decision_does_not_depend_on_order_or_folder(tmp_path: Path) -> None:
    parts = objects(60)
    first = written(tmp_path / "a", KINDS["0, 1 and 255 to ignore"], parts)
    other = written(tmp_path / "b" / "c", KINDS["0, 1 and 255 to ignore"], parts)
    survey = survey_masks(first)
    assert survey == survey_masks(first[::-1]) == survey_masks(other)
    assert survey.num_looked_at == 48
    assert survey.summary == "label images with values 0, 1, 255; not 0 is object, 255 is ignored"


def test_files_that_cannot_be_decoded_are_left_out_of_the_decision(tmp_path: Path) -> None:
    paths = written(tmp_path, KINDS["ids"], objects())
    (tmp_path / "page.png").write_text("<html>")
    (tmp_path / "link.png").symlink_to("nowhere.png")
    survey = survey_masks([*paths, tmp_path / "page.png", tmp_path / "link.png"])
    assert survey.num_looked_at == len(paths)
    assert survey.reading == survey_masks(paths).reading
    assert survey_masks([tmp_path / "page.png"]) == MaskSurvey(ABOVE_HALF, "masks of one value each")


def test_photographs_are_named(tmp_path: Path) -> None:
    survey = survey_masks(written(tmp_path, lambda _, n: Image.fromarray(photograph(n)), objects()))
    assert "look like photographs" in survey.advice


def test_a_large_mask_is_looked_at_in_bands(tmp_path: Path) -> None:
    parts = [np.kron(mask, np.ones((24, 24), dtype=int)) for mask in objects(3)]  # 4 megapixels
    paths = written(tmp_path, KINDS["colours on black"], parts)
    assert overlaps(paths, parts, survey_masks(paths).reading) == [1.0] * 3


@pytest.mark.parametrize("values", MASK_VALUES[1:])
def test_what_the_user_says_wins(values: str, tmp_path: Path) -> None:
    paths = written(tmp_path, KINDS["0, 1 and 255 to ignore"], objects())
    survey = survey_masks(paths, values)
    assert survey.reading == READINGS[values]
    labels, stored = decode_mask(paths[0], survey.reading), np.array(Image.open(paths[0]))
    expected = {
        "above-half": stored > 128, "nonzero": stored > 0, "nonzero-but-255": stored == 1, "alpha": stored > 128,
        "inverted": stored <= 128,
    }  # fmt: skip
    assert np.array_equal(labels == 1, expected[values])
    assert (labels == IGNORED).any() == (values == "nonzero-but-255")
    assert CHOICES["mask_values"] == MASK_VALUES


def test_a_reading_survives_json() -> None:
    for reading in (
        ABOVE_HALF,
        *READINGS.values(),
        MaskReading("colour", background=(255, 255, 255), ignored=(224, 224, 192), tolerance=12.5),
        MaskReading(threshold=32767.5, inverted=True),
    ):
        assert MaskReading.from_dict(json.loads(json.dumps(reading.to_dict()))) == reading
    for wrong in ({"channel": "green"}, {"colour": 1}):
        with pytest.raises(ValueError, match="no reading of masks"):
            MaskReading.from_dict(wrong)


# A dataset


def dataset(root: Path, draw: Callable[[Labels, int], Drawn], number: int = 12) -> Path:
    """Write a dataset of which 11 in 12 pairs are for training and the others for testing."""
    for index, mask in enumerate(objects(number)):
        split = "TestDataset" if index % 12 == 11 else "TrainDataset"
        for folder in ("Imgs", "GT"):
            (root / split / folder).mkdir(parents=True, exist_ok=True)
        Image.fromarray(photograph(index)).save(root / split / "Imgs" / f"{index:02}.png")
        save(draw(mask, index), root / split / "GT" / f"{index:02}")
    return root


def pairs_of(root: Path) -> list[Pair]:
    return training_pairs(find_subsets(root), root)


def test_samples_batches_and_augmentation_keep_ignored_pixels(tmp_path: Path) -> None:
    root = dataset(tmp_path, KINDS["0, 1 and 255 to ignore"])
    pairs = pairs_of(root)
    reading = survey_pairs(pairs).reading
    for on_device in (False, True):
        samples = CamouflageDataset(pairs, 64, augmented=True, masks=reading, on_device=on_device)
        batch = collate([samples[SampleKey(0, index)] for index in range(4)])
        assert batch.masks.unique().tolist() == [0, 1, IGNORED]
    plain = CamouflageDataset(pairs, 64, masks=reading)[SampleKey(0, 3)]
    stored = Image.open(pairs[3].mask).resize((64, 64), Image.Resampling.NEAREST)
    meant = torch.from_numpy(np.array([0, 1, *[IGNORED] * 254], dtype=np.uint8)[np.array(stored)])
    assert torch.equal(plain.mask[0], meant)


def test_worker_processes_read_masks_in_the_same_way(tmp_path: Path) -> None:
    root = dataset(tmp_path, KINDS["colours on white"])
    pairs = pairs_of(root)
    reading = survey_pairs(pairs).reading
    masks = []
    for num_workers in (0, 1):
        shape: dict[str, Any] = {"img_size": 64, "batch_size": 4, "num_workers": num_workers, "pin_memory": False}
        batches = [*validation_loader(pairs, **shape, masks=reading)]
        train = training_loader(pairs, **shape, seed=1, masks=reading)
        batches += [batch for window in windows(train, 0, 0) for batch in window]
        masks.append(torch.cat([batch.masks for batch in batches]))
    assert torch.equal(masks[0], masks[1])
    assert 0.05 < masks[0].float().mean() < 0.5


def test_the_cache_depends_on_how_masks_are_read(tmp_path: Path) -> None:
    root = dataset(tmp_path / "data", KINDS["0, 1 and 255 to ignore"])
    pairs = pairs_of(root)
    paths = set()
    for reading in (survey_pairs(pairs).reading, ABOVE_HALF, READINGS["nonzero"]):
        cache = open_cache(pairs, root, 64, tmp_path / "cache", 1, reading)
        paths.add(cache.path)
        cached = CamouflageDataset(pairs, 64, cache=cache, masks=reading)[SampleKey(0, 2)]
        assert torch.equal(cached.mask, CamouflageDataset(pairs, 64, masks=reading)[SampleKey(0, 2)].mask)
        cache.path.unlink()
        _, decoded = open_cache(pairs, root, 64, tmp_path / "cache", 1, reading).read(pairs[2])
        assert np.array_equal(decoded, cached.mask)
    assert len(paths) == 3


def test_a_run_logs_and_keeps_how_it_reads_masks_and_a_resumed_one_does_the_same(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO, logger="train_ultimate")
    root = dataset(tmp_path / "data", KINDS["0, 1 and 255 to ignore"])
    argv = tiny_arguments(root, tmp_path / "run", "--epochs", "1", "--stage1-epochs", "1")
    assert main(argv) == 0
    assert caplog.messages.count("Masks: label images with values 0, 1, 255; not 0 is object, 255 is ignored") == 1
    config = read_checkpoint(tmp_path / "run" / "epoch_0001.pth")["config"]
    assert MaskReading.from_dict(config["masks"]) == MaskReading(background=(0,), ignored=(255,))
    assert json.loads((tmp_path / "run" / "config.json").read_text())["masks"] == config["masks"]
    for path in (root / "TrainDataset" / "GT").iterdir():  # now they would be decided to be black and white
        Image.open(path).point(lambda value: 255 * (value == 1)).save(path)
    caplog.clear()
    resumed = cli.parse(["train", "--resume", "auto", "--epochs", "2", "--checkpoint-dir", str(tmp_path / "run")])
    run = prepare(resumed.given, Ranks())
    assert run.data.masks == MaskReading(background=(0,), ignored=(255,))
    assert "Masks: as before; not 0 is object, 255 is ignored" in caplog.messages
    run.folder.release()
    changed = prepare({**resumed.given, "mask_values": "nonzero", "checkpoint_dir": str(tmp_path / "run")}, Ranks())
    assert changed.data.masks == READINGS["nonzero"]


def test_ignored_pixels_reach_the_loss_and_count_in_no_validation_score(tmp_path: Path) -> None:
    root = dataset(tmp_path / "data", KINDS["0, 1 and 255 to ignore"])
    seen: set[float] = set()

    def loss(side_logits: Any, masks: torch.Tensor, weight: Any) -> torch.Tensor:
        seen.update(masks.unique().tolist())
        return deep_supervision_loss(side_logits, masks, weight)

    scores: list[dict[str, float]] = []

    def validation(run: Run, loader: Any) -> dict[str, float]:
        scores.append(validate(run, loader))
        model = run.state.model_for_use.eval()
        expected = []
        for pair in run.data.val_pairs:
            image, mask = load_image(pair.image, 64), load_mask(pair.mask, 64, run.data.masks)
            with torch.inference_mode():
                prediction = (model(image[None] / 255)[-1].sigmoid() * 255).round().to(torch.uint8)[0, 0].numpy()
            counts = mask[0].numpy() != IGNORED
            assert 0.5 < counts.mean() < 1
            is_object, found = mask[0].numpy()[counts] == 1, prediction[counts] > 127
            expected.append((is_object & found).sum() / (is_object | found).sum())
        assert scores[-1]["iou"] == pytest.approx(np.mean(expected))
        return scores[-1]

    argv = tiny_arguments(root, tmp_path / "run", "--epochs", "1", "--stage1-epochs", "0")
    assert train(argv, loss=loss, validate=validation) == 0
    assert seen == {0, 1, 2}
    assert len(scores) == 1


@pytest.mark.parametrize(("value", "what"), [(0, "have no object"), (255, "are all object")])
def test_training_on_constant_masks_is_refused(
    value: int, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = dataset(tmp_path / "data", lambda _, n: grey(np.full(SIZE, value)))
    line = failing(tiny_arguments(root, tmp_path / "run"), capsys)
    assert line.startswith(f"error: {root}: 11 of 11 masks {what}, read in this way: masks of one value each")
    assert line.endswith("check that they are the right files, or give another --mask-values")
    assert not (tmp_path / "run" / "epoch_0001.pth").exists()


def test_training_on_mostly_constant_masks_goes_on_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = dataset(tmp_path / "data", lambda mask, n: grey((mask > 0) * 255 * (n < 3)))
    run = prepare(cli.parse(tiny_arguments(root, tmp_path / "run")).given, Ranks())
    assert run.data.masks == ABOVE_HALF
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warning.startswith("masks: 8 of 11 masks have no object, read in this way: values 0 and 255; above 128 is")


def test_images_without_an_object_on_purpose_do_not_count_as_constant(tmp_path: Path) -> None:
    root = dataset(tmp_path, lambda mask, n: grey((mask > 0) * 255 * (n < 3)))
    for number in range(3, 11):
        for folder in ("Imgs", "GT"):
            path = root / "TrainDataset" / folder / f"{number:02}.png"
            path.rename(path.with_name(f"COD10K-NonCAM-1-{number:02}.png"))
    survey = survey_pairs(training_pairs(find_subsets(root, include_noncam=True), root))
    assert (survey.num_looked_at, survey.constant) == (3, "")


def test_check_data_says_how_masks_are_read_and_names_labels_and_inverted_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind, name, reason in (
        (
            "0, 1 and 255 to ignore",
            "mask-labels",
            "label images with values 0, 1, 255; not 0 is object, 255 is ignored",
        ),
        ("colours on white", "mask-labels", "not white is object"),
        ("inverted", "mask-inverted", "they look inverted: their bright part lies all round the border of the image"),
    ):
        root = dataset(tmp_path / name / kind, KINDS[kind], 24)
        assert main(["check-data", "--dataset-path", str(root), "--json", str(tmp_path / "out.json")]) == 1
        report = json.loads((tmp_path / "out.json").read_text())
        found = [(finding["kind"], finding["file"]) for finding in report["findings"]]
        assert found[:2] == [(name, "TestDataset/GT"), (name, "TrainDataset/GT")] or found[0] == (
            name,
            "TrainDataset/GT",
        )
        assert any(reason in finding["reason"] for finding in report["findings"])
        assert f"{name}: " in capsys.readouterr().out
        assert {finding["kind"] for finding in report["findings"]} == {name}  # no single mask is empty, full or odd
        assert any(note.startswith("Masks for training: ") for note in report["notes"])
        assert any(note.startswith("Masks of TestDataset: ") for note in report["notes"])
        shares = (
            report["object_sizes"]["training"]
            if "training" in report["object_sizes"]
            else report["object_sizes"]["train"]
        )
        assert sum(shares[2:5]) == 22  # 10 to 40 % of the image


def test_check_data_reads_masks_as_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = dataset(tmp_path / "data", KINDS["inverted"])
    argv = ["check-data", "--dataset-path", str(root), "--mask-values"]
    assert main([*argv, "above-half"]) == 0
    out = capsys.readouterr().out
    assert "as --mask-values above-half says; above 128 is object" in out
    assert out.endswith(f"train --dataset-path {root} --mask-values above-half\n")
    assert main([*argv, "inverted"]) == 0
