"""The command line: parses, calls one function, prints.

Commands that need no role are in `fedqc.commands`; those that start one are here, the one door of the
library to the roles, opened when such a command runs. Everything heavy is imported then, too, so that
`fedqc --help` answers at once.
"""

import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click
import typer

from fedqc import __version__
from fedqc.commands import check, import_, init, manifest, review, score, segment, train
from fedqc.errors import FedQCError

if TYPE_CHECKING:
    from rich.console import Console

    from fedqc.config import FederationConfig

DEFAULT_UNSEEN = "slices-left-out,another-patient,left-right-flip"
SIMULATION_MIN_COUNT = 3


class Noise(StrEnum):
    """What a simulation does to the candidates' labels."""

    MIXED = "mixed"
    SYSTEMATIC = "systematic"
    SYSTEMATIC_REFERENCE = "systematic-reference"
    NONE = "none"


class Engine(StrEnum):
    """What runs the sites of a simulation."""

    LOCAL = "local"
    RAY = "ray"


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


@app.command()
def server(
    federation: Annotated[Path, typer.Argument(help="The federation.toml.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run; one that was cut off goes on.", show_default="runs/NAME beside the file"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    status: Annotated[
        bool, typer.Option("--status", help="Say how a run stands, from another terminal, and do nothing.")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page/--no-page", help="Show the run on a page on this machine.")
    ] = True,
    page_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Of the page, on 127.0.0.1.", show_default="one that is free"),
    ] = None,
) -> None:
    """Lead a federation: wait for the sites, train, curate, report; and go on where a run was cut off.

    Starts Flower's server and the gateway in front of it, and stops both in the end. Exit code 0: the run is
    completed; 3: it failed, and the same command goes on with it.
    """
    from fedqc_server.launch import serve
    from fedqc_server.status import status_lines
    from rich.console import Console

    from fedqc.config import load_federation
    from fedqc.display import Display

    console = Console(width=None if sys.stdout.isatty() else 100)
    folder = out or federation.resolve().parent / "runs" / load_federation(federation).name
    if status:
        for line in status_lines(folder):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return
    with Display(console) as display:
        serve(
            federation,
            folder,
            seed=seed,
            say=display.say,
            listener=display.listen,
            page=(page_port or 0) if page else None,
        )
    console.print(f"see {folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def client(
    site: Annotated[Path, typer.Argument(help="The site.toml.")],
    *,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Show every record that would leave the site, and connect to nobody."),
    ] = False,
    federation: Annotated[
        Path | None,
        typer.Option(help="With --dry-run: the federation.toml that the coordinator plans."),
    ] = None,
) -> None:
    """Take part in a federation as a site, until stopped with Ctrl-C.

    Only connects outwards, to the coordinator; nothing listens for the network.
    """
    from fedqc_client.dry_run import what_would_leave
    from fedqc_client.launch import serve_site
    from rich.console import Console

    from fedqc.config import load_federation
    from fedqc.display import Display
    from fedqc.errors import ConfigError
    from fedqc.files import private_files

    console = Console(width=None if sys.stdout.isatty() else 100)
    if federation is not None and not dry_run:
        raise ConfigError("--federation: is for --dry-run; in a run the coordinator says what is trained")
    if dry_run:
        planned = None if federation is None else load_federation(federation)
        for one in what_would_leave(site, planned):
            console.print(
                f"{one.kind}, {one.record}: {one.content}", highlight=False, markup=False, soft_wrap=True
            )
        return
    with private_files(), Display(console) as display:
        serve_site(site, say=display.say, progress=display.progress)


@app.command()
def ledger(
    site: Annotated[Path, typer.Argument(help="The site.toml.")],
    *,
    kind: Annotated[
        str | None, typer.Option(help="Only messages of this type, such as query.score.", show_default="all")
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="Also name, type and shape of each array of weights.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="The lines as they are written down.")] = False,
) -> None:
    """Show what has left a site: every message, when, to whom, and all that it told."""
    from fedqc_client.ledger import NAME, Ledger, in_words

    from fedqc.config import load_site

    path, shown = load_site(site).results / NAME, 0
    for text, line in Ledger(path).lines():
        if line is not None and kind in {None, line.kind}:
            shown += 1
            typer.echo(text if json else "\n".join(in_words(line, weights=weights)))
        elif line is None and not json:
            typer.echo(f"not a whole line, or of another version: {text[:200]}")
    if not shown:
        typer.echo(f"{path}: no message{f' of type {kind}' if kind else ''} has left this site", err=True)


@app.command()
def simulate(
    federation: Annotated[
        Path | None, typer.Argument(help="A federation.toml; options given here beat it.", show_default=False)
    ] = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Folder for the run; must be new or empty.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Folder of the data set, only read; phantoms where left out.")
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected where left out.")
    ] = None,
    task: Annotated[str | None, typer.Option(help="A built-in task, or the path of a task's .toml.")] = None,
    sites: Annotated[int | None, typer.Option(help="Number of hospitals.", show_default="4")] = None,
    noise: Annotated[Noise, typer.Option(help="Errors put into the labels.")] = Noise.MIXED,
    unseen: Annotated[
        str | None,
        typer.Option(help="Kinds of error kept out of training.", show_default=DEFAULT_UNSEEN),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Decides everything that is drawn.", show_default="0")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Several seeds, such as 0,1,2: one simulation each, figures pooled.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training of the QC model.")] = None,
    local_steps: Annotated[
        int | None, typer.Option(help="Training steps of a site in a round of the QC model.")
    ] = None,
    segmentation_rounds: Annotated[
        int | None, typer.Option(help="Rounds of training of the segmentation model.")
    ] = None,
    engine: Annotated[Engine, typer.Option(help="In this process, or Flower's Ray.")] = Engine.LOCAL,
    workers: Annotated[int, typer.Option(min=1, help="Processes of the engine ray.")] = 2,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Folder of a simulation that was cut off, to go on with. Stands alone."),
    ] = None,
) -> None:
    """Build a consortium, spoil known labels, run it, and measure what curation finds and is worth.

    Sites get their cases from a data set (--data), or phantoms are drawn for them.
    """
    from rich.console import Console

    from fedqc.config import ComputeConfig, parse
    from fedqc.display import Display
    from fedqc.errors import ConfigError

    console = Console(width=None if sys.stdout.isatty() else 100)
    begin = time.monotonic()
    context = click.get_current_context()
    if resume is not None:
        given = [name for name in context.params if _is_given(context, name) and name != "resume"]
        if given:
            raise ConfigError(
                f"--resume goes on with a simulation as it was started; leave out {', '.join(sorted(given))}"
            )
        with Display(console) as display:
            display.say(f"going on with {resume}")
            from fedqc_simulations.simulate import resume as go_on

            figures = _resumable(resume, lambda: go_on(resume, display))
        folder = resume
    else:
        if out is None:
            raise ConfigError("--out is missing; name a new folder for the run, such as --out runs/first")
        config = _simulated_federation(
            federation,
            task=task or ("phantom" if data is None and federation is None else None),
            sites=sites,
            unseen=unseen,
            rounds=rounds,
            local_steps=local_steps,
            segmentation_rounds=segmentation_rounds,
        )
        if layout is not None and data is None:
            raise ConfigError("--layout says how --data is laid out; give --data too, or leave --layout out")
        if engine is not Engine.RAY and _is_given(context, "workers"):
            raise ConfigError("--workers is for --engine ray; the local engine works in this process")
        compute = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
        with Display(console) as display:
            display.say(f"simulating {len(config.sites.expected)} sites; results go to {out}")
            from fedqc_simulations.simulate import Settings
            from fedqc_simulations.simulate import simulate as run

            settings = Settings(
                federation=config,
                data=None if data is None else data.resolve(),
                layout=layout,
                noise=noise.value,
                seeds=_seeds(seed, seeds),
                compute=compute,
                threads=threads,
                engine=engine.value,
                workers=workers,
            )
            figures = _resumable(out, lambda: run(settings, out, display))
        folder = out
    _print_figures(console, figures)
    minutes = (time.monotonic() - begin) / 60
    console.print(
        f"done in {minutes:.1f} minutes; see {folder / 'report.html'}", highlight=False, soft_wrap=True
    )


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="qcresunet, voxresnet, robinson, dqe, williams or methods.")],
    *,
    task: Annotated[str, typer.Option(help="A built-in task, or the path of a task's .toml.")],
    out: Annotated[Path, typer.Option(help="Folder for the table; one that was cut off goes on.")],
    data: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the data set; it is only read. Left out: phantoms, if the task has some."
        ),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected where left out.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Few cases and steps: minutes, and no figures to quote.")
    ] = False,
    sites: Annotated[
        int, typer.Option(min=0, help="Train across so many sites too, beside the pooled data; 0: do not.")
    ] = 0,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Rounds of every training; the table's own number where left out."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
) -> None:
    """Make a paper's table again on a data set: table.md, table.json and figures.

    qcresunet: Qiu et al. 2023, Table 1. voxresnet: Zhang & Chung 2019, Table 1. robinson: Robinson et al.
    2018, Table 1, experiments 1 and 2. dqe: Kofler et al. 2022, Table 1 and the external evaluation, on
    ratings by simulated raters. williams: Williams et al., Table 1. methods: all methods on spoiled
    annotations.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from fedqc.commands.folders import refuse_inside
    from fedqc.config import ComputeConfig, parse
    from fedqc.display import Display
    from fedqc.errors import ConfigError

    console = Console(width=None if sys.stdout.isatty() else 120)
    compute = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
    if sites == 1:
        raise ConfigError("--sites 1: a federation has two sites at least; leave it out, or name more")
    if data is not None:
        refuse_inside(out, data)
    elif layout is not None:
        raise ConfigError("--layout says how --data is laid out; give --data too, or leave --layout out")
    begin = time.monotonic()
    with Display(console) as display:
        import torch
        from fedqc_simulations.experiments.base import Settings
        from fedqc_simulations.experiments.reproduce import reproduce as run

        if threads is not None:
            torch.set_num_threads(threads)
        task = str(Path(task).expanduser().resolve()) if task.endswith(".toml") else task
        settings = Settings(data and data.resolve(), layout, task, seed, quick, sites, compute, rounds)
        table = run(name, settings, out.resolve(), display)
    console.print(Markdown(table.read_text(encoding="utf-8")))
    minutes = (time.monotonic() - begin) / 60
    console.print(f"done in {minutes:.1f} minutes; see {table}", highlight=False, soft_wrap=True)


def _is_given(context: click.Context, name: str) -> bool:
    return context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE


def _seeds(seed: int | None, seeds: str | None) -> tuple[int, ...]:
    """The seeds of `--seed` or `--seeds`."""
    from fedqc.errors import ConfigError

    if seeds is None:
        return (seed or 0,)
    if seed is not None:
        raise ConfigError("--seed and --seeds exclude each other; name all seeds in --seeds")
    parts = [part.strip() for part in seeds.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() for part in parts):
        raise ConfigError(f"--seeds {seeds!r}: expected whole numbers separated by commas, such as 0,1,2")
    return tuple(int(part) for part in parts)


def _resumable(folder: Path, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Do the work of a run; where it fails half-way, say how to go on."""
    from fedqc.errors import RunError, TrainingError

    try:
        return work()
    except (RunError, TrainingError) as error:
        hint = f"what is done is kept; go on with: fedqc simulate --resume {folder}"
        raise type(error)(f"{error}; {hint}") from error
    except KeyboardInterrupt:
        if (folder / "simulation.json").exists():
            typer.echo(f"what is done is kept; go on with: fedqc simulate --resume {folder}", err=True)
        raise


def _simulated_federation(
    path: Path | None,
    *,
    task: str | None,
    sites: int | None,
    unseen: str | None,
    rounds: int | None,
    local_steps: int | None,
    segmentation_rounds: int | None,
) -> "FederationConfig":
    """The federation of a simulation: the file's, or the defaults, with the options on top."""
    from fedqc.config import FederationConfig, load_federation, parse
    from fedqc.degradation.annotator import ANNOTATOR_KINDS
    from fedqc.errors import ConfigError

    if path is None and task is None:
        known = "fedqc simulate --task msd-hippocampus ..."
        raise ConfigError(f"--task is missing; name what the data show, such as {known}")
    values: dict[str, Any] = {"name": "simulation"}
    if path is not None:
        values = load_federation(path).model_dump(exclude_unset=True)
    tables = ("sites", "qc", "segmentation", "privacy")
    table: dict[str, dict[str, Any]] = {key: dict(values.get(key, {})) for key in tables}
    if task is not None:
        # A path is seen from here, not from the run's folder.
        values["task"] = str(Path(task).expanduser().resolve()) if task.endswith(".toml") else task
    if sites is not None or not table["sites"].get("expected"):
        from fedqc_simulations.simulate import site_names

        table["sites"]["expected"] = site_names(4 if sites is None else sites)
    table["sites"].setdefault("minimum", min(2, len(table["sites"]["expected"])))
    if unseen is not None or "leave_out" not in table["qc"]:
        kinds = [
            kind.strip() for kind in (DEFAULT_UNSEEN if unseen is None else unseen).split(",") if kind.strip()
        ]
        unknown = [kind for kind in kinds if kind not in ANNOTATOR_KINDS]
        if unknown:
            raise ConfigError(
                f"--unseen {', '.join(unknown)}: no such kind; known: {', '.join(ANNOTATOR_KINDS)}"
            )
        table["qc"]["leave_out"] = tuple(kinds)
    table["qc"] |= {
        key: value for key, value in (("rounds", rounds), ("local_steps", local_steps)) if value is not None
    }
    if segmentation_rounds is not None:
        table["segmentation"]["rounds"] = segmentation_rounds
    table["privacy"].setdefault("min_count", SIMULATION_MIN_COUNT)
    return parse(values | table, FederationConfig, source=str(path or "options"))


def _print_figures(console: "Console", evaluation: dict[str, Any]) -> None:
    """The figures people ask for first; the rest is in evaluation.json."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedqc.reports.words import number

    qc = Table(title="QC model on held-back cases", title_justify="left", box=SIMPLE_HEAD)
    for column in ("kinds of error", "n", "r (95 % interval)", "MAE", "error-map DSC"):
        qc.add_column(column, justify="left" if column == "kinds of error" else "right")
    for name, label in (("trained", "in training"), ("unseen", "never trained on"), ("all", "all")):
        one = evaluation["qc"][name]
        interval = number(one["r"])
        if one["r_ci"] is not None:
            interval += f" ({', '.join(number(end) for end in one['r_ci'])})"
        qc.add_row(label, str(one["n"]), interval, number(one["mae"]), number(one["dsc_err_median"]))
    console.print(qc)
    tau = evaluation["curation"]["all"]["tau"]
    title = f"Curation of the candidates (failure: true DSC under {tau:g})"
    curation = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    columns = ("site", "n", "failures", "dropped", "precision", "recall", "AUROC", "DSC before", "after")
    for column in columns:
        curation.add_column(column, justify="left" if column == "site" else "right")
    for name, one in evaluation["curation"].items():
        counts = [str(one[key]) for key in ("n_candidates", "n_failures", "n_dropped")]
        keys = ("precision", "recall", "auroc", "mean_dsc_before", "mean_dsc_after")
        curation.add_row("all sites" if name == "all" else name, *counts, *(number(one[key]) for key in keys))
    console.print(curation)
    _print_arms(console, evaluation["segmentation"])


def _print_arms(console: "Console", segmentation: dict[str, Any]) -> None:
    """What the choice of training cases did to the segmentation model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedqc.reports.words import number

    table = Table(title="Segmentation model on held-back cases", title_justify="left", box=SIMPLE_HEAD)
    for column in ("trained on", "cases", "mean DSC (95 % interval)"):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    labels = {
        "everything": "everything",
        "curated": "what was kept",
        "weighted": "by predicted quality",
        "random": "as many, at random",
        "oracle": "only good labels",
    }
    for arm, label in labels.items():
        one = segmentation[arm]
        shown = number(one["dice_mean"])
        if one["dice_ci"] is not None:
            shown += f" ({', '.join(number(end) for end in one['dice_ci'])})"
        table.add_row(label, str(one["n_train"]), shown)
    console.print(table)
    gap = segmentation["gap_closed"]
    if segmentation["curated"]["dice_mean"] is None:
        line = (
            "no site kept anything to train on: the QC model drops nearly all, so it was trained too little"
        )
    elif gap["value"] is None:
        line = "there is no gap to close: all labels do as well as only the good ones"
    elif gap["ci"] is None:
        line = "all labels and only good ones are too close to say how much of the gap curation closes"
    else:
        low, high = gap["ci"]
        line = (
            f"curation closes {gap['value']:.0%} ({low:.0%} to {high:.0%}) of the gap between all labels and "
            "only good ones"
        )
    console.print(line, highlight=False, soft_wrap=True)


app.command()(train.train)
app.command()(score.score)
app.command()(segment.segment)
app.add_typer(init.app, name="init")
app.command()(review.review)
app.add_typer(import_.app, name="import")
app.add_typer(manifest.app, name="manifest")
