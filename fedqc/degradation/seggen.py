"""SegGen: random rotation, scaling, translation and elastic deformation of a label (Qiu et al. 2023, 3.1)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedqc.degradation.base import Degradation, Params, draw_seed, smooth_field
from fedqc.geometry import Region, foreground, in_voxels, rotation, source_positions

PUBLISHED_SIZE = (160, 192, 160)
"""Voxels of the volumes for which the paper states translation and displacement."""
CONTROL_POINTS = 6
"""Control points an axis of the elastic field; the paper does not say how smooth its field is."""


class SegGen(Degradation):
    """Each of the four transforms with probability 0.5, as published.

    Rotation in [-15, 15] degrees about each axis, scaling in [0.85, 1.25], translation in [-20, 20] voxels,
    elastic displacement of up to [0, 20] voxels; both are scaled from 160x192x160 to the label's size. Angles
    are those of space, whatever the sides of a voxel.
    """

    kind = "seggen"

    def make_params(self, rng: np.random.Generator, label: Tensor) -> Params:
        """Draw the four transforms; one that is not applied has its neutral value."""
        ratio = np.array(label.shape) / np.array(PUBLISHED_SIZE)
        used = rng.random(4) < 0.5
        return {
            "rotation": (rng.uniform(-15, 15, 3) * used[0]).tolist(),
            "scale": float(rng.uniform(0.85, 1.25)) if used[1] else 1.0,
            "translation": (rng.uniform(-20, 20, 3) * ratio * used[2]).tolist(),
            "displacement": (rng.uniform(0, 20) * ratio * used[3]).tolist(),
            "seed": draw_seed(rng),
        }

    def apply(self, labels: Tensor, params: Sequence[Params]) -> Tensor:
        """Sample the labels at the transformed voxel positions, nearest neighbour, background outside."""
        result = torch.zeros_like(labels)
        for label, degraded, p in zip(labels, result, params, strict=True):
            self._transform(label, degraded, p)
        return result

    def _transform(self, label: Tensor, degraded: Tensor, params: Params) -> None:
        """Write the transformed label into an empty one, where its foreground may come to lie."""
        shape = label.shape
        turn, scale = rotation(params["rotation"]), float(params["scale"])
        back, turn = in_voxels(turn.T, self.sides), in_voxels(turn, self.sides)
        displacement = params["displacement"]
        box = foreground(label)
        target = box and _reached(box, turn * scale, params["translation"], displacement, shape)
        if target is None:
            return
        # From output to source: the inverse of rotation and scale.
        matrix = (back / scale).to(label.device)
        shift = torch.tensor(params["translation"], dtype=torch.float32, device=label.device)
        source = source_positions(matrix[None], shift[None], shape, target)[0]
        if any(displacement):
            seed = [int(params["seed"])]
            field = smooth_field(seed, 3, CONTROL_POINTS, shape, label.device, region=target)[0]
            size = torch.tensor(displacement, dtype=torch.float32, device=label.device)
            source += field * size[:, None, None, None]
        degraded[target] = sample_nearest(label, source)


def _reached(
    box: Region, matrix: Tensor, shift: Sequence[float], displacement: Sequence[float], shape: Sequence[int]
) -> Region | None:
    """The output voxels in which something of a box of the label may come to lie; None where there are none.

    Args:
        box: voxels of the label.
        matrix: `[3, 3]`, from source to output.
        shift: in voxels, in the output.
        displacement: by how many voxels along each axis the source may lie elsewhere.
        shape: `X, Y, Z` of both.
    """
    middle = (np.array(shape) - 1) / 2
    first, last = (
        np.array(ends) for ends in zip(*((part.start, part.stop - 1) for part in box), strict=True)
    )
    linear = matrix.double().numpy()
    centre = linear @ ((first + last) / 2 - middle) + np.array(shift) + middle
    half = np.abs(linear) @ ((last - first + 1) / 2 + np.array(displacement)) + 0.01  # and for rounding
    start = np.clip(np.ceil(centre - half), 0, shape).astype(int).tolist()
    stop = np.clip(np.floor(centre + half) + 1, 0, shape).astype(int).tolist()
    x, y, z = (slice(begin, end) for begin, end in zip(start, stop, strict=True))
    return None if any(begin >= end for begin, end in zip(start, stop, strict=True)) else (x, y, z)


def sample_nearest(label: Tensor, source: Tensor) -> Tensor:
    """A label at real-valued positions; background outside.

    Args:
        label: `[X, Y, Z]` uint8.
        source: `[3, ...]` positions in voxels from the volume's centre.

    Returns:
        `[...]` uint8.
    """
    framed = F.pad(label, (1,) * 6)
    index = torch.zeros(source.shape[1:], dtype=torch.int32, device=label.device)
    for positions, length in zip(source, label.shape, strict=True):
        voxel = (positions + (length - 1) / 2).round_().clamp_(-1, length).to(torch.int32)
        index.mul_(length + 2).add_(voxel).add_(1)
    return framed.flatten().index_select(0, index.flatten()).reshape(index.shape)
