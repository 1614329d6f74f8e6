"""What only shows beside other cases: facts are made up here, so that the numbers are known."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from fedqc.cases.comparison import compare_cases
from fedqc.cases.facts import CaseFacts, ImageFacts
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.problems import Problem
from fedqc.task import Task

ROOT = Path("/data")


def files(case_id: str) -> CaseFiles:
    image, label = (ROOT / f"{case_id}{part}.nii.gz" for part in ("", "-label"))
    return CaseFiles(id=case_id, patient=case_id, images=(image,), label=label)


def facts(
    number: int, core: float = 2.0, rim: float = 5.0, image: str | None = None, label: str | None = None
) -> CaseFacts:
    """A case with volumes in ml, whose image and label are its own unless their hashes are given."""
    return CaseFacts(
        shape=(16, 16, 16),
        spacing=(1.0, 1.0, 1.0),
        orientation="RAS",
        images=(ImageFacts(sha256=image or f"i{number}", mean=1, sd=1, low=0, median=1, high=2),),
        label_sha256=label or f"l{number}",
        label_values=tuple(value for value, volume in ((1, core), (2, rim)) if volume),
        volumes_ml={"core": core, "rim": rim},
        convention=None,
    )


def found(known: Sequence[CaseFacts | None], task: Task, ids: list[str] | None = None) -> list[list[Problem]]:
    cases = [files(name) for name in ids or [f"case-{number}" for number in range(len(known))]]
    return compare_cases(cases, known, ROOT, task)


def codes(problems: list[list[Problem]]) -> list[list[str]]:
    return [[problem.code for problem in of_case] for of_case in problems]


def test_a_case_that_is_listed_twice_is_not_its_own_duplicate(task: Task) -> None:
    twice = facts(0)
    assert codes(found([twice, twice], task, ["case", "case"])) == [["duplicate-id"], ["duplicate-id"]]


def test_duplicates_name_each_other(task: Task) -> None:
    known = [facts(number, image="same") for number in range(6)]
    problems = found([*known, None], task)
    assert codes(problems) == [["duplicate-image"]] * 6 + [[]]
    assert "T1 of case-1, T1 of case-2, T1 of case-3 and 2 more" in problems[0][0].found
    assert "T1 of case-0, T1 of case-1, T1 of case-2 and 2 more" in problems[5][0].found


@pytest.mark.parametrize(
    ("volume", "expected"), [(20.1, "10.1 times"), (0.19, "1/10.5 of"), (19.9, None), (0.21, None)]
)
def test_ten_times_the_usual_volume_is_unusual_where_all_are_alike(
    task: Task, volume: float, expected: str | None
) -> None:
    problems = found([*(facts(number) for number in range(12)), facts(12, core=volume)], task)
    assert codes(problems[:12]) == [[]] * 12
    if expected is None:
        assert problems[12] == []
        return
    (problem,) = problems[12]
    assert (problem.code, problem.file) == ("unusual-volume", ROOT / "case-12-label.nii.gz")
    assert f"{expected} the median 2 ml" in problem.found
    assert "0.2 to 20 ml" in problem.expected


def test_where_volumes_spread_widely_ten_times_is_nothing(task: Task) -> None:
    """As tumours do: the log-volumes here have an SD of 1.5, so that 10 times is 1.5 SD."""
    spread = np.exp(np.random.default_rng(0).normal(0, 1.5, 200))
    known: list[CaseFacts | None] = [facts(number, core=volume) for number, volume in enumerate(spread)]
    assert max(spread) / np.median(spread) > 15
    assert codes(found(known, task)) == [[]] * 200
    known.append(facts(200, core=math.exp(6 * 1.5)))
    assert codes(found(known, task))[200] == ["unusual-volume"]


@pytest.mark.parametrize(("n_with", "expected"), [(18, ["missing-class"]), (17, [])])
def test_a_class_that_nearly_all_have_is_missed(task: Task, n_with: int, expected: list[str]) -> None:
    known = [facts(number, core=2.0 if number < n_with else 0.0) for number in range(20)]
    problems = found([*known, facts(20, core=0.0, rim=0.0)], task)
    assert codes(problems) == [[]] * n_with + [expected] * (20 - n_with) + [[]]  # an empty label misses none


def test_of_few_cases_nothing_is_usual(task: Task) -> None:
    known = [*(facts(number) for number in range(8)), facts(8, core=900.0), facts(9, core=0.0)]
    assert codes(found(known, task)) == [[]] * 10
