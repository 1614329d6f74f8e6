import math
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats
from sklearn.metrics import roc_auc_score

from fedqc.curation.guards import SIZE
from fedqc.curation.rules import Outcome
from fedqc.errors import DataError
from fedqc.statistics.site import (
    Figure,
    Histogram,
    Tally,
    quality_histogram,
    summarise_calibration,
    summarise_cross_check,
    summarise_curation,
    summarise_data,
    summarise_labels,
    summarise_segmentation,
)

KEEP, DROP, REVIEW = Outcome.KEEP, Outcome.DROP, Outcome.REVIEW


def figure(value: float, patients: int) -> Figure:
    return Figure(value=value, patients=patients)


def test_data_by_hand() -> None:
    summary = summarise_data(
        patients=["p", "p", "q", "r", "s", "t"],
        reference=[True, True, True, False, False, False],
        volumes_ml={
            "anterior": [1.0, 2.0, 6.0, 0.0, 0.0, 0.0],
            "posterior": [0.0] * 5 + [4.0],
            "rare": [0] * 6,
        },
        left_out={"missing-file": ["u", "u", "v"], "empty-label": ["u"]},
    )
    assert summary.cases == figure(6, 2)
    assert summary.patients == figure(5, 2)
    assert summary.references == figure(3, 2)
    assert summary.left_out == {"missing-file": figure(3, 2), "empty-label": figure(1, 1)}
    # Of the cases that have the class: 1, 2 and 6 ml of two patients.
    assert summary.volume_ml["anterior"].mean == figure(3.0, 2)
    assert summary.volume_ml["anterior"].sd == figure(float(np.sqrt(7.0)), 2)
    assert summary.volume_ml["posterior"].mean == figure(4.0, 1)
    assert summary.volume_ml["posterior"].sd is None
    assert (summary.volume_ml["rare"].mean, summary.volume_ml["rare"].sd) == (None, None)


@pytest.mark.parametrize(
    ("n_references", "behind"),
    [(0, 20), (2, 2), (18, 2), (20, 20)],
)
def test_a_total_is_as_sensitive_as_its_smaller_part(n_references: int, behind: int) -> None:
    summary = summarise_data(
        [f"p{i}" for i in range(20)], [i < n_references for i in range(20)], volumes_ml={}, left_out={}
    )
    assert summary.cases == figure(20, behind)
    assert summary.patients == figure(20, behind)
    assert summary.references == figure(n_references, n_references)


def test_a_patient_may_be_on_both_sides() -> None:
    summary = summarise_data(["p", "p", "q"], [True, False, False], {}, {})
    assert (summary.patients, summary.references) == (figure(2, 1), figure(1, 1))


def test_an_empty_site() -> None:
    summary = summarise_data([], [], {"anterior": []}, {})
    assert (summary.cases, summary.patients, summary.references) == (figure(0, 0),) * 3
    assert summary.volume_ml["anterior"].mean is None


def test_calibration_agrees_with_scipy_and_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    true = rng.uniform(size=90)
    predicted = np.clip(true + rng.normal(scale=0.1, size=90), 0, 1)
    summary = summarise_calibration(predicted, true, [f"p{i % 6}" for i in range(90)], tau=0.75)
    assert summary.samples == figure(90, 6)
    expected = {
        "r": stats.pearsonr(predicted, true).statistic,
        "mae": np.abs(predicted - true).mean(),
        "rmse": np.sqrt(((predicted - true) ** 2).mean()),
        "auroc": roc_auc_score(true < 0.75, 1 - predicted),
        "bias": np.mean(predicted - true),
        "difference_sd": stats.tstd(predicted - true),
    }
    for name, value in expected.items():
        found = getattr(summary, name)
        assert (found.value, found.patients) == (pytest.approx(value), 6), name


def test_calibration_of_regions_agrees_with_scipy() -> None:
    rng = np.random.default_rng(1)
    true = rng.uniform(size=40)
    predicted = np.clip(true + rng.normal(scale=0.1, size=40), 0, 1)
    patients = [f"p{i // 4}" for i in range(40)]
    held = np.arange(40) < 24  # of six patients; four do not hold it
    rare = np.where(held[:, None], np.stack([true, predicted], axis=1), math.nan)
    regions = {"all": np.stack([true, predicted], axis=1), "rare": rare, "none": np.full((40, 2), math.nan)}
    summary = summarise_calibration(predicted, true, patients, 0.75, regions)
    assert summary.regions_mae["all"] == summary.mae
    assert summary.regions_r["all"] == summary.r
    mae, r = summary.regions_mae["rare"], summary.regions_r["rare"]
    assert mae.value == pytest.approx(np.abs(predicted[:24] - true[:24]).mean())
    assert r.value == pytest.approx(stats.pearsonr(predicted[:24], true[:24]).statistic)
    assert (mae.patients, r.patients) == (4, 4)  # those without follow from the figures of all
    assert (set(summary.regions_mae), set(summary.regions_r)) == ({"all", "rare"},) * 2


def test_auroc_has_the_patients_of_the_smaller_class_behind_it() -> None:
    # Only p has a failure, so the curve is p's rank.
    summary = summarise_calibration(
        [0.2, 0.9, 0.8, 0.7], [0.1, 0.9, 0.9, 0.8], ["p", "p", "q", "r"], tau=0.75
    )
    assert summary.auroc == figure(1.0, 1)
    assert summary.r is not None
    assert summary.r.patients == 3


def test_calibration_that_is_not_defined() -> None:
    alone = summarise_calibration([0.5], [0.25], ["p"], tau=0.75)
    assert (alone.r, alone.auroc) == (None, None)
    assert alone.mae == figure(0.25, 1)
    nobody = summarise_calibration([], [], [], tau=0.75)
    assert (nobody.samples, nobody.mae, nobody.rmse) == (figure(0, 0), None, None)
    assert (nobody.bias, nobody.difference_sd, nobody.profile) == (None, None, None)
    assert (alone.bias, alone.difference_sd) == (figure(0.25, 1), None)


def test_profile_by_hand() -> None:
    summary = summarise_calibration(
        [0.0, 0.1, 0.2, 0.85, 0.95, 1.0], [0.1, 0.1, 0.5, 1.0, 0.9, 1.0], ["p", "p", "q", "p", "q", "r"], 0.75
    )
    profile = summary.profile
    assert profile is not None
    assert profile.edges == (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
    assert (profile.counts, profile.patients, profile.total_patients) == ((2, 1, 0, 0, 3), (1, 1, 0, 0, 3), 3)
    assert profile.predicted == pytest.approx((0.05, 0.2, None, None, 2.8 / 3))
    assert profile.true == pytest.approx((0.1, 0.5, None, None, 2.9 / 3))
    # differences -0.1, 0 in the first bin; -0.15, 0.05, 0 in the last
    assert profile.sd == pytest.approx((0.1 / np.sqrt(2), None, None, None, np.std([-0.15, 0.05, 0], ddof=1)))
    imperfect, not_all_wrong = profile.parts
    assert (imperfect.counts, imperfect.patients) == ((2, 1, 0, 0, 1), (1, 1, 0, 0, 1))
    assert (not_all_wrong.counts, not_all_wrong.patients) == (profile.counts, profile.patients)


def test_the_bias_tells_of_those_who_differ_the_other_way() -> None:
    """Beside the mean absolute error it tells the sum of their differences."""
    predicted, true = [0.5] * 5, [0.4, 0.4, 0.4, 0.4, 0.9]
    summary = summarise_calibration(predicted, true, list("pqrst"), 0.75)
    assert summary.bias is not None
    assert summary.bias.value == pytest.approx(0.0)
    assert summary.bias.patients == 1
    of_one_sign = summarise_calibration([0.5] * 4, [0.4] * 4, list("pqrs"), 0.75).bias
    assert of_one_sign is not None
    assert of_one_sign.value == pytest.approx(0.1)
    assert of_one_sign.patients == 4


def test_stars_are_no_dsc_to_be_off_from() -> None:
    summary = summarise_calibration([0.5, 0.9], [0.4, 0.8], ["p", "q"], 0.75, is_dsc=False)
    assert (summary.bias, summary.difference_sd, summary.profile) == (None, None, None)
    assert summary.mae is not None


def test_curation_by_hand() -> None:
    summary = summarise_curation(
        quality=[0.95, 0.85, 0.85, 0.05],
        regions={"anterior": [1.0, 0.5, 0.5, 0.0], "posterior": [1.0, 1.0, 0.8, 0.2]},
        outcomes=[KEEP, KEEP, KEEP, DROP],
        patients=["p", "p", "q", "q"],
    )
    assert summary.candidates == figure(4, 2)
    assert summary.decisions == Tally(
        names=("keep", "drop"), counts=(3, 1), patients=(2, 1), total_patients=2
    )
    assert summary.quality is not None
    assert summary.quality.counts == (1, 0, 0, 0, 0, 0, 0, 0, 2, 1)
    assert summary.quality.patients == (1, 0, 0, 0, 0, 0, 0, 0, 2, 1)
    assert summary.quality.total_patients == 2
    assert summary.quality_mean is not None
    assert summary.quality_mean.value == pytest.approx(0.675)
    assert summary.quality_mean.patients == 2
    assert summary.quality_sd is not None
    assert summary.quality_sd.value == pytest.approx(np.std([0.95, 0.85, 0.85, 0.05], ddof=1))
    assert summary.regions_mean == {"anterior": figure(0.5, 2), "posterior": figure(0.75, 2)}


def test_what_is_not_kept_by_size() -> None:
    sizes = ["small", "small", "empty", "large"]
    summary = summarise_curation(
        [0.5] * 4, {}, [KEEP, DROP, REVIEW, KEEP], ["p", "p", "q", "r"], groups={SIZE: sizes}
    )
    assert summary.not_kept is not None
    assert summary.not_kept.names == ("empty", "small", "large")
    assert (summary.not_kept.not_kept.counts, summary.not_kept.kept.counts) == ((1, 1, 0), (0, 1, 1))
    assert (summary.not_kept.not_kept.total_patients, summary.not_kept.kept.total_patients) == (2, 2)
    assert summary.not_kept.decisions == summary.decisions
    assert summarise_curation([0.5], {}, [KEEP], ["p"], groups={"scanner": ["old"]}).not_kept is None


def test_curation_with_a_review() -> None:
    decisions = summarise_curation([0.5, 0.6], {}, [REVIEW, DROP], ["p", "q"]).decisions
    assert decisions == Tally(names=("drop", "review"), counts=(1, 1), patients=(1, 1), total_patients=2)


def test_curation_without_candidates() -> None:
    summary = summarise_curation([], {"anterior": []}, [], [])
    assert summary.candidates == figure(0, 0)
    assert (summary.decisions, summary.quality, summary.quality_mean, summary.quality_sd) == (None,) * 4
    assert summary.regions_mean == {}


def test_cross_check_by_hand() -> None:
    summary = summarise_cross_check([0.5, 0.75, 1.0], ["p", "p", "q"])
    assert summary.references == figure(3, 2)
    assert summary.quality_mean == figure(0.75, 2)
    assert summary.quality_sd == figure(0.25, 2)  # with n - 1: sqrt((1/16 + 0 + 1/16) / 2)


def test_labels_by_hand() -> None:
    made = [("p", 0.05), ("p", 0.15), ("q", 0.19), ("q", 1.0)]
    summary = summarise_labels(made, [("p", "seggen", 0.15), ("q", "seggen", 1.0), ("q", "untouched", 1.0)])
    assert summary.made.counts == (1, 2, 0, 0, 0, 0, 0, 0, 0, 1)
    assert summary.made.patients == (1, 2, 0, 0, 0, 0, 0, 0, 0, 1)
    assert summary.chosen.counts == (0, 1, 0, 0, 0, 0, 0, 0, 0, 2)
    assert (summary.sources.names, summary.sources.counts) == (("seggen", "untouched"), (2, 1))
    assert (summary.sources.patients, summary.sources.total_patients) == ((2, 1), 2)


def test_cross_check_of_one_or_no_reference() -> None:
    alone = summarise_cross_check([0.5], ["p"])
    assert (alone.references, alone.quality_mean, alone.quality_sd) == (figure(1, 1), figure(0.5, 1), None)
    nobody = summarise_cross_check([], [])
    assert (nobody.references, nobody.quality_mean, nobody.quality_sd) == (figure(0, 0), None, None)


def test_segmentation_by_hand() -> None:
    summary = summarise_segmentation(
        dice=[0.5, 0.75, 1.0],
        regions={"anterior": [0.5, 0.5, 0.8], "posterior": [0.5, 1.0, 0.0]},
        patients=["p", "q", "q"],
    )
    assert summary.cases == figure(3, 2)
    assert summary.dice_mean == figure(0.75, 2)
    assert summary.dice_sd == figure(0.25, 2)
    assert summary.dice == {
        "anterior": figure(float(np.mean([0.5, 0.5, 0.8])), 2),
        "posterior": figure(0.5, 2),
    }


def test_a_region_that_few_references_hold_is_not_hidden_among_the_others() -> None:
    """The one patient's DSC would follow from a mean with the ones and zeros of all others."""
    rare = [0.37, *[math.nan] * 11]
    patients = [f"p{number}" for number in range(12)]
    summary = summarise_segmentation([0.9] * 12, {"rare": rare, "none": [math.nan] * 12}, patients)
    assert summary.dice == {"rare": figure(0.37, 1)}


def test_a_region_that_all_but_few_hold_gives_them_away() -> None:
    """With one region, the mean of all less that of the holders is the DSC of the one who lacks it."""
    held = [0.9] * 11
    summary = summarise_segmentation(
        [*held, 0.0], {"lesion": [*held, math.nan]}, [f"p{i}" for i in range(12)]
    )
    assert summary.dice["lesion"].patients == 1


def test_segmentation_of_one_or_no_case() -> None:
    alone = summarise_segmentation([0.5], {"anterior": [0.25]}, ["p"])
    assert (alone.dice_mean, alone.dice_sd, alone.dice) == (
        figure(0.5, 1),
        None,
        {"anterior": figure(0.25, 1)},
    )
    nobody = summarise_segmentation([], {"anterior": []}, [])
    assert (nobody.cases, nobody.dice_mean, nobody.dice_sd, nobody.dice) == (figure(0, 0), None, None, {})


def test_histogram_bins_hold_their_lower_edge() -> None:
    tenths = [index / 10 for index in range(11)]
    histogram = quality_histogram(tenths, [f"p{i}" for i in range(11)])
    assert histogram.edges == tuple(tenths)
    assert histogram.counts == (1,) * 9 + (2,)  # the last bin holds 1.0 too
    below = quality_histogram([np.nextafter(value, 0) for value in tenths[1:]], ["p"] * 10)
    assert below.counts == (1,) * 10
    assert (below.patients, below.total_patients) == ((1,) * 10, 1)


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan")])
def test_a_quality_outside_the_unit_interval_is_refused(value: float) -> None:
    with pytest.raises(DataError, match=f"quality {value} is outside"):
        quality_histogram([0.5, value], ["p", "q"])


@pytest.mark.parametrize("value", ["3", True, None, float("nan"), float("inf")])
def test_a_figure_is_a_finite_number(value: Any) -> None:
    with pytest.raises(ValidationError):
        Figure(value=value, patients=10)


@pytest.mark.parametrize("patients", [-1, 2.0, True])
def test_a_figure_counts_patients(patients: Any) -> None:
    with pytest.raises(ValidationError):
        Figure(value=1.0, patients=patients)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": (3,)}, "each group needs both"),
        ({"counts": (3, 1)}, "more patients than cases"),
        ({"total_patients": 2}, "2 patients in all do not fit"),
        ({"total_patients": 6}, "6 patients in all do not fit"),
        ({"edges": (0.0, 1.0)}, "2 bins have 2 edges; they need 3"),
    ],
)
def test_a_histogram_that_does_not_add_up_is_refused(change: dict[str, Any], message: str) -> None:
    values = {"edges": (0.0, 0.5, 1.0), "counts": (3, 4), "patients": (3, 2), "total_patients": 4}
    Histogram.model_validate(values)
    with pytest.raises(ValidationError, match=message):
        Histogram.model_validate({**values, **change})


def test_a_tally_needs_a_name_for_each_group() -> None:
    values = {"names": ("keep", "drop"), "counts": (3, 4), "patients": (3, 2), "total_patients": 4}
    Tally.model_validate(values)
    for names in (("keep",), ("keep", "keep")):
        with pytest.raises(ValidationError, match="2 groups have the names"):
            Tally.model_validate({**values, "names": names})


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(DataError, match="reference has 1 values for 2 patients"):
        summarise_data(["p", "q"], [True], {}, {})
    with pytest.raises(DataError, match="volumes of anterior has 1 values for 2"):
        summarise_data(["p", "q"], [True, False], {"anterior": [1.0]}, {})
    with pytest.raises(DataError, match="true has 1 values for 2"):
        summarise_calibration([0.1, 0.2], [0.1], ["p", "q"], 0.75)
    with pytest.raises(DataError, match="outcomes has 1 values for 2"):
        summarise_curation([0.1, 0.2], {}, [KEEP], ["p", "q"])
    with pytest.raises(DataError, match="groups by scanner has 1 values for 2"):
        summarise_curation([0.1, 0.2], {}, [KEEP, KEEP], ["p", "q"], groups={"scanner": ["old"]})
    with pytest.raises(DataError, match="region anterior has 1 values for 2"):
        summarise_calibration([0.1, 0.2], [0.1, 0.2], ["p", "q"], 0.75, {"anterior": [(0.1, 0.2)]})
    with pytest.raises(DataError, match="quality has 1 values for 2"):
        summarise_cross_check([0.1], ["p", "q"])
    with pytest.raises(DataError, match="dice has 1 values for 2"):
        summarise_segmentation([0.1], {}, ["p", "q"])
    with pytest.raises(DataError, match="region anterior has 1 values for 2"):
        summarise_segmentation([0.1, 0.2], {"anterior": [0.1]}, ["p", "q"])
    with pytest.raises(DataError, match="region anterior has 1 values for 2"):
        summarise_curation([0.1, 0.2], {"anterior": [0.1]}, [KEEP, KEEP], ["p", "q"])
