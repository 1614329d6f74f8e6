"""The figures of a report: numbers in, SVG out.

Colours are those of Okabe and Ito (2008), which every kind of colour vision tells apart; shapes and hatches
say the same, for print in black and white. Legends stand outside the axes, so that nothing lies on the data.
"""

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from typing import Any, ParamSpec
from xml.etree import ElementTree

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from fedqc.metrics.agreement import LimitsOfAgreement
from fedqc.statistics.pooled import THRESHOLDS, ProfileBin, RiskCoverage

BLUE, VERMILLION, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
DARK, GREY, PALE = "#333333", "#8a8a8a", "#d9d9d9"

WIDTH = 8.6
"""Inches; on A4 letters stay larger than 8 points."""
GOLDEN = 0.6180339887
MOST_NAMES = 100
"""Sites that one figure can name."""
MOST_PANELS = 20
"""Sites that the small multiples can show; of more a map does."""
MOST_LINES = 20
"""Sites whose curves are drawn one by one; of more a band is."""
MOST_MARKS = 200
"""Cases that a row of a strip shows one by one; of more only the outer ones."""
_MANY_FOLD = 30
"""Numbers that differ by more than this factor are drawn on a logarithmic axis."""
_NAME_LENGTH = 26
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))
_MARKED_ROUNDS = 60
"""Rounds that are marked one by one on a curve."""
_CROWDED = 30
"""Rows from which on marks are smaller."""
_MEASURED = 8
"""Texts of a column, the longest ones, for which room is made: measuring takes longer than drawing."""
_LEAST_ROW = 0.165
"""Inches of a row with a name."""

_STYLE = {
    "figure.dpi": 72,  # of an SVG, in which a point is a pixel
    "svg.fonttype": "none",
    # Comes with matplotlib, so that a figure has the same bytes everywhere. The page shows narrower letters.
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DARK,
    "axes.labelcolor": DARK,
    "axes.axisbelow": True,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "figure.constrained_layout.wspace": 0.05,
    "figure.constrained_layout.hspace": 0.04,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#9ecae8", BLUE, "#003a5c"])
_SMALL_TOO = PowerNorm(0.5, vmin=0, vmax=1)
"""Small shares are the rule and have to differ from none, whatever the largest one is."""
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

Arguments = ParamSpec("Arguments")


@dataclass(frozen=True)
class Points:
    """A group of annotations: true and predicted DSC of each."""

    label: str
    true: Sequence[float]
    predicted: Sequence[float]
    color: str
    marker: str


@dataclass(frozen=True)
class KindMeans:
    """One kind of error: what the model says of it on average, and what is true."""

    name: str
    unseen: bool
    true: float
    predicted: float
    mae: float


@dataclass(frozen=True)
class Dot:
    """A number with its interval, in a row of its own."""

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    note: str = ""
    """Stands at the right."""
    color: str = BLUE
    marker: str = "o"
    small: tuple[float, ...] = ()
    """Further values in the same row, such as those of single seeds."""


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


def with_prefix(svg: str, prefix: str) -> str:
    """The same drawing with other ids, so that several can stand in one page."""
    return re.sub(r'(\bid="|url\(#|href="#)f-', rf"\g<1>{prefix}-", svg)


def _drawn(draw: Callable[Arguments, Figure]) -> Callable[Arguments, str]:
    """Let a function draw in the report's style, whatever the user's own settings are, and return the SVG."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with matplotlib.style.context(_STYLE, after_reset=True):
            text = StringIO()
            figure = draw(*args, **kwargs)
            FigureCanvasSVG(figure)
            if engine := figure.get_layout_engine():
                # Else matplotlib draws everything once more, only to arrange it.
                engine.execute(figure)
                figure.set_layout_engine(None)
            figure.savefig(text, format="svg", transparent=True)
        return _tidied(text.getvalue())

    return drawn


# ------------------------------------------------------------------------------------- annotation quality


@_drawn
def quality_histograms(
    sites: Mapping[str, Sequence[int]], *, threshold: float | None, keep_from: float | None
) -> Figure:
    """Small multiples: how many annotations of each site have which predicted DSC.

    Args:
        sites: counts in bins of equal width in [0, 1]; -1 is a bin that the site may not tell.
        threshold: annotations below are dropped.
        keep_from: upper end of the review band; None, or the threshold, where there is none.
    """
    figure, panels = _small_multiples(sites, "predicted DSC", "annotations")
    for axes, counts in zip(panels, sites.values(), strict=True):
        width = 1 / len(counts)
        highest = max(1, *counts)
        for index, number in enumerate(counts):
            if number < 0:
                middle, height = (index + 0.5) * width, 0.22 * highest
                hidden: dict[str, Any] = {
                    "facecolor": "white",
                    "edgecolor": GREY,
                    "hatch": "xxxx",
                    "linewidth": 0.8,
                }
                axes.bar(middle, height, width * 0.92, **hidden)
            else:
                axes.bar((index + 0.5) * width, number, width * 0.92, color=BLUE)
        _threshold_line(axes.axvline, threshold, "--")
        if keep_from is not None and keep_from != threshold:
            _threshold_line(axes.axvline, keep_from, ":")
        axes.set_ylim(0, highest * 1.08)
    handles: list[Any] = [Patch(color=BLUE, label="annotations")]
    if any(number < 0 for counts in sites.values() for number in counts):
        label = "not told: few patients, or none"
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="xxxx", label=label))
    handles += _threshold_handles(threshold, keep_from)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


@_drawn
def quality_map(
    sites: Mapping[str, Sequence[int]],
    totals: Sequence[int],
    *,
    threshold: float | None,
    keep_from: float | None,
) -> Figure:
    """The same as `quality_histograms` for many sites: a row for each, darker where more of its own lie.

    Args:
        sites: counts in bins of equal width in [0, 1]; -1 is a bin that the site may not tell.
        totals: all annotations of each site, in bins that it may tell and in others.
        threshold: annotations below are dropped.
        keep_from: upper end of the review band; None, or the threshold, where there is none.
    """
    n_bins = len(next(iter(sites.values())))
    counts = np.array(list(sites.values()), np.float64)
    hidden = counts < 0
    counts[hidden] = 0
    shares = counts / np.maximum(1, totals)[:, None]
    figure = Figure(figsize=(WIDTH, 1.1 + _row_height(len(sites)) * len(sites)), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(n_bins + 1) / n_bins
    rows = np.arange(len(sites) + 1) - 0.5
    look: dict[str, Any] = {"cmap": _BLUES, "norm": _SMALL_TOO, "edgecolors": "white", "linewidth": 0.6}
    axes.pcolormesh(edges, rows, shares, **look)
    axes.add_collection(
        PatchCollection(
            [Rectangle((edges[bin_], row - 0.5), 1 / n_bins, 1) for row, bin_ in np.argwhere(hidden)],
            facecolor="white",
            edgecolor="#c4c4c4",
            hatch="////",
            linewidth=0.4,
        )
    )
    _threshold_line(axes.axvline, threshold, "--")
    if keep_from is not None and keep_from != threshold:
        _threshold_line(axes.axvline, keep_from, ":")
    axes.set(xlabel="predicted DSC", xlim=(0, 1), ylim=(len(sites) - 0.5, -0.5), xticks=edges[::2])
    _name_rows(axes, list(sites))
    handles: list[Any] = [
        Patch(facecolor=_BLUES(_SMALL_TOO(share)), edgecolor=GREY, linewidth=0.6, label=f"{100 * share:g} %")
        for share in (0.0, 0.05, 0.25, 0.5, 1.0)
    ]
    handles.append(Patch(facecolor="white", edgecolor="#c4c4c4", hatch="////", label="not told"))
    handles += _threshold_handles(threshold, keep_from)
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1)
    return figure


@_drawn
def count_map(rows: Mapping[str, Sequence[int | None]], columns: Sequence[str], what: str) -> Figure:
    """Numbers of each row in named columns, darker where larger.

    Args:
        rows: for each as many numbers as columns; None is one that was not told.
        columns: their names.
        what: the numbers are of.
    """
    counts = np.array([[value or 0 for value in row] for row in rows.values()], np.float64)
    longest = max(len(name) for name in columns)
    figure = Figure(
        figsize=(WIDTH, 0.75 + 0.068 * longest + _row_height(len(rows)) * max(2, len(rows))),
        layout="constrained",
    )
    axes = figure.subplots()
    axes.pcolormesh(
        np.arange(len(columns) + 1) - 0.5,
        np.arange(len(rows) + 1) - 0.5,
        counts / max(1.0, counts.max()),
        cmap=_BLUES,
        norm=_SMALL_TOO,
        edgecolors="#e4e4e4",
        linewidth=0.6,
    )
    for row, numbers in enumerate(rows.values()):
        for column, number in enumerate(numbers):
            if number is not None:
                dark = number > 0.3 * counts.max()
                text = axes.text(
                    column,
                    row,
                    str(number),
                    ha="center",
                    va="center_baseline",
                    fontsize=9,
                    color="white" if dark else DARK,
                )
                text.set_in_layout(False)
    axes.set(ylim=(len(rows) - 0.5, -0.5), xlim=(-0.5, max(len(columns), 6) - 0.5))
    axes.set_xticks(range(len(columns)), columns, rotation=60, ha="left", rotation_mode="anchor")
    axes.xaxis.tick_top()
    axes.tick_params(axis="x", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.set_xlabel(what, loc="left")
    axes.xaxis.set_label_position("bottom")
    _name_rows(axes, list(rows))
    return figure


@_drawn
def label_histograms(sites: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> Figure:
    """Small multiples: the DSC of the labels that were made at each site, and of those trained on.

    Args:
        sites: counts before and after balancing, in bins of equal width in [0, 1].
    """
    figure, panels = _small_multiples(sites, "true DSC", "labels, %")
    for axes, parts in zip(panels, sites.values(), strict=True):
        made, chosen = ([100 * count / max(1, sum(counts)) for count in counts] for counts in parts)
        edges = [index / len(made) for index in range(len(made) + 1)]
        axes.stairs(chosen, edges, fill=True, color=BLUE, alpha=0.85)
        axes.stairs(made, edges, color=VERMILLION, linewidth=1.4)
        axes.set_ylim(0, max(1.0, *made, *chosen) * 1.08)
    handles: list[Any] = [
        Line2D([], [], color=VERMILLION, linewidth=1.4, label="made"),
        Patch(color=BLUE, alpha=0.85, label="trained on"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


@_drawn
def decision_bars(sites: Mapping[str, Mapping[str, int | None]]) -> Figure:
    """A stacked bar for each site: how many annotations are kept, left to a person, dropped.

    Args:
        sites: for each the numbers under `keep`, `review`, `drop`; None is a number that may not be told.
    """
    figure = Figure(figsize=(WIDTH, 1.15 + _row_height(len(sites)) * len(sites)), layout="constrained")
    axes = figure.subplots()
    looks: dict[str, dict[str, Any]] = {
        "keep": {"label": "kept", "color": BLUE},
        "review": {"label": "review", "facecolor": ORANGE, "edgecolor": "white", "hatch": "..."},
        "drop": {"label": "dropped", "facecolor": VERMILLION, "edgecolor": "white", "hatch": "////"},
    }
    totals = {name: sum(number or 0 for number in one.values()) for name, one in sites.items()}
    widest = max([*totals.values(), 1])
    left = np.zeros(len(sites))
    for outcome, look in looks.items():
        numbers = [one.get(outcome) or 0 for one in sites.values()]
        axes.barh(range(len(sites)), numbers, left=left, height=0.68, **(look | {"label": None}))
        plain = outcome == "keep"
        box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": "none"}
        for row, number in enumerate(numbers):
            if number > widest * 0.03 and len(sites) <= _CROWDED:
                text = axes.text(
                    left[row] + number / 2,
                    row,
                    str(number),
                    ha="center",
                    va="center_baseline",
                    color="white" if plain else DARK,
                    fontsize=9,
                    bbox=None if plain else box,
                )
                text.set_in_layout(False)
        left += numbers
    for row, (name, one) in enumerate(sites.items()):
        if None in one.values():
            hidden = "not told" if totals[name] == 0 else "some groups not told"
            axes.text(left[row] + widest * 0.01, row, hidden, va="center", color=GREY, fontsize=9)
    axes.set(xlabel="annotations", xlim=(0, widest * 1.02), ylim=(len(sites) - 0.5, -0.5))
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(axis="x")
    _name_rows(axes, list(sites))
    figure.legend(
        handles=[Patch(**look) for look in looks.values()], loc="outside upper left", ncols=len(looks)
    )
    return figure


# --------------------------------------------------------------------------------------------- QC accuracy


@_drawn
def scatter_panels(panels: Sequence[tuple[str, Points]]) -> Figure:
    """Predicted against true DSC, a panel for each of one or two groups, both with the same axes."""
    figure = Figure(figsize=(WIDTH, 5.2))
    grid = figure.subplots(1, 2, sharey=True)
    # Two squares with room for three lines above and a legend below.
    figure.subplots_adjust(left=0.075, right=0.99, wspace=0.09, top=0.875, bottom=0.16)
    for axes, (title, points) in zip(grid, panels, strict=False):
        _scatter(axes, points)
        _square(axes)
        axes.set_title(title)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    grid[0].set_ylabel("predicted DSC")
    handles = [_handle(points) for _, points in panels]
    handles.append(Line2D([], [], color=GREY, linewidth=1, label="perfect: predicted = true"))
    figure.legend(handles=handles, loc="lower left", ncols=len(handles))
    return figure


@_drawn
def candidates(
    groups: Sequence[Points], threshold: float, sites: Mapping[str, tuple[Sequence[float], Sequence[float]]]
) -> Figure:
    """The candidates: predicted against true DSC, and beside it site by site.

    Args:
        groups: candidates by decision.
        threshold: a predicted DSC below it is dropped, a true DSC below it is a failure.
        sites: for each site the predicted DSC of its good annotations and of its failures.
    """
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for points in groups:
        _scatter(left, points)
    _square(left)
    left.set_ylabel("predicted DSC")
    left.axvline(threshold, color=DARK, linewidth=1, linestyle="--", zorder=1)
    left.set_title("by decision")
    left.annotate(
        f"threshold {threshold:g}",
        (threshold, 1.01),
        xycoords=("data", "axes fraction"),
        ha="center",
        fontsize=9,
        color=DARK,
    )
    names = list(sites)
    for place, (good, failed) in enumerate(sites.values()):
        for values, shift, color, marker in ((good, -0.18, BLUE, "o"), (failed, 0.18, VERMILLION, "^")):
            # Steps of the golden ratio spread the marks evenly without drawing anything at random.
            ordered = sorted(values)
            spread = [shift + 0.13 * (2 * (number * GOLDEN % 1) - 1) for number in range(len(ordered))]
            right.scatter(
                [place + offset for offset in spread],
                ordered,
                s=20,
                alpha=0.65,
                linewidths=0,
                color=color,
                marker=marker,
            )
    right.set_xticks(range(len(names)), [_short(name, 14) for name in names])
    if len(names) > 4:
        right.tick_params(axis="x", labelrotation=90)
    right.set(xlim=(-0.5, len(names) - 0.5), box_aspect=1)
    right.grid(axis="y")
    right.set_title("by truth")
    for axes in (left, right):
        axes.axhline(threshold, color=DARK, linewidth=1, linestyle="--", zorder=1)
    right.annotate(
        f"threshold\n{threshold:g}",
        (1.01, threshold),
        xycoords=("axes fraction", "data"),
        va="center",
        fontsize=9,
        color=DARK,
    )
    handles: list[Any] = [_handle(points) for points in groups]
    by_truth = [
        Line2D([], [], color=color, marker=marker, linestyle="none", label=label)
        for color, marker, label in ((BLUE, "o", "good label"), (VERMILLION, "^", "failure"))
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), columnspacing=1)
    figure.legend(handles=by_truth, loc="outside lower right", ncols=2)
    return figure


@_drawn
def kinds(means: Sequence[KindMeans]) -> Figure:
    """For each kind of error the mean true and predicted DSC, and the mean absolute error."""
    figure = Figure(figsize=(WIDTH, 1.5 + 0.31 * len(means)), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.7, 1))
    for row, one in enumerate(means):
        color, marker = (VERMILLION, "^") if one.unseen else (BLUE, "o")
        left.plot([one.true, one.predicted], [row, row], color=color, linewidth=2, alpha=0.45)
        left.plot(one.true, row, marker="|", markersize=13, markeredgewidth=2.4, color=DARK)
        left.plot(one.predicted, row, marker=marker, markersize=7.5, color=color)
        right.plot([0, one.mae], [row, row], color=color, linewidth=2, alpha=0.45)
        right.plot(one.mae, row, marker=marker, markersize=7.5, color=color)
    left.set(xlim=(-0.03, 1.03), xlabel="mean DSC", ylim=(len(means) - 0.5, -0.6))
    highest = max([one.mae for one in means] + [0.1])
    right.set(xlim=(0, highest * 1.12), xlabel="mean absolute error")
    for axes in (left, right):
        axes.grid(axis="x")
    _name_rows(left, [one.name for one in means], length=32)
    right.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=DARK, marker="|", markersize=11, markeredgewidth=2.4, linestyle="none"),
        Line2D([], [], color=BLUE, marker="o", markersize=7.5, linestyle="none"),
        Line2D([], [], color=VERMILLION, marker="^", markersize=7.5, linestyle="none"),
    ]
    labels = ["true", "predicted, kind was in training", "predicted, kind never trained on"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


@_drawn
def agreement_panels(
    pooled: Sequence[ProfileBin],
    sites: Sequence[ProfileBin],
    limits: LimitsOfAgreement | None,
) -> Figure:
    """Calibration, and Bland & Altman's (1986) plot, from bins of predicted quality.

    Args:
        pooled: each bin over all sites.
        sites: each bin of each site.
        limits: over all labels.
    """
    figure = Figure(figsize=(WIDTH, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    # Marks of one size are drawn together, which takes far less room than a size for each.
    most = max((one.n for one in sites), default=1)
    by_size: dict[float, list[ProfileBin]] = {2.5: [], 4.0: [], 5.5: []}
    for one in sites:
        by_size[2.5 + 1.5 * min(2, int(3 * math.sqrt(one.n / most)))].append(one)
    for size, alike in by_size.items():
        pale = {"markersize": size, "color": GREY, "alpha": 0.45, "markeredgewidth": 0}
        left.plot([one.predicted for one in alike], [one.true for one in alike], "o", **pale)
        right.plot([one.middle for one in alike], [one.bias for one in alike], "o", **pale)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=0)
    left.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="predicted DSC, mean", ylabel="true DSC, mean")
    left.set_title("calibration")
    bars = [one.sd or 0.0 for one in pooled]
    look: dict[str, Any] = {"color": BLUE, "markersize": 8, "capsize": 4, "linewidth": 2, "zorder": 3}
    left.errorbar([one.predicted for one in pooled], [one.true for one in pooled], bars, fmt="o-", **look)
    middles, differences = [one.middle for one in pooled], [one.bias for one in pooled]
    right.errorbar(middles, differences, [1.96 * sd for sd in bars], fmt="o", **look)
    right.axhline(0, color=GREY, linewidth=1, zorder=0)
    if limits:
        ends = ((limits.bias, "bias", "-"), (limits.lower, "lower", "--"), (limits.upper, "upper", "--"))
        for at, what, line in ends:
            right.axhline(at, color=VERMILLION, linewidth=1.4, linestyle=line, zorder=2)
            right.annotate(
                f"{what}\n{at:+.2f}",
                (1.015, at),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=DARK,
            )
    reach = [abs(one.bias) + 1.96 * sd for one, sd in zip(pooled, bars, strict=True)]
    reach += [abs(one.bias) for one in sites]
    reach += [abs(limits.lower), abs(limits.upper)] if limits else []
    highest = 1.1 * max(0.1, *reach)
    right.set(xlim=(-0.03, 1.03), ylim=(-highest, highest), xlabel="mean of predicted and true DSC")
    right.set_ylabel("predicted minus true DSC")
    right.set_title("Bland and Altman")
    for axes in (left, right):
        axes.set_box_aspect(1)
        axes.grid()
    handles = [
        Line2D([], [], color=BLUE, marker="o", markersize=8, linewidth=2, label="all sites"),
        Line2D([], [], color=GREY, marker="o", linestyle="none", markersize=5, label="one site"),
        Line2D([], [], color=GREY, linewidth=1, label="perfect"),
    ]
    if limits:
        handles.append(
            Line2D([], [], color=VERMILLION, linewidth=1.4, linestyle="--", label="limits of agreement")
        )
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


@_drawn
def risk_coverage(worst: RiskCoverage, best: RiskCoverage, threshold: float | None) -> Figure:
    """How many failures are among what is kept, and what each threshold drops.

    Args:
        worst: the curve as it may be at worst; drawn as lines.
        best: as it may be at best; bands reach to it.
        threshold: the one of the run, where its rule has one.
    """
    figure = Figure(figsize=(WIDTH, 4.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    coverage = np.linspace(0.01, 1, 100)
    left.fill_between(coverage, worst.at(coverage), best.at(coverage), color=BLUE, alpha=0.22, linewidth=0)
    left.plot(coverage, worst.at(coverage), color=BLUE, linewidth=2.2)
    left.plot(coverage, worst.best(coverage), color=GREEN, linewidth=1.6, linestyle="--")
    left.axhline(worst.failing, color=GREY, linewidth=1.2, linestyle=":")
    left.set(xlabel="coverage: share of the labels kept", ylabel="risk: share of failures among the kept")
    left.set_title("risk and coverage")
    left.set_ylim(-0.02, max(0.1, *worst.at(coverage)) * 1.1)
    for low, high, color, line in (
        (worst.failures_below, best.failures_below, VERMILLION, "-"),
        (worst.others_below, best.others_below, BLUE, "-."),
    ):
        right.fill_between(THRESHOLDS, low, high, color=color, alpha=0.18, linewidth=0)
        right.plot(THRESHOLDS, low, color=color, linewidth=2.2, linestyle=line)
    right.set(xlabel="threshold", ylabel="share below the threshold", ylim=(-0.03, 1.03))
    right.set_title("what a threshold drops")
    if threshold is not None:
        _threshold_line(right.axvline, threshold, "--")
    for axes in (left, right):
        axes.set(xlim=(-0.03, 1.03), box_aspect=1)
        axes.grid()
    figure.legend(
        handles=[
            Line2D([], [], color=BLUE, linewidth=2.2, label="this model"),
            Line2D([], [], color=GREEN, linewidth=1.6, linestyle="--", label="best possible"),
            Line2D([], [], color=GREY, linewidth=1.2, linestyle=":", label="knows nothing"),
        ],
        loc="outside lower left",
        ncols=3,
        columnspacing=1,
    )
    by_threshold = [
        Line2D([], [], color=VERMILLION, linewidth=2.2, label="failures"),
        Line2D([], [], color=BLUE, linewidth=2.2, linestyle="-.", label="others"),
        *_threshold_handles(threshold, None),
    ]
    figure.legend(handles=by_threshold, loc="outside lower right", ncols=3, columnspacing=1)
    return figure


# --------------------------------------------------------------------------------------------- rows of dots


@_drawn
def dot_panels(
    panels: Sequence[tuple[str, Sequence[Dot], tuple[float, float] | None]],
    legend: Sequence[tuple[str, str, str]] = (),
    lines: Mapping[str, tuple[float, str]] | None = None,
) -> Figure:
    """Numbers as dots in rows, with their intervals; the same rows in every panel.

    Args:
        panels: name of the number, a dot a row, and the range to show at least.
        legend: label, colour and marker of what needs to be explained.
        lines: by name of the number, where a line is drawn across all rows, and what it is.
    """
    lines = lines or {}
    _, first, _ = panels[0]
    figure = Figure(
        figsize=(WIDTH, 0.85 + (0.35 if legend else 0) + _row_height(len(first)) * max(2, len(first))),
        layout="constrained",
    )
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, dots, least) in zip(grid, panels, strict=True):
        _draw_dots(axes, dots)
        shown = (*(least or ()), *((lines[title][0],) if title in lines else ()))
        axes.set(xlabel=title, xlim=_range(dots, shown), ylim=(max(1, len(dots)) - 0.5, -0.5))
        if title in lines:
            at, what = lines[title]
            axes.axvline(at, color=DARK, linewidth=1.1, linestyle="--", zorder=1)
            inner = "right" if at > sum(axes.get_xlim()) / 2 else "left"
            axes.annotate(
                what, (at, 1.01), xycoords=("data", "axes fraction"), ha=inner, fontsize=9, color=DARK
            )
        axes.xaxis.set_major_locator(MaxNLocator(6 if len(panels) == 1 else 4))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
    _name_rows(grid[0], [dot.name for dot in first])
    if legend:
        handles = [
            Line2D([], [], color=color, marker=marker, linestyle="none", markersize=8, label=label)
            for label, color, marker in legend
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


# -------------------------------------------------------------------------------------- data of one site


@_drawn
def strips(panels: Sequence[tuple[str, Mapping[str, Sequence[float]]]]) -> Figure:
    """How numbers are spread over cases: a mark a case, a box of the middle half, a line at the median.

    Args:
        panels: what the numbers are, and the numbers of each row; the same rows in every panel.
    """
    rows = list(panels[0][1])
    height = min(0.5, 9 / len(rows))
    figure = Figure(figsize=(WIDTH, 1.05 + height * max(1.5, len(rows))), layout="constrained")
    grid = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (title, spreads) in zip(grid, panels, strict=True):
        for row, values in enumerate(spreads.values()):
            _strip(axes, row, sorted(values))
        axes.set(xlabel=title, ylim=(len(rows) - 0.5, -0.5))
        axes.grid(axis="x")
        axes.tick_params(axis="y", length=0)
        _scale(axes, [value for values in spreads.values() for value in values])
    _name_rows(grid[0], rows)
    handles = [
        Line2D([], [], color=BLUE, marker="o", linestyle="none", markersize=4.5, label="a case"),
        Patch(facecolor=PALE, label="middle half of the cases"),
        Line2D(
            [], [], color=DARK, linestyle="none", marker="|", markersize=11, markeredgewidth=2, label="median"
        ),
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _strip(axes: Axes, row: int, values: Sequence[float]) -> None:
    """One row of `strips`; `values` in ascending order."""
    if not values:
        axes.text(0.01, row, "-", transform=axes.get_yaxis_transform(), va="center", color=DARK)
        return
    low, middle, high = (float(end) for end in np.percentile(values, (25, 50, 75)))
    axes.plot([values[0], values[-1]], [row, row], color=PALE, linewidth=1.2, zorder=1)
    axes.barh(row, high - low, left=low, height=0.62, color=PALE, zorder=1)
    half = MOST_MARKS // 2
    shown = [*values[:half], *values[-half:]] if len(values) > MOST_MARKS else values
    # Steps of the golden ratio spread the marks evenly without drawing anything at random.
    places = [row + 0.26 * (2 * (number * GOLDEN % 1) - 1) for number in range(len(shown))]
    axes.scatter(shown, places, s=14, alpha=0.65, linewidths=0, color=BLUE, zorder=2)
    axes.plot([middle, middle], [row - 0.36, row + 0.36], color=DARK, linewidth=2, zorder=3)


@_drawn
def intensity_bands(modalities: Mapping[str, Sequence[tuple[float, float, float]]]) -> Figure:
    """Small multiples: the intensities of each case, the cases in the order of their median.

    Args:
        modalities: for each modality the lowest, the middle and the highest intensity of each case.
    """
    columns = min(4, max(2, len(modalities)))
    rows = -(-len(modalities) // columns)
    figure = Figure(figsize=(WIDTH, 0.75 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (name, cases) in zip(grid.flat, modalities.items(), strict=False):
        ordered = sorted(cases, key=lambda case: case[1])
        edges = [position + 0.5 for position in range(len(ordered) + 1)]
        for low, high, look in ((0, 2, {"color": PALE}), (1, 1, {"color": BLUE, "linewidth": 1.6})):
            bottom, top = ([case[end] for case in ordered] for end in (low, high))
            if low == high:
                axes.stairs(top, edges, baseline=None, **look)
            else:
                axes.stairs(top, edges, baseline=bottom, fill=True, **look)
        axes.set(xlim=(0.5, len(ordered) + 0.5))
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        lowest = min((abs(case[1]) for case in cases if case[1]), default=1.0)
        if max((case[1] for case in cases), default=0.0) > _MANY_FOLD * lowest:
            axes.set_yscale("symlog", linthresh=10)  # of an image that was normalised, half is below 0
            axes.yaxis.set_minor_locator(NullLocator())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.yaxis.set_major_formatter(_plain_number)
        axes.grid(axis="y")
        axes.set_title(_short(name))
    for axes in list(grid.flat)[len(modalities) :]:
        axes.set_visible(False)
    for axes in grid.flat[: len(modalities)]:
        axes.set_xlabel("cases")
    for axes in grid[:, 0]:
        axes.set_ylabel("intensity")
    handles = [
        Line2D([], [], color=BLUE, linewidth=1.6, label="median of a case"),
        Patch(facecolor=PALE, label="all but the lowest and highest 0.5 %"),
    ]
    figure.legend(handles=handles, loc="outside lower left", ncols=2)
    return figure


# ------------------------------------------------------------------------------------- course of the run


@_drawn
def loss_curves(curves: Sequence[Curve]) -> Figure:
    """The training loss of each stage: the mean over the sites, and each site."""
    rows = -(-len(curves) // 2)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.6 * rows), layout="constrained")
    grid = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axes, curve in zip(grid, curves, strict=False):
        each, means = [_numbers(values) for values in curve.sites.values()], _numbers(curve.loss)
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


def _numbers(values: Sequence[float | None]) -> list[float]:
    """Numbers to draw, with a gap where there is none."""
    return [float("nan") if value is None else value for value in values]


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


@_drawn
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
    _name_rows(axes, [name for name, _, _ in bars], length=32)
    return figure


# -------------------------------------------------------------------------------------------------- pieces


def _small_multiples(names: Iterable[str], x: str, y: str) -> tuple[Figure, list[Axes]]:
    """A figure with a panel for each name, for what lies in [0, 1]; what `x` and `y` show."""
    names = list(names)
    columns = min(4, max(2, len(names)))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(WIDTH, 0.75 + 1.65 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    panels = list(grid.flat)
    for axes, name in zip(panels, names, strict=False):
        axes.set(xlim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        axes.set_xticklabels(["0", "", "0.5", "", "1"])
        axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=2))
        axes.set_title(_short(name))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    return figure, panels[: len(names)]


def _scatter(axes: Axes, points: Points) -> None:
    axes.scatter(
        points.true, points.predicted, s=22, alpha=0.6, linewidths=0, color=points.color, marker=points.marker
    )


def _handle(points: Points) -> Line2D:
    return Line2D([], [], color=points.color, marker=points.marker, linestyle="none", label=points.label)


def _square(axes: Axes) -> None:
    """Axes from 0 to 1 with the line on which predicted equals true."""
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=1, zorder=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xlabel="true DSC", box_aspect=1)
    axes.grid()


def _threshold_line(line: Callable[..., object], at: float | None, linestyle: str) -> None:
    if at is not None:
        line(at, color=DARK, linewidth=1.1, linestyle=linestyle)


def _threshold_handles(threshold: float | None, keep_from: float | None) -> list[Line2D]:
    """What the lines of `_threshold_line` mean."""
    if threshold is None:
        return []
    lines = [Line2D([], [], color=DARK, linewidth=1.1, linestyle="--", label=f"threshold {threshold:g}")]
    if keep_from is not None and keep_from != threshold:
        label = f"kept from {keep_from:g}"
        lines.append(Line2D([], [], color=DARK, linewidth=1.1, linestyle=":", label=label))
    return lines


def _draw_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Each in its row; all that look alike as one drawing, which of many sites is several times as fast."""
    size = 8 if len(dots) <= _CROWDED else 5.5
    looks = dict.fromkeys((dot.color, dot.marker) for dot in dots if dot.value is not None)
    for color, marker in looks:
        rows = [row for row, dot in enumerate(dots) if (dot.color, dot.marker) == (color, marker)]
        ends = [(dots[row].low, dots[row].high, row) for row in rows]
        known = [(low, high, row) for low, high, row in ends if low is not None and high is not None]
        axes.hlines(
            [row for _, _, row in known],
            [low for low, _, _ in known],
            [high for _, high, _ in known],
            color=color,
            linewidth=2.4,
            alpha=0.55,
        )
        axes.plot(
            _numbers([dots[row].value for row in rows]),
            rows,
            linestyle="none",
            marker=marker,
            markersize=size,
            color=color,
            clip_on=False,
            zorder=3,
        )
    for row, dot in enumerate(dots):
        if dot.small:
            axes.plot(dot.small, [row + 0.2] * len(dot.small), ".", color=GREY, markersize=6)
        if dot.value is None:
            axes.text(0.01, row, "-", transform=axes.get_yaxis_transform(), va="center", color=DARK)
    _row_texts(axes, 1.015, [dot.note for dot in dots], ha="left")


def _scale(axes: Axes, values: Sequence[float]) -> None:
    """An axis that holds all values; a logarithmic one where they differ by a large factor."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if low > 0 and high > _MANY_FOLD * low:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.2, high * 1.2)
        steps = (1, 2, 5) if high < 100 * low else (1,)
        axes.xaxis.set_major_locator(LogLocator(subs=steps, numticks=8))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.05 * (high - low) or 0.5 * abs(high) or 0.5
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(_plain_number)


def _plain_number(value: float, _position: float) -> str:
    """A tick as people write it, where matplotlib would write a formula."""
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", "\u202f")


def _range(dots: Sequence[Dot], least: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest of all that is drawn, and a little more."""
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high, *dot.small)]
    known = [value for value in values if value is not None] + list(least)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.05
    return low - margin, high + margin


def _row_height(rows: int) -> float:
    """Inches; a figure of many rows still fits on a page, and its letters never overlap."""
    return max(_LEAST_ROW, min(0.36, 9 / max(1, rows)))


def _name_rows(axes: Axes, names: Sequence[str], length: int = _NAME_LENGTH) -> None:
    axes.set_yticks([])
    _row_texts(axes, -0.012, [_short(name, length) for name in names], ha="right")


def _row_texts(axes: Axes, at: float, texts: Sequence[str], ha: str) -> None:
    """A text beside each row, at a place in shares of the width. They are far faster than ticks."""
    longest = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)[:_MEASURED]
    for row, text in enumerate(texts):
        if text:
            drawn = axes.text(
                at, row, text, transform=axes.get_yaxis_transform(), ha=ha, va="center_baseline"
            )
            drawn.set_in_layout(row in longest)


def _short(name: str, length: int = _NAME_LENGTH) -> str:
    """A name that fits; its middle goes first, since names differ at their ends."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}\u2026{name[-tail:]}"


def _tidied(text: str) -> str:
    """An SVG of matplotlib as part of a page: no metadata, no style for the page, no id without need."""
    root = ElementTree.fromstring(text)  # noqa: S314 - matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{_SVG}metadata", f"{_SVG}style"}:
                parent.remove(child)
    names: dict[str, str] = {}
    for value in (value for element in root.iter() for value in element.attrib.values()):
        for name in re.findall(r"url\(#([^)]+)\)", value):
            names.setdefault(name, f"f-{len(names)}")
    for element in root.iter():
        if _HREF in element.attrib:
            names.setdefault(element.attrib[_HREF].removeprefix("#"), f"f-{len(names)}")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attributes(element.attrib, names))
        element.text = element.text if (element.text or "").strip() else None
        element.tail = None
    root.attrib |= {"xmlns": _SVG.strip("{}"), "font-family": _FONTS, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: Mapping[str, str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The attributes of an element that are needed, with short ids."""
    for key, value in attributes.items():
        if key == "id":
            if value in names:
                yield key, names[value]
        elif key == _HREF:
            yield "href", f"#{names[value.removeprefix('#')]}"
        elif not value.startswith("rotate(-0 "):
            text = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{names[match[1]]})", value)
            # The letters' size stays, their family is that of the whole drawing.
            yield key, re.sub(r"font-family: [^;]+(; |$)", "", text)
