import json
from pathlib import Path
from typing import Any

import pytest

from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.layouts.msd import MsdLayout
from fedqc.cases.layouts.nnunet import NnunetLayout
from fedqc.task import Task, load_task
from tests.cases.layouts.trees import cases_in, make_files, only_problem, refusal, write_json


def write_dataset(folder: Path, **changes: Any) -> Path:
    """A dataset.json with two cases, unsorted; the files themselves are not needed. None takes a key out."""
    dataset = {
        "modality": {"0": "MRI"},
        "numTraining": 2,
        "training": [
            {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
            {"image": "imagesTr/a.nii", "label": "labelsTr/a.nii"},
        ],
        **changes,
    }
    return write_json(folder, {key: value for key, value in dataset.items() if value is not None})


def test_cases_sorted_by_id(tmp_path: Path, task: Task) -> None:
    write_dataset(tmp_path)
    first, second = cases_in(tmp_path, task)
    assert first == CaseFiles(
        id="a", patient="a", images=(tmp_path / "imagesTr" / "a.nii",), label=tmp_path / "labelsTr" / "a.nii"
    )
    assert second.id == "b"
    assert second.images == (tmp_path / "imagesTr" / "b.nii.gz",)
    assert find_cases(tmp_path, task).layout == "msd"


def test_a_file_that_is_not_listed(tmp_path: Path, task: Task) -> None:
    write_dataset(tmp_path)
    make_files(tmp_path, "imagesTr/b.nii.gz", "imagesTr/c.nii.gz", "imagesTr/notes.txt", "labelsTr/a.nii")
    make_files(tmp_path, "imagesTs/d.nii.gz", "imagesTr/.e.nii.gz")
    problem = only_problem(tmp_path, task)
    assert (problem.code, problem.file) == ("unexpected-file", tmp_path / "imagesTr" / "c.nii.gz")
    assert "dataset.json does not list" in problem.found


def test_case_without_label(tmp_path: Path, task: Task) -> None:
    (case,) = cases_in(write_dataset(tmp_path, numTraining=1, training=[{"image": "a.nii.gz"}]), task)
    assert case.label is None


@pytest.mark.parametrize(
    "channels",
    [
        {"modality": {"0": "T1", "1": "FLAIR"}},
        {"modality": None, "channel_names": {"0": "t1w", "1": "Flair"}},
        {"modality": ["T1", "FLAIR"]},
        {"modality": {"0": "MRI", "1": "MRI"}},  # says nothing: as they come
        {"modality": {"0": "T1", "1": "other"}},
    ],
)
def test_all_modalities_in_one_image(tmp_path: Path, two_modalities: Task, channels: dict[str, Any]) -> None:
    first, _ = cases_in(write_dataset(tmp_path, **channels), two_modalities)
    assert first.images == (tmp_path / "imagesTr" / "a.nii",)


def test_modalities_in_another_order_than_the_task(tmp_path: Path, two_modalities: Task) -> None:
    write_dataset(tmp_path, modality={"0": "flair", "1": "T1w"})
    assert refusal(tmp_path, two_modalities) == (
        f"{tmp_path / 'dataset.json'}: the images hold flair, T1w, task 'blobs' needs T1, FLAIR in this "
        "order; write a task with the modalities in the order of the images, or use one file for each with "
        "another layout"
    )


def test_other_modalities_than_the_task(tmp_path: Path, two_modalities: Task) -> None:
    message = refusal(write_dataset(tmp_path), two_modalities)
    assert message == (
        f"{tmp_path / 'dataset.json'}: 'modality' lists 1 (MRI), task 'blobs' needs 2 (T1, FLAIR); "
        "choose the task that fits the data"
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"modality": None}, "neither 'modality' nor 'channel_names' is there; list the images' modalities"),
        ({"modality": "MRI"}, "list the images' modalities"),
        ({"modality": {"1": "MRI"}}, "channels are numbered 1, expected 0"),
        ({"training": []}, "'training' is no list of cases"),
        ({"training": "a.nii.gz"}, "'training' is no list of cases"),
        ({"training": ["a.nii.gz"]}, "training[0]: no text under 'image'"),
        ({"training": [{"label": "a.nii.gz"}]}, "training[0]: no text under 'image'"),
        ({"training": [{"image": "a.nii.gz", "label": 3}]}, "training[0]: 'label' is 3"),
    ],
)
def test_broken_dataset_json(tmp_path: Path, task: Task, changes: dict[str, Any], part: str) -> None:
    message = refusal(write_dataset(tmp_path, **changes), task)
    assert message.startswith(str(tmp_path / "dataset.json"))
    assert part in message


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000, "9" * 5000])
def test_dataset_json_that_is_no_json_object(tmp_path: Path, task: Task, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    assert refusal(tmp_path, task).startswith(str(tmp_path / "dataset.json"))


@pytest.mark.parametrize(
    ("entry", "code", "found"),
    [
        ({"image": ".nii.gz"}, "invalid-id", "the id ''"),
        ({"image": "-rf.nii.gz"}, "invalid-id", "the id '-rf'"),
        ({"image": "../a.nii"}, "path-outside", "the path '../a.nii'"),
        ({"image": "a.nii", "label": "/l.nii"}, "path-outside", "the path '/l.nii'"),
    ],
)
def test_one_bad_case_stops_no_other(
    tmp_path: Path, task: Task, entry: dict[str, Any], code: str, found: str
) -> None:
    write_dataset(tmp_path, training=[{"image": "good.nii"}, entry])
    problem = only_problem(tmp_path, task)
    assert problem.code == code
    assert problem.found == f"{found} in {tmp_path / 'dataset.json'}: training[1]"
    assert len(find_cases(tmp_path, task).cases) == 2


def test_wrong_number_of_cases(tmp_path: Path, task: Task) -> None:
    problem = only_problem(write_dataset(tmp_path, numTraining=3), task)
    assert (problem.code, problem.case, problem.file) == ("case-count", None, tmp_path / "dataset.json")
    assert (problem.found, problem.expected) == ("2 cases", "3 as 'numTraining' says")


def test_values_that_mean_something_else(tmp_path: Path, task: Task) -> None:
    problem = only_problem(write_dataset(tmp_path, labels={"0": "background", "2": "Core"}), task)
    assert (problem.code, problem.file) == ("label-convention", tmp_path / "dataset.json")


def test_images_numbered_like_channels(tmp_path: Path, task: Task) -> None:
    names = [f"scan_{number:04d}.nii.gz" for number in range(3)]
    make_files(tmp_path, *(f"imagesTr/{name}" for name in names))
    write_dataset(tmp_path, numTraining=3, training=[{"image": f"./imagesTr/{name}"} for name in names])
    assert not NnunetLayout.detect(tmp_path)
    assert [case.id for case in cases_in(tmp_path, task)] == ["scan_0000", "scan_0001", "scan_0002"]


@pytest.mark.parametrize("training", [5, ["a"], [{"image": 3}], [{"image": "a" * 5000}], [{"image": "\0"}]])
def test_layout_of_a_broken_list_is_found_out(tmp_path: Path, training: object) -> None:
    write_dataset(tmp_path, training=training)
    assert (MsdLayout.detect(tmp_path), NnunetLayout.detect(tmp_path)) == (True, False)
    make_files(tmp_path, "imagesTr/a_0000.nii.gz")
    assert (MsdLayout.detect(tmp_path), NnunetLayout.detect(tmp_path)) == (False, True)


def test_file_that_is_no_json_is_msd(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    assert MsdLayout.detect(tmp_path)
    (tmp_path / "dataset.json").write_text(json.dumps([]))
    assert MsdLayout.detect(tmp_path)


@pytest.mark.real_data
def test_real_cases_are_found(real_data: Path) -> None:
    cases = cases_in(real_data / "Task04_Hippocampus", load_task("msd-hippocampus"))
    assert len(cases) == 200
    assert cases[0].id == "hippocampus_003"
    assert all(path.is_file() for case in cases for path in case.files)
