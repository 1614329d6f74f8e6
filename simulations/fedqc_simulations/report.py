"""The report of a simulation: a coordinator's, and what only a simulation can know.

It shows slices of the sites' cases, which a coordinator's report must never do.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedqc.cases.layouts import find_cases
from fedqc.curation.diagnosis import Kind
from fedqc.curation.manifest import Entry, read_manifest
from fedqc.curation.rules import Outcome
from fedqc.reports import figures
from fedqc.reports.build import (
    NUMBERS_FOLDER,
    coordinator_headline,
    coordinator_sections,
    facts,
    fault_rows,
    files_section,
    suspected_notes,
    time_section,
    untrained_notes,
)
from fedqc.reports.looks import CONTOURS
from fedqc.reports.page import (
    Figure,
    Gallery,
    Headline,
    KeyNumber,
    Note,
    Numbers,
    Part,
    Picture,
    Section,
    Swatch,
    Table,
    Tone,
    write_report,
)
from fedqc.reports.parts import dots_figure
from fedqc.reports.record import RunRecord, read_run
from fedqc.reports.slices import MARKED
from fedqc.reports.words import (
    UNKNOWN,
    count,
    duration,
    kind_in_words,
    listed,
    mean_sd,
    number,
    percent,
    percent_with_interval,
    plural,
    with_interval,
)
from fedqc.task import load_task
from fedqc.trial import Tried
from fedqc_simulations.consortium import KnownLabel, read_candidates
from fedqc_simulations.evaluation import read_judged
from fedqc_simulations.slices import draw_slice

NOTHING_KEPT = "Curation kept too little to train a segmentation model on."

WORST_OF_A_SITE = 3
MOST_PICTURES = 18
MOST_MISTAKES = 6
MOST_SITES_APART = 12
"""Sites that the figure of the candidates shows one by one."""
GOOD_RECALL, GOOD_PRECISION = 0.9, 0.85
"""From here on the verdict is shown as a good one."""

ARMS = {
    "everything": ("all candidates, the spoiled ones too", figures.GREY, "s"),
    "curated": ("what the sites kept", figures.BLUE, "o"),
    "weighted": ("by predicted quality (rule weights, at the run's threshold)", figures.PURPLE, "P"),
    "random": ("as many as curated, chosen at random", figures.ORANGE, "v"),
    "oracle": ("only the untouched ones, which no hospital can know", figures.GREEN, "D"),
}
_DECISIONS = {
    Outcome.KEEP: ("kept", figures.BLUE, "o"),
    Outcome.REVIEW: ("review", figures.ORANGE, "s"),
    Outcome.DROP: ("dropped", figures.VERMILLION, "^"),
}


@dataclass(frozen=True)
class Scored:
    """A candidate: what its site decided, and the truth."""

    site: str
    entry: Entry
    truth: KnownLabel

    def is_mistake(self, tau: float) -> bool:
        """A failure that was kept, or a good label that was not."""
        kept = self.entry.outcome is Outcome.KEEP
        return kept if self.truth.dsc < tau else not kept


def write_simulation_report(out: Path) -> Path:
    """Write `report.html` of a simulation with one seed, over the coordinator's.

    Args:
        out: The run's folder.

    Returns:
        The report.
    """
    record, evaluation = read_run(out), _json(out / "evaluation.json")
    of_run = {section.slug: section for section in coordinator_sections(record)}
    scored = read_scored(out, list(record.sites))
    tau = record.threshold or 0.0
    sections = [
        of_run["consortium"],
        of_run["quality"],
        accuracy_section(evaluation, _judged([out]), scored, tau),
        _with_truth(of_run["references"], evaluation),
        of_run["overall"],
        of_run["calibration"],
        worst_cases_section(out, scored, tau),
        arms_section(evaluation, {arm: read_run(_arm(out, arm)) for arm in ARMS}, of_run["segmentation"]),
        of_run["training"],
        of_run["faults"],
        time_section(record, _arm_seconds(out)),
        files_section(_OWN_FILES),
    ]
    path = out / "report.html"
    noise = _json(out / "simulation.json").get("noise")
    write_report(
        path,
        f"fedqc: {record.run.get('federation', out.name)}",
        sections,
        headline=_headline(record, evaluation),
        facts=[*([f"errors put in: {noise}"] if noise else []), *facts(record)],
        numbers=NUMBERS_FOLDER,
    )
    return path


def write_pooled_report(out: Path) -> Path:
    """Write `report.html` of a simulation with several seeds: their figures drawn together.

    Args:
        out: Holds a folder `seed-N` for each, with a report of its own, and `evaluation.json`.

    Returns:
        The report.
    """
    evaluation = _json(out / "evaluation.json")
    folders = sorted(out.glob("seed-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    records = {folder.name: read_run(folder) for folder in folders}
    each = {folder.name: _json(folder / "evaluation.json") for folder in folders}
    scored = [one for folder in folders for one in read_scored(folder, list(records[folder.name].sites))]
    first = next(iter(records.values()))
    rows = tuple(
        (f"{name}/{site}", *rest) for name, one in records.items() for site, *rest in fault_rows(one)
    )
    faults: Part = (
        Table(
            "Faults of all seeds", ("site", "phase", "rounds", "what happened", "reason"), rows, numeric=False
        )
        if rows
        else Note("No fault: in every seed every site answered every request.", "good")
    )
    path = out / "report.html"
    noise = _json(out / "simulation.json").get("noise")
    write_report(
        path,
        f"fedqc: {first.run.get('federation', out.name)}, {plural(len(folders), 'seed')}",
        [
            _seeds_section(each, records),
            accuracy_section(evaluation, _judged(folders), scored, first.threshold or 0.0, by_site=False),
            _with_truth(Section("references", "References, cross-checked", _POOLED_REFERENCES), evaluation),
            arms_section(evaluation, {}, None, each),
            Section("faults", "Faults", "What went wrong in any of the seeds.", (faults,)),
            Section(
                "files",
                "Where to find what",
                "Each seed has a folder with everything that belongs to it, beside this report.",
                (
                    Table(
                        "Files",
                        ("file", "what it holds"),
                        (
                            *(
                                (f"`{name}/report.html`", f"the report of {name.replace('-', ' ')}")
                                for name in records
                            ),
                            ("`evaluation.json`", "the figures over all seeds"),
                        ),
                        numeric=False,
                    ),
                ),
            ),
        ],
        headline=_pooled_headline(evaluation, records),
        facts=[
            *([f"errors put in: {noise}"] if noise else []),
            f"seeds {listed(str(seed) for seed in evaluation.get('seeds', ()))}",
            *(fact for fact in facts(first) if fact.startswith(("task", "fedqc"))),
        ],
        numbers=NUMBERS_FOLDER,
    )
    return path


def read_scored(out: Path, sites: Sequence[str]) -> list[Scored]:
    """Every candidate that a site has judged, beside the truth."""
    truth = {(one.site, one.id): one for one in read_candidates(out)}
    scored = []
    for site in sites:
        path = out / "sites" / site / "manifest.json"
        if path.is_file():
            scored += [Scored(site, entry, truth[site, entry.id]) for entry in read_manifest(path).entries]
    return scored


# ------------------------------------------------------------------------------------------------ headline


def _headline(record: RunRecord, evaluation: Mapping[str, Any]) -> Headline:
    if not evaluation:
        return coordinator_headline(record)
    notes = (*untrained_notes(record, evaluation["qc"]["all"]["r"]), *suspected_notes(record))
    return Headline(_verdict(evaluation), _tone(evaluation, notes), _key_numbers(evaluation), notes)


def _pooled_headline(evaluation: Mapping[str, Any], records: Mapping[str, RunRecord]) -> Headline:
    notes = [
        Note(f"{name.replace('-', ' ').capitalize()}: {note.text}", note.tone)
        for name, record in records.items()
        for note in untrained_notes(record)
    ]
    named = evaluation.get("suspected", {}).get("named")
    if named:
        notes.append(Note(f"References look wrong: {listed(named)}.", "caution"))
    tone = _tone(evaluation, notes)
    return Headline(_verdict(evaluation), tone, _key_numbers(evaluation), tuple(notes))


def _verdict(evaluation: Mapping[str, Any]) -> str:
    """What curation found and what it was worth, in a sentence or two."""
    curated = evaluation["curation"]["all"]
    failures = curated["n_failures"]
    if not curated["n_candidates"]:
        return "No site has judged its annotations."
    if failures:
        verdict = f"{count(_found(curated))} of {plural(failures, 'failure')} found, {_wrongly(curated)}."
    else:
        verdict = f"There was no failure to find; {_wrongly(curated)}."
    gap = evaluation.get("segmentation", {}).get("gap_closed")
    if gap is None:
        return f"{verdict} No segmentation model was trained."
    if gap["value"] is None:
        kept_too_little = evaluation["segmentation"]["curated"]["dice_mean"] is None
        no_gap = NOTHING_KEPT if kept_too_little else "For the segmentation there was no gap to close."
        return f"{verdict} {no_gap}"
    if gap["ci"] is None:
        return f"{verdict} For the segmentation, spoiled labels made too little difference to say more."
    if gap["value"] < 0:
        return f"{verdict} The segmentation trained on what was kept is worse than one trained on everything."
    return (
        f"{verdict} For the segmentation, curation closed {percent_with_interval(gap['value'], gap['ci'])} "
        "of the gap between spoiled and untouched labels."
    )


def _found(curated: Mapping[str, Any]) -> int:
    return 0 if curated["recall"] is None else round(curated["recall"] * curated["n_failures"])


def _interval(name: str, curated: Mapping[str, Any]) -> str:
    """A share with its interval, to be read behind something else; nothing where there is none."""
    if curated[name] is None:
        return ""
    return f"; {name} {with_interval(curated[name], curated[f'{name}_ci'])}"


def _wrongly(curated: Mapping[str, Any]) -> str:
    wrongly = curated["n_dropped"] - _found(curated)
    good = curated["n_candidates"] - curated["n_failures"]
    return f"{count(wrongly) if wrongly else 'none'} of {plural(good, 'good annotation')} dropped"


def _tone(evaluation: Mapping[str, Any], notes: Sequence[Note]) -> Tone:
    if any(note.tone == "bad" for note in notes):
        return "bad"
    curated = evaluation["curation"]["all"]
    recall, precision = curated["recall"], curated["precision"]
    gap = evaluation.get("segmentation", {}).get("gap_closed", {})
    well = (
        (recall is None or recall >= GOOD_RECALL)
        and (precision is None or precision >= GOOD_PRECISION)
        and (gap.get("value") is None or (gap["value"] > 0 and (not gap["ci"] or gap["ci"][0] > 0)))
    )
    return "good" if well and not notes else "caution"


def _key_numbers(evaluation: Mapping[str, Any]) -> tuple[KeyNumber, ...]:
    curated, qc = evaluation["curation"]["all"], evaluation["qc"]
    good = curated["n_candidates"] - curated["n_failures"]
    numbers = [
        KeyNumber(
            f"{_found(curated)} of {curated['n_failures']}",
            "failures found",
            f"a failure: true DSC under {curated['tau']:g}{_interval('recall', curated)}",
        ),
        KeyNumber(
            f"{curated['n_dropped'] - _found(curated)} of {good}",
            "good annotations dropped",
            _interval("precision", curated).removeprefix("; "),
        ),
    ]
    group, label = (
        ("unseen", "kinds of error never trained on") if qc["unseen"]["n"] else ("all", "all kinds")
    )
    numbers.append(
        KeyNumber(
            number(qc[group]["r"]),
            f"r, predicted and true DSC, {label}",
            f"95 %: {number(qc[group]['r_ci'][0])} to {number(qc[group]['r_ci'][1])}"
            if qc[group]["r_ci"]
            else "not defined: too few or all alike",
        )
    )
    segmentation = evaluation.get("segmentation")
    if segmentation:
        gap, dice = segmentation["gap_closed"], {arm: segmentation[arm]["dice_mean"] for arm in ARMS}
        if gap["value"] is not None and gap["ci"] is not None:
            note = f"95 %: {100 * gap['ci'][0]:.0f} to {100 * gap['ci'][1]:.0f}"
            numbers.append(KeyNumber(f"{100 * gap['value']:.0f}\u00a0%", "of the gap closed", note))
        numbers.append(
            KeyNumber(
                number(dice["curated"]),
                "Dice of the segmentation, curated",
                f"everything {number(dice['everything'])}, oracle {number(dice['oracle'])}",
            )
        )
    return tuple(numbers)


# --------------------------------------------------------------------------------------------- QC accuracy


def accuracy_section(
    evaluation: Mapping[str, Any],
    judged: Sequence[Tried],
    scored: Sequence[Scored],
    tau: float,
    *,
    by_site: bool = True,
) -> Section:
    """How well predicted quality agrees with the truth, and what curation made of it.

    Args:
        evaluation: Content of `evaluation.json`.
        judged: The held-back cases with every kind of error.
        scored: The candidates.
        tau: The threshold.
        by_site: Show the candidates site by site, too.
    """
    title = "How good the QC model is"
    intro = (
        "A simulation knows the truth. Held-back patients, whom no site trained on, were given every kind of "
        "error once. Some kinds were kept out of training on purpose, since nobody knows beforehand which "
        "errors a real hospital makes: trust their figures most."
    )
    if not evaluation:
        note = Note(
            "Not measured: the simulation did not come to its end. Without `evaluation.json` nothing is "
            "known."
        )
        return Section("accuracy", title, intro, (note,))
    qc = evaluation["qc"]
    seen = {kind for kind, of_kind in qc["by_kind"].items() if of_kind["in_training"]}
    parts: list[Part] = []
    if judged:
        panels = []
        for group, label, color, marker in (
            ("trained", "kind was in training", figures.BLUE, "o"),
            ("unseen", "kind never trained on", figures.VERMILLION, "^"),
        ):
            points = [one for one in judged if (one.kind in seen) == (group == "trained")]
            if points:
                panels.append((_agreement_in_words(label, qc[group]), _points(label, points, color, marker)))
        parts.append(
            Figure(
                "Predicted against true quality, held-back cases",
                "Each mark is one annotation. Good: all marks close to the line, in both panels. Bad: a flat "
                "cloud (the prediction knows nothing of the truth), a cloud beside the line (always too high "
                "or too low), or a good left and a poor right panel (the model knows only the errors it was "
                "shown). r: Pearson correlation, its 95 % interval from resampling patients; MAE: mean "
                "absolute error.",
                figures.scatter_panels(panels),
            )
        )
    parts += [_kinds_figure(qc["by_kind"]), _agreement_table(qc)]
    if scored:
        parts.append(_candidates_figure(scored, tau, by_site=by_site))
    parts.append(_curation_table(evaluation["curation"]))
    if evaluation.get("diagnosis", {}).get("n"):
        parts.append(_diagnosis_figure(evaluation["diagnosis"]))
    return Section("accuracy", title, intro, tuple(parts))


def _points(label: str, judged: Sequence[Tried], color: str, marker: str) -> figures.Points:
    true, predicted = [one.true_dsc for one in judged], [one.predicted_dsc for one in judged]
    return figures.Points(label, true, predicted, color, marker)


def _agreement_in_words(label: str, group: Mapping[str, Any]) -> str:
    r = with_interval(group["r"], group["r_ci"])
    return f"{label}\nr = {r}\nMAE = {number(group['mae'])}, n = {group['n']}"


def _kinds_figure(by_kind: Mapping[str, Mapping[str, Any]]) -> Figure:
    means = [
        figures.KindMeans(
            kind_in_words(kind),
            not one["in_training"],
            one["true_dsc"],
            one["predicted_dsc"],
            one["mae"],
        )
        for kind, one in sorted(
            by_kind.items(), key=lambda item: (not item[1]["in_training"], item[1]["mae"])
        )
    ]
    return Figure(
        "Which errors are judged well",
        "One row for each kind of error, those kept out of training below. Left: the mark is the mean "
        "predicted DSC, the bar the true one; good is a mark on its bar, a mark to the right means that "
        "errors of this kind are judged too mildly. Right: mean absolute error of the single predictions; "
        "good is below 0.05, above 0.15 decisions about this kind are guesses near the threshold.",
        figures.kinds(means),
    )


def _agreement_table(qc: Mapping[str, Any]) -> Table:
    rows = []
    for group, label in (("trained", "in training"), ("unseen", "never trained on"), ("all", "all")):
        one = qc[group]
        rows.append(
            (
                label,
                count(one["n"]),
                count(one["patients"]),
                with_interval(one["r"], one["r_ci"]),
                number(one["rho"]),
                mean_sd(one["mae"], one["mae_sd"]),
                number(one["rmse"]),
                number(one["dsc_err_median"]),
            )
        )
    return Table(
        "Agreement in numbers",
        ("kinds of error", "n", "patients", "r (95 %)", "rho", "MAE \u00b1 sd", "RMSE", "error-map DSC"),
        tuple(rows),
        "rho: rank correlation. Error-map DSC: median overlap of the predicted with the true error map. A "
        "dash is a number that cannot be computed, such as a correlation of fewer than three annotations.",
    )


def _diagnosis_figure(diagnosis: Mapping[str, Any]) -> Figure:
    by_kind = diagnosis["by_kind"]
    said = [kind for kind in Kind if any(kind in one for one in by_kind.values())]
    counts = {kind_in_words(kind): [one.get(name, 0) for name in said] for kind, one in by_kind.items()}
    right = f"{percent(diagnosis['right'])} of {plural(diagnosis['n'], 'spoiled annotation')}"
    return Figure(
        "What was said to be wrong, beside what was",
        "In each row, annotations that were not kept by what was done to them; in each column, by what the "
        "sites were told is probably wrong. Good: one dark field a row, under the row's own name (stale "
        "labels under another patient: they are told alike). Bad: a row that spreads, whose errors look like "
        f"others. {right} are told right.",
        figures.count_map(
            {kind: [number or None for number in row] for kind, row in counts.items()},
            [name.replace("-", " ") for name in said],
            "annotations that were not kept",
        ),
        Numbers(("kind", *said), tuple((kind, *row) for kind, row in counts.items())),
    )


def _candidates_figure(scored: Sequence[Scored], tau: float, *, by_site: bool) -> Figure:
    groups = []
    for outcome, (label, color, marker) in _DECISIONS.items():
        of_outcome = [one for one in scored if one.entry.outcome is outcome]
        if of_outcome:
            true = [one.truth.dsc for one in of_outcome]
            predicted = [one.entry.quality for one in of_outcome]
            groups.append(figures.Points(f"{label} ({len(of_outcome)})", true, predicted, color, marker))
    names = list(dict.fromkeys(one.site for one in scored))
    apart = names if by_site and len(names) <= MOST_SITES_APART else ["all sites"]
    columns = {
        name: (
            [one.entry.quality for one in scored if name in (one.site, "all sites") and one.truth.dsc >= tau],
            [one.entry.quality for one in scored if name in (one.site, "all sites") and one.truth.dsc < tau],
        )
        for name in apart
    }
    return Figure(
        f"The candidates: {count(len(scored))} annotations that the sites had to judge",
        "Left: predicted against true DSC, dashed lines at the threshold. Good: marks only at the upper "
        "right (good and kept) and the lower left (broken and dropped). Upper left are failures that were "
        "missed, lower right good annotations that were lost. Right: the same predictions, good annotations "
        "beside failures. Good: a wide gap with the threshold in it. Bad: failures among the good ones, or a "
        "site whose good annotations sink towards the threshold.",
        figures.candidates(groups, tau, columns),
    )


def _curation_table(curation: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = []
    for name, one in curation.items():
        counts = (one[key] for key in ("n_candidates", "n_spoiled", "n_failures", "n_dropped"))
        keys = ("precision", "recall", "auroc", "mean_dsc_before", "mean_dsc_after")
        rows.append(
            (
                "all sites" if name == "all" else name,
                *(count(value) for value in counts),
                *(number(one[key]) for key in keys),
            )
        )
    columns = ("site", "candidates", "spoiled", "failures", "dropped", "precision", "recall", "AUROC")
    return Table(
        "Curation in numbers",
        (*columns, "true DSC before", "after"),
        tuple(rows),
        "Precision: share of the dropped that are failures. Recall: share of the failures that were dropped. "
        "AUROC: how often a failure is ranked below a good annotation. A dash is a number that cannot be "
        "computed: no failure at the site, or nothing dropped. Review counts as dropped.",
    )


# ---------------------------------------------------------------------------------------------- references

_POOLED_REFERENCES = (
    "Models that never saw a site's references judged them, in every seed. The reports of the seeds show how."
)


def _with_truth(section: Section, evaluation: Mapping[str, Any]) -> Section:
    """The section with what the simulation knows: whose references are spoiled."""
    suspected = evaluation.get("suspected")
    if suspected is None:
        return section
    spoiled, named = set(suspected["spoiled"]), set(suspected["named"])
    if not spoiled and not named:
        note = Note("The truth: no references were spoiled, and no site is suspected.", "good")
    else:
        missed, wronged = sorted(spoiled - named), sorted(named - spoiled)
        text = f"The truth: spoiled references at {listed(sorted(spoiled)) or 'no site'}."
        text += f" Missed: {listed(missed)}." if missed else " All of them are named." if spoiled else ""
        text += f" Suspected without cause: {listed(wronged)}." if wronged else " No other site is suspected."
        note = Note(text, "bad" if missed or wronged else "good")
    return replace(section, parts=(note, *section.parts))


# --------------------------------------------------------------------------------------------- worst cases


def worst_cases_section(out: Path, scored: Sequence[Scored], tau: float) -> Section:
    """Slices of the cases that each site's model finds worst, and of those it got wrong."""
    title = "The worst cases of each site"
    intro = (
        "Only a simulation may show this: scans never leave a hospital. In each picture the left half is the "
        "scan with the label's contours, the right half the same slice with the predicted error map over it, "
        "the stronger the surer. The slice is the one with the largest area of predicted error. The "
        "patient's right is on the left; in sagittal slices the front is on the right. Good: the coloured "
        "area lies where the contour is visibly wrong. Bad: it lies elsewhere, or is missing on a label with "
        "a low true DSC."
    )
    if not scored:
        return Section("worst", title, intro, (Note("No site has judged its annotations."),))
    task = load_task(str(out / "task.toml"))
    files = {
        site: {case.id: case for case in find_cases(out / "sites" / site / "data", task, "csv").cases}
        for site in dict.fromkeys(one.site for one in scored)
    }

    def picture(one: Scored, *, with_site: bool = False) -> Picture:
        case, folder = files[one.site][one.entry.id], out / "sites" / one.site
        drawn = draw_slice(case, task, folder / "error_maps" / f"{one.entry.id}.nii.gz")
        where = f"{one.site}, " if with_site else ""
        decision = _DECISIONS[one.entry.outcome][0]
        return Picture(
            drawn.png,
            f"{where}{one.entry.id}: {kind_in_words(one.truth.kind)}.",
            f"True DSC {number(one.truth.dsc, 2)}, predicted {number(one.entry.quality, 2)}: {decision}. "
            f"{drawn.plane.capitalize()} slice, {drawn.modality}.",
        )

    legend = (
        *(
            Swatch(f"label: {name}", *CONTOURS[index % len(CONTOURS)])
            for index, name in enumerate(task.classes)
        ),
        Swatch("predicted error", MARKED, "fill"),
    )
    mistakes = sorted(
        (one for one in scored if one.is_mistake(tau)),
        key=lambda one: (-abs(one.entry.quality - one.truth.dsc), one.site, one.entry.id),
    )
    parts: list[Part] = []
    if mistakes:
        shown = mistakes[:MOST_MISTAKES]
        of_all = f" The {len(shown)} most wrong of {len(mistakes)}." if len(mistakes) > len(shown) else ""
        parts.append(
            Gallery(
                "What curation got wrong",
                tuple(picture(one, with_site=True) for one in shown),
                f"Failures that were kept, and good annotations that were not.{of_all}",
                legend,
            )
        )
    else:
        parts.append(
            Note(
                "Curation made no mistake: every failure was dropped and every good annotation kept.", "good"
            )
        )
    sites = list(files)[:MOST_PICTURES]
    of_a_site = max(1, min(WORST_OF_A_SITE, MOST_PICTURES // len(sites)))
    for position, site in enumerate(sites):
        worst = worst_of([one for one in scored if one.site == site], of_a_site)
        parts.append(
            Gallery(
                f"{site}: lowest predicted quality",
                tuple(picture(one) for one in worst),
                legend=legend if position == 0 and not mistakes else (),
            )
        )
    if len(sites) < len(files):
        parts.append(Note(f"The first {len(sites)} of {len(files)} sites are shown."))
    return Section("worst", title, intro, tuple(parts))


def worst_of(scored: Sequence[Scored], wanted: int) -> list[Scored]:
    """The candidates with the lowest predicted quality, of different kinds of error as far as there are."""
    ordered = sorted(scored, key=lambda one: (one.entry.quality, one.entry.id))
    first_of_kind = list({one.truth.kind: one for one in reversed(ordered)}.values())
    chosen = sorted(first_of_kind, key=ordered.index)[:wanted]
    chosen += [one for one in ordered if one not in chosen][: wanted - len(chosen)]
    return sorted(chosen, key=ordered.index)


# ---------------------------------------------------------------------------------------------------- arms


def arms_section(
    evaluation: Mapping[str, Any],
    runs: Mapping[str, RunRecord],
    of_run: Section | None,
    seeds: Mapping[str, Mapping[str, Any]] | None = None,
) -> Section:
    """What curation is worth: the same training on five choices of annotations.

    Args:
        evaluation: Content of `evaluation.json`.
        runs: The run behind each arm.
        of_run: What the run itself says about its segmentation.
        seeds: With several seeds, the figures of each.
    """
    title = "What curation is worth for the segmentation"
    own = of_run.parts if of_run else ()
    arms = evaluation.get("segmentation")
    if not arms:
        note = Note("Not compared: this simulation trained no segmentation on other choices of annotations.")
        return Section("segmentation", title, "", (note, *own))
    intro = (
        "The same network was trained five times by the same sites with the same budget, each time on "
        "another choice of annotations, and tried on the same held-back patients with good labels: "
        + "; ".join(f"{arm}, {what}" for arm, (what, _, _) in ARMS.items())
        + "."
    )
    dots = []
    for arm, (_, color, marker) in ARMS.items():
        one = arms[arm]
        low, high = one["dice_ci"] or (None, None)
        small = [
            of_seed.get("segmentation", {}).get(arm, {}).get("dice_mean")
            for of_seed in (seeds or {}).values()
        ]
        dots.append(
            figures.Dot(
                arm,
                one["dice_mean"],
                low,
                high,
                note=f"n = {count(one['n_train'])}",
                color=color,
                marker=marker,
                small=tuple(value for value in small if value is not None),
            )
        )
    figure = dots_figure(
        "Dice of the five arms",
        "Mean Dice on held-back patients with 95 % intervals; n is the number of annotations trained on"
        + (", over all seeds; small grey dots are single seeds" if seeds else "")
        + ". Good: curated lies far right of everything and near oracle, and clearly right of random (else "
        "dropping any annotations would have done as well). Weighted beside it says whether to weigh rather "
        "than to drop. Bad: curated beside everything, or left of it. Intervals come from resampling "
        "patients, the same ones in all arms, so arms differ more surely than "
        "overlapping intervals suggest. That another training would come out a little differently is not in "
        "them.",
        [("mean Dice", dots, None)],
        rows="arm",
    )
    regions = list(dict.fromkeys(name for arm in ARMS for name in arms[arm].get("regions", {})))
    table = Table(
        "The arms in numbers",
        ("arm", "trained on", "Dice (95 %)", *regions),
        tuple(
            (
                arm,
                count(arms[arm]["n_train"]),
                with_interval(arms[arm]["dice_mean"], arms[arm]["dice_ci"]),
                *(number(arms[arm]["regions"].get(name)) for name in regions),
            )
            for arm in ARMS
        ),
        "Training sets hold the candidates of all sites that the arm chose. The other columns are the Dice "
        "of each region.",
        exact=Numbers(
            ("arm", "trained on", "Dice", "its 95 % interval from", "to", *regions),
            tuple(
                (
                    arm,
                    arms[arm]["n_train"],
                    arms[arm]["dice_mean"],
                    *(arms[arm]["dice_ci"] or (None, None)),
                    *(arms[arm]["regions"].get(name) for name in regions),
                )
                for arm in ARMS
            ),
        ),
    )
    faults = {
        arm: len(fault_rows(record))
        for arm, record in runs.items()
        if arm != "curated" and fault_rows(record)
    }
    notes: list[Part] = []
    if faults:
        text = listed(f"{arm} ({plural(lines, 'line')})" for arm, lines in faults.items())
        notes.append(Note(f"Sites failed in other arms, too: {text}; see `arms/*/events.jsonl`.", "caution"))
    return Section("segmentation", title, intro, (_gap_note(arms), figure, table, *notes, *own))


def _gap_note(arms: Mapping[str, Any]) -> Note:
    gap = arms["gap_closed"]
    everything, curated, oracle = (
        number(arms[arm]["dice_mean"]) for arm in ("everything", "curated", "oracle")
    )
    if arms["curated"]["dice_mean"] is None:
        return Note(NOTHING_KEPT, "caution")
    if gap["value"] is None:
        return Note(
            f"There is no gap to close: training on untouched labels only gives {oracle}, on everything "
            f"{everything}.",
        )
    if gap["ci"] is None:
        return Note(
            f"Training on everything gives {everything}, on untouched labels only {oracle}, and curation "
            f"gives {curated}. In some draws of patients there is no gap between the first two, so the share "
            "of it that curation closes cannot be said: take more patients, or several seeds.",
            "caution",
        )
    share = percent_with_interval(gap["value"], gap["ci"])
    return Note(
        f"Training on everything gives {everything}, on untouched labels only {oracle}; curation gives "
        f"{curated} and so closes {share} of the gap. The interval comes from resampling patients, the same "
        "ones in all arms; the noise of training is not in it.",
        "good" if gap["ci"][0] > 0 else "caution",
    )


# --------------------------------------------------------------------------------------------------- seeds


def _seeds_section(each: Mapping[str, Mapping[str, Any]], records: Mapping[str, RunRecord]) -> Section:
    """One line for each seed."""
    rows = []
    for name, figures_of in each.items():
        took = duration(sum(records[name].run.get("seconds", {}).values()))
        label = name.partition("-")[2]
        if not figures_of:
            rows.append((label, *[UNKNOWN] * 7, took))
            continue
        curated, qc = figures_of["curation"]["all"], figures_of["qc"]
        gap = figures_of.get("segmentation", {}).get("gap_closed", {"value": None, "ci": None})
        good = curated["n_candidates"] - curated["n_failures"]
        rows.append(
            (
                label,
                f"{_found(curated)} of {curated['n_failures']}",
                f"{curated['n_dropped'] - _found(curated)} of {good}",
                number(qc["trained"]["r"]),
                number(qc["unseen"]["r"]),
                number(qc["unseen"]["mae"]),
                number(figures_of.get("segmentation", {}).get("curated", {}).get("dice_mean")),
                percent_with_interval(gap["value"], gap["ci"]),
                took,
            )
        )
    columns = ("seed", "failures found", "good ones dropped", "r, in training", "r, unseen", "MAE, unseen")
    return Section(
        "seeds",
        "Seed by seed",
        "A seed decides who goes to which site, which labels are spoiled how, and how training goes. Figures "
        "that are alike over the seeds can be trusted; one that stands apart deserves a look at its own "
        "report.",
        (
            Table(
                "The seeds in numbers",
                (*columns, "Dice, curated", "gap closed (95 %)", "run took"),
                tuple(rows),
                "Unseen: kinds of error never trained on. A dash is a number that cannot be computed, such "
                "as the share of a gap where there is none.",
            ),
        ),
    )


# -------------------------------------------------------------------------------------------------- pieces

_OWN_FILES = (
    ("`evaluation.json`", "how well it worked; the figures of this report"),
    ("`sites/NAME/scores.csv`", "what a site decided about each of its annotations, and why"),
    ("`sites/NAME/error_maps`", "where labels are probably wrong, as volumes to lay over the scans"),
    ("`sites/NAME/ledger.jsonl`", "every message that left the site"),
    ("`truth/candidates.csv`", "what was really wrong with each candidate"),
    ("`truth/test_scores.csv`", "each held-back annotation with true and predicted DSC"),
    ("`truth/segmentation_scores.csv`", "Dice of each held-back case in each arm"),
    ("`arms/NAME`", "the run behind each other arm"),
)


def _judged(folders: Sequence[Path]) -> list[Tried]:
    files = [folder for folder in folders if (folder / "truth" / "test_scores.csv").is_file()]
    return [one for folder in files for one in read_judged(folder)]


def _arm(out: Path, arm: str) -> Path:
    return out if arm == "curated" else out / "arms" / arm


def _arm_seconds(out: Path) -> list[tuple[str, float]]:
    runs = {arm: _json(_arm(out, arm) / "run.json") for arm in ARMS if arm != "curated"}
    return [
        (f"arm {arm}", float(sum(run["seconds"].values()))) for arm, run in runs.items() if "seconds" in run
    ]


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
