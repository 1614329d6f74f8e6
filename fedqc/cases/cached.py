"""Preprocessed cases as a sequence that never holds them all."""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.memo import digest
from fedqc.cases.volumes import Case
from fedqc.lazy import Lazy


class CachedCases(Lazy[Case]):
    """Preprocessed cases, each opened when it is asked for: a process may not hold them all open."""

    def __init__(self, cache: CaseCache, files: Sequence[CaseFiles]) -> None:
        self._cache = cache
        self._files = tuple(files)

    @property
    def files(self) -> tuple[CaseFiles, ...]:
        """Where the cases lie."""
        return self._files

    @property
    def patients(self) -> frozenset[str]:
        """Whose cases they are."""
        return frozenset(files.patient for files in self._files)

    def hashes(self) -> tuple[tuple[str, ...], ...]:
        """SHA-256 of each case's files, see `CaseCache.hashes`."""
        return tuple(self._cache.hashes(files) for files in self._files)

    def digest(self) -> str:
        """SHA-256 of whose cases these are and of what their files hold."""
        known = zip(self._files, self.hashes(), strict=True)
        return digest([(files.id, files.patient, hashes) for files, hashes in known])

    def where(self, is_wanted: Callable[[CaseFiles], bool]) -> "CachedCases":
        """Some of the cases, chosen by their files."""
        return CachedCases(self._cache, [files for files in self._files if is_wanted(files)])

    def __len__(self) -> int:
        return len(self._files)

    def make(self, index: int) -> Case:
        """Open a case."""
        return self._cache.get(self._files[index])


class PatientsOf(Lazy[str]):
    """Whose each case is, read when it is asked for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases

    def __len__(self) -> int:
        return len(self._cases)

    def make(self, index: int) -> str:
        """A case's patient."""
        return self._cases[index].patient


class LabelsOf(Lazy[NDArray[np.uint8]]):
    """The labels of cases, each read when it is asked for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases

    def __len__(self) -> int:
        return len(self._cases)

    def make(self, index: int) -> NDArray[np.uint8]:
        """A case's label."""
        return self._cases[index].label
