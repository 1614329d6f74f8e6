from pathlib import Path

import pytest

from fedqc.cases.layouts.brats import BratsLayout
from fedqc.task import Task
from tests.cases.layouts.trees import cases_in, make_files, only_problem, problems_of, refusal, shown

OLD = ("_t1", "_t1ce", "_t2", "_flair", "_seg")
NEW = ("-t1n", "-t1c", "-t2w", "-t2f", "-seg")
NAMINGS = pytest.mark.parametrize("suffixes", [OLD, NEW], ids=["2017", "2023"])


@NAMINGS
@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
@pytest.mark.parametrize("folder", ["", "{}/", "HGG/{}/", "Training/HGG/{}/"])
def test_cases_flat_or_in_folders(
    tmp_path: Path, glioma: Task, suffixes: tuple[str, ...], ending: str, folder: str
) -> None:
    names = {
        case: [f"{folder.format(case)}{case}{suffix}{ending}" for suffix in suffixes]
        for case in ("BraTS19_b", "BraTS19_a")
    }
    make_files(tmp_path, *names["BraTS19_a"], *names["BraTS19_b"], "name_mapping.csv")
    assert BratsLayout.detect(tmp_path)
    first, second = cases_in(tmp_path, glioma)
    assert (first.id, first.patient, dict(first.groups)) == ("BraTS19_a", "BraTS19_a", {})
    assert shown(tmp_path, first) == names["BraTS19_a"]
    assert shown(tmp_path, second) == names["BraTS19_b"]


def test_modalities_in_the_order_of_the_task_by_any_name(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, *(f"a{suffix}.nii.gz" for suffix in OLD))
    some = task.model_copy(update={"modalities": ("FLAIR", "T1w", "T1ce")})
    (case,) = cases_in(tmp_path, some)
    assert shown(tmp_path, case) == [f"a{suffix}.nii.gz" for suffix in ("_flair", "_t1", "_t1ce", "_seg")]


@pytest.mark.parametrize(
    ("case_id", "patient"),
    [
        ("BraTS-GLI-00001-000", "BraTS-GLI-00001"),
        ("BraTS-MEN-RT-00001-101", "BraTS-MEN-RT-00001"),
        ("BraTS2021_00001", "BraTS2021_00001"),
        ("BraTS-GLI-00001", "BraTS-GLI-00001"),
        ("hospital-00001-000", "hospital-00001-000"),
    ],
)
def test_patient_of_a_time_point(tmp_path: Path, task: Task, case_id: str, patient: str) -> None:
    make_files(tmp_path, f"{case_id}-t1n.nii.gz", f"{case_id}-seg.nii.gz")
    (case,) = cases_in(tmp_path, task)
    assert (case.id, case.patient) == (case_id, patient)


@NAMINGS
def test_missing_files_are_listed_in_the_naming_of_the_case(
    tmp_path: Path, glioma: Task, suffixes: tuple[str, ...]
) -> None:
    make_files(tmp_path, f"a/a{suffixes[1]}.nii", f"b/b{suffixes[4]}.nii.gz")
    first, second = BratsLayout().find(tmp_path, glioma).cases
    assert shown(tmp_path, first) == [f"a/a{suffix}.nii" for suffix in suffixes]
    assert shown(tmp_path, second) == [f"b/b{suffix}.nii.gz" for suffix in suffixes]


def test_labels_alone_are_not_enough_to_detect(tmp_path: Path) -> None:
    make_files(tmp_path, "a_seg.nii.gz", "b-seg.nii.gz")
    assert not BratsLayout.detect(tmp_path)
    assert not BratsLayout.detect(tmp_path / "a_seg.nii.gz")


def test_two_files_of_one_modality(tmp_path: Path, two_modalities: Task) -> None:
    make_files(tmp_path, "a_t1.nii.gz", "a-t1n.nii.gz", "a_flair.nii.gz", "a_seg.nii.gz")
    (case,) = BratsLayout().find(tmp_path, two_modalities).cases
    assert shown(tmp_path, case) == ["a-t1n.nii.gz", "a_flair.nii.gz", "a_seg.nii.gz"]
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.case) == ("ambiguous-file", "a")
    assert problem.found == "2 files for T1: a-t1n.nii.gz, a_t1.nii.gz"


def test_two_labels(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "a_t1.nii.gz", "a_seg.nii", "a_seg.nii.gz")
    problem = only_problem(tmp_path, task)
    assert problem.found == "2 files for the label: a_seg.nii, a_seg.nii.gz"


def test_mixed_names_without_doubt(tmp_path: Path, two_modalities: Task) -> None:
    make_files(tmp_path, "a-t2f.nii.gz", "a_t1.nii.gz", "a_seg.nii.gz")
    (case,) = cases_in(tmp_path, two_modalities)
    assert shown(tmp_path, case) == ["a_t1.nii.gz", "a-t2f.nii.gz", "a_seg.nii.gz"]


def test_strange_image_among_the_cases(tmp_path: Path, task: Task) -> None:
    make_files(
        tmp_path, "a/a_t1.nii.gz", "a/a_seg.nii.gz", "a/W39_Segm.nii", "a/notes.txt", "a/._a_t1.nii.gz"
    )
    make_files(tmp_path, "atlas/brain.nii.gz")  # where no case is
    problem = only_problem(tmp_path, task)
    assert (problem.code, problem.case, problem.file) == (
        "unexpected-file",
        None,
        tmp_path / "a/W39_Segm.nii",
    )
    assert problem.expected == (
        "a name that ends in _t1, _t1ce, _t2, _flair, _seg, -t1n, -t1c, -t2w, -t2f, -seg"
    )


def test_one_id_in_two_folders(tmp_path: Path, task: Task) -> None:
    make_files(
        tmp_path, *(f"{folder}/a{suffix}.nii.gz" for folder in ("x", "y") for suffix in ("_t1", "_seg"))
    )
    first, second = BratsLayout().find(tmp_path, task).cases
    assert first.id == second.id == "a"
    assert shown(tmp_path, first) == ["x/a_t1.nii.gz", "x/a_seg.nii.gz"]
    assert shown(tmp_path, second) == ["y/a_t1.nii.gz", "y/a_seg.nii.gz"]


def test_links_are_followed_once(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path / "store", "a/a_t1.nii.gz", "a/a_seg.nii.gz")
    data = tmp_path / "data"
    data.mkdir()
    (data / "a").symlink_to(tmp_path / "store" / "a")
    (data / "b").symlink_to(tmp_path / "store" / "a")
    (tmp_path / "store" / "a" / "up").symlink_to(data)
    (case,) = cases_in(data, task)
    assert shown(data, case) == ["a/a_t1.nii.gz", "a/a_seg.nii.gz"]


def test_files_too_deep_are_not_found(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "1/2/3/4/a_t1.nii.gz")
    assert not BratsLayout.detect(tmp_path)
    assert "no file has a name of BraTS" in refusal(tmp_path, task, "brats")


def test_id_that_cannot_be_one(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "(1)_t1.nii.gz", "(1)_seg.nii.gz")
    assert [(one.code, one.case) for one in problems_of(tmp_path, task)] == [("invalid-id", "(1)")]


def test_task_of_other_modalities(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "a_t1.nii.gz")
    other = task.model_copy(update={"modalities": ("T1", "CT", "cine")})
    assert refusal(tmp_path, other) == (
        "task 'blobs' needs CT, cine, which is no modality of BraTS; these are t1n (t1, t1w), "
        "t1c (t1ce, t1gd), t2w (t2), t2f (flair); choose the task or the layout that fits the data"
    )


def test_modality_called_label_is_none_of_brats(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "a_t1.nii.gz")
    other = task.model_copy(update={"modalities": ("label",)})
    assert "needs label, which is no modality of BraTS" in refusal(tmp_path, other)
