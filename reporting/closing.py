"""The last lines of a run on the terminal: the result, where it is, and the next command."""

import math
import shlex
import sys
from contextlib import suppress
from pathlib import Path

from data.layouts import find_subsets
from runtime.folder import LOG
from training.run import Run

FEW_WINDOWS = 300  # too few for a network to learn much at the default learning rate
ENOUGH_WINDOWS, ENOUGH_EPOCHS = 600, 15  # docs/recipes.md has a table of them
FEW_VALIDATION_IMAGES = 30
_DEVIATION_OF_IOU = 0.25  # from image to image: .246 on 199 images of CAMO whose mean was .586


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
    few = [] if is_synthetic else _too_few(run)
    result = "Done"
    if progress.best_iou >= 0:
        result += f": validation IoU {progress.best_iou:.4f}, reached at epoch {progress.best_epoch}"
    return [
        *few,
        result,
        f"Weights: {best}, curves: {run.folder.path / LOG}",
        f"Next: {shlex.join(['python', sys.argv[0], *next_command])}",
    ]


def enough_epochs(num_images: int, window_size: int) -> int:
    """Return the epochs that make enough optimizer steps of this many training images."""
    return max(ENOUGH_EPOCHS, math.ceil(ENOUGH_WINDOWS / math.ceil(num_images / window_size)))


def _too_few(run: Run) -> list[str]:
    """Say what there was too little of: optimizer steps, validation images."""
    windows, num_images, num_validated = (
        run.state.progress.global_window,
        len(run.data.images),
        len(run.data.validation),
    )
    lines = []
    if windows < FEW_WINDOWS:
        lines.append(
            f"Only {windows} windows (optimizer steps) were trained, too few to learn much: with {num_images} training "
            f"images, --epochs {enough_epochs(num_images, run.data.window_size)} is enough; docs/recipes.md has other "
            "settings for small datasets"
        )
    if num_validated < FEW_VALIDATION_IMAGES:
        lines.append(
            f"Only {num_validated} images to validate on: the standard error of their mean IoU is about "
            f"{_DEVIATION_OF_IOU / math.sqrt(num_validated):.2f}; smaller differences between epochs or runs are chance"
        )
    return lines


def _weights(run: Run) -> Path:
    """Return the file with the best weights; the newest checkpoint if none was ever the best in this folder."""
    store = run.folder.store
    return store.best_path if store.best_path.exists() else next(reversed(store.files()), store.best_path)
