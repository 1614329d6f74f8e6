from pathlib import Path

import pytest

from fedqc.cases.layouts import find_cases
from fedqc.cases.layouts.bids import BidsLayout
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

EXPERT = "derivatives/expert"


def add_subject(root: Path, *names: str, session: str = "sub-01") -> Path:
    """Images in the folder of a session, and its label."""
    folder = session.replace("_", "/")
    make_files(root, *(f"{folder}/anat/{session}_{name}" for name in names))
    return make_files(root, f"{EXPERT}/{folder}/anat/{session}_dseg.nii.gz")


def test_subjects_without_sessions(tmp_path: Path, two_modalities: Task) -> None:
    for subject in ("sub-02", "sub-01"):
        add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz", session=subject)
    make_files(tmp_path, "sub-01/func/sub-01_task-rest_bold.nii.gz", "sub-01/anat/sub-01_T2starw.nii.gz")
    make_files(tmp_path, "sourcedata/sub-09/anat/sub-09_T1w.nii.gz", "code/sub-08/anat/sub-08_T1w.nii.gz")
    make_files(
        tmp_path, ".git/sub-07/anat/sub-07_T1w.nii.gz", "sub-01/anat/._sub-01_T1w.nii.gz", "sub-notes.txt"
    )
    first, second = cases_in(tmp_path, two_modalities)
    assert (first.id, first.patient, dict(first.groups)) == ("sub-01", "sub-01", {})
    assert shown(tmp_path, first) == [
        "sub-01/anat/sub-01_T1w.nii.gz",
        "sub-01/anat/sub-01_FLAIR.nii.gz",
        "derivatives/expert/sub-01/anat/sub-01_dseg.nii.gz",
    ]
    assert second.id == "sub-02"


def test_sessions_are_cases_of_one_patient(tmp_path: Path, two_modalities: Task) -> None:
    for session in ("sub-01_ses-02", "sub-01_ses-pre"):
        add_subject(tmp_path, "T1w.nii", "FLAIR.nii", session=session)
    make_files(
        tmp_path, "sub-01/ses-ct/ct/sub-01_ses-ct_ct.nii.gz", "sub-01/ses-mr/anat/sub-01_ses-mr_T2w.nii"
    )
    first, second = cases_in(tmp_path, two_modalities)
    assert [(case.id, case.patient) for case in (first, second)] == [
        ("sub-01_ses-02", "sub-01"),
        ("sub-01_ses-pre", "sub-01"),
    ]
    assert shown(tmp_path, first) == [
        "sub-01/ses-02/anat/sub-01_ses-02_T1w.nii",
        "sub-01/ses-02/anat/sub-01_ses-02_FLAIR.nii",
        "derivatives/expert/sub-01/ses-02/anat/sub-01_ses-02_dseg.nii.gz",
    ]


@pytest.mark.parametrize(
    ("name", "is_bids"),
    [
        ("sub-01/anat/sub-01_T1w.nii.gz", True),
        ("sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz", True),
        ("sub-01/func/sub-01_bold.nii.gz", False),
        ("sub-01/other/anat/sub-01_T1w.nii.gz", False),
        ("patient-01/anat/sub-01_T1w.nii.gz", False),
        ("sub-01", False),
    ],
)
def test_detection(tmp_path: Path, name: str, is_bids: bool) -> None:
    make_files(tmp_path, name)
    assert BidsLayout.detect(tmp_path) == is_bids
    assert not BidsLayout.detect(tmp_path / name)
    make_files(tmp_path, "dataset_description.json")
    assert BidsLayout.detect(tmp_path) == (name.startswith("sub-01/"))


def test_contrast_agent_and_synonyms(tmp_path: Path, glioma: Task) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "ce-gad_T1w.nii.gz", "T2w.nii.gz", "FLAIR.nii.gz")
    (case,) = cases_in(tmp_path, glioma)
    names = ["T1w", "ce-gad_T1w", "T2w", "FLAIR"]
    assert shown(tmp_path, case)[:4] == [f"sub-01/anat/sub-01_{name}.nii.gz" for name in names]


def test_modality_by_the_name_of_its_suffix(tmp_path: Path, task: Task) -> None:
    add_subject(tmp_path, "T2starw.nii.gz", "acq-sax_CINE.nii.gz")
    own = task.model_copy(update={"modalities": ("t2starw", "cine")})
    (case,) = cases_in(tmp_path, own)
    assert shown(tmp_path, case)[:2] == [
        "sub-01/anat/sub-01_T2starw.nii.gz",
        "sub-01/anat/sub-01_acq-sax_CINE.nii.gz",
    ]


def test_missing_files_are_listed_where_they_should_be(tmp_path: Path, task: Task) -> None:
    own = task.model_copy(update={"modalities": ("T1", "T1ce", "T2", "FLAIR", "T2starw")})
    make_files(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz")
    (case,) = cases_in(tmp_path, own)
    names = ["T1w", "ce-gadolinium_T1w", "T2w", "FLAIR", "T2starw"]
    assert shown(tmp_path, case) == [
        *(f"sub-01/anat/sub-01_{name}.nii.gz" for name in names),
        "derivatives/labels/sub-01/anat/sub-01_dseg.nii.gz",
    ]


def test_missing_labels_are_listed_as_those_of_others_are(tmp_path: Path, one_class: Task) -> None:
    for session in ("sub-1", "sub-10", "sub-10_ses-1", "sub-2_ses-2", "sub-3_ses-3"):
        make_files(tmp_path, f"{session.replace('_', '/')}/anat/{session}_T1w.nii.gz")
    make_files(tmp_path, f"{EXPERT}/final/sub-1/sub-1_acq-sub-1_label-lesion_mask.nii.gz")
    labels = [shown(tmp_path, case)[-1] for case in cases_in(tmp_path, one_class)]
    assert labels[:3] == [
        f"{EXPERT}/final/sub-1/sub-1_acq-sub-1_label-lesion_mask.nii.gz",
        f"{EXPERT}/final/sub-10/sub-10_acq-sub-10_label-lesion_mask.nii.gz",
        f"{EXPERT}/sub-10/ses-1/anat/sub-10_ses-1_dseg.nii.gz",
    ]
    make_files(tmp_path, f"{EXPERT}/sub-2_ses-2_mask.nii")
    assert shown(tmp_path, cases_in(tmp_path, one_class)[-1])[-1] == f"{EXPERT}/sub-3_ses-3_mask.nii"


def test_label_without_images_is_a_case(tmp_path: Path, two_modalities: Task) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    make_files(tmp_path, f"{EXPERT}/sub-02/anat/sub-02_dseg.nii.gz")
    _, case = cases_in(tmp_path, two_modalities)
    assert shown(tmp_path, case) == [
        "sub-02/anat/sub-02_T1w.nii.gz",
        "sub-02/anat/sub-02_FLAIR.nii.gz",
        "derivatives/expert/sub-02/anat/sub-02_dseg.nii.gz",
    ]


@pytest.mark.parametrize(
    ("names", "first"),
    [
        (["run-2_FLAIR.nii", "run-1_FLAIR.nii"], 1),
        (["run-10_FLAIR.nii", "run-9_FLAIR.nii"], 1),
        (["acq-a_run-1_FLAIR.nii", "run-2_FLAIR.nii"], 0),
        (["acq-a_FLAIR.nii", "FLAIR.nii"], 1),
        (["acq-a_FLAIR.nii", "run-1_FLAIR.nii"], 0),
        (["acq-b_FLAIR.nii", "acq-a_FLAIR.nii"], 1),
        (["run-x_FLAIR.nii", "run-1_FLAIR.nii"], 0),
        (["FLAIR.nii.gz", "FLAIR.nii"], 1),
    ],
)
def test_first_of_several_images(tmp_path: Path, two_modalities: Task, names: list[str], first: int) -> None:
    add_subject(tmp_path, "T1w.nii.gz", *names)
    (case,) = find_cases(tmp_path, two_modalities).cases
    assert shown(tmp_path, case)[1] == f"sub-01/anat/sub-01_{names[first]}"
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.case) == ("ambiguous-file", "sub-01")
    assert problem.found == f"2 files for FLAIR: sub-01_{names[first]}, sub-01_{names[1 - first]}"


@pytest.mark.parametrize("entity", ["run-2", "acq-b", "rec-b", "ce-b"])
def test_image_that_the_label_names_comes_first(tmp_path: Path, two_modalities: Task, entity: str) -> None:
    make_files(tmp_path, "sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_FLAIR.nii")
    make_files(tmp_path, f"sub-01/anat/sub-01_{entity}_FLAIR.nii")
    make_files(tmp_path, f"{EXPERT}/sub-01_{entity}_space-orig_dseg.nii")
    (case,) = find_cases(tmp_path, two_modalities).cases
    assert shown(tmp_path, case)[:2] == [
        "sub-01/anat/sub-01_T1w.nii",
        f"sub-01/anat/sub-01_{entity}_FLAIR.nii",
    ]
    assert [one.code for one in problems_of(tmp_path, two_modalities)] == ["ambiguous-file"]


def labels_found(root: Path, task: Task, *names: str) -> list[str]:
    """Of one subject with labels of these names: the label that is taken, and then the codes of problems."""
    make_files(root, "sub-01/anat/sub-01_T1w.nii", "sub-01/anat/sub-01_FLAIR.nii")
    make_files(root, *(f"{EXPERT}/sub-01/anat/sub-01_{name}.nii.gz" for name in names))
    (case,) = find_cases(root, task).cases
    assert case.label is not None
    taken = case.label.name.removeprefix("sub-01_").removesuffix(".nii.gz")
    return [taken, *(problem.code for problem in problems_of(root, task))]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["mask", "label-lesion_mask", "dseg"], ["dseg"]),
        (["mask", "label-lesion_mask"], ["label-lesion_mask"]),
        (["mask"], ["mask"]),
        (["label-LESION_mask", "label-ventricle_mask"], ["label-LESION_mask"]),
        (["label-wmh_mask"], ["label-wmh_mask"]),  # the only one there
        (["label-wmh_mask", "label-ventricle_mask", "mask"], ["mask"]),
        (["desc-brain_mask", "label-brain_mask", "mask"], ["mask"]),
        (["T1w_label-lesion_mask"], ["T1w_label-lesion_mask"]),
        (["desc-rater2_dseg", "desc-rater1_dseg"], ["desc-rater1_dseg", "ambiguous-file"]),
        (["run-2_mask", "run-1_mask"], ["run-1_mask", "ambiguous-file"]),
        (["desc-brain_dseg", "label-GM_probseg", "dseg_desc-rater1"], ["dseg"]),  # none: where it should be
    ],
)
def test_labels_of_one_class(tmp_path: Path, one_class: Task, names: list[str], expected: list[str]) -> None:
    assert labels_found(tmp_path, one_class, *names) == expected


def test_masks_are_no_labels_of_several_classes(tmp_path: Path, two_modalities: Task) -> None:
    assert labels_found(tmp_path, two_modalities, "mask", "label-core_mask") == ["dseg"]
    assert labels_found(tmp_path, two_modalities, "desc-manual_dseg") == ["desc-manual_dseg"]


def test_name_of_a_class_as_bids_can_write_it(tmp_path: Path, one_class: Task) -> None:
    atrium = one_class.model_copy(update={"classes": {"left-atrium": (1,)}})
    found = labels_found(tmp_path, atrium, "label-leftAtrium_mask", "label-rightAtrium_mask")
    assert found == ["label-leftAtrium_mask"]


def test_kind_of_label_is_chosen_case_by_case(tmp_path: Path, one_class: Task) -> None:
    make_files(
        tmp_path, f"{EXPERT}/sub-01_dseg.nii", f"{EXPERT}/sub-01_mask.nii", f"{EXPERT}/sub-02_mask.nii"
    )
    make_files(tmp_path, "sub-01/anat/sub-01_T1w.nii", f"{EXPERT}/sourcedata/sub-02_dseg.nii")
    names = [shown(tmp_path, case)[-1] for case in find_cases(tmp_path, one_class).cases]
    assert names == [f"{EXPERT}/sub-01_dseg.nii", f"{EXPERT}/sub-02_mask.nii"]


def test_two_folders_with_labels(tmp_path: Path, two_modalities: Task) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    make_files(tmp_path, "derivatives/student/sub-01/anat/sub-01_dseg.nii.gz", "derivatives/README.txt")
    make_files(tmp_path, "derivatives/fs/sub-01/anat/sub-01_desc-brain_mask.nii.gz")
    assert refusal(tmp_path, two_modalities) == (
        f"{tmp_path / 'derivatives'}: expert and student hold labels for task 'blobs'; "
        "name the one to use, as layout 'bids:expert'"
    )
    (case,) = cases_in(tmp_path, two_modalities, "bids:student")
    assert shown(tmp_path, case)[-1] == "derivatives/student/sub-01/anat/sub-01_dseg.nii.gz"
    (case,) = cases_in(tmp_path, two_modalities, "bids:fs")
    assert shown(tmp_path, case)[-1] == "derivatives/fs/sub-01/anat/sub-01_dseg.nii.gz"
    for name in ("Expert", "../derivatives/expert", "README.txt", ""):
        assert refusal(tmp_path, two_modalities, f"bids:{name}") == (
            f"{tmp_path / 'derivatives'}: holds no folder {name!r}; found expert, fs, student; "
            "name one of them behind the colon of 'bids:NAME'"
        )


def test_named_folder_without_derivatives(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "sub-01/anat/sub-01_T1w.nii.gz")
    assert "holds no folder 'expert'; found none; " in refusal(tmp_path, task, "bids:expert")


@pytest.mark.parametrize(
    "name", ["scan.nii.gz", "sub-02_T1w.nii.gz", "sub-01_ses-1_T1w.nii.gz", "sub-01_desc-x.nii.gz", "_.nii"]
)
def test_image_whose_name_does_not_fit(tmp_path: Path, two_modalities: Task, name: str) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    make_files(tmp_path, f"sub-01/anat/{name}")
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.case) == ("unexpected-file", None)
    assert problem.file == tmp_path / "sub-01" / "anat" / name
    assert problem.expected == "a name as sub-01_T1w.nii.gz"


def test_links_do_not_go_round_in_circles(tmp_path: Path, two_modalities: Task) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    (tmp_path / "sub-01" / "ses-1").symlink_to(tmp_path / "sub-01")
    (tmp_path / "sub-02").symlink_to("sub-02")
    (tmp_path / EXPERT / "up").symlink_to(tmp_path)
    assert [case.id for case in cases_in(tmp_path, two_modalities)] == ["sub-01"]


def test_annexed_file_that_is_not_there_is_listed(tmp_path: Path, two_modalities: Task) -> None:
    add_subject(tmp_path, "T1w.nii.gz")
    (tmp_path / "sub-01" / "anat" / "sub-01_FLAIR.nii.gz").symlink_to("../../.git/annex/objects/x")
    (case,) = cases_in(tmp_path, two_modalities)
    assert shown(tmp_path, case)[1] == "sub-01/anat/sub-01_FLAIR.nii.gz"


@pytest.mark.parametrize(
    ("sidecar", "groups"),
    [
        ({"Manufacturer": "Siemens", "ManufacturersModelName": " Prisma "}, {"scanner": "Siemens Prisma"}),
        ({"ManufacturersModelName": "Prisma"}, {"scanner": "Prisma"}),
        ({"Manufacturer": "", "ManufacturersModelName": 3}, {}),
        (["Prisma"], {}),
    ],
)
def test_scanner_beside_the_first_image(
    tmp_path: Path, two_modalities: Task, sidecar: object, groups: dict[str, str]
) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    write_json(tmp_path / "sub-01" / "anat", sidecar, "sub-01_T1w.json")
    write_json(tmp_path / "sub-01" / "anat", {"Manufacturer": "other"}, "sub-01_FLAIR.json")
    assert cases_in(tmp_path, two_modalities)[0].groups == groups


def test_scanner_of_the_first_image_that_is_there(tmp_path: Path, two_modalities: Task) -> None:
    add_subject(tmp_path, "FLAIR.nii")
    write_json(tmp_path / "sub-01" / "anat", {"Manufacturer": "Philips"}, "sub-01_FLAIR.json")
    assert cases_in(tmp_path, two_modalities)[0].groups == {"scanner": "Philips"}


def test_groups_of_participants(tmp_path: Path, two_modalities: Task) -> None:
    for session in ("sub-01_ses-1", "sub-02", "sub-03"):
        add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz", session=session)
    write_json(tmp_path / "sub-02" / "anat", {"Manufacturer": "GE"}, "sub-02_T1w.json")
    (tmp_path / "participants.tsv").write_text(
        "participant_id\tage\tsex\tscanner\t\nsub-01\t61\tn/a\t\tx\n02\t34\tF\tB\tx\nsub-09\t1\tM\tC\tx\n"
    )
    assert [case.groups for case in cases_in(tmp_path, two_modalities)] == [
        {"age": "61"},
        {"age": "34", "sex": "F", "scanner": "GE"},
        {},
    ]


@pytest.mark.parametrize("text", ["", "id\nsub-01\n", "participant_id\tage\nsub-01\n", "Participant_ID\nx\n"])
def test_broken_participants_cost_the_groups_only(tmp_path: Path, two_modalities: Task, text: str) -> None:
    add_subject(tmp_path, "T1w.nii.gz", "FLAIR.nii.gz")
    (tmp_path / "participants.tsv").write_text(text)
    problem = only_problem(tmp_path, two_modalities)
    assert (problem.code, problem.file) == ("unexpected-file", tmp_path / "participants.tsv")
    assert problem.found.startswith("a table that cannot be read (")
    assert [dict(case.groups) for case in find_cases(tmp_path, two_modalities).cases] == [{}]


def test_no_image_of_the_task(tmp_path: Path, task: Task) -> None:
    make_files(tmp_path, "sub-01/anat/sub-01_T2w.nii.gz")
    own = task.model_copy(update={"modalities": ("T1", "T1ce", "cine")})
    assert refusal(tmp_path, own) == (
        f"{tmp_path}: no folder sub-*/anat or sub-*/ses-*/anat holds an image of task 'blobs'; "
        "expected names that end in _T1w, _ce-gadolinium_T1w, _cine"
    )
