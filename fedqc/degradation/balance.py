"""Choosing samples so that every quality is learned, not only the most frequent one."""

import numpy as np
from numpy.typing import NDArray


def quantile_balance(dsc: NDArray[np.floating], count: int, rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of `count` samples whose DSC is close to uniform (Qiu et al. 2023, 3.1).

    Uniform targets over the range of the DSC are drawn, and for each the nearest sample is taken; samples
    repeat where they are rare, and among equally near ones the choice is random.

    Args:
        dsc: `[M]` DSC of the samples at hand.
        count: How many to choose.
        rng: Redrawn every epoch, so that all samples are seen in time.
    """
    order = rng.permutation(len(dsc))
    order = order[np.argsort(dsc[order], kind="stable")]
    values = dsc[order]
    targets = rng.uniform(values[0], values[-1], count)
    after = np.clip(np.searchsorted(values, targets), 1, max(1, len(values) - 1))
    before = after - 1
    after = np.minimum(after, len(values) - 1)
    nearer = np.where(targets - values[before] <= values[after] - targets, before, after)
    # A run of equal values is one target's worth of candidates: any of them may be taken.
    first = np.searchsorted(values, values[nearer], side="left")
    last = np.searchsorted(values, values[nearer], side="right")
    return np.asarray(order[rng.integers(first, last)])


def histogram_balance(
    dsc: NDArray[np.floating], count: int, rng: np.random.Generator, bins: int = 10
) -> NDArray[np.intp]:
    """Indices of `count` samples, equally many of every DSC bin on average (Robinson et al. 2018).

    The paper cuts each bin to the count of the rarest one, which leaves next to nothing of a few dozen
    samples. Here a bin that holds any sample is drawn first, and then one of its samples, so these repeat
    where they are rare.

    Args:
        dsc: `[M]` DSC of the samples at hand.
        count: How many to choose.
        rng: Redrawn every epoch, so that all samples are seen in time.
        bins: Of equal width over [0, 1].
    """
    bin_of = np.minimum((np.asarray(dsc) * bins).astype(int), bins - 1)
    members = [indices for index in range(bins) if len(indices := np.flatnonzero(bin_of == index))]
    drawn = rng.integers(len(members), size=count)
    return np.array([rng.choice(members[index]) for index in drawn], dtype=np.intp)
