import pytest

from fedqc.curation.rules import Decision, Outcome, Rule, ThresholdRule
from fedqc.errors import ConfigError, DataError


def test_default_rule_keeps_from_the_threshold_on() -> None:
    rule = ThresholdRule()
    assert rule.threshold == 0.75
    assert rule.decide(0.75, "a").outcome is Outcome.KEEP
    assert rule.decide(1.0, "a").outcome is Outcome.KEEP
    assert rule.decide(0.7499999, "a").outcome is Outcome.DROP
    assert rule.decide(0.0, "a").outcome is Outcome.DROP


def test_review_band_starts_at_the_threshold_and_ends_before_its_upper_edge() -> None:
    rule = ThresholdRule(threshold=0.6, review=0.1)
    outcomes = {quality: rule.decide(quality, "a").outcome for quality in (0.599, 0.6, 0.699, 0.7, 0.9)}
    assert outcomes == {
        0.599: Outcome.DROP,
        0.6: Outcome.REVIEW,
        0.699: Outcome.REVIEW,
        0.7: Outcome.KEEP,
        0.9: Outcome.KEEP,
    }


def test_band_of_decimal_numbers_ends_where_a_person_thinks() -> None:
    assert ThresholdRule(threshold=0.1, review=0.2).decide(0.3, "a").outcome is Outcome.KEEP
    assert ThresholdRule(threshold=0.9, review=0.1).decide(1.0, "a").outcome is Outcome.KEEP


def test_only_keep_is_kept() -> None:
    assert {outcome: Decision("a", outcome, "").kept for outcome in Outcome} == {
        Outcome.KEEP: True,
        Outcome.DROP: False,
        Outcome.REVIEW: False,
    }


@pytest.mark.parametrize(
    ("review", "quality", "reason"),
    [
        (0.0, 0.412, "predicted DSC 0.412 is below the threshold 0.75"),
        (0.0, 0.9, "predicted DSC 0.900 is not below the threshold 0.75"),
        (0.1, 0.8, "predicted DSC 0.800 is in the review band from 0.75 to 0.85"),
        (0.1, 0.9, "predicted DSC 0.900 is not below 0.85, the threshold 0.75 and the review band 0.1"),
        (0.0, 0.74996, "predicted DSC 0.74996 is below the threshold 0.75"),
        (0.1, 0.84996, "predicted DSC 0.84996 is in the review band from 0.75 to 0.85"),
    ],
)
def test_reason_is_a_sentence_with_the_numbers(review: float, quality: float, reason: str) -> None:
    decision = ThresholdRule(review=review).decide(quality, "case-7")
    assert (decision.case_id, decision.reason) == ("case-7", reason)


@pytest.mark.parametrize("quality", [float("nan"), float("inf"), -0.01, 1.01])
def test_a_quality_that_is_none_is_refused_with_its_case(quality: float) -> None:
    with pytest.raises(DataError, match=f"case-7: quality is {quality}"):
        ThresholdRule().decide(quality, "case-7")


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


def test_is_a_rule() -> None:
    rule: Rule = ThresholdRule()
    assert rule.name == "threshold"
