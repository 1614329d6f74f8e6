"""QCResUNet as a QC method (Qiu et al., MICCAI 2023): DSC of every region, their mean, and an error map."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.augmentation import augment
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, halved_when_full
from fedqc.config import QCConfig
from fedqc.degradation.samples import ALL_KINDS, LabelFactory, SamplePool
from fedqc.errors import ConfigError
from fedqc.methods.base import Method, RoundPlan, RoundResult, Score
from fedqc.metrics.overlap import error_map, one_hot, overlap
from fedqc.networks.corrective_qcresunet import CorrectiveQCResUNet
from fedqc.networks.qcresunet import QCOutput, QCResUNet
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings, train


@dataclass(frozen=True)
class QCBatch:
    """Image-label pairs whose quality is known."""

    inputs: Tensor
    """`[N, C + classes, X, Y, Z]` image and one-hot label."""
    dsc: Tensor
    """`[N, R]` true DSC of each region."""
    present: Tensor
    """`[N, R]` whether the region is in the reference."""
    mean: Tensor
    """`[N]` true mean DSC."""
    reference: Tensor
    """`[N, X, Y, Z]` uint8, the class indices that are right."""
    error: Tensor
    """`[N, X, Y, Z]` bool, where the label is wrong."""


class QCResUNetMethod(Method):
    """Trains and applies `QCResUNet` as published, or (the default) in the form that corrects the label."""

    name = "qcresunet"
    judges = "label"

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        self.regions = task.region_indices()
        unknown = [kind for kind in config.leave_out if kind not in ALL_KINDS]
        if unknown:
            raise ConfigError(
                f"qc.leave_out names {', '.join(unknown)}; kinds of label error are {', '.join(ALL_KINDS)}"
            )
        self.kinds = [kind for kind in ALL_KINDS if kind not in config.leave_out]
        with torch.device("meta"):  # only its stride is asked for
            stride = self.build(0).stride
        task.check_strides(stride)
        if max(task.size) == stride:  # instance norm of one voxel is 0, whatever the voxel
            raise ConfigError(
                f"task {task.name!r}: size {'x'.join(map(str, task.size))} is one voxel in the network's "
                "last layer; use a larger size or fewer qc.network.blocks"
            )
        self.shortest_axis = min(task.size) // stride

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
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "build", self.name))
            if chosen.architecture == "published":
                return QCResUNet(in_channels=in_channels, n_outputs=len(self.regions) + 1, **size)
            return CorrectiveQCResUNet(
                in_channels=in_channels, regions=self.regions, n_classes=self.task.n_classes, **size
            )

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
    ) -> RoundResult:
        """One round of local steps on freshly degraded labels of the cases."""
        first_step = (plan.round - 1) * plan.steps
        settings = TrainSettings(
            learning_rate=self.config.learning_rate,
            total_steps=plan.rounds * plan.steps,
            first_step=first_step,
            warmup_steps=50,
            proximal=plan.proximal,
        )
        compute = compute.for_training(self.shortest_axis)
        rng = generator(plan.seed, "train", plan.site, plan.round)
        # Dropout draws from PyTorch's own generator.
        with torch.random.fork_rng(devices=[compute.device] if compute.device.type == "cuda" else []):
            torch.manual_seed(derive_seed(plan.seed, "dropout", plan.site, plan.round))
            batches = self.batches(cases, rng, plan.steps, plan.batch_size, compute.device)
            losses = train(compute.place(network), batches, self.losses, settings, compute, progress)
        return RoundResult(losses, plan.steps * plan.batch_size)

    def batches(
        self,
        cases: Sequence[Case],
        rng: np.random.Generator,
        steps: int,
        batch_size: int,
        device: torch.device,
    ) -> Iterator[QCBatch]:
        """Augmented QC samples, made chunk by chunk; images are read when their batch is made."""
        factory = LabelFactory([case.label for case in cases], self.regions, self.kinds, device)
        pool = SamplePool(factory, self.config.samples, self.config.balance)
        samples = (
            (cases[recipe.case], label)
            for chunk in pool.chunks(rng, steps * batch_size)
            for recipe, label in zip(chunk.recipes, chunk.label, strict=True)
        )
        for _ in range(steps):
            batch = list(islice(samples, batch_size))
            image = torch.from_numpy(np.stack([case.image for case, _ in batch])).to(device)
            reference = torch.from_numpy(np.stack([case.label for case, _ in batch])).to(device)
            label = torch.stack([label for _, label in batch]).to(device)
            image, reference, label = augment(rng, image, reference, label)
            truth = overlap(label, reference, self.regions)
            yield QCBatch(
                inputs=self.inputs(image, label),
                dsc=truth.dsc,
                present=truth.present,
                mean=truth.mean,
                reference=reference,
                error=error_map(label, reference),
            )

    def inputs(self, image: Tensor, label: Tensor) -> Tensor:
        """Network input `[N, C + classes, X, Y, Z]` of images `[N, C, X, Y, Z]` and labels `[N, X, Y, Z]`."""
        joined = torch.cat([image, one_hot(label, self.task.n_classes)], dim=1)
        return joined.to(memory_format=torch.channels_last_3d)

    @staticmethod
    def losses(network: nn.Module, batch: QCBatch) -> dict[str, Tensor]:
        """MAE of the DSC (eq. 1) plus Dice and cross-entropy of the error map (eq. 2), lambda 1 (eq. 3)."""
        output: QCOutput = network(batch.inputs)
        target = torch.cat([batch.mean[:, None], batch.dsc], dim=1)
        weight = torch.cat([torch.ones_like(batch.mean[:, None]), batch.present.float()], dim=1)
        quality = ((output.quality - target).abs() * weight).sum() / weight.sum()
        logits, error = output.error_logits.float(), batch.error.float()
        probability = logits.sigmoid()
        # Over the whole batch, as in the paper: a sample without any error has no Dice of its own.
        dice = 1 - (2 * (probability * error).sum() + 1) / (probability.sum() + error.sum() + 1)
        if output.corrected is not None:  # what is right says more than that something is wrong
            cross_entropy = F.nll_loss(output.corrected, batch.reference.long())
        else:
            cross_entropy = F.binary_cross_entropy_with_logits(logits, error)
        return {"quality": quality, "dice": dice, "cross_entropy": cross_entropy}

    @torch.inference_mode()
    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        """Predicted DSC per region and mean, and the error map."""
        network = compute.place(network).eval()
        remaining = iter(cases)
        while batch := list(islice(remaining, batch_size)):
            yield from halved_when_full(partial(self._score, network, compute), batch)

    def _score(self, network: nn.Module, compute: Compute, batch: Sequence[Case]) -> list[Score]:
        """The scores of cases that fit into memory together."""
        image = torch.from_numpy(np.stack([case.image for case in batch])).to(compute.device)
        label = torch.from_numpy(np.stack([case.label for case in batch])).to(compute.device)
        with compute.autocast():
            output: QCOutput = network(self.inputs(image, label))
        quality = output.quality.float().clamp(0, 1).cpu().numpy()
        errors = output.error_logits.float().sigmoid().cpu().numpy()
        return [
            Score(
                case.id,
                float(values[0]),
                dict(zip(self.task.regions, map(float, values[1:]), strict=True)),
                error,
            )
            for case, values, error in zip(batch, quality, errors, strict=True)
        ]
