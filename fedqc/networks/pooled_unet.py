"""PooledUNet: quality regressed from the pooled last feature map of a 3D U-Net.

The U-Net baseline of Qiu et al. (MICCAI 2023, Table 1): a U-Net made for segmentation, whose last feature
map, at full resolution, is averaged into a linear head. The U-Net is MONAI's, with instance norm.

    input ── U-Net: 4 x max pool, 4 x up ── average pool ── linear ── quality
"""

import torch
from torch import Tensor, nn

POOLINGS = 4


class PooledUNet(nn.Module):
    """A U-Net with a head for quality values, for inputs of any size from 16 voxels.

    Args:
        in_channels: Modalities plus label channels.
        n_outputs: Quality values.
        width: Channels at full and at half resolution; doubled by every further depth.
        dropout: Dropout after every convolution of the U-Net.
    """

    def __init__(self, *, in_channels: int, n_outputs: int, width: int = 32, dropout: float = 0.0) -> None:
        # MONAI takes seconds to load, in every process that Flower starts for a message: only where used.
        from monai.networks.nets.basic_unet import BasicUNet  # noqa: PLC0415

        super().__init__()
        self.unet: nn.Module = BasicUNet(
            spatial_dims=3,
            in_channels=in_channels,
            features=(width, width, 2 * width, 4 * width, 8 * width, width),
            norm=("instance", {"affine": True}),
            bias=False,  # the norm after each convolution would take it away again
            dropout=dropout,
        )
        self.unet.final_conv = nn.Identity()
        self.quality = nn.Linear(width, n_outputs)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the deepest feature map of an input of `size`; instance norm refuses a single one."""
        x, y, z = (axis // 2**POOLINGS for axis in size)
        return x, y, z

    def forward(self, x: Tensor) -> Tensor:
        """Image and label `[N, in_channels, X, Y, Z]` to quality `[N, n_outputs]`, float32, not clamped."""
        features = self.unet(x)
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of mantissa are too few for a DSC
            quality: Tensor = self.quality(features.float().mean(dim=(2, 3, 4)))
        return quality
