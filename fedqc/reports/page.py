"""A report's page: a declared list of sections with figures, tables and notes, written as one HTML file."""

import base64
import csv
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import jinja2
from markupsafe import Markup, escape

from fedqc.files import replacing
from fedqc.reports.figures import with_prefix

Tone = Literal["good", "caution", "bad", "plain"]
Value = str | int | float | None
NUMBERS = "numbers.json"
"""All numbers of a report in one file."""


@dataclass(frozen=True)
class Numbers:
    """What a figure or a table shows, as numbers for a spreadsheet."""

    columns: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    """None is a number that is not known."""


@dataclass(frozen=True)
class Figure:
    """A drawing with what to look for in it."""

    kind: ClassVar[str] = "figure"
    title: str
    caption: str
    svg: str
    """As `fedqc.reports.figures` draws it."""
    numbers: Numbers | None = None
    """All that is drawn; None where no file of it is written."""


@dataclass(frozen=True)
class Table:
    """A table; its cells are text."""

    kind: ClassVar[str] = "table"
    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""
    numeric: bool = True
    """All columns but the first hold numbers."""
    last_is_text: bool = False
    """The last column holds text even so."""
    exact: Numbers | None = None
    """The same as numbers, where cells hold several or are rounded; None: the cells are what there is."""

    has_file: bool = True
    """Whether it is worth a file of its own."""

    @property
    def numbers(self) -> Numbers | None:
        """What is written into the table's own file."""
        return self.exact or (Numbers(self.columns, self.rows) if self.has_file else None)


@dataclass(frozen=True)
class Note:
    """A paragraph."""

    kind: ClassVar[str] = "note"
    text: str
    tone: Tone = "plain"


@dataclass(frozen=True)
class Picture:
    """A small PNG with its caption. Only a simulation's report and a hospital's own hold any."""

    png: bytes
    title: str
    caption: str

    @property
    def address(self) -> str:
        """The picture itself as an address, so that the page needs no other file."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode('ascii')}"


@dataclass(frozen=True)
class Swatch:
    """What a line of a colour means in the pictures."""

    label: str
    color: str
    """`#rrggbb`."""
    line: Literal["solid", "dashed", "dotted", "fill"]


@dataclass(frozen=True)
class Gallery:
    """Pictures side by side."""

    kind: ClassVar[str] = "gallery"
    title: str
    pictures: tuple[Picture, ...]
    caption: str = ""
    legend: tuple[Swatch, ...] = ()


Part = Figure | Table | Note | Gallery


@dataclass(frozen=True)
class Section:
    """A heading and what belongs under it. Text between backticks is shown as code, here and in all texts."""

    slug: str
    """Its anchor, one of its own on the page."""
    title: str
    intro: str
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True)
class KeyNumber:
    """One of the few numbers at the top."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class Headline:
    """What came out, in a sentence and a few numbers."""

    verdict: str
    tone: Tone
    numbers: tuple[KeyNumber, ...] = ()
    notes: tuple[Note, ...] = ()


def write_report(
    path: Path,
    title: str,
    sections: Sequence[Section],
    *,
    headline: Headline,
    facts: Sequence[str] = (),
    numbers: str | None = None,
) -> None:
    """Write a report: one HTML file without scripts that asks nothing of the network.

    Args:
        path: of the file; it appears whole or not at all.
        title: of the page.
        sections: in the order of the page.
        headline: stands at the top.
        facts: stand under the title, such as when it ran.
        numbers: name of a folder beside the report for what its figures and tables show: a CSV file each, to
            which the captions lead, and `numbers.json` with all of it; None: no such files.
    """
    files = [] if numbers is None else _number_files(sections)
    if numbers is not None:
        _write_numbers(path.parent / numbers, title, files)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedqc.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["inline"] = _inline
    environment.filters["id"] = id
    page = environment.get_template("report.html.jinja").render(
        title=title,
        sections=sections,
        headline=headline,
        facts=facts,
        files={id(one.part): f"{numbers}/{one.name}" for one in files},
    )
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is a report that was written by `write_report`."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="fedqc">' in file.read(4096)


@dataclass(frozen=True)
class _NumberFile:
    """A CSV file beside the report."""

    name: str
    section: str
    part: Figure | Table
    numbers: Numbers


def _number_files(sections: Sequence[Section]) -> list[_NumberFile]:
    """One for each figure and table, called after its section and title, so that a reader finds it."""
    files: dict[str, _NumberFile] = {}
    for section in sections:
        for part in section.parts:
            if not isinstance(part, Figure | Table) or part.numbers is None:
                continue
            name = re.sub(r"[^a-z0-9]+", "-", f"{section.slug} {part.title}".lower()).strip("-")
            while f"{name}.csv" in files:
                name += "-too"
            files[f"{name}.csv"] = _NumberFile(f"{name}.csv", section.title, part, part.numbers)
    return list(files.values())


def _write_numbers(folder: Path, title: str, files: Sequence[_NumberFile]) -> None:
    """Write what figures and tables show; what an earlier report had and this one has not goes."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in _numbers_there(folder) - {one.name for one in files}:
        (folder / old).unlink(missing_ok=True)
    for one in files:
        with replacing(folder / one.name) as aside, aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(one.numbers.columns)
            writer.writerows(one.numbers.rows)
    parts = [
        {
            "section": one.section,
            "title": one.part.title,
            "file": one.name,
            "columns": one.numbers.columns,
            "rows": one.numbers.rows,
        }
        for one in files
    ]
    with replacing(folder / NUMBERS) as aside:
        aside.write_text(json.dumps({"report": title, "parts": parts}) + "\n", encoding="utf-8")


def _numbers_there(folder: Path) -> set[str]:
    """Files that an earlier report wrote into the folder."""
    try:
        parts = json.loads((folder / NUMBERS).read_text(encoding="utf-8"))["parts"]
        named = {str(one["file"]) for one in parts}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
    return {one.name for one in folder.glob("*.csv")} & named


def _prose(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _inline(svg: str, number: int) -> Markup:
    """A drawing of ours as part of the page, its ids told apart from those of the others."""
    return Markup(with_prefix(svg, f"figure{number}"))  # noqa: S704 - our own drawing, its texts escaped
