"""Where the time of a window goes, by torch.profiler, and the floor that the hardware's arithmetic sets.

    python benchmarks/window_profile.py --dataset-path data/CAMO [--backbone NAME] [--img-size PX] [--batch-size N]

Profiles windows of ``train_epoch`` as a run has them: loader, gate, detector, average, log. The floor is the time that
the floating-point operations of forward and backward pass would take at the rate of a large matrix product in the same
precision, measured here: what no way of writing the loop can beat.
"""

import argparse
import contextlib
import io
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.loading import training_loader
from train_ultimate import begin_stage, train_epoch
from training.run import Run
from training.setup import prepare
from training.state import EpochStats

KINDS = {  # the first that matches an operator's or a kernel's name
    "convolutions": r"conv|cudnn|implicit|fprop|dgrad|wgrad",
    "matrix products": r"addmm|::mm|bmm|gemm|linear|attention|flash",
    "normalisation": r"norm",
    "loss, average pooling": r"pool|binary_cross_entropy|sigmoid",
    "resizing": r"upsample|interpolate|grid_sample",
    "optimizer": r"adam",
    "many tensors at once: norm, clipping, weight average": r"_foreach|multi_tensor|lerp",
    "copies and casts": r"copy|cat|to_copy|clone|Memcpy|contiguous",
    "element by element": r"add|mul|sub|div|relu|threshold|clamp|where|elementwise|vectorized|fill|zero|sum|mean",
}


def kind_of(name: str) -> str:
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), "other")


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a matrix product of 4,096 (GPU) or 2,048 squared; the best of ten."""
    size = 4096 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--backbone", default="tf_efficientnet_lite0")
    parser.add_argument("--img-size", default="224")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stdout(io.StringIO()):
            run = prepare([
                *("train", "--dataset-path", options.dataset_path, "--checkpoint-dir", directory, "--no-pretrained"),
                *("--backbone", options.backbone, "--img-size", options.img_size, "--device", options.device),
                *("--batch-size", str(options.batch_size), "--accumulation-steps", "1", "--stage1-epochs", "0"),
                *("--spike-policy", "clip", "--num-workers", "1"),
            ])  # fmt: skip
        measure(run, options)


def measure(run: Run, options: argparse.Namespace) -> None:
    (stage,) = run.stages
    model = run.state.model
    begin_stage(run, stage)
    run.train_pairs = run.train_pairs[: options.windows * options.batch_size]
    cuda = run.device.type == "cuda"
    loader = training_loader(run.train_pairs, run.args.img_size, stage.batch_size, 0, 1, pin_memory=cuda)
    if options.compile:
        run.runner.compile(model.train(), run.args.img_size, run.precision, run.memory_format)

    def epoch() -> float:
        run.state.progress.window = 0
        run.state.progress.epoch += 1
        run.state.epoch_stats = EpochStats()
        if cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        with contextlib.redirect_stderr(io.StringIO()):
            train_epoch(run, stage, loader)
        if cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    epoch()
    seconds = min(epoch() for _ in range(3)) / len(loader)  # without the profiler, which costs time itself
    images = torch.zeros(options.batch_size, 3, run.args.img_size, run.args.img_size, device=run.device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    # Twice as many backwards. (The counter takes grouped convolutions for dense ones there.)
    flops = 3 * counter.get_total_flops()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        epoch()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == cuda:
            spent[kind_of(event.key)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[run.precision.name]
    peak = peak_rate(run.device, dtype)
    print(f"{options.backbone}, {options.img_size} px, batch {options.batch_size}, {run.precision.name}, {run.device}"
          f"{', compiled' if options.compile else ''}: {1000 * seconds:.1f} ms a window, "
          f"{options.batch_size / seconds:.1f} images/s")  # fmt: skip
    print(f"floor: {flops / 1e9:.1f} GFLOP at {peak / 1e12:.2f} TFLOP/s = {1000 * flops / peak:.1f} ms; "
          f"utilisation {flops / peak / seconds:.3f}")  # fmt: skip
    if cuda:
        busy = total / 1e6 / len(loader)
        print(f"device idle {max(0.0, 1 - busy / seconds):.3f} of the time; "
              f"at most {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB in use")  # fmt: skip
    for kind, microseconds in spent.most_common():
        print(f"   {microseconds / total:6.1%}  {microseconds / 1000 / len(loader):8.2f} ms  {kind}")


if __name__ == "__main__":
    main()
