"""``evaluate``: score a checkpoint on test sets, or any method's saved predictions against masks.

Images stream from the network (or from files) to the processes that score them; only sums and a row each are kept.
"""

import argparse
import heapq
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import is_json_with, is_picture_with, require_own, save_picture
from data.decoding import decode_mask
from data.layouts import (
    MASK_SUFFIXES,
    OUTSIDE,
    PAIR_FOLDER_NAMES,
    Pair,
    Subset,
    describe_left_out,
    find_subsets,
    named_pairs,
    names_of_masks,
    split_of,
    superclass_of,
    training_pairs,
)
from data.listing import files_by_stem, list_pictures, list_tree, subfolders
from data.masks import ABOVE_HALF, MaskReading
from data.pairing import match_names
from data.predictions import PredictionReading, decode_prediction, survey_predictions
from data.processes import map_in_order
from data.survey import AUTO, survey_pairs
from evaluation.figures import contact_sheet, thumbnail
from evaluation.metrics import ByteArray, ImageScores, MeanScores, score_image
from runtime.files import write_json
from runtime.log import environment

if TYPE_CHECKING:
    from evaluation.predictor import TrainedNetwork  # torch: scoring files does not need it

logger = logging.getLogger("train_ultimate")

_COLUMNS = {  # names as in papers
    "s_measure": "S", "weighted_f": "wF", "mae": "MAE", "adaptive_e": "adpE", "mean_e": "meanE", "max_e": "maxE",
    "adaptive_f": "adpF", "mean_f": "meanF", "max_f": "maxF", "iou": "IoU", "dice": "Dice",
}  # fmt: skip
_GROUP_COLUMNS = ("s_measure", "weighted_f", "mae", "mean_e", "mean_f", "iou", "dice")  # means of image scores
_PREDICTION_SUFFIXES = (*MASK_SUFFIXES, ".tif", ".tiff")
_NUM_WORST = 24
_GREY_OF_LABEL = np.array([0, 255, 128], dtype=np.uint8)  # in a picture of a mask
_MARK = "train_ultimate evaluate"  # in each picture that evaluate writes


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
    stretch: bool = True  # the prediction to its full range

    def labels(self) -> ByteArray:
        """Return the mask, (H, W): 0 background, 1 object, IGNORED."""
        return decode_mask(self.mask, self.mask_reading)

    def grey_levels(self) -> ByteArray:
        """Return the prediction, (H, W)."""
        if isinstance(self.prediction, np.ndarray):
            return self.prediction
        return decode_prediction(self.prediction, self.prediction_reading)


@dataclass(frozen=True)
class Scored:
    """Result of a scoring process."""

    scores: ImageScores
    object_share: float  # share of the object in the image's pixels
    was_resized: bool  # whether the prediction had another size than the mask


@dataclass(order=True)
class Bad:
    """One of the worst images so far. The first of the heap is the best of them."""

    badness: float
    number: int
    panels: list[Image.Image] = field(compare=False)
    caption: str = field(compare=False)


@dataclass
class SetReport:
    """Scores of a test set so far: sums, and a row of numbers for each image."""

    totals: MeanScores = field(default_factory=MeanScores)
    images: list[dict[str, Any]] = field(default_factory=list)
    num_resized: int = 0

    def add(self, case: Case, scored: Scored) -> None:
        self.totals.add(scored.scores)
        self.num_resized += scored.was_resized
        name, superclass = f"{case.name or case.mask.stem}{case.mask.suffix}", superclass_of(case.mask.stem)
        row = {"name": name, "superclass": superclass, "object_share": scored.object_share, **scored.scores.numbers()}
        self.images.append(row)

    def by_superclass(self) -> dict[str, dict[str, float]]:
        names = sorted({row["superclass"] for row in self.images} - {""})
        return {name: _means([row for row in self.images if row["superclass"] == name]) for name in names}

    def by_size(self) -> dict[str, dict[str, float]]:
        """Return mean scores of three groups of equal size, by the object's share of the image."""
        by_share = sorted(self.images, key=lambda row: row["object_share"])
        thirds: dict[str, dict[str, float]] = {}
        for name, rows in zip(("small", "medium", "large"), np.array_split(np.arange(len(by_share)), 3), strict=True):
            if len(rows):
                chosen = [by_share[row] for row in rows]
                thirds[f"{name}, to {chosen[-1]['object_share']:.1%}"] = _means(chosen)
        return thirds

    def to_json(self) -> dict[str, Any]:
        curves = zip(("e", "f", "precision", "recall"), self.totals.curve_sums / self.totals.num_images, strict=True)
        return {
            "num_images": self.totals.num_images,
            "scores": self.totals.means(),
            "curves": {name: curve.tolist() for name, curve in curves},
            "by_superclass": self.by_superclass(),
            "by_size": self.by_size(),
            "images": self.images,
        }


def evaluate(args: argparse.Namespace, num_processes: int, say: Callable[[Iterable[str]], None] = print_lines) -> int:
    """Print the table of scores, and write the files that the flags ask for.

    Args:
        args: flags of the command line.
        num_processes: processes that score; 0 to score in this one.
        say: takes the lines to print.

    Returns:
        exit code: 0, or 1 if an image could not be scored.

    Raises:
        ValueError, OSError: a folder or checkpoint cannot be used, or a mask has no prediction.
    """
    for output in (args.json, args.contact_sheet):
        if output is not None:
            require_writable(Path(output))
    if args.json is not None:
        require_own([Path(args.json)], is_json_with("sets", "not_scored"), "evaluate", f"--json {args.json}")
    if args.contact_sheet is not None:
        sheet_file = Path(args.contact_sheet)
        require_own([sheet_file], is_picture_with(_MARK), "evaluate", f"--contact-sheet {sheet_file}")
    if args.contact_sheet is not None and Path(args.contact_sheet).suffix.lower() not in (".png", ".jpg", ".webp"):
        raise ValueError(f"--contact-sheet {args.contact_sheet}: is no picture; name a .png, .jpg or .webp file")
    if args.checkpoint is not None:
        cases, total, source = _cases_of_checkpoint(args, num_processes, say)
    else:
        cases, total, source = _cases_of_folder(args)
    reports: dict[str, SetReport] = {}
    failures: list[str] = []
    worst: list[Bad] = []
    number = itertools.count()
    with progress_bar(total, "image") as bar:
        for result in scored_cases(cases, num_processes):
            bar.update()
            if isinstance(result, str):
                failures.append(result)
                continue
            case, scored = result
            reports.setdefault(case.set_name, SetReport()).add(case, scored)
            if args.contact_sheet is not None:
                _keep_if_bad(worst, case, scored.scores, next(number))
    if not reports:
        raise ValueError(f"no image could be scored; the first reason: {failures[0] if failures else 'no image'}")
    say(_table(reports))
    print_lines((f"Not scored: {failure}" for failure in failures), to_stderr=True)
    if args.json is not None:
        sets = {name: report.to_json() for name, report in reports.items()}
        packages = environment(Path(__file__), ("torch", "numpy", "pillow"))
        write_json(Path(args.json), {**source, **packages, "not_scored": failures, "sets": sets})
        say([f"All scores, image by image: {args.json}"])
    if args.contact_sheet is not None:
        rows = [(bad.caption, bad.panels) for bad in sorted(worst, reverse=True)]
        sheet = contact_sheet(rows, ("image", "mask", "prediction"))
        save_picture(sheet, Path(args.contact_sheet), _MARK)
        say([f"The {len(rows)} worst: {args.contact_sheet}"])
    return 1 if failures else 0


def scored_cases(cases: Iterable[Case | str], num_processes: int) -> Iterator[tuple[Case, Scored] | str]:
    """Yield each case with its scores, in order, or the reason why it has none. Few cases are in memory at once.

    Args:
        cases: images to score, or reasons why there is none.
        num_processes: processes that score; 0 to score in this one.
    """
    way_out = "try fewer with --num-workers"
    for case, scored in map_in_order(score_case, cases, num_processes, "scores", way_out):
        if isinstance(scored, str):
            yield scored
        else:
            assert isinstance(case, Case)
            yield case, scored


def score_case(case: Case | str) -> Scored | str:
    """Score one image, and save its prediction if asked to. Return the reason if that fails, or if ``case`` is one."""
    if isinstance(case, str):
        return case
    try:
        mask, prediction = case.labels(), case.grey_levels()
        fits = prediction.shape == mask.shape
        if not fits:
            size = mask.shape[1], mask.shape[0]
            prediction = np.array(Image.fromarray(prediction).resize(size, Image.Resampling.BILINEAR))
        scored = Scored(score_image(prediction, mask, case.stretch), float((mask == 1).mean()), not fits)
    except ValueError as error:
        return str(error) if str(case.mask) in str(error) else f"{case.mask}: {error}"
    if case.save_as is not None:
        try:
            save_picture(Image.fromarray(prediction), case.save_as, _MARK)
        except OSError as error:
            return f"{case.save_as}: cannot be saved ({error.strerror or error})"
    return scored


def _cases_of_checkpoint(
    args: argparse.Namespace, num_processes: int, say: Callable[[Iterable[str]], None]
) -> tuple[Iterator[Case | str], int, dict[str, Any]]:
    from evaluation.predictor import load_network, predict_pairs  # torch: scoring files does not need it

    sets = {} if args.held_out else _test_sets(args.dataset_path, args.include_noncam)
    network = load_network(Path(args.checkpoint), args.device, args.precision, args.img_size, args.tta)
    if args.held_out:
        root = Path(args.dataset_path[0])
        trained_on = training_pairs(find_subsets(root, include_noncam=True), root)
        parts = [_held_out(member, trained_on, root) for member in network.members()]
        sets = {"held-out": [pair for _, pairs in parts for pair in pairs]}
    else:
        parts = [(network, [pair for pairs in sets.values() for pair in pairs])]
    names = [
        (name, pair, mask)
        for name, pairs in sets.items()
        for pair, mask in zip(pairs, names_of_masks(pairs), strict=True)
    ]
    saved = network.masks if args.held_out and args.mask_values == AUTO else None
    readings, source = _mask_readings(sets, args.mask_values, saved)
    folders: dict[str, Path | None] = dict.fromkeys(sets)
    if args.save_predictions is not None:
        data = {path.parent.resolve() for _, pair, _ in names for path in (pair.image, pair.mask)}
        for name in sets:
            folder = folders[name] = Path(args.save_predictions) / name
            if data & {folder.resolve(), *folder.resolve().parents}:
                raise ValueError(
                    f"--save-predictions {args.save_predictions}: {folder} belongs to the dataset; name another folder"
                )
        files = [Path(args.save_predictions) / name / f"{mask}.png" for name, _, mask in names]
        require_own(files, is_picture_with(_MARK), "evaluate", f"--save-predictions {args.save_predictions}")
        for folder in {file.parent for file in files}:
            folder.mkdir(parents=True, exist_ok=True)
    use = ["networks, each for the images that it has not seen"] if args.held_out else []
    say([f"Network: {args.checkpoint}, {network.describe(*use)}"])

    def cases() -> Iterator[Case | str]:
        num_loaders = max(1, num_processes // 2) if num_processes else 0
        starts = itertools.accumulate((len(pairs) for _, pairs in parts), initial=0)
        predictions = (
            (start + index, prediction)
            for start, (member, pairs) in zip(starts, parts, strict=False)
            for index, prediction in predict_pairs(member, pairs, args.batch_size, num_loaders, args.stretch)
        )
        for index, prediction in predictions:
            (name, pair, mask), folder = names[index], folders[names[index][0]]
            if isinstance(prediction, str):
                yield prediction
            else:
                save_as = None if folder is None else folder / f"{mask}.png"
                reading, stretch = readings[name], args.stretch
                yield Case(name, pair.mask, pair.image, prediction, save_as, mask, reading, stretch=stretch)

    source |= {
        "checkpoint": args.checkpoint,
        "img_size": network.img_size,
        "precision": network.precision.name,
        "tta": network.tta,
        "stretch": args.stretch,
    }
    return cases(), len(names), source


def _held_out(network: "TrainedNetwork", pairs: Sequence[Pair], root: Path) -> "tuple[TrainedNetwork, list[Pair]]":
    """Return a network of one run with the pairs that its run held out of training, without those of --rehearse."""
    (names,) = network.held_out
    return network, named_pairs(pairs, root, [name for name in names if not name.startswith(OUTSIDE)])


def _cases_of_folder(args: argparse.Namespace) -> tuple[Iterator[Case | str], int, dict[str, Any]]:
    """Pair each mask with its prediction in a folder.

    Raises:
        ValueError: a folder or a prediction is missing. A method must not be scored only on the images it chose.
    """
    root = Path(args.predictions)
    if not root.is_dir():
        raise ValueError(f"--predictions {root}: no such folder; name the folder with a method's predictions")
    if args.masks is not None:
        masks = Path(args.masks)
        if not masks.is_dir():
            raise ValueError(f"--masks {masks}: no such folder; name the folder with the masks")
        _require_no_dataset(masks)
        pairs = [Pair(mask, mask) for mask in _listed(masks, MASK_SUFFIXES).values()]
        if not pairs:
            kinds = ", ".join(MASK_SUFFIXES)
            raise ValueError(f"--masks {masks}: no mask ({kinds}) there; name the folder with the masks")
        sets = {_short_names([masks.resolve().parts[1:]])[0]: pairs}
    else:
        sets = _test_sets(args.dataset_path, args.include_noncam)
    readings, source = _mask_readings(sets, args.mask_values)
    cases: list[Case | str] = []
    for name, pairs in sets.items():
        own_folders = [root / name] if args.masks is None else [root / name, root / Path(args.masks).resolve().name]
        folder = next((folder for folder in own_folders if folder.is_dir()), root)
        names = names_of_masks(pairs)
        predictions = _predictions_of(names, pairs, folder, name)
        missing = [pair.mask.name for pair, mask in zip(pairs, names, strict=True) if mask not in predictions]
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            raise ValueError(
                f"{folder}: no prediction for {len(missing)} of the {len(pairs)} masks of {name}: "
                f"{', '.join(missing[:3])}{more}; give each prediction its mask's file name, in this folder or in one "
                f"called {name}"
            )
        prediction_reading = survey_predictions(predictions[mask] for mask in names)
        for advice in prediction_reading.advice:
            logger.warning(f"predictions of {name}: {advice}")
        for pair, mask in zip(pairs, names, strict=True):
            image = pair.image if args.masks is None else None
            prediction = predictions[mask]
            case = Case(
                name, pair.mask, image, prediction, None, mask, readings[name], prediction_reading, args.stretch
            )
            cases.append(case)
    return iter(cases), len(cases), {**source, "predictions": str(root), "stretch": args.stretch}


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


def _mask_readings(
    sets: Mapping[str, Sequence[Pair]], mask_values: str, saved: MaskReading | None = None
) -> tuple[dict[str, MaskReading], dict[str, Any]]:
    """Decide how the masks of each set are read, and log it.

    Args:
        sets: pairs by the name of their set.
        mask_values: one of ``MASK_VALUES``.
        saved: how the checkpoint's run read them, if they are its own.

    Returns:
        readings by set, and what the JSON file says of them.
    """
    if saved is not None:
        logger.info(f"Masks: as the checkpoint's run read them; {saved.rule}")
        return dict.fromkeys(sets, saved), {"masks": dict.fromkeys(sets, saved.rule)}
    surveys = {name: survey_pairs(pairs, mask_values) for name, pairs in sets.items()}
    for name, survey in surveys.items():
        logger.info(f"Masks of {name}: {survey.summary}")
        for text in filter(None, (survey.advice, survey.constant)):
            logger.warning(f"masks of {name}: {text}")
    readings = {name: survey.reading for name, survey in surveys.items()}
    return readings, {"masks": {name: survey.summary for name, survey in surveys.items()}}


def _listed(folder: Path, suffixes: Sequence[str]) -> dict[str, Path]:
    """Return a folder's pictures by name; of a folder without any, those below it."""
    return files_by_stem(folder, suffixes) or list_pictures(folder, suffixes).files or list_tree(folder, suffixes).files


def _predictions_of(names: Sequence[str], pairs: Sequence[Pair], folder: Path, set_name: str) -> dict[str, Path]:
    """Find the predictions of masks in a folder, by names as ``data.pairing`` matches them.

    Args:
        names: the masks' names.
        pairs: their pairs: a prediction may also have its photograph's name.
        folder: the folder with the predictions.
        set_name: the set's name, for messages.

    Returns:
        mask's name -> prediction; incomplete if predictions are missing.
    """
    files = files_by_stem(folder, _PREDICTION_SUFFIXES)
    if files.keys() >= set(names):
        return files
    if not files or any("/" in name for name in names):  # one set, in folders: their overlays are no predictions
        overlays = [child for child in subfolders(folder) if child.name.startswith("overlays")]
        files = list_tree(folder, _PREDICTION_SUFFIXES, overlays).files
    matching = match_names(files, names, ("predictions", "masks"))
    found = {mask: files[prediction] for prediction, mask in matching.partners.items()}
    if len(found) < len(names):
        matching = match_names(names, files, ("masks", "predictions"))
        found = {mask: files[prediction] for mask, prediction in matching.partners.items()}
    if len(found) < len(names):
        matching = match_names([pair.image.stem for pair in pairs], files, ("images", "predictions"))
        mask_of = {pair.image.stem: mask for pair, mask in zip(pairs, names, strict=True)}
        found = {mask_of[image]: files[prediction] for image, prediction in matching.partners.items()}
    if len(found) == len(names):
        for rule in matching.rules:
            logger.info(f"{set_name}: {rule}")
    return found


def _test_sets(roots: Sequence[str], include_noncam: bool) -> dict[str, list[Pair]]:
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
    return dict(zip(_short_names(list(found)), [list(subset.pairs) for subset in found.values()], strict=True))


def _short_names(paths: Sequence[tuple[str, ...]]) -> list[str]:
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


def _keep_if_bad(worst: list[Bad], case: Case, scores: ImageScores, number: int) -> None:
    badness = -scores.s_measure
    if len(worst) == _NUM_WORST and badness <= worst[0].badness:
        return
    panels = [thumbnail(_GREY_OF_LABEL[case.labels()]), thumbnail(case.grey_levels())]
    if case.image is not None:
        try:
            panels.insert(0, thumbnail(case.image))
        except ValueError:  # the scores do not need it
            panels.insert(0, Image.new("RGB", (1, 1)))
    caption = f"{case.set_name}/{case.name or case.mask.stem}   S {scores.s_measure:.3f}   IoU {scores.iou:.3f}"
    keep: Callable[[list[Bad], Bad], Any] = heapq.heappush if len(worst) < _NUM_WORST else heapq.heapreplace
    keep(worst, Bad(badness, number, panels, caption))


def _means(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    means = {name: float(np.mean([row[name] for row in rows])) for name in _GROUP_COLUMNS}
    return {"num_images": len(rows), **means}


def _table(reports: dict[str, SetReport]) -> list[str]:
    """Return the aligned lines of the table."""
    rows = [("", "images", list(_COLUMNS.values()))]
    for name, report in reports.items():
        means = report.totals.means()
        rows.append((name, str(report.totals.num_images), [f"{means[key]:.3f}" for key in _COLUMNS]))
    titles = [_COLUMNS[key] for key in _GROUP_COLUMNS]
    for name, report in reports.items():
        for title, groups in (("by object size", report.by_size()), ("by superclass", report.by_superclass())):
            if len(groups) > 1:
                rows += [("", "", []), (f"{name} {title}", "images", titles)]
                for group, means in groups.items():
                    values = [f"{means[key]:.3f}" for key in _GROUP_COLUMNS]
                    rows.append((f"  {group}", str(int(means["num_images"])), values))
    width = max(28, *(len(name) for name, _, _ in rows))
    lines = [
        f"{name:{width}} {number:>6}" + "".join(f" {value:>6}" for value in values) for name, number, values in rows
    ]
    resized = {name: report.num_resized for name, report in reports.items() if report.num_resized}
    warning = "Warning: {} predictions of {} were resized to their masks' size"
    return [line.rstrip() for line in lines] + [warning.format(number, name) for name, number in resized.items()]
