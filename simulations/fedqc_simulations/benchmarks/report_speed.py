"""How long the report of a large run takes, and how large it is.

    python -m fedqc_simulations.benchmarks.report_speed [--sites 70] [--rounds 300] [--out FOLDER]

The run is made up: a folder with `run.json`, `statistics.json` and `events.jsonl` as a coordinator writes
them, with training of both models over so many rounds. Its report is built in this process, on one thread.
Seconds are those of reading, drawing and writing; importing the libraries comes on top once. Those of the
processor are fewer where the machine does other work too.
"""

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fedqc.config import FederationConfig, SitesConfig
from fedqc.curation.calibration import BINS
from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import SIZE, SIZES
from fedqc.curation.rules import Outcome
from fedqc.files import write_json
from fedqc.reports.build import NUMBERS_FOLDER, build_coordinator_report
from fedqc.statistics.privacy import release
from fedqc.statistics.site import (
    summarise_calibration,
    summarise_cross_check,
    summarise_curation,
    summarise_data,
    summarise_labels,
    summarise_segmentation,
)

MEGABYTE = 2**20
MIN_COUNT = 10
CASES = 200
"""Candidates of a site, of as many patients."""


def main() -> None:
    """Make up a run, build its report, say how long it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sites", type=int, default=70)
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary) / "run"
        folder.mkdir(parents=True, exist_ok=True)
        write_run(folder, options.sites, options.rounds)
        begin, begin_processor = time.perf_counter(), time.process_time()
        path = build_coordinator_report(folder)
        seconds, processor = time.perf_counter() - begin, time.process_time() - begin_processor
        size = path.stat().st_size / MEGABYTE
        beside = sum(one.stat().st_size for one in (folder / NUMBERS_FOLDER).iterdir()) / MEGABYTE
        Console().print(
            f"{options.sites} sites, {options.rounds} rounds: built in {seconds:.1f} s, {processor:.1f} s of "
            f"the processor; {path.name} {size:.1f} MB, {NUMBERS_FOLDER}/ {beside:.1f} MB",
            highlight=False,
            soft_wrap=True,
        )


def write_run(folder: Path, n_sites: int, n_rounds: int, seed: int = 0) -> None:
    """Write what the coordinator of a finished run has in its folder; numbers passed the sites' filters."""
    rng = np.random.default_rng(seed)
    names = [f"hospital-{number:02d}" for number in range(1, n_sites + 1)]
    config = FederationConfig(task="phantom", sites=SitesConfig(expected=tuple(names), minimum=2))
    statistics: dict[str, Any] = {"failed": {}, "suspected": {}}
    statistics["sites"] = {name: made_up_site(rng, index) for index, name in enumerate(names)}
    told = [one["calibrate"] for one in statistics["sites"].values()]
    statistics["calibration"] = {
        key: np.sum([one.get(key, [0] * BINS) for one in told], axis=0).tolist()
        for key in ("failures", "others")
    }
    statistics["train"] = {stage: made_up_rounds(rng, names, n_rounds) for stage in ("qc", "segmentation")}
    start = datetime(2026, 3, 1, tzinfo=UTC)
    run = {
        "federation": "large",
        "config": config.model_dump(mode="json"),
        "versions": {"fedqc": "0.1.0"},
        "seed": seed,
        "started": start.isoformat(),
        "finished": (start + timedelta(hours=30)).isoformat(),
        "outcome": "completed",
        "reason": None,
        "seconds": {"summarise": 60.0, "train.qc": 60000.0, "score": 900.0, "train.segmentation": 40000.0},
        "sites": {"joined": names, "left_out": {}},
        "models": {"qc": {"rounds": n_rounds, "samples": 1, "sha256": "0" * 64}},
    }
    write_json(folder / "run.json", run)
    write_json(folder / "statistics.json", statistics)
    with (folder / "events.jsonl").open("w", encoding="utf-8") as file:
        for event in made_up_events(names, n_rounds):
            file.write(f"{json.dumps({'time': start.isoformat(), **event})}\n")


def made_up_site(rng: np.random.Generator, index: int) -> dict[str, Any]:
    """What a site tells; a fourth of its annotations are bad, more at every seventh site."""
    patients = [f"p{number}" for number in range(CASES)]
    volume = rng.lognormal(3, 0.5, CASES)
    codes = {"missing-file": 12 + index % 5, "shape-mismatch": 11, "empty-label": 3 if index % 3 else 14}
    references = [f"r{number}" for number in range(40)]
    labels = np.repeat(references, 10)
    true = np.where(rng.uniform(size=len(labels)) < 0.2, 1.0, rng.uniform(0.1, 1, len(labels)))
    noise = 0.05 + 0.1 * (index % 11 == 5)
    predicted = np.clip(true - 0.02 + rng.normal(0, noise, len(labels)), 0, 1)
    bad = rng.uniform(size=CASES) < (0.5 if index % 7 == 3 else 0.25)
    quality = np.clip(np.where(bad, rng.normal(0.45, 0.15, CASES), rng.normal(0.9, 0.05, CASES)), 0, 1)
    outcomes = [Outcome.KEEP if one >= 0.75 else Outcome.DROP for one in quality]
    wrong = rng.choice([Kind.SHIFT, Kind.SWAPPED, Kind.UNDER], CASES, p=(0.1, 0.3, 0.6))
    kinds = [Kind(kind) if one is Outcome.DROP else None for kind, one in zip(wrong, outcomes, strict=True)]
    sizes = np.array(SIZES)[np.argsort(np.argsort(volume)) * len(SIZES) // CASES]
    told = {
        "summarise": summarise_data(
            patients=[*patients, *references],
            reference=[False] * CASES + [True] * len(references),
            volumes_ml={"core": [*volume, *volume[:40]], "rim": [*(2 * volume), *volume[:40]]},
            left_out={code: [f"{code}{one}" for one in range(n)] for code, n in codes.items()},
        ),
        "cross-check": summarise_cross_check(rng.normal(0.9, 0.05, 40).clip(0, 1), references),
        "calibrate": summarise_calibration(predicted, true, labels.tolist(), 0.75),
        "score": summarise_curation(
            quality,
            {"core": quality},
            outcomes,
            patients,
            diagnoses=kinds,
            groups={SIZE: sizes.tolist()},
        ),
        "evaluate.segmentation": summarise_segmentation(
            rng.normal(0.8, 0.08, 40).clip(0, 1), {"core": rng.normal(0.8, 0.1, 40).clip(0, 1)}, references
        ),
    }
    return {phase: release(summary, MIN_COUNT) for phase, summary in told.items()}


def made_up_rounds(rng: np.random.Generator, names: list[str], n_rounds: int) -> list[dict[str, Any]]:
    """The rounds of one training, whose losses fall."""
    patients = [f"p{number}" for number in range(40)]
    made = list(zip(patients, rng.uniform(size=40).tolist(), strict=True))
    labels = dict(release(summarise_labels(made, [(one, "seggen", dsc) for one, dsc in made]), 1))
    rounds = []
    for number in range(1, n_rounds + 1):
        losses = 1.2 * number**-0.3 * rng.lognormal(0, 0.1, len(names))
        rounds.append(
            {
                "round": number,
                "loss": float(losses.mean()),
                "sites": {
                    name: {"samples": 100, "losses": {"loss": float(f"{loss:.3g}")}, "labels": labels}
                    for name, loss in zip(names, losses, strict=True)
                },
                "failed": {names[number % len(names)]: "late"} if number % 50 == 0 else {},
            }
        )
    return rounds


def made_up_events(names: list[str], n_rounds: int) -> list[dict[str, Any]]:
    """The events of both trainings: a line a site and round."""
    events: list[dict[str, Any]] = [{"event": "run-started"}]
    for stage in ("qc", "segmentation"):
        phase = f"train.{stage}"
        events.append({"event": "phase-started", "phase": phase})
        for number in range(1, n_rounds + 1):
            at = {"phase": phase, "round": number, "rounds": n_rounds, "stage": stage}
            events.append({"event": "round-started", **at})
            events += [{"event": "update-received", "site": name, "loss": 0.5, **at} for name in names]
            if number % 50 == 0:
                site = names[number % len(names)]
                events.append({"event": "site-failed", "site": site, "reason": "late", **at})
    return events


if __name__ == "__main__":
    main()
