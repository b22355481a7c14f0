"""Trained networks from their checkpoints: the entry point for other programs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import fixed_size, upright_rgb
from models.network import CamouflageSegmenter, NetworkSettings, build_network
from runtime.checkpoint import made_by_modified_copy, read_checkpoint
from runtime.tensors import first_difference


@dataclass(frozen=True)
class Transform:
    """Preparation of photographs as in training: upright by EXIF, RGB, resized bilinearly to a square."""

    img_size: int  # side S of the network's input in pixels
    device: torch.device

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """Return a batch of one photograph, or of several, of any sizes and modes.

        Shape:
            -> (B, 3, S, S) float32 in [0, 1] on ``device``; B is 1 for one photograph
        """
        batch = [images] if isinstance(images, Image.Image) else images
        pixels = np.stack([fixed_size(upright_rgb(image), self.img_size) for image in batch])
        return torch.from_numpy(pixels).to(self.device).to(torch.float32).div(255)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[CamouflageSegmenter, Transform]:
    """Load the network of a checkpoint, in evaluation mode, and the transform that prepares photographs for it.

    The weights are the averaged ones if the checkpoint has them: those that were validated. The file is all it takes,
    and nothing in it is executed.

    Args:
        path: ``best_model.pth``, or any other checkpoint of a run.
        device: where the network computes, and where the transform puts its batches.

    Returns:
        network, transform. ``network(transform(photograph))[-1]`` are logits, (1, 1, S, S): resize them to the
        photograph's size, then apply the logistic function.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint of this program, holds only weights, is damaged, or its weights are not finite.
    """
    with open(path, "rb"):  # an OSError if the file is missing: read_checkpoint's ValueErrors are about its content
        pass
    checkpoint = read_checkpoint(Path(path))
    model = network_of(checkpoint, path).to(device)
    return model, Transform(checkpoint["config"]["settings"]["img_size"], torch.device(device))


def network_of(checkpoint: Mapping[str, Any], path: str | Path, img_size: int | None = None) -> CamouflageSegmenter:
    """Build the network of a checkpoint on the CPU, with its averaged weights if it has them, in evaluation mode.

    Args:
        checkpoint: content of the file, from ``read_checkpoint``.
        path: name of the file, for messages.
        img_size: side of the images in pixels; None for that of training.

    Raises:
        ValueError: the checkpoint does not describe its network, or the weights do not fit it or this size.
    """
    if "model" not in checkpoint or "config" not in checkpoint:
        raise ValueError(
            f"{path}: holds only weights and does not say which network they belong to; "
            f"use a checkpoint of a run, such as best_model.pth"
        )
    try:
        settings, average = NetworkSettings.of(checkpoint["config"]["settings"], img_size), checkpoint.get("ema")
        weights = checkpoint["model"] if average is None else average["model"]
        # Without what only training needs: a backbone may take images of this size, but not at all scales.
        model = build_network(replace(settings, scales=(1.0,), frozen_levels=0))
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:  # written by other programs
        raise ValueError(f"{path}: its settings describe no network ({type(error).__name__}: {error})") from error
    if difference := first_difference(weights, model.state_dict()):
        raise made_by_modified_copy(path, difference)
    model.load_state_dict(weights)
    return model.eval()
