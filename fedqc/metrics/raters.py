"""How far people who rate labels agree, with themselves and with one another: what a model can hope for.

A target is one case seen in one view. Ratings of views are kept apart, but taken together in the figures; for
those of one view, give its ratings alone.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedqc.errors import DataError
from fedqc.ratings import Rating

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Repeats:
    """How far ratings of the same thing lie apart, in stars; None where there are not enough."""

    n_pairs: int
    """Pairs of ratings that are compared."""
    n_targets: int
    """What was rated more than once: targets, each for itself with every rater where that is compared."""
    n_cases: int
    """Distinct cases among those."""
    mean_absolute: float | None
    """Mean absolute difference of a pair."""
    sd: float | None
    """Standard deviation of the difference of a pair about zero: it does not matter which comes first."""
    repeatability: float | None
    """1.96 times the standard deviation: 95 % of pairs are no further apart (Bland & Altman 1999)."""
    icc_1: float | None
    """ICC(1,1), see `icc_one_way`."""


@dataclass(frozen=True)
class RaterAgreement:
    """Agreement of the raters of one table."""

    raters: int
    intra: Repeats
    """The same rater, the same case and view, rated again."""
    inter: Repeats
    """Different raters, the same case and view, each one's first rating. Being stricter than others counts as
    disagreement."""
    icc_2: float | None
    """ICC(2,1) of the targets that all raters rated, see `icc_two_way`."""


def rater_agreement(ratings: Sequence[Rating]) -> RaterAgreement:
    """How far the raters of a table agree with themselves and with one another."""
    repeated: dict[tuple[str, str, str], list[float]] = {}
    for rating in ratings:
        repeated.setdefault((rating.case, rating.view, rating.rater), []).append(rating.stars)
    rated: dict[tuple[str, str], dict[str, float]] = {}
    for (case, view, rater), stars in repeated.items():
        rated.setdefault((case, view), {})[rater] = stars[0]
    raters = sorted({rating.rater for rating in ratings})
    rated_by_all = [by_rater for by_rater in rated.values() if len(by_rater) == len(raters)]
    return RaterAgreement(
        raters=len(raters),
        intra=_repeats((case, stars) for (case, _, _), stars in repeated.items()),
        inter=_repeats((case, list(by_rater.values())) for (case, _), by_rater in rated.items()),
        icc_2=icc_two_way([[by_rater[rater] for rater in raters] for by_rater in rated_by_all]),
    )


def icc_one_way(targets: Iterable[Sequence[float]]) -> float | None:
    """ICC(1,1): how much of the variance lies between targets, whoever rates them (Shrout & Fleiss 1979).

    Targets may have different numbers of ratings: their number in the formula is then that of the analysis of
    variance with groups of unequal size (Donner 1986), and those with a single one count too.

    Args:
        targets: the ratings of each target.

    Returns:
        1 where all ratings of a target are the same, 0 and below where targets differ no more than ratings of
        one target do; None below two targets, without a target that has two ratings, or where all ratings are
        the same.
    """
    groups = [np.asarray(group, dtype=np.float64) for group in targets if len(group)]
    sizes = np.array([len(group) for group in groups], dtype=np.float64)
    total = sizes.sum()
    if len(groups) < 2 or total == len(groups):
        return None
    values = np.concatenate(groups)
    if np.ptp(values) == 0:
        return None
    means = np.array([group.mean() for group in groups])
    between = np.sum(sizes * (means - values.mean()) ** 2) / (len(groups) - 1)
    within = np.sum((values - np.repeat(means, sizes.astype(int))) ** 2) / (total - len(groups))
    ratings_each = (total - np.sum(sizes**2) / total) / (len(groups) - 1)
    return float((between - within) / (between + (ratings_each - 1) * within))


def icc_two_way(table: ArrayLike) -> float | None:
    """ICC(2,1): absolute agreement of raters who stand for others like them (Shrout & Fleiss 1979).

    Args:
        table: `[targets, raters]`, every target rated by every rater.

    Returns:
        1 where all raters say the same; None below two targets or two raters, or where it is not defined, as
        when all ratings are the same.

    Raises:
        DataError: it is no table of finite numbers.
    """
    x: Values = np.asarray(table, dtype=np.float64)
    if x.size == 0:
        return None
    if x.ndim != 2 or not np.isfinite(x).all():
        raise DataError(
            f"ratings have shape {x.shape}, expected a table [targets, raters] of finite numbers; "
            "leave out what not all raters have rated"
        )
    n, k = x.shape
    if n < 2 or k < 2 or np.ptp(x) == 0:
        return None
    of_targets, of_raters = x.mean(axis=1), x.mean(axis=0)
    targets = k * np.sum((of_targets - x.mean()) ** 2) / (n - 1)
    raters = n * np.sum((of_raters - x.mean()) ** 2) / (k - 1)
    rest = x - of_targets[:, None] - of_raters[None] + x.mean()
    error = np.sum(rest**2) / ((n - 1) * (k - 1))
    scale = targets + (k - 1) * error + k * (raters - error) / n
    return float((targets - error) / scale) if scale > 0 else None


def _repeats(targets: Iterable[tuple[str, Sequence[float]]]) -> Repeats:
    """Figures of targets with the case that each shows; those with one rating count in none of them."""
    several = [(case, stars) for case, stars in targets if len(stars) > 1]
    differences = [
        first - second for _, stars in several for first, second in itertools.combinations(stars, 2)
    ]
    n = len(differences)
    sd = math.sqrt(math.fsum(value**2 for value in differences) / n) if n > 1 else None
    return Repeats(
        n_pairs=n,
        n_targets=len(several),
        n_cases=len({case for case, _ in several}),
        mean_absolute=math.fsum(map(abs, differences)) / n if n else None,
        sd=sd,
        repeatability=None if sd is None else 1.96 * sd,
        icc_1=icc_one_way(stars for _, stars in several),
    )
