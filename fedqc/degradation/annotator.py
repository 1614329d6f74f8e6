"""Errors that people make: one class a kind.

The papers train on errors of machines and curate labels of people. Sizes are relative to the structure (the
radius of the ball with the foreground's volume), so that one set of ranges serves a hippocampus and a glioma;
they are chosen so that DSC reaches from about 0 to about 0.9.
"""

import copy
from abc import abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedqc.degradation.base import (
    Degradation,
    Params,
    component_at,
    distance_to,
    draw_seed,
    radius,
    smooth_field,
)
from fedqc.geometry import CUBE, Region, Sides, foreground, grown, whole

REACH = 12
"""Shortest sides of a voxel by which a contour can move at most; bounds the cost of the distances."""


def _values(params: Sequence[Params], key: str, labels: Tensor) -> Tensor:
    """One float parameter of every label, `[N, 1, 1, 1]`."""
    values = [float(p[key]) for p in params]
    return torch.tensor(values, device=labels.device)[:, None, None, None]


def _present(label: Tensor) -> list[int]:
    """Class indices that occur in a label."""
    return [index for index in label.flatten().bincount().nonzero().flatten().tolist() if index > 0]


def _nearest_class(labels: Tensor, reach: int, sides: Sides) -> tuple[Tensor, Tensor]:
    """Distance to the foreground and the class found there, both `[N, X, Y, Z]`."""
    distances = torch.stack([distance_to(labels == k, reach, sides) for k in range(1, int(labels.max()) + 1)])
    nearest, index = distances.min(dim=0)
    return nearest, (index + 1).to(labels.dtype)


def _outside(labels: Tensor, reach: int, sides: Sides) -> Tensor:
    """Distance to the background, `[N, X, Y, Z]`."""
    return distance_to(labels == 0, reach, sides)


class _MovedContour(Degradation):
    """The contour runs elsewhere, which changes nothing far from it."""

    @staticmethod
    def reach(params: Sequence[Params]) -> int:
        """By how much the contours of a batch move at most, rounded up."""
        return int(np.ceil(max(float(p["distance"]) for p in params)))

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Move the contours in the box that holds them wherever they come to lie."""
        result = labels.clone()
        box = foreground(labels.amax(dim=0))
        if box is not None:
            region = grown(box, self.reach(params) + 1, labels.shape[1:])
            part = (slice(None), *region)
            result[part] = self.move(labels[part], params, region, labels.shape[1:])
        return result

    @abstractmethod
    def move(self, labels: Tensor, params: Sequence[Params], region: Region, shape: Sequence[int]) -> Tensor:
        """Move the contours of the part of labels that lies in a region of volumes of `shape`."""


class UnderContouring(_MovedContour):
    """The contour runs inside the structure: everything closer to the background than a distance is lost."""

    kind = "under-contouring"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the distance, in shortest sides of a voxel; never so far that nothing is left."""
        box = foreground(label) or whole(label.shape)
        around = label[grown(box, 1, label.shape)]
        deepest = float(_outside(around[None], REACH, self.sides).max())
        distance = max(1.0, float(rng.uniform(0.08, 0.4)) * radius(label, self.sides))
        # Depths are exact only up to the reach, so a larger distance could still empty the label.
        return {"distance": min(distance, float(REACH), max(deepest - 0.5, 0.5))}

    def move(self, labels: Tensor, params: Sequence[Params], region: Region, shape: Sequence[int]) -> Tensor:
        """Set voxels within the distance of the background to background."""
        inside = _outside(labels, self.reach(params), self.sides) > _values(params, "distance", labels)
        return torch.where(inside, labels, torch.zeros_like(labels))


class OverContouring(_MovedContour):
    """The contour runs outside the structure: background within a distance takes the nearest class."""

    kind = "over-contouring"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the distance, in shortest sides of a voxel."""
        return {
            "distance": min(max(1.0, float(rng.uniform(0.08, 0.5)) * radius(label, self.sides)), float(REACH))
        }

    def move(self, labels: Tensor, params: Sequence[Params], region: Region, shape: Sequence[int]) -> Tensor:
        """Give background voxels within the distance the class nearest to them."""
        nearest, index = _nearest_class(labels, self.reach(params), self.sides)
        grows = (labels == 0) & (nearest <= _values(params, "distance", labels))
        return torch.where(grows, index, labels)


class StaleLabel(_MovedContour):
    """The label of an earlier scan: the structure has since grown here and shrunk there."""

    kind = "stale-label"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw by how much the contour moves in general and from place to place."""
        distance = min(float(rng.uniform(0.15, 0.6)) * radius(label, self.sides), float(REACH))
        return {"distance": distance, "growth": float(rng.uniform(-0.5, 0.5)), "seed": draw_seed(rng)}

    @staticmethod
    def reach(params: Sequence[Params]) -> int:
        """One and a half times the distance, where place and growth add up."""
        return int(np.ceil(_MovedContour.reach(params) * 1.5))

    def move(self, labels: Tensor, params: Sequence[Params], region: Region, shape: Sequence[int]) -> Tensor:
        """Move the contour by a smooth random field (positive: outwards)."""
        nearest, index = _nearest_class(labels, self.reach(params), self.sides)
        depth = nearest - _outside(labels, self.reach(params), self.sides)  # negative inside
        seeds = [int(p["seed"]) for p in params]
        field = smooth_field(seeds, 1, 5, shape, labels.device, region=region)[:, 0]
        offset = _values(params, "distance", labels) * (field + _values(params, "growth", labels))
        return torch.where(depth <= offset, index, torch.zeros_like(labels))


class MissedComponent(Degradation):
    """One connected piece of one class was not annotated."""

    kind = "missed-component"

    def applies_to(self, label: Tensor) -> bool:
        """Something must be left: at least two pieces of any class."""
        return len(_present(label)) > 1 or self._voxels_left(label)

    @staticmethod
    def _voxels_left(label: Tensor) -> bool:
        mask = label.cpu().numpy() > 0
        return bool(mask.any()) and bool((mask & ~component_at(mask, np.argwhere(mask)[0])).any())

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw a class, then a voxel of it: large pieces are missed as often as they are large."""
        index = int(rng.choice(_present(label)))
        voxels = (label == index).nonzero()
        return {"class": index, "voxel": voxels[int(rng.integers(len(voxels)))].tolist()}

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Set the piece to background."""
        result = labels.clone()
        for label, p in zip(result, params, strict=True):
            box = foreground(label) or whole(label.shape)
            part = label[box]
            voxel = [index - side.start for index, side in zip(p["voxel"], box, strict=True)]
            piece = component_at((part == int(p["class"])).cpu().numpy(), voxel)
            part[torch.from_numpy(piece).to(label.device)] = 0
        return result


class InventedComponent(Degradation):
    """Up to three ellipsoids of a class where there is none."""

    kind = "invented-component"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the number of pieces, their class, and for each a centre and three half axes in voxels."""
        count = int(rng.integers(1, 4))
        shape = np.array(label.shape)
        axes = (
            rng.uniform(0.3, 1.1, (count, 1)) * radius(label, self.sides) * rng.uniform(0.7, 1.4, (count, 3))
        )
        centres = rng.uniform(0.15, 0.85, (count, 3)) * shape
        return {
            "class": int(rng.choice(_present(label))),
            "centres": centres.ravel().tolist(),
            "axes": (axes / self.sides).ravel().tolist(),
        }

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Fill the ellipsoids where the label is background."""
        result = labels.clone()
        for label, p in zip(result, params, strict=True):
            centres = np.array(p["centres"]).reshape(-1, 3)
            axes = np.array(p["axes"]).reshape(-1, 3)
            for centre, half in zip(centres, axes, strict=True):
                region = _box_around(centre, half, label.shape)
                part = label[region]
                part[_ball(centre, half, region, label.device) & (part == 0)] = int(p["class"])
        return result


def _box_around(centre: NDArray[np.float64], half: NDArray[np.float64], shape: Sequence[int]) -> Region:
    """The voxels of a volume that an ellipsoid may hold."""
    start = np.clip(np.floor(centre - half), 0, shape).astype(int).tolist()
    stop = np.clip(np.ceil(centre + half) + 1, 0, shape).astype(int).tolist()
    x, y, z = (slice(begin, end) for begin, end in zip(start, stop, strict=True))
    return x, y, z


def _ball(
    centre: NDArray[np.float64], half: NDArray[np.float64], region: Region, device: torch.device
) -> Tensor:
    """Which voxels of a region an ellipsoid holds."""
    squares = [
        ((torch.arange(part.start, part.stop, dtype=torch.float32, device=device) - middle) / length) ** 2
        for part, middle, length in zip(region, centre.tolist(), half.tolist(), strict=True)
    ]
    inside: Tensor = squares[0][:, None, None] + squares[1][:, None] + squares[2] <= 1
    return inside


class SwappedClasses(Degradation):
    """Two classes carry each other's name, one carries the other's, or all of several carry one name."""

    kind = "swapped-classes"

    def applies_to(self, label: Tensor) -> bool:
        """There must be two classes."""
        return len(_present(label)) > 1

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw two classes, and whether only the first is renamed; of more than two, whether all are."""
        present = _present(label)
        first, second = rng.choice(present, 2, replace=False)
        params = {"first": int(first), "second": int(second), "both": int(rng.random() < 0.7)}
        if len(present) > 2 and rng.random() < 0.25:
            params["all"] = 1
        return params

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Rename."""
        result = labels.clone()
        for label, old, p in zip(result, labels, params, strict=True):
            first, second = int(p["first"]), int(p["second"])
            label[(old > 0) if p.get("all") else (old == first)] = second
            if p["both"] and not p.get("all"):
                label[old == second] = first
        return result


class SlicesLeftOut(Degradation):
    """Slices without annotation: every second one, two of every three, or a run of neighbours."""

    kind = "slices-left-out"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw an axis and which slices of the structure are left out."""
        axis = int(rng.integers(3))
        others = [other for other in range(3) if other != axis]
        slices = (label > 0).any(dim=max(others)).any(dim=min(others)).nonzero()[:, 0].tolist()
        pattern = str(rng.choice(["alternating", "run"]))
        if pattern == "alternating":
            period = int(rng.integers(2, 4))
            kept = int(rng.integers(period))
            # Of every three slices two are left out, of every two one.
            gone = [index for position, index in enumerate(slices) if position % period != kept]
        else:
            length = min(max(1, int(rng.uniform(0.15, 0.7) * len(slices))), max(1, len(slices) - 1))
            start = int(rng.integers(len(slices) - length + 1))
            gone = slices[start : start + length]
        return {"axis": axis, "slices": gone}

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Set the slices to background."""
        result = labels.clone()
        for label, p in zip(result, params, strict=True):
            gone = torch.tensor(p["slices"], dtype=torch.long, device=label.device)
            label.index_fill_(int(p["axis"]), gone, 0)
        return result


class LeftRightFlip(Degradation):
    """The label is mirrored left to right, as when an orientation was read wrongly."""

    kind = "left-right-flip"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Nothing to draw: axis 0 of a case is right-left."""
        return {}

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Mirror axis 0 of the volume."""
        return labels.flip(1)


class Shift(Degradation):
    """The label lies beside the structure, as when a grid's origin was lost."""

    kind = "shift"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw a direction and a length, and round to whole voxels (at least one)."""
        direction = rng.normal(size=3)
        offset = direction / np.linalg.norm(direction) * rng.uniform(0.1, 1.1) * radius(label, self.sides)
        return {"voxels": whole_voxels(offset / self.sides)}

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Move by whole voxels; what comes in from outside is background."""
        result = torch.zeros_like(labels)
        for label, old, p in zip(result, labels, params, strict=True):
            # No further than out of the volume: the stop of a slice must not become negative.
            moves = [max(-n, min(n, int(v))) for v, n in zip(p["voxels"], old.shape, strict=True)]
            pairs = list(zip(moves, old.shape, strict=True))
            target = tuple(slice(max(v, 0), n + min(v, 0)) for v, n in pairs)
            source = tuple(slice(max(-v, 0), n - max(v, 0)) for v, n in pairs)
            label[target] = old[source]
        return result


def whole_voxels(offset: NDArray[np.float64]) -> list[int]:
    """An offset `[3]` in voxels, rounded; at least one voxel, the way in which it is longest."""
    voxels = np.rint(offset).astype(int)
    if not voxels.any():
        voxels[int(np.argmax(np.abs(offset)))] = 1
    return [int(value) for value in voxels]


class AnotherPatient(Degradation):
    """The label of another patient, as when files were mixed up.

    Args:
        donors: Labels `[X, Y, Z]` uint8 to take from, all of one size; the label itself is never taken.
        patients: Whose each is; None: all are of different ones.
    """

    kind = "another-patient"

    def __init__(self, donors: Sequence[Tensor], patients: Sequence[str] | None = None) -> None:
        super().__init__()
        self.donors = donors
        self.patients = patients
        self.patient = ""

    def for_patient(self, patient: str) -> "AnotherPatient":
        """For labels of one patient, whose other scans are no donors."""
        mine = copy.copy(self)
        mine.patient = patient
        return mine

    def applies_to(self, label: Tensor) -> bool:
        """There must be another label."""
        return any(self._may_give(index, label) for index in range(len(self.donors)))

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the donor."""
        order = rng.permutation(len(self.donors)).tolist()
        return {"donor": next(index for index in order if self._may_give(index, label))}

    def _may_give(self, index: int, label: Tensor) -> bool:
        if self.patients is not None and self.patient and self.patients[index] == self.patient:
            return False
        return not torch.equal(self.donors[index].to(label.device), label)

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Return the donors' labels."""
        return torch.stack([self.donors[int(p["donor"])] for p in params]).to(labels)


ANNOTATOR_KINDS: tuple[str, ...] = (
    UnderContouring.kind,
    OverContouring.kind,
    MissedComponent.kind,
    InventedComponent.kind,
    SwappedClasses.kind,
    SlicesLeftOut.kind,
    LeftRightFlip.kind,
    Shift.kind,
    AnotherPatient.kind,
    StaleLabel.kind,
)


def annotator_errors(
    donors: Sequence[Tensor], patients: Sequence[str] | None = None, sides: Sides = CUBE
) -> dict[str, Degradation]:
    """All kinds of annotator error by name.

    Args:
        donors: labels that may be mixed up.
        patients: whose each is, see `AnotherPatient`.
        sides: of a voxel.
    """
    kinds: tuple[Degradation, ...] = (
        UnderContouring(sides),
        OverContouring(sides),
        MissedComponent(),
        InventedComponent(sides),
        SwappedClasses(),
        SlicesLeftOut(),
        LeftRightFlip(),
        Shift(sides),
        AnotherPatient(donors, patients),
        StaleLabel(sides),
    )
    return {kind.kind: kind for kind in kinds}
