"""FedAdam (Reddi et al. 2021, algorithm 2): the mean of the updates is a gradient for the server's own Adam.

As Flower's strategy of this name computes it, with the bias correction of Kingma and Ba 2015, section 2.1.
"""

from dataclasses import dataclass, field

import numpy as np

from fedqc.config import AveragingConfig
from fedqc.protocol import Weights


@dataclass(frozen=True)
class Moments:
    """What the server's Adam remembers between rounds, by the name of the array."""

    first: Weights = field(default_factory=dict)
    second: Weights = field(default_factory=dict)


def adam_step(
    current: Weights, mean: Weights, moments: Moments, round_number: int, config: AveragingConfig
) -> tuple[Weights, Moments]:
    """One step from the current model along the mean of the updates.

    Args:
        current: the model that the sites started from.
        mean: of what they made of it. Arrays of whole numbers are taken as they are here: they only count.
        moments: after the round before.
        round_number: from 1.
        config: `learning_rate`, `momentum` (beta 1), `second_momentum` (beta 2) and `adaptivity` (tau).

    Returns:
        The next model in the dtypes of the current one, and the moments, float64.
    """
    beta_1, beta_2 = config.momentum, config.second_momentum
    rate = (
        config.learning_rate * np.sqrt(1 - beta_2 ** (round_number + 1)) / (1 - beta_1 ** (round_number + 1))
    )
    after, first, second = dict(mean), {}, {}
    for name, values in current.items():
        if not np.issubdtype(values.dtype, np.floating):
            continue
        change = mean[name].astype(np.float64) - values
        first[name] = beta_1 * moments.first.get(name, 0.0) + (1 - beta_1) * change
        second[name] = beta_2 * moments.second.get(name, 0.0) + (1 - beta_2) * change**2
        step = rate * first[name] / (np.sqrt(second[name]) + config.adaptivity)
        after[name] = np.asarray(values + step).astype(values.dtype)
    return after, Moments(first, second)
