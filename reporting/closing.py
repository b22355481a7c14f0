"""The last lines of a run on the terminal: the result, where it is, and the next command."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path

from data.layouts import find_subsets
from runtime.folder import LOG
from training.run import Run

FEW_WINDOWS = 300  # too few for a network to learn much at the default learning rate


def resume_command(run: Run) -> str:
    """Return the command that continues the run."""
    folder = run.settings.checkpoint_dir
    return shlex.join(["python", sys.argv[0], "train", "--resume", "auto", "--checkpoint-dir", folder])


def closing_lines(run: Run) -> list[str]:
    """Return the lines that a finished run prints last."""
    progress, best = run.state.progress, _weights(run)
    is_synthetic = run.settings.dataset_path == "synthetic"
    data = run.folder.path / "synthetic" if is_synthetic else Path(run.settings.dataset_path)
    next_command = ["predict", "--checkpoint", str(best), "PHOTOGRAPHS", "--output", "found", "--overlay"]
    with suppress(ValueError, OSError):  # the dataset may have gone
        if any(subset.split == "test" for subset in find_subsets(data)):
            next_command = ["evaluate", "--checkpoint", str(best), "--dataset-path", str(data)]
    windows, few = progress.global_window, []
    if windows < FEW_WINDOWS and not is_synthetic:
        few = [
            f"Only {windows} windows (optimizer steps) were trained: docs/recipes.md has settings for small datasets"
        ]
    result = "Done"
    if progress.best_iou >= 0:
        result += f": validation IoU {progress.best_iou:.4f}, reached at epoch {progress.best_epoch}"
    return [
        *few,
        result,
        f"Weights: {best}, curves: {run.folder.path / LOG}",
        f"Next: {shlex.join(['python', sys.argv[0], *next_command])}",
    ]


def _weights(run: Run) -> Path:
    """Return the file with the best weights; the newest checkpoint if none was ever the best in this folder."""
    store = run.folder.store
    return store.best_path if store.best_path.exists() else next(reversed(store.files()), store.best_path)
