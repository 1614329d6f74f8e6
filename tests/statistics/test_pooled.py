from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import precision_recall_curve

from fedqc.curation.calibration import BINS, Calibration, calibration_of
from fedqc.metrics.agreement import limits_of_agreement
from fedqc.metrics.filtering import aurc
from fedqc.statistics.pooled import (
    THRESHOLDS,
    at_best,
    pooled_agreement,
    pooled_dice,
    pooled_profile,
    profile_of,
    risk_coverage,
)
from fedqc.statistics.privacy import release
from fedqc.statistics.site import summarise_calibration, summarise_segmentation


def labels(seed: int, n: int = 400) -> tuple[Any, Any]:
    """Predicted and true DSC of n labels of as many patients, judged as well as one may hope for."""
    rng = np.random.default_rng(seed)
    true = rng.uniform(size=n)
    return np.clip(true + rng.normal(0.03, 0.1, n), 0, 1), true


def told(seed: int, min_count: int = 1, n: int = 400) -> dict[str, Any]:
    predicted, true = labels(seed, n)
    owners = [f"p{number}" for number in range(len(true))]
    return dict(release(summarise_calibration(predicted, true, owners, 0.75), min_count))


def test_sites_together_are_what_their_labels_are_together() -> None:
    predicted, true = (np.concatenate(one) for one in zip(labels(0), labels(1, 100), strict=True))
    sites = [told(0), told(1, n=100)]
    limits, expected = pooled_agreement(sites), limits_of_agreement(predicted, true)
    assert limits is not None
    assert expected is not None
    assert limits.n == 500
    for name in ("bias", "sd", "lower", "upper"):
        assert getattr(limits, name) == pytest.approx(getattr(expected, name), abs=5e-4), name
    profile = pooled_profile(sites)
    assert [(one.low, one.high) for one in profile] == [(k / 5, (k + 1) / 5) for k in range(5)]
    for one in profile:
        here = (predicted >= one.low) & ((predicted < one.high) | (one.high == 1))
        assert one.n == here.sum()
        assert one.predicted == pytest.approx(predicted[here].mean(), abs=1e-3)
        assert one.true == pytest.approx(true[here].mean(), abs=1e-3)
        assert one.bias == pytest.approx((predicted - true)[here].mean(), abs=2e-3)
        assert one.sd == pytest.approx((predicted - true)[here].std(ddof=1), abs=1e-3)


def test_a_hidden_bin_has_no_part() -> None:
    one = {
        "profile.labels": [-1, 10, -1, -1, 20],
        "profile.predicted": [-1.0, 0.3, -1.0, -1.0, 0.9],
        "profile.true": [-1.0, 0.2, -1.0, -1.0, 1.0],
        "profile.sd": [-1.0, 0.1, -1.0, -1.0, -1.0],
    }
    assert [(bin_.low, bin_.n, bin_.sd) for bin_ in profile_of(one)] == [(0.2, 10, 0.1), (0.8, 20, None)]
    other = one | {
        "profile.labels": [-1, 30, -1, -1, -1],
        "profile.predicted": [-1.0, 0.34, *[-1.0] * 3],
    }
    low, high = pooled_profile([one, other, {}])
    assert [low.n, low.predicted] == pytest.approx([40, 0.33])
    assert [high.n, high.predicted, high.bias] == pytest.approx([20, 0.9, -0.1])


def test_nobody_told_anything() -> None:
    assert pooled_profile([{}, {"samples": 3}]) == []
    assert pooled_agreement([{}, {"samples": 3}]) is None
    assert pooled_agreement([{"samples": 1, "bias": 0.1}]) is None
    assert pooled_dice([{}, {"cases": 3}]) is None
    assert at_best([{}, {"samples": 3}]) is None


def test_a_site_that_lies_breaks_nothing() -> None:
    """Each of these has the form of an answer."""
    assert pooled_agreement([{"samples": 0, "bias": 0.1, "difference_sd": 0.1}]) is None
    assert pooled_agreement([{"samples": 1, "bias": 0.1, "difference_sd": 0.1}]) is None
    assert profile_of({"profile.labels": [1] * 5, "profile.true": [0.5] * 5}) == []
    one = {"profile.labels": [1] * 5} | {f"profile.{name}": [0.5] * 5 for name in ("predicted", "true", "sd")}
    assert [bin_.sd for bin_ in pooled_profile([one])] == [None] * 5


def test_dice_of_all_sites_is_that_of_all_cases() -> None:
    rng = np.random.default_rng(0)
    cases = [rng.uniform(0.5, 0.9, 30), rng.uniform(0.7, 1, 12)]
    sites = [
        release(summarise_segmentation(dice, {"core": dice / 2}, [f"p{one}" for one in range(len(dice))]), 1)
        for dice in cases
    ]
    everything = np.concatenate(cases)
    pooled = pooled_dice(sites)
    assert pooled is not None
    assert pooled.n == 42
    assert pooled.mean == pytest.approx(everything.mean(), abs=1e-3)
    assert pooled.sd == pytest.approx(everything.std(ddof=1), abs=1e-3)
    expected = stats.norm.interval(0.95, everything.mean(), stats.sem(everything))
    assert pooled.interval == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_area_is_that_of_the_labels_themselves(seed: int) -> None:
    """One label a patient, predicted in hundredths: the counts then hold all that there is."""
    predicted, true = labels(seed)
    predicted = np.minimum(np.floor(predicted * BINS), BINS - 1) / BINS
    failure = true < 0.75
    curve = risk_coverage(calibration_of(predicted, true, [f"p{one}" for one in range(len(true))], 0.75))
    # `aurc` begins with the most confident label, this curve with none.
    expected = aurc(predicted, failure)
    assert expected is not None
    top = predicted == predicted.max()
    assert curve.aurc == pytest.approx(expected + failure[top].mean() / len(true), abs=1e-9)
    for share, threshold in zip(curve.coverage, THRESHOLDS, strict=True):
        assert share == pytest.approx((predicted >= threshold - 1e-9).mean())
    precision, recall, thresholds = precision_recall_curve(~failure, predicted)
    places = np.rint(thresholds * BINS).astype(int)
    assert curve.risk[places] == pytest.approx(1 - precision[:-1])
    assert 1 - curve.others_below[places] == pytest.approx(recall[:-1])
    assert curve.failures_below[places] == pytest.approx(
        [(predicted[failure] < threshold).mean() for threshold in thresholds]
    )
    assert curve.failing == pytest.approx(failure.mean())
    assert curve.least_aurc < curve.aurc < curve.failing
    # The best possible ranks by the truth itself.
    assert curve.least_aurc == pytest.approx(aurc(true, failure), abs=1e-3)


def test_a_model_that_knows_all_and_one_that_knows_nothing() -> None:
    half = (500,) * BINS
    blind = risk_coverage(Calibration(failures=half, others=half))
    assert [blind.aurc, blind.failing] == pytest.approx([0.5, 0.5])
    below, above = (10,) * 50 + (0,) * 50, (0,) * 50 + (10,) * 50
    perfect = risk_coverage(Calibration(failures=below, others=above))
    coverage = np.linspace(0.01, 1, 100)
    assert perfect.aurc == pytest.approx(perfect.least_aurc, abs=1e-3)
    assert perfect.at(coverage) == pytest.approx(perfect.best(coverage))
    nothing = (0,) * BINS
    only_failures = risk_coverage(Calibration(failures=above, others=nothing))
    assert only_failures.aurc == only_failures.least_aurc == only_failures.failing == 1
    assert np.isnan(only_failures.others_below).all()
    no_failure = risk_coverage(Calibration(failures=nothing, others=above))
    assert no_failure.aurc == no_failure.least_aurc == no_failure.failing == 0
    assert np.isnan(no_failure.failures_below).all()


@pytest.mark.parametrize("min_count", [5, 20])
def test_the_labels_lie_between_worst_and_best(min_count: int) -> None:
    """Of what two sites told with few patients moved, beside what they would have told of each."""
    sites = [told(seed, min_count) for seed in (0, 1)]
    sums = {key: np.sum([one[key] for one in sites], axis=0) for key in ("failures", "others")}
    worst = risk_coverage(Calibration(failures=tuple(sums["failures"]), others=tuple(sums["others"])))
    moved = at_best(sites)
    assert moved is not None
    best = risk_coverage(moved)
    predicted, true = (np.concatenate(one) for one in zip(labels(0), labels(1), strict=True))
    exact = risk_coverage(calibration_of(predicted, true, [f"p{one}" for one in range(800)], 0.75))
    assert best.aurc < exact.aurc < worst.aurc
    assert (best.failures_below >= exact.failures_below - 1e-9).all()
    assert (exact.failures_below >= worst.failures_below - 1e-9).all()
    assert (best.others_below <= exact.others_below + 1e-9).all()
    assert (exact.others_below <= worst.others_below + 1e-9).all()
    coverage = np.linspace(0.01, 1, 100)
    assert (best.at(coverage) <= worst.at(coverage) + 1e-9).all()


def test_thresholds_by_hand() -> None:
    failures, others = [0] * BINS, [0] * BINS
    failures[10], others[90] = 2000, 3000
    curve = risk_coverage(Calibration(failures=tuple(failures), others=tuple(others)))
    at = [0, 10, 11, 90, 91, 100]
    assert THRESHOLDS[at].tolist() == [0, 0.1, 0.11, 0.9, 0.91, 1]
    assert curve.failures[at].tolist() == [2, 2, 0, 0, 0, 0]
    assert curve.others[at].tolist() == [3, 3, 3, 3, 0, 0]
    assert curve.coverage[at].tolist() == [1, 1, 0.6, 0.6, 0, 0]
    assert curve.risk[at[:4]].tolist() == [0.4, 0.4, 0, 0]
    assert np.isnan(curve.risk[at[4:]]).all()
    assert curve.failures_below[at].tolist() == [0, 0, 1, 1, 1, 1]
    assert curve.others_below[at].tolist() == [0, 0, 0, 0, 1, 1]
    # at 0 up to a coverage of 0.6, then a line to 0.4
    assert curve.aurc == pytest.approx(0.4 * 0.4 / 2)


def test_best_ends_of_bins_by_hand() -> None:
    """Failures stand at the upper end of what was taken together, others at the lower one."""
    failures, others = [0] * BINS, [0] * BINS
    failures[20], failures[74], others[70], others[95] = 5000, 4000, 4000, 6000
    best = at_best([{"failures": failures}, {"others": others}])
    assert best is not None
    assert {place: mass for place, mass in enumerate(best.failures) if mass} == {0: 5000, 21: 4000}
    assert {place: mass for place, mass in enumerate(best.others) if mass} == {99: 6000, 94: 4000}
