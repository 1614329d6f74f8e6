"""Augmentation of image and labels: rotation, scaling, mirroring, noise, gamma (Qiu et al. 2023, 3.2)."""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fedqc.geometry import CUBE, Sides, in_voxels, rotation, sampling_grid, source_positions


def augment(
    rng: np.random.Generator, image: Tensor, *labels: Tensor, sides: Sides = CUBE
) -> tuple[Tensor, ...]:
    """Augment a batch; image and labels of one sample go through the same spatial transform.

    Args:
        rng: Draws everything, in one order whatever the device.
        image: `[N, C, X, Y, Z]` float32, z-scored, 0 outside the body.
        labels: Each `[N, X, Y, Z]`, class indices or any map that only moves; nearest neighbour.
        sides: Of a voxel.

    Returns:
        New image and labels, same shapes and types.
    """
    matrices = in_voxels(torch.stack([_matrix(rng) for _ in range(len(image))]), sides).to(image.device)
    unmoved = torch.zeros((len(image), 3), device=image.device)
    shape = image.shape[2:]
    grid = sampling_grid(source_positions(matrices, unmoved, shape), shape)
    moved = F.grid_sample(image, grid, mode="bilinear", align_corners=False)
    stacked = torch.stack([label.float() for label in labels], dim=1)
    moved_labels = F.grid_sample(stacked, grid, mode="nearest", align_corners=False).unbind(dim=1)
    kept = (after.to(before.dtype) for after, before in zip(moved_labels, labels, strict=True))
    return _intensities(rng, moved), *kept


def _matrix(rng: np.random.Generator) -> Tensor:
    """`[3, 3]`: rotation up to 15 degrees about each axis, scale 0.85 to 1.18, left-right mirror."""
    angles = rng.uniform(-15, 15, 3) * (rng.random() < 0.7)
    scale = math.exp(rng.uniform(-0.16, 0.16)) if rng.random() < 0.7 else 1.0
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    return rotation(angles.tolist()) * scale * torch.tensor([mirror, 1.0, 1.0])


def _intensities(rng: np.random.Generator, image: Tensor) -> Tensor:
    """Gaussian noise (SD up to 0.1) and gamma (0.7 to 1.5), each on half of the samples; 0 stays 0."""
    inside = image != 0
    shape = (len(image), 1, 1, 1, 1)
    gamma = np.where(rng.random(shape) < 0.5, np.exp(rng.uniform(math.log(0.7), math.log(1.5), shape)), 1.0)
    low = image.amin(dim=(1, 2, 3, 4), keepdim=True)
    span = (image.amax(dim=(1, 2, 3, 4), keepdim=True) - low).clamp(min=1e-6)
    image = ((image - low) / span) ** torch.from_numpy(gamma).to(image) * span + low
    sigma = np.where(rng.random(shape) < 0.5, rng.uniform(0, 0.1, shape), 0.0)
    noise = torch.from_numpy(rng.standard_normal(tuple(image.shape), dtype=np.float32)).to(image)
    return torch.where(inside, image + noise * torch.from_numpy(sigma).to(image), 0.0)
