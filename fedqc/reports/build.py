"""What a coordinator learned in a run, as a report. It holds statistics of sites and nothing of a case."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedqc.reports import figures
from fedqc.reports.overall import overall_section
from fedqc.reports.page import (
    NUMBERS,
    Figure,
    Headline,
    KeyNumber,
    Note,
    Numbers,
    Part,
    Section,
    Table,
    Tone,
    Value,
    write_report,
)
from fedqc.reports.parts import by_site, dots_figure
from fedqc.reports.record import (
    FAULTS,
    OUTCOMES,
    RunRecord,
    around,
    dash,
    decisions,
    ending_sentence,
    first,
    more,
    not_reached,
    read_run,
)
from fedqc.reports.sites import (
    diagnosis_figure,
    kept_figure,
    kept_share,
    left_out_figure,
    self_test_figure,
    sizes_figure,
)
from fedqc.reports.words import (
    UNKNOWN,
    count,
    duration,
    kind_in_words,
    listed,
    mean_sd,
    moment,
    number,
    percent,
    percent_with_interval,
    plural,
    reason_in_words,
    rounds_in_words,
    rule_in_words,
    significant,
    stage_in_words,
    with_interval,
)
from fedqc.statistics.pooled import pooled_dice

UNTRAINED_R = 0.3
"""Where predicted and true quality correlate less than this, the model has learned nothing to speak of."""
UNTRAINED_DROPPED = 0.95
"""A model that keeps less than the rest of all annotations is more likely wrong than right."""
MOST_FAULTS = 200
FEW_PANELS = 3
"""Sites that small multiples show beside all of them together, where there are too many for all."""
NUMBERS_FOLDER = "report"
"""Beside the report: what each of its figures and tables shows, as numbers."""


def build_coordinator_report(
    run_folder: Path, path: Path | None = None, *, numbers: str | None = NUMBERS_FOLDER
) -> Path:
    """Write the report of a run, finished or not, from what is in its folder.

    Args:
        run_folder: of the run.
        path: of the report; None: `report.html` in the folder.
        numbers: name of the folder beside it for the numbers of figures and tables; None: they are left out.

    Returns:
        The report.
    """
    record = read_run(run_folder)
    path = path or run_folder / "report.html"
    title = f"fedqc: {record.run.get('federation', run_folder.name)}"
    write_report(
        path,
        title,
        coordinator_sections(record),
        headline=coordinator_headline(record),
        facts=facts(record),
        numbers=numbers,
    )
    return path


def coordinator_sections(record: RunRecord) -> list[Section]:
    """Every section that a coordinator can fill; a part that the run did not come to says so."""
    return [
        consortium_section(record),
        quality_section(record),
        overall_section(record),
        references_section(record),
        calibration_section(record),
        segmentation_section(record),
        training_section(record),
        faults_section(record),
        time_section(record),
        files_section(),
    ]


def facts(record: RunRecord) -> list[str]:
    """The line under the title: what ran, when, and for how long."""
    run, seconds = record.run, sum(record.run.get("seconds", {}).values())
    known = [
        f"task {record.config['task'].rsplit('/', 1)[-1]}" if "task" in record.config else None,
        f"seed {run['seed']}" if "seed" in run else None,
        f"started {moment(run['started'])}" if "started" in run else None,
        f"took {duration(seconds)}" if seconds else None,
        f"resumed {plural(record.resumed, 'time')}" if record.resumed else None,
        f"fedqc {run['versions']['fedqc']}" if "fedqc" in run.get("versions", {}) else None,
    ]
    return [fact for fact in known if fact]


# ------------------------------------------------------------------------------------------------ headline


def coordinator_headline(record: RunRecord) -> Headline:
    """What came out of the run, as far as a coordinator can know."""
    decided = total_decisions(record)
    kept, dropped = decided["keep"], decided["drop"] + decided["review"]
    notes = ending_notes(record) + untrained_notes(record) + suspected_notes(record)
    evaluated = record.told("evaluate.segmentation").values()
    numbers = [KeyNumber(f"{len(record.joined)} of {_expected(record)}", "sites took part")]
    if kept + dropped:
        note = "numbers that sites may not tell are not in it" if decided["hidden"] else ""
        numbers.append(KeyNumber(count(dropped), f"of {count(kept + dropped)} annotations dropped", note))
    losses = [one["loss"] for one in stages(record).get("qc", ()) if one.get("loss") is not None]
    if losses:
        numbers.append(
            KeyNumber(number(losses[-1]), f"QC training loss after {plural(len(losses), 'round')}")
        )
    if together := pooled_dice(evaluated):
        dice = [told["dice_mean"] for told in evaluated if "dice_mean" in told]
        worst_best = f"sites from {number(min(dice))} to {number(max(dice))}"
        numbers.append(KeyNumber(number(together.mean), "mean Dice of the segmentation", worst_best))
    return Headline(_coordinator_verdict(record), _tone(record, notes), tuple(numbers), tuple(notes))


def _coordinator_verdict(record: RunRecord) -> str:
    ending = ending_sentence(record)
    decided = total_decisions(record)
    n_sites, n_scored = len(record.joined), len(record.told("score"))
    if not n_scored:
        return f"{ending} No site has judged its annotations yet." if ending else "No site judged anything."
    total = decided["keep"] + decided["review"] + decided["drop"]
    at_least = "at least " if decided["hidden"] else ""
    review = f", {count(decided['review'])} are left to a person" if decided["review"] else ""
    where = f"all {n_sites}" if n_scored == n_sites else f"{n_scored} of {n_sites}"
    verdict = (
        f"{where[0].upper()}{where[1:]} sites judged their annotations: of {at_least}{count(total)}, "
        f"{at_least}{count(decided['drop'])} are dropped{review} and {count(decided['keep'])} kept."
    )
    return f"{ending} {verdict}" if ending else verdict


def _tone(record: RunRecord, notes: Sequence[Note]) -> Tone:
    if record.run.get("outcome") != "completed" or any(note.tone == "bad" for note in notes):
        return "bad"
    faults = any(event["event"] != "site-excused" for event in record.faults)
    return "caution" if faults or notes else "good"


def ending_notes(record: RunRecord) -> list[Note]:
    """Why the run did not complete, and what can be done."""
    if record.run.get("outcome") == "completed":
        return []
    reason = record.run.get("reason")
    because = f"Reason: {reason}. " if reason else ""
    return [
        Note(
            f"{because}What was finished before is below; what is missing was not reached. A run is taken up "
            "again where it stopped with `--resume` and its folder.",
            "bad",
        )
    ]


def untrained_notes(record: RunRecord, r: float | None = None) -> list[Note]:
    """A hint where the QC model has evidently learned nothing.

    Args:
        record: of the run.
        r: correlation of predicted and true DSC where a simulation knows it; else what the sites told.
    """
    decided = total_decisions(record)
    total = decided["keep"] + decided["review"] + decided["drop"]
    rs = sorted(told["r"] for told in record.told("calibrate").values() if "r" in told)
    if r is None and rs:
        r = rs[len(rs) // 2]
    signs = []
    not_kept = total - decided["keep"]
    if total and not_kept >= UNTRAINED_DROPPED * total:
        signs.append(f"{count(not_kept)} of {count(total)} annotations are not kept")
    if r is not None and r < UNTRAINED_R:
        signs.append(f"its predictions hardly follow the truth (r\u00a0=\u00a0{number(r, 2)})")
    if not signs:
        return []
    if _is_nothing_trained(record):
        text = f"The QC method cannot judge these labels: {listed(signs)}. Choose another one (`qc.method`)."
        return [Note(text, "bad")]
    effort = _qc_training(record)
    effort = f" It had {effort}." if effort else ""
    return [
        Note(
            f"The QC model looks untrained: {listed(signs)}.{effort} Do not use its decisions; train longer "
            "(`qc.rounds`, `qc.local_steps`).",
            "bad",
        )
    ]


def suspected_notes(record: RunRecord) -> list[Note]:
    """Sites whose references look wrong."""
    suspected = record.statistics.get("suspected", {})
    if not suspected:
        return []
    verb = "has" if len(suspected) == 1 else "have"
    return [
        Note(
            f"{listed(suspected)} {verb} references that look wrong; see the cross-check of references.",
            "caution",
        )
    ]


# ---------------------------------------------------------------------------------------------- consortium


def consortium_section(record: RunRecord) -> Section:
    """Who took part with what, and how the run was set up."""
    name = record.run.get("federation", "unnamed")
    intro = (
        f"Federation {name}: {plural(len(record.joined), 'site')} took part"
        f"{_left_out_in_words(record.left_out)}. Numbers about a site are those it told itself"
        f"{_min_count_in_words(record)}."
    )
    rows, exact = [], list[tuple[Value, ...]]()
    for site in record.sites:
        data, scored = record.sites[site].get("summarise", {}), record.sites[site].get("score", {})
        known = [*(data.get(key) for key in ("cases", "patients", "references")), scored.get("candidates")]
        codes = {key.partition(".")[2]: data[key] for key in data if key.startswith("left_out.")}
        left_out = ", ".join(f"{number_of} {code.replace('-', ' ')}" for code, number_of in codes.items())
        rows.append((site, *map(count, known), left_out or ("none told" if data else UNKNOWN)))
        exact.append((site, *known, left_out))
    rows += [(site, *[UNKNOWN] * 4, reason_in_words(why)) for site, why in record.left_out.items()]
    exact += [(site, *[None] * 4, reason_in_words(why)) for site, why in record.left_out.items()]
    parts: list[Part] = []
    if rows:
        columns = ("site", "cases", "patients", "references", "candidates", "cases or site left out")
        caption = (
            "References are cases whose label the site vouches for; candidates are those that it had judged. "
            f"{dash(record)}"
        )
        numbers = Numbers(columns, tuple(exact))
        parts.append(Table("The sites", columns, tuple(rows), caption, last_is_text=True, exact=numbers))
    if left_out_cases := left_out_figure(record):
        parts.append(left_out_cases)
    if volumes := _volumes(record):
        parts.append(volumes)
    if settings := _settings(record):
        parts.append(Table("The run", ("setting", "value"), settings, numeric=False))
    return Section("consortium", "The consortium", intro, tuple(parts))


def _volumes(record: RunRecord) -> Figure | None:
    """Mean volume of each class at each site."""
    data = record.told("summarise")
    classes = dict.fromkeys(
        key.split(".")[1] for told in data.values() for key in told if key.startswith("volume_ml.")
    )
    if not classes:
        return None
    sites, panels = first(data), []
    for name in list(classes)[:4]:
        dots = []
        for site in sites:
            mean, sd = (data[site].get(f"volume_ml.{name}.{what}") for what in ("mean", "sd"))
            low, high = around(mean, sd)
            dots.append(figures.Dot(site, mean, low, high))
        panels.append((f"{name} (ml)", dots, (0.0, 0.0)))
    return dots_figure(
        "How large the labelled structures are",
        "Mean volume of each class over the cases of a site, as labelled; lines are one standard deviation "
        "to each side. Look for a site that stands apart: it may have other patients, another protocol or "
        "other labelling rules, and the model may do worse there. Sites that agree are the easy case."
        f"{more(data)}",
        panels,
    )


def _settings(record: RunRecord) -> tuple[tuple[str, str], ...]:
    """The essentials of the configuration, in words."""
    config, run = record.config, record.run
    qc, curation = config.get("qc", {}), config.get("curation", {})
    segmentation = config.get("segmentation") or {}
    kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in qc.get("samples", {}).items() if share)
    known: list[tuple[str, str | None]] = [
        ("task", config.get("task")),
        ("QC method", qc.get("method") and qc["method"] + _network(qc)),
        (
            "QC training",
            "nothing is trained across the sites" if _is_nothing_trained(record) else _qc_training(record),
        ),
        ("labels it learned from", kinds or None),
        (
            "kinds of error kept out of training",
            listed(map(kind_in_words, qc.get("leave_out", ()))) or "none",
        ),
        ("averaging", config.get("averaging", {}).get("strategy")),
        ("rule", rule_in_words(curation)),
        ("segmentation training", _effort(segmentation)),
        (
            "fewest patients behind a number",
            None if record.min_count is None else str(record.min_count),
        ),
        ("seed", str(run["seed"]) if "seed" in run else None),
        ("outcome", run.get("outcome")),
        ("started", moment(run["started"]) if "started" in run else None),
        ("finished", moment(run["finished"]) if "finished" in run else None),
        ("versions", ", ".join(f"{name} {one}" for name, one in run.get("versions", {}).items()) or None),
        ("SHA-256 of the QC weights", _digest(run)),
    ]
    return tuple((name, value) for name, value in known if value) if config or run else ()


def _network(qc: Mapping[str, Any]) -> str:
    """Which of a method's networks it is, where it has several."""
    if qc["method"] not in {"qcresunet", "voxresnet"}:
        return ""
    return f", {qc.get('network', {}).get('architecture', 'default')} network"


def _is_nothing_trained(record: RunRecord) -> bool:
    """Whether the QC method has nothing that is trained."""
    rounds: int | None = record.run.get("models", {}).get("qc", {}).get("rounds")
    return rounds == 0


def _qc_training(record: RunRecord) -> str | None:
    """How the QC model was trained, in words; of a method of several parts the rounds of each."""
    parts = {
        stage.removeprefix("qc-"): rounds
        for stage, rounds in stages(record).items()
        if stage.startswith("qc-")
    }
    if parts:
        return listed([f"{plural(len(rounds), 'round')} of {part}" for part, rounds in parts.items()])
    return _effort(record.config.get("qc", {}))


def _effort(stage: Mapping[str, Any]) -> str | None:
    if not {"rounds", "local_steps"} <= stage.keys():
        return None
    batch = f" of {plural(stage['batch_size'], 'sample')}" if "batch_size" in stage else ""
    return f"{plural(stage['rounds'], 'round')} of {plural(stage['local_steps'], 'step')}{batch} at each site"


def _digest(run: Mapping[str, Any]) -> str | None:
    digest = run.get("models", {}).get("qc", {}).get("sha256")
    return f"{digest[:16]}\u2026" if digest else None


def _left_out_in_words(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ", none was left out"
    return f", {plural(len(left_out), 'was', 'were')} left out (the table says why)"


def _min_count_in_words(record: RunRecord) -> str:
    return f", none with fewer than {record.min_count} patients behind it" if record.min_count else ""


# ------------------------------------------------------------------------------------------------- quality


def quality_section(record: RunRecord) -> Section:
    """How good the annotations of each site are, by the model's judgement."""
    intro = (
        "The QC model predicts for every candidate how well its label would agree with a good one (DSC, "
        "from 0 to 1). Scores and decisions of single cases stay at the sites; these are the counts they "
        "tell."
    )
    scored = record.told("score")
    if not scored:
        return Section("quality", "Annotation quality", intro, (not_reached(record, "score"),))
    sites = first(scored)
    parts: list[Part] = []
    histograms = {site: scored[site]["quality"] for site in sites if "quality" in scored[site]}
    curation = record.config.get("curation", {})
    if histograms:
        by_threshold = curation.get("rule") in {"threshold", "weights"}
        threshold, review = record.threshold if by_threshold else None, curation.get("review") or 0.0
        keep_from = None if threshold is None else round(threshold + review, 6)
        if len(histograms) > figures.MOST_PANELS:
            totals = [scored[site].get("candidates") or 0 for site in histograms]
            drawn = figures.quality_map(histograms, totals, threshold=threshold, keep_from=keep_from)
        else:
            drawn = figures.quality_histograms(histograms, threshold=threshold, keep_from=keep_from)
        parts.append(
            Figure(
                "Predicted quality at each site",
                "How many annotations of a site have which predicted DSC. Good: a peak at the right, well "
                "above the threshold, and a separate small group at the left, which are the broken ones. "
                "Bad: a broad hill around the threshold (the model cannot decide, look at those cases by "
                "hand), or everything at the left (the model is not trained, or this site labels "
                "differently). Hatched bins are not told: they hold few patients, or none. "
                f"{_A_MAP if len(histograms) > figures.MOST_PANELS else ''}"
                f"{_silent(scored, sites, 'quality')}{more(scored)}",
                drawn,
                _histogram_numbers(histograms),
            )
        )
    decided = {site: decisions(scored[site]) for site in sites}
    parts += [
        Figure(
            "Kept, left to a person, dropped",
            "What became of each site's annotations. Look for a site that loses much more than the others: "
            "its annotations are worse, or the model does not fit its scans (see calibration). A review "
            f"counts as dropped until somebody decides.{more(scored)}",
            figures.decision_bars(decided),
            by_site(OUTCOMES, {site: [one[name] for name in OUTCOMES] for site, one in decided.items()}),
        ),
        kept_figure(record),
        *(figure for figure in (diagnosis_figure(record), sizes_figure(record)) if figure),
        *_gathering_notes(scored),
        _decision_table(record),
    ]
    return Section("quality", "Annotation quality", intro, tuple(parts))


def _gathering_notes(scored: Mapping[str, Mapping[str, Any]]) -> list[Note]:
    """Where what is not kept gathers in groups; which groups, the sites know."""
    where = [
        f"{site} ({plural(one['gatherings'], 'group')})"
        for site, one in scored.items()
        if one.get("gatherings")
    ]
    if not where:
        return []
    text = (
        f"What is not kept gathers in few groups of cases, such as those of one scanner, at {listed(where)}: "
        "the site's manifest names them. Ask for a look at some before you trust the decisions there."
    )
    return [Note(text, "caution")]


def total_decisions(record: RunRecord) -> dict[str, int]:
    """Over all sites, as far as they told; `hidden` is how many sites did not tell everything."""
    decided = [decisions(scored) for scored in record.told("score").values()]
    totals = {outcome: sum(one[outcome] or 0 for one in decided) for outcome in OUTCOMES}
    return totals | {"hidden": sum(None in one.values() for one in decided)}


def _histogram_numbers(histograms: Mapping[str, Sequence[int]]) -> Numbers:
    """The counts of each bin, which nobody knows where they are hidden."""
    n_bins = len(next(iter(histograms.values())))
    bins = [f"{index / n_bins:g} to {(index + 1) / n_bins:g}" for index in range(n_bins)]
    return by_site(
        bins,
        {site: [None if one < 0 else one for one in counts] for site, counts in histograms.items()},
    )


def _decision_table(record: RunRecord) -> Table:
    rows, exact = [], list[tuple[Value, ...]]()
    regions = _regions(record)
    decided = {site: decisions(scored) for site, scored in record.told("score").items()}
    for site, one in decided.items():
        told = record.sites[site]["score"]
        candidates, (share, *ends) = told.get("candidates"), kept_share(told)
        of_regions = [told.get(f"regions_mean.{region}") for region in regions]
        spread = told.get("quality_mean"), told.get("quality_sd")
        exact.append(
            (site, candidates, *one.values(), share, *ends, *spread, *of_regions, told.get("curated"))
        )
        rows.append(
            (
                f"{site} *" if told.get("curated") == 0 else site,
                count(candidates),
                *(count(one[outcome]) for outcome in OUTCOMES),
                percent_with_interval(share, ends),
                mean_sd(*spread),
                *map(number, of_regions),
            )
        )
    star = ""
    if any(record.sites[site]["score"].get("curated") == 0 for site in decided):
        star = (
            "A star: nothing was dropped, for the model failed the self-test of the site, or the rule had no "
            "labels of known quality to rest on; the site knows which. "
        )
    return Table(
        "Annotation quality in numbers",
        (
            "site",
            "candidates",
            "kept",
            "review",
            "dropped",
            "share kept (95 %)",
            "predicted DSC, mean \u00b1 sd",
            *regions,
        ),
        tuple(rows),
        f"{'The last columns are the predicted DSC of each region. ' if regions else ''}{star}{dash(record)}",
        exact=Numbers(
            (
                "site",
                "candidates",
                "kept",
                "review",
                "dropped",
                "share kept",
                "its 95 % interval from",
                "to",
                "predicted DSC, mean",
                "sd",
                *regions,
                "curated",
            ),
            tuple(exact),
        ),
    )


def _regions(record: RunRecord) -> list[str]:
    names = dict.fromkeys(
        key.partition(".")[2]
        for told in record.told("score").values()
        for key in told
        if key.startswith("regions_mean.")
    )
    return list(names)[:5]


# ---------------------------------------------------------------------------- references and calibration


def references_section(record: RunRecord) -> Section:
    """Whether the references can be trusted."""
    title = "References, cross-checked"
    intro = (
        "The QC model learns from labels that the sites vouch for. They are not taken on trust: models that "
        "never saw a site's references judge them."
    )
    suspected = record.statistics.get("suspected")
    checked = record.told("cross-check")
    if suspected is None and not checked:
        why = f" ({record.check_skipped})" if record.check_skipped else ""
        parts: tuple[Part, ...] = (Note(f"Not checked in this run{why}. {ending_sentence(record)}".strip()),)
        return Section("references", title, intro, parts)
    suspected = suspected or {}
    if suspected:
        sentences = [
            f"{site}: its {plural(one['references'], 'reference')} have a mean predicted DSC of "
            f"{number(one['quality'], 2)}, those of the other sites {number(one['others'], 2)}."
            for site, one in suspected.items()
        ]
        verdict = Note(
            f"The references of {listed(suspected)} look wrong. {' '.join(sentences)} "
            "Its calibration is not used. Have somebody look at these labels before the site takes part "
            "again.",
            "bad",
        )
    else:
        verdict = Note("No site's references stand out.", "good")
    sites = list(dict.fromkeys([*first(checked), *suspected]))
    dots = []
    for site in sites:
        told = checked.get(site, {})
        mean, sd = told.get("quality_mean", suspected.get(site, {}).get("quality")), told.get("quality_sd")
        low, high = around(mean, sd, highest=1.0)
        n_references = told.get("references", suspected.get(site, {}).get("references"))
        dots.append(
            figures.Dot(
                site,
                mean,
                low,
                high,
                note=f"n = {count(n_references)}" + ("  suspected" if site in suspected else ""),
                color=figures.VERMILLION if site in suspected else figures.BLUE,
                marker="X" if site in suspected else "o",
            )
        )
    legend = [("site", figures.BLUE, "o"), ("suspected: its references look wrong", figures.VERMILLION, "X")]
    figure = dots_figure(
        "What models that never saw them say of each site's references",
        "Mean predicted DSC of a site's references; lines are one standard deviation to each side. Good: all "
        "sites close together near 1. Bad: one site far to the left of the others, marked with a cross; its "
        f"references share an error that the others do not have. {dash(record)}{more(checked)}",
        [("predicted DSC of the references", dots, (0.5, 1.0))],
        legend if suspected else (),
    )
    return Section("references", title, intro, (verdict, figure) if sites else (verdict,))


def calibration_section(record: RunRecord) -> Section:
    """How well the model does at each site."""
    title = "Calibration at each site"
    intro = (
        "A quarter of a site's reference patients take no part in training. Their labels are degraded in "
        "known ways and judged, which shows how well the model does on this site's own scans."
    )
    told = record.told("calibrate")
    if not told:
        return Section("calibration", title, intro, (not_reached(record, "calibrate"),))
    keys = ("samples", "r", "mae", "rmse", "auroc", "bias", "difference_sd")
    passed = {1: "passed", 0: "kept everything"}
    curated = {site: record.sites[site].get("score", {}).get("curated") for site in told}
    table = Table(
        "Calibration in numbers",
        ("site", "labels judged", "r", "MAE", "RMSE", "AUROC", "bias", "limits of agreement", "self-test"),
        tuple(
            (
                site,
                count(one.get("samples")),
                *(number(one.get(key)) for key in ("r", "mae", "rmse", "auroc", "bias")),
                _limits_in_words(one.get("bias"), one.get("difference_sd")),
                passed.get(curated[site], UNKNOWN),
            )
            for site, one in told.items()
        ),
        "AUROC: of finding failures. Bias: mean of predicted minus true DSC; 95 % of normal differences lie "
        f"within the limits of agreement. {dash(record)}",
        last_is_text=True,
        exact=Numbers(
            ("site", *keys, "curated"),
            tuple((site, *(one.get(key) for key in keys), curated[site]) for site, one in told.items()),
        ),
    )
    return Section("calibration", title, intro, (self_test_figure(record), table))


def _limits_in_words(bias: float | None, sd: float | None) -> str:
    if bias is None or sd is None:
        return UNKNOWN
    return f"{bias - 1.96 * sd:+.2f} to {bias + 1.96 * sd:+.2f}"


# --------------------------------------------------------------------------------- segmentation, training


def segmentation_section(record: RunRecord) -> Section:
    """How good the segmentation model is that was trained on what was kept."""
    title = "Segmentation"
    intro = (
        "A segmentation model is trained by federated averaging on what every site kept. What curation "
        "changed cannot be told from this model alone: another run, with `curation.threshold = 0`, keeps "
        "everything, and a simulation compares what was kept with everything and with as many at random."
    )
    told = record.told("evaluate.segmentation")
    if not told:
        if record.run.get("outcome") == "completed" and "segmentation" not in stages(record):
            note = Note("This run trained no segmentation model.")
            return Section("segmentation", title, "Curation is for training on what is kept.", (note,))
        return Section("segmentation", title, intro, (not_reached(record, "evaluate.segmentation"),))
    sites = first(told)
    dots = []
    for site in sites:
        mean, sd = told[site].get("dice_mean"), told[site].get("dice_sd")
        low, high = around(mean, sd, highest=1.0)
        dots.append(figures.Dot(site, mean, low, high, note=f"n = {count(told[site].get('cases'))}"))
    figure = dots_figure(
        "Dice of the segmentation at each site",
        "Mean Dice, over the regions, of the model's own segmentation of reference cases that it was not "
        "trained on; lines are one standard deviation over the cases to each side. Good: high and alike. "
        "Bad: a site far below the others, where the model should not be used without a look at its results. "
        + dash(record)
        + more(told),
        [("Dice", dots, None)],
    )
    parts: list[Part] = [figure, _dice_table(told, _OF_A_REGION + dash(record))]
    if together := pooled_dice(told.values()):
        parts.insert(
            0,
            Note(
                f"Over all sites: a mean Dice of {with_interval(together.mean, together.interval)} on "
                f"{plural(together.n, 'reference case')}; in brackets the 95 % interval, as of cases that "
                "are independent of each other."
            ),
        )
    return Section("segmentation", title, intro, tuple(parts))


def _dice_table(told: Mapping[str, Mapping[str, Any]], caption: str) -> Table:
    """The segmentation in numbers: all sites together (see `pooled_dice`), then each."""
    regions = list(
        dict.fromkeys(
            key.partition(".")[2] for one in told.values() for key in one if key.startswith("dice.")
        )
    )
    rows: list[tuple[str, int | None, float | None, float | None, list[float | None]]] = []
    if together := pooled_dice(told.values()):
        rows.append(("all sites", together.n, together.mean, together.sd, [None] * len(regions)))
    rows += [
        (
            site,
            one.get("cases"),
            one.get("dice_mean"),
            one.get("dice_sd"),
            [one.get(f"dice.{region}") for region in regions],
        )
        for site, one in told.items()
    ]
    return Table(
        "Segmentation in numbers",
        ("site", "cases", "Dice, mean \u00b1 sd", *regions),
        tuple(
            (site, count(cases), mean_sd(mean, sd), *map(number, means))
            for site, cases, mean, sd, means in rows
        ),
        caption,
        exact=Numbers(
            ("site", "cases", "Dice, mean", "sd", *regions), tuple((*row, *means) for *row, means in rows)
        ),
    )


def stages(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each stage of training."""
    trained: dict[str, list[dict[str, Any]]] = record.statistics.get("train", {})
    return {stage: rounds for stage, rounds in trained.items() if rounds}


def training_section(record: RunRecord) -> Section:
    """The course of training."""
    intro = "In each round every site trains the current model on its own data, and the results are averaged."
    curves = []
    for stage, rounds in stages(record).items():
        names = dict.fromkeys(site for one in rounds for site in one.get("sites", {}))
        curves.append(
            figures.Curve(
                title=stage_in_words(stage),
                rounds=[one["round"] for one in rounds],
                loss=[one.get("loss") for one in rounds],
                sites={
                    site: [one.get("sites", {}).get(site, {}).get("losses", {}).get("loss") for one in rounds]
                    for site in names
                },
                failed=[one["round"] for one in rounds if one.get("failed")],
            )
        )
    if not curves:
        return Section("training", "Training", intro, (not_reached(record, "train.qc"),))
    banded = (
        f" Of more than {figures.MOST_LINES} sites no lines are drawn, but between which losses all of them "
        "lie, and the middle 80\u00a0%; a light band far above the dark one is a site of its own, which the "
        "numbers name."
        if any(len(curve.sites) > figures.MOST_LINES for curve in curves)
        else ""
    )
    caption = (
        "Good: falls quickly at first and then flattens, all sites together. Still falling at the end: more "
        "rounds would help. Bad: rises, jumps, or one site far above the others, whose data or labels "
        f"differ. A loss says how training went, not how good the model is on new cases.{banded}"
    )
    parts: list[Part] = [
        Figure("Training loss, round by round", caption, figures.loss_curves(curves), _curve_numbers(curves))
    ]
    parts += _training_labels(record)
    if spent := record.run.get("update_privacy"):
        worth = ", ".join(f"{significant(value)} ({stage})" for stage, value in spent["epsilon"].items())
        parts.append(
            Note(
                f"Updates were bounded and blurred: epsilon {worth} at delta {spent['delta']:g} for all "
                "updates of a site in a training. Below 1 hardly anything can be told from them about a "
                "site's data; far above 10 the noise promises nothing."
            )
        )
    return Section("training", "Training", intro, tuple(parts))


def _curve_numbers(curves: Sequence[figures.Curve]) -> Numbers:
    """A line a stage and round, a column a site."""
    sites = list(dict.fromkeys(site for curve in curves for site in curve.sites))
    return Numbers(
        ("stage", "round", "mean", "a site failed", *sites),
        tuple(
            (
                curve.title,
                number_of,
                curve.loss[index],
                int(number_of in curve.failed),
                *(curve.sites[site][index] if site in curve.sites else None for site in sites),
            )
            for curve in curves
            for index, number_of in enumerate(curve.rounds)
        ),
    )


def _training_labels(record: RunRecord) -> list[Part]:
    """The labels of known quality that the QC model was trained on, as far as sites told of them."""
    told: dict[str, list[tuple[Sequence[int], Sequence[int]]]] = {}
    sources: Counter[str] = Counter()
    for one in stages(record).get("qc", ()):
        for site, of_site in one.get("sites", {}).items():
            labels = of_site.get("labels", {})
            if {"made", "chosen"} <= labels.keys():
                told.setdefault(site, []).append((labels["made"], labels["chosen"]))
            for key in labels.keys() - {"made", "chosen"}:
                sources[key.removeprefix("sources.")] += labels[key]
    # In a round -1 stands for a small count that was not told.
    sums = {site: np.maximum(0, counts).sum(axis=0).tolist() for site, counts in told.items()}
    sites: dict[str, tuple[list[int], list[int]]] = {
        site: (made, chosen) for site, (made, chosen) in sums.items()
    }
    if not sites:
        return []
    shares = [f"{name} {one / sources.total():.0%}" for name, one in sources.most_common() if one]
    told_of = f" Sources: {listed(shares)}." if shares else ""
    shown = sites
    if len(sites) > figures.MOST_PANELS:
        together = [
            [sum(column) for column in zip(*(one[part] for one in sites.values()), strict=True)]
            for part in (0, 1)
        ]
        shown = {"all sites": (together[0], together[1])}
        shown |= dict(list(sites.items())[:FEW_PANELS])
    return [
        Figure(
            "Labels that the QC model learned from",
            "The true DSC of the labels that were made for training, and of those that balancing chose among "
            "them, over all rounds. Good: blue reaches from poor to good and is flatter than the line. Bad: "
            "a gap, a quality that the model has never seen; add a source of labels that fills it "
            f"(qc.samples).{told_of}{'' if shown is sites else _TOGETHER}",
            figures.label_histograms(shown),
            _label_numbers(sites),
        )
    ]


def _label_numbers(sites: Mapping[str, tuple[Sequence[int], Sequence[int]]]) -> Numbers:
    """Labels of each site by their true DSC."""
    return Numbers(
        ("site", "true DSC from", "to", "labels made", "labels trained on"),
        tuple(
            (site, index / len(made), (index + 1) / len(made), made[index], chosen[index])
            for site, (made, chosen) in sites.items()
            for index in range(len(made))
        ),
    )


# ------------------------------------------------------------------------------------- faults, time, files


def faults_section(record: RunRecord) -> Section:
    """What went wrong at which site, when and why."""
    intro = (
        "A site that fails, is late or sends something that cannot be used costs the run that site for that "
        "round; after three rounds in a row, for the phase. Everybody else goes on."
    )
    rows = fault_rows(record)
    if not rows:
        note = Note("No fault: every site answered every request.", "good")
        return Section("faults", "Faults", intro, (note,))
    caption = (
        f"{len(rows) - MOST_FAULTS} further lines are left out; `events.jsonl` has all."
        if len(rows) > MOST_FAULTS
        else ""
    )
    columns = ("site", "phase", "rounds", "what happened", "reason")
    table = Table("What went wrong, and where", columns, tuple(rows[:MOST_FAULTS]), caption, numeric=False)
    return Section("faults", "Faults", intro, (table,))


def fault_rows(record: RunRecord) -> list[tuple[str, ...]]:
    """Site, phase, rounds, what happened and why; the same in several rounds is one line."""
    found: dict[tuple[str, str, str, str], list[int]] = {}
    for event in record.faults:
        key = (
            str(event.get("site", UNKNOWN)),
            str(event.get("phase", UNKNOWN)),
            FAULTS[event["event"]],
            _fault_reason(event),
        )
        rounds = found.setdefault(key, [])
        if event.get("round"):
            rounds.append(event["round"])
    return [
        (site, phase, rounds_in_words(rounds), what, reason)
        for (site, phase, what, reason), rounds in found.items()
    ]


def _fault_reason(event: Mapping[str, Any]) -> str:
    if event["event"] == "site-suspected":
        return (
            f"mean predicted DSC of its references {number(event.get('quality'), 2)}, "
            f"of the others' {number(event.get('others'), 2)}"
        )
    reason = str(event.get("reason", UNKNOWN))
    words = event.get("meaning") or reason_in_words(reason)
    return words if words == reason else f"{words} (`{reason}`)"


def time_section(record: RunRecord, further: Sequence[tuple[str, float]] = ()) -> Section:
    """How long each phase took.

    Args:
        record: of the run.
        further: names and seconds of what is not a phase of the run itself; drawn apart.
    """
    seconds = record.run.get("seconds", {})
    bars = [(phase, float(spent), duration(spent)) for phase, spent in seconds.items()]
    total = sum(seconds.values())
    bars += [(name, spent, duration(spent)) for name, spent in further]
    if not bars:
        note = Note(f"No phase has finished. {ending_sentence(record)}".strip())
        return Section("time", "Time", "", (note,))
    intro = f"The phases of the run took {duration(total)} together."
    caption = "Training should take most of the time. A long wait in a phase of questions means slow sites."
    if further:
        caption += " Hatched bars are the arms of the comparison, which a run in hospitals does not have."
    return Section(
        "time",
        "Time",
        intro,
        (
            Figure(
                "Time spent in each phase",
                caption,
                figures.time_bars(bars, others="arm " if further else ""),
                Numbers(("phase", "seconds"), tuple((name, spent) for name, spent, _ in bars)),
            ),
        ),
    )


def files_section(further: Sequence[tuple[str, str]] = ()) -> Section:
    """What lies where in the run's folder."""
    rows = (
        ("`run.json`", "what was run, with what, how it ended"),
        ("`events.jsonl`", "every event of the run, a line each"),
        ("`statistics.json`", "what the sites told"),
        (
            f"`{NUMBERS_FOLDER}`",
            f"the numbers of this report: a CSV file of each figure and table, `{NUMBERS}` with all of them",
        ),
        ("`models/qc`", "the QC model"),
        ("`models/segmentation`", "the segmentation model, where one was trained"),
        *further,
    )
    return Section(
        "files",
        "Where to find what",
        "All of it lies beside this report. Scores, decisions and error maps of single cases stay at the "
        "sites.",
        (Table("Files", ("file", "what it holds"), tuple(rows), numeric=False, has_file=False),),
    )


# -------------------------------------------------------------------------------------------------- pieces

_OF_A_REGION = "The Dice of a region is a mean over the cases that hold it; their number is not told. "
_TOGETHER = f" All sites together, and the first {FEW_PANELS} of them."
_A_MAP = "Each row is a site; a bin is the darker, the larger its share of the site's annotations is. "


def _expected(record: RunRecord) -> int:
    expected = record.config.get("sites", {}).get("expected", ())
    return len({*expected, *record.joined, *record.left_out})


def _silent(scored: Mapping[str, Mapping[str, Any]], sites: Sequence[str], key: str) -> str:
    """Names the sites that told nothing of a key."""
    silent = [site for site in sites if key not in scored[site]]
    return f"{listed(silent)} may not tell any bin." if silent else ""
