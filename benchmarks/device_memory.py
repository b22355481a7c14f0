"""Memory of the README's presets for GPUs, measured on a CUDA device or else estimated.

    python benchmarks/device_memory.py [--device cpu|cuda]

Measured: the peak of two optimizer steps with a weight average, and 0.7 GB for the CUDA context. Estimated: the bytes
that the forward pass of two images keeps for the backward pass, scaled to the batch, a fifth more for temporary
tensors, 20 bytes a parameter (weights, gradients, two moments, average), and the context. Neither includes the cuDNN
workspace.
"""

import argparse

import torch
from runs import settings_of
from torch import Tensor

from losses import deep_supervision_loss
from models import NetworkSettings, build_network
from runtime.machine import Precision, on_device
from training.batchnorm import BufferGuard
from training.optim import Ema, build_optimizer

GB = 1e9
CONTEXT = 0.7 * GB
PRESETS = {
    "8 GB": "--batch-size 8 --accumulation-steps 1",
    "24 GB": "--zoom --batch-size 8 --accumulation-steps 1",
    "80 GB": "--backbone pvt_v2_b4 --img-size 448 --zoom --batch-size 16 --accumulation-steps 1",
}


def bytes_kept(network: torch.nn.Module, img_size: int, batch_size: int, precision: Precision) -> int:
    """Return the bytes of all storages that forward pass and loss keep, without the parameters."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    images = torch.rand(batch_size, 3, img_size, img_size).contiguous(memory_format=torch.channels_last)
    masks = (torch.rand(batch_size, 1, img_size, img_size) > 0.5).float()
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        with precision.autocast():
            side_logits = network(images)
        deep_supervision_loss(side_logits, masks, 0.5)
    return sum(sizes.values())


def peak(network: torch.nn.Module, img_size: int, batch_size: int, precision: Precision) -> int:
    """Return the most bytes that two steps reserve on the device."""
    torch.cuda.reset_peak_memory_stats()
    optimizer = build_optimizer(network, network.get_submodule("backbone"), 1e-4)
    average = Ema(network, 0.999)
    guard = BufferGuard(network)
    for _ in range(2):
        guard.begin_window()
        images = torch.rand(batch_size, 3, img_size, img_size, device="cuda")
        masks = (torch.rand(batch_size, 1, img_size, img_size, device="cuda") > 0.5).float()
        with precision.autocast():
            side_logits = network(images.contiguous(memory_format=torch.channels_last))
        deep_supervision_loss(side_logits, masks, 0.5).backward()
        optimizer.step()
        average.update(network, guard.at_start)
    return torch.cuda.max_memory_reserved()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    device = parser.parse_args().device
    precision = Precision("bf16", device)
    for name, flags in PRESETS.items():
        settings = settings_of("--dataset-path", "x", "--no-pretrained", *flags.split())
        network = build_network(NetworkSettings.of(settings.to_dict()))
        network = on_device(network, torch.device(device), torch.channels_last)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        if device == "cuda":
            total, how = peak(network, settings.img_size, settings.batch_size, precision) + CONTEXT, "measured"
        else:
            kept = bytes_kept(network, settings.img_size, 2, precision) / 2
            total, how = 1.2 * kept * settings.batch_size + 20 * parameters + CONTEXT, "estimated"
        print(f"{name:6} {total / GB:5.1f} GB, {how}; {parameters / 1e6:.1f} M parameters: {flags}")


if __name__ == "__main__":
    main()
