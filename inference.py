"""From a checkpoint to predictions: the network as it was validated, and the field's way from logits to grey levels."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from builders import build_network, memory_format_of, on_device, settings_of
from data.evaluation import images_to_score
from data.layouts import Pair
from data.loading import unit_range
from metrics import ByteArray
from models import CamouflageSegmenter
from training.checkpoint import read_checkpoint
from training.precision import Precision, resolve_device, resolve_precision
from training.state import load_weights


@dataclass(frozen=True)
class TrainedNetwork:
    """A network ready to be used, and how its images are to be prepared."""

    model: CamouflageSegmenter  # in evaluation mode
    img_size: int
    device: torch.device
    precision: Precision
    memory_format: torch.memory_format
    tta: bool  # test-time augmentation: the mean over each image and its mirror image

    def logits(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) float in [0, 1] -> (B, 1, S, S) float32."""
        with self.precision.autocast():
            logits = self.model(images)[-1].float()
            if self.tta:
                logits = (logits + self.model(images.flip(-1))[-1].float().flip(-1)) / 2
        return logits


def load_network(
    path: Path, device_name: str, precision_name: str, img_size: int | None, tta: bool = False
) -> TrainedNetwork:
    """The averaged weights of a checkpoint, where it has them: those that were validated.

    Args:
        path: a checkpoint of ``train``.
        device_name: auto, cpu or cuda.
        precision_name: auto, fp16, bf16 or fp32.
        img_size: side of the network's input; None for that of training.
        tta: average over each image and its mirror image.

    Raises:
        ValueError: no checkpoint of this program, one that holds weights alone, or weights that fit no other size.
    """
    checkpoint = read_checkpoint(path)
    if "config" not in checkpoint:
        raise ValueError(
            f"{path}: holds weights alone and does not tell which network they are of; "
            f"use a checkpoint of a run, such as best_model.pth"
        )
    settings = settings_of(checkpoint["config"]["settings"])
    settings.img_size = img_size or settings.img_size
    device = resolve_device(device_name)
    memory_format = memory_format_of(settings)
    model = on_device(build_network(settings, load_weights=False), device, memory_format)
    average = checkpoint.get("ema")
    load_weights(model, checkpoint["model"] if average is None else average["model"])
    return TrainedNetwork(
        model.eval(), settings.img_size, device, resolve_precision(precision_name, device), memory_format, tta
    )


@torch.inference_mode()
def predict_pairs(
    network: TrainedNetwork, pairs: Sequence[Pair], batch_size: int, num_workers: int
) -> Iterator[tuple[int, ByteArray | str]]:
    """For each pair, in order: its index, and the prediction at its mask's size, or why there is none."""
    loader = images_to_score(pairs, network.img_size, batch_size, num_workers, network.device.type == "cuda")
    for batch in loader:
        images = unit_range(batch.images.to(network.device, non_blocking=True), network.memory_format)
        logits = network.logits(images)
        for index, size, error, image_logits in zip(batch.indices, batch.sizes, batch.errors, logits, strict=True):
            if not error and not torch.isfinite(image_logits).all():  # a host sync, as is grey_levels
                error = f"{pairs[index].image}: the network's output is not finite; try --precision fp32"
            yield index, error or grey_levels(image_logits, size)


def grey_levels(logits: Tensor, size: tuple[int, int]) -> ByteArray:
    """Logits of one image, (1, h, w), as the 8-bit prediction that is scored and saved, (H, W).

    The field's way: resized as logits, bilinearly; then the logistic function; then stretched from the least to the
    largest value. A host sync.
    """
    resized = F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0, 0]
    probabilities = resized.sigmoid()
    low, high = probabilities.aminmax()
    stretched = torch.where(high > low, (probabilities - low) / (high - low), probabilities)
    return (stretched * 255).round().to(torch.uint8).cpu().numpy()
