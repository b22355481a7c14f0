"""Images per second of training: ours with everything on, against four ways of writing the loop; in turn, one process.

    python benchmarks/throughput.py --dataset-path data/CAMO [--backbone NAME] [--backbone-weights FILE]

- ours: ``train_epoch`` with gate, spike detector, weight average, recovery's bookkeeping and log, and a checkpoint
  after each epoch, written while the next one trains.
- bare: the shortest loop that makes the same updates: forward, backward, clip, fused AdamW. Same precision and layout.
- origin: the loop of camouflage repositories: fp32, NCHW, boundary weights computed again for every side output with a
  31 x 31 window, ``.item()`` after each batch.
- lightning, accelerate: the bare loop's work in these trainers, with their extras off.

All train every weight of equal networks on the same batches, and decode them in every epoch. A round is one epoch of
each, in an order of its own; medians over rounds are compared.
"""

import argparse
import contextlib
import io
import logging
import random
import statistics
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import lightning
import torch
import torch.nn.functional as F
from runs import begun, flags_of, loader_of, parser_of, prepared, seconds_of
from torch import Tensor
from torch.utils.data import DataLoader

from data.dataset import Batch
from data.loading import to_device
from losses import deep_supervision_loss
from runtime.machine import resolve_device
from train_ultimate import train_epoch
from training.run import Run
from training.state import EpochStats

LR, GRAD_CLIP = 1e-5, 0.5


class Contest:
    """Contest of several ways, each with a network, loader and optimizer of its own."""

    def __init__(self, options: argparse.Namespace, directory: Path) -> None:
        self.options, self.directory = options, directory

    def fresh(self, name: str) -> tuple[Run, DataLoader[Batch]]:
        options = self.options
        weights = ["--backbone-weights", options.backbone_weights] if options.backbone_weights else ["--no-pretrained"]
        flags = [*flags_of(options), *weights, "--lr", str(2 * LR), "--num-workers", str(options.num_workers)]
        run = prepared(options.dataset_path, self.directory / name, *flags)
        begun(run)
        return run, loader_of(run, options.images)

    def ours(self) -> Callable[[], None]:
        run, loader = self.fresh("ours")
        (stage,) = run.stages

        def epoch() -> None:
            train_epoch(run, stage, loader)
            run.state.progress.epoch += 1
            run.state.progress.window = 0
            run.state.epoch_stats = EpochStats()
            run.folder.store.save_epoch(run.state.progress.epoch, run.checkpoint(), is_best=False)

        return epoch

    def bare(self) -> Callable[[], None]:
        run, loader = self.fresh("bare")
        model = run.state.model
        parameters = list(model.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LR, fused=True)

        def epoch() -> None:
            for batch in loader:
                images, masks = to_device(batch, run.machine.device, run.machine.memory_format)
                with run.machine.precision.autocast():
                    outputs = model(images)
                deep_supervision_loss(outputs, masks, 0.5).backward()
                torch.nn.utils.clip_grad_norm_(parameters, GRAD_CLIP, foreach=True)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)

        return epoch

    def origin(self) -> Callable[[], None]:
        run, loader = self.fresh("origin")
        device = run.machine.device
        model = run.state.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, foreach=False)

        def epoch() -> None:
            total = 0.0
            for batch in loader:
                images = batch.images.to(device).float() / 255
                masks = batch.masks.to(device).float()
                loss = torch.zeros((), device=device)
                for logits in model(images):
                    logits = F.interpolate(logits, masks.shape[-2:], mode="bilinear", align_corners=False)
                    weights = 1 + 5 * (F.avg_pool2d(masks, 31, stride=1, padding=15) - masks).abs()
                    entropy = F.binary_cross_entropy_with_logits(logits, masks, reduction="none")
                    entropy = (weights * entropy).sum((2, 3)) / weights.sum((2, 3))
                    probabilities = logits.sigmoid()
                    overlap = (probabilities * masks * weights).sum((2, 3))
                    union = ((probabilities + masks) * weights).sum((2, 3))
                    loss = loss + (entropy + 1 - (overlap + 1) / (union - overlap + 1)).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP, foreach=False)
                optimizer.step()
                total += loss.item()

        return epoch

    def lightning(self) -> Callable[[], None]:
        run, loader = self.fresh("lightning")
        module = Module(run)
        precision: Any = {"bf16": "bf16-mixed", "fp16": "16-mixed", "fp32": "32-true"}[run.machine.precision.name]

        def epoch() -> None:
            trainer = lightning.Trainer(
                max_epochs=1, accelerator="gpu" if run.machine.device.type == "cuda" else "cpu", devices=1,
                precision=precision, logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False,
            )  # fmt: skip
            trainer.fit(module, loader)

        return epoch

    def accelerate(self) -> Callable[[], None]:
        run, loader = self.fresh("accelerate")
        mixed = {"bf16": "bf16", "fp16": "fp16", "fp32": "no"}[run.machine.precision.name]
        accelerator = accelerate.Accelerator(mixed_precision=mixed, cpu=run.machine.device.type == "cpu")
        optimizer: Any = torch.optim.AdamW(run.state.model.parameters(), lr=LR, fused=True)
        model, optimizer = accelerator.prepare(run.state.model, optimizer)

        def epoch() -> None:
            for batch in loader:
                images, masks = to_device(batch, run.machine.device, run.machine.memory_format)
                with accelerator.autocast():
                    outputs = model(images)
                accelerator.backward(deep_supervision_loss(outputs, masks, 0.5))
                accelerator.clip_grad_norm_(model.parameters(), GRAD_CLIP)
                optimizer.step()
                optimizer.zero_grad()

        return epoch


class Module(lightning.LightningModule):
    """LightningModule of the run's network."""

    def __init__(self, run: Run) -> None:
        super().__init__()
        self.model, self.memory_format = run.state.model, run.machine.memory_format

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Any:
        return to_device(batch, device, self.memory_format)

    def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
        images, masks = batch
        return deep_supervision_loss(self.model(images), masks, 0.5)

    def configure_gradient_clipping(self, *_: Any, **__: Any) -> None:
        """Clip: Lightning's own clipping refuses a fused optimizer."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), GRAD_CLIP, foreach=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=LR, fused=True)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--backbone-weights", help="start from these, with frozen statistics (default: random ones)")
    parser.add_argument("--images", type=int, default=160, help="training images in an epoch")
    parser.add_argument("--num-workers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--ways", nargs="+", default=["ours", "bare", "origin", "lightning", "accelerate"])
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as directory:
        contest = Contest(options, Path(directory))
        epochs: dict[str, Callable[[], None]] = {way: getattr(contest, way)() for way in options.ways}
        seconds: dict[str, list[float]] = {way: [] for way in epochs}
        for number in range(options.rounds + 1):
            for way in random.Random(number).sample(list(epochs), len(epochs)):
                with contextlib.redirect_stderr(io.StringIO()):
                    taken = seconds_of(epochs[way], resolve_device(options.device))
                if number:  # the first is for warming up
                    seconds[way].append(taken)
    rate = {way: options.images / statistics.median(times) for way, times in seconds.items()}
    print(f"{options.backbone}, {options.img_size} px, batch {options.batch_size}, {options.images} images an epoch, "
          f"median of {options.rounds} rounds")  # fmt: skip
    for way, images_per_second in rate.items():
        against = statistics.median(b / a for a, b in zip(seconds["ours"], seconds[way], strict=True))
        print(f"{way:12} {images_per_second:8.1f} images/s, ours / {way}: {against:.3f}")


if __name__ == "__main__":
    main()
