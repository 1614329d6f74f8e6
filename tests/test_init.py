"""`fedqc init`: what is asked, what is written, and what is refused."""

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import typer
from cryptography import x509
from typer.testing import CliRunner

from fedqc import cli, init
from fedqc.commands import init as init_command
from fedqc.config import (
    CoordinatorConfig,
    FederationConfig,
    FrozenModel,
    SiteConfig,
    field_of,
    load_federation,
    load_site,
    parse,
)
from fedqc.errors import FedQCError
from fedqc.task import built_in_tasks

COLUMNS = "id,patient,T1,label\n"
ANSWERS = ["hospital-a", "msd-hippocampus", "../scans", "", "", "", "", ""]
"""To each question about a site, up to the coordinator's address."""
NEEDED = ("--name", "hospital-a", "--task", "msd-hippocampus", "--data", "../scans")
FEDERATION_ANSWERS = ["", "phantom", "", "", "", "", "", ""]


@dataclass(frozen=True)
class Said:
    """How a command ended."""

    code: int
    output: str
    error: str


Fedqc = Callable[..., Said]


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Three cases of two patients."""
    folder = tmp_path / "scans"
    folder.mkdir()
    rows = "".join(f"{name},{name[0]},{name}.nii.gz,{name}-label.nii.gz\n" for name in ("a1", "a2", "b1"))
    (folder / "cases.csv").write_text(COLUMNS + rows)
    return folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that the commands are typed in."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def fedqc(here: Path, monkeypatch: pytest.MonkeyPatch) -> Fedqc:
    """Run a command; with answers, as if somebody sat at a terminal."""

    def run(*arguments: object, answers: Sequence[str] | None = None) -> Said:
        typed = "".join(f"{answer}\n" for answer in answers or ())
        with monkeypatch.context() as terminal:
            if answers is not None:
                terminal.setattr(init_command, "_may_ask", lambda yes: not yes)
            done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=typed)
        if isinstance(done.exception, FedQCError):
            return Said(done.exception.exit_code, done.stdout, str(done.exception))
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Said(done.exit_code, done.stdout, done.stderr)

    return run


def answered(number: int, *answers: str) -> list[str]:
    """All answers about a site, those to one question replaced."""
    return [*ANSWERS[:number], *answers, *ANSWERS[number + 1 :]]


def table(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------- asking


def test_a_site_by_asking(fedqc: Fedqc, here: Path, scans: Path) -> None:
    table(here / "verified.csv", "id", "a1", "b1", "x")
    table(here / "ratings.csv", "id,rater,view,stars", "a1,anna,all,4.5", "a1,ben,all,5")
    (here / "ca.crt").touch()
    said = fedqc(
        *("init", "site"),
        answers=[
            *("hospital-a", "msd-hippocampus", "../scans", "verified.csv", "ratings.csv"),
            *("20", "no", "fl.example.org:443", "ca.crt"),
        ],
    )
    assert said.code == 0
    assert load_site(here / "site.toml") == SiteConfig.model_validate(
        {
            "name": "hospital-a",
            "task": "msd-hippocampus",
            "data": {
                "path": scans,
                "reference": here / "verified.csv",
                "ratings": here / "ratings.csv",
            },
            "results": here / "results",
            "compute": {"cache": here / "cache"},
            "policy": {"min_count": 20, "segmentation": False},
            "coordinator": {
                "address": "fl.example.org:443",
                "ca": here / "ca.crt",
                "key": here / "hospital-a.key",
            },
        }
    )
    assert "found 3 cases of 2 patients, layout csv (detected)\n" in said.output
    assert "names 2 of 3 cases, and 1 id of no case\n" in said.output
    assert "names 1 of 3 cases\n" in said.output
    public = (here / "hospital-a.pub").read_text().strip()
    assert f"send {here / 'hospital-a.pub'} to the coordinator:\n{public}\n" in said.output
    assert (here / "hospital-a.key").stat().st_mode & 0o777 == 0o600
    assert said.output.endswith("site.toml is written. Next: fedqc check site.toml\n")


def test_enter_takes_the_defaults(fedqc: Fedqc, here: Path, scans: Path) -> None:
    assert fedqc("init", "site", answers=ANSWERS).code == 0
    site = load_site(here / "site.toml")
    assert site.policy == SiteConfig.model_fields["policy"].default
    assert site.coordinator == CoordinatorConfig(key=here / f"{site.name}.key")
    assert (site.data.reference, site.data.ratings, site.data.layout) == (None, None, None)
    written = tomllib.loads((here / "site.toml").read_text())
    assert written["policy"] == {"min_count": 10, "segmentation": True}, "what was asked is written"
    assert written["compute"] == {}, "what was not asked is not"


@pytest.mark.parametrize(
    ("number", "wrong", "sentence"),
    [
        (0, "Hospital A", "a site's name is up to 63 lower-case letters, digits and hyphens"),
        (0, "", "this is needed"),
        (0, "   ", "this is needed"),
        (1, "hippocampus", "task 'hippocampus' is not built in; did you mean 'msd-hippocampus'?"),
        (1, "own.toml", "own.toml: there is no such file"),
        (1, "", "this is needed"),
        (2, "../nowhere", "nowhere: there is no such folder or table"),
        (2, "", "this is needed"),
        (2, ".", "site.toml would lie inside the data folder"),
        (2, "..", "site.toml would lie inside the data folder"),
        (2, "cases.csv", "site.toml would lie inside the data folder"),
        (2, "~nobody-of-this-name", "there is no such user"),
        (2, "a\0b", "no file can have this name"),
        (3, "nowhere.csv", "nowhere.csv: there is no such file; make a table"),
        (3, "empty.csv", "empty.csv: names no case"),
        (3, "others.csv", "none of its ids, such as 'x', is a case; these are called such as 'a1'"),
        (3, "ratings.csv", "none of its ids, such as 'x', is a case"),
        (4, "others.csv", "column rater, view, stars is missing"),
        (4, "stars.csv", "stars.csv: line 2: stars is '7', expected a number from 1 to 6"),
        (4, "ratings.csv", "none of its ids, such as 'x', is a case"),
        (5, "0", "greater than or equal to 1 (found '0')"),
        (5, "ten", "integer"),
        (6, "perhaps", "answer yes or no (found 'perhaps')"),
        (7, "https://fl.example.org", "an address is a host and a port from 1 to 65535"),
    ],
)
@pytest.mark.usefixtures("scans")
def test_a_wrong_answer_is_asked_again(
    fedqc: Fedqc, here: Path, number: int, wrong: str, sentence: str
) -> None:
    table(here / "cases.csv", COLUMNS.strip())
    table(here / "empty.csv", "id")
    table(here / "others.csv", "id", "y", "x")
    table(here / "ratings.csv", "id,rater,view,stars", "x,anna,all,5")
    table(here / "stars.csv", "id,rater,view,stars", "a1,anna,all,7")
    assert fedqc("init", "site", "right.toml", answers=ANSWERS).code == 0
    said = fedqc("init", "site", answers=answered(number, wrong, wrong, ANSWERS[number]))
    assert said.code == 0
    assert len(re.findall(rf"^  .*{re.escape(sentence)}", said.output, re.MULTILINE)) == 2
    assert load_site(here / "site.toml") == load_site(here / "right.toml")


def test_all_tasks_are_shown(fedqc: Fedqc, scans: Path) -> None:
    said = fedqc("init", "site", answers=ANSWERS)
    shown = re.findall(r"^  ([a-z-]+)  +[A-Z]", said.output, re.MULTILINE)
    assert shown == built_in_tasks()


def test_where_several_layouts_fit_one_has_to_be_chosen(fedqc: Fedqc, here: Path, scans: Path) -> None:
    training = [{"image": "a1.nii.gz", "label": "a1-label.nii.gz"}]
    (scans / "dataset.json").write_text(json.dumps({"modality": {"0": "MRI"}, "training": training}))
    said = fedqc("init", "site", answers=answered(2, "../scans", "dicom", "msd"))
    assert said.code == 0
    assert "the layouts csv and msd both fit; name the one to use\n" in said.output
    assert "  layout 'dicom' is not known; known layouts: " in said.output
    assert "found 1 case of 1 patient, layout msd\n" in said.output
    assert load_site(here / "site.toml").data.layout == "msd"
    said = fedqc("init", "site", "other.toml", *NEEDED)
    assert (said.code, said.error) == (2, f"{scans}: the layouts csv and msd both fit; name the one to use")
    assert fedqc("init", "site", "other.toml", *NEEDED, "--layout", "csv").code == 0
    assert load_site(here / "other.toml").data.layout == "csv"
    said = fedqc("init", "site", "third.toml", *NEEDED, answers=["csv", *ANSWERS[3:]])
    assert said.code == 0
    assert load_site(here / "third.toml").data.layout == "csv"


def test_an_option_of_a_layout(fedqc: Fedqc, here: Path, tmp_path: Path) -> None:
    for rater in ("anna", "ben"):
        for place, name in (("", "sub-01_T1w"), (f"derivatives/{rater}/", "sub-01_dseg")):
            folder = tmp_path / "scans" / f"{place}sub-01" / "anat"
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{name}.nii.gz").touch()
    said = fedqc("init", "site", answers=answered(2, "../scans", "bids:carl", "bids:ben"))
    assert said.code == 0
    assert "found 1 case of 1 patient, layout bids:ben\n" in said.output
    assert load_site(here / "site.toml").data.layout == "bids:ben"


@pytest.mark.parametrize("hopeless", ["odd", "half", "empty"])
def test_a_folder_that_cannot_be_listed(fedqc: Fedqc, here: Path, scans: Path, hopeless: str) -> None:
    folder = here.parent / hopeless
    folder.mkdir()
    if hopeless == "odd":
        (folder / "scan.txt").touch()
    if hopeless == "half":
        (folder / "cases.csv").write_text("id,label\na1,a1.nii.gz\n")
    said = fedqc("init", "site", "other.toml", answers=answered(2, str(folder), "", "n", "../scans"))
    assert said.code == 0
    assert f"  {folder}" in said.output
    assert load_site(here / "other.toml").data.path == scans
    said = fedqc("init", "site", "mended.toml", answers=answered(2, str(folder), "", "y"))
    assert said.code == 0
    assert load_site(here / "mended.toml").data.path == folder
    for answers in (None, ["", "n"]):
        said = fedqc("init", "site", *NEEDED, "--data", folder, answers=answers)
        assert said.code == 2
        assert str(folder) in said.error
        assert not (here / "site.toml").exists()


def test_what_is_given_as_an_option_is_not_asked(fedqc: Fedqc, here: Path, scans: Path) -> None:
    said = fedqc("init", "site", *NEEDED, "--min-count", "5", answers=["", "", "no", "h:1", "", ""])
    assert said.code == 0
    site = load_site(here / "site.toml")
    assert (site.policy.min_count, site.policy.segmentation, site.coordinator.address) == (5, False, "h:1")
    assert "Name of this site" not in said.output
    assert "Built-in tasks" not in said.output


def test_certificate_and_key_are_asked_for_only_with_an_address(fedqc: Fedqc, scans: Path) -> None:
    assert "Certificate" not in fedqc("init", "site", answers=ANSWERS).output


@pytest.mark.parametrize("number", range(len(ANSWERS)))
def test_the_end_of_input_stops_before_anything_is_written(
    fedqc: Fedqc, here: Path, scans: Path, number: int
) -> None:
    said = fedqc("init", "site", answers=ANSWERS[:number])
    assert (said.code, said.error) == (130, "\nstopped; nothing is written\n")
    assert list(here.iterdir()) == []


# ------------------------------------------------------------------------------------------------ options


def test_a_site_from_options(fedqc: Fedqc, here: Path, scans: Path) -> None:
    table(here / "verified.csv", "id", "a1")
    table(here / "ratings.csv", "id,rater,view,stars", "b1,anna,all,4")
    key = here / "site.key"
    key.touch(0o600)
    given = {
        "--name": "hospital-a",
        "--task": "msd-hippocampus",
        "--data": scans / "cases.csv",
        "--layout": "csv",
        "--reference": "verified.csv",
        "--ratings": "ratings.csv",
        "--results": "kept",
        "--device": "cuda:1",
        "--precision": "fp32",
        "--workers": 7,
        "--cache": here.parent / "fast",
        "--min-count": 12,
        "--address": "[::1]:443",
        "--ca": "site.key",
        "--key": "site.key",
    }
    options = [str(word) for pair in given.items() for word in pair]
    said = fedqc("init", "site", "b/site.toml", *options, "--no-segmentation")
    assert said.error == f"b/site.toml: there is no folder {here / 'b'}; make it first"
    (here / "b").mkdir()
    said = fedqc("init", "site", "b/site.toml", *options, "--no-segmentation")
    assert said.code == 0
    assert "note" not in said.output
    assert said.output.endswith("b/site.toml is written. Next: fedqc check b/site.toml\n")
    assert load_site(here / "b" / "site.toml") == SiteConfig.model_validate(
        {
            "name": "hospital-a",
            "task": "msd-hippocampus",
            "data": {
                "path": scans / "cases.csv",
                "layout": "csv",
                "reference": here / "verified.csv",
                "ratings": here / "ratings.csv",
            },
            "results": here / "kept",
            "compute": {
                "device": "cuda:1",
                "precision": "fp32",
                "workers": 7,
                "cache": here.parent / "fast",
            },
            "policy": {"min_count": 12, "segmentation": False},
            "coordinator": {"address": "[::1]:443", "ca": key, "key": key},
        }
    )


def test_every_key_has_an_option_and_every_option_a_key(scans: Path) -> None:
    rare = {
        "compute.memory",
        "policy.refuse",
        "policy.largest_model",
        "policy.hours",
        "policy.sheet",
    }  # in the file only
    assert sorted(init.SITE_OPTIONS.values()) == sorted(set(keys(SiteConfig)) - rare)
    assert set(init.FEDERATION_OPTIONS.values()) < set(keys(FederationConfig))
    for command, options in (("site", init.SITE_OPTIONS), ("federation", init.FEDERATION_OPTIONS)):
        group = typer.main.get_command(cli.app)
        assert isinstance(group, click.Group)
        inner = group.commands["init"]
        assert isinstance(inner, click.Group)
        found = [one.opts[0] for one in inner.commands[command].params if isinstance(one, click.Option)]
        assert {*options, "--yes"} == {option for option in found if option not in ("--help", "--host")}


@pytest.mark.parametrize("missing", ["--name", "--task", "--data"])
@pytest.mark.parametrize("yes", [True, False])
def test_a_missing_option_is_named_where_nobody_can_be_asked(
    fedqc: Fedqc, here: Path, scans: Path, missing: str, yes: bool
) -> None:
    place = NEEDED.index(missing)
    left = NEEDED[:place] + NEEDED[place + 2 :]
    # With --yes even somebody at a terminal is not asked; without, there is none here.
    said = fedqc("init", "site", *left, *(["--yes"] if yes else []), answers=[] if yes else None)
    assert said.code == 2
    assert said.error.startswith(f"{missing} is missing: ")
    assert "\n" not in said.error
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value", "sentence"),
    [
        ("--name", "A", "a site's name is"),
        ("--task", "glioma", "task 'glioma' is not built in; did you mean"),
        ("--data", "../nowhere", "there is no such folder or table"),
        ("--reference", "nowhere.csv", "nowhere.csv: there is no such file"),
        ("--ratings", "nowhere.csv", "nowhere.csv: there is no such file"),
        ("--results", "../scans/results", "lies inside the data folder"),
        ("--results", "file", "file: is a file; name a folder"),
        ("--cache", "../scans", "lies inside the data folder"),
        ("--device", "gpu", "a device is 'auto'"),
        ("--precision", "fp16", "input should be 'auto', 'fp32' or 'bf16' (found 'fp16')"),
        ("--workers", "0", "greater than or equal to 1 (found 0)"),
        ("--min-count", "-1", "greater than or equal to 1 (found -1)"),
        ("--address", "fl.example.org", "an address is a host and a port"),
        ("--ca", "~nobody-of-this-name/ca.crt", "there is no such user"),
    ],
)
@pytest.mark.usefixtures("scans")
def test_a_wrong_option_is_named(fedqc: Fedqc, here: Path, option: str, value: str, sentence: str) -> None:
    (here / "file").touch()
    for answers in (None, ANSWERS):  # an option that is wrong is an error even at a terminal
        said = fedqc("init", "site", *NEEDED, option, value, answers=answers)
        assert said.code == 2
        assert said.error.startswith(f"{option}: ")
        assert sentence in said.error
        assert "\n" not in said.error
    assert [path.name for path in here.iterdir()] == ["file"]


def test_a_key_that_others_may_read_is_noted(fedqc: Fedqc, here: Path, scans: Path) -> None:
    (here / "site.key").touch()
    (here / "site.key").chmod(0o644)
    said = fedqc("init", "site", *NEEDED, "--key", "site.key")
    assert said.code == 0
    assert "note: " in said.output
    assert "chmod 600" in said.output


# -------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
@pytest.mark.parametrize("command", ["site", "federation"])
def test_nothing_is_written_over(fedqc: Fedqc, here: Path, kind: str, command: str) -> None:
    target = here / "there.toml"
    match kind:
        case "file":
            target.write_text("mine")
        case "folder":
            target.mkdir()
        case "link":
            target.symlink_to("nowhere.toml")
    said = fedqc("init", command, "there.toml", answers=[])
    assert said.code == 2
    assert said.error.startswith("there.toml: is there already, and nothing is written over")
    assert said.output == "", "refused before anything is asked"
    assert kind != "file" or target.read_text() == "mine"
    assert [path.name for path in here.iterdir()] == ["there.toml"]


def test_a_file_that_somebody_else_wrote_meanwhile(
    fedqc: Fedqc, here: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(init, "_check_target", lambda target: None)
    (here / "site.toml").write_text("mine")
    assert "nothing is written over" in fedqc("init", "site", *NEEDED).error
    assert (here / "site.toml").read_text() == "mine"


def test_a_folder_that_may_not_be_written_to(
    fedqc: Fedqc, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)  # root may write everywhere
    said = fedqc("init", "site", answers=[])
    assert (said.code, said.output) == (2, "")
    assert said.error == f"site.toml: this user may not write to {here}; name a file elsewhere"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_the_right_to_write(fedqc: Fedqc, here: Path) -> None:
    here.chmod(0o500)
    try:
        assert "this user may not write" in fedqc("init", "site", answers=[]).error
    finally:
        here.chmod(0o700)


@pytest.mark.parametrize(
    "name",
    [
        'a "quoted" name',
        "it's",
        r"C:\data\new",
        "back\\slash\\",
        "Füße 脳 🧠",
        "#hash = 1",
        "tab\there",
        "line\nbreak",
        "bell\x07 del\x7f",
        "{{ name }} {% raw %}",
        "''' \"\"\"",
        " spaces ",
    ],
)
def test_any_name_is_quoted(fedqc: Fedqc, here: Path, scans: Path, name: str) -> None:
    scans.rename(here.parent / name)
    (here / name).mkdir()
    table(here / name / "verified.csv", "id", "a1")
    target = here / name / "my site.toml"
    reference = f"{name}/verified.csv"
    said = fedqc("init", "site", target, *NEEDED[:4], "--data", f"../{name}", "--reference", reference)
    assert said.code == 0
    site = load_site(target)
    assert site.data.path == here.parent / name
    assert site.data.reference == here / name / "verified.csv"
    assert tomllib.loads(target.read_text())["data"]["reference"] == "verified.csv"
    command = said.output.partition("Next: ")[2]
    assert shlex.split(command) == ["fedqc", "check", str(target)]


def test_a_name_that_is_no_utf8(fedqc: Fedqc, here: Path, scans: Path) -> None:
    name = os.fsdecode(b"scans-\xff")
    try:
        scans.rename(here.parent / name)
    except OSError:
        pytest.skip("this file system knows only UTF-8")
    said = fedqc("init", "site", *NEEDED, "--data", f"../{name}")
    assert said.code == 2
    assert "TOML holds only names in UTF-8" in said.error
    assert list(here.iterdir()) == []


def test_paths_are_relative_inside_the_files_folder_only(
    fedqc: Fedqc, here: Path, scans: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(here / "home"))
    for name in ("home", "inner", "inner/sub"):
        (here / name).mkdir()
    table(here / "inner" / "sub" / "verified.csv", "id", "a1")
    table(here / "home" / "ratings.csv", "id,rater,view,stars", "a1,anna,all,4")
    lists = ("--reference", "inner/sub/../sub/verified.csv", "--ratings", "~/ratings.csv")
    said = fedqc("init", "site", "inner/site.toml", *NEEDED, *lists, "--cache", "inner/./cache")
    assert said.code == 0
    written = tomllib.loads((here / "inner" / "site.toml").read_text())
    assert written["data"] == {
        "path": str(scans),
        "reference": os.path.join("sub", "verified.csv"),  # noqa: PTH118 - as text
        "ratings": str(here / "home" / "ratings.csv"),
    }
    assert written["compute"] == {"cache": "cache"}


def test_a_folder_that_is_called_like_a_home(fedqc: Fedqc, here: Path, scans: Path) -> None:
    scans.rename(here / "~scans")
    assert fedqc("init", "site", *NEEDED, "--data", "./~scans/cases.csv").code == 2  # "~scans": a user
    assert fedqc("init", "site", *NEEDED, "--data", here / "~scans").code == 0
    assert load_site(here / "site.toml").data.path == here / "~scans"


def test_a_task_of_ones_own(fedqc: Fedqc, here: Path, scans: Path) -> None:
    task = (
        'name = "own"\nmodalities = ["T1"]\nspacing = [1, 1, 1]\nsize = [8, 8, 8]\n'
        '[classes]\nx = [1]\n[regions]\nx = ["x"]\n'
    )
    (here / "own.toml").write_text(task)
    assert fedqc("init", "site", *NEEDED, "--task", "own.toml").code == 0
    assert tomllib.loads((here / "site.toml").read_text())["task"] == "own.toml"
    assert load_site(here / "site.toml").task == str(here / "own.toml")
    assert fedqc("init", "federation", answers=["", "own.toml", *FEDERATION_ANSWERS[2:]]).code == 0
    assert load_federation(here / "federation.toml").task == str(here / "own.toml")


# --------------------------------------------------------------------------------------------- federation


def test_a_federation_by_asking(fedqc: Fedqc, here: Path) -> None:
    said = fedqc(
        *("init", "federation"),
        answers=[
            *("a b", "glioma-2026", "glioma", "brats-glioma"),
            *("a,B", "a,a", " a, b ,c,", "4", "0", "3"),
            *("x", "7", "1.5", "0.8", "0", "9", "0", "30"),
        ],
    )
    assert said.code == 0
    for sentence in (
        "a federation's name is up to 63 letters",
        "task 'glioma' is not built in; did you mean 'brats-glioma'?",
        "a site's name is up to 63 lower-case letters, digits and hyphens, the first no hyphen (found 'B')",
        "site named twice: a;",
        "found 4, but only 3 sites; ask for fewer",
        "less than or equal to 1 (found '1.5')",
    ):
        assert sentence in said.output
    assert load_federation(here / "federation.toml") == FederationConfig.model_validate(
        {
            "name": "glioma-2026",
            "task": "brats-glioma",
            "sites": {"expected": ["a", "b", "c"], "minimum": 3, "keys": here / "keys"},
            "qc": {"rounds": 7},
            "curation": {"threshold": 0.8},
            "segmentation": {"rounds": 9},
            "privacy": {"min_count": 30},
        }
    )
    next_ = "fedqc simulate federation.toml --data DATA --out runs/trial"
    assert said.output.endswith(f"federation.toml is written. Next: try it on one machine with {next_}\n")


def test_a_federation_by_enter_alone(fedqc: Fedqc, here: Path) -> None:
    said = fedqc("init", "federation", answers=FEDERATION_ANSWERS)
    assert said.code == 0
    assert load_federation(here / "federation.toml") == FederationConfig.model_validate(
        {"task": "phantom", "sites": {"keys": here / "keys"}}
    )
    assert said.output.endswith("with fedqc simulate federation.toml --out runs/trial\n")


def test_a_federation_from_options(fedqc: Fedqc, here: Path) -> None:
    options = (
        *("--name", "x", "--task", "wmh", "--sites", "a,b", "--minimum", "1", "--rounds", "3"),
        *("--local-steps", "4", "--threshold", "0.5", "--segmentation-rounds", "5", "--min-count", "6"),
    )
    assert fedqc("init", "federation", "x.toml", *options).code == 0
    assert load_federation(here / "x.toml") == FederationConfig.model_validate(
        {
            "name": "x",
            "task": "wmh",
            "sites": {"expected": ["a", "b"], "minimum": 1, "keys": here / "keys"},
            "qc": {"rounds": 3, "local_steps": 4},
            "curation": {"threshold": 0.5},
            "segmentation": {"rounds": 5},
            "privacy": {"min_count": 6},
        }
    )


@pytest.mark.parametrize("task", ["phantom", "phantom-lesions"])
def test_a_federation_with_only_what_is_needed(task: str, fedqc: Fedqc, here: Path) -> None:
    said = fedqc("init", "federation", "--task", task, "--yes", answers=[])
    assert said.code == 0
    assert load_federation(here / "federation.toml") == FederationConfig.model_validate(
        {"task": task, "sites": {"keys": here / "keys"}}
    )
    assert said.output.endswith("with fedqc simulate federation.toml --out runs/trial\n")  # without data


def test_a_federation_with_certificates(fedqc: Fedqc, here: Path) -> None:
    options = ("--task", "wmh", "--sites", "a,b", "--host", "fl.example.org, 10.0.0.1", "--yes")
    said = fedqc("init", "federation", *options)
    assert said.code == 0
    server = load_federation(here / "federation.toml").server
    assert (server.address, server.gateway) == ("0.0.0.0:8443", "nginx")
    assert (server.certificate, server.key) == tuple(
        here / "certificates" / name for name in ("server.crt", "server.key")
    )
    assert f"{here / 'certificates' / 'ca.crt'} is for the sites" in said.output
    certificate = x509.load_pem_x509_certificate((here / "certificates" / "server.crt").read_bytes())
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["fl.example.org"]
    assert [str(one) for one in names.get_values_for_type(x509.IPAddress)] == ["10.0.0.1"]


def test_a_key_that_is_there_is_kept(fedqc: Fedqc, here: Path, scans: Path) -> None:
    options = ("--name", "a", "--task", "msd-hippocampus", "--data", "../scans", "--yes")
    assert fedqc("init", "site", *options).code == 0
    before = (here / "a.key").read_bytes()
    said = fedqc("init", "site", "again.toml", *options)
    assert said.code == 0
    assert "private key" not in said.output
    assert (here / "a.key").read_bytes() == before
    assert load_site(here / "again.toml").coordinator.key == here / "a.key"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ((), "--task is missing: "),
        (("--task", "glioma"), "--task: task 'glioma' is not built in"),
        (("--task", "wmh", "--name", "a b"), "--name: a federation's name is"),
        (("--task", "wmh", "--sites", "a,B"), "--sites: a site's name is"),
        (("--task", "wmh", "--sites", "a,a"), "--sites: 'a,a': site named twice: a"),
        (("--task", "wmh", "--sites", "a"), "--minimum is missing: by default 2 sites have to answer"),
        (("--task", "wmh", "--sites", "a", "--minimum", "2"), "--minimum: found 2, but only 1 site;"),
        (("--task", "wmh", "--minimum", "0"), "--minimum: input should be greater than or equal to 1"),
        (("--task", "wmh", "--rounds", "0"), "--rounds: input should be greater than or equal to 1"),
        (("--task", "wmh", "--threshold", "nan"), "--threshold: "),
        (("--task", "wmh", "--min-count", "0"), "--min-count: input should be greater than or equal to 1"),
    ],
)
def test_a_wrong_federation(fedqc: Fedqc, here: Path, options: tuple[str, ...], sentence: str) -> None:
    said = fedqc("init", "federation", *options)
    assert said.code == 2
    assert said.error.startswith(sentence)
    assert list(here.iterdir()) == []


def test_one_site_alone_is_enough_where_only_one_is_named(fedqc: Fedqc, here: Path) -> None:
    said = fedqc("init", "federation", answers=["", "phantom", "a", "", "", "", "", ""])
    assert said.code == 0
    assert load_federation(here / "federation.toml").sites.minimum == 1


# ---------------------------------------------------------------------------------------------- templates


def keys(model: type[FrozenModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, FrozenModel):
            yield from keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def value_at(values: dict[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


@pytest.mark.parametrize(
    ("template", "model", "required"),
    [
        ("site.toml.jinja", SiteConfig, {"name": "a", "task": "wmh", "data.path": "scans"}),
        ("federation.toml.jinja", FederationConfig, {"task": "wmh"}),
    ],
)
def test_comments_show_every_key_with_its_default(
    template: str, model: type[FrozenModel], required: dict[str, str]
) -> None:
    text = init.render(template, model, required)
    as_it_is = tomllib.loads(text)
    assert {key: value_at(as_it_is, key) for key in required} == required
    shown = tomllib.loads(re.sub(r"^#(\w+ = .*)$", r"\1", text, flags=re.MULTILINE))
    uncommented = parse(shown, model, source=template)
    plain = parse(as_it_is, model, source=template)
    for key in keys(model):
        default = field_of(model, key).default
        if key not in required and default is not None:
            assert value_at(uncommented.model_dump(), key) == default, key
            assert value_at(plain.model_dump(), key) == default, key
        assert value_at(shown, key) is not None, key
    count = sum(1 for line in text.splitlines() if re.match(r"#?\w+ = ", line))
    assert count == len(list(keys(model))), "no key is shown twice"
    assert max(map(len, text.splitlines())) <= 110


def test_durations_in_comments_are_easy_to_read() -> None:
    text = init.render("federation.toml.jinja", FederationConfig, {"task": "wmh", "qc.deadline": 90.0})
    assert '#wait = "30m"\n' in text
    assert '\ndeadline = "90s"\n' in text
    assert [init.to_duration(seconds) for seconds in (172800, 5400, 0.5, 7200)] == ["2d", "90m", "0.5s", "2h"]


# ----------------------------------------------------------------------------------------------- terminal


def test_a_real_terminal_is_asked(here: Path, scans: Path) -> None:
    ours, theirs = pty.openpty()
    command = (sys.executable, "-c", "from fedqc.cli import main; main()", "init", "site", *NEEDED[:4])
    root = Path(__file__).resolve().parents[1]
    environment = os.environ | {"TERM": "dumb", "PYTHONPATH": str(root)}
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    os.write(ours, b"../nowhere\n../scans\n\n\n\n\n\n")
    shown = b""
    while process.poll() is None:
        try:
            shown += os.read(ours, 4096)
        except OSError:  # the other end is closed
            break
    os.close(ours)
    assert process.wait(30) == 0, shown
    assert b"there is no such folder or table" in shown
    assert load_site(here / "site.toml").data.path == scans


def test_no_terminal_is_not_asked(here: Path, scans: Path) -> None:
    command = (sys.executable, "-c", "from fedqc.cli import main; main()", "init", "site", *NEEDED[:4])
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        command, input="../scans\n", capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --data is missing: folder of the scans and labels")
    assert done.stdout == ""
