"""QCResUNet: joint prediction of segmentation quality and error map (Qiu et al., MICCAI 2023).

A ResNet-34 encoder made 3D (instance norm, spatial dropout in every residual block) sees image and label. Its
last layer is pooled into the quality head; a shallow decoder, which starts one layer earlier, makes the error
map. With `width=64` and one label channel for four modalities it has the 66,151,042 parameters of the
published code. Upsampling is nearest and the decoder uses leaky ReLU, as in the paper. With `width=32` and
`attention` it has the 16,569,842 of the journal version's code, where the decoder sees the label once more.

    input ──stem──┬──max pool──┬──layer 1──layer 2──┬──layer 3──┬──layer 4── average pool ── linear ── quality
                  │            │                    │           │
    error map ── up ────────── up ───────────────── up ─────────┘
"""

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.networks.layers import HalvingConv3d


class QCOutput(NamedTuple):
    """What the network predicts for `N` image-label pairs."""

    quality: Tensor
    """`[N, n_outputs]` float32, not clamped: mean DSC, then each region's (or one value alone)."""
    error_logits: Tensor
    """`[N, X, Y, Z]`; the sigmoid is the probability that the label is wrong at a voxel."""
    corrected: Tensor | None = None
    """`[N, 1 + classes, X, Y, Z]` log-probability of each class, where a network corrects the label."""
    class_error_logits: Tensor | None = None
    """`[N, K, X, Y, Z]` the same as `error_logits` for each class, where a network tells them apart."""


class ResidualBlock(nn.Module):
    """Two 3x3x3 convolutions with instance norm around a shortcut, then spatial dropout."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int | tuple[int, int, int], dropout: float
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.InstanceNorm3d(out_channels, affine=True)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.InstanceNorm3d(out_channels, affine=True)
        self.dropout = nn.Dropout3d(dropout)
        self.shortcut: nn.Module = nn.Identity()
        if stride not in (1, (1, 1, 1)) or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv3d(in_channels, out_channels, 1, stride=stride, bias=False),
                nn.InstanceNorm3d(out_channels, affine=True),
            )

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in, X, Y, Z]` to `[N, out, X/stride, Y/stride, Z/stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.dropout(self.norm2(self.conv2(y)))
        return F.relu(y + self.shortcut(x))


class UpBlock(nn.Module):
    """Halve the channels, go to the skip's resolution, join it, two 3x3x3 convolutions."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int) -> None:
        super().__init__()
        self.reduce = nn.Conv3d(in_channels, in_channels // 2, 1)
        channels = in_channels // 2 + skip_channels
        self.conv1 = nn.Conv3d(channels, out_channels, 3, padding=1, bias=False)
        self.conv2 = nn.Conv3d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm = nn.InstanceNorm3d(out_channels)  # without parameters, so both convolutions share it

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """`[N, in, X, Y, Z]` and a skip `[N, skip, 2X, 2Y, 2Z]`, or one less, to the skip's size."""
        x = F.interpolate(self.reduce(x), size=skip.shape[2:], mode="nearest")
        x = F.leaky_relu(self.norm(self.conv1(torch.cat([skip, x], dim=1))), 0.01)
        return F.leaky_relu(self.norm(self.conv2(x)), 0.01)


class ChannelAttention(nn.Module):
    """ECA (Wang et al., CVPR 2020): a channel's weight follows from its mean and those of its neighbours."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def weights(self, means: Tensor) -> Tensor:
        """Means `[N, channels]` to weights in (0, 1), of full precision: they hold for whole channels."""
        with torch.autocast(means.device.type, enabled=False):
            mixed: Tensor = self.mix(means.float()[:, None])
            return mixed[:, 0].sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """`[N, channels, X, Y, Z]` to the same."""
        return x * self.weights(_means(x)).to(x.dtype)[:, :, None, None, None]


class SideMaps(nn.Module):
    """The last stage of the journal version: every depth's error maps beside the label, weighed and added.

    A depth's maps are enlarged as the stem has halved, the label is averaged to that size, both are weighed
    by channel attention, joined by a 1x1x1 convolution, and enlarged to full resolution. Weights and
    convolution are one product here, and it comes before the enlargement: the same sums of fewer values.

    Args:
        channels: Those of each depth of the decoder.
        n_error_maps: How many error maps there are.
        label_channels: How many channels the label has.
        scale: The stem's stride, 1 or 2.
    """

    def __init__(
        self, channels: Sequence[int], n_error_maps: int, label_channels: int, *, scale: int
    ) -> None:
        super().__init__()
        self.scale = scale
        self.maps = nn.ModuleList(nn.Conv3d(count, n_error_maps, 1, bias=False) for count in channels)
        self.attentions = nn.ModuleList(ChannelAttention() for _ in [*channels, n_error_maps])
        self.join = nn.Conv3d(n_error_maps + label_channels, n_error_maps, 1, bias=False)

    def forward(self, decoded: Sequence[Tensor], error: Tensor, label: Tensor) -> Tensor:
        """Join every depth's features, the error maps that follow from the last, and the label.

        Args:
            decoded: each `[N, C, X / s, Y / s, Z / s]`, from coarse to fine.
            error: `[N, n_error_maps, ...]` of the size of the last.
            label: `[N, label_channels, X, Y, Z]`.

        Returns:
            Error maps `[N, n_error_maps, X, Y, Z]`.
        """
        sizes = [features.shape[2:] for features in decoded]
        if self.scale > 1:  # enlarged twice, a depth has the size of the next
            sizes = [*sizes[1:], label.shape[2:]]
        coarser: Tensor | None = None
        for features, size, to_maps, attention in zip(
            decoded, sizes, self.maps, self.attentions[:-1], strict=True
        ):
            coarser = self._joined(to_maps(features), _resized(label, size, "area"), attention, coarser)
        joined = self._joined(error, label, self.attentions[-1])
        return joined if coarser is None else coarser + joined

    def _joined(
        self, maps: Tensor, label: Tensor, attention: nn.Module, coarser: Tensor | None = None
    ) -> Tensor:
        """What maps and the label beside them, of the label's size, add to what coarser depths have said."""
        means = torch.cat([_means(maps), _means(label)], dim=1)
        weights = self.join.weight[:, :, 0, 0, 0] * cast(ChannelAttention, attention).weights(means)[:, None]
        of_maps, of_label = weights[:, :, : maps.shape[1]], weights[:, :, maps.shape[1] :]
        joined = torch.einsum("nec,ncxyz->nexyz", of_maps, maps)
        if coarser is not None:
            joined = joined + _resized(coarser, maps.shape[2:], "nearest")
        return _resized(joined, label.shape[2:], "nearest") + torch.einsum(
            "nec,ncxyz->nexyz", of_label, label
        )


def _means(x: Tensor) -> Tensor:
    """`[N, C, X, Y, Z]` to the mean of each channel `[N, C]`."""
    return x.mean(dim=(2, 3, 4))


def _resized(x: Tensor, size: Sequence[int], mode: str) -> Tensor:
    """`[N, C, X, Y, Z]` at another size; as it is where that is its own, which PyTorch copies."""
    return x if x.shape[2:] == torch.Size(size) else F.interpolate(x, size=tuple(size), mode=mode)


class QCResUNet(nn.Module):
    """QCResUNet of any width and depth, for inputs of any size.

    Args:
        in_channels: Modalities plus label channels.
        n_outputs: Quality values (regions, and their mean).
        n_error_maps: 1, or one for each class (journal version).
        width: Channels of stem and first layer; doubled by every further one (paper 64, journal 32).
        blocks: Residual blocks of each layer; (3, 4, 6, 3) is ResNet-34. At least three layers.
        stem_stride: 2 is the published 7x7x7 stem; 1 is a 3x3x3 stem at full resolution for small volumes.
        dropout: Spatial dropout in every residual block.
        attention: Channel attention as in the journal version: it weighs the input's channels, and, at every
            depth of the decoder, the error maps of that depth beside the label.
        label_channels: How many channels at the end of the input are the label; `attention` alone asks.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        n_outputs: int,
        n_error_maps: int = 1,
        width: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        stem_stride: int = 2,
        dropout: float = 0.3,
        attention: bool = False,
        label_channels: int = 1,
    ) -> None:
        super().__init__()
        self.stem_stride = stem_stride
        self.label_channels = label_channels
        halving = HalvingConv3d(in_channels, width, 7)
        self.stem = nn.Sequential(
            halving if stem_stride == 2 else nn.Conv3d(in_channels, width, 3, padding=1, bias=False),
            nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(),
        )
        self.pool = nn.MaxPool3d(3, stride=2, padding=1)
        layers = []
        channels = width
        for depth, count in enumerate(blocks):
            out, stride = width * 2**depth, 1 if depth == 0 else 2
            first = ResidualBlock(channels, out, stride=stride, dropout=dropout)
            rest = [ResidualBlock(out, out, stride=1, dropout=dropout) for _ in range(count - 1)]
            layers.append(nn.Sequential(first, *rest))
            channels = out
        self.layers = nn.ModuleList(layers)
        self.quality = nn.Linear(channels, n_outputs)

        # The decoder starts at the layer before the last; its skips are the layers between that one and the
        # first, then the max pool, then the stem.
        channels = width * 2 ** (len(blocks) - 2)
        ups = []
        for depth in range(len(blocks) - 3, 0, -1):
            ups.append(UpBlock(channels, width * 2**depth, width * 2**depth))
            channels = width * 2**depth
        self.ups = nn.ModuleList(
            [*ups, UpBlock(channels, width, 2 * width), UpBlock(2 * width, width, width)]
        )
        self.error = nn.Conv3d(width, n_error_maps, 1, bias=not attention)
        self.attention: nn.Module = nn.Identity()
        self.side_maps: SideMaps | None = None
        if attention:
            decoded = [*(width * 2**depth for depth in range(len(blocks) - 3, 0, -1)), 2 * width, width]
            self.attention = ChannelAttention()
            self.side_maps = SideMaps(decoded, n_error_maps, label_channels, scale=stem_stride)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the last feature map of an input of `size`; instance norm refuses a single one."""
        stride = self.stem_stride * 2 ** len(self.layers)  # the max pool, and every layer but the first
        x, y, z = (-(-axis // stride) for axis in size)
        return x, y, z

    def forward(self, x: Tensor) -> QCOutput:
        """Image and label channels `[N, in_channels, X, Y, Z]` to quality and error map."""
        stem = self.stem(self.attention(x))
        pooled = self.pool(stem)
        features = []
        y = pooled
        for layer in self.layers:
            y = layer(y)
            features.append(y)

        with torch.autocast(x.device.type, enabled=False):  # 8 bits of mantissa are too few for a DSC
            quality = self.quality(features[-1].float().mean(dim=(2, 3, 4)))

        y = features[-2]
        decoded = []
        for up, skip in zip(self.ups, [*features[-3:0:-1], pooled, stem], strict=True):
            y = up(y, skip)
            decoded.append(y)
        logits = self.error(y)
        if self.side_maps is not None:
            logits = self.side_maps(decoded, logits, x[:, -self.label_channels :])
        logits = _resized(logits, x.shape[2:], "nearest")
        if logits.shape[1] == 1:
            return QCOutput(quality, logits[:, 0])
        # A label is wrong at a voxel where the mask of some class is.
        return QCOutput(quality, logits.amax(dim=1), class_error_logits=logits)
