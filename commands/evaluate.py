"""``evaluate``: score a checkpoint on test sets, or any method's saved predictions against masks.

Images stream from the network (or from files) to the processes that score them; only sums and a row each are kept.
"""

import argparse
import heapq
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from commands.cli import MEASURES
from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import is_json_with, is_picture_with, require_own, save_picture
from commands.scoring import (
    GROUP_COLUMNS,
    MARK,
    Case,
    MaskSet,
    SetReport,
    about_empty,
    cases_in_folder,
    mask_sets,
    masks_alone,
    protocol_of,
    scored_by,
    scored_cases,
    test_sets,
)
from data.layouts import OUTSIDE, Pair, find_subsets, named_pairs, training_pairs
from data.survey import AUTO
from evaluation.figures import contact_sheet, thumbnail
from evaluation.metrics import ImageScores, Protocol
from runtime.files import write_json
from runtime.log import environment

if TYPE_CHECKING:
    from evaluation.predictor import TrainedNetwork  # torch: scoring files does not need it

_NUM_WORST = 24
_GREY_OF_LABEL = np.array([0, 255, 128], dtype=np.uint8)  # in a picture of a mask


@dataclass(order=True)
class Bad:
    """One of the worst images so far. The first of the heap is the best of them."""

    badness: float
    number: int
    panels: list[Image.Image] = field(compare=False)
    caption: str = field(compare=False)


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
        require_own([sheet_file], is_picture_with(MARK), "evaluate", f"--contact-sheet {sheet_file}")
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
    for name, report in reports.items():
        say(about_empty(name, report.presence(), args.stretch))
    print_lines((f"Not scored: {failure}" for failure in failures), to_stderr=True)
    if args.json is not None:
        sets = {name: report.to_json() for name, report in reports.items()}
        packages = environment(Path(__file__), ("torch", "numpy", "pillow"))
        write_json(Path(args.json), {**source, **packages, "not_scored": failures, "sets": sets})
        say([f"All scores, image by image: {args.json}"])
    if args.contact_sheet is not None:
        rows = [(bad.caption, bad.panels) for bad in sorted(worst, reverse=True)]
        sheet = contact_sheet(rows, ("image", "mask", "prediction"))
        save_picture(sheet, Path(args.contact_sheet), MARK)
        say([f"The {len(rows)} worst: {args.contact_sheet}"])
    return 1 if failures else 0


def cases_of_networks(
    parts: Sequence[tuple["TrainedNetwork", Sequence[Pair]]], sets: Sequence[MaskSet], batch_size: int,
    protocol: Protocol, num_processes: int, folder: Path | None = None,
) -> Iterator[Case | str]:  # fmt: skip
    """Yield the masks of sets with their predictions, or the reason why there is none.

    Args:
        parts: networks, each with the pairs that it predicts; all together are the pairs of the sets, in order.
        sets: the masks.
        batch_size: images that go through a network at once.
        protocol: how to score.
        num_processes: processes that score; half as many decode.
        folder: where predictions are saved, in a folder of each set; None for nowhere.
    """
    from evaluation.predictor import predict_pairs  # torch: scoring files does not need it

    named = [(masks, *entry) for masks in sets for entry in zip(masks.pairs, masks.names, strict=True)]
    num_loaders = max(1, num_processes // 2) if num_processes else 0
    starts = itertools.accumulate((len(pairs) for _, pairs in parts), initial=0)
    predictions = (
        (start + index, prediction)
        for start, (network, pairs) in zip(starts, parts, strict=False)
        for index, prediction in predict_pairs(network, pairs, batch_size, num_loaders, protocol.stretch)
    )
    for index, prediction in predictions:
        masks, pair, name = named[index]
        if isinstance(prediction, str):
            yield prediction
        else:
            save_as = None if folder is None else folder / masks.name / f"{name}.png"
            yield Case(masks.name, pair.mask, pair.image, prediction, save_as, name, masks.reading, protocol=protocol)


def _cases_of_checkpoint(
    args: argparse.Namespace, num_processes: int, say: Callable[[Iterable[str]], None]
) -> tuple[Iterator[Case | str], int, dict[str, Any]]:
    from evaluation.predictor import load_network  # torch: scoring files does not need it

    found = {} if args.held_out else test_sets(args.dataset_path, args.include_noncam)
    network = load_network(Path(args.checkpoint), args.device, args.precision, args.img_size, args.tta)
    if args.held_out:
        root = Path(args.dataset_path[0])
        trained_on = training_pairs(find_subsets(root, include_noncam=True), root)
        parts = [_held_out(member, trained_on, root) for member in network.members()]
        found = {"held-out": [pair for _, pairs in parts for pair in pairs]}
    else:
        parts = [(network, [pair for pairs in found.values() for pair in pairs])]
    sets, rules = mask_sets(
        found, args.mask_values, network.masks if args.held_out and args.mask_values == AUTO else None
    )
    folder = None if args.save_predictions is None else Path(args.save_predictions)
    if folder is not None:
        _make_folders(folder, sets)
    use = ["networks, each for the images that it has not seen"] if args.held_out else []
    say([f"Network: {args.checkpoint}, {network.describe(*use)}"])
    source = {
        "masks": rules,
        "checkpoint": args.checkpoint,
        "img_size": network.img_size,
        "precision": network.precision.name,
        "tta": network.tta,
        **scored_by(args),
    }
    cases = cases_of_networks(parts, sets, args.batch_size, protocol_of(args), num_processes, folder)
    return cases, sum(len(pairs) for _, pairs in parts), source


def _make_folders(folder: Path, sets: Sequence[MaskSet]) -> None:
    """Make the folders for predictions.

    Raises:
        ValueError: The folder holds photographs, masks or files that evaluate has not written.
    """
    data = {path.parent.resolve() for masks in sets for pair in masks.pairs for path in (pair.image, pair.mask)}
    for masks in sets:
        own = folder / masks.name
        if data & {own.resolve(), *own.resolve().parents}:
            raise ValueError(f"--save-predictions {folder}: {own} belongs to the dataset; name another folder")
    files = [folder / masks.name / f"{name}.png" for masks in sets for name in masks.names]
    require_own(files, is_picture_with(MARK), "evaluate", f"--save-predictions {folder}")
    for parent in {file.parent for file in files}:
        parent.mkdir(parents=True, exist_ok=True)


def _held_out(network: "TrainedNetwork", pairs: Sequence[Pair], root: Path) -> "tuple[TrainedNetwork, list[Pair]]":
    """Return a network of one run with the pairs that its run held out of training, without those of --rehearse."""
    (names,) = network.held_out
    return network, named_pairs(pairs, root, [name for name in names if not name.startswith(OUTSIDE)])


def _cases_of_folder(args: argparse.Namespace) -> tuple[Iterator[Case | str], int, dict[str, Any]]:
    """Pair each mask with its prediction in a folder.

    Raises:
        ValueError: a folder or a prediction is missing.
    """
    root = Path(args.predictions)
    if not root.is_dir():
        raise ValueError(f"--predictions {root}: no such folder; name the folder with a method's predictions")
    found = test_sets(args.dataset_path, args.include_noncam) if args.masks is None else masks_alone(Path(args.masks))
    sets, rules = mask_sets(found, args.mask_values)
    cases: list[Case | str] = []
    for masks in sets:
        own = [root / name for name in (masks.name, *([] if args.masks is None else [Path(args.masks).resolve().name]))]
        folder = next((folder for folder in own if folder.is_dir()), root)
        cases += cases_in_folder(folder, masks, protocol_of(args), folder != root or len(sets) == 1)
    return iter(cases), len(cases), {"masks": rules, "predictions": str(root), **scored_by(args)}


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


def _table(reports: dict[str, SetReport]) -> list[str]:
    """Return the aligned lines of the table."""
    rows = [("", "images", list(MEASURES.values()))]
    for name, report in reports.items():
        means = report.totals.means()
        rows.append((name, str(report.totals.num_images), [f"{means[key]:.3f}" for key in MEASURES]))
    titles = [MEASURES[key] for key in GROUP_COLUMNS]
    for name, report in reports.items():
        for title, groups in (("by object size", report.by_size()), ("by superclass", report.by_superclass())):
            if len(groups) > 1:
                rows += [("", "", []), (f"{name} {title}", "images", titles)]
                for group, means in groups.items():
                    values = [f"{means[key]:.3f}" for key in GROUP_COLUMNS]
                    rows.append((f"  {group}", str(int(means["num_images"])), values))
    width = max(28, *(len(name) for name, _, _ in rows))
    lines = [
        f"{name:{width}} {number:>6}" + "".join(f" {value:>6}" for value in values) for name, number, values in rows
    ]
    resized = {name: report.num_resized for name, report in reports.items() if report.num_resized}
    warning = "Warning: {} predictions of {} were resized to their masks' size"
    return [line.rstrip() for line in lines] + [warning.format(number, name) for name, number in resized.items()]
