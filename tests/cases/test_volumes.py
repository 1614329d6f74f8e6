import gzip
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from numpy.typing import NDArray

from fedqc.cases import volumes
from fedqc.cases.volumes import (
    UnreadableVolumeError,
    label_to_classes,
    pieces,
    read_header,
    read_volume,
    sha256_file,
    write_volume,
)
from fedqc.errors import DataError
from fedqc.task import Task

AFFINE = np.array([[0, -2.0, 0.1, 5], [1.5, 0, 0, -7], [0.1, 0, 3, 11], [0, 0, 0, 1]])


def save(path: Path, data: NDArray[Any], kind: Any = nibabel.Nifti1Image) -> Path:
    nibabel.save(kind(data, AFFINE), path)
    return path


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int16", ">i4", "float32", ">f8"])
def test_reads_what_nibabel_wrote(tmp_path: Path, name: str, kind: Any, dtype: str) -> None:
    data = np.arange(24).reshape(2, 3, 4).astype(dtype)
    volume = read_volume(save(tmp_path / name, data, kind))
    assert np.array_equal(volume.data, data)
    assert volume.data.dtype.isnative
    assert np.allclose(volume.affine, AFFINE, atol=1e-6)


def test_big_endian_file(tmp_path: Path) -> None:
    data = np.arange(24, dtype=">i2").reshape(2, 3, 4)
    header = nibabel.Nifti1Header(endianness=">")
    header.set_data_dtype(">i2")
    nibabel.save(nibabel.Nifti1Image(data, AFFINE, header), tmp_path / "a.nii")
    assert (tmp_path / "a.nii").read_bytes()[:4] == (348).to_bytes(4, "big")
    assert np.array_equal(read_volume(tmp_path / "a.nii").data, data)


def test_scaling_of_the_header_is_applied(tmp_path: Path) -> None:
    image = nibabel.Nifti1Image(np.array([[[-1.0, 3.0]]]), AFFINE)
    image.header.set_data_dtype(np.int16)
    nibabel.save(image, tmp_path / "a.nii.gz")
    assert np.allclose(read_volume(tmp_path / "a.nii.gz").data, [[[-1, 3]]], atol=1e-4)


def test_trailing_dimensions_of_one_are_dropped(tmp_path: Path) -> None:
    assert read_volume(save(tmp_path / "a.nii", np.ones((2, 3, 1, 1, 1)))).data.shape == (2, 3, 1)


def test_qfac_of_zero_is_repaired_in_silence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = save(tmp_path / "a.nii", np.ones((2, 3, 4), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[76:80] = bytes(4)  # pixdim[0], which old software leaves at 0
    path.write_bytes(content)
    assert read_volume(path).data.shape == (2, 3, 4)
    assert capfd.readouterr() == ("", "")


def patched(data: bytes, position: int, replacement: bytes) -> bytes:
    return data[:position] + replacement + data[position + len(replacement) :]


def int16(*values: int) -> bytes:
    return np.array(values, dtype="<i2").tobytes()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda _: b"", "it holds nothing"),
        (lambda _: b"hello, this is text\n" * 50, "it is no NIfTI file"),
        (lambda data: data[:200], "it ends inside the header, after 200 bytes"),
        (lambda data: data[:-5], "cannot hold them"),
        (lambda data: patched(data, 344, b"ni1\x00"), "it is no NIfTI file"),
        (lambda data: patched(data, 40, int16(2, 12, 2)), "three or more sides"),
        (lambda data: patched(data, 40, int16(3, 0, 3, 4)), "three or more sides"),
        (lambda data: patched(data, 40, int16(3, 30000, 30000, 30000)), "promises 27000000000352 bytes"),
        (lambda data: patched(data, 40, int16(3, 1000, 1000, 1000)), "promises 1000000352 bytes"),
        (lambda data: patched(data, 40, int16(9, 2, 3, 4)), "header is damaged"),
        (lambda data: patched(data, 70, int16(999)), "header is damaged"),
        (lambda data: patched(data, 70, int16(128, 24)), "expected real numbers"),
        (lambda data: patched(data, 108, np.float32(1e9).tobytes()), "promises 1000000024 bytes"),
        (lambda data: patched(data, 108, np.float32(-5e3).tobytes()), "header is damaged"),
        (lambda data: patched(data, 280, bytes(48)), "its affine has no inverse"),
    ],
)
def test_damaged_files(tmp_path: Path, damage: Any, reason: str) -> None:
    path = save(tmp_path / "a.nii", np.ones((2, 3, 4), dtype=np.uint8))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError) as caught:
        read_volume(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert reason in message
    cure = "export the image as a volume" if "more sides" in reason else "export or copy the file again"
    assert message.endswith(f"; {cure}")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("start", "kind", "cure"),
    [
        (bytes(128) + b"DICM", "a DICOM file", "dcm2niix"),
        (b"NRRD0004\n", "an NRRD file", "convert it"),
        (b"<!DOCTYPE html>", "a web page", "download"),
        (b"PK\x03\x04", "a ZIP archive", "unpack"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS", "git lfs pull"),
        (b"/annex/objects/MD5E-s1--x.nii.gz\n", "a pointer of git-annex", "git annex get"),
    ],
)
@pytest.mark.parametrize("compress", [bytes, gzip.compress])
def test_what_is_met_in_place_of_nifti(
    tmp_path: Path, start: bytes, kind: str, cure: str, compress: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(compress(start + bytes(600)))
    with pytest.raises(UnreadableVolumeError) as caught:
        read_header(path)
    assert caught.value.code == "not-nifti"
    assert f"it is {kind}" in caught.value.reason
    assert cure in caught.value.cure


def test_every_cut_through_a_compressed_file_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9, (6, 6, 6), dtype=np.uint8))
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(DataError):
            read_volume(path)
    path.write_bytes(content[:-1])  # all voxels are there, the checksum is not
    with pytest.raises(DataError, match="compressed data end too early"):
        read_volume(path)


def test_flipped_bit_in_a_compressed_file_is_noticed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.random.default_rng(0).integers(0, 9, (6, 6, 6), dtype=np.uint8))
    stored = bytearray(gzip.compress(path.read_bytes(), compresslevel=0))
    stored[-40] ^= 1
    path = tmp_path / "a.nii.gz"
    path.write_bytes(stored)
    with pytest.raises(DataError, match="compressed data are damaged"):
        read_volume(path)


def test_compressed_header_cannot_promise_more_than_deflate_can_hold(tmp_path: Path) -> None:
    path = save(tmp_path / "a.nii", np.ones((2, 3, 4), dtype=np.uint8))
    promising = patched(path.read_bytes(), 40, int16(3, 1024, 1024, 1024))
    path = tmp_path / "a.nii.gz"
    path.write_bytes(gzip.compress(promising))
    with pytest.raises(DataError, match="promises 1073742176 bytes"):
        read_volume(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"a\.nii: there is no such file"):
        read_volume(tmp_path / "a.nii")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float32", "bool"])
def test_what_is_written_is_read_by_nibabel(tmp_path: Path, dtype: str) -> None:
    data = np.arange(24).reshape(2, 3, 4).astype(dtype)
    write_volume(tmp_path / "new" / "a.nii.gz", data, AFFINE)
    image: Any = nibabel.load(tmp_path / "new" / "a.nii.gz")
    assert np.array_equal(np.asanyarray(image.dataobj), data)
    assert np.allclose(image.affine, AFFINE, atol=1e-6)
    assert image.header.get_xyzt_units()[0] == "mm"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.nii.gz"]


def test_same_content_is_written_as_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "b.nii.gz"):
        write_volume(tmp_path / name, np.ones((2, 3, 4), dtype=np.uint8), AFFINE)
    assert sha256_file(tmp_path / "a.nii.gz") == sha256_file(tmp_path / "b.nii.gz")


def test_failed_writing_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.nii.gz"
    path.write_bytes(b"old")

    def full_disk(image: Any, aside: Path) -> None:
        aside.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nibabel, "save", full_disk)
    with pytest.raises(DataError, match="No space left on device"):
        write_volume(path, np.ones((2, 3, 4)), AFFINE)
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.nii.gz"]


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", "bool"])
def test_label_values_become_class_indices(task: Task, dtype: str) -> None:
    values = np.array([[[0, 1]]]) if dtype == "bool" else np.array([[[0, 1, 2, 5]]])
    classes = label_to_classes(values.astype(dtype), task)
    assert classes.dtype == np.uint8
    assert classes.tolist() == ([[[0, 1]]] if dtype == "bool" else [[[0, 1, 2, 2]]])


@pytest.mark.parametrize("value", [3, -1, 0.5, np.nan, 1e30])
def test_label_values_outside_the_task(task: Task, value: float) -> None:
    with pytest.raises(DataError, match=r"expected one of \[0, 1, 2, 5\]"):
        label_to_classes(np.array([[[0.0, 1.0, value]]]), task)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "i8", "f4"])
def test_pieces_keep_the_order_of_memory(
    task: Task, monkeypatch: pytest.MonkeyPatch, order: Any, dtype: str
) -> None:
    monkeypatch.setattr(volumes, "_PIECE", 7)
    values = np.random.default_rng(0).choice([0, 1, 2, 5], (3, 4, 5)).astype(dtype, order=order)
    assert np.array_equal(np.concatenate([*pieces(values)]), values.ravel(order="K"))
    assert all(np.shares_memory(piece, values) for piece in pieces(values))
    classes = label_to_classes(values, task)
    assert np.array_equal(classes, np.where(values == 5, 2, values))
    values[2, 3, 4] = -1 if dtype != "u1" else 200
    with pytest.raises(DataError, match=f"found label value {values[2, 3, 4]}"):
        label_to_classes(values, task)


def test_hash_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_file(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(DataError, match="cannot be read"):
        sha256_file(tmp_path / "b")
