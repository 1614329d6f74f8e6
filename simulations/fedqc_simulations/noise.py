"""Known errors for known labels: what makes a simulation's candidates spoiled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.degradation.annotator import (
    ANNOTATOR_KINDS,
    OverContouring,
    Shift,
    SwappedClasses,
    whole_voxels,
)
from fedqc.degradation.base import Params, radius
from fedqc.degradation.samples import LabelFactory, Recipe
from fedqc.geometry import CUBE, Sides

Noise = Literal["mixed", "systematic", "systematic-reference", "none"]
MIXED_SHARE = 0.35
"""Share of the candidates that `mixed` noise spoils, each with an error of its own."""
HABIT_SHARE = 0.8
"""Share of the labels that `systematic` noise spoils at a site with a habit."""
LARGEST_DSC = 0.9
"""A spoiled label is at least this bad."""
ATTEMPTS = 50


@dataclass(frozen=True)
class Spoiled:
    """A label with a known error."""

    label: NDArray[np.uint8]
    """`[X, Y, Z]` class indices."""
    kind: str
    params: Params
    dsc: float
    """Mean DSC with the label before."""


def habits(names: Sequence[str], n_classes: int) -> dict[str, str]:
    """The kind of error that is the habit of each site that has one: the first half, the kinds in turn."""
    kinds = _habit_kinds(n_classes)
    chosen = names[: len(names) // 2] if len(names) > 1 else names
    return {name: kinds[index % len(kinds)] for index, name in enumerate(chosen)}


def lone_habit(names: Sequence[str], n_classes: int, rng: np.random.Generator) -> dict[str, str]:
    """One site and its habit, both drawn."""
    kinds = _habit_kinds(n_classes)
    return {names[int(rng.integers(len(names)))]: kinds[int(rng.integers(len(kinds)))]}


def _habit_kinds(n_classes: int) -> list[str]:
    swapped = [SwappedClasses.kind] if n_classes > 1 else []
    return [*swapped, OverContouring.kind, Shift.kind]


def habit_params(
    kind: str, label: NDArray[np.uint8], rng: np.random.Generator, sides: Sides = CUBE
) -> Params:
    """What a site with this habit uses every time, sized for a label whose voxels have `sides`."""
    tensor = torch.from_numpy(label)
    if kind == SwappedClasses.kind:
        return {"first": 1, "second": 2, "both": 1}
    if kind == OverContouring.kind:
        return {"distance": 0.25 * radius(tensor, sides)}
    direction = rng.normal(size=3)
    offset = direction / np.linalg.norm(direction) * 0.45 * radius(tensor, sides)
    return {"voxels": whole_voxels(offset / sides)}


def choose_spoiled(ids: Sequence[str], share: float, rng: np.random.Generator) -> list[str]:
    """Which cases are spoiled, in random order: the share of them, rounded."""
    return [ids[index] for index in rng.permutation(len(ids))[: round(share * len(ids))]]


def deal_kinds(ids: Sequence[str], rng: np.random.Generator) -> dict[str, tuple[str, ...]]:
    """For each case the kinds of error to try, in order; all kinds come first equally often."""
    start = int(rng.integers(len(ANNOTATOR_KINDS)))
    turned = ANNOTATOR_KINDS[start:] + ANNOTATOR_KINDS[:start]
    return {
        case: tuple(turned[(index + step) % len(turned)] for step in range(len(turned)))
        for index, case in enumerate(ids)
    }


def spoil(
    label: NDArray[np.uint8],
    donor: NDArray[np.uint8],
    kinds: Sequence[str],
    regions: Sequence[Sequence[int]],
    rng: np.random.Generator,
    *,
    sides: Sides = CUBE,
) -> Spoiled | None:
    """Give a label an error of the first of `kinds` that is possible and bad enough.

    Args:
        label: `[X, Y, Z]` class indices.
        donor: Another patient's label, of the same shape.
        kinds: Tried in this order.
        regions: Class indices of each region.
        rng: Draws the parameters.
        sides: Of a voxel.

    Returns:
        None where no kind is possible. The label is never empty: that would be found without any model.
    """
    for kind in kinds:
        factory = LabelFactory([label, donor], regions, [kind], sides=sides)
        for _ in range(ATTEMPTS):
            recipe = factory.draw(rng, 0, kind)
            if recipe is None:
                break
            spoiled = _apply(factory, recipe)
            if spoiled.dsc <= LARGEST_DSC and spoiled.label.any():
                return spoiled
    return None


def spoil_with(
    label: NDArray[np.uint8],
    kind: str,
    params: Mapping[str, object],
    regions: Sequence[Sequence[int]],
    sides: Sides = CUBE,
) -> Spoiled | None:
    """Give a label a site's habit; None where that leaves nothing or changes hardly anything."""
    spoiled = _apply(LabelFactory([label], regions, [kind], sides=sides), Recipe(0, kind, params))
    return spoiled if spoiled.dsc <= LARGEST_DSC and spoiled.label.any() else None


def _apply(factory: LabelFactory, recipe: Recipe) -> Spoiled:
    made = factory.make([recipe])
    return Spoiled(made.label[0].numpy(), recipe.kind, recipe.params, float(made.mean[0]))
