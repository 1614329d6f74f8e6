"""The surface DSC of labels (normalised surface distance, NSD): how much of two surfaces lies close together.

    NSD = (area of A's surface near B's + area of B's surface near A's) / (area of both)

Near means no further away than a tolerance in mm (Nikolov et al. 2021). Areas are those of the surfaces'
elements, as MONAI and DeepMind's code have them. Empty masks count as in `fedqc.metrics.overlap`.
"""

import warnings
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.errors import DataError
from fedqc.metrics.overlap import region_masks


def surface_dsc(
    label: NDArray[np.uint8],
    reference: NDArray[np.uint8],
    regions: Sequence[Sequence[int]],
    spacing: Sequence[float],
    tolerance: float,
) -> float:
    """Mean surface DSC over the regions that are in the reference.

    Args:
        label: `[X, Y, Z]` class indices.
        reference: the same shape, class indices of the truth.
        regions: class indices of each region.
        spacing: sides of a voxel in mm.
        tolerance: in mm.

    Returns:
        In [0, 1]; where the reference has no region, 1 for a label that has none either, else 0.

    Raises:
        DataError: the shapes differ, or there is no region.
    """
    if label.shape != reference.shape:
        raise DataError(
            f"label has shape {label.shape}, reference has {reference.shape}; they must be the same"
        )
    if not regions:
        raise DataError("no region to compare; a task names at least one")
    pairs = torch.from_numpy(np.stack([label, reference]))
    ours, truth = region_masks(pairs, regions)
    present = truth.flatten(1).any(dim=1)
    if not present.any():
        return float(not ours.any())
    return float(
        np.mean([_of_masks(ours[i], truth[i], spacing, tolerance) for i in torch.nonzero(present)[:, 0]])
    )


def _of_masks(label: torch.Tensor, truth: torch.Tensor, spacing: Sequence[float], tolerance: float) -> float:
    """Surface DSC of two masks `[X, Y, Z]`, of which the second is not empty."""
    from monai.metrics.surface_dice import compute_surface_dice  # noqa: PLC0415 - takes seconds

    if not label.any():
        return 0.0
    ours, theirs = label[None, None].float(), truth[None, None].float()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)  # MONAI's own use of it
        found = compute_surface_dice(
            ours, theirs, [tolerance], include_background=True, spacing=list(spacing), use_subvoxels=True
        )
    return float(found[0, 0])
