"""Slices of the cases in which `fedqc check` found something, so that people see what it is about."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.layouts.base import is_file
from fedqc.cases.problems import CODES, Code, Problem
from fedqc.cases.volumes import bounding_box, read_volume
from fedqc.errors import DataError
from fedqc.reports.slices import (
    PLANES,
    Panel,
    Slice,
    canonical,
    canonical_spacing,
    clearest,
    draw_panels,
    fullest_plane,
    window_around,
)
from fedqc.task import Task

MOST_OF_A_CODE = 3
MOST_IN_ALL = 30
_MOST_TRIED = 6
"""Cases of a code that are read in search of those that can be drawn."""
_MARGIN = 2.0
"""Side of the picture by that of the label in it."""
_SENSIBLE_MM = (1e-3, 1e3)
_MANY_VOXELS = 2**22
"""Enough to see in which modality the label stands out."""
_STRANGE = 255
"""Stands for label values that the task does not know, beside its class indices (254 at most)."""

# What is wrong with a list, a name, a link, a missing file or a copy is not seen in a scan.
_VISIBLE: tuple[Code, ...] = (
    "missing-label",
    "wrong-dimensions",
    "spacing-out-of-range",
    "shape-mismatch",
    "orientation-mismatch",
    "affine-mismatch",
    "non-finite",
    "constant-image",
    "non-integral-label",
    "unknown-label-value",
    "empty-label",
    "exchanged-files",
    "image-as-label",
    "qform-sform-mismatch",
    "normalised-image",
    "clipped-image",
    "label-convention",
    "label-outside-image",
    "label-cropped",
    "label-fills-image",
    "tiny-islands",
    "unusual-volume",
    "missing-class",
)


class ShapesDifferError(DataError):
    """Image and label have different shapes, so no slice shows both."""


@dataclass(frozen=True)
class Drawn:
    """A problem with its picture."""

    problem: Problem
    slice: Slice


@dataclass
class Affected:
    """The pictures of one code."""

    cases: int
    """That have it."""
    drawn: list[Drawn] = field(default_factory=list)
    shapes_differ: list[str] = field(default_factory=list)
    """Cases that were tried and whose shapes differ, with the shapes."""


def draw_affected(
    problems: Sequence[Problem],
    cases: Sequence[CaseFiles],
    task: Task,
    progress: Callable[[int, int], None] | None = None,
) -> dict[Code, Affected]:
    """Draw a few cases of each code that can be seen in a scan; nothing that a file holds is an obstacle.

    Args:
        problems: of all cases.
        cases: of the site.
        task: what the data show.
        progress: called with (pictures done, all pictures) after each picture.

    Returns:
        By code, in the order of the codes.
    """
    by_id: dict[str, list[CaseFiles]] = {}
    for case in cases:
        by_id.setdefault(case.id, []).append(case)
    of_code: dict[Code, dict[str, Problem]] = {code: {} for code in CODES if code in _VISIBLE}
    for problem in problems:
        if problem.code in of_code and problem.case in by_id:
            of_code[problem.code].setdefault(problem.case, problem)
    affected = {code: Affected(cases=len(found)) for code, found in of_code.items() if found}
    waiting = {
        code: iter([(problem, _files_of(problem, by_id)) for problem in list(found.values())[:_MOST_TRIED]])
        for code, found in of_code.items()
        if found
    }
    # One of each code first, so that every code has its picture before another has its third.
    turns = [code for turn in range(MOST_OF_A_CODE) for code in waiting if turn < affected[code].cases]
    turns = turns[:MOST_IN_ALL]
    for done, code in enumerate(turns, start=1):
        _draw_next(waiting[code], affected[code], task)
        if progress is not None:
            progress(done, len(turns))
    return affected


def _files_of(problem: Problem, by_id: Mapping[str, Sequence[CaseFiles]]) -> CaseFiles:
    """The case of a problem; where several share its id, the one that has the file."""
    cases = by_id[problem.case or ""]
    return next((case for case in cases if problem.file in case.files), cases[0])


def _draw_next(waiting: Iterator[tuple[Problem, CaseFiles]], affected: Affected, task: Task) -> None:
    """Draw the next case that can be drawn."""
    for problem, files in waiting:
        try:
            affected.drawn.append(Drawn(problem, draw_problem(files, problem, task)))
        except ShapesDifferError as error:
            affected.shapes_differ.append(f"{files.id}: {error}")
        # A picture is an extra: whatever numbers a broken file makes of itself, the report goes on.
        except (DataError, ValueError, ArithmeticError, MemoryError):
            continue
        else:
            return


def draw_problem(files: CaseFiles, problem: Problem, task: Task) -> Slice:
    """Draw the slice that shows most of a problem: left the image, right the label's contours over it.

    What the problem is about is coloured where it is a matter of voxels. The label is drawn voxel on voxel,
    whatever the headers say.

    Raises:
        ShapesDifferError: image and label have different shapes.
        DataError: no image can be read.
    """
    with np.errstate(all="ignore"):  # of numbers near the ends of their range
        volumes = _read(files, problem, task)
        marked = _marked(problem, files, volumes, task)
        return _draw(volumes, marked, problem, whole=problem.file in files.images)


@dataclass(frozen=True, eq=False)
class _Channel:
    modality: str
    data: NDArray[np.float32]
    """[X, Y, Z]"""
    affine: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class _Volumes:
    """What can be read of a case, all of one shape."""

    channels: Sequence[_Channel]
    drawn: _Channel
    """The one that is drawn."""
    classes: NDArray[np.uint8] | None
    """[X, Y, Z], class indices or `_STRANGE`."""
    without_label: str
    """Why there is no label."""


def _read(files: CaseFiles, problem: Problem, task: Task) -> _Volumes:
    """Read the label, and the images: only one where the problem is that image's."""
    classes = _read_label(files, task)
    wanted = [problem.file] if problem.file in files.images else files.images
    channels = [one for path in wanted if path is not None for one in _read_channels(files, path, task)]
    if not channels:
        raise DataError(f"{files.id}: no image can be read")
    if classes is None:
        there = files.label is not None and is_file(files.label)
        return _Volumes(channels, channels[0], None, "label cannot be drawn" if there else "no label")
    fitting = [one for one in channels if one.data.shape == classes.shape]
    if not fitting:
        image, label = ("x".join(map(str, shape)) for shape in (channels[0].data.shape, classes.shape))
        raise ShapesDifferError(f"image {image}, label {label}")
    step = math.ceil((classes.size / _MANY_VOXELS) ** (1 / 3))
    some = (slice(None, None, step),) * 3
    clear = clearest([np.nan_to_num(one.data[some]) for one in fitting], classes[some])
    return _Volumes(fitting, fitting[clear], classes, "")


def _read_channels(files: CaseFiles, path: Path, task: Task) -> Iterator[_Channel]:
    """The modalities in a file; none where it cannot be read."""
    with contextlib.suppress(DataError):
        volume = read_volume(path)
        # Of a fourth dimension that should not be there, the first volume is shown.
        volumes = volume.data.reshape((*volume.data.shape[:3], -1), order="F")
        names: Sequence[str] = task.modalities
        if len(files.images) > 1:
            names = names[files.images.index(path) :][:1]
        for index, name in enumerate(names[: volumes.shape[3]]):
            yield _Channel(name, volumes[..., index].astype(np.float32, copy=False), volume.affine)


def _read_label(files: CaseFiles, task: Task) -> NDArray[np.uint8] | None:
    """The label [X, Y, Z] as class indices, where there is one that can be read."""
    if files.label is None:
        return None
    with contextlib.suppress(DataError):
        values = read_volume(files.label).data
        if values.ndim == 3:
            return _to_classes(values, task)
    return None


def _to_classes(values: NDArray[Any], task: Task) -> NDArray[np.uint8]:
    """Class indices; values that the task does not know have their own."""
    highest = max(value for members in task.classes.values() for value in members)
    table = np.full(highest + 2, _STRANGE, dtype=np.uint8)
    table[0] = 0
    for index, members in enumerate(task.classes.values(), start=1):
        table[list(members)] = index
    classes = np.empty(values.shape, dtype=np.uint8, order="F")
    for z in range(values.shape[2]):  # all at once would take a multiple of the label's memory
        plane = values[..., z]
        is_index = (plane >= 0) & (plane <= highest) & (plane == np.rint(plane))
        classes[..., z] = table[np.where(is_index, plane, highest + 1).astype(np.intp)]
    return classes


def _marked(problem: Problem, files: CaseFiles, volumes: _Volumes, task: Task) -> NDArray[Any] | None:
    """The voxels [X, Y, Z] that a problem is about, from 0 to 1; None where it is not about voxels."""
    image, classes = volumes.drawn.data, volumes.classes
    marked: NDArray[Any] | None = None
    if problem.code == "clipped-image":
        marked = image == image.max()
    elif problem.code == "non-finite" and problem.file != files.label:
        marked = ~np.isfinite(image)
    elif classes is not None:
        match problem.code:
            case "non-finite" | "unknown-label-value" | "non-integral-label":
                marked = classes == _STRANGE
            case "label-outside-image":
                marked = classes > 0
                for channel in volumes.channels:
                    marked &= channel.data == 0
            case "tiny-islands":
                marked = _islands(classes, task)
            case "exchanged-files" | "image-as-label" if files.label is not None:  # seen as an image
                values = read_volume(files.label).data
                marked = np.clip(values / (float(np.percentile(values, 99.5)) or 1.0), 0, 1)
    return marked


def _islands(classes: NDArray[np.uint8], task: Task) -> NDArray[np.bool_]:
    """Parts of a label [X, Y, Z] that are too small."""
    is_island = np.zeros(classes.shape, dtype=bool)
    box = bounding_box(classes)
    if box is not None:
        parts, _ = ndimage.label(classes[box], structure=np.ones((3, 3, 3)))
        is_small = np.bincount(parts.ravel()) < task.smallest_part
        is_small[0] = False
        is_island[box] = is_small[parts]
    return is_island


def _draw(volumes: _Volumes, marked: NDArray[Any] | None, problem: Problem, *, whole: bool) -> Slice:
    """Draw the plane with most of what is marked, or of the label, or of the image.

    Args:
        volumes: of the case.
        marked: [X, Y, Z], coloured from 0 to 1.
        problem: that the picture is for.
        whole: show all of the slice, not only what is around the label.
    """
    image, affine, classes = volumes.drawn.data, volumes.drawn.affine, volumes.classes
    spacing = canonical_spacing(affine)
    if not all(_SENSIBLE_MM[0] < side < _SENSIBLE_MM[1] for side in spacing):
        spacing = (1.0, 1.0, 1.0)
    is_exchanged = problem.code in ("exchanged-files", "image-as-label")
    is_number = np.isfinite(image)
    level = image.mean(dtype=np.float64, where=is_number) if is_number.any() else 0.0
    bright = is_number & (image > level)
    in_turn = (bright,) if is_exchanged else (marked, None if classes is None else classes > 0, bright)
    weight = next((one for one in in_turn if one is not None and one.any()), np.ones(image.shape, dtype=bool))
    axis, index = fullest_plane(canonical(weight, affine), spacing, scan=canonical(bright, affine))

    def plane(volume: NDArray[Any]) -> NDArray[Any]:
        cut: NDArray[Any] = np.take(canonical(volume, affine), index, axis)
        return cut

    grey = _grey(plane(image))
    focus = np.zeros(grey.shape, dtype=bool)
    if classes is None:
        right = Panel(text=volumes.without_label)
    else:
        label, marks = plane(classes), None if marked is None else plane(marked)
        focus = label > 0 if marks is None else (label > 0) | (marks > 0)
        known = np.where(label == _STRANGE, 0, label).astype(np.uint8)
        right = Panel(label=known, marked=marks, outlined=not is_exchanged)
    if whole or not focus.any():
        focus[:] = True
    width, height = (side for position, side in enumerate(spacing) if position != axis)
    png = draw_panels(
        grey,
        (Panel(), right),
        (width, height),
        window=window_around(focus, width, height, _MARGIN),
        mirrored=axis != 0,
    )
    return Slice(png, PLANES[axis], volumes.drawn.modality)


def _grey(image: NDArray[np.float32]) -> NDArray[np.float64]:
    """A slice [A, B] from 0 to 1, whatever its intensities are; 0 where there is no number."""
    values = np.nan_to_num(image.astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    low, high = (float(end) for end in np.percentile(values, (1, 99.5)))
    return np.clip((values - low) / ((high - low) or 1.0), 0, 1)
