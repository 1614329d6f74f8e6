"""All cases of a site: each inspected once, remembered until a file changes, and compared with the others."""

import contextlib
import math
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fedqc
from fedqc.cases.comparison import compare_cases
from fedqc.cases.facts import CaseFacts
from fedqc.cases.layouts import CaseFiles, Listing
from fedqc.cases.memo import Memo, state
from fedqc.cases.problems import Problem
from fedqc.cases.validation import Inspection, inspect_case
from fedqc.cases.volumes import MAX_VOXELS, read_header
from fedqc.errors import DataError
from fedqc.task import Task

FORMAT = 2
"""Version of what is remembered; to be raised whenever an inspection finds something else."""
_VOXELS_OF_A_WORKER = 2**26  # four modalities of 256 x 256 x 256


@dataclass(frozen=True)
class CheckedCases:
    """What is known of all cases of a site."""

    layout: str
    cases: tuple[CaseFiles, ...]
    """All that the layout found, sorted by id."""
    usable: tuple[CaseFiles, ...]
    """Those without an error."""
    facts: Mapping[str, CaseFacts]
    """Of each usable case, by its id."""
    problems: tuple[Problem, ...]
    """Those of the folder first, then case by case."""


def check_cases(
    listing: Listing,
    root: Path,
    task: Task,
    *,
    workers: int = 1,
    memory: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CheckedCases:
    """Inspect all cases and compare them with each other.

    Ids that occur twice are left out altogether, for nobody can tell which case is meant.

    Args:
        listing: the cases of one site.
        root: their folder, or the table that lists them.
        task: what the data show.
        workers: number of threads.
        memory: folder that remembers inspections until a file changes; None remembers nothing.
        progress: called with (cases done, all cases) after each case.

    Raises:
        DataError: `memory` cannot be written.
    """
    remembered = None if memory is None else _Memory(memory, task)
    room = _Room(max(MAX_VOXELS, workers * _VOXELS_OF_A_WORKER))
    inspections: list[Inspection] = []
    with ThreadPoolExecutor(workers) as pool:
        inspected = pool.map(partial(_inspect, task=task, memory=remembered, room=room), listing.cases)
        for done, inspection in enumerate(inspected, start=1):
            inspections.append(inspection)
            if progress is not None:
                progress(done, len(listing.cases))
    compared = compare_cases(listing.cases, [inspection.facts for inspection in inspections], root, task)
    problems = list(listing.problems)
    usable: list[CaseFiles] = []
    facts: dict[str, CaseFacts] = {}
    for case, inspection, more in zip(listing.cases, inspections, compared, strict=True):
        found = [*inspection.problems, *more]
        problems.extend(found)
        if inspection.facts is not None and not any(problem.is_error for problem in found):
            usable.append(case)
            facts[case.id] = inspection.facts
    return CheckedCases(
        layout=listing.layout,
        cases=tuple(listing.cases),
        usable=tuple(usable),
        facts=facts,
        problems=tuple(problems),
    )


def _inspect(files: CaseFiles, task: Task, memory: "_Memory | None", room: "_Room") -> Inspection:
    inspection = None if memory is None else memory.get(files)
    if inspection is None:
        with room.of(_voxels(files)):
            inspection = inspect_case(files, task)
        if memory is not None:
            memory.put(files, inspection)
    return inspection


def _voxels(files: CaseFiles) -> int:
    """Voxels of all images of a case, as far as their headers can be read."""
    n_voxels = 0
    for path in files.images:
        with contextlib.suppress(DataError):
            n_voxels += math.prod(read_header(path).shape) if path is not None else 0
    return n_voxels


class _Room:
    """Lets large cases wait for each other, so that together they stay within the memory."""

    def __init__(self, voxels: int) -> None:
        self._size = self._left = voxels
        self._change = threading.Condition()

    @contextlib.contextmanager
    def of(self, voxels: int) -> Iterator[None]:
        """Room for so many voxels, as soon as there is; one case may always go on."""
        taken = min(voxels, self._size)
        with self._change:
            self._change.wait_for(lambda: self._left >= taken)
            self._left -= taken
        try:
            yield
        finally:
            with self._change:
                self._left += taken
                self._change.notify_all()


PASSING = frozenset({"no-permission", "too-large", "unreadable"})
"""Problems that may pass although no file changes: a disk far away may answer again."""


class _Memory:
    """Inspections of cases, each remembered until a file of the case changes."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._memo = Memo(folder)
        self._task = task.digest

    def get(self, files: CaseFiles) -> Inspection | None:
        """What is remembered of a case whose files did not change since."""
        stored = self._memo.get(self._key(files))
        with contextlib.suppress(ValueError, KeyError, TypeError):  # nothing, or damaged
            facts = stored["facts"]
            return Inspection(
                None if facts is None else CaseFacts.model_validate(facts),
                tuple(Problem.from_json(values) for values in stored["problems"]),
            )
        return None

    def put(self, files: CaseFiles, inspection: Inspection) -> None:
        """Remember an inspection; not one that may end otherwise although no file changes."""
        if any(problem.code in PASSING for problem in inspection.problems):
            return
        facts = inspection.facts
        content = {
            "facts": None if facts is None else facts.model_dump(mode="json"),
            "problems": [problem.as_json() for problem in inspection.problems],
        }
        self._memo.put(self._key(files), content)

    def _key(self, files: CaseFiles) -> list[object]:
        listed = [problem.as_json() for problem in files.problems]
        states = [_state(path) for path in (*files.images, files.label)]
        return [FORMAT, fedqc.__version__, self._task, files.id, listed, states]


def _state(path: Path | None) -> tuple[str, int, int] | str | None:
    """The state of a file, or the path of one that is not there."""
    try:
        return None if path is None else state(path)
    except OSError:
        return str(path)
