"""`fedqc score`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fedqc.scoring import Scored

WORST_SHOWN = 10


def score(
    *,
    model: Annotated[Path, typer.Option(help="Folder of a trained QC model.")],
    data: Annotated[Path, typer.Option(help="Folder or table of cases with a label; it is only read.")],
    out: Annotated[Path, typer.Option(help="Folder for the scores; must be new or empty.")],
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected if left out.")
    ] = None,
    review: Annotated[
        bool, typer.Option("--review", help="Also draw the 20 worst cases at the worst place of their label.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
) -> None:
    """Judge the label of every case of a folder with a trained QC model."""
    from rich.console import Console

    from fedqc.commands.folders import checked_cases, new_folder
    from fedqc.config import ComputeConfig, DataConfig, SiteConfig, parse
    from fedqc.display import Display
    from fedqc.errors import DataError

    console = Console(width=None if sys.stdout.isatty() else 100)
    compute = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
    folder = new_folder(out, data)
    with Display(console) as display:
        import torch

        from fedqc.compute import choose_compute
        from fedqc.model import load_model
        from fedqc.scoring import TABLE, score_cases

        if threads is not None:
            torch.set_num_threads(threads)
        stored = load_model(model)
        chosen = choose_compute(compute.device, compute.precision)
        task = stored.card.task
        site = SiteConfig(
            name="this-machine", task=task.name, data=DataConfig(path=data, layout=layout), compute=compute
        )
        checked = checked_cases(site, task, memory=None, display=display).checked
        scored, left_out = score_cases(
            stored,
            checked.usable,
            folder,
            chosen,
            lambda done, total: display.progress("scoring", done, total),
        )
        for sentence in left_out:
            display.say(f"left out: {sentence}")
        if not scored:
            raise DataError(f"{data}: none of {len(checked.cases)} cases can be used; {left_out[0]}")
        if review:
            from fedqc.reports.review import draw_worst

            for sentence in draw_worst(
                scored, task, folder, lambda done, total: display.progress("drawing", done, total)
            ):
                display.say(f"not drawn: {sentence}")
    _print_worst(console, scored, list(stored.method.scored_regions()))
    console.print(
        f"{len(scored)} of {len(checked.cases)} cases are scored; see {out / TABLE}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_worst(console: "Console", scored: "Sequence[Scored]", names: "Sequence[str]") -> None:
    """The cases whose label is judged worst, with the quality of each region."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table

    from fedqc.reports.words import number

    worst = sorted(scored, key=lambda one: one.quality)[:WORST_SHOWN]
    table = Table(title="Worst labels, predicted DSC", title_justify="left", box=SIMPLE_HEAD)
    for column in ("case", "quality", *names):
        table.add_column(column, justify="left" if column == "case" else "right", overflow="fold")
    for one in worst:
        regions = (number(one.regions.get(name)) for name in names)
        table.add_row(escape(one.files.id), number(one.quality), *regions)
    console.print(table)
