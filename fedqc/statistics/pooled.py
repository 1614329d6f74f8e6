"""What sites told of labels of known quality, taken together: numbers of all labels from those of each site.

Sites round what they tell, and hide small bins; what comes out is as exact as what went in.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.curation.calibration import BINS, PATIENT, Calibration
from fedqc.metrics.agreement import LimitsOfAgreement
from fedqc.statistics.site import PROFILE_BINS

THRESHOLDS = np.arange(BINS + 1) / BINS
"""Edges of the bins of a calibration, `[BINS + 1]`."""


@dataclass(frozen=True)
class ProfileBin:
    """Labels whose predicted DSC lies in one bin, at one site or at several."""

    low: float
    high: float
    n: int
    """Labels; sites tell them to the nearest multiple of `min_count`."""
    predicted: float
    """Mean predicted DSC."""
    true: float
    """Mean true DSC."""
    sd: float | None
    """Standard deviation (n - 1) of predicted minus true DSC; None where nobody told one."""

    @property
    def bias(self) -> float:
        """Mean of predicted minus true DSC."""
        return self.predicted - self.true

    @property
    def middle(self) -> float:
        """Mean of predicted and true DSC."""
        return (self.predicted + self.true) / 2


@dataclass(frozen=True)
class PooledMean:
    """A mean over the cases of several sites."""

    n: int
    """Cases."""
    mean: float
    sd: float | None
    """Standard deviation (n - 1) over the cases; None where no site told its own."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % interval of the mean, of cases that are independent of each other."""
        if self.sd is None:
            return None
        reach = 1.96 * self.sd / math.sqrt(self.n)
        return self.mean - reach, self.mean + reach


@dataclass(frozen=True)
class RiskCoverage:
    """What is kept at each of `THRESHOLDS`, of labels of known quality, and how much of it are failures."""

    failures: NDArray[np.float64]
    """`[BINS + 1]` failures that are not below each threshold, in patients."""
    others: NDArray[np.float64]
    """`[BINS + 1]` others, likewise."""

    @property
    def coverage(self) -> NDArray[np.float64]:
        """`[BINS + 1]` share of the labels that is kept, from 1 down to 0."""
        kept = self.failures + self.others
        return _shares(kept, kept[0])

    @property
    def risk(self) -> NDArray[np.float64]:
        """`[BINS + 1]` share of failures among what is kept; NaN where nothing is."""
        return _shares(self.failures, self.failures + self.others)

    @property
    def failing(self) -> float:
        """Share of failures among all labels: the risk, and the area, of a model that knows nothing."""
        return float(self.risk[0])

    @property
    def aurc(self) -> float:
        """Area under risk by coverage (Geifman & El-Yaniv 2017), lower is better.

        By the trapezoidal rule, as `fedqc.metrics.filtering.aurc`, but level from coverage 0 on.
        """
        coverage, risk = self._rising()
        return float(risk[0] * coverage[0] + np.trapezoid(risk, coverage))

    @property
    def least_aurc(self) -> float:
        """The area of a model that ranks every failure below every other label, that is of `best`."""
        return self.failing + (1 - self.failing) * math.log1p(-self.failing) if self.failing < 1 else 1.0

    @property
    def failures_below(self) -> NDArray[np.float64]:
        """`[BINS + 1]` share of the failures that each threshold drops; NaN where there is none at all."""
        return 1 - _shares(self.failures, self.failures[0])

    @property
    def others_below(self) -> NDArray[np.float64]:
        """`[BINS + 1]` share of the others that each threshold drops; NaN where there is none at all."""
        return 1 - _shares(self.others, self.others[0])

    def at(self, coverage: NDArray[np.float64]) -> NDArray[np.float64]:
        """The risk at each coverage."""
        return np.interp(coverage, *self._rising())

    def best(self, coverage: NDArray[np.float64]) -> NDArray[np.float64]:
        """The risk of a model that ranks every failure below every other label, at each coverage above 0."""
        return np.maximum(0.0, 1 - (1 - self.failing) / coverage)

    def _rising(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Coverage and risk wherever something is kept, from the least kept to all."""
        kept = self.coverage > 0
        return self.coverage[kept][::-1], self.risk[kept][::-1]


def profile_of(told: Mapping[str, Any]) -> list[ProfileBin]:
    """The bins that one site told in the phase calibrate; empty where it told none."""
    keys = [f"profile.{name}" for name in ("labels", "predicted", "true", "sd")]
    if not told.keys() >= set(keys):
        return []
    columns = zip(*(told[key] for key in keys), strict=True)
    return [
        ProfileBin(*_ends(index), n, predicted, true, None if sd < 0 else sd)
        for index, (n, predicted, true, sd) in enumerate(columns)
        if n > 0 and predicted >= 0 and true >= 0
    ]


def pooled_profile(sites: Iterable[Mapping[str, Any]]) -> list[ProfileBin]:
    """Each bin over the sites that told it.

    Args:
        sites: what each told in the phase calibrate.
    """
    bins = [one for told in sites for one in profile_of(told)]
    pooled = []
    for index in range(PROFILE_BINS):
        low, high = _ends(index)
        here = [one for one in bins if one.low == low]
        if here:
            n, predicted = _mean([(one.n, one.predicted) for one in here])
            _, true = _mean([(one.n, one.true) for one in here])
            sd = _sd([(one.n, one.bias, one.sd) for one in here])
            pooled.append(ProfileBin(low, high, n, predicted, true, sd))
    return pooled


def pooled_agreement(sites: Iterable[Mapping[str, Any]]) -> LimitsOfAgreement | None:
    """Bias and limits of agreement over all sites that told theirs; None where none did.

    Args:
        sites: what each told in the phase calibrate.
    """
    pooled = _pooled(sites, "samples", "bias", "difference_sd")
    if pooled is None or pooled.sd is None:
        return None
    bias, reach = pooled.mean, 1.96 * pooled.sd
    return LimitsOfAgreement(pooled.n, bias, pooled.sd, lower=bias - reach, upper=bias + reach)


def pooled_dice(sites: Iterable[Mapping[str, Any]]) -> PooledMean | None:
    """The segmentation's Dice over the cases of all sites that told theirs; None where none did.

    Of a region there is none: it counts where a reference holds it, and sites do not tell how often.

    Args:
        sites: what each told in the phase evaluate.segmentation.
    """
    return _pooled(sites, "cases", "dice_mean", "dice_sd")


def risk_coverage(calibration: Calibration) -> RiskCoverage:
    """The curve that counts give; patients weigh the same among failures, and among others.

    Of counts that sites told, whose bins of few patients were moved to the cautious end, it is the highest
    that the labels can have.
    """
    return RiskCoverage(_not_below(calibration.failures), _not_below(calibration.others))


def at_best(sites: Iterable[Mapping[str, Any]]) -> Calibration | None:
    """The counts that are as good for the model as they can be, of what sites told with `min_count` above 1.

    A site counts failures at the upper end of bins that it took together, and others at the lower end (see
    `fedqc.statistics.privacy`). Here each lies at the other end, so the labels themselves are in between.

    Args:
        sites: what each told in the phase calibrate.

    Returns:
        None where no site told any.
    """
    failures, others = [0] * BINS, [0] * BINS
    for told in sites:
        before = 0
        for place, mass in enumerate(told.get("failures", ())):
            if mass:
                failures[before] += mass
                before = place + 1
        after = BINS - 1
        for place, mass in reversed(list(enumerate(told.get("others", ())))):
            if mass:
                others[after] += mass
                after = place - 1
    if not (any(failures) or any(others)):
        return None
    return Calibration(failures=tuple(failures), others=tuple(others))


def _ends(index: int) -> tuple[float, float]:
    return index / PROFILE_BINS, (index + 1) / PROFILE_BINS


def _not_below(counts: Sequence[int]) -> NDArray[np.float64]:
    """`[BINS + 1]` patients at or above each of `THRESHOLDS`."""
    return np.append(np.cumsum(counts[::-1])[::-1], 0) / PATIENT


def _shares(parts: NDArray[np.float64], whole: NDArray[np.float64] | float) -> NDArray[np.float64]:
    """Parts of a whole; NaN where there is none."""
    shares = np.full(len(parts), np.nan)
    np.divide(parts, whole, out=shares, where=np.asarray(whole) > 0)
    return shares


def _pooled(sites: Iterable[Mapping[str, Any]], n: str, mean: str, sd: str) -> PooledMean | None:
    """A mean over the cases of all sites, from the keys of their number, mean and standard deviation."""
    groups = [
        (int(told[n]), float(told[mean]), told.get(sd))
        for told in sites
        if {n, mean} <= told.keys() and told[n] > 0
    ]
    if not groups:
        return None
    return PooledMean(*_mean([(count, middle) for count, middle, _ in groups]), _sd(groups))


def _mean(groups: Sequence[tuple[int, float]]) -> tuple[int, float]:
    """How many there are in all groups, and the mean over them."""
    n = sum(count for count, _ in groups)
    return n, sum(count * mean for count, mean in groups) / n


def _sd(groups: Sequence[tuple[int, float, float | None]]) -> float | None:
    """Standard deviation (n - 1) of all groups together, from what is within and what is between them."""
    known = [(n, mean, sd) for n, mean, sd in groups if sd is not None and n > 1]
    if not known:
        return None
    total, middle = _mean([(n, mean) for n, mean, _ in known])
    squares = sum((n - 1) * sd**2 + n * (mean - middle) ** 2 for n, mean, sd in known)
    return math.sqrt(squares / (total - 1))
