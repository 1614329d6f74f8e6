import csv
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.image as mpl_image
import nibabel
import numpy as np
import pytest
import tomli_w
from fedqc_simulations import report
from fedqc_simulations.consortium import KnownLabel
from fedqc_simulations.report import (
    Scored,
    read_scored,
    worst_of,
    write_pooled_report,
    write_simulation_report,
)
from fedqc_simulations.slices import draw_slice

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import write_volume
from fedqc.config import CurationConfig
from fedqc.curation.manifest import Entry, InputFile, Manifest, UsedModel, UsedRule, write_manifest
from fedqc.curation.rules import Outcome
from fedqc.reports import figures
from fedqc.reports.slices import Slice
from fedqc.task import Task

SITES = ("hospital-1", "hospital-2")
# id, kind, true DSC, predicted DSC, decision; the same at each site
CANDIDATES = (
    ("a", "untouched", 1.0, 0.95, Outcome.KEEP),
    ("b", "shift", 0.3, 0.35, Outcome.DROP),
    ("c", "left-right-flip", 0.4, 0.8, Outcome.KEEP),
    ("d", "untouched", 1.0, 0.77, Outcome.REVIEW),
)
# What is said, without the time that drawing takes.
TEXT_ONLY = pytest.mark.usefixtures("no_drawing")


@pytest.fixture
def no_drawing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every figure is an empty drawing, every picture empty."""
    for name in ("candidates", "decision_bars", "dot_panels", "kinds", "scatter_panels", "time_bars"):
        monkeypatch.setattr(figures, name, lambda *_args, **_kwargs: "<svg></svg>")
    monkeypatch.setattr(report, "draw_slice", lambda *_args: Slice(b"", "axial", "T1"))


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.sources: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.sources += [value or "" for key, value in attrs if key == "src"]


def agreement(n: int, r: float | None) -> dict[str, Any]:
    values = dict.fromkeys(("rho", "mae", "mae_sd", "rmse", "dsc_err_median"), 0.05 if n else None)
    return {"n": n, "patients": n, "r": r, "r_ci": None if r is None else [r - 0.1, r + 0.02], **values}


def curation(n: int) -> dict[str, Any]:
    return {
        "tau": 0.75,
        "n_candidates": 4 * n,
        "n_failures": 2 * n,
        "n_dropped": 2 * n,
        "n_spoiled": 2 * n,
        "precision": 0.5,
        "precision_ci": (0.4, 0.6),
        "recall": 0.5,
        "recall_ci": (0.4, 0.6),
        "accuracy": 0.5,
        "auroc": 0.75,
        "mean_dsc_before": 0.675,
        "mean_dsc_after": 0.7,
    }


def arm(dice: float, n: int) -> dict[str, Any]:
    return {"dice_mean": dice, "dice_ci": [dice - 0.01, dice + 0.01], "n_train": n, "regions": {"core": dice}}


EVALUATION: dict[str, Any] = {
    "seed": 0,
    "qc": {
        "all": agreement(8, 0.9),
        "trained": agreement(4, 0.95),
        "unseen": agreement(4, 0.8),
        "by_kind": {
            kind: {
                "in_training": kind != "left-right-flip",
                "n": 4,
                "true_dsc": 0.5,
                "predicted_dsc": 0.6,
                "mae": 0.1,
                "auroc_vs_untouched": None,
            }
            for kind in ("untouched", "shift", "left-right-flip")
        },
    },
    "curation": {"all": curation(2), "hospital-1": curation(1), "hospital-2": curation(1)},
    "diagnosis": {
        "n": 3,
        "right": 2 / 3,
        "by_kind": {"left-right-flip": {"flip": 1}, "shift": {"under-contouring": 1, "shift": 1}},
    },
    "suspected": {"spoiled": [], "named": []},
    "segmentation": {
        "everything": arm(0.76, 8),
        "curated": arm(0.82, 4),
        "weighted": arm(0.81, 5),
        "random": arm(0.74, 4),
        "oracle": arm(0.84, 4),
        "gap_closed": {"value": 0.75, "ci": [0.6, 0.9]},
    },
}


def write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values))


def entry(case: str, quality: float, decision: Outcome) -> Entry:
    file = InputFile(path=f"labels/{case}.nii.gz", sha256="0" * 64)
    return Entry(
        id=case,
        patient=case,
        quality=quality,
        regions={},
        decision=decision,
        reason="said so",
        files={"label": file},
    )


@pytest.fixture
def simulation(tmp_path: Path, task: Task) -> Path:
    """A finished simulation of two sites, each with a missed failure and a good label in review."""
    out = tmp_path / "run"
    write_json(
        out / "run.json",
        {
            "federation": "alps",
            "config": {
                "task": "blobs",
                "qc": {"rounds": 3, "local_steps": 5},
                "curation": {"rule": "threshold", "threshold": 0.75, "review": 0.05},
                "privacy": {"min_count": 3},
            },
            "outcome": "completed",
            "seconds": {"train.qc": 60.0},
            "sites": {"joined": list(SITES), "left_out": {}},
        },
    )
    score = {"candidates": 4, "decisions.keep": 4}
    write_json(out / "statistics.json", {"sites": {site: {"score": score} for site in SITES}})
    write_json(out / "evaluation.json", EVALUATION)
    write_json(out / "simulation.json", {"noise": "mixed"})
    write_json(out / "arms" / "oracle" / "run.json", {"seconds": {"train.segmentation": 30.0}})
    (out / "task.toml").write_text(tomli_w.dumps(task.model_dump(mode="json", exclude_none=True)))
    rng = np.random.default_rng(0)
    for site in SITES:
        folder = out / "sites" / site
        rows = []
        for case, *_ in CANDIDATES:
            label = np.zeros((16, 16, 16), np.uint8)
            label[4:12, 4:12, 4:12] = 1
            label[6:9, 6:9, 6:9] = 3
            image, error = rng.normal(size=label.shape).astype(np.float32), np.zeros(label.shape, np.uint8)
            error[5, 5:10, 5:10] = 90
            write_volume(folder / "data" / "images" / f"{case}.nii.gz", image, np.eye(4))
            write_volume(folder / "data" / "labels" / f"{case}.nii.gz", label, np.eye(4))
            write_volume(folder / "error_maps" / f"{case}.nii.gz", error, np.eye(4))
            files = {"T1": f"images/{case}.nii.gz", "label": f"labels/{case}.nii.gz"}
            rows.append({"id": case, "patient": case, **files})
        write_table(folder / "data" / "cases.csv", rows)
        manifest = Manifest(
            site=site,
            federation="alps",
            task="blobs",
            created="2026-03-01T10:00:00",
            model=UsedModel(method="qcresunet", sha256="0" * 64, fedqc="0.1.0"),
            rule=UsedRule(config=CurationConfig(review=0.05)),
            entries=tuple(entry(case, predicted, decision) for case, _, _, predicted, decision in CANDIDATES),
        )
        write_manifest(folder / "manifest.json", manifest)
    write_table(
        out / "truth" / "candidates.csv",
        [
            {"site": site, "id": case, "patient": case, "kind": kind, "dsc": dsc}
            for site in SITES
            for case, kind, dsc, _, _ in CANDIDATES
        ],
    )
    write_table(
        out / "truth" / "test_scores.csv",
        [
            {"patient": "p", "kind": kind, "true_dsc": dsc, "predicted_dsc": predicted, "error_dsc": ""}
            for _, kind, dsc, predicted, _ in CANDIDATES
        ],
    )
    return out


def change_evaluation(out: Path, **values: Any) -> None:
    write_json(out / "evaluation.json", EVALUATION | values)


def text_of(path: Path) -> str:
    html = re.sub(r"<style.*?</style>", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", html).replace("\u00a0", " ").split())


# --------------------------------------------------------------------------------------------- one seed


def test_report_holds_every_section_in_order_and_its_pictures(simulation: Path) -> None:
    path = write_simulation_report(simulation)
    html = path.read_text(encoding="utf-8")
    assert path == simulation / "report.html"
    assert re.findall(r'<section id="(\w+)"', html) == [
        "consortium",
        "quality",
        "accuracy",
        "references",
        "overall",
        "calibration",
        "worst",
        "segmentation",
        "training",
        "faults",
        "time",
        "files",
    ]
    page = Tags(html)
    assert len(page.ids) == len(set(page.ids))
    assert "script" not in page.tags
    # Two mistakes at each site, and its three worst.
    assert len(page.sources) == 4 + 6
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert not re.search(r"\b(nan|None|undefined)\b", text_of(path))


@TEXT_ONLY
def test_diagnoses_are_laid_beside_the_truth(simulation: Path) -> None:
    told = text_of(write_simulation_report(simulation))
    assert "67 % of 3 spoiled annotations are told right." in told
    name = "accuracy-what-was-said-to-be-wrong-beside-what-was.csv"
    with (simulation / "report" / name).open(encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["kind", "flip", "under-contouring", "shift"],
            ["left-right flip", "1", "0", "0"],
            ["shift", "0", "1", "1"],
        ]
    write_json(simulation / "evaluation.json", EVALUATION | {"diagnosis": {"n": 0, "by_kind": {}}})
    assert "said to be wrong" not in text_of(write_simulation_report(simulation))


@TEXT_ONLY
def test_verdict_says_what_was_found_lost_and_gained(simulation: Path) -> None:
    text = text_of(write_simulation_report(simulation))
    assert (
        "2 of 4 failures found, 2 of 4 good annotations dropped. For the segmentation, curation closed 75 % "
        "(60 to 90) of the gap" in text
    )
    assert "errors put in: mixed" in text
    assert "r, predicted and true DSC, kinds of error never trained on 0.800 95 %: 0.700 to 0.820" in text


@TEXT_ONLY
@pytest.mark.parametrize(
    ("gap", "verdict"),
    [
        ({"value": None, "ci": None}, "For the segmentation there was no gap to close."),
        ({"value": 1.39, "ci": None}, "spoiled labels made too little difference to say more"),
        ({"value": 1.39, "ci": None}, "the share of it that curation closes cannot be said"),
        ({"value": -0.2, "ci": [-0.4, 0.1]}, "is worse than one trained on everything"),
    ],
)
def test_verdict_hides_nothing(simulation: Path, gap: dict[str, Any], verdict: str) -> None:
    change_evaluation(simulation, segmentation=EVALUATION["segmentation"] | {"gap_closed": gap})
    assert verdict in text_of(write_simulation_report(simulation))


def test_equal_input_gives_equal_bytes(simulation: Path) -> None:
    first = write_simulation_report(simulation).read_bytes()
    assert write_simulation_report(simulation).read_bytes() == first


@TEXT_ONLY
def test_untrained_model_is_called_so(simulation: Path) -> None:
    qc = EVALUATION["qc"] | {"all": agreement(8, 0.05), "unseen": agreement(0, None)}
    change_evaluation(simulation, qc=qc)
    path = write_simulation_report(simulation)
    assert "The QC model looks untrained: its predictions hardly follow the truth (r = 0.05)" in text_of(path)
    assert 'id="top" class="bad"' in path.read_text(encoding="utf-8")


@TEXT_ONLY
@pytest.mark.parametrize(
    ("spoiled", "named", "says"),
    [
        ([], [], "no references were spoiled, and no site is suspected"),
        (["hospital-1"], ["hospital-1"], "spoiled references at hospital-1. All of them are named. No other"),
        (["hospital-1"], ["hospital-2"], "Missed: hospital-1. Suspected without cause: hospital-2."),
    ],
)
def test_truth_about_the_references_is_told(
    simulation: Path, spoiled: list[str], named: list[str], says: str
) -> None:
    change_evaluation(simulation, suspected={"spoiled": spoiled, "named": named})
    assert says in text_of(write_simulation_report(simulation))


@TEXT_ONLY
def test_mistakes_are_shown_and_their_absence_is_said(simulation: Path) -> None:
    assert "hospital-1, c: left-right flip. True DSC 0.40, predicted 0.80: kept." in text_of(
        write_simulation_report(simulation)
    )
    for site in SITES:
        path = simulation / "sites" / site / "manifest.json"
        manifest = Manifest.model_validate_json(path.read_text())
        right = [
            one.model_copy(update={"decision": Outcome.KEEP if one.id in "ad" else Outcome.DROP})
            for one in manifest.entries
        ]
        write_manifest(path, manifest.model_copy(update={"entries": tuple(right)}))
    assert "Curation made no mistake" in text_of(write_simulation_report(simulation))


@TEXT_ONLY
def test_arms_with_faults_say_so(simulation: Path) -> None:
    event = {"event": "site-failed", "site": "hospital-1", "phase": "train.segmentation", "reason": "late"}
    (simulation / "arms" / "oracle" / "events.jsonl").write_text(json.dumps(event) + "\n")
    assert "Sites failed in other arms, too: oracle (1 line)" in text_of(write_simulation_report(simulation))


@TEXT_ONLY
def test_simulation_that_did_not_come_to_its_end_has_a_report(simulation: Path) -> None:
    (simulation / "evaluation.json").unlink()
    (simulation / "truth" / "test_scores.csv").unlink()
    for site in SITES:
        (simulation / "sites" / site / "manifest.json").unlink()
    run = json.loads((simulation / "run.json").read_text())
    write_json(simulation / "run.json", run | {"outcome": "failed", "reason": "too few sites"})
    text = text_of(write_simulation_report(simulation))
    assert "The run failed." in text
    assert "Reason: too few sites." in text
    assert "Not measured: the simulation did not come to its end." in text


# -------------------------------------------------------------------------------------------- many seeds


def test_pooled_report_has_a_line_for_each_seed(simulation: Path, tmp_path: Path) -> None:
    out = tmp_path / "seeds"
    for seed in (0, 2, 10):
        shutil.copytree(simulation, out / f"seed-{seed}")
    event = {"event": "site-failed", "site": "hospital-2", "phase": "score", "reason": "late"}
    (out / "seed-10" / "events.jsonl").write_text(json.dumps(event) + "\n")
    pooled = EVALUATION | {"seeds": [0, 2, 10], "curation": {"all": curation(6)}}
    write_json(out / "evaluation.json", pooled)
    path = write_pooled_report(out)
    text, page = text_of(path), Tags(path.read_text(encoding="utf-8"))
    assert path == out / "report.html"
    assert "6 of 12 failures found" in text
    assert re.search(r"0 2 of 4 2 of 4 .* 2 2 of 4 2 of 4 .* 10 2 of 4 2 of 4", text)
    assert "24 annotations that the sites had to judge" in text
    assert "seed-10/hospital-2 score - gave no usable answer" in text
    assert len(page.ids) == len(set(page.ids))
    assert page.sources == []


# ----------------------------------------------------------------------------------------------- pieces


def test_candidates_stand_beside_their_truth(simulation: Path) -> None:
    scored = read_scored(simulation, [*SITES, "hospital-3"])
    assert [(one.site, one.entry.id, one.truth.dsc) for one in scored[:2]] == [
        ("hospital-1", "a", 1.0),
        ("hospital-1", "b", 0.3),
    ]
    assert len(scored) == 8
    assert [one.entry.id for one in scored if one.is_mistake(0.75)] == ["c", "d", "c", "d"]


def test_worst_cases_are_of_different_kinds_as_far_as_there_are() -> None:
    made = (("a", "x", 0.1), ("b", "x", 0.2), ("c", "y", 0.3), ("d", "y", 0.4), ("e", "x", 0.15))
    scored = [
        Scored("s", entry(case, quality, Outcome.KEEP), KnownLabel("s", case, case, kind, 0.5))
        for case, kind, quality in made
    ]
    assert [one.entry.id for one in worst_of(scored, 2)] == ["a", "c"]
    assert [one.entry.id for one in worst_of(scored, 3)] == ["a", "e", "c"]
    assert len(worst_of(scored, 9)) == 5


@pytest.fixture
def one_case(tmp_path: Path) -> CaseFiles:
    """Voxels of 1 x 1 x 4 mm, stored back to front."""
    affine = np.diag([1.0, -1.0, 4.0, 1.0])
    label = np.zeros((20, 24, 8), np.uint8)
    label[5:15, 5:15, 2:6] = 3
    image = np.where(label > 0, 100.0, 10.0).astype(np.float32)
    for name, data in (("image", image), ("label", label)):
        nibabel.save(nibabel.Nifti1Image(data, affine), tmp_path / f"{name}.nii.gz")
    return CaseFiles("a", "a", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz")


def save_error(path: Path, where: tuple[slice | int, ...]) -> Path:
    error = np.zeros((20, 24, 8), np.uint8)
    error[where] = 100
    nibabel.save(nibabel.Nifti1Image(error, np.diag([1.0, -1.0, 4.0, 1.0])), path)
    return path


def test_plane_has_the_largest_area_of_error_in_mm(one_case: CaseFiles, task: Task, tmp_path: Path) -> None:
    # Most voxels lie in an axial plane (36, or 36 mm2), most area in a sagittal one (24, or 96 mm2).
    path = save_error(tmp_path / "error.nii.gz", (slice(5, 11), slice(5, 11), slice(2, 6)))
    assert draw_slice(one_case, task, path).plane == "sagittal"
    path = save_error(tmp_path / "error.nii.gz", (slice(5, 11), slice(5, 11), slice(2, 3)))
    assert draw_slice(one_case, task, path).plane == "axial"


def test_error_is_drawn_on_the_right_half_only(one_case: CaseFiles, task: Task, tmp_path: Path) -> None:
    path = save_error(tmp_path / "error.nii.gz", (slice(5, 11), slice(5, 11), 3))
    drawn = draw_slice(one_case, task, path)
    pixels = mpl_image.imread(BytesIO(drawn.png))[..., :3]
    reddish = (pixels[..., 0] - pixels[..., 2]) > 0.4
    middle = pixels.shape[1] // 2
    assert reddish[:, middle:].any()
    assert not reddish[:, :middle].any()
    assert drawn.modality == "T1"


def test_case_without_an_error_map_shows_its_label(one_case: CaseFiles, task: Task, tmp_path: Path) -> None:
    drawn = draw_slice(one_case, task, tmp_path / "missing.nii.gz")
    blueish = (
        mpl_image.imread(BytesIO(drawn.png))[..., 2] - mpl_image.imread(BytesIO(drawn.png))[..., 0] > 0.2
    )
    assert blueish.any()
