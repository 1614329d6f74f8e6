"""What the voxels of a volume hold, counted piece by piece: nothing made here is as large as the volume."""

import math
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.volumes import pieces

MANY_VALUES = 32
"""An image has more different values than this, a label fewer."""
_SAMPLE = 2**23  # voxels that are kept at most
_N_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Intensities:
    """Of a modality, all but the first three of the voxels that are not zero; 0 where there are none."""

    n_voxels: int
    n_zero: int
    n_not_finite: int
    """Where there are any, nothing that follows means anything."""
    lowest: float = 0.0
    highest: float = 0.0
    n_highest: int = 0
    mean: float = 0.0
    sd: float = 0.0
    sample: NDArray[np.float32] = field(default_factory=lambda: np.zeros(1, dtype=np.float32), repr=False)
    """All of them, or of a large volume every second, third, ... one: enough for percentiles."""


@dataclass(frozen=True)
class Strangers:
    """Values in a label that mean nothing to the task."""

    n_voxels: int = 0
    examples: tuple[float, ...] = ()
    """The lowest few."""


@dataclass(frozen=True)
class LabelValues:
    """Which values a label holds, in how many voxels."""

    n_voxels: int
    known: Mapping[int, int]
    """Voxels by value, background too, of values that the task knows."""
    has_many: bool
    """Whether there are more different values than a label has."""
    not_finite: Strangers
    fractions: Strangers
    unknown: Strangers
    """Whole numbers."""

    @property
    def n_known(self) -> int:
        """Voxels with a value that the task knows."""
        return sum(self.known.values())


def measure(channel: NDArray[np.float32]) -> Intensities:
    """Measure the intensities of a modality, [X, Y, Z]."""
    n = n_zero = n_highest = n_not_finite = 0
    lowest, highest, mean, squares = math.inf, -math.inf, 0.0, 0.0
    step = math.ceil(channel.size / _SAMPLE)
    sample = []
    for piece in pieces(channel):
        values = piece[piece != 0]
        n_zero += piece.size - values.size
        if not values.size:
            continue
        bottom, top = float(values.min()), float(values.max())
        if not (math.isfinite(bottom) and math.isfinite(top)):
            n_not_finite += int(np.count_nonzero(~np.isfinite(values)))
            continue
        if top >= highest:
            n_highest = int(np.count_nonzero(values == top)) + (n_highest if top == highest else 0)
        lowest, highest = min(lowest, bottom), max(highest, top)
        # The sum of squared differences from the mean, put together as in Chan et al. 1983, eq. 1.5.
        own = float(values.mean(dtype=np.float64))
        inside = float(np.square(values - np.float64(own)).sum())
        squares += inside + (own - mean) ** 2 * n * values.size / (n + values.size)
        mean += (own - mean) * values.size / (n + values.size)
        n += values.size
        sample.append(values[::step])
    if not n or n_not_finite:
        return Intensities(channel.size, n_zero, n_not_finite)
    return Intensities(
        n_voxels=channel.size,
        n_zero=n_zero,
        n_not_finite=0,
        lowest=lowest,
        highest=highest,
        n_highest=n_highest,
        mean=mean,
        sd=math.sqrt(squares / n),
        sample=np.concatenate(sample),
    )


def count_values(values: NDArray[Any], known: Collection[int]) -> LabelValues:
    """Count the values of a label [X, Y, Z] of any real dtype; `known` are those that mean something."""
    counted: Counter[int] = Counter()
    seen: set[float] = set()
    strange = {kind: _Collector() for kind in ("not finite", "fraction", "unknown")}
    wanted = np.array(sorted(known))
    for piece in pieces(values):
        found, times = _distinct(piece)
        if len(seen) <= MANY_VALUES:
            seen.update(found[: MANY_VALUES + 1].tolist())
        is_known = np.isin(found, wanted)
        for value, n in zip(found[is_known].tolist(), times[is_known].tolist(), strict=True):
            counted[int(value)] += n
        is_finite = np.isfinite(found)
        is_whole = is_finite & (found == np.rint(found))
        strange["not finite"].add(found, times, ~is_finite)
        strange["fraction"].add(found, times, is_finite & ~is_whole)
        strange["unknown"].add(found, times, is_whole & ~is_known)
    return LabelValues(
        n_voxels=values.size,
        known=dict(sorted(counted.items())),
        has_many=len(seen) > MANY_VALUES,
        not_finite=strange["not finite"].result(),
        fractions=strange["fraction"].result(),
        unknown=strange["unknown"].result(),
    )


def holds_only(channel: NDArray[np.float32], known: Collection[int]) -> bool:
    """Whether an image [X, Y, Z] has no other values than these, and not only zeros."""
    wanted = np.array(sorted(known))
    return all(np.isin(piece, wanted).all() for piece in pieces(channel)) and bool(channel.any())


def _distinct(piece: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.intp]]:
    """The different values, sorted, and how often there are."""
    if piece.dtype.kind in "iu" and piece.dtype.itemsize <= 2 and piece.min() >= 0:
        times = np.bincount(piece)  # sorting takes several times as long
        found = np.flatnonzero(times)
        return found, times[found]
    return np.unique(piece, return_counts=True)


class _Collector:
    """Adds up strangers."""

    def __init__(self) -> None:
        self._n = 0
        self._lowest: set[float] = set()

    def add(self, values: NDArray[Any], times: NDArray[np.intp], chosen: NDArray[np.bool_]) -> None:
        """Add those of the sorted values that are chosen."""
        if chosen.any():
            self._n += int(times[chosen].sum())
            both = self._lowest | set(values[chosen][:_N_EXAMPLES].astype(np.float64).tolist())
            self._lowest = set(sorted(both)[:_N_EXAMPLES])

    def result(self) -> Strangers:
        """What was added."""
        return Strangers(self._n, tuple(sorted(self._lowest)))
