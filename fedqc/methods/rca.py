"""Reverse classification accuracy (Valindria et al. 2017): the label to be judged is an atlas for references.

If a label is right, it can be carried onto other cases that look similar, and agrees there with their labels,
which are known to be right. The best DSC over the references, region by region, says how good the label is.
That is rarely 1 even for a perfect label, so what an estimate means is learned from spoiled references.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.degradation.samples import degrade_cases
from fedqc.errors import DataError, TrainingError
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage
from fedqc.methods.neighbours import Features, Neighbours, appearance, weight_of_place
from fedqc.methods.region_calibration import CALIBRATION, RegionCalibration, calibration_of
from fedqc.methods.registration import Registration
from fedqc.task import Task
from fedqc.training import Progress

CALIBRATION_KINDS = 4
"""Kinds of error of each reference that is spoiled to calibrate on, where labels are judged one by one."""
_OVERVIEW = 16
"""Voxels along each side of the small images by which similar references are found."""


class Comparison(Protocol):
    """A way to carry labels onto references (`Neighbours`, `Registration`)."""

    def prepare(self, index: int) -> None:
        """Do whatever has to be done of a reference before anything is compared with it."""

    def begin(
        self, case: Case, labels: Sequence[NDArray[np.uint8]]
    ) -> Callable[[int], tuple[NDArray[np.float32], NDArray[np.bool_]]]:
        """Get ready; what is returned compares labels with the reference at an index."""


@dataclass(frozen=True, eq=False)
class Estimate:
    """What the references say of L labels of one image, before calibration."""

    regions: NDArray[np.float32]
    """`[L, R]` best DSC over the references."""
    mean: NDArray[np.float32]
    """`[L]`, over the regions that the label holds or lacks wrongly."""
    compared: tuple[str, ...]
    """Ids of the references, the most similar first."""

    @property
    def values(self) -> NDArray[np.float32]:
        """`[L, 1 + R]`, of whole labels and of their regions."""
        return np.concatenate([self.mean[:, None], self.regions], axis=1)


@dataclass(frozen=True, eq=False)
class _Overview:
    """What is kept of a reference to choose among them."""

    id: str
    patient: str
    image: NDArray[np.float32]


class RCAMethod(Method):
    """Compares a label with those of the site's own reference cases; nothing is trained.

    Args:
        task: What is segmented.
        config: `qc.rca` says how labels are compared.
        together: Judge the labels of one image at once, which takes hardly longer than one of them. They
            share the voxels that are drawn, so it is another measure than one label at a time, with a
            calibration of its own: for many labels of each image, as in experiments, not for a folder of
            cases.
        features: What voxels look like to form `features`.
        clock: Seconds that pass, for `qc.rca.seconds`.
    """

    name = "rca"
    judges = "label"
    figures = ()
    needs_references = True

    def __init__(
        self,
        task: Task,
        config: QCConfig,
        *,
        together: bool = False,
        features: Features = appearance,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(task, config)
        self.regions = tuple(self.scored_regions().values())
        self.together = together
        self.features = features
        self._clock = clock
        self._overviews: tuple[_Overview, ...] = ()
        self._looked_through: Sequence[Case] | None = None
        self._comparison: Comparison | None = None
        self._made_for: tuple[Sequence[Case], torch.device] | None = None

    def stages(self) -> tuple[Stage, ...]:
        """None."""
        return ()

    def build(self, seed: int) -> nn.Module:
        """Part `calibration`: one map for the quality and one for each region, which change nothing yet."""
        return nn.ModuleDict({CALIBRATION: RegionCalibration(len(self.regions))})

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
        """There is no stage to train.

        Raises:
            TrainingError: always.
        """
        raise TrainingError(
            f"method {self.name!r} has nothing to train, found stage {plan.stage!r}; leave it out"
        )

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        """Learn what an estimate means from references whose labels are spoiled.

        Each is compared with the references of other patients, and judged as labels will be: with other
        labels of its image or alone. Without references of two patients estimates stay as they are.

        Args:
            network: with part `calibration`, which is fitted in place.
            cases: reference cases, of which `qc.rca.calibration` are drawn.
            compute: where labels are compared.
            rng: draws cases and errors.
            progress: told after every case.
        """
        names = list(self.scored_regions())
        measured, dsc, present = [], [], []
        drawn = rng.permutation(len(cases))[: self.config.rca.calibration]
        for done, index in enumerate(drawn, start=1):
            case = cases[int(index)]
            if not self._others(case, compute):
                continue
            kinds = self.kinds
            if not self.together:
                kinds = rng.permutation(kinds)[:CALIBRATION_KINDS].tolist()
            spoiled = list(degrade_cases(cases, self.task, kinds, rng, only=[int(index)]))
            measured += [
                self.estimate(case, [one.label for one in group], compute).values
                for group in self._groups(one.case for one in spoiled)
            ]
            dsc += [[one.mean_dsc, *(one.dsc.get(name, 0.0) for name in names)] for one in spoiled]
            present += [[name in one.dsc for name in names] for one in spoiled]
            if progress is not None:
                progress(done, len(drawn))
        if measured:
            calibration_of(network).fit(np.concatenate(measured), np.array(dsc), np.array(present))

    def score(
        self,
        network: nn.Module,
        cases: Iterable[Case],
        compute: Compute,
        batch_size: int = 8,
    ) -> Iterator[Score]:
        """Judge the label of each case, in order.

        Raises:
            DataError: there is no reference case of another patient.
        """
        calibration = calibration_of(network)
        for group in self._groups(cases):
            found = self.estimate(group[0], [case.label for case in group], compute)
            meant = calibration(torch.from_numpy(found.values)).tolist()
            for case, (quality, *regions) in zip(group, meant, strict=True):
                yield Score(case.id, quality, dict(zip(self.scored_regions(), regions, strict=True)))

    def _groups(self, cases: Iterable[Case]) -> Iterator[list[Case]]:
        """Cases that are judged at once: neighbours of one id, whose image is one, or each alone."""
        if not self.together:
            yield from ([case] for case in cases)
            return
        for _, group in groupby(cases, key=lambda case: case.id):
            yield list(group)

    def estimate(self, case: Case, labels: Sequence[NDArray[np.uint8]], compute: Compute) -> Estimate:
        """What the references of other patients say of labels of one image, before calibration.

        What takes long depends on the image alone, so that several labels take hardly longer than one. A
        region that a label does not hold is right to be missing where at least half of the references lack
        it as well: it counts as 1 and has no share in the mean. Else it counts as 0.

        Args:
            case: the image, and whose it is; its own label does not matter.
            labels: L labels `[X, Y, Z]`, one or more.
            compute: where labels are compared.

        Raises:
            DataError: there is no reference case of another patient.
        """
        others = self._others(case, compute)
        if not others:
            raise DataError(self._nobody(case.id))
        assert self._comparison is not None  # noqa: S101 - made with the overviews
        seconds = self.config.rca.seconds
        begin = self._clock()
        compare = self._comparison.begin(case, labels)
        spent = self._clock() - begin
        dsc: list[NDArray[np.float32]] = []
        present: list[NDArray[np.bool_]] = []
        for index in others:
            # Not on the clock, or an estimate would depend on what was judged before.
            self._comparison.prepare(index)
            begin = self._clock()
            overlaps, holds = compare(index)
            spent += self._clock() - begin
            dsc.append(overlaps)
            present.append(holds)
            if seconds is not None and spent >= seconds:
                break
        compared = tuple(self._overviews[index].id for index in others[: len(dsc)])
        held = np.array([[np.isin(label, region).any() for region in self.regions] for label in labels])
        lacked = np.mean(present, axis=0) <= 0.5
        best = np.where(np.array(present)[:, None], dsc, 0).max(axis=0)
        regions = np.where(held, best, lacked).astype(np.float32)
        counts = held | ~lacked
        mean = (regions * counts).sum(axis=1) / np.maximum(1, counts.sum(axis=1))
        mean[~counts.any(axis=1)] = 1  # right to say nothing
        return Estimate(regions, mean.astype(np.float32), compared)

    def _others(self, case: Case, compute: Compute) -> list[int]:
        """Indices of the references to compare a case with, the most similar first, none of its patient."""
        self._look_at_references(compute)
        mine = _overview(case)
        may = self._comparable(mine.id, mine.patient)
        likeness = {index: float((self._overviews[index].image * mine.image).sum()) for index in may}
        return sorted(may, key=lambda index: -likeness[index])[: self.config.rca.references]

    def cannot_judge(self, files: CaseFiles) -> str | None:
        """A case that all references are of the patient of cannot be compared with any."""
        self._look_through_references()
        return None if self._comparable(files.id, files.patient) else self._nobody(files.id)

    def _comparable(self, case_id: str, patient: str) -> list[int]:
        """Indices of the references that a case may be compared with."""
        return [
            index
            for index, one in enumerate(self._overviews)
            if one.id != case_id and (not patient or one.patient != patient)
        ]

    def _nobody(self, case_id: str) -> str:
        return (
            f"case {case_id}: none of {len(self._overviews)} reference cases is of another patient to "
            f"compare it with; method {self.name!r} needs reference cases of two patients or more"
        )

    def _look_through_references(self) -> None:
        """Look at the references once, and again where others are set."""
        if self._looked_through is not self.references:
            self._overviews = tuple(_overview(case) for case in self.references)
            self._looked_through = self.references

    def _look_at_references(self, compute: Compute) -> None:
        """Get ready to compare with the references, once, and again where others are set."""
        self._look_through_references()
        made_for = self._made_for
        if made_for and made_for[0] is self.references and made_for[1] == compute.device:
            return
        self._comparison = (
            Registration(self.references, self.regions, self.config.rca.threads)
            if self.config.rca.form == "registration"
            else self._neighbours(compute.device)
        )
        self._made_for = self.references, compute.device

    def _neighbours(self, device: torch.device) -> Neighbours:
        chosen = self.config.rca
        position = weight_of_place(self.references) if chosen.position is None else chosen.position
        return Neighbours(self.references, self.regions, self.features, chosen.voxels, position, device)


def _overview(case: Case) -> _Overview:
    """A small image whose products with others are their correlation."""
    image = torch.from_numpy(np.array(case.image))[None]
    small = nn.functional.adaptive_avg_pool3d(image, _OVERVIEW)[0].numpy()
    small = small - small.mean()
    norm = float(np.linalg.norm(small))
    return _Overview(case.id, case.patient, small / norm if norm else small)
