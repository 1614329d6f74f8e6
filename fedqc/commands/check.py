"""`fedqc check`."""

import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from fedqc.config import SiteConfig
    from fedqc.site_check import SiteCheck
    from fedqc.statistics.datasheet import DataSheet


def check(
    site: Annotated[
        Path | None,
        typer.Argument(help="The site.toml that names data, lists and task.", show_default=False),
    ] = None,
    *,
    data: Annotated[
        Path | None, typer.Option(help="Without a site.toml: the folder or table of the data.")
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Without a site.toml: a built-in task, or the path of a task's .toml.")
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(help="Without a site.toml: as the data are laid out; detected where left out."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print everything that was found as JSON, for machines.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option("--csv", help="Also write all problems as a table, for a spreadsheet.")
    ] = None,
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

    from fedqc.display import Display
    from fedqc.task import load_task

    width = None if sys.stdout.isatty() else 100
    console = Console(width=width, stderr=as_json)
    config = _configured(site, data, task, layout)
    known_task = load_task(config.task)
    for path, is_ours in ((html, _is_report), (table, _is_table)):
        if path is not None:
            _refuse_wrong_place(path, config.data.folder, is_ours)
    with Display(console) as display:
        from fedqc.site_check import check_site, write_problems

        memory: Path | None = None
        if site is not None:  # what was only looked at in passing leaves nothing behind
            memory = config.compute.cache / "checks"
            hindrance = _hindrance(config.compute.cache, config.data.folder)
            if hindrance is not None:
                display.say(
                    f"the cache {config.compute.cache} {hindrance}, so nothing is remembered; "
                    "name another folder under [compute] cache"
                )
                memory = None
        found = check_site(
            config,
            known_task,
            memory=memory,
            progress=lambda done, total: display.progress("checking the cases", done, total),
        )
        if table is not None:
            write_problems(table, found.problems)
        if html is not None:
            from fedqc.reports.check import build_check_report

            build_check_report(
                found,
                config,
                known_task,
                html,
                progress=lambda done, total: display.progress("drawing slices", done, total),
            )
    if as_json:
        typer.echo(json.dumps(found.as_json(), indent=2))
    else:
        detected = " (detected)" if config.data.layout is None else ""
        console.print(
            f"layout {found.checked.layout}{detected}, task {known_task.name}",
            highlight=False,
            soft_wrap=True,
        )
        _print_check(console, found, config)
        for path in (table, html):
            if path is not None:
                console.print(f"see {path}", highlight=False, soft_wrap=True)
    raise typer.Exit(found.exit_code)


def _configured(site: Path | None, data: Path | None, task: str | None, layout: str | None) -> "SiteConfig":
    """The site of a `site.toml`, or one that is made of the options.

    Raises:
        ConfigError: neither or both are there, or the file is wrong.
    """
    from fedqc.config import DataConfig, SiteConfig, expand, load_site
    from fedqc.errors import ConfigError

    options = {"--data": data, "--task": task, "--layout": layout}
    given = [name for name, value in options.items() if value is not None]
    if site is not None:
        if given:
            raise ConfigError(f"{', '.join(given)}: stands in {site} already; leave out one of them")
        return load_site(site)
    if data is None or task is None:
        lacking = "--task" if data is not None else "--data" if task is not None else None
        raise ConfigError(
            f"{lacking} is missing; name data and task, or a site.toml"
            if lacking
            else "nothing to check; name a site.toml (`fedqc init site` writes one), or --data and --task"
        )
    folder = expand(data).resolve()
    return SiteConfig(name="this-site", task=task, data=DataConfig(path=folder, layout=layout))


def _refuse_wrong_place(path: Path, data: Path, is_ours: "Callable[[Path], bool]") -> None:
    """Nothing but an earlier file of the same kind is written over, and nothing is written among the data.

    Raises:
        ConfigError: the file cannot stand there.
    """
    from fedqc.errors import ConfigError

    if path.resolve().is_relative_to(data):
        raise ConfigError(
            f"{path}: lies inside the data folder {data}, which is only read; name another place"
        )
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent}: there is no such folder; make it first, or name another place")
    if path.exists() and not is_ours(path):
        raise ConfigError(
            f"{path}: is there already and was not written by fedqc check; nothing is written over, "
            "name a new file"
        )


def _is_report(path: Path) -> bool:
    from fedqc.reports.page import is_report

    return is_report(path)


def _is_table(path: Path) -> bool:
    from fedqc.site_check import is_table_of_problems

    return is_table_of_problems(path)


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


def _print_check(console: "Console", found: "SiteCheck", config: "SiteConfig") -> None:
    """The data sheet, a table of problems by code, an example of each, and the verdict."""
    from fedqc.cases.splits import fewest_references
    from fedqc.reports.words import count, plural

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    checked, sheet = found.checked, found.datasheet
    if sheet.cases:
        _print_sheet(console, sheet)
    if found.problems:
        _print_problems(console, found, config.data.folder)
    n_out = len(checked.cases) - len(checked.usable)
    warned = {one.case for one in found.problems if not one.is_error}
    n_warned = len(warned & {case.id for case in checked.cases})  # lists may name what is no case
    verdict = (
        f"{count(len(checked.usable))} of {plural(len(checked.cases), 'case')} can be used "
        f"({plural(sheet.patients, 'patient')}, {plural(sheet.references, 'reference')}), "
        f"{count(n_out)} left out, {count(n_warned)} with warnings"
    )
    say(_plain(verdict))
    if not sheet.references:
        say("no case is a reference, so this site can score its labels but not help to train the QC model")
    min_count = config.policy.min_count
    needed = fewest_references(min_count)
    if 0 < sheet.reference_patients < needed:
        say(
            f"references of {plural(sheet.reference_patients, 'patient')}: with {needed}, the quarter that "
            f"calibrates is {min_count}, and what it finds may be told; once the cases are scored, fedqc "
            "review --pick draws some to verify"
        )
    numbers = plural(len(found.leaves(min_count)), "number")
    say(f"{numbers} about the data would leave the site, each over {min_count} patients or more")


def _plain(text: str) -> str:
    """A text for terminals, some of which know no narrow space between the thousands."""
    return text.replace("\u202f", " ")


def _print_sheet(console: "Console", sheet: "DataSheet") -> None:
    """What the usable cases are like."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from fedqc.reports.words import spread_rows

    table = Table(title="Usable cases", title_justify="left", box=SIMPLE_HEAD)
    for column in ("", "n", "smallest", "at", "median", "largest", "at"):
        is_text = column in ("", "at")
        table.add_column(column, justify="left" if is_text else "right", no_wrap=not column, overflow="fold")
    for row in spread_rows(sheet):
        table.add_row(*(escape(_plain(cell)) for cell in row))
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


def _print_problems(console: "Console", found: "SiteCheck", folder: Path) -> None:
    """A table by code, the errors first, and below it an example of each code in full."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    table = Table(title="Problems", title_justify="left", box=SIMPLE_HEAD)
    for column in ("code", "severity", "cases", "such as"):
        is_count = column == "cases"
        table.add_column(column, justify="right" if is_count else "left", overflow="fold")
    ids = {case.id for case in found.checked.cases}
    for code, problems in found.by_code().items():
        cases = list(dict.fromkeys(one.case for one in problems if one.case is not None and one.case in ids))
        names = ", ".join(cases[:3]) + (", ..." if len(cases) > 3 else "")
        table.add_row(code, problems[0].severity, str(len(cases)) if cases else "-", escape(names))
    console.print(table)
    for code, (problem, *_) in found.by_code().items():
        place = [f"case {problem.case}" if problem.case in ids else "", problem.file_in(folder)]
        say(f"{code}: {', '.join(part for part in place if part) or 'the data'}")
        say(f"    found     {problem.found}")
        say(f"    expected  {problem.expected}")
        say(f"    to do     {problem.fix}")
    say()
