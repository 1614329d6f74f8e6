from pathlib import Path

import pytest

from fedqc.cases.layouts import find_cases, read_ids
from fedqc.cases.layouts.table import TableLayout
from fedqc.errors import DataError
from fedqc.task import Task
from tests.cases.layouts.trees import cases_in, only_problem, refusal, shown


def write_table(folder: Path, text: str, name: str = "cases.csv") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "cases.csv",
            "\ufeffid, patient ,FLAIR,T1,label,scanner,age,\n"
            'b,p1,"scans, new/b-f.nii",b-t.nii,b-l.nii,Prisma,,\n'
            "\n ,,,,,,,\n"
            "a,p1,a-f.nii,a-t.nii,,Skyra,61,x\n",
        ),
        (
            "cases.tsv",
            "id\tpatient\tFLAIR\tT1\tlabel\tscanner\tage\n"
            "b\tp1\tscans, new/b-f.nii\tb-t.nii\tb-l.nii\tPrisma\t\n"
            "a\tp1\ta-f.nii\ta-t.nii\t\tSkyra\t61\n",
        ),
    ],
)
def test_patients_groups_and_paths(tmp_path: Path, two_modalities: Task, name: str, text: str) -> None:
    path = write_table(tmp_path, text, name)
    for root in (tmp_path, path):
        assert TableLayout.detect(root)
        first, second = cases_in(root, two_modalities)
        assert (first.id, first.patient, first.groups) == ("a", "p1", {"scanner": "Skyra", "age": "61"})
        assert shown(tmp_path, first) == ["a-t.nii", "a-f.nii", None]
        assert (second.id, second.patient, second.groups) == ("b", "p1", {"scanner": "Prisma"})
        assert shown(tmp_path, second) == ["b-t.nii", "scans, new/b-f.nii", "b-l.nii"]


def test_table_of_any_name(tmp_path: Path, task: Task) -> None:
    path = write_table(tmp_path, "id\tT1\tlabel\na\tx/a.nii\tl.nii\n", "My Cases.TSV")
    assert not TableLayout.detect(tmp_path)
    (case,) = cases_in(path, task)
    assert case.files == (tmp_path / "x" / "a.nii", tmp_path / "l.nii")


def test_folder_that_is_called_like_a_table(tmp_path: Path, task: Task) -> None:
    folder = tmp_path / "site.csv"
    folder.mkdir()
    write_table(folder, "id,T1,label\na,a.nii,l.nii\n")
    assert [case.id for case in cases_in(folder, task)] == ["a"]


def test_two_tables(tmp_path: Path, task: Task) -> None:
    path = write_table(tmp_path, "id,T1,label\na,a.nii,l.nii\n")
    write_table(tmp_path, "id\tT1\tlabel\nb\tb.nii\tl.nii\n", "cases.tsv")
    assert refusal(tmp_path, task) == (
        f"{tmp_path}: holds cases.csv and cases.tsv; remove one, or name the one to use"
    )
    assert [case.id for case in cases_in(path, task)] == ["a"]
    assert [case.id for case in cases_in(tmp_path / "cases.tsv", task)] == ["b"]


def test_table_without_patients(tmp_path: Path, task: Task) -> None:
    write_table(tmp_path, f"id,T1,label\na,{tmp_path / 'a.nii'},l.nii\n")
    (case,) = cases_in(tmp_path, task, "csv")
    assert case.patient == "a"
    assert case.images == (tmp_path / "a.nii",)


def test_empty_cell_is_a_file_that_is_not_there(tmp_path: Path, two_modalities: Task) -> None:
    write_table(tmp_path, "id,patient,T1,FLAIR,label\na,,,f.nii,l.nii\n")
    (case,) = cases_in(tmp_path, two_modalities)
    assert shown(tmp_path, case) == [None, "f.nii", "l.nii"]
    assert case.patient == "a"


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "column id, T1, label is missing; found no header"),
        ("id,T1\n", "column label is missing; found id, T1, expected id, T1, label"),
        ("id,T1,label\n", "the table has no row"),
        ("id,T1,label\na,b.nii\n", "line 2 has 2 cells, the header 3"),
        ("id,T1,label\n\na,b.nii\n", "line 3 has 2 cells, the header 3"),
        ('id,T1,label\n"a', "cannot be read as a table"),
        ("id,T1,label,Patient\n", "found a column 'Patient', expected 'patient'; rename or remove it"),
        ("ID,T1,label\n", "found a column 'ID', expected 'id'"),
        ("id,t1,T1,label\n", "found a column 't1', expected 'T1'"),
        ("id,T1,label,T1\n", "column 'T1' occurs 2 times; leave one of them"),
        ("id,T1,label,age,age\n", "column 'age' occurs 2 times"),
        (
            "id;T1;mask\n",
            "column label is missing; found id, T1, mask, expected id, T1, label, separated by semi",
        ),
    ],
)
def test_broken_table(tmp_path: Path, task: Task, text: str, part: str) -> None:
    message = refusal(write_table(tmp_path, text), task)
    assert message.startswith(str(tmp_path / "cases.csv"))
    assert part in message


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("name", ["cases.csv", "cases.tsv"])
def test_the_header_says_what_separates(tmp_path: Path, task: Task, separator: str, name: str) -> None:
    rows = [["id", "T1", "label"], ["a", "b.nii", "c.nii"], ["d", "f, g.nii", "h;i.nii"]]
    text = "\n".join(separator.join(f'"{cell}"' for cell in row) for row in rows)
    write_table(tmp_path, text + "\n", name)
    assert [case.images for case in cases_in(tmp_path, task)] == [
        (tmp_path / "b.nii",),
        (tmp_path / "f, g.nii",),
    ]


def test_tabs_are_expected_where_no_column_is_known(tmp_path: Path, task: Task) -> None:
    message = refusal(write_table(tmp_path, "name,scan\na,b\n", "cases.tsv"), task)
    assert message.endswith("found name,scan, expected id, T1, label, separated by tabs")


def test_backslashes_of_windows_are_folders(tmp_path: Path, task: Task) -> None:
    write_table(tmp_path, "id,T1,label\na,scans\\b.nii,..\\c.nii\n")
    (case,) = find_cases(tmp_path, task).cases
    assert case.images == (tmp_path / "scans" / "b.nii",)
    assert [problem.code for problem in case.problems] == ["path-outside"]


@pytest.mark.parametrize(
    ("row", "code", "found"),
    [
        (",b.nii,l.nii", "invalid-id", "the id ''"),
        ("../a,b.nii,l.nii", "invalid-id", "the id '../a'"),
        ("a,../b.nii,l.nii", "path-outside", "the path '../b.nii'"),
        ("a,b.nii,/l.nii", "path-outside", "the path '/l.nii'"),
    ],
)
def test_one_bad_case_stops_no_other(tmp_path: Path, task: Task, row: str, code: str, found: str) -> None:
    write_table(tmp_path, f"id,T1,label\ngood,a.nii,l.nii\n{row}\n")
    problem = only_problem(tmp_path, task)
    assert problem.code == code
    assert problem.found == f"{found} in {tmp_path / 'cases.csv'}: line 3"
    assert len(find_cases(tmp_path, task).cases) == 2


def test_columns_without_a_name_are_left_alone(tmp_path: Path, task: Task) -> None:
    write_table(tmp_path, "id,T1,label,,\na,a.nii,l.nii,x,y\n")
    (case,) = cases_in(tmp_path, task)
    assert case.groups == {}


def test_modalities_that_differ_in_case_only(tmp_path: Path, task: Task) -> None:
    both = task.model_copy(update={"modalities": ("t1", "T1")})
    write_table(tmp_path, "id,T1,t1,label\na,upper.nii,lower.nii,l.nii\n")
    (case,) = cases_in(tmp_path, both)
    assert shown(tmp_path, case)[:2] == ["lower.nii", "upper.nii"]


def test_table_in_another_encoding(tmp_path: Path, task: Task) -> None:
    (tmp_path / "cases.csv").write_bytes("id,T1,label\nä,b,l\n".encode("latin-1"))
    assert "is no text in UTF-8, so its letters cannot be told" in refusal(tmp_path, task)


def test_ids_of_reference_cases(tmp_path: Path) -> None:
    path = tmp_path / "reference.csv"
    path.write_text("rater,id\nx,b\ny, a \nz,\nx,b\n")
    assert read_ids(path) == {"a", "b"}


def test_ids_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.csv"
    with pytest.raises(DataError, match=r"reference\.csv: there is no such file"):
        read_ids(path)
    path.write_text("Id\na\n")
    with pytest.raises(DataError, match=r"found a column 'Id', expected 'id'; rename or remove it"):
        read_ids(path)
    path.write_text("case\na\n")
    with pytest.raises(DataError, match=r"reference\.csv: column id is missing; found case, expected id"):
        read_ids(path)
