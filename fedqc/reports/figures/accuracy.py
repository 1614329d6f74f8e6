"""How right the QC model is: predicted beside true DSC, agreement, risk and coverage."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fedqc.metrics.agreement import LimitsOfAgreement
from fedqc.reports.figures.drawing import (
    BLUE,
    DARK,
    GOLDEN,
    GREEN,
    GREY,
    VERMILLION,
    WIDTH,
    drawn,
    name_rows,
    short,
    threshold_handles,
    threshold_line,
)
from fedqc.statistics.pooled import THRESHOLDS, ProfileBin, RiskCoverage


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


@drawn
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


@drawn
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
    right.set_xticks(range(len(names)), [short(name, 14) for name in names])
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


@drawn
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
    name_rows(left, [one.name for one in means], length=32)
    right.tick_params(axis="y", length=0)
    handles = [
        Line2D([], [], color=DARK, marker="|", markersize=11, markeredgewidth=2.4, linestyle="none"),
        Line2D([], [], color=BLUE, marker="o", markersize=7.5, linestyle="none"),
        Line2D([], [], color=VERMILLION, marker="^", markersize=7.5, linestyle="none"),
    ]
    labels = ["true", "predicted, kind was in training", "predicted, kind never trained on"]
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


@drawn
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


@drawn
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
        threshold_line(right.axvline, threshold, "--")
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
        *threshold_handles(threshold, None),
    ]
    figure.legend(handles=by_threshold, loc="outside lower right", ncols=3, columnspacing=1)
    return figure


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
