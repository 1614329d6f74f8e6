"""MC-dropout U-Net: a 3D U-Net whose dropout never stops, so that it says something else at every pass.

The segmenter of Williams et al. (Fig. 4a): the U-Net of Kayalibay et al. (arXiv 1701.03056), which adds up
segmentation maps of several scales, with dropout of 0.2 after every block (Gal & Ghahramani 2016). Many
passes over one image are samples of what the network holds possible. Instance norm as in the published code
(github.com/sebnieh/QA_for_WhiteMatterLesionSegmentation). That code halves and doubles with 1x1x1 kernels at
stride 2, which look at one voxel of eight; kernels here leave none out: 3x3x3 to halve, 2x2x2 to double.

    input ── conv 8 ────────────────────────────────────────────── join, conv 8 ─── map ── sum ── map
               │                                                       │                    │
             /2, 16, dropout ────────────────── join, conv 16, dropout ┴── map ──── sum ── x2
               │                                  │                                  │
             /2, 32, dropout ── join, conv 32, dropout ── map ───────────────────── x2
               │                  │
             /2, 64, dropout ─────┘
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CHANNELS = (8, 16, 32, 64)
"""Of each level; every further one halves the volume."""
DROPOUT = 0.2


class SteadyDropout(nn.Dropout):
    """Dropout that acts in evaluation as in training."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same; draws from PyTorch's generator of the device."""
        return F.dropout(x, self.p, training=True) if self.p else x


class Down(nn.Module):
    """Half the resolution, then a convolution around which what was halved is added."""

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.halve = nn.Conv3d(in_channels, channels, 3, stride=2, padding=1)
        self.act1 = _norm_act(channels)
        self.conv = nn.Conv3d(channels, channels, 3, padding=1)
        self.act2 = _norm_act(channels)
        self.dropout = SteadyDropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, X, Y, Z]` to `[N, channels, X/2, Y/2, Z/2]`, rounded up."""
        x = self.halve(x)
        x = self.act2(x + self.conv(self.act1(x)))
        y: Tensor = self.dropout(x)
        return y


class Up(nn.Module):
    """Twice the resolution, joined with the encoder's feature map of that level, then a convolution."""

    def __init__(self, in_channels: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.narrow = nn.Sequential(nn.Conv3d(in_channels, channels, 1), _norm_act(channels))
        self.enlarge = nn.Sequential(nn.ConvTranspose3d(channels, channels, 2, stride=2), _norm_act(channels))
        self.conv = nn.Sequential(nn.Conv3d(2 * channels, channels, 3, padding=1), _norm_act(channels))
        self.dropout = SteadyDropout(dropout)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`[N, in_channels, X/2, Y/2, Z/2]` and `[N, channels, X, Y, Z]` to the shape of the latter."""
        x = _cut(self.enlarge(self.narrow(x)), skip)
        y: Tensor = self.dropout(self.conv(torch.cat([x, skip], dim=1)))
        return y


class MCDropoutUNet(nn.Module):
    """The U-Net, for inputs of any size that leaves more than one voxel on the deepest level.

    Args:
        in_channels: Modalities.
        out_channels: Classes with background; the logits of a softmax, which with one class is the paper's
            sigmoid.
        channels: Of each level.
        dropout: Share of the values that are set to zero after each block, at every pass.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        channels: Sequence[int] = CHANNELS,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv3d(in_channels, channels[0], 3, padding=1), _norm_act(channels[0]))
        levels = list(pairwise(channels))
        self.down = nn.ModuleList([Down(fine, coarse, dropout) for fine, coarse in levels])
        self.up = nn.ModuleList([Up(coarse, fine, dropout) for fine, coarse in reversed(levels)])
        self.maps = nn.ModuleList([nn.Conv3d(fine, out_channels, 1) for fine, _ in reversed(levels)])
        self.output = nn.Conv3d(out_channels, out_channels, 1)

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the deepest level of an input of `size`; instance norm refuses a single one."""
        x, y, z = (-(-axis // 2 ** len(self.down)) for axis in size)
        return x, y, z

    def forward(self, x: Tensor) -> Tensor:
        """Images `[N, in_channels, X, Y, Z]` to logits `[N, out_channels, X, Y, Z]`."""
        skips = [self.stem(x)]
        for down in self.down:
            skips.append(down(skips[-1]))
        y = skips.pop()
        total: Tensor | None = None
        for up, to_map in zip(self.up, self.maps, strict=True):
            y = up(y, skips.pop())
            found = to_map(y)
            total = found if total is None else found + _cut(F.interpolate(total, scale_factor=2), found)
        logits: Tensor = self.output(total)
        return logits


def _norm_act(channels: int) -> nn.Module:
    """Norm and PReLU. One slope a channel instead of one for all took the network on a CPU twice as long."""
    return nn.Sequential(nn.InstanceNorm3d(channels, affine=True), nn.PReLU())


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """`x` without the last voxels of axes that were odd before they were halved."""
    x_, y, z = like.shape[2:]
    return x[:, :, :x_, :y, :z]
