"""What curation is worth: the same segmentation training on five choices of candidates.

    everything   all candidates, spoiled ones too
    curated      what the sites kept: the run itself
    weighted     in place of dropping, drawn the more often the better they are judged: rule `weights`
    random       as many dropped at each site as `curated` did, at random
    oracle       only the untouched ones, which nobody can know in a hospital

Sites, seeds, first weights and budget are the same in all of them. Each arm but `curated` is a run of its own
in `arms/`, whose sites share data and cache with the run's sites and have a manifest that the simulation
wrote.
"""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import find_cases
from fedqc.compute import Compute
from fedqc.config import ComputeConfig, FederationConfig
from fedqc.curation.manifest import Manifest, read_manifest, write_manifest
from fedqc.curation.rules import Outcome, WeightsRule
from fedqc.degradation.base import Untouched
from fedqc.model import load_segmentation
from fedqc.seeding import generator
from fedqc.task import Task
from fedqc_simulations.consortium import Progress, borrow_sites, read_candidates, write_federation

Arm = Literal["everything", "curated", "weighted", "random", "oracle"]
ARMS: tuple[Arm, ...] = ("everything", "curated", "weighted", "random", "oracle")
OTHER_ARMS: tuple[Arm, ...] = ("everything", "weighted", "random", "oracle")
"""Those that are runs of their own."""
PHASES = ("train.segmentation", "evaluate.segmentation")
RESAMPLES = 2000


@dataclass(frozen=True)
class ArmScore:
    """How well the model of one arm did on one test case."""

    arm: Arm
    patient: str
    case: str
    regions: dict[str, float]
    """DSC of each region."""
    dice: float
    """Mean over the regions."""


def arm_folder(out: Path, arm: Arm) -> Path:
    """The run's folder of an arm."""
    return out if arm == "curated" else out / "arms" / arm


def taking_part(out: Path, config: FederationConfig) -> list[str]:
    """The sites that train a segmentation model in the run, and so in every arm.

    A site that has no manifest fell out of the run. Where references are trained on too, those take no part
    whose references the cross-check does not trust.
    """
    statistics = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    suspected = statistics.get("suspected", {}) if config.segmentation.references else {}
    return [
        name
        for name in config.sites.expected
        if _manifest_file(out, name).is_file() and name not in suspected
    ]


def build_arm(
    out: Path, arm: Arm, config: FederationConfig, compute: ComputeConfig, seed: int
) -> tuple[Path, dict[str, Path]]:
    """Write the sites of an arm, with their manifests, and its `federation.toml`.

    Returns:
        The `federation.toml`, and the `site.toml` of each site.
    """
    folder = arm_folder(out, arm)
    spoiled = {(one.site, one.id) for one in read_candidates(out) if one.kind != Untouched.kind}
    names = taking_part(out, config)
    files = borrow_sites(folder, names, min_count=config.privacy.min_count, compute=compute)
    for name, file in files.items():
        curated = read_manifest(_manifest_file(out, name))
        is_spoiled = [(name, entry.id) in spoiled for entry in curated.entries]
        rng = generator(seed, "arm", arm, name)
        write_manifest(file.parent / "manifest.json", _chosen(curated, arm, is_spoiled, rng))
    sites = config.sites.model_copy(
        update={"expected": tuple(names), "minimum": min(config.sites.minimum, len(names))}
    )
    write_federation(folder, config.model_copy(update={"sites": sites}), task="../../task.toml")
    return folder / "federation.toml", files


def score_arms(out: Path, task: Task, *, compute: Compute, progress: Progress) -> list[ArmScore]:
    """Every arm's model on every test case; also written to `truth/segmentation_scores.csv`.

    An arm without a model (no site kept anything) has no score.
    """
    cache = CaseCache(out / "truth" / "cache", task)
    files = find_cases(out / "truth" / "test", task, "csv").cases
    scores: list[ArmScore] = []
    for arm in ARMS:
        stored = arm_folder(out, arm) / "models" / "segmentation"
        if not stored.exists():
            continue
        model = load_segmentation(stored, task)
        cases = (cache.get(one) for one in files)
        for score in model.segmentation.evaluate(model.network, cases, compute):
            scores.append(ArmScore(arm, score.patient, score.case_id, score.regions, score.dice))
            progress("trying the segmentation models", len(scores), len(files) * len(ARMS))
    _write_scores(out / "truth" / "segmentation_scores.csv", scores, task)
    return scores


def read_arm_scores(out: Path, task: Task) -> list[ArmScore]:
    """What was written to `truth/segmentation_scores.csv`."""
    with (out / "truth" / "segmentation_scores.csv").open(encoding="utf-8", newline="") as file:
        return [
            ArmScore(
                _arm(row["arm"]),
                row["patient"],
                row["case"],
                {name: float(row[name]) for name in task.regions},
                float(row["dice"]),
            )
            for row in csv.DictReader(file)
        ]


def count_kept(out: Path, arm: Arm, names: Sequence[str]) -> int:
    """Candidates that took part in an arm's training."""
    files = (_manifest_file(arm_folder(out, arm), name) for name in names)
    manifests = [read_manifest(file) for file in files if file.is_file()]
    return sum(entry.outcome is Outcome.KEEP for manifest in manifests for entry in manifest.entries)


def arm_figures(
    scores: Sequence[Sequence[ArmScore]], n_train: dict[Arm, int], *, seed: int
) -> dict[str, Any]:
    """Mean Dice of each arm, and how much of the gap between `everything` and `oracle` curation closes.

    Intervals (95 %) come from resampling patients, the same ones in every arm and seed, since arms are
    compared on the same test cases. They hold for these trained models; what another training would give is
    not in them.

    Args:
        scores: those of each simulation (one, or one a seed).
        n_train: candidates behind each arm, added up over the simulations.
        seed: of the resampling.

    Returns:
        For each arm its figures, None where it has no model; `gap_closed` is None where there is no gap, its
        interval where there is none in some resampling.
    """
    runs = [_table(one) for one in scores]
    patients = sorted({patient for table, owners in runs for patient in owners})
    place = {patient: index for index, patient in enumerate(patients)}
    # Sums and counts by patient: a resampled mean is then one product.
    sums = np.zeros((len(patients), len(ARMS)))
    counts = np.zeros(len(patients))
    for table, owners in runs:
        for row, patient in zip(table, owners, strict=True):
            sums[place[patient]] += row
            counts[place[patient]] += 1
    rng = generator(seed, "bootstrap", "arms")
    times = rng.multinomial(len(patients), [1 / len(patients)] * len(patients), size=RESAMPLES)
    resampled = (times @ sums) / (times @ counts)[:, None]
    means = sums.sum(axis=0) / counts.sum()
    figures: dict[str, Any] = {}
    for index, arm in enumerate(ARMS):
        of_arm = [one for run in scores for one in run if one.arm == arm]
        figures[arm] = {
            "dice_mean": None if np.isnan(means[index]) else float(means[index]),
            "dice_ci": _interval(resampled[:, index]),
            "n_train": n_train[arm],
            "regions": {
                name: float(np.mean([one.regions[name] for one in of_arm]))
                for name in (of_arm[0].regions if of_arm else ())
            },
        }
    value = _gap_closed(means[None])[0]
    figures["gap_closed"] = {
        "value": None if np.isnan(value) else float(value),
        "ci": _interval(_gap_closed(resampled)),
    }
    return figures


def _chosen(curated: Manifest, arm: Arm, is_spoiled: Sequence[bool], rng: np.random.Generator) -> Manifest:
    """The manifest of a site with the decisions of an arm."""
    n_entries = len(curated.entries)
    weights = [1.0] * n_entries
    if arm == "weighted" and not curated.rule.suspended:
        rule = WeightsRule(curated.rule.config.threshold)
        decided = rule.decide({entry.id: entry.quality for entry in curated.entries}).values()
        weights = [one.weight for one in decided]
        dropped = {index for index, one in enumerate(decided) if one.outcome is not Outcome.KEEP}
    elif arm in {"everything", "weighted"}:
        dropped = set[int]()
    elif arm == "oracle":
        dropped = {index for index, bad in enumerate(is_spoiled) if bad}
    else:
        n_dropped = sum(entry.outcome is not Outcome.KEEP for entry in curated.entries)
        dropped = set(rng.permutation(n_entries)[:n_dropped].tolist())
    entries = tuple(
        entry.model_copy(
            update={
                "decision": Outcome.DROP if index in dropped else Outcome.KEEP,
                "reason": f"arm {arm!r} of a simulation",
                "weight": weights[index],
                "diagnosis": None,
                "overruled": None,
            }
        )
        for index, entry in enumerate(curated.entries)
    )
    return curated.model_copy(update={"entries": entries})


def _table(scores: Sequence[ArmScore]) -> tuple[NDArray[np.float64], list[str]]:
    """`[cases, arms]` mean Dice, NaN where an arm has no model, and the patient of each case."""
    dice = {(one.arm, one.case): one.dice for one in scores}
    owner = {one.case: one.patient for one in scores}
    cases = sorted(owner)
    table = np.array([[dice.get((arm, case), np.nan) for arm in ARMS] for case in cases])
    return table, [owner[case] for case in cases]


def _gap_closed(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """For `[n, arms]` means, (curated - everything) / (oracle - everything); NaN where there is no gap."""
    everything, curated, oracle = (means[:, ARMS.index(arm)] for arm in ("everything", "curated", "oracle"))
    share: NDArray[np.float64] = np.full(len(means), np.nan)
    np.divide(curated - everything, oracle - everything, out=share, where=oracle > everything)
    return share


def _interval(values: NDArray[np.float64]) -> list[float] | None:
    if np.isnan(values).any():
        return None
    return [float(end) for end in np.quantile(values, (0.025, 0.975))]


def _write_scores(path: Path, scores: Sequence[ArmScore], task: Task) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "patient", "case", *task.regions, "dice"])
        for one in scores:
            writer.writerow(
                [one.arm, one.patient, one.case, *(one.regions[name] for name in task.regions), one.dice]
            )


def _arm(name: str) -> Arm:
    return next(arm for arm in ARMS if arm == name)


def _manifest_file(out: Path, name: str) -> Path:
    return out / "sites" / name / "manifest.json"
