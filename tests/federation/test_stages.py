"""A QC method of several parts, trained one after another across the sites."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

from fedqc.alone import Job, train_alone
from fedqc.cases.layouts import find_cases
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig, load_site
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError, ProtocolError, TrainingError
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score, Stage
from fedqc.methods.cross_fitting import FOLDS, fold_of, folds_that_may_judge
from fedqc.model import load_model
from fedqc.protocol import TrainRequest
from fedqc.ratings import Rating, read_ratings
from fedqc.task import load_task
from fedqc.training import Progress
from tests.federation.runs import RecordingGrid, record, run, statistics, weights

Sites = dict[str, Path]
FP32 = Compute(torch.device("cpu"), torch.float32)


class Counting(Method):
    """Every part counts the rounds in which it was trained; the last one copies what the first came to."""

    name = "counting"
    judges = "label"
    needs_references = True
    figures = ("stars", "low", "high")
    seen: tuple[tuple[str, frozenset[str]], ...] = ()
    """Stage and patients of every round, of all methods of this kind."""
    rated: tuple[int, ...] = ()
    fits = 0
    cut_off_in = ""
    """Stage in which somebody stops the training."""

    def stages(self) -> tuple[Stage, ...]:
        return (
            Stage("eye-1", 2, 3, 2, part="eye-1", learns_from="all", fold=0),
            Stage("eye-2", 1, 3, 2, part="eye-2", learns_from="all", fold=1, starts_from="eye-1"),
            Stage("taste", 1, 5, 1, part="taste", needs=("eye-1",), learns_from="rated"),
        )

    def build(self, seed: int) -> nn.Module:
        parts = {name: nn.Linear(1, 1, bias=False) for name in ("eye-1", "eye-2", "taste")}
        network = nn.ModuleDict({**parts, "fitted": nn.Linear(1, 1, bias=False)})
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.zero_()
        return network

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
        stage = self.stage(plan.stage)
        assert (plan.steps, plan.batch_size) == (stage.local_steps, stage.batch_size)
        if stage.name == Counting.cut_off_in:
            raise KeyboardInterrupt
        Counting.seen += ((stage.name, frozenset(case.patient for case in cases)),)
        with torch.no_grad():
            weight = network.get_submodule(stage.part).get_parameter("weight")
            if stage.name == "taste":
                assert known is not None
                Counting.rated += (sum(len(known.ratings[case.id]) for case in cases),)
                weight.add_(10 * network.get_submodule("eye-1").get_parameter("weight"))
            weight.add_(1)
        drawn = tuple(case.patient for case in cases)
        return RoundResult({"loss": 0.5}, plan.steps * plan.batch_size, patients=drawn)

    def fit(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        Counting.fits += 1
        with torch.no_grad():
            network.get_submodule("fitted").get_parameter("weight").fill_(len(cases))

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int | None = None
    ) -> Iterator[Score]:
        fitted = network.get_submodule("fitted").get_parameter("weight").item()
        for case in cases:
            yield Score(case.id, len(self.references) / 10, {}, stars=fitted, interval=(0.25, 0.5))


@dataclass(frozen=True)
class Point:
    name: str = "counting"

    def load(self) -> type[Method]:
        return Counting


@pytest.fixture(autouse=True)
def counting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedqc.methods.base.entry_points", lambda group: [Point()])
    monkeypatch.setattr("fedqc_server.phases.build_coordinator_report", lambda folder: None)
    monkeypatch.setattr(Counting, "seen", ())
    monkeypatch.setattr(Counting, "rated", ())
    monkeypatch.setattr(Counting, "fits", 0)


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Sites:
    return {name: make_site(name) for name in ("a", "b")}


def rate(site_file: Path, *lines: str) -> None:
    (site_file.parent / "ratings.csv").write_text("\n".join(["id,rater,view,stars", *lines]) + "\n")
    text = site_file.read_text().replace("[data]", '[data]\nratings = "ratings.csv"')
    site_file.write_text(text)


def first_cases(site_file: Path, count: int) -> list[str]:
    """Ids of candidates: none of them is held back."""
    site = load_site(site_file)
    assert site.data.reference is not None
    references = set(site.data.reference.read_text().split())
    found = find_cases(site.data.path, load_task(site.task)).cases
    return [case.id for case in found if case.id not in references][:count]


def test_stages_are_trained_one_after_another(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    for site_file in sites.values():
        one, two = first_cases(site_file, 2)
        rate(site_file, f"{one},ann,all,3", f"{one},bob,all,4", f"{two},ann,axial,2")
    federation = make_federation(sites, method="counting")
    out = tmp_path / "run"
    grid = RecordingGrid(sites)
    run(grid, federation, out, only=("summarise", "train.qc", "calibrate", "score"))

    trained = [name for name, _ in Counting.seen]
    assert trained == ["eye-1"] * 4 + ["eye-2"] * 2 + ["taste"] * 2
    for name, patients in Counting.seen[:6]:
        assert {fold_of(patient) for patient in patients} == {1 if name == "eye-1" else 0}
    assert Counting.rated == (3, 3)
    # eye-2 began with what eye-1 came to, and taste could read it.
    found = {name: values.item() for name, values in weights(out).items()}
    assert found == {"eye-1.weight": 2, "eye-2.weight": 3, "taste.weight": 21, "fitted.weight": 0}
    assert list(statistics(out)["train"]) == ["qc-eye-1", "qc-eye-2", "qc-taste"]
    assert record(out)["models"]["qc"]["rounds"] == 4
    assert record(out)["models"]["qc"]["samples"] == 2 * (2 * 6 + 6 + 5)

    # What is fitted stays at the site: it knows how many references it trains on, the coordinator does not.
    site_file = sites["a"]
    stored = load_model(load_site(site_file).results / "models" / "qc")
    n_references = len(stored.method.references)
    assert n_references == stored.network.get_submodule("fitted").get_parameter("weight").item() > 0
    case = stored.method.references[0]
    assert case.patient == stored.card.references[0].patient
    assert [one.patient for one in stored.method.references[0:2]] == [
        one.patient for one in stored.card.references[:2]
    ]
    manifest = json.loads((load_site(site_file).results / "manifest.json").read_text())
    assert {entry["quality"] for entry in manifest["entries"]} == {n_references / 10}


def test_what_is_fitted_is_kept_and_fitted_again_where_it_is_damaged(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    for site_file in sites.values():
        rate(site_file, f"{first_cases(site_file, 1)[0]},ann,all,3")
    federation = make_federation(sites, method="counting")
    phases = ("summarise", "train.qc", "calibrate", "score")
    fits = []
    for number, meant in enumerate(("as it is", "damaged", "as it is")):
        kept = [file for one in sites.values() for file in load_site(one).compute.cache.glob("fitted/*")]
        assert len(kept) == (len(sites) if number else 0)
        if meant == "damaged":
            kept[0].write_bytes(b"no tensors")
        run(RecordingGrid(sites), federation, tmp_path / f"run-{number}", only=phases)
        fits.append(Counting.fits)
        for site_file in sites.values():
            stored = load_model(load_site(site_file).results / "models" / "qc")
            fitted = stored.network.get_submodule("fitted").get_parameter("weight").item()
            assert fitted == len(stored.card.references) > 0
    assert fits == [2, 3, 3]  # once a site, and once more where it was damaged


def test_a_site_without_ratings_is_excused(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    rate(sites["a"], f"{first_cases(sites['a'], 1)[0]},ann,all,3")
    federation = make_federation(sites, method="counting", minimum=1)
    run(RecordingGrid(sites), federation, tmp_path / "run", only=("summarise", "train.qc"))
    assert [name for name, _ in Counting.seen][-1:] == ["taste"]
    assert Counting.rated == (1,)
    (taste,) = statistics(tmp_path / "run")["train"]["qc-taste"]
    assert taste["failed"] == {"b": "no-reference"}


def test_an_unknown_stage_is_refused(sites: Sites) -> None:
    method = Counting(load_task("phantom"), QCConfig(method="counting"))
    with pytest.raises(ProtocolError, match="no stage 'nose'; it has eye-1, eye-2, taste"):
        method.stage("nose")
    assert TrainRequest.model_fields["stage"].default == "qc"


@pytest.mark.parametrize("by", ["method", "stage"])
def test_alone_references_to_compare_with_are_of_three_patients(
    sites: Sites, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    """One of them is held back; of one patient's references none could be compared with another."""
    site = load_site(sites["a"])
    task = load_task(site.task)
    cases = find_cases(site.data.path, task).cases
    if by == "stage":
        monkeypatch.setattr(Counting, "needs_references", False)
        monkeypatch.setattr(Counting, "stages", lambda _: (Stage("qc", 1, 1, 1, needs_references=True),))

    def train(count: int) -> None:
        out = tmp_path / f"model-{count}"
        train_alone(
            Job(task, QCConfig(method="counting"), 0),
            cases[:count],
            out,
            cache=tmp_path / "cache",
            compute=FP32,
            workers=1,
            display=Display(Console()),
        )

    assert len({case.patient for case in cases[:3]}) == 3
    with pytest.raises(DataError, match="found 1, and 1 held back; give it cases of 3 patients or more"):
        train(2)
    assert not list(tmp_path.glob("model-*"))
    monkeypatch.setattr("fedqc.alone.train_and_fit", fail)
    with pytest.raises(TrainingError, match="got so far"):
        train(3)


def fail(*_: object, **__: object) -> None:
    raise TrainingError("got so far")


def test_alone(sites: Sites, tmp_path: Path) -> None:
    site = load_site(sites["a"])
    task = load_task(site.task)
    cases = find_cases(site.data.path, task).cases
    rate(sites["a"], *(f"{case.id},ann,all,3" for case in cases))
    ratings = {one.case: [one] for one in read_ratings(sites["a"].parent / "ratings.csv")}
    qc = QCConfig(method="counting")

    def train(name: str, known: dict[str, list[Rating]]) -> Path:
        job = Job(task, qc, 0, ratings=known)
        train_alone(
            job,
            cases,
            tmp_path / name,
            cache=tmp_path / "cache",
            compute=FP32,
            workers=1,
            display=Display(Console()),
        )
        return tmp_path / name

    stored = load_model(train("model", ratings), task)
    found = {name: values.item() for name, values in stored.network.state_dict().items()}
    n_training = len(stored.card.references)
    assert found == {"eye-1.weight": 2, "eye-2.weight": 3, "taste.weight": 21, "fitted.weight": n_training}
    assert stored.card.rounds == 4
    assert stored.card.cases == n_training

    with pytest.raises(TrainingError, match=r"'taste' has nothing to learn from: there are .* a table"):
        train("other", {})
    with pytest.raises(ConfigError, match="unfinished training with other ratings"):
        train("other", ratings)

    # It goes on behind the stages that were finished.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Counting, "cut_off_in", "taste")
        with pytest.raises(KeyboardInterrupt):
            train("third", ratings)
    n_before = len(Counting.seen)
    stored = load_model(train("third", ratings), task)
    assert [name for name, _ in Counting.seen[n_before:]] == ["taste"]
    assert stored.network.get_submodule("taste").get_parameter("weight").item() == 21


def test_folds() -> None:
    patients = [f"patient-{number}" for number in range(400)]
    folds = [fold_of(patient) for patient in patients]
    assert folds == [fold_of(patient) for patient in patients]
    assert 160 < sum(folds) < 240
    assert all(folds_that_may_judge(patient) == (fold_of(patient),) for patient in patients)
    assert folds_that_may_judge("") == FOLDS
