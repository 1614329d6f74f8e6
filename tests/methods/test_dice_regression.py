"""Dice regression: what it sees beside the label, who made that, and what it learns."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import entropy
from torch import Tensor, nn

from fedqc.cases.memo import digest
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig, SamplesConfig
from fedqc.degradation.samples import degrade_cases
from fedqc.errors import TrainingError
from fedqc.methods.base import Known, RoundPlan
from fedqc.methods.cross_fitting import fold_of
from fedqc.methods.dice_regression import DiceRegressionMethod
from fedqc.methods.pair_maps import Errors, Images, KeptMaps, TrainedParts, Uncertainties, weights_digest
from fedqc.methods.pairs import PairBatch
from fedqc.metrics.overlap import overlap
from fedqc.seeding import generator
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
SEGMENTER = {"channels": (4, 8), "passes": 2, "rounds": 1, "local_steps": 2, "batch_size": 2}
Input = Literal["image", "uncertainty", "error"]
INPUTS = pytest.mark.parametrize("sees", ["image", "uncertainty", "error"])


def make(task: Task, sees: Input, **more: object) -> DiceRegressionMethod:
    values = {"network": {"width": 4}, "segmenter": SEGMENTER, "regression": {"input": sees}, **more}
    return DiceRegressionMethod(task, QCConfig.model_validate(values))


def plan(stage: str = "qc", number: int = 1, steps: int = 2) -> RoundPlan:
    return RoundPlan(seed=0, site="a", round=number, rounds=8, steps=steps, batch_size=4, stage=stage)


class Leans(nn.Module):
    """A segmenter that everywhere gives one class so much more than the others, and counts its passes."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.tensor(more))
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        logits = torch.zeros(len(x), 3, *x.shape[2:])
        logits[:, 1] = self.more
        return logits


class Adds(nn.Module):
    """A reconstruction network that gives back what it is shown, and something more."""

    def __init__(self, more: float) -> None:
        super().__init__()
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        return x + self.more


class Edges(nn.Module):
    """A segmenter sure of what the image shows in its first modality, unsure where it shows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        label = x[:, 0].round().clamp(0, 2).long()
        return nn.functional.one_hot(label, 3).movedim(-1, 1) * (50.0 * (label > 0)[:, None])


def entropy_share(more: float) -> float:
    weights = np.exp([0, more, 0])
    return float(entropy(weights / weights.sum()) / np.log(3))


# -------------------------------------------------------------------------------------------- stages


@INPUTS
def test_maps_are_learned_before_the_regression(sees: Input, task: Task) -> None:
    method = make(task, sees)
    before = {
        "image": (),
        "uncertainty": ("segmenter-1", "segmenter-2"),
        "error": ("reconstruction-1", "reconstruction-2"),
    }[sees]
    *first, last = method.stages()
    assert tuple(stage.name for stage in first) == before
    assert (last.name, last.part, last.needs, last.learns_from) == ("qc", "qc", before, "references")
    network = method.build(0)
    assert {name for name, _ in network.named_children()} == {*before, "qc"}
    n_maps = {"image": 2, "uncertainty": 1, "error": 2}[sees]
    assert network.get_parameter("qc.features.0.weight").shape[1] == n_maps + task.n_classes


@INPUTS
def test_a_seed_decides_everything_and_each_stage_trains_its_part(
    sees: Input, task: Task, cases_of_both_folds: list[Case]
) -> None:
    results = []
    for disturbance in (1, 2):
        torch.manual_seed(disturbance)
        method = make(task, sees)
        network = method.build(0)
        for stage in method.stages():
            before = {key: value.clone() for key, value in network.state_dict().items()}
            learned = [case for case in cases_of_both_folds if fold_of(case.patient) != stage.fold]
            method.train_round(network, learned, plan(stage.name), FP32)
            after = network.state_dict()
            changed = {key.split(".")[0] for key in before if not torch.equal(before[key], after[key])}
            assert changed == {stage.part}
        results.append(torch.cat([p.detach().flatten() for p in network.parameters()]))
    assert torch.equal(results[0], results[1])


# ---------------------------------------------------------------------------------------------- maps


def shown(
    method: DiceRegressionMethod, network: nn.Module, cases: list[Case], steps: int = 4
) -> list[PairBatch]:
    """The batches that a round trains on."""
    found: list[PairBatch] = []

    def losses(network: nn.Module, batch: PairBatch) -> dict[str, Tensor]:
        found.append(batch)
        return {"quality": network(batch.inputs).mean()}

    method.losses = losses  # type: ignore[method-assign]
    method.train_round(network, cases, plan(steps=steps), FP32)
    return found


def test_uncertainty_comes_from_segmenters_that_never_saw_the_patient(
    task: Task, cases_of_both_folds: list[Case]
) -> None:
    method = make(task, "uncertainty")
    network = nn.ModuleDict(dict(method.build(0).named_children()))
    network["segmenter-1"], network["segmenter-2"] = Leans(0.0), Leans(2.0)
    for fold, more in ((0, 0.0), (1, 2.0)):
        of_fold = [case for case in cases_of_both_folds if fold_of(case.patient) == fold]
        for batch in shown(make(task, "uncertainty"), network, of_fold, steps=1):
            # Half a step of 255, and what augmentation turns in from outside.
            inside = batch.inputs[:, 0][batch.inputs[:, 0] > 0]
            torch.testing.assert_close(
                inside, torch.full_like(inside, entropy_share(more)), atol=0.5 / 255 + 1e-6, rtol=0
            )


def test_a_case_is_passed_through_the_segmenters_once_while_they_stay_as_they_are(
    task: Task, cases: list[Case]
) -> None:
    method = make(task, "uncertainty")
    network = nn.ModuleDict(dict(method.build(0).named_children()))
    network["segmenter-1"] = network["segmenter-2"] = segmenter = Leans(1.0)
    for number in (1, 2, 3):
        method.train_round(network, cases[:2], plan(number=number, steps=4), FP32)
    assert segmenter.passes == 2 * 2  # two cases, two passes each
    method.train_round(network, cases[:2], replace(plan(), site="b"), FP32)
    assert segmenter.passes == 2 * 2 * 2  # another site's case of the same id is another case


def test_maps_outlive_the_process_of_a_round(task: Task, cases: list[Case], tmp_path: Path) -> None:
    network = nn.ModuleDict(dict(make(task, "uncertainty").build(0).named_children()))
    network["segmenter-1"] = network["segmenter-2"] = segmenter = Leans(1.0)
    known = Known(kept=tmp_path)

    def passes(wanted: int = 2, **changes: str) -> int:
        """Of a round at a client that is new each time, on one case."""
        before = segmenter.passes
        this = replace(plan(), **changes)  # type: ignore[arg-type]
        method = make(task, "uncertainty", segmenter={**SEGMENTER, "passes": wanted})
        method.train_round(network, cases[:1], this, FP32, known=known)
        return segmenter.passes - before

    assert [passes(), passes(), passes(site="b")] == [2, 0, 2]
    for file in tmp_path.rglob("*.npy"):
        file.write_bytes(file.read_bytes()[:-1])
    assert [passes(), passes()] == [2, 0]
    (first,) = {file.parent for file in tmp_path.rglob("*.npy") if digest("b") not in str(file)}
    with torch.no_grad():
        segmenter.more.add_(1)
    assert [passes(), passes()] == [2, 0]
    assert not first.exists()  # maps of weights that are gone
    assert [passes(3), passes(3), passes()] == [3, 0, 2]  # another number of passes, another map


def test_new_weights_have_new_maps(task: Task) -> None:
    method = make(task, "uncertainty")
    network = method.build(0)
    parts = method.stage("qc").needs
    before = weights_digest(network, parts)
    assert weights_digest(method.build(0), parts) == before
    with torch.no_grad():
        network.get_parameter("qc.quality.bias").add_(1)
        assert weights_digest(network, parts) == before
        network.get_parameter("segmenter-2.output.bias").add_(1)
    assert weights_digest(network, parts) != before


def test_kept_maps_have_so_much_room() -> None:
    kept = KeptMaps(room=25)
    for name in "abc":
        kept.put((name,), torch.zeros(8, dtype=torch.uint8))
    assert kept.get(("a",)) is not None  # now b was not asked for longest
    kept.put(("d",), torch.ones(8, dtype=torch.uint8))
    assert [kept.get((name,)) is not None for name in "abcd"] == [True, False, True, True]


def test_errors_are_where_the_judged_label_was_filled_in(task: Task, cases_of_both_folds: list[Case]) -> None:
    maps = Errors(task, make(task, "error").config)
    network = nn.ModuleDict({"reconstruction-1": Adds(0.1), "reconstruction-2": Adds(0.2)})
    chosen = cases_of_both_folds[:2]
    image = torch.from_numpy(np.stack([case.image for case in chosen]))
    label = torch.zeros(2, *task.size, dtype=torch.uint8)
    label[:, :8] = 1
    patients = [case.patient for case in chosen]
    found = maps.of_pairs(TrainedParts(network, FP32), patients, image, label, [])
    low, high = (end(image, dim=(2, 3, 4), keepdim=True) for end in (torch.amin, torch.amax))
    more = torch.tensor([0.1 if fold_of(patient) == 0 else 0.2 for patient in patients])
    expected = more[:, None, None, None, None].expand(2, 2, *task.size).clone()
    expected[:, :, :8] -= ((image - low) / (high - low))[:, :, :8]
    torch.testing.assert_close(found, expected)


def test_images_are_seen_as_they_are(task: Task, cases: list[Case]) -> None:
    image = torch.from_numpy(cases[0].image)[None]
    parts = TrainedParts(nn.Identity(), FP32)
    assert Images(task).of_pairs(parts, ["p"], image, image[:, 0], []) is image
    assert Images(task).of_cases(parts, cases) == []


def test_entropy_moves_as_the_label_does_and_keeps_its_values(task: Task, cases: list[Case]) -> None:
    """It is augmented in space, with the label, and has neither noise nor gamma."""
    method = make(task, "uncertainty")
    network = nn.ModuleDict(dict(method.build(0).named_children()))

    network["segmenter-1"] = network["segmenter-2"] = Edges()
    clean = [replace(case, image=np.stack([case.label.astype("f4"), case.image[1]])) for case in cases]
    for batch in shown(method, network, clean):
        unsure = batch.inputs[:, 0]
        assert set(unsure.unique().tolist()) <= {0.0, 1.0}  # type: ignore[no-untyped-call]
        inside = batch.reference > 0
        assert not unsure[inside].any()
        assert unsure[~inside].mean() > 0.5  # but for what is turned in from outside of the volume


def test_outside_of_training_and_scoring_there_are_no_maps(task: Task) -> None:
    with pytest.raises(TrainingError, match="maps are made in `train_round` and `score`"):
        _ = make(task, "uncertainty").parts


# ------------------------------------------------------------------------------------------ learning


def test_the_loss_is_hubers_without_regions_that_are_not_there(task: Task) -> None:
    method = make(task, "image")
    reference = torch.zeros(2, *task.size, dtype=torch.uint8)
    reference[:, :8] = 1
    reference[1, 8:16] = 2  # the rim is in the second case alone
    label = reference.clone()
    label[:, 4:8] = 0
    truth = overlap(label, reference, task.region_indices())
    batch = method.batch(generator(0), torch.zeros(2, 2, *task.size), reference, label)
    predicted = torch.cat([truth.mean[:, None], truth.dsc], dim=1)
    predicted[0] += torch.tensor([0.1, 0.5, 0.2, 0.3])

    class Fixed(nn.Module):
        def forward(self, _: Tensor) -> Tensor:
            return predicted

    loss = method.losses(Fixed(), batch)["quality"]
    torch.testing.assert_close(loss, torch.tensor((0.1**2 + 0.2**2 + 0.3**2) / 2 / 7))


@INPUTS
def test_training_teaches(sees: Input, task: Task, cases: list[Case]) -> None:
    method = make(task, sees, network={"width": 8}, learning_rate=5e-3, schedule="cosine")
    network = nn.ModuleDict(dict(method.build(0).named_children()))
    for stage in method.stages()[:-1]:
        network[stage.part] = Edges() if sees == "uncertainty" else Adds(0.0)
    clean = [replace(case, image=np.stack([case.label.astype("f4"), case.image[1]])) for case in cases]
    for number in (1, 2, 3):
        method.train_round(network, clean, RoundPlan(0, "a", number, 3, 30, 4), FP32)
    kinds = ["untouched", "seggen", "under-contouring", "another-patient"]
    made = list(degrade_cases(clean, task, kinds, generator(0)))
    scores = list(method.score(network, [degraded.case for degraded in made], FP32))
    assert [score.case_id for score in scores] == [degraded.case.id for degraded in made]
    assert all(0 <= score.quality <= 1 for score in scores)
    assert list(scores[0].regions) == list(task.regions)
    quality = [score.quality for score in scores]
    assert np.corrcoef(quality, [degraded.mean_dsc for degraded in made])[0, 1] > 0.5


@INPUTS
def test_scores_do_not_depend_on_company(sees: Input, task: Task, cases_of_both_folds: list[Case]) -> None:
    method = make(task, sees)
    network = method.build(0)
    first = [score.quality for score in method.score(network, cases_of_both_folds, FP32, batch_size=5)]
    other = list(method.score(network, cases_of_both_folds[::-1], FP32, batch_size=2))
    assert first == pytest.approx([score.quality for score in reversed(other)], abs=1e-6)
    method.train_round(network, cases_of_both_folds, plan(), FP32)  # what was in inference is trained on


class OwnPredictions:
    """Stored labels: of each case one, as a segmenter might have made it."""

    def __init__(self, cases: list[Case]) -> None:
        self.cases = cases
        self.read_of: set[int] = set()

    def count(self, case: int) -> int:
        return 1

    def read(self, case: int, index: int) -> NDArray[np.uint8]:
        self.read_of.add(case)
        label = self.cases[case].label.copy()
        label[: 4 * case] = 0
        return label


def test_the_label_may_be_what_a_segmenter_made(task: Task, cases: list[Case]) -> None:
    samples = SamplesConfig(seggen=0, annotator=0, untouched=0, snapshots=1)
    method = make(task, "error", samples=samples.model_dump())
    labels = OwnPredictions(cases)
    result = method.train_round(
        method.build(0), cases, plan(steps=6), FP32, known=Known(labels={"snapshots": labels})
    )
    assert labels.read_of == set(range(5))
    assert result.drawn is not None
    assert {kind for _, kind, _ in result.drawn.chosen} == {"snapshots"}


def test_the_kind_of_map_follows_the_configuration(task: Task) -> None:
    inputs: tuple[Input, ...] = ("image", "uncertainty", "error")
    kinds = {sees: type(make(task, sees).maps) for sees in inputs}
    assert kinds == {"image": Images, "uncertainty": Uncertainties, "error": Errors}
