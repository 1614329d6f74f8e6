"""`fedqc manifest`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fedqc.config import SiteConfig
    from fedqc.curation.manifest import Manifest
    from fedqc.task import Task

Site = Annotated[Path, typer.Argument(help="The site.toml.")]

app = typer.Typer(
    help="What was decided about a site's cases: check it, overrule it, take it to other tools.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Form(StrEnum):
    """In which form the kept cases are wanted."""

    CSV = "csv"
    LIST = "list"
    MSD = "msd"
    NNUNET = "nnunet"


class Choice(StrEnum):
    """What a person decides."""

    KEEP = "keep"
    DROP = "drop"
    RULE = "rule"


@app.command()
def verify(site: Site) -> None:
    """Compare the manifest with the files, the model and the rule, and say what changed.

    Exit code 0: all is as it was; 1: something is not.
    """
    from rich.console import Console

    from fedqc.curation.verification import changes
    from fedqc.display import Display

    console = Console(width=None if sys.stdout.isatty() else 100)
    config, _, manifest = _read(site)
    with Display(console) as display:
        found = changes(
            manifest,
            config.data.folder,
            config.results / "models" / "qc" / "weights.safetensors",
            lambda done, total: display.progress("reading the files", done, total),
        )
    for sentence in found:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    if found:
        raise typer.Exit(1)
    console.print(f"{len(manifest.entries)} cases, the model and all decisions are as they were")


@app.command()
def overrule(
    site: Site,
    case: Annotated[str, typer.Argument(help="Id of the case.")],
    decision: Annotated[Choice, typer.Argument(help="rule: what the rule says is to hold again.")],
    *,
    by: Annotated[str | None, typer.Option(help="Who decides.", show_default="the user")] = None,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads it later.")] = "",
) -> None:
    """Decide about a case in place of the rule; a later run respects it as long as the files are the same."""
    from fedqc.commands.folders import user_name
    from fedqc.curation.manifest import overrule as decide

    config, task, _ = _read(site)
    chosen = None if decision is Choice.RULE else decision.value
    entry = decide(
        config.results, task, case, chosen, by=by if by is not None else user_name(), reason=reason
    )
    typer.echo(f"{case}: {entry.outcome} (the rule said {entry.decision}: {entry.reason})")


@app.command()
def export(
    site: Site,
    *,
    form: Annotated[
        Form,
        typer.Option(
            help="csv: all candidates; list: kept files; msd: a dataset.json; nnunet: a splits_final.json."
        ),
    ] = Form.CSV,
    out: Annotated[
        Path | None, typer.Option(help="File to write; must not exist.", show_default="print it")
    ] = None,
) -> None:
    """Write what was kept in a form that other tools read."""
    from fedqc.curation.exports import FORMS
    from fedqc.errors import ConfigError

    _, task, manifest = _read(site)
    text = FORMS[form.value](manifest, task)
    if out is None:
        typer.echo(text, nl=False)
        return
    if out.exists():
        raise ConfigError(f"{out}: is there already; nothing is written over, name another file")
    out.write_text(text, encoding="utf-8")
    typer.echo(f"see {out}")


@app.command()
def schema() -> None:
    """Print the JSON schema of manifests."""
    import json

    from fedqc.curation.manifest import Manifest

    typer.echo(json.dumps(Manifest.model_json_schema(), indent=2))


def _read(site: Path) -> "tuple[SiteConfig, Task, Manifest]":
    """A site's configuration, task and manifest."""
    from fedqc.config import load_site
    from fedqc.curation.manifest import manifest_of
    from fedqc.task import load_task

    config = load_site(site)
    task = load_task(config.task)
    return config, task, manifest_of(config, task)
