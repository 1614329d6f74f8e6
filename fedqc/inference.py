"""A trained segmentation model applied to a folder of cases, one case in memory at a time.

OUT/
├── ID.nii.gz            label of a case, on the grid of its image, in the values of the task
└── segmentations.csv    id, patient, ml.<class>, and dice.<region> and dice where the case has a label
"""

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.cases.comparison import duplicate_id
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import label_to_native, preprocess_full
from fedqc.cases.problems import Problem
from fedqc.cases.validation import RawImage, inspect_image
from fedqc.cases.volumes import MAX_VOXELS, voxel_size, write_volume
from fedqc.compute import Compute
from fedqc.errors import DataError
from fedqc.metrics.overlap import overlap
from fedqc.model import StoredSegmentation
from fedqc.segmentation import SegmentationScore
from fedqc.task import Task

TABLE = "segmentations.csv"


@dataclass(frozen=True)
class Segmented:
    """What was found in one case."""

    id: str
    patient: str
    volumes: dict[str, float]
    """Millilitres of each class."""
    score: SegmentationScore | None
    """Overlap with the case's own label, on its grid; None where there is none."""


def segment_cases(
    model: StoredSegmentation,
    cases: Sequence[CaseFiles],
    out: Path,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[Segmented], list[Problem]]:
    """Segment every case that can be used; what is wrong with a case never stops the others.

    Args:
        model: A trained model.
        cases: What to segment; labels are compared with where they are there.
        out: Folder for the results; must be new or empty.
        compute: Device and precision.
        progress: Called with (cases done, all cases) after each case.

    Returns:
        What was found, case by case, and all problems of images and labels.

    Raises:
        DataError: `out` is not empty or cannot be written.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise DataError(f"{out}: is not an empty folder; nothing is written over, name a new one")
    task, times = model.card.task, Counter(files.id for files in cases)
    segmented: list[Segmented] = []
    problems: list[Problem] = []
    for done, files in enumerate(cases, start=1):
        if times[files.id] > 1:
            problems.append(duplicate_id(files, times[files.id]))
        else:
            raw, found = inspect_image(files, task)
            problems.extend(found)
            if raw is not None:
                classes = _segment(model, files, raw, compute)
                if classes is None:
                    problems.append(_too_large(files, raw, task))
                else:
                    values = _label_values(task)[classes]
                    write_volume(out / f"{files.id}.nii.gz", values, raw.affine)
                    segmented.append(_described(files, raw, classes, task))
                    _append(out / TABLE, _row(segmented[-1], task))
        if progress is not None:
            progress(done, len(cases))
    return segmented, problems


def _segment(
    model: StoredSegmentation, files: CaseFiles, raw: RawImage, compute: Compute
) -> NDArray[np.uint8] | None:
    """Class indices on the image's own grid, or None where memory does not suffice."""
    task = model.card.task
    extent = voxel_size(raw.affine) * raw.channels[0].shape
    # Asked beforehand: many systems grant any amount of memory, and kill the process that uses it.
    if np.prod(extent / task.spacing) > MAX_VOXELS:
        return None
    try:
        whole = preprocess_full(files, raw, task)
        return label_to_native(model.segmentation.predict(model.network, whole.image, compute), whole)
    except (MemoryError, torch.OutOfMemoryError):
        return None
    except RuntimeError as error:  # what PyTorch raises on a CPU
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        return None


def _too_large(files: CaseFiles, raw: RawImage, task: Task) -> Problem:
    sides = "x".join(map(str, raw.channels[0].shape))
    return Problem(
        code="too-large",
        case=files.id,
        file=files.images[0],
        found=f"an image of shape {sides} that is too large for the memory at the task's spacing",
        expected=f"one that fits at {'x'.join(f'{side:g}' for side in task.spacing)} mm",
        fix="look whether the voxel size in its header is right, or use a machine with more memory",
    )


def _label_values(task: Task) -> NDArray[np.uint8 | np.uint16]:
    """The first label value of each class, by class index."""
    values = np.array([0, *(members[0] for members in task.classes.values())], dtype=np.uint16)
    return values.astype(np.uint8) if values.max() <= np.iinfo(np.uint8).max else values


def _described(files: CaseFiles, raw: RawImage, classes: NDArray[np.uint8], task: Task) -> Segmented:
    voxels = np.bincount(classes.ravel(), minlength=task.n_classes + 1)[1:]
    millilitres = abs(np.linalg.det(raw.affine[:3, :3])) / 1000
    volumes = dict(zip(task.classes, (voxels * millilitres).tolist(), strict=True))
    if raw.label is None:
        return Segmented(files.id, files.patient, volumes, None)
    label, reference = torch.from_numpy(classes)[None], torch.from_numpy(raw.label)[None]
    found = overlap(label, reference, task.region_indices())
    regions = dict(zip(task.regions, found.dsc[0].tolist(), strict=True))
    held = zip(task.regions, found.present[0].tolist(), strict=True)
    present = frozenset(name for name, there in held if there)
    score = SegmentationScore(files.id, files.patient, regions, found.mean.item(), present)
    return Segmented(files.id, files.patient, volumes, score)


def _row(case: Segmented, task: Task) -> dict[str, str]:
    score = case.score
    return {
        "id": case.id,
        "patient": case.patient,
        **{f"ml.{name}": f"{volume:.4f}" for name, volume in case.volumes.items()},
        **{f"dice.{name}": f"{score.regions[name]:.4f}" if score else "" for name in task.regions},
        "dice": f"{score.dice:.4f}" if score else "",
    }


def _append(path: Path, row: dict[str, str]) -> None:
    """Add a row to a table, the header first; a run that is cut off leaves the rows of what it did."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(row))
        if is_new:
            writer.writeheader()
        writer.writerow(row)
