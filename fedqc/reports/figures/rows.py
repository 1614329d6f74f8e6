"""Numbers in rows with a name each: dots with intervals, the spread over cases, bands of intensities."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from fedqc.reports.figures.drawing import (
    BLUE,
    CROWDED,
    DARK,
    GOLDEN,
    GREY,
    PALE,
    WIDTH,
    drawn,
    name_rows,
    numbers,
    plain_number,
    row_height,
    row_texts,
    short,
)

MOST_MARKS = 200
"""Cases that a row of a strip shows one by one; of more only the outer ones."""
_MANY_FOLD = 30
"""Numbers that differ by more than this factor are drawn on a logarithmic axis."""


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


@drawn
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
        figsize=(WIDTH, 0.85 + (0.35 if legend else 0) + row_height(len(first)) * max(2, len(first))),
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
    name_rows(grid[0], [dot.name for dot in first])
    if legend:
        handles = [
            Line2D([], [], color=color, marker=marker, linestyle="none", markersize=8, label=label)
            for label, color, marker in legend
        ]
        figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    return figure


def _draw_dots(axes: Axes, dots: Sequence[Dot]) -> None:
    """Each in its row; all that look alike as one drawing, which of many sites is several times as fast."""
    size = 8 if len(dots) <= CROWDED else 5.5
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
            numbers([dots[row].value for row in rows]),
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
    row_texts(axes, 1.015, [dot.note for dot in dots], ha="left")


def _range(dots: Sequence[Dot], least: Sequence[float]) -> tuple[float, float]:
    """From the smallest to the largest of all that is drawn, and a little more."""
    values = [value for dot in dots for value in (dot.value, dot.low, dot.high, *dot.small)]
    known = [value for value in values if value is not None] + list(least)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.05
    return low - margin, high + margin


@drawn
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
    name_rows(grid[0], rows)
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
    axes.xaxis.set_major_formatter(plain_number)


@drawn
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
        axes.yaxis.set_major_formatter(plain_number)
        axes.grid(axis="y")
        axes.set_title(short(name))
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
