"""Coarse-to-fine decoder that models foreground and background separately.

The coarsest level finds the object from the context of the whole scene. Each finer level then masks its features twice,
with the current estimate of the object and with its complement: a camouflaged object differs from the background mostly
at its border. The estimate is detached, so that no level trains the coarser ones to suit itself.

Shapes: B batch, C the decoder's width, h w the height and width of a feature level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class ForegroundBackgroundDecoder(nn.Module):
    """Decoder made of a context module, a coarse estimate and one refinement block per feature level.

    Args:
        in_channels: number of channels of each backbone level, fine to coarse.
        channels: width C of the decoder, a multiple of 8.

    Shape:
        features, fine to coarse: (B, in_channels[i], h_i, w_i)
        -> len(in_channels) + 1 side logits, coarse to fine: (B, 1, h_i, w_i)
    """

    def __init__(self, in_channels: Sequence[int], channels: int) -> None:
        super().__init__()
        self.context = PyramidContext(in_channels[-1], channels)
        self.coarse_head = nn.Conv2d(channels, 1, kernel_size=1)
        self.blocks = nn.ModuleList(RefinementBlock(width, channels) for width in reversed(in_channels))
        self.checkpoints_gradients = False  # recompute each block in the backward pass, to save memory

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        hidden = self.context(features[-1])
        side_logits = [self.coarse_head(hidden)]
        for block, feature in zip(self.blocks, reversed(features), strict=True):
            if self.checkpoints_gradients:
                inputs = feature, hidden, side_logits[-1]
                hidden, logits = checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
            else:
                hidden, logits = block(feature, hidden, side_logits[-1])
            side_logits.append(logits)
        return side_logits


class PyramidContext(nn.Module):
    """Context module of parallel dilated convolutions and the global mean (ASPP; Chen et al., 2017).

    Shape:
        (B, in_channels, h, w) -> (B, channels, h, w)
    """

    def __init__(self, in_channels: int, channels: int, dilations: Sequence[int] = (1, 3, 6)) -> None:
        super().__init__()
        self.reduce = ConvNormAct(in_channels, channels, kernel_size=1)
        self.branches = nn.ModuleList(ConvNormAct(channels, channels, 3, dilation=dilation) for dilation in dilations)
        self.global_branch = nn.Conv2d(channels, channels, kernel_size=1)
        self.fuse = ConvNormAct(channels * (len(dilations) + 1), channels, kernel_size=1)

    def forward(self, feature: Tensor) -> Tensor:
        reduced = self.reduce(feature)
        scene = self.global_branch(reduced.mean(dim=(2, 3), keepdim=True)).expand_as(reduced)
        return self.fuse(torch.cat([*(branch(reduced) for branch in self.branches), scene], dim=1))


class RefinementBlock(nn.Module):
    """Block that refines the estimate at one feature level.

    Shape:
        feature (B, in_channels, h, w), hidden (B, C, h', w'), coarser_logits (B, 1, h', w')
        -> hidden (B, C, h, w), logits (B, 1, h, w)
    """

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__()
        self.reduce = ConvNormAct(in_channels, channels, kernel_size=1)
        self.fuse = ConvNormAct(3 * channels, channels, kernel_size=1)
        self.mix = GatedGroupMix(channels)
        self.head = nn.Conv2d(channels, 1, kernel_size=3, padding=1)

    def forward(self, feature: Tensor, hidden: Tensor, coarser_logits: Tensor) -> tuple[Tensor, Tensor]:
        feature = self.reduce(feature)
        size = feature.shape[-2:]
        hidden = F.interpolate(hidden, size=size, mode="bilinear", align_corners=False)
        estimate = F.interpolate(coarser_logits.detach(), size=size, mode="bilinear", align_corners=False).sigmoid()
        hidden = self.fuse(torch.cat([hidden, feature * estimate, feature * (1 - estimate)], dim=1))
        hidden = self.mix(hidden)
        return hidden, self.head(hidden)


class GatedGroupMix(nn.Module):
    """Residual 3x3 convolutions over four channel groups in sequence, followed by a gate over channels.

    Each group also receives the output of the group before it, which gives receptive fields of 3, 5, 7 and 9 pixels
    (Gao et al., "Res2Net", 2019) at a quarter of a full convolution's cost. The gate weighs channels by the content of
    the scene (Hu et al., "Squeeze-and-Excitation", 2018).

    Shape:
        (B, C, h, w) -> (B, C, h, w)
    """

    num_groups = 4

    def __init__(self, channels: int) -> None:
        super().__init__()
        width = channels // self.num_groups
        self.convolutions = nn.ModuleList(ConvNormAct(width, width, 3) for _ in range(self.num_groups))
        self.gate = nn.Sequential(nn.Conv2d(channels, width, 1), nn.ReLU(), nn.Conv2d(width, channels, 1), nn.Sigmoid())
        self.project = nn.Conv2d(channels, channels, kernel_size=1, bias=False)
        self.norm = group_norm(channels)

    def forward(self, hidden: Tensor) -> Tensor:
        outputs: list[Tensor] = []
        for group, convolution in zip(hidden.chunk(self.num_groups, dim=1), self.convolutions, strict=True):
            outputs.append(convolution(group + outputs[-1] if outputs else group))
        mixed = torch.cat(outputs, dim=1)
        mixed = mixed * self.gate(mixed.mean(dim=(2, 3), keepdim=True))
        return F.relu(hidden + self.norm(self.project(mixed)))


class ConvNormAct(nn.Sequential):
    """Convolution that keeps the image size, GroupNorm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, dilation: int = 1) -> None:
        padding = dilation * (kernel_size // 2)
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel_size, padding=padding, dilation=dilation, bias=False),
            group_norm(out_channels),
            nn.ReLU(),
        )


def group_norm(channels: int) -> nn.GroupNorm:
    """Return a normalisation that does not depend on the batch size, which may be 1 or 2 here.

    Groups have eight channels if these divide evenly; otherwise all channels are one group.
    """
    return GroupNorm(channels // 8 if channels % 8 == 0 else 1, channels)


class GroupNorm(nn.GroupNorm):
    """GroupNorm that computes in fp32 under autocast on a CPU, as CUDA's autocast does.

    In bf16 with channels last, its backward pass takes 3 to 5 times as long on a CPU.
    """

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float() if torch.is_autocast_enabled(input.device.type) else input)
