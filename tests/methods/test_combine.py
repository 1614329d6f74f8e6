"""Several methods' scores joined by weights that reference cases give them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import nn

from fedqc.alone import Job, train_rounds
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import CombineConfig, DQEConfig, NetworkConfig, QCConfig, parse
from fedqc.degradation.samples import ALL_KINDS, degrade_cases
from fedqc.display import Display
from fedqc.errors import ConfigError
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage, part_of
from fedqc.methods.combine import Blend, CombineMethod
from fedqc.methods.cross_fitting import is_for_fitting
from fedqc.methods.dqe import DQEMethod
from fedqc.methods.expected_dice import ExpectedDiceMethod
from fedqc.methods.rca_labels import RCALabelsMethod
from fedqc.metrics.agreement import mae
from fedqc.seeding import generator
from fedqc.task import Task
from fedqc.training import Progress
from tests.methods.conftest import make_case

FP32 = Compute(torch.device("cpu"), torch.float32)


class Halves(Method):
    """Knows the right label by the case's id, and says half of what the DSC of all classes is."""

    name = "halves"
    judges = "label"
    fitted_on: tuple[str, ...] = ()

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("eye", 1, 1, 1, part="eye"),
            Stage("hand", 2, 1, 1, part="hand", needs=("eye",), starts_from="eye", learns_from="all", fold=1),
        )

    def build(self, seed: int) -> nn.Module:
        return nn.ModuleDict({"eye": nn.Linear(1, 1), "hand": nn.Linear(1, 1)})

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
        with torch.no_grad():
            part_of(network, self.stage(plan.stage).part).get_parameter("weight").fill_(plan.round)
        return RoundResult({"loss": 0.0}, 1)

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        Halves.fitted_on = tuple(case.patient for case in cases)

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        for case in cases:
            right, label = make_case(int(case.id.removeprefix("case-"))).label > 0, case.label > 0
            dsc = 2 * float((right & label).sum()) / float(right.sum() + label.sum())
            yield Score(case.id, dsc / 2, {"whole": dsc / 2}, (right != label).astype(np.float32))


class Guess(Halves):
    """Says anything, and asks for references."""

    name = "guess"
    needs_references = True

    def stages(self) -> tuple[Stage, ...]:
        return (Stage("qc", 1, 1, 1),)

    def build(self, seed: int) -> nn.Module:
        return nn.Linear(1, 1)

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        assert len(self.references) > 0
        rng = np.random.default_rng(0)
        for case in cases:
            yield Score(case.id, float(rng.uniform()), {})


class Prediction(Guess):
    name = "prediction"
    judges = "prediction"  # type: ignore[assignment]


@dataclass(frozen=True)
class Point:
    name: str
    kind: type[Method]

    def load(self) -> type[Method]:
        return self.kind


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    own = (Halves, Guess, Prediction)
    real = (CombineMethod, DQEMethod, ExpectedDiceMethod, RCALabelsMethod)
    points = [Point(kind.name, kind) for kind in (*own, *real)]
    monkeypatch.setattr("fedqc.methods.base.entry_points", lambda group: points)


@pytest.fixture
def combine(task: Task) -> CombineMethod:
    config = QCConfig(method="combine", combine=CombineConfig(methods=("guess", "halves")))
    return CombineMethod(task, config)


def test_stages_are_those_of_all_methods(combine: CombineMethod) -> None:
    assert combine.stages() == (
        Stage("guess-qc", 1, 1, 1, part="guess", spares_fitting=True),
        Stage("halves-eye", 1, 1, 1, part="halves.eye", spares_fitting=True),
        Stage(
            "halves-hand",
            2,
            1,
            1,
            part="halves.hand",
            needs=("halves.eye",),
            starts_from="halves.eye",
            learns_from="all",
            fold=1,
        ),
    )
    network = combine.build(0)
    assert {name.partition(".")[0] for name in network.state_dict()} == {"guess", "halves", "fitted"}
    plan = RoundPlan(0, "a", 2, 2, 1, 1, stage="halves-hand")
    combine.train_round(network, [], plan, FP32)
    assert network.get_parameter("halves.hand.weight").item() == 2
    assert network.get_parameter("halves.eye.weight").item() != 2
    assert combine.needs_references


def test_a_quarter_of_the_references_is_spared(combine: CombineMethod) -> None:
    references, everyone = combine.stages()[0], combine.stages()[2]
    files = [CaseFiles(id=name, patient=name, images=(), label=None) for name in map(str, range(400))]
    learned = [case for case in files if references.may_learn_from(case, ())]
    assert 250 < len(learned) < 350
    assert not any(is_for_fitting(case.patient) for case in learned)
    assert any(is_for_fitting(case.patient) for case in files if everyone.may_learn_from(case, ()))


def test_what_is_worth_nothing_gets_no_weight(combine: CombineMethod, task: Task) -> None:
    cases = [make_case(number) for number in range(12)]
    kept = [case for case in cases if is_for_fitting(case.patient)]
    assert 2 <= len(kept) <= 6
    combine.references = cases
    network = combine.build(0)
    before = [score.quality for score in combine.score(network, cases, FP32)]
    halves = [score.quality for score in combine.methods["halves"].score(network, cases, FP32)]
    guesses = [score.quality for score in combine.methods["guess"].score(network, cases, FP32)]
    assert before == pytest.approx(np.mean([halves, guesses], axis=0), abs=1e-6)

    combine.fit(network, cases, FP32, generator(0, "fit"))
    assert Halves.fitted_on == tuple(case.patient for case in cases if case not in kept)
    blend = network["fitted"]
    assert isinstance(blend, Blend)
    guess, half = blend.weight.tolist()
    assert guess < 0.1
    assert half == pytest.approx(2, rel=0.25)

    unseen = [make_case(number) for number in range(20, 26)]
    samples = list(degrade_cases(unseen, task, ALL_KINDS, generator(0, "unseen")))
    scores = list(combine.score(network, iter([sample.case for sample in samples]), FP32))
    true = np.array([sample.mean_dsc for sample in samples])
    error = mae(np.array([score.quality for score in scores]), true)
    plain = [
        np.mean([one.quality for one in both])
        for both in zip(
            *(
                combine.methods[name].score(network, [s.case for s in samples], FP32)
                for name in combine.methods
            ),
            strict=True,
        )
    ]
    uncombined = mae(np.array(plain), true)
    assert error is not None
    assert uncombined is not None
    assert error < 0.7 * uncombined
    assert [score.case_id for score in scores] == [sample.case.id for sample in samples]
    assert all(set(score.regions) == set(task.regions) for score in scores)
    assert all(score.error_map is not None for score in scores)


def test_with_too_few_patients_it_is_the_mean(combine: CombineMethod) -> None:
    cases = [case for case in map(make_case, range(8)) if not is_for_fitting(case.patient)]
    combine.references = cases
    network = combine.build(0)
    combine.fit(network, cases, FP32, generator(0, "fit"))
    assert network.get_buffer("fitted.weight").tolist() == [0.5, 0.5]
    empty = replace(cases[0], label=np.zeros_like(cases[0].label))
    (score,) = combine.score(network, [empty], FP32)
    assert score.quality == pytest.approx(np.random.default_rng(0).uniform() / 2, abs=1e-6)


def test_each_case_has_its_own_stored_labels_where_some_are_spared(
    combine: CombineMethod, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = [make_case(number) for number in range(12)]
    assert any(is_for_fitting(case.patient) for case in cases[:-1])
    seen: list[int] = []

    class OwnLabels:
        def count(self, case: int) -> int:
            return case

        def read(self, case: int, index: int) -> NDArray[np.uint8]:
            return cases[case].label

    def train_round(
        self: Method, network: nn.Module, chosen: Sequence[Case], plan: RoundPlan, *_: Any, known: Known
    ) -> RoundResult:
        labels = known.labels["forest"]
        for index, case in enumerate(chosen):
            assert np.array_equal(labels.read(index, 0), case.label)
            assert labels.count(index) == cases.index(case)
        seen.append(len(chosen))
        return RoundResult({"loss": 0.0}, 1)

    monkeypatch.setattr(Halves, "train_round", train_round)
    files = [CaseFiles(case.id, case.patient, (), None) for case in cases]
    cache: Any = SimpleNamespace(get=lambda one: next(case for case in cases if case.id == one.id))
    job = Job(task, combine.config, 0)
    combine.references = CachedCases(cache, files)
    with Display(Console(quiet=True)) as display:
        train_rounds(
            job,
            combine,
            CachedCases(cache, files),
            Known(labels={"forest": OwnLabels()}),
            tmp_path / "model",
            compute=FP32,
            display=display,
        )
    assert len(seen) == 4
    assert max(seen) < len(cases)


def test_a_case_that_one_of_the_methods_cannot_judge(
    combine: CombineMethod, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = CaseFiles("case-1", "patient-1", (), None)
    assert combine.cannot_judge(files) is None
    monkeypatch.setattr(Guess, "cannot_judge", lambda self, _: f"{len(self.references)} references")
    combine.references = [make_case(1)]
    assert combine.cannot_judge(files) == "1 references"


def test_only_methods_that_judge_the_label(task: Task) -> None:
    config = QCConfig(combine=CombineConfig(methods=("guess", "prediction")))
    with pytest.raises(ConfigError, match="'prediction', which judges its own prediction"):
        CombineMethod(task, config)
    for wrong in (["a"], ["a", "a"], ["combine", "a"]):
        with pytest.raises(ConfigError, match="methods"):
            parse({"methods": wrong}, CombineConfig, source="x")


def test_who_needs_a_teacher_is_refused_as_nobody_can_give_one(task: Task) -> None:
    methods = CombineConfig(methods=("guess", "dqe"))
    with pytest.raises(ConfigError, match="'dqe', which as it is set up learns from a trained model"):
        CombineMethod(task, QCConfig(combine=methods, dqe=DQEConfig(targets="distilled")))
    CombineMethod(task, QCConfig(combine=methods))


def test_whoever_learns_from_other_cases_spares_the_patients_too(task: Task) -> None:
    """Unless in folds, where a patient is judged by those that did not see it."""
    network = NetworkConfig(width=4, blocks=(1, 1))
    config = QCConfig(network=network, combine=CombineConfig(methods=("rca-labels", "expected-dice")))
    for stage in CombineMethod(task, config).stages():
        assert (stage.learns_from, stage.spares_fitting) == ("all", stage.fold is None)


def test_how_to_optimise_reaches_whom_it_is_of_use_to(task: Task) -> None:
    chosen: dict[str, Any] = {"learning_rate": 0.5, "schedule": "constant"}
    config = QCConfig(combine=CombineConfig(methods=("dqe", "expected-dice")), **chosen)
    combine = CombineMethod(task, config)
    assert combine.methods["dqe"].config.learning_rate == 0.5
    assert combine.methods["expected-dice"].config.schedule is None
    none = CombineConfig(methods=("expected-dice", "guess"))
    with pytest.raises(ConfigError, match=r"qc.learning_rate is of no use to qc.method 'combine'"):
        CombineMethod(task, config.model_copy(update={"combine": none}))


def test_each_method_gets_its_own_network_options(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Halves, "network_options", frozenset({"width", "dropout"}))
    monkeypatch.setattr(Guess, "network_options", frozenset({"width"}))
    config = QCConfig(
        combine=CombineConfig(methods=("guess", "halves")), network=NetworkConfig(width=8, dropout=0.5)
    )
    methods = CombineMethod(task, config).methods
    assert methods["guess"].config.network == NetworkConfig(width=8)
    assert methods["halves"].config.network == NetworkConfig(width=8, dropout=0.5)
    with pytest.raises(ConfigError, match="'combine', which takes dropout, width; leave it out"):
        CombineMethod(task, config.model_copy(update={"network": NetworkConfig(attention=True)}))
