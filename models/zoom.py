"""Features of an image at several zooms, mixed pixel by pixel with learned weights (Pang et al., ZoomNet, CVPR 2022).

Shapes: B batch, c a level's channels, h w its height and width at one of the zooms.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.decoder import ConvNormAct

_MULTIPLE = 32  # pixels; every backbone takes images whose sides are multiples of this


class ZoomedFeatures(nn.Module):
    """Features of a backbone at several sizes of its input, merged level by level by ``ScaleSelection``.

    All sizes share the backbone's weights; this module holds only the layers that choose between the sizes. A single
    zoom needs no such layers: it only changes how finely the backbone sees the image.

    Args:
        in_channels: number of channels of each backbone level.
        channels: width of the layers that choose, a multiple of 8.
        zooms: factors of the image's sides, which are rounded to multiples of 32.

    Shape:
        images (B, 3, H, W), normalised; scale, a factor of all zooms
        -> the backbone's levels, in the sizes of the middle zoom, or of the larger of two
    """

    def __init__(self, in_channels: Sequence[int], channels: int, zooms: Sequence[float]) -> None:
        super().__init__()
        self.zooms = sorted(zooms)
        widths = in_channels if len(zooms) > 1 else []
        self.selections = nn.ModuleList(ScaleSelection(width, channels, len(zooms)) for width in widths)

    def forward(self, backbone: Backbone, images: Tensor, scale: float = 1.0) -> list[Tensor]:
        pyramids = [backbone(resized(images, scale * zoom)) for zoom in self.zooms]
        if len(pyramids) == 1:
            return pyramids[0]
        return [selection(maps) for selection, *maps in zip(self.selections, *pyramids, strict=True)]


class ScaleSelection(nn.Module):
    """Mean of feature maps, with weights that are computed for each pixel from all maps.

    Shape:
        maps, small to large: (B, c, h_i, w_i) -> (B, c, h, w), the size of the middle map
    """

    def __init__(self, in_channels: int, channels: int, num_zooms: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(num_zooms * in_channels, channels, kernel_size=1)
        self.choose = nn.Conv2d(channels, num_zooms, kernel_size=3, padding=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        size = maps[len(maps) // 2].shape[-2:]
        maps = [F.interpolate(seen, size=size, mode="bilinear", align_corners=False) for seen in maps]
        shares = self.choose(self.reduce(torch.cat(maps, dim=1))).softmax(dim=1)
        weighted = [seen * share for seen, share in zip(maps, shares.split(1, dim=1), strict=True)]
        return torch.stack(weighted).sum(dim=0)


def zoomed_side(side: int, zoom: float) -> int:
    """Return the side in pixels after zooming: the nearest multiple of 32; ties go to the even multiple.

    Only integer arithmetic: during an export a side may be a symbol, which cannot be rounded.
    """
    ratio = Fraction(zoom).limit_denominator(10_000)
    part, whole = side * ratio.numerator, _MULTIPLE * ratio.denominator
    multiple = (2 * part + whole - 1 + part // whole % 2) // (2 * whole)
    return _MULTIPLE * torch.sym_max(multiple, 1)  # type: ignore[return-value]  # int for int


def resized(images: Tensor, zoom: float) -> Tensor:
    """Resize images bilinearly to ``zoomed_side``.

    No smoothing beforehand: at half the size, each pixel is already the mean of four.

    Shape:
        (B, 3, H, W) -> (B, 3, H', W')
    """
    if zoom == 1:
        return images
    size = [zoomed_side(side, zoom) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
