"""Simulated raters: stars from a label's true quality, with errors whose size is known.

    stars = f(quality) + bias of the rater + bias of the rater in the view + error of this one rating

rounded to whole or half stars and kept from 1 to 6. `f` is one fixed rising line, `STARS_OF_QUALITY`; biases
and errors are normal. As all of it is known, so is what a method that learns from ratings should find, and
what figures on the agreement of raters should say.
"""

import csv
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.files import replacing
from fedqc.metrics.overlap import overlap
from fedqc.ratings import COLUMNS, FEWEST_STARS, MOST_STARS, Rating, View

STARS_OF_QUALITY = ((0.0, 1.0), (0.4, 2.0), (0.6, 3.0), (0.75, 4.0), (0.87, 5.0), (1.0, 6.0))
"""Quality and the stars that it earns, straight lines between: the better a label, the closer people look."""
VIEWS: tuple[View, ...] = get_args(View)
_AXES: dict[View, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""What axis a view looks along; they are right-left, posterior-anterior, inferior-superior."""


@dataclass(frozen=True)
class Rater:
    """One person, and how far to trust them; all in stars."""

    name: str
    bias: float
    """How much more than deserved they give; below 0 they are strict."""
    view_bias: Mapping[View, float]
    """What is added to it in each view."""
    sigma: float
    """Standard deviation of the error of each rating: what they do not repeat when they rate again."""


@dataclass(frozen=True)
class Panel:
    """Raters as they are drawn; all in stars."""

    bias: float = 0.4
    """Standard deviation of the raters' biases."""
    view_bias: float = 0.2
    """Standard deviation of what is added in a view."""
    sigma: tuple[float, float] = (0.3, 0.6)
    """Smallest and largest `Rater.sigma`, uniform between."""


USUAL_PANEL = Panel()


def draw_raters(rng: np.random.Generator, count: int, panel: Panel = USUAL_PANEL) -> tuple[Rater, ...]:
    """Raters `rater-1`, `rater-2`, ..., each with errors of their own."""
    return tuple(
        Rater(
            name=f"rater-{number}",
            bias=float(rng.normal(0, panel.bias)),
            view_bias={view: float(rng.normal(0, panel.view_bias)) for view in VIEWS},
            sigma=float(rng.uniform(*panel.sigma)),
        )
        for number in range(1, count + 1)
    )


def stars_of(quality: float) -> float:
    """The stars from 1 to 6 that a label of a quality in [0, 1] deserves, by `STARS_OF_QUALITY`."""
    known, stars = np.array(STARS_OF_QUALITY).T
    return float(np.interp(quality, known, stars))


def rate(
    rng: np.random.Generator,
    qualities: Mapping[str, Mapping[View, float]],
    raters: Sequence[Rater],
    *,
    again: float = 0.2,
    step: float = 0.5,
) -> list[Rating]:
    """Let all raters rate all labels.

    Args:
        rng: Draws every rating's error, and who rates what again.
        qualities: By case, the true quality in [0, 1] in each view that is rated.
        raters: Each rates every case in every of its views.
        again: Share of those that a rater rates a second time, with a new error, after all first times.
        step: Ratings are multiples of it: 1 or 0.5 stars, or 0 for ratings that are not rounded.

    Returns:
        Case by case, then what was rated again.
    """
    first = [
        (case, rater, view, quality)
        for (case, views), rater in itertools.product(qualities.items(), raters)
        for view, quality in views.items()
    ]
    second = [which for which, chosen in zip(first, rng.random(len(first)) < again, strict=True) if chosen]
    ratings = []
    for case, rater, view, quality in first + second:
        stars = stars_of(quality) + rater.bias + rater.view_bias[view] + float(rng.normal(0, rater.sigma))
        if step:
            stars = round(stars / step) * step
        ratings.append(Rating(case, rater.name, view, min(max(stars, FEWEST_STARS), MOST_STARS)))
    return ratings


def view_qualities(
    label: NDArray[np.uint8], reference: NDArray[np.uint8], regions: Sequence[Sequence[int]]
) -> dict[View, float]:
    """The true quality of a label as raters see it: mean DSC of its regions, in three slices and as a whole.

    The slice of a view is the one where the reference has the largest area. Empty regions count as in
    `fedqc.metrics.overlap`.

    Args:
        label: `[X, Y, Z]` class indices, axes right-left, posterior-anterior, inferior-superior.
        reference: the same shape, class indices of the truth.
        regions: class indices of each region, as in `Task.region_indices()`.

    Raises:
        DataError: the shapes differ, or there is no region.
    """

    def mean_dsc(one: NDArray[np.uint8], other: NDArray[np.uint8]) -> float:
        return float(overlap(torch.tensor(one)[None], torch.tensor(other)[None], regions).mean[0])

    qualities: dict[View, float] = {"all": mean_dsc(label, reference)}
    for view, axis in _AXES.items():
        others = tuple(other for other in range(3) if other != axis)
        index = int(np.count_nonzero(reference, axis=others).argmax())
        qualities[view] = mean_dsc(label.take([index], axis), reference.take([index], axis))
    return qualities


def write_ratings(path: Path, ratings: Sequence[Rating]) -> None:
    """Write a table of ratings as a site has it, which `fedqc.ratings.read_ratings` reads.

    Raises:
        OSError: the file cannot be written.
    """
    with replacing(path) as aside, aside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((one.case, one.rater, one.view, f"{one.stars:.6g}") for one in ratings)
