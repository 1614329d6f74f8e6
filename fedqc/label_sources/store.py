"""Labels made by segmenters, on disk: made once, each with its recipe and its exactly known DSC.

    folder / source / <SHA-256 of the settings> / <SHA-256 of case id, shape and reference label>.labels

Such a file is the SHA-256 of all that follows it, a line of JSON that lists the labels, and the labels, each
zlib-compressed on its own. It is written aside and renamed, so that it is there whole or not at all. One that
was changed since counts as none, and its labels are made again.
"""

import hashlib
import json
import math
import os
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, JsonValue, NonNegativeInt, TypeAdapter

from fedqc.cases.memo import digest, writing
from fedqc.cases.volumes import Case
from fedqc.config import FrozenModel
from fedqc.errors import DataError
from fedqc.metrics.overlap import overlap

LEARNED_FROM = "learned_from"
"""In a recipe, what the segmenter has learned from (`fedqc.label_sources.folds.learned_from`)."""
FORMAT = 1
"""Version of the files; to be raised whenever they are written in another way."""

_Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class StoredLabel:
    """What is known of one stored label."""

    recipe: Mapping[str, Any]
    """How it was made: the segmenter, what it was read at, the fold, the seed, what it learned from."""
    dsc: tuple[float, ...]
    """DSC of each region (conventions of `fedqc.metrics.overlap`)."""
    mean: float
    """Mean DSC over the regions present in the reference."""


class _Entry(FrozenModel):
    """A stored label in the list of its file."""

    recipe: dict[str, JsonValue]
    dsc: tuple[_Share, ...]
    mean: _Share
    length: NonNegativeInt
    """Bytes of the compressed label."""


_INDEX = TypeAdapter(tuple[_Entry, ...])


class LabelStore:
    """The labels that one source made with one set of settings.

    One process at a time makes the labels of a case; any number may read them.

    Args:
        folder: The stores of all sources.
        source: Name of the source, part of the path.
        settings: All that changes what is made (the task's digest, the seed, the source's own parameters):
            anything that JSON can write. Other settings have another store.

    Raises:
        DataError: the folder cannot be written.
    """

    def __init__(self, folder: Path, source: str, settings: Mapping[str, Any]) -> None:
        self._folder = folder / source / digest([FORMAT, json.dumps(settings, sort_keys=True)])
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)

    def add(
        self,
        case: Case,
        labels: Iterable[tuple[Mapping[str, Any], NDArray[np.uint8]]],
        regions: Sequence[Sequence[int]],
    ) -> None:
        """Measure labels of a case and store them behind those that it has; all of them or none.

        A label takes the place of one with the same recipe, whose segmenter an earlier run has trained on
        other cases perhaps. Where there are folds, the fold does not count, nor the segmenter's seed and what
        it has learned from: they change as patients come and go.

        Args:
            case: With the reference label.
            labels: Recipe (anything that JSON can write) and `[X, Y, Z]` uint8 class indices of each.
            regions: Class indices of each region, see `Task.region_indices`.

        Raises:
            DataError: a label is not on the case's grid, or the folder cannot be written.
        """
        path = self._path(case)
        before = _load(path)
        stored = {_key(entry.recipe): (entry, packed) for entry, packed in before}
        reference = torch.from_numpy(np.array(case.label))[None]
        for recipe, label in labels:
            written = json.loads(json.dumps(recipe, allow_nan=False))  # as it is when it is read again
            if label.shape != case.label.shape or label.dtype != np.uint8:
                raise DataError(
                    f"case {case.id}: the label made by {written} is {label.dtype} of shape {label.shape}, "
                    f"expected uint8 of shape {case.label.shape}; make it on the case's grid"
                )
            found = overlap(torch.from_numpy(np.array(label))[None], reference, regions)
            packed = zlib.compress(label.tobytes())
            entry = _Entry(
                recipe=written,
                dsc=tuple(found.dsc[0].tolist()),
                mean=float(found.mean[0]),
                length=len(packed),
            )
            stored[_key(written)] = entry, packed
        after = list(stored.values())
        if after != before:
            self._write(path, after)

    def of(self, case: Case) -> tuple[StoredLabel, ...]:
        """The labels stored for a case, in the order in which they were added."""
        return tuple(StoredLabel(entry.recipe, entry.dsc, entry.mean) for entry, _ in _load(self._path(case)))

    def read(self, case: Case, index: int) -> NDArray[np.uint8]:
        """One label of a case: `[X, Y, Z]` class indices.

        Args:
            case: With the reference label.
            index: Position of the label in `of(case)`.

        Raises:
            DataError: there is no such label, or no longer.
        """
        path = self._path(case)
        stored = _load(path)
        if not 0 <= index < len(stored):
            raise DataError(
                f"{path}: holds {len(stored)} whole labels of case {case.id}, asked for number {index}; "
                "start again, and what is missing is made again"
            )
        n_voxels = math.prod(case.label.shape)
        inflater = zlib.decompressobj()
        try:
            content = inflater.decompress(stored[index][1], n_voxels + 1)
        except zlib.error:
            content = b""
        if len(content) != n_voxels or not inflater.eof:
            raise DataError(
                f"{path}: label {index} of case {case.id} is damaged; delete the file and start again, "
                "and its labels are made again"
            )
        return np.frombuffer(content, dtype=np.uint8).reshape(case.label.shape).copy()

    def _path(self, case: Case) -> Path:
        """By the reference, as a DSC is worth nothing without it; hashing images too would take seconds."""
        key = hashlib.sha256(json.dumps([case.id, case.label.shape]).encode())
        key.update(np.ascontiguousarray(case.label).data)
        return self._folder / f"{key.hexdigest()}.labels"

    def _write(self, path: Path, stored: Sequence[tuple[_Entry, bytes]]) -> None:
        index = _INDEX.dump_json(tuple(entry for entry, _ in stored))
        content = b"\n".join([index, b"".join(packed for _, packed in stored)])
        with writing(self._folder), tempfile.TemporaryDirectory(prefix="tmp-", dir=self._folder) as aside:
            new = Path(aside) / path.name
            with new.open("wb") as file:
                file.write(hashlib.sha256(content).hexdigest().encode() + b"\n" + content)
                file.flush()
                os.fsync(file.fileno())  # or a power cut could leave a renamed file full of zeros
            new.replace(path)


def _key(recipe: Mapping[str, JsonValue]) -> str:
    """By what a label is known among those of its case."""
    changing = {"fold", "seed", LEARNED_FROM} if "fold" in recipe else set()
    return json.dumps({name: value for name, value in recipe.items() if name not in changing}, sort_keys=True)


def _load(path: Path) -> list[tuple[_Entry, bytes]]:
    """The labels in a file, compressed; none where it is missing or damaged."""
    try:
        checksum, _, content = path.read_bytes().partition(b"\n")
        index, _, packed = content.partition(b"\n")
        entries = _INDEX.validate_json(index)
    except (OSError, ValueError):
        return []
    ends = list(accumulate((entry.length for entry in entries), initial=0))
    if hashlib.sha256(content).hexdigest().encode() != checksum or ends[-1] != len(packed):
        return []
    return [(entry, packed[ends[i] : ends[i + 1]]) for i, entry in enumerate(entries)]
