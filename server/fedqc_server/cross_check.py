"""Whose references can be trusted: judged by a model that never saw them.

References are what QC models learn from, so a site whose references share a habit (all contours too wide,
say) teaches it to the model, and a model that learned it there will not object. So the sites are dealt into
two halves. Each half trains a QC model of its own for a few rounds, and each site's references are scored by
the other half's model. A site that scores far below the others of its half is named, and its references are
used for nothing.

Two sites with the same habit, one in each half, vouch for each other; and of two or three sites nobody can
tell who is wrong, so it takes `FEWEST_SITES`.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from fedqc.seeding import generator

FEWEST_SITES = 4
SMALLEST_GAP = 0.1
"""Mean predicted DSC below the others' that is too little to speak of, however sure it is."""
STANDARD_ERRORS = 4.0
"""How sure it must be that the gap is not chance."""


@dataclass(frozen=True)
class Suspicion:
    """Why a site's references are not trusted."""

    quality: float
    """Mean predicted DSC of its reference labels."""
    others: float
    """Median of the same over the other sites that the same model judged."""
    references: int


def halves(sites: Collection[str], seed: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Deal the sites into two halves, each in the order of the names."""
    names = sorted(sites)
    order = generator(seed, "cross-check").permutation(len(names))
    middle = len(names) // 2
    first, second = (tuple(sorted(names[i] for i in part)) for part in (order[:middle], order[middle:]))
    return first, second


def suspect(
    statistics: Mapping[str, Mapping[str, Any]], judged_together: Sequence[Collection[str]]
) -> dict[str, Suspicion]:
    """The sites whose references score far below those of the others.

    A site is compared with the sites that the same model judged: two models differ by more than sites do.

    Args:
        statistics: of each site `references`, `quality_mean` and `quality_sd`. A site that did not tell all
            of them (too few patients stand behind them), or told what cannot be, is not judged.
        judged_together: the sites that each model judged.

    Returns:
        The sites that are not trusted: at least `SMALLEST_GAP` and `STANDARD_ERRORS` standard errors of the
        difference below the median of the others.
    """
    told = _told(statistics)
    found = {}
    for half in judged_together:
        here = {site: told[site] for site in sorted(half) if site in told}
        for site, (count, mean, sd) in here.items():
            others = [values for name, values in here.items() if name != site]
            if not others:
                continue
            middle = median(other_mean for _, other_mean, _ in others)
            # The median of the others is about as certain as one of them.
            variance = sd**2 / count + median(other_sd**2 / n for n, _, other_sd in others)
            gap = middle - mean
            if gap >= SMALLEST_GAP and gap >= STANDARD_ERRORS * math.sqrt(variance):
                found[site] = Suspicion(quality=mean, others=middle, references=int(count))
    return found


def usual_quality(statistics: Mapping[str, Mapping[str, Any]]) -> float | None:
    """Median over the sites of what the models say of their references, None where no site told it.

    References are good at most sites, or nothing here works. So models that find fault with most of them have
    not learned enough to judge anybody.
    """
    means = [mean for _, mean, _ in _told(statistics).values()]
    return median(means) if means else None


def _told(statistics: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    """Number of references, mean and SD of each site that told all three, and told what can be."""
    keys = ("references", "quality_mean", "quality_sd")
    told = {
        site: (values[keys[0]], values[keys[1]], values[keys[2]])
        for site, values in statistics.items()
        if all(key in values for key in keys)
    }
    return {site: values for site, values in told.items() if _is_possible(*values)}


def _is_possible(count: float, mean: float, sd: float) -> bool:
    return count >= 1 and 0 <= mean <= 1 and 0 <= sd <= 1
