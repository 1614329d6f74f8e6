"""Rules in whole runs: what they rest on is counted at the sites, and nothing is dropped without ground."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from fedqc_client import tasks
from fedqc_simulations.engine import LocalGrid

from fedqc.config import SiteConfig, load_site
from fedqc.curation.calibration import BINS, PATIENT
from fedqc.curation.diagnosing import MENDED
from fedqc.curation.diagnosis import Kind
from fedqc.curation.manifest import Manifest, overrule, read_manifest
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import SELF_TEST
from fedqc.errors import ConfigError
from fedqc.segmentation import Segmentation
from fedqc.statistics.releases import RELEASES
from fedqc.task import load_task
from tests.federation.conftest import TinyMethod
from tests.federation.runs import Sites, run, statistics

pytestmark = pytest.mark.usefixtures("tiny_method", "no_report")
UNTIL_SCORED = ("summarise", "train.qc", "calibrate", "score")
TARGET, CONFORMAL = 'rule = "target"\nlevel = 0.9', 'rule = "conformal"\nalpha = 0.5'


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Sites:
    return {name: make_site(name) for name in ("a", "b")}


def decisions(site: Path) -> dict[str, Outcome]:
    return {entry.id: entry.decision for entry in manifest_of(site).entries}


def manifest_of(site: Path) -> Manifest:
    return read_manifest(load_site(site).results / "manifest.json")


@pytest.mark.parametrize("curation", [TARGET, CONFORMAL])
def test_a_rule_rests_on_what_all_sites_counted(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, curation: str
) -> None:
    run(LocalGrid(sites), make_federation(sites, curation=curation), tmp_path / "run", only=UNTIL_SCORED)
    told = statistics(tmp_path / "run")
    for of_site in told["sites"].values():
        assert of_site["calibrate"]["regions_mae.ball"] == of_site["calibrate"]["mae"]  # there is one region
        assert of_site["score"]["gatherings"] == 0
    for table in ("failures", "others"):
        of_sites = [told["sites"][site]["calibrate"][table] for site in sites]
        assert all(
            len(counts) == BINS and sum(counts) == pytest.approx(PATIENT, abs=10) for counts in of_sites
        )
        assert told["calibration"][table] == [sum(column) for column in zip(*of_sites, strict=True)]
    for site in sites.values():
        rule = manifest_of(site).rule
        assert rule.calibration is not None
        assert list(rule.calibration.failures) == told["calibration"]["failures"]
        found = decisions(site)
        assert found.pop("bad-7") is Outcome.DROP
        assert set(found.values()) == {Outcome.KEEP}
        assert told["sites"]["a"]["score"]["curated"] == 1


def test_what_is_wrong_is_written_down_and_told_in_counts(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=UNTIL_SCORED)
    entries = {entry.id: entry for entry in manifest_of(sites["a"]).entries}
    bad = entries.pop("bad-7")
    wrong = bad.diagnosis
    assert wrong is not None
    assert wrong.kind is Kind.SHIFT
    assert wrong.repair is not None
    assert wrong.repair.how == "move it by 5.0 mm to the right, 5.0 mm to the back, 5.0 mm to the bottom"
    assert wrong.repair.quality >= bad.quality + MENDED
    assert all(entry.diagnosis is None for entry in entries.values())
    told = statistics(tmp_path / "run")["sites"]["a"]["score"]
    assert [key for key in told if key.startswith("diagnosis")] == ["diagnosis.shift"]
    assert told["diagnosis.shift"] == 1


def test_the_self_test_keeps_no_maps(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large volume they would not fit into memory together."""
    score, alive, most = TinyMethod.score, list[weakref.ref[Any]](), 0

    def with_maps_of_their_own(self: TinyMethod, *args: Any) -> Any:
        nonlocal most
        for one in score(self, *args):
            error_map = np.array(one.error_map)
            alive.append(weakref.ref(error_map))
            most = max(most, sum(map_of() is not None for map_of in alive))
            yield replace(one, error_map=error_map)
            del one, error_map

    monkeypatch.setattr(TinyMethod, "score", with_maps_of_their_own)
    run(
        LocalGrid(sites),
        make_federation(sites),
        tmp_path / "run",
        only=("summarise", "train.qc", "calibrate"),
    )
    assert len(alive) > 10
    assert most <= 2


def test_a_diagnosis_that_fails_costs_no_scores(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks, "diagnose_cases", Mock(side_effect=MemoryError("too large")))
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=UNTIL_SCORED)
    assert decisions(sites["a"])["bad-7"] is Outcome.DROP
    assert {entry.diagnosis for entry in manifest_of(sites["a"]).entries} == {None}
    told = statistics(tmp_path / "run")["sites"]["a"]["score"]
    assert not [key for key in told if key.startswith("diagnosis")]


def test_a_method_that_does_not_tell_what_is_right_scores_once(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = TinyMethod.score

    def without_maps(self: TinyMethod, *args: Any) -> Any:
        return (replace(one, error_map=None) for one in score(self, *args))

    monkeypatch.setattr(TinyMethod, "score", without_maps)
    diagnosing = Mock()
    monkeypatch.setattr(tasks, "diagnose_cases", diagnosing)
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=UNTIL_SCORED)
    assert decisions(sites["a"])["bad-7"] is Outcome.DROP
    diagnosing.assert_not_called()


def test_each_site_may_rest_on_its_own_labels(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites, curation=f"{TARGET}\npooled = false")
    run(LocalGrid(sites), federation, tmp_path / "run", only=UNTIL_SCORED)
    rules = [manifest_of(site).rule.calibration for site in sites.values()]
    # one patient of each is held back
    assert all(rule is not None and rule.n_failing == pytest.approx(1, abs=0.01) for rule in rules)
    assert rules[0] != rules[1]


def test_what_too_few_patients_stand_behind_is_not_told_and_the_own_labels_decide(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites, curation=TARGET, min_count=2)
    run(LocalGrid(sites), federation, tmp_path / "run", only=UNTIL_SCORED)
    told = statistics(tmp_path / "run")
    assert "failures" not in told["sites"]["a"]["calibrate"]
    assert not any(told["calibration"]["failures"])
    assert manifest_of(sites["a"]).rule.calibration is not None
    assert decisions(sites["a"])["bad-7"] is Outcome.DROP


def test_without_ground_nothing_is_dropped(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites, curation='rule = "conformal"\nalpha = 0.01')
    run(LocalGrid(sites), federation, tmp_path / "run", only=UNTIL_SCORED)
    manifest = manifest_of(sites["a"])
    assert set(decisions(sites["a"]).values()) == {Outcome.KEEP}
    assert "at alpha 0.01 it takes 99" in str(manifest.rule.suspended)
    assert manifest.entries[0].reason == f"not curated: {manifest.rule.suspended}"
    assert statistics(tmp_path / "run")["sites"]["a"]["score"]["curated"] == 0


@pytest.fixture
def blind_at_b(monkeypatch: pytest.MonkeyPatch) -> None:
    """At site b the model sees the opposite of what is there, in the labels of known quality."""
    score = TinyMethod.score

    def inverted(self: TinyMethod, network: Any, cases: Any, *args: Any) -> Any:
        for one in score(self, network, cases, *args):
            is_known = one.case_id.startswith("ref") and where["site"] == "b"
            yield replace(one, quality=1 - one.quality) if is_known else one

    where = {"site": ""}
    self_test = tasks._self_test

    def noted(site: SiteConfig, *args: Any) -> Any:
        where["site"] = site.name
        return self_test(site, *args)

    monkeypatch.setattr(TinyMethod, "score", inverted)
    monkeypatch.setattr(tasks, "_self_test", noted)


@pytest.mark.usefixtures("blind_at_b")
@pytest.mark.parametrize("phases", [UNTIL_SCORED, ("summarise", "train.qc", "score")])
def test_a_site_where_the_model_fails_its_self_test_keeps_all(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, phases: tuple[str, ...]
) -> None:
    """Whether it was asked to calibrate or not."""
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=phases)
    assert decisions(sites["a"])["bad-7"] is Outcome.DROP
    assert set(decisions(sites["b"]).values()) == {Outcome.KEEP}
    assert "labels of known quality it errs by" in str(manifest_of(sites["b"]).rule.suspended)
    told = statistics(tmp_path / "run")["sites"]
    assert (told["a"]["score"]["curated"], told["b"]["score"]["curated"]) == (1, 0)


@pytest.mark.usefixtures("blind_at_b")
def test_references_that_are_not_trusted_test_nothing(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc_server.run.Run.suspected", property(lambda self: frozenset({"b"})))
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=UNTIL_SCORED)
    assert decisions(sites["b"])["bad-7"] is Outcome.DROP
    assert not (load_site(sites["b"]).results / SELF_TEST).exists()
    assert "score" in statistics(tmp_path / "run")["sites"]["b"]


def test_what_is_told_is_remembered_of_those_who_are_counted(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    """Few who came must not hide among patients of whom nothing is told."""
    site = make_site("a", references=6, good=3, spoiled=2)
    run(LocalGrid({"a": site}), make_federation(["a"]), tmp_path / "run", only=UNTIL_SCORED)
    remembered = json.loads((load_site(site).results / RELEASES).read_text())["phases"]
    told = {phase: len(releases[-1]["about"]) for phase, releases in remembered.items()}
    assert told == {"query.summarise": 11, "query.calibrate": 2, "query.score": 5}


def test_stars_need_a_method_that_gives_some(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"stars, which qc\.method 'tiny' does not give"):
        run(LocalGrid(sites), make_federation(sites, curation='rule = "stars"'), tmp_path / "run")
    assert not (tmp_path / "run" / "run.json").exists()


def test_weights_decide_how_often_a_case_is_drawn(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, list[float]]] = []
    train_round = Segmentation.train_round

    def noted(self: Segmentation, network: Any, cases: Any, *args: Any, weights: Any, **options: Any) -> Any:
        seen.append((len(cases), weights))
        return train_round(self, network, cases, *args, weights=weights, **options)

    monkeypatch.setattr(Segmentation, "train_round", noted)
    run(
        LocalGrid(sites),
        make_federation(sites, curation='rule = "weights"\nthreshold = 0.5'),
        tmp_path / "run",
    )
    kept = [entry for entry in manifest_of(sites["a"]).entries if entry.decision is Outcome.KEEP]
    assert [entry.weight for entry in kept] == pytest.approx([2 * entry.quality - 1 for entry in kept])
    assert seen[0] == (3, [entry.weight for entry in kept])


def test_what_a_person_kept_is_learned_from_and_never_calibrated_on(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = make_federation(sites)
    run(LocalGrid(sites), federation, tmp_path / "first", only=UNTIL_SCORED)
    results, task = load_site(sites["a"]).results, load_task(load_site(sites["a"]).task)
    for case in ("bad-7", "good-4", "good-5"):
        overrule(results, task, case, "drop" if case == "good-4" else "keep", by="Dr. Doe", reason="seen")
    label = sites["a"].parent / "data" / "good-5-label.nii.gz"
    label.write_bytes(label.read_bytes() + b"\0")  # another file than the one that was looked at
    learned: dict[str, set[str]] = {}
    train_round = TinyMethod.train_round

    def noted(self: TinyMethod, network: Any, cases: Any, plan: Any, *args: Any, **options: Any) -> Any:
        learned[plan.site] = {case.id for case in cases}
        return train_round(self, network, cases, plan, *args, **options)

    monkeypatch.setattr(TinyMethod, "train_round", noted)
    run(LocalGrid(sites), federation, tmp_path / "second", only=UNTIL_SCORED)
    assert {case for case in learned["a"] if not case.startswith("ref")} == {"bad-7"}
    assert {case for case in learned["b"] if not case.startswith("ref")} == set()
    told = json.loads((results / SELF_TEST).read_text())
    assert {one["patient"] for one in told["labels"]} < {f"P{index}" for index in range(4)}
    found = {
        entry.id: entry.overruled and entry.overruled.decision for entry in manifest_of(sites["a"]).entries
    }
    assert found == {"bad-7": Outcome.KEEP, "good-4": Outcome.DROP, "good-5": None, "good-6": None}


def test_a_manifest_that_cannot_be_read_is_put_aside(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    results = load_site(sites["a"]).results
    results.mkdir(parents=True, exist_ok=True)
    (results / "manifest.json").write_text("{")
    run(LocalGrid(sites), make_federation(sites), tmp_path / "run", only=UNTIL_SCORED)
    assert next(results.glob("manifest-until-*.json")).read_text() == "{"
    assert decisions(sites["a"])["bad-7"] is Outcome.DROP
    (note,) = json.loads((results / "activity.json").read_text())["notes"]
    assert "of another site or task, or damaged" in note
