"""What all figures of a report share: colours, style, the way to SVG, rows with names, lines of a threshold.

Colours are those of Okabe and Ito (2008), which every kind of colour vision tells apart; shapes and hatches
say the same, for print in black and white. Legends stand outside the axes, so that nothing lies on the data.
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from io import StringIO
from typing import ParamSpec
from xml.etree import ElementTree

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

BLUE, VERMILLION, ORANGE, GREEN, PURPLE = "#0072B2", "#D55E00", "#E69F00", "#009E73", "#CC79A7"
DARK, GREY, PALE = "#333333", "#8a8a8a", "#d9d9d9"

WIDTH = 8.6
"""Inches; on A4 letters stay larger than 8 points."""
GOLDEN = 0.6180339887
MOST_NAMES = 100
"""Sites that one figure can name."""
MOST_PANELS = 20
"""Sites that the small multiples can show; of more a map does."""
CROWDED = 30
"""Rows from which on marks are smaller."""
_NAME_LENGTH = 26
_MEASURED = 8
"""Texts of a column, the longest ones, for which room is made: measuring takes longer than drawing."""
_LEAST_ROW = 0.165
"""Inches of a row with a name."""

_STYLE = {
    "figure.dpi": 72,  # of an SVG, in which a point is a pixel
    "svg.fonttype": "none",
    # Comes with matplotlib, so that a figure has the same bytes everywhere. The page shows narrower letters.
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "text.parse_math": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": DARK,
    "axes.labelcolor": DARK,
    "axes.axisbelow": True,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.8,
    "figure.constrained_layout.wspace": 0.05,
    "figure.constrained_layout.hspace": 0.04,
    "legend.frameon": False,
    "legend.fontsize": 9.5,
}
_SVG = "{http://www.w3.org/2000/svg}"
_HREF = "{http://www.w3.org/1999/xlink}href"
_FONTS = "'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', 'DejaVu Sans', sans-serif"

Arguments = ParamSpec("Arguments")


def with_prefix(svg: str, prefix: str) -> str:
    """The same drawing with other ids, so that several can stand in one page."""
    return re.sub(r'(\bid="|url\(#|href="#)f-', rf"\g<1>{prefix}-", svg)


def drawn(draw: Callable[Arguments, Figure]) -> Callable[Arguments, str]:
    """Let a function draw in the report's style, whatever the user's own settings are, and return the SVG."""

    @functools.wraps(draw)
    def drawn(*args: Arguments.args, **kwargs: Arguments.kwargs) -> str:
        with matplotlib.style.context(_STYLE, after_reset=True):
            text = StringIO()
            figure = draw(*args, **kwargs)
            FigureCanvasSVG(figure)
            if engine := figure.get_layout_engine():
                # Else matplotlib draws everything once more, only to arrange it.
                engine.execute(figure)
                figure.set_layout_engine(None)
            figure.savefig(text, format="svg", transparent=True)
        return _tidied(text.getvalue())

    return drawn


def _tidied(text: str) -> str:
    """An SVG of matplotlib as part of a page: no metadata, no style for the page, no id without need."""
    root = ElementTree.fromstring(text)  # noqa: S314 - matplotlib has just written it
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag in {f"{_SVG}metadata", f"{_SVG}style"}:
                parent.remove(child)
    names: dict[str, str] = {}
    for value in (value for element in root.iter() for value in element.attrib.values()):
        for name in re.findall(r"url\(#([^)]+)\)", value):
            names.setdefault(name, f"f-{len(names)}")
    for element in root.iter():
        if _HREF in element.attrib:
            names.setdefault(element.attrib[_HREF].removeprefix("#"), f"f-{len(names)}")
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        element.attrib = dict(_attributes(element.attrib, names))
        element.text = element.text if (element.text or "").strip() else None
        element.tail = None
    root.attrib |= {"xmlns": _SVG.strip("{}"), "font-family": _FONTS, "stroke-linejoin": "round"}
    return ElementTree.tostring(root, encoding="unicode")


def _attributes(attributes: Mapping[str, str], names: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """The attributes of an element that are needed, with short ids."""
    for key, value in attributes.items():
        if key == "id":
            if value in names:
                yield key, names[value]
        elif key == _HREF:
            yield "href", f"#{names[value.removeprefix('#')]}"
        elif not value.startswith("rotate(-0 "):
            text = re.sub(r"url\(#([^)]+)\)", lambda match: f"url(#{names[match[1]]})", value)
            # The letters' size stays, their family is that of the whole drawing.
            yield key, re.sub(r"font-family: [^;]+(; |$)", "", text)


def threshold_line(line: Callable[..., object], at: float | None, linestyle: str) -> None:
    """A line of an axes, such as `axes.axvline`, at a bound of the rule; none where there is no bound."""
    if at is not None:
        line(at, color=DARK, linewidth=1.1, linestyle=linestyle)


def threshold_handles(threshold: float | None, keep_from: float | None) -> list[Line2D]:
    """What the lines of `threshold_line` mean."""
    if threshold is None:
        return []
    lines = [Line2D([], [], color=DARK, linewidth=1.1, linestyle="--", label=f"threshold {threshold:g}")]
    if keep_from is not None and keep_from != threshold:
        label = f"kept from {keep_from:g}"
        lines.append(Line2D([], [], color=DARK, linewidth=1.1, linestyle=":", label=label))
    return lines


def row_height(rows: int) -> float:
    """Inches; a figure of many rows still fits on a page, and its letters never overlap."""
    return max(_LEAST_ROW, min(0.36, 9 / max(1, rows)))


def name_rows(axes: Axes, names: Sequence[str], length: int = _NAME_LENGTH) -> None:
    """Write the rows' names at the left; long ones lose their middle."""
    axes.set_yticks([])
    row_texts(axes, -0.012, [short(name, length) for name in names], ha="right")


def row_texts(axes: Axes, at: float, texts: Sequence[str], ha: str) -> None:
    """A text beside each row, at a place in shares of the width. They are far faster than ticks."""
    longest = sorted(range(len(texts)), key=lambda row: len(texts[row]), reverse=True)[:_MEASURED]
    for row, text in enumerate(texts):
        if text:
            written = axes.text(
                at, row, text, transform=axes.get_yaxis_transform(), ha=ha, va="center_baseline"
            )
            written.set_in_layout(row in longest)


def short(name: str, length: int = _NAME_LENGTH) -> str:
    """A name that fits; its middle goes first, since names differ at their ends."""
    tail = length // 3
    return name if len(name) <= length else f"{name[: length - tail - 1]}\u2026{name[-tail:]}"


def plain_number(value: float, _position: float) -> str:
    """A tick as people write it, where matplotlib would write a formula."""
    return f"{value:g}" if abs(value) < 1e4 else f"{value:,.0f}".replace(",", "\u202f")


def numbers(values: Sequence[float | None]) -> list[float]:
    """Numbers to draw, with a gap where there is none."""
    return [float("nan") if value is None else value for value in values]
