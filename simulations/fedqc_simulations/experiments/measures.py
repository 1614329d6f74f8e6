"""The figures of the papers' tables, from what models said and what is true."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqc.metrics.agreement import mae, mae_sd, patient_interval, pearson
from fedqc_simulations.experiments.base import Judged

RESAMPLES = 1000

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval over patients; None where it is not defined."""

    value: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        """The figure, and the interval in brackets."""
        if self.value is None:
            return "—"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ({self.low:.3f} to {self.high:.3f})"


@dataclass(frozen=True)
class Figures:
    """How well a model does on some labels."""

    r: Estimate
    mae: Estimate
    mae_sd: float | None
    error_dsc: Estimate
    """Median DSC of the error maps."""

    def cells(self) -> tuple[str, str, str, str]:
        """r, MAE with its SD, MAE with its interval, DSC_err."""
        spread = "" if self.mae.value is None else f"{self.mae.value:.4f}"
        if self.mae_sd is not None:
            spread += f" ± {self.mae_sd:.3f}"
        return str(self.r), spread, str(self.mae), str(self.error_dsc)


@dataclass(frozen=True)
class Paired:
    """P values of paired t-tests between two models; None where there are fewer than two pairs."""

    predictions: float | None
    """Of the predicted DSC, label by label (Qiu et al. 2023, 3.2)."""
    errors: float | None
    """Of each patient's mean absolute error: the labels of one patient are not independent."""


def p_value(p: float | None) -> str | None:
    """As it is printed."""
    return None if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def figures_of(judged: Sequence[Judged], rng: np.random.Generator) -> Figures:
    """Correlation, mean absolute error and error-map DSC, with intervals over patients.

    Args:
        judged: all labels.
        rng: draws the patients.
    """
    patients = [one.patient for one in judged]
    predicted = np.array([one.predicted for one in judged])
    true = np.array([one.true for one in judged])
    marked = [(one.patient, one.error["dsc"]) for one in judged if one.error.get("dsc") is not None]
    error_dsc = np.array([value for _, value in marked], dtype=np.float64)
    return Figures(
        r=estimate(lambda chosen: pearson(predicted[chosen], true[chosen]), patients, rng),
        mae=estimate(lambda chosen: mae(predicted[chosen], true[chosen]), patients, rng),
        mae_sd=mae_sd(predicted, true),
        error_dsc=estimate(
            lambda chosen: float(np.median(error_dsc[chosen])) if len(chosen) else None,
            [patient for patient, _ in marked],
            rng,
        ),
    )


def estimate(
    figure: Callable[[NDArray[np.intp]], float | None], patients: Sequence[str], rng: np.random.Generator
) -> Estimate:
    """A figure of all labels, and its percentile interval over draws of patients, each with all labels.

    Args:
        figure: of the labels at some positions.
        patients: whose each label is.
        rng: draws the patients.
    """
    low, high = patient_interval(figure, patients, rng, RESAMPLES) or (None, None)
    return Estimate(figure(np.arange(len(patients))), low, high)


def paired(first: Sequence[Judged], second: Sequence[Judged]) -> Paired:
    """Whether two models that judged the same labels differ."""
    from scipy.stats import ttest_rel  # noqa: PLC0415 - takes half a second to load

    def p_value(a: Sequence[float], b: Sequence[float]) -> float | None:
        if len(a) < 2 or np.allclose(a, b):
            return None
        return float(ttest_rel(a, b).pvalue)

    means = [
        [float(np.mean(errors)) for _, errors in sorted(_errors(judged).items())]
        for judged in (first, second)
    ]
    predicted = [[one.predicted for one in judged] for judged in (first, second)]
    return Paired(p_value(*predicted), p_value(*means))


def _errors(judged: Sequence[Judged]) -> dict[str, list[float]]:
    """Absolute errors by patient."""
    found: dict[str, list[float]] = {}
    for one in judged:
        found.setdefault(one.patient, []).append(abs(one.predicted - one.true))
    return found
