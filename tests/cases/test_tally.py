from typing import Any

import numpy as np
import pytest

from fedqc.cases import volumes
from fedqc.cases.tally import Strangers, count_values, holds_only, measure


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that each volume has many."""
    monkeypatch.setattr(volumes, "_PIECE", 7)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_measures_what_is_not_zero(order: Any, offset: float) -> None:
    channel = np.random.default_rng(0).normal(offset, 5, (5, 6, 7)).astype(np.float32)
    channel[:2] = 0
    channel[3, 3, 3] = channel[4, 4, 4] = channel.max() + 1
    values = channel[channel != 0].astype(np.float64)
    measured = measure(np.asarray(channel, order=order))
    assert (measured.n_voxels, measured.n_zero, measured.n_not_finite) == (210, 84, 0)
    assert (measured.lowest, measured.highest, measured.n_highest) == (values.min(), values.max(), 2)
    assert measured.mean == pytest.approx(values.mean(), rel=1e-12)
    assert measured.sd == pytest.approx(values.std(), rel=1e-9)
    assert sorted(measured.sample) == sorted(values)


def test_highest_value_in_a_later_piece_counts_anew() -> None:
    channel = np.array([5] * 10 + [0] * 20 + [3] * 5 + [9] * 2 + [5] * 5, dtype=np.float32)
    assert (measure(channel).highest, measure(channel).n_highest) == (9, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_voxels_that_are_not_finite_are_counted(value: float) -> None:
    channel = np.ones((5, 6, 7), dtype=np.float32)
    channel[0, :2] = 0
    channel[1, 1, :3] = channel[4, 5, 6] = value
    measured = measure(channel)
    assert (measured.n_zero, measured.n_not_finite) == (14, 4)


def test_nothing_but_zeros() -> None:
    measured = measure(np.zeros((2, 3, 4), dtype=np.float32))
    assert (measured.n_zero, measured.lowest, measured.highest, measured.sd) == (24, 0, 0, 0)


@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "i4", "u8", "f4", "f8", "g"])
def test_counts_known_values_of_any_type(dtype: str) -> None:
    label = np.zeros((5, 6, 7), dtype)
    label[1], label[2, 0] = 2, 1
    counted = count_values(label, (0, 1, 2, 70))
    assert counted.known == {0: 161, 1: 7, 2: 42}
    assert (counted.n_known, counted.n_voxels, counted.has_many) == (210, 210, False)
    assert counted.not_finite == counted.fractions == counted.unknown == Strangers()


def test_strangers_by_kind_with_the_lowest_as_examples() -> None:
    label = np.array([0, 1, 9, 8, 7, 6, 6, -3, 0.5, 1e30, 2.5, np.nan, np.inf, -np.inf, np.nan])
    counted = count_values(np.repeat(label, 3), (0, 1))
    assert counted.known == {0: 3, 1: 3}
    assert counted.unknown == Strangers(21, (-3, 6, 7))
    assert counted.fractions == Strangers(6, (0.5, 2.5))
    assert counted.not_finite.n_voxels == 12


def test_many_values_are_those_of_an_image() -> None:
    assert not count_values(np.arange(32), (0,)).has_many
    assert count_values(np.arange(33), (0,)).has_many


def test_holds_only_known_values() -> None:
    channel = np.zeros((3, 4, 5), dtype=np.float32)
    assert not holds_only(channel, (0, 1))
    channel[2, 3, 4] = 1
    assert holds_only(channel, (0, 1))
    channel[0, 0, 0] = 2
    assert not holds_only(channel, (0, 1))
