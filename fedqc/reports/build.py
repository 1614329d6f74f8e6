"""What a coordinator learned in a run, as a report. It holds statistics of sites and nothing of a case."""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from fedqc.reports import figures
from fedqc.reports.page import Figure, Headline, KeyNumber, Note, Part, Section, Table, Tone, write_report
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
    plural,
    reason_in_words,
    rounds_in_words,
    rule_in_words,
    significant,
    stage_in_words,
)

OUTCOMES = ("keep", "review", "drop")
UNTRAINED_R = 0.3
"""Where predicted and true quality correlate less than this, the model has learned nothing to speak of."""
UNTRAINED_DROPPED = 0.95
"""A model that keeps less than the rest of all annotations is more likely wrong than right."""
MOST_FAULTS = 200

_FAULTS = {
    "site-left-out": "left out of the run",
    "site-failed": "gave no usable answer",
    "site-out": "out of this phase after three rounds in a row without it",
    "site-suspected": "its references look wrong",
    "site-excused": "takes no part in this phase, no fault of its own",
}


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds; whatever is missing is empty."""

    run: dict[str, Any]
    statistics: dict[str, Any]
    faults: tuple[dict[str, Any], ...] = ()
    """The events that cost a site something, in their order."""
    last_phase: str | None = None
    """The phase that started last."""
    last_round: tuple[int, int] | None = None
    """The round that started last in it, and how many were planned."""
    check_skipped: str | None = None
    """Why the references were not cross-checked."""
    resumed: int = 0
    """How often the run was taken up again."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each site told, by phase; those that joined first, then any other."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        config: dict[str, Any] = self.run.get("config", {})
        return config

    @property
    def joined(self) -> list[str]:
        """The sites that took part."""
        return list(self.run.get("sites", {}).get("joined", ()))

    @property
    def left_out(self) -> dict[str, str]:
        """The sites that did not, with the reason."""
        return dict(self.run.get("sites", {}).get("left_out", {}))

    @property
    def min_count(self) -> int | None:
        """Fewest patients behind a number that a site tells."""
        found: int | None = self.config.get("privacy", {}).get("min_count")
        return found

    @property
    def threshold(self) -> float | None:
        """The lowest predicted DSC that is not dropped."""
        found: float | None = self.config.get("curation", {}).get("threshold")
        return found

    def told(self, phase: str) -> dict[str, dict[str, Any]]:
        """What each site told in a phase, for those that told anything."""
        return {site: phases[phase] for site, phases in self.sites.items() if phases.get(phase)}


def read_run(folder: Path) -> RunRecord:
    """Read what a run has written so far; a run may have ended anywhere."""
    run, statistics = _json(folder / "run.json"), _json(folder / "statistics.json")
    faults, last_phase, last_round, check_skipped, resumed = [], None, None, None, 0
    for event in _events(folder / "events.jsonl"):
        name = event.get("event")
        if name in _FAULTS:
            faults.append(event)
        elif name == "phase-started":
            last_phase, last_round = event.get("phase"), None
        elif name == "round-started":
            last_round = (event.get("round", 0), event.get("rounds", 0))
        elif name == "phase-skipped" and event.get("phase") == "cross-check":
            check_skipped = event.get("reason")
        elif name == "run-resumed":
            resumed += 1
    told = statistics.get("sites", {})
    names = [*run.get("sites", {}).get("joined", ()), *told]
    sites = {name: told.get(name, {}) for name in dict.fromkeys(names)}
    return RunRecord(run, statistics, tuple(faults), last_phase, last_round, check_skipped, resumed, sites)


def build_coordinator_report(run_folder: Path, path: Path | None = None) -> Path:
    """Write the report of a run, finished or not, from what is in its folder.

    Args:
        run_folder: of the run.
        path: of the report; None: `report.html` in the folder.

    Returns:
        The report.
    """
    record = read_run(run_folder)
    path = path or run_folder / "report.html"
    title = f"fedqc: {record.run.get('federation', run_folder.name)}"
    write_report(
        path,
        title,
        coordinator_sections(run_folder),
        headline=coordinator_headline(record),
        facts=facts(record),
    )
    return path


def coordinator_sections(run_folder: Path) -> list[Section]:
    """Every section that a coordinator can fill; a part that the run did not come to says so."""
    record = read_run(run_folder)
    return [
        consortium_section(record),
        quality_section(record),
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
    dice = [
        told["dice_mean"] for told in record.told("evaluate.segmentation").values() if "dice_mean" in told
    ]
    numbers = [KeyNumber(f"{len(record.joined)} of {_expected(record)}", "sites took part")]
    if kept + dropped:
        note = "numbers that sites may not tell are not in it" if decided["hidden"] else ""
        numbers.append(KeyNumber(count(dropped), f"of {count(kept + dropped)} annotations dropped", note))
    losses = [one["loss"] for one in stages(record).get("qc", ()) if one.get("loss") is not None]
    if losses:
        numbers.append(
            KeyNumber(number(losses[-1]), f"QC training loss after {plural(len(losses), 'round')}")
        )
    if dice:
        worst_best = f"sites from {number(min(dice))} to {number(max(dice))}"
        numbers.append(KeyNumber(number(sum(dice) / len(dice)), "mean Dice of the segmentation", worst_best))
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


def ending_sentence(record: RunRecord) -> str:
    """How a run ended that did not end well; empty where it completed."""
    outcome, reason = record.run.get("outcome"), record.run.get("reason")
    where = ""
    if record.last_phase:
        where = f" in phase {record.last_phase}"
        if record.last_round:
            where += f", round {record.last_round[0]} of {record.last_round[1]}"
    if outcome == "completed":
        return ""
    if outcome == "failed":
        return f"The run failed{where}."
    if outcome == "interrupted":
        return f"The run was interrupted{where}."
    if outcome is None:
        return "There is no run.json: the run never started, or this is not a run's folder."
    return (
        f"The run has not ended: it is still at work{where}, or was killed there ({reason or 'no reason'})."
    )


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
    rows = []
    for site in _first(record.sites):
        data, scored = record.sites[site].get("summarise", {}), record.sites[site].get("score", {})
        codes = {key.partition(".")[2]: data[key] for key in data if key.startswith("left_out.")}
        left_out = ", ".join(f"{number_of} {code.replace('-', ' ')}" for code, number_of in codes.items())
        rows.append(
            (
                site,
                *(count(data.get(key)) for key in ("cases", "patients", "references")),
                count(scored.get("candidates")),
                left_out or ("none told" if data else UNKNOWN),
            )
        )
    rows += [(site, *[UNKNOWN] * 4, reason_in_words(why)) for site, why in record.left_out.items()]
    parts: list[Part] = []
    if rows:
        columns = ("site", "cases", "patients", "references", "candidates", "cases or site left out")
        caption = (
            "References are cases whose label the site vouches for; candidates are those that it had judged. "
            f"{_dash(record)}{_more(record.sites)}"
        )
        parts.append(Table("The sites", columns, tuple(rows), caption, last_is_text=True))
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
    sites, panels = _first(data), []
    for name in list(classes)[:4]:
        dots = []
        for site in sites:
            mean, sd = (data[site].get(f"volume_ml.{name}.{what}") for what in ("mean", "sd"))
            low, high = _around(mean, sd)
            dots.append(figures.Dot(site, mean, low, high))
        panels.append((f"{name} (ml)", dots, (0.0, 0.0)))
    return Figure(
        "How large the labelled structures are",
        "Mean volume of each class over the cases of a site, as labelled; lines are one standard deviation "
        "to each side. Look for a site that stands apart: it may have other patients, another protocol or "
        "other labelling rules, and the model may do worse there. Sites that agree are the easy case.",
        figures.dot_panels(panels),
    )


def _settings(record: RunRecord) -> tuple[tuple[str, str], ...]:
    """The essentials of the configuration, in words."""
    config, run = record.config, record.run
    qc, curation = config.get("qc", {}), config.get("curation", {})
    segmentation = config.get("segmentation") or {}
    kinds = ", ".join(f"{kind} {percent(share)}" for kind, share in qc.get("samples", {}).items())
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
        return Section("quality", "Annotation quality", intro, (_not_reached(record, "score"),))
    sites = _first(scored)
    parts: list[Part] = []
    histograms = {site: scored[site]["quality"] for site in sites if "quality" in scored[site]}
    curation = record.config.get("curation", {})
    if histograms:
        by_threshold = curation.get("rule") in {"threshold", "weights"}
        threshold, review = record.threshold if by_threshold else None, curation.get("review") or 0.0
        parts.append(
            Figure(
                "Predicted quality at each site",
                "How many annotations of a site have which predicted DSC. Good: a peak at the right, well "
                "above the threshold, and a separate small group at the left, which are the broken ones. "
                "Bad: a broad hill around the threshold (the model cannot decide, look at those cases by "
                "hand), or everything at the left (the model is not trained, or this site labels "
                "differently). Hatched bins are not told: they hold few patients, or none. "
                f"{_silent(scored, sites, 'quality')}{_more(histograms, figures.MOST_PANELS)}",
                figures.quality_histograms(
                    dict(list(histograms.items())[: figures.MOST_PANELS]),
                    threshold=threshold,
                    keep_from=None if threshold is None else round(threshold + review, 6),
                ),
            )
        )
    decided = {site: decisions(scored[site]) for site in sites}
    parts += [
        Figure(
            "Kept, left to a person, dropped",
            "What became of each site's annotations. Look for a site that loses much more than the others: "
            "its annotations are worse, or the model does not fit its scans (see calibration). A review "
            "counts as dropped until somebody decides.",
            figures.decision_bars(decided),
        ),
        _decision_table(record, decided),
    ]
    return Section("quality", "Annotation quality", intro, tuple(parts))


def decisions(scored: Mapping[str, Any]) -> dict[str, int | None]:
    """How many annotations of a site are kept, in review and dropped; None is a number it may not tell."""
    told = {outcome: scored.get(f"decisions.{outcome}") for outcome in OUTCOMES}
    known = sum(number_of for number_of in told.values() if number_of is not None)
    # An outcome that nobody has is not told either; where the others are everybody, it is 0.
    missing = 0 if known == scored.get("candidates") else None
    return {outcome: missing if one is None else one for outcome, one in told.items()}


def total_decisions(record: RunRecord) -> dict[str, int]:
    """Over all sites, as far as they told; `hidden` is how many sites did not tell everything."""
    decided = [decisions(scored) for scored in record.told("score").values()]
    totals = {outcome: sum(one[outcome] or 0 for one in decided) for outcome in OUTCOMES}
    return totals | {"hidden": sum(None in one.values() for one in decided)}


def _decision_table(record: RunRecord, decided: Mapping[str, Mapping[str, int | None]]) -> Table:
    rows = []
    for site, one in decided.items():
        told = record.sites[site]["score"]
        candidates, keep = told.get("candidates"), one["keep"]
        rows.append(
            (
                f"{site} *" if told.get("curated") == 0 else site,
                count(candidates),
                *(count(one[outcome]) for outcome in OUTCOMES),
                percent(1 - keep / candidates) if candidates and keep is not None else UNKNOWN,
                mean_sd(told.get("quality_mean"), told.get("quality_sd")),
                *(number(told.get(f"regions_mean.{region}")) for region in _regions(record)),
            )
        )
    regions = _regions(record)
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
            "share not kept",
            "predicted DSC, mean \u00b1 sd",
            *regions,
        ),
        tuple(rows),
        f"{'The last columns are the predicted DSC of each region. ' if regions else ''}"
        f"{star}"
        f"{_dash(record)}{_more(record.told('score'))}",
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
    sites = list(dict.fromkeys([*_first(checked), *suspected]))
    dots = []
    for site in sites:
        told = checked.get(site, {})
        mean, sd = told.get("quality_mean", suspected.get(site, {}).get("quality")), told.get("quality_sd")
        low, high = _around(mean, sd, highest=1.0)
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
    figure = Figure(
        "What models that never saw them say of each site's references",
        "Mean predicted DSC of a site's references; lines are one standard deviation to each side. Good: all "
        "sites close together near 1. Bad: one site far to the left of the others, marked with a cross; its "
        f"references share an error that the others do not have. {_dash(record)}{_more(checked)}",
        figures.dot_panels(
            [("predicted DSC of the references", dots, (0.5, 1.0))], legend if suspected else ()
        ),
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
        return Section("calibration", title, intro, (_not_reached(record, "calibrate"),))
    suspected = record.statistics.get("suspected") or {}
    sites = _first(told)

    def dots(key: str) -> list[figures.Dot]:
        return [figures.Dot(site, told[site].get(key)) for site in sites]

    figure = Figure(
        "Predicted against known quality, site by site",
        "r: correlation of predicted and true DSC; MAE: mean absolute error of the predicted DSC; AUROC: how "
        "often a failure is ranked below a good label. Good: r and AUROC near 1, MAE below 0.1, sites alike. "
        "Bad: one site apart, since decisions there deserve less trust. "
        + (f"{listed(suspected)} calibrates nothing: its references look wrong. " if suspected else "")
        + _dash(record),
        figures.dot_panels(
            [
                ("r", dots("r"), (0.8, 1.0)),
                ("MAE", dots("mae"), (0.0, 0.1)),
                ("AUROC of failures", dots("auroc"), (0.8, 1.0)),
            ]
        ),
    )
    table = Table(
        "Calibration in numbers",
        ("site", "labels judged", "r", "MAE", "RMSE", "AUROC of failures"),
        tuple(
            (
                site,
                count(told[site].get("samples")),
                *(number(told[site].get(key)) for key in ("r", "mae", "rmse", "auroc")),
            )
            for site in sites
        ),
        f"{_dash(record)}{_more(told)}",
    )
    return Section("calibration", title, intro, (figure, table))


# --------------------------------------------------------------------------------- segmentation, training


def segmentation_section(record: RunRecord) -> Section:
    """How good the segmentation model is that was trained on what was kept."""
    title = "Segmentation"
    intro = "A segmentation model is trained by federated averaging on what every site kept."
    told = record.told("evaluate.segmentation")
    if not told:
        if record.run.get("outcome") == "completed" and "segmentation" not in stages(record):
            note = Note("This run trained no segmentation model.")
            return Section("segmentation", title, "Curation is for training on what is kept.", (note,))
        return Section("segmentation", title, intro, (_not_reached(record, "evaluate.segmentation"),))
    sites = _first(told)
    regions = dict.fromkeys(
        key.partition(".")[2] for one in told.values() for key in one if key.startswith("dice.")
    )
    dots = []
    for site in sites:
        mean, sd = told[site].get("dice_mean"), told[site].get("dice_sd")
        low, high = _around(mean, sd, highest=1.0)
        dots.append(figures.Dot(site, mean, low, high, note=f"n = {count(told[site].get('cases'))}"))
    figure = Figure(
        "Dice of the segmentation at each site",
        "Mean Dice, over the regions, of the model's own segmentation of reference cases that it was not "
        "trained on; lines are one standard deviation over the cases to each side. Good: high and alike. "
        "Bad: a site far below the others, where the model should not be used without a look at its results. "
        + _dash(record),
        figures.dot_panels([("Dice", dots, None)]),
    )
    table = Table(
        "Segmentation in numbers",
        ("site", "cases", "Dice, mean \u00b1 sd", *regions),
        tuple(
            (
                site,
                count(told[site].get("cases")),
                mean_sd(told[site].get("dice_mean"), told[site].get("dice_sd")),
                *(number(told[site].get(f"dice.{region}")) for region in regions),
            )
            for site in sites
        ),
        f"{_dash(record)}{_more(told)}",
    )
    return Section("segmentation", title, intro, (figure, table))


def stages(record: RunRecord) -> dict[str, list[dict[str, Any]]]:
    """The rounds of each stage of training."""
    trained: dict[str, list[dict[str, Any]]] = record.statistics.get("train", {})
    return {stage: rounds for stage, rounds in trained.items() if rounds}


def training_section(record: RunRecord) -> Section:
    """The course of training."""
    intro = "In each round every site trains the current model on its own data, and the results are averaged."
    curves = []
    for stage, rounds in stages(record).items():
        names = _first(dict.fromkeys(site for one in rounds for site in one.get("sites", {})))
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
        return Section("training", "Training", intro, (_not_reached(record, "train.qc"),))
    caption = (
        "Good: falls quickly at first and then flattens, all sites together. Still falling at the end: more "
        "rounds would help. Bad: rises, jumps, or one site far above the others, whose data or labels "
        "differ. A loss says how training went, not how good the model is on new cases."
    )
    parts: list[Part] = [Figure("Training loss, round by round", caption, figures.loss_curves(curves))]
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


def _training_labels(record: RunRecord) -> list[Part]:
    """The labels of known quality that the QC model was trained on, as far as sites told of them."""
    sites: dict[str, tuple[list[int], list[int]]] = {}
    sources: Counter[str] = Counter()
    for one in stages(record).get("qc", ()):
        for site, told in one.get("sites", {}).items():
            labels = told.get("labels", {})
            if {"made", "chosen"} <= labels.keys():
                made, chosen = sites.get(site, ([], []))
                sites[site] = _added(made, labels["made"]), _added(chosen, labels["chosen"])
            for key in labels.keys() - {"made", "chosen"}:
                sources[key.removeprefix("sources.")] += labels[key]
    if not sites:
        return []
    shares = [f"{name} {one / sources.total():.0%}" for name, one in sources.most_common() if one]
    told_of = f" Sources: {listed(shares)}." if shares else ""
    return [
        Figure(
            "Labels that the QC model learned from",
            "The true DSC of the labels that were made for training, and of those that balancing chose among "
            "them, over all rounds. Good: blue reaches from poor to good and is flatter than the line. Bad: "
            "a gap, a quality that the model has never seen; add a source of labels that fills it "
            f"(qc.samples).{told_of}{_more(sites, figures.MOST_PANELS)}",
            figures.label_histograms(dict(list(sites.items())[: figures.MOST_PANELS])),
        )
    ]


def _added(sums: Sequence[int], counts: Sequence[int]) -> list[int]:
    """Sums of counts, in which -1 stands for a small one that was not told."""
    return [before + max(0, more) for before, more in zip_longest(sums, counts, fillvalue=0)]


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
            _FAULTS[event["event"]],
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
            ),
        ),
    )


def files_section(further: Sequence[tuple[str, str]] = ()) -> Section:
    """What lies where in the run's folder."""
    rows = (
        ("`run.json`", "what was run, with what, how it ended"),
        ("`events.jsonl`", "every event of the run, a line each"),
        ("`statistics.json`", "what the sites told; the numbers of this report"),
        ("`models/qc`", "the QC model"),
        ("`models/segmentation`", "the segmentation model, where one was trained"),
        *further,
    )
    return Section(
        "files",
        "Where to find what",
        "All of it lies beside this report. Scores, decisions and error maps of single cases stay at the "
        "sites.",
        (Table("Files", ("file", "what it holds"), tuple(rows), numeric=False),),
    )


# -------------------------------------------------------------------------------------------------- pieces


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `events.jsonl`; the last one of a killed run may be half."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event


def _expected(record: RunRecord) -> int:
    expected = record.config.get("sites", {}).get("expected", ())
    return len({*expected, *record.joined, *record.left_out})


def _first(sites: Mapping[str, object]) -> list[str]:
    """The sites that figures and tables show."""
    return list(sites)[: figures.MOST_NAMES]


def _more(sites: Mapping[str, object], most: int = figures.MOST_NAMES) -> str:
    """Says so where not all sites are shown."""
    if len(sites) <= most:
        return ""
    return f" The first {most} of {len(sites)} sites are shown; `statistics.json` has all."


def _silent(scored: Mapping[str, Mapping[str, Any]], sites: Sequence[str], key: str) -> str:
    """Names the sites that told nothing of a key."""
    silent = [site for site in sites if key not in scored[site]]
    return f"{listed(silent)} may not tell any bin." if silent else ""


def _dash(record: RunRecord) -> str:
    if record.min_count is None:
        return "A dash is a number that was not told."
    return (
        f"A dash is a number that was not told, mostly for fewer than {record.min_count} patients behind it."
    )


def _around(
    mean: float | None, sd: float | None, highest: float = math.inf
) -> tuple[float | None, float | None]:
    """One standard deviation to each side of a mean, as far as there can be values."""
    return (None, None) if mean is None or sd is None else (max(0.0, mean - sd), min(highest, mean + sd))


def _not_reached(record: RunRecord, phase: str) -> Note:
    failed = record.statistics.get("failed", {}).get(phase, {})
    if failed:
        reasons = Counter(reason_in_words(reason) for reason in failed.values())
        why = "; ".join(f"{plural(times, 'site')}: {reason}" for reason, times in reasons.items())
        return Note(f"No site answered in phase {phase} ({why}).", "bad")
    return Note(f"Nothing to show: the run has nothing from phase {phase}. {ending_sentence(record)}".strip())
