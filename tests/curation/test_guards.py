from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy.stats import fisher_exact

from fedqc.cases.layouts import CaseFiles
from fedqc.curation.guards import SIZE, gatherings, groups_of, limited
from fedqc.curation.rules import Decision, Outcome

KEEP, DROP, REVIEW = Outcome.KEEP, Outcome.DROP, Outcome.REVIEW


def test_what_goes_beyond_the_share_is_left_to_a_person_the_best_first() -> None:
    quality = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.9}
    decisions = {case: Decision(KEEP if case == "d" else DROP, f"said of {case}") for case in quality}
    found = limited(decisions, quality, 0.5)
    assert {case: one.outcome for case, one in found.items()} == {
        "a": REVIEW,
        "b": DROP,
        "c": DROP,
        "d": KEEP,
    }
    assert found["a"].reason.startswith("said of a; but more than 0.5 of the site would be dropped")
    assert found["b"] is decisions["b"]
    assert list(found) == list(quality)
    assert limited(decisions, quality, 0.75) == decisions
    assert [one.outcome for one in limited(decisions, quality, 0).values()] == [REVIEW] * 3 + [KEEP]
    assert limited({}, {}, 0.5) == {}


def cases(volumes: list[float], **columns: list[str]) -> tuple[list[CaseFiles], Any]:
    """Cases with a label of so many ml, and columns of the site's list."""
    files = [
        CaseFiles(
            f"case-{i}",
            f"P{i}",
            (Path("x"),),
            Path("y"),
            groups={name: values[i] for name, values in columns.items() if values[i]},
        )
        for i in range(len(volumes))
    ]
    return files, {
        one.id: SimpleNamespace(volumes_ml={"a": v / 2, "b": v / 2})
        for one, v in zip(files, volumes, strict=True)
    }


def test_cases_are_grouped_by_columns_and_by_size() -> None:
    files, facts = cases([1, 0, 2, 3, 4, 5, 6], scanner=["A", "B", "", "A", "A", "A", "A"], id=["x"] * 7)
    groups = groups_of(files, facts)
    assert set(groups) == {"scanner", SIZE}  # a column that is the same everywhere tells nothing
    assert groups["scanner"][:3] == ["A", "B", ""]
    assert groups[SIZE] == ["small", "empty", "small", "medium", "medium", "large", "large"]


def test_columns_of_names_and_labels_of_one_size_are_no_groups() -> None:
    files, facts = cases([2.0] * 30, name=[f"n{i}" for i in range(30)])
    assert groups_of(files, facts) == {}
    empty, nothing = cases([0.0, 0.0])
    assert groups_of(empty, nothing) == {}


def test_a_group_that_loses_far_more_is_named() -> None:
    scanner = ["old"] * 20 + ["new"] * 80
    not_kept = [True] * 15 + [False] * 5 + [True] * 4 + [False] * 76
    coin = np.random.default_rng(1).choice(["left", "right", "both"], 100).tolist()
    found = gatherings({"side": coin, "scanner": scanner}, not_kept)
    (one,) = found
    assert (one.column, one.group) == ("scanner", "old")
    assert (one.n_cases, one.n_not_kept, one.n_others, one.n_others_not_kept) == (20, 15, 80, 4)
    alone = fisher_exact([[4, 76], [15, 5]]).pvalue
    assert one.p_value == pytest.approx(4 * alone)  # three sides and a scanner were looked at
    assert "scanner 'old': 15 of 20 cases are not kept, of the others 4 of 80 (p = " in one.sentence


def test_chance_is_no_warning() -> None:
    """Of 200 sites whose drops have nothing to do with the groups, about one in a hundred is warned."""
    warned = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        groups = {
            "scanner": rng.choice(list("ABC"), 90).tolist(),
            "size": rng.choice(list("sml"), 90).tolist(),
        }
        warned += bool(gatherings(groups, (rng.uniform(size=90) < 0.3).tolist()))
    assert warned <= 6


def test_without_cases_or_groups_there_is_nothing_to_say() -> None:
    assert gatherings({}, []) == ()
    assert gatherings({"scanner": ["A"] * 5 + ["B"] * 5}, [False] * 10) == ()


def test_a_group_that_loses_less_than_the_others_is_no_warning() -> None:
    groups = {"scanner": ["good"] * 30 + ["a"] * 20 + ["b"] * 20}
    not_kept = [False] * 30 + [True] * 10 + [False] * 10 + [True] * 10 + [False] * 10
    assert gatherings(groups, not_kept) == ()
