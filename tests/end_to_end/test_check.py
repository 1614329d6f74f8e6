"""`fedqc check` as a site engineer uses it: exit codes, output, and nothing written where it should not."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., int]


@pytest.fixture
def site(data: Path, task_file: Path, tmp_path: Path) -> Path:
    """A site.toml beside a data folder of ten good cases."""
    (tmp_path / "verified.csv").write_text("id\ncase_00\ncase_01\n")
    path = tmp_path / "site.toml"
    path.write_text(
        f'name = "hospital-a"\ntask = "{task_file}"\n[data]\npath = "data"\nreference = "verified.csv"\n'
        "[policy]\nmin_count = 3\n"
    )
    return path


def digest(folder: Path) -> str:
    """Of all names, contents and times of change in a folder."""
    content = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        content.update(f"{path} {path.stat().st_mtime_ns}".encode())
        content.update(path.read_bytes() if path.is_file() else b"")
    return content.hexdigest()


def test_a_clean_folder(fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digest(data)
    assert fedqc("check", site) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "layout msd (detected), task ellipsoids" in lines
    assert "label value: 1 (10), 2 (10)" in lines
    assert "10 of 10 cases can be used (10 patients, 2 references), 0 left out, 0 with warnings" in lines
    assert digest(data) == before
    assert len(list((site.parent / "cache" / "checks").iterdir())) == 10


def test_problems_are_named_with_their_fix(
    fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken, twin = data / "labelsTr" / "case_03.nii.gz", data / "imagesTr" / "case_05.nii.gz"
    broken.write_bytes(broken.read_bytes()[:-50])
    shutil.copyfile(data / "imagesTr" / "case_04.nii.gz", twin)
    assert fedqc("check", site) == 1
    out = capsys.readouterr().out
    example = out[out.index("truncated: case case_03, labelsTr/case_03.nii.gz\n") :].splitlines()
    assert [line.split()[0] for line in example[1:4]] == ["found", "expected", "to"]
    assert example[1].startswith(
        "    found     a file that cannot be read: its compressed data end too early"
    )
    assert "duplicate-image: case case_04" in out
    assert "9 of 10 cases can be used (9 patients, 2 references), 1 left out, 2 with warnings" in out


def test_a_reference_that_is_no_case_is_no_case(
    fedqc: Run, site: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (site.parent / "verified.csv").write_text("id\ncase_00\nCASE_01\n")
    assert fedqc("check", site) == 1
    out = capsys.readouterr().out
    assert f"unknown-reference: {site.parent / 'verified.csv'}\n" in out
    assert "there is a case 'case_01'" in out
    assert "(10 patients, 1 reference), 0 left out, 0 with warnings" in out


def test_json_for_machines(fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "labelsTr" / "case_03.nii.gz").unlink()
    assert fedqc("check", site, "--json") == 1
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert list(found) == ["layout", "cases", "usable", "problems", "datasheet"]
    assert (found["layout"], found["cases"], found["usable"]) == ("msd", 10, 9)
    (problem,) = found["problems"]
    assert list(problem) == ["code", "severity", "case", "file", "found", "expected", "fix"]
    assert (problem["code"], problem["severity"], problem["case"]) == ("missing-label", "error", "case_03")
    assert found["datasheet"]["cases"] == 9


def test_nothing_usable(fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in (data / "labelsTr").iterdir():
        path.write_bytes(b"")
    assert fedqc("check", site) == 2
    assert "0 of 10 cases can be used" in capsys.readouterr().out


def test_the_report_writes_over_nothing_but_a_report(
    fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = site.parent / "check.html"
    assert fedqc("check", site, "--html", page) == 0
    assert "Data of hospital-a" in page.read_text()
    assert fedqc("check", site, "--html", page) == 0
    capsys.readouterr()
    listed = digest(site.parent)
    for wrong, reason in (
        (site, "is there already and was not written by fedqc check; nothing is written over"),
        (site.parent / "verified.csv", "is there already and was not written"),
        (site.parent / "cache", "is a folder; name a file in it"),
        (site.parent / "nowhere" / "check.html", "there is no such folder; make it first"),
        (data / "check.html", "lies inside the data folder"),
    ):
        assert fedqc("check", site, "--html", wrong) == 2
        message = capsys.readouterr().err
        assert message.startswith("error: ")
        assert reason in message
    assert digest(site.parent) == listed


def test_all_problems_as_a_table(
    fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (3, 5):
        (data / "labelsTr" / f"case_0{number}.nii.gz").write_bytes(b"")
    (data / "imagesTr" / "case_0x.nii.gz").write_bytes(b"")
    path = site.parent / "problems.csv"
    assert fedqc("check", site, "--csv", path) == 1
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["code"], row["severity"], row["case"]) for row in rows] == [
        ("unexpected-file", "warning", ""),
        ("empty-file", "error", "case_03"),
        ("empty-file", "error", "case_05"),
    ]
    assert rows[0]["file"] == str(data / "imagesTr" / "case_0x.nii.gz")
    assert all(row["found"] and row["expected"] and row["fix"] for row in rows)
    assert fedqc("check", site, "--csv", path) == 1  # its own table is written over, nothing else is
    capsys.readouterr()
    assert fedqc("check", site, "--csv", site.parent / "verified.csv") == 2
    assert "nothing is written over" in capsys.readouterr().err
    assert (site.parent / "verified.csv").read_text() == "id\ncase_00\ncase_01\n"


def test_a_folder_without_a_site(
    fedqc: Run, data: Path, task_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digest(data.parent)
    assert fedqc("check", "--data", data, "--task", task_file) == 0
    assert "10 of 10 cases can be used" in capsys.readouterr().out
    assert digest(data.parent) == before  # and leaves nothing behind


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ((), "nothing to check; name a site.toml (`fedqc init site` writes one), or --data and --task"),
        (("--data", "data"), "--task is missing"),
        (("--task", "wmh"), "--data is missing"),
        (("site.toml", "--task", "wmh"), "--task: stands in site.toml already"),
    ],
)
def test_what_to_check_is_named_once(
    fedqc: Run, capsys: pytest.CaptureFixture[str], *, options: tuple[str, ...], reason: str
) -> None:
    assert fedqc("check", *options) == 2
    assert reason in capsys.readouterr().err


@pytest.mark.parametrize(
    ("cache", "reason"),
    [("data/cache", "lies inside the data folder"), ("site.toml/cache", "cannot be written")],
)
def test_without_a_cache_nothing_is_remembered(
    fedqc: Run, site: Path, data: Path, capsys: pytest.CaptureFixture[str], *, cache: str, reason: str
) -> None:
    site.write_text(site.read_text() + f'[compute]\ncache = "{cache}"\n')
    before = digest(data)
    assert fedqc("check", site) == 0
    out = capsys.readouterr().out
    assert f"the cache {site.parent / cache} {reason}" in out
    assert "so nothing is remembered" in out
    assert digest(data) == before


def test_wrong_input_is_a_sentence(fedqc: Run, site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    site.write_text(site.read_text().replace('path = "data"', 'path = "daata"'))
    assert fedqc("check", site) == 2
    output = capsys.readouterr()
    assert output.err.startswith(f"error: {site.parent / 'daata'}: there is no such folder")
    assert "cache" not in output.out
    assert fedqc("check", site.parent / "sites.toml") == 2
    assert "there is no such file" in capsys.readouterr().err
    assert fedqc("check", os.devnull) == 2
    assert "key 'name' is missing" in capsys.readouterr().err
