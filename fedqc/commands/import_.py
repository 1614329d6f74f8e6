"""`fedqc import`."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Make fedqc models of published weights.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _group() -> None:
    """Keeps the name of a single command."""


@app.command()
def dqe(
    *,
    out: Annotated[Path, typer.Option(help="Folder of the model; must be new or empty.")] = Path("dqe"),
) -> None:
    """The published DQE: rates labels of `brats-glioma` with one to six stars.

    Takes the weights from the package deep-quality-estimation 0.0.3, which has to be installed.
    """
    from fedqc.commands.folders import refuse_full
    from fedqc.importing import import_dqe

    refuse_full(out)
    import_dqe(out.resolve())
    typer.echo(f"the model is in {out}; judge labels with: fedqc score --model {out} --data ... --out ...")
