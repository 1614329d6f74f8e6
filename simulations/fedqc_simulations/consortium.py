"""A consortium on one machine: a real data set split over sites, with known errors put into known labels.

OUT/
├── sites/hospital-1/    site.toml and data/ (cases.csv, reference.csv, images/, labels/): all the site has
└── truth/               what only the simulation knows
    ├── candidates.csv   site, id, patient, kind of error, true DSC
    ├── references.csv   the same of the references
    ├── recipes.json     how each spoiled label was made; donor: the case whose label was mixed up with it
    └── test/            held-back cases, in the csv layout
"""

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from nibabel.orientations import apply_orientation, io_orientation, ornt_transform
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import label_to_classes, read_header, read_volume, voxel_size, write_volume
from fedqc.config import ComputeConfig, FederationConfig
from fedqc.degradation.annotator import AnotherPatient
from fedqc.degradation.base import Untouched
from fedqc.errors import ConfigError, DataError
from fedqc.geometry import Sides, sides_of
from fedqc.seeding import generator
from fedqc.task import Task
from fedqc_simulations.noise import (
    HABIT_SHARE,
    MIXED_SHARE,
    Noise,
    Spoiled,
    choose_spoiled,
    deal_kinds,
    habit_params,
    habits,
    lone_habit,
    spoil,
    spoil_with,
)

REFERENCE_SHARE = 0.35
TEST_SHARE = 0.15
FEWEST_PATIENTS = 4
"""A site needs a patient to train on, one to calibrate on, one candidate and one for the test."""

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done and how much there is."""


@dataclass(frozen=True)
class KnownLabel:
    """What the simulation knows of a candidate's or a reference's label."""

    site: str
    id: str
    patient: str
    kind: str
    """Kind of error, or `untouched`."""
    dsc: float
    """True mean DSC of the label, on the grid of its file."""


@dataclass(frozen=True)
class _Roles:
    """One site's cases by what they are for."""

    references: list[CaseFiles]
    test: list[CaseFiles]
    candidates: list[CaseFiles]


def build_consortium(
    cases: Sequence[CaseFiles],
    task: Task,
    out: Path,
    *,
    names: Sequence[str],
    seed: int,
    noise: Noise,
    min_count: int,
    compute: ComputeConfig,
    progress: Progress,
    home: Callable[[str], str] | None = None,
) -> dict[str, Path]:
    """Split cases by patient into site folders (copies) and spoil a share of the labels.

    Args:
        cases: Usable cases; their files are only read.
        task: What they show.
        out: The run's folder.
        names: Of the sites.
        seed: Decides who goes where and what is spoiled how.
        noise: Which labels are spoiled, see `docs/how-to/simulate.md`.
        min_count: Smallest number of patients behind a number that leaves a site.
        compute: How the sites compute.
        progress: Told what is being done.
        home: The site that a case belongs to, by the case's id; None deals the patients out.

    Returns:
        The `site.toml` of each site.

    Raises:
        ConfigError: there are too few patients for the sites.
    """
    roles = _split(cases, names, seed, home)
    task_file = out / "task.toml"
    task_file.parent.mkdir(parents=True, exist_ok=True)
    task_file.write_text(tomli_w.dumps(task.model_dump(mode="json", exclude_none=True)), encoding="utf-8")
    habit_of: dict[str, str] = {}
    if noise == "systematic":
        habit_of = habits(names, task.n_classes)
    elif noise == "systematic-reference":
        habit_of = lone_habit(names, task.n_classes, generator(seed, "habit"))
    candidates: list[KnownLabel] = []
    references: list[KnownLabel] = []
    recipes: dict[str, object] = {}
    for position, name in enumerate(names):
        progress("building the sites", position, len(names))
        site, folder = roles[name], out / "sites" / name
        write_site(
            folder,
            name,
            references=site.references,
            candidates=site.candidates,
            task=task,
            min_count=min_count,
            compute=compute,
        )
        spoiled = _spoil_site(site, task, noise, habit_of.get(name), generator(seed, "noise", name))
        for known, members in ((candidates, site.candidates), (references, site.references)):
            for case in members:
                if case.id not in spoiled:
                    known.append(KnownLabel(name, case.id, case.patient, Untouched.kind, 1.0))
                    continue
                error, donor = spoiled[case.id]
                known.append(KnownLabel(name, case.id, case.patient, error.kind, error.dsc))
                made = {"kind": error.kind, "params": dict(error.params)}
                is_mix_up = error.kind == AnotherPatient.kind
                recipes[f"{name}/{case.id}"] = made | ({"donor": donor} if is_mix_up else {})
                write_volume(folder / "data" / _label_name(case), *as_file(case, error.label, task))
    progress("building the sites", len(names), len(names))
    test = [case for name in names for case in roles[name].test]
    truth = out / "truth"
    _write_cases(truth / "test", task, test)
    for file, labels in (("candidates.csv", candidates), ("references.csv", references)):
        _write_table(truth / file, [dataclasses.asdict(label) for label in labels])
    (truth / "recipes.json").write_text(json.dumps(recipes, indent=1) + "\n", encoding="utf-8")
    return site_files(out, names)


def site_files(out: Path, names: Sequence[str]) -> dict[str, Path]:
    """The `site.toml` of each site of a consortium."""
    return {name: out / "sites" / name / "site.toml" for name in names}


def write_federation(folder: Path, config: FederationConfig, *, task: str = "task.toml") -> None:
    """Write a run's `federation.toml`, whose task is the file that lies with the run."""
    values = config.model_dump(mode="json", exclude_none=True) | {"task": task}
    (folder / "federation.toml").write_text(tomli_w.dumps(values), encoding="utf-8")


def read_candidates(out: Path) -> list[KnownLabel]:
    """What was written to `truth/candidates.csv`."""
    return _read_known(out / "truth" / "candidates.csv")


def read_references(out: Path) -> list[KnownLabel]:
    """What was written to `truth/references.csv`."""
    return _read_known(out / "truth" / "references.csv")


def _read_known(path: Path) -> list[KnownLabel]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            KnownLabel(row["site"], row["id"], row["patient"], row["kind"], float(row["dsc"]))
            for row in csv.DictReader(file)
        ]


def _split(
    cases: Sequence[CaseFiles], names: Sequence[str], seed: int, home: Callable[[str], str] | None
) -> dict[str, _Roles]:
    """Deal the patients to the sites, and each site's patients to its roles."""
    patients = sorted({case.patient for case in cases})
    if len(patients) < FEWEST_PATIENTS * len(names):
        raise ConfigError(
            f"{len(names)} sites need {FEWEST_PATIENTS * len(names)} patients with usable cases "
            f"({FEWEST_PATIENTS} each), the data have {len(patients)}; "
            f"use --sites {max(1, len(patients) // FEWEST_PATIENTS)} or fewer, or more data"
        )
    order = generator(seed, "split").permutation(len(patients))
    roles = {}
    for position, name in enumerate(names):
        own = [patients[index] for index in order[position :: len(names)]]
        if home is not None:
            at_home = {case.patient for case in cases if home(case.id) == name}
            own = [patients[index] for index in order if patients[index] in at_home]
        n_test = max(1, round(TEST_SHARE * len(own)))
        n_references = max(2, round(REFERENCE_SHARE * len(own)))
        groups = own[:n_test], own[n_test : n_test + n_references], own[n_test + n_references :]
        test, references, candidates = ([c for c in cases if c.patient in set(group)] for group in groups)
        roles[name] = _Roles(references, test, candidates)
    return roles


def _spoil_site(
    site: _Roles, task: Task, noise: Noise, habit: str | None, rng: np.random.Generator
) -> dict[str, tuple[Spoiled, str | None]]:
    """The spoiled labels of one site by case id, each with the id of the case that stood by as donor."""
    share = MIXED_SHARE if noise == "mixed" else HABIT_SHARE if habit else 0.0
    by_id = {case.id: case for case in site.candidates}
    chosen = choose_spoiled(list(by_id), share, rng)
    if noise == "systematic-reference":
        vouched = {case.id: case for case in site.references}
        chosen += choose_spoiled(list(vouched), share, rng)
        by_id |= vouched
    regions = task.region_indices()
    spoiled: dict[str, tuple[Spoiled | None, str | None]] = {}
    if habit and chosen:
        first = by_id[chosen[0]]
        params = habit_params(habit, read_label(first, task), rng, label_sides(first))
        for case in chosen:
            label, sides = read_label(by_id[case], task), label_sides(by_id[case])
            spoiled[case] = spoil_with(label, habit, params, regions, sides), None
    else:
        everyone = [*site.candidates, *site.references]
        for case, kinds in deal_kinds(chosen, rng).items():
            label = read_label(by_id[case], task)
            others = [other for other in everyone if other.patient != by_id[case].patient]
            donor = others[int(rng.integers(len(others)))]
            donor_label = fitted_to(read_label(donor, task), label.shape)
            sides = label_sides(by_id[case])
            spoiled[case] = spoil(label, donor_label, kinds, regions, rng, sides=sides), donor.id
    return {case: (error, donor_id) for case, (error, donor_id) in spoiled.items() if error is not None}


def read_label(case: CaseFiles, task: Task) -> NDArray[np.uint8]:
    """A case's label as class indices, axes right, anterior, superior."""
    volume = read_volume(_label(case))
    canonical: NDArray[np.uint8] = apply_orientation(
        label_to_classes(volume.data, task), io_orientation(volume.affine)
    )
    return np.ascontiguousarray(canonical)


def label_sides(case: CaseFiles) -> Sides:
    """Sides of a voxel of a case's label, axes right, anterior, superior."""
    affine = read_header(_label(case)).affine
    spacing = np.empty(3)
    spacing[io_orientation(affine)[:, 0].astype(int)] = voxel_size(affine)
    return sides_of(spacing.tolist())


def as_file(
    case: CaseFiles, classes: NDArray[np.uint8], task: Task
) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Class indices, axes right, anterior, superior, as values, type and affine of the case's own file."""
    volume = read_volume(_label(case))
    canonical = np.array([[axis, 1] for axis in range(3)])
    stored = apply_orientation(classes, ornt_transform(canonical, io_orientation(volume.affine)))
    values = np.array([0, *(members[0] for members in task.classes.values())], dtype=np.uint16)
    # In the type of the file: a spoiled label should not be known by its header.
    return values[stored].astype(volume.data.dtype), volume.affine


def fitted_to(label: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """A label cropped and padded about its centre to `shape`."""
    fitted = np.zeros(shape, dtype=label.dtype)
    sides = [(have, want, min(have, want)) for have, want in zip(label.shape, shape, strict=True)]
    source = tuple(slice((have - side) // 2, (have - side) // 2 + side) for have, _, side in sides)
    target = tuple(slice((want - side) // 2, (want - side) // 2 + side) for _, want, side in sides)
    fitted[target] = label[source]
    return fitted


def write_site(
    folder: Path,
    name: str,
    *,
    references: Sequence[CaseFiles],
    candidates: Sequence[CaseFiles],
    task: Task,
    min_count: int,
    compute: ComputeConfig,
) -> None:
    """Write a site's data and its `site.toml`, whose results lie beside it; the task lies two folders up."""
    _write_cases(folder / "data", task, [*references, *candidates])
    _write_table(folder / "data" / "reference.csv", [{"id": case.id} for case in references])
    settings = {
        "name": name,
        "task": "../../task.toml",  # relative, so that a run's folder can be moved
        "results": ".",
        "data": {"path": "data", "layout": "csv", "reference": "data/reference.csv"},
        "compute": compute.model_dump(mode="json", exclude_none=True),
        "policy": {"min_count": min_count, "sheet": False},
    }
    (folder / "site.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")


def borrow_sites(
    folder: Path,
    names: Sequence[str],
    *,
    min_count: int,
    compute: ComputeConfig,
    ratings: bool = False,
) -> dict[str, Path]:
    """Write sites that share data and cache with those of a consortium two folders up, for a run of its own.

    Args:
        folder: of the run, such as CONSORTIUM/arms/random.
        names: of the sites.
        min_count: smallest number of patients behind a number that leaves a site.
        compute: how the sites compute.
        ratings: whether the sites have a table `data/ratings.csv`.

    Returns:
        The `site.toml` of each.
    """
    files = site_files(folder, names)
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = f"../../../../sites/{name}"
        data = {"path": f"{beside}/data", "layout": "csv", "reference": f"{beside}/data/reference.csv"}
        settings = {
            "name": name,
            "task": "../../../../task.toml",
            "results": ".",
            "data": data | ({"ratings": f"{beside}/data/ratings.csv"} if ratings else {}),
            "compute": compute.model_dump(mode="json", exclude_none=True) | {"cache": f"{beside}/cache"},
            "policy": {"min_count": min_count, "sheet": False},
        }
        file.write_text(tomli_w.dumps(settings), encoding="utf-8")
    return files


def _write_cases(folder: Path, task: Task, cases: Sequence[CaseFiles]) -> None:
    """Copy cases into a folder in the csv layout."""
    (folder / "images").mkdir(parents=True)
    (folder / "labels").mkdir()
    rows = []
    for case in cases:
        names = [f"images/{case.id}_{modality}.nii.gz" for modality in task.modalities]
        images = [path for path in case.images if path is not None]  # of a usable case, all
        if len(images) == len(names):
            names = [
                name.removesuffix(".nii.gz") + _suffix(path) for name, path in zip(names, images, strict=True)
            ]
            for source, name in zip(images, names, strict=True):
                shutil.copyfile(source, folder / name)
        else:  # one 4D file holds all modalities; the csv layout has a file for each
            volume = read_volume(images[0])
            for channel, name in enumerate(names):
                write_volume(folder / name, volume.data[..., channel], volume.affine)
        shutil.copyfile(_label(case), folder / _label_name(case))
        columns = dict(zip(task.modalities, names, strict=True))
        rows.append({"id": case.id, "patient": case.patient, **columns, "label": _label_name(case)})
    _write_table(folder / "cases.csv", rows)


def _write_table(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]) if rows else ["id"])
        writer.writeheader()
        writer.writerows(rows)


def _label(case: CaseFiles) -> Path:
    if case.label is None:
        msg = f"case {case.id}: a usable case has a label"
        raise DataError(msg)
    return case.label


def _label_name(case: CaseFiles) -> str:
    return f"labels/{case.id}{_suffix(_label(case))}"


def _suffix(path: Path) -> str:
    return ".nii.gz" if path.name.endswith(".gz") else ".nii"
