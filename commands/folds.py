"""``train --folds``: a run for each part of the data; each photograph scored by the network that has not seen it."""

import os
import shlex
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from commands.cli import Request, evaluate_arguments
from commands.evaluate import evaluate
from commands.output import print_lines
from data.processes import num_cores
from evaluation.metrics import interval_of_mean
from reporting.history import interval
from runtime.files import write_json
from runtime.folder import CONFIG, FOLD, folds_begun, read_json, require_free
from training.settings import NOT_RESUMED, Settings, UsageError, with_paths_found

SCORES, SHEET = "out_of_fold.json", "out_of_fold.png"  # in the folder of the folds


def runs_of(request: Request) -> list[Request]:
    """Return a request for each run that ``train`` or ``demo`` asks for: of each fold, in a folder below, or only one.

    With ``--folds`` their settings are written to ``config.json`` of the folder, for ``--resume auto``.

    Raises:
        UsageError: The flags do not go together.
        ValueError, OSError: The folder holds another run, or cannot be written to.
    """
    given, folder = request.given, Path(request.given["checkpoint_dir"])
    resume, trained = given.get("resume"), [*folder.glob(FOLD.format("*/*.pth"))]
    begun = folds_begun(folder) if resume or trained else None
    before = {} if begun is None else with_paths_found(begun)
    taken = f"{folder} holds the folds of a run already: go on with --resume auto, or choose another folder"
    num_folds = given.get("folds", before.get("folds") if resume == "auto" else None)
    if num_folds is None:
        if begun is not None:
            raise ValueError(taken)
        return [request]
    if resume not in (None, "auto"):
        raise UsageError(f"--folds {num_folds}: goes on with --resume auto, and --checkpoint-dir names the folder")
    if before and before["folds"] != num_folds:
        raise ValueError(f"{folder} holds a run with --folds {before['folds']}, not {num_folds}: choose another folder")
    if any(folder.glob("*.pth")):
        raise ValueError(f"{folder} holds a run without --folds: choose another --checkpoint-dir")
    kept = {name: value for name, value in before.items() if name not in NOT_RESUMED} if resume else {}
    preset = {**request.preset, **kept}

    def run_of(fold: int) -> Request:
        own = {"folds": num_folds, "fold": fold, "checkpoint_dir": str(folder / FOLD.format(fold))}
        return replace(request, given={**given, **own}, preset=preset)

    if "fold" in given:
        return [run_of(given["fold"])]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError("--folds with several processes: start each fold by itself, with --fold 1, --fold 2, ...")
    if resume is None and trained:
        raise ValueError(taken)
    settings = Settings.resolve({**given, "folds": num_folds}, preset=preset).to_dict()
    require_free(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, {"settings": settings, "working_directory": str(Path.cwd())})
    return [run_of(fold) for fold in range(1, num_folds + 1)]


def score_folds(folder: Path, quiet: bool) -> int:
    """Score every photograph by the network of the fold that held it out. Print the scores, and where the worst are.

    Args:
        folder: of the folds, all trained.
        quiet: only write the files.

    Returns:
        exit code 0, also if photographs cannot be read: training has left them out, too.

    Raises:
        ValueError, OSError: see ``evaluate``.
    """
    settings = with_paths_found(read_json(folder / FOLD.format(1) / CONFIG))
    data = settings["dataset_path"]
    if data == "synthetic":
        data = str(folder / FOLD.format(1) / "synthetic")
    args = evaluate_arguments(
        checkpoint=str(folder), dataset_path=[data], held_out=True, device=settings["device"],
        json=str(folder / SCORES), contact_sheet=str(folder / SHEET),
    )  # fmt: skip
    say = _say_nothing if quiet else print_lines
    evaluate(args, min(8, num_cores()), say)
    held_out = read_json(folder / SCORES)["sets"]["held-out"]
    low, high = interval_of_mean([row["iou"] for row in held_out["images"]])
    uncertain = interval({"iou_low": low, "iou_high": high})
    say(
        [
            f"Done: IoU {held_out['scores']['iou']:.4f} over {held_out['num_images']} photographs, each by the network "
            f"that has not seen it{uncertain}; the worst are hard cases, or errors in their masks",
            f"Next: {shlex.join(['python', sys.argv[0], 'predict', '--checkpoint', str(folder)])} PHOTOGRAPHS "
            "--output found --overlay",
        ]
    )
    return 0


def _say_nothing(_lines: Iterable[str]) -> None:
    pass
