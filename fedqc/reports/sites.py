"""The sites side by side: what each kept and why not, how its self-test went, and what it left out."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedqc.curation.diagnosis import Kind
from fedqc.curation.guards import EMPTY, SIZES
from fedqc.metrics.filtering import share_interval
from fedqc.reports import figures
from fedqc.reports.page import Figure
from fedqc.reports.parts import by_site, dots_figure
from fedqc.reports.record import RunRecord, dash, decisions, first, more
from fedqc.reports.words import count, listed


def kept_share(scored: Mapping[str, Any]) -> tuple[float | None, float | None, float | None]:
    """The share of a site's annotations that is kept, and the ends of its interval; None where not told."""
    kept, candidates = decisions(scored)["keep"], scored.get("candidates")
    if kept is None or not candidates or kept > candidates:
        return None, None, None
    return (kept / candidates, *share_interval(kept, candidates))


def kept_figure(record: RunRecord) -> Figure:
    """Which share of its annotations each site kept."""
    scored = record.told("score")
    dots = [
        _with_look(figures.Dot(site, *kept_share(one), note=f"n = {count(one.get('candidates'))}"), one)
        for site, one in ((site, scored[site]) for site in first(scored))
    ]
    return dots_figure(
        "Share of the annotations that is kept",
        "Lines are 95 % intervals (Wilson 1927): how far the share may be from that of many further "
        "annotations like these, where those of one patient are not much alike; n is the number of "
        "annotations. Good: sites alike, or apart for a reason "
        "that they can name. Bad: a site whose interval lies far to the left of the others'. A cross at 1 is "
        "a site that kept everything since the model cannot be trusted there, which says nothing about its "
        f"annotations. {dash(record)}{more(scored)}",
        [("share kept", dots, (0.0, 1.0))],
        _legend(record),
    )


def self_test_figure(record: RunRecord) -> Figure:
    """How well the model does on each site's own scans, against what it has to reach there."""
    told = record.told("calibrate")
    sites = first(told)
    suspected = record.statistics.get("suspected") or {}
    curation = record.config.get("curation", {})
    least, most = curation.get("min_auroc"), curation.get("max_mae")

    def dots(key: str) -> list[figures.Dot]:
        scored = {site: record.sites[site].get("score", {}) for site in sites}
        return [_with_look(figures.Dot(site, told[site].get(key)), scored[site]) for site in sites]

    is_dsc = any("bias" in one for one in told.values())  # stars have none, and are not bound by the MAE
    lines = {
        name: (bound, f"{words} {bound:g}")
        for name, bound, words in (
            ("MAE", most if is_dsc else None, "at most"),
            ("AUROC of failures", least, "at least"),
        )
        if bound is not None
    }
    tested = (
        "Dashed: what the self-test of a site asks for before anything is dropped there. " if lines else ""
    )
    return dots_figure(
        "Predicted against known quality, site by site",
        "r: correlation of predicted and true DSC; MAE: mean absolute error of the predicted DSC; AUROC: how "
        f"often a failure is ranked below a good label. {tested}Good: r and AUROC near 1, "
        f"{'MAE below 0.1, ' if is_dsc else ''}"
        "sites alike. Bad: one site apart, since decisions there deserve less trust; or a cross, a site that "
        "kept everything, for the self-test or for want of labels that the rule rests on. "
        + (f"{listed(suspected)} calibrates nothing: its references look wrong. " if suspected else "")
        + dash(record)
        + more(told),
        [
            ("r", dots("r"), (0.8, 1.0)),
            ("MAE", dots("mae"), (0.0, 0.1)),
            ("AUROC of failures", dots("auroc"), (0.8, 1.0)),
        ],
        _legend(record),
        lines,
    )


def left_out_figure(record: RunRecord) -> Figure | None:
    """How many cases each site left out for which problem; None where none told of any."""
    return _counts_figure(
        record,
        "summarise",
        "left_out",
        "Cases left out, by problem",
        "How many cases of a site cannot be used, by the code of the problem (`fedqc check` at the site "
        "names them, and says how to mend them). Look for a column that many sites share, an instruction "
        "that was not clear, and for a site with a dark field, whose export went wrong.",
    )


def diagnosis_figure(record: RunRecord) -> Figure | None:
    """What is probably wrong with each site's labels that are not kept; None where none told of any."""
    return _counts_figure(
        record,
        "score",
        "diagnosis",
        "What is probably wrong with what is not kept",
        "How many annotations of a site that are not kept probably have which error (the site's review page "
        "names it for each case, with what would mend it). Look for a site with one dark field: that is one "
        "mistake, such as classes called by each other's names or an export that flips, and it can be mended "
        "at once. Errors that spread over the columns are work of many hands. Another patient's is what no "
        "error explains; unclear is what hardly differs from what the model would have, or a person dropped.",
        tuple(Kind),
    )


def sizes_figure(record: RunRecord) -> Figure | None:
    """What each site does not keep, by the size of its labels; None where none told of any."""
    return _counts_figure(
        record,
        "score",
        "not_kept",
        "What is not kept, by the size of its label",
        "Small, medium and large are thirds of a site's own labels, by volume. Good: as much of each. Bad: "
        "nearly all in one column: then the model, or the annotators, cannot tell small structures, say, and "
        "what is kept no longer stands for all patients.",
        (EMPTY, *SIZES),
    )


def _counts_figure(  # noqa: PLR0917 - what is counted, and what to say of it
    record: RunRecord, phase: str, table: str, title: str, caption: str, order: Sequence[str] = ()
) -> Figure | None:
    """The counts that sites told of named groups, such as `left_out.<code>`."""
    told = record.told(phase)
    keys = {key for one in told.values() for key in one if key.startswith(f"{table}.")}
    names = {key.removeprefix(f"{table}.") for key in keys}
    columns = [name for name in order if name in names] or sorted(names)
    counts = {site: [one.get(f"{table}.{name}") for name in columns] for site, one in told.items()}
    drawn = {site: counts[site] for site in first(told) if any(counts[site])}
    if not drawn:
        return None
    few = f"fewer than {record.min_count} patients" if record.min_count else "few patients"
    return Figure(
        title,
        f"{caption} An empty field is a number that was not told: none, or {few}; sites with empty fields "
        f"only are left out.{more(told)}",
        figures.count_map(drawn, [name.replace("-", " ") for name in columns], title.lower()),
        by_site(columns, counts),
    )


def _with_look(dot: figures.Dot, scored: Mapping[str, Any]) -> figures.Dot:
    """The dot of a site, a cross for one that kept everything."""
    return replace(dot, color=figures.VERMILLION, marker="X") if scored.get("curated") == 0 else dot


def _legend(record: RunRecord) -> list[tuple[str, str, str]]:
    if all(one.get("curated") != 0 for one in record.told("score").values()):
        return []
    return [("site", figures.BLUE, "o"), ("kept everything", figures.VERMILLION, "X")]
