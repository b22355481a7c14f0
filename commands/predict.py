"""``predict``: find the objects in photographs, as PNGs and as overlays for people. No masks needed.

Images stream from the processes that decode them through the network to the processes that write predictions.
"""

import argparse
import itertools
import os
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from commands.output import print_lines, progress_bar
from commands.own_files import is_picture_with, require_own, save_picture
from data.decoding import decode_image
from data.processes import map_in_order
from evaluation.figures import overlay
from evaluation.metrics import ByteArray
from evaluation.sources import Source, find_sources, name_predictions

_OBJECT = 128  # grey levels from here on are probabilities of at least one half
_MARK = "train_ultimate predict"  # in each file that predict writes


@dataclass(frozen=True)
class Prediction:
    """A prediction to write."""

    levels: ByteArray  # (H, W)
    image: Path
    save_as: Path
    overlay: Path | None  # None: no overlay is written


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

    from evaluation.predictor import load_network, predict_images  # torch: mistakes so far need not wait for it

    network = load_network(Path(args.checkpoint), args.device, args.precision, args.img_size, args.tta)
    for parent in folders:
        parent.mkdir(parents=True, exist_ok=True)
    print_lines([f"Network: {args.checkpoint}, {network.describe()}"])
    images = [source.path for source in sources.images]
    num_loaders, num_writers = (num_processes + 1) // 2, max(1, num_processes // 2) if num_processes else 0

    def predictions() -> Iterator[Prediction | str]:
        for index, levels in predict_images(network, images, args.batch_size, num_loaders, args.threshold):
            failed = isinstance(levels, str)
            yield levels if failed else Prediction(levels, images[index], names[index], overlays[index])

    failures = list(sources.problems)
    print_lines((f"Not predicted: {problem}" for problem in failures), to_stderr=True)
    with warnings.catch_warnings(), progress_bar(len(images), "image") as bar:
        warnings.simplefilter("ignore")  # Pillow's, about metadata and very large images, which it reads all the same
        way_out = "try fewer with --num-workers"
        for _, problem in map_in_order(save_prediction, predictions(), num_writers, "writes predictions", way_out):
            bar.update()
            if problem:
                failures.append(problem)
                with bar.external_write_mode(file=sys.stderr):
                    print_lines([f"Not predicted: {problem}"], to_stderr=True)
    what = (
        "probabilities x 255" if args.threshold is None else f"masks, 255 from a probability of {args.threshold:g} on"
    )
    num_written = len(images) - len(failures) + len(sources.problems)
    summary = [f"{num_written} PNG{'s' if num_written != 1 else ''} in {output} ({what})"]
    summary += [f"as many overlays in {folder}"] if args.overlay else []
    summary += [f"{sources.num_repeated} named more than once, predicted once"] if sources.num_repeated else []
    summary += [f"{len(failures)} not predicted, named above"] if failures else []
    print_lines([f"Predicted: {'; '.join(summary)}"])
    return 1 if failures else 0


def save_prediction(prediction: Prediction | str) -> str:
    """Write an image's prediction and overlay. Return the reason if that fails or ``prediction`` is one, else ""."""
    if isinstance(prediction, str):
        return prediction
    what = "prediction"
    try:
        save_picture(Image.fromarray(prediction.levels), prediction.save_as, _MARK)
        if prediction.overlay is not None:
            what = "overlay"  # JPEG allows at most 65,535 pixels a side
            marked = overlay(decode_image(prediction.image), prediction.levels >= _OBJECT)
            save_picture(marked, prediction.overlay, _MARK)
    except (OSError, ValueError) as error:
        return f"{prediction.image}: {what} cannot be saved ({error})"
    return ""


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
