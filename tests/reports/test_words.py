import pytest

from fedqc.protocol import ErrorCode
from fedqc.reports.words import (
    count,
    duration,
    kind_in_words,
    listed,
    mean_sd,
    moment,
    number,
    percent,
    percent_with_interval,
    plural,
    reason_in_words,
    rounds_in_words,
    significant,
    stage_in_words,
    with_interval,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(0.12345), "0.123"),
        (number(None), "-"),
        (number(float("nan")), "-"),
        (number(float("inf")), "-"),
        (percent(0.816), "82\u00a0%"),
        (percent(None), "-"),
        (percent(float("nan")), "-"),
        (count(12345), "12\u202f345"),
        (count(None), "-"),
        (significant(0.012345), "0.0123"),
        (significant(999.4), "999"),
        (significant(999.9), "1\u202f000"),
        (significant(-294321.0), "-294\u202f000"),
        (significant(0.0), "0"),
        (with_interval(0.5, (0.4, 0.6)), "0.500 (0.400 to 0.600)"),
        (with_interval(0.5, None), "0.500"),
        (with_interval(None, None), "-"),
        (percent_with_interval(0.816, (-0.1, 0.97)), "82\u00a0% (-10 to 97)"),
        (percent_with_interval(None, None), "-"),
        (mean_sd(0.5, 0.1), "0.500 \u00b1 0.100"),
        (mean_sd(0.5, None), "0.500"),
        (mean_sd(None, None), "-"),
        (plural(1, "site"), "1 site"),
        (plural(0, "site"), "0 sites"),
        (plural(2, "was", "were"), "2 were"),
        (duration(0.2), "under 1 s"),
        (duration(119), "119 s"),
        (duration(600), "10 min"),
        (duration(9000), "2.5 h"),
        (moment("2026-03-01T10:05:59.000+00:00"), "2026-03-01 10:05 UTC"),
        (moment(None), "-"),
        (listed([]), ""),
        (listed(["a"]), "a"),
        (listed(["a", "b", "c"]), "a, b and c"),
        (listed("abcd", shown=2), "a, b and 2 more"),
        (rounds_in_words([5, 1, 3, 4, 4]), "1, 3 to 5"),
        (rounds_in_words([]), "-"),
        (kind_in_words("slices-left-out"), "slices left out"),
        (kind_in_words("left-right-flip"), "left-right flip"),
        (reason_in_words("not-finite"), "its weights or its loss are not finite numbers"),
        (reason_in_words("flower-error-9"), "flower-error-9"),
        (reason_in_words("data-error"), ErrorCode.DATA.sentence),
    ],
)
def test_what_people_read(shown: str, expected: str) -> None:
    assert shown == expected


def test_stages() -> None:
    assert {stage: stage_in_words(stage) for stage in ("qc", "segmentation", "check-1", "check-2")} == {
        "qc": "QC model",
        "segmentation": "segmentation model",
        "check-1": "cross-check, first half of the sites",
        "check-2": "cross-check, second half of the sites",
    }
    assert stage_in_words("qc-segmenter-1-2") == "QC model, segmenter-1-2"
    assert stage_in_words("check-2-eye") == "cross-check, second half of the sites, eye"
    assert stage_in_words("snapshots-t1n-1") == "segmenter that makes labels, snapshots-t1n-1"
