"""Time from a checkpoint to the first window's gradient, if it was written at the start or at 90 % of an epoch.

    python benchmarks/resume_time.py --dataset-path DIR [--rounds N]

Three ways, in turn: ours, whose sampler begins in mid-epoch; the plain one, which reads the batches that are done and
drops them; PyTorch Lightning. All have the same network, images, batch size and one loader process. Also printed:
whether the first window after the resume is the one that was due.
"""

import argparse
import itertools
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning
import torch
from runs import flags_of, loader_of, parser_of, prepared
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import Batch, CamouflageDataset, collate
from data.sampler import EpochBatchSampler, SampleKey
from losses import deep_supervision_loss
from training.feed import epoch_windows
from training.gate import StepGate
from training.run import Run
from training.window import Window, accumulate_gradients

Timing = tuple[float, bool]  # seconds, and whether the samples were those due


def due(run: Run, window: int) -> list[int]:
    """Return the sample indices of a window of the first epoch."""
    sampler = EpochBatchSampler(len(run.data.train_pairs), run.settings.batch_size, run.settings.seed)
    sampler.set_position(0, window)
    return [key.index for key in next(iter(sampler))]


def next_window(run: Run, loader: DataLoader[Batch]) -> Window:
    settings, state = run.settings, run.state
    gate = StepGate(state.model, state.detector, settings.grad_clip, run.machine.ranks, run.signals.received)
    return next(epoch_windows(run, run.stages[0], loader, gate))


def ours(prepare: Callable[..., Run], checkpoint: Path, window: int) -> Timing:
    start = time.perf_counter()
    run = prepare("--resume", str(checkpoint))
    first = next_window(run, loader_of(run))
    accumulate_gradients(run.state.model, first)
    return time.perf_counter() - start, first.sample_indices == due(run, window)


def skipping(prepare: Callable[..., Run], checkpoint: Path, window: int) -> Timing:
    start = time.perf_counter()
    run = prepare("--resume", str(checkpoint))
    run.state.progress.window = 0
    loader = loader_of(run)
    first = next_window(run, loader)
    batches = iter(loader)  # from the start of the epoch: the sampler's position
    for _ in range(window):
        next(batches)
    first = replace(first, batches=[next(batches)])
    accumulate_gradients(run.state.model, first)
    return time.perf_counter() - start, first.sample_indices == due(run, window)


class Module(lightning.LightningModule):
    """LightningModule of the same network and loss, which saves after some batches or stops in the first one."""

    def __init__(self, run: Run, save_after: int | None, path: Path) -> None:
        super().__init__()
        self.model, self.save_after, self.path = run.state.model, save_after, path
        self.seen: list[int] | None = None
        self.done = 0.0

    def training_step(self, batch: Batch, _index: int) -> Tensor:
        loss = deep_supervision_loss(self.model(batch.images.div(255)), batch.masks.float(), 0.0)
        if self.seen is None:
            self.seen = batch.indices.tolist()
        return loss

    def on_after_backward(self) -> None:
        self.done = self.done or time.perf_counter()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.save_after is None:
            self.trainer.should_stop = True
        elif self.trainer.global_step >= self.save_after:
            self.trainer.save_checkpoint(self.path)
            self.trainer.should_stop = True

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.0)


def lightning_loader(run: Run) -> DataLoader[Batch]:
    """Return a shuffling loader as users write it; every process draws the same order."""
    settings = run.settings
    dataset = Indexed(CamouflageDataset(run.data.train_pairs, settings.img_size, augmented=True, seed=settings.seed))
    generator = torch.Generator().manual_seed(0)
    return DataLoader(
        dataset, settings.batch_size, shuffle=True, num_workers=1, collate_fn=collate, generator=generator
    )


class Indexed(torch.utils.data.Dataset[Any]):
    """Dataset indexed by number, as Lightning expects it."""

    def __init__(self, dataset: CamouflageDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[SampleKey(0, index)]


def fit(run: Run, module: Module, checkpoint: Path | None, limit: int) -> None:
    trainer = lightning.Trainer(
        max_epochs=1, max_steps=limit, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, lightning_loader(run), ckpt_path=None if checkpoint is None else str(checkpoint))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.set_defaults(device="cpu")
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        compare(options, Path(folder))


def compare(options: argparse.Namespace, folder: Path) -> None:
    numbers = itertools.count()

    def prepare(*more: str) -> Run:
        flags = [*flags_of(options), "--no-pretrained", "--num-workers", "1", *more]
        return prepared(options.dataset_path, folder / f"run-{next(numbers)}", *flags)

    run = prepare()
    num_windows = len(loader_of(run))
    positions = {"start": 1, "90 %": round(0.9 * num_windows)}
    run.state.progress.stage = run.stages[0].number
    for name, window in positions.items():
        run.state.progress.window = run.state.progress.global_window = window
        path = run.folder.store.save_step(window, run.checkpoint())
        run.folder.store.wait()
        path.rename(folder / f"{name}.pth")
        fit(run, Module(run, window, folder / f"{name}.ckpt"), None, window)
    order = torch.randperm(len(run.data.train_pairs), generator=generator_of_shuffle()).tolist()

    def with_lightning(name: str, window: int) -> Timing:
        start = time.perf_counter()
        fresh = prepare()
        module = Module(fresh, None, folder / "unused.ckpt")
        fit(fresh, module, folder / f"{name}.ckpt", num_windows)
        expected = order[window * options.batch_size : (window + 1) * options.batch_size]
        return module.done - start, module.seen == expected

    ways: dict[str, Callable[[str, int], Timing]] = {
        "ours": lambda name, window: ours(prepare, folder / f"{name}.pth", window),
        "reading and skipping": lambda name, window: skipping(prepare, folder / f"{name}.pth", window),
        "PyTorch Lightning": with_lightning,
    }
    timings: dict[tuple[str, str], list[Timing]] = {}
    for _ in range(options.rounds):
        for name, window in positions.items():
            for way, function in ways.items():
                timings.setdefault((way, name), []).append(function(name, window))
    print(f"{num_windows} windows an epoch; median of {options.rounds} rounds, from the start of prepare()")
    for way in ways:
        start, late = (statistics.median(seconds for seconds, _ in timings[way, name]) for name in positions)
        right = all(correct for name in positions for _, correct in timings[way, name])
        which = "the window that was due" if right else "NOT the window that was due"
        print(f"{way:22} start {start:.2f} s, 90 % {late:.2f} s, ratio {late / start:.2f}; first window: {which}")


def generator_of_shuffle() -> torch.Generator:
    """Return the generator as RandomSampler finds it: the loader has drawn its workers' base seed from it already."""
    generator = torch.Generator().manual_seed(0)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator


if __name__ == "__main__":
    main()
