"""One slice of a case as a small picture: the label's contours, and where the QC model finds them wrong."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import label_to_classes, read_volume
from fedqc.reports.slices import (
    PLANES,
    Panel,
    Slice,
    canonical,
    canonical_spacing,
    clearest,
    draw_panels,
    fullest_plane,
    window_around,
)
from fedqc.task import Task

_SURE = 0.25
"""Probability from which an error counts when the slice is chosen."""
_MARGIN = 1.6
"""Side of the picture by that of what it shows."""


def draw_slice(files: CaseFiles, task: Task, error_map: Path) -> Slice:
    """Draw the plane with the largest area of predicted error: left the label, right the error map over it.

    Args:
        files: of the case, its label included.
        task: what it shows.
        error_map: probability in per cent on the grid of the case's files; need not exist.

    Raises:
        DataError: a file cannot be read.
    """
    assert files.label is not None  # noqa: S101 - what a site scored has a label
    volume = read_volume(files.label)
    label, affine = label_to_classes(volume.data, task), volume.affine
    error = read_volume(error_map).data / 100 if error_map.is_file() else np.zeros(label.shape)
    label, error = canonical(label, affine), canonical(error, affine)
    channels = [canonical(channel, affine) for channel in _channels(files)]
    spacing = canonical_spacing(affine)

    weight = _what_to_show(error, label)
    axis, index = fullest_plane(weight, spacing)
    channel = clearest(channels, label)
    image, contours, wrong, focus = (
        np.take(array, index, axis) for array in (channels[channel], label, error, weight + (label > 0))
    )
    width, height = (side for position, side in enumerate(spacing) if position != axis)
    png = draw_panels(
        image,
        (Panel(label=contours), Panel(marked=wrong)),
        (width, height),
        window=window_around(focus, width, height, _MARGIN),
        mirrored=axis != 0,
    )
    return Slice(png, PLANES[axis], task.modalities[channel])


def _channels(files: CaseFiles) -> Sequence[NDArray[Any]]:
    volumes = [read_volume(path).data for path in files.images if path is not None]
    if len(volumes) == 1 and volumes[0].ndim == 4:
        return [volumes[0][..., channel] for channel in range(volumes[0].shape[3])]
    return volumes


def _what_to_show(error: NDArray[Any], label: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Predicted errors; where there are none the label, and where that is empty everything."""
    for found in (np.where(error >= _SURE, error, 0.0), error, label > 0):
        if found.any():
            return np.asarray(found, dtype=np.float64)
    return np.ones(label.shape)
