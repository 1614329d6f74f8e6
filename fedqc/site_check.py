"""A site's data as a whole: its cases, its lists, what is wrong with them, and what may be told of them."""

import csv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedqc.cases.check import CheckedCases, check_cases
from fedqc.cases.layouts import CaseFiles, find_cases, read_ids
from fedqc.cases.problems import Code, Problem
from fedqc.config import SiteConfig
from fedqc.credentials import credential_problems
from fedqc.files import replacing
from fedqc.ratings import rating_problems, read_ratings
from fedqc.statistics.datasheet import DataSheet, describe_data, summarise_cases
from fedqc.statistics.privacy import Released, release
from fedqc.statistics.site import DataSummary
from fedqc.task import Task

_COLUMNS = ("code", "severity", "case", "file", "found", "expected", "fix")


@dataclass(frozen=True)
class SiteCheck:
    """What was found in a site's data."""

    checked: CheckedCases
    references: frozenset[str]
    """Ids of the cases whose label the site vouches for, the unusable ones too."""
    problems: tuple[Problem, ...]
    """All, those of the site and its lists first."""
    datasheet: DataSheet
    left_out: Mapping[str, Sequence[str]]
    """By the code of the error, the patient of each case that was left out for it."""
    summary: DataSummary
    """What may leave the site once it has passed the privacy filters."""

    @property
    def usable_references(self) -> tuple[CaseFiles, ...]:
        """Usable cases whose label the site vouches for."""
        return tuple(case for case in self.checked.usable if case.id in self.references)

    @property
    def candidates(self) -> tuple[CaseFiles, ...]:
        """The other usable cases."""
        return tuple(case for case in self.checked.usable if case.id not in self.references)

    def by_code(self) -> dict[Code, list[Problem]]:
        """The problems by their code: those of errors first, then by name."""
        grouped: dict[Code, list[Problem]] = {}
        for problem in sorted(self.problems, key=lambda one: (not one.is_error, one.code)):
            grouped.setdefault(problem.code, []).append(problem)
        return grouped

    def leaves(self, min_count: int) -> Released:
        """The numbers of `summary` that pass the privacy filters."""
        return release(self.summary, min_count)

    @property
    def exit_code(self) -> int:
        """0: nothing was found; 1: warnings, or cases that are left out; 2: no case can be used."""
        if not self.checked.usable:
            return 2
        return 1 if self.problems else 0

    def as_json(self) -> dict[str, Any]:
        """What `fedqc check --json` prints."""
        return {
            "layout": self.checked.layout,
            "cases": len(self.checked.cases),
            "usable": len(self.checked.usable),
            "problems": [problem.as_json() for problem in self.problems],
            "datasheet": self.datasheet.model_dump(mode="json"),
        }


def check_site(
    site: SiteConfig,
    task: Task,
    *,
    memory: Path | None,
    progress: Callable[[int, int], None] | None = None,
    references: frozenset[str] | None = None,
) -> SiteCheck:
    """Find and check everything that `site.toml` names; the data folder is only read.

    Args:
        site: the site's configuration.
        task: what the data show.
        memory: folder that remembers checked cases until a file changes; None remembers nothing.
        progress: called with (cases done, all cases) after each case.
        references: ids of the references; None: those that the site lists at present.

    Raises:
        DataError: the folder or a list cannot be read at all, or `memory` cannot be written.
    """
    data = site.data
    listing = find_cases(data.path, task, data.layout)
    if references is None:
        references = read_ids(data.reference) if data.reference else frozenset()
    ratings = read_ratings(data.ratings) if data.ratings else []
    checked = check_cases(
        listing, data.path, task, workers=site.compute.workers, memory=memory, progress=progress
    )
    ids = {case.id for case in checked.cases}
    problems = [
        *credential_problems(site.coordinator),
        *_unknown_references(references - ids, ids, data.reference),
    ]
    if data.ratings is not None:
        problems += rating_problems(ratings, ids, data.ratings)
    problems += _shared_patients(checked.usable, references)
    left_out = _left_out(checked)
    return SiteCheck(
        checked=checked,
        references=references,
        problems=(*problems, *checked.problems),
        datasheet=describe_data(checked.usable, checked.facts, references, len(ratings), task),
        summary=summarise_cases(checked.usable, checked.facts, references, left_out, task),
        left_out=left_out,
    )


def write_problems(path: Path, problems: Sequence[Problem]) -> None:
    """Write problems as a table, one a row; the file appears whole or not at all."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8-sig", newline="") as file:  # Excel's UTF-8
        writer = csv.DictWriter(file, _COLUMNS)
        writer.writeheader()
        writer.writerows(problem.as_json() for problem in problems)


def is_table_of_problems(path: Path) -> bool:
    """Whether a file is a table that was written by `write_problems`."""
    with path.open("rb") as file:
        return file.readline(200).decode("utf-8-sig", "replace").strip() == ",".join(_COLUMNS)


def _left_out(checked: CheckedCases) -> dict[str, list[str]]:
    """By the code of the error, the patient of each case that was left out for it."""
    patients = {case.id: case.patient for case in checked.cases}
    errors = {(one.code, one.case) for one in checked.problems if one.is_error and one.case is not None}
    left_out: dict[str, list[str]] = {}
    for code, case in sorted(errors):
        left_out.setdefault(code, []).append(patients[case])
    return left_out


def _unknown_references(strangers: frozenset[str], ids: set[str], path: Path | None) -> Iterator[Problem]:
    by_letters = {case.casefold(): case for case in ids}
    for stranger in sorted(strangers):
        yield Problem(
            code="unknown-reference",
            case=stranger,
            file=path,
            found=f"a reference {stranger!r} that is no case of this site",
            expected="the id of a case",
            fix="correct the id in the table of references"
            + (f": there is a case {case!r}" if (case := by_letters.get(stranger.casefold())) else ""),
        )


def _shared_patients(cases: tuple[CaseFiles, ...], references: frozenset[str]) -> Iterator[Problem]:
    """Candidates whose patient has a reference too: the model learned from that patient."""
    vouched = {case.patient: case.id for case in cases if case.id in references}
    for case in cases:
        if case.id not in references and case.patient in vouched:
            yield Problem(
                code="shared-patient",
                case=case.id,
                file=None,
                found=f"patient {case.patient!r} among the references too ({vouched[case.patient]})",
                expected="references and other cases of different patients",
                fix="make both a reference, or neither",
            )
