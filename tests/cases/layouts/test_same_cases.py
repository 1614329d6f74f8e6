"""Real cases, rearranged into every layout that can hold them, are the same cases."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.layouts.modalities import common_name
from fedqc.task import Task, load_task
from tests.cases.layouts.trees import write_json

pytestmark = pytest.mark.real_data


@dataclass(frozen=True)
class Original:
    """A case as it is to be found again."""

    id: str
    patient: str
    images: tuple[Path, ...]
    """In the order of the task."""
    label: Path


Arrange = Callable[[Path, Task, Sequence[Original]], dict[str, tuple[str, str]]]
"""Writes a folder and tells the id and the patient that the layout can say of each case."""


def link(source: Path, target: Path) -> str:
    """A second name for a file; in a fresh folder, so nothing else has it."""
    target.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, target)
    return target.name


def by_id(cases: Sequence[Original]) -> dict[str, tuple[str, str]]:
    return {case.id: (case.id, case.id) for case in cases}


def as_msd(root: Path, task: Task, cases: Sequence[Original]) -> dict[str, tuple[str, str]]:
    training = []
    for case in cases:
        image, label = f"imagesTr/{case.id}.nii.gz", f"labelsTr/{case.id}.nii.gz"
        if len(case.images) == 1:
            link(case.images[0], root / image)
        else:
            image = image.removesuffix(".gz")  # packing it again would take most of the test's time
            stacked = np.stack([voxels(path) for path in case.images], axis=-1)
            (root / "imagesTr").mkdir(parents=True, exist_ok=True)
            nibabel.save(nibabel.Nifti1Image(stacked, np.eye(4)), root / image)
        link(case.label, root / label)
        training.append({"image": f"./{image}", "label": f"./{label}"})
    names = {str(number): name for number, name in enumerate(task.modalities)}
    write_json(root, {"modality": names, "numTraining": len(cases), "training": training[::-1]})
    return by_id(cases)


def as_nnunet(
    root: Path, task: Task, cases: Sequence[Original], *, version: int
) -> dict[str, tuple[str, str]]:
    """Channels are numbered in another order than the task's."""
    order = list(reversed(range(len(task.modalities))))
    for case in cases:
        for channel, index in enumerate(order):
            link(case.images[index], root / "imagesTr" / f"{case.id}_{channel:04d}.nii.gz")
        link(case.label, root / "labelsTr" / f"{case.id}.nii.gz")
    names = {str(channel): task.modalities[index] for channel, index in enumerate(order)}
    listed = [{"image": f"./imagesTr/{c.id}.nii.gz", "label": f"./labelsTr/{c.id}.nii.gz"} for c in cases]
    if version == 1:
        values = {str(members[0]): name for name, members in task.classes.items()}
        content: dict[str, Any] = {
            "modality": names,
            "labels": {"0": "background", **values},
            "training": listed,
        }
    else:
        regions = {
            name: [value for member in members for value in task.classes[member]]
            for name, members in task.regions.items()
        }
        content = {
            "channel_names": names,
            "labels": {"background": 0, **regions},
            "regions_class_order": list(range(1, len(regions) + 1)),
            "file_ending": ".nii.gz",
            "overwrite_image_reader_writer": "NibabelIO",
        }
    write_json(root, {**content, "numTraining": len(cases)})
    return by_id(cases)


def as_table(root: Path, task: Task, cases: Sequence[Original], *, tabs: bool) -> dict[str, tuple[str, str]]:
    root.mkdir()
    with (root / f"cases.{'tsv' if tabs else 'csv'}").open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if tabs else ",")
        writer.writerow(["label", *reversed(task.modalities), "patient", "id"])
        for case in cases:
            files = [case.label, *reversed(case.images)]
            names = [link(path, root / case.id / f"{number}.nii.gz") for number, path in enumerate(files)]
            writer.writerow([*(f"{case.id}/{name}" for name in names), case.patient, case.id])
    return {case.id: (case.id, case.patient) for case in cases}


def as_brats(
    root: Path, task: Task, cases: Sequence[Original], *, old: bool, flat: bool
) -> dict[str, tuple[str, str]]:
    names = {"t1n": "_t1", "t1c": "_t1ce", "t2w": "_t2", "t2f": "_flair"}
    for case in cases:
        folder = root if flat else root / case.id
        for modality, path in zip(map(common_name, task.modalities), case.images, strict=True):
            link(path, folder / f"{case.id}{names[modality] if old else f'-{modality}'}.nii.gz")
        link(case.label, folder / f"{case.id}{'_seg' if old else '-seg'}.nii.gz")
    return {case.id: (case.id, case.patient) for case in cases}


def as_bids(
    root: Path, task: Task, cases: Sequence[Original], session: str = ""
) -> dict[str, tuple[str, str]]:
    suffixes = {"t1n": "T1w", "t1c": "ce-gd_T1w", "t2w": "T2w", "t2f": "FLAIR"}
    known = {}
    for case in cases:
        subject = f"sub-{re.sub('[^A-Za-z0-9]', '', case.id)}"  # all that a label of BIDS may have
        stem, folder = f"{subject}{session and f'_{session}'}", Path(subject) / session / "anat"
        for modality, path in zip(map(common_name, task.modalities), case.images, strict=True):
            link(path, root / folder / f"{stem}_{suffixes[modality]}.nii.gz")
        kind = "dseg" if len(task.classes) > 1 else "label-lesion_mask"
        link(case.label, root / "derivatives" / "manual" / folder / f"{stem}_{kind}.nii.gz")
        known[case.id] = (stem, subject)
    write_json(root, {"Name": "set", "BIDSVersion": "1.9.0"}, "dataset_description.json")
    return known


ARRANGEMENTS: dict[str, tuple[str, Arrange]] = {
    "bids": ("bids", as_bids),
    "bids with sessions": ("bids", partial(as_bids, session="ses-02")),
    "brats 2017": ("brats", partial(as_brats, old=True, flat=False)),
    "brats 2017 flat": ("brats", partial(as_brats, old=True, flat=True)),
    "brats 2023": ("brats", partial(as_brats, old=False, flat=False)),
    "brats 2023 flat": ("brats", partial(as_brats, old=False, flat=True)),
    "csv": ("csv", partial(as_table, tabs=False)),
    "tsv": ("csv", partial(as_table, tabs=True)),
    "msd": ("msd", as_msd),
    "nnunet 1": ("nnunet", partial(as_nnunet, version=1)),
    "nnunet 2": ("nnunet", partial(as_nnunet, version=2)),
}


def hippocampus(data: Path) -> list[Original]:
    folder = data / "Task04_Hippocampus"
    listed = json.loads((folder / "dataset.json").read_text())["training"]
    images = sorted(folder / entry["image"] for entry in listed)[:6]
    names = [image.name for image in images]
    ids = [name.removesuffix(".nii.gz") for name in names]
    return [
        Original(case, case, (image,), folder / "labelsTr" / name)
        for case, image, name in zip(ids, images, names, strict=True)
    ]


def glioma_with(label: str) -> Callable[[Path], list[Original]]:
    def read(data: Path) -> list[Original]:
        case = "BraTS-GLI-00001-000"
        images = tuple(data / case / f"{case}-{name}.nii.gz" for name in ("t1n", "t1c", "t2w", "t2f"))
        return [Original(case, "BraTS-GLI-00001", images, data / case / f"{label}.nii.gz")]

    return read


def sclerosis(data: Path) -> list[Original]:
    return [
        Original(
            folder.name,
            folder.name,
            (folder / "t1.nii.gz", folder / "flair.nii.gz"),
            folder / "lesions.nii.gz",
        )
        for folder in sorted((data / "open_ms_data").iterdir())
    ]


SETS: dict[str, tuple[str, Callable[[Path], list[Original]]]] = {
    "hippocampus": ("msd-hippocampus", hippocampus),
    "glioma-123": ("brats-glioma", glioma_with("seg-BraTS23_1")),
    "glioma-124": ("brats-glioma", glioma_with("seg-bratstoolkit_isen")),
    "sclerosis": ("wmh", sclerosis),
}


@pytest.fixture(scope="module", params=SETS)
def cases(
    request: pytest.FixtureRequest, real_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Task, list[Original]]:
    """A real set, copied once, so that every other file of a test is but a link to a copy."""
    name, read = SETS[request.param]
    folder = tmp_path_factory.mktemp("originals")

    def copy(case: str, path: Path) -> Path:
        return Path(shutil.copyfile(path, folder / f"{case}-{path.name}"))

    copied = [
        Original(
            one.id, one.patient, tuple(copy(one.id, path) for path in one.images), copy(one.id, one.label)
        )
        for one in read(real_data)
    ]
    return load_task(name), copied


@pytest.mark.parametrize(("layout", "arrange"), ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_same_cases_in_every_layout(
    cases: tuple[Task, list[Original]], layout: str, arrange: Arrange, tmp_path: Path
) -> None:
    task, originals = cases
    root = tmp_path / "data"
    expected = arrange(root, task, originals)
    listing = find_cases(root, task)
    assert listing.layout == layout
    assert [*listing.problems, *(problem for case in listing.cases for problem in case.problems)] == []
    found = {case.id: case for case in listing.cases}
    assert {case.id: case.patient for case in listing.cases} == dict(expected.values())
    assert len(found) == len(originals)
    for original in originals:
        case = found[expected[original.id][0]]
        assert case.label is not None
        assert case.label.read_bytes() == original.label.read_bytes()
        assert_same_images(case, original)


def assert_same_images(case: CaseFiles, original: Original) -> None:
    if len(case.images) == len(original.images):
        paths = [path for path in case.images if path is not None]
        assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in original.images]
        return
    (path,) = case.images
    stacked = voxels(path)
    assert stacked.shape[3] == len(original.images)
    for channel, image in enumerate(original.images):
        np.testing.assert_array_equal(stacked[..., channel], voxels(image))


def voxels(path: Path | None) -> NDArray[Any]:
    assert path is not None
    return np.asarray(nibabel.Nifti1Image.from_filename(path).dataobj)
