import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import optimize, stats

from fedqc.statistics.update_privacy import clipped_and_noised, epsilon

RECEIVED: dict[str, NDArray[Any]] = {
    "w": np.full((30, 40), 2.0, np.float32),
    "b": np.zeros(100),
    "n": np.array(3, np.int64),
}


def update(change: float) -> dict[str, np.ndarray]:
    return {"w": RECEIVED["w"] + np.float32(change), "b": RECEIVED["b"] + change, "n": np.array(7, np.int64)}


def change_norm(arrays: dict[str, np.ndarray]) -> float:
    return math.sqrt(sum(float(((arrays[name] - RECEIVED[name]) ** 2).sum()) for name in ("w", "b")))


@pytest.mark.parametrize(("change", "norm"), [(1.0, 0.5), (0.001, 0.001 * math.sqrt(1300)), (0.0, 0.0)])
def test_the_change_is_no_larger_than_the_bound(change: float, norm: float) -> None:
    rng = np.random.default_rng(0)
    clipped = clipped_and_noised(update(change), RECEIVED, clip=0.5, noise=0.0, rng=rng)
    assert change_norm(clipped) == pytest.approx(norm, rel=1e-4)
    assert {name: values.dtype for name, values in clipped.items()} == {
        name: values.dtype for name, values in RECEIVED.items()
    }
    assert clipped["n"] == 7


def test_the_noise_has_its_spread_on_every_number() -> None:
    rng = np.random.default_rng(0)
    noised = clipped_and_noised(update(0.0), RECEIVED, clip=0.5, noise=3.0, rng=rng)
    drawn = np.concatenate([(noised[name] - RECEIVED[name]).ravel() for name in ("w", "b")])
    assert stats.kstest(drawn, "norm", args=(0, 1.5)).pvalue > 0.01
    assert noised["n"] == 7


def test_epsilon_falls_with_noise_and_grows_with_rounds() -> None:
    assert epsilon(10, 1) < epsilon(5, 1) < epsilon(5, 20)


@pytest.mark.parametrize(("noise", "rounds"), [(5.0, 1), (20.0, 20), (50.0, 100)])
def test_epsilon_is_the_bound_of_renyi_accounting_and_never_below_the_truth(
    noise: float, rounds: int
) -> None:
    """The least of the Renyi bounds over all orders, found by search; and the exact curve of the Gaussian
    mechanism (Balle & Wang 2018, theorem 8), which no bound may undercut."""
    delta, shift = 1e-5, 2 * math.sqrt(rounds) / noise

    def renyi(order: float) -> float:
        return order * shift**2 / 2 + math.log(1 / delta) / (order - 1)

    least = optimize.minimize_scalar(renyi, bounds=(1.0001, 1e5), method="bounded").fun
    assert epsilon(noise, rounds) == pytest.approx(least, rel=1e-3)

    def exact_delta(eps: float) -> float:
        upper = stats.norm.cdf(shift / 2 - eps / shift)
        return float(upper - math.exp(eps) * stats.norm.cdf(-shift / 2 - eps / shift))

    assert exact_delta(epsilon(noise, rounds)) <= delta
