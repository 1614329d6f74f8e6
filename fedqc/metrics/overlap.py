"""The Dice similarity coefficient (DSC) of labels: the one implementation, with its conventions.

    DSC = 2 |A and B| / (|A| + |B|)

- Both masks empty: 1 (right to say nothing). One mask empty: 0.
- A region that is empty in the reference is left out of a case's mean DSC by mask; it never counts as 0, as 1
  or as NaN. Its own DSC still stands beside it: 1 where the label is empty too, else 0.
- A case whose reference holds no region at all: its mean is 1 where the label holds none either, else 0.

Labels are class indices (0 is background); a region is a union of classes. Everything is batched over the
first axis and runs on the device of its arguments.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedqc.errors import DataError
from fedqc.geometry import foreground


@dataclass(frozen=True)
class Overlap:
    """Overlap of N labels with their references in R regions."""

    dsc: Tensor
    """`[N, R]` float32 in [0, 1]: DSC of each region."""
    present: Tensor
    """`[N, R]` bool: the region is not empty in the reference."""
    mean: Tensor
    """`[N]` float32 in [0, 1]: mean DSC over the present regions."""


def overlap(label: Tensor, reference: Tensor, regions: Sequence[Sequence[int]]) -> Overlap:
    """DSC of each region between labels and their references.

    Args:
        label: `[N, X, Y, Z]` integer class indices, 0 is background.
        reference: the same shape, class indices of the truth.
        regions: class indices of each region, as in `Task.region_indices()`.

    Returns:
        DSC per region, which regions are present, and the mean over those (conventions above).

    Raises:
        DataError: the shapes differ, or there is no region.
    """
    _check_shapes(label, reference)
    if not regions:
        raise DataError("no region to compare; a task names at least one")
    if len(label) and not any(0 in region for region in regions):  # most of a scan belongs to no region
        box = foreground(torch.maximum(label.amax(dim=0), reference.amax(dim=0)))
        if box is not None:
            label, reference = label[(slice(None), *box)], reference[(slice(None), *box)]
    in_label = region_masks(label, regions).flatten(2)
    in_reference = region_masks(reference, regions).flatten(2)
    n_label, n_reference = _count(in_label), _count(in_reference)
    dsc = _dice(_count(in_label & in_reference), n_label + n_reference)
    present = n_reference > 0
    n_present = present.sum(dim=1)
    mean = (dsc * present).sum(dim=1) / n_present.clamp(min=1)
    silent = (n_label == 0).all(dim=1).to(dsc.dtype)
    return Overlap(dsc=dsc, present=present, mean=torch.where(n_present > 0, mean, silent))


def region_masks(label: Tensor, regions: Sequence[Sequence[int]]) -> Tensor:
    """Where each region is.

    Args:
        label: `[N, X, Y, Z]` integer class indices.
        regions: class indices of each region.

    Returns:
        `[N, R, X, Y, Z]` bool.
    """
    masks = torch.zeros((len(label), len(regions), *label.shape[1:]), dtype=torch.bool, device=label.device)
    for position, region in enumerate(regions):
        for index in region:
            masks[:, position] |= label == index
    return masks


def binary_dice(a: Tensor, b: Tensor) -> Tensor:
    """DSC of two batches of masks.

    Args:
        a: `[N, ...]` bool, or numbers where anything but 0 is inside.
        b: the same shape.

    Returns:
        `[N]` float32 in [0, 1]; 1 where both are empty, 0 where one is.

    Raises:
        DataError: the shapes differ.
    """
    _check_shapes(a, b)
    a, b = a.bool().flatten(1), b.bool().flatten(1)
    return _dice(_count(a & b), _count(a) + _count(b))


def error_map(label: Tensor, reference: Tensor) -> Tensor:
    """Where a label is wrong: its class differs from the reference's.

    Args:
        label: `[N, X, Y, Z]` integer class indices.
        reference: the same shape.

    Returns:
        `[N, X, Y, Z]` bool.

    Raises:
        DataError: the shapes differ.
    """
    _check_shapes(label, reference)
    return label != reference


def one_hot(label: Tensor, n_classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """One channel a class, without background: how a label goes into a network.

    Args:
        label: `[N, X, Y, Z]` integer class indices in 0..n_classes.
        n_classes: number of classes without background.
        dtype: of the result.

    Returns:
        `[N, n_classes, X, Y, Z]` zeros and ones.
    """
    return region_masks(label, [(index,) for index in range(1, n_classes + 1)]).to(dtype)


def _count(mask: Tensor) -> Tensor:
    """Voxels inside, along the last axis: as integers, exact for any volume and in mixed precision."""
    if mask.device.type != "cpu":
        return mask.sum(dim=-1, dtype=torch.int32)
    rows = mask.reshape(-1, mask.shape[-1]).numpy()  # which are counted eight times as fast as by PyTorch
    return torch.tensor([np.count_nonzero(row) for row in rows], dtype=torch.int32).reshape(mask.shape[:-1])


def _dice(both: Tensor, sizes: Tensor) -> Tensor:
    """DSC of masks from the voxels that are in both, and in the one and in the other together."""
    return torch.where(sizes > 0, 2 * both / sizes.clamp(min=1), 1.0).to(torch.float32)


def _check_shapes(a: Tensor, b: Tensor) -> None:
    if a.shape != b.shape:
        raise DataError(
            f"label has shape {tuple(a.shape)}, reference has {tuple(b.shape)}; they must be the same"
        )
