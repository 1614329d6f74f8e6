"""Baselines that regress quality from image and label and have no error map (Qiu et al. 2023, Table 1)."""

from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, freed_memory_returned, seeded
from fedqc.methods.base import Score
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod, quality_loss
from fedqc.methods.qcresunet import PUBLISHED_SETTINGS
from fedqc.networks.pooled_unet import PooledUNet
from fedqc.networks.resnet import ResNet
from fedqc.seeding import derive_seed


class _Regression(PairMethod):
    """One number for the label's mean DSC and one for each region's, learned with the MAE (eq. 1)."""

    own_settings = PUBLISHED_SETTINGS

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """MAE of the DSC."""
        return {"quality": quality_loss(network(batch.inputs), batch)}

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """Predicted mean DSC, and each region's."""
        quality: Tensor = network(self.inputs(image, label))
        return Judgement(quality[:, 0], quality[:, 1:])

    @property
    def in_channels(self) -> int:
        """Modalities and classes."""
        return len(self.task.modalities) + self.task.n_classes

    @property
    def n_outputs(self) -> int:
        """The mean and each region."""
        return len(self.regions) + 1


class UNetMethod(_Regression):
    """A 3D U-Net whose last feature map is pooled into a linear head."""

    name = "unet"
    network_options = frozenset({"width", "dropout"})

    def build(self, seed: int) -> PooledUNet:
        """The network, 32 channels wide where `qc.network.width` is left out."""
        chosen = self.config.network
        with seeded(derive_seed(seed, "build", self.name)):
            return PooledUNet(
                in_channels=self.in_channels,
                n_outputs=self.n_outputs,
                width=chosen.width or 32,
                dropout=chosen.dropout or 0.0,
            )

    def deepest(self) -> tuple[int, int, int]:
        """The coarsest of five levels."""
        with torch.device("meta"):
            return self.build(0).deepest(self.task.size)

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        """As any; at 240x240x155 each of its feature maps takes 570 MB, and kept memory came to 12 GB."""
        with freed_memory_returned(compute):
            yield from super().score(network, cases, compute, batch_size)


class ResNet34Method(_Regression):
    """QCResUNet's encoder alone: a ResNet-34 made 3D."""

    name = "resnet34"
    network_options = frozenset({"width", "blocks", "dropout"})
    bottleneck: ClassVar[bool] = False

    def build(self, seed: int) -> ResNet:
        """The network, 64 channels wide where `qc.network.width` is left out."""
        chosen = self.config.network
        with seeded(derive_seed(seed, "build", self.name)):
            return ResNet(
                in_channels=self.in_channels,
                n_outputs=self.n_outputs,
                width=chosen.width or 64,
                blocks=chosen.blocks or (3, 4, 6, 3),
                dropout=0.3 if chosen.dropout is None else chosen.dropout,
                bottleneck=self.bottleneck,
            )

    def deepest(self) -> tuple[int, int, int]:
        """The feature map that is pooled."""
        with torch.device("meta"):
            return self.build(0).deepest(self.task.size)


class ResNet50Method(ResNet34Method):
    """The same with bottleneck blocks, a ResNet-50."""

    name = "resnet50"
    bottleneck = True
