"""The course of a run: losses round by round, and where the time went."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from fedqc.reports.figures.drawing import (
    BLUE,
    GREEN,
    GREY,
    PALE,
    VERMILLION,
    WIDTH,
    drawn,
    name_rows,
    numbers,
)

MOST_LINES = 20
"""Sites whose curves are drawn one by one; of more a band is."""
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_MARKED_ROUNDS = 60
"""Rounds that are marked one by one on a curve."""


@dataclass(frozen=True)
class Curve:
    """The loss of one stage, round by round."""

    title: str
    rounds: Sequence[int]
    loss: Sequence[float | None]
    sites: Mapping[str, Sequence[float | None]]
    """Of each site, as long as `rounds`."""
    failed: Sequence[int] = ()
    """Rounds in which a site failed."""


@drawn
def loss_curves(curves: Sequence[Curve]) -> Figure:
    """The training loss of each stage: the mean over the sites, and each site."""
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, curve in zip(grid, curves, strict=False):
        each, means = [numbers(values) for values in curve.sites.values()], numbers(curve.loss)
        few = len(curve.rounds) <= _MARKED_ROUNDS
        if len(each) > MOST_LINES:
            for (low, high), color in zip(_bands(np.array(each)), (PALE, "#b0b0b0"), strict=True):
                axes.fill_between(curve.rounds, low, high, color=color, linewidth=0)
        else:
            for points in each:
                axes.plot(
                    curve.rounds,
                    points,
                    color=GREY,
                    linewidth=0.8,
                    alpha=0.7,
                    marker="." if few else "",
                    markersize=3,
                )
        axes.plot(curve.rounds, means, color=BLUE, linewidth=2.2, marker="o" if few else "", markersize=3.5)
        if curve.failed:
            axes.plot(
                curve.failed,
                [0.0] * len(curve.failed),
                color=VERMILLION,
                marker="X",
                markersize=8,
                linestyle="none",
                clip_on=False,
                zorder=5,
            )
        axes.set_title(curve.title)
        axes.set(xlabel="round", ylabel="training loss")
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.grid(axis="y")
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    handles: list[Any] = [
        Line2D([], [], color=BLUE, linewidth=2.2, marker="o", markersize=3.5, label="mean over the sites"),
    ]
    if any(len(curve.sites) <= MOST_LINES for curve in curves):
        handles.append(Line2D([], [], color=GREY, linewidth=0.8, marker=".", markersize=3, label="one site"))
    if any(len(curve.sites) > MOST_LINES for curve in curves):
        handles += [
            Patch(color="#b0b0b0", label="middle 80 % of the sites"),
            Patch(color=PALE, label="all sites"),
        ]
    if any(curve.failed for curve in curves):
        handles.append(
            Line2D(
                [],
                [],
                color=VERMILLION,
                marker="X",
                markersize=8,
                linestyle="none",
                label="round without one of the sites",
            )
        )
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


def _bands(sites: NDArray[np.float64]) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """From `[sites, rounds]` numbers the ends, over rounds, of all of them and of the middle 80 %."""
    # A round that nobody told of has no ends; numpy would warn of each.
    told = np.isfinite(sites).any(axis=0)
    bands = []
    for tail in (0, 10):
        ends = np.full((2, sites.shape[1]), np.nan)
        ends[:, told] = np.nanpercentile(sites[:, told], (tail, 100 - tail), axis=0)
        bands.append((ends[0], ends[1]))
    return bands


@drawn
def time_bars(bars: Sequence[tuple[str, float, str]], *, others: str = "") -> Figure:
    """How long each phase took.

    Args:
        bars: name, seconds, and the time in words. A name that starts with `others` is drawn apart.
        others: start of the names of bars that are not phases of the run itself.
    """
    figure = Figure(figsize=(WIDTH, 0.75 + 0.3 * max(2, len(bars))), layout="constrained")
    axes = figure.subplots()
    longest = max([seconds for _, seconds, _ in bars] + [1.0])
    unit, divisor = next(
        (name, seconds) for name, seconds in _UNITS if longest >= 2 * seconds or seconds == 1
    )
    for row, (name, seconds, text) in enumerate(bars):
        apart = bool(others) and name.startswith(others)
        look: dict[str, Any] = (
            {"facecolor": "white", "edgecolor": GREEN, "hatch": "////"} if apart else {"color": BLUE}
        )
        axes.barh(row, seconds / divisor, height=0.62, **look)
        axes.annotate(
            text,
            (seconds / divisor, row),
            xytext=(5, 0),
            textcoords="offset points",
            va="center_baseline",
            fontsize=9,
        )
    axes.set(xlabel=unit, ylim=(len(bars) - 0.5, -0.5))
    axes.set_xlim(0, longest / divisor * 1.12)
    axes.grid(axis="x")
    name_rows(axes, [name for name, _, _ in bars], length=32)
    return figure
