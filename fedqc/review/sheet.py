"""The sheet of a site's worst cases: one HTML file to read and to print. It shows scans and never leaves."""

from collections import Counter
from collections.abc import Callable, Sequence

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import sha256_file
from fedqc.config import SiteConfig
from fedqc.curation.manifest import Entry, Manifest, manifest_of
from fedqc.curation.rules import Outcome
from fedqc.errors import FedQCError, printable
from fedqc.files import private_files
from fedqc.ratings import MOST_STARS
from fedqc.reports.looks import CONTOURS
from fedqc.reports.page import (
    Gallery,
    Headline,
    KeyNumber,
    Note,
    Picture,
    Section,
    Swatch,
    Table,
    write_report,
)
from fedqc.reports.review import Planes, draw_planes
from fedqc.reports.slices import MARKED
from fedqc.reports.words import UNKNOWN, count, moment, number, plural, rule_in_words
from fedqc.review.worklist import LABEL, SHEET
from fedqc.scoring import ERROR_MAPS
from fedqc.task import Task

MOST_SHOWN = 20

_OUTCOMES = {Outcome.KEEP: "kept", Outcome.DROP: "dropped", Outcome.REVIEW: "to decide"}
_ONLY_HERE = Note(
    "For use inside the hospital only: this page shows scans and names cases. Nothing of it is ever sent.",
    "caution",
)
_HOW_TO_DECIDE = Note(
    "How to decide: `fedqc review SITE.toml` shows all cases in full in the browser and takes decisions; "
    "`fedqc manifest overrule SITE.toml CASE keep` (or `drop`, or `rule`) takes one without a browser. "
    "`fedqc review SITE.toml --sheet` then writes this sheet anew."
)


def write_sheet(
    site: SiteConfig, task: Task, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Write `review.html` into a site's results folder; only its owner may read it.

    It shows 20 of the candidates that the rule did not keep, or of all where the rule was not applied: those
    of the lowest predicted quality first, and those that people decided about last.

    Args:
        site: whose cases were scored.
        task: of the site.
        progress: called with (cases drawn, all cases to draw) after each case.

    Returns:
        A sentence for each case that could not be drawn; it is on the sheet without pictures.

    Raises:
        DataError: the site has no manifest, it cannot be read, or it is of another site or task.
    """
    manifest = manifest_of(site, task)
    in_order = sorted(manifest.entries, key=lambda one: (one.overruled is not None, one.quality, one.id))
    listed = [one for one in in_order if manifest.rule.suspended or one.decision is not Outcome.KEEP]
    shown, not_drawn = listed[:MOST_SHOWN], []
    cases: list[Gallery] = []
    for place, entry in enumerate(shown, start=1):
        planes = _planes(entry, site, task)
        if isinstance(planes, str):
            not_drawn.append(f"case {printable(entry.id)}: {planes}")
        cases.append(_case(entry, place, planes, task))
        if progress is not None:
            progress(place, len(shown))
    sections = [_run_section(manifest), _cases_section(cases, len(listed), manifest)]
    decided = [entry for entry in manifest.entries if entry.overruled]
    if decided:
        sections.append(_decided_section(decided))
    with private_files():
        write_report(
            site.results / SHEET,
            f"Cases of {manifest.site} to look at",
            sections,
            headline=_headline(manifest),
            facts=[manifest.federation, f"task {manifest.task}", f"scored {moment(manifest.created)}"],
        )
    return not_drawn


def _planes(entry: Entry, site: SiteConfig, task: Task) -> Planes | str:
    """Three planes through a case, or why there are none."""
    folder = site.data.folder
    roles = [role for role in ("image", *task.modalities) if role in entry.files]
    images = tuple(folder / entry.files[role].path for role in roles)
    files = CaseFiles(entry.id, entry.patient, images, folder / entry.files[LABEL].path)
    try:
        for file in entry.files.values():
            if sha256_file(folder / file.path) != file.sha256:
                return f"{printable(file.path)} has changed since it was scored"
        return draw_planes(files, task, site.results / ERROR_MAPS / f"{entry.id}.nii.gz")
    # A picture is an extra: whatever became of the files meanwhile, the sheet goes on.
    except MemoryError:
        return "it does not fit into memory"
    except (FedQCError, OSError, ValueError, ArithmeticError) as error:
        return printable(str(error))


# ------------------------------------------------------------------------------------------- what it says


def _headline(manifest: Manifest) -> Headline:
    entries = manifest.entries
    outcomes = Counter(entry.outcome for entry in entries)
    not_kept = [entry for entry in entries if entry.decision is not Outcome.KEEP]
    waiting = sum(entry.overruled is None for entry in not_kept)
    everything = plural(len(entries), "candidate")
    verdict = f"The rule kept all of {everything}."
    if not_kept:
        who = f"nobody has decided about {count(waiting)} of them" if waiting else "people decided about all"
        verdict = f"The rule did not keep {count(len(not_kept))} of {everything}; {who}."
    if manifest.rule.suspended:
        verdict = f"The rule was not applied: all of {everything} are kept."
    warnings = [f"Nothing was dropped: {manifest.rule.suspended}."] if manifest.rule.suspended else []
    warnings += [f"{one.sentence}." for one in manifest.gatherings]
    return Headline(
        verdict,
        "caution" if waiting or warnings else "good",
        (
            KeyNumber(
                count(len(entries)),
                "candidates",
                f"of {plural(len({entry.patient for entry in entries}), 'patient')}",
            ),
            KeyNumber(count(outcomes[Outcome.KEEP]), "kept"),
            KeyNumber(count(outcomes[Outcome.DROP]), "dropped"),
            KeyNumber(count(outcomes[Outcome.REVIEW]), "left to a person"),
            KeyNumber(count(sum(entry.overruled is not None for entry in entries)), "decided by a person"),
        ),
        (_ONLY_HERE, *(Note(text, "caution") for text in warnings), _HOW_TO_DECIDE),
    )


def _run_section(manifest: Manifest) -> Section:
    """The rule and the model behind the decisions."""
    rule, model = manifest.rule.config, manifest.model
    left_out = len({one.case for one in manifest.left_out})
    rows = (
        ("rule", rule_in_words(rule.model_dump()) or rule.rule),
        ("model", f"{model.method}, weights {model.sha256[:12]}, applied by fedqc {model.fedqc}"),
        (
            "cases left out",
            f"{count(left_out)}, for errors that `fedqc check` names" if left_out else "none",
        ),
    )
    table = Table("Where the decisions come from", ("what", "in this run"), rows, numeric=False)
    return Section("run", "Rule and model", "", (table,))


def _cases_section(cases: Sequence[Gallery], n_listed: int, manifest: Manifest) -> Section:
    if not cases:
        return Section("cases", "The cases", "", (Note("None: the rule kept every candidate.", "good"),))
    which = "candidates; the rule was not applied" if manifest.rule.suspended else "cases that were not kept"
    some = f"The first {len(cases)} of" if n_listed > len(cases) else "All"
    intro = (
        f"{some} {count(n_listed)} {which}, the lowest predicted quality first; last come those about which "
        "a person decided. Each is cut in three planes through the place where most seems wrong, or where "
        "most is labelled if the model draws no errors: left the label, right over it what the model takes "
        "for wrong, the more colour the surer. The patient's right is on the left; in sagittal slices the "
        "front is on the right."
    )
    return Section("cases", "The cases", intro, tuple(cases))


def _case(entry: Entry, place: int, planes: Planes | str, task: Task) -> Gallery:
    """A case and what is known of it; above the first one, what the colours mean."""
    regions = ", ".join(f"{name} {number(value)}" for name, value in entry.regions.items())
    about = [
        _quality(entry),
        *([f"regions: {regions}"] if regions else []),
        f"patient {printable(entry.patient)}",
    ]
    lines = [_decision(entry), f"{'; '.join(about)}."]
    if entry.diagnosis:
        lines.append(f"{entry.diagnosis.sentence}.")
    pictures: tuple[Picture, ...] = ()
    if isinstance(planes, str):
        lines.append(f"Not drawn: {planes}.")
    else:
        pictures = tuple(
            Picture(png, f"{plane.capitalize()},", f"{planes.modality}")
            for plane, png in planes.pictures.items()
        )
    legend = (
        *(Swatch(name, *CONTOURS[index % len(CONTOURS)]) for index, name in enumerate(task.classes)),
        Swatch("probably wrong", MARKED, "fill"),
    )
    title = f"{place}. {printable(entry.id)}"
    return Gallery(title, pictures, "\n".join(lines), legend if place == 1 else ())


def _decision(entry: Entry) -> str:
    """What became of a case, and why."""
    outcome, by = _OUTCOMES[entry.outcome].capitalize(), entry.overruled
    if by is None:
        return f"{outcome}: {entry.reason}."
    why = printable(by.reason) or "no reason given"
    return f"{outcome} by {printable(by.by)}, {by.when[:10]}: {why}. The rule: {entry.reason}."


def _quality(entry: Entry) -> str:
    if entry.stars is not None:
        return f"{entry.stars:.1f} of {MOST_STARS:.0f} stars"
    found = f"Predicted DSC {number(entry.quality)}"
    if entry.interval is None:
        return found
    low, high = entry.interval
    return f"{found}, expected {number(low, 2)} to {number(high, 2)}"


def _decided_section(decided: Sequence[Entry]) -> Section:
    """What people decided, about cases that are not shown too."""
    rows = tuple(
        (
            printable(entry.id),
            _OUTCOMES[entry.outcome],
            _OUTCOMES[entry.decision],
            printable(by.by),
            by.when[:10],
            printable(by.reason) or UNKNOWN,
        )
        for entry in decided
        if (by := entry.overruled)
    )
    columns = ("case", "now", "by the rule", "who", "when", "why")
    table = Table("Decisions in place of the rule's", columns, rows, numeric=False)
    return Section("decided", "What people decided", "", (table,))
