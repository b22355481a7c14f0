"""Cost of training by image size, batch, backbone and size of the dataset: milliseconds per image of whole epochs.

    python benchmarks/scaling.py --dataset-path data/CAMO [--series NAME ...] [--images N] [--rounds N]

An epoch trains all weights, validates, logs and saves, as in ``run_stage``. In each series one setting changes; its
values take turns, and medians over rounds are compared with the first of them. Larger datasets are made of links to the
same photographs.
"""

import argparse
import contextlib
import io
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import write_links
from runs import begun, flags_of, loader_of, prepared, seconds_of
from torch.utils.flop_counter import FlopCounterMode

from data.loading import validation_loader
from train_ultimate import finish_epoch, train_epoch, validate

Case = dict[str, Any]
BASE: Case = {"backbone": "tf_efficientnet_lite0", "img_size": 224, "batch_size": 8}
SMALL: Case = {"backbone": "resnet10t", "img_size": 96, "batch_size": 8}  # overheads show most in small networks
SERIES: dict[str, list[Case]] = {
    "img-size": [{**BASE, "img_size": size} for size in (160, 224, 320, 448)],
    "batch-size": [{**BASE, "batch_size": size} for size in (2, 4, 8, 16)],
    "backbone": [{**BASE, "backbone": name} for name in ("resnet10t", BASE["backbone"], "resnet26", "pvt_v2_b1")],
    "images": [{**SMALL, "images": factor} for factor in (1, 3, 10)],
}


def epochs_of(case: Case, dataset: Path, directory: Path, device: str) -> tuple[Callable[[], float], str]:
    """Return a function that trains an epoch and returns its seconds per image; and the network's size in words."""
    flags = flags_of(argparse.Namespace(**case, device=device))
    run = prepared(dataset, directory, *flags, "--no-pretrained", "--num-workers", "1")
    stage, settings, device_in_use = begun(run), run.settings, run.machine.device
    loader = loader_of(run)
    val_loader = validation_loader(
        run.data.val_pairs, settings.img_size, stage.batch_size, num_workers=1, pin_memory=device_in_use.type == "cuda"
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run.state.model.eval()(torch.zeros(1, 3, settings.img_size, settings.img_size, device=device_in_use))
    millions = sum(parameter.numel() for parameter in run.state.model.parameters()) / 1e6
    size = f"{millions:.1f} M parameters, {counter.get_total_flops() / 2e9:.2f} GMACs per image"

    def epoch() -> None:
        train_epoch(run, stage, loader)
        finish_epoch(run, stage, validate(run, val_loader))

    return lambda: seconds_of(epoch, device_in_use) / len(run.data.train_pairs), size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", type=Path, required=True)
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--images", type=int, default=96, help="images of the dataset, a tenth of them to validate on")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    for name in options.series:
        with tempfile.TemporaryDirectory() as temporary:
            folder, cases = Path(temporary), []
            for number, case in enumerate(SERIES[name]):
                images = options.images * case.get("images", 1)
                dataset = folder / f"data-{images}"
                if not dataset.exists():
                    write_links(options.dataset_path, dataset, images)
                cases.append(epochs_of(case, dataset, folder / f"run-{number}", options.device))
            rows: list[list[float]] = [[] for _ in cases]
            for round_number in range(options.rounds + 1):
                for row, (epoch, _) in zip(rows, cases, strict=True):
                    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                        seconds = epoch()
                    if round_number:  # the first is for warming up
                        row.append(1000 * seconds)
        print(f"{name}, {options.rounds} epochs of {options.images} images each:")
        for case, row, (_, size) in zip(SERIES[name], rows, cases, strict=True):
            ratio = statistics.median(ours / first for ours, first in zip(row, rows[0], strict=True))
            value, milliseconds = case[name.replace("-", "_")], statistics.median(row)
            print(f"   {value:>22} {milliseconds:8.1f} ms per image, x {ratio:5.3f}   ({size})")


if __name__ == "__main__":
    main()
