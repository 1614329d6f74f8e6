"""The worst labels of a folder as pictures: three planes through the place where most seems wrong."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import matplotlib.image
import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.validation import read_case
from fedqc.cases.volumes import read_volume
from fedqc.errors import DataError
from fedqc.files import replacing
from fedqc.reports.looks import CONTOURS
from fedqc.reports.slices import (
    MARKED,
    PLANES,
    Panel,
    canonical,
    canonical_spacing,
    clearest,
    draw_panels,
    window_around,
)
from fedqc.scoring import ERROR_MAPS, Scored
from fedqc.task import Task

REVIEW = "review"
MOST_REVIEWED = 20

_REACH_MM = 4.0
"""Standard deviation of what counts as one place."""
_SURE = 0.25
"""Probability from which an error belongs into the picture."""
_MARGIN = 1.6
"""Side of the picture by that of what it shows."""
_DPI = 110
_LINE, _LETTER, _INDENT = 26, 8, 6
"""Pixels of a line of text, of a letter at most, and of the rim."""
_POINTS = 8


@dataclass(frozen=True)
class Planes:
    """Three planes through one place of a case: left the label, right the error map over it."""

    pictures: dict[str, bytes]
    """PNG of each, by the plane's name: axial, coronal, sagittal."""
    modality: str


def draw_worst(
    scored: Sequence[Scored], task: Task, out: Path, progress: Callable[[int, int], None] | None = None
) -> list[str]:
    """Draw the cases with the lowest quality into `out/review/ID.png`, one in memory at a time.

    Args:
        scored: Cases whose error maps lie in `out`, as `fedqc.scoring.score_cases` leaves them.
        task: What they show.
        out: Folder of the scores.
        progress: Called with (pictures done, all pictures) after each picture.

    Returns:
        A sentence for each case that could not be drawn.
    """
    worst = sorted(scored, key=lambda one: one.quality)[:MOST_REVIEWED]
    failed: list[str] = []
    (out / REVIEW).mkdir(parents=True, exist_ok=True)
    for done, one in enumerate(worst, start=1):
        try:
            png = draw_review(one, task, out / ERROR_MAPS / f"{one.files.id}.nii.gz")
        # A picture is an extra: whatever became of the files meanwhile, the scores stand.
        except DataError as error:
            failed.append(str(error))
        except MemoryError:
            failed.append(f"case {one.files.id}: does not fit into memory")
        else:
            with replacing(out / REVIEW / f"{one.files.id}.png") as aside:
                aside.write_bytes(png)
        if progress is not None:
            progress(done, len(worst))
    return failed


def draw_review(scored: Scored, task: Task, error_map: Path) -> bytes:
    """Draw three planes through the worst place as a PNG: left the label, right the error map over it.

    Args:
        scored: The case.
        task: What it shows.
        error_map: Probability in per cent on the grid of the case's files; need not exist.

    Raises:
        DataError: a file cannot be read.
    """
    planes = draw_planes(scored.files, task, error_map)
    return _with_words(f"{scored.files.id}: quality {scored.quality:.2f}", planes, tuple(task.classes))


def draw_planes(files: CaseFiles, task: Task, error_map: Path) -> Planes:
    """Draw three planes through the worst place, each for itself.

    Args:
        files: Of the case, with its label.
        task: What it shows.
        error_map: Probability in per cent on the grid of the case's files; need not exist.

    Raises:
        DataError: a file cannot be read.
    """
    raw, classes = read_case(files, task)
    spacing = canonical_spacing(raw.affine)
    label = canonical(classes, raw.affine)
    if error_map.is_file():
        error = canonical(read_volume(error_map).data.astype(np.float32) / 100, raw.affine)
    else:
        error = np.zeros(label.shape, dtype=np.float32)
    channels = [canonical(channel, raw.affine) for channel in raw.channels]
    shown = clearest(channels, label)
    place = _worst_place(error, label, spacing)
    pictures = {}
    for axis in (2, 1, 0):
        image, contours, wrong = (np.take(one, place[axis], axis) for one in (channels[shown], label, error))
        wrong = np.where(wrong >= _SURE, wrong, 0)
        focus = (contours > 0) | (wrong > 0)
        width, height = (side for position, side in enumerate(spacing) if position != axis)
        pictures[PLANES[axis]] = draw_panels(
            image,
            (Panel(label=contours), Panel(label=contours, marked=wrong)),
            (width, height),
            window=window_around(focus if focus.any() else np.ones_like(focus), width, height, _MARGIN),
            mirrored=axis != 0,
        )
    return Planes(pictures, task.modalities[shown])


def _worst_place(
    error: NDArray[np.float32], label: NDArray[np.uint8], spacing: Sequence[float]
) -> tuple[int, ...]:
    """The voxel with most of what is wrong around it; of the label, or of the grid, where nothing is."""
    weight = error if error.any() else (label > 0).astype(np.float32)
    if not weight.any():
        return tuple(side // 2 for side in label.shape)
    around = ndimage.gaussian_filter(weight, [_REACH_MM / side for side in spacing], mode="constant")
    return tuple(int(index) for index in np.unravel_index(around.argmax(), around.shape))


def _with_words(title: str, planes: Planes, classes: Sequence[str]) -> bytes:
    """The slices below each other, with what they show."""
    pictures = [matplotlib.image.imread(BytesIO(png)) for png in planes.pictures.values()]
    width = pictures[0].shape[1]
    legend = _legend(classes, width)
    total = _LINE + sum(len(picture) for picture in pictures) + len(legend) * _LINE
    with matplotlib.style.context({}, after_reset=True):
        figure = Figure(figsize=(width / _DPI, total / _DPI), dpi=_DPI, facecolor="black")

        def write(x: float, line: float, text: str, color: str = "white", align: str = "left") -> None:
            y = line + _LINE / 2
            figure.text(x / width, y / total, text, color=color, size=_POINTS, va="center", ha=align)

        bottom = total - _LINE
        write(_INDENT, bottom, title)
        write(width - _INDENT, bottom, planes.modality, align="right")
        for plane, picture in zip(planes.pictures, pictures, strict=True):
            bottom -= len(picture)
            figure.figimage(picture, 0, bottom)
            write(_INDENT, bottom + len(picture) - _LINE, plane)
        for line in legend:
            bottom -= _LINE
            for x, text, color in line:
                write(x, bottom, text, color)
        png = BytesIO()
        figure.savefig(png, format="png", metadata={"Software": None})
    return png.getvalue()


def _legend(classes: Sequence[str], width: int) -> list[list[tuple[float, str, str]]]:
    """What each colour means, in as many lines as that needs: place, text and colour."""
    looks = [(name, CONTOURS[index % len(CONTOURS)][0]) for index, name in enumerate(classes)]
    lines: list[list[tuple[float, str, str]]] = [[]]
    x: float = _INDENT
    for text, color in [*looks, ("probably wrong", MARKED)]:
        length = _LETTER * len(text) + 2 * _INDENT
        if lines[-1] and x + length > width:
            lines.append([])
            x = _INDENT
        lines[-1].append((x, text, color))
        x += length
    return lines
