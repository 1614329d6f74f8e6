"""A trained QC model judges labels one by one, and what is written down of it.

OUT/
├── scores.csv            id, patient, quality, the quality of each region, and the method's further figures
└── error_maps/
    ├── ID.nii.gz         probability in per cent that the label is wrong, on the grid of the case's files
    └── CLASS/ID.nii.gz   the same for the mask of a class, where the method tells classes apart
"""

import csv
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import preprocess, to_native
from fedqc.cases.volumes import Case, write_volume
from fedqc.compute import Compute
from fedqc.errors import DataError, ModelError
from fedqc.methods.base import FEWEST_REFERENCE_PATIENTS, Method, Score, has_too_few_references
from fedqc.model import StoredModel

TABLE = "scores.csv"
ERROR_MAPS = "error_maps"


@dataclass(frozen=True)
class Scored:
    """What the model says of one case."""

    files: CaseFiles
    quality: float
    """In [0, 1]; lower is worse."""
    regions: dict[str, float]
    """Quality of each region, as far as the method tells it."""


def judge(
    method: Method, network: nn.Module, cases: Iterable[Case], compute: Compute
) -> Iterator[tuple[Case, Score]]:
    """Each case with what the method says of it, in order; cases are read as the method asks for them.

    Raises:
        ModelError: the method does not keep the order.
    """
    opened: deque[Case] = deque()

    def opening() -> Iterator[Case]:
        for case in cases:
            opened.append(case)
            yield case

    for score in method.score(network, opening(), compute):
        case = opened.popleft()
        if score.case_id != case.id:
            raise ModelError(f"method {method.name!r} scored {score.case_id!r} where {case.id!r} was due")
        yield case, score


def write_error_map(path: Path, probability: NDArray[np.float32], case: Case) -> None:
    """Write where a label is probably wrong, in per cent (uint8) on the grid of the case's own files.

    Args:
        path: of the new file.
        probability: [X, Y, Z] on the network's grid.
        case: where it lies.
    """
    per_cent = np.rint(probability * 100).clip(0, 100).astype(np.uint8)
    write_volume(path, to_native(per_cent, case, order=1), case.native_affine)


def write_error_maps(folder: Path, score: Score, case: Case) -> None:
    """Write the error maps that a method has of a case: of the label, and of each class."""
    for name, probability in score.class_error_maps.items():
        write_error_map(folder / name / f"{case.id}.nii.gz", probability, case)
    if score.error_map is not None:
        write_error_map(folder / f"{case.id}.nii.gz", score.error_map, case)


def score_cases(
    model: StoredModel,
    cases: Sequence[CaseFiles],
    out: Path,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Scored], list[str]]:
    """Score cases one after another; what cannot be read or judged never stops the others.

    Args:
        model: A trained model.
        cases: Usable ones, each with its label.
        out: Folder for the results, which holds nothing.
        compute: Device and precision.
        progress: Called with (cases done, all cases) after each case.

    Returns:
        What the model says, in the order of the cases, and a sentence for each case that could not be read or
        judged.

    Raises:
        DataError: the model compares with references, and has those of too few patients.
    """
    task = model.card.task
    patients = {one.patient for one in model.card.references}
    if has_too_few_references(model.method, patients):
        raise DataError(
            f"method {model.method.name!r} compares with reference cases of {FEWEST_REFERENCE_PATIENTS} "
            f"patients or more; found those of {len(patients)} in the model's card; make the model again "
            "with more references"
        )
    left_out: list[str] = []
    by_id = {files.id: files for files in cases}

    def readable() -> Iterator[Case]:
        for files in cases:
            reason = model.method.cannot_judge(files)
            if reason is not None:
                left_out.append(reason)
                continue
            try:
                case = preprocess(files, task)
            except DataError as error:
                left_out.append(str(error))
            except MemoryError:
                left_out.append(
                    f"case {files.id}: does not fit into memory at the task's spacing; look whether the "
                    "voxel size in its header is right, or use a machine with more memory"
                )
            else:
                yield case

    scored: list[Scored] = []
    out.mkdir(parents=True, exist_ok=True)
    try:
        with (out / TABLE).open("w", encoding="utf-8", newline="") as file:
            table = csv.writer(file, lineterminator="\n")
            names = list(model.method.scored_regions())
            table.writerow(["id", "patient", "quality", *names, *model.method.figures])
            for case, score in judge(model.method, model.network, readable(), compute):
                further = [score.figures[name] for name in model.method.figures]
                figures = [*(score.regions.get(name) for name in names), *further]
                cells = ["" if figure is None else f"{figure:.6f}" for figure in figures]
                table.writerow([case.id, case.patient, f"{score.quality:.6f}", *cells])
                file.flush()  # what is cut off leaves the rows of what it did
                write_error_maps(out / ERROR_MAPS, score, case)
                scored.append(Scored(by_id[case.id], score.quality, score.regions))
                if progress is not None:
                    progress(len(scored) + len(left_out), len(cases))
    finally:
        if not scored:  # so that the folder can be named again
            (out / TABLE).unlink()
    return scored, left_out
