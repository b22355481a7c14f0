"""Synthetic scenes: reproducible, found like photographs, and not solvable by brightness."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.layouts import find_subsets
from data.synthetic import camouflage_scene, dataset_folder, write_synthetic_dataset


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_synthetic_dataset(tmp_path / name, 3, 1, 64, seed=4)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) == 9
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes() for file in files)


def test_layout_is_found_like_any_other(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "data", 3, 1, 64, seed=4)
    found = [(subset.name, subset.split, len(subset.pairs)) for subset in find_subsets(tmp_path / "data")]
    assert found == [("TestDataset", "test", 1), ("TrainDataset", "train", 3)]


def test_objects_cannot_be_found_by_brightness() -> None:
    """Even the best threshold, chosen per image by its mask, must fail: the cue is texture, not brightness."""
    best_ious = []
    for index in range(30):
        image, mask = camouflage_scene(np.random.default_rng(index), 96)
        grey, truth = np.array(Image.fromarray(image).convert("L")), mask > 0
        assert 0.01 < truth.mean() < 0.5
        candidates = [side for level in range(0, 256, 8) for side in (grey > level, grey <= level)]
        best_ious.append(max((side & truth).sum() / (side | truth).sum() for side in candidates))
    assert np.mean(best_ious) < 0.25


def test_second_call_with_the_same_recipe_keeps_the_files(tmp_path: Path) -> None:
    root = tmp_path / "data"
    write_synthetic_dataset(root, 2, 1, 64, seed=4)
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*.*")}
    write_synthetic_dataset(root, 2, 1, 64, seed=4)
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*.*")} == before
    with pytest.raises(ValueError, match="other settings"):
        write_synthetic_dataset(root, 2, 1, 64, seed=5)


def test_interrupted_writing_leaves_no_dataset_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            write_synthetic_dataset(tmp_path / "data", 2, 1, 64, seed=4)
    assert not (tmp_path / "data").exists()
    write_synthetic_dataset(tmp_path / "data", 2, 1, 64, seed=4)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.parametrize("in_the_way", ["file", "link", "folder"])
def test_what_others_wrote_where_scenes_are_made_is_kept(tmp_path: Path, in_the_way: str) -> None:
    mine, place = tmp_path / "mine", tmp_path / "data.unfinished"
    mine.mkdir()
    (mine / "photo.jpg").write_bytes(b"x")
    if in_the_way == "folder":
        mine.rename(place)
    elif in_the_way == "link":
        place.symlink_to(mine)
    else:
        place.write_bytes(b"x")
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(ValueError, match=r"data\.unfinished: in the way of synthetic scenes, and not made by them"):
        write_synthetic_dataset(tmp_path / "data", 2, 1, 64, seed=4)
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_damaged_recipe_is_one_of_other_settings(tmp_path: Path) -> None:
    write_synthetic_dataset(tmp_path / "data", 2, 1, 64, seed=4)
    (tmp_path / "data" / "recipe.json").write_text('{"num_')
    with pytest.raises(ValueError, match="contains data made with other settings"):
        write_synthetic_dataset(tmp_path / "data", 2, 1, 64, seed=4)


def test_synthetic_scenes_are_inside_the_runs_folder() -> None:
    assert dataset_folder("synthetic", Path("runs/1")) == Path("runs/1/synthetic")
    assert dataset_folder("photos", Path("runs/1")) == Path("photos")
