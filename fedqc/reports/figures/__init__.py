"""The figures of a report: numbers in, SVG out."""

from fedqc.reports.figures.accuracy import (
    KindMeans,
    Points,
    agreement_panels,
    candidates,
    kinds,
    risk_coverage,
    scatter_panels,
)
from fedqc.reports.figures.course import (
    MOST_LINES,
    Curve,
    loss_curves,
    time_bars,
)
from fedqc.reports.figures.drawing import (
    BLUE,
    DARK,
    GREEN,
    GREY,
    MOST_NAMES,
    MOST_PANELS,
    ORANGE,
    PURPLE,
    VERMILLION,
    with_prefix,
)
from fedqc.reports.figures.quality import (
    count_map,
    decision_bars,
    label_histograms,
    quality_histograms,
    quality_map,
)
from fedqc.reports.figures.rows import (
    MOST_MARKS,
    Dot,
    dot_panels,
    intensity_bands,
    strips,
)

__all__ = [
    "BLUE",
    "DARK",
    "GREEN",
    "GREY",
    "MOST_LINES",
    "MOST_MARKS",
    "MOST_NAMES",
    "MOST_PANELS",
    "ORANGE",
    "PURPLE",
    "VERMILLION",
    "Curve",
    "Dot",
    "KindMeans",
    "Points",
    "agreement_panels",
    "candidates",
    "count_map",
    "decision_bars",
    "dot_panels",
    "intensity_bands",
    "kinds",
    "label_histograms",
    "loss_curves",
    "quality_histograms",
    "quality_map",
    "risk_coverage",
    "scatter_panels",
    "strips",
    "time_bars",
    "with_prefix",
]
