import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fedqc.cases import layouts
from fedqc.cases.layouts import CsvLayout, MsdLayout, find_cases, load_layouts, read_ids
from fedqc.errors import ConfigError, DataError
from fedqc.task import Task, load_task


@pytest.fixture
def two_modalities(task: Task) -> Task:
    return task.model_copy(update={"modalities": ("T1", "FLAIR")})


def write_dataset(folder: Path, **changes: Any) -> Path:
    """A dataset.json with two cases, unsorted; the files themselves are not needed."""
    dataset = {
        "modality": {"0": "MRI"},
        "training": [
            {"image": "./imagesTr/b.nii.gz", "label": "./labelsTr/b.nii.gz"},
            {"image": "imagesTr/a.nii", "label": "labelsTr/a.nii"},
        ],
    }
    (folder / "dataset.json").write_text(json.dumps({**dataset, **changes}))
    return folder


def write_table(folder: Path, text: str) -> Path:
    path = folder / "cases.csv"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(root: Path, task: Task, layout: str | None = None) -> str:
    with pytest.raises(DataError) as caught:
        find_cases(root, task, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_layouts_that_come_with_fedqc() -> None:
    known = load_layouts()
    assert known["msd"] is MsdLayout
    assert known["csv"] is CsvLayout


@pytest.mark.parametrize("target", ["fedqc.no_such_module:Layout", "fedqc.errors:DataError"])
def test_broken_plug_in_is_named(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = EntryPoint(name="broken", value=target, group="fedqc.layouts")
    monkeypatch.setattr(layouts, "entry_points", lambda group: [broken])
    with pytest.raises(ConfigError, match=f"layout 'broken' .{target}."):
        load_layouts()


def test_msd_cases_sorted_by_id(tmp_path: Path, task: Task) -> None:
    write_dataset(tmp_path)
    first, second = find_cases(tmp_path, task, "msd")
    assert first == layouts.CaseFiles(
        id="a", patient="a", images=(tmp_path / "imagesTr" / "a.nii",), label=tmp_path / "labelsTr" / "a.nii"
    )
    assert second.id == "b"
    assert second.images == (tmp_path / "imagesTr" / "b.nii.gz",)


def test_msd_is_found_out(tmp_path: Path, task: Task) -> None:
    assert len(find_cases(write_dataset(tmp_path), task)) == 2


def test_msd_case_without_label(tmp_path: Path, task: Task) -> None:
    (case,) = find_cases(write_dataset(tmp_path, training=[{"image": "a.nii.gz"}]), task)
    assert case.label is None


def test_msd_channels_of_newer_files(tmp_path: Path, two_modalities: Task) -> None:
    write_dataset(tmp_path, modality=None)
    content = json.loads((tmp_path / "dataset.json").read_text())
    del content["modality"]
    content["channel_names"] = {"0": "T1", "1": "FLAIR"}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    assert len(find_cases(tmp_path, two_modalities)) == 2


def test_msd_with_other_modalities_than_the_task(tmp_path: Path, two_modalities: Task) -> None:
    message = refusal(write_dataset(tmp_path), two_modalities)
    assert message == (
        f"{tmp_path / 'dataset.json'}: 'modality' lists 1 (MRI), task 'blobs' needs 2 (T1, FLAIR); "
        "choose the task that fits the data"
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"modality": None}, "list the images' modalities"),
        ({"training": []}, "'training' is no list of cases"),
        ({"training": "a.nii.gz"}, "'training' is no list of cases"),
        ({"training": ["a.nii.gz"]}, "training[0]: no text under 'image'"),
        ({"training": [{"label": "a.nii.gz"}]}, "training[0]: no text under 'image'"),
        ({"training": [{"image": "a.nii.gz", "label": 3}]}, "training[0]: 'label' is 3"),
        ({"training": [{"image": ".nii.gz"}]}, "'' cannot be the id of a case"),
        ({"training": [{"image": "-rf.nii.gz"}]}, "'-rf' cannot be the id of a case"),
    ],
)
def test_broken_dataset_json(tmp_path: Path, task: Task, changes: dict[str, Any], part: str) -> None:
    message = refusal(write_dataset(tmp_path, **changes), task)
    assert message.startswith(str(tmp_path / "dataset.json"))
    assert part in message


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_dataset_json_that_is_no_json_object(tmp_path: Path, task: Task, text: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    assert refusal(tmp_path, task).startswith(str(tmp_path / "dataset.json"))


@pytest.mark.parametrize("place", ["../outside.nii.gz", "/etc/passwd", "a/../../outside.nii.gz", "a\x00.nii"])
def test_paths_may_not_leave_the_folder(tmp_path: Path, task: Task, place: str) -> None:
    data = tmp_path / "data"
    data.mkdir()
    message = refusal(write_dataset(data, training=[{"image": place}]), task)
    assert f"training[0]: {place!r} leads out of {data}" in message
    write_dataset(data, training=[{"image": "a.nii.gz", "label": place}])
    assert f"training[0]: {place!r} leads out of {data}" in refusal(data, task)


def test_links_may_not_leave_the_folder(tmp_path: Path, task: Task) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (tmp_path / "outside.nii.gz").touch()
    (data / "a.nii.gz").symlink_to(tmp_path / "outside.nii.gz")
    assert "leads out of" in refusal(write_dataset(data, training=[{"image": "a.nii.gz"}]), task)


def test_table_with_patients_and_quoted_paths(tmp_path: Path, two_modalities: Task) -> None:
    path = write_table(
        tmp_path,
        "\ufeffid, patient ,FLAIR,T1,label\n"
        'b,p1,"scans, new/b-f.nii",b-t.nii,b-l.nii\n'
        "\n"
        "a,p1,a-f.nii,a-t.nii,\n",
    )
    for root in (tmp_path, path):
        first, second = find_cases(root, two_modalities)
        assert (first.id, first.patient, first.label) == ("a", "p1", None)
        assert second.images == (tmp_path / "b-t.nii", tmp_path / "scans, new" / "b-f.nii")
        assert second.label == tmp_path / "b-l.nii"


def test_table_without_patients(tmp_path: Path, task: Task) -> None:
    write_table(tmp_path, f"id,T1,label\na,{tmp_path / 'a.nii'},l.nii\n")
    (case,) = find_cases(tmp_path, task, "csv")
    assert case.patient == "a"
    assert case.images == (tmp_path / "a.nii",)


def test_empty_cell_is_left_to_validation(tmp_path: Path, two_modalities: Task) -> None:
    write_table(tmp_path, "id,T1,FLAIR,label\na,,f.nii,l.nii\n")
    (case,) = find_cases(tmp_path, two_modalities)
    assert case.images == (tmp_path / "f.nii",)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "column id, T1, label is missing; found no header"),
        ("id,T1\n", "column label is missing; found id, T1, expected id, T1, label"),
        ("id,T1,label\n", "the table has no row"),
        ("id,T1,label\na,b.nii\n", "line 2 has 2 cells, the header 3"),
        ("id,T1,label\n,b.nii,l.nii\n", "line 2: '' cannot be the id of a case"),
        ("id,T1,label\n../a,b.nii,l.nii\n", "line 2: '../a' cannot be the id of a case"),
        ("id,T1,label\na,../b.nii,l.nii\n", "line 2: '../b.nii' leads out of"),
        ('id,T1,label\n"a', "cannot be read as a table"),
    ],
)
def test_broken_table(tmp_path: Path, task: Task, text: str, part: str) -> None:
    message = refusal(write_table(tmp_path, text), task)
    assert message.startswith(str(tmp_path / "cases.csv"))
    assert part in message


def test_table_in_another_encoding(tmp_path: Path, task: Task) -> None:
    (tmp_path / "cases.csv").write_bytes("id,T1,label\nä,b,l\n".encode("latin-1"))
    assert "save it as CSV in UTF-8" in refusal(tmp_path, task)


def test_missing_folder(tmp_path: Path, task: Task) -> None:
    assert refusal(tmp_path / "no", task) == (
        f"{tmp_path / 'no'}: there is no such folder; correct the path of the data"
    )


def test_empty_folder(tmp_path: Path, task: Task) -> None:
    assert refusal(tmp_path, task).startswith(f"{tmp_path}: the folder is empty; ")


def test_unknown_layout(tmp_path: Path, task: Task) -> None:
    assert refusal(write_dataset(tmp_path), task, "bids") == (
        "layout 'bids' is not known; known layouts: csv, msd"
    )


def test_no_layout_fits(tmp_path: Path, task: Task) -> None:
    (tmp_path / "scan.nii.gz").touch()
    assert "no layout fits (known: csv, msd)" in refusal(tmp_path, task)
    assert "no layout fits" in refusal(tmp_path / "scan.nii.gz", task)


def test_two_layouts_fit(tmp_path: Path, task: Task) -> None:
    write_dataset(tmp_path)
    write_table(tmp_path, "id,T1,label\na,a.nii,l.nii\n")
    assert "csv and msd both fit" in refusal(tmp_path, task)
    assert [case.id for case in find_cases(tmp_path, task, "csv")] == ["a"]


def test_layout_that_does_not_fit(tmp_path: Path, task: Task) -> None:
    (tmp_path / "scan.nii.gz").touch()
    assert "dataset.json: there is no such file; layout 'msd' needs it" in refusal(tmp_path, task, "msd")
    assert "cases.csv: there is no such file" in refusal(tmp_path, task, "csv")


def test_ids_of_reference_cases(tmp_path: Path) -> None:
    path = tmp_path / "reference.csv"
    path.write_text("rater,id\nx,b\ny, a \nz,\nx,b\n")
    assert read_ids(path) == {"a", "b"}


def test_ids_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "reference.csv"
    with pytest.raises(DataError, match=r"reference\.csv: there is no such file"):
        read_ids(path)
    path.write_text("case\na\n")
    with pytest.raises(DataError, match=r"reference\.csv: column id is missing; found case, expected id"):
        read_ids(path)


@pytest.mark.real_data
def test_real_cases_are_found(real_data: Path) -> None:
    cases = find_cases(real_data / "Task04_Hippocampus", load_task("msd-hippocampus"))
    assert len(cases) == 200
    assert cases[0].id == "hippocampus_003"
    assert all(case.label is not None and case.label.is_file() for case in cases)
