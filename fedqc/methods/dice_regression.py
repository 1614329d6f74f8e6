"""Dice regression: the DSC of a label, by a CNN that sees it beside a map (Williams et al.).

The map is one of three (`[qc.regression] input`): the image; the entropy of MC-dropout segmenters; or the
error of reconstruction networks, which are shown the image without what the label marks. In the paper the
label is the segmenter's own prediction; here it is whatever is to be judged, annotations too. The networks
that make the maps are trained first, in two folds (`fedqc.methods.segmenters`).
"""

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedqc.augmentation import augment
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.degradation.samples import SamplePool
from fedqc.errors import TrainingError
from fedqc.methods.base import Known, RoundPlan, RoundResult, Score, Stage, part_of
from fedqc.methods.pair_maps import KeptMaps, TrainedParts, pair_maps, weights_digest
from fedqc.methods.pairs import Judgement, PairBatch, PairMethod
from fedqc.networks.dice_regression import CHANNELS, DiceRegressionNet
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings

QC = "qc"
"""Name of the regression's stage and part."""


class DiceRegressionMethod(PairMethod):
    """A regression CNN on a map and a label."""

    name = "dice-regression"
    figures = ()
    network_options = frozenset({"width"})
    own_settings = TrainSettings(
        learning_rate=1e-3, total_steps=1, optimizer="adam", schedule="constant", weight_decay=0.0
    )
    """Adam as its library has it, as in the published code."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.maps = pair_maps(task, config)
        self._kept = KeptMaps()
        self._parts: TrainedParts | None = None
        super().__init__(task, config)

    def stages(self) -> tuple[Stage, ...]:
        """The networks that make the maps, then the regression."""
        before = tuple(stage for kind in self.maps.networks for stage in kind.stages())
        needs = tuple(stage.part for stage in before)
        own = (self.config.rounds, self.config.local_steps, self.config.batch_size)
        return *before, Stage(QC, *own, part=QC, needs=needs)

    def build(self, seed: int) -> nn.Module:
        """All networks; the regression is 16 channels wide where `qc.network.width` is left out."""
        parts: dict[str, nn.Module] = {}
        for kind in self.maps.networks:
            parts |= kind.build(seed)
        width = self.config.network.width or CHANNELS[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "build", self.name))
            parts[QC] = DiceRegressionNet(
                in_channels=self.maps.channels + self.task.n_classes,
                n_outputs=1 + len(self.regions),
                size=self.task.size,
                channels=[width * 2**level for level in range(len(CHANNELS))],
            )
        return nn.ModuleDict(parts)

    def deepest(self) -> tuple[int, int, int]:
        """Voxels that the last convolution sees."""
        x, y, z = (-(-axis // 2 ** (len(CHANNELS) - 1)) for axis in self.task.size)
        return x, y, z

    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        known: Known | None = None,
    ) -> RoundResult:
        """One round of a network that makes maps, or of the regression on labels of known quality."""
        for kind in self.maps.networks:
            if plan.stage in kind.all_parts():
                return kind.train_round(network, cases, plan, compute, progress)
        owner = (plan.site, weights_digest(network, self.stage(QC).needs))
        shown = self._with(TrainedParts(compute.place(network), compute, self._kept, owner))
        return super(DiceRegressionMethod, shown).train_round(
            part_of(network, QC), cases, plan, compute, progress, known=known
        )

    def batches(
        self, cases: Sequence[Case], pool: SamplePool, rng: np.random.Generator, steps: int, batch_size: int
    ) -> Iterator[PairBatch]:
        """Augmented QC samples with their maps in the place of their images."""
        samples = (
            (cases[recipe.case], label)
            for chunk in pool.chunks(rng, steps * batch_size)
            for recipe, label in zip(chunk.recipes, chunk.label, strict=True)
        )
        for _ in range(steps):
            batch = list(islice(samples, batch_size))
            chosen = [case for case, _ in batch]
            label = torch.stack([label for _, label in batch])
            image = torch.from_numpy(np.stack([case.image for case in chosen])).to(label.device)
            reference = torch.from_numpy(np.stack([case.label for case in chosen])).to(label.device)
            of_cases = self.maps.of_cases(self.parts, chosen)
            image, reference, label, *of_cases = augment(rng, image, reference, label, *of_cases)
            patients = [case.patient for case in chosen]
            maps = self.maps.of_pairs(self.parts, patients, image, label, of_cases)
            yield self.batch(rng, maps, reference, label)

    def losses(self, network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        """Huber loss of the mean and the regions' DSC, regions left out that the reference does not hold.

        Its corner is at 1, as in the published code: between values in [0, 1] it is half the squared error.
        """
        target = torch.cat([batch.mean[:, None], batch.dsc], dim=1)
        weight = torch.cat([torch.ones_like(batch.mean[:, None]), batch.present.float()], dim=1)
        loss = F.huber_loss(network(batch.inputs), target, reduction="none")
        return {"quality": (loss * weight).sum() / weight.sum()}

    def judge(self, network: nn.Module, image: Tensor, label: Tensor) -> Judgement:
        """Predicted mean DSC, and each region's, of maps `[N, M, X, Y, Z]` with labels `[N, X, Y, Z]`."""
        quality: Tensor = network(self.inputs(image, label))
        return Judgement(quality[:, 0], quality[:, 1:])

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        """Judge the label of each case, in order."""
        shown = self._with(TrainedParts(compute.place(network).eval(), compute))
        return super(DiceRegressionMethod, shown).score(part_of(network, QC), cases, compute, batch_size)

    def _score(self, network: nn.Module, compute: Compute, batch: Sequence[Case]) -> list[Score]:
        """The scores of cases, whose maps take the place of their images."""
        shown = []
        for case in batch:
            image = torch.from_numpy(np.array(case.image))[None].to(compute.device)
            label = torch.from_numpy(np.array(case.label))[None].to(compute.device)
            of_cases = self.maps.of_cases(self.parts, [case])
            maps = self.maps.of_pairs(self.parts, [case.patient], image, label, of_cases)
            shown.append(replace(case, image=maps[0].cpu().numpy()))
        return super()._score(network, compute, shown)

    @property
    def parts(self) -> TrainedParts:
        """The networks that make maps.

        Raises:
            TrainingError: they are not at hand outside of `train_round` and `score`.
        """
        if self._parts is None:
            raise TrainingError("maps are made in `train_round` and `score`, where the networks are given")
        return self._parts

    def _with(self, parts: TrainedParts) -> Self:
        """The method with the networks at hand that make maps."""
        shown = copy.copy(self)
        shown._parts = parts
        return shown
