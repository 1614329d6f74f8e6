from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.task import Task

SHAPE = (16, 18, 20)


@pytest.fixture
def task() -> Task:
    """One modality, two classes; the second has two label values."""
    return Task(
        name="blobs",
        modalities=("T1",),
        classes={"core": (1,), "rim": (2, 5)},
        regions={"core": ("core",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 24),
    )


@pytest.fixture
def image() -> NDArray[np.float32]:
    return np.random.default_rng(0).uniform(10, 200, SHAPE).astype(np.float32)


@pytest.fixture
def label() -> NDArray[np.uint8]:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[3:12, 4:13, 5:15] = 2
    label[5:9, 6:10, 7:12] = 1
    label[11, 12, 14] = 5
    return label


@pytest.fixture
def make_case(
    tmp_path: Path, image: NDArray[np.float32], label: NDArray[np.uint8]
) -> Callable[..., CaseFiles]:
    """Write a case that has nothing wrong but what the arguments change."""

    def make(case_id: str = "case-1", **changes: Any) -> CaseFiles:
        image_path = tmp_path / f"{case_id}.nii.gz"
        label_path = tmp_path / f"{case_id}-label.nii.gz"
        affine = changes.get("affine", np.eye(4))
        nibabel.save(nibabel.Nifti1Image(changes.get("image", image), affine), image_path)
        label_affine = changes.get("label_affine", affine)
        nibabel.save(nibabel.Nifti1Image(changes.get("label", label), label_affine), label_path)
        return CaseFiles(id=case_id, patient=case_id, images=(image_path,), label=label_path)

    return make
