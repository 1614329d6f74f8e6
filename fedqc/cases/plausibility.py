"""What looks odd about a case although it could be used. The case stays; somebody should look."""

import math
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nibabel.orientations import io_orientation
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.conventions import Guess
from fedqc.cases.problems import Problem
from fedqc.cases.tally import Intensities, LabelValues, holds_only
from fedqc.cases.volumes import bounding_box, pieces, voxel_size
from fedqc.task import Task

MAX_SHARE_OUTSIDE = 0.01
"""Of a label, in voxels where every modality is zero."""
MAX_SHARE_CLIPPED = 0.01
"""Of the voxels that are not zero, at the highest value."""
MAX_SHARE_MARKED = 0.8
"""Of the voxels where a modality is not zero."""
NORMALISED_TOLERANCE = 0.05
"""Of mean 0 and standard deviation 1."""
_EVERY_TOUCHING_VOXEL = np.ones((3, 3, 3), dtype=bool)


def are_exchanged(values: LabelValues, channels: Sequence[NDArray[np.float32]], task: Task) -> bool:
    """Whether the label's file holds intensities and an image's file label values."""
    if values.n_known > 0.99 * values.n_voxels or not values.has_many:
        return False
    return any(holds_only(channel, task.label_values) for channel in channels)


def is_copy(values: NDArray[Any], counted: LabelValues, channels: Sequence[NDArray[np.float32]]) -> bool:
    """Whether what should be a label [X, Y, Z] is one of the images again."""
    if not counted.has_many:
        return False
    label = values.astype(np.float32, copy=False)
    return any(
        channel.shape == label.shape and all(map(np.array_equal, pieces(channel), pieces(label)))
        for channel in channels
    )


def image_problems(case: str, path: Path, name: str, intensities: Intensities) -> Iterator[Problem]:
    """What is odd about the intensities of a modality, called `name` where a file holds several."""
    problem = partial(Problem, case=case, file=path)
    lowest, highest = intensities.lowest, intensities.highest
    if intensities.n_not_finite or lowest == highest:
        return
    mean, sd = intensities.mean, intensities.sd
    scaled = lowest >= -1 and highest <= 1
    if scaled or (abs(mean) < NORMALISED_TOLERANCE and abs(sd - 1) < NORMALISED_TOLERANCE):
        how = f"from {lowest:.3g} to {highest:.3g}" if scaled else f"with mean {mean:.2f} and SD {sd:.2f}"
        yield problem(
            code="normalised-image",
            found=f"intensities{name} {how}",
            expected="intensities as the scanner gave them",
            fix="use the image as it was before it was normalised; a cut-off range cannot be brought back",
        )
    share = intensities.n_highest / (intensities.n_voxels - intensities.n_zero)
    if share > MAX_SHARE_CLIPPED:
        yield problem(
            code="clipped-image",
            found=f"{share:.1%} of the voxels{name} that are not zero at the highest value {highest:g}",
            expected=f"at most {MAX_SHARE_CLIPPED:.0%}",
            fix="use the image as it was before its intensities were cut off",
        )


def label_problems(
    case: str,
    path: Path,
    classes: NDArray[np.uint8],
    *,
    channels: Sequence[NDArray[np.float32]],
    affine: NDArray[np.float64],
    guess: Guess,
    task: Task,
) -> Iterator[Problem]:
    """What is odd about a label [X, Y, Z] of class indices, seen together with its image and their affine."""
    problem = partial(Problem, case=case, file=path)
    box = bounding_box(classes)
    if box is None:
        return
    is_marked = classes[box] > 0
    n_marked = int(np.count_nonzero(is_marked))
    is_inside = channels[0] != 0
    for channel in channels[1:]:
        is_inside |= channel != 0
    n_inside = int(np.count_nonzero(is_inside))
    n_outside = int(np.count_nonzero(is_marked & ~is_inside[box]))
    share = n_outside / n_marked
    if share > MAX_SHARE_OUTSIDE:
        yield problem(
            code="label-outside-image",
            found=f"{share:.0%} of the label where every modality is zero",
            expected=f"at most {MAX_SHARE_OUTSIDE:.0%}",
            fix="look whether image and label belong together and lie in the same place",
        )
    filled = (n_marked - n_outside) / max(n_inside, 1)
    if filled > MAX_SHARE_MARKED:
        yield problem(
            code="label-fills-image",
            found=f"{filled:.0%} of the image's voxels that are not zero marked",
            expected=f"at most {MAX_SHARE_MARKED:.0%}",
            fix="look whether background and structure are exchanged, or everything was marked by mistake",
        )
    n_seen = int(np.count_nonzero(classes[_window(is_inside, affine, task)]))
    if n_seen < n_marked:
        size, spacing = ("x".join(f"{side:g}" for side in sides) for sides in (task.size, task.spacing))
        yield problem(
            code="label-cropped",
            found=f"{1 - n_seen / n_marked:.1%} of the label outside of what the network sees",
            expected=f"all of it in the middle {size} voxels of {spacing} mm of the image's non-zero part",
            fix="use a task of your own with a larger size",
        )
    sizes = _part_sizes(is_marked)
    n_islands = int((sizes < task.smallest_part).sum())
    if n_islands and sizes.max() >= task.smallest_part:
        yield problem(
            code="tiny-islands",
            found=f"{n_islands} of {len(sizes)} parts with fewer than {task.smallest_part} voxels",
            expected="none",
            fix="look whether these voxels were marked by mistake, and remove them",
        )
    if guess.is_foreign:
        assert guess.convention is not None  # noqa: S101 - a guess that is foreign names one
        convention = task.conventions[guess.convention]
        meaning = ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in convention.items())
        own = ", ".join(f"{name} {'/'.join(map(str, values))}" for name, values in task.classes.items())
        yield problem(
            code="label-convention",
            found=f"a label that looks as if numbered by {guess.convention} ({meaning})",
            expected=f"{own} as in task {task.name!r}",
            fix="look what the values mean; renumber the label, or write a task of your own",
        )


def _part_sizes(is_marked: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Voxels of each separate part."""
    # Turned, so that it walks through files' volumes in the order of memory.
    parts, n_parts = ndimage.label(is_marked.T, structure=_EVERY_TOUCHING_VOXEL)
    sizes = np.zeros(n_parts + 1, dtype=np.int64)
    for piece in pieces(parts):
        counted = np.bincount(piece)
        sizes[: counted.size] += counted
    return sizes[1:]


def _window(
    is_inside: NDArray[np.bool_], affine: NDArray[np.float64], task: Task
) -> tuple[slice, slice, slice]:
    """The part of the files' grid that preprocessing leaves, to a voxel more or less.

    Args:
        is_inside: [X, Y, Z], where a modality is not zero.
        affine: of the grid.
        task: with size and spacing.
    """
    box = bounding_box(is_inside) or tuple(slice(0, side) for side in is_inside.shape)
    canonical = io_orientation(affine)[:, 0].astype(int)
    sides = []
    for axis, (seen, side) in enumerate(zip(box, voxel_size(affine), strict=True)):
        half = task.size[canonical[axis]] * task.spacing[canonical[axis]] / side / 2
        middle = (seen.start + seen.stop) / 2
        sides.append(slice(max(0, math.floor(middle - half)), math.ceil(middle + half)))
    x, y, z = sides
    return x, y, z
