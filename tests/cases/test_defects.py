"""One folder with every defect, each made from a healthy case: all are found, and nothing else is."""

import csv
import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.problems import Code, Problem
from fedqc.config import ComputeConfig, DataConfig, SiteConfig
from fedqc.site_check import SiteCheck, check_site
from fedqc.task import Anatomy, Task

SHAPE = (20, 22, 24)
MODALITIES = ("T1c", "T2")
AFFINE = np.diag([-1.5, 1.0, 2.0, 1.0])
OWN = {"necrosis": (1,), "edema": (2,), "enhancing": (3, 4)}
TASK = Task(
    name="tumour",
    modalities=MODALITIES,
    classes=OWN,
    regions={"whole": ("necrosis", "edema", "enhancing")},
    spacing=(2.0, 2.0, 2.0),
    size=(16, 16, 24),
    spacing_range=(0.5, 4.0),
    conventions={
        "brats": {"necrosis": (1,), "edema": (2,), "enhancing": (3,)},
        "brats-2017": {"necrosis": (1,), "edema": (2,), "enhancing": (4,)},
        "nnunet": {"necrosis": (2,), "edema": (1,), "enhancing": (3,)},
    },
    anatomy=Anatomy(outermost="edema", innermost="necrosis", brightest={"T1c": "enhancing"}),
)


@dataclass
class Patient:
    """A case while it is made: volumes, headers, and what the table says of it."""

    id: str
    images: dict[str, NDArray[Any]]
    label: NDArray[Any]
    affine: NDArray[np.float64] = field(default_factory=AFFINE.copy)
    label_affine: NDArray[np.float64] = field(default_factory=AFFINE.copy)
    row: dict[str, str] = field(default_factory=dict)
    later: list[Callable[[Path], None]] = field(default_factory=list)
    """Done to the folder once the files are written."""


def healthy(case_id: str, number: int) -> Patient:
    """A head with a tumour: necrosis inside a rim that enhances inside edema; no two alike."""
    rng = np.random.default_rng(number)
    centre = np.array(SHAPE) / 2 + rng.uniform(-1, 1, 3)
    offset = np.indices(SHAPE) + 0.5 - centre[:, None, None, None]
    distance = np.sqrt((offset**2).sum(axis=0)) * rng.uniform(0.97, 1.03)
    label = np.zeros(SHAPE, dtype=np.uint8)
    for value, radius in ((2, 6.5), (3, 4.5), (1, 3.0)):
        label[distance < radius] = value
    images = {}
    for name, contrast in (("T1c", (0, 40, 0, 160)), ("T2", (0, 150, 80, 20))):
        noisy = 200 + rng.normal(0, 12, SHAPE) + np.array(contrast)[label]
        images[name] = np.where(distance < 9.5, noisy, 0).astype(np.float32)
    return Patient(case_id, images, label)


def name_of(patient: Patient, part: str) -> str:
    return f"{patient.id}-{part}.nii.gz"


def write(folder: Path, patient: Patient) -> None:
    for part, volume in (*patient.images.items(), ("label", patient.label)):
        affine = patient.label_affine if part == "label" else patient.affine
        nibabel.save(nibabel.Nifti1Image(volume, affine), folder / name_of(patient, part))
        patient.row.setdefault(part, name_of(patient, part))
    for work in patient.later:
        work(folder)


def edit_header(part: str, **fields: Any) -> Callable[[Patient], None]:
    """Set fields of a stored header as a broken exporter would, around all of nibabel's checks."""

    def edit(patient: Patient) -> None:
        def work(folder: Path) -> None:
            path = folder / name_of(patient, part)
            content = bytearray(gzip.decompress(path.read_bytes()))
            header = np.frombuffer(content, dtype=nibabel.Nifti1Header.template_dtype, count=1)
            for name, value in fields.items():
                header[name] = value
            path.write_bytes(gzip.compress(bytes(content)))

        patient.later.append(work)

    return edit


def edit_file(part: str, change: Callable[[bytes], bytes]) -> Callable[[Patient], None]:
    """Change the bytes of a stored file."""

    def edit(patient: Patient) -> None:
        def work(folder: Path) -> None:
            path = folder / name_of(patient, part)
            path.write_bytes(change(path.read_bytes()))

        patient.later.append(work)

    return edit


def with_image(change: Callable[[NDArray[Any]], NDArray[Any]], part: str = "T2") -> Callable[[Patient], None]:
    def edit(patient: Patient) -> None:
        patient.images[part] = change(patient.images[part])

    return edit


def with_label(change: Callable[[NDArray[Any]], NDArray[Any]]) -> Callable[[Patient], None]:
    def edit(patient: Patient) -> None:
        patient.label = change(patient.label)

    return edit


def in_table(**cells: str) -> Callable[[Patient], None]:
    def edit(patient: Patient) -> None:
        patient.row.update(cells)

    return edit


def with_voxels(volume: NDArray[Any], value: float, count: int = 3) -> NDArray[Any]:
    """A float copy whose first voxels have another value."""
    changed = volume.astype(np.float32)
    changed.ravel()[:count] = value
    return changed


def damaged(content: bytes) -> bytes:
    middle = len(content) // 2
    return (
        content[:middle]
        + bytes(byte ^ 255 for byte in content[middle : middle + 40])
        + content[middle + 40 :]
    )


def exchanged(patient: Patient) -> None:
    patient.images["T2"], patient.label = patient.label.astype(np.float32), patient.images["T2"]


def z_scored(volume: NDArray[Any]) -> NDArray[Any]:
    inside = volume != 0
    return np.where(inside, (volume - volume[inside].mean()) / volume[inside].std(), 0).astype(np.float32)


def renumbered(label: NDArray[Any], **values: int) -> NDArray[Any]:
    table = np.array([0, values.get("one", 1), values.get("two", 2), values.get("three", 3)], dtype=np.uint8)
    result: NDArray[np.uint8] = table[label]
    return result


def label_header(affine: NDArray[np.float64]) -> Callable[[Patient], None]:
    def edit(patient: Patient) -> None:
        patient.label_affine = affine

    return edit


def shifted(millimetres: float) -> NDArray[np.float64]:
    affine = AFFINE.copy()
    affine[1, 3] += millimetres
    return affine


def all_headers(affine: NDArray[np.float64]) -> Callable[[Patient], None]:
    def edit(patient: Patient) -> None:
        patient.affine = patient.label_affine = affine

    return edit


def linked(patient: Patient) -> None:
    def work(folder: Path) -> None:
        path = folder / name_of(patient, "T2")
        archive = folder.parent / "archive"
        archive.mkdir()
        path.rename(archive / "T2.nii.gz")
        path.symlink_to(archive / "T2.nii.gz")

    patient.later.append(work)


def island(label: NDArray[Any]) -> NDArray[Any]:
    label = label.copy()
    label[10, 11, 2] = 2
    return label


def broad(patient: Patient) -> None:
    """Voxels of 3 mm make the tumour 39 mm broad, and the network sees 16x16x24 voxels of 2 mm."""
    patient.affine = patient.label_affine = np.diag([-3.0, 1.0, 2.0, 1.0])


def everything_marked(patient: Patient) -> None:
    patient.label[patient.images["T2"] > 0] = 2


def nothing_but_a_voxel(label: NDArray[Any]) -> NDArray[Any]:
    voxel = np.zeros_like(label)
    voxel[10, 11, 12] = 2
    return voxel


def copy_of_an_image(patient: Patient) -> None:
    patient.label = patient.images["T1c"]


FLIPPED = AFFINE @ np.diag([-1.0, 1, 1, 1])
DEFECTS: dict[str, tuple[Callable[[Patient], None], list[Code]]] = {
    "healthy": (lambda _: None, []),
    "one-volume-in-4d": (with_image(lambda image: image[..., None]), []),
    "brats-2017": (with_label(lambda label: renumbered(label, three=4)), []),
    "modality-not-listed": (in_table(T2=""), ["missing-modality"]),
    "modality-gone": (in_table(T2="gone.nii.gz"), ["missing-modality"]),
    "label-not-listed": (in_table(label=""), ["missing-label"]),
    "label-gone": (in_table(label="gone.nii.gz"), ["missing-label"]),
    "empty-file": (edit_file("T2", lambda _: b""), ["empty-file"]),
    "truncated": (edit_file("T2", lambda content: content[:-200]), ["truncated"]),
    "truncated-inside": (
        edit_file("T2", lambda content: gzip.compress(gzip.decompress(content)[:-200])),
        ["truncated"],
    ),
    "damaged": (edit_file("label", damaged), ["unreadable"]),
    "no-nifti": (edit_file("T2", lambda _: b"PatientName,Doe\n" * 40), ["not-nifti"]),
    "several-volumes": (with_image(lambda image: np.stack([image] * 3, axis=-1)), ["wrong-dimensions"]),
    "flat": (with_image(lambda image: image[..., 0] + 1), ["wrong-dimensions"]),
    "label-of-layers": (with_label(lambda label: np.stack([label] * 2, axis=-1)), ["wrong-dimensions"]),
    "zero-spacing": (edit_header("T2", pixdim=[1, 0, 1, 2, 1, 1, 1, 1]), ["invalid-spacing"]),
    "negative-spacing": (edit_header("label", pixdim=[1, 1, 1, -2, 1, 1, 1, 1]), ["invalid-spacing"]),
    "no-number-spacing": (edit_header("T2", pixdim=[1, 1, np.nan, 2, 1, 1, 1, 1]), ["invalid-spacing"]),
    "singular": (edit_header("T2", srow_y=[0, 0, 0, 0], qform_code=0), ["singular-affine"]),
    "in-metres": (all_headers(np.diag([1e-3, 1e-3, 2e-3, 1])), ["spacing-out-of-range"] * 3),
    "other-shape": (with_label(lambda label: label[:, :-1]), ["shape-mismatch"]),
    "other-place": (label_header(shifted(2)), ["affine-mismatch"]),
    "other-orientation": (label_header(FLIPPED), ["orientation-mismatch"]),
    "two-forms": (
        edit_header("T1c", qform_code=1, qoffset_x=5.0),
        ["qform-sform-mismatch"],
    ),
    "not-a-number": (with_image(lambda image: with_voxels(image, np.nan)), ["non-finite"]),
    "infinite": (with_image(lambda image: with_voxels(image, np.inf)), ["non-finite"]),
    "label-not-a-number": (with_label(lambda label: with_voxels(label, np.nan)), ["non-finite"]),
    "nothing-but-zeros": (with_image(np.zeros_like), ["constant-image"]),
    "constant": (with_image(lambda image: np.full_like(image, 7)), ["constant-image"]),
    "mask": (with_image(lambda image: 5.0 * (image > 0)), ["constant-image"]),
    "z-scored": (with_image(z_scored), ["normalised-image"]),
    "unit-range": (with_image(lambda image: image / image.max()), ["normalised-image"]),
    "clipped": (
        with_image(lambda image: image.clip(max=np.percentile(image[image > 0], 95))),
        ["clipped-image"],
    ),
    "interpolated-label": (with_label(lambda label: with_voxels(label, 0.5)), ["non-integral-label"]),
    "strange-value": (with_label(lambda label: with_voxels(label, 7)), ["unknown-label-value"]),
    "negative-value": (with_label(lambda label: with_voxels(label, -1)), ["unknown-label-value"]),
    "nothing-marked": (with_label(np.zeros_like), ["empty-label"]),
    "swapped-convention": (with_label(lambda label: renumbered(label, one=2, two=1)), ["label-convention"]),
    "outside": (with_label(lambda label: np.roll(label, (11, 11, 12), (0, 1, 2))), ["label-outside-image"]),
    "broad": (broad, ["label-cropped"]),
    "everything-marked": (everything_marked, ["label-fills-image", "missing-class", "missing-class"]),
    "single-voxel": (
        with_label(nothing_but_a_voxel),
        ["missing-class", "unusual-volume", "missing-class"],
    ),
    "forgotten-class": (with_label(lambda label: renumbered(label, one=3)), ["missing-class"]),
    "unit-of-metres": (edit_header("T2", xyzt_units=1), ["unit-not-mm"]),
    "copy-of-image": (copy_of_an_image, ["image-as-label"]),
    "island": (with_label(island), ["tiny-islands"]),
    "exchanged": (exchanged, ["exchanged-files"]),
    "wrong name/": (lambda _: None, ["invalid-id"]),
    "outside-path": (in_table(T2="../elsewhere.nii.gz"), ["path-outside"]),
    "linked": (linked, ["link-outside"]),
    "twin-of-image": (lambda _: None, ["duplicate-image"]),
    "twin-of-label": (lambda _: None, ["duplicate-label"]),
    "clash": (lambda _: None, ["name-clash"]),
    "CLASH": (lambda _: None, ["name-clash"]),
    "followup": (in_table(patient="known"), ["shared-patient"]),
    "vouched": (in_table(patient="known"), []),
}
# Who else is named where two cases share something.
TWINS: dict[str, list[Code]] = {
    "original-of-image": ["duplicate-image"],
    "original-of-label": ["duplicate-label"],
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> SiteCheck:
    """What is found in a folder with all defects and a case with the id of another."""
    home = tmp_path_factory.mktemp("site")
    folder = home / "data"
    folder.mkdir()
    others = [f"other-{number}" for number in range(12)]  # they say what is usual
    names = (*DEFECTS, *TWINS, "double", *others)
    patients = {name: healthy(name, number) for number, name in enumerate(names)}
    patients["twin-of-image"].images["T2"] = patients["original-of-image"].images["T1c"]
    patients["twin-of-label"].label = patients["original-of-label"].label
    for name, (spoil, _) in DEFECTS.items():
        spoil(patients[name])
    for name, patient in patients.items():
        patient.row["id"] = name
        patient.id = name.strip(" /").replace(" ", "-") + ("-upper" if name.isupper() else "")
        write(folder, patient)
    rows = [patient.row for patient in patients.values()]
    rows.append(patients["double"].row)
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ("id", *MODALITIES, "label", "patient"), restval="")
        writer.writeheader()
        writer.writerows(rows)
    (home / "verified.csv").write_text("id\nvouched\nstranger\n")
    site = SiteConfig(
        name="hospital-a",
        task="tumour",
        data=DataConfig(path=folder, reference=home / "verified.csv"),
        compute=ComputeConfig(workers=2),
    )
    return check_site(site, TASK, memory=None)


def codes_of(found: SiteCheck, case: str) -> list[Code]:
    return [problem.code for problem in found.problems if problem.case == case]


@pytest.mark.parametrize("name", DEFECTS)
def test_the_defect_is_found_and_nothing_else(found: SiteCheck, name: str) -> None:
    expected = DEFECTS[name][1]
    assert codes_of(found, name) == expected
    is_usable = name in {case.id for case in found.checked.usable}
    assert is_usable == all(not problem.is_error for problem in found.problems if problem.case == name)


@pytest.mark.parametrize("name", TWINS)
def test_both_twins_are_named(found: SiteCheck, name: str) -> None:
    assert codes_of(found, name) == TWINS[name]


def test_cases_with_one_id_are_left_out_altogether(found: SiteCheck) -> None:
    assert codes_of(found, "double").count("duplicate-id") == 2
    assert "double" not in {case.id for case in found.checked.usable}


def test_a_reference_that_is_no_case(found: SiteCheck) -> None:
    (problem,) = [problem for problem in found.problems if problem.code == "unknown-reference"]
    assert problem.case == "stranger"
    assert "'stranger'" in problem.found
    assert problem.file is not None
    assert problem.file.name == "verified.csv"


def test_every_problem_is_a_sentence_with_a_fix(found: SiteCheck) -> None:
    for problem in found.problems:
        assert problem.found
        assert problem.expected
        assert problem.fix
        assert "\n" not in str(problem)
        assert Problem.from_json(problem.as_json()) == problem


def test_every_code_of_a_case_is_tried() -> None:
    tried = {code for _, codes in DEFECTS.values() for code in codes}
    elsewhere = {
        "no-permission",  # test_check.py, as another user
        "too-large",  # test_volumes.py
        "duplicate-id",
        "unknown-reference",
        "ambiguous-file",  # of layouts, as are the next two
        "unexpected-file",
        "case-count",
        "unknown-rating",
        "key-exposed",
        "missing-credential",
    }
    assert tried | elsewhere == set(get_args(Code))
    assert not tried & elsewhere


def test_the_sheet_counts_what_can_be_used(found: SiteCheck) -> None:
    sheet = found.datasheet
    assert sheet.cases == len(found.checked.usable)
    assert sheet.references == 1
    assert sheet.patients == sheet.cases - 1  # followup and vouched are one
    assert sheet.conventions["nnunet"] == 1
    assert sheet.conventions["brats-2017"] == 1
    assert sheet.spacing_mm["x"].median == pytest.approx(1.5)
    assert found.exit_code == 1
    assert os.fspath(found.as_json()["layout"]) == "csv"
