"""Speed of scoring against pysodmetrics, in one process and in two, and the memory that many images take.

    python benchmarks/scoring.py --masks data/CAMO/TestDataset/GT

Masks are scaled to 352 x 352 and to 768 x 1024. Predictions are blurred, dimmed and noisy masks, so that few pixels are
exactly 0. Both sides compute S, E, F, weighted F, MAE, IoU and Dice with their curves, in turn, image by image; then
from PNG files, `evaluate --predictions` in two processes against a loop in one, in turn, three rounds.
"""

import argparse
import contextlib
import io
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter
from py_sod_metrics import sod_metrics
from py_sod_metrics.fmeasurev2 import DICEHandler, FmeasureV2, IOUHandler

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train_ultimate  # noqa: E402
from evaluation.metrics import BoolArray, ByteArray, score_image  # noqa: E402

SIZES = ((352, 352), (768, 1024))


def reference(prediction: ByteArray, mask: BoolArray) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        handlers = {
            "iou": IOUHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
            "dice": DICEHandler(with_dynamic=False, with_adaptive=False, with_binary=True),
        }
        measures = (
            *(sod_metrics.Fmeasure(), sod_metrics.Smeasure(), sod_metrics.Emeasure()),
            *(sod_metrics.WeightedFmeasure(), sod_metrics.MAE(), FmeasureV2(handlers)),
        )
        for measure in measures:
            measure.step(prediction, mask.astype(np.uint8) * 255)


def write_pairs(masks: Path, folder: Path, size: tuple[int, int], number: int) -> None:
    """Write masks and predictions to ``folder/GT`` and ``folder/predictions``."""
    rng = np.random.default_rng(0)
    for name in ("GT", "predictions"):
        (folder / name).mkdir(parents=True)
    paths = sorted(masks.iterdir())
    for index in range(number):
        mask = Image.open(paths[index % len(paths)]).convert("L").resize((size[1], size[0]), Image.Resampling.NEAREST)
        soft = np.array(mask.filter(ImageFilter.GaussianBlur(8)), dtype=np.float64) * rng.uniform(0.6, 1)
        noisy = soft + rng.normal(0, 6, size) + rng.integers(0, 30)
        mask.save(folder / "GT" / f"{index:05d}.png")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(folder / "predictions" / f"{index:05d}.png")


def read(folder: Path) -> list[tuple[ByteArray, BoolArray]]:
    names = sorted(path.name for path in (folder / "GT").iterdir())
    return [
        (np.array(Image.open(folder / "predictions" / name)), np.array(Image.open(folder / "GT" / name)) > 128)
        for name in names
    ]


def evaluate(folder: Path, num_processes: int) -> None:
    argv = ["--predictions", str(folder / "predictions"), "--masks", str(folder / "GT")]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert train_ultimate.main(["evaluate", *argv, "--num-workers", str(num_processes)]) == 0


def one_process(folder: Path) -> str:
    ours = theirs = 0.0
    pairs = read(folder)
    for prediction, mask in pairs:
        start = time.perf_counter()
        reference(prediction, mask)
        middle = time.perf_counter()
        score_image(prediction, mask)
        theirs, ours = theirs + middle - start, ours + time.perf_counter() - middle
    per_image = [1000 * seconds / len(pairs) for seconds in (theirs, ours)]
    return f"pysodmetrics {per_image[0]:.1f} ms, ours {per_image[1]:.1f} ms per image, ratio {theirs / ours:.2f}"


def two_processes(folder: Path) -> str:
    ours = theirs = 0.0
    for _ in range(3):
        start = time.perf_counter()
        for prediction, mask in read(folder):
            reference(prediction, mask)
        middle = time.perf_counter()
        evaluate(folder, num_processes=2)
        theirs, ours = theirs + middle - start, ours + time.perf_counter() - middle
    return f"pysodmetrics {theirs / 3:.2f} s, evaluate {ours / 3:.2f} s, ratio {theirs / ours:.2f}"


def peak_memory(folder: Path, number: int, many: Path) -> float:
    """Return the peak memory in MB of the main process of `evaluate`, on ``number`` links to the folder's images."""
    for name in ("GT", "predictions"):
        originals = sorted((folder / name).iterdir())
        (many / name).mkdir(parents=True)
        for index in range(number):
            (many / name / f"{index:05d}.png").symlink_to(originals[index % len(originals)])
    argv = ["evaluate", "--predictions", str(many / "predictions"), "--masks", str(many / "GT"), "--num-workers", "2"]
    program = "import sys, train_ultimate; train_ultimate.main(sys.argv[1:]); print(open('/proc/self/status').read())"
    result = subprocess.run(
        [sys.executable, "-c", program, *argv], check=True, capture_output=True, text=True, cwd=ROOT
    )
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--masks", type=Path, required=True, help="a folder with masks")
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folders = {size: Path(temporary) / "x".join(map(str, size)) for size in SIZES}
        for size, folder in folders.items():
            write_pairs(args.masks, folder, size, args.images)
        few = peak_memory(folders[SIZES[0]], 100, Path(temporary) / "few")
        many = peak_memory(folders[SIZES[0]], 2000, Path(temporary) / "many")
        print(f"Peak memory of evaluate: {few:.0f} MB at 100 images, {many:.0f} MB at 2,000, ratio {many / few:.3f}")
        for (height, width), folder in folders.items():
            print(f"{height} x {width}, one process, {args.images} images: {one_process(folder)}")
            print(f"{height} x {width}, from files, two processes: {two_processes(folder)}")


if __name__ == "__main__":
    main()
