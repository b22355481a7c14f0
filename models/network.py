"""The network: input normalisation, backbone (at one zoom or several), decoder; and how settings become one."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, build_backbone, reason_of
from models.decoder import ForegroundBackgroundDecoder
from models.hub import read_network, write_network
from models.zoom import ZoomedFeatures, resized, zoomed_side

logger = logging.getLogger("train_ultimate")


@dataclass(frozen=True)
class NetworkSettings:
    """The settings that decide a network's architecture, and which of its parts train."""

    backbone: str
    decoder_channels: int  # a multiple of 8
    img_size: int  # side of the square images in pixels, a multiple of 32
    zooms: tuple[float, ...] = (1.0,)
    scales: tuple[float, ...] = (1.0,)  # --multi-scale; they change no weight
    frozen_levels: int = 0
    freeze_norm_statistics: bool = True

    @classmethod
    def of(cls, settings: Mapping[str, Any], img_size: int | None = None) -> Self:
        """Read a run's settings, as checkpoints, incidents and ``config.json`` hold them.

        Settings added since the file was written take their defaults.

        Args:
            settings: the run's settings by name.
            img_size: side of the images in pixels; None for the one in ``settings``.

        Raises:
            KeyError, TypeError: these are not the settings of a run.
        """
        return cls(
            settings["backbone"],
            settings["decoder_channels"],
            img_size or settings["img_size"],
            tuple(settings.get("zoom", cls.zooms)),
            tuple(settings.get("multi_scale", cls.scales)),
            settings.get("frozen_levels", cls.frozen_levels),
            settings["pretrained"] or any(settings.get(name) for name in ("backbone_weights", "start_from")),
        )


class CamouflageSegmenter(nn.Module):
    """Network for camouflaged-object segmentation of RGB images.

    Normalisation is part of the network, so that training, validation and every later use agree on it.

    Args:
        backbone: feature extractor.
        decoder_channels: width of the decoder, a multiple of 8.
        freeze_norm_statistics: keep the running statistics of the backbone's BatchNorm layers even while its weights
            train. Right for pretrained statistics, which small batches would only disturb; random weights come with
            none worth keeping.
        zooms: factors of the image's size at which the backbone sees it, see ``ZoomedFeatures``.

    Attributes:
        config: content of ``config.json`` after ``from_pretrained``; empty otherwise.

    Shape:
        images (B, 3, H, W) float RGB in [0, 1]; scale, a further factor of the size that the backbone sees, for
        ``--multi-scale``
        -> side logits, coarse to fine: (B, 1, h_i, w_i); the last one (B, 1, H, W)
    """

    def __init__(
        self,
        backbone: Backbone,
        decoder_channels: int,
        freeze_norm_statistics: bool,
        zooms: Sequence[float] = (1.0,),
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.zoom = ZoomedFeatures(backbone.channels, decoder_channels, zooms) if list(zooms) != [1] else None
        self.decoder = ForegroundBackgroundDecoder(backbone.channels, decoder_channels)
        self.freeze_norm_statistics = freeze_norm_statistics
        self.config: dict[str, Any] = {}
        self.backbone_frozen = False
        self.always_frozen: frozenset[str] = frozenset()  # names of backbone parameters
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        normalised = (images - self.get_buffer("mean")) / self.get_buffer("std")
        if self.zoom is None:
            features = self.backbone(resized(normalised, scale))
        else:
            features = self.zoom(self.backbone, normalised, scale)
        side_logits = self.decoder(features)
        finest = F.interpolate(side_logits[-1], size=images.shape[-2:], mode="bilinear", align_corners=False)
        return [*side_logits[:-1], finest]

    def set_backbone_frozen(self, frozen: bool) -> None:
        """Freeze or unfreeze the backbone.

        A frozen backbone gets no gradients, and stays in evaluation mode during ``train()`` so that its BatchNorm
        statistics do not change either.
        """
        self.backbone_frozen = frozen
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not frozen and name not in self.always_frozen)
        self.train(self.training)

    def freeze_levels(self, number: int, img_size: int) -> None:
        """Freeze for good the layers that compute the backbone's finest levels.

        The backward pass ends above them and needs none of their activations. In a convolutional network these layers
        see the most pixels, so this saves much of a step's time and memory.

        Args:
            number: number of levels, counted from the finest.
            img_size: side in pixels of images that the backbone takes.

        Raises:
            ValueError: the backbone has fewer levels.
        """
        self.always_frozen = self.backbone.parameters_of(number, img_size)
        self.set_backbone_frozen(self.backbone_frozen)

    def checkpoint_gradients(self) -> bool:
        """Trade time for memory: recompute activations in the backward pass, not keep them (Chen et al., 2016).

        Gradients do not change. BatchNorm layers in training mode count each batch twice, unless the caller restores
        their statistics after the backward pass.

        Returns:
            whether the backbone supports it; the decoder always does.
        """
        self.decoder.checkpoints_gradients = True
        return self.backbone.checkpoint_gradients()

    def save_pretrained(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``from_pretrained`` and huggingface_hub's mixin.

        Args:
            folder: created if it is missing.
            config: backbone, decoder_channels and img_size, as in ``NetworkSettings``; other keys are written too.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        zooms = [1.0] if self.zoom is None else self.zoom.zooms
        mean, std = (self.get_buffer(name).flatten().tolist() for name in ("mean", "std"))
        write_network(Path(folder), {**config, "zooms": zooms, "mean": mean, "std": std}, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_options: Any) -> "CamouflageSegmenter":
        """Load a trained network that ``train_ultimate.py export --format safetensors`` wrote.

        Args:
            source: the folder, or "owner/name" on the Hugging Face hub.
            hub_options: revision, token, cache_dir, local_files_only: see ``huggingface_hub.hf_hub_download``.

        Returns:
            the network in evaluation mode on the CPU, with bitwise the exported weights. Its ``config`` holds
            ``config.json``: ``config["img_size"]`` is the side of the images it was trained with.

        Raises:
            ValueError: there is no such folder or repository, or its weights do not fit the network it describes.
        """
        config, weights = read_network(source, **hub_options)
        try:
            settings = NetworkSettings(
                config["backbone"], config["decoder_channels"], config["img_size"], tuple(config["zooms"])
            )
            model = build_network(settings)
            model.load_state_dict(weights)
            for name in ("mean", "std"):  # as in training, even if the installed timm has other constants
                model.get_buffer(name).copy_(torch.tensor(config[name]).view(1, 3, 1, 1))
        except (RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
            raise ValueError(
                f"{source}: its weights do not fit the network of its config.json ({reason_of(error)})"
            ) from error
        model.config = config
        return model.eval()

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        elif self.freeze_norm_statistics:
            for module in self.backbone.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self


def build_network(
    settings: NetworkSettings, pretrained: bool = False, backbone_weights: Mapping[str, Tensor] | None = None
) -> CamouflageSegmenter:
    """Build the network and run it on an empty image, at each of the scales it will train at.

    Args:
        settings: the architecture.
        pretrained: start the backbone from timm's pretrained weights.
        backbone_weights: weights to start the backbone from; take precedence over ``pretrained``.

    Raises:
        ValueError: unknown backbone, unusable weights, or images of a size that the backbone does not take.
    """
    size, zooms = settings.img_size, settings.zooms
    sides = [zoomed_side(size, zoom) for zoom in zooms]
    if len(set(sides)) < len(sides) or (sides == [size] and zooms != (1,)):
        factors = " ".join(f"{zoom:g}" for zoom in zooms)
        raise ValueError(
            f"--zoom {factors}: at --img-size {size} that is {sides} pixels, in multiples of 32, which are not "
            f"different sizes; choose zooms further apart, or further from 1"
        )
    if pretrained and backbone_weights is None:
        logger.info(
            "Pretrained weights of %s: from the Hugging Face hub, or its cache on this machine", settings.backbone
        )
    backbone = build_backbone(settings.backbone, pretrained, backbone_weights, size)
    model = CamouflageSegmenter(backbone, settings.decoder_channels, settings.freeze_norm_statistics, zooms)
    for scale in {1.0, *settings.scales}:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, size, size), scale)
        except (RuntimeError, AssertionError) as error:
            images = f"--img-size {size}" + (f" at --multi-scale {scale:g}" if scale != 1 else "")
            usual = f"; it was made for {backbone.usual_size} x {backbone.usual_size} pixels" if scale == 1 else ""
            raise ValueError(
                f"--backbone {settings.backbone} does not take images of {images} ({reason_of(error)}){usual}"
            ) from error
    if settings.frozen_levels:
        model.freeze_levels(settings.frozen_levels, size)
    return model.train()
