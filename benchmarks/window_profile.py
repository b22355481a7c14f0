"""Breakdown of a window's time, by torch.profiler, and the floor that the hardware's arithmetic sets.

    python benchmarks/window_profile.py --dataset-path data/CAMO [--backbone NAME] [--img-size PX] [--batch-size N]

Profiles the windows of ``train_epoch`` as they are in a run: loader, gate, detector, average, log. The floor is the
time that the floating-point operations of forward and backward pass would take at the rate of a large matrix product in
the same precision, measured here. No way of writing the loop can beat it.
"""

import argparse
import re
import tempfile
from collections import Counter

import torch
from runs import begun, flags_of, loader_of, parser_of, prepared, seconds_of
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from train_ultimate import train_epoch
from training.run import Run
from training.state import EpochStats

KINDS = {  # an operator or kernel is of the first kind whose pattern its name matches
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
    """Return the floating-point operations per second of a square matrix product, the best of ten."""
    size = 4096 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(seconds_of(lambda: torch.mm(a, b), device) for _ in range(10))


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dataset-path", required=True)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        flags = ["--no-pretrained", "--spike-policy", "clip", "--num-workers", "1"]
        measure(prepared(options.dataset_path, directory, *flags_of(options), *flags), options)


def measure(run: Run, options: argparse.Namespace) -> None:
    model, device, precision = run.state.model, run.machine.device, run.machine.precision
    stage, cuda = begun(run), device.type == "cuda"
    loader = loader_of(run, options.windows * options.batch_size)
    if options.compile:
        run.runner.compile(model.train(), precision)

    def epoch() -> float:
        run.state.progress.window = 0
        run.state.progress.epoch += 1
        run.state.epoch_stats = EpochStats()
        return seconds_of(lambda: train_epoch(run, stage, loader), device)

    epoch()
    seconds = min(epoch() for _ in range(3)) / len(loader)  # without the profiler, which costs time itself
    images = torch.zeros(options.batch_size, 3, options.img_size, options.img_size, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    flops = 3 * counter.get_total_flops()  # the backward pass takes twice as many; the counter miscounts them
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as profiler:
        epoch()
    spent: Counter[str] = Counter()
    for event in profiler.key_averages():
        on_device = str(event.device_type).endswith("CUDA")
        if on_device == cuda:
            spent[kind_of(event.key)] += event.self_device_time_total if cuda else event.self_cpu_time_total
    total = sum(spent.values())

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision.name]
    peak = peak_rate(device, dtype)
    print(f"{options.backbone}, {options.img_size} px, batch {options.batch_size}, {precision.name}, {device}"
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
