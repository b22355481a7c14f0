"""Test sets, the predictions that belong to them, and their scores: what ``evaluate`` and ``compare`` share.

Images stream from the network (or from files) to the processes that score them; only sums and a row each are kept.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from commands.own_files import save_picture
from data.decoding import decode_image, decode_mask
from data.layouts import (
    MASK_SUFFIXES,
    PAIR_FOLDER_NAMES,
    Pair,
    Subset,
    describe_left_out,
    find_subsets,
    names_of_masks,
    split_of,
    superclass_of,
)
from data.listing import files_by_stem, list_pictures, list_tree, subfolders
from data.masks import ABOVE_HALF, MaskReading
from data.pairing import match_names
from data.predictions import PredictionReading, decode_prediction, survey_predictions
from data.processes import map_in_order
from data.survey import survey_pairs
from evaluation.further import NEED_PHOTOGRAPHS, further_scores
from evaluation.metrics import ByteArray, ImageScores, MeanScores, PreparedMask, Protocol, score_image
from evaluation.statistics import auroc

logger = logging.getLogger("train_ultimate")

GROUP_COLUMNS = ("s_measure", "weighted_f", "mae", "mean_e", "mean_f", "iou", "dice")  # means of image scores
CURVES: Sequence[str] = ("e", "f", "precision", "recall")  # in the order of MeanScores
MARK = "train_ultimate evaluate"  # in each picture that evaluate writes
PREDICTION_SUFFIXES = (*MASK_SUFFIXES, ".tif", ".tiff")


@dataclass(frozen=True)
class Case:
    """One image to score."""

    set_name: str
    mask: Path
    image: Path | None
    prediction: Path | ByteArray
    save_as: Path | None = None  # None: the prediction is not saved
    name: str = ""  # the mask's name in the set, without ending; empty for that of its file
    mask_reading: MaskReading = ABOVE_HALF
    prediction_reading: PredictionReading = field(default_factory=PredictionReading)
    protocol: Protocol = field(default_factory=Protocol)

    @property
    def row_name(self) -> str:
        """The mask's file name in the set, which its row of scores has."""
        return f"{self.name or self.mask.stem}{self.mask.suffix}"

    def labels(self) -> ByteArray:
        """Return the mask, (H, W): 0 background, 1 object, IGNORED."""
        return decode_mask(self.mask, self.mask_reading)

    def grey_levels(self) -> ByteArray:
        """Return the prediction, (H, W)."""
        if isinstance(self.prediction, np.ndarray):
            return self.prediction
        return decode_prediction(self.prediction, self.prediction_reading)


@dataclass(frozen=True)
class MaskSet:
    """Masks of a test set, and how they are read.

    Attributes:
        name: to print.
        pairs: masks with their images.
        names: a name for each mask in the set: its predictions are called like it.
        reading: of the masks.
    """

    name: str
    pairs: Sequence[Pair]
    names: Sequence[str]
    reading: MaskReading

    def by_row_name(self) -> dict[str, Pair]:
        """Return the pairs by the names of their rows of scores, see ``Case``."""
        return {f"{name}{pair.mask.suffix}": pair for name, pair in zip(self.names, self.pairs, strict=True)}


@dataclass(frozen=True)
class Scored:
    """Result of a scoring process."""

    scores: ImageScores
    further: dict[str, float]  # of ``evaluation.further``
    object_share: float  # share of the object in the image's pixels
    highest: float  # value of the prediction, as it was saved, in [0, 1]
    was_resized: bool  # whether the prediction had another size than the mask


@dataclass
class SetReport:
    """Scores of a test set so far: sums, and a row of numbers for each image."""

    totals: MeanScores = field(default_factory=MeanScores)
    images: list[dict[str, Any]] = field(default_factory=list)
    num_resized: int = 0

    def add(self, case: Case, scored: Scored) -> None:
        self.totals.add(scored.scores, scored.further)
        self.num_resized += scored.was_resized
        groups = {
            "superclass": superclass_of(case.mask.stem), "object_share": scored.object_share, "highest": scored.highest,
        }  # fmt: skip
        row = {"name": case.row_name, **groups, **scored.scores.numbers(), **scored.further}
        self.images.append(row)

    def by_superclass(self) -> dict[str, dict[str, float]]:
        return self.by_group({row["name"]: row["superclass"] for row in self.images})

    def by_group(self, group_of: Mapping[str, str]) -> dict[str, dict[str, float]]:
        """Return mean scores of groups of images, by the group of each image's name; "" or no entry is no group."""
        groups: dict[str, list[dict[str, Any]]] = {}
        for row in self.images:
            groups.setdefault(group_of.get(row["name"], ""), []).append(row)
        return {name: means_of(groups[name]) for name in sorted(groups.keys() - {""})}

    def by_size(self) -> dict[str, dict[str, float]]:
        """Return mean scores of three groups of equal size, by the object's share of the image."""
        by_share = sorted(self.images, key=lambda row: row["object_share"])
        thirds: dict[str, dict[str, float]] = {}
        for name, rows in zip(("small", "medium", "large"), np.array_split(np.arange(len(by_share)), 3), strict=True):
            if len(rows):
                chosen = [by_share[row] for row in rows]
                thirds[f"{name}, to {chosen[-1]['object_share']:.1%}"] = means_of(chosen)
        return thirds

    def presence(self) -> dict[str, float] | None:
        """Return how well images without an object are told apart by the highest value of their predictions.

        Returns:
            ``auroc`` and ``false_alarms``, the share of images without an object where one is found, above 0.5; None
            for a set that does not have images of both kinds.
        """
        with_object = np.array([row["highest"] for row in self.images if row["object_share"] > 0])
        without = np.array([row["highest"] for row in self.images if row["object_share"] == 0])
        if not len(with_object) or not len(without):
            return None
        rates = {"auroc": auroc(with_object, without), "false_alarms": float((without > 0.5).mean())}
        return {"num_empty": len(without), **rates}

    def state(self) -> dict[str, Any]:
        """Return everything, for ``of``."""
        totals = {**asdict(self.totals), "curve_sums": self.totals.curve_sums.tolist()}
        return {"totals": totals, "images": self.images, "num_resized": self.num_resized}

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> "SetReport":
        """Return the report that ``state`` described."""
        totals = {**state["totals"], "curve_sums": np.array(state["totals"]["curve_sums"])}
        return cls(MeanScores(**totals), state["images"], state["num_resized"])

    def to_json(self) -> dict[str, Any]:
        curves = zip(CURVES, self.totals.curve_sums / self.totals.num_images, strict=True)
        return {
            "num_images": self.totals.num_images,
            "scores": self.totals.means(),
            "curves": {name: curve.tolist() for name, curve in curves},
            "presence": self.presence(),
            "by_superclass": self.by_superclass(),
            "by_size": self.by_size(),
            "images": self.images,
        }


def protocol_of(args: argparse.Namespace, further: Iterable[str] = ()) -> Protocol:
    """Return how the flags say that predictions are scored."""
    return Protocol(args.stretch, args.convention, tuple(further))


def scored_by(args: argparse.Namespace) -> dict[str, Any]:
    """Return the same for a JSON file."""
    return {"stretch": args.stretch, "convention": args.convention}


def scored_cases(cases: Iterable[Case | str], num_processes: int) -> Iterator[tuple[Case, Scored] | str]:
    """Yield each case with its scores, in order, or the reason why it has none. Few cases are in memory at once.

    Args:
        cases: images to score, or reasons why there is none.
        num_processes: processes that score; 0 to score in this one.
    """
    yield from scored_groups(([case] for case in cases), num_processes)


def scored_groups(groups: Iterable[Sequence[Case | str]], num_processes: int) -> Iterator[tuple[Case, Scored] | str]:
    """Do the same for groups of cases, each scored by one process: predictions of one mask, which is read once."""
    way_out = "try fewer with --num-workers"
    for group, results in map_in_order(_score_group, groups, num_processes, "scores", way_out):
        for case, scored in zip(group, results, strict=True):
            if isinstance(scored, str):
                yield scored
            else:
                assert isinstance(case, Case)
                yield case, scored


def _score_group(cases: Sequence[Case | str]) -> list[Scored | str]:
    masks: dict[Path, PreparedMask] = {}
    return [score_case(case, masks) for case in cases]


def score_case(case: Case | str, masks: dict[Path, PreparedMask] | None = None) -> Scored | str:
    """Score one image, and save its prediction if asked to. Return the reason if that fails, or if ``case`` is one.

    Args:
        case: the image.
        masks: those that were read for other cases; its own is added.
    """
    if isinstance(case, str):
        return case
    masks = {} if masks is None else masks
    try:
        if case.mask not in masks:
            masks[case.mask] = PreparedMask(case.labels())
        prepared = masks[case.mask]
        mask, prediction = prepared.labels, case.grey_levels()
        fits = prediction.shape == mask.shape
        if not fits:
            size = mask.shape[1], mask.shape[0]
            prediction = np.array(Image.fromarray(prediction).resize(size, Image.Resampling.BILINEAR))
        scores = score_image(prediction, prepared, case.protocol)
        further = further_scores(case.protocol.further, prediction, mask, case.protocol, _photograph(case, mask.shape))
        scored = Scored(
            scores, further, float(prepared.inside.mean()), float(prediction[mask < 2].max()) / 255, not fits
        )
    except ValueError as error:
        return str(error) if str(case.mask) in str(error) else f"{case.mask}: {error}"
    if case.save_as is not None:
        try:
            save_picture(Image.fromarray(prediction), case.save_as, MARK)
        except OSError as error:
            return f"{case.save_as}: cannot be saved ({error.strerror or error})"
    return scored


def _photograph(case: Case, shape: tuple[int, ...]) -> ByteArray | None:
    """Return a case's photograph at its mask's size, if it has one and a measure needs it.

    Raises:
        ValueError: it cannot be decoded.
    """
    if case.image is None or not NEED_PHOTOGRAPHS & set(case.protocol.further):
        return None
    photograph = decode_image(case.image)
    size = shape[1], shape[0]
    return np.array(photograph if photograph.size == size else photograph.resize(size, Image.Resampling.BILINEAR))


def about_empty(name: str, presence: Mapping[str, float] | None, stretch: bool) -> list[str]:
    """Return a line on the images of a set that have no object; none for a set without such images.

    Args:
        name: of the set, or of a method on it.
        presence: see ``SetReport.presence``.
        stretch: Predictions were stretched: their highest values say nothing.
    """
    if presence is None:
        return []
    number = int(presence["num_empty"])
    if stretch:
        return [f"{name}: {number} images without an object; --no-stretch says how well they are told apart"]
    return [
        f"{name}: {number} images without an object: something is found in {presence['false_alarms']:.0%} of them; "
        f"AUROC {presence['auroc']:.3f}"
    ]


def means_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {name: float(np.mean([row[name] for row in rows])) for name in GROUP_COLUMNS}
    return {"num_images": len(rows), **means}


def masks_alone(folder: Path) -> dict[str, list[Pair]]:
    """Return the masks in a folder as a set, each as its own image.

    Raises:
        ValueError: There are none, or the folder is one above theirs.
    """
    if not folder.is_dir():
        raise ValueError(f"--masks {folder}: no such folder; name the folder with the masks")
    _require_no_dataset(folder)
    pairs = [Pair(mask, mask) for mask in pictures_in(folder, MASK_SUFFIXES).values()]
    if not pairs:
        raise ValueError(
            f"--masks {folder}: no mask ({', '.join(MASK_SUFFIXES)}) there; name the folder with the masks"
        )
    return {short_names([folder.resolve().parts[1:]])[0]: pairs}


def _require_no_dataset(masks: Path) -> None:
    """Check that ``--masks`` names no folder above the masks' own: photographs below it would be taken for masks.

    Raises:
        ValueError: it holds images and masks; the message names the folders of the masks.
    """
    try:
        subsets = find_subsets(masks)
    except ValueError:  # no images and masks below it
        return
    folders = sorted({str(pair.mask.parent) for subset in subsets for pair in subset.pairs})
    if folders and str(masks) not in folders:
        more = f" and {len(folders) - 3} others" if len(folders) > 3 else ""
        raise ValueError(
            f"--masks {masks}: is the folder of a dataset, whose masks are in {', '.join(folders[:3])}{more}; name "
            f"that folder, or give --dataset-path {masks} instead of --masks"
        )


def mask_sets(
    sets: Mapping[str, Sequence[Pair]], mask_values: str, saved: MaskReading | None = None
) -> tuple[list[MaskSet], dict[str, str]]:
    """Decide how the masks of each set are read, and log it.

    Args:
        sets: pairs by the name of their set.
        mask_values: one of ``MASK_VALUES``.
        saved: how the checkpoint's run read them, if they are its own.

    Returns:
        the sets, and a sentence on the masks of each.
    """
    if saved is not None:
        logger.info(f"Masks: as the checkpoint's run read them; {saved.rule}")
        readings, rules = dict.fromkeys(sets, saved), dict.fromkeys(sets, saved.rule)
    else:
        surveys = {name: survey_pairs(pairs, mask_values) for name, pairs in sets.items()}
        for name, survey in surveys.items():
            logger.info(f"Masks of {name}: {survey.summary}")
            for text in filter(None, (survey.advice, survey.constant)):
                logger.warning(f"masks of {name}: {text}")
        readings = {name: survey.reading for name, survey in surveys.items()}
        rules = {name: survey.summary for name, survey in surveys.items()}
    return [MaskSet(name, pairs, names_of_masks(pairs), readings[name]) for name, pairs in sets.items()], rules


def cases_in_folder(folder: Path, masks: MaskSet, protocol: Protocol, is_own: bool) -> list[Case]:
    """Pair each mask of a set with its prediction in a folder.

    Args:
        folder: of one method's predictions.
        masks: of the set.
        protocol: how to score.
        is_own: The folder is the set's own: a prediction without a mask is named in a warning.

    Raises:
        ValueError: a prediction is missing. A method must not be scored only on the images it chose.
    """
    predictions, surplus = _predictions_of(masks, folder)
    missing = [pair.mask.name for pair, name in zip(masks.pairs, masks.names, strict=True) if name not in predictions]
    if missing:
        raise ValueError(
            f"{folder}: no prediction for {len(missing)} of the {len(masks.pairs)} masks of {masks.name}: "
            f"{_first_of(missing)}; give each prediction its mask's file name, in this folder or in one called "
            f"{masks.name}"
        )
    if surplus and is_own:
        logger.warning(f"{folder}: not scored, without a mask in {masks.name}: {_first_of(surplus)}")
    reading = survey_predictions(predictions[name] for name in masks.names)
    for advice in reading.advice:
        logger.warning(f"predictions of {masks.name}: {advice}")
    images = [None if pair.image == pair.mask else pair.image for pair in masks.pairs]
    return [
        Case(masks.name, pair.mask, image, predictions[name], None, name, masks.reading, reading, protocol)
        for pair, image, name in zip(masks.pairs, images, masks.names, strict=True)
    ]


def _first_of(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def pictures_in(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return a folder's pictures by name; of a folder without any, those below it."""
    return files_by_stem(folder, suffixes) or list_pictures(folder, suffixes).files or list_tree(folder, suffixes).files


def _predictions_of(masks: MaskSet, folder: Path) -> tuple[dict[str, Path], list[str]]:
    """Find the predictions of masks in a folder, by names as ``data.pairing`` matches them.

    Args:
        masks: of the set. A prediction may also have its photograph's name.
        folder: the folder with the predictions.

    Returns:
        mask's name -> prediction, incomplete if predictions are missing; and the names of files that belong to none.
    """
    names = masks.names
    files = files_by_stem(folder, PREDICTION_SUFFIXES)
    if files.keys() >= set(names):
        return files, [path.name for name, path in files.items() if name not in set(names)]
    if not files or any("/" in name for name in names):  # one set, in folders: their overlays are no predictions
        overlays = [child for child in subfolders(folder) if child.name.startswith("overlays")]
        files = list_tree(folder, PREDICTION_SUFFIXES, overlays).files
    matching = match_names(files, names, ("predictions", "masks"))
    found = {mask: files[prediction] for prediction, mask in matching.partners.items()}
    if len(found) < len(names):
        matching = match_names(names, files, ("masks", "predictions"))
        found = {mask: files[prediction] for mask, prediction in matching.partners.items()}
    if len(found) < len(names):
        matching = match_names([pair.image.stem for pair in masks.pairs], files, ("images", "predictions"))
        mask_of = {pair.image.stem: mask for pair, mask in zip(masks.pairs, names, strict=True)}
        found = {mask_of[image]: files[prediction] for image, prediction in matching.partners.items()}
    if len(found) == len(names):
        for rule in matching.rules:
            logger.info(f"{masks.name}: {rule}")
    used = set(found.values())
    return found, [path.name for path in files.values() if path not in used]


def test_sets(roots: Sequence[str], include_noncam: bool) -> dict[str, list[Pair]]:
    """Return the pairs of the test sets below each root, by the name to print.

    If a root has no test set, all of its folders are taken, with a warning.
    """
    found: dict[tuple[str, ...], Subset] = {}
    for root in roots:
        subsets = find_subsets(Path(root), include_noncam)
        tests = [subset for subset in subsets if subset.split == "test"]
        if not tests:
            logger.warning(
                f"{root}: nothing in its path marks a test set; all images are scored, trained on or not "
                f"(--held-out scores those that the checkpoint's run did not train on)"
            )
        for subset in tests or subsets:
            for rule in subset.rules:
                logger.info(f"{subset.name}: {rule}")
            if subset.images_without_mask:
                logger.warning(f"{subset.name}: {len(subset.images_without_mask)} images without a mask are skipped")
            for line in describe_left_out(subset):
                logger.warning(f"{subset.name}: {line}")
            if subset.pairs:
                found[*Path(root).resolve().parts[1:], *subset.name.split("/")] = subset
    if not found:
        raise ValueError(f"--dataset-path {' '.join(roots)}: no image there has a mask; name a folder with both")
    return dict(zip(short_names(list(found)), [list(subset.pairs) for subset in found.values()], strict=True))


def short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the last folder of each path that says more than "test" or "images", and more if that is not unique."""
    specific = [
        [part for part in path if split_of([part]) is None and part.lower() not in PAIR_FOLDER_NAMES] or list(path)
        for path in paths
    ]
    names = []
    for own in specific:
        endings = ("-".join(own[-length:]) for length in range(1, len(own) + 1))
        unique = (end for end in endings if sum(f"-{'-'.join(other)}".endswith(f"-{end}") for other in specific) == 1)
        names.append(next(unique, None))
    return [name or "-".join(path) for name, path in zip(names, paths, strict=True)]
