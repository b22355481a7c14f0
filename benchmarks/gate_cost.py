"""Cost of gate, detector, recovery's bookkeeping and log: ``train_epoch`` against the same loop without them, in turn.

    python benchmarks/gate_cost.py [--backbone NAME] [--img-size PX] [--batch-size N] [--windows N] [--device cpu|cuda]

Both loops run the same batch through equal networks in the same precision (bf16 or fp32), clip, set the learning rate
and step a fused AdamW; neither averages weights. The bare loop's windows run between those of ``train_epoch``, in one
process. On CUDA every window is timed to the end of its work, and only those that take a snapshot may wait for the
device.
"""

import argparse
import copy
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from runs import AlternatingLoader, begun, flags_of, parser_of, prepared, seconds_of
from torch.nn.utils import clip_grad_norm_

from data.dataset import Batch
from data.loading import to_device
from models import CamouflageSegmenter
from train_ultimate import train_epoch
from training.optim import build_optimizer, set_learning_rates
from training.recovery import SNAPSHOT_EVERY
from training.run import Run
from training.window import batch_loss

GRAD_CLIP, LR = 0.5, 1e-5


def bare_loop(run: Run) -> Callable[[Batch], float]:
    """Return a function that trains a copy of the network on a batch, without a gate, and returns the seconds."""
    machine, model = run.machine, copy.deepcopy(run.state.model)
    assert isinstance(model, CamouflageSegmenter)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(model, model.backbone, run.settings.weight_decay)
    weight = torch.zeros((), device=machine.device)

    def window(batch: Batch) -> None:
        images, masks = to_device(batch, machine.device, machine.memory_format)
        batch_loss(model, images, masks, weight, machine.precision, scale=1.0).backward()
        clip_grad_norm_(parameters, GRAD_CLIP, foreach=True)
        set_learning_rates(optimizer, LR, run.settings.backbone_lr_scale)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return lambda batch: seconds_of(lambda: window(batch), machine.device)


class WatchedLoader(AlternatingLoader):
    """Alternating loader that counts the windows of ``train_epoch`` in which the host waited for a CUDA device."""

    num_waits = 0

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            if not torch.cuda.is_available():
                yield batch
                continue
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                torch.cuda.set_sync_debug_mode("warn")
                yield batch
                torch.cuda.set_sync_debug_mode("default")
            self.num_waits += any("called a synchronizing" in str(warning.message) for warning in caught)


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--windows", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--no-pretrained", "--ema-decay", "0", "--lr", str(2 * LR), "--grad-clip", str(GRAD_CLIP)]
        run = prepared("synthetic", directory, *flags_of(options), *flags)
        measure(run, options)


def measure(run: Run, options: argparse.Namespace) -> None:
    stage = begun(run)
    loader = WatchedLoader(run, options.windows, bare_loop(run))
    train_epoch(run, stage, loader)
    assert run.state.epoch_stats.num_skipped == 0
    precision, device = run.machine.precision.name, run.machine.device
    print(f"{options.backbone}, {options.img_size} px, batch {options.batch_size}, {precision}, {device}")
    gated, bare = zip(*loader.seconds, strict=True)
    for name, seconds in (("train_epoch", gated), ("bare", bare)):
        low, median, high = (1000 * quartile for quartile in statistics.quantiles(seconds, n=4))
        print(f"{name:>11}: median {median:.1f} ms, quartiles {low:.1f} to {high:.1f}, {len(seconds)} windows")
    if device.type == "cuda":
        print(f"windows that waited for the device: {loader.num_waits}, a snapshot is every {SNAPSHOT_EVERY}th")
        assert loader.num_waits <= (options.windows + loader.WARM_UP) // SNAPSHOT_EVERY
    ratio = statistics.median(gated) / statistics.median(bare)
    neighbours = statistics.median(one / other for one, other in loader.seconds)
    print(f"ratio of medians {ratio:.4f}; median of the ratios of neighbours {neighbours:.4f}")


if __name__ == "__main__":
    main()
