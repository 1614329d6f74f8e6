"""A site behind a run: four candidates on disk, with error maps, and what was decided about them."""

from pathlib import Path

import numpy as np
import pytest

from fedqc.cases.volumes import sha256_file, write_volume
from fedqc.config import CurationConfig, load_site
from fedqc.curation.diagnosis import Diagnosis, Kind, Repair
from fedqc.curation.guards import Gathering
from fedqc.curation.manifest import MANIFEST, Entry, InputFile, Manifest, UsedModel, UsedRule, write_manifest
from fedqc.curation.rules import ThresholdRule
from fedqc.review.worklist import Worklist
from fedqc.task import load_task

TASK = """
name = "ball"
modalities = ["t1", "t2"]
spacing = [1.0, 1.0, 1.0]
size = [16, 16, 16]
[classes]
core = [1]
rim = [2, 4]
[regions]
ball = ["core", "rim"]
"""
QUALITIES = {"good": 0.97, "near": 0.78, "bad": 0.3, "<b>odd</b> & 'case'": 0.7}
SIDE = 24
DIAGNOSIS = Diagnosis(
    kind=Kind.SHIFT,
    found="moved by 2.0 mm to the left",
    explains=0.9,
    repair=Repair(how="move it by 2.0 mm to the right", quality=0.93),
)


def write_site(folder: Path, qualities: dict[str, float] | None = None) -> Path:
    """Write the site's folder."""
    qualities = qualities or QUALITIES
    (folder / "data").mkdir(parents=True)
    (folder / "results" / "error_maps").mkdir(parents=True)
    (folder / "ball.toml").write_text(TASK)
    grid = np.indices((SIDE, SIDE, SIDE)) - 11.5
    distance = np.sqrt((grid**2).sum(axis=0))
    label = np.select([distance < 4, distance < 7], [1, 4], 0).astype(np.uint8)
    errors = np.zeros_like(label)
    errors[16:20, 10:14, 15:18] = 90
    decisions = ThresholdRule(0.75, 0.05).decide(qualities)
    entries = []
    for number, (case, quality) in enumerate(qualities.items()):
        image = (100 * (label > 0) + 10 + np.arange(SIDE)).astype(np.float32)
        paths = {"t1": f"{number}-t1.nii.gz", "t2": f"{number}-t2.nii.gz", "label": f"{number}-label.nii.gz"}
        for role, path in paths.items():
            write_volume(folder / "data" / path, label if role == "label" else image, np.eye(4))
        if "/" not in case:
            maps = folder / "results" / "error_maps"
            write_volume(maps / f"{case}.nii.gz", errors, np.eye(4))
            if case == "good":  # of one class, elsewhere
                (maps / "rim").mkdir()
                write_volume(maps / "rim" / f"{case}.nii.gz", np.flip(errors).copy(), np.eye(4))
        entries.append(
            Entry(
                id=case,
                patient=f"patient-{number}",
                quality=quality,
                regions={"ball": quality},
                interval=(quality - 0.1, min(1.0, quality + 0.1)),
                decision=decisions[case].outcome,
                reason=decisions[case].reason,
                diagnosis=DIAGNOSIS if case == "bad" else None,
                files={
                    role: InputFile(path=path, sha256=sha256_file(folder / "data" / path))
                    for role, path in paths.items()
                },
            )
        )
    warning = Gathering(
        column="scanner", group="old", n_cases=4, n_not_kept=3, n_others=9, n_others_not_kept=0, p_value=0.002
    )
    manifest = Manifest(
        site="hospital-a",
        federation="balls-2026",
        task="ball",
        created="2026-03-01T12:30:00+00:00",
        model=UsedModel(method="qcresunet", sha256="a" * 64, fedqc="0.1.0"),
        rule=UsedRule(config=CurationConfig(review=0.05)),
        entries=tuple(entries),
        gatherings=(warning,),
    )
    write_manifest(folder / "results" / MANIFEST, manifest)
    site = folder / "site.toml"
    site.write_text('name = "hospital-a"\ntask = "ball.toml"\n[data]\npath = "data"\nlayout = "csv"\n')
    return site


@pytest.fixture
def site(tmp_path: Path) -> Path:
    return write_site(tmp_path / "site")


@pytest.fixture
def worklist(site: Path) -> Worklist:
    config = load_site(site)
    return Worklist(config, load_task(config.task), by="Dr. Doe")
