"""The benchmark of checking and preprocessing runs, on data made up here; what it measures is not tested."""

import re
from pathlib import Path

import numpy as np
import pytest
from fedqc_simulations.benchmarks import check_speed
from fedqc_simulations.benchmarks.check_speed import HEAD, Row

from fedqc.cases.layouts import CaseFiles, Listing, find_cases
from fedqc.cases.volumes import write_volume
from fedqc.task import Task, load_task


@pytest.fixture
def task() -> Task:
    return load_task("msd-hippocampus").model_copy(update={"size": (8, 8, 8)})


@pytest.fixture
def files(tmp_path: Path) -> CaseFiles:
    rng = np.random.default_rng(0)
    image, label = np.zeros((9, 8, 7), dtype=np.int16), np.zeros((9, 8, 7), dtype=np.uint8)
    image[1:8, 1:7, 1:6] = rng.integers(10, 1000, (7, 6, 5))
    label[2:6, 2:6, 2:5] = 2
    label[3:5, 3:5, 3] = 1
    write_volume(tmp_path / "image.nii.gz", image, np.eye(4))
    write_volume(tmp_path / "label.nii.gz", label, np.eye(4))
    return CaseFiles("a", "a", (tmp_path / "image.nii.gz",), tmp_path / "label.nii.gz")


def numbers(rows: list[Row]) -> list[float]:
    """The first number of each row."""
    assert all(str(row).count("|") == str(HEAD).count("|") for row in rows)
    return [float(re.match(r"[0-9.e+-]+", row.value)[0]) for row in rows]  # type: ignore[index]


def test_checking(files: CaseFiles, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_speed.by_processes([files], task, 1)
    monkeypatch.setattr(check_speed, "by_processes", lambda *_: None)  # each start takes a second
    rows = check_speed.compare_one_case(files, tmp_path, task, 1)
    assert rows[0].peer == "nibabel get_fdata of the same files"
    assert len(rows) == 3
    inflated = check_speed.compare_inflate("it", Listing(cases=[files]), tmp_path, task, 1)
    assert [row.what for row in inflated][:2] == ["inflate it, isal", "inflate it, gzip"]
    assert all(number >= 0 for number in numbers(rows) + numbers(inflated))


@pytest.mark.filterwarnings("ignore")  # MONAI's own deprecations are not ours to mend
def test_preprocessing_gives_the_same_voxels_as_monai(files: CaseFiles, task: Task) -> None:
    coarse = task.model_copy(update={"spacing": (1.5, 2.0, 1.25)})
    for each in (task, coarse):
        preprocess, cache, difference = numbers(check_speed.compare_with_monai("case", files, each, 1))
        assert min(preprocess, cache) >= 0
        assert difference < 1e-3


def test_memory_of_copies(files: CaseFiles, task: Task) -> None:
    (row,) = check_speed.compare_copies(files, task, (3,))
    assert re.fullmatch(r"[0-9.]+ s, [0-9]+ MiB", row.value)


def test_second_visits(tmp_path: Path) -> None:
    rows = check_speed.compare_visits(tmp_path, 5, 16)
    assert [row.what for row in rows] == [
        "check 5 cases of 16x16x16, 2 workers, first time",
        "second time, nothing changed",
        "third time, 5 files changed",
        "cache of 5 cases of 16x16x16, first time",
        "second time",
    ]
    assert len(list((tmp_path / "memory").glob("*.json"))) == 10  # five cases, each before and after
    assert len(find_cases(tmp_path / "data", load_task(str(tmp_path / "task.toml"))).cases) == 5
