"""Layers with the parameters and the values of PyTorch's, which are faster on a CPU (docs/decisions/0019)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm3d(nn.InstanceNorm3d):
    """Instance norm that leaves `channels_last_3d` as it is where no gradient is needed.

    PyTorch's own works in the other layout and returns that, and the convolution behind it has to bring every
    value back. Group norm with one channel a group is the same; its gradient in bf16 is many times slower.
    """

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, X, Y, Z]` to the same."""
        channels_last = x.is_contiguous(memory_format=torch.channels_last_3d)
        if torch.is_grad_enabled() or self.track_running_stats or x.device.type != "cpu" or not channels_last:
            return super().forward(x)
        return F.group_norm(x, self.num_features, self.weight, self.bias, self.eps)


class HalvingConv3d(nn.Conv3d):
    """Convolution of odd kernel size k with stride 2 and padding k // 2, without a bias.

    The instructions for bf16 work on sixteen channels or more at a time, of which the few of an input fill
    less than half. In bf16 blocks of 2x2x2 voxels become eight times the channels, and the same sums are a
    convolution of half the kernel size without a stride. The blocks are made by a convolution too, of zeros
    and ones: that is faster than any way to move the values, and exact.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride=2, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, X, Y, Z]` to `[N, out, X/2, Y/2, Z/2]`, rounded up."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        padding = self.kernel_size[0] // 2
        # Blocks begin where windows do, and one tap more, of zeros, fills the last block of a window.
        weight = F.pad(self.weight, (0, 1) * 3)
        x = x.to(torch.get_autocast_dtype("cpu"))
        odd = [axis % 2 for axis in x.shape[:1:-1]]
        if any(odd):
            x = F.pad(x, [voxels for more in odd for voxels in (0, more)])
        ones = torch.eye(8 * self.in_channels, dtype=x.dtype).reshape(-1, 2, 2, 2, self.in_channels)
        blocks = F.conv3d(x, ones.permute(0, 4, 1, 2, 3), stride=2, padding=padding)
        return F.conv3d(blocks, _blocks(weight))


def _blocks(x: Tensor) -> Tensor:
    """`[N, C, 2X, 2Y, 2Z]` as blocks of 2x2x2 voxels `[N, 8C, X, Y, Z]`, channels last."""
    n, channels = x.shape[:2]
    x_, y, z = (axis // 2 for axis in x.shape[2:])
    x = x.permute(0, 2, 3, 4, 1).reshape(n, x_, 2, y, 2, z, 2, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, x_, y, z, 8 * channels).permute(0, 4, 1, 2, 3)
