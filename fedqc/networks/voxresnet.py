"""VoxResNet: segmentation with four deeply supervised depths (Chen et al., NeuroImage 2018).

Zhang & Chung (2019) use it twice: in 3D and in 2D as segmenters, whose five outputs are labels of known
quality, and in 3D to predict the error map of a label. Channels, kernels and heads are those of a public
re-implementation (github.com/txin96/VoxResNet), whose 1,327,276 parameters this network has from one channel
to three: the first convolution of every residual module, and the second one of all, stay within a slice
(3x3x1 here, where slices lie along Z), every depth comes to full resolution in `HEAD` channels, and the final
output is the sum of the four depths'. Instance norm takes the place of batch norm (docs/decisions/0006) with
as many parameters.

    input ── 2 conv ──┬── conv /2, 2 modules ──┬── conv /2, 2 modules ──┬── conv /2, 2 modules ──┐
                      │                        │                        │                        │
                    deconv                 deconv x2                deconv x4                deconv x8
                    side 1                   side 2                   side 3                   side 4
                      └────────────────────────┴────────── sum ─────────┴────────────────────────┘
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn import functional as F

HEAD = 4
"""Channels of a depth at full resolution, before its 1x1x1 classifier."""


class VoxResNetOutput(NamedTuple):
    """Logits of `N` inputs at their own resolution."""

    final: Tensor
    """`[N, out_channels, *spatial]`: what the network says (Loss-1 in Fig. 1 of Zhang & Chung)."""
    side: tuple[Tensor, ...]
    """Four of the same shape, from the shallowest depth to the deepest (Loss-2 to Loss-5)."""


class Layers(NamedTuple):
    """What differs between two and three dimensions."""

    conv: Callable[..., nn.Module]
    deconv: Callable[..., nn.Module]
    norm: Callable[..., nn.Module]
    slice_kernel: int | tuple[int, ...]
    """Kernel that does not look beyond its slice."""
    slice_padding: int | tuple[int, ...]


LAYERS = {
    2: Layers(nn.Conv2d, nn.ConvTranspose2d, nn.InstanceNorm2d, 3, 1),
    3: Layers(nn.Conv3d, nn.ConvTranspose3d, nn.InstanceNorm3d, (3, 3, 1), (1, 1, 0)),
}


class VoxResModule(nn.Module):
    """Norm, ReLU and convolution, twice, around the identity; the first convolution stays within a slice."""

    def __init__(self, layers: Layers, channels: int) -> None:
        super().__init__()
        self.norm1 = layers.norm(channels, affine=True)
        self.conv1 = layers.conv(channels, channels, layers.slice_kernel, padding=layers.slice_padding)
        self.norm2 = layers.norm(channels, affine=True)
        self.conv2 = layers.conv(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, channels, *spatial]` to the same."""
        y: Tensor = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return x + y


class VoxResNet(nn.Module):
    """VoxResNet in 3D or 2D, for inputs of any size.

    Args:
        in_channels: Modalities, plus label channels where the error map of a label is asked for.
        out_channels: Classes with background, or error maps.
        spatial_dims: 3 for volumes, 2 for slices.
        width: Channels of the three deeper depths; the first has half of them.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, spatial_dims: Literal[2, 3] = 3, width: int = 64
    ) -> None:
        super().__init__()
        layers = LAYERS[spatial_dims]
        half = width // 2
        self.depths = nn.ModuleList(
            [
                nn.Sequential(
                    layers.conv(in_channels, half, 3, padding=1),
                    layers.norm(half, affine=True),
                    nn.ReLU(),
                    layers.conv(half, half, layers.slice_kernel, padding=layers.slice_padding),
                )
            ]
        )
        self.heads = nn.ModuleList(
            [
                nn.Sequential(
                    layers.deconv(half, HEAD, 3, padding=1),
                    layers.conv(HEAD, out_channels, 1),
                )
            ]
        )
        channels = half
        for scale in (2, 4, 8):
            self.depths.append(
                nn.Sequential(
                    layers.norm(channels, affine=True),
                    nn.ReLU(),
                    layers.conv(channels, width, 3, stride=2, padding=1),
                    VoxResModule(layers, width),
                    VoxResModule(layers, width),
                )
            )
            self.heads.append(
                nn.Sequential(
                    layers.deconv(width, HEAD, scale, stride=scale),
                    layers.conv(HEAD, out_channels, 1),
                )
            )
            channels = width

        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @property
    def stride(self) -> int:
        """Voxels of the input behind one voxel of the deepest depth; instance norm refuses a single one."""
        return int(2 ** (len(self.depths) - 1))

    def forward(self, x: Tensor) -> VoxResNetOutput:
        """Channels `[N, in_channels, *spatial]` to the final and the side logits."""
        within = (slice(None), slice(None), *(slice(axis) for axis in x.shape[2:]))
        side = []
        y = x
        for depth, head in zip(self.depths, self.heads, strict=True):
            y = depth(y)
            side.append(head(y)[within])
        first, second, third, fourth = side
        return VoxResNetOutput(first + second + third + fourth, (first, second, third, fourth))
