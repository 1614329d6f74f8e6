import itertools
import json
from dataclasses import asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.errors import DataError
from fedqc.metrics.raters import icc_one_way, icc_two_way, rater_agreement
from fedqc.ratings import Rating, View

SHROUT_FLEISS = [[9, 2, 5, 8], [6, 1, 3, 2], [8, 4, 6, 8], [7, 1, 2, 6], [10, 5, 6, 9], [6, 2, 4, 7]]
"""Six targets, four judges: Table 2 of the paper, whose Table 4 has the coefficients."""


def test_the_example_of_shrout_and_fleiss() -> None:
    assert icc_one_way(SHROUT_FLEISS) == pytest.approx(0.17, abs=0.005)
    assert icc_two_way(SHROUT_FLEISS) == pytest.approx(0.29, abs=0.005)


def variance_left(design: NDArray[np.floating], values: NDArray[np.floating]) -> float:
    """Sum of squares that a linear model does not explain: analysis of variance without its formulas."""
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    return float(np.sum((values - design @ coefficients) ** 2))


@pytest.mark.parametrize("seed", range(4))
def test_against_least_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n, k = int(rng.integers(3, 12)), int(rng.integers(2, 6))
    table = rng.normal(size=(n, 1)) + 0.5 * rng.normal(size=(1, k)) + 0.7 * rng.normal(size=(n, k))
    values = table.ravel()
    of_target = np.kron(np.eye(n), np.ones((k, 1)))
    of_rater = np.kron(np.ones((n, 1)), np.eye(k))
    nothing, alone = np.ones((n * k, 1)), variance_left(of_target, values)
    total, rest = variance_left(nothing, values), variance_left(np.hstack([of_target, of_rater]), values)
    between, within = (total - alone) / (n - 1), alone / (n * (k - 1))
    error = rest / ((n - 1) * (k - 1))
    raters = (alone - rest) / (k - 1)
    assert icc_one_way(table) == pytest.approx((between - within) / (between + (k - 1) * within))
    expected = (between - error) / (between + (k - 1) * error + k * (raters - error) / n)
    assert icc_two_way(table) == pytest.approx(expected)


def test_groups_of_unequal_size() -> None:
    """The coefficient tends to the share of the variance that was put between the targets: 1 / (1 + 0.25)."""
    rng = np.random.default_rng(0)
    groups = [rng.normal() + 0.5 * rng.normal(size=rng.integers(1, 5)) for _ in range(4000)]
    assert icc_one_way([group.tolist() for group in groups]) == pytest.approx(0.8, abs=0.02)


@pytest.mark.parametrize("table", [[], [[]], [[1, 2, 3]], [[1], [2], [3]], [[4, 4], [4, 4]], [[0.1] * 3] * 3])
def test_not_defined(table: list[list[float]]) -> None:
    assert icc_two_way(table) is None
    assert icc_one_way(table) is None


def test_the_ends_of_the_scale() -> None:
    assert icc_one_way([[1, 1], [2, 2], [6, 6]]) == icc_two_way([[1, 1], [2, 2], [6, 6]]) == 1
    assert icc_one_way([[1, 6], [6, 1]]) == -1
    assert icc_two_way([[1, 2], [2, 1]]) is None  # nothing to divide by
    # A rater who is stricter agrees less, though the order is the same.
    assert icc_two_way([[1, 2], [2, 3], [3, 4]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize("table", [[1.0, 2.0], [[1.0, np.nan], [2.0, 3.0]]])
def test_what_is_no_table(table: list[float]) -> None:
    with pytest.raises(DataError, match="leave out"):
        icc_two_way(table)


def rated(*rows: tuple[str, str, View, float]) -> list[Rating]:
    return [Rating(*row) for row in rows]


def test_pairs_by_hand() -> None:
    found = rater_agreement(
        rated(
            ("a", "anna", "axial", 5),
            ("a", "ben", "axial", 3),
            ("a", "anna", "axial", 4),  # again: 1 apart
            ("a", "anna", "all", 6),  # another view is another thing, and nobody else saw it
            ("b", "anna", "axial", 2),
            ("b", "ben", "axial", 2),
            ("b", "ben", "axial", 5),  # again: 3 apart
            ("c", "ben", "axial", 1),
        )
    )
    assert found.raters == 2
    intra, inter = found.intra, found.inter
    assert (intra.n_pairs, intra.n_targets, intra.n_cases) == (2, 2, 2)
    assert intra.mean_absolute == 2
    assert intra.sd == pytest.approx(np.sqrt((1 + 9) / 2))
    assert intra.repeatability == pytest.approx(1.96 * np.sqrt(5))
    # The first ratings: anna 5 and ben 3 of a, 2 and 2 of b.
    assert (inter.n_pairs, inter.n_targets, inter.n_cases) == (2, 2, 2)
    assert inter.mean_absolute == 1
    assert inter.sd == pytest.approx(np.sqrt(2))
    assert inter.icc_1 == icc_one_way([[5, 3], [2, 2]])
    assert found.icc_2 == icc_two_way([[5, 3], [2, 2]])


def test_three_ratings_of_one_thing_are_three_pairs() -> None:
    stars = (2.0, 3.5, 6.0)
    found = rater_agreement(rated(*(("a", "anna", "all", one) for one in stars)))
    assert (found.intra.n_pairs, found.intra.n_targets) == (3, 1)
    differences = [one - other for one, other in itertools.combinations(stars, 2)]
    assert found.intra.mean_absolute == pytest.approx(np.mean(np.abs(differences)))
    # Half the mean squared difference of all pairs is the variance.
    assert found.intra.sd == pytest.approx(np.sqrt(2 * np.var(stars, ddof=1)))
    assert found.intra.icc_1 is None
    assert found.inter.n_pairs == 0


def test_the_order_of_the_rows_of_two_raters_does_not_matter() -> None:
    rng = np.random.default_rng(0)
    rows = [
        Rating(f"case-{case}", rater, "all", float(rng.integers(1, 7)))
        for case in range(8)
        for rater in ("anna", "ben", "carl")
    ]
    shuffled = [rows[index] for index in rng.permutation(len(rows))]
    first, second = rater_agreement(rows), rater_agreement(shuffled)
    assert asdict(second.inter) == pytest.approx(asdict(first.inter))
    assert second.icc_2 == pytest.approx(first.icc_2)


@pytest.mark.parametrize("rows", [[], [("a", "anna", "all", 3.0)], [("a", "anna", "all", 3.0)] * 2])
def test_too_few(rows: list[tuple[str, str, View, float]]) -> None:
    found = rater_agreement(rated(*rows))
    assert found.icc_2 is None
    assert found.inter.mean_absolute is found.inter.sd is found.inter.icc_1 is None
    assert found.intra.sd is found.intra.repeatability is found.intra.icc_1 is None
    assert json.loads(json.dumps(asdict(found))) == asdict(found)
