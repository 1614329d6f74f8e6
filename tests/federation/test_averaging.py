import numpy as np
import pytest
from fedqc_server.averaging import RunningMean, check_update

from fedqc.protocol import Weights

CURRENT: Weights = {"w": np.zeros((2, 2), np.float32), "n": np.zeros((), np.int64)}


def update(value: float, count: int = 0) -> Weights:
    return {"w": np.full((2, 2), value, np.float32), "n": np.array(count, np.int64)}


def test_mean_is_weighted_by_samples() -> None:
    mean = RunningMean()
    mean.add("a", update(1.0, count=10), samples=1)
    mean.add("b", update(5.0, count=13), samples=3)
    # (1 * 1 + 3 * 5) / 4 = 4; (10 + 3 * 13) / 4 = 12.25, rounded to 12
    result = mean.mean()
    np.testing.assert_array_equal(result["w"], np.full((2, 2), 4.0, np.float32))
    assert result["n"] == 12
    assert result["w"].dtype == np.float32
    assert result["n"].dtype == np.int64
    assert result["n"].shape == ()
    assert mean.sites == ("a", "b")
    assert mean.samples == 4


def test_one_site_comes_back_bit_for_bit() -> None:
    values = np.random.default_rng(0).normal(size=100).astype(np.float32)
    mean = RunningMean()
    mean.add("a", {"w": values}, samples=7)
    np.testing.assert_array_equal(mean.mean()["w"], values)


def test_sums_in_float64() -> None:
    # In float32 the small updates vanish beside 2**24.
    mean = RunningMean()
    mean.add("a", {"w": np.array([2.0**24], np.float32)}, samples=1)
    for index in range(7):
        mean.add(f"b{index}", {"w": np.array([1.0], np.float32)}, samples=1)
    assert mean.mean()["w"][0] == np.float32((2.0**24 + 7) / 8)


def test_memory_is_that_of_one_update() -> None:
    mean = RunningMean()
    sizes = []
    for index in range(20):
        mean.add(f"site-{index:02}", {"w": np.ones(1000, np.float32)}, samples=1)
        sizes.append(sum(array.nbytes for array in mean._sum.values()))
    assert set(sizes) == {8000}


def test_the_caller_s_arrays_stay() -> None:
    first = {"w": np.ones(3, np.float64)}
    mean = RunningMean()
    mean.add("a", first, samples=1)
    mean.add("b", first, samples=1)
    mean.mean()
    np.testing.assert_array_equal(first["w"], np.ones(3))


def test_sites_come_in_the_order_of_their_names() -> None:
    mean = RunningMean()
    mean.add("b", update(1.0), samples=1)
    with pytest.raises(ValueError, match="order of their names"):
        mean.add("a", update(1.0), samples=1)
    with pytest.raises(ValueError, match="order of their names"):
        mean.add("b", update(1.0), samples=1)


def test_nothing_has_no_mean() -> None:
    with pytest.raises(ValueError, match="no update"):
        RunningMean().mean()
    with pytest.raises(ValueError, match="0 samples"):
        RunningMean().add("a", update(1.0), samples=0)


def test_check_update() -> None:
    assert check_update(update(1.0), CURRENT) is None
    assert check_update({"w": update(1.0)["w"]}, CURRENT) == "names-differ"
    assert check_update(dict(reversed(update(1.0).items())), CURRENT) == "names-differ"
    assert check_update(update(1.0) | {"w": np.zeros((4,), np.float32)}, CURRENT) == "shape-differs"
    assert check_update(update(1.0) | {"w": np.zeros((2, 2), np.float64)}, CURRENT) == "dtype-differs"
    assert check_update(update(np.nan), CURRENT) == "not-finite"
    assert check_update(update(-np.inf), CURRENT) == "not-finite"
