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
    convolution of half the kernel size without a stride.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        padding = kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, stride=2, padding=padding, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[N, C, X, Y, Z]` to `[N, out, X/2, Y/2, Z/2]`, rounded up."""
        if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        size, padding = self.kernel_size[0], self.kernel_size[0] // 2
        # One tap more, of zeros, on the side that makes the first voxel of a window the first of a block.
        front = padding % 2
        taps = (size + 1) // 2
        weight = F.pad(self.weight, (front, 1 - front) * 3)
        before = padding + front
        after = [(before, 2 * taps - 2 - before + axis % 2) for axis in x.shape[:1:-1]]
        x = F.pad(x.to(torch.get_autocast_dtype("cpu")), [voxels for pair in after for voxels in pair])
        return F.conv3d(_blocks(x), _blocks(weight))


def _blocks(x: Tensor) -> Tensor:
    """`[N, C, 2X, 2Y, 2Z]` as blocks of 2x2x2 voxels `[N, 8C, X, Y, Z]`, channels last."""
    n, channels = x.shape[:2]
    x_, y, z = (axis // 2 for axis in x.shape[2:])
    x = x.permute(0, 2, 3, 4, 1).reshape(n, x_, 2, y, 2, z, 2, channels).permute(0, 1, 3, 5, 2, 4, 6, 7)
    return x.reshape(n, x_, y, z, 8 * channels).permute(0, 4, 1, 2, 3)
