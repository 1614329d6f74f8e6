"""The monotone map beside scikit-learn's isotonic regression."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from sklearn.isotonic import IsotonicRegression

from fedqc.errors import TrainingError
from fedqc.methods.calibration import MonotoneMap, Widening


def test_until_it_is_fitted_it_changes_nothing_in_the_unit_interval() -> None:
    raw = torch.tensor([[-0.5, 0.0, 0.3], [0.77, 1.0, 3.0]])
    torch.testing.assert_close(MonotoneMap()(raw), raw.clamp(0, 1))


@pytest.mark.parametrize("n", [1, 2, 12, 30])
def test_few_values_are_mapped_as_scikit_learn_does(n: int) -> None:
    rng = np.random.default_rng(n)
    raw = rng.normal(5, 2, n).astype(np.float32)
    true = np.clip((raw - 2) / 6 + rng.normal(0, 0.2, n), 0, 1)
    fitted = MonotoneMap()
    fitted.fit(raw, true)
    asked = np.linspace(-5, 15, 200, dtype=np.float32)
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw, true).predict(asked)
    np.testing.assert_allclose(fitted(asked), expected, atol=1e-5)
    np.testing.assert_allclose(fitted(torch.from_numpy(asked)).numpy(), expected, atol=1e-5)


def test_many_values_are_mapped_nearly_as_scikit_learn_does() -> None:
    rng = np.random.default_rng(0)
    raw = rng.uniform(0, 1, 5000)
    true = np.clip(raw**2 + rng.normal(0, 0.1, 5000), 0, 1)
    fitted = MonotoneMap()
    fitted.fit(raw, true)
    assert len(fitted.raw) == 33
    expected = IsotonicRegression(y_min=0, y_max=1, out_of_bounds="clip").fit(raw, true)
    assert np.abs(fitted(raw) - expected.predict(raw)).mean() < 0.01
    found = fitted(np.linspace(-1, 2, 1000))
    assert (np.diff(found) >= 0).all()
    assert 0 <= found.min() <= found.max() <= 1


def test_the_direction_is_learned_only_where_it_may_be() -> None:
    raw, true = np.array([10.0, 20.0, 30.0, 40.0]), np.array([0.9, 0.6, 0.7, 0.1])
    learned, increasing = MonotoneMap(sign="learned"), MonotoneMap()
    learned.fit(raw, true)
    increasing.fit(raw, true)
    np.testing.assert_allclose(learned(raw), [0.9, 0.65, 0.65, 0.1], atol=1e-6)
    np.testing.assert_allclose(increasing(raw), true.mean(), atol=1e-6)
    upwards = MonotoneMap(sign="learned")
    upwards.fit(raw, 1 - true)
    np.testing.assert_allclose(upwards(raw), [0.1, 0.35, 0.35, 0.9], atol=1e-6)


def test_a_value_that_says_nothing_means_the_mean_quality() -> None:
    fitted = MonotoneMap(sign="learned")
    fitted.fit([0.5, 0.5, 0.5], [0.0, 0.3, 0.9])
    np.testing.assert_allclose(fitted(np.array([0.0, 0.5, 1.0])), 0.4, atol=1e-6)


def test_it_is_stored_as_plain_tensors(tmp_path: Path) -> None:
    fitted, read = MonotoneMap(), MonotoneMap()
    fitted.fit([0.2, 0.4, 0.6], [0.1, 0.5, 0.9])
    save_file(fitted.state_dict(), tmp_path / "map.safetensors")
    read.load_state_dict(load_file(tmp_path / "map.safetensors"))
    raw = torch.linspace(0, 1, 20)
    assert torch.equal(read(raw), fitted(raw))
    assert not list(fitted.parameters())


@pytest.mark.parametrize(("raw", "true"), [([], []), ([0.1, 0.2], [0.3]), ([0.1, float("nan")], [0.1, 0.2])])
def test_what_cannot_be_fitted_to_is_refused(raw: list[float], true: list[float]) -> None:
    with pytest.raises(TrainingError, match="finite pairs"):
        MonotoneMap().fit(raw, true)


def test_widened_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """However narrow they were; and drawn anew, as labels are that they were not fitted to."""
    rng = np.random.default_rng(0)

    def drawn(n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        true = rng.uniform(0.3, 0.7, n)
        return true + rng.normal(0, 0.05, n), true

    predicted, true = drawn(2000)
    widening = Widening()
    widening.fit(predicted - 0.001, predicted + 0.001, true)
    assert float(widening.by) == pytest.approx(1.96 * 0.05, rel=0.05)
    held = []
    for value, truth in zip(*drawn(2000), strict=True):
        low, high = widening(value - 0.001, value + 0.001, value)
        held.append(low <= truth <= high)
    assert np.mean(held) == pytest.approx(0.95, abs=0.02)


def test_intervals_that_were_too_wide_become_narrower_but_hold_the_quality() -> None:
    widening = Widening()
    assert widening(0.2, 0.4, 0.5) == (0.2, 0.5)
    true = np.full(40, 0.5)
    widening.fit(true - 0.3, true + 0.3, true)
    assert widening(0.1, 0.9, 0.5) == pytest.approx((0.4, 0.6))
    assert widening(0.1, 0.3, 0.25) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize(("n", "certain"), [(18, False), (19, True)])
def test_few_labels_make_nothing_certain(n: int, certain: bool) -> None:
    """The 95th percentile of 18 draws may be larger than all of them."""
    widening = Widening()
    widening.fit(np.full(n, 0.4), np.full(n, 0.6), np.full(n, 0.7))
    assert widening(0.4, 0.6, 0.5) == (pytest.approx((0.3, 0.7)) if certain else (0.0, 1.0))
