from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fedqc_client.site_data import load_site_data

from fedqc.cases import check
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.validation import Inspection, inspect_case
from fedqc.cases.volumes import Case
from fedqc.config import load_site
from fedqc.errors import DataError
from fedqc.statistics.site import Figure
from fedqc.task import Task, load_task


def test_cases_by_what_they_are_for(make_site: Callable[..., Path], task_file: Path) -> None:
    site = load_site(make_site("a", references=2, good=2, spoiled=1))
    data_folder = site.data.path
    (data_folder / "good-2.nii.gz").write_text("a text file")
    with (site.data.path.parent / "reference.csv").open("a") as file:
        file.write("nobody\ngood-2\n")
    data = load_site_data(site, load_task(str(task_file)))
    assert [case.id for case in data.references] == ["ref-0", "ref-1"]
    assert [case.id for case in data.candidates] == ["bad-4", "good-3"]
    errors = [problem for problem in data.check.problems if problem.is_error]
    assert [(problem.case, problem.code) for problem in errors] == [("good-2", "not-nifti")]
    assert data.check.summary.left_out == {"not-nifti": Figure(value=1, patients=1)}
    assert data.check.references == {"ref-0", "ref-1", "good-2", "nobody"}


def test_files_are_checked_once_until_one_changes(
    make_site: Callable[..., Path], task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> set[str | None]:
        problems = load_site_data(site, task).check.problems
        return {problem.case for problem in problems if problem.is_error}

    site, task = load_site(make_site("a", references=2, good=1)), load_task(str(task_file))
    (site.data.path / "ref-0.nii.gz").write_bytes(b"broken")
    read: list[str] = []

    def counted(files: CaseFiles, task: Task) -> Inspection:
        read.append(files.id)
        return inspect_case(files, task)

    monkeypatch.setattr(check, "inspect_case", counted)
    assert broken() == {"ref-0"}
    assert sorted(read) == ["bad-3", "good-2", "ref-0", "ref-1"]
    assert broken() == {"ref-0"}
    (site.data.path / "ref-1.nii.gz").write_bytes(b"broken too")
    assert broken() == {"ref-0", "ref-1"}
    assert read[4:] == ["ref-1"]
    other = task.model_copy(update={"classes": {"ball": (2,)}})
    with pytest.raises(DataError, match="none of 4 cases can be used"):
        load_site_data(site, other)


def test_cached_cases_open_one_at_a_time(
    make_site: Callable[..., Path], task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_site_data(load_site(make_site("a", references=3)), load_task(str(task_file)))
    lazy = CachedCases(data.cache, data.references)
    opened: list[str] = []
    get = data.cache.get

    def watched(files: CaseFiles) -> Case:
        opened.append(files.id)
        return get(files)

    monkeypatch.setattr(data.cache, "get", watched)
    assert len(lazy) == 3
    assert lazy[1].id == "ref-1"
    assert [case.id for case in lazy[1:]] == ["ref-1", "ref-2"]
    assert opened == ["ref-1", "ref-1", "ref-2"]
    assert lazy[0].image.shape == (1, 16, 16, 16)
    assert np.unique(lazy[0].label).tolist() == [0, 1]
