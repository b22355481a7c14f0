"""Folder layouts: pairs found, split and left out."""

import logging
import os
import shutil
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from data.layouts import (
    Pair,
    Subset,
    describe,
    find_subsets,
    fingerprint,
    leave_out,
    read_exclude_file,
    split_as_before,
    split_validation,
    training_pairs,
)


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB" if name.endswith("jpg") else "L", (4, 4)).save(folder / name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset's folder, whose name says nothing about training or testing, as that of a test's folder does."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder


def summary(root: Path, include_noncam: bool = False) -> list[tuple[str, str, int]]:
    return [(subset.name, subset.split, len(subset.pairs)) for subset in find_subsets(root, include_noncam)]


CAM, NONCAM = "COD10K-CAM-1-Aquatic-1-BatFish-{}", "COD10K-NonCAM-5-Background-1-Sky-{}"
FOUR = ("CAMO", "CHAMELEON", "COD10K", "NC4K")

# Every layout in use: its image folders, each with mask folder and number of pairs, and the expected subsets.
LAYOUTS = {
    "COD10K-v3": (
        {"Train/Image": ("Train/GT_Object", 3, CAM), "Test/Image": ("Test/GT_Object", 2, CAM)},
        [("Test", "test", 2), ("Train", "train", 3)],
    ),
    "SINet, four test sets": (
        {
            "TrainDataset/Imgs": ("TrainDataset/GT", 3, "{}"),
            **{f"TestDataset/{name}/Imgs": (f"TestDataset/{name}/GT", 2, "{}") for name in FOUR},
        },
        [*((f"TestDataset/{name}", "test", 2) for name in FOUR), ("TrainDataset", "train", 3)],
    ),
    "SINet, one test set": (
        {"TrainDataset/Imgs": ("TrainDataset/GT", 3, "{}"), "TestDataset/Imgs": ("TestDataset/GT", 2, "{}")},
        [("TestDataset", "test", 2), ("TrainDataset", "train", 3)],
    ),
    "ZoomNeXt": (
        {"TR-COD10K/Image": ("TR-COD10K/Mask", 3, "{}"), "TE-CAMO/Image": ("TE-CAMO/Mask", 2, "{}")},
        [("TE-CAMO", "test", 2), ("TR-COD10K", "train", 3)],
    ),
    "BiRefNet": (
        {"TR-COD10K/im": ("TR-COD10K/gt", 3, "{}"), "TE-NC4K/im": ("TE-NC4K/gt", 2, "{}")},
        [("TE-NC4K", "test", 2), ("TR-COD10K", "train", 3)],
    ),
    "CAMO-V.1.0": (
        {"Images/Train": ("GT", 3, "train_{}"), "Images/Test": ("GT", 2, "test_{}")},
        [("Images/Test", "test", 2), ("Images/Train", "train", 3)],
    ),
    "NC4K": ({"Test/NC4K/Imgs": ("Test/NC4K/GT", 2, "{}")}, [("Test/NC4K", "test", 2)]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("above", ["", "downloads/"])
def test_every_layout_in_use_is_recognised_paired_and_counted(tmp_path: Path, layout: str, above: str) -> None:
    """Each folder also has edge maps, an image without a mask and a mask without an image."""
    folders, expected = LAYOUTS[layout]
    root = tmp_path / "data"
    for images, (masks, count, name) in folders.items():
        stems = [name.format(number) for number in range(count)]
        put(root / above / images, *(f"{stem}.jpg" for stem in stems), "lone_image.jpg")
        put(root / above / masks, *(f"{stem}.png" for stem in stems), "lone_mask.png")
        put((root / above / masks).parent / "GT_Edge", *(f"{stem}.png" for stem in stems))
    if layout == "COD10K-v3":
        put(root / above / "Train" / "Image", NONCAM.format(1) + ".jpg", NONCAM.format(2) + ".jpg")
        put(root / above / "Train" / "GT_Object", NONCAM.format(1) + ".png", NONCAM.format(2) + ".png")
    subsets = find_subsets(root)
    assert [(s.name, s.split, len(s.pairs)) for s in subsets] == [(above + n, split, num) for n, split, num in expected]
    for subset in subsets:
        assert all(pair.image.stem == pair.mask.stem for pair in subset.pairs)
        assert [path.name for path in subset.images_without_mask] == ["lone_image.jpg"]
        assert [path.name for path in subset.masks_without_image] == ["lone_mask.png"]
    noncam = sum(subset.num_noncam_skipped for subset in subsets)
    assert noncam == (2 if layout == "COD10K-v3" else 0)
    assert sum(len(s.pairs) for s in find_subsets(root, include_noncam=True)) == sum(n for *_, n in expected) + noncam


def test_cod10k_images_without_camouflage_are_left_out_by_default(tmp_path: Path) -> None:
    cam, noncam = "COD10K-CAM-1-Aquatic-1-BatFish-2", "COD10K-NonCAM-5-Background-1-Sky-7"
    for split in ("Train", "Test"):
        put(tmp_path / "COD10K-v3" / split / "Image", f"{cam}.jpg", f"{noncam}.jpg")
        put(tmp_path / "COD10K-v3" / split / "GT_Object", f"{cam}.png", f"{noncam}.png")
        put(tmp_path / "COD10K-v3" / split / "GT_Edge", f"{cam}.png")
    train = next(subset for subset in find_subsets(tmp_path) if subset.split == "train")
    assert [pair.superclass for pair in train.pairs] == ["Aquatic"]
    assert train.num_noncam_skipped == 1
    assert summary(tmp_path, include_noncam=True) == [("COD10K-v3/Test", "test", 2), ("COD10K-v3/Train", "train", 2)]


@pytest.mark.parametrize(
    ("images", "masks"), [("Image", "Mask"), ("im", "gt"), ("Imgs", "GT"), ("images", "masks"), ("IMAGE", "MASK")]
)
def test_a_plain_folder_pair_is_for_training(tmp_path: Path, images: str, masks: str) -> None:
    put(tmp_path / "own" / images, "a.jpg")
    put(tmp_path / "own" / masks, "a.png")
    assert summary(tmp_path / "own") == [("own", "train", 1)]


@pytest.mark.parametrize(
    ("folder", "split"),
    [
        *(("TR-COD10K", "train"), ("COD10K-TE", "test"), ("my_test_set", "test"), ("TESTDATASET", "test")),
        *(
            ("valid", "test"),
            ("evaluation", "test"),
            ("testset", "test"),
            ("training_set", "train"),
            ("values", "train"),
        ),
    ],
)
def test_the_folder_name_decides_the_split(tmp_path: Path, folder: str, split: str) -> None:
    root = tmp_path / "animals"
    put(root / folder / "im", "a.jpg")
    put(root / folder / "gt", "a.png")
    assert summary(root) == [(folder, split, 1)]
    assert summary(root / folder) == [(folder, split, 1)]


def test_folders_above_the_dataset_do_not_decide_the_split(tmp_path: Path) -> None:
    root = tmp_path / "test" / "animals"
    put(root / "Imgs", "a.jpg")
    put(root / "GT", "a.png")
    assert summary(root) == [("animals", "train", 1)]


def test_own_images_and_masks_with_a_folder_for_each_split(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / "images" / split, "a.jpg", "b.jpg")
        put(tmp_path / "masks" / split, "a.png", "b.png")
    assert summary(tmp_path) == [("images/train", "train", 2), ("images/val", "test", 2)]


def test_folders_that_differ_only_in_case_are_both_found(tmp_path: Path) -> None:
    for folder in ("Train", "train"):
        put(tmp_path / folder / "Imgs", f"{folder}.jpg")
        put(tmp_path / folder / "GT", f"{folder}.png")
    assert len(training_pairs(find_subsets(tmp_path), tmp_path)) == len(list(tmp_path.iterdir()))


def test_photographs_that_occur_twice_count_once(tmp_path: Path) -> None:
    """Otherwise, a link or overlapping collections could put one into the training and the validation set."""
    put(tmp_path / "TrainDataset" / "Imgs", "a.jpg", "b.jpg")
    put(tmp_path / "TrainDataset" / "GT", "a.png", "b.png")
    (tmp_path / "train_link").symlink_to(tmp_path / "TrainDataset")
    put(tmp_path / "COD10K-v3" / "Train" / "Image", "a.jpg", "c.jpg")
    put(tmp_path / "COD10K-v3" / "Train" / "GT_Object", "a.png", "c.png")
    subsets = find_subsets(tmp_path)
    pairs = training_pairs(subsets, tmp_path)
    assert sorted(pair.image.name for pair in pairs) == ["a.jpg", "b.jpg", "c.jpg"]
    assert "3 pairs occur twice and count once" in describe(subsets, len(pairs))


def test_description_says_what_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    put(tmp_path / "Train" / "Image", "COD10K-NonCAM-5-x-1-y-7.jpg", "COD10K-CAM-1-Aquatic-1-BatFish-2.jpg", "lone.jpg")
    put(tmp_path / "Train" / "GT_Object", "COD10K-CAM-1-Aquatic-1-BatFish-2.png")
    lines = "\n".join(describe(find_subsets(tmp_path), num_used=1))
    assert "Train: 1 pairs, for training" in lines
    assert "1 without camouflaged objects left out" in lines
    warning = "Train: 1 images without a mask left out, the first: lone.jpg"
    assert caplog.record_tuples == [("train_ultimate", logging.WARNING, warning)]


def test_earlier_split_is_kept_when_files_come_and_go(tmp_path: Path) -> None:
    pairs = make_pairs([""] * 30)
    before, validation = split_validation(pairs, 0.2, seed=1)
    names = [pair.image.as_posix() for pair in validation]
    added = Pair(Path("new.jpg"), Path("new.png"))
    train, val = split_as_before([*before[1:], *validation[1:], added], Path(), names)
    assert val == validation[1:]
    assert train == [*before[1:], added]
    with pytest.raises(ValueError, match="none of the 6 images"):
        split_as_before(before, Path(), names)


def test_pairs_are_matched_by_stem_across_formats(tmp_path: Path) -> None:
    put(tmp_path / "Imgs", "a.jpg", "b.png", "c.bmp", "d.webp", "e.JPEG", "no_mask.jpg")
    put(tmp_path / "GT", "a.png", "b.bmp", "c.jpg", "d.png", "e.png", "no_image.png")
    (tmp_path / "Imgs" / "notes.txt").write_text("not an image")
    (tmp_path / "Imgs" / ".hidden.jpg").write_text("macOS leaves these")
    (subset,) = find_subsets(tmp_path)
    assert [(pair.image.name, pair.mask.name) for pair in subset.pairs] == [
        *(("a.jpg", "a.png"), ("b.png", "b.bmp"), ("c.bmp", "c.jpg"), ("d.webp", "d.png"), ("e.JPEG", "e.png")),
    ]
    assert [path.name for path in subset.images_without_mask] == ["no_mask.jpg"]


def test_pairs_are_excluded_by_image_or_mask_and_unknown_names_returned(tmp_path: Path) -> None:
    root = tmp_path / "data"
    put(root / "Imgs", "a.jpg", "b.jpg", "c.jpg", "d e.jpg")
    put(root / "GT", "a.png", "b.png", "c.png", "d e.png")
    file = tmp_path / "exclude.txt"
    file.write_bytes(b"\xef\xbb\xbf# reason\r\nImgs/a.jpg\r\n\r\n  GT/b.png\nImgs/d e.jpg\nGT/z.png\nImgs/\xff.jpg\n")
    names = read_exclude_file(file)
    assert names == ["Imgs/a.jpg", "GT/b.png", "Imgs/d e.jpg", "GT/z.png", "Imgs/\udcff.jpg"]
    pairs = training_pairs(find_subsets(root), root)
    left, unmatched = leave_out(pairs, root, names)
    assert [pair.image.name for pair in left] == ["c.jpg"]
    assert unmatched == ["GT/z.png", "Imgs/\udcff.jpg"]
    with pytest.raises(ValueError, match="names every one of the 4 training pairs"):
        leave_out(pairs, root, [f"Imgs/{pair.image.name}" for pair in pairs])


def test_a_copy_of_an_excluded_photograph_does_not_take_its_place(tmp_path: Path) -> None:
    for folder in ("TrainDataset", "TrainCopy"):
        put(tmp_path / folder / "Imgs", "a.jpg", "b.jpg")
        put(tmp_path / folder / "GT", "a.png", "b.png")
    pairs = training_pairs(find_subsets(tmp_path), tmp_path)
    left, _ = leave_out(pairs, tmp_path, ["TrainCopy/Imgs/a.jpg"])
    assert [pair.image.name for pair in left] == ["b.jpg"]


def test_two_images_of_one_stem_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "Imgs", "a.jpg", "a.png")
    put(tmp_path / "GT", "a.png")
    with pytest.raises(ValueError, match=r"a\.jpg and a\.png share a stem"):
        find_subsets(tmp_path)


def test_the_error_for_an_unknown_layout_lists_expected_and_actual_folders(tmp_path: Path) -> None:
    put(tmp_path / "photos" / "zebras", "a.jpg")
    with pytest.raises(ValueError, match=r"Looked for \{image,gt_object\}.*found photos/, photos/zebras/"):
        find_subsets(tmp_path)


def test_a_missing_folder_and_an_empty_folder_have_errors_of_their_own(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        find_subsets(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no folders"):
        find_subsets(tmp_path)


def test_training_needs_a_training_folder_with_masks(tmp_path: Path) -> None:
    put(tmp_path / "TestDataset" / "Imgs", "a.jpg")
    put(tmp_path / "TestDataset" / "GT", "a.png")
    with pytest.raises(ValueError, match="only test folders found"):
        training_pairs(find_subsets(tmp_path), tmp_path)
    put(tmp_path / "TrainDataset" / "Imgs", "a.jpg", "b.jpg")
    put(tmp_path / "TrainDataset" / "GT")
    with pytest.raises(ValueError, match="2 images in TrainDataset and not one has a mask"):
        training_pairs(find_subsets(tmp_path), tmp_path)


def make_pairs(superclasses: list[str]) -> list[Pair]:
    stems = [f"COD10K-CAM-1-{name}-1-Kind-{i}" if name else f"photo_{i}" for i, name in enumerate(superclasses)]
    return [Pair(Path(f"{stem}.jpg"), Path(f"{stem}.png")) for stem in stems]


@given(
    superclasses=st.lists(st.sampled_from(["", "Aquatic", "Flying", "Terrestrial"]), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.9),
    seed=st.integers(0, 2**32),
)
def test_validation_split_is_a_partition_stratified_to_within_one(
    superclasses: list[str], fraction: float, seed: int
) -> None:
    pairs = make_pairs(superclasses)
    train, val = split_validation(pairs, fraction, seed)
    assert train
    assert val
    assert sorted(train + val, key=pairs.index) == pairs
    assert (train, val) == split_validation(pairs, fraction, seed)
    for name in set(superclasses):
        share = len(val) * superclasses.count(name) / len(pairs)
        assert abs(sum(pair.superclass == name for pair in val) - share) < 1


def test_validation_split_depends_on_the_seed() -> None:
    pairs = make_pairs([""] * 100)
    assert split_validation(pairs, 0.1, seed=1)[1] != split_validation(pairs, 0.1, seed=2)[1]


def test_fingerprint_changes_with_names_and_sizes_only(tmp_path: Path) -> None:
    root = tmp_path / "animals"
    put(root / "Imgs", "a.jpg", "b.jpg")
    put(root / "GT", "a.png", "b.png")

    def now() -> str:
        return fingerprint(training_pairs(find_subsets(root), root), root)

    before = now()
    (root / "Imgs" / "a.jpg").touch()
    assert now() == before
    (root / "Imgs" / "a.jpg").write_bytes(b"another size")
    assert now() != before


def test_a_broken_link_is_still_a_pair(tmp_path: Path) -> None:
    for name in ("Imgs", "GT"):
        (tmp_path / "TrainDataset" / name).mkdir(parents=True)
        for index in range(3):
            (tmp_path / "TrainDataset" / name / f"{index}.png").write_bytes(b"x" * index)
    (tmp_path / "TrainDataset" / "Imgs" / "3.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "TrainDataset" / "GT" / "3.png").write_bytes(b"")
    pairs = training_pairs(find_subsets(tmp_path), tmp_path)
    assert len(pairs) == 4
    assert len(fingerprint(pairs, tmp_path)) == 16


def touch(root: Path, *names: str) -> None:
    """Write files of different contents."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode() * 9)


def pairs_in(subset: Subset, root: Path) -> list[tuple[str, str]]:
    return [(str(pair.image.relative_to(root)), str(pair.mask.relative_to(root))) for pair in subset.pairs]


def test_ordinary_layouts_are_read_as_by_the_first_version(tmp_path: Path) -> None:
    """Fingerprint and split as version 1 computed them: a resumed run compares them with its checkpoint's."""
    root = tmp_path / "data"
    for number in range(40):
        stem = f"COD10K-CAM-{number}-{('Aquatic', 'Flying')[number % 2]}-1-Kind-{number}"
        touch(root, f"TrainDataset/Imgs/{stem}.jpg", f"TrainDataset/GT/{stem}.png")
    for number in range(12):
        touch(root, f"CAMO/Images/Train/camourflage_{number:05}.jpg", f"CAMO/GT/camourflage_{number:05}.png")
        touch(root, f"CAMO/Images/Test/camourflage_{number + 50:05}.jpg", f"CAMO/GT/camourflage_{number + 50:05}.png")
    touch(root, "TrainDataset/Imgs/lone_image.jpg", "TrainDataset/GT/lone_mask.png", "TrainDataset/Imgs/Thumbs.db")
    touch(root, "TrainDataset/Imgs/._x.jpg", "TrainDataset/GT/._x.png", "TrainDataset/Imgs/notes.txt")
    subsets = find_subsets(root)
    pairs = training_pairs(subsets, root)
    _, validation = split_validation(pairs, 0.1, seed=42)
    assert [subset.rules for subset in subsets] == [()] * 3
    assert fingerprint(pairs, root) == "980327ec640df181"
    assert [pair.image.stem.split("-")[-1] for pair in validation] == ["camourflage_00011", "11", "20", "28", "5"]


@pytest.mark.parametrize(
    ("images", "masks"), [("{}.tif", "{}.gif"), ("{}.JFIF", "{}.PNG"), ("{}.bmp", "{}.webp"), ("{}.JPE", "{}.TIFF")]
)
def test_pictures_in_unusual_formats_are_read_too(tmp_path: Path, images: str, masks: str) -> None:
    touch(tmp_path, "images/1.jpg", "masks/1.png", *(f"images/{images.format(number)}" for number in (2, 3)))
    touch(tmp_path, *(f"masks/{masks.format(number)}" for number in (2, 3)))
    (subset,) = find_subsets(tmp_path)
    assert len(subset.pairs) == 3
    assert (subset.images_without_mask, subset.masks_without_image, subset.left_out) == ((), (), {})


def test_a_usual_format_wins_over_others_of_its_name(tmp_path: Path) -> None:
    """As before the others were read; they may be previews or originals."""
    touch(tmp_path, "images/a.jpg", "images/a.tif", "images/a.gif", "images/a.heic", "masks/a.png", "masks/a.gif")
    touch(tmp_path, "images/b.tif", "images/b.gif", "masks/b.png", "images/c.heic", "masks/c.npy")
    (subset,) = find_subsets(tmp_path)
    assert pairs_in(subset, tmp_path) == [("images/a.jpg", "masks/a.png")]
    assert sorted(path.name for path in subset.left_out) == ["b.gif", "b.tif", "c.heic", "c.npy"]


def test_sub_folders_are_read_if_there_is_no_pair_above_them(data: Path) -> None:
    for animal in ("frog", "owl"):
        touch(data, *(f"images/{animal}/{number:03}.jpg" for number in range(3)))
        touch(data, *(f"masks/{animal}/{number:03}.png" for number in range(3)))
    (subset,) = find_subsets(data)
    assert pairs_in(subset, data) == [
        (f"images/{animal}/{number:03}.jpg", f"masks/{animal}/{number:03}.png")
        for animal in ("frog", "owl") for number in range(3)
    ]  # fmt: skip
    assert subset.rules == ("folders below images and masks are read too",)
    assert len(training_pairs([subset], data)) == 6
    touch(data, "images/cover.jpg", "masks/cover.png")
    (subset,) = find_subsets(data)
    assert len(subset.pairs) == 1
    assert len(subset.left_out) == 6


def test_splits_named_by_folders_at_any_depth_are_kept_apart(tmp_path: Path) -> None:
    for split in ("train", "val"):
        touch(tmp_path, f"images/frog/{split}/1.jpg", f"masks/frog/{split}/1.png")
        touch(tmp_path, f"images/owl/{split}/1.jpg", f"masks/owl/{split}/1.png")
    subsets = find_subsets(tmp_path)
    assert {subset.split: sorted(pairs_in(subset, tmp_path)) for subset in subsets} == {
        "train": [(f"images/{a}/train/1.jpg", f"masks/{a}/train/1.png") for a in ("frog", "owl")],
        "test": [(f"images/{a}/val/1.jpg", f"masks/{a}/val/1.png") for a in ("frog", "owl")],
    }
    assert not any(subset.masks_without_image for subset in subsets)


def test_masks_of_a_split_are_found_in_any_letter_case(tmp_path: Path) -> None:
    for split in ("Train", "Test"):
        touch(tmp_path, f"images/{split}/1.jpg", f"masks/{split.lower()}/1.png")
    assert summary(tmp_path) == [("images/Test", "test", 1), ("images/Train", "train", 1)]


@pytest.mark.parametrize(
    ("images", "masks", "name"),
    [
        ("photos", "labels", "data"),
        ("JPEGImages", "SegmentationClass", "data"),
        ("x/img", "x/mask", "x"),
        ("train", "train_masks", "train"),
        ("images_train", "gt_train", "images_train"),
    ],
)
def test_folders_whose_names_are_alike_are_taken_if_none_is_known(
    tmp_path: Path, images: str, masks: str, name: str
) -> None:
    root = tmp_path / "data"
    touch(root, f"{images}/1.jpg", f"{images}/2.jpg", f"{masks}/1.png", f"{masks}/2.png")
    (subset,) = find_subsets(root)
    assert (subset.name, subset.split, len(subset.pairs)) == (name, "train", 2)
    assert subset.rules == (f"taken for images and masks: {Path(images).name}, {Path(masks).name}",)


def test_one_folder_may_hold_images_and_masks(tmp_path: Path) -> None:
    touch(tmp_path, "train/1.jpg", "train/1_mask.png", "train/2.jpg", "train/2_mask.png")
    touch(tmp_path, "test/1.jpg", "test/1.png", "test/2.jpg", "test/2.png")
    test, train = find_subsets(tmp_path)
    assert (test.name, test.split, pairs_in(test, tmp_path)[0]) == ("test", "test", ("test/1.jpg", "test/1.png"))
    assert (train.split, pairs_in(train, tmp_path)[0]) == ("train", ("train/1.jpg", "train/1_mask.png"))
    assert train.rules == ("images and masks are in one folder", "all 2 masks end in _mask; paired by the rest")


def test_what_archivers_and_network_disks_leave_is_no_data(tmp_path: Path) -> None:
    touch(tmp_path, "images/a.jpg", "masks/a.png", "images/@eaDir/a.jpg/preview.jpg", "images/Thumbs.db")
    touch(tmp_path, "__MACOSX/images/b.jpg", "__MACOSX/masks/b.png")
    (subset,) = find_subsets(tmp_path)
    assert (len(subset.pairs), subset.left_out) == (1, {})


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "device"])
def test_what_is_no_file_is_left_out_without_being_opened(
    data: Path, kind: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(data / "images", "a.jpg", "b.jpg")
    put(data / "masks", "a.png", "b.png", "z.png")
    monkeypatch.chdir(data)  # a socket's path must be short
    special = Path("images/z.jpg")
    if kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(special))
    elif kind == "device":
        special.symlink_to("/dev/zero")
    else:
        target = Path("pipe") if kind == "link to a pipe" else special
        os.mkfifo(target)
        if target != special:
            special.symlink_to(data / target)
    subsets = find_subsets(data)
    pairs = training_pairs(subsets, data)
    assert [pair.image.name for pair in pairs] == ["a.jpg", "b.jpg"]
    describe(subsets, len(pairs))
    assert "1 files left out (not a file but a pipe, socket or device), the first: z.jpg" in caplog.text


def test_bitmaps_of_one_name_and_size_are_different_photographs(data: Path) -> None:
    for number, animal in enumerate(("frog", "owl", "moth")):
        (data / "images" / animal).mkdir(parents=True)
        Image.new("RGB", (40, 30), (number, 9, 9)).save(data / "images" / animal / "1.bmp")
        put(data / "masks" / animal, "1.png")
    shutil.copyfile(data / "images" / "owl" / "1.bmp", data / "images" / "moth" / "1.bmp")
    assert len(training_pairs(find_subsets(data), data)) == 2


def test_the_reason_why_no_pair_was_found_is_in_the_error_and_in_the_warnings(
    data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    touch(data, *(f"images/{number}.jpg" for number in range(3)), "images/9.heic")
    touch(data, *(f"masks/{number}_edge.png" for number in range(3)))
    (data / "images" / "train").mkdir()  # empty: not where the images are
    with pytest.raises(ValueError, match=r"the names are such as 0 and 0_edge; 1 files left out \(in a format that"):
        training_pairs(find_subsets(data), data)
    describe(find_subsets(data), 0)
    assert "3 images without a mask left out, the first: 0.jpg; the names are such as 0 and 0_edge" in caplog.text
    assert "1 files left out (in a format that is not read; convert to .jpg or .png), the first: 9.heic" in caplog.text


def test_images_beside_the_folders_of_splits_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    touch(tmp_path, "images/train/1.jpg", "masks/train/1.png", "images/unlabelled/2.jpg", "images/3.jpg")
    describe(find_subsets(tmp_path), 1)
    assert "2 files left out (beside folders for training or testing, and then only those are read)" in caplog.text
