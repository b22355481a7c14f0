"""Predictions of a checkpoint's network, at the sizes of masks or photographs, as grey levels or masks."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from data.layouts import Pair
from data.loading import unit_range
from data.masks import MaskReading
from evaluation.images import PreparedBatch, images_to_predict, images_to_score
from evaluation.metrics import ByteArray
from evaluation.objects import Found
from evaluation.trained import network_of
from models.network import CamouflageSegmenter
from runtime.checkpoint import read_checkpoint
from runtime.folder import best_weights
from runtime.machine import Precision, memory_errors, on_device, resolve_device, resolve_precision

logger = logging.getLogger("train_ultimate")

Answer = TypeVar("Answer")

OUT_OF_MEMORY = "out of memory with one image: choose a smaller --img-size, or --device cpu"


@dataclass(frozen=True)
class TrainedNetwork:
    """Trained network, or an ensemble of the networks of several folds, and what their input has to look like."""

    models: tuple[CamouflageSegmenter, ...]  # in evaluation mode
    img_size: int  # side of the square input in pixels
    device: torch.device
    precision: Precision
    memory_format: torch.memory_format
    tta: bool  # test-time augmentation: average over each image and its mirror image
    held_out: tuple[tuple[str, ...], ...]  # validation images of each run, as paths below the dataset's folder
    masks: MaskReading | None = None  # how its run read the masks; None if it does not say

    def members(self) -> "list[TrainedNetwork]":
        """Return each network of the ensemble by itself."""
        parts = zip(self.models, self.held_out, strict=True)
        return [replace(self, models=(model,), held_out=(names,)) for model, names in parts]

    def describe(self, several: str = "networks, whose logits are averaged") -> str:
        """Say what computes, for the first line of a command; of an ensemble, how it is used."""
        number = f"{len(self.models)} {several}, " if len(self.models) > 1 else ""
        tta = ", with mirror images" if self.tta else ""
        return f"{number}{self.img_size} px, {self.precision.name} on {self.device}{tta}"

    def logits(self, images: Tensor) -> Tensor:
        """Return the finest logits, the mean over networks and mirror images.

        Shape:
            (B, 3, S, S) float in [0, 1] -> (B, 1, S, S) float32
        """
        with self.precision.products(), self.precision.autocast():
            found = [model(images)[-1].float() for model in self.models]
            if self.tta:
                found += [model(images.flip(-1))[-1].float().flip(-1) for model in self.models]
        return found[0] if len(found) == 1 else torch.stack(found).mean(0)


def load_network(
    path: Path, device_name: str, precision_name: str, img_size: int | None, tta: bool = False
) -> TrainedNetwork:
    """Load a checkpoint's network, with its averaged weights if it has them: those that were validated.

    Args:
        path: checkpoint of a run; or the folder of ``train --folds``, whose networks become an ensemble.
        device_name: auto, cpu or cuda.
        precision_name: auto, fp16, bf16, tf32 or fp32.
        img_size: side of the network's input in pixels; None for that of training.
        tta: average over each image and its mirror image.

    Raises:
        ValueError: it is no checkpoint of this program, holds only weights, or its weights do not fit this size; or
            the folds were not trained for images of one size.
    """
    files, device = best_weights(path) if path.is_dir() else [path], resolve_device(device_name)
    models, configs = zip(*(_model_and_config(file, img_size) for file in files), strict=True)
    settings = configs[0]["settings"]
    sizes = sorted({config["settings"]["img_size"] for config in configs})
    if len(sizes) > 1 and img_size is None:
        raise ValueError(f"{path}: its folds were trained at {sizes} pixels; choose one with --img-size")
    if path.is_dir() and len(files) < (settings.get("folds") or 0):
        logger.warning(f"{path}: {len(files)} of {settings['folds']} folds have weights so far")
    memory_format = torch.channels_last if settings.get("channels_last", True) else torch.contiguous_format
    return TrainedNetwork(
        tuple(on_device(model, device, memory_format) for model in models),
        img_size or settings["img_size"],
        device,
        resolve_precision(precision_name, device),
        memory_format,
        tta,
        tuple(tuple(config.get("validation", ())) for config in configs),
        MaskReading.from_dict(masks) if (masks := configs[0].get("masks")) else None,
    )


def _model_and_config(file: Path, img_size: int | None) -> tuple[CamouflageSegmenter, dict[str, Any]]:
    checkpoint = read_checkpoint(file)
    return network_of(checkpoint, file, img_size), checkpoint["config"]


def predict_pairs(
    network: TrainedNetwork, pairs: Sequence[Pair], batch_size: int, num_workers: int, stretch: bool = True
) -> Iterator[tuple[int, ByteArray | str]]:
    """Yield each pair's index with the prediction at its mask's size, or with the reason why there is none.

    Predictions are stretched as ``grey_levels`` says, or else probabilities times 255.
    """
    loader = images_to_score(pairs, network.img_size, batch_size, num_workers, network.device.type == "cuda")
    levels = grey_levels if stretch else probability_levels
    return _predict(network, loader, [pair.image for pair in pairs], levels)


def predict_images(
    network: TrainedNetwork, images: Sequence[Path], batch_size: int, num_workers: int, threshold: float = 0.5
) -> Iterator[tuple[int, Found | str]]:
    """Yield each image's index with what was found at its upright size, or with the reason why there is none.

    Args:
        network: that predicts.
        images: files.
        batch_size: images that go through the network at once.
        num_workers: processes that decode; 0 to decode in this one.
        threshold: The object is where the probability reaches it.
    """
    loader = images_to_predict(images, network.img_size, batch_size, num_workers, network.device.type == "cuda")
    return _predict(network, loader, images, lambda logits, size: found_in(logits, size, threshold))


@torch.inference_mode()
def _predict(
    network: TrainedNetwork,
    batches: Iterable[PreparedBatch],
    images: Sequence[Path],
    levels: Callable[[Tensor, tuple[int, int]], Answer],
) -> Iterator[tuple[int, Answer | str]]:
    parts = 1
    for batch in batches:
        inputs = unit_range(batch.images.to(network.device, non_blocking=True), network.memory_format)
        logits = None
        while logits is None:
            try:
                with memory_errors():
                    logits = torch.cat([network.logits(part) for part in inputs.tensor_split(min(parts, len(inputs)))])
            except torch.OutOfMemoryError:
                if parts >= len(inputs):
                    raise ValueError(OUT_OF_MEMORY) from None
                parts *= 2  # for later batches too
        for index, size, error, image_logits in zip(batch.indices, batch.sizes, batch.errors, logits, strict=True):
            if not error and not torch.isfinite(image_logits).all():  # waits for the device, as ``levels`` does
                error = f"{images[index]}: the network's output is not finite; try --precision fp32"
            yield index, error or _levels_that_fit(levels, image_logits, size)


def _levels_that_fit(
    levels: Callable[[Tensor, tuple[int, int]], Answer], logits: Tensor, size: tuple[int, int]
) -> Answer:
    """Compute grey levels, on the CPU if the photograph is too large for the device's memory."""
    try:
        with memory_errors():
            return levels(logits, size)
    except torch.OutOfMemoryError:
        pass
    return levels(logits.cpu(), size)


def found_in(logits: Tensor, size: tuple[int, int], threshold: float) -> Found:
    """Return one image's probabilities times 255, and where they reach a threshold. Waits for the device.

    The logits are resized bilinearly before the logistic function. Values are not stretched, so that an image without
    an object stays dark. Works in place, to save memory with large photographs.

    Shape:
        logits (1, h, w) -> (H, W) uint8
    """
    probabilities = _resized(logits, size).sigmoid_()
    mask = (probabilities >= threshold).cpu().numpy()
    return Found(probabilities.mul_(255).round_().to(torch.uint8).cpu().numpy(), mask)


def probability_levels(logits: Tensor, size: tuple[int, int]) -> ByteArray:
    """Return one image's probabilities times 255, see ``found_in``."""
    return _resized(logits, size).sigmoid_().mul_(255).round_().to(torch.uint8).cpu().numpy()


def grey_levels(logits: Tensor, size: tuple[int, int]) -> ByteArray:
    """Return one image's 8-bit prediction, as it is scored and saved. Waits for the device.

    As customary in this field: the logits are resized bilinearly, then the logistic function, then the values are
    stretched from the smallest to the largest.

    Shape:
        logits (1, h, w) -> (H, W) uint8
    """
    probabilities = _resized(logits, size).sigmoid_()
    low, high = probabilities.aminmax()
    stretched = torch.where(high > low, (probabilities - low) / (high - low), probabilities)
    return (stretched * 255).round().to(torch.uint8).cpu().numpy()


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Return resized logits, (1, h, w) -> (H, W), as a new tensor."""
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0, 0]
