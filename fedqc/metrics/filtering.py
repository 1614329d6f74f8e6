"""How well dropping annotations finds the broken ones."""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedqc.errors import DataError


@dataclass(frozen=True)
class Filtering:
    """What dropping did to the candidates; a failure is a candidate with a true DSC below tau.

    None where a number is not defined (which JSON can hold).
    """

    tau: float
    """A true DSC below this is a failure."""
    n_candidates: int
    n_failures: int
    n_dropped: int
    precision: float | None
    """Share of the dropped that are failures; None if nothing was dropped."""
    precision_ci: tuple[float, float] | None
    """Its 95 % interval (Wilson), as of candidates that are independent of each other."""
    recall: float | None
    """Share of the failures that were dropped; None if there is no failure."""
    recall_ci: tuple[float, float] | None
    """Its 95 % interval, likewise."""
    accuracy: float | None
    """Share of the candidates that are dropped failures or kept others; None without candidates."""
    auroc: float | None
    """Area under the ROC curve of 1 - quality for failures; None unless there are failures and others."""
    mean_dsc_before: float | None
    """Mean true DSC of all candidates; None without candidates."""
    mean_dsc_after: float | None
    """Mean true DSC of what is kept; None if nothing is."""


def filtering(quality: ArrayLike, true_dsc: ArrayLike, dropped: ArrayLike, tau: float) -> Filtering:
    """Compare what was dropped with what is broken.

    Args:
        quality: `[n]` predicted quality in [0, 1], lower is worse.
        true_dsc: `[n]` true DSC.
        dropped: `[n]` bool: not kept (an undecided review counts as dropped).
        tau: a true DSC below this is a failure.

    Raises:
        DataError: the lengths differ, a value is not finite, or `dropped` is not bool.
    """
    scores, truth, out = (
        np.asarray(quality, np.float64),
        np.asarray(true_dsc, np.float64),
        np.asarray(dropped),
    )
    if scores.ndim != 1 or not scores.shape == truth.shape == out.shape:
        raise DataError(
            f"quality has shape {scores.shape}, true DSC {truth.shape}, dropped {out.shape}; "
            "all must be [n] with the same n"
        )
    if out.size and out.dtype != np.bool_:
        raise DataError(f"dropped holds {out.dtype}; it must be bool, one for each candidate")
    if not (np.isfinite(scores).all() and np.isfinite(truth).all()):
        raise DataError("a quality or a true DSC is not finite; leave those candidates out first")
    out = out.astype(np.bool_)
    failure = truth < tau
    return Filtering(
        tau=tau,
        n_candidates=len(truth),
        n_failures=int(failure.sum()),
        n_dropped=int(out.sum()),
        precision=_mean(failure[out]),
        precision_ci=_interval(failure[out]),
        recall=_mean(out[failure]),
        recall_ci=_interval(out[failure]),
        accuracy=_mean(out == failure),
        auroc=auroc(-scores, failure),  # the order of 1 - quality, without its rounding
        mean_dsc_before=_mean(truth),
        mean_dsc_after=_mean(truth[~out]),
    )


def _interval(hits: NDArray[np.bool_]) -> tuple[float, float] | None:
    return share_interval(int(hits.sum()), len(hits)) if len(hits) else None


def auroc(scores: ArrayLike, positives: ArrayLike) -> float | None:
    """Area under the ROC curve: how often a positive scores above a negative, ties counting half.

    Args:
        scores: `[n]`, higher means rather positive.
        positives: `[n]` bool.

    Returns:
        In [0, 1]; None where there is no positive or no negative.
    """
    truth = np.asarray(positives, dtype=np.bool_)
    if truth.all() or not truth.any():
        return None
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415 - half a second, in processes without an AUROC

    return float(roc_auc_score(truth, np.asarray(scores, dtype=np.float64)))


def share_interval(hits: int, n: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927, J. Am. Stat. Assoc. 22:209).

    Args:
        hits: how many of the n are counted.
        n: above 0.
    """
    z = 1.959963984540054  # of the normal distribution; scipy.stats has it, and takes a second to import
    middle, spread = (hits + z**2 / 2) / (n + z**2), z / (n + z**2)
    reach = spread * math.sqrt(hits * (n - hits) / n + z**2 / 4)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def aurc(confidence: ArrayLike, risk: ArrayLike) -> float | None:
    """Area under the risk-coverage curve (Geifman & El-Yaniv 2017; as in Zenk et al. 2025), lower is better.

    The curve is the mean risk of what is kept, from the most confident case alone to all cases. What is
    equally confident is kept together, so that the curve is level up to the first point that it has. The area
    is taken by the trapezoidal rule, from one case on.

    Args:
        confidence: `[n]`, such as a predicted quality.
        risk: `[n]`, such as 1 - DSC.

    Returns:
        The area; None without any case. Taken of `-risk` as confidence, it is the least that is possible.
    """
    scores, risks = np.asarray(confidence, np.float64), np.asarray(risk, np.float64)
    if not len(scores):
        return None
    order = np.argsort(-scores, kind="stable")
    kept = np.arange(1, len(order) + 1)
    mean_risk = np.cumsum(risks[order]) / kept
    is_last = np.append(np.diff(scores[order]) != 0, True)  # of those that are equally confident
    points, coverage = mean_risk[is_last], kept[is_last] / len(order)
    level = float(points[0] * (coverage[0] - 1 / len(order)))
    return level + float(np.trapezoid(points, coverage))


def excess_aurc(confidence: ArrayLike, risk: ArrayLike) -> float | None:
    """How far `aurc` is above the least that is possible with these risks; None without any case."""
    found, least = aurc(confidence, risk), aurc(-np.asarray(risk, np.float64), risk)
    return None if found is None or least is None else found - least


def _mean(values: np.ndarray[tuple[int, ...], np.dtype[np.bool_ | np.float64]]) -> float | None:
    return float(values.mean()) if values.size else None
