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
from fedqc.cases.tally import measure
from fedqc.cases.validation import RawImage, read_case
from fedqc.cases.volumes import Case, MeanSD, bounding_box, voxel_size
from fedqc.errors import DataError
from fedqc.task import Task

_SLICES = 16  # that are z-scored at once
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
    raw, native_label = read_case(files, task)
    shape = native_label.shape
    resampling = _Resampling.of(shape, raw.affine, task)
    channels, box = _non_zero_part(raw.channels, resampling)
    label = resampling.label(native_label)[box]
    starts = [_start(have, want) for have, want in zip(label.shape, task.size, strict=True)]
    intensities = _intensities(raw, channels, resampling)
    return Case(
        id=files.id,
        patient=files.patient,
        image=_scored(channels, intensities, starts, task.size),
        label=_pad_or_crop(label, starts, task.size),
        affine=resampling.affine @ _shift([side.start for side in box]) @ _shift(starts),
        native_shape=shape,
        native_affine=raw.affine,
        intensities=intensities,
    )


def preprocess_full(files: CaseFiles, raw: RawImage, task: Task) -> FullImage:
    """Bring an image to the task's spacing, as `preprocess` does, but neither pad nor crop it to its size."""
    shape = raw.channels[0].shape
    resampling = _Resampling.of(shape, raw.affine, task)
    channels, box = _non_zero_part(raw.channels, resampling)
    return FullImage(
        id=files.id,
        image=_scored(channels, _intensities(raw, channels, resampling), [0, 0, 0], channels[0].shape),
        affine=resampling.affine @ _shift([side.start for side in box]),
        native_shape=shape,
        native_affine=raw.affine,
    )


def keeps_voxels(shape: tuple[int, ...], affine: NDArray[np.float64], task: Task) -> bool:
    """Whether volumes [X, Y, Z] of this grid have the task's spacing, so that no voxel gets another value."""
    return _Resampling.of(shape, affine, task).keeps_voxels


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
    if _keeps_grid(matrix):
        return _copied(volume, matrix, case.native_shape)

    def sample(values: NDArray[Any], order: int, mode: str) -> NDArray[Any]:
        sampled: NDArray[Any] = ndimage.affine_transform(
            values, matrix[:3, :3], matrix[:3, 3], output_shape=case.native_shape, order=order, mode=mode
        )
        return sampled

    is_seen = sample(np.ones(volume.shape, dtype=np.uint8), 0, "grid-constant")
    native = sample(volume, order, "nearest")
    native[is_seen == 0] = 0
    return native


def _keeps_grid(matrix: NDArray[np.float64]) -> bool:
    """Whether voxels of one grid [4, 4] lie on voxels of the other: axes are turned or exchanged at most."""
    linear, offset = np.abs(matrix[:3, :3]), matrix[:3, 3]
    ones = (linear == 1).sum(axis=0), (linear == 1).sum(axis=1)
    is_turned = (np.count_nonzero(linear) == 3) and (np.stack(ones) == 1).all()
    return bool(is_turned and (offset == np.round(offset)).all())


def _copied(volume: NDArray[Any], matrix: NDArray[np.float64], shape: tuple[int, int, int]) -> NDArray[Any]:
    """What resampling comes to where voxels lie on voxels, in a small part of the time.

    Args:
        volume: [X, Y, Z].
        matrix: [4, 4], from voxel indices of the result to those of the volume (`_keeps_grid`).
        shape: of the result, which is 0 where the volume does not reach.
    """
    axes = np.abs(matrix[:3, :3]).argmax(axis=1)  # of the result, by axis of the volume
    source, target = [slice(0)] * 3, [slice(0)] * 3
    for axis, other in enumerate(axes):
        offset = int(matrix[axis, 3])
        if matrix[axis, other] < 0:  # counted from the other end
            volume = np.flip(volume, axis)
            offset = volume.shape[axis] - 1 - offset
        begin = max(0, -offset)
        end = max(begin, min(shape[other], volume.shape[axis] - offset))
        target[other], source[axis] = slice(begin, end), slice(begin + offset, end + offset)
    native = np.zeros(shape, dtype=volume.dtype)
    native[tuple(target)] = volume[tuple(source)].transpose(np.argsort(axes))
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


Positions = tuple[NDArray[np.float64] | None, ...]
"""Of the new voxels in the old grid along each axis; None where an axis stays as it is."""


@dataclass(frozen=True, eq=False)
class _Resampling:
    """The way from the files' grid to the task's spacing, axes along right, anterior, superior."""

    positions: Positions
    """Along the axes of the files, in the direction of the new ones."""
    orientation: NDArray[np.float64]
    """[3, 2], what is still to be done with axes and directions after that, as nibabel writes it."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices of the new grid to mm (RAS+)."""

    @classmethod
    def of(cls, shape: tuple[int, ...], native_affine: NDArray[np.float64], task: Task) -> "_Resampling":
        orientation = io_orientation(native_affine)
        affine = native_affine @ inv_ornt_aff(orientation, shape)
        axes = orientation[:, 0].astype(int)
        canonical_shape = [shape[axis] for axis in np.argsort(axes)]
        wanted, affine = _sampling(canonical_shape, affine, task.spacing)
        positions = []
        for axis, (new_axis, direction) in enumerate(zip(axes, orientation[:, 1], strict=True)):
            along = wanted[new_axis]
            if along is not None and direction < 0:
                along = shape[axis] - 1 - along
            positions.append(along)
        orientation = orientation.copy()
        orientation[[along is not None for along in positions], 1] = 1
        return cls(tuple(positions), orientation, affine)

    @property
    def keeps_voxels(self) -> bool:
        """Whether no voxel gets another value."""
        return all(along is None for along in self.positions)

    def image(self, channel: NDArray[np.float32]) -> NDArray[np.float32]:
        """A modality [X, Y, Z] on the new grid; a view of it where no voxel changes."""
        return self._turn(_linear(channel, self.positions))

    def label(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """A label [X, Y, Z] of class indices on the new grid; a view of it where no voxel changes."""
        return self._turn(label if self.keeps_voxels else _resample_label(label, self.positions))

    def _turn(self, volume: NDArray[Any]) -> NDArray[Any]:
        turned: NDArray[Any] = apply_orientation(volume, self.orientation)
        return turned


def _non_zero_part(
    channels: Sequence[NDArray[np.float32]], resampling: _Resampling
) -> tuple[list[NDArray[np.float32]], tuple[slice, slice, slice]]:
    """Each channel on the new grid, cut to the box of the voxels that are not zero in some; and the box."""
    resampled = [resampling.image(channel) for channel in channels]
    is_inside = resampled[0] != 0
    for channel in resampled[1:]:
        is_inside |= channel != 0
    x, y, z = is_inside.shape
    # Resampling can lose the only voxels of a nearly empty image; then the whole grid stays.
    box = bounding_box(is_inside) or (slice(0, x), slice(0, y), slice(0, z))
    return [channel[box] for channel in resampled], box


def _sampling(
    shape: Sequence[int], affine: NDArray[np.float64], spacing: tuple[float, float, float]
) -> tuple[Positions, NDArray[np.float64]]:
    """Positions along each axis, and the new affine.

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
    return tuple(positions), affine @ change


def _linear(volume: NDArray[Any], positions: Positions) -> NDArray[np.float32]:
    """Linear interpolation, axis by axis, as the grids are parallel; the outermost values go on outside."""
    # Turned, as files' volumes lie in memory: whole slices are mixed first, so that single voxels of the
    # innermost axis are picked when there are the fewest left.
    values = volume.T.astype(np.float32, copy=False)
    for axis, along in enumerate(reversed(positions)):
        if along is None:
            continue
        last = values.shape[axis] - 1
        inside = np.clip(along, 0, last)
        below = inside.astype(np.intp)
        weight = (inside - below).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)])
        lower, mixed = values.take(below, axis), values.take(np.minimum(below + 1, last), axis)
        mixed -= lower
        mixed *= weight
        mixed += lower
        values = mixed
    return values.T


def _resample_label(label: NDArray[np.uint8], positions: Positions) -> NDArray[np.uint8]:
    """The class with the largest linearly interpolated share of each voxel.

    Nearest neighbour would leave steps of up to half an old voxel in the contour, which the QC network could
    take for an error of the annotator.
    """
    shape = [
        side if along is None else len(along) for side, along in zip(label.shape, positions, strict=True)
    ]
    resampled = np.zeros(shape, dtype=np.uint8, order="F")
    box = bounding_box(label)
    if box is None:
        return resampled
    # Only where new voxels lie less than an old one away from the label can there be any of it.
    parts: list[slice] = []
    targets: list[slice] = []
    along_parts: list[NDArray[np.float64] | None] = []
    for side, along, length in zip(box, positions, label.shape, strict=True):
        part = slice(max(0, side.start - 1), min(length, side.stop + 1))
        parts.append(part)
        if along is None:
            targets.append(part)
            along_parts.append(None)
            continue
        inside = np.clip(along, 0, length - 1)
        near = np.flatnonzero((inside > side.start - 1) & (inside < side.stop))
        if not near.size:
            return resampled
        targets.append(slice(int(near[0]), int(near[-1]) + 1))
        along_parts.append(inside[near] - part.start)
    values = label[tuple(parts)]
    largest = _linear(values == 0, tuple(along_parts))
    classes = np.zeros(largest.shape, dtype=np.uint8)
    for index in np.unique(values[values > 0]):
        share = _linear(values == index, tuple(along_parts))
        is_larger = share > largest
        classes[is_larger] = index
        largest[is_larger] = share[is_larger]
    resampled[tuple(targets)] = classes
    return resampled


def _intensities(
    raw: RawImage, channels: Sequence[NDArray[np.float32]], resampling: _Resampling
) -> tuple[MeanSD, ...]:
    """Mean and standard deviation of each channel on the new grid; 1 stands for a deviation of 0."""
    measured = raw.intensities if resampling.keeps_voxels else [measure(channel) for channel in channels]
    return tuple(MeanSD(known.mean, known.sd or 1.0) for known in measured)


def _scored(
    channels: Sequence[NDArray[np.float32]],
    intensities: Sequence[MeanSD],
    starts: Sequence[int],
    size: tuple[int, ...],
) -> NDArray[np.float32]:
    """A window [C, X, Y, Z] of the z-scored channels, 0 outside of them.

    Mean 0 and standard deviation 1 are those of all voxels that are not zero; zeros stay zeros.
    """
    image = np.zeros((len(channels), *size), dtype=np.float32)
    source, target = _overlap(channels[0].shape, starts, size)
    for channel, known, window in zip(channels, intensities, image, strict=True):
        seen, scored = channel[source], window[target]
        for start in range(0, seen.shape[2], _SLICES):
            # By slices, for seen and scored lie in memory in opposite order, and only few fit into the cache.
            values = seen[:, :, start : start + _SLICES]
            scored[:, :, start : start + _SLICES] = np.where(
                values != 0, (values - np.float64(known.mean)) / known.sd, 0
            )
    return image


def _start(have: int, want: int) -> int:
    """Where a centred window of `want` voxels starts in `have` voxels; negative where it has to be padded."""
    return have // 2 - want // 2 if have >= want else -((want - have) // 2)


def _overlap(
    shape: tuple[int, ...], starts: Sequence[int], size: tuple[int, ...]
) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a volume that a window shows, and where in the window it lies."""
    source = tuple(
        slice(max(start, 0), min(start + want, have))
        for start, want, have in zip(starts, size, shape, strict=True)
    )
    target = tuple(
        slice(part.start - start, part.stop - start) for part, start in zip(source, starts, strict=True)
    )
    return source, target


def _pad_or_crop(volume: NDArray[Any], starts: list[int], size: tuple[int, int, int]) -> NDArray[Any]:
    window = np.zeros(size, dtype=volume.dtype)
    source, target = _overlap(volume.shape, starts, size)
    window[target] = volume[source]
    return window


def _shift(start: list[int]) -> NDArray[np.float64]:
    """The matrix that moves the origin of a grid to the voxel `start`."""
    matrix = np.eye(4)
    matrix[:3, 3] = start
    return matrix
