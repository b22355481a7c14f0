"""The last lines of a run on the terminal: the result, where it is, and the next command."""

import shlex
import sys
from contextlib import suppress
from pathlib import Path

from data.layouts import find_subsets
from reporting.history import interval, read_run
from runtime.folder import LOG, folds_begun
from training.rules import too_few_validated, too_few_windows
from training.run import Run


def resume_command(run: Run) -> str:
    """Return the command that continues the run, and the other folds that were begun with it."""
    folder = _folder_of_folds(run) or run.settings.checkpoint_dir
    return shlex.join(["python", sys.argv[0], "train", "--resume", "auto", "--checkpoint-dir", str(folder)])


def closing_lines(run: Run) -> list[str]:
    """Return the lines that a finished run prints last."""
    progress, best = run.state.progress, _weights(run)
    is_synthetic = run.settings.dataset_path == "synthetic"
    data = run.folder.path / "synthetic" if is_synthetic else Path(run.settings.dataset_path)
    few = [] if is_synthetic else _too_few(run)
    result = "Done"
    if progress.best_iou >= 0:
        uncertain = interval(read_run(run.folder.path).epochs.get(progress.best_epoch, {}))
        result += f": validation IoU {progress.best_iou:.4f}, reached at epoch {progress.best_epoch}{uncertain}"
    lines = [*few, result, f"Weights: {best}, curves: {run.folder.path / LOG}"]
    if _folder_of_folds(run) is not None:
        return lines  # what comes next is another fold
    next_command = ["predict", "--checkpoint", str(best), "PHOTOGRAPHS", "--output", "found", "--overlay"]
    with suppress(ValueError, OSError):  # the dataset may have gone
        if any(subset.split == "test" for subset in find_subsets(data)):
            next_command = ["evaluate", "--checkpoint", str(best), "--dataset-path", str(data)]
    return [*lines, f"Next: {shlex.join(['python', sys.argv[0], *next_command])}"]


def _folder_of_folds(run: Run) -> Path | None:
    """Return the folder of all folds if the run is one that was begun with the others; None if it stands alone."""
    parent = Path(run.settings.checkpoint_dir).parent
    return parent if run.settings.fold is not None and folds_begun(parent) else None


def _too_few(run: Run) -> list[str]:
    """Say what there was too little of: optimizer steps, validation images."""
    windows = too_few_windows(run.state.progress.global_window, len(run.data.images), run.data.window_size)
    validated = too_few_validated(len(run.data.validation)) if run.settings.folds is None else ""
    return [*filter(None, (windows, validated))]


def _weights(run: Run) -> Path:
    """Return the file with the best weights; the newest checkpoint if none was ever the best in this folder."""
    store = run.folder.store
    return store.best_path if store.best_path.exists() else next(reversed(store.files()), store.best_path)
