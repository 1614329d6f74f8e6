"""`fedqc segment`: a trained model applied to a folder of cases."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.compute import Compute
from fedqc.config import QCConfig, SegmentationConfig
from fedqc.model import ModelCard, save_model
from fedqc.segmentation import Segmentation
from fedqc.task import Task, load_task

Run = Callable[..., int]
SHAPE = (18, 18, 18)


class Bright(nn.Module):
    """Says class 1 where a voxel is much brighter than its image's mean, and class 2 where much darker."""

    def __init__(self) -> None:
        super().__init__()
        self.limit = nn.Parameter(torch.tensor(1.2))

    def forward(self, image: Tensor) -> Tensor:
        score = image[:, :1] / self.limit
        return torch.cat([1 - score.abs(), score - 1, -score - 1], dim=1)


@pytest.fixture(autouse=True)
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Segmentation, "build", lambda *_: Bright())


def card(task: Task, **changes: Any) -> ModelCard:
    fields: dict[str, Any] = {
        "task": task,
        "stage": "segmentation",
        "segmentation": SegmentationConfig(channels=(4, 8)),
        "federation": "north",
        "seed": 0,
        "rounds": 1,
        "samples": 1,
        "sites": ("a",),
    }
    return ModelCard(**(fields | changes))


@pytest.fixture
def task(task_file: Path) -> Task:
    """Two label values for the first class; the first one is written."""
    return load_task(str(task_file)).model_copy(update={"classes": {"front": (3, 1), "back": (2,)}})


@pytest.fixture
def model(tmp_path: Path, task: Task) -> Path:
    save_model(tmp_path / "model", Bright().state_dict(), card(task))
    return tmp_path / "model"


def truth(number: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.uint8]:
    """A front half of 10x5x8 voxels and a back half of 10x4x8, somewhere else in every case."""
    label = np.zeros(shape, dtype=np.uint8)
    x = 2 + number
    label[x : x + 10, 4:9, 5:13] = 3
    label[x : x + 10, 9:13, 5:13] = 2
    return label


def shown(label: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An image whose brightness says the class; never 0."""
    return np.select([label == 3, label == 2], [100, 1], 50).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four cases in the csv layout: with a label, without, and lying otherwise in the scanner."""
    root = tmp_path / "images"
    root.mkdir()
    affine = np.array([[-1.0, 0, 0, 20], [0, -1, 0, 30], [0, 0, 1, -7], [0, 0, 0, 1]])
    rows = ["id,patient,T1,label"]
    for number, (placed, label) in enumerate(
        [(np.eye(4), True), (np.eye(4), False), (affine, True), (affine, False)]
    ):
        name = f"case-{number}"
        nibabel.save(nibabel.Nifti1Image(shown(truth(number)), placed), root / f"{name}.nii.gz")
        if label:
            nibabel.save(nibabel.Nifti1Image(truth(number), placed), root / f"{name}-label.nii.gz")
        rows.append(f"{name},p{number},{name}.nii.gz,{f'{name}-label.nii.gz' if label else ''}")
    (root / "cases.csv").write_text("\n".join(rows) + "\n")
    return root


def table(out: Path) -> list[dict[str, str]]:
    with (out / "segmentations.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_labels_lie_where_the_images_lie(
    fedqc: Run, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert fedqc("segment", "--model", model, "--data", folder, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {
        "segmentations.csv",
        *(f"case-{n}.nii.gz" for n in range(4)),
    }
    for number in range(4):
        made: Any = nibabel.load(out / f"case-{number}.nii.gz")
        image: Any = nibabel.load(folder / f"case-{number}.nii.gz")
        assert np.array_equal(np.asanyarray(made.dataobj), truth(number))
        assert np.array_equal(made.affine, image.affine)
        assert made.get_data_dtype() == np.uint8
    rows = table(out)
    assert list(rows[0]) == ["id", "patient", "ml.front", "ml.back", "dice.front", "dice.back", "dice"]
    assert [(row["id"], row["patient"]) for row in rows] == [(f"case-{n}", f"p{n}") for n in range(4)]
    assert {(row["ml.front"], row["ml.back"]) for row in rows} == {("0.4000", "0.3200")}
    assert [row["dice"] for row in rows] == ["1.0000", "", "1.0000", ""]
    assert rows[1]["dice.front"] == rows[1]["dice.back"] == ""
    printed = capsys.readouterr().out
    assert "segmenting: 4 of 4" in printed
    assert f"4 of 4 cases are segmented; see {out / 'segmentations.csv'}" in printed
    assert "mean of each case   2      1.000" in printed


def test_another_spacing_and_a_large_image(fedqc: Run, model: Path, tmp_path: Path) -> None:
    root, out = tmp_path / "images", tmp_path / "out"
    root.mkdir()
    affine = np.diag([0.5, 0.75, 2.0, 1.0])
    affine[:3, 3] = 5, -3, 8
    label = np.zeros((60, 44, 11), dtype=np.uint8)  # 30x33x22 mm: more than one window
    label[10:50, 8:22, 3:8] = 3
    label[10:50, 22:36, 3:8] = 2
    nibabel.save(nibabel.Nifti1Image(shown(label), affine), root / "a.nii")
    wrong = label.copy()
    wrong[:, 22:36] = 0  # a label without its back half
    nibabel.save(nibabel.Nifti1Image(wrong, affine), root / "label.nii")
    (root / "cases.csv").write_text("id,T1,label\na,a.nii,label.nii\n")
    assert fedqc("segment", "--model", model, "--data", root, "--layout", "csv", "--out", out) == 0
    made: Any = nibabel.load(out / "a.nii.gz")
    found = np.asanyarray(made.dataobj)
    assert found.shape == label.shape
    assert np.allclose(made.affine, affine)
    for value in (2, 3):
        both = ((found == value) & (label == value)).sum()
        assert 2 * both / ((found == value).sum() + (label == value).sum()) > 0.9
    (row,) = table(out)
    assert float(row["ml.back"]) == pytest.approx((found == 2).sum() * 0.75 / 1000, abs=1e-4)
    dice = 2 * ((found == 3) & (wrong == 3)).sum() / ((found == 3).sum() + (wrong == 3).sum())
    assert float(row["dice.front"]) == pytest.approx(dice, abs=1e-4)
    assert (row["dice.back"], row["dice"]) == ("0.0000", row["dice.front"])  # no back half in the label


def test_large_label_values_fit(fedqc: Run, folder: Path, task: Task, tmp_path: Path) -> None:
    many = task.model_copy(update={"classes": {"front": (3,), "back": (2, 700)}})
    more = task.model_copy(update={"classes": {"front": (700, 3), "back": (2,)}})
    for name, which, dtype in (("many", many, np.uint8), ("more", more, np.uint16)):
        save_model(tmp_path / name, Bright().state_dict(), card(which))
        out = tmp_path / f"out-{name}"
        assert fedqc("segment", "--model", tmp_path / name, "--data", folder, "--out", out) == 0
        made: Any = nibabel.load(out / "case-0.nii.gz")
        assert made.get_data_dtype() == dtype
        first = which.classes["front"][0]
        assert np.array_equal(np.asanyarray(made.dataobj) == first, truth(0) == 3)


def test_broken_cases_are_named_and_the_others_go_on(
    fedqc: Run, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (folder / "case-1.nii.gz").write_bytes((folder / "case-1.nii.gz").read_bytes()[:-100])
    nibabel.save(nibabel.Nifti1Image(truth(2) + 7, np.eye(4)), folder / "case-2-label.nii.gz")
    with (folder / "cases.csv").open("a") as file:
        file.write("case-3,p3,case-3.nii.gz,\ncase-4,p4,nowhere.nii.gz,\n")
    assert fedqc("segment", "--model", model, "--data", folder, "--out", out) == 0
    assert [row["id"] for row in table(out)] == ["case-0", "case-2"]
    assert table(out)[1]["dice"] == ""  # its label cannot be used, its image can
    lines = capsys.readouterr().out.splitlines()
    left_out = [line for line in lines if line.startswith("left out: ")]
    unused = [line for line in lines if line.startswith("label not used: ")]
    for words in (
        ("case case-1, ", "its compressed data end too early", "export or copy the file again"),
        ("case case-3, ", "found 2 cases with this id", "give each case an id of its own"),
        ("case case-4, ", "no such file", "restore the file"),
    ):
        assert any(all(word in line for word in words) for line in left_out)
    assert len(left_out) == 4  # case-3 is there twice
    assert len(unused) == 2  # its values, and where it lies
    assert all("case case-2, " in line for line in unused)
    assert any(line.startswith("2 of 6 cases are segmented") for line in lines)


@pytest.mark.parametrize("voxel", [20.0, 1.0])
def test_a_case_too_large_for_the_memory(
    fedqc: Run,
    *,
    voxel: float,
    model: Path,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A voxel of 2 cm would be 8,000 of the task's."""
    monkeypatch.setattr("fedqc.inference.MAX_VOXELS", 10**6)
    affine = np.diag([voxel, voxel, voxel, 1])
    nibabel.save(nibabel.Nifti1Image(shown(truth(0)), affine), folder / "case-1.nii.gz")
    predict = Segmentation.predict

    def full(self: Segmentation, network: nn.Module, image: NDArray[np.float32], compute: Compute) -> Any:
        if image.shape[1:] == (17, 18, 18):  # case 3
            # PyTorch's own way to say so on a CPU is another one.
            raise MemoryError if voxel == 1 else RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return predict(self, network, image, compute)

    empty_slice = shown(truth(3))
    empty_slice[-1] = 0
    nibabel.save(nibabel.Nifti1Image(empty_slice, np.eye(4)), folder / "case-3.nii.gz")
    monkeypatch.setattr(Segmentation, "predict", full)
    assert fedqc("segment", "--model", model, "--data", folder, "--out", tmp_path / "out") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    names = ["case-3"] if voxel == 1 else ["case-1", "case-3"]
    for line, name in zip(lines, names, strict=True):
        assert f"{name}.nii.gz: found an image of shape 18x18x18 that is too large" in line
        assert "expected one that fits at 1x1x1 mm; look whether the voxel size" in line


# ---------------------------------------------------------------------------------------------- wrong input


@pytest.fixture
def refused(fedqc: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run `fedqc segment` on something that cannot work; the result is the sentence it printed."""

    def run(model: Path, data: Path, *options: object) -> str:
        out = tmp_path / "out"
        assert fedqc("segment", "--model", model, "--data", data, "--out", out, *options) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert not out.exists()
        return message

    return run


def test_no_model(refused: Callable[..., str], folder: Path) -> None:
    assert f"{folder}: not a model: No such file" in refused(folder, folder)


def test_a_qc_model(refused: Callable[..., str], folder: Path, task: Task, tmp_path: Path) -> None:
    qc = card(task, stage="qc", qc=QCConfig(), segmentation=None)
    save_model(tmp_path / "qc", Bright().state_dict(), qc)
    message = refused(tmp_path / "qc", folder)
    assert f"{tmp_path / 'qc'}: a QC model, expected a segmentation model" in message


def test_other_modalities(
    refused: Callable[..., str], folder: Path, data: Path, task: Task, tmp_path: Path
) -> None:
    two = task.model_copy(update={"modalities": ("T1", "FLAIR")})
    save_model(tmp_path / "two", Bright().state_dict(), card(two))
    message = refused(tmp_path / "two", folder)
    assert str(folder / "cases.csv") in message
    assert "FLAIR" in message
    message = refused(tmp_path / "two", data)
    assert str(data / "dataset.json") in message
    assert "T1, FLAIR" in message


def test_no_usable_case(refused: Callable[..., str], model: Path, folder: Path) -> None:
    for path in folder.glob("case-?.nii.gz"):
        path.write_text("no image")
    message = refused(model, folder)
    assert f"{folder}: none of 4 cases can be used; the first problem: case case-0" in message


def test_no_data(refused: Callable[..., str], model: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused(model, tmp_path / "nowhere")


def test_device_that_is_not_there(refused: Callable[..., str], model: Path, folder: Path) -> None:
    assert "device 'cuda:99': this machine has" in refused(model, folder, "--device", "cuda:99")


def test_nothing_is_written_over(
    fedqc: Run, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, file = tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "case-0.nii.gz").write_text("years of work")
    file.write_text("more work")
    for out in (full, file):
        assert fedqc("segment", "--model", model, "--data", folder, "--out", out) == 2
        assert f"{out}: is not an empty folder; nothing is written over" in capsys.readouterr().err
    assert (full / "case-0.nii.gz").read_text() == "years of work"
    assert fedqc("segment", "--model", model, "--data", folder, "--out", folder / "labels") == 2
    assert "lies inside the data folder" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.real_data
def test_a_real_case(fedqc: Run, real_data: Path, tmp_path: Path) -> None:
    source, root = real_data / "Task04_Hippocampus", tmp_path / "images"
    listed = json.loads((source / "dataset.json").read_text())
    name = Path(listed["training"][0]["image"]).name
    for folder in ("imagesTr", "labelsTr"):
        (root / folder).mkdir(parents=True)
        (root / folder / name).write_bytes((source / folder / name).read_bytes())
    listed["training"] = [{"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"}]
    (root / "dataset.json").write_text(json.dumps(listed))
    save_model(tmp_path / "model", Bright().state_dict(), card(load_task("msd-hippocampus")))
    out = tmp_path / "out"
    assert fedqc("segment", "--model", tmp_path / "model", "--data", root, "--out", out) == 0
    made: Any = nibabel.load(out / name)
    image: Any = nibabel.load(root / "imagesTr" / name)
    assert made.shape == image.shape
    assert np.allclose(made.affine, image.affine)
    (row,) = table(out)
    assert 0 < float(row["dice"]) < 1
