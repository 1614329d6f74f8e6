"""`fedqc train`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fedqc.alone import TrainedAlone
    from fedqc.cases.layouts import CaseFiles
    from fedqc.config import QCConfig
    from fedqc.site_check import SiteCheck


def train(
    *,
    data: Annotated[
        Path, typer.Option(help="Folder or table of cases whose labels are right; it is only read.")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the model; must be new or empty.")],
    task: Annotated[
        str | None,
        typer.Option(help="A built-in task, or the path of a task's .toml.", show_default="that of --config"),
    ] = None,
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected if left out.")
    ] = None,
    reference: Annotated[
        Path | None, typer.Option(help="Table of the cases whose labels are right; all where left out.")
    ] = None,
    ratings: Annotated[
        Path | None,
        typer.Option(help="Table of ratings (id, rater, view, stars), for methods that learn from them."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A federation.toml, for what it says of the QC model; options beat it."),
    ] = None,
    method: Annotated[str | None, typer.Option(help="QC method.", show_default="qcresunet")] = None,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds of training; after each, it can go on from there.")
    ] = None,
    local_steps: Annotated[int | None, typer.Option(help="Training steps in a round.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is drawn.")] = 0,
    licence: Annotated[
        str | None, typer.Option(help="Licence of the weights, for the model's card, such as CC-BY-4.0.")
    ] = None,
    cache: Annotated[
        Path | None, typer.Option(help="Folder for prepared cases.", show_default="OUT.cache")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
) -> None:
    """Train a QC model on this machine, without a federation, and try it on held-back cases.

    A quarter of the patients is held back. Where it was cut off, the same command goes on.
    """
    from rich.console import Console

    from fedqc.commands.folders import checked_cases, new_folder, refuse_inside
    from fedqc.config import ComputeConfig, DataConfig, SiteConfig, parse
    from fedqc.display import Display
    from fedqc.errors import ConfigError, DeviceError, TrainingError

    console = Console(width=None if sys.stdout.isatty() else 100)
    task_name, qc = _configured(config, task, method=method, rounds=rounds, local_steps=local_steps)
    compute = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
    folder = new_folder(out, data)
    cached = folder.with_name(f"{folder.name}.cache") if cache is None else cache
    refuse_inside(cached, data)
    go_on = f"what is done is kept beside {out}; the same command goes on with it"
    with Display(console) as display:
        import torch

        from fedqc.alone import Job, train_alone
        from fedqc.compute import choose_compute
        from fedqc.methods.base import get_method
        from fedqc.ratings import ratings_by_case
        from fedqc.task import load_task

        if threads is not None:
            torch.set_num_threads(threads)
        known_task = load_task(task_name)
        # What does not fit is refused before anything is read.
        planned = get_method(qc.method)(known_task, qc)
        if planned.judges != "label":
            raise ConfigError(
                f"method {qc.method!r} judges its own prediction and never looks at the label; choose one "
                "that judges the label"
            )
        chosen = choose_compute(compute.device, compute.precision)
        site = SiteConfig(
            name="this-machine",
            task=task_name,
            data=DataConfig(path=data, layout=layout, reference=reference, ratings=ratings),
            compute=compute,
        )
        references = _references(
            checked_cases(site, known_task, memory=cached / "checks", display=display), reference
        )
        try:
            trained = train_alone(
                Job(known_task, qc, seed, licence, ratings_by_case(ratings)),
                references,
                folder,
                cache=cached,
                compute=chosen,
                workers=compute.workers,
                display=display,
            )
        except (TrainingError, DeviceError) as error:
            raise type(error)(f"{error}; {go_on}") from error
        except KeyboardInterrupt:
            typer.echo(go_on, err=True)
            raise
    _print_trial(console, trained, qc)
    card = trained.card
    console.print(
        f"trained on {card.cases} cases of {card.patients} patients; the model is in {out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _configured(path: Path | None, task: str | None, **options: Any) -> "tuple[str, QCConfig]":
    """Task and table [qc]: the file's, or the defaults, with the options that are given on top.

    Raises:
        ConfigError: the file or an option is wrong, or nothing names the task.
    """
    from fedqc.config import QCConfig, load_federation, parse
    from fedqc.errors import ConfigError

    given = {key: value for key, value in options.items() if value is not None}
    if path is not None:
        federation = load_federation(path)
        values = federation.qc.model_dump(exclude_unset=True) | given
        return task or federation.task, parse(values, QCConfig, source=str(path))
    if task is None:
        raise ConfigError("--task is missing; name what the data show, such as --task msd-hippocampus")
    return task, parse(given, QCConfig, source="options")


def _references(found: "SiteCheck", table: Path | None) -> "Sequence[CaseFiles]":
    """The usable cases that count as references: all, or those of the table.

    Raises:
        DataError: there is none.
    """
    from fedqc.errors import DataError

    if table is None:
        return found.checked.usable
    if not found.usable_references:
        raise DataError(
            f"{table}: none of its {len(found.references)} cases can be used; compare its column id with the "
            "ids that `fedqc check` shows"
        )
    return found.usable_references


def _print_trial(console: "Console", trained: "TrainedAlone", qc: "QCConfig") -> None:
    """How well the model judges labels of the held-back cases, by kind of error."""
    from statistics import fmean

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedqc.degradation.samples import ALL_KINDS
    from fedqc.reports.words import kind_in_words, number, with_interval

    if not trained.tried:
        console.print("all cases are of one patient, so there is none to try the model on", highlight=False)
        return
    title = "Labels of the held-back cases, degraded in every kind"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    for column in ("kind of error", "n", "true DSC", "predicted", "MAE"):
        table.add_column(column, justify="left" if column == "kind of error" else "right")
    by_kind = {kind: [one for one in trained.tried if one.kind == kind] for kind in ALL_KINDS}
    for kind, tried in {**by_kind, "all": trained.tried}.items():
        if not tried:
            continue
        is_new = kind in qc.leave_out
        table.add_row(
            kind_in_words(kind) + (", never trained on" if is_new else ""),
            str(len(tried)),
            number(fmean(one.true_dsc for one in tried)),
            number(fmean(one.predicted_dsc for one in tried)),
            number(fmean(abs(one.predicted_dsc - one.true_dsc) for one in tried)),
        )
    console.print(table)
    r, low, high, error_dsc = (
        trained.card.figures[key] for key in ("r", "r_low", "r_high", "dsc_err_median")
    )
    interval = None if low is None or high is None else (low, high)
    console.print(
        f"r of predicted and true DSC {with_interval(r, interval)}, "
        f"median DSC of predicted and true error maps {number(error_dsc)}",
        highlight=False,
        soft_wrap=True,
    )
