"""Where voxels go under rotations and scalings.

Positions are computed element by element, never by a matrix product: its last bits depend on the number of
threads, and a label voxel that lies half-way between two others would then change its class.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Region = tuple[slice, slice, slice]
"""A box of voxels: along each axis from its first to behind its last."""
Sides = tuple[float, float, float]
"""Sides of a voxel, in units of the shortest."""
CUBE: Sides = (1.0, 1.0, 1.0)


def sides_of(spacing: Sequence[float]) -> Sides:
    """Sides of a voxel by its size in mm; what differs by less than a thousandth counts as equal."""
    x, y, z = (round(side / min(spacing), 3) for side in spacing)
    return x, y, z


def whole(shape: Sequence[int]) -> Region:
    """The box that holds a whole volume of `shape` `X, Y, Z`."""
    x, y, z = (slice(0, length) for length in shape)
    return x, y, z


def foreground(label: Tensor) -> Region | None:
    """The smallest box that holds the foreground of `[X, Y, Z]`; None where there is none."""
    columns = label.amax(dim=0)
    sides = [label.flatten(1).amax(dim=1), columns.amax(dim=1), columns.amax(dim=0)]
    filled = [side.nonzero().flatten().tolist() for side in sides]
    if not filled[0]:
        return None
    x, y, z = (slice(voxels[0], voxels[-1] + 1) for voxels in filled)
    return x, y, z


def grown(region: Region, margin: int, shape: Sequence[int]) -> Region:
    """A box with a margin of voxels on each side, as far as the volume goes."""
    x, y, z = (
        slice(max(0, part.start - margin), min(length, part.stop + margin))
        for part, length in zip(region, shape, strict=True)
    )
    return x, y, z


def rotation(degrees: Sequence[float]) -> Tensor:
    """The `[3, 3]` matrix that rotates about x, then y, then z by angles in degrees."""
    a, b, c = (math.radians(angle) for angle in degrees)
    x = torch.tensor([[1, 0, 0], [0, math.cos(a), -math.sin(a)], [0, math.sin(a), math.cos(a)]])
    y = torch.tensor([[math.cos(b), 0, math.sin(b)], [0, 1, 0], [-math.sin(b), 0, math.cos(b)]])
    z = torch.tensor([[math.cos(c), -math.sin(c), 0], [math.sin(c), math.cos(c), 0], [0, 0, 1]])
    return z @ y @ x


def in_voxels(matrix: Tensor, sides: Sides) -> Tensor:
    """A linear map `[..., 3, 3]` of space as one of voxel positions, which in thick slices is another."""
    side = torch.tensor(sides, dtype=matrix.dtype, device=matrix.device)
    return matrix * (side[None, :] / side[:, None])


def source_positions(
    matrices: Tensor, shifts: Tensor, shape: Sequence[int], region: Region | None = None
) -> Tensor:
    """Where each output voxel comes from: `matrix @ (position - shift)`.

    Args:
        matrices: `[N, 3, 3]`, from output to source.
        shifts: `[N, 3]` in voxels.
        shape: `X, Y, Z` of the volume.
        region: the output voxels to do so for; None: all.

    Returns:
        `[N, 3, X, Y, Z]` (or the region's size) positions in voxels from the volume's centre, float32.
    """
    moved = []
    for axis, (length, part) in enumerate(zip(shape, region or whole(shape), strict=True)):
        voxels = torch.arange(part.start, part.stop, dtype=torch.float32, device=matrices.device)
        positions = voxels - (length - 1) / 2
        sides = [-1 if other == axis else 1 for other in range(3)]
        moved.append(positions.reshape(1, *sides) - shifts[:, axis, None, None, None])
    rows = matrices[:, :, :, None, None, None].unbind(dim=1)
    return torch.stack(
        [row[:, 0] * moved[0] + row[:, 1] * moved[1] + row[:, 2] * moved[2] for row in rows], dim=1
    )


def sampling_grid(source: Tensor, shape: Sequence[int]) -> Tensor:
    """Positions as `grid_sample` (with `align_corners=False`) wants them.

    Args:
        source: `[N, 3, X, Y, Z]` in voxels from the centre of the volume to sample.
        shape: Of that volume.

    Returns:
        `[N, X, Y, Z, 3]`, in the order z, y, x; -1 and 1 are the outer edges of the outer voxels.
    """
    half = torch.tensor([n / 2 for n in shape], device=source.device)
    return (source / half[None, :, None, None, None]).flip(1).permute(0, 2, 3, 4, 1)
