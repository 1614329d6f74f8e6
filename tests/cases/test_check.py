import contextlib
import errno
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedqc.cases import check
from fedqc.cases.check import CheckedCases, check_cases
from fedqc.cases.layouts import CaseFiles, Listing, find_cases
from fedqc.cases.problems import Problem
from fedqc.cases.validation import Inspection, inspect_case
from fedqc.errors import DataError
from fedqc.task import Task, load_task

MakeCase = Callable[..., CaseFiles]


def checked(cases: list[CaseFiles], root: Path, task: Task, **options: Any) -> CheckedCases:
    return check_cases(Listing(cases), root, task, **options)


@pytest.fixture
def inspected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ids of the cases that were really read."""
    ids: list[str] = []

    def inspect(files: CaseFiles, task: Task) -> Inspection:
        ids.append(files.id)
        return inspect_case(files, task)

    monkeypatch.setattr(check, "inspect_case", inspect)
    return ids


@contextlib.contextmanager
def as_another_user(folder: Path) -> Iterator[None]:
    """As somebody whom modes of files bind, which they do not bind root; `folder` is open to everybody."""
    if os.geteuid() != 0:
        yield
        return
    folder.chmod(0o777)
    for parent in folder.parents[:-2]:  # of pytest's own, below /tmp
        parent.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("workers", [1, 3])
def test_bad_cases_do_not_stop_the_others(
    make_case: MakeCase, task: Task, *, image: Any, label: Any, tmp_path: Path, workers: int
) -> None:
    cases = [make_case(f"case-{n}", image=image + n, label=np.roll(label, n, axis=0)) for n in (1, 2, 3)]
    cases.insert(1, make_case("bad", label=0 * label))
    cases.append(replace(cases[0], label=None, id="worse"))
    calls: list[tuple[int, int]] = []
    result = checked(cases, tmp_path, task, workers=workers, progress=lambda *call: calls.append(call))
    assert [case.id for case in result.usable] == ["case-1", "case-2", "case-3"]
    assert list(result.facts) == ["case-1", "case-2", "case-3"]
    assert [(problem.case, problem.code) for problem in result.problems] == [
        ("bad", "empty-label"),
        ("worse", "missing-label"),
    ]
    assert calls == [(done, 5) for done in range(1, 6)]


def test_no_case_at_all(task: Task, tmp_path: Path) -> None:
    assert checked([], tmp_path, task).usable == ()


def test_no_case_with_a_duplicate_id_is_used(
    make_case: MakeCase, task: Task, image: Any, label: Any, tmp_path: Path
) -> None:
    twin = make_case("twin")
    single = make_case("single", image=image + 1, label=label * (label < 5))
    result = checked([twin, single, replace(twin, patient="other")], tmp_path, task)
    assert result.usable == (single,)
    codes = [problem.code for problem in result.problems]
    assert codes.count("duplicate-id") == 2
    assert "found 2 cases with this id" in str(result.problems[0])


def test_what_was_inspected_is_remembered(
    make_case: MakeCase, task: Task, *, image: Any, label: Any, tmp_path: Path, inspected: list[str]
) -> None:
    memory = tmp_path / "memory"
    cases = [make_case("good"), make_case("odd", image=image / 300), make_case("bad", label=0 * label)]
    first = checked(cases, tmp_path, task, memory=memory)
    assert inspected == ["good", "odd", "bad"]
    assert checked(cases, tmp_path, task, memory=memory) == first
    assert inspected == ["good", "odd", "bad"]
    cases[2] = make_case("bad")
    again = checked(cases, tmp_path, task, memory=memory)
    assert inspected == ["good", "odd", "bad", "bad"]
    assert [case.id for case in again.usable] == ["good", "odd", "bad"]


def test_another_task_is_another_question(
    make_case: MakeCase, task: Task, tmp_path: Path, inspected: list[str]
) -> None:
    memory = tmp_path / "memory"
    checked([make_case()], tmp_path, task, memory=memory)
    narrow = task.model_copy(update={"spacing_range": (2.0, 4.0), "spacing": (3.0, 3.0, 3.0)})
    result = checked([make_case()], tmp_path, narrow, memory=memory)
    assert {problem.code for problem in result.problems} == {"spacing-out-of-range"}
    assert len(inspected) == 2


@pytest.mark.parametrize("content", ["", "{", "[]", '{"facts": 3, "problems": []}', '{"facts": null}'])
def test_a_damaged_memory_is_made_again(
    make_case: MakeCase, task: Task, tmp_path: Path, inspected: list[str], content: str
) -> None:
    memory = tmp_path / "memory"
    cases = [make_case()]
    first = checked(cases, tmp_path, task, memory=memory)
    (remembered,) = memory.iterdir()
    intact = remembered.read_text()
    remembered.write_text(content)
    assert checked(cases, tmp_path, task, memory=memory) == first
    assert len(inspected) == 2
    assert json.loads(remembered.read_text()) == json.loads(intact)


def test_a_memory_that_cannot_be_written_is_named(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/checks: the cache cannot be written \(.*\); free space or"):
        checked([make_case()], tmp_path, task, memory=tmp_path / "file" / "checks")


def test_problems_of_the_folder_come_first(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    odd = Problem(code="case-count", case=None, file=None, found="1", expected="2", fix="copy the other")
    result = check_cases(Listing([replace(make_case(), label=None)], [odd], "csv"), tmp_path, task)
    assert [problem.code for problem in result.problems] == ["case-count", "missing-label"]
    assert result.layout == "csv"


def test_links_inside_the_folder_are_fine(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    files = make_case()
    (link := tmp_path / "link.nii.gz").symlink_to(tmp_path / "case-1.nii.gz")
    assert checked([replace(files, images=(link,))], tmp_path, task).problems == ()
    assert checked([files], tmp_path / "cases.csv", task).problems == ()


def test_files_without_permission_are_named_and_not_remembered(
    make_case: MakeCase, task: Task, tmp_path: Path
) -> None:
    files = make_case()
    assert files.label is not None
    files.label.chmod(0)
    (memory := tmp_path / "memory").mkdir()
    with as_another_user(memory):
        result = checked([files], tmp_path, task, memory=memory)
    assert [problem.code for problem in result.problems] == ["no-permission"]
    assert "give this user the right to read the file" in str(result.problems[0])
    assert list(memory.iterdir()) == []


def test_what_the_system_could_not_read_is_tried_again(
    make_case: MakeCase, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk far away that did not answer for a moment costs a case one check, not every later one."""
    memory, files = tmp_path / "memory", make_case()

    def failing(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr("fedqc.cases.volumes.igzip.IGzipFile", failing)
        result = checked([files], tmp_path, task, memory=memory)
    assert {problem.code for problem in result.problems} == {"unreadable"}
    assert checked([files], tmp_path, task, memory=memory).usable == (files,)


@pytest.mark.parametrize(("room", "together"), [(100, 1), (5040, 1), (15_000, 2)])
def test_large_cases_wait_for_each_other(
    make_case: MakeCase,
    task: Task,
    tmp_path: Path,
    *,
    monkeypatch: pytest.MonkeyPatch,
    room: int,
    together: int,
) -> None:
    # A case has 5,760 voxels; one that needs more room than there is goes on alone.
    inside, most = 0, 0
    both = threading.Barrier(together)

    def inspect(files: CaseFiles, task: Task) -> Inspection:
        nonlocal inside, most
        inside += 1
        both.wait(timeout=10)
        most = max(most, inside)
        both.wait(timeout=10)
        inside -= 1
        return Inspection(None, ())

    monkeypatch.setattr(check, "inspect_case", inspect)
    monkeypatch.setattr(check, "MAX_VOXELS", room)
    monkeypatch.setattr(check, "_VOXELS_OF_A_WORKER", 0)
    checked([make_case(f"case-{n}") for n in range(4)], tmp_path, task, workers=2)
    assert most == together


def test_many_copies_of_a_case_are_named_shortly(make_case: MakeCase, task: Task, tmp_path: Path) -> None:
    files = make_case()
    found = checked([replace(files, id=f"case-{n}") for n in range(6)], tmp_path, task)
    of_third = [problem.found for problem in found.problems if problem.case == "case-2"]
    assert of_third == [
        "T1 with the same voxels as T1 of case-0, T1 of case-1, T1 of case-3 and 2 more",
        "a label with the same voxels as that of case-0, case-1, case-3 and 2 more",
    ]
    of_fifth = [problem.found for problem in found.problems if problem.case == "case-4"]
    assert of_fifth[1] == "a label with the same voxels as that of case-0, case-1, case-2 and 2 more"


@pytest.mark.real_data
def test_all_real_cases_are_valid(real_data: Path) -> None:
    root, task = real_data / "Task04_Hippocampus", load_task("msd-hippocampus")
    result = check_cases(find_cases(root, task), root, task, workers=2)
    assert result.problems == ()
    assert len(result.usable) == 200
    first = next(iter(result.facts.values()))
    assert first.orientation == "RAS"
    assert first.label_values == (1, 2)
