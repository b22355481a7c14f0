"""Set-up that benchmarks of training share: flags, a run as ``train`` prepares it, its loader, and a clock.

Importing this module puts the program's folder on ``sys.path``.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import cli
from data.dataset import Batch
from data.loading import training_loader
from data.sampler import EpochBatchSampler
from runtime.ranks import Ranks
from train_ultimate import begin_stage
from training.run import Run
from training.settings import Settings
from training.setup import prepare
from training.stages import Stage


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the flags that ``flags_of`` passes on to ``train``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    return parser


def flags_of(options: argparse.Namespace) -> list[str]:
    """Return flags of ``train`` for a whole network that trains, one batch per optimizer step."""
    return [
        *("--backbone", options.backbone, "--img-size", str(options.img_size), "--device", options.device),
        *("--batch-size", str(options.batch_size), "--accumulation-steps", "1", "--stage1-epochs", "0"),
    ]


def settings_of(*flags: str) -> Settings:
    """Return the settings of ``train`` with these flags."""
    return Settings.resolve(cli.parse(["train", *flags]).given)


def prepared(dataset: str | Path, directory: str | Path, *flags: str, ranks: Ranks | None = None) -> Run:
    """Return a run of ``train`` on the dataset, in the checkpoint folder, with these flags."""
    flags = ("--dataset-path", str(dataset), "--checkpoint-dir", str(directory), *flags)
    return prepare(cli.parse(["train", *flags]).given, ranks or Ranks())


def begun(run: Run) -> Stage:
    """Bring a run without stage 1 to the start of its stage, and return that."""
    (stage,) = run.stages
    begin_stage(run, stage)
    return stage


def loader_of(run: Run, num_images: int | None = None) -> DataLoader[Batch]:
    """Return the run's training loader, in this process unless ``--num-workers`` is given.

    Args:
        run: the run.
        num_images: number of training images in an epoch; None for all.
    """
    settings, pin_memory = run.settings, run.machine.device.type == "cuda"
    return training_loader(
        run.data.train_pairs[:num_images], settings.img_size, settings.batch_size, settings.seed,
        settings.num_workers or 0, pin_memory, window_size=run.data.window_size, share=run.share,
    )  # fmt: skip


class AlternatingLoader(DataLoader[Batch]):
    """Loader of the same batch for every window of ``train_epoch``, which runs something else between windows.

    ``train_epoch`` asks for the next batch when it has queued a window's step, so the time from one request to the next
    is one pass of its loop.

    Args:
        run: the run, on one rank or several.
        num_windows: number of windows to time, after some to warm up.
        other: runs what a window is compared with, on the same batch, and returns its seconds.

    Attributes:
        seconds: of each window, and of ``other`` right before it.
    """

    WARM_UP = 5  # windows

    def __init__(self, run: Run, num_windows: int, other: Callable[[Batch], float]) -> None:
        self.seconds: list[tuple[float, float]] = []
        self._run = run
        self._batch = next(iter(loader_of(run)))
        self._other = other
        self._num_windows = num_windows
        # The last window is not timed: nothing asks for a batch after it.
        num_samples = (num_windows + self.WARM_UP + 1) * run.data.window_size
        sampler = EpochBatchSampler(num_samples, run.settings.batch_size, 0, run.data.window_size, run.share)
        super().__init__([], batch_sampler=sampler)  # type: ignore[arg-type]  # read through __iter__ below only

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch types an iterator of its own
        device, ranks = self._run.machine.device, self._run.machine.ranks
        for number in range(self._num_windows + self.WARM_UP):
            ranks.all(True)  # ranks start together
            other = self._other(self._batch)
            ranks.all(True)
            synchronize(device)
            start = time.perf_counter()
            yield self._batch
            synchronize(device)
            if number >= self.WARM_UP:
                self.seconds.append((time.perf_counter() - start, other))
        yield self._batch


def seconds_of(call: Callable[[], object], device: torch.device) -> float:
    """Return how long a call takes, with all the work that it queues on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait for all work that is queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()
