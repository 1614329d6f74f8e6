"""Folders of made-up cases. Layouts open no image, so files are empty unless a test fills them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fedqc.cases.layouts import CaseFiles, find_cases
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from fedqc.task import Task


def make_files(folder: Path, *names: str) -> Path:
    """Empty files of these names, with the folders that they lie in."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return folder


def write_json(folder: Path, content: Any, name: str = "dataset.json") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))
    return folder


def refusal(root: Path, task: Task, layout: str | None = None) -> str:
    """The sentence with which a folder is refused."""
    with pytest.raises(DataError) as caught:
        find_cases(root, task, layout)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cases_in(root: Path, task: Task, layout: str | None = None) -> list[CaseFiles]:
    """The cases of a folder that has nothing wrong."""
    listing = find_cases(root, task, layout)
    assert problems_of(root, task, layout) == []
    return list(listing.cases)


def problems_of(root: Path, task: Task, layout: str | None = None) -> list[Problem]:
    """All problems, those of the folder first."""
    listing = find_cases(root, task, layout)
    return [*listing.problems, *(problem for case in listing.cases for problem in case.problems)]


def only_problem(root: Path, task: Task, layout: str | None = None) -> Problem:
    (problem,) = problems_of(root, task, layout)
    return problem


def relative(paths: Sequence[Path | None], root: Path) -> list[str | None]:
    return [None if path is None else path.relative_to(root).as_posix() for path in paths]


def shown(root: Path, case: CaseFiles) -> list[str | None]:
    """Images and label of a case, relative to the folder."""
    return relative([*case.images, case.label], root)
