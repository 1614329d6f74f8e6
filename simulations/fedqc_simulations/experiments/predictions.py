"""What segmenters of five folds predict for cases that they never saw, and the maps that go with it.

In each fold an MC-dropout U-Net and a reconstruction U-Net learn from the patients of the other four (as in
Williams et al.). Kept of each case of the fold are the mean prediction of all passes with its true DSC, the
entropy of that mean, and what the reconstruction gives back minus what is there, with the predicted
structures cut out.

OUT/
├── models/fold-K/PART.safetensors   the two networks of each fold
└── cache/
    ├── labels/predictions/          the predictions, a `LabelStore`
    └── maps/HASH.npz                the two maps of a case and their sums
"""

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.config import NetworkConfig, QCConfig
from fedqc.files import replacing
from fedqc.label_sources.folds import folds_of
from fedqc.label_sources.store import LabelStore
from fedqc.methods.base import Known, Method, RoundPlan, Stage, part_of
from fedqc.methods.pair_maps import PairMaps, TrainedParts
from fedqc.methods.segmenters import CrossFitted, Reconstructors, Segmenters
from fedqc.methods.voxel_sum import ErrorSumMethod, UncertaintySumMethod
from fedqc.model import load_weights
from fedqc.seeding import derive_seed
from fedqc.task import Task
from fedqc_simulations.experiments.base import Workshop

FOLDS = 5
SOURCE = "predictions"
"""Of the labels, in their store."""
MAPS = ("uncertainty", "error")


class OneOfAFold(CrossFitted):
    """A single network, for whoever deals the folds and shows it nobody that it has learned from."""

    def all_parts(self) -> tuple[str, ...]:
        """The one."""
        return (self.kind,)

    def parts_for(self, patient: str) -> tuple[str, ...]:
        """The one."""
        return (self.kind,)

    def stages(self) -> tuple[Stage, ...]:
        """The one's, on whatever cases it is given."""
        batch_size = self.config.batch_size
        return (Stage(self.kind, self.rounds, self.local_steps, batch_size, part=self.kind),)


class FoldSegmenter(OneOfAFold, Segmenters):
    """The MC-dropout U-Net of a fold."""


class FoldReconstructor(OneOfAFold, Reconstructors):
    """The reconstruction U-Net of a fold."""


class FoldNetworks(ErrorSumMethod):
    """Both networks of a fold."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        config = config.model_copy(update={"network": NetworkConfig()})  # which is for regressions
        super().__init__(task, config)
        self.segmenters = FoldSegmenter(task, config)
        self.reconstructors = FoldReconstructor(task, config)


class Predictions:
    """The predictions for all cases of a reproduction, and their maps.

    Args:
        workshop: Whose cases they are.
    """

    def __init__(self, workshop: Workshop) -> None:
        patients = {files.patient for files in workshop.cases}
        self._fold_of = folds_of(patients, workshop.seed, FOLDS)
        self.labels = LabelStore(workshop.labels, SOURCE, {"seed": workshop.seed})
        self._maps = workshop.out / "cache" / "maps"
        self._maps.mkdir(parents=True, exist_ok=True)

    def fold_of(self, files: CaseFiles | Case) -> int:
        """The fold of a case, whose networks have not learned from its patient."""
        return self._fold_of[files.patient]

    def has(self, case: Case) -> bool:
        """Whether all is there of a case."""
        return self._path(case.id).is_file() and len(self.labels.of(case)) > 0

    def add(self, case: Case, label: NDArray[np.uint8], maps: dict[str, Tensor], task: Task) -> None:
        """Keep what was predicted for a case.

        Args:
            case: With its reference.
            label: `[X, Y, Z]` class indices.
            maps: By `MAPS`, `[X, Y, Z]`.
            task: Names the regions whose DSC is measured.
        """
        path = self._path(case.id)
        arrays = {name: one.cpu().numpy() for name, one in maps.items()}
        sums = {f"{name}-sum": one.sum(dtype=np.float64) for name, one in arrays.items()}
        with replacing(path) as aside:
            np.savez(aside, **{name: one.astype(np.float16) for name, one in arrays.items()}, **sums)  # type: ignore[arg-type]  # NumPy's hint has no room for names
        self.labels.add(case, [({"fold": self.fold_of(case) + 1}, label)], task.region_indices())

    def map_of(self, case_id: str, name: str) -> NDArray[np.float16]:
        """One of the maps of a case, `[X, Y, Z]`."""
        with np.load(self._path(case_id), allow_pickle=False) as file:
            found: NDArray[np.float16] = file[name]
        return found

    def sum_of(self, case_id: str, name: str) -> float:
        """The voxel-wise sum of one of the maps (Williams et al., eq. 1)."""
        with np.load(self._path(case_id), allow_pickle=False) as file:
            return float(file[f"{name}-sum"])

    def _path(self, case_id: str) -> Path:
        return self._maps / f"{hashlib.sha256(case_id.encode()).hexdigest()}.npz"


class KeptMap(PairMaps):
    """One of the kept maps, in the place of one that a Dice regression would make itself."""

    channels = 1

    def __init__(self, predictions: Predictions, name: str) -> None:
        self._predictions = predictions
        self._name = name

    def of_cases(self, parts: TrainedParts, cases: Sequence[Case]) -> list[Tensor]:
        """The map, `[N, X, Y, Z]` float16, to be augmented as a label is."""
        maps = [torch.from_numpy(self._predictions.map_of(case.id, self._name)) for case in cases]
        return [torch.stack(maps).to(parts.compute.device)]

    def of_pairs(
        self,
        parts: TrainedParts,
        patients: Sequence[str],
        image: Tensor,
        label: Tensor,
        of_cases: Sequence[Tensor],
    ) -> Tensor:
        """The map."""
        return of_cases[0][:, None].float()


def make_predictions(workshop: Workshop, qc: QCConfig) -> Predictions:
    """Train the networks of each fold and let them predict its cases; what is there is not made again."""
    predictions = Predictions(workshop)
    method = FoldNetworks(workshop.task, qc)
    doubt = UncertaintySumMethod(workshop.task, method.config)
    most = math.log(workshop.task.n_classes + 1)
    for fold in range(FOLDS):
        held_out = [files for files in workshop.cases if predictions.fold_of(files) == fold]
        cases = workshop.opened(held_out)
        missing = [index for index, case in enumerate(cases) if not predictions.has(case)]
        if missing:
            training = [files for files in workshop.cases if predictions.fold_of(files) != fold]
            network = workshop.compute.place(_trained(workshop, method, fold, training)).eval()
        for done, index in enumerate(missing, start=1):
            case = cases[index]
            with torch.no_grad():
                found = method.segmenters.predict(network, case, workshop.compute)
                uncertainty = doubt.measure(network, case, found, workshop.compute).map / most
                error = method.measure(network, case, found, workshop.compute).map
            maps = {"uncertainty": uncertainty, "error": error}
            predictions.add(case, found.label.cpu().numpy(), maps, workshop.task)
            workshop.display.progress(f"predicting fold {fold + 1}", done, len(missing))
    return predictions


def _trained(workshop: Workshop, method: FoldNetworks, fold: int, training: Sequence[CaseFiles]) -> nn.Module:
    """The networks of a fold; each is kept as soon as it is trained."""
    name = f"fold-{fold + 1}"
    seed = derive_seed(workshop.seed, name)
    network = method.build(seed)
    cases = workshop.opened(training)
    for stage in method.stages():
        part = part_of(network, stage.part)
        path = workshop.out / "models" / name / f"{stage.part}.safetensors"
        if path.is_file():
            load_weights(part, load_file(path), source=str(path))
            continue
        train_all_rounds(workshop, method, network, cases, stage, seed=seed, what=f"{stage.name}, {name}")
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            save_file({key: one.contiguous() for key, one in part.state_dict().items()}, aside)
    return network


def train_all_rounds(
    workshop: Workshop,
    method: Method,
    network: nn.Module,
    cases: CachedCases,
    stage: Stage,
    *,
    seed: int,
    what: str,
    known: Known | None = None,
) -> None:
    """Train all rounds of one stage of a network in place.

    Args:
        workshop: where and how to compute.
        method: of the network.
        network: its parts that the stage needs are trained.
        cases: to learn from.
        stage: what is trained, and for how long.
        seed: decides what is drawn, together with `what`.
        what: in words.
        known: what else is known of the cases.
    """
    workshop.display.say(f"training {what} on {len(cases)} cases")
    for number in range(1, stage.rounds + 1):
        plan = RoundPlan(
            seed=seed,
            site=what,
            round=number,
            rounds=stage.rounds,
            steps=stage.local_steps,
            batch_size=stage.batch_size,
            stage=stage.name,
        )
        method.train_round(
            network,
            cases,
            plan,
            workshop.compute,
            lambda done, total: workshop.display.progress(f"training {what}, steps", done, total),
            known=known,
        )
