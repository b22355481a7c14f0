"""What several processes cost beyond compute: windows trained together, against the same ones with nothing sent.

    torchrun --standalone --nproc-per-node=2 benchmarks/ranks.py [--shard] [--backbone NAME] [--img-size PX]
        [--batch-size N] [--windows N] [--device cpu|cuda] [-- flags of train]
    python benchmarks/ranks.py ...                                  one process: images a second to compare with

Ranks take the two kinds of windows in turn, all at the same time, so that both share the machine alike. Together: a
window as ``train_epoch`` runs it, gradients averaged (or, with --shard, weights gathered and gradients scattered), the
packed all-reduce of the verdict, clipping and the step. Alone: the same passes, each rank for itself, and nothing else.
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grads_with_norm_

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.loading import training_loader
from runtime.sharding import whole_weights
from train_ultimate import begin_stage
from training.batchnorm import BufferGuard
from training.feed import epoch_windows
from training.gate import gated_step, should_skip
from training.optim import gradient_norm, set_learning_rates
from training.run import Run
from training.setup import prepare
from training.window import Window, accumulate_gradients

GRAD_CLIP, LR, WARM_UP = 0.5, 1e-5, 5


def together(run: Run, window: Window, guard: BufferGuard) -> None:
    guard.begin_window()
    _, loss = run.runner.gradients(run.state.model, window, guard)
    parameters = [parameter for parameter in run.state.model.parameters() if parameter.requires_grad]
    grad_norm, found_inf = gradient_norm(parameters), torch.zeros_like(loss)
    loss, grad_norm, found_inf, _ = run.ranks.agree(
        loss, grad_norm, found_inf, run.stop.told(), guard.statistics, window.num_samples
    )
    spike, _ = run.state.detector.examine(loss, grad_norm, found_inf)
    clip_grads_with_norm_(parameters, GRAD_CLIP, grad_norm, foreach=True)
    gated_step(run.state.optimizer, should_skip(loss, grad_norm, found_inf, torch.zeros_like(spike)))
    run.state.optimizer.zero_grad(set_to_none=True)


def alone(run: Run, window: Window) -> None:
    accumulate_gradients(run.state.model, replace(window, total=None))
    run.state.model.zero_grad(set_to_none=True)


def seconds_of(run: Run, function: Callable[[], None]) -> float:
    """From when all ranks are there."""
    run.ranks.all(True)
    start = time.perf_counter()
    function()
    if run.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--shard", action="store_true")
    parser.add_argument("more", nargs="*", help="after --: more flags of train")
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp())
    run = prepare([
        *("train", "--dataset-path", "synthetic", "--checkpoint-dir", str(directory), "--no-pretrained"),
        *("--backbone", options.backbone, "--img-size", str(options.img_size), "--device", options.device),
        *("--batch-size", str(options.batch_size), "--accumulation-steps", "1", "--num-workers", "0"),
        *(["--shard"] if options.shard else []), *options.more,
    ])  # fmt: skip
    try:
        measure(run, options)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    run.ranks.close(done=True)


def measure(run: Run, options: argparse.Namespace) -> None:
    stage, sizes = run.stages[1], (options.img_size, options.batch_size)
    begin_stage(run, stage)
    run.state.model.train()
    run.state.progress.epoch = stage.first_epoch
    guard = BufferGuard(run.state.model)
    window_size = options.batch_size * run.ranks.size
    loader = training_loader(run.train_pairs, *sizes, 0, 0, False, window_size=window_size, share=run.share)
    window = next(epoch_windows(run, stage, loader, 1, guard))
    set_learning_rates(run.state.optimizer, LR, 1.0)
    kinds: dict[str, Callable[[], None]] = {
        "together": lambda: together(run, window, guard),
        "alone": lambda: alone(run, window),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(options.windows + WARM_UP):
        for name in sorted(kinds, reverse=number % 2 == 1):
            if name == "alone":
                with whole_weights(run.state.model):
                    seconds[name].append(seconds_of(run, kinds[name]))
            else:
                seconds[name].append(seconds_of(run, kinds[name]))
    slowest = {name: [max(ranks) for ranks in zip(*run.ranks.gather(seconds[name]), strict=True)] for name in kinds}
    medians = {name: statistics.median(values[WARM_UP:]) for name, values in slowest.items()}
    ratios = [a / b for a, b in zip(slowest["together"][WARM_UP:], slowest["alone"][WARM_UP:], strict=True)]
    medians_ms = {name: 1000 * median for name, median in medians.items()}
    print(
        f"{run.ranks.size} ranks{', sharded' * run.ranks.shards}, {options.backbone}, {options.img_size} px, batch "
        f"{options.batch_size} a rank, {run.precision.name}, {run.device}: together {medians_ms['together']:.1f} ms, "
        f"alone {medians_ms['alone']:.1f} ms, median ratio {statistics.median(ratios):.3f}; "
        f"{window_size / medians['together']:.1f} images/s"
    )


if __name__ == "__main__":
    main()
