"""What is wrong with a label: the kind of error that would make it of the label as it should be.

Some methods tell more of a label than that it is wrong: what it should be (`Score.corrected`). Each kind of
error is tried on that: the error of the kind that comes nearest to the label at hand. The diagnosis is the
kind that explains most of the difference,

    explains = 2 |D & E & (S = L)| / (|D| + |E|)

with the label L, the corrected label T, the error's outcome S, and the voxels D and E where L and S differ
from T. What no kind explains is the label of another patient, or of an earlier scan. Nothing is learned for
this, and no reference is needed.

An error of order or place (swapped classes, a flip, a shift) can be undone. Whether that mends the label is
checked by scoring it; a person decides, nothing is changed.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.curation.diagnosis import Diagnosis, Kind, Repair
from fedqc.methods.base import ERROR_FROM, Method, Score
from fedqc.scoring import judge
from fedqc.task import Task

Label = NDArray[np.uint8]
"""`[X, Y, Z]` class indices."""

EXPLAINED = 0.62
"""Of the label of another patient some kind explains nearly as much by chance; less explains nothing."""
ALIKE = 0.8
"""DSC of label and corrected label from which it is no other patient's, though nothing explains it."""
CLEARLY = 0.05
"""By so much a later kind has to explain more than an earlier one, which is the simpler."""
MENDED = 0.1
"""By so much a repaired label has to be predicted better."""
MARGIN = 12
"""Voxels around label and corrected label; no contour runs further out."""
MOST_DISTANCES = 24
"""Distances by which a contour is moved on trial."""
MISSED_OVERLAP = 0.02
"""A piece of which less is labelled counts as missed."""
SMALLEST_PIECE = 8
"""Voxels."""

_ENDS = (("left", "right"), ("back", "front"), ("bottom", "top"))
"""Of the axes of a case, in the direction of its voxels."""
_PLANES = ("sagittal", "coronal", "axial")
_NEIGHBOURS = np.ones((3, 3, 3))


@dataclass(frozen=True)
class _Explanation:
    """An error of one kind, and what comes of the corrected label by it."""

    kind: Kind
    found: str
    made: Label
    how: str = ""
    """What would undo it, in words."""
    undone: Label | None = None
    """The label after that."""


def corrected_label(label: Label, score: Score, task: Task) -> Label | None:
    """What a label should be, as a method sees it: its corrected label, or what its error maps make of it.

    Returns:
        `[X, Y, Z]` class indices; None where the method does not tell.
    """
    if score.corrected is not None:
        return score.corrected
    maps = score.class_error_maps
    if not maps and score.error_map is not None and task.n_classes == 1:
        maps = dict.fromkeys(task.classes, score.error_map)
    if not maps:
        return None
    # Where several classes claim a voxel, the one that is surest.
    holds = [
        np.where(label == index, 1 - maps[name], maps[name]) for index, name in enumerate(task.classes, 1)
    ]
    return np.where(np.max(holds, axis=0) >= ERROR_FROM, np.argmax(holds, axis=0) + 1, 0).astype(np.uint8)


def diagnose_cases(
    method: Method, network: nn.Module, cases: Iterable[Case], compute: Compute
) -> Iterator[tuple[Case, Diagnosis | None]]:
    """Each case with what is probably wrong with its label; None where the method does not tell."""
    for case, score in judge(method, network, cases, compute):
        corrected = corrected_label(case.label, score, method.task)
        if corrected is None:
            yield case, None
            continue
        diagnosis, undone = diagnose(case.label, corrected, method.task, _middles(case))
        if undone is not None:
            how, repaired = undone
            again = replace(case, label=repaired)
            (judged,) = (one for _, one in judge(method, network, [again], compute))
            if judged.quality >= score.quality + MENDED:
                diagnosis = diagnosis.model_copy(update={"repair": Repair(how=how, quality=judged.quality)})
        yield case, diagnosis


def diagnose(
    label: Label, corrected: Label, task: Task, middles: Sequence[NDArray[np.float64]] = ()
) -> tuple[Diagnosis, tuple[str, Label] | None]:
    """Find the kind of error that explains best what a label and the corrected one differ in.

    Args:
        label: `[X, Y, Z]` class indices.
        corrected: of the same shape.
        task: what they show; axes run to the right, the front and the top.
        middles: where it may have been mirrored, in voxels; none stand for the middle of the array.

    Returns:
        The diagnosis, and how to undo the error with the label after that, where it can be undone.
    """
    if not (label != corrected).any():
        found = "the label is as it should be wherever the model can tell"
        return Diagnosis(kind=Kind.UNCLEAR, found=found, explains=0), None
    best: _Explanation | None = None
    most = 0.0
    box = _box(label, corrected)
    pair = _Pair(label[box], corrected[box], tuple(task.classes), task.spacing)
    own = (np.array(label.shape) - 1) / 2
    for explanation in chain(_flips(label, corrected, middles or [own]), pair.explanations()):
        whole = explanation.kind is Kind.FLIP
        ours, theirs = (label, corrected) if whole else (pair.label, pair.corrected)
        explains = _explained(ours, theirs, explanation.made)
        if best is None or explains > most + (0 if explanation.kind is best.kind else CLEARLY):
            best, most = explanation, explains
    if best is None or most < EXPLAINED:
        if _agreement(label, corrected) >= ALIKE:
            found = "the label differs a little from what the model would have, in no way that has a name"
            return Diagnosis(kind=Kind.UNCLEAR, found=found, explains=most), None
        found = "nothing in it fits: another patient's label, or that of an earlier scan"
        return Diagnosis(kind=Kind.ANOTHER, found=found, explains=most), None
    undone = None
    if best.undone is not None:
        undone = best.how, best.undone
        if best.kind is not Kind.FLIP:
            repaired = np.zeros_like(label)
            repaired[box] = best.undone
            undone = best.how, repaired
    return Diagnosis(kind=best.kind, found=best.found, explains=most), undone


def _agreement(label: Label, corrected: Label) -> float:
    """DSC over all classes together."""
    total = np.count_nonzero(label) + np.count_nonzero(corrected)
    return 2 * np.count_nonzero((label == corrected) & (label > 0)) / total if total else 1.0


def _explained(label: Label, corrected: Label, made: Label) -> float:
    """See the module."""
    wrong, would_be = label != corrected, made != corrected
    total = int(wrong.sum()) + int(would_be.sum())
    return float(2 * (wrong & would_be & (made == label)).sum() / total) if total else 0.0


def _box(label: Label, corrected: Label) -> tuple[slice, slice, slice]:
    """Where one of them holds something, with a margin."""
    filled = (label > 0) | (corrected > 0)
    x, y, z = (
        slice(max(0, int(places[0]) - MARGIN), int(places[-1]) + 1 + MARGIN)
        for places in (np.flatnonzero(filled.any(axis=others)) for others in ((1, 2), (0, 2), (0, 1)))
    )
    return x, y, z


def _flips(label: Label, corrected: Label, middles: Iterable[NDArray[np.float64]]) -> Iterator[_Explanation]:
    """Mirrored about a middle of the volume, along one axis or several, as a lost orientation does."""
    for middle, along in product(middles, product((False, True), repeat=3)):
        axes = [axis for axis, flipped in enumerate(along) if flipped]
        if axes:
            ends = " and ".join(f"{_ENDS[axis][0]} to {_ENDS[axis][1]}" for axis in axes)
            made, undone = (_mirrored(one, axes, middle) for one in (corrected, label))
            yield _Explanation(Kind.FLIP, f"flipped {ends}", made, f"flip it {ends}", undone)


def _mirrored(label: Label, axes: Sequence[int], middle: NDArray[np.float64]) -> Label:
    """A label mirrored about a place in voxels; what comes in from outside is background."""
    beside = np.rint(2 * middle - (np.array(label.shape) - 1)).astype(int)
    offset = np.where(np.isin(range(3), axes), beside, 0)
    return _moved(np.flip(label, tuple(axes)), offset)


def _middles(case: Case) -> list[NDArray[np.float64]]:
    """Where a volume may have been mirrored, in voxels of the case: the middle of its file, and its own.

    They differ where an image was cropped to what is not zero.
    """
    own = (np.array(case.label.shape) - 1) / 2
    in_file = case.native_affine @ [*(np.array(case.native_shape) - 1) / 2, 1]
    of_file = (np.linalg.inv(case.affine) @ in_file)[:3]
    return [own] if np.allclose(np.rint(2 * own), np.rint(2 * of_file)) else [of_file, own]


@dataclass(frozen=True)
class _Pair:
    """A label and what it should be, in the box that holds both."""

    label: Label
    corrected: Label
    classes: tuple[str, ...]
    spacing: tuple[float, float, float]

    def explanations(self) -> Iterator[_Explanation]:
        """An error of each kind that may be, the simpler kinds first."""
        yield from self._missed()
        yield from self._swapped()
        yield from self._moved_contours()
        yield from self._slices()
        yield from self._shift()
        yield from self._invented()

    def _missed(self) -> Iterator[_Explanation]:
        """Without the pieces of a class of which the label has hardly anything."""
        made, names = self.corrected.copy(), []
        for index, name in enumerate(self.classes, 1):
            pieces, _ = ndimage.label(self.corrected == index, _NEIGHBOURS)
            sizes = np.bincount(pieces.ravel())
            labelled = np.bincount(pieces.ravel(), self.label.ravel() == index)
            gone = (sizes >= SMALLEST_PIECE) & (labelled < MISSED_OVERLAP * sizes)
            gone[0] = False
            made[gone[pieces]] = 0
            names += [name] * int(gone.sum())
        if names:
            yield _Explanation(Kind.MISSED, f"not labelled: {_counted(names)}", made)

    def _swapped(self) -> Iterator[_Explanation]:
        """With the class names that the label has in their place."""
        count = len(self.classes) + 1
        both = np.bincount(
            self.corrected.ravel().astype(np.intp) * count + self.label.ravel(), minlength=count**2
        ).reshape(count, count)
        becomes = np.arange(count, dtype=np.uint8)
        for index in range(1, count):
            if both[index, 1:].any():
                becomes[index] = 1 + both[index, 1:].argmax()
        held = [index for index in range(1, count) if both[index].any()]
        changed = [index for index in held if becomes[index] != index]
        if not changed:
            return
        said = ", ".join(
            f"{self.classes[index - 1]} is called {self.classes[becomes[index] - 1]}" for index in changed
        )
        made = becomes[self.corrected]
        if len(set(becomes[held].tolist())) < len(held):  # two have one name now, which nobody can undo
            yield _Explanation(Kind.SWAPPED, said, made)
            return
        back = ", ".join(
            f"call {self.classes[becomes[index] - 1]} {self.classes[index - 1]}" for index in changed
        )
        undo = np.arange(count, dtype=np.uint8)
        undo[becomes[held]] = held
        yield _Explanation(Kind.SWAPPED, said, made, back, undo[self.label])

    def _moved_contours(self) -> Iterator[_Explanation]:
        """With a contour that runs further in, or further out: that of all, or that of one class."""
        yield from self._moved_contour("the contour", self.corrected > 0, self.label > 0)
        present = [index for index in range(1, len(self.classes) + 1) if (self.corrected == index).any()]
        for index in present if len(present) > 1 else ():
            name = f"the contour of {self.classes[index - 1]}"
            yield from self._moved_contour(name, self.corrected == index, self.label == index)

    def _moved_contour(
        self, name: str, inside: NDArray[np.bool_], labelled: NDArray[np.bool_]
    ) -> Iterator[_Explanation]:
        """The same of one contour: what lies in it, and what is labelled so."""
        if not inside.any():
            return
        depth, outer = self._nearest(inside)
        for distance in _distances(depth[inside & ~labelled]):
            made = np.where(inside & (depth <= distance), outer, self.corrected)
            said = f"{name} runs {distance:.1f} mm inside of where it should be"
            yield _Explanation(Kind.UNDER, said, made)
        away, inner = self._nearest(~inside)
        others = self.corrected > 0
        # A class may also reach into others alone, where what is labelled in all is right.
        for reached in (~inside, ~inside & others) if (others & ~inside).any() else (~inside,):
            for distance in _distances(away[reached & labelled]):
                made = np.where(reached & (away <= distance), inner, self.corrected)
                said = f"{name} runs {distance:.1f} mm outside of where it should be"
                yield _Explanation(Kind.OVER, said, made)

    def _nearest(self, inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], Label]:
        """Of each voxel how far, in mm, the nearest one is that does not lie inside, and its class."""
        if inside.all():  # where there is none
            return np.full(inside.shape, np.inf), self.corrected
        away, nearest = ndimage.distance_transform_edt(inside, self.spacing, return_indices=True)
        return away, self.corrected[tuple(nearest)]

    def _slices(self) -> Iterator[_Explanation]:
        """Without the slices of an axis in which the label has nothing."""
        for axis, plane in enumerate(_PLANES):
            others = tuple(other for other in range(3) if other != axis)
            held = (self.corrected > 0).any(axis=others)
            gone = held & ~(self.label > 0).any(axis=others)
            if gone.any():
                made = self.corrected.copy()
                np.moveaxis(made, axis, 0)[gone] = 0
                said = f"{gone.sum()} of {held.sum()} {plane} slices are not labelled"
                yield _Explanation(Kind.SLICES, said, made)

    def _shift(self) -> Iterator[_Explanation]:
        """Moved by whole voxels: from where the centres say, to where both agree best."""
        if not (self.label.any() and self.corrected.any()):
            return
        here, there = (
            np.array(ndimage.center_of_mass(volume > 0)) for volume in (self.label, self.corrected)
        )
        offset = np.rint(here - there).astype(int)
        agreed = self._agreeing(offset)
        climbing = True
        while climbing:
            climbing = False
            for step in (*np.eye(3, dtype=int), *-np.eye(3, dtype=int)):
                if (more := self._agreeing(offset + step)) > agreed:
                    offset, agreed, climbing = offset + step, more, True
        if offset.any():
            way = _way(offset * np.array(self.spacing))
            made, undone = _moved(self.corrected, offset), _moved(self.label, -offset)
            back = _way(-offset * np.array(self.spacing))
            yield _Explanation(Kind.SHIFT, f"moved by {way}", made, f"move it by {back}", undone)

    def _agreeing(self, offset: NDArray[np.intp]) -> int:
        """Voxels of a class in which the label and the moved corrected label agree."""
        moved = _moved(self.corrected, offset)
        return int(((moved > 0) & (moved == self.label)).sum())

    def _invented(self) -> Iterator[_Explanation]:
        """With a ball, stretched as it may be, for each thick piece of a label where there is nothing."""
        excess = (self.label > 0) & (self.corrected == 0)
        pieces, count = ndimage.label(ndimage.binary_opening(excess))
        made, names = self.corrected.copy(), []
        for number, region in enumerate(ndimage.find_objects(pieces), 1):
            inside = pieces[region] == number
            if inside.sum() < SMALLEST_PIECE:
                continue
            index = int(np.bincount(self.label[region][inside]).argmax())
            start = [part.start for part in region]
            made[(made == 0) & _ball_like(np.argwhere(inside) + start, made.shape)] = index
            names.append(self.classes[index - 1])
        if count and names:
            yield _Explanation(Kind.INVENTED, f"labelled where there is nothing: {_counted(names)}", made)


def _distances(found: NDArray[np.float64]) -> NDArray[np.float64]:
    """Some of the distances of voxels from a contour, from the smallest to the largest."""
    known: NDArray[np.float64] = np.unique(found.round(3))
    if len(known) <= MOST_DISTANCES:
        return known
    chosen = np.linspace(0, len(known) - 1, MOST_DISTANCES).round().astype(np.intp)
    return np.asarray(known[chosen])


def _moved(label: Label, offset: NDArray[np.intp]) -> Label:
    """A label moved by whole voxels; what comes in from outside is background."""
    result = np.zeros_like(label)
    source, target = [], []
    for step, length in zip(offset.tolist(), label.shape, strict=True):
        bounded = max(-length, min(length, step))
        source.append(slice(max(0, -bounded), length - max(0, bounded)))
        target.append(slice(max(0, bounded), length - max(0, -bounded)))
    result[tuple(target)] = label[tuple(source)]
    return result


def _ball_like(voxels: NDArray[np.intp], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """The solid ellipsoid that has the centre and the second moments of some voxels `[n, 3]`."""
    centre = voxels.mean(axis=0)
    # A solid ellipsoid's variance along an axis is a fifth of the half axis squared; a voxel has its own.
    spread = 5 * (np.cov(voxels.T) + np.eye(3) / 12)
    reach = np.sqrt(np.diag(spread))
    low = np.maximum(np.ceil(centre - reach).astype(int), 0)
    high = np.minimum(np.floor(centre + reach).astype(int) + 1, shape)
    inside = np.zeros(shape, dtype=np.bool_)
    region = tuple(slice(first, last) for first, last in zip(low, high, strict=True))
    axes = [np.arange(first, last) - middle for first, last, middle in zip(low, high, centre, strict=True)]
    places = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
    inside[region] = np.einsum("...i,ij,...j->...", places, np.linalg.inv(spread), places) <= 1
    return inside


def _way(millimetres: NDArray[np.float64]) -> str:
    """An offset in words, along the axes along which there is any."""
    steps = [
        f"{abs(length):.1f} mm to the {_ENDS[axis][length > 0]}"
        for axis, length in enumerate(millimetres.tolist())
        if length
    ]
    return ", ".join(steps)


def _counted(names: list[str]) -> str:
    """Names with how often each is there."""
    return ", ".join(
        f"a piece of {name}" if names.count(name) == 1 else f"{names.count(name)} pieces of {name}"
        for name in dict.fromkeys(names)
    )
