"""Noise on what a site's update tells about its data, and what that noise is worth.

Flower has this as a wrapper around the whole ClientApp. There it would come behind the guard, and the ledger
would list other bytes than those that leave; so it is done here, before.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DELTA = 1e-5
"""Probability with which the promise of epsilon may fail."""


def clipped_and_noised(
    update: Mapping[str, NDArray[Any]],
    received: Mapping[str, NDArray[Any]],
    *,
    clip: float,
    noise: float,
    rng: np.random.Generator,
) -> dict[str, NDArray[Any]]:
    """An update whose change is bounded and blurred (the Gaussian mechanism; Dwork & Roth 2014, app. A).

    Args:
        update: arrays after training. Whole-number arrays pass as they are: they count steps.
        received: the arrays that training started from.
        clip: largest L2 norm of the change over all arrays; a larger one is scaled down to it.
        noise: standard deviation of the noise on each number, as a multiple of `clip`.
        rng: of the noise; whoever can guess it can take the noise away again.

    Returns:
        Arrays in the dtypes of `update`.
    """
    changes = {
        name: values.astype(np.float64) - received[name]
        for name, values in update.items()
        if np.issubdtype(values.dtype, np.floating)
    }
    norm = math.sqrt(sum(float((change**2).sum()) for change in changes.values()))
    scale = min(1.0, clip / norm) if norm > 0 else 1.0
    blurred: dict[str, NDArray[Any]] = dict(update)
    for name, change in changes.items():
        moved = received[name] + scale * change + rng.normal(0.0, noise * clip, change.shape)
        blurred[name] = np.asarray(moved).astype(update[name].dtype)
    return blurred


def epsilon(noise: float, rounds: int, delta: float = DELTA) -> float:
    """What all updates of a site together can tell apart, with the probability `delta` of telling more.

    Two data sets of a site give changes that differ by 2 `clip` at most, so one update is zero-concentrated
    differentially private with rho = (2 / noise)^2 / 2, and rhos add up over the rounds (Bun & Steinke 2016,
    propositions 1.3, 1.6 and lemma 1.7).
    """
    rho = rounds * (2 / noise) ** 2 / 2
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))
