"""Image/mask pairs in the folder layouts of camouflaged-object datasets, and their splits.

Recognised below the given folder, at most four levels down, in any letter case:

    COD10K-v3        {Train,Test}/{Image,GT_Object}   only COD10K-CAM-* by default
    SINet, most      TrainDataset/{Imgs,GT}  TestDataset/{CAMO,CHAMELEON,COD10K,NC4K}/{Imgs,GT}  TestDataset/{Imgs,GT}
    ZoomNeXt         {Image,Mask}
    BiRefNet         {im,gt}
    CAMO-V.1.0       Images/{Train,Test} with one GT folder for both, or {images,masks}/{train,val}
    NC4K             {Imgs,GT}
    your own         {images,masks}

Images and masks are paired by file stem, never by position in a sorted list, where one missing mask would shift every
pair after it. A folder's path says whether it is for training or for testing ("Train", "TR-COD10K", "TestDataset",
"valid"); a folder that says neither is for training.
"""

import hashlib
import logging
import os
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

NONCAM_PREFIX = "COD10K-NonCAM"  # images without a camouflaged object, whose masks are empty
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MASK_SUFFIXES = (".png", ".jpg", ".bmp")

# (image folder, mask folder), lower case; the first match in a directory wins.
_PAIR_FOLDERS = (
    ("image", "gt_object"),
    ("imgs", "gt"),
    ("image", "mask"),
    ("im", "gt"),
    ("images", "masks"),
    ("images", "gt"),
    ("image", "gt"),
)
PAIR_FOLDER_NAMES = frozenset(name for names in _PAIR_FOLDERS for name in names)
_MAX_DEPTH = 4
_TRAIN_WORD = re.compile(r"train.*|tr")
_TEST_WORD = re.compile(r"test.*|te|val|valid|validation|vd|eval.*")
_COD10K_NAME = re.compile(r"COD10K-CAM-\d+-(?P<superclass>[^-]+)-\d+-[^-]+-\d+")

Split = Literal["train", "test"]

logger = logging.getLogger("train_ultimate")


@dataclass(frozen=True)
class Pair:
    """One photograph and its mask."""

    image: Path
    mask: Path

    @property
    def superclass(self) -> str:
        """COD10K's superclass ("Aquatic", "Flying", ...), or an empty string if the file name has none."""
        return superclass_of(self.image.stem)


def superclass_of(stem: str) -> str:
    match = _COD10K_NAME.match(stem)
    return match["superclass"] if match else ""


@dataclass(frozen=True)
class Subset:
    """The pairs of one image folder and its mask folder."""

    name: str
    split: Split
    pairs: tuple[Pair, ...]
    images_without_mask: tuple[Path, ...]
    masks_without_image: tuple[Path, ...]
    num_noncam_skipped: int


def find_subsets(root: Path, include_noncam: bool = False) -> list[Subset]:
    """Return every pair of an image folder and a mask folder below ``root``, sorted by path.

    Args:
        root: the folder given by ``--dataset-path``.
        include_noncam: keep COD10K's images without a camouflaged object.

    Raises:
        ValueError: ``root`` is not a folder or has no known layout, or two images share a stem.
    """
    if not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise ValueError(f"{root}: {what}; --dataset-path must name the dataset's folder")
    subsets = []
    for images, masks in _find_pair_folders(root):
        nested = [child for child in _subfolders(images) if split_of([child.name]) is not None]
        stems = {folder: files_by_stem(folder, IMAGE_SUFFIXES).keys() for folder in nested or [images]}
        for folder in stems:
            own = nested and (masks / folder.name).is_dir()
            # A shared mask folder holds the masks of all splits: those of another split do not lack their image.
            elsewhere = {stem for other in stems if other != folder and not own for stem in stems[other]}
            mask_folder = masks / folder.name if own else masks
            subsets.append(_read_subset(root, folder, mask_folder, bool(nested), elsewhere, include_noncam))
    if not subsets:
        raise ValueError(_describe_unknown_layout(root))
    return subsets


def training_pairs(subsets: Sequence[Subset], root: Path) -> list[Pair]:
    """Return all training pairs, each once, in an order that depends only on file names.

    A photograph that occurs twice, by a symbolic link or because one collection contains another (TrainDataset contains
    COD10K's training images), could end up on both sides of the validation split: only the first one counts.

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
            f"{root}: {num_images} images in {names} and not one has a mask; name each mask after its image, with one "
            f"of {', '.join(MASK_SUFFIXES)}"
        )
    return each_once(pairs)


def each_once(pairs: Sequence[Pair]) -> list[Pair]:
    """Drop pairs whose photograph has the file name and size of an earlier one."""
    firsts: dict[tuple[str, int], Pair] = {}
    for pair in pairs:
        firsts.setdefault((pair.image.name, size_and_time(pair.image)[0]), pair)
    return list(firsts.values())


def size_and_time(path: Path) -> tuple[int, int]:
    """Return a file's size in bytes and modification time in ns; (-1, -1) for a broken link."""
    try:
        status = path.stat()
    except OSError:  # opening the file will report it
        return -1, -1
    return status.st_size, status.st_mtime_ns


def read_exclude_file(path: Path) -> list[str]:
    """Read an exclude file: paths relative to the dataset's folder, one per line; skip blank lines and ``#`` comments.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
    except OSError as error:
        raise ValueError(
            f"--exclude {path}: cannot be read ({error.strerror}); check-data --write-exclude FILE writes such a file"
        ) from error
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def leave_out(pairs: Sequence[Pair], root: Path, names: Collection[str]) -> tuple[list[Pair], list[str]]:
    """Leave out the pairs whose image or mask is named, by its path relative to ``root``.

    Call after ``each_once``: leaving out the first of two copies before it would let the second one in.

    Returns:
        the remaining pairs, and the names that match no pair.

    Raises:
        ValueError: no pair remains.
    """
    left, unmatched = [], set(names)
    for pair in pairs:
        own = {path.relative_to(root).as_posix() for path in (pair.image, pair.mask)}
        unmatched -= own
        if own.isdisjoint(names):
            left.append(pair)
    if not left:
        raise ValueError(f"{root}: --exclude names every one of the {len(pairs)} training pairs; shorten its list")
    return left, sorted(unmatched)


def describe(subsets: Sequence[Subset], num_used: int) -> list[str]:
    """Return a line for each folder and for what was left out of it; warn of images without a mask.

    Args:
        subsets: from ``find_subsets``.
        num_used: number of pairs from ``training_pairs``.
    """
    lines = []
    for subset in subsets:
        use = "for training" if subset.split == "train" else "for testing, not touched"
        lines.append(f"{subset.name}: {len(subset.pairs)} pairs, {use}")
        if subset.images_without_mask:
            count, first = len(subset.images_without_mask), subset.images_without_mask[0].name
            logger.warning(f"{subset.name}: {count} images without a mask left out, the first: {first}")
        if subset.num_noncam_skipped:
            lines.append(f"   {subset.num_noncam_skipped} without camouflaged objects left out (see --include-noncam)")
    num_for_training = sum(len(subset.pairs) for subset in subsets if subset.split == "train")
    if num_for_training > num_used:
        lines.append(f"{num_for_training - num_used} pairs occur twice and count once")
    return lines


def by_name(pairs: Sequence[Pair], root: Path) -> dict[str, Pair]:
    """Map each image's path relative to ``root``, its name in checkpoints and logs, to its pair."""
    return {pair.image.relative_to(root).as_posix(): pair for pair in pairs}


def split_as_before(pairs: Sequence[Pair], root: Path, validation: Sequence[str]) -> tuple[list[Pair], list[Pair]]:
    """Split the pairs as an earlier run did, by its validation images' paths; new images go to the training set.

    If it were drawn again after files were added or removed, the validation set would contain images that the network
    was trained on.

    Returns:
        training pairs, validation pairs.

    Raises:
        ValueError: none of the validation images exists, or no other image.
    """
    names, named = set(validation), by_name(pairs, root)
    chosen = [pair for name, pair in named.items() if name in names]
    rest = [pair for name, pair in named.items() if name not in names]
    if not chosen:
        raise ValueError(
            f"{root}: none of the {len(names)} images in the checkpoint's validation set was found (such as "
            f"{min(names)}); resume with the dataset it was trained on, and do not exclude all of them"
        )
    if not rest:
        raise ValueError(f"{root}: no images to train on besides the {len(chosen)} of the validation set; add some")
    return rest, chosen


def named_pairs(pairs: Sequence[Pair], root: Path, names: Sequence[str]) -> list[Pair]:
    """Return the pairs of the images with these paths relative to ``root``.

    Raises:
        ValueError: one of them is missing; scores of the others would be those of another set.
    """
    named = by_name(pairs, root)
    missing = [name for name in names if name not in named]
    if missing:
        raise ValueError(
            f"{root}: {len(missing)} of the {len(names)} images that the checkpoint's run held out are not there (such "
            f"as {missing[0]}); --dataset-path must name the folder that it was trained with"
        )
    return [named[name] for name in names]


def split_validation(pairs: Sequence[Pair], fraction: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Carve a validation set out of the training pairs: the same one for the same pairs, fraction and seed.

    Each superclass contributes its share (largest remainders round up), so that an epoch's scores do not depend on
    which animals happened to be drawn. Both lists keep the order of ``pairs``.

    Returns:
        training pairs, validation pairs; at least one of each.

    Raises:
        ValueError: there are fewer than two pairs.
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
    """Return 16 hex digits that change when a file is added, removed, renamed or resized; contents are not read."""
    digest = hashlib.sha256()
    for pair in pairs:
        for path in (pair.image, pair.mask):
            digest.update(
                f"{path.relative_to(root).as_posix()}\0{size_and_time(path)[0]}\n".encode(errors="surrogateescape")
            )
    return digest.hexdigest()[:16]


def _find_pair_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    for directory, depth in _walk(root):
        children = {child.name.lower(): child for child in _subfolders(directory)}
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
            pending.extend((child, depth + 1) for child in reversed(_subfolders(directory)))


def _subfolders(directory: Path) -> list[Path]:
    """Return visible subfolders, sorted by name; none if the directory is not readable (``lost+found``)."""
    try:
        with os.scandir(directory) as entries:
            names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except PermissionError:
        return []
    return [directory / name for name in names]


def split_of(path_parts: Sequence[str]) -> Split | None:
    """Return the split named by the last folder that names one, or None."""
    for part in reversed(path_parts):
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
        if any(_TRAIN_WORD.fullmatch(word) for word in words):
            return "train"
        if any(_TEST_WORD.fullmatch(word) for word in words):
            return "test"
    return None


def _read_subset(
    root: Path, images: Path, masks: Path, nested: bool, stems_elsewhere: Collection[str], include_noncam: bool
) -> Subset:
    location = images if nested else images.parent
    relative = location.relative_to(root)
    image_by_stem = files_by_stem(images, IMAGE_SUFFIXES)
    mask_by_stem = files_by_stem(masks, MASK_SUFFIXES)
    lone_masks = [mask_by_stem[stem] for stem in mask_by_stem.keys() - image_by_stem.keys() - set(stems_elsewhere)]
    noncam = [stem for stem in image_by_stem if stem.startswith(NONCAM_PREFIX)]
    if not include_noncam:
        for stem in noncam:
            del image_by_stem[stem]
    pairs = [Pair(image, mask_by_stem[stem]) for stem, image in image_by_stem.items() if stem in mask_by_stem]
    return Subset(
        name=relative.as_posix() if relative.parts else root.resolve().name,
        split=split_of(relative.parts) or split_of([root.resolve().name]) or "train",
        pairs=tuple(pairs),
        images_without_mask=tuple(image for stem, image in image_by_stem.items() if stem not in mask_by_stem),
        masks_without_image=tuple(sorted(lone_masks)),
        num_noncam_skipped=0 if include_noncam else len(noncam),
    )


def files_by_stem(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Map stem to path for the folder's visible files with one of the suffixes, sorted by name.

    Raises:
        ValueError: two of them share a stem.
    """
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
    part_of_one = any(root.name.lower() in pair for pair in _PAIR_FOLDERS)
    hint = f"; try {root.parent}, the folder that holds images and masks" if part_of_one else ""
    return f"{root}: no image/mask folders found{hint}. Looked for {known}, up to four levels down; found {shown}"
