"""Volumes on disk and in memory: the one NIfTI reader and writer of fedqc."""

import contextlib
import gzip
import hashlib
import io
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import nibabel
import numpy as np
from isal import igzip, igzip_lib
from nibabel.volumeutils import apply_read_scaling
from numpy.typing import NDArray

from fedqc.errors import DataError
from fedqc.files import replacing
from fedqc.task import Task

MAX_VOXELS = 2**27
"""Of one file, and of all images of a case (512 x 512 x 512): processing takes some 12 bytes a voxel."""
_MAX_BYTES = 4 * MAX_VOXELS + 2**20  # of float32 with a header
_CHUNK = 2**22  # bytes inflated at once
_PIECE = 2**22  # voxels that are looked at at once, where a volume would need too much memory as a whole
_MAX_INFLATION = 1032  # deflate cannot shrink data further than 1032 to 1 (zlib's documentation)
_NIFTI_HEADERS: dict[int, Any] = {
    348: nibabel.Nifti1Header,
    540: nibabel.Nifti2Header,
}  # by header size in bytes
_OTHER_UNITS = {1: "metre", 3: "micron"}  # NIFTI_UNITS_METER and NIFTI_UNITS_MICRON of nifti1.h
UnreadableCode = Literal[
    "no-permission", "empty-file", "truncated", "not-nifti", "unreadable", "too-large", "wrong-dimensions"
]

_COPY_AGAIN = "export or copy the file again"
_CURES: dict[UnreadableCode, str] = {
    "no-permission": "give this user the right to read the file",
    "wrong-dimensions": "export the image as a volume",
    "too-large": "crop the volume to what matters, or leave the case out",
}
_DICOM = ("a DICOM file", "convert it to NIfTI, for instance with dcm2niix")
_STRANGERS = {
    b"NRRD": ("an NRRD file", "convert it to NIfTI"),
    b"<": ("a web page or other markup, as a failed download leaves it", "download the file again"),
    b"PK": ("a ZIP archive", "unpack it"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch it with git lfs pull"),
    b"/annex/objects": ("a pointer of git-annex, not the file itself", "fetch it with git annex get"),
}  # what is met under the name of a NIfTI file, by its first bytes: what it is, and what to do
_DAMAGED = (gzip.BadGzipFile, cast(type[Exception], igzip_lib.IsalError))  # while a file is inflated
_UNKNOWN = 255  # no class index: a task has at most 254 classes

# nibabel prints what it repairs in a header to stderr; what matters of it is reported as a Problem.
_SILENT = logging.Logger("fedqc.silent", level=logging.CRITICAL + 1)


@dataclass(frozen=True, eq=False)
class Volume:
    """A volume as stored: `data` of any real dtype, `affine` [4, 4] from voxel indices to mm (RAS+)."""

    data: NDArray[Any]
    affine: NDArray[np.float64]


@dataclass(frozen=True)
class MeanSD:
    """Mean and standard deviation of the voxels of a modality that are not zero: what z-scoring takes out."""

    mean: float
    sd: float


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
    intensities: tuple[MeanSD, ...] = ()
    """Of each modality: a voxel that is not 0 showed `value * sd + mean`. Empty where `image` was never
    z-scored."""

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm."""
        x, y, z = voxel_size(self.affine)
        return float(x), float(y), float(z)


@dataclass(frozen=True, eq=False)
class Header:
    """What a file says of its voxels before any of them is read."""

    shape: tuple[int, ...]
    """Sides in voxels, trailing sides of length 1 dropped (but never the first three)."""
    affine: NDArray[np.float64]
    """[4, 4], from voxel indices to mm (RAS+): the sform where there is one, else the qform."""
    pixdim: tuple[float, float, float]
    """Voxel size in mm as written, which may be anything."""
    qform: NDArray[np.float64] | None
    sform: NDArray[np.float64] | None
    unit: str | None
    """Of lengths, where the header says another one than mm; fedqc takes them as mm all the same."""


class UnreadableVolumeError(DataError):
    """A file that is no whole NIfTI volume: the code of its problem, the reason, and what to do."""

    def __init__(self, path: Path, code: UnreadableCode, reason: str, cure: str | None = None) -> None:
        self.code: UnreadableCode = code
        self.reason = reason
        self.cure = cure or _CURES.get(code, _COPY_AGAIN)
        super().__init__(f"{path}: {reason}; {self.cure}")


def voxel_size(affine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Voxel size [3] in mm of a grid with `affine` [4, 4]."""
    size: NDArray[np.float64] = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    return size


def pieces(volume: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """All voxels piece by piece, [N] each, in the order of memory: without a copy where that has no gaps."""
    voxels = volume.ravel(order="K")
    for start in range(0, voxels.size, _PIECE):
        yield voxels[start : start + _PIECE]


def bounding_box(volume: NDArray[Any]) -> tuple[slice, slice, slice] | None:
    """Smallest box of [X, Y, Z] that holds all voxels that are not zero; None where there is none."""
    sides = []
    for axis in range(3):
        hit = np.flatnonzero(volume.any(axis=tuple(other for other in range(3) if other != axis)))
        if not hit.size:
            return None
        sides.append(slice(int(hit[0]), int(hit[-1]) + 1))
    x, y, z = sides
    return x, y, z


def is_singular(affine: NDArray[np.float64]) -> bool:
    """Whether `affine` [4, 4] gives voxels no place in the scanner."""
    if not np.isfinite(affine).all():
        return True
    with np.errstate(all="ignore"):  # sides of 10^300 mm
        volume = abs(float(np.linalg.det(affine[:3, :3])))
    return not np.isfinite(volume) or volume < 1e-12


def read_header(path: Path) -> Header:
    """Read what a NIfTI-1 or -2 file (.nii or .nii.gz) says of its voxels, and nothing else.

    Raises:
        DataError: the file is missing (plain `DataError`), or no volume (`UnreadableVolumeError`).
    """
    with _reading(path) as stream:
        return _header(path, stream)[0]


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
    with _reading(path) as stream:
        header, raw = _header(path, stream)
        if is_singular(header.affine):
            raise UnreadableVolumeError(
                path, "unreadable", "its affine has no inverse, so its voxels have no place in the scanner"
            )
        return Volume(data=_voxels(path, stream, raw).reshape(header.shape, order="F"), affine=header.affine)


def write_volume(path: Path, data: NDArray[Any], affine: NDArray[np.float64]) -> None:
    """Write `data` (bool is stored as uint8) as NIfTI; the file appears whole or not at all.

    Raises:
        DataError: the file cannot be written.
    """
    stored = data.astype(np.uint8) if data.dtype == np.bool_ else data
    image = nibabel.Nifti1Image(stored, affine, dtype=stored.dtype)  # 64-bit whole numbers too
    image.header.set_xyzt_units("mm")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as aside:
            nibabel.save(image, aside)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be written ({error.strerror or error}); free space or allow it"
        ) from None


def label_to_classes(values: NDArray[Any], task: Task) -> NDArray[np.uint8]:
    """Label values of a file [X, Y, Z], of any real dtype, as class indices of the task.

    Raises:
        DataError: a value is neither 0 nor a value of one of the task's classes.
    """
    known = np.array([0, *(value for members in task.classes.values() for value in members)])
    table = np.full(known.max() + 2, _UNKNOWN, dtype=np.uint8)  # the last one stands for all that are larger
    table[0] = 0
    for index, members in enumerate(task.classes.values(), start=1):
        table[list(members)] = index
    classes = np.empty_like(values, dtype=np.uint8)
    for piece, its_classes in zip(pieces(values), pieces(classes), strict=True):
        if values.dtype.kind in "iu" and values.dtype.itemsize <= 2:  # most labels; a table is faster
            table.take(piece, mode="clip", out=its_classes)
            is_strange = (its_classes == _UNKNOWN) | (piece < 0)
        else:
            is_strange = ~np.isin(piece, known)
            table.take(np.where(is_strange, 0, piece).astype(np.intp), out=its_classes)
        if is_strange.any():
            raise DataError(
                f"found label value {piece[is_strange][0]}, expected one of {sorted(known.tolist())}; "
                f"correct the label or add the value to a class of task {task.name!r}"
            )
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


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[BinaryIO]:
    """The inflated bytes of a file; whatever goes wrong while they are read is said in our words."""
    try:
        _check_is_there(path)
        # NumPy has nothing to warn of: an overflow becomes inf, which validation reports.
        with path.open("rb") as file, np.errstate(all="ignore"):
            is_zipped = file.read(2) == b"\x1f\x8b"
            file.seek(0)
            if is_zipped:
                # Faster than Python's own, which a long header or a long row of zeros at the end keeps busy.
                with igzip.IGzipFile(fileobj=file) as stream:
                    yield cast(BinaryIO, stream)
            else:
                yield file
            return
    except DataError:
        raise
    except PermissionError:
        code, reason = "no-permission", "this user may not read it"
    except EOFError:
        code, reason = "truncated", "its compressed data end too early"
    except _DAMAGED:
        code, reason = "unreadable", "its compressed data are damaged"
    except OSError as error:
        code, reason = "unreadable", f"the system cannot read it ({error.strerror or error})"
    except MemoryError:
        code, reason = "too-large", "it does not fit into memory"
    except Exception as error:  # nibabel raises anything on damaged headers, and all mean the same
        code, reason = "unreadable", f"its header is damaged ({error})"
    raise UnreadableVolumeError(path, cast(UnreadableCode, code), reason)


def _check_is_there(path: Path) -> None:
    if path.is_dir():
        raise UnreadableVolumeError(path, "not-nifti", "it is a folder")
    if not path.is_file():
        raise DataError(f"{path}: there is no such file; correct the path or restore the file")
    if path.stat().st_size == 0:  # also of what the system makes up while it is read, if it ever ends
        raise UnreadableVolumeError(path, "empty-file", "it holds nothing")


def _header(path: Path, stream: BinaryIO) -> tuple[Header, Any]:
    """The header at the start of the stream, checked against what the file can hold; ours and nibabel's."""
    stored_bytes = path.stat().st_size
    raw, pixdim = _nifti_header(path, stream.read(max(_NIFTI_HEADERS)))
    shape, dtype = raw.get_data_shape(), raw.get_data_dtype()
    if len(shape) < 3 or min(shape) < 1:
        raise UnreadableVolumeError(
            path, "wrong-dimensions", f"its header says shape {shape}, expected three or more sides"
        )
    if dtype.kind not in "biuf":
        raise UnreadableVolumeError(
            path, "unreadable", f"its voxels are of type {dtype}, expected real numbers"
        )
    voxels = math.prod(shape)
    promised = raw.get_data_offset() + voxels * dtype.itemsize
    is_zipped = isinstance(stream, gzip.GzipFile)
    if promised > stored_bytes * (_MAX_INFLATION if is_zipped else 1):
        raise UnreadableVolumeError(
            path,
            "truncated",
            f"its header promises {promised} bytes, the file of {stored_bytes} cannot hold them",
        )
    if voxels > MAX_VOXELS or promised > _MAX_BYTES:
        raise UnreadableVolumeError(
            path,
            "too-large",
            f"it has {'x'.join(map(str, shape))} voxels of {dtype}, expected at most {MAX_VOXELS} voxels "
            f"and {_MAX_BYTES >> 20} MiB",
        )
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    header = Header(
        shape=shape,
        affine=np.asarray(raw.get_best_affine(), dtype=np.float64),
        pixdim=pixdim,
        qform=raw.get_qform() if raw["qform_code"] > 0 else None,
        sform=raw.get_sform() if raw["sform_code"] > 0 else None,
        unit=_OTHER_UNITS.get(int(raw["xyzt_units"]) & 7),
    )
    return header, raw


def _nifti_header(path: Path, start: bytes) -> tuple[Any, tuple[float, float, float]]:
    """The header as nibabel reads it, what it can repair repaired, and the voxel size as it was written."""
    for size in (int.from_bytes(start[:4], "little"), int.from_bytes(start[:4], "big")):
        if size in _NIFTI_HEADERS and len(start) < size:
            raise UnreadableVolumeError(
                path, "truncated", f"it ends inside the header, after {len(start)} bytes"
            )
        if size in _NIFTI_HEADERS:
            header = _NIFTI_HEADERS[size](start[:size], check=False)
            x, y, z = (float(side) for side in header["pixdim"][1:4])
            header.check_fix(logger=_SILENT, error_level=logging.ERROR)
            if header["magic"].item().startswith(b"n+"):  # header and voxels in one file
                return header, (x, y, z)
    is_dicom = start[128:132] == b"DICM"
    known = (stranger for begin, stranger in _STRANGERS.items() if start.startswith(begin))
    kind, cure = _DICOM if is_dicom else next(known, ("no NIfTI file", _COPY_AGAIN))
    raise UnreadableVolumeError(path, "not-nifti", f"it is {kind}", cure)


def _voxels(path: Path, stream: BinaryIO, raw: Any) -> NDArray[Any]:
    """All voxels after the header, in the order of the file, scaled as the header says."""
    dtype, start = raw.get_data_dtype(), raw.get_data_offset()
    stream.seek(start)
    voxels = np.empty(math.prod(raw.get_data_shape()), dtype)
    content = memoryview(voxels.view(np.uint8).data)
    done = 0
    while done < len(content):
        n_read = cast(io.RawIOBase, stream).readinto(content[done : done + _CHUNK])
        if not n_read:
            reason = f"it ends after {start + done} of {start + len(content)} bytes"
            raise UnreadableVolumeError(path, "truncated", reason)
        done += n_read
    # On to the end of the stream, where gzip compares the checksum; but not for ever.
    for _ in range(_MAX_BYTES // _CHUNK):
        if not stream.read(_CHUNK):
            break
    voxels = voxels.astype(dtype.newbyteorder("="), copy=False)
    scaled: NDArray[Any] = apply_read_scaling(voxels, *raw.get_slope_inter())
    return scaled
