"""A network that learns from RCA's estimates: of which labels, from whom, and that they are made once."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig, RCAConfig, SamplesConfig
from fedqc.errors import TrainingError
from fedqc.methods.base import Known, RoundPlan
from fedqc.methods.rca import Estimate, RCAMethod
from fedqc.methods.rca_labels import Estimates, RCALabelsMethod
from fedqc.seeding import generator
from fedqc.task import Task
from tests.methods.conftest import make_case

FP32 = Compute(torch.device("cpu"), torch.float32)
PLAN = RoundPlan(seed=0, site="a", round=1, rounds=2, steps=2, batch_size=4)
REFERENCES = [make_case(number) for number in range(3)]


def make(task: Task, references: Sequence[Case] = REFERENCES, **options: object) -> RCALabelsMethod:
    values = {
        "network": NetworkConfig(width=4, blocks=(1, 1)),
        "samples": SamplesConfig(seggen=0, annotator=0.5, untouched=0.5),
        "balance": "none",
        "leave_out": ("swapped-classes",),
        "rca": RCAConfig(voxels=800, references=2, calibration=2),
        **options,
    }
    method = RCALabelsMethod(task, QCConfig.model_validate({"method": "rca-labels", **values}))
    method.references = references
    return method


@pytest.fixture
def candidate() -> Case:
    """A label that is far from what the image shows, and consistent with itself all the same."""
    case = make_case(7)
    return replace(case, id="candidate", label=np.roll(case.label, 14, axis=0))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Case and number of labels of every estimate."""
    found: list[tuple[str, int]] = []
    estimate = RCAMethod.estimate

    def noted(self: RCAMethod, case: Case, labels: Sequence[NDArray[np.uint8]], compute: Compute) -> Estimate:
        found.append((case.id, len(labels)))
        return estimate(self, case, labels, compute)

    monkeypatch.setattr(RCAMethod, "estimate", noted)
    return found


def test_background_is_not_scored(task: Task) -> None:
    method = make(task)
    assert method.scored_regions() == {"core": (1,), "rim": (2,), "all-classes": (1, 2), "whole": (1, 2)}
    assert list(method.rca.scored_regions().items()) == list(method.scored_regions().items())
    (stage,) = method.stages()
    assert stage.learns_from == "all"
    assert stage.needs_references


def test_a_candidates_own_label_is_not_taken_to_be_right(task: Task, candidate: Case) -> None:
    method = make(task)
    pool = method.pool([candidate, REFERENCES[0]])
    (chunk,) = pool.chunks(np.random.default_rng(0), 24)
    untouched = {
        recipe.case: dsc
        for recipe, dsc in zip(chunk.recipes, chunk.dsc, strict=True)
        if recipe.kind == "untouched"
    }
    assert untouched[0].max() < 0.6  # compared with itself it would be 1
    assert untouched[1].min() > 0.8
    torch.testing.assert_close(chunk.mean, chunk.dsc[:, 2])  # of all classes together
    assert pool.drawn.chosen[0][2] in chunk.mean.tolist()


def shares(label: NDArray[np.uint8]) -> list[float]:
    """Something that tells labels apart."""
    both = float((label > 0).mean())
    return [float((label == 1).mean()), float((label == 2).mean()), both, both / 2]


@pytest.fixture
def by_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    """What RCA says of a label follows from the label alone."""

    def said(self: RCAMethod, case: Case, labels: Sequence[NDArray[np.uint8]], compute: Compute) -> Estimate:
        regions = np.array([shares(label) for label in labels], dtype=np.float32)
        return Estimate(regions, regions.mean(axis=1), ("reference",))

    monkeypatch.setattr(RCAMethod, "estimate", said)


@pytest.mark.usefixtures("by_shares")
def test_targets_go_with_their_labels(task: Task, candidate: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqc.methods.rca_labels.augment", lambda rng, image, label, sides: (image, label))
    method = make(task, rca=RCAConfig(calibration=0), balance="histogram")
    cases = [candidate, *REFERENCES]
    pool = method.pool(cases)
    for batch in method.batches(cases, pool, np.random.default_rng(0), 4, 6):
        expected = torch.tensor([shares(label) for label in batch.label.numpy()])
        torch.testing.assert_close(batch.dsc, expected)
        masks = torch.stack([batch.label == index for index in range(3)], dim=1).float()
        torch.testing.assert_close(batch.inputs[:, 2:], masks)


@pytest.mark.usefixtures("by_shares")
def test_estimates_are_calibrated_on_the_references(task: Task, candidate: Case) -> None:
    """Each region by its own map, which for a measure that means nothing says what is usual."""
    rca = make(task).rca
    estimates = Estimates(rca, REFERENCES, FP32, None)
    estimates.make(candidate, [candidate.label])
    (values,) = estimates.known(candidate).values()
    network = rca.build(0)
    rca.fit(network, REFERENCES, FP32, generator(0, "rca-labels", "fit"))
    (score,) = rca.score(network, [candidate], FP32)
    assert dict(zip(rca.scored_regions(), values, strict=True)) == pytest.approx(score.regions)
    assert values != pytest.approx(shares(candidate.label), abs=0.05)


def test_every_case_is_looked_at_once(
    task: Task, candidate: Case, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    method = make(task)
    cases = [candidate, REFERENCES[0]]
    rounds = [replace(PLAN, round=number) for number in (1, 2)]
    network = method.build(0)
    for plan in rounds:
        result = method.train_round(network, cases, plan, FP32, known=Known(kept=tmp_path))
        assert np.isfinite(result.losses["quality"])
        assert result.samples == 8
    fitted = 2  # qc.rca.calibration
    assert len(asked) <= fitted + len(cases)
    assert {case for case, _ in asked} <= {"candidate", *(case.id for case in REFERENCES)}
    assert all(count > 8 for _, count in asked)

    # Another process knows them from the disk, and trains in the same way.
    again = make(task)
    n_before = len(asked)
    other = again.build(0)
    for plan in rounds:
        again.train_round(other, cases, plan, FP32, known=Known(kept=tmp_path))
    assert len(asked) == n_before
    for name, values in network.state_dict().items():
        torch.testing.assert_close(values, other.state_dict()[name])

    # Other references say other things.
    other_references = make(task, references=[make_case(number) for number in (3, 4)])
    other_references.train_round(other, cases, rounds[0], FP32, known=Known(kept=tmp_path))
    assert len(asked) > n_before


def test_what_was_cut_off_on_disk_is_made_again(
    task: Task, candidate: Case, asked: list[tuple[str, int]], tmp_path: Path
) -> None:
    def made() -> dict[str, list[float]]:
        estimates = Estimates(make(task).rca, REFERENCES, FP32, tmp_path)
        if not estimates.known(candidate):
            estimates.make(candidate, [candidate.label])
        return estimates.known(candidate)

    before = made()
    (path,) = tmp_path.rglob("*.json")
    path.write_text(path.read_text()[:20])
    n_before = len(asked)
    assert made() == before
    assert len(asked) > n_before
    assert made() == before


def test_without_references_of_two_patients_there_is_nothing_to_compare_with(
    task: Task, candidate: Case
) -> None:
    for references in ([], [REFERENCES[0], replace(REFERENCES[1], patient=REFERENCES[0].patient)]):
        method = make(task, references)
        message = f"of 2 patients or more; found {len(references)} cases"
        with pytest.raises(TrainingError, match=message):
            method.train_round(method.build(0), [candidate], PLAN, FP32)


def test_it_scores_without_references(task: Task, candidate: Case) -> None:
    method = make(task, references=())
    (score,) = method.score(method.build(0), [candidate], FP32)
    assert not method.needs_references
    assert list(score.regions) == ["core", "rim", "all-classes", "whole"]
    mean = np.mean([score.regions[name] for name in task.regions])
    assert score.quality == pytest.approx(mean)
