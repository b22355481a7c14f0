"""Images per second of a network on a CPU: exported to onnxruntime, exported to .pt2, and in this program; in turn.

    python benchmarks/export.py [--backbone NAME ...] [--zoom FACTOR ...] [--img-size PX] [--batch-size N] [--threads N]

Weights are random, which does not change the time. Formats are those that `train_ultimate.py export` writes.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands.export import ExportedNetwork, trace, write_onnx
from data.processes import keep_freed_memory
from models import NetworkSettings, build_network
from runtime.machine import on_device


def runners(
    name: str, img_size: int, zooms: list[float], images: torch.Tensor, threads: int
) -> dict[str, Callable[[], object]]:
    """Return the functions to compare, by name: each runs a forward pass of all images."""
    model = build_network(NetworkSettings(name, 64, img_size, tuple(zooms))).eval().requires_grad_(False)
    traced = trace(model, img_size, fixed_size=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        write_onnx(traced, path, {})
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Else its threads would spin between calls, on the cores that the next function needs.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    program, pixels = traced.program.module(), images.numpy()
    exported = ExportedNetwork(model, any_size=False)
    network = on_device(exported, torch.device("cpu"), torch.channels_last)  # the layout of `evaluate`
    channels_last = images.contiguous(memory_format=torch.channels_last)
    return {
        "torch": lambda: network(channels_last),
        ".pt2": lambda: program(images),
        "onnxruntime": lambda: session.run(None, {"images": pixels}),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", nargs="+", default=["tf_efficientnet_lite0", "resnet18", "pvt_v2_b2"])
    parser.add_argument("--zoom", nargs="+", type=float, default=[1.0])
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    images = torch.rand(options.batch_size, 3, options.img_size, options.img_size)
    print(
        f"{options.img_size} px, batch {options.batch_size}, {options.threads} threads, fp32, "
        f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, medians of {options.rounds}"
    )
    for name in options.backbone:
        compared = runners(name, options.img_size, options.zoom, images, options.threads)
        seconds: dict[str, list[float]] = {label: [] for label in compared}
        with torch.inference_mode():
            for _ in range(options.rounds + 2):
                for label, run in compared.items():
                    start = time.perf_counter()
                    run()
                    seconds[label].append(time.perf_counter() - start)
        rates = {label: options.batch_size / statistics.median(times[2:]) for label, times in seconds.items()}
        pairs = zip(seconds["torch"][2:], seconds["onnxruntime"][2:], strict=True)
        ratio = statistics.median(ours / theirs for ours, theirs in pairs)
        listed = ", ".join(f"{label} {rate:.1f}" for label, rate in rates.items())
        print(f"{name:24} images/s: {listed}; onnxruntime / torch x {ratio:.2f}")


if __name__ == "__main__":
    main()
