"""Phantoms: made-up brains with a tumour or with white matter lesions, no two alike, each from a seed.

    anatomy:   a brain with folded cortex and ventricles
    pathology: what grows in it                          -> share of each tissue in every voxel, and the label
    scanner:   how bright each tissue is, bias field, blur, noise        -> images, zero outside the brain

Anatomy follows from levels: distances in mm to a surface, positive inside, with smooth random fields added.
Tissues have soft edges (a voxel that a surface cuts holds a share of both sides), labels hard ones. Nothing
here is a model of disease; the phantoms only have what makes a segmentation easy or hard.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.volumes import write_volume
from fedqc.seeding import generator
from fedqc_simulations.consortium import Progress
from fedqc_simulations.levels import Grid, Volume, ellipsoid, smooth_field
from fedqc_simulations.pathology import TUMOUR, Head, Kind

_CONTRAST_SPREAD = 0.06
"""Largest relative change of one tissue's brightness at a site; a modality's order stays the same."""


@dataclass(frozen=True)
class Scanner:
    """How one site's images look."""

    contrast: tuple[tuple[float, ...], ...]
    """Brightness of each tissue (outer) in each modality (inner), in the units of the image."""
    bias: float
    """Strength of the bias field: its logarithm stays within plus and minus this."""
    blur: float
    """Standard deviation in mm of the Gaussian that blurs the images."""
    noise: float
    """Noise in each of the two channels of the receiver, as a share of the brightest tissue's brightness."""


@dataclass(frozen=True, eq=False)
class Anatomy:
    """A brain before it is scanned."""

    kind: Kind
    shares: Volume
    """`[tissues, X, Y, Z]`, how much of each voxel each tissue of the kind fills; 1 together in the brain."""
    brain: NDArray[np.bool_]
    """`[X, Y, Z]`."""
    label: NDArray[np.uint8]
    """`[X, Y, Z]`, values as in the kind's `label_values`."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A scanned brain and its true label."""

    image: Volume
    """`[modalities, X, Y, Z]`, positive inside the brain and 0 outside."""
    label: NDArray[np.uint8]
    """`[X, Y, Z]`, values as in the kind's `label_values`."""
    affine: NDArray[np.float64]
    """`[4, 4]`, from voxel indices to mm (RAS+); the origin is in the middle of the volume."""


def draw_scanner(rng: np.random.Generator, kind: Kind = TUMOUR) -> Scanner:
    """A site's scanner: every tissue a little brighter or darker, each modality with a gain of its own."""
    usual = np.array(list(kind.contrast.values()))
    spread = rng.uniform(1 - _CONTRAST_SPREAD, 1 + _CONTRAST_SPREAD, usual.shape)
    gain = 500 * np.exp(rng.uniform(-0.7, 0.7, len(kind.modalities)))
    contrast = usual * spread * gain
    return Scanner(
        contrast=tuple(tuple(map(float, row)) for row in contrast),
        bias=float(rng.uniform(0.05, 0.25)),
        blur=float(rng.uniform(*kind.blur)),
        noise=float(rng.uniform(0.02, 0.05)),
    )


def make_phantom(rng: np.random.Generator, scanner: Scanner, kind: Kind = TUMOUR) -> Phantom:
    """Draw a brain and scan it with a scanner that was drawn for the same kind."""
    anatomy = draw_anatomy(rng, kind)
    return Phantom(scan(rng, anatomy, scanner), anatomy.label, kind.grid.affine)


def draw_anatomy(rng: np.random.Generator, kind: Kind = TUMOUR) -> Anatomy:
    """Draw a brain and what it has."""
    grid = kind.grid
    x, y, z = _positions(rng, grid)
    half_axes = rng.normal((65, 80, 59), (2.5, 3.5, 2.5))
    brain = ellipsoid((x, y, z), half_axes, power=2.5) + 2 * smooth_field(rng, grid, 22)
    ventricles = _ventricles(rng, grid, x, y, z)
    white_matter = kind.tissues.index("white matter")
    shares = np.zeros((len(kind.tissues), *grid.shape), dtype=np.float32)
    shares[white_matter] = 1
    _paint(shares, kind, "grey matter", _deep_grey(rng, grid, x, y, z))
    # The zeros of a rough field are the furrows: fluid at their bottom, cortex along their banks.
    uneven = smooth_field(rng, grid, 22)
    furrow, reach = 6.5 * np.abs(smooth_field(rng, grid, 6.5)), 20 + 3 * uneven
    # Between the halves of the brain, down to where the corpus callosum joins them.
    fissure = np.maximum(np.abs(x + 2 * uneven), 18 - np.hypot(0.5 * y, z - 2))
    bank = np.maximum(5.5 - brain, np.minimum(4 - furrow, reach - brain))
    _paint(shares, kind, "grey matter", np.maximum(bank, 5 - fissure))
    bottom = np.maximum(1 - brain, np.minimum(1.6 - furrow, reach - 5 - brain))
    _paint(shares, kind, "fluid", np.maximum(bottom, 1.5 - fissure))
    _paint(shares, kind, "fluid", ventricles)

    growth = kind.grow(rng, Head(grid, (x, y, z), brain, ventricles, shares[white_matter].copy()))
    for name, level in growth.levels.items():
        _paint(shares, kind, name, level)
    inside = brain > 0
    return Anatomy(kind, shares * inside, inside, growth.label * inside)


def scan(rng: np.random.Generator, anatomy: Anatomy, scanner: Scanner) -> Volume:
    """Images `[modalities, X, Y, Z]` of a brain: contrast, texture, bias field, blur, Rician noise.

    They are zero outside the brain, and nowhere else.
    """
    grid = anatomy.kind.grid
    texture = 1 + 0.03 * smooth_field(rng, grid, 6)
    bias = np.exp(scanner.bias * np.clip(smooth_field(rng, grid, 48) / 2, -1, 1))
    images = []
    for brightness in zip(*scanner.contrast, strict=True):
        signal = np.zeros(grid.shape, dtype=np.float32)
        for share, level in zip(anatomy.shares, brightness, strict=True):
            signal += np.float32(level) * share
        signal = ndimage.gaussian_filter(
            signal * texture * bias, scanner.blur / grid.spacing, mode="constant"
        )
        noisy = add_rician_noise(rng, signal, scanner.noise * max(brightness))
        # At least 1, so that what is zero is exactly what lies outside, also in whole numbers.
        images.append(np.where(anatomy.brain, np.maximum(noisy, 1), 0))
    return np.stack(images).astype(np.float32)


def add_rician_noise(rng: np.random.Generator, signal: Volume, sigma: float) -> Volume:
    """The magnitude of a signal with normal noise of `sigma` in both channels of the receiver.

    Gudbjartsson & Patz 1995, eq. 1: where there is no signal, the mean is `sigma * sqrt(pi / 2)`.
    """
    real, imaginary = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    magnitude: Volume = np.hypot(signal + real, imaginary)
    return magnitude


def write_phantoms(
    folder: Path,
    sites: int | Sequence[str],
    cases_per_site: int,
    seed: int,
    progress: Progress,
    *,
    kind: Kind = TUMOUR,
) -> None:
    """Write phantoms as a data set in the layout `msd`: one 4D file a case, `labelsTr`, `dataset.json`.

    A case has a generator of its own: it looks the same however many others there are. `site_of` says whose
    scanner it comes from.

    Args:
        folder: Made if need be; files of the same name are overwritten.
        sites: Their names, or how many (`site-1`, `site-2`, ...). Each has a scanner of its own.
        cases_per_site: How many phantoms each site has.
        seed: Decides everything that is drawn.
        progress: Told after each phantom.
        kind: What the brains have: `fedqc_simulations.pathology.KINDS`.

    Raises:
        DataError: a file cannot be written.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)] if isinstance(sites, int) else sites
    total = len(names) * cases_per_site
    ids: list[str] = []
    for site in names:
        scanner = draw_scanner(generator(seed, "scanner", site), kind)
        for number in range(cases_per_site):
            progress("making phantoms", len(ids), total)
            phantom = make_phantom(generator(seed, "phantom", site, number), scanner, kind)
            ids.append(f"{site}_{number:03d}")
            # Whole numbers, as scanners write them.
            stored = np.moveaxis(np.rint(phantom.image), 0, 3).astype(np.int16)
            write_volume(folder / "imagesTr" / f"{ids[-1]}.nii.gz", stored, phantom.affine)
            write_volume(folder / "labelsTr" / f"{ids[-1]}.nii.gz", phantom.label, phantom.affine)
    dataset = {
        "name": "phantoms",
        "description": f"made by fedqc from seed {seed}",
        "modality": {str(index): name for index, name in enumerate(kind.modalities)},
        "labels": {"0": "background"} | {str(value): name for name, value in kind.label_values.items()},
        "numTraining": len(ids),
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"} for name in ids
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(dataset, indent=1) + "\n", encoding="utf-8")
    progress("making phantoms", total, total)


def site_of(case_id: str) -> str:
    """The site whose scanner a phantom comes from, by the id that `write_phantoms` gave it."""
    return case_id.rpartition("_")[0]


def _positions(rng: np.random.Generator, grid: Grid) -> tuple[Volume, Volume, Volume]:
    """Where the voxels are in mm, seen from a head that is turned and moved a little; each `[X, Y, Z]`."""
    x, y, z = np.meshgrid(
        *(
            grid.spacing * (np.arange(side, dtype=np.float32) - (side - 1) / 2) - rng.normal(0, 2)
            for side in grid.shape
        ),
        indexing="ij",
    )
    for_z, for_x = rng.normal(0, math.radians(4), 2)
    x, y = x * math.cos(for_z) - y * math.sin(for_z), x * math.sin(for_z) + y * math.cos(for_z)
    y, z = y * math.cos(for_x) - z * math.sin(for_x), y * math.sin(for_x) + z * math.cos(for_x)
    return x, y, z


def _paint(shares: Volume, kind: Kind, name: str, level: Volume) -> None:
    """Let a tissue take the place of what is there, as far as its level fills each voxel."""
    filled = np.clip(level / kind.grid.spacing + 0.5, 0, 1)
    shares *= 1 - filled
    shares[kind.tissues.index(name)] += filled


def _ventricles(rng: np.random.Generator, grid: Grid, x: Volume, y: Volume, z: Volume) -> Volume:
    """Level of the two lateral ventricles: long, bent down at both ends, further apart behind."""
    size = math.exp(rng.normal(0, 0.2))
    half_axes = size * rng.normal((6.5, 30, 9), (0.5, 2.5, 0.8))
    bend, spread = 0.006 * y**2, 11 + 0.12 * np.clip(-y, 0, None)
    sides = [ellipsoid((x + side * spread, y + 4, z - 8 + bend), half_axes) for side in (-1, 1)]
    level: Volume = np.maximum(sides[0], sides[1])
    return level + 0.8 * smooth_field(rng, grid, 10)


def _deep_grey(rng: np.random.Generator, grid: Grid, x: Volume, y: Volume, z: Volume) -> Volume:
    """Level of the grey nuclei on both sides below the ventricles."""
    half_axes = rng.normal((9, 20, 10), (0.8, 1.5, 0.8))
    sides = [ellipsoid((x + side * 19, y - 2, z + 8), half_axes) for side in (-1, 1)]
    level: Volume = np.maximum(sides[0], sides[1])
    return level + smooth_field(rng, grid, 10)
