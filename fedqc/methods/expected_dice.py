"""The DSC that a label may be expected to have, by what segmenters that never saw it hold possible.

The entropy sum of Williams et al. never looks at the label. This is its form for curation: every pass of an
MC-dropout U-Net is a label that may be the right one, and the mean DSC with them is what is to be expected of
the label at hand. The DSC with single passes show how much the passes differ. Nothing needs references, but
a site that has some learns from them what the expected DSC means there, and how far off it may be (`fit`).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute, halved_when_full
from fedqc.config import QCConfig
from fedqc.degradation.samples import degrade_cases
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage
from fedqc.methods.calibration import MonotoneMap, Widening
from fedqc.methods.region_calibration import CALIBRATION, RegionCalibration, calibration_of
from fedqc.methods.segmenters import Segmenters
from fedqc.metrics.overlap import overlap
from fedqc.task import Task
from fedqc.training import Progress

SPREAD = (0.025, 0.975)
"""Quantiles of the DSC with single passes between which the interval lies, before it is widened."""
FOLDS = 5
"""Groups of patients, each of which is tried with a calibration on the others, to see how wide to make it."""
INTERVAL = "interval"
"""Name of the part of the network that widens it."""


class ExpectedDiceMethod(Method):
    """Expected DSC with the passes of one MC-dropout U-Net."""

    name = "expected-dice"
    judges = "label"
    figures = ("qi", "low", "high")

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        self.regions = self.scored_regions()
        self.segmenters = Segmenters(task, config, self.snapshots)

    @property
    def snapshots(self) -> int:
        """Segmenters of each fold."""
        return 1

    def stages(self) -> tuple[Stage, ...]:
        """The segmenters'."""
        return self.segmenters.stages()

    def build(self, seed: int) -> nn.Module:
        """Segmenters, calibration, and what widens intervals."""
        fitted = {CALIBRATION: RegionCalibration(len(self.regions)), INTERVAL: Widening()}
        return nn.ModuleDict({**self.segmenters.build(seed), **fitted})

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
        """One round of a segmenter."""
        return self.segmenters.train_round(network, cases, plan, compute, progress)

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        """Learn from degraded labels of the references which DSC an expected DSC means, and how safely."""
        network = compute.place(network)
        measured, dsc, present, patients = [], [], [], []
        made = degrade_cases(cases, self.task, self.kinds, rng)
        for index, labels in groupby(made, key=lambda degraded: degraded.recipe.case):
            samples = self.segmenters.predict(network, cases[index], compute).samples
            for degraded in labels:
                label = torch.from_numpy(degraded.case.label).to(compute.device)
                measured.append(self._measured(label, samples))
                dsc.append([degraded.mean_dsc, *(degraded.dsc.get(name, 0.0) for name in self.regions)])
                present.append([name in degraded.dsc for name in self.regions])
                patients.append(degraded.case.patient)
            if progress is not None:
                progress(index + 1, len(cases))
        if measured:
            values, true = torch.stack(measured).cpu().numpy(), np.array(dsc)  # [n, 3, 1 + R], [n, 1 + R]
            calibration_of(network).fit(values[:, 0], true, np.array(present))
            ends = _ends_for_the_unseen(values[..., 0], true[:, 0], patients)
            _widening_of(network).fit(ends[:, 0], ends[:, 1], true[:, 0])

    def score(
        self,
        network: nn.Module,
        cases: Iterable[Case],
        compute: Compute,
        batch_size: int | None = None,
    ) -> Iterator[Score]:
        """Judge the label of each case, in order and one by one."""
        network = compute.place(network).eval()
        for case in cases:
            yield from halved_when_full(partial(self._score, network, compute), [case])

    @torch.no_grad()
    def _score(self, network: nn.Module, compute: Compute, batch: Sequence[Case]) -> list[Score]:
        (case,) = batch
        label = torch.from_numpy(np.array(case.label)).to(compute.device)
        samples = self.segmenters.predict(network, case, compute).samples
        calibrated = calibration_of(network)(self._measured(label, samples))
        (quality, *regions), low, high = calibrated.tolist()
        wrong = torch.stack([sample != label for sample in samples]).float().mean(dim=0)
        return [
            Score(
                case.id,
                quality,
                dict(zip(self.regions, regions, strict=True)),
                wrong.cpu().numpy(),
                corrected=samples.mode(dim=0).values.cpu().numpy(),
                interval=_widening_of(network)(low[0], high[0], quality),
            )
        ]

    def _measured(self, label: Tensor, samples: Tensor) -> Tensor:
        """`[3, 1 + R]`: the mean agreement of a label with the passes, and its lower and upper end."""
        single = agreement(label, samples, tuple(self.regions.values()))
        ends = torch.tensor(SPREAD, device=single.device)
        return torch.cat([single.mean(dim=0, keepdim=True), single.quantile(ends, dim=0)])


def _ends_for_the_unseen(
    measured: NDArray[np.float32], true: NDArray[np.float64], patients: Sequence[str]
) -> NDArray[np.float64]:
    """Both ends `[n, 2]` of the interval of each label, by a calibration on the labels of other patients.

    On those it was fitted to, a calibration is less wrong than it will be. One patient alone leaves nothing
    to fit to: its intervals are as wrong as can be.

    Args:
        measured: `[n, 3]`, see `_measured`; of whole labels.
        true: `[n]`, their DSC.
        patients: of each label.
    """
    from sklearn.model_selection import GroupKFold  # noqa: PLC0415 - takes long, only where it is fitted

    ends = np.tile((true - 1)[:, None], 2)
    n_patients = len(set(patients))
    if n_patients > 1:
        for learned, tried in GroupKFold(min(FOLDS, n_patients)).split(measured, groups=patients):
            calibration = MonotoneMap()
            calibration.fit(measured[learned, 0], true[learned])
            ends[tried] = calibration(measured[tried, 1:])
    return ends


def _widening_of(network: nn.Module) -> Widening:
    widening = network.get_submodule(INTERVAL)
    assert isinstance(widening, Widening)  # noqa: S101 - for the type checker
    return widening


def agreement(label: Tensor, samples: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """DSC of a label with each of N labels that may be the right one.

    Args:
        label: `[X, Y, Z]` class indices.
        samples: `[N, X, Y, Z]` class indices.
        regions: class indices of each region.

    Returns:
        `[N, 1 + R]` float32: the mean over the regions that a sample holds, and each region's
        (conventions of `fedqc.metrics.overlap`).
    """
    found = [overlap(label[None], sample[None], regions) for sample in samples]
    return torch.stack([torch.cat([one.mean, one.dsc[0]]) for one in found])
