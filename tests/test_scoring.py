"""What is written of cases that a model judges: known scores of a method that needs no training."""

import csv
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc import scoring
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.errors import DataError, ModelError
from fedqc.methods.base import Method, RoundResult, Score
from fedqc.model import ModelCard, StoredModel
from fedqc.scoring import judge, score_cases, write_error_map, write_error_maps
from fedqc.task import Task

CPU = Compute(torch.device("cpu"), torch.float32)
SHAPE = (12, 10, 9)
FLIPPED = np.array([[0, -2.0, 0, 9], [1, 0, 0, -5], [0, 0, 1, 3], [0, 0, 0, 1]])
"""The first axis of a file runs to the front, the second, of 2 mm, to the left."""


class ByNumber(Method):
    """Quality is the case's number in tenths; wrong is what is labelled, with a probability of 0.296."""

    name = "by-number"
    judges = "label"
    maps = True
    order = 1

    def build(self, seed: int) -> nn.Module:
        return nn.Identity()

    def train_round(self, *_: Any, **__: Any) -> RoundResult:
        raise AssertionError("nobody trains it here")

    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        for case in list(cases)[:: self.order] if self.order != 1 else cases:
            quality = int(case.id) / 10
            error = (case.label > 0).astype(np.float32) * np.float32(0.296) if self.maps else None
            yield Score(case.id, quality, {"left": quality / 2}, error)


@pytest.fixture
def task() -> Task:
    return Task(
        name="blocks",
        modalities=("T1",),
        classes={"left": (1,), "right": (2,)},
        regions={"left": ("left",), "right": ("right",)},
        spacing=(1.0, 1.0, 1.0),
        size=(24, 24, 16),
    )


def label_of(number: int) -> NDArray[np.uint8]:
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[1 + number % 4 : 6, 3:7, 2:6] = 1
    label[6:9, 3:7, 2:6] = 2
    return label


@pytest.fixture
def cases(tmp_path: Path) -> list[CaseFiles]:
    """Cases 7, 2, 5 and so on, in no order, of patients of their own."""
    made = []
    for number in (7, 2, 5, 9, 1, 4, 3, 8, 6, 0):
        paths = [tmp_path / "data" / f"{number}-{kind}.nii.gz" for kind in ("image", "label")]
        paths[0].parent.mkdir(exist_ok=True)
        label = label_of(number)
        nibabel.save(nibabel.Nifti1Image(50 + label.astype(np.float32), FLIPPED), paths[0])
        nibabel.save(nibabel.Nifti1Image(label, FLIPPED), paths[1])
        made.append(CaseFiles(str(number), f"p{number}", (paths[0],), paths[1]))
    return made


def stored(task: Task, **changes: Any) -> StoredModel:
    qc = QCConfig()
    card = ModelCard(task=task, qc=qc, federation="", seed=0, rounds=1, samples=1, sites=())
    method = ByNumber(task, qc)
    for name, value in changes.items():
        setattr(method, name, value)
    return StoredModel(card, method, nn.Identity(), "0" * 64)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_keeps_the_order_of_the_cases(task: Task, cases: list[CaseFiles], tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    scored, left_out = score_cases(
        stored(task), cases, tmp_path / "out", CPU, lambda *step: told.append(step)
    )
    assert left_out == []
    assert [one.files for one in scored] == cases
    assert [one.quality for one in scored] == [int(files.id) / 10 for files in cases]
    assert told == [(done, 10) for done in range(1, 11)]
    table = rows(tmp_path / "out")
    assert list(table[0]) == ["id", "patient", "quality", "left", "right", "qi"]
    assert [(row["id"], row["patient"]) for row in table] == [(one.id, one.patient) for one in cases]
    assert table[0] == {
        "id": "7",
        "patient": "p7",
        "quality": "0.700000",
        "left": "0.350000",
        "right": "",
        "qi": "1.000000",
    }


def test_error_maps_lie_on_the_files_own_grid(task: Task, cases: list[CaseFiles], tmp_path: Path) -> None:
    score_cases(stored(task), cases[:2], tmp_path / "out", CPU)
    for files in cases[:2]:
        made: Any = nibabel.load(tmp_path / "out" / "error_maps" / f"{files.id}.nii.gz")
        found = np.asanyarray(made.dataobj)
        assert (found.dtype, found.shape) == (np.uint8, SHAPE)
        assert np.array_equal(made.affine, FLIPPED)
        label = label_of(int(files.id))
        inside = np.zeros(SHAPE, dtype=bool)
        inside[2:5, 4:6, 3:5] = True  # away from the edge, which is interpolated from 1 mm to 2 mm
        assert set(found[inside & (label > 0)]) == {30}
        assert not found[:, :2].any()


@pytest.mark.parametrize(("probability", "per_cent"), [(0.0, 0), (0.004, 0), (0.996, 100), (1.2, 100)])
def test_per_cent(
    task: Task, cases: list[CaseFiles], tmp_path: Path, probability: float, per_cent: int
) -> None:
    case = preprocess(cases[0], task)
    write_error_map(tmp_path / "a.nii.gz", np.full(task.size, probability, dtype=np.float32), case)
    made: Any = nibabel.load(tmp_path / "a.nii.gz")
    assert set(np.unique(made.dataobj)) == {per_cent}


def test_error_maps_are_interpolated(task: Task, cases: list[CaseFiles], tmp_path: Path) -> None:
    """Four per cent more with each millimetre to the right; a voxel of 2 mm lies between two of 1 mm."""
    case = preprocess(cases[0], task)
    ramp = np.broadcast_to(0.04 * np.arange(24, dtype=np.float32)[:, None, None], task.size)
    write_error_map(tmp_path / "a.nii.gz", ramp, case)
    made: Any = nibabel.load(tmp_path / "a.nii.gz")
    right = 9 - 2.0 * np.arange(SHAPE[1])  # mm, along the second axis of the file
    expected = 4 * (right - case.affine[0, 3])
    assert (expected % 4 == 2).all()
    assert np.array_equal(np.asanyarray(made.dataobj)[6, :, 4], expected)


def test_error_maps_of_classes_lie_beside_that_of_the_label(
    task: Task, cases: list[CaseFiles], tmp_path: Path
) -> None:
    case = preprocess(cases[0], task)
    whole, left = (np.full(task.size, value, dtype=np.float32) for value in (0.5, 0.25))
    write_error_maps(tmp_path / "maps", Score(case.id, 1.0, {}, whole, {"left": left}), case)
    found = {
        path.relative_to(tmp_path / "maps").as_posix(): np.unique(nibabel.load(path).dataobj).tolist()  # type: ignore[attr-defined]
        for path in (tmp_path / "maps").rglob("*.nii.gz")
    }
    assert found == {"7.nii.gz": [50], "left/7.nii.gz": [25]}


def test_a_method_without_error_maps(task: Task, cases: list[CaseFiles], tmp_path: Path) -> None:
    scored, _ = score_cases(stored(task, maps=False), cases, tmp_path / "out", CPU)
    assert len(scored) == 10
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["scores.csv"]


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (DataError("a sentence"), "a sentence"),
        (MemoryError(), "case 5: does not fit into memory at the task's spacing; look whether the voxel"),
    ],
)
def test_a_case_that_cannot_be_read_does_not_stop_the_others(
    *,
    task: Task,
    cases: list[CaseFiles],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
    sentence: str,
) -> None:
    def breaking(files: CaseFiles, task: Task) -> Case:
        if files.id == "5":
            raise error
        return preprocess(files, task)

    monkeypatch.setattr(scoring, "preprocess", breaking)
    told: list[tuple[int, int]] = []
    scored, (left_out,) = score_cases(
        stored(task), cases, tmp_path / "out", CPU, lambda *step: told.append(step)
    )
    assert left_out.startswith(sentence)
    assert [one.files.id for one in scored] == [files.id for files in cases if files.id != "5"]
    assert [row["id"] for row in rows(tmp_path / "out")] == [one.files.id for one in scored]
    assert told[-1] == (10, 10)


def test_a_case_that_cannot_be_judged_does_not_stop_the_others(
    task: Task, cases: list[CaseFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        ByNumber, "cannot_judge", lambda _, files: "case 5: with nobody" if files.id == "5" else None
    )
    told: list[tuple[int, int]] = []
    scored, left_out = score_cases(
        stored(task), cases, tmp_path / "out", CPU, lambda *step: told.append(step)
    )
    assert left_out == ["case 5: with nobody"]
    assert [one.files.id for one in scored] == [files.id for files in cases if files.id != "5"]
    assert told[-1] == (10, 10)


def test_a_model_without_references_to_compare_with_is_refused_up_front(
    task: Task, cases: list[CaseFiles], tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="2 patients or more; found those of 0 in the model's card"):
        score_cases(stored(task, needs_references=True), cases, tmp_path / "out", CPU)
    assert not (tmp_path / "out").exists()


def test_what_is_cut_off_leaves_the_rows_of_what_it_did(
    task: Task, cases: list[CaseFiles], tmp_path: Path
) -> None:
    def stopping(done: int, _: int) -> None:
        if done == 3:
            assert len(rows(tmp_path / "out")) == 3
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_cases(stored(task), cases, tmp_path / "out", CPU, stopping)
    assert [row["id"] for row in rows(tmp_path / "out")] == ["7", "2", "5"]


def test_where_nothing_is_scored_nothing_is_left(
    task: Task, cases: list[CaseFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder can be named again."""
    model = stored(task)

    def refusing(*_: object) -> Iterator[Score]:
        raise DataError("no reference case of another patient")
        yield

    monkeypatch.setattr(model.method, "score", refusing)
    with pytest.raises(DataError, match="no reference case"):
        score_cases(model, cases, tmp_path / "out", CPU)
    assert not any((tmp_path / "out").iterdir())


def test_few_cases_are_in_memory(
    task: Task, cases: list[CaseFiles], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images: list[weakref.ref[NDArray[np.float32]]] = []
    most = 0

    def watched(files: CaseFiles, task: Task) -> Case:
        nonlocal most
        case = preprocess(files, task)
        images.append(weakref.ref(case.image))
        most = max(most, sum(image() is not None for image in images))
        return case

    monkeypatch.setattr(scoring, "preprocess", watched)
    score_cases(stored(task), cases, tmp_path / "out", CPU)
    assert len(images) == 10
    assert most <= 3


def test_a_method_that_changes_the_order_is_caught(task: Task, cases: list[CaseFiles]) -> None:
    model = stored(task, order=-1)
    read = [preprocess(files, task) for files in cases[:2]]
    with pytest.raises(ModelError, match="'by-number' scored '2' where '7' was due"):
        list(judge(model.method, model.network, read, CPU))
