"""Photographs of one scene, kept on one side of the split: validation must not score what was learnt by heart."""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.decoding import to_rgb
from data.duplicates import THUMBNAIL_SIDE, find_alike, thumbnail
from data.layouts import Pair
from data.masks import UInt8Array
from data.opening import open_picture
from data.processes import num_cores


def scenes_of(images: Sequence[Path]) -> list[int]:
    """Return a number for each photograph, the same for those that show one scene: duplicates, frames of a video.

    About a millisecond for a JPEG, whose thumbnail is read without the whole file. What cannot be read is a scene of
    its own.
    """
    with ThreadPoolExecutor(max_workers=num_cores()) as pool:
        thumbnails = list(pool.map(_thumbnail, images))
    scenes = list(range(len(images)))

    def first_of(position: int) -> int:
        while scenes[position] != position:
            scenes[position] = scenes[scenes[position]]
            position = scenes[position]
        return position

    for alike in find_alike(np.array(thumbnails, np.uint8).reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)):
        here, there = sorted((first_of(alike.first), first_of(alike.second)))
        scenes[there] = here
    return [first_of(position) for position in range(len(images))]


def _thumbnail(path: Path) -> UInt8Array:
    try:
        with open_picture(path) as image:
            image.draft("RGB", (2 * THUMBNAIL_SIDE, 2 * THUMBNAIL_SIDE))
            return thumbnail(to_rgb(image))
    except Exception:  # Pillow's plug-ins raise anything; the file's reader reports it
        return np.zeros((THUMBNAIL_SIDE, THUMBNAIL_SIDE), np.uint8)  # too flat to be like another


def keep_scenes_together(
    pairs: Sequence[Pair], validation: Sequence[Pair], seed: int
) -> tuple[list[Pair], list[Pair], int]:
    """Move photographs out of validation whose scene is in training too, and others in for them.

    The others are alone in their scenes, of the same superclass if there are such. If nothing would be left to validate
    on, because all photographs show one scene, everything stays as it is.

    Args:
        pairs: all pairs.
        validation: those of them to validate on; training has the rest.
        seed: of the choice of the others.

    Returns:
        training pairs, validation pairs, both in the order of ``pairs``; and how many were moved out of validation.
    """
    scene = dict(zip((pair.image for pair in pairs), scenes_of([pair.image for pair in pairs]), strict=True))
    held_out = {pair.image for pair in validation}
    trained_on = {scene[pair.image] for pair in pairs if pair.image not in held_out}
    shared = [pair for pair in validation if scene[pair.image] in trained_on]
    sizes = Counter(scene.values())
    alone = [pair for pair in pairs if pair.image not in held_out and sizes[scene[pair.image]] == 1]
    random.Random(f"scenes, seed {seed}").shuffle(alone)
    kept = held_out - {pair.image for pair in shared}
    for pair in shared:
        if alone:
            other = next((other for other in alone if other.superclass == pair.superclass), alone[0])
            alone.remove(other)
            kept.add(other.image)
    if kept:
        held_out = kept
    training = [pair for pair in pairs if pair.image not in held_out]
    return training, [pair for pair in pairs if pair.image in held_out], len(shared) if kept else 0


def fold_of_each(pairs: Sequence[Pair], num_folds: int, seed: int) -> list[int]:
    """Return the number of each pair's fold, from 1: photographs of one scene are in the same fold.

    Folds have as many photographs, and as many of each superclass, as scenes allow. The same pairs, number and seed
    give the same folds.

    Raises:
        ValueError: There are fewer scenes than folds.
    """
    scenes: dict[int, list[int]] = defaultdict(list)
    for index, scene in enumerate(scenes_of([pair.image for pair in pairs])):
        scenes[scene].append(index)
    if len(scenes) < num_folds:
        scene = f", of {len(scenes)} scenes" if len(scenes) < len(pairs) else ""
        raise ValueError(f"--folds {num_folds}: there are only {len(pairs)} photographs{scene}; give fewer folds")
    drawn = list(scenes.values())
    random.Random(f"folds, seed {seed}").shuffle(drawn)
    folds = [0] * len(pairs)
    sizes: Counter[int] = Counter()
    of_superclass: Counter[tuple[int, str]] = Counter()
    for scene in sorted(drawn, key=len, reverse=True):  # the largest first: the single ones make up for them
        superclass = pairs[scene[0]].superclass
        fold = min(range(1, num_folds + 1), key=lambda one: (of_superclass[one, superclass], sizes[one]))
        for index in scene:
            folds[index] = fold
        sizes[fold] += len(scene)
        of_superclass[fold, superclass] += len(scene)
    return folds
