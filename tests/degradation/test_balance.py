import numpy as np
import pytest
from scipy import stats

from fedqc.degradation.balance import histogram_balance, quantile_balance


def skewed(count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """DSC as degradations make them: most of them high."""
    return np.random.default_rng(0).beta(5, 1.5, count)


def test_quantile_balance_makes_a_skewed_dsc_uniform() -> None:
    dsc = skewed(20_000)
    chosen = dsc[quantile_balance(dsc, 3000, np.random.default_rng(1))]
    uniform = stats.uniform(dsc.min(), np.ptp(dsc))
    assert stats.kstest(dsc[:3000], uniform.cdf).statistic > 0.3
    assert stats.kstest(chosen, uniform.cdf).statistic < 0.04


def test_quantile_balance_takes_the_nearest_sample() -> None:
    # Targets are uniform over [0, 1], so each sample is taken as often as it is the nearest.
    dsc = np.array([1.0, 0.0, 0.4])
    chosen = quantile_balance(dsc, 20_000, np.random.default_rng(2))
    shares = np.bincount(chosen, minlength=3) / 20_000
    np.testing.assert_allclose(shares, [0.3, 0.2, 0.5], atol=0.015)


def test_among_equal_samples_the_choice_is_random() -> None:
    dsc = np.array([0.5] * 4 + [1.0])
    shares = np.bincount(quantile_balance(dsc, 8000, np.random.default_rng(3)), minlength=5) / 8000
    np.testing.assert_allclose(shares, [0.125] * 4 + [0.5], atol=0.02)
    same = quantile_balance(np.full(3, 0.7, dtype=np.float32), 3000, np.random.default_rng(3))
    np.testing.assert_allclose(np.bincount(same, minlength=3) / 3000, [1 / 3] * 3, atol=0.03)


def test_one_sample_is_taken_again_and_again() -> None:
    assert quantile_balance(np.array([0.3]), 4, np.random.default_rng(0)).tolist() == [0, 0, 0, 0]
    assert histogram_balance(np.array([0.3]), 2, np.random.default_rng(0)).tolist() == [0, 0]


def test_histogram_balance_by_hand() -> None:
    dsc = np.array([0.05] * 5 + [0.55] * 3 + [0.95, 1.0])  # 1.0 is in the last bin
    chosen = histogram_balance(dsc, 30_000, np.random.default_rng(4))
    shares = np.bincount(chosen, minlength=10) / 30_000
    np.testing.assert_allclose(shares, [1 / 15] * 5 + [1 / 9] * 3 + [1 / 6] * 2, atol=0.01)


@pytest.mark.parametrize("bins", [5, 10])
def test_histogram_balance_fills_every_bin_that_holds_any_alike(bins: int) -> None:
    dsc = skewed(4000)
    edges = np.linspace(0, 1, bins + 1)
    before, _ = np.histogram(dsc, edges)
    after, _ = np.histogram(dsc[histogram_balance(dsc, 20_000, np.random.default_rng(5), bins)], edges)
    assert not after[before == 0].any()
    np.testing.assert_allclose(after[before > 0] / 20_000, 1 / (before > 0).sum(), atol=0.015)


def test_the_generator_decides() -> None:
    dsc = skewed(200)
    seeds = (1, 1, 2)
    quantile = [quantile_balance(dsc, 50, np.random.default_rng(seed)) for seed in seeds]
    histogram = [histogram_balance(dsc, 50, np.random.default_rng(seed)) for seed in seeds]
    for first, again, other in (quantile, histogram):
        assert np.array_equal(first, again)
        assert not np.array_equal(first, other)
