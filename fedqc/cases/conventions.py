"""Which class does a label value mean? Guessed from how the labels lie in each other and how they look.

BraTS numbered the enhancing tumour 4 until 2022 and 3 since; nnU-Net and the Decathlon call edema 1 and
necrosis 2, BraTS the other way round. A task lists such conventions, and what is known of its anatomy. Each
convention that knows all values of a label is asked how much of that anatomy it makes true. The answer is
told to people; no label is ever rewritten.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.volumes import bounding_box, pieces
from fedqc.task import Task

_SLICES = 8  # of a volume that are looked at at once, where all at once would need too much memory
_ENOUGH = 2**24  # voxels to see which label borders on what; of larger labels only some slices are looked at


@dataclass(frozen=True)
class Guess:
    """What speaks for the convention that explains a label best."""

    convention: str | None
    """Its name; None where no convention explains the label better than the others."""
    is_foreign: bool
    """Whether it contradicts the task, and explains more of the anatomy than those that fit the task."""


def guess_convention(
    values: NDArray[np.integer], channels: Sequence[NDArray[np.float32]], task: Task
) -> Guess:
    """Guess the convention of one label.

    Args:
        values: [X, Y, Z] label values as in the file.
        channels: a volume [X, Y, Z] for each of the task's modalities.
        task: with conventions and anatomy.
    """
    box = bounding_box(values)
    if box is None:
        return Guess(None, is_foreign=False)
    present = sorted({int(value) for piece in pieces(values) for value in np.unique(piece)} - {0})
    fitting = {
        name: {value: member for member, members in classes.items() for value in members}
        for name, classes in task.conventions.items()
        if set(present) <= {value for members in classes.values() for value in members}
    }
    if not fitting:
        return Guess(None, is_foreign=False)
    evidence = _evidence(values[box], [channel[box] for channel in channels], present, task)
    points = {
        name: sum(meaning[value] == wanted for value, wanted in evidence) for name, meaning in fitting.items()
    }
    best = max(points.values())
    leading = [name for name, found in points.items() if found == best]
    home = [points[name] for name in fitting if not _is_foreign(task, name)]
    if len(leading) > 1 or (len(fitting) > 1 and best == 0):
        return Guess(None, is_foreign=False)
    # One sign may mislead: small lesions have no edema, or nothing that enhances.
    is_foreign = _is_foreign(task, leading[0]) and best >= max(home, default=0) + 2
    return Guess(leading[0], is_foreign)


def _is_foreign(task: Task, convention: str) -> bool:
    """Whether a convention gives a class a value that means something else in the task."""
    return any(
        not set(values) <= set(task.classes[name]) for name, values in task.conventions[convention].items()
    )


def _evidence(
    values: NDArray[np.integer], channels: Sequence[NDArray[np.float32]], present: list[int], task: Task
) -> list[tuple[int, str]]:
    """Pairs of a label value that stands out and the class that the anatomy expects there."""
    if len(present) < 2:
        return []
    outside = _share_of_background(values, present)
    evidence = []
    if task.anatomy.outermost is not None:
        evidence.append((max(outside, key=outside.__getitem__), task.anatomy.outermost))
    if task.anatomy.innermost is not None:
        evidence.append((min(outside, key=outside.__getitem__), task.anatomy.innermost))
    for modality, wanted in task.anatomy.brightest.items():
        channel = channels[task.modalities.index(modality)]
        means = {value: float(channel.mean(where=values == value, dtype=np.float64)) for value in present}
        evidence.append((max(means, key=means.__getitem__), wanted))
    return evidence


def _share_of_background(values: NDArray[np.integer], present: list[int]) -> Mapping[int, float]:
    """For each value, which share of its surface (faces of voxels) borders on background."""
    number = np.zeros(max(present) + 1, dtype=np.uint8)
    number[present] = np.arange(1, len(present) + 1)
    # Turned, so that it is walked through in the order of memory: the first axis is the slowest.
    padded = np.pad(values.T, 1)
    step = math.ceil(padded.size / _ENOUGH) * _SLICES
    n_numbers = len(present) + 1
    pairs = np.zeros(n_numbers**2, dtype=np.int64)
    for first in range(0, len(padded) - 1, step):
        slab = number[padded[first : first + _SLICES + 1]]  # the last slice belongs to the next slab, too
        for here, there in (
            (slab[:-1], slab[1:]),
            (slab[:-1, :-1], slab[:-1, 1:]),
            (slab[:-1, :, :-1], slab[:-1, :, 1:]),
        ):
            is_border = here != there
            border = here[is_border].astype(np.intp) * n_numbers + there[is_border]
            pairs += np.bincount(border, minlength=pairs.size)
    faces = pairs.reshape(n_numbers, n_numbers)
    faces = faces + faces.T
    shares = faces[1:, 0] / faces[1:].sum(axis=1)
    return dict(zip(present, shares.tolist(), strict=True))
