"""QC samples: an image, a degraded label, and what is then known exactly about that label."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqc.cases.cached import LabelsOf, PatientsOf
from fedqc.cases.volumes import Case
from fedqc.config import SamplesConfig
from fedqc.degradation.annotator import ANNOTATOR_KINDS, annotator_errors
from fedqc.degradation.balance import histogram_balance, quantile_balance
from fedqc.degradation.base import Degradation, Params, Untouched
from fedqc.degradation.seggen import SegGen
from fedqc.errors import ConfigError, TrainingError
from fedqc.geometry import CUBE, Sides, sides_of
from fedqc.lazy import Lazy
from fedqc.metrics.overlap import overlap
from fedqc.task import Task

ALL_KINDS: tuple[str, ...] = (Untouched.kind, SegGen.kind, *ANNOTATOR_KINDS)
STORED_KINDS: tuple[str, ...] = ("snapshots", "forest", "side-outputs")
"""Kinds whose labels lie on disk, made by segmenters (`fedqc.label_sources`)."""
CHUNK = 32
"""Samples made at a time."""
VOXELS_AT_ONCE = 2**23
"""Voxels degraded at a time: a deformation needs some 100 bytes for each."""


class StoredLabels(Protocol):
    """Labels of one kind that lie on disk, for each of the cases at hand."""

    def count(self, case: int) -> int:
        """How many labels there are of the case at an index."""

    def read(self, case: int, index: int) -> NDArray[np.uint8]:
        """One of them, `[X, Y, Z]` class indices on the case's grid."""


class ChosenLabels:
    """The stored labels of some of the cases.

    Args:
        labels: Those of all cases.
        cases: Indices of the chosen ones, in order.
    """

    def __init__(self, labels: StoredLabels, cases: Sequence[int]) -> None:
        self._labels = labels
        self._cases = tuple(cases)

    def count(self, case: int) -> int:
        """How many labels there are of the case that was chosen as the `case`-th."""
        return self._labels.count(self._cases[case])

    def read(self, case: int, index: int) -> NDArray[np.uint8]:
        """One of them, `[X, Y, Z]` class indices on the case's grid."""
        return self._labels.read(self._cases[case], index)


@dataclass(frozen=True)
class Recipe:
    """All that is needed to make one degraded label again."""

    case: int
    """Index of the reference case."""
    kind: str
    params: Params


@dataclass(frozen=True)
class Degraded:
    """Degraded labels with their truth, in the order of their recipes."""

    recipes: tuple[Recipe, ...]
    label: Tensor
    """`[N, X, Y, Z]` uint8 class indices."""
    dsc: Tensor
    """`[N, R]` DSC of each region."""
    present: Tensor
    """`[N, R]` whether the region is in the reference at all."""
    mean: Tensor
    """`[N]` mean DSC over the present regions."""

    def chosen(self, indices: NDArray[np.intp]) -> "Degraded":
        """The samples at `indices`, in that order; one may occur several times."""
        recipes = tuple(self.recipes[index] for index in indices)
        where = torch.from_numpy(indices).to(self.label.device)
        return Degraded(recipes, self.label[where], self.dsc[where], self.present[where], self.mean[where])

    def joined(self, other: "Degraded") -> "Degraded":
        """These samples, then the other ones."""
        pairs = [(getattr(self, name), getattr(other, name)) for name in ("label", "dsc", "present", "mean")]
        return Degraded(self.recipes + other.recipes, *(torch.cat(pair) for pair in pairs))


@dataclass
class DrawnLabels:
    """The labels of some training, each as the index of its case, its kind and its mean DSC."""

    made: list[tuple[int, str, float]] = field(default_factory=list)
    """Before balancing."""
    chosen: list[tuple[int, str, float]] = field(default_factory=list)
    """After it: those that were trained on, before their augmentation."""

    def note(self, made: Degraded, chosen: Degraded) -> None:
        """Take down labels that were made, and those of them that were chosen."""
        for labels, taken in ((self.made, made), (self.chosen, chosen)):
            labels += [
                (recipe.case, recipe.kind, dsc)
                for recipe, dsc in zip(taken.recipes, taken.mean.tolist(), strict=True)
            ]


class _Labels(Lazy[Tensor]):
    """Labels as tensors, read from their (memory-mapped) arrays only when asked for."""

    def __init__(self, arrays: Sequence[NDArray[np.uint8]]) -> None:
        self.arrays = arrays

    def __len__(self) -> int:
        return len(self.arrays)

    def make(self, index: int) -> Tensor:
        """Read a label."""
        return torch.from_numpy(np.array(self.arrays[index]))

    def stack(self, indices: Sequence[int]) -> Tensor:
        """`[N, X, Y, Z]` uint8; N may be 0."""
        stacked = np.empty((len(indices), *self.arrays[0].shape), dtype=np.uint8)
        for position, index in enumerate(indices):
            stacked[position] = self.arrays[index]
        return torch.from_numpy(stacked)


class LabelFactory:
    """Makes degraded labels from a site's reference labels.

    Args:
        references: `[X, Y, Z]` uint8 class indices, all of one size; each is read when it is asked for.
        regions: Class indices of each region, see `Task.region_indices`.
        kinds: The kinds of error to make.
        device: Where labels are degraded and end up; the result is the same everywhere.
        stored: Labels that lie on disk, further kinds by their name.
        patients: Whose each reference is; None: nobody has two.
        sides: Of a voxel.
    """

    def __init__(
        self,
        references: Sequence[NDArray[np.uint8]],
        regions: Sequence[Sequence[int]],
        kinds: Sequence[str] = ALL_KINDS,
        device: torch.device | None = None,
        stored: Mapping[str, StoredLabels] | None = None,
        *,
        patients: Sequence[str] | None = None,
        sides: Sides = CUBE,
    ) -> None:
        unknown = [kind for kind in kinds if kind not in ALL_KINDS]
        if unknown:
            raise ConfigError(
                f"unknown kind of label error: {', '.join(unknown)}; known: {', '.join(ALL_KINDS)}"
            )
        self.references = _Labels(references)
        self.regions = regions
        self.device = device
        self.patients = patients
        known: dict[str, Degradation] = {Untouched.kind: Untouched(), SegGen.kind: SegGen(sides)}
        known |= annotator_errors(self.references, patients, sides)
        self.degradations: Mapping[str, Degradation] = {kind: known[kind] for kind in kinds}
        self.stored = dict(stored or {})
        self.kinds = [*kinds, *self.stored]

    def draw(self, rng: np.random.Generator, case: int, kind: str) -> Recipe | None:
        """A recipe of one kind for one case; None where that kind of error is not possible."""
        if kind in self.stored:
            count = self.stored[kind].count(case)
            return Recipe(case, kind, {"index": int(rng.integers(count))}) if count else None
        patient = "" if self.patients is None else self.patients[case]
        degradation, label = self.degradations[kind].for_patient(patient), self.references[case]
        if not degradation.applies_to(label):
            return None
        return Recipe(case, kind, degradation.make_params(rng, label))

    def make(self, recipes: Sequence[Recipe]) -> Degraded:
        """Apply recipes, and compare what comes of them with the references."""
        reference = self._references(recipes)
        result = self._labels(recipes, reference)
        at_once = self._at_once(reference)
        pairs = zip(torch.split(result, at_once), torch.split(reference, at_once), strict=True)
        truths = [overlap(made, right, self.regions) for made, right in pairs]
        dsc, present, mean = (
            torch.cat([getattr(truth, name) for truth in truths]) for name in ("dsc", "present", "mean")
        )
        return Degraded(tuple(recipes), result, dsc, present, mean)

    def labels(self, recipes: Sequence[Recipe]) -> Tensor:
        """`[N, X, Y, Z]` uint8, what comes of recipes."""
        return self._labels(recipes, self._references(recipes))

    def _references(self, recipes: Sequence[Recipe]) -> Tensor:
        """`[N, X, Y, Z]`, the label that each recipe starts from."""
        return self.references.stack([recipe.case for recipe in recipes]).to(self.device)

    @staticmethod
    def _at_once(labels: Tensor) -> int:
        return max(1, VOXELS_AT_ONCE // math.prod(labels.shape[1:]))

    def _labels(self, recipes: Sequence[Recipe], reference: Tensor) -> Tensor:
        """What comes of recipes; labels of one kind are made at once, as many as are small."""
        at_once = self._at_once(reference)
        result = torch.empty_like(reference)
        order = sorted(range(len(recipes)), key=lambda index: recipes[index].kind)
        for kind, members in groupby(order, key=lambda index: recipes[index].kind):
            indices = list(members)
            if kind in self.stored:
                for index in indices:
                    label = self.stored[kind].read(recipes[index].case, recipes[index].params["index"])
                    result[index] = torch.from_numpy(label)
                continue
            for start in range(0, len(indices), at_once):
                part = indices[start : start + at_once]
                params = [recipes[index].params for index in part]
                result[part] = self.degradations[kind].apply(reference[part], params)
        return result


class SamplePool:
    """Draws a training round's samples in stated shares of kinds and balances their DSC.

    Args:
        factory: Makes the labels.
        samples: Shares of the sources; `annotator` is divided equally among its kinds.
        balance: `quantile` (QCResUNet), `histogram` (Robinson) or `none`.

    Raises:
        ConfigError: no kind has a share, or one has whose labels were not made.
    """

    def __init__(
        self,
        factory: LabelFactory,
        samples: SamplesConfig,
        balance: Literal["quantile", "histogram", "none"],
    ) -> None:
        self.factory = factory
        self.balance = balance
        self.drawn = DrawnLabels()
        annotator = [kind for kind in factory.kinds if kind in ANNOTATOR_KINDS]
        shares = dict.fromkeys(annotator, samples.annotator / max(1, len(annotator)))
        if SegGen.kind in factory.kinds:
            shares[SegGen.kind] = samples.seggen
        shares |= stored_shares(samples)
        if missing := [kind for kind in shares if kind not in factory.kinds]:
            raise ConfigError(f"qc.samples has a share of {', '.join(missing)}, whose labels were not made")
        self.kinds = list(shares)
        untouched = samples.untouched if Untouched.kind in factory.kinds else 0.0
        total = sum(shares.values()) + untouched
        if not total:
            raise ConfigError("no kind of label error is left to train on; see qc.samples and qc.leave_out")
        self.untouched = untouched / total
        self.weights = np.array(list(shares.values())) / max(sum(shares.values()), 1e-12)

    def chunks(self, rng: np.random.Generator, count: int) -> Iterator[Degraded]:
        """`count` samples in random order, up to 32 at a time."""
        for start in range(0, count, CHUNK):
            yield self._chunk(rng, min(CHUNK, count - start))

    def _chunk(self, rng: np.random.Generator, count: int) -> Degraded:
        """Untouched labels keep their share: balancing by DSC would leave hardly any of them."""
        n_untouched = int(rng.binomial(count, self.untouched)) if self.kinds else count
        cases = rng.integers(len(self.factory.references), size=n_untouched)
        untouched = self.factory.make([Recipe(int(case), Untouched.kind, {}) for case in cases])
        self.drawn.note(untouched, untouched)
        if n_untouched == count:
            return untouched
        degraded = self._balanced(rng, count - n_untouched)
        return untouched.joined(degraded).chosen(rng.permutation(count))

    def _balanced(self, rng: np.random.Generator, count: int) -> Degraded:
        """Twice as many degraded labels as needed are made and measured, then chosen by their DSC."""
        recipes: list[Recipe] = []
        attempts = 0
        while len(recipes) < (count if self.balance == "none" else 2 * count):
            attempts += 1
            if attempts > 100 * count:
                raise TrainingError(
                    f"none of the label errors {', '.join(self.kinds)} is possible in these cases"
                )
            kind = self.kinds[int(rng.choice(len(self.kinds), p=self.weights))]
            recipe = self.factory.draw(rng, int(rng.integers(len(self.factory.references))), kind)
            if recipe is not None:
                recipes.append(recipe)
        made = self.factory.make(recipes)
        chosen = made
        if self.balance != "none":
            choose = quantile_balance if self.balance == "quantile" else histogram_balance
            chosen = made.chosen(choose(made.mean.cpu().numpy(), count, rng))
        self.drawn.note(made, chosen)
        return chosen


def source_of(kind: str) -> str:
    """Which of the shares of `qc.samples` a kind belongs to, with `-` for `_`."""
    return "annotator" if kind in ANNOTATOR_KINDS else kind


def stored_shares(samples: SamplesConfig) -> dict[str, float]:
    """The shares of the kinds whose labels lie on disk, where they have one."""
    shares = {kind: float(getattr(samples, kind.replace("-", "_"))) for kind in STORED_KINDS}
    return {kind: share for kind, share in shares.items() if share > 0}


@dataclass(frozen=True)
class DegradedCase:
    """A case with a degraded label in place of its own, and the truth about it."""

    case: Case
    """Image and degraded label."""
    kind: str
    recipe: Recipe
    dsc: dict[str, float]
    """DSC of each region that is in the reference."""
    mean_dsc: float
    error: NDArray[np.bool_]
    """`[X, Y, Z]` where the degraded label is wrong."""


def degrade_cases(
    cases: Sequence[Case],
    task: Task,
    kinds: Sequence[str],
    rng: np.random.Generator,
    only: Sequence[int] | None = None,
) -> Iterator[DegradedCase]:
    """Each case once with each kind of error that is possible in it, so that all kinds weigh the same.

    Args:
        cases: with labels that are right; another patient's label is one of theirs.
        task: what the labels show.
        kinds: of errors.
        rng: draws them.
        only: indices of the cases to degrade; None: all.
    """
    if not cases:
        return
    regions = task.region_indices()
    factory = LabelFactory(
        LabelsOf(cases), regions, kinds, patients=PatientsOf(cases), sides=sides_of(task.spacing)
    )
    for index in range(len(cases)) if only is None else only:
        case = cases[index]
        recipes = [recipe for kind in kinds if (recipe := factory.draw(rng, index, kind)) is not None]
        made = factory.make(recipes)
        for position, recipe in enumerate(recipes):
            label = made.label[position].numpy()
            present = made.present[position].tolist()
            values = zip(task.regions, made.dsc[position].tolist(), present, strict=True)
            yield DegradedCase(
                case=replace(case, label=label),
                kind=recipe.kind,
                recipe=recipe,
                dsc={name: dsc for name, dsc, there in values if there},
                mean_dsc=float(made.mean[position]),
                error=label != case.label,
            )
