import json
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.arms import (
    ARMS,
    Arm,
    ArmScore,
    arm_figures,
    build_arm,
    count_kept,
    read_arm_scores,
    taking_part,
)

from fedqc.config import (
    ComputeConfig,
    CurationConfig,
    FederationConfig,
    SegmentationConfig,
    SitesConfig,
    load_federation,
    load_site,
)
from fedqc.curation.manifest import (
    Entry,
    InputFile,
    Manifest,
    UsedModel,
    UsedRule,
    read_manifest,
    write_manifest,
)
from fedqc.curation.rules import Outcome
from fedqc.task import Task

COUNTS: dict[Arm, int] = {"everything": 10, "curated": 7, "weighted": 8, "random": 7, "oracle": 6}


def scores(dice: dict[Arm, list[float]], patients: list[str] | None = None) -> list[ArmScore]:
    """One score a case and arm; every case is a patient of its own unless said otherwise."""
    return [
        ArmScore(arm, patients[index] if patients else f"p{index}", f"c{index}", {"core": value}, value)
        for arm, values in dice.items()
        for index, value in enumerate(values)
    ]


def test_figures_by_hand() -> None:
    one = scores(
        {
            "everything": [0.5, 0.6, 0.7],
            "curated": [0.6, 0.7, 0.8],
            "weighted": [0.6, 0.6, 0.75],
            "random": [0.4, 0.5, 0.6],
            "oracle": [0.7, 0.8, 0.9],
        }
    )
    figures = arm_figures([one], COUNTS, seed=0)
    assert [round(figures[arm]["dice_mean"], 9) for arm in ARMS] == [0.6, 0.7, 0.65, 0.5, 0.8]
    assert [figures[arm]["n_train"] for arm in ARMS] == [10, 7, 8, 7, 6]
    assert figures["curated"]["regions"] == {"core": pytest.approx(0.7)}
    # Every patient gains the same, so whoever is drawn half of the gap is closed.
    assert figures["gap_closed"]["value"] == pytest.approx(0.5)
    assert figures["gap_closed"]["ci"] == pytest.approx([0.5, 0.5])
    low, high = figures["everything"]["dice_ci"]
    assert 0.5 <= low < 0.6 < high <= 0.7
    json.dumps(figures, allow_nan=False)


def test_intervals_are_those_of_paired_resampling() -> None:
    rng = np.random.default_rng(3)
    base = rng.uniform(0.5, 0.9, 40)
    dice: dict[Arm, list[float]] = {
        "everything": base.tolist(),
        "curated": (base + rng.normal(0.04, 0.02, 40)).tolist(),
        "weighted": (base + 0.03).tolist(),
        "random": (base - 0.02).tolist(),
        "oracle": (base + rng.normal(0.05, 0.02, 40)).tolist(),
    }
    figures = arm_figures([scores(dice)], COUNTS, seed=0)
    table = np.array([dice[arm] for arm in ARMS])
    again = np.random.default_rng(9)
    means = np.array([table[:, again.integers(0, 40, 40)].mean(axis=1) for _ in range(4000)])
    share = (means[:, 1] - means[:, 0]) / (means[:, 4] - means[:, 0])
    assert figures["gap_closed"]["ci"] == pytest.approx(np.quantile(share, (0.025, 0.975)), abs=0.03)
    assert figures["oracle"]["dice_ci"] == pytest.approx(np.quantile(means[:, 4], (0.025, 0.975)), abs=0.01)


def test_cases_of_one_patient_are_drawn_together() -> None:
    alike: dict[Arm, list[float]] = {arm: [0.2, 0.2, 0.2, 0.8, 0.8, 0.8] for arm in ARMS}
    apart = arm_figures([scores(alike)], COUNTS, seed=0)["everything"]["dice_ci"]
    together = arm_figures([scores(alike, ["p", "p", "p", "q", "q", "q"])], COUNTS, seed=0)
    low, high = together["everything"]["dice_ci"]
    assert (low, high) == (pytest.approx(0.2), pytest.approx(0.8))
    assert high - low > apart[1] - apart[0]
    # The same patient in two simulations is still one patient.
    twice = arm_figures([scores(alike, ["p"] * 6), scores(alike, ["p"] * 6)], COUNTS, seed=0)
    assert twice["everything"]["dice_ci"] == pytest.approx([0.5, 0.5])


def test_what_cannot_be_said_is_none() -> None:
    same: dict[Arm, list[float]] = {arm: [0.5, 0.6] for arm in ARMS}
    assert arm_figures([scores(same)], COUNTS, seed=0)["gap_closed"] == {"value": None, "ci": None}
    # Some resamplings have no gap: there is a value and no interval.
    shaky = same | {"oracle": [0.9, 0.5], "curated": [0.7, 0.6]}
    figures = arm_figures([scores(shaky)], COUNTS, seed=0)
    assert figures["gap_closed"]["value"] == pytest.approx(0.1 / 0.15)
    assert figures["gap_closed"]["ci"] is None
    without: dict[Arm, list[float]] = {arm: values for arm, values in shaky.items() if arm != "curated"}
    figures = arm_figures([scores(without)], COUNTS, seed=0)
    assert figures["curated"] == {"dice_mean": None, "dice_ci": None, "n_train": 7, "regions": {}}
    assert figures["gap_closed"] == {"value": None, "ci": None}
    json.dumps(figures, allow_nan=False)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Two curated sites: of ten candidates each four are spoiled, and three were dropped."""
    rows = ["site,id,patient,kind,dsc"]
    for site in ("a", "b"):
        entries = []
        for index in range(10):
            outcome = (Outcome.DROP, Outcome.REVIEW, Outcome.DROP)[index] if index < 3 else Outcome.KEEP
            entries.append(
                Entry(
                    id=f"case-{index}",
                    patient=f"p{index}",
                    quality=0.8 if outcome is Outcome.KEEP else 0.5 + 0.2 * index,
                    regions={},
                    decision=outcome,
                    reason="-",
                    files={"T1": InputFile(path="x.nii.gz", sha256="0" * 64)},
                )
            )
            rows.append(f"{site},case-{index},p{index},{'shift' if index < 4 else 'untouched'},0.5")
        (tmp_path / "sites" / site).mkdir(parents=True)
        manifest = Manifest(
            site=site,
            federation="f",
            task="blobs",
            created="2026-01-01T00:00:00+00:00",
            model=UsedModel(method="qcresunet", sha256="0" * 64, fedqc="0.1.0"),
            rule=UsedRule(config=CurationConfig()),
            entries=tuple(entries),
        )
        write_manifest(tmp_path / "sites" / site / "manifest.json", manifest)
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "candidates.csv").write_text("\n".join(rows) + "\n")
    (tmp_path / "statistics.json").write_text("{}")
    return tmp_path


CONFIG = FederationConfig(task="msd-hippocampus", sites=SitesConfig(expected=("a", "b", "gone"), minimum=3))


def kept(file: Path) -> set[int]:
    entries = read_manifest(file.parent / "manifest.json").entries
    return {int(one.id.removeprefix("case-")) for one in entries if one.decision is Outcome.KEEP}


def test_what_each_arm_keeps(out: Path) -> None:
    made = {arm: build_arm(out, arm, CONFIG, ComputeConfig(), seed=0)[1] for arm in ARMS if arm != "curated"}
    for site in ("a", "b"):
        assert kept(made["everything"][site]) == set(range(10))
        assert kept(made["oracle"][site]) == set(range(4, 10))
        assert len(kept(made["random"][site])) == 7  # as many dropped as by the curation
    assert kept(made["random"]["a"]) != kept(made["random"]["b"])
    assert {arm: count_kept(out, arm, ["a", "b", "gone"]) for arm in ARMS} == {
        "everything": 20,
        "curated": 14,
        "weighted": 16,  # that in between was left to a person
        "random": 14,
        "oracle": 12,
    }
    weights = [one.weight for one in read_manifest(made["weighted"]["a"].parent / "manifest.json").entries]
    assert weights[2:] == pytest.approx([0.6, *[0.2] * 7])
    assert kept(made["weighted"]["a"]) == set(range(2, 10))
    first = kept(made["random"]["a"])
    drawn = [kept(build_arm(out, "random", CONFIG, ComputeConfig(), seed=seed)[1]["a"]) for seed in range(8)]
    assert drawn[0] == first
    assert len({frozenset(one) for one in drawn}) > 1
    assert any(not one >= {0, 1, 2} for one in drawn)  # not those that the curation dropped


def test_the_sites_of_an_arm_share_the_data_of_the_run(out: Path) -> None:
    federation, sites = build_arm(out, "oracle", CONFIG, ComputeConfig(device="cpu"), seed=0)
    assert sorted(sites) == ["a", "b"]  # a site that fell out takes no part
    config = load_federation(federation)
    assert config.sites.expected == ("a", "b")
    assert config.sites.minimum == 2
    assert Path(config.task) == out / "task.toml"
    site = load_site(sites["a"])
    assert site.data.path == out / "sites" / "a" / "data"
    assert site.compute.cache == out / "sites" / "a" / "cache"
    assert site.results == out / "arms" / "oracle" / "sites" / "a"
    assert site.compute.device == "cpu"


def test_whoever_trains_nothing_in_the_run_trains_nothing_in_an_arm(out: Path) -> None:
    (out / "statistics.json").write_text(json.dumps({"suspected": {"b": {}}}))
    assert taking_part(out, CONFIG) == ["a", "b"]  # its candidates are trained on, if not its references
    config = CONFIG.model_copy(update={"segmentation": SegmentationConfig(references=True)})
    assert sorted(build_arm(out, "oracle", config, ComputeConfig(), seed=0)[1]) == ["a"]
    assert count_kept(out, "oracle", taking_part(out, config)) == 6


def test_scores_come_back_from_their_file(tmp_path: Path, task: Task) -> None:
    (tmp_path / "truth").mkdir()
    (tmp_path / "truth" / "segmentation_scores.csv").write_text(
        "arm,patient,case,core,rim,whole,dice\noracle,p1,c1,0.5,0.25,1.0,0.6\n"
    )
    assert read_arm_scores(tmp_path, task) == [
        ArmScore("oracle", "p1", "c1", {"core": 0.5, "rim": 0.25, "whole": 1.0}, 0.6)
    ]
