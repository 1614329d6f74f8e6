"""The cases of this site, as every phase needs them."""

import contextlib
import dataclasses
import hashlib
import json
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import fedqc
from fedqc.cases.cache import CaseCache
from fedqc.cases.layouts import CaseFiles, find_cases, read_ids
from fedqc.cases.validation import Problem, Validation, validate
from fedqc.cases.volumes import Case
from fedqc.config import SiteConfig
from fedqc.errors import DataError
from fedqc.protocol import task_digest
from fedqc.seeding import derive_seed
from fedqc.task import Task

_REFERENCE_PARTS = 4
"""One part in four of the reference patients is for calibration, the rest for training."""


@dataclass(frozen=True)
class SiteData:
    """A site's cases by what they are for, and what is wrong with the others."""

    cache: CaseCache
    references: tuple[CaseFiles, ...]
    """Usable cases whose label the site vouches for."""
    candidates: tuple[CaseFiles, ...]
    """The other usable cases."""
    problems: tuple[Problem, ...]
    patients: dict[str, str]
    """Patient of every case by its id, the unusable ones too."""
    unknown_references: tuple[str, ...]
    """Ids in the site's table of references that are no case."""

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
        DataError: the data folder or the table of references cannot be used, or no case can.
    """
    cases = find_cases(site.data.path, task, site.data.layout)
    vouched = read_ids(site.data.reference) if site.data.reference else frozenset()
    validation = _validated(cases, site, task)
    if not validation.usable:
        raise DataError(
            f"{site.data.path}: none of {len(cases)} cases can be used; "
            f"the first problem: {validation.problems[0]}"
        )
    return SiteData(
        cache=CaseCache(site.compute.cache, task),
        references=tuple(case for case in validation.usable if case.id in vouched),
        candidates=tuple(case for case in validation.usable if case.id not in vouched),
        problems=tuple(validation.problems),
        patients={case.id: case.patient for case in cases},
        unknown_references=tuple(sorted(vouched - {case.id for case in cases})),
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


def _validated(cases: Sequence[CaseFiles], site: SiteConfig, task: Task) -> Validation:
    """Validation of the cases, remembered beside the cache: a phase may run in a process of its own."""
    store = site.compute.cache / "validation.json"
    fingerprint = _fingerprint(cases, task)
    with contextlib.suppress(
        OSError, ValueError, KeyError, TypeError
    ):  # not there yet, or damaged: check again
        stored = json.loads(store.read_text(encoding="utf-8"))
        if stored["fingerprint"] == fingerprint:
            usable = set(stored["usable"])
            return Validation(
                usable=[case for case in cases if case.id in usable],
                problems=[_problem(values) for values in stored["problems"]],
            )
    validation = validate(cases, task, workers=site.compute.workers)
    content = {
        "fingerprint": fingerprint,
        "usable": [case.id for case in validation.usable],
        "problems": [dataclasses.asdict(problem) for problem in validation.problems],
    }
    try:
        store.parent.mkdir(parents=True, exist_ok=True)
        aside = store.with_name(f".{store.name}.{uuid.uuid4().hex}")
        aside.write_text(json.dumps(content, default=str), encoding="utf-8")
        aside.replace(store)
    except OSError as error:
        raise DataError(
            f"{store.parent}: the cache cannot be written ({error.strerror}); "
            "free space or name another folder"
        ) from None
    return validation


def _problem(values: dict[str, Any]) -> Problem:
    return Problem(**values | {"file": Path(values["file"]) if values["file"] else None})


def _fingerprint(cases: Sequence[CaseFiles], task: Task) -> str:
    """What validation depends on: the code, the task, and each file's path, size and time of last change."""
    files = [
        [case.id, case.patient, *(_state(path) for path in (*case.images, case.label) if path)]
        for case in cases
    ]
    return hashlib.sha256(json.dumps([fedqc.__version__, task_digest(task), files]).encode()).hexdigest()


def _state(path: Path) -> list[str | int]:
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]
