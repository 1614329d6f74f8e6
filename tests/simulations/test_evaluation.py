import csv
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fedqc_simulations.consortium import build_consortium
from fedqc_simulations.evaluation import (
    curation_figures,
    diagnosis_figures,
    judge_test_cases,
    qc_figures,
    read_curated,
    read_judged,
)
from torch import nn

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import ComputeConfig, CurationConfig, QCConfig
from fedqc.curation.diagnosis import Diagnosis, Kind
from fedqc.curation.manifest import (
    Entry,
    InputFile,
    Manifest,
    Overruled,
    UsedModel,
    UsedRule,
    write_manifest,
)
from fedqc.curation.rules import Outcome
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.degradation.samples import ALL_KINDS
from fedqc.methods.base import Known, Method, RoundPlan, RoundResult, Score
from fedqc.metrics.filtering import share_interval
from fedqc.model import ModelCard, StoredModel
from fedqc.task import Task
from fedqc.training import Progress
from fedqc.trial import Tried

FP32 = Compute(torch.device("cpu"), torch.float32)


class Blind(Method):
    """Says 0.25 of everything and marks the voxel at the origin."""

    name = "blind"
    judges = "label"

    def build(self, seed: int) -> nn.Module:
        return nn.Linear(1, 1)

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
        return RoundResult({}, 0)

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        held = []  # scores come only after several cases were read, as those of a batch do
        for number, case in enumerate(cases):
            marked = np.zeros(case.label.shape, dtype=np.float32)
            marked[0, 0, 0] = 0.5
            held.append(Score(case.id, 0.25 + number / 1000, {}, marked))
            if len(held) == 3:
                yield from held
                held = []
        yield from held


@pytest.fixture
def model(task: Task) -> StoredModel:
    config = QCConfig(leave_out=("shift", "left-right-flip"))
    card = ModelCard(
        stage="qc",
        task=task,
        qc=config,
        federation="north",
        seed=0,
        rounds=1,
        samples=1,
        sites=("hospital-1",),
    )
    return StoredModel(card, Blind(task, config), nn.Linear(1, 1), "0" * 64)


# ------------------------------------------------------------------------------------------------ agreement


def test_agreement_by_hand() -> None:
    judged = [
        Tried("a", "untouched", 1.0, 0.9, None),
        Tried("b", "untouched", 1.0, 0.7, None),
        Tried("a", "shift", 0.4, 0.5, 0.6),
        Tried("b", "shift", 0.6, 0.8, 0.9),
        Tried("a", "over-contouring", 0.8, 0.6, 0.2),
        Tried("b", "over-contouring", 0.6, 0.6, 0.4),
    ]
    figures = qc_figures(judged, ["over-contouring"], seed=0)
    assert (figures["all"]["n"], figures["trained"]["n"], figures["unseen"]["n"]) == (6, 4, 2)
    assert figures["all"]["patients"] == 2
    errors = np.array([0.1, 0.3, 0.1, 0.2, 0.2, 0.0])
    assert figures["all"]["mae"] == pytest.approx(errors.mean())
    assert figures["all"]["mae_sd"] == pytest.approx(errors.std(ddof=1))
    assert figures["all"]["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    pairs = np.array([[one.predicted_dsc, one.true_dsc] for one in judged])
    assert figures["all"]["r"] == pytest.approx(np.corrcoef(pairs.T)[0, 1])
    assert figures["trained"]["r"] == pytest.approx(np.corrcoef(pairs[:4].T)[0, 1])
    assert figures["unseen"]["r"] is None  # two samples
    assert figures["all"]["dsc_err_median"] == pytest.approx(0.5)
    assert figures["trained"]["dsc_err_median"] == pytest.approx(0.75)
    assert figures["unseen"]["dsc_err_median"] == pytest.approx(0.3)
    shift = figures["by_kind"]["shift"]
    assert shift == {
        "in_training": True,
        "n": 2,
        "true_dsc": pytest.approx(0.5),
        "predicted_dsc": pytest.approx(0.65),
        "mae": pytest.approx(0.15),
        "auroc_vs_untouched": 0.75,  # of 0.5, 0.8 against 0.9, 0.7 three of four pairs are in order
    }
    assert figures["by_kind"]["over-contouring"]["in_training"] is False
    assert figures["by_kind"]["over-contouring"]["auroc_vs_untouched"] == 1.0
    assert figures["by_kind"]["untouched"]["auroc_vs_untouched"] is None
    assert list(figures["by_kind"]) == ["untouched", "over-contouring", "shift"]
    assert figures == qc_figures(judged, ["over-contouring"], seed=0)
    json.dumps(figures, allow_nan=False)


def test_nothing_unseen_and_no_error_map() -> None:
    judged = [Tried(f"p{n}", "shift", n / 10, n / 20, None) for n in range(5)]
    figures = qc_figures(judged, [], seed=0)
    assert figures["trained"]["mae"] == figures["all"]["mae"] == pytest.approx(0.1)
    assert figures["all"]["r"] == pytest.approx(1)
    assert figures["all"]["dsc_err_median"] is None
    assert (figures["unseen"]["n"], figures["unseen"]["r"], figures["unseen"]["r_ci"]) == (0, None, None)
    assert figures["by_kind"]["shift"]["auroc_vs_untouched"] is None
    json.dumps(figures, allow_nan=False)


# ----------------------------------------------------------------------------------------------- test cases


@pytest.fixture
def consortium(tmp_path: Path, make_cases: Callable[..., list[CaseFiles]], task: Task) -> Path:
    """Twelve patients at one site: two of them, at most three cases, are for the test."""
    out = tmp_path / "run"
    build_consortium(
        make_cases(12),
        task,
        out,
        names=("hospital-1",),
        seed=0,
        noise="mixed",
        min_count=1,
        compute=ComputeConfig(),
        progress=lambda *_: None,
    )
    return out


def manifest(site: str, entries: Sequence[Entry]) -> Manifest:
    return Manifest(
        site=site,
        federation="north",
        task="blobs",
        created="2025-01-02T03:04:05+00:00",
        model=UsedModel(method="blind", sha256="0" * 64, fedqc="0.1.0"),
        rule=UsedRule(config=CurationConfig(review=0.1)),
        entries=tuple(entries),
    )


def entry(case: str, quality: float, decision: Outcome) -> Entry:
    label = InputFile(path=f"labels/{case}.nii.gz", sha256="1" * 64)
    return Entry(
        id=case,
        patient=case,
        quality=quality,
        regions={},
        decision=decision,
        reason="of a test",
        files={"label": label},
    )


def test_every_test_case_is_judged_with_every_kind(consortium: Path, model: StoredModel) -> None:
    told: list[tuple[str, int, int]] = []
    judged = judge_test_cases(
        consortium, model, seed=0, compute=FP32, progress=lambda *event: told.append(event)
    )
    patients = {one.patient for one in judged}
    n_cases = len(judged) // len(ALL_KINDS)
    assert len(patients) == 2
    for kind in ALL_KINDS:
        assert sum(one.kind == kind for one in judged) == n_cases >= 2
    # In the order of the cases, each quality beside the label that it was said of.
    assert [one.predicted_dsc for one in judged] == pytest.approx(
        [0.25 + n / 1000 for n in range(len(judged))]
    )
    assert [one.kind for one in judged] == list(ALL_KINDS) * n_cases
    for one in judged:
        if one.kind == "untouched":
            assert (one.true_dsc, one.error_dsc) == (1.0, None)
    wrong = [one for one in judged if one.kind in ANNOTATOR_KINDS and one.true_dsc < 1]
    assert len(wrong) >= len(judged) // 2
    assert all(one.error_dsc is not None and 0 <= one.error_dsc < 0.5 for one in wrong)
    assert told[-1] == ("scoring the test cases", len(judged), len(judged))
    assert judged == judge_test_cases(consortium, model, seed=0, compute=FP32, progress=lambda *_: None)
    assert judged != judge_test_cases(consortium, model, seed=1, compute=FP32, progress=lambda *_: None)


def test_what_was_judged_is_written_and_read_again(consortium: Path, model: StoredModel) -> None:
    judged = judge_test_cases(consortium, model, seed=0, compute=FP32, progress=lambda *_: None)
    assert read_judged(consortium) == judged
    assert {one.error_dsc for one in judged if one.kind == "untouched"} == {None}
    figures = qc_figures(judged, ["shift", "left-right-flip"], seed=0)
    with (consortium / "truth" / "test_scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == figures["all"]["n"]
    unseen = [row for row in rows if row["kind"] in {"shift", "left-right-flip"}]
    assert len(unseen) == figures["unseen"]["n"]
    errors = [abs(float(row["true_dsc"]) - float(row["predicted_dsc"])) for row in rows]
    assert figures["all"]["mae"] == pytest.approx(np.mean(errors))
    json.dumps(figures, allow_nan=False)


def test_nothing_curated_is_no_error(tmp_path: Path) -> None:
    figures = curation_figures([], 0.75)
    assert figures["all"]["n_candidates"] == 0
    json.dumps(figures, allow_nan=False)


# ------------------------------------------------------------------------------------------------- curation


def test_curation_by_hand(tmp_path: Path) -> None:
    truth = tmp_path / "truth" / "candidates.csv"
    truth.parent.mkdir()
    truth.write_text(
        "site,id,patient,kind,dsc\n"
        "a,one,p1,untouched,1.0\na,two,p2,shift,0.4\na,three,p3,over-contouring,0.8\na,four,p4,stale-label,0.2\n"
        "b,one,p5,untouched,1.0\nb,two,p6,shift,0.5\n"
        "c,one,p7,shift,0.1\n"
    )
    keep, drop, review = Outcome.KEEP, Outcome.DROP, Outcome.REVIEW
    decided = {
        "a": [("one", 0.95, keep), ("two", 0.5, drop), ("three", 0.8, review), ("four", 0.9, keep)],
        "b": [("two", 0.3, drop), ("one", 0.6, drop)],
    }
    for site, rows in decided.items():
        (tmp_path / "sites" / site).mkdir(parents=True)
        write_manifest(
            tmp_path / "sites" / site / "manifest.json", manifest(site, [entry(*row) for row in rows])
        )
    figures = curation_figures(read_curated(tmp_path, ["a", "b", "c"]), 0.75)  # c fell out of the run
    assert list(figures) == ["all", "a", "b"]
    assert figures["a"] == {
        "tau": 0.75,
        "n_candidates": 4,
        "n_spoiled": 3,
        "n_failures": 2,  # below 0.75: two, four
        "n_dropped": 2,  # two, and three until someone decides
        "precision": 0.5,
        "precision_ci": pytest.approx(share_interval(1, 2), abs=1e-12),
        "recall": 0.5,
        "recall_ci": pytest.approx(share_interval(1, 2), abs=1e-12),
        "accuracy": 0.5,
        "auroc": 0.75,  # of 0.5, 0.9 against 0.95, 0.8
        "mean_dsc_before": pytest.approx(0.6),
        "mean_dsc_after": pytest.approx(0.6),
    }
    both = figures["all"]
    assert (both["n_candidates"], both["n_spoiled"], both["n_failures"], both["n_dropped"]) == (6, 4, 3, 4)
    assert both["precision"] == pytest.approx(2 / 4)
    assert both["recall"] == pytest.approx(2 / 3)
    assert both["mean_dsc_before"] == pytest.approx(3.9 / 6)
    assert both["mean_dsc_after"] == pytest.approx(0.6)
    assert (figures["b"]["n_dropped"], figures["b"]["mean_dsc_after"]) == (2, None)
    json.dumps(figures, allow_nan=False)


def test_diagnoses_by_hand(tmp_path: Path) -> None:
    truth = tmp_path / "truth" / "candidates.csv"
    truth.parent.mkdir()
    kinds = ("shift", "shift", "left-right-flip", "stale-label", "untouched", "seggen")
    truth.write_text(
        "site,id,patient,kind,dsc\n" + "".join(f"a,{n},p{n},{kind},0.5\n" for n, kind in enumerate(kinds))
    )
    said = (Kind.SHIFT, Kind.UNDER, Kind.FLIP, Kind.ANOTHER, Kind.UNCLEAR, Kind.OVER)
    entries = [
        entry(str(n), 0.3, Outcome.DROP).model_copy(
            update={"diagnosis": Diagnosis(kind=kind, found="see", explains=1)}
        )
        for n, kind in enumerate(said)
    ]
    kept_by_a_person = Overruled(decision=Outcome.KEEP, reason="", by="me", when="2026-01-02T03:04:05+00:00")
    entries[3] = entries[3].model_copy(update={"overruled": kept_by_a_person})
    (tmp_path / "sites" / "a").mkdir(parents=True)
    write_manifest(tmp_path / "sites" / "a" / "manifest.json", manifest("a", entries))
    curated = read_curated(tmp_path, ["a"])
    assert [one.diagnosis for one in curated] == [
        "shift",
        "under-contouring",
        "flip",
        None,  # it is kept
        "unclear",
        "over-contouring",
    ]
    figures = diagnosis_figures((one.kind, one.diagnosis) for one in curated if one.diagnosis)
    assert (figures["n"], figures["right"]) == (
        3,
        pytest.approx(2 / 3),
    )  # what has no name counts for nothing
    assert figures["by_kind"] == {
        "untouched": {"unclear": 1},
        "seggen": {"over-contouring": 1},
        "left-right-flip": {"flip": 1},
        "shift": {"shift": 1, "under-contouring": 1},
    }
    assert diagnosis_figures([("stale-label", "another-patient")])["right"] == 1
    assert diagnosis_figures([]) == {"n": 0, "right": None, "by_kind": {}}
