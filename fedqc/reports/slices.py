"""One slice of a case as a small picture: two panels side by side, with contours or marked voxels.

Arrays have their axes right, anterior, superior (`canonical`); a slice keeps two of them in that order.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from nibabel.orientations import apply_orientation, io_orientation
from numpy.typing import NDArray

from fedqc.cases.volumes import voxel_size
from fedqc.reports.looks import CONTOURS, Line

Window = tuple[tuple[float, float], tuple[float, float]]
"""From left to right and from bottom to top, in mm."""
MARKED = "#E69F00"
_MARKED_RGB = (0xE6 / 255, 0x9F / 255, 0)
PLANES = ("sagittal", "coronal", "axial")

_SMALLEST_MM = 16.0
_INCHES, _DPI = 2.0, 110


@dataclass(frozen=True)
class Slice:
    """A picture, and what it shows."""

    png: bytes
    plane: str
    modality: str


@dataclass(frozen=True, eq=False)
class Panel:
    """What one half of a picture shows over the scan."""

    label: NDArray[np.uint8] | None = None
    """[A, B], class indices, drawn as contours."""
    marked: NDArray[Any] | None = None
    """[A, B], from 0 to 1: how strongly a voxel is coloured. The scan is dim under it, for print."""
    outlined: bool = False
    """What is marked by half or more has a line around it, so that a single voxel is seen."""
    text: str = ""
    """Stands in the panel instead of anything else."""


def canonical(array: NDArray[Any], affine: NDArray[np.float64]) -> NDArray[Any]:
    """A volume [X, Y, Z] with its axes right, anterior, superior."""
    turned: NDArray[Any] = apply_orientation(array, io_orientation(affine))
    return turned


def canonical_spacing(affine: NDArray[np.float64]) -> tuple[float, float, float]:
    """Voxel size in mm along right, anterior, superior."""
    size = voxel_size(affine)
    place = io_orientation(affine)[:, 0]
    x, y, z = (float(size[np.flatnonzero(place == axis)[0]]) for axis in range(3))
    return x, y, z


def fullest_plane(
    weight: NDArray[Any], spacing: Sequence[float], *, scan: NDArray[np.bool_] | None = None
) -> tuple[int, int]:
    """The plane that holds the largest area of something.

    Args:
        weight: [X, Y, Z], of each voxel.
        spacing: voxel size in mm along X, Y, Z.
        scan: [X, Y, Z], where the image shows something: a plane with little of it counts for less, one
            with none of it only where there is no other.

    Returns:
        Axis and index.
    """
    best = (-1.0, 0, 0)
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        areas = weight.sum(axis=others) * spacing[others[0]] * spacing[others[1]]
        if scan is not None:
            areas = areas * scan.mean(axis=others)
        best = max(best, (float(areas.max()), axis, int(areas.argmax())), key=lambda found: found[0])
    if scan is not None and best[0] <= 0:
        return fullest_plane(weight, spacing)
    return best[1], best[2]


def clearest(channels: Sequence[NDArray[Any]], label: NDArray[Any]) -> int:
    """The modality in which what is labelled stands out most from what is not."""
    inside = label > 0
    if not inside.any() or inside.all():
        return 0
    contrast = [
        abs(float(one[inside].mean()) - float(one[~inside].mean())) / (float(one.std()) or 1.0)
        for one in (channel.astype(np.float64) for channel in channels)
    ]
    return int(np.argmax(contrast))


def window_around(focus: NDArray[Any], width: float, height: float, margin: float) -> Window:
    """A square around what is to be seen, inside the slice as far as it fits.

    Args:
        focus: [A, B], not zero where there is something to see.
        width: of a voxel in mm, along A.
        height: of a voxel in mm, along B.
        margin: side of the square by that of what it shows.
    """
    columns, rows = (np.flatnonzero(focus.any(axis=axis)) for axis in (1, 0))
    left, right = columns[0] * width, (columns[-1] + 1) * width
    bottom, top = rows[0] * height, (rows[-1] + 1) * height
    side_x, side_y = focus.shape[0] * width, focus.shape[1] * height
    half = min(max(right - left, top - bottom, _SMALLEST_MM) * margin, max(side_x, side_y)) / 2
    x = _inside((left + right) / 2, half, side_x)
    y = _inside((bottom + top) / 2, half, side_y)
    return (x - half, x + half), (y - half, y + half)


def _inside(middle: float, half: float, side: float) -> float:
    """The middle of a window of a slice that is `side` wide, moved so that the window does not leave it."""
    return side / 2 if 2 * half >= side else min(max(middle, half), side - half)


def draw_panels(
    image: NDArray[Any],
    panels: tuple[Panel, Panel],
    pixel: tuple[float, float],
    *,
    window: Window,
    mirrored: bool,
) -> bytes:
    """The same slice twice, as a PNG.

    Args:
        image: [A, B], finite.
        panels: what the left and the right half show over it.
        pixel: sides of a voxel in mm, along A and B.
        window: what is seen of the slice.
        mirrored: puts the patient's right on the left, as radiologists look at scans.
    """
    width, height = pixel
    extent = (0.0, image.shape[0] * width, 0.0, image.shape[1] * height)
    low, high = (float(value) for value in np.percentile(image, (1, 99.5)))
    with matplotlib.style.context({}, after_reset=True):
        figure = Figure(figsize=(2 * _INCHES, _INCHES), dpi=_DPI, facecolor="black")
        for side, panel in enumerate(panels):
            axes = figure.add_axes((side * 0.505, 0.0, 0.495, 1.0))
            axes.set_axis_off()
            if panel.text:
                axes.text(0.5, 0.5, panel.text, color="white", ha="center", va="center", fontsize=9)
                continue
            brightest = high if panel.marked is None else low + 2 * (high - low)
            axes.imshow(
                image.T,
                cmap="gray",
                vmin=low,
                vmax=brightest if high > low else low + 1,
                origin="lower",
                extent=extent,
                interpolation="bilinear",
            )
            if panel.marked is not None:
                overlay = np.zeros((*panel.marked.T.shape, 4))
                overlay[..., :3] = _MARKED_RGB
                overlay[..., 3] = 0.9 * np.clip(panel.marked.T, 0, 1)
                axes.imshow(overlay, origin="lower", extent=extent, interpolation="nearest")
            if panel.marked is not None and panel.outlined:
                _contour(axes, panel.marked >= 0.5, (width, height), (MARKED, "solid"), 3.2)
            if panel.label is not None:
                for value in np.unique(panel.label[panel.label > 0]):
                    look = CONTOURS[(int(value) - 1) % len(CONTOURS)]
                    _contour(axes, panel.label == value, (width, height), look, 1.6)
            axes.set(xlim=window[0][::-1] if mirrored else window[0], ylim=window[1])
        figure.add_artist(Rectangle((0.495, 0), 0.01, 1, color="white", transform=figure.transFigure))
        png = BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _contour(
    axes: Axes, mask: NDArray[np.bool_], pixel: tuple[float, float], look: tuple[str, Line], points: float
) -> None:
    """A line around what is true, in a colour and a style, so many points wide."""
    if not mask.any():
        return
    # A rim of background, so that what touches the edge has a closed contour.
    padded = np.pad(mask, 1)
    x, y = ((np.arange(size) - 0.5) * side for size, side in zip(padded.shape, pixel, strict=True))
    color, line = look
    axes.contour(x, y, padded.T, levels=[0.5], colors=color, linestyles=line, linewidths=points)
