"""The command line: parses, calls one function, prints. Roles and everything heavy are imported when used."""

import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedqc import __version__
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
    NONE = "none"


app = typer.Typer(
    name="fedqc",
    help="Find the broken annotations of a consortium without a scan leaving its hospital.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
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


@app.command()
def simulate(
    federation: Annotated[
        Path | None, typer.Argument(help="A federation.toml; options given here beat it.", show_default=False)
    ] = None,
    *,
    data: Annotated[Path, typer.Option(help="Folder of the data set; it is only read.")],
    out: Annotated[Path, typer.Option(help="Folder for the run; must be new or empty.")],
    layout: Annotated[str | None, typer.Option(help="msd or csv; detected where left out.")] = None,
    task: Annotated[str | None, typer.Option(help="A built-in task, or the path of a task's .toml.")] = None,
    sites: Annotated[int | None, typer.Option(help="Number of hospitals.", show_default="4")] = None,
    noise: Annotated[Noise, typer.Option(help="Errors put into the labels.")] = Noise.MIXED,
    unseen: Annotated[
        str | None,
        typer.Option(help="Kinds of error kept out of training.", show_default=DEFAULT_UNSEEN),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    rounds: Annotated[int | None, typer.Option(help="Rounds of training.")] = None,
    local_steps: Annotated[int | None, typer.Option(help="Training steps of a site in a round.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
) -> None:
    """Build a consortium from a data set, spoil known labels, run it, and measure what it finds."""
    from rich.console import Console

    from fedqc.config import ComputeConfig, parse
    from fedqc.display import Display

    console = Console(width=None if sys.stdout.isatty() else 100)
    config = _simulated_federation(
        federation,
        task=task,
        sites=sites,
        unseen=unseen,
        rounds=rounds,
        local_steps=local_steps,
    )
    compute = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
    begin = time.monotonic()
    with Display(console) as display:
        display.say(f"simulating {len(config.sites.expected)} sites; results go to {out}")
        from fedqc_simulations.simulate import simulate as run

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        result = run(
            config,
            data,
            layout,
            out,
            seed=seed,
            noise=noise.value,
            compute=compute,
            progress=display.progress,
            listener=display.listen,
        )
    for problem in result.problems:
        console.print(f"left out: {problem}", highlight=False, markup=False, soft_wrap=True)
    _print_figures(console, result.evaluation)
    minutes = (time.monotonic() - begin) / 60
    console.print(
        f"done in {minutes:.1f} minutes; see {out / 'evaluation.svg'}", highlight=False, soft_wrap=True
    )


def _simulated_federation(
    path: Path | None,
    *,
    task: str | None,
    sites: int | None,
    unseen: str | None,
    rounds: int | None,
    local_steps: int | None,
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
    table: dict[str, dict[str, Any]] = {key: dict(values.get(key, {})) for key in ("sites", "qc", "privacy")}
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
    table["privacy"].setdefault("min_count", SIMULATION_MIN_COUNT)
    return parse(values | table, FederationConfig, source=str(path or "options"))


def _print_figures(console: "Console", evaluation: dict[str, Any]) -> None:
    """The figures people ask for first; the rest is in evaluation.json."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    qc = Table(title="QC model on held-back cases", title_justify="left", box=SIMPLE_HEAD)
    for column in ("kinds of error", "n", "r (95 % interval)", "MAE", "error-map DSC"):
        qc.add_column(column, justify="left" if column == "kinds of error" else "right")
    for name, label in (("trained", "in training"), ("unseen", "never trained on"), ("all", "all")):
        one = evaluation["qc"][name]
        interval = _number(one["r"])
        if one["r_ci"] is not None:
            interval += f" ({', '.join(_number(end) for end in one['r_ci'])})"
        qc.add_row(label, str(one["n"]), interval, _number(one["mae"]), _number(one["dsc_err_median"]))
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
        curation.add_row(
            "all sites" if name == "all" else name, *counts, *(_number(one[key]) for key in keys)
        )
    console.print(curation)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
