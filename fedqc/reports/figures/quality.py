"""How good annotations are, site by site: distributions of quality, counts, decisions."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from fedqc.reports.figures.drawing import (
    BLUE,
    CROWDED,
    DARK,
    GREY,
    ORANGE,
    VERMILLION,
    WIDTH,
    drawn,
    name_rows,
    row_height,
    short,
    threshold_handles,
    threshold_line,
)

_BLUES = LinearSegmentedColormap.from_list("blues", ["#ffffff", "#9ecae8", BLUE, "#003a5c"])
_SMALL_TOO = PowerNorm(0.5, vmin=0, vmax=1)
"""Small shares are the rule and have to differ from none, whatever the largest one is."""


@drawn
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
        threshold_line(axes.axvline, threshold, "--")
        if keep_from is not None and keep_from != threshold:
            threshold_line(axes.axvline, keep_from, ":")
        axes.set_ylim(0, highest * 1.08)
    handles: list[Any] = [Patch(color=BLUE, label="annotations")]
    if any(number < 0 for counts in sites.values() for number in counts):
        label = "not told: few patients, or none"
        handles.append(Patch(facecolor="white", edgecolor=GREY, hatch="xxxx", label=label))
    handles += threshold_handles(threshold, keep_from)
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles))
    return figure


@drawn
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
        axes.set_title(short(name))
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    for axes in grid[-1]:
        axes.set_xlabel(x)
    for axes in grid[:, 0]:
        axes.set_ylabel(y)
    return figure, panels[: len(names)]


@drawn
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
    figure = Figure(figsize=(WIDTH, 1.1 + row_height(len(sites)) * len(sites)), layout="constrained")
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
    threshold_line(axes.axvline, threshold, "--")
    if keep_from is not None and keep_from != threshold:
        threshold_line(axes.axvline, keep_from, ":")
    axes.set(xlabel="predicted DSC", xlim=(0, 1), ylim=(len(sites) - 0.5, -0.5), xticks=edges[::2])
    name_rows(axes, list(sites))
    handles: list[Any] = [
        Patch(facecolor=_BLUES(_SMALL_TOO(share)), edgecolor=GREY, linewidth=0.6, label=f"{100 * share:g} %")
        for share in (0.0, 0.05, 0.25, 0.5, 1.0)
    ]
    handles.append(Patch(facecolor="white", edgecolor="#c4c4c4", hatch="////", label="not told"))
    handles += threshold_handles(threshold, keep_from)
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), columnspacing=1)
    return figure


@drawn
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
        figsize=(WIDTH, 0.75 + 0.068 * longest + row_height(len(rows)) * max(2, len(rows))),
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
    name_rows(axes, list(rows))
    return figure


@drawn
def decision_bars(sites: Mapping[str, Mapping[str, int | None]]) -> Figure:
    """A stacked bar for each site: how many annotations are kept, left to a person, dropped.

    Args:
        sites: for each the numbers under `keep`, `review`, `drop`; None is a number that may not be told.
    """
    figure = Figure(figsize=(WIDTH, 1.15 + row_height(len(sites)) * len(sites)), layout="constrained")
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
            if number > widest * 0.03 and len(sites) <= CROWDED:
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
    name_rows(axes, list(sites))
    figure.legend(
        handles=[Patch(**look) for look in looks.values()], loc="outside upper left", ncols=len(looks)
    )
    return figure
