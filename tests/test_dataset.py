"""Samples from files of any encoding, replacements for those that cannot be decoded, and batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from data.dataset import CamouflageDataset, collate, header_problems, load_image, load_mask
from data.decoding import problem_of
from data.layouts import Pair, find_subsets, training_pairs
from data.sampler import SampleKey, derive_seed
from data.transforms import draw_augmentation, to_rows


def half_red(mode: str, size: tuple[int, int] = (40, 20)) -> Image.Image:
    """Return an image with a bright left half and a dark right half."""
    pixels = np.zeros((size[1], size[0], 3), dtype=np.uint8)
    pixels[:, : size[0] // 2] = 200
    return Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "png"), ("RGBA", "png"), ("CMYK", "jpg"), ("P", "png"), ("LA", "png"), ("1", "png")],
)
def test_image_modes_become_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    half_red(mode).save(path)
    image = load_image(path, 32)
    assert image.shape == (3, 32, 32)
    assert image.dtype == torch.uint8
    assert image[:, :, :12].float().mean() > 150
    assert image[:, :, 20:].float().mean() < 60


def test_sixteen_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    path = tmp_path / "deep.png"
    Image.fromarray(np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)).save(path)
    image = load_image(path, 64)
    assert image.min() == 0
    assert image.max() == 255
    assert 120 < image.float().mean() < 135


def test_exif_orientation_is_honoured(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # show turned by 90 degrees clockwise
    half_red("RGB").save(path, exif=exif, quality=95)
    image = load_image(path, 32).float().mean(dim=0)
    assert image[:12].mean() > 150  # the left half has become the top
    assert image[20:].mean() < 60


@pytest.mark.parametrize(
    "values",
    [
        *((np.array([[0, 255]], dtype=np.uint8)), np.array([[0, 1]], dtype=np.uint8)),
        *((np.array([[40, 200]], dtype=np.uint8)), np.array([[0, 65535]], dtype=np.uint16)),
        np.array([[0, 127]], dtype=np.uint8),
        np.array([[[0, 0, 0], [255, 0, 0]]], dtype=np.uint8),
        np.array([[[0, 0, 0, 255], [255, 255, 255, 255]]], dtype=np.uint8),
    ],
    ids=["0-255", "0-1", "grey", "16-bit", "0-127", "red", "rgba"],
)
def test_mask_encodings_become_binary(tmp_path: Path, values: np.ndarray) -> None:
    path = tmp_path / "mask.png"
    Image.fromarray(np.repeat(values, 2, axis=0)).resize((32, 32), Image.Resampling.NEAREST).save(path)
    mask = load_mask(path, 32)
    assert mask.shape == (1, 32, 32)
    assert mask[:, :, :16].sum() == 0
    assert mask[:, :, 16:].all()


def test_any_bright_colour_of_a_palette_mask_is_object(tmp_path: Path) -> None:
    image = Image.fromarray(np.repeat(np.array([[0, 1]], dtype=np.uint8), 2, axis=0)).resize((32, 32), 0)
    image.putpalette([0, 0, 0, 64, 0, 0])
    image.save(tmp_path / "mask.png")
    assert Image.open(tmp_path / "mask.png").mode == "P"
    mask = load_mask(tmp_path / "mask.png", 32)
    assert mask.float().mean() == 0.5


def test_empty_masks_stay_empty_even_with_compression_noise(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 9, (32, 32)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / "mask.jpg", quality=90)
    Image.fromarray(np.zeros((32, 32), dtype=np.uint8)).save(tmp_path / "mask.png")
    assert load_mask(tmp_path / "mask.jpg", 32).sum() == 0
    assert load_mask(tmp_path / "mask.png", 32).sum() == 0


def test_whatever_pillow_raises_becomes_an_error_with_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Damaged EXIF data, for example, raises a TypeError deep inside Pillow."""

    def damaged(_: Image.Image, **_options: object) -> Image.Image:
        raise TypeError("unsupported operand")

    half_red("RGB").save(tmp_path / "a.png")
    monkeypatch.setattr(ImageOps, "exif_transpose", damaged)
    for load in (load_image, load_mask):
        with pytest.raises(ValueError, match=r"a\.png: cannot be decoded \(unsupported operand\)"):
            load(tmp_path / "a.png", 32)


@pytest.fixture
def damaged(tiny_dataset: Path, tmp_path: Path) -> list[Pair]:
    """Eight pairs; the first one's image and the fourth one's mask are cut short."""
    pairs = training_pairs(find_subsets(tiny_dataset), tiny_dataset)[:8]
    image, mask = tmp_path / pairs[0].image.name, tmp_path / pairs[3].mask.name
    image.write_bytes(pairs[0].image.read_bytes()[:-300])
    mask.write_bytes(pairs[3].mask.read_bytes()[:-30])
    return [Pair(image, pairs[0].mask), *pairs[1:3], Pair(pairs[3].image, mask), *pairs[4:]]


def test_an_undecodable_pair_is_missing_from_validation(damaged: list[Pair]) -> None:
    dataset = CamouflageDataset(damaged, 32)
    batch = collate([dataset[SampleKey(0, index)] for index in (1, 0, 2, 3)])
    assert batch.indices.tolist() == [1, 2]
    assert torch.equal(batch.images[1], load_image(damaged[2].image, 32))
    assert batch.num_missing == 2
    assert batch.errors.keys() == {0, 3}
    assert str(damaged[0].image) in batch.errors[0]
    assert "truncated" in batch.errors[0]
    assert str(damaged[3].mask) in batch.errors[3]
    empty = collate([dataset[SampleKey(0, 0)]])
    assert empty.images.shape == (0, 3, 32, 32)


def test_an_undecodable_pair_is_replaced_in_training(damaged: list[Pair]) -> None:
    """The replacement is a function of epoch and index, and so is its augmentation."""
    dataset, again = (CamouflageDataset(damaged, 64, augmented=True, seed=3) for _ in range(2))
    replacements = set()
    for epoch in range(20):
        sample, repeated = dataset[SampleKey(epoch, 0)], again[SampleKey(epoch, 0)]
        assert torch.equal(sample.image, repeated.image)
        assert sample.index == repeated.index
        assert not sample.is_missing
        assert sample.errors.keys() <= {0, 3}
        assert not torch.equal(sample.image, dataset[SampleKey(epoch, sample.index)].image)
        replacements.add(sample.index)
    assert replacements == {1, 2, 4, 5, 6, 7}
    assert any(3 in dataset[SampleKey(epoch, 0)].errors for epoch in range(20))  # drawn, but undecodable too


def test_augmentations_left_to_the_device_belong_to_their_images(damaged: list[Pair]) -> None:
    """Also if a pair is replaced: its augmentation is the requested pair's. Also in part of a batch."""
    here, later = (CamouflageDataset(damaged, 64, augmented=True, seed=3, on_device=value) for value in (False, True))
    keys = [SampleKey(4, index) for index in (2, 0, 5)]
    expected, batch = collate([here[key] for key in keys]), collate([later[key] for key in keys])
    assert batch.indices.tolist() == expected.indices.tolist()
    assert batch.augmentations is not None
    drawn = to_rows([draw_augmentation(64, derive_seed(3, key.epoch, key.index)) for key in keys])
    assert torch.equal(batch.augmentations, drawn)
    part = batch.take([2, 1])
    assert part.augmentations is not None
    assert torch.equal(part.augmentations, drawn[[2, 1]])
    assert expected.augmentations is None
    assert CamouflageDataset(damaged, 64, on_device=True)[SampleKey(0, 1)].augmentation is None  # validation


def test_a_sample_is_missing_if_no_replacement_can_be_decoded(damaged: list[Pair]) -> None:
    sample = CamouflageDataset([damaged[0], damaged[3]], 32, augmented=True)[SampleKey(0, 1)]
    assert sample.is_missing
    assert sample.errors.keys() == {0, 1}


def test_augmentation_depends_only_on_seed_epoch_and_index(tiny_dataset: Path) -> None:
    pairs = training_pairs(find_subsets(tiny_dataset), tiny_dataset)
    first = CamouflageDataset(pairs, 64, augmented=True, seed=1)
    torch.manual_seed(123)  # the global generator has no influence
    second = CamouflageDataset(pairs, 64, augmented=True, seed=1)
    key = SampleKey(3, 5)
    assert torch.equal(first[key].image, second[key].image)
    assert torch.equal(first[key].mask, second[key].mask)
    other_seed = CamouflageDataset(pairs, 64, augmented=True, seed=2)
    assert not torch.equal(first[key].image, first[SampleKey(4, 5)].image)
    assert not torch.equal(first[key].image, other_seed[key].image)


def test_header_check_finds_files_that_are_not_images(tmp_path: Path) -> None:
    good, bad = tmp_path / "good.png", tmp_path / "bad.jpg"
    half_red("L").save(good)
    bad.write_text("<html>404</html>")
    problems = header_problems([Pair(good, good), Pair(bad, good), Pair(good, bad)])
    assert problems.keys() == {1, 2}
    assert "bad.jpg: cannot be decoded (not an image)" in problems[1]


def test_problem_of_decodes_the_pixels_too(damaged: list[Pair]) -> None:
    assert header_problems(damaged) == {}
    assert [bool(problem_of(pair.image, pair.mask)) for pair in damaged] == [True, False, False, True] + 4 * [False]
