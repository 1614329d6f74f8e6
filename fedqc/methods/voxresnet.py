"""Error map of a label by a VoxResNet, and the quality that follows (Zhang & Chung 2019).

The network marks voxels where the label is wrong. The paper's quality indicator, the share of voxels that
are not marked (`Score.quality_indicator`), is near 1 for any small structure. Quality here is the DSC that
label L and error map E imply: correcting L where E says so gives what would be right, so for one class

    TP = |L and not E|    FP = |L and E|    FN = |not L and E|    DSC = 2 TP / (2 TP + FP + FN)

There is one error map for each class, so that a voxel of the wrong class counts in both. The network says
whether a voxel belongs to the class, and where the label says the opposite, it is wrong. As published
(`architecture = "published"`), it has to learn the comparison, too (docs/decisions/0005 and 0018).
"""

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.cases.volumes import Case
from fedqc.compute import seeded
from fedqc.config import QCConfig
from fedqc.methods.base import ERROR_FROM
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod, scaled
from fedqc.metrics.overlap import binary_dice, one_hot
from fedqc.networks.voxresnet import VoxResNet, VoxResNetOutput
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc.training import TrainSettings

PATCH = (96, 96, 80)
"""Voxels of a training patch (section 3)."""
SIDE_WEIGHT = 0.5
"""Weight of the four auxiliary losses beside the final one's; the paper does not say."""
WINDOWS_AT_ONCE = 2


class VoxResNetMethod(PairMethod):
    """Trains a VoxResNet on patches to mark errors, and applies it in sliding windows to any size."""

    name = "voxresnet"
    network_options = frozenset({"architecture", "width", "error_maps", "patch"})
    own_settings = TrainSettings(learning_rate=1e-3, total_steps=1, optimizer="adam", warmup_steps=50)

    def __init__(self, task: Task, config: QCConfig) -> None:
        patch = config.network.patch or PATCH
        x, y, z = (min(want, have) for want, have in zip(patch, task.size, strict=True))
        self.patch = (x, y, z)
        super().__init__(task, config)

    def build(self, seed: int) -> VoxResNet:
        """The network, 64 channels wide where `qc.network.width` is left out."""
        with seeded(derive_seed(seed, "build", self.name)):
            return VoxResNet(
                in_channels=len(self.task.modalities) + self.task.n_classes,
                out_channels=self.task.n_classes,
                width=self.config.network.width or 64,
            )

    def deepest(self) -> tuple[int, int, int]:
        """An eighth of a patch, rounded up."""
        x, y, z = (-(-voxels // 8) for voxels in self.patch)
        return x, y, z

    def shown(self, cases: Sequence[Case], image: Tensor, label: Tensor, maps: Sequence[Tensor]) -> Tensor:
        """Intensities in [-1, 1], of the whole image before a patch of it is cut."""
        return scaled(image, -1, 1)

    def inputs(self, image: Tensor, label: Tensor) -> Tensor:
        """`[N, C + classes, X, Y, Z]`: scaled intensities and one mask a class."""
        joined = torch.cat([image, one_hot(label, self.task.n_classes)], dim=1)
        return joined.to(memory_format=torch.channels_last_3d)

    def batch(self, rng: np.random.Generator, image: Tensor, reference: Tensor, label: Tensor) -> PairBatch:
        """Pairs cut to patches at random places, the same place in image, reference and label."""
        starts = [
            int(rng.integers(have - want + 1)) for have, want in zip(label.shape[1:], self.patch, strict=True)
        ]
        x, y, z = (slice(start, start + want) for start, want in zip(starts, self.patch, strict=True))
        return super().batch(rng, image[:, :, x, y, z], reference[:, x, y, z], label[:, x, y, z])

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """Cross-entropy and Dice, errors as the positive class, of the final and the four side outputs."""
        output: VoxResNetOutput = network(batch.inputs)
        count = self.task.n_classes
        masks = one_hot(batch.label, count)
        error = (masks != one_hot(batch.reference, count)).float()
        dice, cross_entropy = _losses(self._wrong(output.final, masks), error)
        side = [
            sum(_losses(self._wrong(logits, masks), error), torch.zeros_like(dice)) for logits in output.side
        ]
        return {
            "dice": dice,
            "cross_entropy": cross_entropy,
            "side": SIDE_WEIGHT * torch.stack(side).mean(),
        }

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """DSC that label and error maps imply for each region, their mean, and the error maps."""
        from monai.inferers.utils import sliding_window_inference  # noqa: PLC0415 - takes seconds to load

        def final(windows: Tensor) -> Tensor:
            output: VoxResNetOutput = network(windows.to(memory_format=torch.channels_last_3d))
            return output.final.float()

        inputs = self.inputs(image, label)
        logits = sliding_window_inference(
            inputs, self.patch, WINDOWS_AT_ONCE, final, overlap=0.25, mode="gaussian"
        )
        masks = one_hot(label, self.task.n_classes).bool()
        wrong = self._wrong(cast(Tensor, logits), masks).sigmoid()
        corrected = masks ^ (wrong >= ERROR_FROM)
        regions = torch.stack(
            [_implied_dsc(masks, corrected, members) for members in self.regions.values()], dim=1
        )
        present = torch.stack(
            [_union(corrected, members).flatten(1).any(dim=1) for members in self.regions.values()], dim=1
        )
        # As `fedqc.metrics.overlap` takes means, with the corrected label in the place of the truth.
        silent = (~masks.flatten(1).any(dim=1)).float()
        mean = (regions * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        quality = torch.where(present.any(dim=1), mean, silent)
        by_class = wrong if self.config.network.error_maps == "classes" else None
        return Judgement(quality, regions, wrong.amax(dim=1), by_class)

    def _wrong(self, logits: Tensor, masks: Tensor) -> Tensor:
        """Log-odds `[N, K, X, Y, Z]` that the label's class masks are wrong, of what the network says."""
        if self.config.network.architecture == "published":
            return logits
        return torch.where(masks.bool(), -logits, logits)


def _losses(logits: Tensor, error: Tensor) -> tuple[Tensor, Tensor]:
    """Dice over the batch, and cross-entropy, of error maps `[N, K, X, Y, Z]`."""
    logits = logits.float()
    probability = logits.sigmoid()
    dice = 1 - (2 * (probability * error).sum() + 1) / (probability.sum() + error.sum() + 1)
    return dice, F.binary_cross_entropy_with_logits(logits, error)


def _union(masks: Tensor, members: tuple[int, ...]) -> Tensor:
    """`[N, X, Y, Z]` bool of a region, of class masks `[N, K, X, Y, Z]`."""
    return masks[:, [index - 1 for index in members]].any(dim=1)


def _implied_dsc(masks: Tensor, corrected: Tensor, members: tuple[int, ...]) -> Tensor:
    """`[N]` DSC of a region of the label with what it is once it is corrected."""
    return binary_dice(_union(masks, members), _union(corrected, members))
