from pathlib import Path
from typing import Any

import pytest

from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.layouts.msd import MsdLayout
from fedqc.cases.layouts.nnunet import NnunetLayout
from fedqc.task import Task
from tests.cases.layouts.trees import (
    cases_in,
    make_files,
    only_problem,
    problems_of,
    refusal,
    shown,
    write_json,
)


def write_nnunet(folder: Path, ids: tuple[str, ...] = ("b", "a"), channels: int = 2, **changes: Any) -> Path:
    """An nnU-Net folder, version 2, with empty files; a change to None takes a key out."""
    (folder / "imagesTr").mkdir(parents=True)
    for case in ids:
        make_files(folder, *(f"imagesTr/{case}_{channel:04d}.nii.gz" for channel in range(channels)))
        make_files(folder, f"labelsTr/{case}.nii.gz")
    dataset = {
        "channel_names": {"0": "FLAIR", "1": "T1"},
        "labels": {"background": 0, "whole": [1, 2], "core": 1},
        "regions_class_order": [2, 1],
        "numTraining": len(ids),
        "file_ending": ".nii.gz",
        "overwrite_image_reader_writer": "SimpleITKIO",
        **changes,
    }
    return write_json(folder, {key: value for key, value in dataset.items() if value is not None})


def version_1(**changes: Any) -> dict[str, Any]:
    """The changes that make a dataset.json of version 1."""
    training = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in "ab"]
    labels = {"0": "background", "1": "core"}
    old = {"modality": {"0": "FLAIR", "1": "T1"}, "training": training, "labels": labels}
    new = ("channel_names", "file_ending", "regions_class_order", "overwrite_image_reader_writer")
    return {**dict.fromkeys(new), **old, **changes}


def channels_of(case: CaseFiles) -> list[str]:
    return [path.name[-11:-7] for path in case.images if path is not None]


@pytest.mark.parametrize("changes", [{}, version_1()], ids=["version 2", "version 1"])
def test_channels_in_the_order_of_the_task(
    tmp_path: Path, two_modalities: Task, changes: dict[str, Any]
) -> None:
    write_nnunet(tmp_path, **changes)
    first, second = cases_in(tmp_path, two_modalities)
    assert first == CaseFiles(
        id="a",
        patient="a",
        images=(tmp_path / "imagesTr" / "a_0001.nii.gz", tmp_path / "imagesTr" / "a_0000.nii.gz"),
        label=tmp_path / "labelsTr" / "a.nii.gz",
    )
    assert second.id == "b"
    assert (MsdLayout.detect(tmp_path), NnunetLayout.detect(tmp_path)) == (False, True)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ({"1": "t1", "0": "Flair"}, 1),  # in any case and order
        ({"0": "t1", "1": "flair"}, 0),
        (["FLAIR", "T1"], 1),
        ({"0": "t2f", "1": "T1w"}, 1),  # synonyms
        ({"0": "MRI", "1": "MRI"}, 0),  # none of the task's names: as they come
        ({"0": "T1", "1": "other"}, 0),
    ],
)
def test_names_of_channels(tmp_path: Path, two_modalities: Task, names: object, first: int) -> None:
    write_nnunet(tmp_path, channel_names=names)
    case, _ = cases_in(tmp_path, two_modalities)
    assert channels_of(case) == [f"000{first}", f"000{1 - first}"]


@pytest.mark.parametrize("names", [["FLAIR", "T1ce"], ["other", "T1"], ["T1", "T1"]])
def test_names_of_channels_that_contradict_the_task(
    tmp_path: Path, two_modalities: Task, names: list[str]
) -> None:
    write_nnunet(tmp_path, channel_names=names)
    assert refusal(tmp_path, two_modalities) == (
        f"{tmp_path / 'dataset.json'}: the channels are {', '.join(names)}, task 'blobs' needs T1, FLAIR; "
        "call the channels as the task does, or choose the task that fits"
    )


def test_three_channels_in_the_order_of_the_task(tmp_path: Path, task: Task) -> None:
    three = task.model_copy(update={"modalities": ("T1", "T2", "FLAIR")})
    write_nnunet(tmp_path, ("a",), 3, channel_names={"0": "T2", "1": "FLAIR", "2": "T1"})
    (case,) = cases_in(tmp_path, three)
    assert channels_of(case) == ["0002", "0000", "0001"]


def test_modalities_that_differ_in_case_only(tmp_path: Path, task: Task) -> None:
    both = task.model_copy(update={"modalities": ("t1", "T1")})
    write_nnunet(tmp_path, ("a",), channel_names={"0": "T1", "1": "t1"})
    (case,) = cases_in(tmp_path, both)
    assert channels_of(case) == ["0001", "0000"]


def test_ids_with_numbers_and_other_files(tmp_path: Path, task: Task) -> None:
    ids = ("la_003", "la_0000", "0001")
    write_nnunet(tmp_path, ids, 1, channel_names={"0": "T1"})
    make_files(tmp_path, "imagesTr/._la_003_0000.nii.gz", "imagesTr/notes.txt", "imagesTr/la_003_0000.json")
    make_files(tmp_path, "imagesTs/la_009_0000.nii.gz", "labelsTr/.la_010.nii.gz")
    cases = cases_in(tmp_path, task)
    assert [case.id for case in cases] == ["0001", "la_0000", "la_003"]
    assert [shown(tmp_path, case)[0] for case in cases] == [
        f"imagesTr/{case.id}_0000.nii.gz" for case in cases
    ]


def test_uncompressed_files(tmp_path: Path, task: Task) -> None:
    write_nnunet(tmp_path, (), channel_names=["MRI"], file_ending=".nii", numTraining=1)
    make_files(tmp_path, "imagesTr/a_0000.nii")
    (case,) = cases_in(tmp_path, task)
    assert shown(tmp_path, case) == ["imagesTr/a_0000.nii", "labelsTr/a.nii"]


@pytest.mark.parametrize("missing", ["imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"])
def test_missing_file_is_listed(tmp_path: Path, two_modalities: Task, missing: str) -> None:
    (write_nnunet(tmp_path) / missing).unlink()
    case, _ = cases_in(tmp_path, two_modalities)
    assert tmp_path / missing in case.files


def test_label_without_images_is_a_case(tmp_path: Path, task: Task) -> None:
    write_nnunet(tmp_path, ("a", "b"), 1, channel_names=["T1"])
    (tmp_path / "imagesTr" / "a_0000.nii.gz").unlink()
    case, _ = cases_in(tmp_path, task)
    assert shown(tmp_path, case) == ["imagesTr/a_0000.nii.gz", "labelsTr/a.nii.gz"]


def test_images_without_any_label(tmp_path: Path, task: Task) -> None:
    write_nnunet(tmp_path, (), channel_names=["T1"], numTraining=1)
    make_files(tmp_path, "imagesTr/a_0000.nii.gz")
    (case,) = cases_in(tmp_path, task)
    assert shown(tmp_path, case)[1] == "labelsTr/a.nii.gz"


def test_list_of_paths(tmp_path: Path, two_modalities: Task) -> None:
    listed = {
        "b": {"images": ["mri/b flair.nii.gz", "mri/b t1.nii.gz"], "label": "b.nii.gz"},
        "a": {"images": [str(tmp_path / "a_0000.nii.gz"), "a_0001.nii.gz"]},
        "c": {"images": ["c_0000.nii.gz"], "label": ""},
        "d": {"images": ["", "d_0001.nii.gz"], "label": "d.nii.gz"},
    }
    content = {"channel_names": {"0": "FLAIR", "1": "T1"}, "file_ending": ".nii.gz", "dataset": listed}
    cases = cases_in(write_json(tmp_path, content), two_modalities)
    assert [case.id for case in cases] == ["a", "b", "c", "d"]
    assert [shown(tmp_path, case) for case in cases] == [
        ["a_0001.nii.gz", "a_0000.nii.gz", None],
        ["mri/b t1.nii.gz", "mri/b flair.nii.gz", "b.nii.gz"],
        [None, "c_0000.nii.gz", None],
        ["d_0001.nii.gz", None, "d.nii.gz"],
    ]
    assert [case.patient for case in cases] == ["a", "b", "c", "d"]
    assert find_cases(tmp_path, two_modalities).layout == "nnunet"


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"channel_names": None}, "neither 'modality' nor 'channel_names' is there"),
        ({"channel_names": {"0": "T1"}}, "'channel_names' lists 1 (T1), task 'blobs' needs 2 (T1, FLAIR)"),
        ({"channel_names": {"1": "T1", "2": "FLAIR"}}, "channels are numbered 1, 2, expected 0, 1"),
        ({"file_ending": ".png"}, "'file_ending' is '.png', expected .nii.gz or .nii; convert"),
        ({"file_ending": [".nii"]}, "'file_ending' is ['.nii'], expected"),
        ({"dataset": []}, "'dataset' is no list of cases"),
        ({"dataset": {}}, "'dataset' is no list of cases"),
        ({"dataset": {"a": ["b"]}}, "dataset['a']: no list of paths under 'images'"),
        ({"dataset": {"a": {"images": "b"}}}, "dataset['a']: no list of paths under 'images'"),
        ({"dataset": {"a": {"images": ["b", 3]}}}, "dataset['a']: no list of paths under 'images'"),
        (
            {"dataset": {"a": {"images": ["b", "c", "d"]}}},
            "dataset['a']: lists 3 images, expected 2; give one",
        ),
        ({"dataset": {"a": {"images": ["b", "c"], "label": 3}}}, "dataset['a']: 'label' is 3"),
    ],
)
def test_broken_list(tmp_path: Path, two_modalities: Task, changes: dict[str, Any], part: str) -> None:
    message = refusal(write_nnunet(tmp_path, **changes), two_modalities)
    assert message.startswith(str(tmp_path / "dataset.json"))
    assert part in message


@pytest.mark.parametrize(
    ("dataset", "code", "found"),
    [
        ({"../a": {"images": ["b", "c"]}}, "invalid-id", "the id '../a'"),
        ({"a": {"images": ["b", "../c"]}}, "path-outside", "the path '../c'"),
        ({"a": {"images": ["b", "c"], "label": "/d"}}, "path-outside", "the path '/d'"),
    ],
)
def test_one_bad_case_stops_no_other(
    tmp_path: Path, two_modalities: Task, dataset: dict[str, Any], code: str, found: str
) -> None:
    good = {"good": {"images": ["0", "1"]}}
    write_nnunet(tmp_path, dataset={**dataset, **good})
    problem = only_problem(tmp_path, two_modalities)
    (name,) = dataset
    assert (problem.code, problem.case) == (code, name)
    assert problem.found == f"{found} in {tmp_path / 'dataset.json'}: dataset[{name!r}]"


@pytest.mark.parametrize("number", [3, "2", None])
def test_wrong_number_of_cases(tmp_path: Path, two_modalities: Task, number: object) -> None:
    write_nnunet(tmp_path, numTraining=number)
    found = problems_of(tmp_path, two_modalities)
    assert [(one.code, one.found, one.expected) for one in found] == (
        [] if number is None else [("case-count", "2 cases", f"{number!r} as 'numTraining' says")]
    )


@pytest.mark.parametrize("name", ["a.nii.gz", "a_0002.nii.gz", "c_0000.nii", "c_00000.nii.gz"])
def test_strange_file_among_the_images(tmp_path: Path, two_modalities: Task, name: str) -> None:
    make_files(write_nnunet(tmp_path), f"imagesTr/{name}")
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.case, problem.file) == (
        "unexpected-file",
        None,
        tmp_path / "imagesTr" / name,
    )
    assert problem.found == "an image that is no channel of dataset.json"
    assert problem.expected == "a name as ID_0000.nii.gz to ID_0001.nii.gz"


def test_strange_file_among_the_labels(tmp_path: Path, task: Task) -> None:
    make_files(write_nnunet(tmp_path, ("a",), 1, channel_names=["T1"]), "labelsTr/b.nii")
    problem = only_problem(tmp_path, task)
    assert (problem.code, problem.file) == ("unexpected-file", tmp_path / "labelsTr" / "b.nii")
    assert problem.expected == "a name as ID.nii.gz"


def test_image_without_an_id(tmp_path: Path, two_modalities: Task) -> None:
    make_files(write_nnunet(tmp_path, numTraining=None), "imagesTr/_0000.nii.gz")
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.found) == ("invalid-id", f"the id '' in {tmp_path}")


def test_no_image(tmp_path: Path, two_modalities: Task) -> None:
    write_nnunet(tmp_path, ())
    assert "there is no image; put ID_0000.nii.gz" in refusal(tmp_path, two_modalities, "nnunet")
    (tmp_path / "imagesTr").rmdir()
    assert "imagesTr: cannot be listed (No such file" in refusal(tmp_path, two_modalities, "nnunet")
