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
pair after it. If stems differ, ``data.pairing`` looks for a rule. If an image folder has no pair, the folders below it
are searched too. If there is no such folder at all, folders with similar names ("photos" and "labels", "train" and
"train_masks") are taken, or those that hold both images and masks.

A folder's path says whether it is for training or for testing ("Train", "TR-COD10K", "TestDataset", "valid"); a folder
that says neither is for training.
"""

import hashlib
import logging
import os
import random
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from data.listing import MAX_DEPTH, by_stem, list_pictures, list_tree, picture_names, subfolders, walk
from data.pairing import Matching, folder_role, match_names, separate

NONCAM_PREFIX = "COD10K-NonCAM"  # images without a camouflaged object, whose masks are empty
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")  # the usual formats, see ``list_pictures``
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
_COMPARED = 4096  # bytes
_IN_SUBFOLDER = "in sub-folders, which are read only if no image above them has a mask"
_BESIDE_SPLITS = "beside folders for training or testing, and then only those are read"
_TRAIN_WORD = re.compile(r"train.*|tr")
_TEST_WORD = re.compile(r"test.*|te|val|valid|validation|vd|eval.*")
_COD10K_NAME = re.compile(r"COD10K-CAM-\d+-(?P<superclass>[^-]+)-\d+-[^-]+-\d+")

Split = Literal["train", "test"]
_SPLITS: tuple[Split | None, ...] = (None, "test", "train")

logger = logging.getLogger("train_ultimate")


OUTSIDE = "../"  # how names of another dataset's files begin


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
    rules: tuple[str, ...] = ()  # how the pairs were found, if not by equal names in a known layout
    hint: str = ""  # why images have no mask, if something is known
    left_out: Mapping[Path, str] = field(default_factory=dict)  # file that is not read -> why


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
    subsets: list[Subset] = []
    if folders := list(_find_pair_folders(root)):
        for images, masks in folders:
            subsets += _read_folders(root, images, masks, {folder for pair in folders for folder in pair}, ())
    elif folders := list(_find_similar_folders(root)):
        for images, masks in folders:
            rule = f"taken for images and masks: {images.name}, {masks.name}"
            subsets += _read_folders(root, images, masks, {folder for pair in folders for folder in pair}, (rule,))
    else:
        subsets += _read_mixed_folders(root)
    if not subsets:
        raise ValueError(_describe_unknown_layout(root))
    return subsets if include_noncam else [_without_noncam(subset) for subset in subsets]


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
        reasons = [subset.hint for subset in train if subset.hint]
        reasons += [line for subset in train for line in describe_left_out(subset)]
        raise ValueError(
            f"{root}: {num_images} images in {names} and not one has a mask; "
            + "".join(f"{reason}; " for reason in reasons[:3])
            + f"name each mask after its image, with one of {', '.join(MASK_SUFFIXES)}"
        )
    return each_once(pairs)


def each_once(pairs: Sequence[Pair]) -> list[Pair]:
    """Drop pairs whose photograph has the file name, the size and the content of an earlier one."""
    alike: dict[tuple[str, int], list[Path]] = defaultdict(list)
    once = []
    for pair in pairs:
        size = size_and_time(pair.image)[0]
        firsts = alike[pair.image.name, size]
        if not any(_same_content(pair.image, first, size) for first in firsts):
            firsts.append(pair.image)
            once.append(pair)
    return once


def _same_content(path: Path, other: Path, size: int) -> bool:
    """Compare two files of one size at three places: frog/1.bmp and moth/1.bmp may well be equally large."""
    try:
        if path.samefile(other):
            return True
        with path.open("rb") as one, other.open("rb") as two:
            for start in (0, size // 2, max(0, size - _COMPARED)):
                if one.seek(start) == two.seek(start) and one.read(_COMPARED) != two.read(_COMPARED):
                    return False
    except OSError:  # decoding will report it
        pass
    return True


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
        own = {name_of(path, root) for path in (pair.image, pair.mask)}
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
        lines += [f"   {rule}" for rule in subset.rules]
        warn_of_left_out(subset)
        if subset.num_noncam_skipped:
            lines.append(f"   {subset.num_noncam_skipped} without camouflaged objects left out (see --include-noncam)")
    num_for_training = sum(len(subset.pairs) for subset in subsets if subset.split == "train")
    if num_for_training > num_used:
        lines.append(f"{num_for_training - num_used} pairs occur twice and count once")
    return lines


def warn_of_left_out(subset: Subset) -> None:
    """Log how many images are not used, and why."""
    if subset.images_without_mask:
        count, first = len(subset.images_without_mask), subset.images_without_mask[0].name
        hint = f"; {subset.hint}" if subset.hint else ""
        logger.warning(f"{subset.name}: {count} images without a mask left out, the first: {first}{hint}")
    for line in describe_left_out(subset):
        logger.warning(f"{subset.name}: {line}")


def describe_left_out(subset: Subset) -> list[str]:
    """Return a line for each reason why files of a subset are not read."""
    by_reason: dict[str, list[Path]] = defaultdict(list)
    for path, reason in subset.left_out.items():
        by_reason[reason].append(path)
    return [
        f"{len(paths)} files left out ({reason}), the first: {paths[0].name}" for reason, paths in by_reason.items()
    ]


def by_name(pairs: Sequence[Pair], root: Path) -> dict[str, Pair]:
    """Map each image's path relative to ``root``, its name in checkpoints and logs, to its pair."""
    return {name_of(pair.image, root): pair for pair in pairs}


def name_of(path: Path, root: Path) -> str:
    """Return a file's name in checkpoints and logs: its path relative to ``root``, with slashes.

    Those of another dataset begin with ``OUTSIDE``.
    """
    try:
        return path.relative_to(root).as_posix()
    except ValueError:
        return Path(os.path.relpath(path, root)).as_posix()


def names_of_masks(pairs: Sequence[Pair]) -> list[str]:
    """Return the name of each pair's mask without ending; with its folders, if several have the same ("frog/001")."""
    stems = [pair.mask.stem for pair in pairs]
    if len(set(stems)) == len(stems):
        return stems
    common = Path(os.path.commonpath([pair.mask.parent for pair in pairs]))
    return [pair.mask.relative_to(common).with_suffix("").as_posix() for pair in pairs]


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


def pairs_to_rehearse(
    pairs: Sequence[Pair], root: Path, number: int, fraction: float, seed: int, validation: Sequence[str] | None
) -> tuple[list[Pair], list[Pair]]:
    """Choose pairs of another dataset to train on and to validate on, beside those of the dataset itself.

    Args:
        pairs: training pairs of the other dataset.
        root: folder of the dataset itself, where names begin.
        number: pairs to train on; fewer if there are not so many.
        fraction: share to validate on.
        seed: decides which.
        validation: names of the validation images of the run being resumed; None for a new run.

    Raises:
        ValueError: there are fewer than two pairs, or none of the validation images is there.
    """
    if validation is None:
        left, held_out = split_validation(pairs, fraction, seed)
    else:
        left, held_out = split_as_before(pairs, root, validation)
    chosen = set(random.Random(f"rehearsal, seed {seed}").sample(range(len(left)), min(number, len(left))))
    return [pair for index, pair in enumerate(left) if index in chosen], held_out


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
            digest.update(f"{name_of(path, root)}\0{size_and_time(path)[0]}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def _find_pair_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    for directory, depth in walk(root):
        children = {child.name.lower(): child for child in subfolders(directory)}
        for image_name, mask_name in _PAIR_FOLDERS:
            if depth < MAX_DEPTH and image_name in children and mask_name in children:
                yield children[image_name], children[mask_name]
                break


def _find_similar_folders(root: Path) -> Iterator[tuple[Path, Path]]:
    """Yield pairs of folders whose names are alike but for a word: photos, labels; train, train_masks; a_img, a_gt."""
    for directory, depth in walk(root):
        images: dict[str, Path] = {}
        masks: dict[str, Path] = {}
        for child in subfolders(directory) if depth < MAX_DEPTH else []:
            role, rest = folder_role(child.name)
            if role == "mask":
                masks.setdefault(rest, child)
            elif role == "image":
                images[rest] = child
            elif rest:
                images.setdefault(rest, child)
        for rest, folder in masks.items():
            if rest in images and all(_pictures_below(own, ()) for own in (images[rest], folder)):
                yield images[rest], folder


def split_of(path_parts: Sequence[str]) -> Split | None:
    """Return the split named by the last folder that names one, or None."""
    for part in reversed(path_parts):
        words = [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)]
        if any(_TRAIN_WORD.fullmatch(word) for word in words):
            return "train"
        if any(_TEST_WORD.fullmatch(word) for word in words):
            return "test"
    return None


@dataclass(frozen=True)
class _Part:
    """Images and masks of two folders by name, and which belong together."""

    images: Mapping[str, Path]
    masks: Mapping[str, Path]
    matching: Matching
    left_out: Mapping[Path, str]

    @property
    def used(self) -> set[Path]:
        return {self.masks[mask] for mask in self.matching.partners.values()}


def _read_folders(
    root: Path, images: Path, masks: Path, pair_folders: Collection[Path], rules: tuple[str, ...]
) -> Iterator[Subset]:
    """Yield the subsets of an image folder and its mask folder.

    Args:
        root: the dataset's folder.
        images: the image folder.
        masks: the mask folder.
        pair_folders: all image and mask folders, which are no sub-folders of others.
        rules: how the folders were found, if their names are not known ones.
    """
    skip = set(pair_folders) - {images, masks}
    nested = [child for child in subfolders(images) if split_of([child.name]) is not None]
    if not any(_pictures_below(child, ()) for child in nested):
        nested = []
    parts: dict[Path, tuple[Path, _Part]] = {}
    for folder in nested or [images]:
        mask_folder = _folder_of_split(masks, folder.name) if nested else masks
        parts[folder] = mask_folder, _read_part(folder, mask_folder, skip)
    unread = dict.fromkeys(_pictures_below(images, {*skip, *nested}), _BESIDE_SPLITS) if nested else {}
    for folder, (mask_folder, part) in parts.items():
        # A shared mask folder holds the masks of all splits: those of another split do not lack their image.
        used = {mask for other, one in parts.values() if other == mask_folder for mask in one.used}
        location = folder if nested or (rules and folder_role(images.name)[1]) else images.parent
        splits: dict[str, Split | None] = {name: split_of(name.split("/")[:-1]) for name in part.images} or {"": None}
        for split in _SPLITS:
            if split not in splits.values():
                continue
            own = {name: image for name, image in part.images.items() if splits[name] == split}
            left_out = {**part.left_out, **unread}
            yield _subset(root, location, split, replace(part, images=own, left_out=left_out), used, rules)
            unread = {}


def _folder_of_split(masks: Path, name: str) -> Path:
    """Return a split's folder in the mask folder, in any letter case; if there is none, the mask folder."""
    found = {child.name: child for child in subfolders(masks) if child.name.lower() == name.lower()}
    return found.get(name, next(iter(found.values()), masks))


def _read_part(images: Path, masks: Path, skip: Collection[Path]) -> _Part:
    """Pair the pictures of two folders, without those of folders below, unless these are the only ones to fit."""
    image_listing, mask_listing = list_pictures(images, IMAGE_SUFFIXES), list_pictures(masks, MASK_SUFFIXES)
    matching = match_names(image_listing.files, mask_listing.files)
    below = [path for child in subfolders(images) if child not in skip for path in _pictures_below(child, skip)]
    unread = dict.fromkeys(below, _IN_SUBFOLDER)
    if not matching.partners:
        image_listing, mask_listing = list_tree(images, IMAGE_SUFFIXES, skip), list_tree(masks, MASK_SUFFIXES, skip)
        matching, unread = match_names(image_listing.files, mask_listing.files), {}
        if any("/" in name for name in (*image_listing.files, *mask_listing.files)):
            rule = f"folders below {images.name} and {masks.name} are read too"
            matching = replace(matching, rules=(rule, *matching.rules))
    left_out = {**image_listing.left_out, **mask_listing.left_out, **unread}
    return _Part(image_listing.files, mask_listing.files, matching, left_out)


def _pictures_below(folder: Path, skip: Collection[Path]) -> list[Path]:
    return [directory / name for directory, _ in walk(folder, skip) for name in picture_names(directory)]


def _read_mixed_folders(root: Path) -> Iterator[Subset]:
    """Yield a subset for each folder that holds both images and masks."""
    for directory, _ in walk(root):
        if names := separate(picture_names(directory)):
            images, masks = (by_stem(directory, own) for own in names)
            part = _Part(images, masks, match_names(images, masks), {})
            yield _subset(root, directory, None, part, part.used, ("images and masks are in one folder",))


def _subset(
    root: Path, location: Path, split: Split | None, part: _Part, used: Collection[Path], rules: tuple[str, ...]
) -> Subset:
    """Return the subset of a part.

    Args:
        root: the dataset's folder.
        location: the folder whose path names the subset.
        split: what the names of its sub-folders say.
        part: images and masks.
        used: masks that belong to an image.
        rules: how the folders were found.
    """
    relative = location.relative_to(root)
    name = relative.as_posix() if relative.parts else root.resolve().name
    partners = {image: part.matching.partners.get(image) for image in part.images}
    return Subset(
        name=f"{name}/{split}" if split else name,
        split=split or split_of(relative.parts) or split_of([root.resolve().name]) or "train",
        pairs=tuple(Pair(part.images[image], part.masks[mask]) for image, mask in partners.items() if mask is not None),
        images_without_mask=tuple(part.images[image] for image, mask in partners.items() if mask is None),
        masks_without_image=tuple(sorted(mask for mask in part.masks.values() if mask not in used)),
        num_noncam_skipped=0,
        rules=(*rules, *part.matching.rules),
        hint=part.matching.hint,
        left_out=part.left_out,
    )


def _without_noncam(subset: Subset) -> Subset:
    """Leave out COD10K's images without a camouflaged object."""
    pairs = tuple(pair for pair in subset.pairs if not pair.image.name.startswith(NONCAM_PREFIX))
    without_mask = tuple(image for image in subset.images_without_mask if not image.name.startswith(NONCAM_PREFIX))
    before = len(subset.pairs) + len(subset.images_without_mask)
    num_skipped = before - len(pairs) - len(without_mask)
    return replace(subset, pairs=pairs, images_without_mask=without_mask, num_noncam_skipped=num_skipped)


def _describe_unknown_layout(root: Path) -> str:
    found = [path.relative_to(root).as_posix() + "/" for path, depth in walk(root) if 0 < depth < MAX_DEPTH]
    shown = ", ".join(found[:8]) + (", ..." if len(found) > 8 else "") if found else "no folders"
    known = ", ".join(f"{{{image},{mask}}}" for image, mask in _PAIR_FOLDERS)
    part_of_one = any(root.name.lower() in pair for pair in _PAIR_FOLDERS)
    hint = f"; try {root.parent}, the folder that holds images and masks" if part_of_one else ""
    return f"{root}: no image/mask folders found{hint}. Looked for {known}, up to four levels down; found {shown}"
