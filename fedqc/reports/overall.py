"""How good the QC model is over all sites, from what they told of labels of known quality."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.curation.calibration import Calibration
from fedqc.metrics.agreement import LimitsOfAgreement
from fedqc.reports import figures
from fedqc.reports.page import Figure, Note, Numbers, Part, Section, Table
from fedqc.reports.record import RunRecord, not_reached
from fedqc.reports.words import count, number, percent
from fedqc.statistics.pooled import (
    THRESHOLDS,
    ProfileBin,
    RiskCoverage,
    at_best,
    pooled_agreement,
    pooled_profile,
    profile_of,
    risk_coverage,
)

TITLE = "How good the QC model is, over all sites"


def overall_section(record: RunRecord) -> Section:
    """Calibration, agreement, and what is kept at which risk, from counts and means of all sites together."""
    intro = (
        "Each site spoiled labels of reference patients whom no training saw, had the model judge them, and "
        "told how predicted and true DSC agree: means and counts over several patients, never a single "
        "label. Here they are taken together, each site by its number of labels. Sites whose references look "
        "wrong have no part. Such errors are made up: how the model does on those of real annotators can "
        "differ."
    )
    told = {
        site: one
        for site, one in record.told("calibrate").items()
        if site not in (record.statistics.get("suspected") or {})
    }
    if not told:
        return Section("overall", TITLE, intro, (not_reached(record, "calibrate"),))
    parts: list[Part] = []
    limits = pooled_agreement(told.values())
    pooled = pooled_profile(told.values())
    if pooled:
        parts += [_agreement_figure(pooled, {site: profile_of(one) for site, one in told.items()}, limits)]
    calibrations = calibrations_of(record, told)
    curves = [risk_coverage(one) for one in calibrations or ()]
    if curves:
        parts.append(_risk_figure(record, *curves))
    if parts:
        parts.append(_overall_table(pooled, limits, curves))
    else:
        few = f"fewer than {record.min_count}" if record.min_count else "too few"
        parts.append(Note(f"No site may tell of it: each has {few} patients that it calibrates on."))
    return Section("overall", TITLE, intro, tuple(parts))


def _agreement_figure(
    pooled: list[ProfileBin], sites: dict[str, list[ProfileBin]], limits: LimitsOfAgreement | None
) -> Figure:
    every = {"all sites": pooled, **sites}
    columns = ("predicted DSC from", "to", "labels", "predicted DSC, mean", "true DSC, mean", "bias", "sd")
    rows = tuple(
        (site, one.low, one.high, one.n, one.predicted, one.true, round(one.bias, 6), one.sd)
        for site, bins in every.items()
        for one in bins
    )
    drawn = figures.agreement_panels(pooled, [one for bins in sites.values() for one in bins], limits)
    return Figure(
        "Predicted against known quality, all sites together",
        "Labels in five bins of predicted DSC; a blue mark with bars is the mean of a bin over all sites, a "
        "small grey one that of a site, larger for more labels. Left: what is predicted beside what is true; "
        "bars are one standard deviation of the difference. Good: all on the diagonal. Bad: below it (judged "
        "too mildly, failures pass), above it (too strictly), a flat row (the model knows nothing), or grey "
        "marks far apart (sites differ; look at each below). Right: the difference, predicted minus true; "
        "bars and the dashed lines hold 95 % of normal differences, the line between them is the mean over "
        "all labels. Good: all close to 0, bars short and equally long. Bad: a slope (poor labels are judged "
        "too mildly, good ones too strictly), or limits wider than the distance from your threshold to a "
        "good label. A bin that few patients have is not told.",
        drawn,
        Numbers(("site", *columns), rows),
    )


def calibrations_of(
    record: RunRecord, told: Mapping[str, Mapping[str, Any]]
) -> tuple[Calibration, Calibration] | None:
    """The pooled counts as they were told, and as good as they can be; the same where nothing was moved."""
    worst = record.calibration
    if worst is None:
        return None
    best = at_best(told.values()) if (record.min_count or 1) > 1 else None
    return worst, best or worst


def _risk_figure(record: RunRecord, worst: RiskCoverage, best: RiskCoverage) -> Figure:
    by_threshold = record.config.get("curation", {}).get("rule") in {"threshold", "weights"}
    moved = (
        " Sites move numbers of few patients to the cautious end before they tell them (`min_count` is "
        f"{record.min_count}): the lines are the worst that can be behind what they told, the bands reach to "
        "the best. A wide band means that too few patients calibrate to say more."
        if worst.aurc != best.aurc
        else ""
    )
    bound = "the threshold" if record.threshold is None else f"{record.threshold:g}"
    drawn = figures.risk_coverage(worst, best, record.threshold if by_threshold else None)
    return Figure(
        "How many failures are among what is kept",
        f"A failure is a label with a true DSC below {bound}; each patient counts once among the failures "
        "and once among the others, however many labels were spoiled. Left: the labels are kept from the "
        "best predicted one on; the further to the right, the more are kept. Good: near the green line, that "
        "is at 0 until only failures are left. Bad: near the dotted line, where keeping fewer labels does "
        f"not help. Failures were made on purpose, {percent(worst.failing)} here, so read the shape, not the "
        "height. Right: what each threshold drops. Good: a wide gap between the lines, failures high, "
        f"others low, and your threshold in it. Bad: lines close together.{moved}",
        drawn,
        _risk_numbers(worst, best),
    )


def _risk_numbers(worst: RiskCoverage, best: RiskCoverage) -> Numbers:
    """What each threshold keeps and drops; None where there is nothing to have a share of."""
    columns: dict[str, NDArray[np.float64]] = {"threshold": THRESHOLDS}
    for curve, which in ((worst, "at worst"), (best, "at best")):
        columns |= {
            f"share of the failures below, {which}": curve.failures_below,
            f"share of the others below, {which}": curve.others_below,
            f"coverage, {which}": curve.coverage,
            f"risk, {which}": curve.risk,
        }
    rows = zip(*(column.tolist() for column in columns.values()), strict=True)
    return Numbers(
        tuple(columns),
        tuple(tuple(None if math.isnan(one) else round(one, 6) for one in row) for row in rows),
    )


def _overall_table(
    pooled: list[ProfileBin],
    limits: LimitsOfAgreement | None,
    curves: Sequence[RiskCoverage],
) -> Table:
    known: list[tuple[str, float, str]] = []
    if limits:
        known += [
            ("labels judged", limits.n, count(limits.n)),
            ("bias: predicted minus true DSC, mean", limits.bias, f"{limits.bias:+.3f}"),
            ("its standard deviation", limits.sd, number(limits.sd)),
            ("lower limit of agreement", limits.lower, f"{limits.lower:+.3f}"),
            ("upper limit of agreement", limits.upper, f"{limits.upper:+.3f}"),
        ]
    if pooled:
        error = sum(one.n * abs(one.bias) for one in pooled) / sum(one.n for one in pooled)
        known.append(("calibration error: mean distance from the line", error, number(error)))
    if curves:
        worst, best = curves
        at_worst = ""
        if worst.aurc != best.aurc:
            at_worst = ", at worst"
            known.append(("AURC of this model, at best", best.aurc, number(best.aurc)))
        known += [
            (f"AURC of this model{at_worst}", worst.aurc, number(worst.aurc)),
            ("AURC of the best possible one", worst.least_aurc, number(worst.least_aurc)),
            ("AURC of one that knows nothing", worst.failing, number(worst.failing)),
        ]
    return Table(
        "The QC model in numbers, all sites together",
        ("number", "value"),
        tuple((name, text) for name, _, text in known),
        "Limits of agreement: 95 % of normal differences lie between them (Bland & Altman 1986). Calibration "
        "error: how far the mean of a bin is from the line, over the five bins by their labels. AURC: area "
        "under the risk-coverage curve (Geifman & El-Yaniv 2017), the mean share of failures among what is "
        "kept over all shares that one may keep; lower is better, and only the distance to the best possible "
        "one is the model's fault. Good: AURC much nearer to the best than to the one that knows nothing, a "
        "calibration error below 0.05.",
        exact=Numbers(("number", "value"), tuple((name, value) for name, value, _ in known)),
    )
