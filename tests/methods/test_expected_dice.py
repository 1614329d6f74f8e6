"""The expected DSC of a label with passes of segmenters, for `expected-dice` and `ensemble`."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score
from torch import Tensor, nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.degradation.samples import ALL_KINDS, degrade_cases
from fedqc.methods.base import Method, RoundPlan, begin_stage
from fedqc.methods.cross_fitting import fold_of
from fedqc.methods.ensemble import EnsembleMethod
from fedqc.methods.expected_dice import ExpectedDiceMethod, agreement
from fedqc.task import Task

FP32 = Compute(torch.device("cpu"), torch.float32)
SEGMENTER = {
    "channels": (4, 8),
    "passes": 3,
    "rounds": 2,
    "local_steps": 25,
    "batch_size": 2,
    "learning_rate": 3e-2,
}


def make(task: Task, method: type[ExpectedDiceMethod] = ExpectedDiceMethod) -> ExpectedDiceMethod:
    return method(task, QCConfig.model_validate({"segmenter": SEGMENTER}))


def trained(method: Method, cases: list[Case]) -> nn.Module:
    """All stages, as one site would train them."""
    network = method.build(0)
    for stage in method.stages():
        begin_stage(network, stage)
        learned = [case for case in cases if stage.fold is None or fold_of(case.patient) != stage.fold]
        for number in range(1, stage.rounds + 1):
            plan = RoundPlan(
                0, "a", number, stage.rounds, stage.local_steps, stage.batch_size, stage=stage.name
            )
            method.train_round(network, learned, plan, FP32)
    return network


class Finds(nn.Module):
    """A segmenter that reads the class from the first modality, and moves it by some voxels at each pass."""

    def __init__(self, moves: tuple[int, ...]) -> None:
        super().__init__()
        self.moves, self.passes = moves, 0

    def forward(self, x: Tensor) -> Tensor:
        move = self.moves[self.passes % len(self.moves)]
        self.passes += 1
        label = x[:, 0].round().clamp(0, 2).long().roll(move, dims=1)
        return nn.functional.one_hot(label, 3).movedim(-1, 1) * 50.0


def clean(case: Case) -> Case:
    """With a first modality that shows the label as it is."""
    return replace(case, image=np.stack([case.label.astype(np.float32), case.image[1]]))


def with_segmenters(method: ExpectedDiceMethod, *moves: int) -> nn.Module:
    parts: Mapping[str, nn.Module] = {
        name: Finds(moves) if name.startswith("segmenter") else part
        for name, part in method.build(0).named_children()
    }
    return nn.ModuleDict(parts)


def test_agreement_is_the_f1_score_of_every_region_with_every_pass(task: Task, cases: list[Case]) -> None:
    label = torch.from_numpy(cases[0].label)
    samples = torch.stack([label.roll(2, dims=0), torch.from_numpy(cases[1].label), label * (label == 2)])
    regions = task.region_indices()
    found = agreement(label, samples, regions)
    for row, sample in zip(found.tolist(), samples, strict=True):
        scores, present = [], []
        for region in regions:
            a, b = (np.isin(one.numpy(), region).ravel() for one in (label, sample))
            scores.append(f1_score(b, a, zero_division=1.0))
            present.append(b.any())
        assert row[1:] == pytest.approx(scores)
        assert row[0] == pytest.approx(np.mean(np.array(scores)[present]))


def test_the_expected_dsc_and_what_lies_around_it(task: Task, cases: list[Case]) -> None:
    method = make(task)
    case = clean(cases[0])
    (score,) = method.score(with_segmenters(method, 0, 0, 2), [case], FP32)
    label = torch.from_numpy(case.label)
    moved = agreement(label, label.roll(2, dims=0)[None], task.region_indices())[0]
    assert score.quality == pytest.approx((2 + moved[0].item()) / 3)
    assert score.regions["core"] == pytest.approx((2 + moved[2].item()) / 3)
    low, high = np.quantile([1, 1, moved[0].item()], [0.025, 0.975])
    assert score.interval == pytest.approx((low, high))
    assert score.error_map is not None
    np.testing.assert_allclose(score.error_map, (label.roll(2, dims=0) != label).numpy() / 3, rtol=1e-6)


def test_after_a_little_training_worse_labels_score_worse(
    task: Task, cases_of_both_folds: list[Case]
) -> None:
    method = make(task)
    assert method.judges == "label"
    network = trained(method, cases_of_both_folds)
    kinds = ["untouched", "seggen", "under-contouring", "another-patient"]
    made = list(degrade_cases(cases_of_both_folds, task, kinds, np.random.default_rng(0)))
    spoiled = [degraded.case for degraded in made]
    scores = list(method.score(network, spoiled, FP32))
    quality = np.array([score.quality for score in scores])
    assert np.corrcoef(quality, [degraded.mean_dsc for degraded in made])[0, 1] > 0.8
    for score, case in zip(scores, spoiled, strict=True):
        assert score.case_id == case.id
        assert list(score.regions) == list(task.regions)
        assert score.interval is not None
        low, high = score.interval
        assert 0 <= low <= score.quality <= high <= 1
        assert score.error_map is not None
        assert score.error_map.shape == task.size
    backwards = list(method.score(network, reversed(spoiled), FP32, batch_size=3))
    assert [score.quality for score in reversed(backwards)] == quality.tolist()


def test_calibration_learns_what_an_expected_dsc_means(task: Task, cases: list[Case]) -> None:
    """Segmenters that err by two voxels: a label as it should be is expected to have less than it has."""
    method = make(task)
    clean_cases = [clean(case) for case in cases]
    network = with_segmenters(method, 2)
    made = list(degrade_cases(clean_cases, task, ALL_KINDS, np.random.default_rng(1)))
    truth = np.array([degraded.mean_dsc for degraded in made])

    def judged() -> tuple[float, float]:
        """Mean error, and the share of intervals that hold the truth."""
        scores = list(method.score(network, [degraded.case for degraded in made], FP32))
        ends = np.array([score.interval for score in scores])
        error = np.abs(np.array([score.quality for score in scores]) - truth).mean()
        return float(error), float(((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean())

    before, _ = judged()
    done: list[tuple[int, int]] = []
    rng = np.random.default_rng(0)
    method.fit(network, clean_cases, FP32, rng, lambda now, all_of_them: done.append((now, all_of_them)))
    error, covered = judged()
    assert error < 0.8 * before
    assert 0.9 <= covered < 1  # of other errors than those it was fitted to; passes that all agree hold none
    assert done == [(number, 5) for number in range(1, 6)]


def test_without_references_the_calibration_stays_as_it_is(task: Task) -> None:
    method = make(task)
    network = method.build(0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method.fit(network, [], FP32, np.random.default_rng(0))
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_all_that_is_learned_is_among_the_tensors(task: Task, cases: list[Case]) -> None:
    method = make(task)
    network = method.build(0)
    unfitted = [score.quality for score in method.score(network, cases, FP32)]
    method.fit(network, cases, FP32, np.random.default_rng(0))
    other = method.build(1)
    other.load_state_dict(network.state_dict())
    first, second = ([score.quality for score in method.score(one, cases, FP32)] for one in (network, other))
    assert first == second != unfitted


def test_the_ensemble_has_three_snapshots_unless_told_otherwise(task: Task) -> None:
    method = make(task, EnsembleMethod)
    names = [stage.name for stage in method.stages()]
    assert names == [
        *("segmenter-1", "segmenter-1-2", "segmenter-1-3"),
        *("segmenter-2", "segmenter-2-2", "segmenter-2-3"),
    ]
    parts = dict(method.build(0).named_children())
    assert set(parts) == {*names, "calibration", "interval"}
    two = EnsembleMethod(task, QCConfig.model_validate({"segmenter": {**SEGMENTER, "snapshots": 2}}))
    assert len(two.stages()) == 4
    assert len(make(task).stages()) == 2


def test_the_ensemble_agrees_with_its_snapshots_in_the_mean(
    task: Task, cases_of_both_folds: list[Case]
) -> None:
    method = make(task, EnsembleMethod)
    assert method.judges == "label"
    case = clean(cases_of_both_folds[1])
    network = nn.ModuleDict(dict(method.build(0).named_children()))
    for stage in method.stages():  # the other fold's snapshots are wrong everywhere, and never asked
        network[stage.part] = Finds((0,) if stage.fold == fold_of(case.patient) else (16,))
    second = next(stage.part for stage in method.stages() if stage.fold == 1 and stage.starts_from)
    network[second] = Finds((3,))
    (score,) = method.score(network, [case], FP32)
    label = torch.from_numpy(case.label)
    moved = agreement(label, label.roll(3, dims=0)[None], task.region_indices())[0]
    assert score.quality == pytest.approx((2 + moved[0].item()) / 3)


def test_a_first_snapshot_is_trained_on(task: Task, cases_of_both_folds: list[Case]) -> None:
    config = {**SEGMENTER, "snapshots": 2, "rounds": 1, "local_steps": 1}
    method = EnsembleMethod(task, QCConfig.model_validate({"segmenter": config}))
    network = method.build(0)
    first, second = (stage for stage in method.stages() if stage.fold == 0)
    begin_stage(network, second)
    weights = [network.get_submodule(stage.part).state_dict() for stage in (first, second)]
    assert all(torch.equal(weights[0][name], value) for name, value in weights[1].items())
    method.train_round(network, cases_of_both_folds, RoundPlan(0, "a", 1, 1, 1, 2, stage=second.name), FP32)
    assert not torch.equal(weights[0]["output.bias"], network.get_parameter(f"{second.part}.output.bias"))
