"""Figures of the reproductions, as PNG."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fedqc.metrics.agreement import limits_of_agreement, pearson
from fedqc.ratings import FEWEST_STARS, MOST_STARS
from fedqc.reports.figures import BLUE, DARK, GREY, ORANGE
from fedqc_simulations.experiments.base import Judged

STYLE = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10}
BINS = np.linspace(0, 1, 11)


def draw_scatter(path: Path, title: str, judged: Sequence[Judged]) -> None:
    """Predicted against true DSC of all labels."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.6, 4.8), layout="constrained")
        axes = figure.subplots()
        axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
        true, predicted = [one.true for one in judged], [one.predicted for one in judged]
        axes.scatter(true, predicted, s=9, color=BLUE, alpha=0.45, linewidths=0)
        axes.set(
            xlim=(-0.02, 1.02),
            ylim=(-0.02, 1.02),
            xlabel="true DSC",
            ylabel="predicted DSC",
            title=f"{title}\nn = {len(judged)}",
            aspect="equal",
        )
        figure.savefig(path, dpi=150)


def draw_filter(path: Path, rows: Mapping[str, Sequence[Judged]], threshold: float) -> None:
    """Predicted against true DSC of several ways, with what is sorted out (Williams et al., Fig. 3).

    Args:
        path: of the PNG.
        rows: what each way said, by its title.
        threshold: DSC below which a label is a failure, and is sorted out where it is predicted.
    """
    with matplotlib.style.context(STYLE):
        columns = min(3, len(rows))
        lowest = min(threshold, *(min(one.true, one.predicted) for judged in rows.values() for one in judged))
        begin = max(0.0, math.floor(10 * lowest) / 10) - 0.02
        height = math.ceil(len(rows) / columns)
        figure = Figure(figsize=(3.0 * columns, 3.2 * height), layout="constrained")
        panels = figure.subplots(height, columns, squeeze=False, sharex=True, sharey=True).ravel()
        for axes, (title, judged) in zip(panels, rows.items(), strict=False):
            true, predicted = (
                np.array([getattr(one, name) for one in judged]) for name in ("true", "predicted")
            )
            axes.axhspan(begin, threshold, color=GREY, alpha=0.15, linewidth=0)
            axes.axvline(threshold, color=GREY, linewidth=1, linestyle="--")
            axes.plot([0, 1], [0, 1], color=GREY, linewidth=1)
            for failed, color, label in ((False, BLUE, "good"), (True, ORANGE, "failure")):
                some = (true < threshold) == failed
                axes.scatter(
                    true[some], predicted[some], s=11, color=color, alpha=0.6, linewidths=0, label=label
                )
            axes.set(xlim=(begin, 1.02), ylim=(begin, 1.02), title=title, aspect="equal")
            axes.xaxis.set_tick_params(labelbottom=True)
        for axes in panels[len(rows) :]:
            axes.set_axis_off()
        for axes in panels[: len(rows)]:
            axes.set_xlabel("true DSC")
        for axes in panels[::columns]:
            axes.set_ylabel("predicted DSC")
        panels[0].legend(frameon=False, loc="upper left", handletextpad=0.2)
        figure.suptitle(f"n = {len(next(iter(rows.values())))}; shaded: left for review", fontsize=10)
        figure.savefig(path, dpi=150)


@dataclass(frozen=True)
class Example:
    """A slice of a case, and what was predicted there; all `[X, Y]`."""

    true: float
    """DSC of the prediction in the whole case."""
    image: NDArray[np.floating]
    reference: NDArray[np.bool_]
    prediction: NDArray[np.bool_]
    uncertainty: NDArray[np.floating]
    error: NDArray[np.floating]


def draw_maps(path: Path, examples: Sequence[Example]) -> None:
    """Predictions with their uncertainty and error maps (Williams et al., Fig. 2)."""
    greatest = max(float(np.abs(one.error).max()) for one in examples) or 1.0
    most = max(float(one.uncertainty.max()) for one in examples) or 1.0
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 2.5 * len(examples)), layout="constrained")
        panels = figure.subplots(len(examples), 3, squeeze=False)
        for row, one in zip(panels, examples, strict=True):
            row[0].imshow(one.image.T, origin="lower", cmap="gray")
            for mask, color in ((one.reference, ORANGE), (one.prediction, BLUE)):
                if mask.any():
                    row[0].contour(mask.T, levels=[0.5], colors=[color], linewidths=1)
            doubt = row[1].imshow(one.uncertainty.T, origin="lower", cmap="magma", vmin=0, vmax=most)
            error = row[2].imshow(one.error.T, origin="lower", cmap="RdBu", vmin=-greatest, vmax=greatest)
            row[0].set_ylabel(f"true DSC {one.true:.2f}")
            for axes in row:
                axes.set(xticks=[], yticks=[])
        titles = ("image", "uncertainty", "error")
        figure.suptitle("reference orange, prediction blue", fontsize=10)
        for axes, title in zip(panels[0], titles, strict=True):
            axes.set_title(title, fontsize=10)
        figure.colorbar(doubt, ax=panels[:, 1], shrink=0.6, location="bottom")
        figure.colorbar(error, ax=panels[:, 2], shrink=0.6, location="bottom")
        figure.savefig(path, dpi=150)


def draw_indicator(path: Path, judged: Sequence[Judged]) -> None:
    """Quality indicator against accuracy and against DSC (Zhang & Chung 2019, Fig. 4)."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(8.4, 4.0), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, name, label in zip(
            panels, ("accuracy", "true"), ("voxel accuracy", "true DSC"), strict=True
        ):
            for source, color, shown in (("side-outputs", BLUE, "made"), ("reference", ORANGE, "references")):
                group = [one for one in judged if one.source == source]
                x, y = [getattr(one, name) for one in group], [one.indicator for one in group]
                axes.scatter(x, y, s=9, color=color, alpha=0.5, linewidths=0, label=shown)
            axes.set(xlabel=label, ylabel="quality indicator (QI)")
        panels[0].legend(frameon=False)
        figure.savefig(path, dpi=150)


def draw_balance(path: Path, title: str, before: NDArray[np.floating], after: NDArray[np.floating]) -> None:
    """The distribution of DSC before and after balancing (Qiu et al. 2023, Fig. 2)."""
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, values, name, color in zip(
            panels, (before, after), ("as made", "balanced"), (ORANGE, BLUE), strict=True
        ):
            share = np.full(len(values), 100 / max(1, len(values)))
            axes.hist(values, bins=BINS, weights=share, color=color, edgecolor="white", linewidth=0.8)
            axes.set(xlabel="true DSC", title=f"{name} (n = {len(values)})", xlim=(0, 1))
            axes.tick_params(colors=DARK)
        panels[0].set_ylabel("labels, %")
        figure.suptitle(f"{title[0].upper()}{title[1:]} labels")
        figure.savefig(path, dpi=150)


def draw_comparison(
    path: Path, points: Mapping[str, Mapping[str, tuple[float | None, float | None]]]
) -> None:
    """Methods side by side: how well each finds failures, and how far its quality is off.

    Args:
        path: of the PNG.
        points: by consortium (one or two) and method, AUROC and mean absolute error; None where there is
            none.
    """
    methods = list(next(iter(points.values())))
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(9.6, 1.6 + 0.36 * len(methods)), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, position, label in zip(
            panels, (0, 1), ("AUROC of finding failures", "mean absolute error of the DSC"), strict=True
        ):
            apart = 0.12 if len(points) > 1 else 0  # none hides another
            styles = ((BLUE, "o", -apart), (ORANGE, "D", apart))
            for (noise, found), (color, marker, lower) in zip(points.items(), styles, strict=False):
                pairs = [(found[name][position], row + lower) for row, name in enumerate(methods)]
                shown = [(value, row) for value, row in pairs if value is not None]
                x, y = [value for value, _ in shown], [row for _, row in shown]
                label_once = noise if position == 0 else None
                axes.scatter(
                    x, y, s=42, color=color, marker=marker, label=label_once, zorder=3, clip_on=False
                )
            axes.set(xlabel=label)
            axes.grid(axis="y", color=GREY, alpha=0.3, linewidth=0.6)
        panels[0].set_yticks(range(len(methods)), methods)
        panels[0].set(xlim=(None, 1.0))
        panels[1].set(xlim=(0, None))
        panels[0].invert_yaxis()
        if len(points) > 1:
            figure.legend(frameon=False, loc="outside upper center", ncols=2, title="candidates spoiled")
        figure.savefig(path, dpi=150)


def draw_agreement(path: Path, title: str, predicted: Sequence[float], rated: Sequence[float]) -> None:
    """Bland-Altman plot of two ratings: mean difference and limits of agreement, where they are defined."""
    first, second = np.array(predicted), np.array(rated)
    limits = limits_of_agreement(first, second)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        axes = figure.subplots()
        axes.scatter((first + second) / 2, first - second, s=12, color=BLUE, alpha=0.5, linewidths=0)
        axes.set(
            xlim=(FEWEST_STARS - 0.1, MOST_STARS + 0.1),
            xlabel="mean of prediction and mean rater, stars",
            ylabel="prediction minus mean rater, stars",
            title=f"{title} (n = {len(first)})",
        )
        lines = (
            {}
            if limits is None
            else {"mean": limits.bias, "mean + 1.96 SD": limits.upper, "mean - 1.96 SD": limits.lower}
        )
        for name, value in lines.items():
            axes.axhline(value, color=DARK if name == "mean" else ORANGE, linewidth=1.2, zorder=1)
            axes.annotate(
                f"{name}\n{value:+.2f}",
                (1.01, value),
                xycoords=("axes fraction", "data"),
                va="center",
                fontsize=9,
                color=DARK,
            )
        figure.savefig(path, dpi=150)


def draw_stars(
    path: Path, title: str, truth: Sequence[float], predicted: Sequence[float], label: str
) -> None:
    """Predicted stars against what they are held against, with the line of least squares.

    Args:
        path: of the PNG.
        title: of the model.
        truth: what each label has: stars of raters, or DSC.
        predicted: stars of each label.
        label: what `truth` is.
    """
    x, y = np.array(truth), np.array(predicted)
    r = pearson(x, y)
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(4.8, 4.6), layout="constrained")
        axes = figure.subplots()
        axes.scatter(x, y, s=12, color=BLUE, alpha=0.5, linewidths=0)
        if r is not None:
            slope, start = np.polyfit(x, y, 1)
            ends = np.array([x.min(), x.max()])
            axes.plot(ends, slope * ends + start, color=ORANGE, linewidth=1.5)
        shown = "" if r is None else f", r = {r:.2f}"
        axes.set(
            ylim=(FEWEST_STARS - 0.1, MOST_STARS + 0.1),
            xlabel=label,
            ylabel="predicted stars, mean of the views",
            title=f"{title}\nn = {len(x)}{shown}",
        )
        axes.title.set_fontsize(10)
        figure.savefig(path, dpi=150)
