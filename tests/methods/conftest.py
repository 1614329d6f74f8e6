from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.methods.cross_fitting import fold_of
from fedqc.task import Task


@pytest.fixture
def task() -> Task:
    return Task(
        name="blobs",
        modalities=("T1", "T2"),
        classes={"core": (1,), "rim": (2,)},
        regions={"rim": ("rim",), "core": ("core",), "whole": ("core", "rim")},
        spacing=(1.0, 1.0, 1.0),
        size=(32, 16, 16),
    )


def make_case(number: int) -> Case:
    rng = np.random.default_rng(number)
    label: NDArray[np.uint8] = np.zeros((32, 16, 16), dtype=np.uint8)
    x, y, z = rng.integers(2, 6, 3)
    label[x : x + 16, y : y + 7, z : z + 8] = 2
    label[x + 3 : x + 11, y + 2 : y + 5, z + 2 : z + 6] = 1
    image = np.stack([label, 2.0 - label]) + rng.normal(0, 0.2, (2, *label.shape))
    return Case(
        id=f"case-{number}",
        patient=f"patient-{number}",
        image=image.astype(np.float32),
        label=label,
        affine=np.eye(4),
        native_shape=(32, 16, 16),
        native_affine=np.eye(4),
    )


@pytest.fixture
def cases() -> list[Case]:
    return [make_case(number) for number in range(5)]


@pytest.fixture
def cases_of_both_folds(cases: list[Case]) -> list[Case]:
    """The same cases, of patients who are in fold 0, 1, 0, 1, 0."""
    patients: list[list[str]] = [[], []]
    for number in range(30):
        patients[fold_of(f"p{number}")].append(f"p{number}")
    return [replace(case, patient=patients[index % 2].pop()) for index, case in enumerate(cases)]
