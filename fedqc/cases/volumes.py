"""Volumes on disk and in memory: the one NIfTI reader and writer of fedqc."""

import gzip
import hashlib
import logging
import math
import os
import uuid
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import nibabel
import numpy as np
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from fedqc.errors import DataError
from fedqc.task import Task

MAX_VOXELS = 2**31
_MAX_INFLATION = 1032  # deflate cannot shrink data further than 1032 to 1 (zlib's documentation)
_NIFTI_HEADERS: dict[int, Any] = {
    348: nibabel.Nifti1Header,
    540: nibabel.Nifti2Header,
}  # by header size in bytes
_UNKNOWN = 255  # no class index: a task has at most 254 classes

# nibabel prints what it repairs in a header to stderr; what matters of it is reported as a Problem.
_SILENT = logging.Logger("fedqc.silent", level=logging.CRITICAL + 1)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as stored: `data` of any real dtype, `affine` [4, 4] from voxel indices to mm (RAS+)."""

    data: NDArray[Any]
    affine: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """One case on the network's grid. Arrays that come from the cache are memory-mapped and read-only."""

    id: str
    patient: str
    image: NDArray[np.float32]
    """[C, X, Y, Z], modalities in the task's order, z-scored, 0 outside the head."""
    label: NDArray[np.uint8]
    """[X, Y, Z], class indices."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices of this grid to mm (RAS+)."""
    native_shape: tuple[int, int, int]
    """Shape of the files' own grid."""
    native_affine: NDArray[np.float64]
    """[4, 4], from voxel indices of the files' own grid to mm (RAS+)."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm."""
        x, y, z = voxel_size(self.affine)
        return float(x), float(y), float(z)


class UnreadableVolumeError(DataError):
    """A file that is no whole NIfTI volume; `reason` says why."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{path}: {reason}; export or copy the file again")


def voxel_size(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size [3] in mm of a grid with `affine` [4, 4]."""
    size: NDArray[np.float64] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return size


def read_volume(path: Path) -> Volume:
    """Read a NIfTI-1 or -2 file (.nii or .nii.gz) of three or more dimensions, scaled as its header says.

    The whole file is checked, the checksum of the compression included, and what the header promises is
    compared with what the file can hold before any memory is taken. Trailing dimensions of length 1 are
    dropped.

    Returns:
        `data` as stored (float64 where the header scales), `affine` in mm.

    Raises:
        DataError: the file is missing (plain `DataError`) or damaged (`UnreadableVolumeError`).
    """
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; correct the path or restore the file")
    try:
        # NumPy has nothing to warn of: an overflow becomes inf, which validation reports.
        with path.open("rb") as file, np.errstate(all="ignore"):
            return _parse(path, file)
    except UnreadableVolumeError:
        raise
    except EOFError:
        reason = "its compressed data end too early"
    except (gzip.BadGzipFile, zlib.error):
        reason = "its compressed data are damaged"
    except OSError as error:
        reason = f"the system cannot read it ({error.strerror or error})"
    except MemoryError:
        reason = "it does not fit into memory"
    except Exception as error:  # nibabel raises anything on damaged headers, and all mean the same
        reason = f"its NIfTI header is damaged ({error})"
    raise UnreadableVolumeError(path, reason)


def write_volume(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write `data` (bool is stored as uint8) as NIfTI; the file appears whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    stored = data.astype(np.uint8) if data.dtype == np.bool_ else data
    image = nibabel.Nifti1Image(stored, affine)
    image.header.set_xyzt_units("mm")
    aside = path.with_name(f".{uuid.uuid4().hex}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, aside)
        aside.replace(path)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space or allow it"
        ) from None
    finally:
        aside.unlink(missing_ok=True)


def label_to_classes(values: NDArray[Any], task: Task) -> NDArray[np.uint8]:
    """Label values of a file [X, Y, Z], of any real dtype, as class indices of the task.

    Raises:
        DataError: a value is neither 0 nor a value of one of the task's classes.
    """
    known = np.array([0, *(value for members in task.classes.values() for value in members)])
    strange = values[~np.isin(values, known)]
    if strange.size:
        raise DataError(
            f"found label value {strange[0]}, expected one of {sorted(known.tolist())}; "
            f"correct the label or add the value to a class of task {task.name!r}"
        )
    table = np.full(known.max() + 1, _UNKNOWN, dtype=np.uint8)
    table[0] = 0
    for index, members in enumerate(task.classes.values(), start=1):
        table[list(members)] = index
    classes: NDArray[np.uint8] = table[values.astype(np.intp)]
    return classes


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}); restore the file") from None


def _parse(path: Path, file: BinaryIO) -> Volume:
    stored_bytes = os.fstat(file.fileno()).st_size
    is_zipped = file.read(2) == b"\x1f\x8b"
    file.seek(0)
    stream: Any = gzip.GzipFile(fileobj=file) if is_zipped else file
    header = _read_header(path, stream.read(max(_NIFTI_HEADERS)))
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    start, voxels = header.get_data_offset(), math.prod(shape)
    if len(shape) < 3 or min(shape) < 1 or voxels > MAX_VOXELS:
        raise UnreadableVolumeError(
            path,
            f"its header says shape {shape}, expected three or more sides and at most {MAX_VOXELS} voxels",
        )
    if dtype.kind not in "biuf":
        raise UnreadableVolumeError(path, f"its voxels are of type {dtype}, expected real numbers")
    promised = start + voxels * dtype.itemsize
    if promised > stored_bytes * (_MAX_INFLATION if is_zipped else 1):
        raise UnreadableVolumeError(
            path, f"its header promises {promised} bytes, the file of {stored_bytes} cannot hold them"
        )
    stream.seek(start)
    content = stream.read(voxels * dtype.itemsize)
    if len(content) < voxels * dtype.itemsize:
        raise UnreadableVolumeError(path, f"it ends after {start + len(content)} of {promised} bytes")
    stream.read(1)  # drives gzip over the end of its stream, where it compares the checksum

    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    data = np.frombuffer(content, dtype).reshape(shape, order="F")
    data = data.astype(dtype.newbyteorder("="), copy=False)
    data = apply_read_scaling(data, *header.get_slope_inter())
    return Volume(data=data, affine=_affine(path, header))


def _read_header(path: Path, start: bytes) -> Any:
    for size in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")):
        if size in _NIFTI_HEADERS and len(start) >= size:
            header = _NIFTI_HEADERS[size](start[:size], check=False)
            header.check_fix(logger=_SILENT, error_level=logging.ERROR)
            if header["magic"].item().startswith(b"n+"):  # header and voxels in one file
                return header
    raise UnreadableVolumeError(path, "it is no NIfTI file")


def _affine(path: Path, header: Any) -> NDArray[np.float64]:
    affine: NDArray[np.float64] = np.asarray(header.get_best_affine(), dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-12:
        raise UnreadableVolumeError(
            path, "its affine has no inverse, so its voxels have no place in the scanner"
        )
    return affine
