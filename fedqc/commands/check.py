"""`fedqc check`."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from fedqc.site_check import SiteCheck
    from fedqc.statistics.datasheet import DataSheet


def check(
    site: Annotated[Path, typer.Argument(help="The site.toml that names data, lists and task.")],
    *,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that was found as JSON, for machines.")
    ] = False,
    html: Annotated[
        Path | None,
        typer.Option(help="Also write a report with slices of the affected cases, for local use."),
    ] = None,
) -> None:
    """Look through a site's data: what is there, what is wrong, and how to mend it.

    Needs neither network nor GPU, and changes nothing in the data folder. Exit code 0: nothing was found,
    1: warnings, or cases that are left out, 2: no case can be used, or the configuration is wrong.
    """
    from rich.console import Console

    from fedqc.config import load_site
    from fedqc.display import Display
    from fedqc.task import load_task

    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, stderr=as_json)
    config = load_site(site)
    task = load_task(config.task)
    folder = config.data.path.parent if config.data.path.is_file() else config.data.path
    if html is not None:
        _refuse_wrong_place(html, folder)
    with Display(console) as display:
        from fedqc.site_check import check_site

        memory: Path | None = config.compute.cache / "checks"
        hindrance = _hindrance(config.compute.cache, folder)
        if hindrance is not None:
            display.say(
                f"the cache {config.compute.cache} {hindrance}, so nothing is remembered; "
                "name another folder under [compute] cache"
            )
            memory = None
        found = check_site(
            config,
            task,
            memory=memory,
            progress=lambda done, total: display.progress("checking the cases", done, total),
        )
        if html is not None:
            from fedqc.reports.check import build_check_report

            build_check_report(
                found,
                config,
                task,
                html,
                progress=lambda done, total: display.progress("drawing slices", done, total),
            )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        detected = " (detected)" if config.data.layout is None else ""
        console.print(
            f"layout {found.checked.layout}{detected}, task {task.name}", highlight=False, soft_wrap=True
        )
        _print_check(console, found, config.policy.min_count)
        if html is not None:
            console.print(f"see {html}", highlight=False, soft_wrap=True)
    raise typer.Exit(found.exit_code)


def _refuse_wrong_place(html: Path, data: Path) -> None:
    """Nothing but an earlier report is written over, and nothing is written among the data.

    Raises:
        ConfigError: the report cannot stand there.
    """
    from fedqc.errors import ConfigError
    from fedqc.reports.page import is_report

    if html.resolve().is_relative_to(data):
        raise ConfigError(
            f"{html}: lies inside the data folder {data}, which is only read; name another place"
        )
    if html.is_dir():
        raise ConfigError(f"{html}: is a folder; name a file, such as {html / 'check.html'}")
    if not html.parent.is_dir():
        raise ConfigError(f"{html.parent}: there is no such folder; make it first, or name another place")
    if html.exists() and not is_report(html):
        raise ConfigError(
            f"{html}: is there already and is no report; nothing is written over, name a new file"
        )


def _hindrance(cache: Path, data: Path) -> str | None:
    """Why checked cases cannot be remembered in the site's cache; None where they can."""
    if cache.is_relative_to(data):
        return "lies inside the data folder, which is only read"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"


def _print_check(console: "Console", found: "SiteCheck", min_count: int) -> None:
    """The data sheet, a table of problems by code, an example of each, and the verdict."""
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    checked, sheet = found.checked, found.datasheet
    if sheet.cases:
        _print_sheet(console, sheet)
    if found.problems:
        _print_problems(console, found)
    left_out = len(checked.cases) - len(checked.usable)
    warned = len({one.case for one in found.problems if not one.is_error and one.case is not None})
    say(
        f"{len(checked.usable)} of {len(checked.cases)} cases can be used "
        f"({sheet.patients} patients, {sheet.references} references), {left_out} are left out, "
        f"{warned} have warnings"
    )
    if not sheet.references:
        say("no case is a reference, so this site can score its labels but not help to train the QC model")
    numbers = len(found.leaves(min_count))
    say(f"{numbers} numbers about the data would leave the site, each over {min_count} patients or more")


def _print_sheet(console: "Console", sheet: "DataSheet") -> None:
    """What the usable cases are like."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title="Usable cases", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "n", "smallest", "median", "largest"):
        table.add_column(column, justify="right" if column else "left")
    spreads = {
        **{f"voxel side {axis}, mm": spread for axis, spread in sheet.spacing_mm.items()},
        **{f"voxels along {axis}": spread for axis, spread in sheet.shape.items()},
        **{f"median intensity of {name}": spread for name, spread in sheet.intensities.items()},
        **{f"volume of {name}, ml": spread for name, spread in sheet.volumes_ml.items()},
    }
    for name, spread in spreads.items():
        if spread is None:
            table.add_row(name, "0", "-", "-", "-")
        else:
            figures = (spread.smallest, spread.median, spread.largest)
            table.add_row(name, str(spread.n), *(f"{figure:.4g}" for figure in figures))
    console.print(table)
    counted = {
        "orientation": sheet.orientations,
        "label value": sheet.label_values,
        "label convention": sheet.conventions,
        **sheet.groups,
    }
    for name, counts in counted.items():
        if counts:
            values = ", ".join(f"{value} ({count})" for value, count in counts.items())
            console.print(f"{name}: {values}", highlight=False, markup=False, soft_wrap=True)


def _print_problems(console: "Console", found: "SiteCheck") -> None:
    """A table by code, the errors first, and below it an example of each code in full."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="Problems", title_justify="left", box=SIMPLE_HEAD)
    for column in ("code", "severity", "cases", "such as"):
        table.add_column(column, justify="right" if column == "cases" else "left")
    for code, problems in found.by_code().items():
        cases = list(dict.fromkeys(problem.case for problem in problems if problem.case is not None))
        names = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        table.add_row(code, problems[0].severity, str(len(cases)) if cases else "-", escape(names))
    console.print(table)
    for code, problems in found.by_code().items():
        console.print(f"{code}: {problems[0]}", highlight=False, markup=False, soft_wrap=True)
    console.print()
