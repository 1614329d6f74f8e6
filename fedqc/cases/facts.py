"""What is known of a case once its voxels were read. It stays at the site; statistics are made of it."""

import hashlib
from collections.abc import Sequence
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydantic import FiniteFloat, NonNegativeInt

from fedqc.cases.conventions import Guess
from fedqc.cases.tally import Intensities, LabelValues
from fedqc.cases.volumes import Header, voxel_size
from fedqc.config import FrozenModel
from fedqc.task import Task


class ImageFacts(FrozenModel):
    """One modality of a case; intensities of the voxels that are not zero."""

    sha256: str
    """Of shape and voxels as float32, whatever the file's type and compression."""
    mean: FiniteFloat
    sd: FiniteFloat
    low: FiniteFloat
    """0.5th percentile."""
    median: FiniteFloat
    high: FiniteFloat
    """99.5th percentile."""


class CaseFacts(FrozenModel):
    """One case without errors."""

    shape: tuple[NonNegativeInt, NonNegativeInt, NonNegativeInt]
    spacing: tuple[FiniteFloat, FiniteFloat, FiniteFloat]
    """Voxel size in mm."""
    orientation: str
    """The directions of the axes, such as RAS."""
    images: tuple[ImageFacts, ...]
    """In the order of the task's modalities."""
    label_sha256: str
    """Of shape and class indices."""
    label_values: tuple[NonNegativeInt, ...]
    """Label values in the file, without background."""
    volumes_ml: dict[str, FiniteFloat]
    """By class."""
    convention: str | None
    """The convention that explains the label best; None where none does."""


def describe_image(channel: NDArray[np.float32], intensities: Intensities) -> ImageFacts:
    """Describe one modality, [X, Y, Z]."""
    low, median, high = np.percentile(intensities.sample, (0.5, 50, 99.5))
    return ImageFacts(
        sha256=_digest(channel),
        mean=intensities.mean,
        sd=intensities.sd,
        low=float(low),
        median=float(median),
        high=float(high),
    )


def describe_case(
    images: Sequence[ImageFacts],
    *,
    values: LabelValues,
    classes: NDArray[np.uint8],
    header: Header,
    guess: Guess,
    task: Task,
) -> CaseFacts:
    """Put together what is known of a case.

    Args:
        images: a description of each modality.
        values: which values the label has in its file.
        classes: [X, Y, Z] class indices.
        header: of the first image.
        guess: which convention the label follows.
        task: what the data show.
    """
    x, y, z = header.shape[:3]
    spacing = voxel_size(header.affine)
    voxels = {
        name: sum(values.known.get(value, 0) for value in members) for name, members in task.classes.items()
    }
    millilitres = abs(float(np.linalg.det(header.affine[:3, :3]))) / 1000
    return CaseFacts(
        shape=(x, y, z),
        spacing=(float(spacing[0]), float(spacing[1]), float(spacing[2])),
        orientation="".join(map(str, nibabel.aff2axcodes(header.affine))),
        images=tuple(images),
        label_sha256=_digest(classes),
        label_values=tuple(value for value in values.known if value),
        volumes_ml={name: n * millilitres for name, n in voxels.items()},
        convention=guess.convention,
    )


def _digest(volume: NDArray[Any]) -> str:
    """SHA-256 of a volume's shape and voxels (in the order that needs no copy, which is the files')."""
    content = hashlib.sha256(str(volume.shape).encode())
    content.update(volume.ravel(order="F").data)
    return content.hexdigest()
