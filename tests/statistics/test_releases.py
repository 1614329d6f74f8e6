"""Two runs cannot be subtracted: what was told is told anew when enough patients changed, and not before."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedqc.errors import DataError
from fedqc.statistics.privacy import release
from fedqc.statistics.releases import release_of, settle
from fedqc.statistics.site import summarise_cross_check

MIN_COUNT = 3


def told(
    path: Path,
    values: Any,
    patients: dict[str, str],
    basis: str = "model 1",
    phase: str = "score",
    *,
    settings: str = "",
    min_count: int = MIN_COUNT,
) -> Any:
    return settle(path, phase, release_of(values, patients, basis, settings, min_count))


def people(*names: str, **changed: str) -> dict[str, str]:
    return dict.fromkeys(names, "as at first") | changed


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "releases.json"


def test_what_is_told_first_is_told(path: Path) -> None:
    assert told(path, {"n": 4}, people(*"abcd")) == {"n": 4}
    assert "abcd" not in path.read_text()
    assert '"a"' not in path.read_text()


@pytest.mark.parametrize(
    "patients",
    [
        people(*"abcde"),  # one came
        people(*"abc"),  # one left
        people(*"abcd", a="other files"),
        people(*"abce"),  # one for another: two changed
    ],
)
def test_a_change_of_few_is_not_told(path: Path, patients: dict[str, str]) -> None:
    told(path, {"n": 4}, people(*"abcd"))
    assert told(path, {"n": 5}, patients) == {"n": 4}
    assert told(path, {"n": 5}, patients) == {"n": 4}  # nor by asking twice
    assert told(path, {"n": 5}, patients, basis="model 2") == {}  # an earlier model's numbers would mislead
    assert told(path, {"n": 4}, people(*"abcd"), basis="model 2") == {"n": 4}


def test_where_nothing_was_told_nothing_can_be_subtracted(path: Path) -> None:
    assert told(path, {}, people(*"ab")) == {}
    assert not path.exists()
    assert told(path, {"n": 3}, people(*"abc")) == {"n": 3}
    assert told(path, {"n": 4}, people(*"abcd")) == {"n": 3}


def test_what_is_only_looked_at_is_what_would_be_told_and_is_not_remembered(path: Path) -> None:
    told(path, {"n": 3}, people(*"abc"))
    before = path.read_text()
    for count, would_be in ((4, 3), (6, 6)):
        new = release_of({"n": count}, people(*"abcdef"[:count]), "model 1", "", MIN_COUNT)
        assert settle(path, "score", new, remember=False) == {"n": would_be}
    assert path.read_text() == before


def test_a_change_of_enough_is_told(path: Path) -> None:
    told(path, {"n": 4}, people(*"abcd"))
    assert told(path, {"n": 5}, people(*"abcde")) == {"n": 4}
    assert told(path, {"n": 6}, people(*"abcdef")) == {"n": 4}
    assert told(path, {"n": 7}, people(*"abcdefg")) == {"n": 7}  # three since it was told last
    assert told(path, {"n": 6}, people(*"abcdef")) == {"n": 7}


def test_all_earlier_releases_count_not_only_the_last(path: Path) -> None:
    told(path, {"n": 4}, people(*"abcd"))
    assert told(path, {"n": 7}, people(*"abcdefg")) == {"n": 7}
    # three others than last time, but only two more than at first
    assert told(path, {"n": 6}, people(*"abcdeh")) == {"n": 7}


def test_four_releases_cannot_be_combined_to_one_patient(path: Path) -> None:
    """A + B less A + C less D + B, and D + C and one more: what is left is the one, though any two differ."""
    a, b, c, d = "abc", "efg", "hij", "klm"
    assert told(path, {"n": 6}, people(*a, *b)) == {"n": 6}
    assert told(path, {"n": 7}, people(*a, *c)) == {"n": 7}
    assert told(path, {"n": 8}, people(*d, *b)) == {"n": 8}
    assert told(path, {"n": 9}, people(*d, *c, "x")) == {"n": 8}
    assert told(path, {"n": 9}, people(*d, *c)) == {"n": 9}


def test_four_releases_may_be_combined_to_enough(path: Path) -> None:
    """Two in the first and two others in the last, where three are enough."""
    a, b, c, d = "abc", "efg", "hij", "klm"
    for n, patients in enumerate([people(*a, *b, *"wx"), people(*a, *c), people(*d, *b)]):
        assert told(path, {"n": n}, patients) == {"n": n}
    assert told(path, {"n": 3}, people(*d, *c, *"yz")) == {"n": 3}


def test_where_there_is_more_than_one_combination_nobody_searches(path: Path) -> None:
    """Any two differ by four on each side, but all groups are pairs, which no combination has to cancel."""
    assert told(path, {"n": 6}, people(*"ab", *"cd", *"ef")) == {"n": 6}
    assert told(path, {"n": 7}, people(*"gh", *"cd", *"ij")) == {"n": 7}
    assert told(path, {"n": 8}, people(*"kl", *"ef", *"ij")) == {"n": 7}


@pytest.mark.parametrize(
    ("patients", "is_told"),
    [
        (people(*"abcdefgh", *"kl"), False),  # two came, two left
        (people(*"abcdefg", *"k"), False),  # one came, three left
        (people(*"abcdefghi", *"klm"), False),  # three came, one left
        (people(*"abcdefghij", a="new", b="new"), False),
        (people(*"abcdefghij", a="new", b="new", c="new"), True),
        (people(*"abcdefg", *"klm"), True),
    ],
)
def test_those_who_came_and_those_who_left_count_for_themselves(
    path: Path, patients: dict[str, str], is_told: bool
) -> None:
    told(path, {"n": 10}, people(*"abcdefghij"))
    assert told(path, {"n": 11}, patients) == {"n": 11 if is_told else 10}


def test_the_same_people_under_another_model_are_told(path: Path) -> None:
    told(path, {"mean": 0.5}, people(*"abcd"))
    assert told(path, {"mean": 0.75}, people(*"abcd"), basis="model 2") == {"mean": 0.75}


def test_two_thresholds_have_one_patient_between_them(path: Path) -> None:
    told(path, {"keep": 41}, people(*"abcd"), settings="threshold 0.75")
    assert told(path, {"keep": 40}, people(*"abcd"), settings="threshold 0.76") == {}
    assert told(path, {"keep": 41}, people(*"abcd"), settings="threshold 0.75") == {"keep": 41}
    assert told(path, {"keep": 9}, people(*"abcdefg"), settings="threshold 0.76") == {"keep": 9}
    other = told(path, {"keep": 39}, people(*"abcd"), "model 2", settings="threshold 0.76")
    assert other == {"keep": 39}


def test_what_was_told_under_a_laxer_rule_is_not_told_again(path: Path) -> None:
    told(path, {"n": 4}, people(*"abcd"), min_count=1)
    assert told(path, {}, people(*"abcde"), min_count=4) == {}
    assert told(path, {"n": 9}, people(*"efghi"), min_count=4) == {"n": 9}
    assert told(path, {"n": 8}, people(*"efgh"), min_count=3) == {"n": 9}  # stricter is as good


def test_phases_are_told_apart_and_numbers_come_back_as_they_were(path: Path) -> None:
    values = {"n": 4, "mean": 3.0, "bins": [1, -1, 0]}
    told(path, values, people(*"abcd"))
    assert told(path, {"n": 9}, people(*"ab"), phase="summarise") == {"n": 9}
    again = told(path, {}, people(*"abc"))
    assert again == values
    assert [type(value) for value in again.values()] == [int, float, list]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"phases": {"score": {}}}', '{"phases": {"score": {"about": 1}}}']
)
def test_a_memory_that_cannot_be_read_tells_nothing(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(DataError, match="so nothing is told; restore the file"):
        told(path, {"n": 4}, people(*"abcd"))
    assert path.read_text() == content


@settings(deadline=None, database=None, max_examples=60)
@given(
    runs=st.lists(st.sets(st.integers(0, 11)), min_size=2, max_size=6),
    min_count=st.integers(2, 5),
    seed=st.integers(0, 99),
)
def test_no_two_releases_differ_by_a_group_that_is_too_small(
    tmp_path_factory: pytest.TempPathFactory, runs: list[set[int]], min_count: int, seed: int
) -> None:
    """An attacker who knows who is there and subtracts any two answers finds at least `min_count` people."""
    path = tmp_path_factory.mktemp("site") / "releases.json"
    quality = np.random.default_rng(seed).uniform(size=12)
    behind: list[tuple[str, set[int]]] = []
    known: dict[str, set[int]] = {}
    for present in runs:
        names = [f"P{one}" for one in sorted(present)]
        values: Any = dict(release(summarise_cross_check(quality[sorted(present)], names), min_count))
        answer = told(path, values, dict.fromkeys(names, "x"), min_count=min_count)
        text = json.dumps(answer, sort_keys=True)
        if answer == values:
            known.setdefault(text, present)
        assert not answer or text in known  # every answer is that of a group that was told
        behind.append((text, known.get(text, set())))
    # Any two answers that differ are of groups that differ by nobody, or by enough, on either side.
    for (first, one), (second, other) in itertools.combinations(behind, 2):
        if "{}" not in {first, second} and first != second:
            assert all(len(side) == 0 or len(side) >= min_count for side in (one - other, other - one))
