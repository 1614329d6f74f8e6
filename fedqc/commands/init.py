"""`fedqc init`: site, federation, certificate and key."""

import sys
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="Write a commented site.toml or federation.toml; make keys and certificates.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
Yes = Annotated[bool, typer.Option("--yes", help="Ask nothing; what is not given has its default.")]


def _may_ask(yes: bool) -> bool:
    return not yes and sys.stdin.isatty()


@app.command()
def site(
    path: Annotated[Path, typer.Argument(help="The new file; nothing is written over.")] = Path("site.toml"),
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the site: lower-case letters, digits, hyphens.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A built-in task, or the path of a task's .toml.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data, or a table that lists them; it is only read.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected if left out.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Table (column id) of the cases whose label the site vouches for.")
    ] = None,
    ratings: Annotated[
        Path | None, typer.Option(help="Table (columns id, rater, view, stars) of ratings by people.")
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Folder for what stays at the site.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16.")] = None,
    workers: Annotated[int | None, typer.Option(help="Cases that are prepared at the same time.")] = None,
    cache: Annotated[Path | None, typer.Option(help="Folder for prepared cases.")] = None,
    min_count: Annotated[
        int | None, typer.Option(help="Fewest patients behind any number that leaves the site.")
    ] = None,
    segmentation: Annotated[
        bool | None, typer.Option(help="Whether to take part in the training of a segmentation model.")
    ] = None,
    address: Annotated[str | None, typer.Option(help="Host and port of the coordinator.")] = None,
    ca: Annotated[Path | None, typer.Option(help="Certificate that the coordinator sent.")] = None,
    key: Annotated[
        Path | None,
        typer.Option(
            help="Private key of the site; made where there is none.", show_default="NAME.key beside the file"
        ),
    ] = None,
    yes: Yes = False,
) -> None:
    """Describe a site: its name, its data and what it allows.

    At a terminal, what is not given is asked for. --name, --task and --data must be there, the rest has
    defaults.
    """
    from fedqc.init import init_site

    options = {
        "--name": name,
        "--task": task,
        "--data": data,
        "--layout": layout,
        "--reference": reference,
        "--ratings": ratings,
        "--results": results,
        "--device": device,
        "--precision": precision,
        "--workers": workers,
        "--cache": cache,
        "--min-count": min_count,
        "--segmentation": segmentation,
        "--address": address,
        "--ca": ca,
        "--key": key,
    }
    init_site(path, options, asking=_may_ask(yes))


@app.command()
def federation(
    path: Annotated[Path, typer.Argument(help="The new file; nothing is written over.")] = Path(
        "federation.toml"
    ),
    *,
    name: Annotated[str | None, typer.Option(help="Name of the federation.")] = None,
    task: Annotated[str | None, typer.Option(help="A built-in task, or the path of a task's .toml.")] = None,
    sites: Annotated[
        str | None, typer.Option(help="Names of the sites, separated by commas; any site if left out.")
    ] = None,
    minimum: Annotated[int | None, typer.Option(help="Fewest sites that have to answer.")] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training of the QC model.")] = None,
    local_steps: Annotated[
        int | None, typer.Option(help="Training steps of a site in a round of the QC model.")
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Predicted quality (0 to 1) under which a label is dropped.")
    ] = None,
    segmentation_rounds: Annotated[
        int | None, typer.Option(help="Rounds of training of the segmentation model.")
    ] = None,
    min_count: Annotated[
        int | None, typer.Option(help="Fewest patients behind any number that leaves a site.")
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Make certificates for the server that sites reach under this name or address, or several, "
            "separated by commas."
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(help="Host and port where the server listens.", show_default="0.0.0.0:8443 with --host"),
    ] = None,
    yes: Yes = False,
) -> None:
    """Describe a federation: its sites, how the models are trained, what is kept.

    At a terminal, what is not given is asked for. --task must be there; the rest has defaults.
    """
    from fedqc.init import init_federation

    options = {
        "--name": name,
        "--task": task,
        "--sites": sites,
        "--minimum": minimum,
        "--rounds": rounds,
        "--local-steps": local_steps,
        "--threshold": threshold,
        "--segmentation-rounds": segmentation_rounds,
        "--min-count": min_count,
        "--host": host,
        "--address": address,
    }
    init_federation(path, options, asking=_may_ask(yes))


@app.command()
def certificate(
    folder: Annotated[
        Path, typer.Argument(help="With ca.crt and ca.key, as init federation --host made it.")
    ] = Path("certificates"),
    *,
    host: Annotated[
        str | None,
        typer.Option(
            help="Name or address under which sites reach the server, or several, separated by commas.",
            show_default="as in the certificate before",
        ),
    ] = None,
) -> None:
    """Make another server certificate, before the one there is runs out; sites trust it as the one before."""
    from fedqc.certificates import YEARS_OF_SERVER, renew_server_files

    hosts = [name.strip() for name in host.split(",")] if host else []
    files = renew_server_files(folder, hosts)
    typer.echo(
        f"{files.certificate} and {files.key} are new, for {YEARS_OF_SERVER} years; start fedqc server again"
    )


@app.command()
def key(
    name: Annotated[str, typer.Argument(help="Name of the site.")],
    *,
    out: Annotated[
        Path | None, typer.Option(help="The private key; nothing is written over.", show_default="NAME.key")
    ] = None,
) -> None:
    """Make a site's keys anew, where they were lost or somebody else may have them."""
    from fedqc.certificates import make_site_key

    private = out or Path(f"{name}.key")
    public = make_site_key(private, name)
    typer.echo(f"{private} stays here, send {public} to the coordinator")
