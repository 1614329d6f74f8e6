import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats
from sklearn.metrics import mean_absolute_error, root_mean_squared_error

from fedqc.errors import DataError
from fedqc.metrics.agreement import agreement, limits_of_agreement, mae, mae_sd, pearson, rmse, spearman

Values = NDArray[np.float64]


def samples(n: int = 60, seed: int = 0, noise: float = 0.1) -> tuple[Values, Values]:
    rng = np.random.default_rng(seed)
    true = rng.uniform(size=n)
    return np.clip(true + rng.normal(scale=noise, size=n), 0, 1), true


def test_by_hand() -> None:
    predicted, true = [0.1, 0.4, 0.4, 0.9], [0.0, 0.5, 0.2, 1.0]
    # absolute errors 0.1 0.1 0.2 0.1
    assert mae(predicted, true) == pytest.approx(0.125)
    assert mae_sd(predicted, true) == pytest.approx(0.05)  # squares of -.025 -.025 .075 -.025: 0.0075 / 3
    assert rmse(predicted, true) == pytest.approx(np.sqrt(0.07 / 4))
    # deviations -.35 -.05 -.05 .45 and -.425 .075 -.225 .575
    assert pearson(predicted, true) == pytest.approx(0.415 / np.sqrt(0.33 * 0.5675))
    # ranks 1 2.5 2.5 4 and 1 3 2 4: deviations -1.5 0 0 1.5 and -1.5 .5 -.5 1.5
    assert spearman(predicted, true) == pytest.approx(4.5 / np.sqrt(4.5 * 5))


def test_agrees_with_scipy_and_scikit_learn() -> None:
    predicted, true = samples()
    predicted = predicted.round(1)  # ties
    assert pearson(predicted, true) == pytest.approx(stats.pearsonr(predicted, true).statistic)
    assert spearman(predicted, true) == pytest.approx(stats.spearmanr(predicted, true).statistic)
    assert mae(predicted, true) == pytest.approx(mean_absolute_error(true, predicted))
    assert rmse(predicted, true) == pytest.approx(root_mean_squared_error(true, predicted))


def test_interval_agrees_with_scipy_where_every_patient_has_one_sample() -> None:
    predicted, true = samples(noise=0.4)
    mine = agreement(predicted, true, [f"p{i}" for i in range(60)], np.random.default_rng(1), 4000).r_ci
    theirs = stats.bootstrap(
        (predicted, true),
        lambda x, y: stats.pearsonr(x, y).statistic,
        paired=True,
        vectorized=False,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert mine == pytest.approx((theirs.low, theirs.high), abs=0.015)


def test_interval_draws_patients_with_all_of_their_samples() -> None:
    # Twenty copies of each patient add no knowledge: the interval is the one of the single samples.
    predicted, true = samples(12)
    patients = [f"p{i}" for i in range(12)]
    single = agreement(predicted, true, patients, np.random.default_rng(3))
    copied = agreement(
        np.repeat(predicted, 20), np.repeat(true, 20), list(np.repeat(patients, 20)), np.random.default_rng(3)
    )
    assert (copied.n, copied.patients) == (240, 12)
    assert single.r_ci is not None
    assert copied.r_ci == pytest.approx(single.r_ci)
    naive = agreement(np.repeat(predicted, 20), np.repeat(true, 20), [str(i) for i in range(240)],
                      np.random.default_rng(3)).r_ci  # fmt: skip
    assert naive is not None
    assert naive[1] - naive[0] < 0.5 * (single.r_ci[1] - single.r_ci[0])


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(60):
        true = np.repeat(rng.normal(size=40), 3)
        predicted = 0.8 * true + 0.6 * np.repeat(rng.normal(size=40), 3)  # correlation 0.8
        interval = agreement(predicted, true, list(np.repeat([f"p{i}" for i in range(40)], 3)), rng, 200).r_ci
        assert interval is not None
        hits += interval[0] <= 0.8 <= interval[1]
    assert hits >= 50


def test_whole_result_is_the_same_for_the_same_generator() -> None:
    predicted, true = samples()
    patients = [f"p{i // 3}" for i in range(60)]
    first = agreement(predicted, true, patients, np.random.default_rng(5), 100)
    assert first == agreement(predicted, true, patients, np.random.default_rng(5), 100)
    assert first.r_ci != agreement(predicted, true, patients, np.random.default_rng(6), 100).r_ci
    assert (first.n, first.patients, first.r) == (60, 20, pearson(predicted, true))
    assert (first.rho, first.mae) == (spearman(predicted, true), mae(predicted, true))
    assert (first.mae_sd, first.rmse) == (mae_sd(predicted, true), rmse(predicted, true))
    assert first.r is not None
    assert first.r_ci is not None
    assert first.r_ci[0] < first.r < first.r_ci[1]


@pytest.mark.parametrize("n", [0, 1, 2])
def test_few_samples(n: int) -> None:
    predicted, true = [0.2, 0.4][:n], [0.1, 0.5][:n]
    result = agreement(predicted, true, ["a", "b"][:n], np.random.default_rng(0))
    assert (result.n, result.r, result.r_ci, result.rho) == (n, None, None, None)
    assert result.mae == (None if n == 0 else pytest.approx(0.1))
    assert result.rmse == (None if n == 0 else pytest.approx(0.1))
    assert result.mae_sd == (None if n < 2 else pytest.approx(0))
    json.dumps(dataclasses.asdict(result), allow_nan=False)


@pytest.mark.parametrize("constant", [[0.1] * 7, [0.0] * 7, [1e-170 * i for i in range(7)]])
def test_a_constant_has_no_correlation(constant: list[float]) -> None:
    true = [0.1, 0.7, 0.3, 0.4, 0.9, 0.2, 0.6]
    result = agreement(constant, true, list("abcdefg"), np.random.default_rng(0), 50)
    assert (result.r, result.r_ci) == (None, None)
    assert result.mae is not None
    assert pearson(true, constant) is None


def test_one_patient_has_no_interval_and_undefined_draws_are_left_out() -> None:
    predicted, true = samples(5)
    assert agreement(predicted, true, ["a"] * 5, np.random.default_rng(0)).r_ci is None
    # Patient a alone is constant: those draws (a quarter) have no r.
    mixed = agreement([0.5] * 3 + [0.1, 0.9, 0.3], [0.5] * 3 + [0.2, 0.8, 0.1], list("aaabbb"),
                      np.random.default_rng(0), 200)  # fmt: skip
    assert mixed.r_ci is not None
    assert np.isfinite(mixed.r_ci).all()


@settings(deadline=None, database=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=3, max_size=30))
def test_correlations_stay_in_range(pairs: list[tuple[float, float]]) -> None:
    predicted, true = zip(*pairs, strict=True)
    for measure in (pearson, spearman):
        value = measure(predicted, true)
        assert value is None or -1 <= value <= 1


def test_wrong_input() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(DataError, match=r"\(3,\), true has \(2,\)"):
        pearson([0.1, 0.2, 0.3], [0.1, 0.2])
    with pytest.raises(DataError, match=r"\(2, 1\)"):
        mae([[0.1], [0.2]], [[0.1], [0.2]])
    with pytest.raises(DataError, match="1 of 3 samples"):
        agreement([0.1, np.nan, 0.3], [0.1, 0.2, 0.3], list("abc"), rng)
    with pytest.raises(DataError, match="3 samples but 2 patients"):
        agreement([0.1, 0.2, 0.3], [0.1, 0.2, 0.3], list("ab"), rng)


def test_limits_of_agreement() -> None:
    found = limits_of_agreement([3.0, 5.0, 4.0], [2.0, 3.0, 1.0])  # differences 1 2 3
    assert found is not None
    assert [found.n, found.bias, found.sd] == pytest.approx([3, 2, 1])
    assert [found.lower, found.upper] == pytest.approx([0.04, 3.96])
    assert limits_of_agreement([1.0], [2.0]) is None
    with pytest.raises(DataError):
        limits_of_agreement([1.0, 2.0], [1.0])


def test_limits_of_agreement_hold_most_differences() -> None:
    predicted, true = samples(n=4000)
    found = limits_of_agreement(predicted, true)
    assert found is not None
    inside = (found.lower < predicted - true) & (predicted - true < found.upper)
    assert inside.mean() == pytest.approx(0.95, abs=0.015)
