"""A QCResUNet whose decoder says which class every voxel should have; quality and error map follow from that.

Encoder blocks and decoder blocks are QCResUNet's (`qcresunet.py`), the reading of the decoder is ours. The
published decoder must learn where image and label disagree, an exclusive-or of two contours. Here it predicts
the corrected label, and the disagreement with the label at hand is computed:

    error map       1 - P(the label's own class) at each voxel
    region's DSC    2 sum(L P) / (sum(L) + sum(P)) of the label L and the predicted P of that region,
                    plus a learned correction from the pooled deepest features

It needs an order of magnitude fewer steps than the published form and carries over to errors it never saw,
which it need not recognise (docs/decisions/0005). There is no max pool, and the decoder starts at the deepest
layer.

    input ──stem (1/2)── layer 1 (1/2) ──── layer 2 (1/4) ──── layer 3 (1/8) ── average pool ─┐
                            │                  │                  │                           ├── quality
    corrected label ── up ──┴─────── up ───────┴─────── up ───────┘ ── overlap with label ────┘
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedqc.networks.layers import HalvingConv3d
from fedqc.networks.qcresunet import QCOutput, ResidualBlock, UpBlock

HIDDEN = 64
"""Units of the quality head's one hidden layer."""


class CorrectiveQCResUNet(nn.Module):
    """QCResUNet that corrects the label and compares.

    Args:
        in_channels: Modalities plus classes; the last channels are the one-hot label without background.
        regions: Class indices (from 1) of each region that is scored.
        n_classes: Classes without background.
        width: Channels of the stem and the first layer; doubled by every further layer.
        blocks: Residual blocks of each layer.
        dropout: Spatial dropout in every residual block.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        regions: Sequence[Sequence[int]],
        n_classes: int,
        width: int = 16,
        blocks: Sequence[int] = (1, 2, 3),
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.regions = [list(region) for region in regions]
        self.n_classes = n_classes
        self.stem = nn.Sequential(
            HalvingConv3d(in_channels, width, 5),
            nn.InstanceNorm3d(width, affine=True),
            nn.ReLU(),
        )
        widths = [width * 2**depth for depth in range(len(blocks))]
        layers = []
        channels = width
        for depth, (out, count) in enumerate(zip(widths, blocks, strict=True)):
            first = ResidualBlock(channels, out, stride=1 if depth == 0 else 2, dropout=dropout)
            rest = [ResidualBlock(out, out, stride=1, dropout=dropout) for _ in range(count - 1)]
            layers.append(nn.Sequential(first, *rest))
            channels = out
        self.layers = nn.ModuleList(layers)
        pairs = zip(widths[:0:-1], widths[-2::-1], strict=True)
        self.ups = nn.ModuleList(UpBlock(deep, skip, skip) for deep, skip in pairs)
        self.corrected = nn.ConvTranspose3d(width, n_classes + 1, 2, stride=2)
        last = nn.Linear(HIDDEN, len(regions) + 1)
        self.quality = nn.Sequential(nn.Linear(widths[-1] + 3 * len(regions), HIDDEN), nn.ReLU(), last)

        for module in self.modules():
            if isinstance(module, nn.Conv3d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # Most voxels are background, and at first the overlap speaks alone.
        nn.init.zeros_(self.corrected.bias)  # type: ignore[arg-type]
        with torch.no_grad():
            self.corrected.bias[0] = 2.0  # type: ignore[index]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    @property
    def stride(self) -> int:
        """Voxels of the input behind one voxel of the last layer; every axis must be a multiple of it."""
        return int(2 ** len(self.layers))

    def deepest(self, size: tuple[int, int, int]) -> tuple[int, int, int]:
        """Voxels of the last feature map of an input of `size`; instance norm refuses a single one."""
        x, y, z = (axis // self.stride for axis in size)
        return x, y, z

    def forward(self, x: Tensor) -> QCOutput:
        """Image and label channels `[N, in_channels, X, Y, Z]` to quality and error map."""
        y = self.stem(x)
        features = []
        for layer in self.layers:
            y = layer(y)
            features.append(y)
        for up, skip in zip(self.ups, features[-2::-1], strict=True):
            y = up(y, skip)
        logits = self.corrected(y)
        with torch.autocast(x.device.type, enabled=False):  # 8 bits of mantissa are too few for a DSC
            logits = logits.float()
            label = x[:, -self.n_classes :].float()
            quality = self._quality(logits.softmax(dim=1)[:, 1:], label, features[-1].float())
            return QCOutput(quality, _disagreement(logits, label), logits.log_softmax(dim=1))

    def _quality(self, predicted: Tensor, label: Tensor, deepest: Tensor) -> Tensor:
        """Mean and regions' quality `[N, 1 + R]`: soft DSC with the corrected label, plus a correction."""
        overlaps, in_label, in_predicted = [], [], []
        for region in self.regions:
            channels = [index - 1 for index in region]
            ours, theirs = label[:, channels].sum(dim=1), predicted[:, channels].sum(dim=1)
            overlaps.append((ours * theirs).sum(dim=(1, 2, 3)))
            in_label.append(ours.sum(dim=(1, 2, 3)))
            in_predicted.append(theirs.sum(dim=(1, 2, 3)))
        both, of_label, of_predicted = (
            torch.stack(part, dim=1) for part in (overlaps, in_label, in_predicted)
        )
        dsc = (2 * both + 1) / (of_label + of_predicted + 1)
        precision, recall = (both + 1) / (of_label + 1), (both + 1) / (of_predicted + 1)
        pooled = deepest.mean(dim=(2, 3, 4))
        correction: Tensor = self.quality(torch.cat([pooled, dsc, precision, recall], dim=1))
        return torch.cat([dsc.mean(dim=1, keepdim=True), dsc], dim=1) + correction


def _disagreement(logits: Tensor, label: Tensor) -> Tensor:
    """Log-odds `[N, X, Y, Z]` that a voxel's class is not the label's: the others' logits against its own."""
    own = torch.cat([1 - label.sum(dim=1, keepdim=True), label], dim=1).bool()
    others = logits.masked_fill(own, float("-inf")).logsumexp(dim=1)
    return others - logits.masked_fill(~own, 0.0).sum(dim=1)
