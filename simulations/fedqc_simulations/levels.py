"""Levels: distances in mm to a surface, positive inside, from which phantoms are put together."""

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

Volume = NDArray[np.float32]


@dataclass(frozen=True)
class Grid:
    """The voxels of a phantom."""

    shape: tuple[int, int, int]
    spacing: float
    """Voxel size in mm along each axis."""

    @property
    def affine(self) -> NDArray[np.float64]:
        """`[4, 4]`, from voxel indices to mm (RAS+); the origin is in the middle of the volume."""
        affine = np.diag([self.spacing, self.spacing, self.spacing, 1.0])
        affine[:3, 3] = [-self.spacing * (side - 1) / 2 for side in self.shape]
        return affine


def smooth_field(rng: np.random.Generator, grid: Grid, scale: float) -> Volume:
    """`[X, Y, Z]`, mean 0 and standard deviation 1, smooth over `scale` mm.

    White noise, blurred; drawn no finer than it needs to be and interpolated.
    """
    step = max(1, int(scale / grid.spacing / 1.5))
    sigma = scale / grid.spacing / step
    coarse = tuple(math.ceil(side / step) + 1 for side in grid.shape)
    # Noise over the edge, cut off again, keeps the field as rough at the edge as in the middle.
    margin = math.ceil(2 * sigma)
    noise = rng.standard_normal([side + 2 * margin for side in coarse], dtype=np.float32)
    field = ndimage.gaussian_filter(noise, sigma, truncate=3)[(slice(margin, -margin),) * 3]
    if step > 1:
        field = ndimage.zoom(field, step, order=1)
    field = field[tuple(slice(side) for side in grid.shape)]
    scaled: Volume = (field - field.mean()) / field.std()
    return scaled


def ellipsoid(positions: Sequence[Volume], half_axes: Collection[float], power: float = 2) -> Volume:
    """Roughly the distance in mm to an ellipsoid about the origin, positive inside; boxier above power 2."""
    sides = [np.abs(p / float(half)) ** power for p, half in zip(positions, half_axes, strict=True)]
    radius = (sides[0] + sides[1] + sides[2]) ** (1 / power)
    level: Volume = (1 - radius) * float(min(half_axes))
    return level
