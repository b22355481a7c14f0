"""Inspection of every file of a dataset, and the report of what is wrong.

``start_inspection`` decodes each pair once, in worker processes, and keeps a kilobyte of it; ``assess`` makes the
report. Each finding says how the program treats the file: most are usable all the same.
"""

import hashlib
import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from data.decoding import decode_reason, to_rgb
from data.duplicates import THUMBNAIL_SIDE, Likeness, find_alike, thumbnail
from data.layouts import NONCAM_PREFIX, Pair, Split, Subset, each_once
from data.masks import ABOVE_HALF, MaskReading, half_of_white
from data.opening import open_picture
from data.processes import process_pool
from data.survey import AUTO, MaskSurvey, survey_pairs

# Kinds of findings in the order of the report, the most serious first.
KINDS = {
    "leak": "in training and in testing: inflates the scores on the test images",
    "unreadable": "not readable as images",
    "truncated": "cut short",
    "size-mismatch": "image and mask differ in size",
    "empty-mask": "masks without an object",
    "full-mask": "masks without a background",
    "mask-inverted": "masks that look inverted",
    "mask-labels": "masks that are label images",
    "mask-doubtful": "masks that are unlike masks",
    "mask-not-binary": "masks with values in between",
    "wrong-mode": "unusual modes",
    "image-without-mask": "images without a mask",
    "mask-without-image": "masks without an image",
    "left-out": "files that are not read",
    "duplicate": "the same file twice",
    "near-duplicate": "the same photograph twice",
    "same-scene": "the same scene twice: another moment, crop or edit",
}
SIZE_BINS = (0.01, 0.05, 0.1, 0.2, 0.4)  # upper ends of the object's share of the image; a last bin is above 0.4

_SOFT_SHARE = 0.01  # of a mask's pixels; fewer values in between are soft outlines, which a note counts
_ASPECT_TOLERANCE = 0.02
_IMAGE_MODES = {
    "L": "grey; its one channel is used three times",
    "1": "black and white; its one channel is used three times",
    "P": "palette; its colours are looked up",
    "CMYK": "CMYK; converted to RGB without its colour profile",
    "RGBA": "RGB with transparency, which is dropped",
    "LA": "grey with transparency, which is dropped",
}
_MASK_MODES = {
    "P": "palette; the brightest channel of its colours counts",
    "RGB": "colour; the brightest channel counts",
    "RGBA": "colour with transparency, which is dropped; the brightest channel counts",
    "LA": "grey with transparency, which is dropped",
}
_PUBLISHED: dict[tuple[str, Split], int] = {
    ("COD10K", "train"): 3040, ("COD10K", "test"): 2026, ("CAMO", "train"): 1000, ("CAMO", "test"): 250,
    ("CHAMELEON", "test"): 76, ("NC4K", "test"): 4121,
}  # fmt: skip
_PUBLISHED_NONCAM: dict[Split, int] = {"train": 2960, "test": 1974}
_SET_NAME = re.compile(r"(?<![A-Z])(COD10K|CAMO|CHAMELEON|NC4K)(?![A-Z])")


@dataclass(frozen=True)
class Finding:
    """Finding about one file. Paths are relative to the dataset's folder, with slashes."""

    kind: str  # one of KINDS
    file: str
    reason: str
    other: str = ""  # a related file: its mask, its image or its duplicate


@dataclass(frozen=True)
class Problem:
    """Problem of one of a pair's two files, as a worker process returns it."""

    kind: str
    in_mask: bool
    reason: str
    spoils_training: bool = False


@dataclass(frozen=True)
class PairFacts:
    """Facts that the inspection keeps of a pair."""

    problems: tuple[Problem, ...]
    digest: bytes  # of the image file; empty if it cannot be read
    thumbnail: bytes  # 32 x 32 grey levels; empty if the image cannot be decoded
    object_share: float  # of the mask's pixels; NaN if the mask cannot be decoded
    has_soft_outline: bool

    @property
    def usable(self) -> bool:
        return not any(problem.kind in ("unreadable", "truncated") for problem in self.problems)


@dataclass(frozen=True)
class Folder:
    """Line of the report for one subset."""

    name: str
    split: Split
    pairs: int
    images_without_mask: int
    masks_without_image: int
    noncam_left_out: int
    published: int | None  # pairs in the published set, if the folder's name identifies it
    published_as: str


@dataclass
class Report:
    folders: list[Folder]
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    object_sizes: dict[Split, list[int]] = field(default_factory=dict)  # pairs in each of SIZE_BINS and above
    # Training images that training is better without, and why. Never test images: scores would no longer be comparable.
    exclude: dict[str, str] = field(default_factory=dict)
    num_usable: int = 0  # pairs


def pairs_to_inspect(subsets: Sequence[Subset]) -> list[tuple[Pair, Split]]:
    """Return test pairs, then training pairs, each photograph once per split, as training counts them."""
    pairs: list[tuple[Pair, Split]] = []
    splits: tuple[Split, ...] = ("test", "train")
    for split in splits:
        of_split = [pair for subset in subsets if subset.split == split for pair in subset.pairs]
        pairs.extend((pair, split) for pair in each_once(of_split))
    return pairs


@dataclass(frozen=True)
class MaskGroup:
    """Pairs whose masks are read in the same way: all for training, or those of a test set."""

    name: str
    pairs: frozenset[Pair]
    survey: MaskSurvey

    def folder(self, root: Path) -> str:
        """Return the folder that the masks are in, relative to ``root``."""
        return Path(os.path.commonpath([pair.mask.parent for pair in self.pairs])).relative_to(root).as_posix()


def survey_groups(
    subsets: Sequence[Subset], pairs: Sequence[tuple[Pair, Split]], mask_values: str = AUTO
) -> list[MaskGroup]:
    """Decide how masks are read: the same way for training, where ``train`` does so too, and for each test set.

    Args:
        subsets: from ``find_subsets``.
        pairs: from ``pairs_to_inspect``.
        mask_values: one of ``MASK_VALUES``.
    """
    named = {"for training": [pair for pair, split in pairs if split == "train"]}
    left = {pair for pair, split in pairs if split == "test"}
    for subset in subsets:
        if subset.split == "test":
            named[f"of {subset.name}"] = [pair for pair in subset.pairs if pair in left]
            left.difference_update(subset.pairs)
    groups = {name: members for name, members in named.items() if members}
    return [MaskGroup(name, frozenset(members), survey_pairs(members, mask_values)) for name, members in groups.items()]


def start_inspection(pairs: Sequence[Pair], num_workers: int, groups: Sequence[MaskGroup] = ()) -> Iterator[PairFacts]:
    """Start the worker processes (none for 0), and return an iterator over the facts, in the order of ``pairs``.

    The processes end with the iteration, even an interrupted one.

    Args:
        pairs: from ``pairs_to_inspect``.
        num_workers: number of processes.
        groups: from ``survey_groups``.

    Raises:
        ValueError: a worker process died; raised during iteration.
    """
    reading_of = {pair: group.survey.reading for group in groups for pair in group.pairs}
    readings = [reading_of.get(pair, ABOVE_HALF) for pair in pairs]
    if num_workers == 0:
        return map(inspect_pair, pairs, readings)
    stack = ExitStack()
    pool = stack.enter_context(process_pool(num_workers, "reads images", "try fewer with --num-workers, 0 for none"))
    return _drain(stack, pool.map(inspect_pair, pairs, readings, chunksize=4))


def _drain(stack: ExitStack, results: Iterator[PairFacts]) -> Iterator[PairFacts]:
    with stack:
        yield from results


def inspect_pair(pair: Pair, reading: MaskReading = ABOVE_HALF) -> PairFacts:
    """Decode both files of a pair as training does. Whatever the files contain, never raise."""
    problems: list[Problem] = []
    image, image_data = _load(pair.image, False, problems)
    mask, mask_data = _load(pair.mask, True, problems)
    grey, share, soft = b"", float("nan"), False
    if image is not None:
        if image.mode != "RGB":
            problems.append(Problem("wrong-mode", False, _IMAGE_MODES.get(image.mode, _sixteen_bit(image.mode))))
        grey = thumbnail(to_rgb(image)).tobytes()
    if mask is not None:
        if mask.mode not in ("L", "1") and reading.channel == "brightest":
            problems.append(Problem("wrong-mode", True, _MASK_MODES.get(mask.mode, _sixteen_bit(mask.mode))))
        found, share, soft = _mask_problems(mask, reading, lossy=mask_data.startswith(b"\xff\xd8"))
        if not (share == 0 and pair.image.name.startswith(NONCAM_PREFIX)):
            problems += found
    if image is not None and mask is not None and image.size != mask.size:
        problems.append(_size_mismatch(image_data, image.size, mask.size))
    digest = hashlib.blake2b(image_data, digest_size=16).digest() if image_data else b""
    return PairFacts(tuple(problems), digest, grey, share, soft)


def _load(path: Path, in_mask: bool, problems: list[Problem]) -> tuple[Image.Image | None, bytes]:
    """Return the decoded image, upright by EXIF, and the file's bytes; if that fails, None and add a problem."""

    def fail(kind: str, reason: str) -> None:
        problems.append(Problem(kind, in_mask, reason, spoils_training=True))

    try:
        data = path.read_bytes()
    except OSError as error:
        fail("unreadable", f"cannot be opened ({error.strerror})")
        return None, b""
    try:
        image = open_picture(io.BytesIO(data))
    except Exception as error:  # Pillow's plug-ins raise anything for a damaged file
        fail("unreadable", _not_an_image(data, error))
        return None, data
    try:
        image.load()
        return ImageOps.exif_transpose(image), data
    except Exception as error:
        reason = str(error) or type(error).__name__
        if "truncated" in reason or isinstance(error, EOFError):
            fail("truncated", f"cut short after {len(data):,} bytes")
        else:
            fail("unreadable", f"damaged {image.format} ({reason})")
        return None, data


def _not_an_image(data: bytes, error: Exception) -> str:
    if not data:
        return "an empty file"
    if data.lstrip()[:1] == b"<":
        return "not an image but HTML or XML, as a failed download leaves"
    return decode_reason(error)


def _sixteen_bit(mode: str) -> str:
    return "more than 8 bits; scaled to 8" if mode.startswith(("I", "F")) else f"{mode}; converted"


def _mask_problems(mask: Image.Image, reading: MaskReading, lossy: bool) -> tuple[list[Problem], float, bool]:
    """Return problems with a mask's values, the object's share, and whether only its outlines are soft."""
    labels = reading.read(mask, lossy)
    share = float((labels == 1).mean())
    if share == 0 or not (labels == 0).any():
        kind, what = ("empty-mask", "no object") if share == 0 else ("full-mask", "the object fills the image")
        return [Problem(kind, True, what, spoils_training=share > 0)], share, False  # empty: perhaps a negative image
    if reading.background is not None:  # any value is a label
        return [], share, False
    values = reading.pixels(mask)
    darkest, brightest = values.min(), values.max()
    between = float(((values > darkest) & (values < brightest)).mean())
    if between < _SOFT_SHARE:
        return [], share, between > 0
    threshold = half_of_white(values) if reading.threshold is None else reading.threshold
    values_between = f"{between:.1%} of its values lie between {darkest} and {brightest}{', a JPEG' * lossy}"
    reason = f"{values_between}; those {'not ' * reading.inverted}above {threshold:g} count as object"
    return [Problem("mask-not-binary", True, reason)], share, False


def _size_mismatch(image_data: bytes, image_size: tuple[int, int], mask_size: tuple[int, int]) -> Problem:
    (width, height), (mask_width, mask_height) = image_size, mask_size
    reason = f"the image is {width} x {height}, its mask {mask_width} x {mask_height}"
    if abs(width * mask_height / (height * mask_width) - 1) <= _ASPECT_TOLERANCE:
        return Problem("size-mismatch", False, f"{reason}; the aspect ratio is the same, and training resizes both")
    with open_picture(io.BytesIO(image_data)) as stored:
        if stored.size == mask_size:
            reason += "; the mask fits the image as stored, not as its EXIF orientation turns it"
    return Problem("size-mismatch", False, reason, spoils_training=True)


def assess(
    root: Path, subsets: Sequence[Subset], pairs: Sequence[tuple[Pair, Split]], facts: Sequence[PairFacts],
    groups: Sequence[MaskGroup] = (),
) -> Report:  # fmt: skip
    """Return the report on a dataset.

    Args:
        root: the dataset's folder.
        subsets: from ``find_subsets``.
        pairs: from ``pairs_to_inspect``.
        facts: from ``start_inspection``, one for each pair.
        groups: from ``survey_groups``.
    """
    report = Report([_folder(root, subset) for subset in subsets])
    report.num_usable = sum(fact.usable for fact in facts)
    report.findings += _partner_findings(root, subsets)
    report.findings += [finding for group in groups for finding in _group_findings(root, group)]
    _add_problems(report, root, pairs, facts)
    _add_duplicates(report, root, pairs, facts)
    order = list(KINDS)
    report.findings.sort(key=lambda finding: (order.index(finding.kind), finding.file))
    for split in ("train", "test"):
        shares = [fact.object_share for (_, own), fact in zip(pairs, facts, strict=True) if own == split]
        counts = np.bincount(np.digitize([share for share in shares if share > 0], SIZE_BINS), minlength=6)
        report.object_sizes[split] = counts.tolist()
    for subset in subsets:
        report.notes += [f"{subset.name}: {line}" for line in (*subset.rules, subset.hint) if line]
    report.notes += [f"Masks {group.name}: {group.survey.summary}" for group in groups]
    report.notes += _notes(report.folders, sum(len(subset.pairs) for subset in subsets) - len(pairs))
    num_soft = sum(fact.has_soft_outline for fact in facts)
    if num_soft:
        report.notes.append(
            f"{num_soft} masks have soft outlines (values in between in less than {_SOFT_SHARE:.0%} of their pixels), "
            "which is harmless: a threshold makes them sharp"
        )
    return report


def _partner_findings(root: Path, subsets: Sequence[Subset]) -> Iterator[Finding]:
    for subset in subsets:
        for image in subset.images_without_mask:
            reason = "no file of its name among the masks; left out"
            yield Finding("image-without-mask", _relative(image, root), reason)
        for mask in subset.masks_without_image:
            reason = "no file of its name among the images; not used"
            yield Finding("mask-without-image", _relative(mask, root), reason)
        for file, reason in subset.left_out.items():
            yield Finding("left-out", _relative(file, root), reason)


def _group_findings(root: Path, group: MaskGroup) -> Iterator[Finding]:
    survey, folder = group.survey, group.folder(root)
    if survey.is_label:
        yield Finding("mask-labels", folder, survey.summary)
    if survey.advice:
        yield Finding("mask-inverted" if survey.is_inverted else "mask-doubtful", folder, survey.advice)
    if survey.constant:
        yield Finding("mask-doubtful", folder, survey.constant)


def _add_problems(report: Report, root: Path, pairs: Sequence[tuple[Pair, Split]], facts: Sequence[PairFacts]) -> None:
    for (pair, split), fact in zip(pairs, facts, strict=True):
        for problem in fact.problems:
            file, other = (pair.mask, pair.image) if problem.in_mask else (pair.image, pair.mask)
            shown = _relative(other, root) if problem.in_mask or problem.kind == "size-mismatch" else ""
            report.findings.append(Finding(problem.kind, _relative(file, root), problem.reason, shown))
            if problem.spoils_training and split == "train":
                what = "mask: " if problem.in_mask else ""
                report.exclude.setdefault(_relative(pair.image, root), f"{problem.kind}: {what}{problem.reason}")


def _add_duplicates(
    report: Report, root: Path, pairs: Sequence[tuple[Pair, Split]], facts: Sequence[PairFacts]
) -> None:
    """Add findings for duplicates, and exclude one of two: the later one, unless the first has a bad mask.

    Of two copies, only one of which has an object in its mask, the other is no image without an object.
    """
    empty = {finding.other for finding in report.findings if finding.kind == "empty-mask"}
    spoilt = {*report.exclude, *empty}
    for second, first, kind, reason in _duplicates(pairs, facts):
        (pair, split), (other, other_split) = pairs[second], pairs[first]
        if split != other_split:
            kind = "leak"
        image, earlier = _relative(pair.image, root), _relative(other.image, root)
        place = f"both for {split}ing" if split == other_split else "one for training, one for testing"
        report.findings.append(Finding(kind, image, f"{reason}; {place}", earlier))
        if kind != "same-scene" and other_split == "train" and earlier in empty and image not in empty:
            report.exclude.setdefault(earlier, f"empty-mask: mask: no object, but there is one in {image}")
        if split == "train" and (kind == "leak" or (kind != "same-scene" and earlier not in spoilt)):
            report.exclude.setdefault(image, f"{kind}: {reason} as {earlier}")


def _duplicates(pairs: Sequence[tuple[Pair, Split]], facts: Sequence[PairFacts]) -> Iterator[tuple[int, int, str, str]]:
    """Yield (position, position of its earlier duplicate, kind, reason), once for each photograph that has one.

    Test images come first in ``pairs``, so they count as the earlier ones. Among several duplicates, a test image is
    preferred, then the best match. Exact copies of a file are not compared any further.
    """
    firsts: dict[bytes, int] = {}
    distinct = []
    for position, fact in enumerate(facts):
        if not fact.thumbnail:  # already reported as unreadable; failed downloads are often the same page
            continue
        first = firsts.setdefault(fact.digest, position)
        if first != position:
            yield position, first, "duplicate", "the same file"
        else:
            distinct.append(position)
    thumbnails = np.frombuffer(b"".join(facts[position].thumbnail for position in distinct), dtype=np.uint8)
    best: dict[int, tuple[tuple[bool, bool, float], Likeness]] = {}
    for likeness in find_alike(thumbnails.reshape(-1, THUMBNAIL_SIDE, THUMBNAIL_SIDE)):
        in_test = pairs[distinct[likeness.first]][1] == "test"
        rank = in_test, likeness.same_photograph, likeness.correlation
        if likeness.second not in best or rank > best[likeness.second][0]:
            best[likeness.second] = rank, likeness
    for second, (_, likeness) in best.items():
        kind, what = ("near-duplicate", "photograph") if likeness.same_photograph else ("same-scene", "scene")
        mirrored = "mirrored, " if likeness.mirrored else ""
        reason = f"the same {what} ({mirrored}correlation {likeness.correlation:.2f})"
        yield distinct[second], distinct[likeness.first], kind, reason


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _folder(root: Path, subset: Subset) -> Folder:
    published_as, published = _published(root, subset)
    return Folder(
        name=subset.name,
        split=subset.split,
        pairs=len(subset.pairs),
        images_without_mask=len(subset.images_without_mask),
        masks_without_image=len(subset.masks_without_image),
        noncam_left_out=subset.num_noncam_skipped,
        published=published,
        published_as=published_as,
    )


def _published(root: Path, subset: Subset) -> tuple[str, int | None]:
    """Return the published set named by the last part of a folder's path that names one, and its number of pairs."""
    parts = [root.resolve().name, *subset.name.split("/")]
    names = [match[1] for part in reversed(parts) if (match := _SET_NAME.search(part.upper()))]
    if names:
        noncam = sum(pair.image.name.startswith(NONCAM_PREFIX) for pair in subset.pairs)
        count = _PUBLISHED.get((names[0], subset.split))
        if count is not None and names[0] == "COD10K" and noncam:
            count += _PUBLISHED_NONCAM[subset.split]
        return f"{names[0]}-{subset.split}", count
    of_them = any(pair.image.name.lower().startswith(("cod10k", "camourflage")) for pair in subset.pairs)
    if parts[-1].lower() == "traindataset" and of_them:
        return "COD10K-train and CAMO-train", _PUBLISHED["COD10K", "train"] + _PUBLISHED["CAMO", "train"]
    return "", None


def _notes(folders: Sequence[Folder], num_twice: int) -> list[str]:
    notes = []
    for folder in folders:
        if folder.published is not None and folder.published != folder.pairs:
            notes.append(
                f"{folder.name}: {folder.pairs} pairs; {folder.published_as}, as published: {folder.published}"
            )
        if folder.noncam_left_out:
            published = _PUBLISHED_NONCAM[folder.split]
            more = "" if folder.noncam_left_out == published else f" (COD10K as published has {published})"
            notes.append(f"{folder.name}: {folder.noncam_left_out} NonCAM images left out{more}; see --include-noncam")
        if folder.published_as in ("NC4K-train", "CHAMELEON-train"):
            name = folder.published_as.removesuffix("-train")
            notes.append(
                f"{folder.name}: {name} is a test set, but training would use it, because no folder in its path says "
                "test; move it into one called TestDataset"
            )
    if num_twice:
        notes.append(
            f"{num_twice} pairs occur twice (same name and size, by a link or in two collections) and count once"
        )
    return notes
