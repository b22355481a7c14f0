"""Time from a checkpoint to the first window's gradient, for one written at 90 % of an epoch and one at its start.

    python benchmarks/resume_time.py --dataset-path DIR [--rounds N]

Three ways, alternating: ours, whose sampler begins in mid-epoch; the plain one, which reads the batches that are done
and throws them away; PyTorch Lightning. All with the same network, images, batch size and one loader process. Told,
too: whether the first window after the resume is the one that was due.
"""

import argparse
import contextlib
import io
import logging
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import lightning
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import Batch, CamouflageDataset, collate
from data.loading import training_loader
from data.sampler import EpochBatchSampler, SampleKey
from losses import deep_supervision_loss
from training.batchnorm import BufferGuard
from training.feed import epoch_windows
from training.run import Run
from training.setup import prepare
from training.window import Window, accumulate_gradients

IMG_SIZE, BATCH_SIZE = 224, 8
Timing = tuple[float, bool]  # seconds, and whether the samples were those due


def arguments(dataset: str, directory: str, *more: str) -> list[str]:
    return [
        *("train", "--dataset-path", dataset, "--checkpoint-dir", directory, "--no-pretrained", "--device", "cpu"),
        *("--backbone", "tf_efficientnet_lite0", "--img-size", str(IMG_SIZE), "--batch-size", str(BATCH_SIZE)),
        *("--accumulation-steps", "1", "--num-workers", "1", *more),
    ]


def loader_of(run: Run) -> DataLoader[Batch]:
    return training_loader(run.train_pairs, IMG_SIZE, BATCH_SIZE, run.args.seed, 1, pin_memory=False)


def due(run: Run, window: int) -> list[int]:
    sampler = EpochBatchSampler(len(run.train_pairs), BATCH_SIZE, run.args.seed)
    sampler.set_position(0, window)
    return [key.index for key in next(iter(sampler))]


def windows_of(run: Run, loader: DataLoader[Batch]) -> Window:
    return next(epoch_windows(run, run.stages[0], loader, len(loader), BufferGuard(run.state.model)))


def ours(dataset: str, directory: str, checkpoint: Path, window: int) -> Timing:
    start = time.perf_counter()
    run = prepare(arguments(dataset, directory, "--resume", str(checkpoint)))
    first = windows_of(run, loader_of(run))
    accumulate_gradients(run.state.model, first)
    return time.perf_counter() - start, first.sample_indices == due(run, window)


def skipping(dataset: str, directory: str, checkpoint: Path, window: int) -> Timing:
    start = time.perf_counter()
    run = prepare(arguments(dataset, directory, "--resume", str(checkpoint)))
    run.state.progress.window = 0
    loader = loader_of(run)
    first = windows_of(run, loader)
    batches = iter(loader)  # from the start of the epoch, as the sampler was left there
    for _ in range(window):
        next(batches)
    first = Window(**{**vars(first), "batches": [next(batches)]})
    accumulate_gradients(run.state.model, first)
    return time.perf_counter() - start, first.sample_indices == due(run, window)


class Module(lightning.LightningModule):
    """The same network, loss and data as a LightningModule; stops in its first batch, or saves after one."""

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
    """A shuffling loader as users write it; the order is drawn from a generator seeded alike in each process."""
    pairs = run.train_pairs
    keys = CamouflageDataset(pairs, IMG_SIZE, augmented=True, seed=run.args.seed)
    generator = torch.Generator().manual_seed(0)
    return DataLoader(Indexed(keys), BATCH_SIZE, shuffle=True, num_workers=1, collate_fn=collate, generator=generator)


class Indexed(torch.utils.data.Dataset[Any]):
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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as _:
        run = prepare(arguments(options.dataset_path, f"{folder}/first"))
        num_windows = len(loader_of(run))
        positions = {"start": 1, "90 %": round(0.9 * num_windows)}
        run.state.progress.stage = 1
        for name, window in positions.items():
            run.state.progress.window = run.state.progress.global_window = window
            run.store.save_step(window, run.checkpoint())
            run.store.wait()
            (Path(folder) / "first" / f"step_{window:08d}.pth").rename(Path(folder) / f"{name}.pth")
            fit(run, Module(run, window, Path(folder) / f"{name}.ckpt"), None, window)
        order = torch.randperm(len(run.train_pairs), generator=generator_of_shuffle()).tolist()
        ways: dict[str, Callable[[str, int, str], Timing]] = {
            "ours": lambda name, window, d: ours(options.dataset_path, d, Path(folder) / f"{name}.pth", window),
            "reading and skipping": lambda name, window, d: skipping(
                options.dataset_path, d, Path(folder) / f"{name}.pth", window
            ),
        }

        def lightnings(name: str, window: int, directory: str) -> Timing:
            start = time.perf_counter()
            fresh = prepare(arguments(options.dataset_path, directory))
            module = Module(fresh, None, Path(folder) / "unused.ckpt")
            fit(fresh, module, Path(folder) / f"{name}.ckpt", num_windows)
            expected = order[window * BATCH_SIZE : (window + 1) * BATCH_SIZE]
            return module.done - start, module.seen == expected

        ways["PyTorch Lightning"] = lightnings
        timings: dict[tuple[str, str], list[Timing]] = {}
        for number in range(options.rounds):
            for name, window in positions.items():
                for way, function in ways.items():
                    directory = f"{folder}/{number}-{name}-{way}".replace(" ", "")
                    timings.setdefault((way, name), []).append(function(name, window, directory))
    print(f"{num_windows} windows an epoch; median of {options.rounds} rounds, from the start of prepare()")
    for way in ways:
        start, late = (statistics.median(seconds for seconds, _ in timings[way, name]) for name in positions)
        right = all(correct for name in positions for _, correct in timings[way, name])
        which = "the window that was due" if right else "NOT the window that was due"
        print(f"{way:22} start {start:.2f} s, 90 % {late:.2f} s, ratio {late / start:.2f}; first window: {which}")


def generator_of_shuffle() -> torch.Generator:
    """Torch's RandomSampler draws its permutation from the loader's generator, after the loader's own base seed."""
    generator = torch.Generator().manual_seed(0)
    torch.empty((), dtype=torch.int64).random_(generator=generator)
    return generator


if __name__ == "__main__":
    main()
