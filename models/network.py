"""The network: input normalisation, backbone (at one zoom or several), decoder."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone, build_backbone
from models.decoder import ForegroundBackgroundDecoder
from models.hub import read_network, write_network
from models.zoom import ZoomedFeatures, resized, zoomed_side


class CamouflageSegmenter(nn.Module):
    """Camouflaged-object segmentation from RGB images.

    Normalisation is part of the network, so that training, validation and every later use agree on it.

    Args:
        backbone: feature extractor.
        decoder_channels: width of the decoder; a multiple of 8.
        freeze_norm_statistics: keep the running statistics of the backbone's BatchNorm layers as they are even while
            its weights train: right for pretrained ones, which small batches would only disturb. A backbone that
            starts from random weights has none worth keeping.
        zooms: factors of its size at which the backbone sees an image: see ``ZoomedFeatures``.

    Shape:
        images (B, 3, H, W) float RGB in [0, 1]; and a factor of the size at which the backbone sees them, for training
        at several: see ``--multi-scale``
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
        self.config: dict[str, Any] = {}  # of ``from_pretrained``
        self.backbone_frozen = False
        self.always_frozen: frozenset[str] = frozenset()  # names of parameters of the backbone
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
        """Frozen: no gradients, and evaluation mode whatever ``train()`` says, so that no statistic moves either."""
        self.backbone_frozen = frozen
        for name, parameter in self.backbone.named_parameters():
            parameter.requires_grad_(not frozen and name not in self.always_frozen)
        self.train(self.training)

    def freeze_levels(self, number: int, img_size: int) -> None:
        """Keep what the backbone's finest levels are computed from as it is, for good.

        Nothing of it is kept for the backward pass, which ends above it: in a convolutional network, where those layers
        see the most pixels, that is much of the time and the memory of a step.

        Args:
            number: of levels, fine to coarse.
            img_size: of images that the backbone takes.

        Raises:
            ValueError: it has fewer levels.
        """
        self.always_frozen = self.backbone.parameters_of(number, img_size)
        self.set_backbone_frozen(self.backbone_frozen)

    def checkpoint_gradients(self) -> bool:
        """Trade time for memory: compute activations again in the backward pass, not keep them (Chen et al., 2016).

        The same gradients. BatchNorm layers that learn their statistics take in each batch twice, unless whoever runs
        the backward pass puts them back.

        Returns:
            whether the backbone can do it; the decoder always can.
        """
        self.decoder.checkpoints_gradients = True
        return self.backbone.checkpoint_gradients()

    def save_pretrained(self, folder: str | Path, config: Mapping[str, Any]) -> None:
        """Write ``config.json`` and ``model.safetensors`` for ``from_pretrained`` and huggingface_hub's mixin.

        Args:
            folder: made where it is missing.
            config: backbone, decoder_channels and img_size, as given to ``build_model``; and whatever else is to be
                told there.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        zooms = [1.0] if self.zoom is None else self.zoom.zooms
        mean, std = (self.get_buffer(name).flatten().tolist() for name in ("mean", "std"))
        write_network(Path(folder), {**config, "zooms": zooms, "mean": mean, "std": std}, self.state_dict())

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub_options: Any) -> "CamouflageSegmenter":
        """A trained network from a folder that ``train_ultimate.py export --format safetensors`` has written.

        Args:
            source: the folder, or else "owner/name" on the Hugging Face hub.
            hub_options: revision, token, cache_dir, local_files_only: see ``huggingface_hub.hf_hub_download``.

        Returns:
            the network in evaluation mode on the CPU, with the weights bit for bit; ``config`` is what ``config.json``
            says: ``config["img_size"]`` the side of the images it was trained with.

        Raises:
            ValueError: neither is there, or its weights do not fit the network it describes.
        """
        config, weights = read_network(source, **hub_options)
        try:
            model = build_model(
                config["backbone"], config["decoder_channels"], config["img_size"], zooms=config["zooms"]
            )
            model.load_state_dict(weights)
            for name in ("mean", "std"):  # as it was trained, whatever the timm of today says
                model.get_buffer(name).copy_(torch.tensor(config[name]).view(1, 3, 1, 1))
        except (RuntimeError, TypeError, AttributeError, IndexError, ZeroDivisionError) as error:
            reason = " ".join(line.strip() for line in str(error).splitlines()[:2])[:300]
            raise ValueError(f"{source}: its weights do not fit the network of its config.json ({reason})") from error
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


def build_model(
    backbone: str, decoder_channels: int, img_size: int, pretrained: bool = False, backbone_weights: Path | None = None,
    freeze_norm_statistics: bool = True, zooms: Sequence[float] = (1.0,), scales: Sequence[float] = (1.0,),
    frozen_levels: int = 0,
) -> CamouflageSegmenter:  # fmt: skip
    """Build the network and run it on an empty image, at each of the scales that it is to be trained at.

    See ``CamouflageSegmenter.freeze_levels`` for ``frozen_levels``, and ``build_backbone`` for the other arguments and
    the errors.
    """
    sides = [zoomed_side(img_size, zoom) for zoom in zooms]
    if len(set(sides)) < len(sides) or (sides == [img_size] and list(zooms) != [1]):
        factors = " ".join(f"{zoom:g}" for zoom in zooms)
        raise ValueError(
            f"--zoom {factors}: at --img-size {img_size} that is {sides} pixels, in multiples of 32: not a size of its "
            f"own for each; choose zooms that are further apart"
        )
    body = build_backbone(backbone, pretrained, backbone_weights, img_size)
    model = CamouflageSegmenter(body, decoder_channels, freeze_norm_statistics, zooms)
    for scale in {1.0, *scales}:
        try:
            with torch.no_grad():
                model.eval()(torch.zeros(1, 3, img_size, img_size), scale)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            size = f"--img-size {img_size}" + (f" at --multi-scale {scale:g}" if scale != 1 else "")
            raise ValueError(f"--backbone {backbone} does not take images of {size} ({reason})") from error
    if frozen_levels:
        model.freeze_levels(frozen_levels, img_size)
    return model.train()


def build_network(args: argparse.Namespace, load_weights: bool) -> CamouflageSegmenter:
    """The network from the settings. Without ``load_weights`` its weights are random: a checkpoint brings its own."""
    torch.manual_seed(args.seed)
    if load_weights and args.pretrained and not args.backbone_weights:
        print(f"Pretrained weights of {args.backbone}: from the Hugging Face hub, or its cache on this machine")
    return build_model(
        args.backbone,
        args.decoder_channels,
        args.img_size,
        zooms=args.zoom,
        scales=args.multi_scale,
        frozen_levels=args.frozen_levels,
        pretrained=load_weights and args.pretrained,
        backbone_weights=Path(args.backbone_weights) if load_weights and args.backbone_weights else None,
        freeze_norm_statistics=args.pretrained or args.backbone_weights is not None,
    )
