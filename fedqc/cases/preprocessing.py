"""From the files of a case to what a network sees, and back.

The steps are those of nnU-Net and QCResUNet: canonical orientation, resampling to the task's spacing, crop to
the non-zero part, z-score inside it, centre pad or crop to the task's size. The affine follows every step, so
that results can be brought back onto the grid of the files.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.validation import RawImage, read_case
from fedqc.cases.volumes import Case, voxel_size
from fedqc.errors import DataError
from fedqc.task import Task

_SAME_SPACING = 1e-3  # relative; a smaller difference is no reason to blur an image


@dataclass(frozen=True, eq=False)
class FullImage:
    """One image at the task's spacing, whole: its non-zero part, of any size."""

    id: str
    image: NDArray[np.float32]
    """[C, X, Y, Z], modalities in the task's order, z-scored, 0 outside the head."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices of this grid to mm (RAS+)."""
    native_shape: tuple[int, int, int]
    """Shape of the files' own grid."""
    native_affine: NDArray[np.float64]
    """[4, 4], from voxel indices of the files' own grid to mm (RAS+)."""


def preprocess(files: CaseFiles, task: Task) -> Case:
    """Read one case and bring it onto the network's grid.

    Returns:
        image [C, X, Y, Z] float32 and label [X, Y, Z] uint8 of the task's size.

    Raises:
        DataError: the case has a problem (see `fedqc.cases.validation`).
    """
    raw = read_case(files, task)
    image, affine, positions, box = _at_spacing(raw.channels, raw.affine, task)
    label = _resample_label(_canonical(raw.label, raw.affine), positions)[box]
    starts = [_start(have, want) for have, want in zip(label.shape, task.size, strict=True)]
    return Case(
        id=files.id,
        patient=files.patient,
        image=np.stack([_pad_or_crop(channel, starts, task.size) for channel in image]),
        label=_pad_or_crop(label, starts, task.size),
        affine=affine @ _shift(starts),
        native_shape=raw.label.shape,
        native_affine=raw.affine,
    )


def preprocess_full(files: CaseFiles, raw: RawImage, task: Task) -> FullImage:
    """Bring an image to the task's spacing, as `preprocess` does, but neither pad nor crop it to its size."""
    image, affine, _, _ = _at_spacing(raw.channels, raw.affine, task)
    return FullImage(
        id=files.id,
        image=image,
        affine=affine,
        native_shape=raw.channels[0].shape,
        native_affine=raw.affine,
    )


def to_native(volume: NDArray[Any], case: Case | FullImage, order: Literal[0, 1]) -> NDArray[Any]:
    """Bring a volume from the network's grid onto the grid of the case's files.

    Args:
        volume: [X, Y, Z] on the grid of `case`, any real dtype.
        case: where it lies.
        order: 0 nearest neighbour (labels), 1 linear (probabilities).

    Returns:
        Array of `case.native_shape` and the dtype of `volume`, 0 where the network saw nothing.

    Raises:
        DataError: the volume is not on the case's grid.
    """
    expected = case.image.shape[1:]
    if volume.shape != expected:
        raise DataError(
            f"case {case.id}: found a volume of shape {volume.shape}, expected {expected}; "
            "only what lies on the case's grid can be brought back"
        )
    matrix = np.linalg.inv(case.affine) @ case.native_affine
    # Without rounding noise, voxels half-way between two others fall the same way everywhere.
    matrix = np.round(matrix, 9)

    def sample(values: NDArray[Any], order: int, mode: str) -> NDArray[Any]:
        sampled: NDArray[Any] = ndimage.affine_transform(
            values, matrix[:3, :3], matrix[:3, 3], output_shape=case.native_shape, order=order, mode=mode
        )
        return sampled

    is_seen = sample(np.ones(volume.shape, dtype=np.uint8), 0, "grid-constant")
    native = sample(volume, order, "nearest")
    native[is_seen == 0] = 0
    return native


def label_to_native(label: NDArray[np.uint8], case: Case | FullImage) -> NDArray[np.uint8]:
    """Bring a label from the network's grid onto the grid of the case's files, with smooth contours.

    Args:
        label: [X, Y, Z] class indices on the grid of `case`.
        case: where it lies.

    Returns:
        Array of `case.native_shape`: the class with the largest linearly interpolated share of each voxel.

    Raises:
        DataError: the label is not on the case's grid.
    """
    largest = to_native((label == 0).astype(np.float32), case, 1)
    native = np.zeros(case.native_shape, dtype=np.uint8)
    for index in np.unique(label[label > 0]):
        share = to_native((label == index).astype(np.float32), case, 1)
        is_larger = share > largest
        native[is_larger] = index
        largest[is_larger] = share[is_larger]
    return native


def _at_spacing(
    channels: Sequence[NDArray[np.float32]], native_affine: NDArray[np.float64], task: Task
) -> tuple[
    NDArray[np.float32],
    NDArray[np.float64],
    list[NDArray[np.float64] | None],
    tuple[slice, slice, slice],
]:
    """The z-scored non-zero part [C, X, Y, Z] at the task's spacing, its affine, and how it was cut out.

    The last two are the positions of `_sampling` and the box of the part that is not zero.
    """
    image = np.stack([_canonical(channel, native_affine) for channel in channels])
    affine = native_affine @ inv_ornt_aff(io_orientation(native_affine), channels[0].shape)
    positions, affine = _sampling(image.shape[1:], affine, task.spacing)
    image = np.stack([_linear(channel, positions) for channel in image])
    box = _non_zero_box(image)
    image = np.stack([_z_score(channel) for channel in image[:, *box]])
    return image, affine @ _shift([side.start for side in box]), positions, box


def _canonical(volume: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """Axes in the order and direction closest to right, anterior, superior."""
    canonical: NDArray[Any] = apply_orientation(volume, io_orientation(affine))
    return canonical


def _sampling(
    shape: tuple[int, ...], affine: NDArray[np.float64], spacing: tuple[float, float, float]
) -> tuple[list[NDArray[np.float64] | None], NDArray[np.float64]]:
    """Positions of the new voxels in the old grid along each axis (None: unchanged), and the new affine.

    The new grid covers the old field of view from its first edge (not from its first voxel centre), so that
    the outer slices of thick-sliced scans keep their full thickness.
    """
    positions: list[NDArray[np.float64] | None] = []
    change = np.eye(4)
    for axis, (side, old, new) in enumerate(zip(shape, voxel_size(affine), spacing, strict=True)):
        step = new / old
        if abs(step - 1) < _SAME_SPACING:
            positions.append(None)
            continue
        first = (step - 1) / 2
        positions.append(first + step * np.arange(max(1, round(side / step))))
        change[axis, axis], change[axis, 3] = step, first
    return positions, affine @ change


def _linear(volume: NDArray[Any], positions: list[NDArray[np.float64] | None]) -> NDArray[np.float32]:
    """Linear interpolation, axis by axis, as the grids are parallel; the outermost values go on outside."""
    values = volume.astype(np.float32, copy=False)
    for axis, wanted in enumerate(positions):
        if wanted is None:
            continue
        last = values.shape[axis] - 1
        inside = np.clip(wanted, 0, last)
        below = inside.astype(np.intp)
        weight = (inside - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        lower, upper = values.take(below, axis), values.take(np.minimum(below + 1, last), axis)
        values = lower + weight * (upper - lower)
    return values


def _resample_label(
    label: NDArray[np.uint8], positions: list[NDArray[np.float64] | None]
) -> NDArray[np.uint8]:
    """The class with the largest linearly interpolated share of each voxel.

    Nearest neighbour would leave steps of up to half an old voxel in the contour, which the QC network could
    take for an error of the annotator.
    """
    if all(wanted is None for wanted in positions):
        return label
    largest = _linear(label == 0, positions)
    resampled = np.zeros(largest.shape, dtype=np.uint8)
    for index in np.unique(label[label > 0]):
        share = _linear(label == index, positions)
        is_larger = share > largest
        resampled[is_larger] = index
        largest[is_larger] = share[is_larger]
    return resampled


def _non_zero_box(image: NDArray[np.float32]) -> tuple[slice, slice, slice]:
    """Bounding box of the voxels that are not zero in some channel of [C, X, Y, Z]."""
    is_inside = np.asarray(image.any(axis=0))
    box = []
    for axis in range(3):
        hit = np.flatnonzero(np.moveaxis(is_inside, axis, 0).any(axis=(1, 2)))
        # Resampling can lose the only voxels of a nearly empty image; then the whole grid stays.
        box.append(slice(int(hit[0]), int(hit[-1]) + 1) if hit.size else slice(0, image.shape[axis + 1]))
    x, y, z = box
    return x, y, z


def _z_score(channel: NDArray[np.float32]) -> NDArray[np.float32]:
    """Mean 0 and standard deviation 1 over the voxels that are not zero; zeros stay zeros."""
    is_inside = channel != 0
    if not is_inside.any():
        return channel
    values = channel[is_inside].astype(np.float64)
    deviation = values.std()
    scored = np.zeros_like(channel)
    scored[is_inside] = (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    return scored


def _start(have: int, want: int) -> int:
    """Where a centred window of `want` voxels starts in `have` voxels; negative where it has to be padded."""
    return have // 2 - want // 2 if have >= want else -((want - have) // 2)


def _pad_or_crop(volume: NDArray[Any], starts: list[int], size: tuple[int, int, int]) -> NDArray[Any]:
    window = np.zeros(size, dtype=volume.dtype)
    source = tuple(
        slice(max(start, 0), min(start + want, have))
        for start, want, have in zip(starts, size, volume.shape, strict=True)
    )
    target = tuple(
        slice(part.start - start, part.stop - start) for part, start in zip(source, starts, strict=True)
    )
    window[target] = volume[source]
    return window


def _shift(start: list[int]) -> NDArray[np.float64]:
    """The matrix that moves the origin of a grid to the voxel `start`."""
    matrix = np.eye(4)
    matrix[:3, 3] = start
    return matrix
