"""What labels of known quality tell of predicted quality: counts over bins, which add up over sites.

A site degrades labels of its calibration patients, so that it knows which of them are failures (a true DSC
below a bound), and counts them by their predicted quality. Every patient counts the same in each of the two
tables, however many labels it has there: labels of one patient resemble each other, patients are the draw.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field, model_validator

from fedqc.config import FrozenModel
from fedqc.errors import DataError

BINS = 100
"""Of equal width in [0, 1]; a bin holds its lower edge, the last one its upper edge too."""
PATIENT = 1000
"""What the labels of a patient come to together in a table, so that shares of patients are whole numbers."""

ROUNDING = 1e-12
"""Of shares: a bound that is reached exactly is reached."""

_EDGES = np.arange(1, BINS) / BINS
Counts = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=BINS, max_length=BINS)]


class Calibration(FrozenModel):
    """Labels of known quality by their predicted quality, in thousandths of a patient."""

    failures: Counts
    """Those whose true DSC is below the bound, `[BINS]`."""
    others: Counts
    """All others, `[BINS]`."""

    @model_validator(mode="after")
    def _holds_something(self) -> Self:
        if not (any(self.failures) or any(self.others)):
            msg = "a calibration without any label tells nothing"
            raise ValueError(msg)
        return self

    @cached_property
    def n_failing(self) -> float:
        """Patients with a failure among their labels."""
        return sum(self.failures) / PATIENT

    @cached_property
    def n_others(self) -> float:
        """Patients with a label that is none."""
        return sum(self.others) / PATIENT

    def cut_for_recall(self, level: float) -> float | None:
        """The lowest predicted quality under which at least this share of the failures lies.

        Returns:
            An edge of the bins; None where there is no failure.
        """
        if not self.n_failing:
            return None
        below = np.cumsum(self.failures)
        found = int(np.searchsorted(below, level * below[-1] - 0.5))  # half a thousandth is rounding
        return (found + 1) / BINS

    def cut_for_precision(self, level: float) -> float | None:
        """The highest predicted quality under which at least this share is failures.

        Failures and others count as if there were as many patients of both.

        Returns:
            An edge of the bins; None where failures or others are missing, or where no cut reaches it.
        """
        if not (self.n_failing and self.n_others):
            return None
        failing = np.cumsum(self.failures) / sum(self.failures)
        others = np.cumsum(self.others) / sum(self.others)
        reached = (failing > 0) & (failing >= level * (failing + others) - ROUNDING)
        return None if not reached.any() else (int(np.flatnonzero(reached)[-1]) + 1) / BINS

    def p_values(self, quality: ArrayLike) -> NDArray[np.float64]:
        """How rarely a failure of another patient is predicted to be as good.

        Conformal p-values of "this label is a failure" (Bates et al. 2023, Ann. Statist. 51:149, eq. 2), each
        patient weighing the same (Lee, Barber & Willett 2023, arXiv:2306.06342, 3): whatever the network, a
        failure has a p-value of at most p with probability p at most, if candidates' failures resemble those
        of the calibration.

        Args:
            quality: `[n]` predicted quality in [0, 1].

        Returns:
            `[n]` in (0, 1]; 1 where there is no failure to compare with.
        """
        as_good = np.cumsum(self.failures[::-1])[::-1]
        return np.asarray((PATIENT + as_good[bins_of(quality)]) / (PATIENT + sum(self.failures)))


def calibration_of(quality: ArrayLike, true: ArrayLike, patients: Sequence[str], tau: float) -> Calibration:
    """Count labels of known quality.

    Args:
        quality: `[n]` predicted quality in [0, 1].
        true: `[n]` true DSC.
        patients: the patient of each label.
        tau: a true DSC below this is a failure.

    Raises:
        DataError: the lengths differ, there is no label, or a quality is outside [0, 1].
    """
    scores, failure = np.asarray(quality, np.float64), np.asarray(true, np.float64) < tau
    owner = np.asarray(patients, dtype=np.str_)
    if not scores.shape == failure.shape == owner.shape or not scores.size:
        raise DataError(
            f"a calibration has {scores.size} predictions, {failure.size} true values and {owner.size} "
            "patients; it takes as many of each, one or more"
        )
    return Calibration(
        failures=tuple(counted(scores[failure], owner[failure]).tolist()),
        others=tuple(counted(scores[~failure], owner[~failure]).tolist()),
    )


def counted(quality: NDArray[np.float64], patients: NDArray[np.str_]) -> NDArray[np.int64]:
    """`[BINS]` labels by predicted quality, in thousandths of a patient, who comes to one in all.

    Args:
        quality: `[n]` in [0, 1]; n may be 0.
        patients: `[n]`.
    """
    _, owner, n_labels = np.unique(patients, return_inverse=True, return_counts=True)
    share = PATIENT / n_labels[owner] if len(patients) else np.zeros(0)
    mass = np.cumsum(np.bincount(bins_of(quality), share, minlength=BINS))
    # Rounded so that all bins together are as many patients as there are: rules ask for so many.
    return np.diff(np.rint(mass), prepend=0).astype(np.int64)


def bins_of(quality: ArrayLike) -> NDArray[np.intp]:
    """`[n]`, the bin of each quality.

    Raises:
        DataError: a quality is outside [0, 1].
    """
    scores = np.asarray(quality, dtype=np.float64)
    outside = scores[~((scores >= 0) & (scores <= 1))]
    if outside.size:
        raise DataError(f"quality {outside[0]} is outside [0, 1]; a QC method must give a number in [0, 1]")
    return np.searchsorted(_EDGES, scores, side="right")
