"""Wrong input: one clear sentence that names the file and the fix, no traceback, nothing written over."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pytest

Run = Callable[..., int]


@pytest.fixture
def refused(
    fedqc: Run, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `fedqc simulate` on something that cannot work; the result is the sentence it printed."""

    def run(*arguments: object, task: object = task_file) -> str:
        out = tmp_path / "run"
        assert fedqc("simulate", *arguments, "--task", task, "--out", out) == 2
        assert not (out / "run.json").exists()
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert message.count("\n") == 1
        assert "Traceback" not in message
        return message

    return run


def test_missing_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    message = refused("--data", tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in message


def test_empty_folder(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    message = refused("--data", tmp_path / "empty")
    assert f"{tmp_path / 'empty'}: the folder is empty; put the data there" in message


def test_no_layout_fits(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "scan.txt").write_text("x")
    assert "no layout fits" in refused("--data", tmp_path / "odd")


def test_unknown_layout(refused: Callable[..., str], data: Path) -> None:
    assert "layout 'dicom' is not known; known layouts: bids, brats, csv, " in refused(
        "--data", data, "--layout", "dicom"
    )


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--workers", 3), "--workers is for --engine ray"),
        (("--seeds", "0,x"), "--seeds '0,x': expected whole numbers separated by commas"),
        (("--seeds", ","), "expected whole numbers"),
        (("--seeds", "1,1"), "name each seed once"),
        (("--seeds", "0,1", "--seed", 2), "--seed and --seeds exclude each other"),
        (("--segmentation-rounds", 0), "segmentation.rounds"),
    ],
)
def test_options_that_do_not_fit(
    options: tuple[object, ...], sentence: str, refused: Callable[..., str], data: Path, tmp_path: Path
) -> None:
    assert sentence in refused("--data", data, *options)
    assert not (tmp_path / "run").exists()


def test_a_task_without_data(refused: Callable[..., str]) -> None:
    assert "--data is missing; task 'ellipsoids' needs a data set" in refused()


def test_a_layout_without_data(refused: Callable[..., str]) -> None:
    assert "give --data too" in refused("--layout", "msd", task="phantom")


def test_too_few_patients_leave_no_folder(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    assert "5 sites need 20 patients" in refused("--data", data, "--sites", 5)
    assert not (tmp_path / "run").exists()


def test_no_folder_for_the_run(fedqc: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert fedqc("simulate") == 2
    assert "--out is missing" in capsys.readouterr().err


def test_unknown_task(refused: Callable[..., str], data: Path) -> None:
    message = refused("--data", data, task="msd-hippocampos")
    assert "msd-hippocampos" in message
    assert "msd-hippocampus" in message


def test_unknown_key(fedqc: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('task = "msd-hippocampus"\n[qc]\nround = 3\n')
    assert fedqc("simulate", path, "--data", data, "--out", tmp_path / "run") == 2
    assert f"{path}: unknown key 'qc.round'; did you mean 'rounds'?" in capsys.readouterr().err


def test_site_name_twice(fedqc: Run, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "federation.toml"
    path.write_text('task = "msd-hippocampus"\n[sites]\nexpected = ["north", "south", "north"]\n')
    assert fedqc("simulate", path, "--data", data, "--out", tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert str(path) in message
    assert "site named twice: north" in message


def test_no_sites(refused: Callable[..., str], data: Path) -> None:
    assert "0 sites: a consortium has at least one; use --sites 1 or more" in refused(
        "--data", data, "--sites", 0
    )


def test_more_sites_than_patients(refused: Callable[..., str], data: Path) -> None:
    message = refused("--data", data, "--sites", 11)
    assert "11 sites need 44 patients with usable cases (4 each), the data have 10; use --sites 2" in message


@pytest.mark.parametrize("option", [("--seed", -1), ("--threads", 0)])
def test_numbers_out_of_range(
    fedqc: Run, option: tuple[str, int], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        fedqc("simulate", "--data", data, "--task", "msd-hippocampus", "--out", tmp_path / "run", *option)
        == 2
    )
    message = capsys.readouterr().err
    assert option[0] in message
    assert "Traceback" not in message


def test_out_inside_the_data(
    fedqc: Run, task_file: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fedqc("simulate", "--data", data, "--task", task_file, "--out", data / "run") == 2
    assert f"lies inside the data folder {data}" in capsys.readouterr().err
    assert not (data / "run").exists()


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("[sites]\nminimum = 5", "sites.minimum is 5, but there are 4 sites; lower it or use --sites 5"),
        ("[curation]\nthreshold = 0.7\nreview = 0.6", "add up to 1.3"),
    ],
)
def test_settings_that_cannot_work_together(
    fedqc: Run, *, table: str, sentence: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(f'task = "msd-hippocampus"\n{table}\n')
    assert fedqc("simulate", path, "--data", data, "--out", tmp_path / "run") == 2
    assert sentence in capsys.readouterr().err


def test_device_that_is_not_there(refused: Callable[..., str], data: Path) -> None:
    assert "device 'cuda:99': this machine has" in refused("--data", data, "--device", "cuda:99")


def test_unknown_kind(refused: Callable[..., str], data: Path) -> None:
    assert "--unseen shfit: no such kind; known: under-contouring" in refused(
        "--data", data, "--unseen", "shfit"
    )


def test_size_that_strides_do_not_divide(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    task = tmp_path / "odd.toml"
    task.write_text(
        'name = "odd"\nmodalities = ["T1"]\nspacing = [1, 1, 1]\nsize = [16, 20, 16]\n'
        "[classes]\na = [1]\nb = [2]\n[regions]\na = ['a']\n"
    )
    message = refused("--data", data, task=task)
    assert "size along y is 20" in message
    assert "16 or 24" in message


def test_modality_missing(refused: Callable[..., str], data: Path, tmp_path: Path) -> None:
    task = tmp_path / "two.toml"
    task.write_text(
        'name = "two"\nmodalities = ["T1", "T2"]\nspacing = [1, 1, 1]\nsize = [16, 16, 16]\n'
        "[classes]\na = [1]\nb = [2]\n[regions]\na = ['a']\n"
    )
    message = refused("--data", data, task=task)
    assert str(data / "dataset.json") in message
    assert "needs 2 (T1, T2)" in message


def test_nothing_is_written_over(
    fedqc: Run, data: Path, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    assert fedqc("simulate", "--data", data, "--task", task_file, "--out", out) == 2
    assert f"{out}: the run's folder is not empty; nothing is written over" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def spoil_files(data: Path) -> dict[str, str]:
    """Break five cases, each in its own way; the result is the file and what is said of it."""
    images, labels = data / "imagesTr", data / "labelsTr"
    (images / "case_00.nii.gz").write_text("no image at all")
    truncated = images / "case_01.nii.gz"
    truncated.write_bytes(truncated.read_bytes()[:-2000])
    nibabel.save(nibabel.Nifti1Image(np.ones((9, 18, 18), np.uint8), np.eye(4)), labels / "case_02.nii.gz")
    fractions = np.full((18, 18, 18), 0.5, np.float32)
    nibabel.save(nibabel.Nifti1Image(fractions, np.eye(4)), labels / "case_03.nii.gz")
    (labels / "case_04.nii.gz").write_bytes(gzip.compress(b""))
    return {
        "imagesTr/case_00.nii.gz": "it is no NIfTI file",
        "imagesTr/case_01.nii.gz": "its compressed data end too early",
        "labelsTr/case_02.nii.gz": "shape 9x18x18, expected 18x18x18",
        "labelsTr/case_03.nii.gz": "0.5",
        "labelsTr/case_04.nii.gz": "",
    }


def test_broken_cases_are_named_and_the_others_go_on(
    fedqc: Run, data: Path, task_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = spoil_files(data)
    out = tmp_path / "run"
    options = ("--sites", 1, "--rounds", 1, "--local-steps", 1, "--segmentation-rounds", 1)

    assert fedqc("simulate", "--data", data, "--task", task_file, "--out", out, *options) == 0

    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("left out: ")]
    for name, found in broken.items():
        (line,) = [line for line in lines if str(data / name) in line]
        assert found in line
        assert ";" in line  # and what to do about it
    assert len(lines) == len(broken)
    used = [path.name for path in (out / "sites").rglob("labels/*.nii.gz")]
    assert not any(f"case_0{number}" in name for number in range(5) for name in used)


def test_no_usable_case(refused: Callable[..., str], data: Path) -> None:
    spoil_files(data)
    listed = json.loads((data / "dataset.json").read_text())
    listed["training"] = listed["training"][:5]
    (data / "dataset.json").write_text(json.dumps(listed))
    message = refused("--data", data)
    assert "none of 5 cases can be used" in message
    assert "case_00" in message
