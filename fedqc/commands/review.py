"""`fedqc review`."""

from pathlib import Path
from typing import Annotated

import typer


def review(
    site: Annotated[Path, typer.Argument(help="The site.toml.")],
    *,
    by: Annotated[str | None, typer.Option(help="Who decides.", show_default="the user")] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="On 127.0.0.1.", show_default="one that is free")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")
    ] = True,
) -> None:
    """Look at a site's cases in the browser, those first where it is worth most, and decide otherwise.

    The page is served to this machine only, until stopped with Ctrl-C. Decisions are saved at once.
    """
    import webbrowser
    from getpass import getuser

    from fedqc.config import load_site
    from fedqc.review.serve import serve_review
    from fedqc.review.worklist import Worklist
    from fedqc.task import load_task

    config = load_site(site)
    worklist = Worklist(config, load_task(config.task), by=getuser() if by is None else by)

    def opened(address: str) -> None:
        typer.echo(f"{len(worklist.ids)} cases of {config.name}; open {address}")
        typer.echo("stop with Ctrl-C; what is decided is saved")
        if browser:
            webbrowser.open(address)

    serve_review(worklist, port, opened)
