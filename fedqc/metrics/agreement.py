"""How well predicted quality agrees with the truth: correlation, error, and an interval over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedqc.errors import DataError

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Predicted against true DSC of n samples; None where a number is not defined (which JSON can hold)."""

    n: int
    """Samples."""
    patients: int
    """Distinct patients among them."""
    r: float | None
    """Pearson correlation."""
    r_ci: tuple[float, float] | None
    """95 % interval of r, by resampling patients."""
    rho: float | None
    """Spearman rank correlation."""
    mae: float | None
    """Mean absolute error."""
    mae_sd: float | None
    """Sample standard deviation of the absolute error."""
    rmse: float | None
    """Root of the mean squared error."""


@dataclass(frozen=True)
class LimitsOfAgreement:
    """Differences of two measurements of n samples, the first minus the second (Bland & Altman 1986)."""

    n: int
    """Samples."""
    bias: float
    """Mean difference."""
    sd: float
    """Sample standard deviation (n - 1) of the differences."""
    lower: float
    """Bias minus 1.96 times the standard deviation."""
    upper: float
    """Bias plus 1.96 times the standard deviation: 95 % of normal differences lie between."""


def agreement(
    predicted: ArrayLike,
    true: ArrayLike,
    patients: Sequence[str],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> Agreement:
    """Every measure of agreement, with a percentile bootstrap interval of r.

    Several degradations of one patient are not independent, so the bootstrap draws patients, each with all of
    its samples. Draws for which r is not defined are left out of the interval.

    Args:
        predicted: `[n]` predicted DSC.
        true: `[n]` true DSC.
        patients: the patient of each sample.
        rng: draws the patients.
        resamples: number of bootstrap draws.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    if len(patients) != len(x):
        raise DataError(f"{len(x)} samples but {len(patients)} patients; every sample needs its patient")
    return Agreement(
        n=len(x),
        patients=len(set(patients)),
        r=pearson(x, y),
        r_ci=patient_interval(lambda chosen: pearson(x[chosen], y[chosen]), patients, rng, resamples),
        rho=spearman(x, y),
        mae=mae(x, y),
        mae_sd=mae_sd(x, y),
        rmse=rmse(x, y),
    )


def pearson(predicted: ArrayLike, true: ArrayLike) -> float | None:
    """Pearson correlation of two `[n]` arrays; None below 3 samples or where one of them is constant.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    # Asked before the mean is taken: a constant minus its rounded mean is not always zero.
    if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return None
    x, y = x - x.mean(), y - y.mean()
    scale = float(np.sqrt(np.sum(x * x)) * np.sqrt(np.sum(y * y)))
    if scale == 0:  # differences so small that their squares vanish
        return None
    return float(np.clip(np.sum(x * y) / scale, -1, 1))


def spearman(predicted: ArrayLike, true: ArrayLike) -> float | None:
    """Spearman rank correlation of two `[n]` arrays, ties by mean rank; None where `pearson` is.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    from scipy.stats import rankdata  # noqa: PLC0415 - half a second, in processes that need no rank too

    return pearson(rankdata(x), rankdata(y))


def mae(predicted: ArrayLike, true: ArrayLike) -> float | None:
    """Mean absolute error of two `[n]` arrays; None without a sample.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    return float(np.mean(np.abs(x - y))) if len(x) else None


def mae_sd(predicted: ArrayLike, true: ArrayLike) -> float | None:
    """Sample standard deviation (n - 1) of the absolute error of two `[n]` arrays; None below 2 samples.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    return float(np.std(np.abs(x - y), ddof=1)) if len(x) > 1 else None


def rmse(predicted: ArrayLike, true: ArrayLike) -> float | None:
    """Root mean squared error of two `[n]` arrays; None without a sample.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(predicted, true)
    return float(np.sqrt(np.mean((x - y) ** 2))) if len(x) else None


def limits_of_agreement(first: ArrayLike, second: ArrayLike) -> LimitsOfAgreement | None:
    """Bias and limits of agreement of two `[n]` arrays (Bland & Altman 1986); None below 2 samples.

    Raises:
        DataError: the lengths differ or a value is not finite.
    """
    x, y = _pair(first, second)
    if len(x) < 2:
        return None
    bias, sd = float(np.mean(x - y)), float(np.std(x - y, ddof=1))
    return LimitsOfAgreement(len(x), bias, sd, lower=bias - 1.96 * sd, upper=bias + 1.96 * sd)


def patient_interval(
    figure: Callable[[NDArray[np.intp]], float | None],
    patients: Sequence[str],
    rng: np.random.Generator,
    resamples: int = 1000,
) -> tuple[float, float] | None:
    """95 % interval of a figure over draws of patients, each with all of their samples (bootstrap).

    Draws for which the figure is not defined are left out.

    Args:
        figure: of the samples at some positions.
        patients: of each sample.
        rng: draws the patients.
        resamples: number of draws.

    Returns:
        2.5th and 97.5th percentile; None below two patients, or where the figure never is defined.
    """
    names, owner = np.unique(np.asarray(patients, dtype=np.str_), return_inverse=True)
    if len(names) < 2 or figure(np.arange(len(patients))) is None:
        return None
    samples_of = [np.flatnonzero(owner == index) for index in range(len(names))]
    drawn = []
    for _ in range(resamples):
        chosen = np.concatenate([samples_of[index] for index in rng.integers(len(names), size=len(names))])
        value = figure(chosen)
        if value is not None:
            drawn.append(value)
    if not drawn:
        return None
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _pair(predicted: ArrayLike, true: ArrayLike) -> tuple[Values, Values]:
    """Both as float64 `[n]`, checked."""
    x, y = np.asarray(predicted, dtype=np.float64), np.asarray(true, dtype=np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise DataError(
            f"predicted has shape {x.shape}, true has {y.shape}; both must be [n] with the same n"
        )
    bad = int(np.count_nonzero(~np.isfinite(x) | ~np.isfinite(y)))
    if bad:
        raise DataError(f"{bad} of {len(x)} samples have a value that is not finite; leave them out first")
    return x, y
