"""What a degradation is: parameters drawn first, applied second, and kept, so that it can be replayed."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from fedqc.geometry import CUBE, Region, Sides, whole

Params = Mapping[str, Any]
"""Drawn parameters of one degradation: numbers and lists of numbers, so that they can be written to JSON."""


class Degradation(ABC):
    """Turns labels into worse ones. Kinds of error are told apart by `kind`.

    Args:
        sides: Of a voxel: errors are of one size in all directions, however thick the slices.
    """

    kind: ClassVar[str]

    def __init__(self, sides: Sides = CUBE) -> None:
        self.sides = sides

    def for_patient(self, patient: str) -> "Degradation":
        """For labels of one patient, where it matters whose they are; empty where nobody knows."""
        return self

    def applies_to(self, label: Tensor) -> bool:
        """Whether this kind of error is possible in `label` `[X, Y, Z]`; most need some foreground."""
        return bool(label.any())

    @abstractmethod
    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the parameters for one label `[X, Y, Z]` uint8 of class indices."""

    @abstractmethod
    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Degrade a batch.

        Args:
            labels: `[N, X, Y, Z]` uint8 class indices, on any device.
            params: One set of parameters for each label.

        Returns:
            New labels, same shape, type and device.
        """


def radius(label: Tensor, sides: Sides = CUBE) -> float:
    """Radius, in shortest sides of a voxel, of the ball that has the foreground's volume.

    Sizes of errors are relative to it.
    """
    volume = int((label > 0).sum()) * math.prod(sides)
    return max(1.0, float((3.0 * volume / (4.0 * np.pi)) ** (1 / 3)))


def distance_to(mask: Tensor, reach: int, sides: Sides = CUBE) -> Tensor:
    """Euclidean distance to the nearest voxel of `mask`, exact up to `reach`, larger beyond.

    One parabola minimum an axis (Felzenszwalb & Huttenlocher 2012), bounded by `reach` and so a few shifted
    minima on the whole batch instead of a loop over lines.

    Args:
        mask: `[N, X, Y, Z]` bool.
        reach: Largest distance of interest, in shortest sides of a voxel.
        sides: Of a voxel.

    Returns:
        `[N, X, Y, Z]` float32, in shortest sides of a voxel.
    """
    far = float((reach + 1) ** 2 * 4)
    squared = torch.where(mask, 0.0, far)
    for axis in (1, 2, 3):
        length = squared.shape[axis]
        best = squared.clone()
        side = sides[axis - 1]
        for step in range(1, min(int(reach / side), length - 1) + 1):
            ahead, behind = squared.narrow(axis, step, length - step), squared.narrow(axis, 0, length - step)
            low, high = best.narrow(axis, 0, length - step), best.narrow(axis, step, length - step)
            low.copy_(torch.minimum(low, ahead + (step * side) ** 2))
            high.copy_(torch.minimum(high, behind + (step * side) ** 2))
        squared = best
    return squared.sqrt()


def smooth_field(
    seeds: Sequence[int],
    channels: int,
    points: int,
    shape: Sequence[int],
    device: torch.device,
    *,
    region: Region | None = None,
) -> Tensor:
    """Smooth random fields in [-1, 1]: uniform values on a coarse grid, interpolated trilinearly.

    Unlike `F.interpolate`, in a part of the volume alone if wanted, and to the same bits as in all of it.

    Args:
        seeds: One seed a field, part of the recipe.
        channels: Values at every voxel.
        points: Control points along each axis.
        shape: `X, Y, Z`.
        device: Where the result lives; the values do not depend on it.
        region: The voxels of interest; None: all.

    Returns:
        `[N, channels, X, Y, Z]` (or the region's size) float32.
    """
    coarse = [
        torch.rand((channels, points, points, points), generator=torch.Generator().manual_seed(seed)) * 2 - 1
        for seed in seeds
    ]
    field = torch.stack(coarse).to(device)
    parts = region or whole(shape)
    for axis in (2, 1, 0):  # the last and largest step then copies whole planes
        voxels = torch.arange(parts[axis].start, parts[axis].stop, dtype=torch.float32, device=device)
        position = voxels * ((points - 1) / max(1, shape[axis] - 1))
        below = position.long().clamp(max=points - 2)
        weight = (position - below).reshape(-1, *[1] * (2 - axis))
        low, high = (field.index_select(axis + 2, index) for index in (below, below + 1))
        field = torch.lerp(low, high, weight)
    return field


def draw_seed(rng: np.random.Generator) -> int:
    """A seed that fits into a recipe."""
    return int(rng.integers(2**31))


def component_at(mask: np.ndarray, voxel: Sequence[int]) -> np.ndarray:
    """The 26-connected component of `mask` `[X, Y, Z]` that holds `voxel`, as a mask."""
    components, _ = ndimage.label(mask, structure=np.ones((3, 3, 3)))
    return np.asarray(components == components[tuple(voxel)])


class Untouched(Degradation):
    """The reference label itself: a model must know what good looks like."""

    kind = "untouched"

    def applies_to(self, label: Tensor) -> bool:
        """Always."""
        return True

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:  # noqa: D102
        return {}

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:  # noqa: D102
        return labels.clone()
