"""``predict``: find the objects in photographs, as PNGs, as overlays for people, and as a table. No masks needed.

Images stream from the processes that decode them through the network to the processes that write predictions.
"""

import argparse
import csv
import io
import itertools
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from commands.output import print_lines, progress_bar, require_writable
from commands.own_files import contains, is_picture_with, require_own, save_picture
from data.decoding import decode_image
from data.processes import map_in_order
from evaluation.figures import overlay
from evaluation.objects import CSV_COLUMNS, Finding, Found, describe, require_scipy
from evaluation.sources import Source, find_sources, name_predictions
from runtime.files import write_text

_LEAST = 0.0001  # smallest object, as a share of its photograph
_MARK = "train_ultimate predict"  # in each file that predict writes


@dataclass(frozen=True)
class Prediction:
    """A prediction to write."""

    found: Found
    image: Path
    save_as: Path
    as_mask: bool  # write 0 and 255 instead of probabilities
    overlay: Path | None  # None: no overlay is written
    least: float | None  # size of an object, as a share of the photograph; None: they are not counted


def predict(args: argparse.Namespace, num_processes: int) -> int:
    """Write a prediction of every image that can be read, and name the others on stderr.

    Args:
        args: flags of the command line.
        num_processes: processes that decode and write, half each; 0 to do both in this one.

    Returns:
        exit code: 0, or 1 if an input could not be read or a prediction not written.

    Raises:
        ValueError, OSError: there is no image, or checkpoint or output folder cannot be used.
    """
    output = Path(args.output)
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output {output}: is a file; name a folder")
    sources = find_sources(args.inputs, output)
    if not sources.images:
        print_lines((f"Not predicted: {problem}" for problem in sources.problems), to_stderr=True)
        raise ValueError("no image found; give files, folders or patterns")
    names = [output / name for name in name_predictions(sources.images)]
    folder = output / _unused_name("overlays", {name.relative_to(output).parts[0] for name in names})
    overlays = [folder / name.relative_to(output).with_suffix(".jpg") if args.overlay else None for name in names]
    folders = {path.parent for path in (*names, *overlays) if path is not None}
    _require_apart(sources.images, folders, output)
    require_own([*names, *filter(None, overlays)], is_picture_with(_MARK), "predict", f"--output {output}")
    if args.csv is not None:
        require_writable(args.csv)
        require_own([args.csv], contains(",".join(CSV_COLUMNS).encode()), "predict", f"--csv {args.csv}")
        require_scipy()

    from evaluation.predictor import load_network, predict_images  # torch: mistakes so far need not wait for it

    network = load_network(Path(args.checkpoint), args.device, args.precision, args.img_size, args.tta)
    for parent in folders:
        parent.mkdir(parents=True, exist_ok=True)
    print_lines([f"Network: {args.checkpoint}, {network.describe()}"])
    images = [source.path for source in sources.images]
    num_loaders, num_writers = (num_processes + 1) // 2, max(1, num_processes // 2) if num_processes else 0

    def predictions() -> Iterator[Prediction | str]:
        threshold, as_mask = args.threshold or 0.5, args.threshold is not None
        least = None if args.csv is None else _LEAST if args.least_object is None else args.least_object
        for index, found in predict_images(network, images, args.batch_size, num_loaders, threshold):
            if isinstance(found, str):
                yield found
            else:
                yield Prediction(found, images[index], names[index], as_mask, overlays[index], least)

    findings: list[tuple[Path, Finding]] = []
    failures = list(sources.problems)
    print_lines((f"Not predicted: {problem}" for problem in failures), to_stderr=True)
    with warnings.catch_warnings(), progress_bar(len(images), "image") as bar:
        warnings.simplefilter("ignore")  # Pillow's, about metadata and very large images, which it reads all the same
        way_out = "try fewer with --num-workers"
        saved = map_in_order(save_prediction, predictions(), num_writers, "writes predictions", way_out)
        for prediction, finding in saved:
            bar.update()
            if isinstance(finding, str):
                failures.append(finding)
                with bar.external_write_mode(file=sys.stderr):
                    print_lines([f"Not predicted: {finding}"], to_stderr=True)
            elif finding is not None and isinstance(prediction, Prediction):
                findings.append((prediction.image, finding))
    if args.csv is not None:
        if args.sort == "doubt":
            findings.sort(key=lambda entry: -entry[1].doubt)
        write_text(args.csv, _table(findings))
    what = (
        "probabilities x 255" if args.threshold is None else f"masks, 255 from a probability of {args.threshold:g} on"
    )
    num_written = len(images) - len(failures) + len(sources.problems)
    summary = [f"{num_written} PNG{'s' if num_written != 1 else ''} in {output} ({what})"]
    summary += [f"as many overlays in {folder}"] if args.overlay else []
    summary += [f"{sources.num_repeated} named more than once, predicted once"] if sources.num_repeated else []
    summary += [f"{len(failures)} not predicted, named above"] if failures else []
    if args.csv is not None:
        with_object = sum(bool(finding.boxes) for _, finding in findings)
        summary.append(f"objects in {with_object} of them, listed in {args.csv}")
    print_lines([f"Predicted: {'; '.join(summary)}"])
    return 1 if failures else 0


def _table(findings: Sequence[tuple[Path, Finding]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(finding.row(str(image)) for image, finding in findings)
    return stream.getvalue()


def save_prediction(prediction: Prediction | str) -> Finding | str | None:
    """Write an image's prediction and overlay.

    Returns:
        what was found in numbers, if they were asked for; or the reason if writing fails or ``prediction`` is one.
    """
    if isinstance(prediction, str):
        return prediction
    what = "prediction"
    try:
        levels = prediction.found.mask.astype(np.uint8) * 255 if prediction.as_mask else prediction.found.levels
        save_picture(Image.fromarray(levels), prediction.save_as, _MARK)
        if prediction.overlay is not None:
            what = "overlay"  # JPEG allows at most 65,535 pixels a side
            marked = overlay(decode_image(prediction.image), prediction.found.mask)
            save_picture(marked, prediction.overlay, _MARK)
    except (OSError, ValueError) as error:
        return f"{prediction.image}: {what} cannot be saved ({error})"
    return None if prediction.least is None else describe(prediction.found, prediction.least)


def _unused_name(name: str, used: Collection[str]) -> str:
    used = {other.casefold() for other in used}
    return next(one for number in itertools.count(1) if (one := f"{name}-{number}" if number > 1 else name) not in used)


def _require_apart(sources: Sequence[Source], folders: Collection[Path], output: Path) -> None:
    """Check that no folder gets both predictions and photographs: the next run would mistake one for the other.

    Raises:
        ValueError: an image, or the file that it links to, is in a folder that would be written to.
    """
    written_to = {os.path.realpath(folder) for folder in folders}
    for source in sources:
        of_link, of_file = os.path.realpath(source.path.parent), Path(os.path.realpath(source.path)).parent
        if of_link in written_to or str(of_file) in written_to:
            raise ValueError(
                f"--output {output}: {source.path} is in a folder that predictions would be written to; "
                "name another folder"
            )
