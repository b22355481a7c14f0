"""Inspection: findings in single files, and the search for duplicate photographs."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data.duplicates import find_alike, thumbnail
from data.inspection import Report, assess, inspect_pair, pairs_to_inspect
from data.layouts import Pair, find_subsets
from data.synthetic import camouflage_scene


def scene(seed: int, size: int = 96) -> tuple[Image.Image, Image.Image]:
    image, mask = camouflage_scene(np.random.default_rng(seed), size)
    return Image.fromarray(image), Image.fromarray(mask)


def write_pair(root: Path, name: str, seed: int, split: str = "TrainDataset") -> Pair:
    pair = Pair(root / split / "Imgs" / f"{name}.jpg", root / split / "GT" / f"{name}.png")
    for path, image in zip((pair.image, pair.mask), scene(seed), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return pair


def problems(pair: Pair) -> list[tuple[str, bool, str, bool]]:
    return [(p.kind, p.in_mask, p.reason, p.spoils_training) for p in inspect_pair(pair).problems]


def report_on(root: Path) -> Report:
    subsets = find_subsets(root)
    pairs = pairs_to_inspect(subsets)
    return assess(root, subsets, pairs, [inspect_pair(pair) for pair, _ in pairs])


def test_good_pair_has_no_problems(tmp_path: Path) -> None:
    facts = inspect_pair(write_pair(tmp_path, "a", seed=1))
    assert facts.problems == ()
    assert facts.usable
    assert 0.01 < facts.object_share < 0.4
    assert len(facts.thumbnail) == 1024


@pytest.mark.parametrize(
    ("data", "kind", "reason"),
    [
        (b"", "unreadable", "an empty file"),
        (
            b"\n<!DOCTYPE html><html>404</html>",
            "unreadable",
            "not an image but HTML or XML, as a failed download leaves",
        ),
        (b"garbage" * 50, "unreadable", "not an image"),
    ],
)
def test_files_that_are_not_images_are_unreadable(tmp_path: Path, data: bytes, kind: str, reason: str) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    pair.image.write_bytes(data)
    assert problems(pair) == [(kind, False, reason, True)]
    assert not inspect_pair(pair).usable


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "WEBP"])
def test_truncated_files_are_distinguished_from_files_that_are_not_images(tmp_path: Path, file_format: str) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    buffer = io.BytesIO()
    Image.open(pair.image).save(buffer, file_format)
    pair.image.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    ((kind, _, reason, spoils),) = problems(pair)
    if file_format == "WEBP":  # its decoder does not say why it fails
        assert kind in ("unreadable", "truncated")
    else:
        assert kind == "truncated"
        assert reason.startswith("cut short after")
    assert spoils


def test_a_broken_link_is_unreadable(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    pair.mask.unlink()
    pair.mask.symlink_to("nowhere.png")
    assert problems(pair) == [("unreadable", True, "cannot be opened (No such file or directory)", True)]
    pair.image.unlink()
    pair.image.symlink_to("nowhere.jpg")
    assert [finding.kind for finding in report_on(tmp_path).findings] == ["unreadable"] * 2


@pytest.mark.parametrize(
    ("mode", "reason"),
    [
        ("L", "grey; its one channel is used three times"),
        ("CMYK", "CMYK; converted to RGB without its colour profile"),
        ("RGBA", "RGB with transparency, which is dropped"),
        ("P", "palette; its colours are looked up"),
        ("I;16", "more than 8 bits; scaled to 8"),
    ],
)
def test_photographs_of_other_modes_are_found_with_their_treatment(tmp_path: Path, mode: str, reason: str) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    image = Image.open(pair.image)
    if mode == "I;16":
        other = Image.fromarray(np.array(image.convert("L")).astype(np.uint16) * 257)
    else:
        other = image.convert(mode)
    file = tmp_path / f"a{'.jpg' if mode == 'CMYK' else '.png'}"
    other.save(file)
    assert problems(Pair(file, pair.mask)) == [("wrong-mode", False, reason, False)]


@pytest.mark.parametrize(("mode", "reason"), [("P", "palette"), ("RGB", "colour"), ("RGBA", "transparency")])
def test_masks_of_other_modes_are_found_and_still_binary(tmp_path: Path, mode: str, reason: str) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    Image.open(pair.mask).convert(mode).save(pair.mask)
    ((kind, in_mask, found, spoils),) = problems(pair)
    assert (kind, in_mask, spoils) == ("wrong-mode", True, False)
    assert reason in found
    assert "counts" in found


def test_masks_of_ones_and_black_and_white_masks_are_fine(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    mask = Image.open(pair.mask)
    mask.point([value // 255 for value in range(256)]).save(pair.mask)
    assert problems(pair) == []
    mask.convert("1").save(pair.mask)
    assert problems(pair) == []


def test_mask_values_in_between_are_found_with_their_share(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    mask = np.array(Image.open(pair.mask))
    mask[:24] = 100  # a quarter
    Image.fromarray(mask).save(pair.mask)
    reason = "25.0% of its values lie between 0 and 255; those above 128 count as object"
    assert problems(pair) == [("mask-not-binary", True, reason, False)]


def test_jpeg_masks_are_named_as_jpegs(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    file = pair.mask.with_suffix(".jpg")
    Image.open(pair.mask).save(file, quality=60)
    ((kind, in_mask, reason, _),) = problems(Pair(pair.image, file))
    assert (kind, in_mask) == ("mask-not-binary", True)
    assert "a JPEG" in reason


def test_soft_outlines_are_a_note_and_no_finding(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    mask = np.array(Image.open(pair.mask))
    mask[0, :50] = 7  # 0.5 %
    Image.fromarray(mask).save(pair.mask)
    report = report_on(tmp_path)
    assert report.findings == []
    assert any(note.startswith("1 masks have soft outlines") for note in report.notes)


@pytest.mark.parametrize(("value", "kind"), [(0, "empty-mask"), (255, "full-mask"), (1, "full-mask")])
def test_masks_of_one_value_are_empty_or_full(tmp_path: Path, value: int, kind: str) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    Image.new("L", (96, 96), value).save(pair.mask)
    assert [(p[0], p[1], p[3]) for p in problems(pair)] == [(kind, True, kind == "full-mask")]


def test_an_empty_mask_is_correct_for_an_image_without_camouflage(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "COD10K-NonCAM-5-Background-1-Sky-7", seed=1)
    Image.new("L", (96, 96)).save(pair.mask)
    assert problems(pair) == []


def test_sizes_are_compared_upright(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    photo = Image.open(pair.image).resize((96, 64))
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    photo.save(pair.image, exif=turned)
    mask = Image.open(pair.mask)
    mask.resize((64, 96), Image.Resampling.NEAREST).save(pair.mask)
    assert problems(pair) == []
    mask.resize((96, 64), Image.Resampling.NEAREST).save(pair.mask)
    ((kind, _, reason, spoils),) = problems(pair)
    assert (kind, spoils) == ("size-mismatch", True)
    assert "64 x 96, its mask 96 x 64; the mask fits the image as stored, not as its EXIF orientation" in reason


def test_a_mask_of_the_same_aspect_ratio_in_another_size_does_not_spoil_training(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "a", seed=1)
    Image.open(pair.mask).resize((48, 48), Image.Resampling.NEAREST).save(pair.mask)
    ((kind, _, reason, spoils),) = problems(pair)
    assert (kind, spoils) == ("size-mismatch", False)
    assert reason.endswith("the aspect ratio is the same, and training resizes both")


def altered(image: Image.Image, how: str) -> Image.Image:
    width, height = image.size
    if how == "compressed":
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=25)
        return Image.open(buffer)
    return {
        "smaller": lambda: image.resize((width // 2, height // 2)),
        "wider": lambda: image.resize((width * 2, height)),
        "mirrored": lambda: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        "blurred": lambda: image.filter(ImageFilter.GaussianBlur(1)),
        "darker": lambda: image.point(lambda value: value * 0.8),
        "cropped": lambda: image.crop((width // 25, height // 25, width, height)),
    }[how]()


@pytest.mark.parametrize("how", ["compressed", "smaller", "wider", "mirrored", "blurred", "darker"])
def test_altered_photographs_are_found(how: str) -> None:
    images = [scene(seed, 192)[0] for seed in range(20)]
    images.append(altered(images[4], how))
    (likeness,) = find_alike(np.stack([thumbnail(image) for image in images]))
    assert (likeness.first, likeness.second) == (4, 20)
    assert likeness.same_photograph
    assert likeness.mirrored == (how == "mirrored")


def test_a_slight_crop_is_found_as_the_same_scene() -> None:
    images = [scene(seed, 192)[0] for seed in range(20)]
    images.append(altered(images[4], "cropped"))
    (likeness,) = find_alike(np.stack([thumbnail(image) for image in images]))
    assert (likeness.first, likeness.second, likeness.same_photograph) == (4, 20, False)


def test_a_scene_whose_animal_has_moved_is_not_the_same_photograph() -> None:
    image = np.array(scene(3, 192)[0])
    moved = image.copy()
    moved[20:80, 20:80] = image[110:170, 110:170]
    (likeness,) = find_alike(np.stack([thumbnail(Image.fromarray(photo)) for photo in (image, moved)]))
    assert not likeness.same_photograph


def test_different_scenes_and_flat_images_are_not_alike() -> None:
    thumbnails = [thumbnail(scene(seed, 64)[0]) for seed in range(400)]
    thumbnails += [np.full((32, 32), level, np.uint8) for level in (0, 0, 128, 255)]
    assert find_alike(np.stack(thumbnails)) == []
    assert find_alike(np.zeros((0, 32, 32), np.uint8)) == []


def copy_pair(pair: Pair, root: Path, name: str, split: str = "TrainDataset", quality: int = 0) -> None:
    copy = write_pair(root, name, seed=0, split=split)
    copy.mask.write_bytes(pair.mask.read_bytes())
    if quality:
        Image.open(pair.image).save(copy.image, quality=quality)
    else:
        copy.image.write_bytes(pair.image.read_bytes())


def test_of_two_duplicates_the_test_image_is_kept_or_else_the_first(tmp_path: Path) -> None:
    for number in range(6):
        write_pair(tmp_path, f"a{number}", seed=10 + number)
    a = {path.stem: Pair(path, tmp_path / "TrainDataset/GT" / f"{path.stem}.png")
         for path in (tmp_path / "TrainDataset" / "Imgs").iterdir()}  # fmt: skip
    copy_pair(a["a0"], tmp_path, "b0")  # twice in training
    copy_pair(a["a1"], tmp_path, "t1", "TestDataset")  # leaks, as a file
    copy_pair(a["a2"], tmp_path, "t2", "TestDataset", quality=40)  # leaks, compressed again
    copy_pair(a["a3"], tmp_path, "t3", "TestDataset", quality=40)  # twice in testing: a file, and compressed
    copy_pair(a["a4"], tmp_path, "t4", "TestDataset")
    a["a3"].image.unlink()
    a["a3"].mask.unlink()
    copy_pair(a["a4"], tmp_path, "t5", "TestDataset", quality=40)
    report = report_on(tmp_path)
    train, test = "TrainDataset/Imgs", "TestDataset/Imgs"
    assert [(finding.kind, finding.file, finding.other) for finding in report.findings] == [
        ("leak", f"{train}/a1.jpg", f"{test}/t1.jpg"),
        ("leak", f"{train}/a2.jpg", f"{test}/t2.jpg"),
        ("leak", f"{train}/a4.jpg", f"{test}/t4.jpg"),
        ("duplicate", f"{train}/b0.jpg", f"{train}/a0.jpg"),
        ("near-duplicate", f"{test}/t5.jpg", f"{test}/t4.jpg"),
    ]
    assert sorted(report.exclude) == [f"{train}/a1.jpg", f"{train}/a2.jpg", f"{train}/a4.jpg", f"{train}/b0.jpg"]


def test_the_later_copy_is_kept_if_the_first_has_a_bad_mask(tmp_path: Path) -> None:
    first = write_pair(tmp_path, "a", seed=1)
    copy_pair(first, tmp_path, "b")
    Image.new("L", (96, 96)).save(first.mask)
    report = report_on(tmp_path)
    assert [finding.kind for finding in report.findings] == ["empty-mask", "duplicate"]
    assert list(report.exclude) == ["TrainDataset/Imgs/a.jpg"]


def test_files_that_are_not_images_are_not_duplicates(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        write_pair(tmp_path, name, seed=ord(name)).image.write_text("<html>404</html>")
    report = report_on(tmp_path)
    assert [finding.kind for finding in report.findings] == ["unreadable"] * 3
    assert report.num_usable == 0


def test_photographs_linked_twice_are_a_note_and_no_finding(tmp_path: Path) -> None:
    for number in range(3):
        write_pair(tmp_path, f"a{number}", seed=number)
    (tmp_path / "train_link").symlink_to(tmp_path / "TrainDataset")
    report = report_on(tmp_path)
    assert report.findings == []
    assert report.notes[-1].startswith("3 pairs occur twice")


@pytest.mark.parametrize(
    ("folder", "published_as", "published"),
    [
        ("COD10K-v3/Train", "COD10K-train", 3040),
        ("COD10K-v3/Test", "COD10K-test", 2026),
        ("TrainDataset", "COD10K-train and CAMO-train", 4040),
        ("TestDataset/CAMO", "CAMO-test", 250),
        ("TestDataset/CHAMELEON", "CHAMELEON-test", 76),
        ("TestDataset/NC4K", "NC4K-test", 4121),
        ("TR-CAMO", "CAMO-train", 1000),
        ("mine", "", None),
    ],
)
def test_counts_are_compared_with_the_published_ones(
    tmp_path: Path, folder: str, published_as: str, published: int | None
) -> None:
    root = tmp_path / "data"
    stem = "camourflage_00001" if folder == "TrainDataset" else "a"  # users use that folder name, too
    for kind, name in (("Imgs", f"{stem}.jpg"), ("GT", f"{stem}.png")):
        (root / folder / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / folder / kind / name)
    report = assess(root, find_subsets(root), [], [])
    assert [(f.published_as, f.published) for f in report.folders] == [(published_as, published)]
    assert any("1 pairs; " in note for note in report.notes) == (published is not None)


def test_a_note_warns_of_a_test_set_that_training_would_use(tmp_path: Path) -> None:
    root = tmp_path / "data"
    for kind, name in (("Imgs", "a.jpg"), ("GT", "a.png")):
        (root / "NC4K" / kind).mkdir(parents=True)
        Image.new("L", (8, 8)).save(root / "NC4K" / kind / name)
    assert any("NC4K is a test set" in note for note in assess(root, find_subsets(root), [], []).notes)


def test_object_sizes_are_counted_by_split(tmp_path: Path) -> None:
    for name, share in (("a", 0.005), ("b", 0.03), ("c", 0.5), ("d", 0.0)):
        pair = write_pair(tmp_path, name, seed=ord(name))
        mask = np.zeros((100, 100), np.uint8)
        mask.reshape(-1)[: int(10_000 * share)] = 255
        Image.fromarray(mask).save(pair.mask)
    assert report_on(tmp_path).object_sizes == {"train": [1, 1, 0, 0, 0, 1], "test": [0] * 6}
