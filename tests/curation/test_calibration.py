"""Against brute force, and the guarantee itself over simulated splits."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from fedqc.curation.calibration import BINS, PATIENT, Calibration, bins_of, calibration_of, counted
from fedqc.curation.rules import largest_kept
from fedqc.errors import DataError

steady = settings(deadline=None, database=None)
qualities = st.lists(st.integers(0, 100).map(lambda per_cent: per_cent / 100), min_size=1, max_size=30)


def of(failures: list[float], others: list[float]) -> Calibration:
    """One label a patient."""
    true = [0.0] * len(failures) + [1.0] * len(others)
    return calibration_of([*failures, *others], true, [str(index) for index in range(len(true))], 0.75)


@pytest.mark.parametrize(
    ("quality", "place"), [(0.0, 0), (0.0099, 0), (0.01, 1), (0.29, 29), (0.57, 57), (0.999, 99), (1.0, 99)]
)
def test_a_bin_holds_its_lower_edge(quality: float, place: int) -> None:
    assert bins_of([quality]).tolist() == [place]


@pytest.mark.parametrize("quality", [-0.01, 1.01, float("nan")])
def test_what_is_no_quality_is_refused(quality: float) -> None:
    with pytest.raises(DataError, match="outside"):
        bins_of([quality])


def test_every_patient_counts_the_same() -> None:
    counts = counted(np.array([0.1, 0.1, 0.2, 0.3, 0.3]), np.array(["a", "a", "a", "a", "b"]))
    assert counts.sum() == 2 * PATIENT
    assert (counts[10], counts[20], counts[30]) == (500, 250, 1250)
    assert counted(np.zeros(0), np.zeros(0, dtype=np.str_)).tolist() == [0] * BINS


@pytest.mark.parametrize("labels", [3, 6, 7, 12, 13, 14])
def test_nine_patients_are_nine_however_many_labels_each_has(labels: int) -> None:
    """Thirds and sevenths of a patient are no thousandths, and a rule may ask for nine patients."""
    quality = np.tile(np.linspace(0.105, 0.605, labels), 9)
    counts = counted(quality, np.repeat([f"p{number}" for number in range(9)], labels))
    assert counts.sum() == 9 * PATIENT
    assert np.abs(counts[counts > 0] - 9 * PATIENT / labels).max() <= 1


def test_failures_and_others_are_counted_apart() -> None:
    known = calibration_of([0.2, 0.9, 0.8], [0.3, 0.74, 0.75], ["a", "a", "a"], tau=0.75)
    assert (known.n_failing, known.n_others) == (1, 1)
    assert (known.failures[20], known.failures[90], known.others[80]) == (500, 500, 1000)


def test_a_calibration_of_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="0 predictions"):
        calibration_of([], [], [], 0.75)
    with pytest.raises(DataError, match="2 predictions, 1 true"):
        calibration_of([0.1, 0.2], [0.1], ["a", "b"], 0.75)
    with pytest.raises(ValidationError, match="without any label"):
        Calibration(failures=(0,) * BINS, others=(0,) * BINS)


@steady
@given(qualities, st.integers(1, 100))
def test_cut_for_recall_is_the_lowest_that_reaches_it(failures: list[float], per_cent: int) -> None:
    cut = of(failures, [0.5]).cut_for_recall(per_cent / 100)
    places = bins_of(failures)
    reached = [edge for edge in range(1, BINS + 1) if 100 * (places < edge).sum() >= per_cent * len(places)]
    assert cut == min(reached) / BINS


@steady
@given(qualities, qualities, st.integers(51, 100))
def test_cut_for_precision_is_the_highest_that_reaches_it(
    failures: list[float], others: list[float], per_cent: int
) -> None:
    cut = of(failures, others).cut_for_precision(per_cent / 100)
    bad, good = bins_of(failures), bins_of(others)
    reached = []
    for edge in range(1, BINS + 1):
        found, wrong = (bad < edge).mean(), (good < edge).mean()
        if found and found / (found + wrong) >= per_cent / 100 - 1e-12:
            reached.append(edge / BINS)
    assert cut == (max(reached) if reached else None)


@pytest.mark.parametrize("per_cent", [55, 70, 90, 95, 99])
def test_a_precision_that_is_reached_exactly_is_reached(per_cent: int) -> None:
    failing = [0.0] * per_cent
    others = [0.0] * (100 - per_cent) + [0.9] * (2 * per_cent - 100)  # as many, so that shares are counts
    assert of(failing, others).cut_for_precision(per_cent / 100) == 0.9


def test_cuts_need_what_they_are_about() -> None:
    assert of([], [0.9]).cut_for_recall(0.9) is None
    assert of([], [0.9]).cut_for_precision(0.9) is None
    assert of([0.1], []).cut_for_precision(0.9) is None


@steady
@given(qualities, qualities)
def test_p_values_count_failures_that_are_as_good(failures: list[float], candidates: list[float]) -> None:
    places = bins_of(failures)
    expected = [(1 + (places >= place).sum()) / (1 + len(places)) for place in bins_of(candidates)]
    assert of(failures, [0.5]).p_values(candidates) == pytest.approx(expected)


def test_without_failures_nothing_is_unlikely_to_be_one() -> None:
    assert of([], [0.9]).p_values([0.0, 1.0]).tolist() == [1, 1]


def draw(
    rng: np.random.Generator, n_patients: int, n_labels: int, bad: float
) -> tuple[NDArray[np.float64], ...]:
    """True and predicted DSC `[patients, labels]`: patients differ in how well the model judges them."""
    true = np.where(
        rng.uniform(size=(n_patients, n_labels)) < bad,
        rng.uniform(0.2, 0.75, (n_patients, n_labels)),
        rng.uniform(0.75, 1, (n_patients, n_labels)),
    )
    of_patient = rng.normal(0, 0.05, (n_patients, 1))
    return true, np.clip(true + of_patient + rng.normal(0, 0.05, true.shape), 0, 1)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.2])
@pytest.mark.parametrize("bad", [0.1, 0.35, 0.8])
def test_on_average_at_most_alpha_of_the_kept_are_failures(alpha: float, bad: float) -> None:
    """200 splits; calibration labels, several a patient, are half failures whatever the candidates are."""
    rng = np.random.default_rng([int(100 * alpha), int(100 * bad)])
    shares, kept = [], []
    for _ in range(200):
        true, predicted = draw(rng, 150, 4, 0.5)
        owner = np.repeat(np.arange(150), 4).astype(np.str_)
        known = calibration_of(predicted.ravel(), true.ravel(), owner.tolist(), 0.75)
        true, predicted = (values.ravel() for values in draw(rng, 80, 1, bad))
        p_values = known.p_values(predicted)
        selected = p_values <= largest_kept(p_values, alpha)
        shares.append((true[selected] < 0.75).mean() if selected.any() else 0.0)
        kept.append(selected.sum())
    assert np.mean(shares) <= alpha + 2 * np.std(shares) / np.sqrt(len(shares))
    assert np.mean(kept) > 0.15 * (1 - bad) * 80  # it does not keep its word by keeping nothing
