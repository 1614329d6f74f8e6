"""`fedqc review`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedqc.config import SiteConfig


def review(
    site: Annotated[Path, typer.Argument(help="The site.toml.")],
    *,
    by: Annotated[str | None, typer.Option(help="Who decides.", show_default="the user")] = None,
    pick: Annotated[
        int | None,
        typer.Option(min=1, help="Draw so many cases at random, to verify their labels as references."),
    ] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="On 127.0.0.1.", show_default="one that is free")
    ] = None,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
    sheet: Annotated[
        bool,
        typer.Option("--sheet", help="Write review.html, a sheet of the worst cases, and serve nothing."),
    ] = False,
) -> None:
    """Look at a site's cases in the browser, those first where it is worth most, and decide otherwise.

    The page is served to this machine only, until stopped with Ctrl-C. Decisions are saved at once.
    """
    from fedqc.commands.folders import user_name
    from fedqc.config import load_site
    from fedqc.curation.verified import VERIFIED
    from fedqc.errors import ConfigError
    from fedqc.review.serve import serve_review
    from fedqc.review.worklist import Worklist
    from fedqc.task import load_task

    if sheet:
        given = {"--by": by, "--pick": pick, "--port": port}
        for option in (name for name, value in given.items() if value is not None):
            raise ConfigError(
                f"{option} is for the page, which --sheet does not serve; leave one of them out"
            )
        _write_sheet(load_site(site))
        return
    config = load_site(site)
    worklist = Worklist(config, load_task(config.task), by=by if by is not None else user_name(), pick=pick)

    def opened(address: str) -> None:
        typer.echo(f"{len(worklist.ids)} cases of {config.name}; open {address}")
        typer.echo(f"{worklist.by} decides; stop with Ctrl-C, what is decided is saved")
        if pick is not None:
            typer.echo(
                f"what you keep is listed in {config.results / VERIFIED}, with the references so far; "
                "when you are done, name that file under [data] reference"
            )
        if browser:
            _open(address)

    serve_review(worklist, port or 0, opened)


def _write_sheet(site: "SiteConfig") -> None:
    from rich.console import Console

    from fedqc.curation.manifest import refuse_another_user
    from fedqc.display import Display
    from fedqc.review.sheet import write_sheet
    from fedqc.review.worklist import SHEET
    from fedqc.task import load_task

    refuse_another_user(site.results)
    console = Console(width=None if sys.stdout.isatty() else 100)
    with Display(console) as display:
        for sentence in write_sheet(
            site, load_task(site.task), lambda done, total: display.progress("drawing", done, total)
        ):
            display.say(f"not drawn: {sentence}")
    console.print(f"see {site.results / SHEET}", highlight=False, markup=False, soft_wrap=True)


def _open(address: str) -> None:
    """Open the address in a browser, without its token in the list of processes, which all users can read."""
    import os
    import tempfile
    import threading
    import webbrowser

    # Mode 0600; in the home folder, since browsers in a sandbox of their own see another /tmp.
    home = Path.home() if os.access(Path.home(), os.W_OK) else None
    descriptor, name = tempfile.mkstemp(".html", "fedqc-review-", home)
    os.close(descriptor)
    page = Path(name)
    page.write_text(f'<!doctype html><meta http-equiv="refresh" content="0;url={address}">', encoding="utf-8")

    def show() -> None:  # a text browser would keep the server waiting that it waits for
        webbrowser.open(page.as_uri())

    threading.Thread(target=show, daemon=True).start()
    forget = threading.Timer(60, page.unlink, kwargs={"missing_ok": True})
    forget.daemon = True
    forget.start()
