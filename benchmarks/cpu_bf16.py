"""A CPU's training step in bf16, with layers as torch computes them, or in fp32 where that is faster; in turn.

python benchmarks/cpu_bf16.py [--backbone NAME ...] [--img-size PX] [--batch-size N] [--rounds N]

First all of them against none, then all against all but one kind: some depthwise convolutions of the backbone, the
decoder's GroupNorm.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from data.processes import keep_freed_memory
from losses import deep_supervision_loss
from models import backbone as backbone_module
from models import decoder as decoder_module
from models.network import build_model

LEFT_IN_BF16 = {
    "depthwise": (backbone_module, "speed_up_depthwise", lambda _: None),
    "GroupNorm": (decoder_module, "GroupNorm", nn.GroupNorm),
}


def step_of(name: str, img_size: int, batch_size: int, left: tuple[str, ...] = ()) -> Callable[[], float]:
    """Seconds of a forward and backward pass.

    Args:
        name: of the backbone.
        img_size: in pixels.
        batch_size: in images.
        left: kinds of layers that stay in bf16.
    """
    with ExitStack() as stack:
        for kind in left:
            stack.enter_context(mock.patch.object(*LEFT_IN_BF16[kind]))
        model = build_model(name, 64, img_size).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
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
        for left in (tuple(LEFT_IN_BF16), *((kind,) for kind in LEFT_IN_BF16)):
            in_bf16 = step_of(name, *sizes, left)
            times = [(in_bf16(), ours()) for _ in range(options.rounds + 3)][3:]
            before, after = (1000 * statistics.median(column) for column in zip(*times, strict=True))
            ratio = statistics.median(slow / fast for slow, fast in times)
            print(f"{name:24} {' and '.join(left):24} {before:7.1f} -> {after:7.1f} ms, x {ratio:.2f}")


if __name__ == "__main__":
    main()
