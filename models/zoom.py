"""The same image at three zooms, and for every place in it the one to look at (Pang et al., "ZoomNet", CVPR 2022).

Shapes: B batch, c a level's channels, h w its height and width at the image's own size.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.decoder import ConvNormAct

_MULTIPLE = 32  # of pixels: the sides of images that every backbone takes


class ZoomedFeatures(nn.Module):
    """Features of a backbone at 0.5, 1 and 1.5 times an image's size, merged level by level by ``ScaleSelection``.

    The backbone's weights are shared by the three, and belong to it: here is what chooses between them.

    Args:
        in_channels: channels of the backbone's levels.
        channels: width of the layers that choose; a multiple of 8.

    Shape:
        images (B, 3, H, W), normalised -> the backbone's levels for images of that size
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.selections = nn.ModuleList(ScaleSelection(width, channels) for width in in_channels)

    def forward(self, backbone: Backbone, images: Tensor) -> list[Tensor]:
        far, near = (backbone(_resized(images, halves)) for halves in (1, 3))
        levels = zip(self.selections, far, backbone(images), near, strict=True)
        return [selection(*features) for selection, *features in levels]


class ScaleSelection(nn.Module):
    """A mean of three maps, weighted at each place by what is seen there at all three zooms.

    Shape:
        far (B, c, h1, w1), own (B, c, h, w), near (B, c, h2, w2) -> (B, c, h, w)
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(3 * in_channels, channels, kernel_size=1)
        self.choose = nn.Conv2d(channels, 3, kernel_size=3, padding=1)

    def forward(self, far: Tensor, own: Tensor, near: Tensor) -> Tensor:
        size = own.shape[-2:]
        far, near = (F.interpolate(other, size=size, mode="bilinear", align_corners=False) for other in (far, near))
        weights = self.choose(self.reduce(torch.cat([far, own, near], dim=1))).softmax(dim=1)
        shares = weights.split(1, dim=1)
        return far * shares[0] + own * shares[1] + near * shares[2]


def _resized(images: Tensor, halves: int) -> Tensor:
    """To so many halves of their size, or the nearest sides that are multiples of 32."""
    height, width = (
        max(_MULTIPLE, (side * halves // 2 + _MULTIPLE // 2) // _MULTIPLE * _MULTIPLE) for side in images.shape[-2:]
    )
    return F.interpolate(images, size=(height, width), mode="bilinear", align_corners=False)
