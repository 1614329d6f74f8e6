"""`fedqc.load_model(...).score(...)`: whatever a case is given as, the model sees the same."""

import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import fedqc
from fedqc.api import QCModel, VolumeLike
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess, to_native
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import NetworkConfig, QCConfig
from fedqc.errors import ConfigError, DataError, ModelError
from fedqc.methods.base import Score, get_method
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.model import ModelCard, load_model, save_model
from fedqc.task import Task

DOCS = Path(__file__).resolve().parents[1] / "docs"
CPU = Compute(torch.device("cpu"), torch.float32)
SHAPE = (18, 14, 20)
FLIPPED = np.array([[0, -1.5, 0, 9], [1, 0, 0, -5], [0, 0, -1, 3], [0, 0, 0, 1]])
"""The first axis of a file runs to the front, the second, of 1.5 mm, to the left, the third down."""


def task_of(*modalities: str) -> Task:
    return Task(
        name="blocks",
        modalities=modalities,
        classes={"left": (1, 4), "right": (2,)},
        regions={"left": ("left",), "both": ("left", "right")},
        spacing=(1.0, 1.0, 1.0),
        size=(16, 16, 16),
    )


def stored(folder: Path, *modalities: str) -> Path:
    """A tiny model that was not trained: scores are the network's, whatever they mean."""
    task = task_of(*modalities)
    qc = QCConfig(network=NetworkConfig(width=4, blocks=(1, 1)))
    card = ModelCard(task=task, qc=qc, federation="", seed=0, rounds=0, samples=0, sites=())
    save_model(folder, get_method("qcresunet")(task, qc).build(3).state_dict(), card)
    return folder


def opened(folder: Path) -> QCModel:
    return fedqc.load_model(folder, device="cpu", precision="fp32")


@pytest.fixture
def model(tmp_path: Path) -> QCModel:
    return opened(stored(tmp_path / "qc", "T1", "FLAIR"))


@pytest.fixture
def arrays() -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """An image [2, X, Y, Z] and its label."""
    rng = np.random.default_rng(2)
    label = np.zeros(SHAPE, dtype=np.uint8)
    label[4:9, 3:9, 6:14] = 4
    label[9:13, 3:9, 6:14] = 2
    image = rng.uniform(10, 20, (2, *SHAPE)) + 30 * np.stack([label > 0, label == 2])
    return image.astype(np.float32), label


@pytest.fixture
def files(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]) -> dict[str, Path]:
    """The same in files: each modality, both in one, and the label."""
    image, label = arrays
    content = {"T1": image[0], "FLAIR": image[1], "both": np.moveaxis(image, 0, -1), "label": label}
    paths = {name: tmp_path / f"{name}.nii.gz" for name in content}
    for name, data in content.items():
        nibabel.save(nibabel.Nifti1Image(data, FLIPPED), paths[name])
    return paths


def same(one: Score, other: Score) -> bool:
    assert one.error_map is not None
    assert other.error_map is not None
    is_same = one.quality == other.quality and one.regions == other.regions
    return is_same and np.array_equal(one.error_map, other.error_map)


def test_files_and_arrays_come_to_the_same(
    model: QCModel, files: dict[str, Path], arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]
) -> None:
    image, label = arrays
    one_file = model.score(str(files["both"]), files["label"])
    modalities = {"FLAIR": files["FLAIR"], "T1": files["T1"]}
    mixed: Mapping[str, VolumeLike] = {"T1": image[0], "FLAIR": files["FLAIR"]}
    in_other_ways = [
        model.score(modalities, files["label"]),
        model.score(image, label, affine=FLIPPED),
        model.score(image.astype(np.float64), label.astype(np.int64), affine=FLIPPED.tolist()),
        model.score(np.asfortranarray(image), label.astype(np.float16), affine=FLIPPED),
        model.score({"T1": image[0], "FLAIR": image[1]}, label, affine=FLIPPED),
        model.score(files["both"], label),  # on the grid of the file
        model.score(image, files["label"]),
        model.score(mixed, label),
    ]
    assert all(same(one_file, other) for other in in_other_ways)
    assert not same(one_file, model.score(image[::-1], label, affine=FLIPPED))


def test_what_the_method_says_of_the_case_on_its_own_grid(model: QCModel, files: dict[str, Path]) -> None:
    found = model.score(files["both"], files["label"])
    read = load_model(files["label"].parent / "qc")
    case = preprocess(CaseFiles("a", "p", (files["both"],), files["label"]), read.card.task)
    (expected,) = read.method.score(read.network, [case], CPU)
    assert expected.error_map is not None
    assert (found.quality, found.regions) == (expected.quality, expected.regions)
    assert found.error_map is not None
    assert found.error_map.dtype == np.float32
    assert found.error_map.shape == SHAPE
    assert np.array_equal(found.error_map, to_native(expected.error_map, case, order=1))
    assert list(found.regions) == ["left", "both"]
    assert 0 < found.quality < 1


def test_arrays_without_a_place_have_the_tasks_spacing(
    model: QCModel, arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]
) -> None:
    image, label = arrays
    plain = model.score(image, label)
    assert same(plain, model.score(image, label, affine=np.eye(4)))
    assert same(plain, model.score(image, label, spacing=(1, 1, 1)))
    wide = model.score(image, label, spacing=(1, 1.5, 1))
    assert not same(plain, wide)
    assert same(wide, model.score(image, label, affine=np.diag([1, 1.5, 1, 1])))


def test_a_single_modality(tmp_path: Path, arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]) -> None:
    image, label = arrays
    model = opened(stored(tmp_path / "single", "T1"))
    path = tmp_path / "scan.nii"
    nibabel.save(nibabel.Nifti1Image(image[0], np.eye(4)), path)
    assert same(model.score(image[:1], label), model.score(path, label))
    assert same(model.score(image[:1], label == 4), model.score({"T1": path}, (label == 4).astype(np.int32)))


def test_error_maps_of_classes_lie_on_the_same_grid(
    model: QCModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def with_classes(*_: Any) -> Any:
        ones = np.ones((16, 16, 16), dtype=np.float32)
        yield Score("", 0.5, {}, None, {"left": ones})

    monkeypatch.setattr(QCResUNetMethod, "score", with_classes)
    found = model.score(files["both"], files["label"])
    assert found.error_map is None
    assert found.class_error_maps["left"].shape == SHAPE


def test_the_method_is_told_whose_label_it_judges(
    model: QCModel, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def asking(_: object, __: object, cases: Iterable[Case], *___: object) -> Iterator[Score]:
        for case in cases:
            seen.append(case.patient)
            yield Score("", 0.5, {})

    monkeypatch.setattr(QCResUNetMethod, "score", asking)
    model.score(files["both"], files["label"])
    model.score(files["both"], files["label"], patient="sub-07")
    assert seen == ["", "sub-07"]


# ------------------------------------------------------------------------------------------ what is refused


def test_models_that_cannot_be_loaded(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: not a model: No such file"):
        fedqc.load_model(tmp_path / "nowhere")
    stored(tmp_path / "qc", "T1")
    with pytest.raises(ConfigError, match="load_model: device: a device is 'auto'"):
        fedqc.load_model(tmp_path / "qc", device="gpu")
    with pytest.raises(ConfigError, match=r"load_model: precision: .*'fp32'"):
        fedqc.load_model(str(tmp_path / "qc"), precision="fp16")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"image": np.ones(SHAPE)}, "image: found an array of shape 18 x 14 x 20, expected 2 x X x Y x Z"),
        ({"image": np.ones((3, *SHAPE))}, "give it the modalities of task 'blocks' as first axis: T1, FLAIR"),
        ({"image": np.zeros((2, *SHAPE))}, "image: found nothing but the value 0 of T1, expected an image"),
        ({"image": {"T1": np.ones(SHAPE)}}, "image: 'FLAIR' is missing; the modalities of task 'blocks' are"),
        ({"image": {"T1": "a", "FLAIR": "b", "T2": "c"}}, "image: 'T2' is unknown; the modalities of"),
        ({"image": "nowhere.nii.gz"}, "nowhere.nii.gz: there is no such file"),
        ({"label": "nowhere.nii.gz"}, "nowhere.nii.gz: there is no such file"),
        (
            {"label": np.full(SHAPE, 7)},
            "label: found label value 7 in 5040 voxels, expected one of 0, 1, 2, 4",
        ),
        (
            {"label": np.ones(SHAPE) / 2},
            "label: found label value 0.5 in 5040 voxels, expected whole numbers",
        ),
        ({"label": np.zeros(SHAPE)}, "label: found a label without any marked voxel"),
        (
            {"label": np.ones((18, 14, 19))},
            "label: found shape 18x14x19, expected 18x14x20 as in image; bring",
        ),
        ({"label": np.ones((18, 14))}, "label: found an array of float64 and shape 18 x 14, expected real"),
        (
            {"label": np.ones((*SHAPE, 2))},
            "label: found a label of shape 18x14x20x2, expected three dimensions",
        ),
        (
            {"label": np.full(SHAPE, "x")},
            "label: found an array of <U1 and shape 18 x 14 x 20, expected real",
        ),
        ({"spacing": (1, 1, 1), "affine": np.eye(4)}, "affine and spacing both say where arrays lie"),
        ({"spacing": (1, 1)}, "spacing: found (1, 1), expected three numbers above 0, in mm"),
        ({"spacing": (1, -1, 1)}, "spacing: found (1, -1, 1), expected three numbers above 0, in mm"),
        ({"affine": np.zeros((4, 4))}, "affine: found no matrix of 4 x 4 numbers with an inverse"),
        ({"affine": np.eye(3)}, "affine: found no matrix of 4 x 4 numbers with an inverse"),
        ({"spacing": (1, 1, 40)}, "image: found voxels of 1 x 1 x 40 mm, expected sides of 0.05 to 20 mm"),
    ],
)
def test_what_cannot_be_judged_is_said_in_a_sentence(
    model: QCModel,
    arrays: tuple[NDArray[np.float32], NDArray[np.uint8]],
    change: dict[str, Any],
    sentence: str,
) -> None:
    given: dict[str, Any] = {"image": arrays[0], "label": arrays[1], **change}
    with pytest.raises(DataError, match=re.escape(sentence)) as refused:
        model.score(**given)
    assert "fedqc-" not in str(refused.value)  # nothing of the folder in which arrays are kept


def test_files_know_where_they_lie(
    model: QCModel, files: dict[str, Path], arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]
) -> None:
    with pytest.raises(DataError, match="affine and spacing are for arrays, and files know where they lie"):
        model.score(files["both"], files["label"], affine=np.eye(4))
    with pytest.raises(DataError, match=r"label: found axes RAS, expected ALI as in both\.nii\.gz"):
        model.score(files["both"], arrays[1], affine=np.eye(4))


def test_nothing_is_left_behind(
    model: QCModel,
    arrays: tuple[NDArray[np.float32], NDArray[np.uint8]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    aside = tmp_path / "aside"
    aside.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(aside))
    model.score(*arrays)
    with pytest.raises(DataError):
        model.score(arrays[0], arrays[1] + 10)
    assert list(aside.iterdir()) == []


# -------------------------------------------------------------------------------------------------- the docs


def test_the_snippet_of_the_guide_runs(
    tmp_path: Path,
    arrays: tuple[NDArray[np.float32], NDArray[np.uint8]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = (DOCS / "how-to" / "score.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    image, label = arrays
    stored(tmp_path / "models" / "qc", "T1")
    nibabel.save(nibabel.Nifti1Image(image[0], np.eye(4)), tmp_path / "scan.nii.gz")
    nibabel.save(nibabel.Nifti1Image(label, np.eye(4)), tmp_path / "label.nii.gz")
    monkeypatch.chdir(tmp_path)
    content: dict[str, Any] = {}
    exec(snippet, content)  # noqa: S102 - it is ours
    assert content["score"].error_map.shape == SHAPE
    assert 0 <= content["worst"] <= 1
    assert capsys.readouterr().out.startswith(f"{content['score'].quality} {{'left': ")


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import fedqc, sys; print([name for name in ('torch', 'numpy', 'pydantic') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_torch_tensors_are_arrays(
    model: QCModel, arrays: tuple[NDArray[np.float32], NDArray[np.uint8]]
) -> None:
    image, label = arrays
    given: Any = torch.from_numpy(image), torch.from_numpy(label)
    assert same(model.score(*given), model.score(image, label))
