"""Speed of a training step in bf16 on a CPU, with slow layers computed in fp32 against all layers in bf16, in turn.

    python benchmarks/cpu_bf16.py [--backbone NAME ...] [--img-size PX] [--batch-size N] [--rounds N]

Two kinds of layers are computed in fp32: some depthwise convolutions of the backbone, and the decoder's GroupNorm. Both
are put back into bf16, then one at a time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.processes import keep_freed_memory
from losses import deep_supervision_loss
from models import NetworkSettings, build_network
from runtime.machine import on_device

IN_FP32 = {"depthwise": nn.Conv2d, "GroupNorm": nn.GroupNorm}


def put_into_bf16(model: nn.Module, kind: str) -> None:
    """Give layers back the class of torch or timm that this program's is derived from."""
    for layer in model.modules():
        if isinstance(layer, IN_FP32[kind]):
            layer.__class__ = next(
                parent for parent in type(layer).__mro__ if not parent.__module__.startswith("models.")
            )


def step_of(name: str, img_size: int, batch_size: int, in_bf16: tuple[str, ...] = ()) -> Callable[[], float]:
    """Return a function that runs a forward and backward pass, and returns the seconds.

    Args:
        name: timm name of the backbone.
        img_size: side of the images in pixels.
        batch_size: number of images.
        in_bf16: kinds of layers to put back into bf16.
    """
    model = build_network(NetworkSettings(name, 64, img_size))
    for kind in in_bf16:
        put_into_bf16(model, kind)
    model = on_device(model, torch.device("cpu"), torch.channels_last)
    images = torch.rand(batch_size, 3, img_size, img_size).to(memory_format=torch.channels_last)
    masks = (torch.rand(batch_size, 1, img_size, img_size) > 0.5).float()

    def step() -> float:
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            side_logits = model(images)
        deep_supervision_loss(side_logits, masks, 0.5).backward()
        model.zero_grad()
        return time.perf_counter() - start

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ["tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_atto", "pvt_v2_b1"]
    parser.add_argument("--backbone", nargs="+", default=names)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    keep_freed_memory()
    print(f"{options.img_size} px, batch {options.batch_size}, medians of {options.rounds}")
    sizes = options.img_size, options.batch_size
    for name in options.backbone:
        ours = step_of(name, *sizes)
        for kinds in (tuple(IN_FP32), *((kind,) for kind in IN_FP32)):
            in_bf16 = step_of(name, *sizes, kinds)
            times = [(in_bf16(), ours()) for _ in range(options.rounds + 3)][3:]
            before, after = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(slow / fast for slow, fast in times)
            print(f"{name:24} {' and '.join(kinds):24} {before:7.1f} -> {after:7.1f} ms, x {ratio:.2f}")


if __name__ == "__main__":
    main()
