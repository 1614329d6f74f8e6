"""Phantoms: made-up brains with a tumour in four MRI modalities, no two alike, each from a seed.

    anatomy: a brain with folded cortex, ventricles and a nested lesion -> share of each tissue in every voxel
    scanner: how bright each tissue is, bias field, blur, noise         -> four images, zero outside the brain

Anatomy follows from levels: distances in mm to a surface, positive inside, with smooth random fields added.
Tissues have soft edges (a voxel that a surface cuts holds a share of both sides), labels hard ones. Nothing
here is a model of disease; the phantoms only have what makes a segmentation easy or hard.
"""

import json
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from fedqc.cases.volumes import write_volume
from fedqc.seeding import generator
from fedqc_simulations.consortium import Progress

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
TISSUES = ("white matter", "grey matter", "fluid", "edema", "core", "rim")
LABEL_VALUES = {"core": 1, "edema": 2, "rim": 3}
"""As in BraTS 2023 and in the task `phantom`."""
SHAPE = (40, 48, 40)
SPACING = 4.0
"""Voxel size in mm along each axis."""

_CONTRAST = (  # brightness in each modality; white matter in T1 is 1
    (1.00, 1.00, 0.45, 0.55),  # white matter
    (0.74, 0.76, 0.62, 0.72),  # grey matter
    (0.28, 0.30, 1.15, 0.18),  # fluid
    (0.60, 0.60, 0.88, 1.05),  # edema
    (0.42, 0.44, 1.00, 0.62),  # core
    (0.58, 1.40, 0.76, 0.86),  # rim
)
_CONTRAST_SPREAD = 0.06
"""Largest relative change of one tissue's brightness at a site; a modality's order stays the same."""
_FEWEST_VOXELS = 24
"""Of core and of edema: less would be gone on a coarser grid."""

Volume = NDArray[np.float32]


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

    shares: Volume
    """`[6, X, Y, Z]`, how much of each voxel each of `TISSUES` fills; they add up to 1 inside the brain."""
    brain: NDArray[np.bool_]
    """`[X, Y, Z]`."""
    label: NDArray[np.uint8]
    """`[X, Y, Z]`, values as in `LABEL_VALUES`."""


@dataclass(frozen=True, eq=False)
class Phantom:
    """A scanned brain and its true label."""

    image: Volume
    """`[4, X, Y, Z]`, `MODALITIES` in order, positive inside the brain and 0 outside."""
    label: NDArray[np.uint8]
    """`[X, Y, Z]`, values as in `LABEL_VALUES`."""
    affine: NDArray[np.float64]
    """`[4, 4]`, from voxel indices to mm (RAS+); the origin is in the middle of the volume."""


def draw_scanner(rng: np.random.Generator) -> Scanner:
    """A site's scanner: every tissue a little brighter or darker, each modality with a gain of its own."""
    spread = rng.uniform(1 - _CONTRAST_SPREAD, 1 + _CONTRAST_SPREAD, np.shape(_CONTRAST))
    gain = 500 * np.exp(rng.uniform(-0.7, 0.7, len(MODALITIES)))
    contrast = np.array(_CONTRAST) * spread * gain
    return Scanner(
        contrast=tuple(tuple(map(float, row)) for row in contrast),
        bias=float(rng.uniform(0.05, 0.25)),
        blur=float(rng.uniform(1.2, 2.8)),
        noise=float(rng.uniform(0.02, 0.05)),
    )


def make_phantom(rng: np.random.Generator, scanner: Scanner) -> Phantom:
    """Draw a brain and scan it."""
    anatomy = draw_anatomy(rng)
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = [-SPACING * (side - 1) / 2 for side in SHAPE]
    return Phantom(scan(rng, anatomy, scanner), anatomy.label, affine)


def draw_anatomy(rng: np.random.Generator) -> Anatomy:
    """Draw a brain with one lesion, sometimes two."""
    x, y, z = _positions(rng)
    half_axes = rng.normal((65, 80, 59), (2.5, 3.5, 2.5))
    brain = _ellipsoid((x, y, z), half_axes, power=2.5) + 2 * _smooth_field(rng, 22)
    ventricles = _ventricles(rng, x, y, z)
    shares = np.zeros((len(TISSUES), *SHAPE), dtype=np.float32)
    shares[TISSUES.index("white matter")] = 1
    _paint(shares, "grey matter", _deep_grey(rng, x, y, z))
    # The zeros of a rough field are the furrows: fluid at their bottom, cortex along their banks.
    uneven = _smooth_field(rng, 22)
    furrow, reach = 6.5 * np.abs(_smooth_field(rng, 6.5)), 20 + 3 * uneven
    # Between the halves of the brain, down to where the corpus callosum joins them.
    fissure = np.maximum(np.abs(x + 2 * uneven), 18 - np.hypot(0.5 * y, z - 2))
    bank = np.maximum(5.5 - brain, np.minimum(4 - furrow, reach - brain))
    _paint(shares, "grey matter", np.maximum(bank, 5 - fissure))
    bottom = np.maximum(1 - brain, np.minimum(1.6 - furrow, reach - 5 - brain))
    _paint(shares, "fluid", np.maximum(bottom, 1.5 - fissure))
    _paint(shares, "fluid", ventricles)

    # Tumours start in the white matter, and grow around what holds fluid rather than into it.
    tissue = np.minimum(brain - 4, -2 - ventricles)
    rim = rng.uniform(4.5, 7)
    while True:
        levels = _lesion(rng, (x, y, z), tissue, rim)
        label = _nested_label(levels)
        if all((label == value).sum() >= _FEWEST_VOXELS for value in LABEL_VALUES.values()):
            break
    for name, level in levels.items():
        _paint(shares, name, level)
    inside = brain > 0
    return Anatomy(shares * inside, inside, label * inside)


def scan(rng: np.random.Generator, anatomy: Anatomy, scanner: Scanner) -> Volume:
    """Images `[4, X, Y, Z]` of a brain: contrast, texture, bias field, blur, Rician noise, zero outside."""
    texture = 1 + 0.03 * _smooth_field(rng, 6)
    bias = np.exp(scanner.bias * np.clip(_smooth_field(rng, 48) / 2, -1, 1))
    images = []
    for brightness in zip(*scanner.contrast, strict=True):
        signal = np.zeros(SHAPE, dtype=np.float32)
        for share, level in zip(anatomy.shares, brightness, strict=True):
            signal += np.float32(level) * share
        signal = ndimage.gaussian_filter(signal * texture * bias, scanner.blur / SPACING, mode="constant")
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
    folder: Path, sites: int | Sequence[str], cases_per_site: int, seed: int, progress: Progress
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

    Raises:
        DataError: a file cannot be written.
    """
    names = [f"site-{number}" for number in range(1, sites + 1)] if isinstance(sites, int) else sites
    total = len(names) * cases_per_site
    ids: list[str] = []
    for site in names:
        scanner = draw_scanner(generator(seed, "scanner", site))
        for number in range(cases_per_site):
            progress("making phantoms", len(ids), total)
            phantom = make_phantom(generator(seed, "phantom", site, number), scanner)
            ids.append(f"{site}_{number:03d}")
            # Whole numbers, as scanners write them.
            stored = np.moveaxis(np.rint(phantom.image), 0, 3).astype(np.int16)
            write_volume(folder / "imagesTr" / f"{ids[-1]}.nii.gz", stored, phantom.affine)
            write_volume(folder / "labelsTr" / f"{ids[-1]}.nii.gz", phantom.label, phantom.affine)
    dataset = {
        "name": "phantoms",
        "description": f"made by fedqc from seed {seed}",
        "modality": {str(index): name for index, name in enumerate(MODALITIES)},
        "labels": {"0": "background"} | {str(value): name for name, value in LABEL_VALUES.items()},
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


def _positions(rng: np.random.Generator) -> tuple[Volume, Volume, Volume]:
    """Where the voxels are in mm, seen from a head that is turned and moved a little; each `[X, Y, Z]`."""
    x, y, z = np.meshgrid(
        *(
            SPACING * (np.arange(side, dtype=np.float32) - (side - 1) / 2) - rng.normal(0, 2)
            for side in SHAPE
        ),
        indexing="ij",
    )
    for_z, for_x = rng.normal(0, math.radians(4), 2)
    x, y = x * math.cos(for_z) - y * math.sin(for_z), x * math.sin(for_z) + y * math.cos(for_z)
    y, z = y * math.cos(for_x) - z * math.sin(for_x), y * math.sin(for_x) + z * math.cos(for_x)
    return x, y, z


def _smooth_field(rng: np.random.Generator, scale: float) -> Volume:
    """`[X, Y, Z]`, mean 0 and standard deviation 1, smooth over `scale` mm.

    White noise, blurred; drawn no finer than it needs to be and interpolated.
    """
    step = max(1, int(scale / SPACING / 1.5))
    sigma = scale / SPACING / step
    coarse = tuple(math.ceil(side / step) + 1 for side in SHAPE)
    # Noise over the edge, cut off again, keeps the field as rough at the edge as in the middle.
    margin = math.ceil(2 * sigma)
    noise = rng.standard_normal([side + 2 * margin for side in coarse], dtype=np.float32)
    field = ndimage.gaussian_filter(noise, sigma, truncate=3)[(slice(margin, -margin),) * 3]
    if step > 1:
        field = ndimage.zoom(field, step, order=1)
    field = field[tuple(slice(side) for side in SHAPE)]
    scaled: Volume = (field - field.mean()) / field.std()
    return scaled


def _ellipsoid(positions: Sequence[Volume], half_axes: Collection[float], power: float = 2) -> Volume:
    """Roughly the distance in mm to an ellipsoid about the origin, positive inside; boxier above power 2."""
    sides = [np.abs(p / float(half)) ** power for p, half in zip(positions, half_axes, strict=True)]
    radius = (sides[0] + sides[1] + sides[2]) ** (1 / power)
    level: Volume = (1 - radius) * float(min(half_axes))
    return level


def _paint(shares: Volume, name: str, level: Volume) -> None:
    """Let a tissue take the place of what is there, as far as its level fills each voxel."""
    filled = np.clip(level / SPACING + 0.5, 0, 1)
    shares *= 1 - filled
    shares[TISSUES.index(name)] += filled


def _ventricles(rng: np.random.Generator, x: Volume, y: Volume, z: Volume) -> Volume:
    """Level of the two lateral ventricles: long, bent down at both ends, further apart behind."""
    size = math.exp(rng.normal(0, 0.2))
    half_axes = size * rng.normal((6.5, 30, 9), (0.5, 2.5, 0.8))
    bend, spread = 0.006 * y**2, 11 + 0.12 * np.clip(-y, 0, None)
    sides = [_ellipsoid((x + side * spread, y + 4, z - 8 + bend), half_axes) for side in (-1, 1)]
    level: Volume = np.maximum(sides[0], sides[1])
    return level + 0.8 * _smooth_field(rng, 10)


def _deep_grey(rng: np.random.Generator, x: Volume, y: Volume, z: Volume) -> Volume:
    """Level of the grey nuclei on both sides below the ventricles."""
    half_axes = rng.normal((9, 20, 10), (0.8, 1.5, 0.8))
    sides = [_ellipsoid((x + side * 19, y - 2, z + 8), half_axes) for side in (-1, 1)]
    level: Volume = np.maximum(sides[0], sides[1])
    return level + _smooth_field(rng, 10)


def _lesion(
    rng: np.random.Generator, positions: Sequence[Volume], tissue: Volume, rim: float
) -> dict[str, Volume]:
    """Levels of edema (with all inside it), rim (with the core) and core, in this order.

    Args:
        rng: Draws place, size and shape.
        positions: In mm, each `[X, Y, Z]`.
        tissue: Level of where the lesion may grow.
        rim: Thickness of the rim in mm.
    """
    edema, tumour = np.full((2, *SHAPE), -np.inf, dtype=np.float32)
    candidates = np.argwhere(tissue > 10)
    largest = math.exp(rng.uniform(math.log(16), math.log(36)))
    for share in (1.0, rng.uniform(0.4, 0.8))[: 2 if rng.random() < 0.2 else 1]:
        size = share * largest
        centre = tuple(candidates[int(rng.integers(len(candidates)))])
        away = [p - p[centre] for p in positions]
        outer = _ellipsoid(away, size * np.exp(rng.normal(0, 0.15, 3)))
        edema = np.maximum(edema, outer + 0.18 * size * _smooth_field(rng, 0.6 * size))
        # The tumour does not sit in the middle of its edema.
        away = [p + rng.normal(0, 0.1) * size for p in away]
        inner = _ellipsoid(away, rng.uniform(0.6, 0.9) * size * np.exp(rng.normal(0, 0.12, 3)))
        tumour = np.maximum(tumour, inner + 0.1 * size * _smooth_field(rng, 0.5 * size))
    edema = np.minimum(edema, tissue)
    tumour = np.minimum(tumour, edema - SPACING)
    return {"edema": edema, "rim": tumour, "core": tumour - rim * (1 + 0.2 * _smooth_field(rng, 10))}


def _nested_label(levels: dict[str, Volume]) -> NDArray[np.uint8]:
    """The label of a lesion: each part keeps a voxel of the part around it on all six sides."""
    label = np.zeros(SHAPE, dtype=np.uint8)
    room = np.ones(SHAPE, dtype=bool)
    for name, level in levels.items():
        part = room & (level > 0)
        label[part] = LABEL_VALUES[name]
        room = ndimage.binary_erosion(part)
    return label
