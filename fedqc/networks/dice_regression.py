"""Dice regression: a plain 3D CNN from maps and a label to the label's DSC (Williams et al., Fig. 4c).

    input ── 4 x (conv 3x3x3, leaky ReLU, max pool /2), 16-32-64-128 ── flatten ── linear ── quality

As in the published code, no layer has a norm, and the last one knows where in the volume a feature lies, so
that an input has the one size the network was made for.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

CHANNELS = (16, 32, 64, 128)
LEAK = 0.3
"""Slope of the leaky ReLU below 0: that of the paper's library, where the code names none."""


class DiceRegressionNet(nn.Module):
    """Convolutions and a linear output.

    Args:
        in_channels: Maps plus label channels.
        n_outputs: Quality values.
        size: Voxels of an input.
        channels: Of each convolution; after each the volume is halved, rounded up.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        n_outputs: int,
        size: tuple[int, int, int],
        channels: Sequence[int] = CHANNELS,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in zip((in_channels, *channels), channels, strict=False):
            layers += [nn.Conv3d(before, after, 3, padding=1), nn.LeakyReLU(LEAK)]
            layers += [nn.MaxPool3d(2, ceil_mode=True)]
        self.features = nn.Sequential(*layers)
        voxels = math.prod(-(-axis // 2 ** len(channels)) for axis in size)
        self.quality = nn.Linear(channels[-1] * voxels, n_outputs)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in_channels, *size]` to quality `[N, n_outputs]`, float32, not clamped."""
        features = self.features(x)
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of mantissa are too few for a DSC
            quality: Tensor = self.quality(features.float().flatten(1))
        return quality
