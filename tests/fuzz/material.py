"""Folders to try: one that is right in each layout, and all that hypothesis may do to them."""

import gzip
import json
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args

import nibabel
import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from fedqc.task import Anatomy, Task
from tests.fuzz.properties import FOLDER, PIPE, Entry, Link

TASK = Task(
    name="lesions",
    modalities=("T1", "FLAIR"),
    classes={"core": (1,), "rim": (2, 4)},
    regions={"whole": ("core", "rim")},
    spacing=(1.0, 1.0, 1.0),
    size=(8, 8, 8),
    # So that guessing runs too.
    conventions={"ours": {"core": (1,), "rim": (2,)}, "theirs": {"core": (2,), "rim": (1,)}},
    anatomy=Anatomy(outermost="rim", innermost="core", brightest={"T1": "core"}),
)
SINGLE = TASK.model_copy(update={"modalities": ("T1",)})
SHAPE = (5, 6, 7)
Order = Literal["<", ">"]
_ORDERS: tuple[Order, ...] = get_args(Order)
_HEADERS: Mapping[int, Any] = {1: nibabel.Nifti1Header, 2: nibabel.Nifti2Header}


def image(seed: int, shape: tuple[int, ...] = SHAPE) -> NDArray[np.int16]:
    """Intensities that nothing is odd about."""
    return np.random.default_rng(seed).integers(10, 32000, shape).astype(np.int16)


def label(seed: int = 0) -> NDArray[np.uint8]:
    """A label with both classes."""
    classes = np.zeros(SHAPE, dtype=np.uint8)
    classes[1:4, 1:5, 1:6] = 2
    classes[2, 2:4, 2 : 4 + seed % 2] = 1
    return classes


def nifti(data: NDArray[Any], version: int = 1, order: Order = "<") -> bytes:
    """A volume as a file, its header a fresh one."""
    header = _HEADERS[version](endianness=order)
    header.set_data_shape(data.shape)
    header.set_data_dtype(data.dtype.newbyteorder(order))
    header.set_sform(np.eye(4), code=1)
    header.set_qform(np.eye(4), code=1)
    header.set_xyzt_units("mm")
    header["magic"] = b"n+1" if version == 1 else b"n+2\0\r\n\032\n"
    start = header.sizeof_hdr + 4
    header["vox_offset"] = start
    voxels = data.astype(data.dtype.newbyteorder(order)).tobytes(order="F")
    return bytes(header.binaryblock) + bytes(4) + voxels


def zipped(content: bytes) -> bytes:
    """A file's content compressed, the same bytes every time."""
    return gzip.compress(content, 1, mtime=0)


# -------------------------------------------------------------------------------------------------- layouts


def _table(separator: str) -> dict[str, Entry]:
    rows = [["id", "T1", "FLAIR", "label", "patient", "scanner"]]
    files = ("T1.nii", "FLAIR.nii.gz", "seg.nii.gz")
    rows += [[f"c{n}", *(f"c{n}/{file}" for file in files), f"p{n}", "A"] for n in (1, 2)]
    table = "".join(separator.join(row) + "\n" for row in rows).encode()
    tree: dict[str, Entry] = {
        "cases.tsv" if separator == "\t" else "cases.csv": table,
        "reference.csv": b"id\nc1\n",
        "ratings.csv": b"id,rater,view,stars\nc1,ada,axial,5\nc2,ada,all,3.5\n",
    }
    for n in (1, 2):
        tree[f"c{n}/T1.nii"] = nifti(image(n))
        tree[f"c{n}/FLAIR.nii.gz"] = zipped(nifti(image(10 + n)))
        tree[f"c{n}/seg.nii.gz"] = zipped(nifti(label(n)))
    return tree


def _brats() -> dict[str, Entry]:
    tree: dict[str, Entry] = {}
    for n, case in enumerate(("BraTS-GLI-00001-000", "BraTS-GLI-00002-000")):
        tree[f"{case}/{case}-t1n.nii.gz"] = zipped(nifti(image(n)))
        tree[f"{case}/{case}-t2f.nii.gz"] = zipped(nifti(image(10 + n)))
        tree[f"{case}/{case}-seg.nii.gz"] = zipped(nifti(label(n)))
    return tree


def _msd() -> dict[str, Entry]:
    names = ["c_1", "c_2"]
    dataset = {
        "modality": {"0": "T1", "1": "FLAIR"},
        "labels": {"0": "background", "1": "core", "2": "rim"},
        "numTraining": 2,
        "training": [{"image": f"./imagesTr/{n}.nii.gz", "label": f"./labelsTr/{n}.nii.gz"} for n in names],
    }
    tree: dict[str, Entry] = {"dataset.json": json.dumps(dataset).encode()}
    for n, name in enumerate(names):
        tree[f"imagesTr/{name}.nii.gz"] = zipped(nifti(image(n, (*SHAPE, 2))))
        tree[f"labelsTr/{name}.nii.gz"] = zipped(nifti(label(n)))
    return tree


def _nnunet() -> dict[str, Entry]:
    dataset = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "whole": [1, 2], "core": 1},
        "regions_class_order": [2, 1],
        "numTraining": 2,
        "file_ending": ".nii.gz",
    }
    tree: dict[str, Entry] = {"dataset.json": json.dumps(dataset).encode()}
    for n in (1, 2):
        tree[f"imagesTr/c{n}_0000.nii.gz"] = zipped(nifti(image(n)))
        tree[f"imagesTr/c{n}_0001.nii.gz"] = zipped(nifti(image(10 + n)))
        tree[f"labelsTr/c{n}.nii.gz"] = zipped(nifti(label(n)))
    return tree


def _bids() -> dict[str, Entry]:
    tree: dict[str, Entry] = {
        "dataset_description.json": b'{"Name": "made up", "BIDSVersion": "1.9.0"}',
        "participants.tsv": b"participant_id\tsite\nsub-01\tA\nsub-02\tB\n",
    }
    for n, (subject, session) in enumerate((("sub-01", ""), ("sub-02", "ses-a"))):
        name, folder = f"{subject}_{session}".strip("_"), f"{subject}/{session}".strip("/")
        tree[f"{folder}/anat/{name}_T1w.nii.gz"] = zipped(nifti(image(n)))
        tree[f"{folder}/anat/{name}_T1w.json"] = b'{"Manufacturer": "Acme", "ManufacturersModelName": "One"}'
        tree[f"{folder}/anat/{name}_FLAIR.nii.gz"] = zipped(nifti(image(10 + n)))
        tree[f"derivatives/expert/{folder}/anat/{name}_dseg.nii.gz"] = zipped(nifti(label(n)))
    return tree


HEALTHY: Mapping[str, Mapping[str, Entry]] = {
    "csv": _table(","),
    "tsv": _table("\t"),
    "brats": _brats(),
    "msd": _msd(),
    "nnunet": _nnunet(),
    "bids": _bids(),
}
"""A folder of two cases without a problem in each layout."""
LISTS = (
    *("cases.csv", "cases.tsv", "dataset.json", "participants.tsv", "sub-01/anat/sub-01_T1w.json"),
    *("reference.csv", "ratings.csv"),
)
"""Files that are read themselves."""


# -------------------------------------------------------------------------------------------------- headers


def _fields(version: int) -> Mapping[str, np.dtype[Any]]:
    dtype = _HEADERS[version]().structarr.dtype
    return {name: dtype[name] for name in dtype.names}


_NUMBERS = (0, 1, -1, 2, 3, 4, 5, 7, 8, 16, 64, 127, 128, 255, 256, 348, 352, 512, 540, 544, 1024, 1536, 1792)
_EXTREMES = (2**15 - 1, -(2**15), 2**31 - 1, -(2**31), 2**63 - 1, -(2**63), 1e-300, 1e38, 1e300)


@st.composite
def headers(draw: st.DrawFn) -> bytes:
    """A whole file of either version and byte order, plain or compressed, with drawn fields in its header."""
    version, order = draw(st.sampled_from([1, 2])), draw(st.sampled_from(_ORDERS))
    is_label = draw(st.booleans())
    data: NDArray[Any] = label() if is_label else image(1)
    kind = draw(st.sampled_from(["u1", "i2", "i4", "i8", "f4", "f8"]))
    content = bytearray(nifti(data.astype(kind), version, order))
    fields = _HEADERS[version]().structarr.dtype.fields
    for name in draw(st.lists(st.sampled_from(sorted(fields)), min_size=1, max_size=4, unique=True)):
        dtype, offset = fields[name][:2]
        content[offset : offset + dtype.itemsize] = draw(_field(dtype, order))
    return zipped(bytes(content)) if draw(st.booleans()) else bytes(content)


def _field(dtype: np.dtype[Any], order: Order) -> st.SearchStrategy[bytes]:
    """Bytes for a field: any at all, or numbers that mean something."""
    anything = st.binary(min_size=dtype.itemsize, max_size=dtype.itemsize)
    base, shape = dtype.subdtype or (dtype, ())
    if base.kind not in "iuf":
        return anything
    numbers = [*_NUMBERS, *_EXTREMES, *((float("nan"), float("inf")) if base.kind == "f" else ())]

    def packed(values: list[float]) -> bytes:
        with np.errstate(all="ignore"):
            limits = np.iinfo(base) if base.kind in "iu" else None
            kept = [min(max(int(v), limits.min), limits.max) for v in values] if limits else values
            return np.array(kept).astype(base.newbyteorder(order)).tobytes()

    n = int(np.prod(shape)) if shape else 1
    return anything | st.lists(st.sampled_from(numbers), min_size=n, max_size=n).map(packed)


# ----------------------------------------------------------------------------------------------------- bytes


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file with some bytes changed, put in, taken out or repeated, or cut off."""
    damaged = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, max(0, len(damaged) - 1)))
        length = draw(st.sampled_from([1, 1, 2, 4, 8, 60, 1000]))
        match draw(st.sampled_from(["flip", "write", "insert", "remove", "repeat", "cut"])):
            case "flip" if damaged:
                damaged[place] ^= 1 << draw(st.integers(0, 7))
            case "write":
                new = draw(st.binary(max_size=8))
                damaged[place : place + len(new)] = new
            case "insert":
                damaged[place:place] = draw(st.binary(max_size=16))
            case "remove":
                del damaged[place : place + length]
            case "repeat":
                damaged[place:place] = damaged[place : place + length]
            case "cut":
                del damaged[place:]
    return bytes(damaged)


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A volume damaged before or after it was compressed, or never compressed."""
    data: NDArray[Any] = label() if draw(st.booleans()) else image(1)
    content = nifti(data, draw(st.sampled_from([1, 2])))
    match draw(st.sampled_from(["plain", "inside", "outside"])):
        case "plain":
            return draw(damaged(content))
        case "inside":
            return zipped(draw(damaged(content)))
        case _:
            return draw(damaged(zipped(content)))


# ----------------------------------------------------------------------------------------------------- trees

_CHARACTERS = st.characters(exclude_characters="/\0", exclude_categories=["Cs"])


def _is_name(name: str) -> bool:
    return name not in {"", ".", ".."} and len(os.fsencode(name)) <= 255


_ENDINGS = (
    *("", ".nii", ".nii.gz", ".csv"),
    *("_0000.nii.gz", "-t1n.nii.gz", "_t1.nii", "_T1w.nii.gz", "_dseg.nii"),
)
_STRANGE = ("a\nb", "\r", "\x1b[31m", "\u202e", "\u2028", "..a", ".hidden", " ", "-", "*", "A")
_MEANT = (
    *("cases.csv", "CASES.CSV", "cases.tsv", "dataset.json", "participants.tsv", "imagesTr", "labelsTr"),
    *("anat", "derivatives", "sub-01", "sub-", "ses-", "sub-01_T1w.nii.gz", "_T1w.nii.gz", "seg.nii"),
)
NAMES = st.one_of(
    st.tuples(
        st.one_of(
            st.text(_CHARACTERS, min_size=1, max_size=12),
            st.sampled_from(_STRANGE),
            st.binary(min_size=1, max_size=8).map(lambda raw: os.fsdecode(raw.replace(b"/", b"\xff"))),
            st.integers(100, 255).map("x".__mul__),
        ),
        st.sampled_from(_ENDINGS),
    ).map("".join),
    st.sampled_from(_MEANT),
).filter(_is_name)
"""Of files and folders."""

ENTRIES: st.SearchStrategy[Entry] = st.one_of(
    st.sampled_from(
        [
            b"",
            FOLDER,
            PIPE,
            Link("nowhere"),
            Link("."),
            Link(".."),
            Link("../outside.nii"),
            Link("../../outside.nii"),
            Link("../elsewhere"),
            Link("/dev/zero"),
            Link("cases.csv"),
            Link("x" * 255),
            zipped(b""),
            nifti(image(3)),
            zipped(nifti(label())),
        ]
    ),
    st.binary(max_size=40),
    NAMES.map(Link),
)
"""What may lie in place of anything, or beside it."""


class Folder(dict[str, Entry]):
    """A folder that shows what is not in a healthy one."""

    def __repr__(self) -> str:
        known = {(path, entry) for tree in HEALTHY.values() for path, entry in tree.items()}
        changed = {path: entry for path, entry in self.items() if (path, entry) not in known}
        return f"{changed} of {len(self)}"


@st.composite
def trees(draw: st.DrawFn, layout: str) -> Folder:
    """The folder of a layout with names, entries and lists changed."""
    tree = dict(HEALTHY[layout])
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(sorted(tree)))
        match draw(st.sampled_from(["rename", "replace", "add", "remove", "list", "list"])):
            case "rename":
                parts = path.split("/")
                depth = draw(st.integers(1, len(parts)))
                old, new = "/".join(parts[:depth]), "/".join([*parts[: depth - 1], draw(NAMES)])
                tree = {_moved(name, old, new): entry for name, entry in tree.items()}
            case "replace":
                tree[path] = draw(ENTRIES)
            case "add":
                parts = path.split("/")[: draw(st.integers(0, path.count("/")))]
                tree["/".join([*parts, *draw(st.lists(NAMES, min_size=1, max_size=2))])] = draw(ENTRIES)
            case "remove" if len(tree) > 1:
                del tree[path]
            case "list":
                listed = [name for name in LISTS if isinstance(tree.get(name), bytes)]
                if listed:
                    name = draw(st.sampled_from(listed))
                    tree[name] = draw(_changed_list(name, tree[name]))
    # In any order: what a link or a file stands for in one may be the folder of another.
    return Folder(draw(st.permutations(sorted(tree.items(), key=lambda item: item[0]))))


def _moved(path: str, old: str, new: str) -> str:
    return new + path[len(old) :] if path == old or path.startswith(f"{old}/") else path


_CELLS = st.text(max_size=8) | st.sampled_from(
    (
        *("", "c1", "C1", "../outside.nii", "/etc/passwd", "c1/T1.nii", "a\0b", "\ud800", "a\nb", '"'),
        *(".", "..", "c1/../c1/T1.nii", "\u202e", "id", "T1", "n/a", "/", "sub-01", "c1/" * 2000, "x" * 300),
    )
)
_JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(), _CELLS, st.sampled_from([10**400, 2, 4, -1])
    ),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_CELLS, inner, max_size=3),
    max_leaves=5,
)


def _changed_list(name: str, content: Entry) -> st.SearchStrategy[bytes]:
    assert isinstance(content, bytes)
    changed = damaged(content)
    return changed | (_changed_json(content) if name.endswith(".json") else _changed_table(name, content))


@st.composite
def _changed_json(draw: st.DrawFn, content: bytes) -> bytes:
    """A JSON file with one value, at any depth, taken out, renamed or replaced."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):  # damaged before
        return draw(_JSON.map(json.dumps)).encode("utf-8", "surrogatepass")
    holder: Any = None
    key: Any = None
    inner = value
    while isinstance(inner, dict | list) and inner and (holder is None or draw(st.booleans())):
        keys = sorted(inner) if isinstance(inner, dict) else range(len(inner))
        holder, key = inner, draw(st.sampled_from(keys))
        inner = holder[key]
    if holder is None:
        return draw(_JSON.map(json.dumps)).encode("utf-8", "surrogatepass")
    match draw(st.sampled_from(["replace", "remove", "rename", "deepen"])):
        case "replace":
            holder[key] = draw(_JSON)
        case "remove":
            del holder[key]
        case "rename" if isinstance(holder, dict):
            holder[draw(_CELLS)] = holder.pop(key)
        case "deepen":
            depth = draw(st.sampled_from([10, 500, 100_000]))
            return (b'{"training": ' if draw(st.booleans()) else b"") + b"[" * depth
    return json.dumps(value).encode()


@st.composite
def _changed_table(draw: st.DrawFn, name: str, content: bytes) -> bytes:
    """A table with drawn cells, and quotes as the program that wrote it put them, or none."""
    separator = "\t" if name.endswith(".tsv") else ","
    rows = [line.split(separator) for line in content.decode("utf-8", "replace").splitlines()]
    for _ in range(draw(st.integers(1, 3))):
        if not rows:
            break
        row = draw(st.sampled_from(rows))
        place = draw(st.integers(0, max(0, len(row) - 1)))
        row[place : place + 1] = draw(st.lists(_CELLS, max_size=3))
    quote = _quoted if draw(st.booleans()) else str
    encoding = draw(st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1"]))
    text = "\n".join(separator.join(map(quote, row)) for row in rows)
    return text.encode(encoding, "replace" if encoding == "latin-1" else "surrogatepass")


def _quoted(cell: str) -> str:
    return '"' + cell.replace('"', '""') + '"'
