"""Slices as a person looks at them: axial, coronal and sagittal through the middle of a label.

Kofler et al. (2022) show a network what raters saw: the slices of all modalities through the centre of mass
of the tumour core, as they lie in the files, with the masks of the label beside them. A `Case` holds the same
voxels, cropped to the head and z-scored; both are undone here. Axes run to the left, the back and the top
(LPS, as BraTS stores its files), whatever the orientation of the files. Where the files were resampled to the
task's spacing, slices show the case's own grid.
"""

import contextlib
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from nibabel.orientations import (
    aff2axcodes,
    apply_orientation,
    axcodes2ornt,
    inv_ornt_aff,
    io_orientation,
    ornt_transform,
)
from numpy.typing import NDArray
from torch import Tensor

from fedqc.cases.preprocessing import keeps_voxels
from fedqc.cases.sources import Source
from fedqc.cases.validation import AFFINE_TOLERANCE
from fedqc.cases.volumes import MAX_VOXELS, Case, Header, is_singular, label_to_classes
from fedqc.errors import DataError
from fedqc.task import Task

VIEWS = ("axial", "coronal", "sagittal")
_AXES = (2, 1, 0)  # that a slice of each view leaves out
_LPS = axcodes2ornt("LPS")
_READERS = 2
"""Threads that inflate files."""
PERCENTILES = (0.5, 99.5)
"""Of the intensities of all slices of a view, become 0 and 1 (Kofler et al. 2022, 2)."""

Middle = tuple[int, int, int]
"""A voxel (x, y, z)."""


@dataclass(frozen=True)
class Look:
    """What is made of slices before a network sees them."""

    normalisation: Literal["percentile", "min-max"]
    """`percentile`: all slices of a view together; `min-max`: each by itself."""
    encoding: Literal["tissue", "regions"]
    """A mask for each class, or for each region of the task."""
    side: int
    """Of the square, in voxels."""


@dataclass(frozen=True, eq=False)
class Cut:
    """A slice through image and label."""

    image: NDArray[np.float64]
    """[C, H, W] in the units of the files."""
    label: NDArray[np.uint8]
    """[H, W], class indices."""


def middle_of(label: NDArray[np.uint8], task: Task) -> Middle | None:
    """Centre of mass of the task's core, or where there is none of all that is labelled, rounded down.

    Args:
        label: [X, Y, Z] class indices, in any memory order.
        task: Says which classes are the core.

    Returns:
        The voxel, or None where nothing is labelled.
    """
    # The axes as they lie in memory: looking for a few voxels in many takes as long as reading them.
    axes = np.argsort([-abs(stride) for stride in label.strides], kind="stable")
    turned = label.transpose(axes)
    flat = turned.ravel()
    marked = np.flatnonzero(flat != 0)
    core = marked[np.isin(flat[marked], task.core_indices())]
    if not marked.size:
        return None
    found = np.unravel_index(core if core.size else marked, turned.shape)
    middle = [0, 0, 0]
    for axis, positions in zip(axes, found, strict=True):
        middle[axis] = int(positions.sum()) // len(positions)
    return middle[0], middle[1], middle[2]


def default_side(task: Task) -> int:
    """The square that holds the task's longest side: the next multiple of 32, or the published 240."""
    longest = max(task.size)
    return 240 if 160 < longest <= 240 else -(-longest // 32) * 32


def views_of_case(case: Case, task: Task, look: Look) -> Tensor:
    """The three views of a case; only the slices that are needed are copied.

    Returns:
        `[3, C + M, side, side]` float32 in the order of `VIEWS`: modalities in [0, 1], then masks.

    Raises:
        DataError: nothing is labelled, so that there is no middle, and in this task that means an error.
    """
    label = case.label[::-1, ::-1]
    middle = middle_of(label, task)
    if middle is None:
        if task.empty_label == "error":
            raise DataError(
                f"case {case.id}: found a label without any marked voxel, expected at least one to lay "
                "slices through; annotate the case or leave it out"
            )
        x, y, z = (side // 2 for side in label.shape)
        middle = x, y, z
    return assembled(_cuts_of_case(case, label, middle, task), task, look)


def views_of_sources(images: Sequence[Source], label: Source, task: Task, look: Look) -> Tensor | None:
    """The three views straight from files or arrays, as `views_of_case` gives them of the prepared case.

    Of images only the slices are looked at. Where a task's size cuts something off the head, slices show it
    all the same.

    Args:
        images: One for each modality, or one with all of them as fourth axis.
        label: On the same grid, in the label values of the task.
        task: What the case shows.
        look: What the slices become.

    Returns:
        As `views_of_case`; None where the case has to be read as a whole: its spacing is not the task's, or
        something is odd about it, and reading it says what.
    """
    with contextlib.suppress(DataError):
        headers = [source.header() for source in (*images, label)]
        if not _is_plain(headers, task):
            return None
        to_lps = ornt_transform(io_orientation(headers[-1].affine), _LPS)

        def turned(volume: NDArray[Any]) -> NDArray[Any]:
            lps: NDArray[Any] = apply_orientation(volume, to_lps)
            return lps

        def read_label() -> tuple[NDArray[np.uint8], Middle] | None:
            classes = _classes(label.volume().data, task)
            lps = None if classes is None else turned(classes)
            middle = None if lps is None else middle_of(lps, task)
            return None if lps is None or middle is None else (lps, middle)

        def read_image(
            source: Source, labelled: Future[tuple[NDArray[np.uint8], Middle] | None]
        ) -> list[list[NDArray[np.float64]]]:
            volume = source.volume().data
            channels = [volume] if volume.ndim == 3 else list(np.moveaxis(volume, -1, 0))
            found = labelled.result()
            return [] if found is None else [list(_slices(turned(one), found[1])) for one in channels]

        with ThreadPoolExecutor(_READERS) as pool:
            labelled = pool.submit(read_label)
            reading = [pool.submit(read_image, source, labelled) for source in images]
            channels = [channel for one in reading for channel in one.result()]
        found = labelled.result()
        if found is None or any(_is_odd(channel, task) for channel in channels):
            return None
        classes, middle = found
        cuts = [
            Cut(np.stack([channel[view] for channel in channels]), _at(classes, axis, middle))
            for view, axis in enumerate(_AXES)
        ]
        return assembled(cuts, task, look)
    return None


def assembled(cuts: Sequence[Cut], task: Task, look: Look) -> Tensor:
    """Slices, normalised and padded (or cropped) about their middle, with the label's masks behind them.

    Padding repeats the lowest value of each row, then of each column, as the published code does.

    Returns:
        `[N, C + M, side, side]` float32.
    """
    members = (
        tuple((index,) for index in range(1, task.n_classes + 1))
        if look.encoding == "tissue"
        else task.region_indices()
    )
    n_channels = len(cuts[0].image) + len(members)
    views = np.empty((len(cuts), n_channels, look.side, look.side), dtype=np.float32)
    for view, cut in zip(views, cuts, strict=True):
        masks = np.array([np.isin(cut.label, classes) for classes in members], dtype=np.float32)
        view[:] = _square(np.concatenate([_normalised(cut.image, look), masks]), look.side)
    return torch.from_numpy(views)


def _cuts_of_case(case: Case, label: NDArray[np.uint8], middle: Middle, task: Task) -> list[Cut]:
    """The slices of a case in the field of view of its files; `label` and `middle` are in LPS."""
    image = case.image[:, ::-1, ::-1]
    n_channels = len(image)
    taken_out = np.array([(one.mean, one.sd) for one in case.intensities] or [(0.0, 1.0)] * n_channels)
    mean, sd = (values[:, None, None] for values in taken_out.T)
    shape, starts = _field_of_view(case, task)
    cuts = []
    for axis in _AXES:
        plane = [other for other in range(3) if other != axis]
        scored = np.stack([_at(channel, axis, middle) for channel in image]).astype(np.float64)
        seen = np.where(scored != 0, scored * sd + mean, 0)
        whole = Cut(
            np.zeros((n_channels, *(shape[other] for other in plane))),
            np.zeros([shape[other] for other in plane], dtype=np.uint8),
        )
        # Where the window of the case lies in the field of view, and which part of it does.
        spans = [
            (max(0, starts[other]), min(shape[other], starts[other] + label.shape[other])) for other in plane
        ]
        there = tuple(slice(begin, end) for begin, end in spans)
        here = tuple(
            slice(begin - starts[other], end - starts[other])
            for (begin, end), other in zip(spans, plane, strict=True)
        )
        whole.image[:, *there] = seen[:, *here]
        whole.label[there] = _at(label, axis, middle)[here]
        cuts.append(whole)
    return cuts


def _field_of_view(case: Case, task: Task) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Sides of what the slices show, and where the case's window begins in it, along left, back and top."""
    size = case.label.shape
    if not keeps_voxels(case.native_shape, case.native_affine, task):
        return size, (0, 0, 0)
    orientation = io_orientation(case.native_affine)
    axes = orientation[:, 0].astype(int)
    shape = tuple(case.native_shape[axis] for axis in np.argsort(axes))
    canonical = case.native_affine @ inv_ornt_aff(orientation, case.native_shape)
    x, y, z = np.rint((np.linalg.inv(canonical) @ case.affine)[:3, 3]).astype(int).tolist()
    return shape, (shape[0] - x - size[0], shape[1] - y - size[1], z)


def _slices(volume: NDArray[Any], middle: Middle) -> Iterator[NDArray[np.float64]]:
    """The slice [H, W] of each view, as single-precision numbers like a case's."""
    for axis in _AXES:
        with np.errstate(all="ignore"):  # what does not fit becomes inf, which is odd
            yield _at(volume, axis, middle).astype(np.float32).astype(np.float64)


def _at(volume: NDArray[Any], axis: int, middle: Middle) -> NDArray[Any]:
    """The slice of a volume [X, Y, Z] across an axis, a view; `take` would copy the whole volume first."""
    whole: list[slice | int] = [slice(None)] * 3
    whole[axis] = middle[axis]
    slice_: NDArray[Any] = volume[tuple(whole)]
    return slice_


def _is_plain(headers: Sequence[Header], task: Task) -> bool:
    """Whether volumes, the label's last, are of one grid with the task's spacing, and nothing is odd."""
    *images, label = headers
    n_modalities = len(task.modalities)
    holds_all = n_modalities > 1 and len(images) == 1
    if len(images) != (1 if holds_all else n_modalities):
        return False
    return (
        all(header.shape[3:] == ((n_modalities,) if holds_all else ()) for header in images)
        and len(label.shape) == 3
        and all(header.shape[:3] == label.shape for header in images)
        and not any(is_singular(header.affine) for header in headers)
        and all(np.abs(header.affine - images[0].affine).max() <= AFFINE_TOLERANCE for header in headers)
        and all(np.isfinite(side) and side > 0 for header in headers for side in header.pixdim)
        and sum(int(np.prod(header.shape)) for header in images) <= MAX_VOXELS
        and len(set(aff2axcodes(label.affine))) == 3
        and keeps_voxels(label.shape, images[0].affine, task)
    )


def _classes(values: NDArray[Any], task: Task) -> NDArray[np.uint8] | None:
    """Class indices of a label [X, Y, Z] in the task's values; None where it holds another one."""
    if values.dtype.kind not in "iu" or values.dtype.itemsize > 2:
        with np.errstate(all="ignore"):
            whole = values.astype(np.min_scalar_type(max(task.label_values)))
        if not np.array_equal(whole, values):
            return None
        values = whole
    try:
        return label_to_classes(values, task)
    except DataError:
        return None


def _is_odd(slices: Sequence[NDArray[np.float64]], task: Task) -> bool:
    """Whether the slices of a modality hold what no image holds: a constant, label values, infinity."""
    values = np.concatenate([one.ravel() for one in slices])
    seen = values[values != 0]
    if not seen.size or not np.isfinite(seen).all() or seen.min() == seen.max():
        return True
    return bool(seen.max() <= max(task.label_values) and np.isin(seen, task.label_values).all())


def _normalised(image: NDArray[np.float64], look: Look) -> NDArray[np.float32]:
    """Slices [C, H, W] brought onto [0, 1]; 0 everywhere where all values are the same."""
    if look.normalisation == "percentile":
        low, high = np.percentile(image, PERCENTILES)
    else:
        low, high = image.min(axis=(1, 2), keepdims=True), image.max(axis=(1, 2), keepdims=True)
    span = high - low
    scaled: NDArray[np.float32] = ((image - low) / np.where(span > 0, span, 1)).clip(0, 1).astype(np.float32)
    return scaled


def _square(channels: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Channels [C, H, W] padded or cropped to [C, side, side]."""
    missing = [max(0, side - have) for have in channels.shape[1:]]
    padded = np.pad(channels, [(0, 0), *((n // 2, n - n // 2) for n in missing)], mode="minimum")
    top, left = ((have - side) // 2 for have in padded.shape[1:])
    return padded[:, top : top + side, left : left + side]
