"""Resident memory of a run with its loader processes, over epochs and at ten times the images.

    python benchmarks/memory.py --dataset-path data/CAMO [--epochs N] [--images N] [--img-size PX]

Trains twice, on ``--images`` images and on ten times as many (links to them), and reads /proc meanwhile. Printed: the
peak in each quarter of the first run, the growth of peaks per epoch (least squares, with the standard error), and the
second run's peak against the first's. Linux only.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.layouts import find_subsets, training_pairs

SCRIPT = Path(__file__).parents[1] / "train_ultimate.py"


def write_links(root: Path, folder: Path, number: int) -> Path:
    """Write ``number`` pairs of links, all with different names, to ``folder/TrainDataset/{Imgs,GT}``."""
    pairs = training_pairs(find_subsets(root), root)
    for name in ("Imgs", "GT"):
        (folder / "TrainDataset" / name).mkdir(parents=True)
    for index in range(number):
        pair = pairs[index % len(pairs)]
        for name, path in (("Imgs", pair.image), ("GT", pair.mask)):
            link = folder / "TrainDataset" / name / f"{index:06d}{path.suffix}"
            link.symlink_to(path.resolve())
    return folder


def resident_mb(pid: int) -> float:
    """Return the memory of a process and its children, with shared memory counted once (proportional set size)."""
    total = 0.0
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for process in (str(pid), *children):
        try:
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
        except OSError:  # the process has just ended
            continue
        total += next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return total


def train(dataset: Path, directory: Path, epochs: int, options: argparse.Namespace) -> list[float]:
    """Train, and return each epoch's peak in MB."""
    flags = [
        *("--dataset-path", str(dataset), "--checkpoint-dir", str(directory), "--no-pretrained"),
        *("--backbone", options.backbone, "--img-size", str(options.img_size), "--batch-size", "8"),
        *("--accumulation-steps", "1", "--epochs", str(epochs), "--stage1-epochs", "0", "--num-workers", "2"),
    ]
    command = [sys.executable, str(SCRIPT), "train", *flags]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log, peaks = directory / "metrics.jsonl", [0.0]
    while process.poll() is None:
        done = log.read_text().count('"event": "epoch"') if log.exists() else 0
        while len(peaks) <= done:
            peaks.append(0.0)
        try:
            peaks[done] = max(peaks[done], resident_mb(process.pid))
        except OSError:
            break
        time.sleep(0.1)
    if process.wait() != 0:
        raise SystemExit(f"training ended with {process.returncode}")
    return [peak for peak in peaks[:epochs] if peak]


def growth(peaks: NDArray[np.float64]) -> tuple[float, float]:
    """Return the least-squares slope and its standard error, without the first quarter, which allocates buffers."""
    peaks = peaks[len(peaks) // 4 :]
    values = peaks - peaks.mean()
    epochs = np.arange(len(values)) - (len(values) - 1) / 2
    slope = float(epochs @ values / (epochs @ epochs))
    rest = values - slope * epochs
    return slope, float(np.sqrt(rest @ rest / (len(values) - 2) / (epochs @ epochs)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", type=Path, required=True)
    parser.add_argument("--backbone", default="resnet10t")
    parser.add_argument("--img-size", type=int, default=96)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        few = write_links(options.dataset_path, folder / "few", options.images)
        peaks = train(few, folder / "run-few", options.epochs, options)
        slope, error = growth(np.array(peaks))
        quarters = ", ".join(f"{max(part):.0f}" for part in np.array_split(peaks, 4))
        print(f"{options.images} images, {len(peaks)} epochs, peaks by quarter: {quarters} MB")
        print("each epoch's: " + " ".join(f"{peak:.0f}" for peak in peaks))
        print(f"growth {slope:+.2f} +- {error:.2f} MB an epoch after the first quarter")
        many = write_links(options.dataset_path, folder / "many", 10 * options.images)
        large = train(many, folder / "run-many", max(1, options.epochs // 10), options)
        ratio = max(large) / max(peaks)
        print(f"{10 * options.images} images: peak {max(large):.0f} MB against {max(peaks):.0f}, ratio {ratio:.3f} "
              f"(median of epochs {statistics.median(large) / statistics.median(peaks):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
