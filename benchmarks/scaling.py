"""What training costs against image size, batch, backbone and data-set size: milliseconds an image, of whole epochs.

    python benchmarks/scaling.py --dataset-path data/CAMO [--series NAME ...] [--images N] [--rounds N]

An epoch is what ``run_stage`` makes of it: all weights trained, then validation, report and checkpoint. In each series
one thing changes; its settings take turns, and medians over rounds are compared with the first of them. Links to the
same photographs make up the larger data sets.
"""

import argparse
import contextlib
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from memory import write_links

from data.loading import training_loader, validation_loader
from train_ultimate import begin_stage, finish_epoch, train_epoch, validate
from training.setup import prepare

Settings = dict[str, str]
BASE: Settings = {"backbone": "tf_efficientnet_lite0", "img-size": "224", "batch-size": "8"}
SMALL: Settings = {"backbone": "resnet10t", "img-size": "96", "batch-size": "8"}  # where overheads would show
SERIES: dict[str, list[Settings]] = {
    "img-size": [{**BASE, "img-size": size} for size in ("160", "224", "320", "448")],
    "batch-size": [{**BASE, "batch-size": size} for size in ("2", "4", "8", "16")],
    "backbone": [{**BASE, "backbone": name} for name in ("resnet10t", BASE["backbone"], "resnet26", "pvt_v2_b1")],
    "images": [{**SMALL, "images": f"{factor}x"} for factor in (1, 3, 10)],
}


def epochs_of(settings: Settings, dataset: Path, directory: Path, device: str) -> tuple[Callable[[], float], str]:
    """A function that trains an epoch and returns its seconds an image; and what the network amounts to."""
    flags = [text for name, value in settings.items() if name != "images" for text in (f"--{name}", value)]
    with contextlib.redirect_stdout(io.StringIO()):
        run = prepare([
            *("train", "--dataset-path", str(dataset), "--checkpoint-dir", str(directory), "--device", device),
            *("--no-pretrained", "--accumulation-steps", "1", "--stage1-epochs", "0", "--num-workers", "1", *flags),
        ])  # fmt: skip
    (stage,) = run.stages
    begin_stage(run, stage)
    workers = {"num_workers": 1, "pin_memory": run.device.type == "cuda"}
    loader = training_loader(run.train_pairs, run.args.img_size, stage.batch_size, 0, **workers)
    val_loader = validation_loader(run.val_pairs, run.args.img_size, stage.batch_size, **workers)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.state.model.eval()(torch.zeros(1, 3, run.args.img_size, run.args.img_size, device=run.device))
    millions = sum(parameter.numel() for parameter in run.state.model.parameters()) / 1e6
    about = f"{millions:.1f} M parameters, {counter.get_total_flops() / 2e9:.2f} GMACs an image"

    def epoch() -> float:
        start = time.perf_counter()
        train_epoch(run, stage, loader)
        finish_epoch(run, stage, validate(run, val_loader))
        return (time.perf_counter() - start) / len(run.train_pairs)

    return epoch, about


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", type=Path, required=True)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--images", type=int, default=96, help="of the data set, a tenth of them to validate on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    for name in options.series:
        with tempfile.TemporaryDirectory() as temporary:
            folder, cases = Path(temporary), []
            for number, settings in enumerate(SERIES[name]):
                images = options.images * int(settings.get("images", "1x")[:-1])
                dataset = folder / f"data-{images}"
                if not dataset.exists():
                    write_links(options.dataset_path, dataset, images)
                cases.append(epochs_of(settings, dataset, folder / f"run-{number}", options.device))
            rows: list[list[float]] = [[] for _ in cases]
            for round_number in range(options.rounds + 1):
                for row, (epoch, _) in zip(rows, cases, strict=True):
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        seconds = epoch()
                    if round_number:  # the first is for warming up
                        row.append(1000 * seconds)
        print(f"{name}, {options.rounds} epochs of {options.images} images each:")
        for settings, row, (_, about) in zip(SERIES[name], rows, cases, strict=True):
            ratio = statistics.median(ours / first for ours, first in zip(row, rows[0], strict=True))
            print(f"   {settings[name]:>22} {statistics.median(row):8.1f} ms an image, x {ratio:5.3f}   ({about})")


if __name__ == "__main__":
    main()
