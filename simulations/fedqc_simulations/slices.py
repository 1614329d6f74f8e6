"""One slice of a case as a small picture: the label's contours, and where the QC model finds them wrong."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import label_to_classes, read_volume, voxel_size
from fedqc.task import Task

Line = Literal["solid", "dashed", "dotted"]
# Light colours of Okabe and Ito for dark scans; the line tells them apart without colour.
CONTOURS: tuple[tuple[str, Line], ...] = (
    ("#56B4E9", "solid"),
    ("#F0E442", "dashed"),
    ("#009E73", "dotted"),
    ("#CC79A7", "solid"),
    ("#FFFFFF", "dashed"),
)
ERROR = "#E69F00"
_ERROR_RGB = (0xE6 / 255, 0x9F / 255, 0)
PLANES = ("sagittal", "coronal", "axial")

_SURE = 0.25
"""Probability from which an error counts when the slice is chosen."""
_MARGIN = 1.6
"""Side of the picture by that of what it shows."""
_SMALLEST_MM = 16.0
_INCHES, _DPI = 2.0, 110


@dataclass(frozen=True)
class Slice:
    """A picture, and what it shows."""

    png: bytes
    plane: str
    modality: str


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
    label, error = _canonical(label, affine), _canonical(error, affine)
    channels = [_canonical(channel, affine) for channel in _channels(files)]
    spacing = _canonical_spacing(affine)

    weight = _what_to_show(error, label)
    axis, index = _plane(weight, spacing)
    channel = _clearest(channels, label)
    image, contours, wrong, focus = (
        np.take(array, index, axis) for array in (channels[channel], label, error, weight + (label > 0))
    )
    width, height = (side for position, side in enumerate(spacing) if position != axis)
    pixel = (width, height)
    png = _draw(image, contours, wrong, pixel, window=_window(focus, *pixel), mirrored=axis != 0)
    return Slice(png, PLANES[axis], task.modalities[channel])


def _channels(files: CaseFiles) -> list[NDArray[Any]]:
    volumes = [read_volume(path).data for path in files.images]
    if len(volumes) == 1 and volumes[0].ndim == 4:
        return [volumes[0][..., channel] for channel in range(volumes[0].shape[3])]
    return volumes


def _canonical(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """Axes right, anterior, superior."""
    turned: NDArray[Any] = apply_orientation(array, io_orientation(affine))
    return turned


def _canonical_spacing(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size in mm along right, anterior, superior."""
    size = voxel_size(affine)
    place = io_orientation(affine)[:, 0]
    x, y, z = (float(size[np.flatnonzero(place == axis)[0]]) for axis in range(3))
    return x, y, z


def _what_to_show(error: NDArray[Any], label: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Predicted errors; where there are none the label, and where that is empty everything."""
    for found in (np.where(error >= _SURE, error, 0.0), error, label > 0):
        if found.any():
            return np.asarray(found, dtype=np.float64)
    return np.ones(label.shape)


def _plane(weight: NDArray[np.float64], spacing: Sequence[float]) -> tuple[int, int]:
    """Axis and index of the plane with the largest area in mm2."""
    best = (-1.0, 0, 0)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        areas = weight.sum(axis=others) * spacing[others[0]] * spacing[others[1]]
        best = max(best, (float(areas.max()), axis, int(areas.argmax())), key=lambda found: found[0])
    return best[1], best[2]


def _clearest(channels: Sequence[NDArray[Any]], label: NDArray[np.uint8]) -> int:
    """The modality in which what is labelled stands out most from what is not."""
    inside = label > 0
    if not inside.any() or inside.all():
        return 0
    contrast = [
        abs(float(one[inside].mean()) - float(one[~inside].mean())) / (float(one.std()) or 1.0)
        for one in (channel.astype(np.float64) for channel in channels)
    ]
    return int(np.argmax(contrast))


def _window(
    focus: NDArray[Any], width: float, height: float
) -> tuple[tuple[float, float], tuple[float, float]]:
    """A square in mm around what is to be seen, inside the slice as far as it fits."""
    columns, rows = (np.flatnonzero(focus.any(axis=axis)) for axis in (1, 0))
    left, right = columns[0] * width, (columns[-1] + 1) * width
    bottom, top = rows[0] * height, (rows[-1] + 1) * height
    side_x, side_y = focus.shape[0] * width, focus.shape[1] * height
    half = min(max(right - left, top - bottom, _SMALLEST_MM) * _MARGIN, max(side_x, side_y)) / 2
    x = _inside((left + right) / 2, half, side_x)
    y = _inside((bottom + top) / 2, half, side_y)
    return (x - half, x + half), (y - half, y + half)


def _inside(middle: float, half: float, side: float) -> float:
    """The middle of a window of a slice that is `side` wide, moved so that the window does not leave it."""
    return side / 2 if 2 * half >= side else min(max(middle, half), side - half)


def _draw(
    image: NDArray[Any],
    label: NDArray[np.uint8],
    error: NDArray[Any],
    pixel: tuple[float, float],
    *,
    window: tuple[tuple[float, float], tuple[float, float]],
    mirrored: bool,
) -> bytes:
    """Both panels; `mirrored` puts the patient's right on the left, as radiologists look at scans."""
    width, height = pixel
    extent = (0.0, image.shape[0] * width, 0.0, image.shape[1] * height)
    with matplotlib.style.context({}, after_reset=True):
        figure = Figure(figsize=(2 * _INCHES, _INCHES), dpi=_DPI, facecolor="black")
        panels = [figure.add_axes((side * 0.505, 0.0, 0.495, 1.0)) for side in (0, 1)]
        figure.add_artist(Rectangle((0.495, 0), 0.01, 1, color="white", transform=figure.transFigure))
        low, high = (float(value) for value in np.percentile(image, (1, 99.5)))
        # Dim under the errors, so that they stand out in print, too.
        for axes, brightest in zip(panels, (high, low + 2 * (high - low)), strict=True):
            axes.set_axis_off()
            axes.imshow(
                image.T,
                cmap="gray",
                vmin=low,
                vmax=brightest if high > low else low + 1,
                origin="lower",
                extent=extent,
                interpolation="bilinear",
            )
        overlay = np.zeros((*error.T.shape, 4))
        overlay[..., :3] = _ERROR_RGB
        overlay[..., 3] = 0.9 * np.clip(error.T, 0, 1)
        panels[1].imshow(overlay, origin="lower", extent=extent, interpolation="nearest")
        _contours(panels[0], label, width, height)
        for axes in panels:
            axes.set(xlim=window[0][::-1] if mirrored else window[0], ylim=window[1])
        png = BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _contours(axes: Axes, label: NDArray[np.uint8], width: float, height: float) -> None:
    # A rim of background, so that what touches the edge has a closed contour.
    padded = np.pad(label, 1)
    x = (np.arange(padded.shape[0]) - 0.5) * width
    y = (np.arange(padded.shape[1]) - 0.5) * height
    for value in np.unique(label[label > 0]):
        color, line = CONTOURS[(int(value) - 1) % len(CONTOURS)]
        axes.contour(x, y, (padded == value).T, levels=[0.5], colors=color, linestyles=line, linewidths=1.6)
