"""Gain from the decoded cache: images per second of the real loaders with it, against decoding in every epoch.

    python benchmarks/loader_cache.py --dataset-path DIR [--img-size PX] [--num-workers N] [--batch-size N] [--rounds N]

Training (shuffled, augmented) and validation (in order, not augmented) are timed separately. The loaders keep their
processes. The first epoch of each is not counted; after it, epochs with and without the cache alternate, and medians
are compared.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.cache import open_cache
from data.dataset import Batch
from data.layouts import find_subsets, training_pairs
from data.loading import training_loader, validation_loader, windows
from data.processes import num_cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", type=Path, required=True)
    parser.add_argument("--img-size", type=int, default=352)
    parser.add_argument("--num-workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache-dir", type=Path, help="folder to build the cache in (default: a temporary one)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    root = options.dataset_path
    pairs = training_pairs(find_subsets(root), root)
    workers = {"num_workers": options.num_workers, "pin_memory": False}

    with tempfile.TemporaryDirectory(dir=options.cache_dir) as folder:
        cache = open_cache(pairs, root, options.img_size, options.cache_dir or Path(folder), num_cores())
        print(f"{root}: {len(pairs)} pairs at {options.img_size} px, {options.num_workers} workers, batches of "
              f"{options.batch_size}, {options.rounds} epochs of each, images per second, medians")  # fmt: skip
        for name in ("training", "validation"):
            loaders: list[DataLoader[Batch]] = []
            for with_cache in (cache, None):
                given = pairs, options.img_size, options.batch_size
                if name == "training":
                    loaders.append(training_loader(*given, seed=0, **workers, cache=with_cache))
                else:
                    loaders.append(validation_loader(*given, **workers, cache=with_cache))
            for loader in loaders:
                images_per_second(loader, name, epoch=0)
            speeds = [[images_per_second(loader, name, epoch) for loader in loaders]
                      for epoch in range(1, options.rounds + 1)]  # fmt: skip
            cached, decoding = (statistics.median(column) for column in zip(*speeds, strict=True))
            ratio = statistics.median(one / other for one, other in speeds)
            print(f"{name}: with the cache {cached:.0f}, decoding {decoding:.0f}; ratio of the medians "
                  f"{cached / decoding:.2f}, median of the ratios of neighbouring epochs {ratio:.2f}")  # fmt: skip
            del loaders  # ends their processes


def images_per_second(loader: DataLoader[Batch], name: str, epoch: int) -> float:
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in batches(loader, name, epoch))
    return count / (time.perf_counter() - start)


def batches(loader: DataLoader[Batch], name: str, epoch: int) -> Iterator[Batch]:
    if name == "validation":
        yield from loader
    else:
        for window in windows(loader, epoch, 0):
            yield from window


if __name__ == "__main__":
    main()
