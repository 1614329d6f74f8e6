"""A QC model is tried on held-back cases: labels degraded in every known way, so that the truth is known."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.degradation.samples import ALL_KINDS, DegradedCase, degrade_cases
from fedqc.methods.base import ERROR_FROM, Method
from fedqc.metrics.agreement import agreement
from fedqc.scoring import judge


@dataclass(frozen=True)
class Tried:
    """One degraded label, and what the model said of it."""

    patient: str
    kind: str
    true_dsc: float
    predicted_dsc: float
    error_dsc: float | None
    """DSC of the predicted and the true error map; None where the label has no error, or there is no map."""


def try_model(
    method: Method,
    network: nn.Module,
    cases: Sequence[Case],
    rng: np.random.Generator,
    compute: Compute,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tried]:
    """Score each case with every kind of label error that is possible in it, once.

    Args:
        method: How the network scores.
        network: A trained one.
        cases: None of which it was trained on; each is read when its turn comes.
        rng: Draws the errors.
        compute: Device and precision.
        progress: Called with (labels done, all labels) after each label.
    """
    pending: deque[DegradedCase] = deque()

    def samples() -> Iterator[Case]:
        for sample in degrade_cases(cases, method.task, ALL_KINDS, rng):
            pending.append(sample)
            yield sample.case

    tried = []
    most = len(cases) * len(ALL_KINDS)
    for case, score in judge(method, network, samples(), compute):
        sample = pending.popleft()
        error_dsc = (
            None if score.error_map is None else _error_dsc(score.error_map >= ERROR_FROM, sample.error)
        )
        tried.append(Tried(case.patient, sample.kind, sample.mean_dsc, score.quality, error_dsc))
        if progress is not None:
            progress(len(tried), most)
    if progress is not None and len(tried) < most:  # not every error is possible in every case
        progress(most, most)
    return tried


def trial_figures(tried: Sequence[Tried], rng: np.random.Generator) -> dict[str, float | int | None]:
    """What a trial comes to, in figures that a model's card holds; None where one is not defined.

    Args:
        tried: All that was tried.
        rng: Draws patients for the interval of r.

    Returns:
        `n` labels of so many `patients`, Pearson's `r` of predicted and true DSC with the ends `r_low` and
        `r_high` of its 95 % interval, the mean absolute error `mae`, and `dsc_err_median`, the median DSC of
        predicted and true error maps.
    """
    found = agreement(
        [one.predicted_dsc for one in tried],
        [one.true_dsc for one in tried],
        [one.patient for one in tried],
        rng,
    )
    low, high = found.r_ci or (None, None)
    error_dsc = [one.error_dsc for one in tried if one.error_dsc is not None]
    return {
        "n": found.n,
        "patients": found.patients,
        "r": found.r,
        "r_low": low,
        "r_high": high,
        "mae": found.mae,
        "dsc_err_median": float(np.median(error_dsc)) if error_dsc else None,
    }


def _error_dsc(predicted: NDArray[np.bool_], true: NDArray[np.bool_]) -> float | None:
    """DSC of two error maps; None where there is no error to find."""
    if not true.any():
        return None
    return float(2 * (predicted & true).sum() / (predicted.sum() + true.sum()))
