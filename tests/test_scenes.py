"""Photographs of one scene stay on one side of the split."""

import random
from pathlib import Path

import numpy as np
import pytest
from conftest import needs_shared
from PIL import Image, ImageFilter

from data.layouts import Pair, find_subsets, split_validation, training_pairs
from data.scenes import fold_of_each, keep_scenes_together, scenes_of


def photograph(seed: int) -> Image.Image:
    """Return a picture with structure at all sizes, unlike those of other seeds."""
    generator, picture = np.random.default_rng(seed), np.zeros((96, 128, 3))
    for side in (4, 8, 16, 32):
        noise = Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8))
        picture += np.asarray(noise.resize((128, 96), Image.Resampling.BICUBIC), dtype=float)
    return Image.fromarray((picture / 4).astype(np.uint8))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Twenty photographs of scenes of their own, and five more of each of two scenes, as frames of a video."""
    folder, generator, pairs = tmp_path_factory.mktemp("frames"), random.Random(3), []
    for number in range(30):
        scene = number if number < 20 else 100 + number % 2
        picture = photograph(scene)
        if number >= 20:
            shift = generator.randint(0, 6)
            picture = picture.crop((shift, 0, 122 + shift, 96)).filter(ImageFilter.GaussianBlur(generator.random() / 2))
        path = folder / f"{number:02d}.jpg"
        picture.save(path, quality=90)
        pairs.append(Pair(path, path.with_suffix(".png")))
    return pairs


def test_frames_of_a_video_are_one_scene_and_other_photographs_are_not(frames: list[Pair]) -> None:
    scenes = scenes_of([pair.image for pair in frames])
    assert len(set(scenes[:20])) == 20
    assert len(set(scenes[20::2])) == len(set(scenes[21::2])) == 1
    assert len(set(scenes)) == 22


@pytest.mark.parametrize("seed", range(5))
def test_no_scene_is_on_both_sides_and_the_number_stays(frames: list[Pair], seed: int) -> None:
    _, drawn = split_validation(frames, 0.3, seed)
    training, validation, moved = keep_scenes_together(frames, drawn, seed)
    scene = dict(zip(frames, scenes_of([pair.image for pair in frames]), strict=True))
    assert not {scene[pair] for pair in training} & {scene[pair] for pair in validation}
    assert sorted([*training, *validation], key=frames.index) == frames
    assert len(validation) == len(drawn) == 9
    assert moved == len({*drawn} - {*validation})
    assert (training, validation, moved) == keep_scenes_together(frames, drawn, seed)


def test_split_without_shared_scenes_stays_as_it_was_drawn(frames: list[Pair]) -> None:
    alone = frames[:20]
    training, drawn = split_validation(alone, 0.2, seed=1)
    assert keep_scenes_together(alone, drawn, seed=1) == (training, drawn, 0)


def test_one_scene_alone_is_split_as_before(frames: list[Pair]) -> None:
    """There is nothing else to validate on."""
    video = frames[20::2]
    training, drawn = split_validation(video, 0.4, seed=1)
    assert keep_scenes_together(video, drawn, seed=1) == (training, drawn, 0)


def test_unreadable_photographs_are_scenes_of_their_own(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).write_bytes(b"no picture")
    assert scenes_of([tmp_path / "a.jpg", tmp_path / "b.jpg", tmp_path / "missing.jpg"]) == [0, 1, 2]
    assert scenes_of([]) == []


@needs_shared
def test_photographs_of_camo_do_not_leak_into_validation() -> None:
    root = Path(__file__).parents[2] / "shared/data/CAMO"
    pairs = training_pairs(find_subsets(root), root)
    _, drawn = split_validation(pairs, 0.1, seed=42)
    _, validation, moved = keep_scenes_together(pairs, drawn, seed=42)
    assert moved > 0
    assert len(validation) == len(drawn)


@pytest.mark.parametrize("num_folds", [2, 3, 5, 22])
def test_folds_are_of_equal_size_as_far_as_scenes_allow(frames: list[Pair], num_folds: int) -> None:
    folds = fold_of_each(frames, num_folds, seed=1)
    scenes = scenes_of([pair.image for pair in frames])
    assert len({*zip(scenes, folds, strict=True)}) == len({*scenes}) == 22  # no scene in two folds
    sizes = [folds.count(number) for number in range(1, num_folds + 1)]
    assert sum(sizes) == 30
    assert max(sizes) - min(sizes) <= (1 if num_folds <= 5 else 4)  # two scenes have five photographs
    assert folds == fold_of_each(frames, num_folds, seed=1)
    assert folds != fold_of_each(frames, num_folds, seed=2)


def test_folds_share_the_superclasses(frames: list[Pair], tmp_path: Path) -> None:
    pairs = []
    for number, pair in enumerate(frames[:20]):
        superclass = ("Aquatic", "Flying")[number % 4 == 0]
        image = tmp_path / f"COD10K-CAM-1-{superclass}-1-X-{number}.jpg"
        image.symlink_to(pair.image)
        pairs.append(Pair(image, pair.mask))
    folds = fold_of_each(pairs, 5, seed=0)
    for number in range(1, 6):
        own = [pair.superclass for pair, fold in zip(pairs, folds, strict=True) if fold == number]
        assert sorted(own) == ["Aquatic"] * 3 + ["Flying"]


def test_more_folds_than_scenes_are_refused(frames: list[Pair]) -> None:
    with pytest.raises(ValueError, match="only 30 photographs, of 22 scenes; give fewer folds"):
        fold_of_each(frames, 23, seed=0)
