"""SegGen: random rotation, scaling, translation and elastic deformation of a label (Qiu et al. 2023, 3.1)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedqc.degradation.base import Degradation, Params, draw_seed, smooth_field
from fedqc.geometry import rotation, sampling_grid, source_positions

PUBLISHED_SIZE = (160, 192, 160)
"""Voxels of the volumes for which the paper states translation and displacement."""
CONTROL_POINTS = 6
"""Control points an axis of the elastic field; the paper does not say how smooth its field is."""


class SegGen(Degradation):
    """Each of the four transforms with probability 0.5, as published.

    Rotation in [-15, 15] degrees about each axis, scaling in [0.85, 1.25], translation in [-20, 20] voxels,
    elastic displacement of up to [0, 20] voxels; both are scaled from 160x192x160 to the label's size.
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
        shape = labels.shape[1:]
        device = labels.device
        # From output to source: the inverse of rotation and scale.
        matrices = torch.stack([rotation(p["rotation"]).T / float(p["scale"]) for p in params]).to(device)
        shift = torch.tensor([p["translation"] for p in params], dtype=torch.float32, device=device)
        size = torch.tensor([p["displacement"] for p in params], dtype=torch.float32, device=device)
        source = source_positions(matrices, shift, shape)
        field = smooth_field([int(p["seed"]) for p in params], 3, CONTROL_POINTS, shape, device)
        source = source + field * size[:, :, None, None, None]
        return sample_nearest(labels, source)


def sample_nearest(labels: Tensor, source: Tensor) -> Tensor:
    """Labels at real-valued positions.

    Args:
        labels: `[N, X, Y, Z]` uint8.
        source: `[N, 3, X, Y, Z]` positions in voxels from the volume's centre.
    """
    sampled = F.grid_sample(
        labels[:, None].float(), sampling_grid(source, labels.shape[1:]), mode="nearest", align_corners=False
    )
    return sampled[:, 0].to(labels.dtype)
