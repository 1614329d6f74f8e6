"""Whose references can be trusted: the sites that are named, and what becomes of their references."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fedqc_server.cross_check import STANDARD_ERRORS, Suspicion, halves, suspect, usual_quality
from fedqc_server.run_folder import listening
from flwr.app import Message, MetricRecord
from safetensors.numpy import load_file

from fedqc.config import load_site
from tests.federation.runs import RecordingGrid, Sites, events, run, statistics

# ------------------------------------------------------------------------------------------------- by hand


@pytest.mark.parametrize("n", [4, 5, 6, 11])
def test_halves_are_disjoint_and_complete(n: int) -> None:
    sites = [f"site-{index}" for index in range(n)]
    first, second = halves(sites, seed=3)
    assert sorted([*first, *second]) == sorted(sites)
    assert (len(first), len(second)) == (n // 2, n - n // 2)
    assert (list(first), list(second)) == (sorted(first), sorted(second))


def test_halves_depend_on_names_and_seed_only() -> None:
    sites = [f"site-{index}" for index in range(6)]
    assert halves(sites, seed=3) == halves(sites[::-1], seed=3) == halves(set(sites), seed=3)
    assert len({halves(sites, seed)[0] for seed in range(30)}) > 10


def told(mean: float, sd: float = 0.04, references: int = 16) -> dict[str, Any]:
    return {"references": references, "quality_mean": mean, "quality_sd": sd}


def together(sites: dict[str, dict[str, Any]]) -> dict[str, Suspicion]:
    """Who is named among sites that one model judged."""
    return suspect(sites, [list(sites)])


HEALTHY = {"a": told(0.92), "b": told(0.95), "c": told(0.9)}


def test_a_clear_outlier_is_named() -> None:
    found = together(HEALTHY | {"d": told(0.6)})
    assert found == {"d": Suspicion(quality=0.6, others=0.92, references=16)}


def test_a_healthy_spread_is_not() -> None:
    assert together(HEALTHY | {"d": told(0.88)}) == {}
    # A large gap among few or scattered references may be chance.
    assert together(HEALTHY | {"d": told(0.8, sd=0.2, references=4)}) == {}


def test_a_site_that_is_better_is_not_named() -> None:
    low = {name: told(0.5) for name in "abc"}
    assert together(low | {"d": told(0.95)}) == {}


def test_a_small_gap_is_not_named_however_sure() -> None:
    sure = {name: told(0.95, sd=0.001, references=1000) for name in "abc"}
    assert together(sure | {"d": told(0.851, sd=0.001, references=1000)}) == {}
    assert set(together(sure | {"d": told(0.849, sd=0.001, references=1000)})) == {"d"}


def test_how_sure_it_must_be() -> None:
    # Standard error of the difference: sqrt(0.09**2 / 16 + 0.12**2 / 16) = 0.15 / 4; four of them are 0.15.
    assert STANDARD_ERRORS == 4.0
    others = {name: told(0.9, sd=0.12) for name in "abc"}
    assert together(others | {"d": told(0.751, sd=0.09)}) == {}
    assert set(together(others | {"d": told(0.749, sd=0.09)})) == {"d"}


def test_without_spread_the_gap_alone_counts() -> None:
    exact = {name: told(0.9, sd=0.0) for name in "abc"}
    assert set(together(exact | {"d": told(0.79, sd=0.0)})) == {"d"}
    assert together(exact | {"d": told(0.9, sd=0.0)}) == {}


def test_two_of_seven_are_named() -> None:
    sites = {name: told(0.9) for name in "abcde"} | {"f": told(0.5), "g": told(0.6)}
    assert set(together(sites)) == {"f", "g"}


def test_of_two_the_lower_one_is_named() -> None:
    assert set(together({"a": told(0.95), "b": told(0.7)})) == {"b"}
    assert together({"a": told(0.95)}) == {}
    assert together({}) == {}


def test_models_differ_by_more_than_sites_do() -> None:
    # What the check measured on hippocampus with a habit at "b": one model is kinder than the other.
    sites = {
        "a": told(0.945, 0.029),
        "b": told(0.779, 0.088),
        "c": told(0.864, 0.041),
        "d": told(0.847, 0.034),
    }
    assert set(suspect(sites, [["a", "b"], ["c", "d"]])) == {"b"}
    # Without a habit nobody is named for the judge that he met.
    healthy = sites | {"b": told(0.95, 0.02)}
    assert suspect(healthy, [["a", "b"], ["c", "d"]]) == {}


@pytest.mark.parametrize("missing", ["references", "quality_mean", "quality_sd"])
def test_who_tells_too_little_is_not_judged_and_judges_nobody(missing: str) -> None:
    part = {key: value for key, value in told(0.3).items() if key != missing}
    assert together(HEALTHY | {"d": part}) == {}
    assert together({"a": told(0.92), "d": part}) == {}
    assert set(together(HEALTHY | {"d": told(0.3), "e": part})) == {"d"}


@pytest.mark.parametrize(
    "nonsense",
    [
        told(0.3, references=0),
        told(0.3, references=-4),
        told(0.3, sd=-0.1),
        told(0.3, sd=1e300),
        told(-3.0),
        told(1e300),
    ],
)
def test_what_cannot_be_is_not_judged(nonsense: dict[str, Any]) -> None:
    assert together(HEALTHY | {"d": nonsense}) == {}
    assert set(together(HEALTHY | {"d": nonsense, "e": told(0.3)})) == {"e"}


def test_what_is_usual() -> None:
    assert usual_quality({"a": told(0.9), "b": told(0.2), "c": told(0.8), "d": told(1e300)}) == 0.8
    assert usual_quality({"a": {"references": 3}}) is None


# ---------------------------------------------------------------------------------------------- in a run

runs = pytest.mark.usefixtures("tiny_method", "no_report")


@pytest.fixture
def make_sites(make_site: Callable[..., Path]) -> Callable[..., Sites]:
    def make(names: str, spoiled: str = "", **options: Any) -> Sites:
        return {name: make_site(name, habit=name in spoiled, **options) for name in names}

    return make


@runs
def test_a_site_with_a_habit_is_named_and_its_references_are_used_for_nothing(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcd", spoiled="c"), tmp_path / "run"
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites, references=True), out)
    found = statistics(out)
    assert list(found["suspected"]) == ["c"]
    suspicion = found["suspected"]["c"]
    told = {site: values["cross-check"] for site, values in found["sites"].items()}
    assert suspicion["quality"] == told["c"]["quality_mean"] < 0.5
    assert suspicion["others"] == told["a"]["quality_mean"] > 0.9
    assert suspicion["references"] == 4
    (event,) = events(out, "site-suspected")
    assert (event["site"], event["phase"]) == ("c", "cross-check")
    assert (event["quality"], event["others"]) == (suspicion["quality"], suspicion["others"])
    # It trains for the check, where nobody knew, and never after it.
    stages = [e["stage"] for e in events(out, "update-received") if e["site"] == "c"]
    assert stages in (["check-1"], ["check-2"])
    assert grid.kinds("c").count("train.qc") == 1
    assert grid.kinds("a").count("train.qc") == 1 + 2
    assert "query.calibrate" not in grid.kinds("c")
    assert "calibrate" not in found["sites"]["c"]
    assert [set(entry["sites"]) for entry in found["train"]["qc"]] == [{"a", "b", "d"}] * 2
    # Segmentation may train on references; not on these.
    assert "train.segmentation" not in grid.kinds("c")
    # Its candidates are judged all the same, and both models are its own too.
    assert found["sites"]["c"]["score"]["decisions.keep"] == 3
    assert {path.name for path in (load_site(sites["c"]).results / "models").iterdir()} == {
        "qc",
        "segmentation",
    }
    # What the model comes to on references that are wrong says nothing of it.
    assert {site for site, values in found["sites"].items() if "evaluate.segmentation" in values} == set(
        "abd"
    )


@runs
def test_what_a_suspected_site_kept_takes_part_in_segmentation(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcd", spoiled="c"), tmp_path / "run"
    run(RecordingGrid(sites), make_federation(sites), out)
    assert set(statistics(out)["train"]["segmentation"][0]["sites"]) == {"a", "b", "c", "d"}


@runs
def test_models_that_find_fault_with_most_sites_judge_nobody(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcd", spoiled="abc"), tmp_path / "run"
    run(RecordingGrid(sites), make_federation(sites), out)
    assert "suspected" not in statistics(out)
    (event,) = events(out, "phase-skipped")
    assert event["phase"] == "cross-check"
    assert "trained too little to judge" in event["reason"]


@runs
def test_healthy_sites_are_not_named(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcde"), tmp_path / "run"
    run(RecordingGrid(sites), make_federation(sites), out, only=("summarise", "cross-check"))
    assert statistics(out)["suspected"] == {}
    assert events(out, "site-suspected", "phase-skipped") == []
    assert {site for site, told in statistics(out)["sites"].items() if "cross-check" in told} == set("abcde")


@runs
@pytest.mark.parametrize(
    ("names", "rounds", "reason"),
    [("abc", 1, "3 sites told of references; it takes 4"), ("abcd", 0, "switched off")],
    ids=["three sites", "switched off"],
)
def test_a_check_that_cannot_be_is_skipped(
    request: pytest.FixtureRequest, tmp_path: Path, names: str, rounds: int, reason: str
) -> None:
    sites, out = request.getfixturevalue("make_sites")(names, spoiled="c"), tmp_path / "run"
    federation = request.getfixturevalue("make_federation")(sites, rounds=1, cross_check_rounds=rounds)
    grid = RecordingGrid(sites)
    run(grid, federation, out, only=("summarise", "cross-check", "train.qc"))
    (event,) = events(out, "phase-skipped")
    assert (event["phase"], event["reason"]) == ("cross-check", reason)
    assert "suspected" not in statistics(out)
    assert "query.cross_check" not in grid.kinds("a")
    assert grid.kinds("c").count("train.qc") == 1


@runs
def test_sites_without_references_do_not_end_the_check(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    """Dealt in, three of them would be a half that cannot train."""
    sites = {name: make_site(name) for name in "abcd"}
    sites |= {name: make_site(name, references=0) for name in ("e", "f", "g", "h")}
    grid, out = RecordingGrid(sites), tmp_path / "run"
    run(grid, make_federation(sites), out, only=("summarise", "cross-check"))
    assert statistics(out)["suspected"] == {}
    assert {site for site, message in grid.asked if message.metadata.message_type == "train.qc"} == set(
        "abcd"
    )


@runs
def test_a_site_below_min_count_tells_nothing_and_is_not_judged(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {name: make_site(name) for name in "abcd"} | {"e": make_site("e", min_count=5, habit=True)}
    grid, out = RecordingGrid(sites), tmp_path / "run"
    run(grid, make_federation(sites), out, only=("summarise", "cross-check"))
    assert "references" not in statistics(out)["sites"]["e"]["summarise"]
    assert "cross-check" not in statistics(out)["sites"]["e"]
    assert statistics(out)["suspected"] == {}


def trained_where(out: Path) -> dict[str, set[str]]:
    """The sites whose updates went into each half's model."""
    trained: dict[str, set[str]] = {}
    for event in events(out, "update-received"):
        trained.setdefault(event["stage"], set()).add(event["site"])
    return trained


def judges(grid: RecordingGrid, out: Path) -> dict[str, str]:
    """The stage whose model judged each site, told by its weights."""
    stages = {}
    for stage in ("check-1", "check-2"):
        weights = load_file(out / "checkpoints" / f"{stage}.safetensors")
        stages[weights["0.weight"].tobytes()] = stage
    return {
        site: stages[message.content.array_records["weights"]["0.weight"].numpy().tobytes()]
        for site, message in grid.asked
        if message.metadata.message_type == "query.cross_check"
    }


@runs
@pytest.mark.parametrize("seed", [0, 1])
def test_nobody_is_judged_by_a_model_that_saw_its_references(
    seed: int, make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcde", references=2), tmp_path / "run"
    grid = RecordingGrid(sites)
    federation = make_federation(sites, cross_check_rounds=2)
    run(grid, federation, out, seed=seed, only=("summarise", "cross-check"))
    trained, judged = trained_where(out), judges(grid, out)
    assert trained["check-1"] | trained["check-2"] == set(sites) == set(judged)
    for site, stage in judged.items():
        assert site not in trained[stage], (site, stage)


@runs
def test_nor_when_the_run_goes_on_without_a_site(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    """The halves stay as they were dealt: the first half's model is trained already."""
    sites, out = make_sites("abcde", references=2), tmp_path / "run"
    federation, only = make_federation(sites), ("summarise", "cross-check")
    first, second = halves("abcde", seed=0)

    def interrupt(event: dict[str, Any]) -> None:
        if event["event"] == "round-started" and event["stage"] == "check-2":
            raise KeyboardInterrupt

    with listening(interrupt), pytest.raises(KeyboardInterrupt):
        run(RecordingGrid(sites), federation, out, only=only)
    assert statistics(out)["train"].keys() == {"check-1"}
    left = {name: path for name, path in sites.items() if name != first[0]}
    grid = RecordingGrid(left)
    run(grid, federation, out, resume=True, only=only)
    trained, judged = trained_where(out), judges(grid, out)
    assert trained == {"check-1": set(first), "check-2": set(second)}
    assert set(judged) == set(left)
    for site, stage in judged.items():
        assert site not in trained[stage], (site, stage)


@runs
def test_a_half_that_cannot_train_ends_the_check_and_not_the_run(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = make_sites("abcd", spoiled="c", references=2), tmp_path / "run"
    _, second = halves("abcd", seed=0)

    def fail(site: str, reply: Message) -> None:
        started = events(out, "round-started")
        if reply.metadata.message_type == "train.qc" and started[-1]["stage"] == "check-2":
            reply.content["more"] = MetricRecord({"n": 1})

    grid = RecordingGrid(sites, fail)
    run(grid, make_federation(sites), out, only=("summarise", "cross-check", "train.qc"))
    (event,) = events(out, "phase-skipped")
    assert event["phase"] == "cross-check"
    assert event["reason"].startswith("check-2, round 1 of 1: 0 sites answered, at least 1 are needed")
    assert {e["site"] for e in events(out, "site-failed")} == set(second)
    assert "suspected" not in statistics(out)
    assert "query.cross_check" not in grid.kinds("a")
    assert set(statistics(out)["train"]["qc"][0]["sites"]) == set(sites)


@runs
def test_numbers_that_cannot_be_cost_that_site_only(
    make_sites: Callable[..., Sites], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    def lie(site: str, reply: Message) -> None:
        if reply.metadata.message_type == "query.cross_check":
            if site == "a":
                reply.content.metric_records["statistics"]["quality_sd"] = 1e14
            if site == "b":
                reply.content.metric_records["statistics"]["quality_mean"] = [0.5, 0.5]
            if site == "c":  # a column of everybody's report, if it were taken
                reply.content.metric_records["statistics"]["dice.invented"] = 0.5

    sites, out = make_sites("abcdef", spoiled="f", references=2), tmp_path / "run"
    run(RecordingGrid(sites, lie), make_federation(sites), out, only=("summarise", "cross-check"))
    assert list(statistics(out)["suspected"]) == ["f"]
    failed = sorted((e["site"], e["reason"]) for e in events(out, "site-failed"))
    assert failed == [("b", "bad-reply"), ("c", "bad-reply")]
    assert json.loads((out / "run.json").read_text())["outcome"] == "completed"
