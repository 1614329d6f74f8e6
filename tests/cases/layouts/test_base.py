import os
from pathlib import Path

import pytest

from fedqc.cases.layouts import CaseBuilder, CaseFiles
from fedqc.cases.layouts.base import has_list, is_file, is_folder, names_in, nifti_names, walk, without_ending
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from tests.cases.layouts.trees import make_files, relative


def test_files_that_are_listed() -> None:
    image, label = Path("i.nii"), Path("l.nii")
    assert CaseFiles("a", "a", (None, image), label).files == (image, label)
    assert CaseFiles("a", "a", (image, None), None).files == (image,)


def test_case_is_a_patient_of_its_own_unless_told(tmp_path: Path) -> None:
    case = CaseBuilder("a", tmp_path, "list")
    assert case.build([], None) == CaseFiles("a", "a", (), None)
    told = case.build([], None, patient="p", groups={"scanner": "x"})
    assert (told.patient, told.groups) == ("p", {"scanner": "x"})
    assert case.build([], None, patient="").patient == "a"


@pytest.mark.parametrize("case_id", ["a", "0001", "_b", "Ä 1", "sub-01_ses-02", "a+b.c"])
def test_ids_that_are_fine(tmp_path: Path, case_id: str) -> None:
    assert CaseBuilder(case_id, tmp_path, "list").problems == []


@pytest.mark.parametrize("case_id", ["", "-rf", "../a", "a/b", ".a", "a\nb", "a\0", "\udcff"])
def test_id_that_cannot_be_a_file_name(tmp_path: Path, case_id: str) -> None:
    case = CaseBuilder(case_id, tmp_path, "list").build([], None)
    (problem,) = case.problems
    assert (problem.code, problem.case, problem.file) == ("invalid-id", case.id, None)
    assert case.id == repr(case_id)[1:-1]  # can be printed
    assert problem.found == f"the id {case_id!r} in list"


@pytest.mark.parametrize("name", ["../outside.nii", "/etc/passwd", "a/../../b.nii", "a\0.nii"])
def test_path_out_of_the_folder(tmp_path: Path, name: str) -> None:
    case = CaseBuilder("a", tmp_path, "list")
    assert "\0" not in str(case.path(name))
    (problem,) = case.problems
    assert (problem.code, problem.case) == ("path-outside", "a")
    assert problem.found == f"the path {name!r} in list"
    assert problem.expected == f"a path inside {tmp_path}"


def test_paths_inside_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "data")
    case = CaseBuilder("a", Path("data"), "list")
    assert case.path("./a/b c.nii") == Path("data/a/b c.nii")
    assert case.path(str(tmp_path / "data" / "a.nii")) == tmp_path / "data" / "a.nii"
    through_link = CaseBuilder("a", Path("link"), "list")
    assert through_link.path(str(tmp_path / "data" / "a.nii")) == tmp_path / "data" / "a.nii"
    assert case.problems == through_link.problems == []
    beside = CaseBuilder("a", tmp_path / "dat", "list")
    beside.path(str(tmp_path / "data" / "a.nii"))
    assert [problem.code for problem in beside.problems] == ["path-outside"]


def test_first_of_several_files(tmp_path: Path) -> None:
    case = CaseBuilder("a", tmp_path, "list")
    assert case.first([tmp_path / "1.nii"], "T1") == tmp_path / "1.nii"
    assert case.problems == []
    assert case.first([tmp_path / "1.nii", tmp_path / "2.nii"], "T1") == tmp_path / "1.nii"
    (problem,) = case.problems
    assert (problem.code, problem.case, problem.file) == ("ambiguous-file", "a", tmp_path / "1.nii")
    assert problem.found == "2 files for T1: 1.nii, 2.nii"
    assert problem.fix == "move the others away if 1.nii, which is taken, is the right one"


def test_names_of_files(tmp_path: Path) -> None:
    make_files(tmp_path, "b.nii", "a.nii.gz", ".c.nii", "d.txt", "e.nii.txt", "folder/f.nii")
    assert names_in(tmp_path) == ["a.nii.gz", "b.nii", "d.txt", "e.nii.txt", "folder"]
    assert nifti_names(tmp_path) == ["a.nii.gz", "b.nii"]
    assert [without_ending(name) for name in nifti_names(tmp_path)] == ["a", "b"]
    with pytest.raises(DataError, match=r"none: cannot be listed \(No such file or directory\)"):
        names_in(tmp_path / "none")


def test_files_and_folders_that_may_not_be_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "cases.csv")
    assert (is_file(tmp_path / "cases.csv"), is_folder(tmp_path), has_list(tmp_path)) == (True, True, True)

    def refuse(self: Path) -> bool:
        raise PermissionError

    monkeypatch.setattr(Path, "is_file", refuse)
    monkeypatch.setattr(Path, "is_dir", refuse)
    assert (is_file(tmp_path / "cases.csv"), is_folder(tmp_path), has_list(tmp_path)) == (False, False, False)


def test_walk_stops_at_its_depth_and_passes_over_what_is_hidden(tmp_path: Path) -> None:
    make_files(
        tmp_path, "1.nii", "a/2.nii.gz", "a/b/3.nii", "a/b/c/4.nii", ".h/5.nii", "a/._6.nii", "a/7.txt"
    )
    (tmp_path / "a" / "folder.nii").mkdir()
    (tmp_path / "a" / "gone.nii").symlink_to(tmp_path / "nowhere")
    problems: list[Problem] = []
    walked = {folder.relative_to(tmp_path).as_posix(): names for folder, names in walk(tmp_path, 2, problems)}
    assert walked == {".": ["1.nii"], "a": ["2.nii.gz", "gone.nii"], "a/b": ["3.nii"], "a/folder.nii": []}
    assert problems == []


def test_walk_does_not_go_round_in_circles(tmp_path: Path) -> None:
    make_files(tmp_path / "data", "real/1.nii")
    make_files(tmp_path / "elsewhere", "2.nii")
    (tmp_path / "data" / "a-link").symlink_to(tmp_path / "data" / "real")
    (tmp_path / "data" / "real" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "self").symlink_to("self")
    (tmp_path / "data" / "out").symlink_to(tmp_path / "elsewhere")
    walked = list(walk(tmp_path / "data", 9, []))
    assert relative([folder for folder, _ in walked], tmp_path) == ["data", "data/real", "data/out"]
    assert [names for _, names in walked] == [[], ["1.nii"], ["2.nii"]]


def test_walk_does_not_follow_links_to_where_the_folder_lies(tmp_path: Path) -> None:
    data = tmp_path / "all" / "data"
    make_files(data, "a/1.nii")
    make_files(tmp_path, "all/other/2.nii", "beside/3.nii")
    for name, target in (("up", ".."), ("root", "/"), ("beside", tmp_path / "beside")):
        (data / name).symlink_to(target)
    found = {name for _, names in walk(data, 5, []) for name in names}
    assert found == {"1.nii", "3.nii"}


def test_walk_says_which_folder_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_files(tmp_path, "a/1.nii", "b/2.nii")
    scandir = os.scandir

    def refuse(folder: Path) -> object:
        if Path(folder).name == "a":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    problems: list[Problem] = []
    assert [folder.name for folder, _ in walk(tmp_path, 1, problems)] == [tmp_path.name, "b"]
    (problem,) = problems
    assert (problem.code, problem.case, problem.file) == ("no-permission", None, tmp_path / "a")
    assert problem.found == "a folder that cannot be listed (Permission denied)"
