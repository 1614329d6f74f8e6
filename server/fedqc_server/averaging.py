"""Federated averaging: which updates are fit for it, and their mean."""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

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


def update_norm(update: Mapping[str, NDArray[Any]], current: Mapping[str, NDArray[Any]]) -> float:
    """L2 norm of what an update changes, over all arrays; infinite where it is beyond float64."""
    squares = 0.0
    with np.errstate(over="ignore"):
        for name, values in update.items():
            change = values.astype(np.float64) - current[name]
            squares += float((change * change).sum())
    return float(np.sqrt(squares))


@dataclass(frozen=True)
class Received:
    """An update that `check_update` found fit."""

    site: str
    samples: int
    """Training samples drawn: its weight in the mean."""
    norm: float
    """See `update_norm`."""
    file: Path


class Updates:
    """The updates of one round, each on disk: their mean needs the memory of one, whatever their number.

    They have to be laid down because a bound on their norms is known only when all of them are there. Use it
    as a context manager; its folder is gone afterwards.

    Args:
        folder: where there is room for all updates of a round.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=".updates-", dir=folder))
        self._received: list[Received] = []
        self._names: tuple[str, ...] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose updates are in the mean."""
        return tuple(sorted(update.site for update in self._received))

    @property
    def samples(self) -> int:
        """Training samples behind the mean."""
        return sum(update.samples for update in self._received)

    def add(
        self,
        site: str,
        update: Mapping[str, NDArray[Any]],
        samples: int,
        current: Mapping[str, NDArray[Any]],
    ) -> None:
        """Lay down an update that `check_update` found fit.

        Args:
            site: name of the site.
            update: its arrays.
            samples: training samples drawn, the weight of the update.
            current: the global model that it started from.

        Raises:
            ValueError: the site is there already, or has no sample.
        """
        if site in self.sites:
            raise ValueError(f"{site!r} has an update in this round already")
        if samples < 1:
            raise ValueError(f"{site!r} has {samples} samples; an update needs one at least")
        self._names = tuple(update)  # a file of tensors has an order of its own
        file = self._folder / f"{len(self._received)}.safetensors"
        # `ascontiguousarray` would make a vector of a scalar.
        save_file({name: np.asarray(values, order="C") for name, values in update.items()}, file)
        self._received.append(Received(site, samples, update_norm(update, current), file))

    def refuse_huge(self, factor: float) -> tuple[str, ...]:
        """Take out the updates whose norm is more than `factor` times the median.

        The lower of two medians counts, so of two sites the one with the smaller update sets the measure.

        Returns:
            The sites whose updates were taken out.
        """
        if not self._received:
            return ()
        bound = factor * median_low(update.norm for update in self._received)
        huge = tuple(
            update.site for update in self._received if update.norm > bound > 0 or np.isinf(update.norm)
        )
        self._received = [update for update in self._received if update.site not in huge]
        return huge

    def mean(self) -> Weights:
        """The mean weighted by samples (McMahan et al. 2017), in the dtypes of the updates.

        Sums are float64 and taken in the order of the sites' names, so that the order in which updates came
        does not change them. Whole-number buffers (batch-norm counters) are rounded.

        Raises:
            ValueError: there is no update.
        """
        if not self._received:
            raise ValueError("there is no update, so there is no mean")
        sums: dict[str, NDArray[np.float64]] = {}
        dtypes: dict[str, np.dtype[Any]] = {}
        for received in sorted(self._received, key=lambda update: update.site):
            update = load_file(received.file)
            for name, values in update.items():
                weighted = values * np.float64(received.samples)
                if name in sums:
                    sums[name] += weighted
                else:
                    sums[name], dtypes[name] = np.asarray(weighted), values.dtype
        mean: Weights = {}
        for name in self._names:
            value = sums[name] / self.samples
            whole = np.issubdtype(dtypes[name], np.integer)
            mean[name] = np.asarray(np.rint(value) if whole else value).astype(dtypes[name])
        return mean
