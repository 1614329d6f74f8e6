import json
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from fedqc.cases import layouts
from fedqc.cases.layouts import CsvLayout, MsdLayout, NnunetLayout, find_cases, load_layouts, read_ids
from fedqc.cases.validation import validate_case
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


def write_nnunet(folder: Path, ids: tuple[str, ...] = ("b", "a"), channels: int = 2, **changes: Any) -> Path:
    """An nnU-Net folder, version 2, with empty files; a change to None takes a key out."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in ids:
        for channel in range(channels):
            (folder / "imagesTr" / f"{case}_{channel:04d}.nii.gz").touch()
        (folder / "labelsTr" / f"{case}.nii.gz").touch()
    dataset = {
        "channel_names": {"0": "FLAIR", "1": "T1"},
        "labels": {"background": 0, "whole": [1, 2], "core": 1},
        "numTraining": len(ids),
        "file_ending": ".nii.gz",
        **changes,
    }
    kept = {key: value for key, value in dataset.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))
    return folder


def version_1(**changes: Any) -> dict[str, Any]:
    """The changes that make a dataset.json of version 1."""
    training = [{"image": f"./imagesTr/{i}.nii.gz", "label": f"./labelsTr/{i}.nii.gz"} for i in "ab"]
    labels = {"0": "background", "1": "core"}
    old = {"modality": {"0": "FLAIR", "1": "T1"}, "training": training, "labels": labels}
    return {"channel_names": None, "file_ending": None, **old, **changes}


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
    assert known["nnunet"] is NnunetLayout


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


@pytest.mark.parametrize("changes", [{}, version_1()], ids=["version 2", "version 1"])
def test_nnunet_channels_in_the_order_of_the_task(
    tmp_path: Path, two_modalities: Task, changes: dict[str, Any]
) -> None:
    write_nnunet(tmp_path, **changes)
    first, second = find_cases(tmp_path, two_modalities)
    assert first == layouts.CaseFiles(
        id="a",
        patient="a",
        images=(tmp_path / "imagesTr" / "a_0001.nii.gz", tmp_path / "imagesTr" / "a_0000.nii.gz"),
        label=tmp_path / "labelsTr" / "a.nii.gz",
    )
    assert second.id == "b"
    assert not MsdLayout.detect(tmp_path)


@pytest.mark.parametrize(
    ("names", "first"),
    [
        ({"1": "t1", "0": "Flair"}, 1),  # in any case and order
        ({"0": "t1", "1": "flair"}, 0),
        (["FLAIR", "T1"], 1),
        ({"0": "FLAIR", "1": "T1ce"}, 0),  # not the task's names: as they come
        ({"0": "T1", "1": "T1"}, 0),
    ],
)
def test_nnunet_names_of_channels(tmp_path: Path, two_modalities: Task, names: object, first: int) -> None:
    write_nnunet(tmp_path, channel_names=names)
    case, _ = find_cases(tmp_path, two_modalities)
    assert [path.name for path in case.images] == [f"a_000{first}.nii.gz", f"a_000{1 - first}.nii.gz"]


def test_nnunet_three_channels_in_the_order_of_the_task(tmp_path: Path, task: Task) -> None:
    three = task.model_copy(update={"modalities": ("T1", "T2", "FLAIR")})
    write_nnunet(tmp_path, ("a",), 3, channel_names={"0": "T2", "1": "FLAIR", "2": "T1"})
    (case,) = find_cases(tmp_path, three)
    assert [path.name[-11:-7] for path in case.images] == ["0002", "0000", "0001"]


def test_nnunet_modalities_that_differ_in_case_only(tmp_path: Path, task: Task) -> None:
    both = task.model_copy(update={"modalities": ("t1", "T1")})
    write_nnunet(tmp_path, ("a",), channel_names={"0": "t1", "1": "T1"})
    (case,) = find_cases(tmp_path, both)
    assert [path.name[-11:-7] for path in case.images] == ["0000", "0001"]


def test_nnunet_ids_with_numbers_and_other_files(tmp_path: Path, task: Task) -> None:
    ids = ("la_003", "la_0000", "0001")
    write_nnunet(tmp_path, ids, 1, channel_names={"0": "T1"})
    for name in ("._la_003_0000.nii.gz", "notes.txt", "la_003_0000.json"):
        (tmp_path / "imagesTr" / name).touch()
    cases = find_cases(tmp_path, task)
    assert [case.id for case in cases] == ["0001", "la_0000", "la_003"]
    assert [case.images[0].name for case in cases] == [f"{case.id}_0000.nii.gz" for case in cases]


def test_nnunet_of_uncompressed_files(tmp_path: Path, task: Task) -> None:
    write_nnunet(tmp_path, (), channel_names=["MRI"], file_ending=".nii", numTraining=1)
    (tmp_path / "imagesTr" / "a_0000.nii").touch()
    (case,) = find_cases(tmp_path, task)
    assert case.images == (tmp_path / "imagesTr" / "a_0000.nii",)
    assert case.label == tmp_path / "labelsTr" / "a.nii"


@pytest.mark.parametrize("missing", ["imagesTr/a_0001.nii.gz", "labelsTr/a.nii.gz"])
def test_nnunet_missing_file_is_left_to_validation(
    tmp_path: Path, two_modalities: Task, missing: str
) -> None:
    (write_nnunet(tmp_path) / missing).unlink()
    case, _ = find_cases(tmp_path, two_modalities)
    found = [
        problem.file for problem in validate_case(case, two_modalities) if problem.code == "missing-file"
    ]
    assert found == [tmp_path / missing]


def test_nnunet_label_without_images_is_a_case(tmp_path: Path, task: Task) -> None:
    write_nnunet(tmp_path, ("a", "b"), 1, channel_names=["T1"])
    (tmp_path / "imagesTr" / "a_0000.nii.gz").unlink()
    case, _ = find_cases(tmp_path, task)
    assert (case.id, case.images) == ("a", (tmp_path / "imagesTr" / "a_0000.nii.gz",))


def test_nnunet_list_of_paths(tmp_path: Path, two_modalities: Task) -> None:
    listed = {
        "b": {"images": ["mri/b flair.nii.gz", "mri/b t1.nii.gz"], "label": "b.nii.gz"},
        "a": {"images": [str(tmp_path / "a_0000.nii.gz"), "a_0001.nii.gz"]},
    }
    content = {"channel_names": {"0": "FLAIR", "1": "T1"}, "file_ending": ".nii.gz", "dataset": listed}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    first, second = find_cases(tmp_path, two_modalities)
    assert first.images == (tmp_path / "a_0001.nii.gz", tmp_path / "a_0000.nii.gz")
    assert first.label is None
    assert second.images == (tmp_path / "mri" / "b t1.nii.gz", tmp_path / "mri" / "b flair.nii.gz")
    assert (second.patient, second.label) == ("b", tmp_path / "b.nii.gz")


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"channel_names": None}, "neither 'modality' nor 'channel_names' is there"),
        ({"channel_names": {"0": "T1"}}, "'channel_names' lists 1 (T1), task 'blobs' needs 2 (T1, FLAIR)"),
        ({"channel_names": {"1": "T1", "2": "FLAIR"}}, "channels are numbered 1, 2, expected 0, 1"),
        ({"file_ending": ".png"}, "'file_ending' is '.png', expected .nii.gz or .nii; convert"),
        ({"file_ending": [".nii"]}, "'file_ending' is ['.nii'], expected"),
        ({"numTraining": 3}, "'numTraining' is 3, found 2 cases; copy the missing files"),
        ({"numTraining": "2"}, "'numTraining' is '2', found 2 cases"),
        ({"dataset": []}, "'dataset' is no list of cases"),
        ({"dataset": {}}, "'dataset' is no list of cases"),
        ({"dataset": {"a": ["b"]}}, "dataset['a']: no list of paths under 'images'"),
        ({"dataset": {"a": {"images": "b"}}}, "dataset['a']: no list of paths under 'images'"),
        ({"dataset": {"a": {"images": ["b", 3]}}}, "dataset['a']: no list of paths under 'images'"),
        ({"dataset": {"a": {"images": ["b"]}}}, "dataset['a']: lists 1 images, expected 2"),
        ({"dataset": {"a": {"images": ["b", "c"], "label": 3}}}, "dataset['a']: 'label' is 3"),
        ({"dataset": {"../a": {"images": ["b", "c"]}}}, "'../a' cannot be the id of a case"),
        ({"dataset": {"a": {"images": ["b", "../c"]}}}, "dataset['a']: '../c' leads out of"),
        ({"dataset": {"a": {"images": ["b", "c"], "label": "/d"}}}, "dataset['a']: '/d' leads out of"),
    ],
)
def test_broken_nnunet_list(tmp_path: Path, two_modalities: Task, changes: dict[str, Any], part: str) -> None:
    message = refusal(write_nnunet(tmp_path, **changes), two_modalities)
    assert message.startswith(str(tmp_path / "dataset.json"))
    assert part in message


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a.nii.gz", "is no channel that dataset.json lists, expected a name as ID_0000.nii.gz to ID_0001"),
        ("a_0002.nii.gz", "is no channel"),
        ("c_0000.nii", "is no channel"),
        ("c_00000.nii.gz", "is no channel"),
        ("_0000.nii.gz", "'' cannot be the id of a case"),
    ],
)
def test_strange_file_among_nnunet_images(tmp_path: Path, two_modalities: Task, name: str, part: str) -> None:
    path = write_nnunet(tmp_path) / "imagesTr" / name
    path.touch()
    message = refusal(tmp_path, two_modalities)
    assert message.startswith(f"{path}: ")
    assert part in message


def test_nnunet_without_images(tmp_path: Path, two_modalities: Task) -> None:
    write_nnunet(tmp_path, ())
    assert "there is no image; put ID_0000.nii.gz" in refusal(tmp_path, two_modalities, "nnunet")
    (tmp_path / "imagesTr").rmdir()
    assert "imagesTr: cannot be listed (No such file" in refusal(tmp_path, two_modalities, "nnunet")


def test_nnunet_links_may_not_leave_the_folder(tmp_path: Path, two_modalities: Task) -> None:
    data = write_nnunet(tmp_path / "data")
    (tmp_path / "outside.nii.gz").touch()
    link = data / "imagesTr" / "a_0001.nii.gz"
    link.unlink()
    link.symlink_to(tmp_path / "outside.nii.gz")
    assert f"'imagesTr/a_0001.nii.gz' leads out of {data}" in refusal(data, two_modalities)


def test_decathlon_images_numbered_like_channels(tmp_path: Path, task: Task) -> None:
    names = [f"scan_{number:04d}.nii.gz" for number in range(3)]
    (tmp_path / "imagesTr").mkdir()
    for name in names:
        (tmp_path / "imagesTr" / name).touch()
    write_dataset(tmp_path, training=[{"image": f"./imagesTr/{name}"} for name in names])
    assert not NnunetLayout.detect(tmp_path)
    assert [case.id for case in find_cases(tmp_path, task)] == ["scan_0000", "scan_0001", "scan_0002"]


@pytest.mark.parametrize("training", [5, ["a"], [{"image": 3}], [{"image": "a" * 5000}], [{"image": "\0"}]])
def test_layout_of_a_broken_list_is_found_out(tmp_path: Path, task: Task, training: object) -> None:
    write_dataset(tmp_path, training=training)
    assert (MsdLayout.detect(tmp_path), NnunetLayout.detect(tmp_path)) == (True, False)
    (tmp_path / "imagesTr").mkdir()
    (tmp_path / "imagesTr" / "a_0000.nii.gz").touch()
    assert (MsdLayout.detect(tmp_path), NnunetLayout.detect(tmp_path)) == (False, True)


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
        ("id,T1,label,Patient\n", "found a column 'Patient', expected 'patient'; rename or remove it"),
        ("ID,T1,label\n", "found a column 'ID', expected 'id'"),
        ("id,t1,T1,label\n", "found a column 't1', expected 'T1'"),
        ("id,T1,label,T1\n", "column 'T1' occurs 2 times; leave one of them"),
        ("id,T1,label,age,age\n", "column 'age' occurs 2 times"),
        ("id;T1;label\n", "separated by commas, not by semicolons; save the table again"),
    ],
)
def test_broken_table(tmp_path: Path, task: Task, text: str, part: str) -> None:
    message = refusal(write_table(tmp_path, text), task)
    assert message.startswith(str(tmp_path / "cases.csv"))
    assert part in message


def test_columns_of_ones_own_are_left_alone(tmp_path: Path, task: Task) -> None:
    write_table(tmp_path, "id,T1,label,age,,\na,a.nii,l.nii,61,,\n")
    assert len(find_cases(tmp_path, task)) == 1


def test_modalities_that_differ_in_case_only(tmp_path: Path, task: Task) -> None:
    both = task.model_copy(update={"modalities": ("t1", "T1")})
    write_table(tmp_path, "id,T1,t1,label\na,upper.nii,lower.nii,l.nii\n")
    (case,) = find_cases(tmp_path, both)
    assert [path.name for path in case.images] == ["lower.nii", "upper.nii"]


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
        "layout 'bids' is not known; known layouts: csv, msd, nnunet"
    )


def test_no_layout_fits(tmp_path: Path, task: Task) -> None:
    (tmp_path / "scan.nii.gz").touch()
    assert "no layout fits (known: csv, msd, nnunet)" in refusal(tmp_path, task)
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
    path.write_text("Id\na\n")
    with pytest.raises(DataError, match=r"found a column 'Id', expected 'id'; rename or remove it"):
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
