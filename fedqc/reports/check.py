"""What was found in a site's data, as a report for the hospital: it shows scans and never leaves."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedqc import __version__
from fedqc.cases.problems import CODES, MEANINGS, Code, Problem
from fedqc.config import SiteConfig
from fedqc.errors import printable
from fedqc.reports import figures
from fedqc.reports.check_slices import MOST_IN_ALL, MOST_OF_A_CODE, Affected, Drawn, draw_affected
from fedqc.reports.looks import CONTOURS
from fedqc.reports.page import (
    Figure,
    Gallery,
    Headline,
    KeyNumber,
    Note,
    Part,
    Picture,
    Section,
    Swatch,
    Table,
    Tone,
    write_report,
)
from fedqc.reports.slices import MARKED
from fedqc.reports.words import UNKNOWN, count, listed, plural, significant, spread_rows
from fedqc.site_check import SiteCheck
from fedqc.statistics.datasheet import AXES
from fedqc.task import Task

MOST_ROWS = 200
"""Problems that the table of all problems shows."""
_EXAMPLES = 3

_NUMBERS = {
    "cases": "usable cases",
    "left_out": "cases left out: {}",
    "volume_ml": "volume of {}, ml",
    "spacing_mm": "mean voxel side {}, mm",
    "shape": "mean number of voxels along {}",
    "intensity": "mean over the cases of their median intensity, {}",
}

_ONLY_HERE = Note(
    "For use inside the hospital only: this page shows scans and names cases. Nothing of it is ever sent.",
    "caution",
)


def build_check_report(
    check: SiteCheck,
    site: SiteConfig,
    task: Task,
    path: Path,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write the report of a check.

    Args:
        check: what was found.
        site: the site's configuration.
        task: what the data show.
        path: of the HTML file; its folder is made where it is missing.
        progress: called with (pictures done, all pictures) after each picture.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    affected = draw_affected(check.problems, check.checked.cases, task, progress)
    layout = f"layout {check.checked.layout}{' (detected)' if site.data.layout is None else ''}"
    sections = [found_section(check, site)]
    if affected:
        sections.append(pictures_section(affected, task))
    if check.problems:
        sections.append(cases_section(check, site))
    sections += [datasheet_section(check, task), leaves_section(check, site)]
    write_report(
        path,
        f"Data of {site.name}",
        sections,
        headline=_headline(check, site),
        facts=[f"task {task.name}", layout, printable(str(site.data.path)), f"fedqc {__version__}"],
    )


# ------------------------------------------------------------------------------------------------ headline


def _headline(check: SiteCheck, site: SiteConfig) -> Headline:
    n_cases, n_usable = len(check.checked.cases), len(check.checked.usable)
    n_out, n_warned = n_cases - n_usable, len(_warned(check))
    tone: Tone = "caution" if check.problems else "good"
    if n_cases == 0:
        verdict, tone = "There is no case here.", "bad"
    elif n_usable == 0:
        verdict, tone = f"None of {plural(n_cases, 'case')} can be used: every one has an error.", "bad"
    elif n_out:
        verdict = (
            f"{count(n_usable)} of {plural(n_cases, 'case')} can be used; {count(n_out)} "
            f"{'is left out until its' if n_out == 1 else 'are left out until their'} errors are mended."
        )
    elif not check.problems:
        verdict = f"All {plural(n_cases, 'case')} can be used, and nothing looks wrong."
    else:
        verdict = f"All {plural(n_cases, 'case')} can be used."
    if n_warned:
        verdict += (
            f" Somebody should look at {count(n_warned)} that can be used but "
            f"{'has' if n_warned == 1 else 'have'} a warning."
        )
    elif n_usable and check.problems and not n_out:
        verdict += " Somebody should look at the folder or its lists."
    sheet = check.datasheet
    return Headline(
        verdict,
        tone,
        (
            KeyNumber(count(n_usable), "cases can be used", f"of {plural(sheet.patients, 'patient')}"),
            KeyNumber(count(n_cases - n_usable), "left out", "an error each, or several"),
            KeyNumber(count(n_warned), "usable with a warning"),
            KeyNumber(
                count(sheet.references),
                "references",
                "no list under [data] reference" if site.data.reference is None else "usable ones",
            ),
            KeyNumber(
                count(len(check.leaves(site.policy.min_count))),
                "numbers would leave the site",
                f"each over {plural(site.policy.min_count, 'patient')} or more",
            ),
        ),
        (_ONLY_HERE,),
    )


def _warned(check: SiteCheck) -> set[str]:
    """Ids of the usable cases with a warning."""
    usable = {case.id for case in check.checked.usable}
    return {problem.case for problem in check.problems if problem.case in usable}


# ----------------------------------------------------------------------------------------------- problems


def found_section(check: SiteCheck, site: SiteConfig) -> Section:
    """What was found, code by code."""
    title, intro = (
        "What was found",
        "One line for each kind of problem, with what to do for most of its cases.",
    )
    if not check.problems:
        note = Note("Nothing: every file could be read, and no check had anything to say.", "good")
        return Section("found", title, "", (note,))
    ids = {case.id for case in check.checked.cases}
    parts: list[Part] = []
    for severity, heading in (
        ("error", "Errors: these cases are left out"),
        ("warning", "Warnings: these cases stay, but somebody should look"),
    ):
        found = {code: some for code, some in check.by_code().items() if CODES[code] == severity}
        if not found:
            parts.append(Note(f"No {severity}s.", "good"))
            continue
        rows = sorted(
            ((code, _cases_of(problems, ids), problems) for code, problems in found.items()),
            key=lambda row: -len(row[1]),
        )
        has_none = any(not cases for _, cases, _ in rows)
        parts.append(
            Table(
                heading,
                ("code", "cases", "what it means", "what to do", "for example"),
                tuple(
                    (
                        f"`{code}`",
                        count(len(cases)) if cases else UNKNOWN,
                        MEANINGS[code],
                        _usual_fix(problems),
                        listed(_examples(problems, site), shown=_EXAMPLES),
                    )
                    for code, cases, problems in rows
                ),
                "A dash: it is about the folder or a list, not about a case." if has_none else "",
                numeric=False,
            )
        )
    return Section("found", title, intro, tuple(parts))


def _cases_of(problems: Sequence[Problem], ids: set[str]) -> set[str]:
    """Cases of the site that have one of the problems."""
    return {problem.case for problem in problems if problem.case in ids}


def _usual_fix(problems: Sequence[Problem]) -> str:
    return Counter(problem.fix for problem in problems).most_common(1)[0][0]


def _examples(problems: Sequence[Problem], site: SiteConfig) -> list[str]:
    """Files, and cases where a problem names no file."""
    names = (
        problem.file_in(site.data.folder) or f"case {printable(problem.case or UNKNOWN)}"
        for problem in problems
    )
    return list(dict.fromkeys(names))


def cases_section(check: SiteCheck, site: SiteConfig) -> Section:
    """All problems, one by one."""
    ids = {case.id for case in check.checked.cases}
    left_out = ids - {case.id for case in check.checked.usable}

    def rank(problem: Problem) -> int:
        return 0 if problem.case not in ids else 1 if problem.case in left_out else 2

    problems = sorted(check.problems, key=rank)
    caption = "Files are seen from the data folder. What to do for each one is in `fedqc check --csv`."
    if len(problems) > MOST_ROWS:
        caption = (
            f"The first {MOST_ROWS} of {count(len(problems))} problems; `fedqc check --csv` writes all, "
            "each with what to do. Files are seen from the data folder."
        )
    table = Table(
        "Every problem",
        ("case", "problem", "file", "found"),
        tuple(
            (
                UNKNOWN if problem.case is None else printable(problem.case),
                f"`{problem.code}`",
                problem.file_in(site.data.folder) or UNKNOWN,
                f"{problem.found}; expected {problem.expected}",
            )
            for problem in problems[:MOST_ROWS]
        ),
        caption,
        numeric=False,
    )
    intro = "Problems of the folder and its lists come first, then cases that are left out, then the others."
    return Section("cases", "Case by case", intro, (table,))


# ----------------------------------------------------------------------------------------------- pictures


def pictures_section(affected: Mapping[Code, Affected], task: Task) -> Section:
    """Slices of affected cases."""
    intro = (
        "Left the scan, right the same slice with the label's contours. Where a problem is about single "
        "voxels, these are orange, and the slice is the one with most of them; else it is the one with the "
        "largest part of the label. The label is drawn voxel on voxel, whatever the headers say: if it fits "
        "the scan although the headers differ, it is the header that is wrong. The patient's right is on the "
        f"left; in sagittal slices the front is on the right. At most {MOST_OF_A_CODE} cases of a code and "
        f"{MOST_IN_ALL} in all are shown."
    )
    legend: tuple[Swatch, ...] = (
        *(
            Swatch(f"label: {name}", *CONTOURS[index % len(CONTOURS)])
            for index, name in enumerate(task.classes)
        ),
        Swatch("what the problem is about", MARKED, "fill"),
    )
    parts: list[Part] = []
    for severity, heading in (("error", "Errors"), ("warning", "Warnings")):
        of_kind = {code: one for code, one in affected.items() if CODES[code] == severity}
        pictures = tuple(_picture(drawn) for one in of_kind.values() for drawn in one.drawn)
        if pictures:
            some = [
                f"{len(one.drawn)} of {plural(one.cases, 'case')} with `{code}`"
                for code, one in of_kind.items()
                if len(one.drawn) < one.cases and one.drawn
            ]
            caption = f"Not all are shown: {listed(some, shown=len(some))}." if some else ""
            parts.append(Gallery(heading, pictures, caption, legend))
            legend = ()  # once is enough
        differ = [name for one in of_kind.values() for name in one.shapes_differ]
        if differ:
            parts.append(
                Note(
                    f"No picture of {listed(dict.fromkeys(differ))}: image and label have different shapes, "
                    "so no slice shows both."
                )
            )
    if not parts:
        parts.append(Note("None of the affected cases can be drawn: no image of theirs can be read."))
    return Section("pictures", "How it looks", intro, tuple(parts))


def _picture(drawn: Drawn) -> Picture:
    problem, found = drawn.problem, drawn.slice
    return Picture(
        found.png,
        f"{problem.code}: {printable(problem.case or UNKNOWN)}.",
        f"Found {problem.found}. {found.plane.capitalize()} slice, {found.modality}.",
    )


# --------------------------------------------------------------------------------------------- data sheet


def datasheet_section(check: SiteCheck, task: Task) -> Section:
    """What the usable cases are like."""
    title, sheet = "Data sheet", check.datasheet
    intro = (
        f"What the {plural(sheet.cases, 'usable case')} of {plural(sheet.patients, 'patient')} are like: one "
        "that lies far from the others deserves a look even where no check complains."
    )
    if not sheet.cases:
        return Section("datasheet", title, "", (Note("Nothing to describe: no case can be used."),))
    facts = [check.checked.facts[case.id] for case in check.checked.usable]
    volumes = {
        name: [fact.volumes_ml[name] for fact in facts if fact.volumes_ml[name] > 0]
        for name in list(task.classes)[: figures.MOST_NAMES]
    }
    intensities = {
        name: [(fact.images[index].low, fact.images[index].median, fact.images[index].high) for fact in facts]
        for index, name in enumerate(task.modalities[: figures.MOST_PANELS])
    }
    grids = [
        (
            "voxel side, mm",
            {axis: [fact.spacing[index] for fact in facts] for index, axis in enumerate(AXES)},
        ),
        ("voxels", {axis: [float(fact.shape[index]) for fact in facts] for index, axis in enumerate(AXES)}),
    ]
    return Section(
        "datasheet",
        title,
        intro,
        (
            Figure(
                "Volume of each class",
                "Over the cases that have the class. Good: one cloud. Bad: single marks far outside, often a "
                "label of another structure, one that is cut off, or voxels in other units than mm. "
                f"{_outer(sheet.cases)}{_first(len(task.classes), figures.MOST_NAMES)}",
                figures.strips([("volume, ml", volumes)]),
            ),
            Figure(
                "Grids of the files",
                "Voxel sides and numbers of voxels along the axes of the files, as they are stored. Several "
                f"clouds mean several protocols, which is no fault. {_outer(sheet.cases)}",
                figures.strips(grids),
            ),
            Figure(
                "Intensities of each case",
                "Of the voxels that are not zero; the cases in the order of their median. Good: a slow rise. "
                "A step means several scanners or protocols; a case with a band of its own width may "
                f"have been normalised or cut off. {_first(len(task.modalities), figures.MOST_PANELS)}",
                figures.intensity_bands(intensities),
            ),
            Table(
                "In numbers",
                ("what", "cases", "smallest", "at case", "median", "largest", "at case"),
                tuple(spread_rows(sheet)),
                "Intensities are medians of the voxels that are not zero. Where all cases are alike, none is "
                "named.",
                numeric=False,
            ),
            Table("How many cases have what", ("what", "cases"), tuple(_count_rows(check))),
        ),
    )


def _outer(n_cases: int) -> str:
    """Says so where not every case has a mark."""
    most = figures.MOST_MARKS
    return f"Of more than {most} cases the outer {most} have marks. " if n_cases > most else ""


def _first(n: int, most: int) -> str:
    """Says so where a figure does not show all."""
    return f"The first {most} of {n} are drawn." if n > most else ""


def _count_rows(check: SiteCheck) -> Iterator[tuple[str, ...]]:
    sheet = check.datasheet
    yield "reference", count(sheet.references)
    counted = {
        "orientation": sheet.orientations,
        "label value": sheet.label_values,
        "label convention": sheet.conventions,
        **sheet.groups,
    }
    for what, counts in counted.items():
        for value, n in counts.items():
            yield f"{what} {value}", count(n)


# ------------------------------------------------------------------------------------------ what may leave


def leaves_section(check: SiteCheck, site: SiteConfig) -> Section:
    """Which numbers would leave the site, and which are held back."""
    min_count = site.policy.min_count
    released = check.leaves(min_count)
    known = list(_figures_of(check.summary.model_dump()))
    intro = (
        "What the coordinator would be told about these data when a run begins (phase `summarise`). A number "
        f"leaves only if it tells something about {plural(min_count, 'patient')} or more: `min_count` under "
        "`[policy]`. A federation may ask for a larger one, which then holds."
    )
    rows = tuple(
        (
            _in_words(key),
            _shown(value),
            count(patients),
            _shown(released[key]) if key in released else "held back",
            f"`{key}`",
        )
        for key, value, patients in known
    )
    table = Table(
        "Number by number",
        ("what", "at this site", "patients behind it", "leaves as", "key"),
        rows,
        "Patients behind it: the fewest that the number tells something about; for totals, the smaller group "
        "of those with references and the others. Later phases tell more, by the same rule; every message "
        "that leaves is in the site's ledger.",
        last_is_text=True,
    )
    n_held = len(known) - len(released)
    held = f"{count(n_held)} {'is' if n_held == 1 else 'are'} held back"
    verdict = Note(f"{plural(len(released), 'number')} would leave, {held}.")
    return Section("leaves", "What would leave the site", intro, (verdict, table))


def _figures_of(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float, int]]:
    """Dotted key, value and patients of every number of a summary."""
    for name, value in values.items():
        if value is None:
            continue
        if "patients" in value and "value" in value:
            yield f"{prefix}{name}", value["value"], value["patients"]
        else:
            yield from _figures_of(value, f"{prefix}{name}.")


def _shown(value: float | list[int] | list[float]) -> str:
    """A number of the summary, which holds no histogram."""
    return count(value) if isinstance(value, int) else significant(value) if isinstance(value, float) else "-"


def _in_words(key: str) -> str:
    """What a number of the summary is."""
    kind, _, rest = key.partition(".")
    name, _, moment = rest.partition(".")
    of_what = {"mean": "mean ", "sd": "standard deviation of the "}.get(moment, "")
    return of_what + _NUMBERS.get(kind, key).format(name)
