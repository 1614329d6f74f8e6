"""A trained QC model for programs: judges a label that lies in files or in arrays.

Methods that need no prepared case look at files and arrays directly. For all others arrays are written to
files of their own for as long as it takes, so that they are checked and prepared by the very code that reads
a site's files, and come to the same numbers.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import ArrayLike, NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.preprocessing import label_to_native, preprocess, to_native
from fedqc.cases.sources import Source
from fedqc.cases.volumes import Volume, is_singular, read_header
from fedqc.compute import Compute, choose_compute
from fedqc.config import ComputeConfig, parse
from fedqc.errors import DataError
from fedqc.methods.base import Score
from fedqc.model import ModelCard, StoredModel, load_model
from fedqc.task import Task

VolumeLike = str | os.PathLike[str] | NDArray[Any]
"""The path of a NIfTI file, or an array."""
_PATH = (str, os.PathLike)


class QCModel:
    """A trained QC model.

    Args:
        stored: As it was read from disk.
        compute: Device and precision.
    """

    def __init__(self, stored: StoredModel, compute: Compute) -> None:
        self._stored = stored
        self._compute = compute

    @property
    def card(self) -> ModelCard:
        """What the model is and where it comes from; its task too."""
        return self._stored.card

    def score(
        self,
        image: VolumeLike | Mapping[str, VolumeLike],
        label: VolumeLike,
        *,
        patient: str = "",
        affine: ArrayLike | None = None,
        spacing: Sequence[float] | None = None,
    ) -> Score:
        """Judge a label.

        Args:
            image: One file with the task's modalities (`[X, Y, Z]`, or `[X, Y, Z, C]` where there are
                several), an array `[C, X, Y, Z]` of any real dtype, or by modality a file or an array
                `[X, Y, Z]`.
            label: A file or an array `[X, Y, Z]`, in the label values of the task.
            patient: Whose it is, as in training. Methods that have learned from every case (`expected-dice`,
                `ensemble`) or compare with references (`rca`) then judge without those of this patient. For
                a patient who had no part in training leave it out.
            affine: `[4, 4]`, from voxel indices of the arrays to mm (RAS+).
            spacing: Instead of `affine`, voxel size in mm of arrays whose axes run to the right, the front
                and the top. Arrays without either lie on the grid of the files beside them, and without a
                file they have the task's spacing and these axes.

        Returns:
            What the method says; `case_id` is empty, and error maps and corrected label `[X, Y, Z]` lie on
            the label's own grid.

        Raises:
            DataError: something is wrong with image or label, or the two do not fit the task or each other.
        """
        images, labelled = self._sources(image, label, affine, spacing)
        method, network = self._stored.method, self._stored.network
        direct = method.score_sources(network, images, labelled, self._compute)
        if direct is not None:
            return direct
        with tempfile.TemporaryDirectory(prefix="fedqc-") as folder:
            *paths, label_path = (_in_a_file(one, Path(folder)) for one in (*images, labelled))
            files = CaseFiles(id="", patient=patient, images=tuple(paths), label=label_path)
            try:
                case = preprocess(files, self.card.task)
            except DataError as error:  # the case has no id, and arrays are known by what they are
                sentence = str(error).removeprefix(", ").replace(f"{folder}{os.sep}", "")
                raise DataError(sentence) from None
        (score,) = method.score(network, [case], self._compute)

        def native(probability: NDArray[np.float32]) -> NDArray[np.float32]:
            return to_native(probability, case, order=1)

        return replace(
            score,
            error_map=None if score.error_map is None else native(score.error_map),
            class_error_maps={name: native(one) for name, one in score.class_error_maps.items()},
            corrected=None if score.corrected is None else label_to_native(score.corrected, case),
        )

    def _sources(
        self,
        image: VolumeLike | Mapping[str, VolumeLike],
        label: VolumeLike,
        affine: ArrayLike | None,
        spacing: Sequence[float] | None,
    ) -> tuple[list[Source], Source]:
        """Where image and label come from."""
        task = self.card.task
        if isinstance(image, Mapping):
            _check_modalities(image, task)
            volumes = {f"image {name}": image[name] for name in task.modalities}
        else:
            volumes = {"image": image if isinstance(image, _PATH) else _channels_last(image, task)}
        volumes["label"] = label
        grid = _grid(list(volumes.values()), affine, spacing, task)
        *images, labelled = (
            Source(Path(one))
            if isinstance(one, _PATH)
            else Source(Path(name), Volume(_real(name, one), grid))
            for name, one in volumes.items()
        )
        return images, labelled


def open_model(path: str | os.PathLike[str], *, device: str, precision: str) -> QCModel:
    """Read a model, see `fedqc.load_model`."""
    chosen = parse({"device": device, "precision": precision}, ComputeConfig, source="load_model")
    stored = load_model(Path(path))
    return QCModel(stored, choose_compute(chosen.device, chosen.precision))


def _check_modalities(image: Mapping[str, VolumeLike], task: Task) -> None:
    """Refuse a mapping that does not name the task's modalities.

    Raises:
        DataError: one is missing or unknown.
    """
    wrong = [
        *(f"{name!r} is missing" for name in task.modalities if name not in image),
        *(f"{name!r} is unknown" for name in image if name not in task.modalities),
    ]
    if wrong:
        known = ", ".join(task.modalities)
        raise DataError(f"image: {', '.join(wrong)}; the modalities of task {task.name!r} are {known}")


def _channels_last(image: ArrayLike, task: Task) -> NDArray[Any]:
    """An image [C, X, Y, Z] as files hold it, [X, Y, Z, C].

    Raises:
        DataError: the array has other dimensions.
    """
    array = np.asarray(image)
    names = task.modalities
    if array.ndim != 4 or len(array) != len(names):
        raise DataError(
            f"image: found an array of shape {_sides(array)}, expected {len(names)} x X x Y x Z; give it the "
            f"modalities of task {task.name!r} as first axis: {', '.join(names)}"
        )
    return np.moveaxis(array, 0, -1)


def _grid(
    volumes: Sequence[VolumeLike], affine: ArrayLike | None, spacing: Sequence[float] | None, task: Task
) -> NDArray[np.float64]:
    """Where arrays lie, as an affine [4, 4].

    Raises:
        DataError: what is given contradicts itself, or gives voxels no place.
    """
    paths = [Path(one) for one in volumes if isinstance(one, _PATH)]
    if affine is not None and spacing is not None:
        raise DataError("affine and spacing both say where arrays lie; give one of them")
    if (affine is not None or spacing is not None) and len(paths) == len(volumes):
        raise DataError("affine and spacing are for arrays, and files know where they lie; leave both out")
    source = "affine"
    if affine is not None:
        grid = np.asarray(affine, dtype=np.float64)
    elif spacing is None and paths:
        source, grid = str(paths[0]), read_header(paths[0]).affine
    else:
        sides = np.asarray(task.spacing if spacing is None else spacing, dtype=np.float64)
        if sides.shape != (3,) or not (np.isfinite(sides) & (sides > 0)).all():
            raise DataError(f"spacing: found {spacing}, expected three numbers above 0, in mm")
        grid = np.diag([*sides, 1.0])
    if grid.shape != (4, 4) or is_singular(grid):
        raise DataError(
            f"{source}: found no matrix of 4 x 4 numbers with an inverse, so arrays have no place in the "
            "scanner; give one as affine"
        )
    return grid


def _real(name: str, array: ArrayLike) -> NDArray[Any]:
    """An array [X, Y, Z] or [X, Y, Z, C] in a type of number that a file may have.

    Raises:
        DataError: it is no volume of real numbers.
    """
    values = np.asarray(array)
    kind = values.dtype.kind
    if kind not in "biuf" or values.ndim < 3:
        found = f"an array of {values.dtype} and shape {_sides(values)}"
        raise DataError(f"{name}: found {found}, expected real numbers and shape X x Y x Z")
    if kind == "b":
        return values.astype(np.uint8)
    if kind == "f":
        return values.astype(np.float32 if values.dtype.itemsize <= 4 else np.float64, copy=False)
    return values


def _in_a_file(source: Source, folder: Path) -> Path:
    """The file of a source; an array is written to `folder`, as a NIfTI file without an ending."""
    if source.held is None:
        return source.path
    path, values = folder / source.path, source.held.data
    path.write_bytes(nibabel.Nifti1Image(values, source.held.affine, dtype=values.dtype).to_bytes())
    return path


def _sides(array: NDArray[Any]) -> str:
    return " x ".join(map(str, array.shape))
