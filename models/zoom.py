"""The same image at several zooms, and for every place in it the ones to look at (Pang et al., "ZoomNet", CVPR 2022).

Shapes: B batch, c a level's channels, h w its height and width at one of the zooms.
"""

from collections.abc import Sequence
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbone import Backbone
from models.decoder import ConvNormAct

_MULTIPLE = 32  # of pixels: the sides of images that every backbone takes


class ZoomedFeatures(nn.Module):
    """Features of a backbone at other sizes of its input, merged level by level by ``ScaleSelection``.

    The backbone's weights are shared by all sizes, and belong to it: here is what chooses between them. One zoom alone
    is not merged with anything: an image of 224 pixels at 1.25 is a finer map of what 224 pixels show.

    Args:
        in_channels: channels of the backbone's levels.
        channels: width of the layers that choose; a multiple of 8.
        zooms: factors of the image's sides, which become the nearest multiples of 32.

    Shape:
        images (B, 3, H, W), normalised, and a factor of all zooms
        -> the backbone's levels for images of the middle zoom, of two the larger
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
    """A mean of maps, weighted at each place by what is seen there at all zooms.

    Shape:
        maps, small to large: (B, c, h_i, w_i) -> (B, c, h, w), the size of the middle one
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
    """In pixels: the nearest multiple of 32, of two the even multiple.

    In whole numbers alone, for the sake of exports: there a side may be a symbol, which does not round.
    """
    ratio = Fraction(zoom).limit_denominator(10_000)
    part, whole = side * ratio.numerator, _MULTIPLE * ratio.denominator
    multiple = (2 * part + whole - 1 + part // whole % 2) // (2 * whole)
    return _MULTIPLE * torch.sym_max(multiple, 1)  # type: ignore[return-value]  # an int of an int


def resized(images: Tensor, zoom: float) -> Tensor:
    """Images with sides of ``zoomed_side``. Not smoothed before: at half the size, each pixel is the mean of four.

    Shape:
        (B, 3, H, W) -> (B, 3, H', W')
    """
    if zoom == 1:
        return images
    size = [zoomed_side(side, zoom) for side in images.shape[-2:]]
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)
