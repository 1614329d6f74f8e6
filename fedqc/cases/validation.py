"""What can be wrong with a case. Every problem of every case is found; none stops the search."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import UnreadableVolumeError, Volume, label_to_classes, read_volume
from fedqc.errors import DataError
from fedqc.task import Task

AFFINE_TOLERANCE = 1e-3
"""Largest absolute difference, in mm, between the affines of volumes that share a grid."""

Code = Literal[
    "missing-file",
    "missing-label",
    "unreadable",
    "wrong-dimensions",
    "shape-mismatch",
    "orientation-mismatch",
    "affine-mismatch",
    "non-finite",
    "empty-image",
    "empty-label",
    "non-integral-label",
    "unknown-label-value",
    "duplicate-id",
]


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a case."""

    code: Code
    case: str
    file: Path | None
    found: str
    expected: str
    fix: str

    def __str__(self) -> str:
        """The problem as one sentence."""
        place = f"case {self.case}, {self.file}" if self.file else f"case {self.case}"
        return f"{place}: found {self.found}, expected {self.expected}; {self.fix}"


@dataclass(frozen=True)
class Validation:
    """The cases that can be used, in the order given, and all problems of the others."""

    usable: list[CaseFiles]
    problems: list[Problem]


@dataclass(frozen=True, eq=False)
class RawImage:
    """An image as its files hold it, checked, with its label where there is one that can be used."""

    channels: tuple[NDArray[np.float32], ...]
    """One volume [X, Y, Z] a modality."""
    label: NDArray[np.uint8] | None
    """[X, Y, Z], class indices."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices to mm (RAS+)."""


@dataclass(frozen=True, eq=False)
class RawCase:
    """A case as its files hold it, checked: one grid, no problem."""

    channels: tuple[NDArray[np.float32], ...]
    """One volume [X, Y, Z] a modality."""
    label: NDArray[np.uint8]
    """[X, Y, Z], class indices."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices to mm (RAS+)."""


def validate(
    cases: Sequence[CaseFiles],
    task: Task,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> Validation:
    """Check all cases; ids that occur twice are left out altogether, for nobody can tell which is meant.

    Args:
        cases: the cases of one site.
        task: what the data show.
        workers: number of threads.
        progress: called with (cases done, all cases) after each case.
    """
    duplicates = duplicate_ids(cases)
    usable: list[CaseFiles] = []
    problems: list[Problem] = []
    with ThreadPoolExecutor(workers) as pool:
        checked = pool.map(partial(validate_case, task=task), cases)
        for done, (case, found) in enumerate(zip(cases, checked, strict=True), start=1):
            if case.id in duplicates:
                found.append(duplicate(case, duplicates[case.id]))
            problems.extend(found)
            if not found:
                usable.append(case)
            if progress is not None:
                progress(done, len(cases))
    return Validation(usable=usable, problems=problems)


def duplicate_ids(cases: Sequence[CaseFiles]) -> dict[str, int]:
    """The ids that occur more than once, and how often."""
    return {case_id: times for case_id, times in Counter(case.id for case in cases).items() if times > 1}


def duplicate(files: CaseFiles, times: int) -> Problem:
    """The problem of a case whose id occurs `times` times."""
    return Problem(
        code="duplicate-id",
        case=files.id,
        file=files.images[0] if files.images else None,
        found=f"{times} cases with this id",
        expected="one",
        fix="give each case an id of its own",
    )


def validate_case(files: CaseFiles, task: Task) -> list[Problem]:
    """All problems of one case; whatever its files hold, nothing is raised."""
    return _inspect(files, task)[1]


def read_case(files: CaseFiles, task: Task) -> RawCase:
    """Read the files of one case.

    Raises:
        DataError: the first problem of the case.
    """
    raw, problems = _inspect(files, task)
    if raw is None or raw.label is None or problems:
        raise DataError(str(problems[0]))
    return RawCase(channels=raw.channels, label=raw.label, affine=raw.affine)


def inspect_image(files: CaseFiles, task: Task) -> tuple[RawImage | None, list[Problem]]:
    """Read a case that needs no label; whatever its files hold, nothing is raised.

    Returns:
        The image (None where it has a problem), and all problems, those of a label that is there too.
    """
    return _inspect(files, task, needs_label=False)


def _inspect(
    files: CaseFiles, task: Task, *, needs_label: bool = True
) -> tuple[RawImage | None, list[Problem]]:
    """The case as read (None where the image has a problem), and all problems of image and label."""
    problems: list[Problem] = []
    images = _read_images(files, task, problems)
    for path, volume in images:
        problems.extend(_image_problems(files.id, path, volume, task))
    for path, volume in images[1:]:
        problems.extend(_grid_problems(files.id, (path, volume), images[0]))
    label_problems: list[Problem] = []
    label = _read_label(files, label_problems) if files.label or needs_label else None
    if label is not None:
        label_problems.extend(_label_problems(files.id, label[0], label[1].data, task))
        if images:
            label_problems.extend(_grid_problems(files.id, label, images[0]))
    if problems:
        return None, problems + label_problems
    channels = tuple(channel for _, volume in images for channel in _channels(volume.data))
    classes = label_to_classes(label[1].data, task) if label is not None and not label_problems else None
    return RawImage(channels=channels, label=classes, affine=images[0][1].affine), label_problems


def _read_images(files: CaseFiles, task: Task, problems: list[Problem]) -> list[tuple[Path, Volume]]:
    """The readable images of the right dimensions."""
    n_modalities = len(task.modalities)
    if len(files.images) not in {1, n_modalities}:
        problems.append(
            Problem(
                code="missing-file",
                case=files.id,
                file=None,
                found=f"{len(files.images)} images",
                expected=f"one for each of {', '.join(task.modalities)}",
                fix="list the missing files or leave the case out",
            )
        )
    holds_all = n_modalities > 1 and len(files.images) == 1
    images = []
    for path in files.images:
        volume = _read(files.id, path, problems)
        if volume is None:
            continue
        shape = volume.data.shape
        if (len(shape) == 4 and shape[3] == n_modalities) if holds_all else len(shape) == 3:
            images.append((path, volume))
            continue
        fourth = f"a fourth dimension of the {n_modalities} modalities" if holds_all else "three dimensions"
        problems.append(
            Problem(
                code="wrong-dimensions",
                case=files.id,
                file=path,
                found=f"an image of shape {_sides(shape)}",
                expected=fourth,
                fix="export the image as the task needs it",
            )
        )
    return images


def _read_label(files: CaseFiles, problems: list[Problem]) -> tuple[Path, Volume] | None:
    """The label, if it is readable and has three dimensions."""
    if files.label is None:
        problems.append(
            Problem(
                code="missing-label",
                case=files.id,
                file=None,
                found="no label",
                expected="one",
                fix="add the label or leave the case out",
            )
        )
        return None
    volume = _read(files.id, files.label, problems)
    if volume is not None and volume.data.ndim != 3:
        problems.append(
            Problem(
                code="wrong-dimensions",
                case=files.id,
                file=files.label,
                found=f"a label of shape {_sides(volume.data.shape)}",
                expected="three dimensions",
                fix="store all classes in one volume, a number for each",
            )
        )
        return None
    return None if volume is None else (files.label, volume)


def _read(case: str, path: Path, problems: list[Problem]) -> Volume | None:
    try:
        return read_volume(path)
    except UnreadableVolumeError as error:
        problems.append(
            Problem(
                code="unreadable",
                case=case,
                file=path,
                found=f"a file that cannot be read: {error.reason}",
                expected="a whole .nii or .nii.gz file",
                fix="export or copy the file again",
            )
        )
    except DataError:
        problems.append(
            Problem(
                code="missing-file",
                case=case,
                file=path,
                found="no such file",
                expected="a .nii or .nii.gz file",
                fix="restore the file or correct its path in the list",
            )
        )
    return None


def _image_problems(case: str, path: Path, volume: Volume, task: Task) -> Iterator[Problem]:
    channels = _channels(volume.data)
    for position, channel in enumerate(channels):
        where = f" of {task.modalities[position]}" if len(channels) > 1 else ""
        n_wrong = int(np.count_nonzero(~np.isfinite(channel)))
        if n_wrong:
            yield Problem(
                code="non-finite",
                case=case,
                file=path,
                found=f"{n_wrong} voxels{where} that are NaN, infinite or beyond 32-bit floats",
                expected="finite numbers",
                fix="export the image again or set these voxels to 0",
            )
        if not channel.any():
            yield Problem(
                code="empty-image",
                case=case,
                file=path,
                found=f"nothing but zeros{where}",
                expected="an image",
                fix="export the image again or leave the case out",
            )


def _label_problems(case: str, path: Path, values: NDArray[Any], task: Task) -> Iterator[Problem]:
    known = [0, *sorted(value for members in task.classes.values() for value in members)]
    strange = values[~np.isin(values, known)]
    is_finite = np.isfinite(strange)
    is_whole = is_finite & (strange == np.rint(strange))
    problem = partial(Problem, case=case, file=path)
    expected = f"one of {', '.join(map(str, known))} as in task {task.name!r}"
    if not is_finite.all():
        yield problem(
            code="non-finite",
            found=f"{np.count_nonzero(~is_finite)} label voxels that are NaN or infinite",
            expected=expected,
            fix="export the label again",
        )
    if (is_finite & ~is_whole).any():
        yield problem(
            code="non-integral-label",
            found=f"label value {_examples(strange[is_finite & ~is_whole])}",
            expected="whole numbers",
            fix="resample the label with nearest neighbour and store it as integers",
        )
    if is_whole.any():
        yield problem(
            code="unknown-label-value",
            found=f"label value {_examples(strange[is_whole])}",
            expected=expected,
            fix="correct the label or add the value to a class of the task",
        )
    if not values.any():
        yield problem(
            code="empty-label",
            found="a label without any marked voxel",
            expected="at least one",
            fix="annotate the case or leave it out",
        )


def _grid_problems(
    case: str, checked: tuple[Path, Volume], reference: tuple[Path, Volume]
) -> Iterator[Problem]:
    """Problems of a volume that has to lie on the grid of another of the same case."""
    path, volume = checked
    reference_path, expected = reference
    problem = partial(Problem, case=case, file=path)
    as_in = f"as in {reference_path.name}"
    shape, expected_shape = volume.data.shape[:3], expected.data.shape[:3]
    if shape != expected_shape:
        yield problem(
            code="shape-mismatch",
            found=f"shape {_sides(shape)}",
            expected=f"{_sides(expected_shape)} {as_in}",
            fix="bring both onto one grid",
        )
    difference = np.abs(volume.affine - expected.affine)
    if difference.max() <= AFFINE_TOLERANCE:
        return
    axes = "".join(map(str, nibabel.aff2axcodes(volume.affine)))
    expected_axes = "".join(map(str, nibabel.aff2axcodes(expected.affine)))
    if axes != expected_axes:
        yield problem(
            code="orientation-mismatch",
            found=f"axes {axes}",
            expected=f"{expected_axes} {as_in}",
            fix="bring both onto one grid and look whether they are flipped against each other",
        )
    else:
        yield problem(
            code="affine-mismatch",
            found=f"an affine that differs by up to {difference.max():.3g} mm",
            expected=f"at most {AFFINE_TOLERANCE:g} mm of difference, {as_in}",
            fix="bring both onto one grid, or copy the image's header if only the header is wrong",
        )


def _channels(data: NDArray[Any]) -> list[NDArray[np.float32]]:
    """The 3D volumes of an image [X, Y, Z] or [X, Y, Z, C]."""
    with np.errstate(all="ignore"):  # what does not fit becomes inf and is reported
        single = data.astype(np.float32, copy=False)
    return [single] if data.ndim == 3 else [single[..., channel] for channel in range(data.shape[3])]


def _examples(values: NDArray[Any]) -> str:
    """The first few different values, and how many voxels there are."""
    different = [f"{value:g}" for value in np.unique(values)[:3]]
    return f"{', '.join(different)} in {values.size} voxels"


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
