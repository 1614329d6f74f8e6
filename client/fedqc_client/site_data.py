"""The cases of this site, as every phase needs them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.config import SiteConfig
from fedqc.errors import DataError
from fedqc.seeding import derive_seed
from fedqc.site_check import SiteCheck, check_site
from fedqc.task import Task

_REFERENCE_PARTS = 4
"""One part in four of the reference patients is for calibration, the rest for training."""


@dataclass(frozen=True)
class SiteData:
    """A site's cases by what they are for, and what is wrong with the others."""

    cache: CaseCache
    check: SiteCheck
    """What was found in the site's data, the unusable cases too."""
    references: tuple[CaseFiles, ...]
    """Usable cases whose label the site vouches for."""
    candidates: tuple[CaseFiles, ...]
    """The other usable cases."""

    @property
    def usable(self) -> tuple[CaseFiles, ...]:
        """References and candidates."""
        return self.references + self.candidates


class CachedCases(Sequence[Case]):
    """Preprocessed cases, each opened when it is asked for.

    A site may have more than fit into memory at once, and more than a process may hold open.
    """

    def __init__(self, cache: CaseCache, files: Sequence[CaseFiles]) -> None:
        self._cache = cache
        self._files = tuple(files)

    @property
    def patients(self) -> frozenset[str]:
        """Whose cases they are."""
        return frozenset(files.patient for files in self._files)

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


def load_site_data(site: SiteConfig, task: Task) -> SiteData:
    """Find and check the site's cases; what was checked once is not read again until a file changes.

    Raises:
        DataError: the data folder or a list of cases cannot be used, or no case can.
    """
    check = check_site(site, task, memory=site.compute.cache / "checks")
    if not check.checked.usable:
        first = next(problem for problem in check.problems if problem.is_error)
        raise DataError(
            f"{site.data.path}: none of {len(check.checked.cases)} cases can be used; "
            f"the first problem: {first}"
        )
    return SiteData(
        cache=CaseCache(site.compute.cache, task),
        check=check,
        references=check.usable_references,
        candidates=check.candidates,
    )


def split_references(
    references: Sequence[CaseFiles], seed: int
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """Reference cases for training (three quarters of the patients) and for calibration (a quarter).

    The seed of the run and the patients decide, so every phase of a run makes the same split. From two
    patients on there is one at least on either side.
    """
    patients = sorted(
        {case.patient for case in references}, key=lambda patient: derive_seed(seed, "split", patient)
    )
    n_held_back = (len(patients) + 2) // _REFERENCE_PARTS
    held_back = set(patients[:n_held_back])
    return (
        tuple(case for case in references if case.patient not in held_back),
        tuple(case for case in references if case.patient in held_back),
    )
