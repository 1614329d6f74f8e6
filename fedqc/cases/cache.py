"""Preprocessed cases on disk, memory-mapped, shared by any number of processes.

An entry is a folder named by what it was made from: the SHA-256 of the contents of its files and the
settings of the task that preprocessing uses. It is written aside and renamed, so a process that is killed
leaves no half entry, and of two processes that make the same entry either result may stay. An entry that was
changed since it was made is made again.
"""

import contextlib
import errno
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.memo import Memo, digest, state, writing
from fedqc.cases.preprocessing import preprocess
from fedqc.cases.volumes import Case, MeanSD, sha256_file
from fedqc.errors import DataError
from fedqc.task import Task

FORMAT = 3
"""Version of the entries; to be raised whenever preprocessing gives other numbers."""

_ARRAYS = ("image.npy", "label.npy")
_READING = threading.Lock()
"""Held while NumPy reads the header of an array by Python's parser, which counts its depth for all threads at
once in some versions, 3.11.7 among them: a SystemError once in a while (CPython issue 106905)."""


class CaseCache:
    """The preprocessed cases of one task in one folder."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder = folder
        self._task = task
        self._hashes = Memo(folder / "hashes")

    def get(self, files: CaseFiles) -> Case:
        """The preprocessed case; its arrays are memory-mapped and read-only.

        Raises:
            DataError: the case has a problem, or the cache's folder cannot be written.
        """
        hashes = self.hashes(files)
        entry = self._folder / self._key(hashes)
        case = self._open(entry, files)
        if case is None:
            made = preprocess(files, self._task)
            self._store(entry, made, files)
            case = self._open(entry, files) or made
        return case

    def prepare(
        self,
        cases: Sequence[CaseFiles],
        *,
        workers: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Preprocess the cases that are not there yet.

        None stays open: a memory-mapped case keeps two files open, and a process may have only so many.

        Args:
            cases: valid cases.
            workers: number of threads.
            progress: called with (cases done, all cases) after each case.

        Raises:
            DataError: as `get`.
        """

        def make(files: CaseFiles) -> None:
            self.get(files)

        with ThreadPoolExecutor(workers) as pool:
            for done, _ in enumerate(pool.map(make, cases), start=1):
                if progress is not None:
                    progress(done, len(cases))

    def hashes(self, files: CaseFiles) -> tuple[str, ...]:
        """SHA-256 of each image and, last, of the label, remembered as long as size and time of change stay.

        Raises:
            DataError: a file cannot be read.
        """
        paths = files.files
        try:
            states = [state(path.resolve()) for path in paths]
        except OSError as error:
            raise DataError(
                f"{error.filename}: cannot be read ({error.strerror}); restore the file"
            ) from None
        remembered = self._hashes.get(states)
        if isinstance(remembered, list) and len(remembered) == len(paths):
            return tuple(str(known) for known in remembered)
        hashes = tuple(sha256_file(path) for path in paths)
        self._hashes.put(states, hashes)
        return hashes

    def _key(self, hashes: tuple[str, ...]) -> str:
        task = self._task
        settings = [task.modalities, list(task.classes.items()), task.spacing, task.size]
        return digest([FORMAT, hashes, settings])

    def _open(self, entry: Path, files: CaseFiles) -> Case | None:
        """The case stored in `entry`, or None if there is no such entry or it was changed or damaged."""
        try:
            card = json.loads((entry / "case.json").read_text())
            if [list(_size_and_time(entry / name)) for name in _ARRAYS] != card["states"]:
                return None
            with _READING:
                image, label = (np.load(entry / name, mmap_mode="r", allow_pickle=False) for name in _ARRAYS)
            x, y, z = card["native_shape"]
            return Case(
                id=files.id,
                patient=files.patient,
                image=image,
                label=label,
                affine=np.array(card["affine"], dtype=np.float64).reshape(4, 4),
                native_shape=(x, y, z),
                native_affine=np.array(card["native_affine"], dtype=np.float64).reshape(4, 4),
                intensities=tuple(MeanSD(float(mean), float(sd)) for mean, sd in card["intensities"]),
            )
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    def _store(self, entry: Path, case: Case, files: CaseFiles) -> None:
        with writing(self._folder), tempfile.TemporaryDirectory(prefix="tmp-", dir=self._folder) as aside:
            new, old = Path(aside) / "new", Path(aside) / "old"
            new.mkdir()
            arrays: tuple[NDArray[Any], ...] = (case.image, case.label)
            for name, array in zip(_ARRAYS, arrays, strict=True):
                with (new / name).open("wb") as file:
                    np.save(file, array)
                    file.flush()
                    os.fsync(file.fileno())  # or a power cut could leave a renamed entry full of zeros
            card = {
                "affine": case.affine.tolist(),
                "native_shape": case.native_shape,
                "native_affine": case.native_affine.tolist(),
                "intensities": [(one.mean, one.sd) for one in case.intensities],
                "states": [_size_and_time(new / name) for name in _ARRAYS],
            }
            (new / "case.json").write_text(json.dumps(card))
            if self._open(entry, files) is None:  # else another process was faster
                with contextlib.suppress(FileNotFoundError):
                    entry.rename(old)
                try:
                    new.rename(entry)
                except OSError as error:
                    if error.errno not in {errno.ENOTEMPTY, errno.EEXIST}:  # else another process was faster
                        raise


def _size_and_time(path: Path) -> tuple[int, int]:
    """What differs once an array was written again, wherever its entry was moved."""
    return state(path)[1:]
