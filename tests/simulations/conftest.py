from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.task import Task

ORIENTATIONS = (
    np.diag([1.0, 1.0, 1.0, 1.0]),  # right, anterior, superior
    np.diag([-1.0, -1.0, 1.0, 1.0]),  # left, posterior, superior
    np.array([[0, 0, 1.0, -5], [-1, 0, 0, 7], [0, 1, 0, 2], [0, 0, 0, 1]]),  # posterior, superior, right
)


@pytest.fixture
def task() -> Task:
    """Two classes, the second with two label values."""
    return Task(
        name="blobs",
        modalities=("T1",),
        classes={"core": (3,), "rim": (1, 5)},
        regions={"core": ("core",), "rim": ("rim",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


def make_label(number: int) -> NDArray[np.uint8]:
    """Class indices `[16, 18, 17]`, right, anterior, superior; every one another."""
    label = np.zeros((16, 18, 17), dtype=np.uint8)
    x, y, z = np.random.default_rng(number).integers(1, 4, 3)
    label[x : x + 9, y : y + 10, z : z + 9] = 2
    label[x + 2 : x + 7, y + 2 : y + 6, z + 2 : z + 8] = 1
    return label


@pytest.fixture
def make_cases(tmp_path: Path) -> Callable[..., list[CaseFiles]]:
    """Write cases: `patients` of them, the first with two cases; their files in three orientations."""

    def make(patients: int) -> list[CaseFiles]:
        folder = tmp_path / "data"
        folder.mkdir()
        made = []
        owners = ["p0", *(f"p{number}" for number in range(patients))]
        for number, patient in enumerate(owners):
            affine = ORIENTATIONS[number % len(ORIENTATIONS)]
            classes = make_label(number)
            to_file = nibabel.orientations.ornt_transform(
                np.array([[0, 1], [1, 1], [2, 1]]), nibabel.io_orientation(affine)
            )
            stored = nibabel.apply_orientation(classes, to_file)
            image = np.random.default_rng(number).uniform(10, 20, stored.shape) + 50.0 * stored
            paths = folder / f"image {number}.nii.gz", folder / f"label {number}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(image.astype(np.float32), affine), paths[0])
            values = np.array([0, 3, 5], dtype=np.uint8)[stored]
            nibabel.save(nibabel.Nifti1Image(values, affine), paths[1])
            made.append(CaseFiles(id=f"case-{number}", patient=patient, images=(paths[0],), label=paths[1]))
        return made

    return make
