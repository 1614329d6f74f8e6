"""Federated averaging: which updates are fit for it, and their mean."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.protocol import Weights


def check_update(update: Mapping[str, NDArray[Any]], current: Mapping[str, NDArray[Any]]) -> str | None:
    """Why an update cannot be averaged, or None.

    Args:
        update: arrays from a site.
        current: the global model; an update has exactly its names, in its order, its shapes and its dtypes.

    Returns:
        A reason code: `names-differ`, `shape-differs`, `dtype-differs` or `not-finite`.
    """
    if list(update) != list(current):
        return "names-differ"
    for name, values in update.items():
        if values.shape != current[name].shape:
            return "shape-differs"
        if values.dtype != current[name].dtype:
            return "dtype-differs"
        if not np.isfinite(values).all():
            return "not-finite"
    return None


class RunningMean:
    """Weighted mean of updates (McMahan et al. 2017), in the memory of one, whatever the number of sites.

    Sums are float64. Floating-point sums depend on their order, so updates are added in the order of the
    sites' names; then the order in which they arrive does not change the result.
    """

    def __init__(self) -> None:
        self._sum: dict[str, NDArray[np.float64]] = {}
        self._dtypes: dict[str, np.dtype[Any]] = {}
        self._samples = 0
        self._sites: list[str] = []

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites in the mean."""
        return tuple(self._sites)

    @property
    def samples(self) -> int:
        """Training samples behind the mean."""
        return self._samples

    def add(self, site: str, update: Mapping[str, NDArray[Any]], samples: int) -> None:
        """Add an update that `check_update` found fit.

        Args:
            site: name of the site, behind all names added before.
            update: its arrays.
            samples: training samples drawn, the weight of the update.

        Raises:
            ValueError: a name out of order, or no sample.
        """
        if self._sites and site <= self._sites[-1]:
            raise ValueError(
                f"{site!r} is added after {self._sites[-1]!r}; add the sites in the order of their names"
            )
        if samples < 1:
            raise ValueError(f"{site!r} has {samples} samples; an update needs one at least")
        for name, values in update.items():
            weighted = values * np.float64(samples)
            if name in self._sum:
                self._sum[name] += weighted
            else:
                self._sum[name] = weighted
                self._dtypes[name] = values.dtype
        self._sites.append(site)
        self._samples += samples

    def mean(self) -> Weights:
        """The mean in the dtypes of the updates; whole-number buffers (batch-norm counters) are rounded.

        Raises:
            ValueError: nothing was added.
        """
        if not self._sites:
            raise ValueError("no update was added; there is no mean")
        mean: Weights = {}
        for name, total in self._sum.items():
            value = total / self._samples
            whole = np.issubdtype(self._dtypes[name], np.integer)
            mean[name] = np.asarray(np.rint(value) if whole else value).astype(self._dtypes[name])
        return mean
