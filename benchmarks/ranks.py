"""Cost of several processes beyond compute: windows trained together, against the same passes with nothing sent.

    torchrun --standalone --nproc-per-node=2 benchmarks/ranks.py [--shard] [--backbone NAME] [--img-size PX]
        [--batch-size N] [--windows N] [--device cpu|cuda] [-- flags of train]
    python benchmarks/ranks.py ...                                  one process: images a second to compare with

Ranks take the two kinds in turn, all at the same time, so that both share the machine alike. Together: a window of
``train_epoch``, with gradients averaged (with --shard: weights gathered and gradients scattered), the packed all-reduce
of the verdict, clipping, step and log; no weight average. Alone: forward and backward pass of each rank for itself.
"""

import argparse
import shutil
import statistics
import tempfile

import torch
from runs import AlternatingLoader, begun, flags_of, parser_of, prepared, seconds_of

from data.dataset import Batch
from data.loading import to_device
from runtime.machine import resolve_device
from runtime.ranks import join
from runtime.sharding import whole_weights
from train_ultimate import train_epoch
from training.run import Run
from training.settings import Settings
from training.window import batch_loss


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("more", nargs="*", help="after --: more flags of train")
    options = parser.parse_args()
    ranks = join(resolve_device(options.device).type, Settings.rank_timeout)
    directory = ranks.from_first(tempfile.mkdtemp)
    flags = ["--no-pretrained", "--ema-decay", "0", *(["--shard"] if options.shard else []), *options.more]
    try:
        measure(prepared("synthetic", directory, *flags_of(options), *flags, ranks=ranks), options)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    ranks.close(done=True)


def measure(run: Run, options: argparse.Namespace) -> None:
    machine, model, ranks = run.machine, run.state.model, run.machine.ranks
    stage, weight = begun(run), torch.zeros((), device=machine.device)

    def passes(batch: Batch) -> None:
        images, masks = to_device(batch, machine.device, machine.memory_format)
        batch_loss(model, images, masks, weight, machine.precision, scale=1.0).backward()
        model.zero_grad(set_to_none=True)

    def alone(batch: Batch) -> float:
        with whole_weights(model):
            ranks.all(True)
            return seconds_of(lambda: passes(batch), machine.device)

    loader = AlternatingLoader(run, options.windows, alone)
    train_epoch(run, stage, loader)
    slowest = [
        (max(together for together, _ in window), max(alone for _, alone in window))
        for window in zip(*ranks.gather(loader.seconds), strict=True)
    ]
    if not ranks.is_first:
        return
    together, by_itself = (statistics.median(column) for column in zip(*slowest, strict=True))
    ratio = statistics.median(one / other for one, other in slowest)
    print(
        f"{ranks.size} ranks{', sharded' * ranks.shards}, {options.backbone}, {options.img_size} px, batch "
        f"{options.batch_size} a rank, {machine.precision.name}, {machine.device}: together {1000 * together:.1f} ms, "
        f"alone {1000 * by_itself:.1f} ms, median ratio {ratio:.3f}; {run.data.window_size / together:.1f} images/s"
    )


if __name__ == "__main__":
    main()
