"""Memory of the README's presets on a GPU: the peak that torch reserves in two steps, and 0.7 GB for the CUDA context.

    python benchmarks/device_memory.py

Without a GPU, the same of torch's allocator alone, without cuDNN's workspaces:

    python -m tests.nullcuda --memory 80000000000 --no-arithmetic --program benchmarks/device_memory.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from commands import cli
from losses import deep_supervision_loss
from models import NetworkSettings, build_network
from runtime.machine import Precision, on_device, resolve_precision
from training.batchnorm import BufferGuard
from training.optim import Ema, build_optimizer
from training.settings import Settings

GB = 1e9
CONTEXT = 0.7 * GB
PRESETS = {
    "8 GB": "--batch-size 8 --accumulation-steps 1",
    "24 GB": "--zoom --batch-size 8 --accumulation-steps 1",
    "80 GB": "--backbone pvt_v2_b4 --img-size 448 --zoom --batch-size 16 --accumulation-steps 1",
}
OTHERS = {
    "frozen": "--frozen-levels 1 --batch-size 8 --accumulation-steps 1",
    "checkpointing": "--gradient-checkpointing --batch-size 8 --accumulation-steps 1",
    "resnet50": "--backbone resnet50 --batch-size 8 --accumulation-steps 1",
    "resnet50, frozen": "--backbone resnet50 --frozen-levels 1 --batch-size 8 --accumulation-steps 1",
}


def peak(flags: str, precision: Precision) -> int:
    """Return the most bytes of a GPU that two optimizer steps of stage 2 take, the context included.

    The backbone is treated as a pretrained one, whose normalisation statistics are fixed; its values do not matter.
    """
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved()
    settings = Settings.resolve(cli.parse(["train", "--dataset-path", "x", *flags.split()]).given)
    network = build_network(NetworkSettings.of(settings.to_dict()))
    network = on_device(network, torch.device("cuda"), torch.channels_last).train()
    network.set_backbone_frozen(False)
    if settings.gradient_checkpointing:
        network.checkpoint_gradients()
    optimizer = build_optimizer(network, network.backbone, 1e-4)
    average = Ema(network, 0.999)
    guard = BufferGuard(network)
    shape = settings.batch_size, 3, settings.img_size, settings.img_size
    for _ in range(2):
        guard.begin_window()
        images = torch.rand(shape, device="cuda").contiguous(memory_format=torch.channels_last)
        masks = (torch.rand(shape, device="cuda")[:, :1] > 0.5).float()
        with precision.autocast():
            side_logits = network(images)
        deep_supervision_loss(side_logits, masks, torch.zeros((), device="cuda")).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(network, guard.at_start)
    return int(torch.cuda.max_memory_reserved() - before + CONTEXT)


def main() -> None:
    precision = resolve_precision("auto", torch.device("cuda"))
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {precision.name}")
    for name, flags in {**PRESETS, **OTHERS}.items():
        print(f"{name:17} {peak(flags, precision) / GB:5.1f} GB: {flags}")


if __name__ == "__main__":
    main()
