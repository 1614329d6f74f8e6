"""ResNet: quality regressed from image and label by a plain 3D ResNet.

ResNet-50 is the network of Robinson et al. (MICCAI 2018), who regress the DSC of every class of a stack of
heart slices; with ResNet-34 it is a baseline of Qiu et al. (MICCAI 2023), whose residual blocks these are:
instance norm and spatial dropout. The 34 layers with `width=64`, four modalities and one label channel are
the encoder and the quality head of QCResUNet and have its 63,557,953 parameters. A block of ResNet-50 halves
in its 3x3x3 convolution, not in the 1x1x1 before it, as most implementations do.

    input ── stem (1/2) ── max pool (1/4) ── layers 1 to 4 (1/4 to 1/32) ── average pool ── linear ── quality
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.networks.qcresunet import ResidualBlock

EXPANSION = 4
"""Channels a bottleneck block gives for each one of its 3x3x3 convolution."""


class Bottleneck(nn.Module):
    """1x1x1, 3x3x3 and 1x1x1 convolution with instance norm around a shortcut, then spatial dropout."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int | tuple[int, int, int], dropout: float
    ) -> None:
        super().__init__()
        channels = out_channels // EXPANSION
        self.conv1 = nn.Conv3d(in_channels, channels, 1, bias=False)
        self.norm1 = nn.InstanceNorm3d(channels, affine=True)
        self.conv2 = nn.Conv3d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm3d(channels, affine=True)
        self.conv3 = nn.Conv3d(channels, out_channels, 1, bias=False)
        self.norm3 = nn.InstanceNorm3d(out_channels, affine=True)
        self.dropout = nn.Dropout3d(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != out_channels:  # true of the first block of every layer
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.InstanceNorm3d(out_channels, affine=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in, X, Y, Z]` to `[N, out, X/stride, Y/stride, Z/stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = self.dropout(self.norm3(self.conv3(y)))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-34 or ResNet-50 of any width and depth, for inputs of any size.

    Args:
        in_channels: Modalities plus label channels.
        n_outputs: Quality values.
        width: Channels of stem and of the first layer's 3x3x3 convolutions; doubled by every further layer.
        blocks: Residual blocks of each layer.
        bottleneck: Bottleneck blocks (ResNet-50) in place of two 3x3x3 convolutions each (ResNet-34).
        short_axes: The axes that are never halved, such as the slices of a 224x224x8 stack (Robinson et al.).
        dropout: Spatial dropout in every residual block.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        n_outputs: int,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        bottleneck: bool = False,
        short_axes: Sequence[bool] = (False, False, False),
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        x, y, z = (1 if short else 2 for short in short_axes)
        self.halving = (x, y, z)
        self.stem = nn.Sequential(
            nn.Conv3d(in_channels, width, 7, stride=self.halving, padding=3, bias=False),
            nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(),
        )
        x, y, z = (1 if short else 3 for short in short_axes)
        self.pool = nn.MaxPool3d((x, y, z), stride=self.halving, padding=(x // 2, y // 2, z // 2))
        block, expansion = (Bottleneck, EXPANSION) if bottleneck else (ResidualBlock, 1)
        layers = []
        channels = width
        for depth, count in enumerate(blocks):
            out, stride = expansion * width * 2**depth, (1, 1, 1) if depth == 0 else self.halving
            first = block(channels, out, stride=stride, dropout=dropout)
            rest = [block(out, out, stride=1, dropout=dropout) for _ in range(count - 1)]
            layers.append(nn.Sequential(first, *rest))
            channels = out
        self.layers = nn.Sequential(*layers)
        self.quality = nn.Linear(channels, n_outputs)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the last feature map of an input of `size`; instance norm refuses a single one."""
        halvings = len(self.layers) + 1  # stem, max pool and every layer but the first
        x, y, z = (-(-axis // by**halvings) for axis, by in zip(size, self.halving, strict=True))
        return x, y, z

    def forward(self, x: Tensor) -> Tensor:
        """Image and label `[N, in_channels, X, Y, Z]` to quality `[N, n_outputs]`, float32, not clamped."""
        features = self.layers(self.pool(self.stem(x)))
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of mantissa are too few for a DSC
            quality: Tensor = self.quality(features.float().mean(dim=(2, 3, 4)))
        return quality
