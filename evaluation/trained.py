"""A trained network from its checkpoint, for use: the way in for other programs."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.decoding import fixed_size, upright_rgb
from models.network import CamouflageSegmenter, build_model


@dataclass(frozen=True)
class Transform:
    """Photographs to the network's input, as in training: upright by EXIF, RGB, resized bilinearly to a square."""

    img_size: int  # S
    device: torch.device

    def __call__(self, images: Image.Image | Sequence[Image.Image]) -> Tensor:
        """One photograph, or several of any sizes, of any mode.

        Shape:
            -> (B, 3, S, S) float32 in [0, 1] on the network's device; B is 1 for one photograph
        """
        batch = [images] if isinstance(images, Image.Image) else images
        pixels = np.stack([fixed_size(upright_rgb(image), self.img_size) for image in batch])
        return torch.from_numpy(pixels).to(self.device).to(torch.float32).div(255)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> tuple[CamouflageSegmenter, Transform]:
    """The network of a checkpoint of ``train``, in evaluation mode, and what prepares photographs for it.

    Its averaged weights where it has them: those that were validated. Needs nothing but the file; nothing in it is
    executed.

    Args:
        path: ``best_model.pth``, or any other checkpoint of a run.
        device: that the network is to be on, and ``Transform`` puts its batches on.

    Returns:
        network, transform. ``network(transform(photograph))[-1]`` are logits, (1, 1, S, S): resize them to the
        photograph's size, then apply the logistic function.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no checkpoint of this program, holds weights alone, is damaged, or its weights are not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load takes a flipped bit as it is; the checksums tell
            damaged = archive.testzip()
        if damaged is not None:
            raise ValueError(f"damaged: checksum of {damaged}")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged archive raises anything; what could run code, UnpicklingError
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a readable checkpoint ({reason})") from error
    model = network_of(checkpoint, path)
    for name, weight in model.state_dict().items():
        if not torch.isfinite(weight).all():
            raise ValueError(f"{path}: {name} is not finite")
    model = model.to(device)
    return model, Transform(checkpoint["config"]["settings"]["img_size"], torch.device(device))


def network_of(checkpoint: Any, path: str | Path, img_size: int | None = None) -> CamouflageSegmenter:
    """The network that a checkpoint is of, on the CPU, with its weights for use, in evaluation mode.

    Args:
        checkpoint: what its file holds.
        path: of the file, for messages.
        img_size: side of the images it is to take; None for that of training.

    Raises:
        ValueError: it does not tell which network it is of, or its weights fit no images of this size.
    """
    if not isinstance(checkpoint, dict) or "model" not in checkpoint or "config" not in checkpoint:
        raise ValueError(
            f"{path}: holds weights alone and does not tell which network they are of; "
            f"use a checkpoint of a run, such as best_model.pth"
        )
    try:
        settings, average = checkpoint["config"]["settings"], checkpoint.get("ema")
        weights = checkpoint["model"] if average is None else average["model"]
        model = build_as_trained(settings, img_size or settings["img_size"])
    except (KeyError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:  # made by other programs
        raise ValueError(f"{path}: its settings describe no network ({type(error).__name__}: {error})") from error
    try:
        model.load_state_dict(weights)
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
        raise ValueError(f"{path}: the checkpoint's weights do not fit its network ({reason})") from error
    return model.eval()


def build_as_trained(settings: Mapping[str, Any], img_size: int) -> CamouflageSegmenter:
    """The network that a run's settings describe, with random weights. Runs from before ``--zoom`` had none."""
    return build_model(
        settings["backbone"],
        settings["decoder_channels"],
        img_size,
        freeze_norm_statistics=settings["pretrained"] or settings["backbone_weights"] is not None,
        zooms=settings.get("zoom", [1.0]),
    )
