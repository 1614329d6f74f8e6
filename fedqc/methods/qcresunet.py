"""QCResUNet as a QC method (Qiu et al., MICCAI 2023): DSC of every region, their mean, and an error map."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.compute import seeded
from fedqc.config import QCConfig
from fedqc.errors import ConfigError
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod, quality_loss
from fedqc.metrics.overlap import one_hot
from fedqc.networks.corrective_qcresunet import CorrectiveQCResUNet
from fedqc.networks.qcresunet import QCOutput, QCResUNet
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc.training import TrainSettings

PUBLISHED_SETTINGS = TrainSettings(
    learning_rate=1e-4, total_steps=1, optimizer="adam", schedule="exponential", weight_decay=5e-4
)
"""Adam from 1e-4 to 1e-6 with an L2 penalty of 5e-4 (Qiu et al. 2023, 3.2)."""


class QCResUNetMethod(PairMethod):
    """Trains and applies `QCResUNet` as published, or (the default) in the form that corrects the label."""

    name = "qcresunet"
    network_options = frozenset({"architecture", "width", "blocks", "dropout", "attention", "error_maps"})
    own_settings = TrainSettings(learning_rate=3e-3, total_steps=1, warmup_steps=50)

    def __init__(self, task: Task, config: QCConfig) -> None:
        if config.network.architecture == "published":
            self.own_settings = PUBLISHED_SETTINGS  # type: ignore[misc]  # the class has the other form's
        elif config.network.attention:
            raise ConfigError(
                "qc.network.attention is an option of the published network; set architecture = 'published' "
                "or leave it out"
            )
        super().__init__(task, config)

    def deepest(self) -> tuple[int, int, int]:
        """The feature map that is pooled; the corrective form halves whole voxels only."""
        with torch.device("meta"):  # only its size is asked for
            network = self.build(0)
        if isinstance(network, CorrectiveQCResUNet):
            self.task.check_strides(network.stride)
        return network.deepest(self.task.size)

    def build(self, seed: int) -> QCResUNet | CorrectiveQCResUNet:
        """The network that `qc.network` describes; what is left out there has the architecture's default."""
        chosen = self.config.network
        size: dict[str, Any] = {
            name: value
            for name, value in (
                ("width", chosen.width),
                ("blocks", chosen.blocks),
                ("dropout", chosen.dropout),
            )
            if value is not None
        }
        in_channels = len(self.task.modalities) + self.task.n_classes
        with seeded(derive_seed(seed, "build", self.name)):
            if chosen.architecture == "published":
                return QCResUNet(
                    in_channels=in_channels,
                    n_outputs=len(self.regions) + 1,
                    n_error_maps=self.task.n_classes if self._by_class else 1,
                    attention=chosen.attention,
                    label_channels=self.task.n_classes,
                    **size,
                )
            return CorrectiveQCResUNet(
                in_channels=in_channels,
                regions=tuple(self.regions.values()),
                n_classes=self.task.n_classes,
                **size,
            )

    @property
    def _by_class(self) -> bool:
        return self.config.network.error_maps == "classes"

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """MAE of the DSC (eq. 1) plus lambda times Dice and cross-entropy of the error maps (eq. 2 and 3)."""
        output: QCOutput = network(batch.inputs)
        logits, error = output.error_logits.float(), batch.error.float()
        if self._by_class:
            logits, error = self._class_logits(output, batch.label), self._class_errors(batch).float()
        probability = logits.sigmoid()
        # Over the whole batch, as in the paper: a sample without any error has no Dice of its own.
        dice = 1 - (2 * (probability * error).sum() + 1) / (probability.sum() + error.sum() + 1)
        if output.corrected is not None:  # what is right says more than that something is wrong
            cross_entropy = F.nll_loss(output.corrected, batch.reference.long())
        else:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, error)
        weight = self.config.error_weight
        return {
            "quality": quality_loss(output.quality, batch),
            "dice": weight * dice,
            "cross_entropy": weight * cross_entropy,
        }

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """Predicted mean DSC and each region's, the error map or one for each class, and the right label."""
        output: QCOutput = network(self.inputs(image, label))
        quality = output.quality
        by_class = self._class_logits(output, label).sigmoid() if self._by_class else None
        corrected = output.corrected
        return Judgement(
            quality[:, 0],
            quality[:, 1:],
            output.error_logits.float().sigmoid(),
            class_errors=by_class,
            corrected=None if corrected is None else corrected.argmax(dim=1).to(torch.uint8),
        )

    def _class_logits(self, output: QCOutput, label: Tensor) -> Tensor:
        """Log-odds `[N, K, X, Y, Z]` that the mask of each class is wrong at a voxel."""
        if output.class_error_logits is not None:
            return output.class_error_logits.float()
        if output.corrected is None:  # one class, whose error map is the only one
            return output.error_logits.float()[:, None]
        # The corrected label holds the class or not; wrong is where the label says otherwise.
        inside = output.corrected[:, 1:].exp().clamp(1e-6, 1 - 1e-6).logit()
        return torch.where(one_hot(label, self.task.n_classes).bool(), -inside, inside)

    def _class_errors(self, batch: PairBatch) -> Tensor:
        """`[N, K, X, Y, Z]` bool, where the mask of each class is wrong."""
        count = self.task.n_classes
        return one_hot(batch.label, count) != one_hot(batch.reference, count)
