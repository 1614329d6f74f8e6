"""Preprocessed cases as a sequence that never holds them all."""

from collections.abc import Callable, Sequence
from typing import overload

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case


class CachedCases(Sequence[Case]):
    """Preprocessed cases, each opened when it is asked for.

    There may be more than fit into memory at once, and more than a process may hold open.
    """

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

    def where(self, is_wanted: Callable[[CaseFiles], bool]) -> "CachedCases":
        """Some of the cases, chosen by their files."""
        return CachedCases(self._cache, [files for files in self._files if is_wanted(files)])

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> "CachedCases": ...
    def __getitem__(self, index: int | slice) -> "Case | CachedCases":
        if isinstance(index, slice):
            return CachedCases(self._cache, self._files[index])
        return self._cache.get(self._files[index])


class LabelsOf(Sequence[NDArray[np.uint8]]):
    """The labels of cases, each read when it is asked for."""

    def __init__(self, cases: Sequence[Case]) -> None:
        self._cases = cases

    def __len__(self) -> int:
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.uint8]: ...
    @overload
    def __getitem__(self, index: slice) -> "LabelsOf": ...
    def __getitem__(self, index: int | slice) -> "NDArray[np.uint8] | LabelsOf":
        if isinstance(index, slice):
            return LabelsOf(self._cases[index])
        return self._cases[index].label


class ChosenCases(Sequence[Case]):
    """Some of a sequence's cases, each read when it is asked for."""

    def __init__(self, cases: Sequence[Case], indices: Sequence[int]) -> None:
        self._cases = cases
        self._indices = tuple(indices)

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Case: ...
    @overload
    def __getitem__(self, index: slice) -> "ChosenCases": ...
    def __getitem__(self, index: int | slice) -> "Case | ChosenCases":
        if isinstance(index, slice):
            return ChosenCases(self._cases, self._indices[index])
        return self._cases[self._indices[index]]
