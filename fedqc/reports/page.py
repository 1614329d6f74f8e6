"""A report's page: a declared list of sections with figures, tables and notes, written as one HTML file."""

import base64
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


@dataclass(frozen=True)
class Figure:
    """A drawing with what to look for in it."""

    kind: ClassVar[str] = "figure"
    title: str
    caption: str
    svg: str
    """As `fedqc.reports.figures` draws it."""


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
    path: Path, title: str, sections: Sequence[Section], *, headline: Headline, facts: Sequence[str] = ()
) -> None:
    """Write a report: one HTML file without scripts that asks nothing of the network.

    Args:
        path: of the file; it appears whole or not at all.
        title: of the page.
        sections: in the order of the page.
        headline: stands at the top.
        facts: stand under the title, such as when it ran.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("fedqc.reports"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["inline"] = _inline
    page = environment.get_template("report.html.jinja").render(
        title=title, sections=sections, headline=headline, facts=facts
    )
    with replacing(path) as aside:
        aside.write_text(page, encoding="utf-8")


def is_report(path: Path) -> bool:
    """Whether a file is a report that was written by `write_report`."""
    with path.open("rb") as file:
        return b'<meta name="generator" content="fedqc">' in file.read(4096)


def _prose(text: str) -> Markup:
    """Escaped text, with what stands between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704 - escaped before


def _inline(svg: str, number: int) -> Markup:
    """A drawing of ours as part of the page, its ids told apart from those of the others."""
    return Markup(with_prefix(svg, f"figure{number}"))  # noqa: S704 - our own drawing, its texts escaped
