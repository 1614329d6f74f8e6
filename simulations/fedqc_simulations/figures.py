"""The figure of a simulation: how predicted quality compares with the truth, and what was dropped."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Blue and orange of Okabe and Ito (2008), told apart by every kind of colour vision, and by shape in print.
FIRST = ("#0072B2", "o")
SECOND = ("#D55E00", "^")


Points = Sequence[tuple[float, float]]
"""True and predicted DSC."""


def draw_evaluation(
    path: Path, *, trained: Points, unseen: Points, kept: Points, dropped: Points, tau: float
) -> None:
    """Write an SVG with two panels: held-back cases, and the sites' candidates.

    Args:
        path: Of the SVG.
        trained: Held-back cases with kinds of error that were in training.
        unseen: Held-back cases with the other kinds.
        kept: Candidates that were kept.
        dropped: Candidates that were dropped.
        tau: The threshold.
    """
    figure = Figure(figsize=(11, 6), layout="compressed")
    left, right = figure.subplots(1, 2)
    _scatter(left, trained, "kinds of error in training", FIRST)
    _scatter(left, unseen, "kinds never trained on", SECOND)
    n_held_back = len(trained) + len(unseen)
    _finish(left, f"Held-back cases with every kind of error, n = {n_held_back}\nperfect: on the diagonal")
    _scatter(right, kept, "kept", FIRST)
    _scatter(right, dropped, "dropped", SECOND)
    for line in (right.axhline, right.axvline):
        line(tau, color="0.4", linewidth=0.8, linestyle="--")
    missed, wronged = (0.02, 0.96, "failures kept", "left"), (0.98, 0.05, "good ones\ndropped", "right")
    for x, y, text, side in (missed, wronged):
        right.text(x, y, text, ha=side, va="center", color="0.35", fontsize=9)
    n_candidates = len(kept) + len(dropped)
    _finish(
        right, f"Candidates of all sites, n = {n_candidates}\nempty corners: nothing missed, nothing lost"
    )
    figure.savefig(path, metadata={"Date": None})


def _scatter(axes: Axes, points: Points, label: str, style: tuple[str, str]) -> None:
    true, predicted = zip(*points, strict=True) if points else ((), ())
    color, marker = style
    axes.scatter(true, predicted, s=16, alpha=0.6, linewidths=0, color=color, marker=marker, label=label)


def _finish(axes: Axes, title: str) -> None:
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8, zorder=0)
    axes.set(
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="true DSC", ylabel="predicted DSC", aspect="equal"
    )
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(0, 0.93), fontsize=9, frameon=False)
