"""Files that promise, or inflate to, more than any memory holds, and files that keep a reader busy.

    python -m tests.fuzz.promises

checks a folder of each kind in turn and prints, as JSON, seconds of computing, peak memory and the codes of
what was found.
"""

import json
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from isal import isal_zlib

from tests.fuzz.material import SINGLE, image, label, nifti, zipped
from tests.fuzz.properties import holds_of, peak_memory, reset_peak

GIGABYTE = 2**30
_BLOCK = 2**24
_FLAG_EXTRA, _FLAG_NAME, _FLAG_COMMENT = 4, 8, 16


def zeros_zipped(start: bytes, n_zeros: int) -> bytes:
    """A gzip file of `start` and then zeros, made in no time: the same compressed block over and over."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = [packer.compress(start) + packer.flush(zlib.Z_FULL_FLUSH)]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = bytes(_BLOCK)
    block = packer.compress(zeros) + packer.flush(zlib.Z_FULL_FLUSH)
    n_blocks = n_zeros // _BLOCK
    checksum = isal_zlib.crc32(start)
    for _ in range(n_blocks):
        checksum = isal_zlib.crc32(zeros, checksum)
    length = (len(start) + n_blocks * _BLOCK) % 2**32
    end = b"\x03\x00" + struct.pack("<II", checksum, length)  # an empty last block
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + b"".join([*packed, *[block] * n_blocks, end])


def header(shape: tuple[int, ...], dtype: str = "u1", version: int = 1, offset: int | None = None) -> bytes:
    """The header of a volume that is not there."""
    made = nibabel.Nifti1Header() if version == 1 else nibabel.Nifti2Header()
    made.set_data_dtype(dtype)
    made["dim"][: len(shape) + 1] = (len(shape), *shape)
    made["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\032\n"
    made["vox_offset"] = made.sizeof_hdr + 4 if offset is None else offset
    made.set_sform(np.eye(4), code=1)
    return bytes(made.binaryblock) + bytes(4)


def with_field(flag: int, content: bytes) -> bytes:
    """A right gzip file with an optional field in the header of its first member."""
    right = zipped(nifti(image(1)))
    return right[:3] + bytes([flag]) + right[4:10] + content + right[10:]


def _members(*parts: bytes) -> bytes:
    return b"".join(map(zipped, parts))


_RIGHT = nifti(image(1))
Codes = frozenset[str] | None
NONE: Codes = frozenset()
REFUSED: Codes = None
"""The folder as a whole, in one sentence."""


def _codes(*codes: str) -> Codes:
    return frozenset(codes)


IMAGES: Mapping[str, tuple[Codes, Callable[[], bytes]]] = {
    "10^6 x 10^6 voxels": (
        _codes("truncated"),
        lambda: header((10**6, 10**6, 1), version=2) + bytes(1000),
    ),
    "10^6 x 10^6 voxels, compressed": (
        _codes("truncated"),
        lambda: zipped(header((10**6, 10**6, 1), version=2) + bytes(1000)),
    ),
    "the most voxels of NIfTI-1": (_codes("truncated"), lambda: header((2**15 - 1,) * 7, "f8")),
    "more voxels than 64 bits count": (
        _codes("truncated"),
        lambda: header((2**62,) * 7, "f8", version=2),
    ),
    "a gigabyte of zeros, as promised": (
        _codes("too-large"),
        lambda: zeros_zipped(header((1024,) * 3), GIGABYTE),
    ),
    "as many zeros as are allowed": (
        _codes("shape-mismatch", "constant-image"),
        lambda: zeros_zipped(header((512,) * 3, "f4"), 2**29),
    ),
    "a gigabyte of zeros before the voxels": (
        _codes("too-large"),
        lambda: zeros_zipped(header((5, 6, 7), offset=2**30), GIGABYTE),
    ),
    "half a gigabyte of zeros before the voxels": (
        _codes("constant-image"),
        lambda: zeros_zipped(header((5, 6, 7), offset=2**29), GIGABYTE),
    ),
    "a gigabyte of zeros behind the voxels": (NONE, lambda: zeros_zipped(_RIGHT, GIGABYTE)),
    "a gigabyte of zeros in a second member": (
        NONE,
        lambda: zipped(_RIGHT) + zeros_zipped(b"", GIGABYTE),
    ),
    "two members": (NONE, lambda: _members(_RIGHT[:400], _RIGHT[400:])),
    "a member for each byte": (NONE, lambda: _members(*(bytes([byte]) for byte in _RIGHT))),
    "300,000 empty members": (NONE, lambda: zipped(_RIGHT) + zipped(b"") * 300_000),
    "64 MiB of zeros behind the last member": (NONE, lambda: zipped(_RIGHT) + bytes(2**26)),
    "an extra field of 64 KiB": (
        NONE,
        lambda: with_field(_FLAG_EXTRA, struct.pack("<H", 65535) + bytes(65535)),
    ),
    "a name of 64 MiB": (
        _codes("unreadable"),
        lambda: with_field(_FLAG_NAME, b"x" * 2**26 + b"\0"),
    ),
    "a name without an end": (_codes("unreadable"), lambda: with_field(_FLAG_NAME, b"x" * 2**26)),
    "a comment of 64 MiB": (
        _codes("unreadable"),
        lambda: with_field(_FLAG_COMMENT, b"x" * 2**26 + b"\0"),
    ),
}
"""Images of a case that is right otherwise, and the codes of what is to be found."""
LISTS: Mapping[str, tuple[str, Callable[[], bytes]]] = {
    "a table that is too long": ("cases.csv", lambda: bytes(2**24)),
    "a table of as many rows as fit": ("cases.csv", lambda: b"id,T1,label\n" + b",,a\n" * (2**21 - 100)),
    "a list that is too long": ("dataset.json", lambda: bytes(2**24)),
    "a list of very many lists": ("dataset.json", lambda: b'{"training":[' + b"[]," * 2**18 + b"[]]}"),
}
"""Files that list the cases of a folder, each to be refused."""


def measured() -> dict[str, dict[str, Any]]:
    """Seconds, peak memory in bytes and codes (None: nothing could be checked) of each."""
    figures: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="fedqc-promises-") as place:
        for number, name in enumerate([*IMAGES, *LISTS]):
            data = Path(place) / str(number) / "data"
            data.mkdir(parents=True)
            if name in IMAGES:
                (data / "cases.csv").write_bytes(b"id,T1,label\na,image,label\n")
                (data / "image").write_bytes(IMAGES[name][1]())
                (data / "label").write_bytes(nifti(label()))
            else:
                file, content = LISTS[name]
                (data / file).write_bytes(content())
            reset_peak()
            begin = time.process_time()
            found = holds_of(data, SINGLE, None, data.parent / "memory", once=True)
            codes = None if found is None else sorted({problem.code for problem in found.problems})
            figures[name] = {
                "seconds": time.process_time() - begin,
                "memory": peak_memory(),
                "codes": codes,
            }
    return figures


if __name__ == "__main__":
    print(json.dumps(measured()))  # noqa: T201 - read by the test
