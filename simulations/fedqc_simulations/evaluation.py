"""What a simulation can measure because it knows the truth: the content of `evaluation.json`."""

import csv
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import find_cases
from fedqc.compute import Compute
from fedqc.curation.diagnosis import Kind
from fedqc.curation.manifest import read_manifest
from fedqc.curation.rules import Outcome
from fedqc.degradation.annotator import ANNOTATOR_KINDS, LeftRightFlip, StaleLabel
from fedqc.degradation.base import Untouched
from fedqc.degradation.samples import ALL_KINDS
from fedqc.metrics.agreement import agreement
from fedqc.metrics.filtering import auroc, filtering
from fedqc.model import StoredModel
from fedqc.seeding import generator
from fedqc.trial import Tried, try_model
from fedqc_simulations.consortium import Progress, read_candidates

MEANT = {kind: Kind(kind) for kind in ANNOTATOR_KINDS if kind in set(Kind)} | {
    LeftRightFlip.kind: Kind.FLIP,
    StaleLabel.kind: Kind.ANOTHER,
}
"""The right diagnosis of each kind of error that has one."""


@dataclass(frozen=True)
class Curated:
    """One candidate, what its site decided, and the truth."""

    site: str
    kind: str
    """Kind of error, or `untouched`."""
    true_dsc: float
    predicted_dsc: float
    dropped: bool
    """Review counts as dropped."""
    diagnosis: str | None = None
    """What was said to be wrong with it, where it was dropped and the method tells."""


def judge_test_cases(
    out: Path, model: StoredModel, *, seed: int, compute: Compute, progress: Progress
) -> list[Tried]:
    """Every held-back case with every kind of error once, scored by the model; `truth/test_scores.csv`."""
    task = model.card.task
    cache = CaseCache(out / "truth" / "cache", task)
    cases = CachedCases(cache, find_cases(out / "truth" / "test", task, "csv").cases)
    judged = try_model(
        model.method,
        model.network,
        cases,
        generator(seed, "test"),
        compute,
        progress=lambda done, most: progress("scoring the test cases", done, most),
    )
    _write_judged(_judged_file(out), judged)
    return judged


def read_judged(out: Path) -> list[Tried]:
    """What was written to `truth/test_scores.csv`."""
    with _judged_file(out).open(encoding="utf-8", newline="") as file:
        return [
            Tried(
                row["patient"],
                row["kind"],
                float(row["true_dsc"]),
                float(row["predicted_dsc"]),
                float(row["error_dsc"]) if row["error_dsc"] else None,
            )
            for row in csv.DictReader(file)
        ]


def qc_figures(judged: Sequence[Tried], left_out: Collection[str], *, seed: int) -> dict[str, Any]:
    """Agreement of predicted and true DSC: all kinds, those trained on, those not, and each on its own."""
    groups = {
        "all": judged,
        "trained": [one for one in judged if one.kind not in left_out],
        "unseen": [one for one in judged if one.kind in left_out],
    }
    untouched = [one.predicted_dsc for one in judged if one.kind == Untouched.kind]
    by_kind = {}
    for kind in ALL_KINDS:
        of_kind = [one for one in judged if one.kind == kind]
        if of_kind:
            predicted = np.array([one.predicted_dsc for one in of_kind])
            true = np.array([one.true_dsc for one in of_kind])
            by_kind[kind] = {
                "in_training": kind not in left_out,
                "n": len(of_kind),
                "true_dsc": float(true.mean()),
                "predicted_dsc": float(predicted.mean()),
                "mae": float(np.abs(predicted - true).mean()),
                "auroc_vs_untouched": None
                if kind == Untouched.kind
                else auroc(
                    1 - np.array([*predicted, *untouched]), [True] * len(of_kind) + [False] * len(untouched)
                ),
            }
    return {name: _agreement(group, seed, name) for name, group in groups.items()} | {"by_kind": by_kind}


def read_curated(out: Path, sites: Sequence[str]) -> list[Curated]:
    """What each site decided, beside the truth; a site that fell out of the run has decided nothing."""
    truth = {(one.site, one.id): one for one in read_candidates(out)}
    curated = []
    for site in sites:
        path = out / "sites" / site / "manifest.json"
        for entry in read_manifest(path).entries if path.is_file() else ():
            candidate = truth[site, entry.id]
            dropped = entry.outcome is not Outcome.KEEP
            said = entry.diagnosis.kind.value if dropped and entry.diagnosis else None
            curated.append(Curated(site, candidate.kind, candidate.dsc, entry.quality, dropped, said))
    return curated


def curation_figures(curated: Sequence[Curated], tau: float) -> dict[str, Any]:
    """What dropping did to the candidates, over all sites and at each."""
    sites = dict.fromkeys(one.site for one in curated)
    groups = {"all": curated} | {site: [one for one in curated if one.site == site] for site in sites}
    return {name: _filtering(group, tau) for name, group in groups.items()}


def diagnosis_figures(labels: Iterable[tuple[str, str]]) -> dict[str, Any]:
    """What labels are said to suffer from, beside what was done to them.

    Args:
        labels: of each, its kind of error or `untouched`, and its diagnosis.
    """
    by_kind: dict[str, Counter[str]] = {}
    for kind, diagnosis in labels:
        by_kind.setdefault(kind, Counter())[diagnosis] += 1
    meant = {kind: said for kind, said in by_kind.items() if kind in MEANT}
    n = sum(said.total() for said in meant.values())
    right = sum(said[MEANT[kind]] for kind, said in meant.items())
    return {
        "n": n,
        "right": right / n if n else None,
        "by_kind": {kind: dict(by_kind[kind]) for kind in ALL_KINDS if kind in by_kind},
    }


def _agreement(judged: Sequence[Tried], seed: int, name: str) -> dict[str, Any]:
    figures = agreement(
        [one.predicted_dsc for one in judged],
        [one.true_dsc for one in judged],
        [one.patient for one in judged],
        generator(seed, "bootstrap", name),
    )
    error_dsc = [one.error_dsc for one in judged if one.error_dsc is not None]
    return {**asdict(figures), "dsc_err_median": float(np.median(error_dsc)) if error_dsc else None}


def _filtering(curated: Sequence[Curated], tau: float) -> dict[str, Any]:
    figures = filtering(
        [one.predicted_dsc for one in curated],
        [one.true_dsc for one in curated],
        np.array([one.dropped for one in curated], dtype=bool),
        tau,
    )
    return {**asdict(figures), "n_spoiled": sum(one.kind != Untouched.kind for one in curated)}


def _judged_file(out: Path) -> Path:
    return out / "truth" / "test_scores.csv"


def _write_judged(path: Path, judged: Sequence[Tried]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=[field.name for field in fields(Tried)])
        writer.writeheader()
        writer.writerows(asdict(one) for one in judged)
