import dataclasses
import json

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import accuracy_score, precision_score, recall_score, roc_auc_score

from fedqc.errors import DataError
from fedqc.metrics.filtering import aurc, auroc, excess_aurc, filtering, share_interval


def test_by_hand() -> None:
    quality = [0.9, 0.8, 0.6, 0.3, 0.7, 0.2]
    true = [0.95, 0.5, 0.9, 0.1, 0.75, 0.4]  # failures under 0.75: the 2nd, 4th and 6th; 0.75 itself is none
    dropped = [False, False, True, True, True, True]
    result = filtering(quality, true, dropped, 0.75)
    assert (result.tau, result.n_candidates, result.n_failures, result.n_dropped) == (0.75, 6, 3, 4)
    assert result.precision == 2 / 4
    assert result.recall == pytest.approx(2 / 3)
    assert (result.precision_ci, result.recall_ci) == (share_interval(2, 4), share_interval(2, 3))
    assert result.accuracy == pytest.approx(3 / 6)
    # pairs (failure, other) with the failure scored lower: 0.8 beats 0.9; 0.3 and 0.2 beat all three: 7 of 9
    assert result.auroc == pytest.approx(7 / 9)
    assert result.mean_dsc_before == pytest.approx(3.6 / 6)
    assert result.mean_dsc_after == pytest.approx((0.95 + 0.5) / 2)


def test_agrees_with_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(size=200)
    quality = np.clip(true + rng.normal(scale=0.2, size=200), 0, 1).round(2)  # ties
    dropped, failure = quality < 0.75, true < 0.75
    result = filtering(quality, true, dropped, 0.75)
    assert result.precision == pytest.approx(precision_score(failure, dropped))
    assert result.recall == pytest.approx(recall_score(failure, dropped))
    assert result.accuracy == pytest.approx(accuracy_score(failure, dropped))
    assert result.auroc == pytest.approx(roc_auc_score(failure, 1 - quality))
    assert result.precision != pytest.approx(result.recall, abs=1e-3)


@pytest.mark.parametrize(
    ("true", "dropped", "undefined"),
    [
        ([], [], {"precision", "recall", "accuracy", "auroc", "mean_dsc_before", "mean_dsc_after"}),
        ([0.9, 0.8], [False, False], {"precision", "recall", "auroc"}),
        ([0.1, 0.2], [True, True], {"auroc", "mean_dsc_after"}),
        ([0.1, 0.9], [False, False], {"precision"}),
    ],
)
def test_undefined_numbers_are_none(true: list[float], dropped: list[bool], undefined: set[str]) -> None:
    result = dataclasses.asdict(filtering(true, true, dropped, 0.75))
    assert {name for name, value in result.items() if value is None} == undefined | {
        f"{name}_ci" for name in undefined & {"precision", "recall"}
    }
    json.dumps(result, allow_nan=False)


def test_auroc() -> None:
    assert auroc([3.0, 2.0, 1.0], [True, False, False]) == 1.0
    assert auroc([1.0, 2.0, 3.0], [True, False, False]) == 0.0
    assert auroc([1.0, 1.0, 0.0], [True, False, False]) == 0.75  # a tie counts half
    assert auroc([1.0, 2.0], [True, True]) is None
    assert auroc([1.0, 2.0], [False, False]) is None
    assert auroc([], []) is None


def test_wrong_input() -> None:
    with pytest.raises(DataError, match=r"quality has shape \(2,\), true DSC \(1,\), dropped \(2,\)"):
        filtering([0.1, 0.2], [0.1], [True, False], 0.75)
    with pytest.raises(DataError, match="dropped holds int64; it must be bool"):
        filtering([0.1, 0.2], [0.1, 0.2], [0, 1], 0.75)
    with pytest.raises(DataError, match="not finite"):
        filtering([0.1, 0.2], [0.1, np.nan], [True, False], 0.75)


def test_area_under_the_risk_coverage_curve() -> None:
    confidence, risk = [0.9, 0.5, 0.7, 0.6, 0.1], [0.1, 0.2, 0.3, 0.4, 0.9]
    assert aurc(confidence, risk) == pytest.approx(0.191333, abs=1e-6)
    assert aurc([-value for value in risk], risk) == pytest.approx(0.168)
    assert excess_aurc(confidence, risk) == pytest.approx(0.191333 - 0.168, abs=1e-6)
    assert aurc([], []) is None
    assert excess_aurc([], []) is None


def test_what_is_equally_confident_is_kept_together() -> None:
    # Points of the curve at two and at four cases: mean risks 0.5 and 0.25.
    for risk in ([1, 0, 0, 0], [0, 1, 0, 0]):
        assert aurc([0.8, 0.8, 0.2, 0.2], risk) == pytest.approx(0.5 * 0.25 + (0.5 + 0.25) / 2 * 0.5)


def test_who_cannot_tell_cases_apart_is_not_rewarded_for_it() -> None:
    risk = [0.1, 0.2, 0.9, 1.0]
    assert aurc([0.5] * 4, risk) == pytest.approx(np.mean(risk) * 3 / 4)
    least = excess_aurc([1.0] * 4, risk)
    assert least is not None
    assert least > 0


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (0, 20), (3, 20), (20, 20), (150, 200)])
def test_interval_of_a_share_agrees_with_scipy(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert share_interval(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-12)
