"""The command line: parses, calls one function, prints; a command a file.

Roles and everything heavy are imported when a command is called, so that `fedqc --help` answers at once.
"""

import sys
from typing import Annotated

import typer

from fedqc import __version__
from fedqc.cli import check, init, segment, simulate
from fedqc.errors import FedQCError

app = typer.Typer(
    name="fedqc",
    help="Find the broken annotations of a consortium without a scan leaving its hospital.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; an error a user can meet is one sentence on stderr, never a traceback."""
    try:
        app()
    except FedQCError as error:
        _fail(str(error), error.exit_code)
    except OSError as error:
        _fail(
            f"{error.filename or 'a file'}: {error.strerror or error}; check path, rights and space",
            2,
        )
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    typer.echo(f"error: {message}", err=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedqc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.command()(check.check)
app.command()(simulate.simulate)
app.command()(segment.segment)
app.add_typer(init.app, name="init")
