"""What can be wrong with one case. Every problem is found; none stops the search.

Files are looked at in three steps: their headers (do the grids fit?), their voxels (are they an image and a
label?), and what looks odd about a case that could be used (`fedqc.cases.plausibility`). Voxels are read
once, and only of files whose header makes sense.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from fedqc.cases import plausibility
from fedqc.cases.conventions import guess_convention
from fedqc.cases.facts import CaseFacts, describe_case, describe_image
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.problems import ErrorCode, Problem
from fedqc.cases.tally import Intensities, LabelValues, Strangers, count_values, measure
from fedqc.cases.volumes import (
    MAX_VOXELS,
    Header,
    UnreadableVolumeError,
    is_singular,
    label_to_classes,
    read_header,
    read_volume,
    voxel_size,
)
from fedqc.errors import DataError
from fedqc.task import Task

AFFINE_TOLERANCE = 1e-3
"""Largest absolute difference, in mm, between the affines of volumes that share a grid."""
QFORM_TOLERANCE = 0.1
"""Largest distance, in mm, between the places that qform and sform give to a corner of the volume."""


@dataclass(frozen=True)
class Inspection:
    """All that was found in one case: what is known of it, and what is wrong with it."""

    facts: CaseFacts | None
    """None where it has an error."""
    problems: tuple[Problem, ...]

    @property
    def is_usable(self) -> bool:
        """Whether no problem is an error."""
        return self.facts is not None


@dataclass(frozen=True, eq=False)
class RawImage:
    """An image as its files hold it, checked, with its label where there is one that can be used."""

    channels: tuple[NDArray[np.float32], ...]
    """One volume [X, Y, Z] a modality."""
    intensities: tuple[Intensities, ...]
    """Of each modality."""
    label: NDArray[np.uint8] | None
    """[X, Y, Z], class indices."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices to mm (RAS+)."""


def inspect_case(files: CaseFiles, task: Task) -> Inspection:
    """Find everything that is wrong with one case; whatever its files hold, nothing is raised."""
    contents = _read(files, task, needs_label=True)
    problems = contents.problems
    label = contents.label
    if any(problem.is_error for problem in problems) or label is None:
        return Inspection(None, tuple(problems + contents.image_warnings))
    classes = label_to_classes(label.values, task)
    guess = guess_convention(label.values, contents.channels, task)
    images = [
        describe_image(*measured) for measured in zip(contents.channels, contents.measured, strict=True)
    ]
    facts = describe_case(
        images, values=label.counted, classes=classes, header=contents.files[0].header, guess=guess, task=task
    )
    problems += contents.image_warnings
    problems += plausibility.label_problems(
        files.id,
        label.path,
        classes,
        channels=contents.channels,
        affine=label.header.affine,
        guess=guess,
        task=task,
    )
    return Inspection(facts, tuple(problems))


def read_case(files: CaseFiles, task: Task) -> tuple[RawImage, NDArray[np.uint8]]:
    """Read the files of one case.

    Returns:
        The image, and its label [X, Y, Z] of class indices on the same grid.

    Raises:
        DataError: the first error of the case.
    """
    contents = _read(files, task, needs_label=True)
    for problem in contents.problems:
        if problem.is_error:
            raise DataError(str(problem))
    raw = contents.raw(task)
    assert raw.label is not None  # noqa: S101 - it would have been an error
    return raw, raw.label


def inspect_image(files: CaseFiles, task: Task) -> tuple[RawImage | None, list[Problem]]:
    """Read a case that needs no label; whatever its files hold, nothing is raised.

    Returns:
        The image (None where it has an error), and all errors, those of a label that is there too.
    """
    contents = _read(files, task, needs_label=False)
    is_usable = not any(problem.is_error for problem in contents.image_problems)
    return (contents.raw(task) if is_usable else None), [
        problem for problem in contents.problems if problem.is_error
    ]


@dataclass(frozen=True, eq=False)
class _File:
    """A file with a grid."""

    path: Path
    header: Header


@dataclass(frozen=True, eq=False)
class _Label(_File):
    """A label; `values` [X, Y, Z] are as in the file, and of a small type if the task knows all of them."""

    values: NDArray[Any]
    counted: LabelValues


@dataclass(eq=False)
class _Contents:
    """The files of a case as far as they can be read, and what is wrong with them."""

    files: list[_File] = field(default_factory=list)
    """The images."""
    channels: list[NDArray[np.float32]] = field(default_factory=list)
    """[X, Y, Z] each."""
    measured: list[Intensities] = field(default_factory=list)
    """Of each channel."""
    label: _Label | None = None
    image_problems: list[Problem] = field(default_factory=list)
    label_problems: list[Problem] = field(default_factory=list)
    image_warnings: list[Problem] = field(default_factory=list)

    @property
    def problems(self) -> list[Problem]:
        return self.image_problems + self.label_problems

    def raw(self, task: Task) -> RawImage:
        """The image, which must have no error, and the label if it has none."""
        classes = None
        if self.label is not None and not any(problem.is_error for problem in self.label_problems):
            classes = label_to_classes(self.label.values, task)
        return RawImage(
            channels=tuple(self.channels),
            intensities=tuple(self.measured),
            label=classes,
            affine=self.files[0].header.affine,
        )


def _read(files: CaseFiles, task: Task, *, needs_label: bool) -> _Contents:
    """Read what can be read of a case, and find all its errors."""
    contents = _Contents(image_problems=list(files.problems))
    if any(problem.code == "path-outside" for problem in files.problems):
        return contents  # what it names is not ours to read
    _read_images(files, task, contents)
    # Layouts list a label where it should be; to a case that needs none, one that is not there means nothing.
    if needs_label or (files.label is not None and os.path.lexists(files.label)):
        contents.label = _read_label(files, task, contents.label_problems)
    reference = contents.files[0] if contents.files else None
    for file in contents.files[1:]:
        contents.image_problems.extend(_grid_problems(files.id, file, contents.files[0]))
    if contents.label is not None and reference is not None:
        contents.label_problems.extend(_grid_problems(files.id, contents.label, reference))
    label = contents.label
    if label is not None and plausibility.are_exchanged(label.counted, contents.channels, task):
        contents.label_problems.append(
            Problem(
                code="exchanged-files",
                case=files.id,
                file=label.path,
                found="intensities, and label values in the image's file",
                expected="a label",
                fix="exchange the two files",
            )
        )
        return contents
    names = _channel_names(task, contents)
    for (path, name), measured in zip(names, contents.measured, strict=True):
        contents.image_problems.extend(_image_problems(files.id, path, name, measured))
        contents.image_warnings.extend(plausibility.image_problems(files.id, path, name, measured))
    if label is not None and plausibility.is_copy(label.values, label.counted, contents.channels):
        contents.label_problems.append(
            Problem(
                code="image-as-label",
                case=files.id,
                file=label.path,
                found="the voxels of an image of this case",
                expected="a label",
                fix="put the label in its place, or leave the case out",
            )
        )
    elif label is not None:
        contents.label_problems.extend(_label_problems(files.id, label.path, label.counted, task))
    return contents


def _channel_names(task: Task, contents: _Contents) -> list[tuple[Path, str]]:
    """File of each channel, and ` of T1` where the file holds several."""
    if len(contents.files) == 1 and len(contents.channels) > 1:
        return [(contents.files[0].path, f" of {name}") for name in task.modalities]
    return [(file.path, "") for file in contents.files]


def _read_images(files: CaseFiles, task: Task, contents: _Contents) -> None:
    """Read the images; a file of other dimensions than the task needs is left out of the contents."""
    n_modalities = len(task.modalities)
    holds_all = n_modalities > 1 and len(files.images) == 1
    names = ("all modalities",) if holds_all else task.modalities
    found: list[Path | None] = [*files.images, *[None] * (len(names) - len(files.images))]
    room = MAX_VOXELS
    for name, path in zip(names, found, strict=True):
        if path is None:
            contents.image_problems.append(
                _missing(files.id, "missing-modality", f"no file of {name}", "one for each modality")
            )
            continue
        problems: list[Problem] = []
        header = _read_header(files.id, path, ("missing-modality", f"of {name}"), task, problems)
        if header is not None and not _has_dimensions(header, n_modalities if holds_all else 0):
            problems.append(_wrong_image_dimensions(files.id, path, header, n_modalities, holds_all))
            header = None
        if header is not None and math.prod(header.shape) > room:
            problems.append(_too_large(files.id, path, header, n_modalities))
            header = None
        data = None if header is None else _read_voxels(files.id, path, problems)
        contents.image_problems.extend(problems)
        if header is not None and data is not None:
            room -= data.size
            contents.files.append(_File(path, header))
            contents.channels.extend(_channels(data))
            contents.measured.extend(map(measure, contents.channels[len(contents.measured) :]))


def _read_label(files: CaseFiles, task: Task, problems: list[Problem]) -> _Label | None:
    """The label, if it is readable and has three dimensions."""
    if files.label is None:
        problems.append(_missing(files.id, "missing-label", "no label", "one"))
        return None
    header = _read_header(files.id, files.label, ("missing-label", "with the label"), task, problems)
    if header is not None and len(header.shape) != 3:
        problems.append(
            Problem(
                code="wrong-dimensions",
                case=files.id,
                file=files.label,
                found=f"a label of shape {_sides(header.shape)}",
                expected="three dimensions",
                fix="store all classes in one volume, a number for each",
            )
        )
        return None
    values = None if header is None else _read_voxels(files.id, files.label, problems)
    if header is None or values is None:
        return None
    counted = count_values(values, task.label_values)
    if counted.n_known == values.size:
        values = values.astype(np.min_scalar_type(max(task.label_values)), copy=False)
    return _Label(files.label, header, values, counted)


def _missing(case: str, code: ErrorCode, found: str, expected: str, file: Path | None = None) -> Problem:
    return Problem(
        code=code,
        case=case,
        file=file,
        found=found,
        expected=expected,
        fix="restore the file or correct its path in the list, or leave the case out",
    )


def _read_header(
    case: str, path: Path, missing: tuple[ErrorCode, str], task: Task, problems: list[Problem]
) -> Header | None:
    """The header, or None where nothing can be done with the file; `missing` says what a missing file is."""
    try:
        header = read_header(path)
    except UnreadableVolumeError as error:
        problems.append(_unreadable(case, path, error))
        return None
    except DataError:
        code, what = missing
        problems.append(_missing(case, code, f"no such file {what}", "a .nii or .nii.gz file", path))
        return None
    problem = partial(Problem, case=case, file=path)
    sides = header.pixdim
    if not all(np.isfinite(side) and side > 0 for side in sides):
        problems.append(
            problem(
                code="invalid-spacing",
                found=f"voxel sides of {_numbers(sides)} mm in the header",
                expected="three numbers above 0",
                fix="export the file again, or correct pixdim in its header",
            )
        )
        return None
    if is_singular(header.affine):
        problems.append(
            problem(
                code="singular-affine",
                found="an affine without an inverse, so the voxels have no place in the scanner",
                expected="three axes that differ",
                fix="export the file again, or correct sform and qform in its header",
            )
        )
        return None
    problems.extend(_header_problems(case, path, header, task))
    return header


def _header_problems(case: str, path: Path, header: Header, task: Task) -> Iterator[Problem]:
    """What is odd about one grid."""
    problem = partial(Problem, case=case, file=path)
    smallest, largest = task.spacing_range
    spacing = voxel_size(header.affine)
    if spacing.min() < smallest * (1 - 1e-3) or spacing.max() > largest * (1 + 1e-3):
        yield problem(
            code="spacing-out-of-range",
            found=f"voxels of {_numbers(spacing)} mm",
            expected=f"sides of {smallest:g} to {largest:g} mm as in task {task.name!r}",
            fix="look whether the header's unit is mm, or widen spacing_range in a task of your own",
        )
    if header.unit is not None:
        yield problem(
            code="unit-not-mm",
            found=f"a header in {header.unit}s, with voxels of {_numbers(header.pixdim)}",
            expected="a header in mm",
            fix="set the header's unit to mm if the sides are in mm, as fedqc takes them; else mend these",
        )
    if header.qform is not None and header.sform is not None:
        corners = np.array(np.meshgrid(*([0, side - 1] for side in header.shape[:3]))).reshape(3, -1)
        places = [form[:3, :3] @ corners + form[:3, 3:] for form in (header.qform, header.sform)]
        distance = float(np.linalg.norm(places[0] - places[1], axis=0).max())
        if not distance <= QFORM_TOLERANCE:  # NaN is no agreement
            yield problem(
                code="qform-sform-mismatch",
                found=f"qform and sform that place a corner {distance:.3g} mm apart",
                expected=f"at most {QFORM_TOLERANCE:g} mm",
                fix="find out which is right and store it as both; fedqc uses the sform, others may not",
            )


def _too_large(case: str, path: Path, header: Header, n_modalities: int) -> Problem:
    return Problem(
        code="too-large",
        case=case,
        file=path,
        found=f"{_sides(header.shape)} voxels in one of {n_modalities} images",
        expected=f"at most {MAX_VOXELS} voxels in all images of a case",
        fix="crop the volumes to what matters, or leave the case out",
    )


def _read_voxels(case: str, path: Path, problems: list[Problem]) -> NDArray[Any] | None:
    try:
        return read_volume(path).data
    except UnreadableVolumeError as error:
        problems.append(_unreadable(case, path, error))
    except DataError:  # it went away meanwhile
        problems.append(_missing(case, "missing-modality", "no such file any more", "a file", path))
    return None


def _unreadable(case: str, path: Path, error: UnreadableVolumeError) -> Problem:
    return Problem(
        code=error.code,
        case=case,
        file=path,
        found=f"a file that cannot be read: {error.reason}",
        expected="a whole .nii or .nii.gz file",
        fix=error.cure,
    )


def _has_dimensions(header: Header, n_channels: int) -> bool:
    """Whether there are three dimensions, or (with channels) a fourth that holds the channels."""
    return header.shape[3:] == ((n_channels,) if n_channels else ())


def _wrong_image_dimensions(
    case: str, path: Path, header: Header, n_modalities: int, holds_all: bool
) -> Problem:
    shape = header.shape
    several = f"{shape[3]} volumes in one file, " if len(shape) == 4 else ""
    return Problem(
        code="wrong-dimensions",
        case=case,
        file=path,
        found=f"{several}an image of shape {_sides(shape)}",
        expected=f"a fourth dimension of the {n_modalities} modalities" if holds_all else "three dimensions",
        fix="export the image as the task needs it",
    )


def _image_problems(case: str, path: Path, name: str, measured: Intensities) -> Iterator[Problem]:
    lowest, highest = measured.lowest, measured.highest
    if measured.n_not_finite:
        yield Problem(
            code="non-finite",
            case=case,
            file=path,
            found=f"{_voxels(measured.n_not_finite)}{name} of NaN, infinity or beyond 32-bit floats",
            expected="finite numbers",
            fix="export the image again or set these voxels to 0",
        )
    elif lowest == highest:  # all voxels that are not zero, if any
        zero = "0 and " if measured.n_zero and highest else ""
        yield Problem(
            code="constant-image",
            case=case,
            file=path,
            found=f"nothing but the value{'s' if zero else ''} {zero}{highest:g}{name}",
            expected="an image",
            fix="export the image again or leave the case out",
        )


def _label_problems(case: str, path: Path, values: LabelValues, task: Task) -> Iterator[Problem]:
    problem = partial(Problem, case=case, file=path)
    expected = f"one of {', '.join(map(str, task.label_values))} as in task {task.name!r}"
    if values.not_finite.n_voxels:
        yield problem(
            code="non-finite",
            found=f"NaN or infinity in {_voxels(values.not_finite.n_voxels)} of the label",
            expected=expected,
            fix="export the label again",
        )
    if values.fractions.n_voxels:
        yield problem(
            code="non-integral-label",
            found=f"label value {_examples(values.fractions)}",
            expected="whole numbers",
            fix="resample the label with nearest neighbour and store it as integers",
        )
    if values.unknown.n_voxels:
        yield problem(
            code="unknown-label-value",
            found=f"label value {_examples(values.unknown)}",
            expected=expected,
            fix="correct the label or add the value to a class of the task",
        )
    if task.empty_label == "error" and values.known.get(0) == values.n_voxels:
        yield problem(
            code="empty-label",
            found="a label without any marked voxel",
            expected="at least one",
            fix="annotate the case or leave it out",
        )


def _grid_problems(case: str, checked: _File, reference: _File) -> Iterator[Problem]:
    """Problems of a volume that has to lie on the grid of another of the same case."""
    problem = partial(Problem, case=case, file=checked.path)
    as_in = f"as in {_told_apart(reference.path, checked.path)}"
    nowhere = [
        _told_apart(file.path, other.path)
        for file, other in ((checked, reference), (reference, checked))
        if file.header.qform is None and file.header.sform is None
    ]
    hint = f"; neither sform nor qform is set in {' and '.join(nowhere)}" if nowhere else ""
    shape, expected_shape = checked.header.shape[:3], reference.header.shape[:3]
    if shape != expected_shape:
        yield problem(
            code="shape-mismatch",
            found=f"shape {_sides(shape)}",
            expected=f"{_sides(expected_shape)} {as_in}",
            fix="bring both onto one grid",
        )
    affine, expected = checked.header.affine, reference.header.affine
    difference = np.abs(affine - expected)
    if difference.max() <= AFFINE_TOLERANCE:
        return
    axes = "".join(map(str, nibabel.aff2axcodes(affine)))
    expected_axes = "".join(map(str, nibabel.aff2axcodes(expected)))
    if axes != expected_axes:
        yield problem(
            code="orientation-mismatch",
            found=f"axes {axes}{hint}",
            expected=f"{expected_axes} {as_in}",
            fix="bring both onto one grid and look whether they are flipped against each other",
        )
    else:
        yield problem(
            code="affine-mismatch",
            found=f"an affine that differs by up to {difference.max():.3g} mm{hint}",
            expected=f"at most {AFFINE_TOLERANCE:g} mm of difference, {as_in}",
            fix="bring both onto one grid, or copy the image's header if only the header is wrong",
        )


def _told_apart(path: Path, other: Path) -> str:
    """The name of a file, with its folder's where another one is called the same."""
    return path.name if path.name != other.name else f"{path.parent.name}/{path.name}"


def _channels(data: NDArray[Any]) -> list[NDArray[np.float32]]:
    """The 3D volumes of an image [X, Y, Z] or [X, Y, Z, C]."""
    with np.errstate(all="ignore"):  # what does not fit becomes inf and is reported
        single = data.astype(np.float32, copy=False)
    return [single] if data.ndim == 3 else [single[..., channel] for channel in range(data.shape[3])]


def _examples(strangers: Strangers) -> str:
    """The first few different values, and how many voxels there are."""
    return f"{', '.join(f'{value:g}' for value in strangers.examples)} in {_voxels(strangers.n_voxels)}"


def _voxels(n: int) -> str:
    return f"{n} voxel{'' if n == 1 else 's'}"


def _numbers(values: Any) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _sides(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
