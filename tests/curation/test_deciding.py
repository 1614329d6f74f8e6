import json
from pathlib import Path

import pytest

from fedqc.config import CurationConfig
from fedqc.curation.calibration import calibration_of
from fedqc.curation.deciding import decide
from fedqc.curation.rules import Outcome, make_rule
from fedqc.curation.self_test import KnownLabel, SelfTest, read_self_test, write_self_test

KEY = "a" * 64
QUALITY = {"good": 0.9, "bad": 0.3}


def labels_of(pairs: list[tuple[float, float]]) -> SelfTest:
    """One patient a pair of true and predicted quality."""
    labels = [
        KnownLabel(patient=f"patient-{index}", true=true, predicted=predicted)
        for index, (true, predicted) in enumerate(pairs)
    ]
    return SelfTest(key=KEY, labels=tuple(labels))


SOUND = labels_of([(0.1, 0.15), (0.5, 0.45), (0.6, 0.62), (0.9, 0.88), (1.0, 0.97)])


def test_the_rule_is_applied_where_the_model_passed() -> None:
    rule, decisions = decide(QUALITY, CurationConfig(), SOUND)
    assert (rule.suspended, rule.calibration) == (None, None)
    assert {case: one.outcome for case, one in decisions.items()} == {
        "good": Outcome.KEEP,
        "bad": Outcome.DROP,
    }


def test_a_site_without_a_test_takes_the_rule_as_it_is() -> None:
    assert decide(QUALITY, CurationConfig())[1]["bad"].outcome is Outcome.DROP


@pytest.mark.parametrize(
    ("pairs", "changes", "why"),
    [
        ([(0.1, 0.9), (0.9, 0.3)], {}, r"errs by 0.70 DSC on average, more than 0.3"),
        ([(0.7, 0.8), (0.8, 0.7)], {}, r"finds failures with an AUROC of 0.00, below 0.75"),
        ([(0.1, 0.15), (0.9, 0.8)], {"max_mae": 0.05}, r"errs by 0.07 DSC on average, more than 0.05"),
    ],
)
def test_a_model_that_fails_drops_nothing(
    pairs: list[tuple[float, float]], changes: dict[str, float], why: str
) -> None:
    rule, decisions = decide(QUALITY, CurationConfig(**changes), labels_of(pairs))
    assert rule.suspended is not None
    assert why in rule.suspended
    assert {one.outcome for one in decisions.values()} == {Outcome.KEEP}
    assert decisions["bad"].reason == f"not curated: {rule.suspended}"


def test_labels_that_are_all_failures_or_none_have_no_auroc_and_pass() -> None:
    assert labels_of([(0.9, 0.8), (0.95, 0.7)]).failed(CurationConfig()) is None


def test_stars_are_no_dsc_to_be_off_by() -> None:
    test = labels_of([(1.0, 0.5), (0.9, 0.4), (0.2, 0.1)])
    assert "errs by" in str(test.failed(CurationConfig()))
    stars = test.model_copy(update={"is_dsc": False})
    assert stars.failed(CurationConfig(rule="stars")) is None
    wrong = labels_of([(1.0, 0.1), (0.2, 0.9)]).model_copy(update={"is_dsc": False})
    assert "AUROC" in str(wrong.failed(CurationConfig(rule="stars")))


def test_pooled_labels_go_first_and_the_own_ones_where_they_are_too_few() -> None:
    config = CurationConfig(rule="target", level=0.9)
    pooled = calibration_of([0.2, 0.61, 0.9], [0.1, 0.1, 0.9], ["a", "b", "c"], 0.75)
    useless = calibration_of([0.9], [0.9], ["a"], 0.75)
    assert decide(QUALITY, config, SOUND, pooled)[0].calibration == pooled
    assert decide(QUALITY, config, SOUND, useless)[0].calibration == SOUND.calibration(0.75)
    alone = config.model_copy(update={"pooled": False})
    assert decide(QUALITY, alone, SOUND, pooled)[0].calibration == SOUND.calibration(0.75)
    rule, decisions = decide(QUALITY, config)
    assert rule.suspended == "rule target: there are no labels of known quality"
    assert decisions["bad"].outcome is Outcome.KEEP


def test_decisions_can_be_made_again_from_the_rule_as_it_was_used() -> None:
    used, decisions = decide(QUALITY, CurationConfig(rule="target", level=0.9), SOUND)
    assert make_rule(used.config, used.calibration).decide(QUALITY) == decisions


def test_a_test_is_read_again_if_it_can_be(tmp_path: Path) -> None:
    path = tmp_path / "results" / "self_test.json"
    assert read_self_test(path) is None
    write_self_test(path, SOUND)
    assert read_self_test(path) == SOUND
    for broken in ("{", "[]", '{"key": 1}', json.dumps({"key": KEY, "labels": []})):
        path.write_text(broken)
        assert read_self_test(path) is None
