"""Voxel-wise sums of the uncertainty or of the error of a network's own prediction (Williams et al., eq. 1).

`uncertainty-sum` adds up the entropy of the mean of N = 20 MC-dropout passes over the volume. `error-sum`
cuts the predicted lesions out of the image, has a reconstruction network fill them in, and adds up what it
gives back minus what is there. The difference has its sign, as in the published code and as the paper's
threshold of -100,000 says. Both are about what the network itself predicts and never look at a label: on
spoiled annotations they are blind, so curation refuses them. They are here for the paper's table.

Sums are of no scale and grow with what is marked: whether a large one is good is learned on reference cases
(`fit`), of which the DSC of the network's own prediction is known. Until then quality is the mean over the
voxels, cut to [0, 1], which says little.
"""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, halved_when_full
from fedqc.config import QCConfig
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage
from fedqc.methods.region_calibration import CALIBRATION, RegionCalibration, calibration_of
from fedqc.methods.segmenters import CrossFitted, Prediction, Reconstructors, Segmenters, region_probability
from fedqc.metrics.overlap import overlap
from fedqc.task import Task
from fedqc.training import Progress


@dataclass(frozen=True)
class VoxelSum:
    """A prediction, and the map whose sum says how good it is."""

    label: Tensor
    """`[X, Y, Z]` uint8 class indices, what the network predicts."""
    map: Tensor
    """`[X, Y, Z]` float32: entropy in nats, or error with its sign."""
    means: Tensor
    """`[1 + R]` float32, mean over the voxels of the whole and of each region, in [0, 1] or [-1, 1]."""

    @property
    def value(self) -> float:
        """The sum over the volume (VS)."""
        return float(self.map.double().sum())


class VoxelSumMethod(Method):
    """A map of the network's own prediction, summed up."""

    judges = "prediction"
    figures = ()

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        self.regions = self.scored_regions()
        self.segmenters = Segmenters(task, config)

    @property
    def networks(self) -> tuple[CrossFitted, ...]:
        """What is trained."""
        return (self.segmenters,)

    @abstractmethod
    def measure(self, network: nn.Module, case: Case, found: Prediction, compute: Compute) -> VoxelSum:
        """The map of a prediction."""

    def stages(self) -> tuple[Stage, ...]:
        """All networks'."""
        return tuple(stage for kind in self.networks for stage in kind.stages())

    def build(self, seed: int) -> nn.Module:
        """The networks and the calibration."""
        parts: dict[str, nn.Module] = {}
        for kind in self.networks:
            parts |= kind.build(seed)
        return nn.ModuleDict({**parts, CALIBRATION: RegionCalibration(len(self.regions), learned_sign=True)})

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
        """One round of one of the networks."""
        (kind,) = (kind for kind in self.networks if plan.stage in kind.all_parts())
        return kind.train_round(network, cases, plan, compute, progress)

    @torch.no_grad()
    def predict(self, network: nn.Module, case: Case, compute: Compute) -> VoxelSum:
        """What the network predicts for a case whose patient it never saw, and how sure that is."""
        network = compute.place(network).eval()
        return self.measure(network, case, self.segmenters.predict(network, case, compute), compute)

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        """Learn from reference cases which DSC a sum means."""
        measured, dsc, present = [], [], []
        for number, case in enumerate(cases, start=1):
            found = self.predict(network, case, compute)
            reference = torch.from_numpy(np.array(case.label)).to(compute.device)
            truth = overlap(found.label[None], reference[None], tuple(self.regions.values()))
            measured.append(found.means.tolist())
            dsc.append([*truth.mean.tolist(), *truth.dsc[0].tolist()])
            present.append(truth.present[0].tolist())
            if progress is not None:
                progress(number, len(cases))
        if measured:
            calibration_of(network).fit(np.array(measured), np.array(dsc), np.array(present))

    def score(
        self,
        network: nn.Module,
        cases: Iterable[Case],
        compute: Compute,
        batch_size: int | None = None,
    ) -> Iterator[Score]:
        """Judge what the network predicts for each case, in order and one by one."""
        for case in cases:
            yield from halved_when_full(partial(self._score, network, compute), [case])

    def _score(self, network: nn.Module, compute: Compute, batch: Sequence[Case]) -> list[Score]:
        (case,) = batch
        found = self.predict(network, case, compute)
        quality, *regions = calibration_of(network)(found.means).tolist()
        return [Score(case.id, quality, dict(zip(self.regions, regions, strict=True)))]


class UncertaintySumMethod(VoxelSumMethod):
    """Entropy of the mean of all passes."""

    name = "uncertainty-sum"

    def measure(self, network: nn.Module, case: Case, found: Prediction, compute: Compute) -> VoxelSum:
        """Entropy of all classes; for a region, of its being there or not. Means are shares of the most."""
        there = region_probability(found.probability, tuple(self.regions.values()))
        binary = (torch.special.entr(there) + torch.special.entr(1 - there)).flatten(1).mean(dim=1)
        whole = found.entropy.mean() / math.log(len(found.probability))
        return VoxelSum(found.label, found.entropy, torch.cat([whole[None], binary / math.log(2)]))


class ErrorSumMethod(VoxelSumMethod):
    """What a reconstruction without the predicted lesions gives back, minus what is there."""

    name = "error-sum"

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        self.reconstructors = Reconstructors(task, config)

    @property
    def networks(self) -> tuple[CrossFitted, ...]:
        """What is trained."""
        return self.segmenters, self.reconstructors

    def measure(self, network: nn.Module, case: Case, found: Prediction, compute: Compute) -> VoxelSum:
        """The mean error over the modalities; there is one, whichever region is asked for."""
        image = torch.from_numpy(np.array(case.image))[None].to(compute.device)
        errors = self.reconstructors.errors(network, [case.patient], image, found.label[None], compute)
        error = errors[0].mean(dim=0)
        return VoxelSum(found.label, error, error.mean().expand(1 + len(self.regions)))
