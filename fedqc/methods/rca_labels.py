"""A network trained on what reverse classification accuracy says (Robinson et al. 2018, experiment 2).

Where hardly any label is known to be right, RCA can judge the labels of all other cases by the few that are,
but takes long. The network learns from its estimates and then judges at once, without references. It learns
RCA's mistakes too: the paper's error rises from 0.031 to 0.139.

As in the paper, RCA judges a fixed set of labels: those that lie on disk, and a few of every other kind that
has a share in training. The label that a case comes with is one of them and is never taken to be right.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqc.augmentation import augment
from fedqc.cases.cached import LabelsOf, PatientsOf
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig
from fedqc.degradation.base import Untouched
from fedqc.degradation.samples import (
    Degraded,
    LabelFactory,
    Recipe,
    SamplePool,
    StoredLabels,
    source_of,
    stored_shares,
)
from fedqc.errors import TrainingError
from fedqc.files import write_json
from fedqc.geometry import CUBE, Sides
from fedqc.methods.base import FEWEST_REFERENCE_PATIENTS, Known, Stage, with_own_settings
from fedqc.methods.pairs import PairBatch
from fedqc.methods.rca import RCAMethod
from fedqc.methods.region_calibration import RegionCalibration, calibration_of
from fedqc.methods.robinson import BACKGROUND, WHOLE, RobinsonMethod
from fedqc.seeding import generator
from fedqc.task import Task

VARIANTS = 3
"""Labels of each kind that are made of a case, of kinds that are drawn at random."""
_VERSION = 2
"""To be raised whenever estimates come out otherwise."""


def class_task(task: Task) -> Task:
    """The task whose regions are the classes, all of them together and its own: what RCA judges here."""
    classes = {name: (name,) for name in task.classes}
    return task.model_copy(update={"regions": {**classes, WHOLE: tuple(task.classes), **task.regions}})


class RCALabelsMethod(RobinsonMethod):
    """The ResNet-50 of `robinson`, learned from RCA's estimates, which know no DSC of background.

    It learns from all valid cases and compares them with the site's references (`references`) as `[qc.rca]`
    says; to score it needs none.
    """

    name = "rca-labels"

    def __init__(self, task: Task, config: QCConfig) -> None:
        super().__init__(task, config)
        own = with_own_settings(config).model_copy(update={"network": NetworkConfig()})
        self.rca = RCAMethod(class_task(task), own, together=True)
        self._estimates: Estimates | None = None

    def scored_regions(self) -> dict[str, tuple[int, ...]]:
        """As `robinson`, without background."""
        return {name: region for name, region in super().scored_regions().items() if name != BACKGROUND}

    def stages(self) -> tuple[Stage, ...]:
        """One, on references and candidates alike."""
        return tuple(replace(stage, learns_from="all", needs_references=True) for stage in super().stages())

    def pool(
        self,
        cases: Sequence[Case],
        device: torch.device | None = None,
        known: Known | None = None,
    ) -> SamplePool:
        """Labels whose quality RCA has estimated; balanced by what it says of all classes together.

        Raises:
            TrainingError: there are no reference cases of two patients.
        """
        patients = {case.patient for case in self.references}
        if len(patients) < FEWEST_REFERENCE_PATIENTS:
            raise TrainingError(
                f"method {self.name!r} judges labels by reference cases of {FEWEST_REFERENCE_PATIENTS} "
                f"patients or more; found {len(self.references)} cases of {len(patients)} patients; "
                "vouch for more cases"
            )
        known = known or Known()
        if self._estimates is None or self._estimates.references is not self.references:
            compute = Compute(device or torch.device("cpu"), torch.float32)
            self._estimates = Estimates(self.rca, self.references, compute, known.kept)
        samples = self.config.samples
        kinds = [kind for kind in self.kinds if samples.model_dump()[source_of(kind).replace("-", "_")] > 0]
        stored = {kind: known.labels[kind] for kind in stored_shares(samples) if kind in known.labels}
        factory = EstimatedLabels(cases, self._estimates, kinds, device, stored, sides=self.sides)
        return SamplePool(factory, samples, self.config.balance)

    def batches(  # noqa: PLR0917 - what is drawn, and from what
        self,
        cases: Sequence[Case],
        pool: SamplePool,
        rng: np.random.Generator,
        steps: int,
        batch_size: int,
        seen: list[str] | None = None,
    ) -> Iterator[PairBatch]:
        """Augmented labels with what was estimated of them before."""
        samples = (
            (cases[recipe.case], label, dsc)
            for chunk in pool.chunks(rng, steps * batch_size)
            for recipe, label, dsc in zip(chunk.recipes, chunk.label, chunk.dsc, strict=True)
        )
        for _ in range(steps):
            batch = list(islice(samples, batch_size))
            if seen is not None:
                seen += [case.patient for case, _, _ in batch]
            label = torch.stack([label for _, label, _ in batch])
            dsc = torch.stack([dsc for _, _, dsc in batch])
            image = torch.from_numpy(np.stack([case.image for case, _, _ in batch])).to(label.device)
            image, label = augment(rng, image, label, sides=self.sides)
            yield PairBatch(
                inputs=self.inputs(image, label),
                label=label,
                reference=label,  # what is right nobody knows, and no loss of this method asks
                error=torch.zeros_like(label, dtype=torch.bool),
                dsc=dsc,
                present=torch.ones_like(dsc, dtype=torch.bool),
                mean=dsc[:, list(self.regions).index(WHOLE)],
            )


class Estimates:
    """What RCA says of labels; made once, and kept on disk where there is a folder for that.

    DIGEST/              SHA-256 of the references and of how RCA compares
    └── CASE.json        by the SHA-256 of a label, the estimated DSC of each region

    Args:
        rca: Judges labels.
        references: What it compares with.
        compute: Where.
        folder: Of all digests; None: nothing is kept on disk.
    """

    def __init__(
        self, rca: RCAMethod, references: Sequence[Case], compute: Compute, folder: Path | None
    ) -> None:
        self.references = references
        self.regions = tuple(rca.scored_regions())
        self._rca = rca
        self._rca.references = references
        self._compute = compute
        self._folder = None if folder is None else folder / self._digest()
        self._names: dict[str, str] = {}
        """By the id of a case: a large image takes long to hash."""
        self._made: dict[str, dict[str, list[float]]] = {}
        self._calibration: RegionCalibration | None = None

    def known(self, case: Case) -> dict[str, list[float]]:
        """By the SHA-256 of a label of this case, the estimated DSC of each region."""
        if case.id not in self._names:
            self._names[case.id] = _name(case)
        name = self._names[case.id]
        if name not in self._made:
            path = self._path(name)
            try:
                self._made[name] = {} if path is None else dict(json.loads(path.read_bytes()))
            except (OSError, ValueError, TypeError):  # not there yet, or cut off: to be made
                self._made[name] = {}
        return self._made[name]

    def make(self, case: Case, labels: Sequence[NDArray[np.uint8]]) -> None:
        """Estimate labels of one case, one or more, and keep what came out."""
        found = torch.from_numpy(self._rca.estimate(case, labels, self._compute).values)
        made = self.known(case)
        for label, (_, *values) in zip(labels, self._calibrated(found).tolist(), strict=True):
            made[digest_of(label)] = values
        if (path := self._path(self._names[case.id])) is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, made)

    def _calibrated(self, found: Tensor) -> Tensor:
        """What estimates mean, which is fitted to the references when it is first asked for."""
        if self._calibration is None:
            network = self._rca.build(0)
            self._rca.fit(network, self.references, self._compute, generator(0, "rca-labels", "fit"))
            self._calibration = calibration_of(network)
        meant: Tensor = self._calibration(found)
        return meant

    def _digest(self) -> str:
        config = self._rca.config
        settings = {"version": _VERSION, "task": self._rca.task.digest, "leave_out": config.leave_out}
        digest = hashlib.sha256(json.dumps(settings | config.rca.model_dump(mode="json")).encode())
        for case in self.references:
            digest.update(f"{_name(case)} {case.patient} {digest_of(case.label)}".encode())
        return digest.hexdigest()[:32]

    def _path(self, name: str) -> Path | None:
        return None if self._folder is None else self._folder / f"{name}.json"


class EstimatedLabels(LabelFactory):
    """Labels of which is known what RCA makes of them; of each case and kind there are a few.

    Args:
        cases: Of one size; their own labels may be wrong.
        estimates: What RCA says.
        kinds: The kinds of error to make.
        device: Where labels are degraded and end up.
        stored: Labels that lie on disk.
        sides: Of a voxel.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        estimates: Estimates,
        kinds: Sequence[str],
        device: torch.device | None,
        stored: Mapping[str, StoredLabels],
        *,
        sides: Sides = CUBE,
    ) -> None:
        super().__init__(LabelsOf(cases), (), kinds, device, stored, patients=PatientsOf(cases), sides=sides)
        self._cases = cases
        self._estimates = estimates

    def draw(self, rng: np.random.Generator, case: int, kind: str) -> Recipe | None:
        """One of the recipes of one kind for one case; None where that kind of error is not possible."""
        if kind in self.stored:
            return super().draw(rng, case, kind)
        return self._variant(case, kind, int(rng.integers(VARIANTS)))

    def make(self, recipes: Sequence[Recipe]) -> Degraded:
        """Apply recipes; the DSC are RCA's, and the mean that of all classes together."""
        labels = self.labels(recipes)
        dsc = torch.ones(len(recipes), len(self._estimates.regions), device=labels.device)
        order = sorted(range(len(recipes)), key=lambda index: recipes[index].case)
        for number, members in groupby(order, key=lambda index: recipes[index].case):
            case = self._cases[number]
            own = {index: labels[index].cpu().numpy() for index in members}
            if not all(digest_of(label) in self._estimates.known(case) for label in own.values()):
                every = [*self.labels(self._every(number)).cpu().numpy(), *own.values()]
                self._estimates.make(case, list({digest_of(label): label for label in every}.values()))
            known = self._estimates.known(case)
            for index, label in own.items():
                dsc[index] = torch.tensor(known[digest_of(label)])
        present = torch.ones_like(dsc, dtype=torch.bool)
        whole = dsc[:, self._estimates.regions.index(WHOLE)]
        return Degraded(tuple(recipes), labels, dsc, present, whole)

    def _variant(self, case: int, kind: str, number: int) -> Recipe | None:
        """Always the same recipe for the same case, kind and number."""
        return super().draw(generator(0, "rca-labels", self._cases[case].id, kind, number), case, kind)

    def _every(self, case: int) -> list[Recipe]:
        """All recipes of a case, so that RCA looks at its image once."""
        recipes: list[Recipe] = []
        for kind in self.kinds:
            if kind in self.stored:
                count = self.stored[kind].count(case)
                recipes += [Recipe(case, kind, {"index": index}) for index in range(count)]
            elif kind == Untouched.kind:
                recipes.append(Recipe(case, kind, {}))
            else:
                variants = (self._variant(case, kind, number) for number in range(VARIANTS))
                recipes += [recipe for recipe in variants if recipe is not None]
        return recipes


def digest_of(volume: NDArray[np.generic]) -> str:
    """SHA-256 of a volume's voxels, the first 32 digits."""
    return hashlib.sha256(np.ascontiguousarray(volume).tobytes()).hexdigest()[:32]


def _name(case: Case) -> str:
    """What a case's estimates are kept under: another image is another case."""
    return hashlib.sha256(f"{case.id} {digest_of(case.image)}".encode()).hexdigest()[:32]
