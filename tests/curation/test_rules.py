from typing import Any

import numpy as np
import pytest
from scipy.stats import false_discovery_control

from fedqc.config import CurationConfig
from fedqc.curation.calibration import Calibration, calibration_of
from fedqc.curation.rules import (
    ConformalRule,
    Decision,
    Outcome,
    QuantileRule,
    Rule,
    StarsRule,
    TargetRule,
    ThresholdRule,
    WeightsRule,
    largest_kept,
    make_rule,
)
from fedqc.errors import ConfigError, DataError

KEEP, DROP, REVIEW = Outcome.KEEP, Outcome.DROP, Outcome.REVIEW


def one(rule: Rule, quality: float) -> Decision:
    """The decision about a lone candidate."""
    return rule.decide({"case-7": quality})["case-7"]


def outcomes(rule: Rule, *qualities: float) -> list[Outcome]:
    """The decisions about a site's candidates."""
    decided = rule.decide({f"case-{index}": quality for index, quality in enumerate(qualities)})
    return [decision.outcome for decision in decided.values()]


def calibration(failures: list[float], others: list[float]) -> Calibration:
    """One label a patient."""
    true = [0.1] * len(failures) + [0.9] * len(others)
    patients = [f"patient-{index}" for index in range(len(true))]
    return calibration_of([*failures, *others], true, patients, tau=0.75)


def test_default_rule_keeps_from_the_threshold_on() -> None:
    rule = ThresholdRule()
    assert rule.threshold == 0.75
    assert outcomes(rule, 0.75, 1.0, 0.7499999, 0.0) == [KEEP, KEEP, DROP, DROP]


def test_review_band_starts_at_the_threshold_and_ends_before_its_upper_edge() -> None:
    rule = ThresholdRule(threshold=0.6, review=0.1)
    assert outcomes(rule, 0.599, 0.6, 0.699, 0.7, 0.9) == [DROP, REVIEW, REVIEW, KEEP, KEEP]


def test_band_of_decimal_numbers_ends_where_a_person_thinks() -> None:
    assert one(ThresholdRule(threshold=0.1, review=0.2), 0.3).outcome is KEEP
    assert one(ThresholdRule(threshold=0.9, review=0.1), 1.0).outcome is KEEP


@pytest.mark.parametrize(
    ("review", "quality", "reason"),
    [
        (0.0, 0.412, "predicted DSC 0.412 is below the threshold 0.75"),
        (0.0, 0.9, "predicted DSC 0.900 is not below the threshold 0.75"),
        (0.1, 0.8, "predicted DSC 0.800 is in the review band from the threshold 0.75 to 0.85"),
        (0.1, 0.9, "predicted DSC 0.900 is not below 0.85, the threshold 0.75 and the review band 0.1"),
        (0.0, 0.74996, "predicted DSC 0.74996 is below the threshold 0.75"),
        (0.1, 0.84996, "predicted DSC 0.84996 is in the review band from the threshold 0.75 to 0.85"),
    ],
)
def test_reason_is_a_sentence_with_the_numbers(review: float, quality: float, reason: str) -> None:
    assert one(ThresholdRule(review=review), quality).reason == reason


RULES: list[Rule] = [
    ThresholdRule(),
    StarsRule(),
    QuantileRule(),
    WeightsRule(),
    TargetRule(0.7, "as wanted"),
    ConformalRule(calibration([0.5] * 20, [0.9]), 0.1, 0.75),
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
@pytest.mark.parametrize("quality", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_quality_that_is_none_is_refused_with_its_case(rule: Rule, quality: float) -> None:
    with pytest.raises(DataError, match=f"case-7: quality is {quality}"):
        one(rule, quality)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_site_without_candidates_has_no_decision(rule: Rule) -> None:
    assert rule.decide({}) == {}


@pytest.mark.parametrize(
    ("threshold", "review", "message"),
    [
        (-0.1, 0.0, "threshold is -0.1"),
        (1.5, 0.0, "threshold is 1.5"),
        (0.5, -0.1, "review is -0.1"),
        (float("nan"), 0.0, "threshold is nan"),
        (0.9, 0.2, r"add up to 1.1.* make review 0.1 or less"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(threshold: float, review: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ThresholdRule(threshold=threshold, review=review)


# -------------------------------------------------------------------------------------------------- stars


def test_stars_are_counted_from_one_to_six() -> None:
    # quality 0 is one star, quality 1 six: four stars are 0.6
    assert outcomes(StarsRule(4.0), 0.0, 0.599, 0.6, 1.0) == [DROP, DROP, KEEP, KEEP]
    assert outcomes(StarsRule(4.0, review=0.5), 0.6, 0.69, 0.7) == [REVIEW, REVIEW, KEEP]


def test_the_reason_speaks_of_stars() -> None:
    assert one(StarsRule(4.0), 0.5).reason == "a rating of 3.500 is below 4 stars"


# --------------------------------------------------------------------------------------------- quantile


def test_quantile_drops_the_worst_share_whatever_it_is() -> None:
    assert outcomes(QuantileRule(0.5), 0.9, 0.99, 0.8, 0.95) == [DROP, KEEP, DROP, KEEP]
    assert outcomes(QuantileRule(0.34), 0.9, 0.8, 0.95) == [KEEP, DROP, KEEP]
    assert outcomes(QuantileRule(0.3), 0.9, 0.8, 0.95) == [KEEP, KEEP, KEEP]  # rounded down
    assert outcomes(QuantileRule(0.1), *[0.5] * 10).count(DROP) == 1  # 0.1 of 10 is 1, not 0.99999


def test_of_equal_ones_the_first_by_id_is_dropped() -> None:
    assert outcomes(QuantileRule(0.25), 0.5, 0.5, 0.5, 0.5) == [DROP, KEEP, KEEP, KEEP]


# ---------------------------------------------------------------------------------------------- weights


def test_weight_grows_from_the_threshold_to_one() -> None:
    rule = WeightsRule(0.6)
    assert outcomes(rule, 0.5, 0.6, 0.61) == [DROP, DROP, KEEP]
    assert one(rule, 0.8).weight == pytest.approx(0.5)
    assert one(rule, 1.0).weight == 1
    assert "weight 0.5" in one(rule, 0.8).reason


# ------------------------------------------------------------------------------- by labels of known quality


def test_target_finds_the_threshold_under_which_the_wanted_share_of_failures_lies() -> None:
    known = calibration([0.1] * 18 + [0.525, 0.815], [0.905] * 10)
    rule = make_rule(CurationConfig(rule="target", level=0.95), known)
    assert isinstance(rule, TargetRule)
    assert rule.threshold == 0.53  # 19 of 20 failures are below
    assert "0.95 of the failures lie, by 20 patients" in one(rule, 0.4).reason
    assert outcomes(rule, 0.525, 0.53, 0.7) == [DROP, KEEP, KEEP]


def test_target_precision_drops_as_much_as_it_may() -> None:
    known = calibration([0.2] * 10, [0.155, *[0.805] * 9])
    rule = make_rule(CurationConfig(rule="target", target="precision", level=0.9), known)
    assert isinstance(rule, TargetRule)
    assert rule.threshold == 0.8  # 10 failures and 1 other below: 0.91; from 0.81 on 10 and 10
    with pytest.raises(DataError, match=r"no threshold reaches a precision of 0\.95"):
        make_rule(CurationConfig(rule="target", target="precision", level=0.95), known)


def test_a_target_under_which_all_would_lie_is_none() -> None:
    with pytest.raises(DataError, match="no threshold reaches a recall"):
        make_rule(CurationConfig(rule="target"), calibration([0.995] * 5, [0.9]))


def test_largest_kept_is_that_of_benjamini_and_hochberg() -> None:
    rng = np.random.default_rng(5)
    for _ in range(200):
        p_values = rng.uniform(size=rng.integers(1, 30)) ** 3
        alpha = rng.uniform(0.01, 0.5)
        selected = false_discovery_control(p_values) <= alpha
        assert np.array_equal(p_values <= largest_kept(p_values, alpha), selected)
    assert largest_kept([0.9], 0.1) == -1


def test_conformal_keeps_what_it_can_vouch_for() -> None:
    rule = make_rule(CurationConfig(rule="conformal", alpha=0.1), calibration([0.5] * 19 + [0.8], [0.9]))
    # p of 0.9 is 1/21, of 0.8 2/21: both are selected among two, 0.8 alone among many is not
    assert outcomes(rule, 0.9, 0.8) == [KEEP, KEEP]
    assert outcomes(rule, *[0.9] * 30, 0.8, 0.4) == [KEEP] * 31 + [DROP]
    assert outcomes(rule, 0.9, 0.8, *[0.4] * 8) == [REVIEW, REVIEW] + [DROP] * 8
    assert "as good in 4.8% of failures" in one(rule, 0.9).reason


def test_conformal_says_when_it_can_never_keep_anything() -> None:
    with pytest.raises(DataError, match=r"failures of 3 patients.*at alpha 0.1 it takes 9"):
        make_rule(CurationConfig(rule="conformal", alpha=0.1), calibration([0.5] * 3, [0.9]))
    make_rule(CurationConfig(rule="conformal", alpha=0.1), calibration([0.5] * 9, [0.9]))


@pytest.mark.parametrize("rule", ["target", "conformal"])
def test_a_rule_that_needs_labels_of_known_quality_says_so(rule: Any) -> None:
    with pytest.raises(DataError, match="there are no labels of known quality"):
        make_rule(CurationConfig(rule=rule))


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (CurationConfig(threshold=0.6, review=0.1), ThresholdRule(0.6, 0.1)),
        (CurationConfig(rule="stars", stars=3.5, review=0.5), StarsRule(3.5, 0.5)),
        (CurationConfig(rule="quantile", share=0.2), QuantileRule(0.2)),
        (CurationConfig(rule="weights", threshold=0.5), WeightsRule(0.5)),
    ],
)
def test_rules_are_made_as_they_are_configured(config: CurationConfig, kind: Rule) -> None:
    assert make_rule(config) == kind
