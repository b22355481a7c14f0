"""Find image/mask pairs in the folder layouts that camouflaged-object data sets come in.

Recognised below the given folder, at most three levels down, in any letter case:

    COD10K-v3        {Train,Test}/{Image,GT_Object}   only COD10K-CAM-* unless asked otherwise
    SINet, most      TrainDataset/{Imgs,GT}  TestDataset/{CAMO,CHAMELEON,COD10K,NC4K}/{Imgs,GT}  TestDataset/{Imgs,GT}
    ZoomNeXt         {Image,Mask}
    BiRefNet         {im,gt}
    CAMO-V.1.0       Images/{Train,Test} with one GT folder for both
    NC4K             {Imgs,GT}
    your own         {images,masks}

Images and masks are paired by file stem, never by position in a sorted list: one missing mask would otherwise shift
every pair after it. Whether a folder is for training or for testing is read off its path ("Train", "TR-COD10K",
"TestDataset"); a folder that says neither is taken for training.
"""

import hashlib
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".jpg", ".bmp")

# (image folder, mask folder), lower case; the first that matches in a directory wins.
_PAIR_FOLDERS = (
    ("image", "gt_object"),
    ("imgs", "gt"),
    ("image", "mask"),
    ("im", "gt"),
    ("images", "masks"),
    ("images", "gt"),
    ("image", "gt"),
)
_MAX_DEPTH = 3
_TRAIN_WORDS = {"train", "training", "tr"}
_TEST_WORDS = {"test", "testing", "te", "val", "validation"}
_COD10K_NAME = re.compile(r"COD10K-CAM-\d+-(?P<superclass>[^-]+)-\d+-[^-]+-\d+")

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Pair:
    """One photograph and its mask."""

    image: Path
    mask: Path

    @property
    def superclass(self) -> str:
        """COD10K's superclass ("Aquatic", "Flying", ...) where the file name tells it, else an empty string."""
        match = _COD10K_NAME.match(self.image.stem)
        return match["superclass"] if match else ""


@dataclass(frozen=True)
class Subset:
    """The pairs of one image folder and its mask folder."""

    name: str
    split: Split
    pairs: tuple[Pair, ...]
    images_without_mask: tuple[Path, ...]
    num_noncam_skipped: int


def find_subsets(root: Path, include_noncam: bool = False) -> list[Subset]:
    """Every image/mask folder pair below ``root``, sorted by path.

    Args:
        root: the folder that ``--dataset-path`` names.
        include_noncam: keep COD10K's images without any camouflaged object (their masks are empty).

    Raises:
        ValueError: ``root`` is not a folder, holds no known layout, or two images share a stem.
    """
    if not root.is_dir():
        raise ValueError(f"{root}: no such folder; --dataset-path must name the data set's folder, or be 'synthetic'")
    subsets = []
    for images, masks in _find_pair_folders(root):
        nested = [child for child in _subfolders(images).values() if _split_of([child.name]) is not None]
        for folder in nested or [images]:
            subsets.append(_read_subset(root, folder, masks, shared_masks=bool(nested), include_noncam=include_noncam))
    if not subsets:
        raise ValueError(_describe_unknown_layout(root))
    return subsets


def training_pairs(subsets: Sequence[Subset], root: Path) -> list[Pair]:
    """All pairs meant for training, in an order that depends on file names alone.

    Raises:
        ValueError: there is no training folder, or no training image has a mask.
    """
    train = [subset for subset in subsets if subset.split == "train"]
    if not train:
        names = ", ".join(subset.name for subset in subsets)
        raise ValueError(
            f"{root}: only test folders found ({names}); training needs one such as TrainDataset/{{Imgs,GT}}"
        )
    pairs = [pair for subset in train for pair in subset.pairs]
    if not pairs:
        num_images = sum(len(subset.images_without_mask) for subset in train)
        names = ", ".join(subset.name for subset in train)
        raise ValueError(
            f"{root}: {num_images} images in {names} and not one has a mask; a mask carries its image's file name, "
            f"with {', '.join(MASK_SUFFIXES)}"
        )
    return pairs


def split_validation(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Carve a validation set out of the training pairs: the same one for the same pairs, fraction and seed.

    Each superclass gives its share (largest remainders round up), so that an epoch's scores are not at the mercy of
    which animals happened to be drawn. Both lists keep the order of ``pairs``.

    Returns:
        (training pairs, validation pairs); at least one of each.

    Raises:
        ValueError: fewer than two pairs.
    """
    if len(pairs) < 2:
        raise ValueError(f"{len(pairs)} training pair: at least two are needed, one to train on and one to validate on")
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(pair.superclass, []).append(index)
    num_validation = min(max(1, round(fraction * len(pairs))), len(pairs) - 1)
    quotas = {name: int(num_validation * len(members) / len(pairs)) for name, members in groups.items()}
    by_remainder = sorted(groups, key=lambda name: (num_validation * len(groups[name]) / len(pairs)) % 1, reverse=True)
    for name in by_remainder[: num_validation - sum(quotas.values())]:
        quotas[name] += 1
    generator = random.Random(f"validation split, seed {seed}")
    chosen = {index for name in sorted(groups) for index in generator.sample(groups[name], quotas[name])}
    training = [pair for index, pair in enumerate(pairs) if index not in chosen]
    return training, [pairs[index] for index in sorted(chosen)]


def fingerprint(pairs: Sequence[Pair], root: Path) -> str:
    """16 hex digits that change when a file is added, removed, renamed or resized; contents are not read."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.image, pair.mask):
            digest.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def _find_pair_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    for directory, depth in _walk(root):
        children = _subfolders(directory)
        for image_name, mask_name in _PAIR_FOLDERS:
            if depth < _MAX_DEPTH and image_name in children and mask_name in children:
                yield children[image_name], children[mask_name]
                break


def _walk(root: Path) -> Iterator[tuple[Path, int]]:
    pending = [(root, 0)]
    while pending:
        directory, depth = pending.pop()
        yield directory, depth
        if depth < _MAX_DEPTH:
            pending.extend((child, depth + 1) for child in reversed(_subfolders(directory).values()))


def _subfolders(directory: Path) -> dict[str, Path]:
    """Lower-case name -> path of each visible subfolder, sorted by name."""
    with os.scandir(directory) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return {name.lower(): directory / name for name in names}


def _split_of(path_parts: Sequence[str]) -> Split | None:
    for part in reversed(path_parts):
        words = {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}
        if words & _TRAIN_WORDS:
            return "train"
        if words & _TEST_WORDS:
            return "test"
    return None


def _read_subset(root: Path, images: Path, masks: Path, shared_masks: bool, include_noncam: bool) -> Subset:
    location = images if shared_masks else images.parent
    relative = location.relative_to(root)
    image_by_stem = _files_by_stem(images, IMAGE_SUFFIXES)
    mask_by_stem = _files_by_stem(masks, MASK_SUFFIXES)
    noncam = [stem for stem in image_by_stem if stem.startswith("COD10K-NonCAM")]
    if not include_noncam:
        for stem in noncam:
            del image_by_stem[stem]
    pairs = [Pair(image, mask_by_stem[stem]) for stem, image in image_by_stem.items() if stem in mask_by_stem]
    return Subset(
        name=relative.as_posix() if relative.parts else root.resolve().name,
        split=_split_of(relative.parts) or _split_of([root.resolve().name]) or "train",
        pairs=tuple(pairs),
        images_without_mask=tuple(image for stem, image in image_by_stem.items() if stem not in mask_by_stem),
        num_noncam_skipped=0 if include_noncam else len(noncam),
    )


def _files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    for name in names:
        path = folder / name
        if path.suffix.lower() not in suffixes:
            continue
        if path.stem in files:
            raise ValueError(f"{folder}: {files[path.stem].name} and {name} share a stem; remove one of them")
        files[path.stem] = path
    return files


def _describe_unknown_layout(root: Path) -> str:
    found = [path.relative_to(root).as_posix() + "/" for path, depth in _walk(root) if 0 < depth < _MAX_DEPTH]
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "no folders"
    known = ", ".join(f"{{{image},{mask}}}" for image, mask in _PAIR_FOLDERS)
    return f"{root}: no image/mask folders found. Looked for {known}, up to three levels down; found {shown}"
