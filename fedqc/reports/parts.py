"""Parts of reports that several sections need: a figure or a table together with the numbers behind it."""

from collections.abc import Mapping, Sequence

from fedqc.reports import figures
from fedqc.reports.page import Figure, Numbers, Value

Panels = Sequence[tuple[str, Sequence[figures.Dot], tuple[float, float] | None]]


def dots_figure(  # noqa: PLR0917 - as `figures.dot_panels`, with its texts
    title: str,
    caption: str,
    panels: Panels,
    legend: Sequence[tuple[str, str, str]] = (),
    lines: Mapping[str, tuple[float, str]] | None = None,
    rows: str = "site",
) -> Figure:
    """A figure of `figures.dot_panels`.

    Args:
        title: of the figure.
        caption: what to look for in it.
        panels: as there.
        legend: as there.
        lines: as there.
        rows: what each row is.
    """
    columns, values = [rows], [[dot.name for dot in panels[0][1]]]
    of_columns: list[Sequence[Value]] = [*values]
    for name, dots, _ in panels:
        columns.append(name)
        of_columns.append([dot.value for dot in dots])
        if any(dot.low is not None for dot in dots):
            columns += [f"{name}, low end", f"{name}, high end"]
            of_columns += [[dot.low for dot in dots], [dot.high for dot in dots]]
        if any(dot.note for dot in dots):
            columns.append(f"{name}, note")
            of_columns.append([dot.note for dot in dots])
    numbers = Numbers(tuple(columns), tuple(zip(*of_columns, strict=True)))
    return Figure(title, caption, figures.dot_panels(panels, legend, lines), numbers)


def by_site(columns: Sequence[str], sites: Mapping[str, Sequence[Value]]) -> Numbers:
    """Numbers with a row for each site."""
    return Numbers(("site", *columns), tuple((site, *values) for site, values in sites.items()))
