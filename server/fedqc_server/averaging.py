"""Federated averaging: which updates are fit for it, and what they come to.

The rules that make one model of many are those of Flower's strategies. Here they work on a few columns at a
time, read from disk, so that the memory they take does not depend on the number of sites.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median_low
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from fedqc.config import AveragingConfig
from fedqc.errors import ModelError
from fedqc.protocol import Weights

_AT_ONCE = 2**20
"""Numbers of all sites together that are combined at once."""

Rule = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.float64]]
"""From numbers [site, N] and samples [site] to one number each, [N]."""


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


def packed(weights: Weights, transfer: Literal["fp32", "fp16"]) -> Weights:
    """Weights as they travel: with fp16, float32 arrays in half the bytes.

    Raises:
        ModelError: a number is too large for fp16.
    """
    if transfer == "fp32":
        return weights
    largest = float(np.finfo(np.float16).max)
    sent: Weights = {}
    for name, values in weights.items():
        if values.dtype == np.float32 and values.size and float(np.abs(values).max()) > largest:
            raise ModelError(f'weight {name!r} is too large for fp16; set [averaging] transfer = "fp32"')
        sent[name] = values.astype(np.float16) if values.dtype == np.float32 else values
    return sent


def update_norm(update: Mapping[str, NDArray[Any]], current: Mapping[str, NDArray[Any]]) -> float:
    """L2 norm of what an update changes, over all arrays; infinite where it is beyond float64."""
    squares = 0.0
    with np.errstate(over="ignore"):
        for name, values in update.items():
            change = values.astype(np.float64) - current[name]
            squares += float((change * change).sum())
    return float(np.sqrt(squares))


def rule_of(config: AveragingConfig) -> Rule:
    """How the strategy makes one number of those that the sites sent."""
    match config.strategy:
        case "trimmed-mean":
            return partial(_trimmed_mean, share=config.trim)
        case "median":
            return _median
        case _:  # what else they do comes before or after the mean
            return _mean


def _mean(values: NDArray[np.float64], samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean weighted by samples (McMahan et al. 2017, algorithm 1)."""
    mean: NDArray[np.float64] = (values * samples[:, None]).sum(axis=0) / samples.sum()
    return mean


def _trimmed_mean(
    values: NDArray[np.float64], samples: NDArray[np.float64], share: float
) -> NDArray[np.float64]:
    """The mean without the lowest and the highest `share` of the sites (Yin et al. 2018, definition 2).

    Of three sites or more, one at each end goes at least: a robust mean that cuts nothing is none. Samples
    do not count, or a site could buy weight.
    """
    n_sites = len(values)
    n_cut = max(int(share * n_sites), 1) if n_sites > 2 else 0
    trimmed: NDArray[np.float64] = np.sort(values, axis=0)[n_cut : n_sites - n_cut].mean(axis=0)
    return trimmed


def _median(values: NDArray[np.float64], samples: NDArray[np.float64]) -> NDArray[np.float64]:
    """The median, number by number (Yin et al. 2018, definition 1); samples do not count."""
    median: NDArray[np.float64] = np.median(values, axis=0)
    return median


@dataclass(frozen=True)
class Received:
    """An update that `check_update` found fit."""

    site: str
    samples: int
    """Training samples drawn: its weight in the mean."""
    norm: float
    """See `update_norm`."""
    path: Path
    """Of its numbers, with the name of a dtype behind it: `PATH.float32` holds all float32 arrays in turn."""


class Updates:
    """The updates of one round, each on disk: combining them needs the memory of one, whatever their number.

    They have to be laid down because a bound on their norms is known only when all of them are there, and a
    median needs all of them at once. Use it as a context manager; its folder is gone afterwards.

    Args:
        folder: where there is room for all updates of a round.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=".updates-", dir=folder))
        self._received: list[Received] = []
        self._form: dict[str, tuple[np.dtype[Any], tuple[int, ...]]] = {}
        """Dtype and shape of each array, in the order of the network."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose updates count."""
        return tuple(sorted(update.site for update in self._received))

    @property
    def samples(self) -> int:
        """Training samples behind the updates that count."""
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
        self._form = {name: (values.dtype, values.shape) for name, values in update.items()}
        path = self._folder / str(len(self._received))
        for values in update.values():
            with _numbers_of(path, values.dtype).open("ab") as file:
                file.write(values.tobytes())
        self._received.append(Received(site, samples, update_norm(update, current), path))

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

    def combined(self, rule: Rule) -> Weights:
        """What the updates come to by a rule, in their dtypes, but float32 where they came in float16.

        Whole-number arrays are rounded.

        The sites stand in the order of their names, so that the order in which updates came does not change
        a bit of it.

        Raises:
            ValueError: there is no update.
        """
        if not self._received:
            raise ValueError("there is no update, so there is nothing to combine")
        in_turn = sorted(self._received, key=lambda update: update.site)
        flat = {
            dtype: self._column(in_turn, dtype, rule) for dtype in {dtype for dtype, _ in self._form.values()}
        }
        begin = dict.fromkeys(flat, 0)
        weights: Weights = {}
        for name, (dtype, shape) in self._form.items():
            end = begin[dtype] + int(np.prod(shape))
            weights[name] = flat[dtype][begin[dtype] : end].reshape(shape)
            begin[dtype] = end
        return weights

    def _column(self, in_turn: list[Received], dtype: np.dtype[Any], rule: Rule) -> NDArray[Any]:
        """All arrays of a dtype, one behind the other."""
        samples = np.array([update.samples for update in in_turn], dtype=np.float64)
        size = sum(int(np.prod(shape)) for known, shape in self._form.values() if known == dtype)
        combined = np.empty(size, np.float32 if dtype == np.float16 else dtype)
        files = [_numbers_of(update.path, dtype) for update in in_turn]
        step = max(1, _AT_ONCE // len(files))
        for begin in range(0, size, step):
            end = min(begin + step, size)
            values = np.empty((len(files), end - begin))
            for row, file in zip(values, files, strict=True):
                row[:] = np.fromfile(file, dtype, end - begin, offset=begin * dtype.itemsize)
            numbers = rule(values, samples)
            combined[begin:end] = np.rint(numbers) if np.issubdtype(dtype, np.integer) else numbers
        return combined


def _numbers_of(path: Path, dtype: np.dtype[Any]) -> Path:
    return path.with_name(f"{path.name}.{dtype.name}")
