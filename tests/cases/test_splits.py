from pathlib import Path

import pytest

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.splits import fewest_references, split_references


def cases(*patients: str) -> list[CaseFiles]:
    return [CaseFiles(f"case-{i}", patient, (Path("x"),), None) for i, patient in enumerate(patients)]


@pytest.mark.parametrize(
    ("n", "n_held_back"), [(0, 0), (1, 0), (2, 1), (3, 1), (4, 1), (5, 1), (6, 2), (8, 2), (20, 5)]
)
def test_a_quarter_of_the_patients_is_held_back(n: int, n_held_back: int) -> None:
    references = cases(*(f"P{i}" for i in range(n)))
    training, held_back = split_references(references, seed=5)
    assert len(held_back) == n_held_back
    assert sorted([*training, *held_back], key=lambda case: case.id) == sorted(references, key=lambda c: c.id)


def test_a_patient_is_on_one_side_whatever_the_order() -> None:
    references = cases(*(f"P{i % 7}" for i in range(30)))
    training, held_back = split_references(references, seed=5)
    assert {c.patient for c in training}.isdisjoint({c.patient for c in held_back})
    again = split_references(references[::-1], seed=5)
    assert {c.id for c in again[1]} == {c.id for c in held_back}
    splits = {frozenset(c.patient for c in split_references(references, seed)[1]) for seed in range(20)}
    assert len(splits) > 5


@pytest.mark.parametrize("held_back", [1, 2, 5, 10])
def test_so_many_references_are_enough_and_one_less_is_not(held_back: int) -> None:
    def n_held_back(n: int) -> int:
        cases = [CaseFiles(str(i), str(i), (), None) for i in range(n)]
        return len(split_references(cases, 0)[1])

    fewest = fewest_references(held_back)
    assert (n_held_back(fewest), n_held_back(fewest - 1)) == (held_back, held_back - 1)
