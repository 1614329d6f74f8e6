"""`fedqc segment`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from fedqc.inference import Segmented


def segment(
    *,
    model: Annotated[Path, typer.Option(help="Folder of a trained segmentation model.")],
    data: Annotated[Path, typer.Option(help="Folder of the images; it is only read. Labels are not needed.")],
    out: Annotated[Path, typer.Option(help="Folder for the labels; must be new or empty.")],
    layout: Annotated[
        str | None, typer.Option(help="As the data are laid out; detected if left out.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; all cores where left out.")] = None,
) -> None:
    """Segment every case of a folder at full size with a trained model."""
    from rich.console import Console

    from fedqc.config import ComputeConfig, parse
    from fedqc.display import Display
    from fedqc.errors import ConfigError, DataError

    console = Console(width=None if sys.stdout.isatty() else 100)
    chosen = parse({"device": device, "precision": precision}, ComputeConfig, source="options")
    if out.resolve().is_relative_to(data.resolve()):
        raise ConfigError(
            f"{out}: lies inside the data folder {data}, which is only read; name another folder"
        )
    with Display(console) as display:
        import torch

        from fedqc.cases.layouts import find_cases
        from fedqc.compute import choose_compute
        from fedqc.inference import segment_cases
        from fedqc.model import load_segmentation

        if threads is not None:
            torch.set_num_threads(threads)
        stored = load_segmentation(model)
        cases = find_cases(data, stored.card.task, layout).cases
        display.say(f"segmenting the cases of {data}; results go to {out}")
        segmented, problems = segment_cases(
            stored,
            cases,
            out,
            choose_compute(chosen.device, chosen.precision),
            lambda done, total: display.progress("segmenting", done, total),
        )
    names = {case.id for case in segmented}
    for problem in problems:
        what = "label not used" if problem.case in names else "left out"
        console.print(f"{what}: {problem}", highlight=False, markup=False, soft_wrap=True)
    if not segmented:
        raise DataError(f"{data}: none of {len(cases)} cases can be used; the first problem: {problems[0]}")
    _print_segmented(console, segmented)
    console.print(
        f"{len(segmented)} of {len(cases)} cases are segmented; see {out / 'segmentations.csv'}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


def _print_segmented(console: "Console", segmented: "Sequence[Segmented]") -> None:
    """Mean volume of each class, and mean DSC of each region over the cases with a label."""
    from statistics import fmean

    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fedqc.reports.words import number

    volumes = Table(title="Volume", title_justify="left", box=SIMPLE_HEAD)
    for column in ("class", "n", "mean ml", "smallest", "largest"):
        volumes.add_column(column, justify="left" if column == "class" else "right")
    for name in segmented[0].volumes:
        found = [case.volumes[name] for case in segmented]
        figures = (fmean(found), min(found), max(found))
        volumes.add_row(name, str(len(found)), *(f"{figure:.3f}" for figure in figures))
    console.print(volumes)
    scores = [case.score for case in segmented if case.score is not None]
    if not scores:
        return
    overlaps = Table(title="Overlap with labels", title_justify="left", box=SIMPLE_HEAD)
    for column in ("region", "n", "mean DSC"):
        overlaps.add_column(column, justify="left" if column == "region" else "right")
    for name in scores[0].regions:
        overlaps.add_row(name, str(len(scores)), number(fmean(score.regions[name] for score in scores)))
    overlaps.add_row("mean of each case", str(len(scores)), number(fmean(score.dice for score in scores)))
    console.print(overlaps)
