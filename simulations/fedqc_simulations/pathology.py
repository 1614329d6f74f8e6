"""What the brain of a phantom has: a tumour, or lesions of the white matter.

Each kind of phantom has a grid of its own, and the modalities and label values of the built-in task that goes
with it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.errors import ConfigError
from fedqc.task import Task, load_task
from fedqc_simulations.levels import Grid, Volume, ellipsoid, smooth_field

_FEWEST_VOXELS = 24
"""Of a tumour's core and of its edema: less would be gone on a coarser grid."""
_LEAST_LOAD, _GREATEST_LOAD = 0.5, 50.0
"""Volume in ml of all white matter lesions of a brain together."""


@dataclass(frozen=True, eq=False)
class Head:
    """A healthy brain, as far as it matters where something may grow in it."""

    grid: Grid
    positions: tuple[Volume, Volume, Volume]
    """Where the voxels are in mm, seen from the head; each `[X, Y, Z]`."""
    brain: Volume
    """Level of the brain, `[X, Y, Z]`."""
    ventricles: Volume
    """Level of the ventricles, `[X, Y, Z]`."""
    white: Volume
    """`[X, Y, Z]`, how much of each voxel is white matter."""


@dataclass(frozen=True, eq=False)
class Growth:
    """What has grown in a head."""

    levels: dict[str, Volume]
    """Level `[X, Y, Z]` of each tissue, in the order in which one takes the place of the other."""
    label: NDArray[np.uint8]
    """`[X, Y, Z]`."""


@dataclass(frozen=True, eq=False)
class Kind:
    """A kind of phantom."""

    task: str
    """The built-in task whose modalities and label values the phantoms have."""
    grid: Grid
    modalities: tuple[str, ...]
    contrast: Mapping[str, tuple[float, ...]]
    """Brightness of each tissue in each modality; white matter in T1 is 1. The healthy tissues come first."""
    label_values: Mapping[str, int]
    blur: tuple[float, float]
    """Smallest and largest standard deviation in mm of the Gaussian that a site's scanner blurs images by."""
    grow: Callable[[np.random.Generator, Head], Growth]
    """Draws what a head has."""

    @property
    def tissues(self) -> tuple[str, ...]:
        """Their names, in the order of an anatomy's shares."""
        return tuple(self.contrast)


def grow_tumour(rng: np.random.Generator, head: Head) -> Growth:
    """Draw one tumour, sometimes two: edema, in it a rim, in it a core."""
    # Tumours start in the white matter, and grow around what holds fluid rather than into it.
    tissue = np.minimum(head.brain - 4, -2 - head.ventricles)
    rim = rng.uniform(4.5, 7)
    while True:
        levels = _tumour(rng, head, tissue, rim)
        label = _nested_label(levels)
        if all((label == value).sum() >= _FEWEST_VOXELS for value in TUMOUR.label_values.values()):
            return Growth(levels, label)


def grow_white_matter_lesions(rng: np.random.Generator, head: Head) -> Growth:
    """Draw many lesions in the white matter, most of them near the ventricles, where they flow together.

    Their volume together is drawn first, log-uniform from 0.5 to 50 ml, and met to the voxel; the more of it,
    the more and the larger lesions.
    """
    grid = head.grid
    load = math.exp(rng.uniform(math.log(_LEAST_LOAD), math.log(_GREATEST_LOAD)))
    n_voxels = round(1000 * load / grid.spacing**3)
    white = (head.white > 0.5) & (head.brain > 4)
    from_ventricles = ndimage.distance_transform_edt(head.ventricles <= 0, sampling=grid.spacing)[white]
    points = np.stack([axis[white] for axis in head.positions], axis=1)

    number = min(round(9 * load**0.45 * math.exp(rng.normal(0, 0.2))), n_voxels // 2)
    # Hardly any between the ventricles.
    weight = (np.exp(-from_ventricles / 3) + 0.015) * np.minimum(1, (points[:, 0] / 12) ** 2)
    centres = rng.choice(len(points), number, replace=False, p=weight / weight.sum())
    near = np.exp(-from_ventricles[centres] / 8)
    sizes = (1 + near) * np.exp(rng.normal(0, 0.45, number))
    stretch = np.exp(rng.normal(0, 0.25, (number, 3)))
    uneven = 1 + 0.25 * np.clip(smooth_field(rng, grid, 5)[white], -2, 2)
    away = (points[None] - points[centres, None]) / stretch[:, None]
    distances = np.linalg.norm(away, axis=2) * uneven  # [lesions, voxels of white matter], in mm
    # All grow by the same factor until together they have the volume that was drawn.
    relative = (distances / sizes[:, None]).min(axis=0)
    inner, outer = np.partition(relative, (n_voxels - 1, n_voxels))[n_voxels - 1 : n_voxels + 1]
    growth = (inner + outer) / 2
    level = np.full(grid.shape, -np.inf, dtype=np.float32)
    level[white] = (growth * sizes[:, None] - distances).max(axis=0)
    label = np.zeros(grid.shape, dtype=np.uint8)
    label[white] = np.where(relative < growth, WHITE_MATTER_LESIONS.label_values["lesion"], 0)
    return Growth({"lesion": level}, label)


def _tumour(rng: np.random.Generator, head: Head, tissue: Volume, rim: float) -> dict[str, Volume]:
    """Levels of edema (with all inside it), rim (with the core) and core, in this order.

    Args:
        rng: Draws place, size and shape.
        head: Where it grows.
        tissue: Level of where the tumour may grow.
        rim: Thickness of the rim in mm.
    """
    grid = head.grid
    edema, tumour = np.full((2, *grid.shape), -np.inf, dtype=np.float32)
    candidates = np.argwhere(tissue > 10)
    largest = math.exp(rng.uniform(math.log(16), math.log(36)))
    for share in (1.0, rng.uniform(0.4, 0.8))[: 2 if rng.random() < 0.2 else 1]:
        size = share * largest
        centre = tuple(candidates[int(rng.integers(len(candidates)))])
        away: Sequence[Volume] = [p - p[centre] for p in head.positions]
        outer = ellipsoid(away, size * np.exp(rng.normal(0, 0.15, 3)))
        edema = np.maximum(edema, outer + 0.18 * size * smooth_field(rng, grid, 0.6 * size))
        # The tumour does not sit in the middle of its edema.
        away = [p + rng.normal(0, 0.1) * size for p in away]
        inner = ellipsoid(away, rng.uniform(0.6, 0.9) * size * np.exp(rng.normal(0, 0.12, 3)))
        tumour = np.maximum(tumour, inner + 0.1 * size * smooth_field(rng, grid, 0.5 * size))
    edema = np.minimum(edema, tissue)
    tumour = np.minimum(tumour, edema - grid.spacing)
    return {"edema": edema, "rim": tumour, "core": tumour - rim * (1 + 0.2 * smooth_field(rng, grid, 10))}


def _nested_label(levels: dict[str, Volume]) -> NDArray[np.uint8]:
    """The label of a tumour: each part keeps a voxel of the part around it on all six sides."""
    shape = levels["edema"].shape
    label = np.zeros(shape, dtype=np.uint8)
    room = np.ones(shape, dtype=bool)
    for name, level in levels.items():
        part = room & (level > 0)
        label[part] = TUMOUR.label_values[name]
        room = ndimage.binary_erosion(part)
    return label


TUMOUR = Kind(
    task="phantom",
    grid=Grid((40, 48, 40), 4.0),
    modalities=("t1n", "t1c", "t2w", "t2f"),
    contrast={
        "white matter": (1.00, 1.00, 0.45, 0.55),
        "grey matter": (0.74, 0.76, 0.62, 0.72),
        "fluid": (0.28, 0.30, 1.15, 0.18),
        "edema": (0.60, 0.60, 0.88, 1.05),
        "core": (0.42, 0.44, 1.00, 0.62),
        "rim": (0.58, 1.40, 0.76, 0.86),
    },
    label_values={"core": 1, "edema": 2, "rim": 3},  # as in BraTS 2023
    blur=(1.2, 2.8),
    grow=grow_tumour,
)
WHITE_MATTER_LESIONS = Kind(
    task="phantom-lesions",
    grid=Grid((54, 66, 54), 3.0),  # the smallest load, 0.5 ml, has 19 voxels
    modalities=("T1", "FLAIR"),
    contrast={
        "white matter": (1.00, 0.62),
        "grey matter": (0.74, 0.74),
        "fluid": (0.28, 0.18),
        # Two cases of Lesjak et al. 2018 have 0.6 and 0.75 times the white matter's in T1, 1.35 in FLAIR.
        "lesion": (0.70, 0.90),
    },
    label_values={"lesion": 1},
    blur=(0.6, 1.6),
    grow=grow_white_matter_lesions,
)
KINDS = {kind.task: kind for kind in (TUMOUR, WHITE_MATTER_LESIONS)}
"""By the name of their task."""


def kind_for(task: Task) -> Kind:
    """The phantoms that are drawn for a task where no data set is named.

    Raises:
        ConfigError: there are none for it.
    """
    if task.name not in KINDS or task != load_task(task.name):
        raise ConfigError(
            f"--data is missing; task {task.name!r} needs a data set, "
            f"only tasks {' and '.join(map(repr, KINDS))} are drawn"
        )
    return KINDS[task.name]
