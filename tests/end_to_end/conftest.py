"""A small data set in the MSD layout: two-part ellipsoids that the image shows, no two alike."""

import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

from fedqc import cli

SIDE = 18
TASK = """
name = "ellipsoids"
modalities = ["T1"]
spacing = [1.0, 1.0, 1.0]
size = [16, 16, 16]
[classes]
front = [1]
back = [2]
[regions]
front = ["front"]
back = ["back"]
"""


def write_data_set(folder: Path, cases: int) -> Path:
    """Write `cases` cases and their dataset.json."""
    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(5)
    training = []
    for number in range(cases):
        grid = np.indices((SIDE, SIDE, SIDE)) - rng.uniform(7.5, 9.5, (3, 1, 1, 1))
        inside = ((grid / rng.uniform(4.0, 6.5, (3, 1, 1, 1))) ** 2).sum(axis=0) <= 1
        label = np.where(inside, np.where(grid[1] > 0, 1, 2), 0).astype(np.uint8)
        image = (50 + 40 * label + rng.normal(0, 4, label.shape)).astype(np.float32)
        name = f"case_{number:02d}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), folder / "imagesTr" / name)
        nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), folder / "labelsTr" / name)
        training.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    (folder / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "training": training}))
    return folder


@pytest.fixture(scope="session")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("task") / "ellipsoids.toml"
    path.write_text(TASK)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data_set(tmp_path / "data", 10)


@pytest.fixture
def data_set() -> Callable[[Path, int], Path]:
    """Write a data set of as many cases as wanted."""
    return write_data_set


@pytest.fixture
def fedqc(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command line in this process; the result is its exit code."""

    def run(*arguments: object) -> int:
        monkeypatch.setattr("sys.argv", ["fedqc", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return int(stopped.value.code or 0)

    return run
