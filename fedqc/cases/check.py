"""All cases of a site: each inspected once, remembered until a file changes, and compared with the others."""

import contextlib
import hashlib
import json
import math
import os
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import fedqc
from fedqc.cases.facts import CaseFacts
from fedqc.cases.layouts import CaseFiles, Listing
from fedqc.cases.problems import Code, Problem
from fedqc.cases.validation import Inspection, inspect_case
from fedqc.cases.volumes import MAX_VOXELS, read_header
from fedqc.errors import DataError
from fedqc.task import Task

FORMAT = 1
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
    compared = [
        _shared_ids(listing.cases),
        _links(listing.cases, root),
        _same_content(listing.cases, inspections, task),
    ]
    problems = list(listing.problems)
    usable: list[CaseFiles] = []
    facts: dict[str, CaseFacts] = {}
    for index, (case, inspection) in enumerate(zip(listing.cases, inspections, strict=True)):
        found = [*inspection.problems, *(problem for group in compared for problem in group[index])]
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


class _Memory:
    """Inspections in a folder, each in a file named by what it depends on."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._folder = folder
        self._task = task.digest
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, files: CaseFiles) -> Inspection | None:
        """What is remembered of a case whose files did not change since."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # not there yet, or damaged
            stored = json.loads(self._path(files).read_text(encoding="utf-8"))
            facts = stored["facts"]
            return Inspection(
                None if facts is None else CaseFacts.model_validate_json(json.dumps(facts)),
                tuple(Problem.from_json(values) for values in stored["problems"]),
            )
        return None

    def put(self, files: CaseFiles, inspection: Inspection) -> None:
        """Remember an inspection; not one that may end otherwise although no file changes."""
        if any(problem.code in {"no-permission", "too-large"} for problem in inspection.problems):
            return
        facts = inspection.facts
        content = {
            "facts": None if facts is None else facts.model_dump(mode="json"),
            "problems": [problem.as_json() for problem in inspection.problems],
        }
        with self._writing(), tempfile.TemporaryDirectory(prefix="tmp-", dir=self._folder) as aside:
            written = Path(aside) / "inspection.json"
            written.write_text(json.dumps(content), encoding="utf-8")
            written.replace(self._path(files))

    def _path(self, files: CaseFiles) -> Path:
        listed = [problem.as_json() for problem in files.problems]
        content = [FORMAT, fedqc.__version__, self._task, files.id, listed, *map(_state, files.images)]
        if files.label is not None:
            content.append(_state(files.label))
        return self._folder / f"{hashlib.sha256(json.dumps(content).encode()).hexdigest()}.json"

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                f"{self._folder}: cannot be written ({error.strerror or error}); "
                "free space or name another folder under [compute] cache"
            ) from None


def _state(path: Path | None) -> list[str | int] | None:
    """Path, size and time of last change: what differs once a file was written again."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError:
        return [str(path)]
    return [str(path), status.st_size, status.st_mtime_ns]


def _shared_ids(cases: Sequence[CaseFiles]) -> list[list[Problem]]:
    """Ids that occur twice, or differ in upper and lower case only."""
    times = Counter(case.id for case in cases)
    alike: dict[str, set[str]] = {}
    for case_id in times:
        alike.setdefault(case_id.casefold(), set()).add(case_id)
    return [
        [
            *([duplicate_id(case, times[case.id])] if times[case.id] > 1 else []),
            *_clash(case, alike[case.id.casefold()] - {case.id}),
        ]
        for case in cases
    ]


def duplicate_id(case: CaseFiles, times: int) -> Problem:
    """The problem of a case whose id occurs `times` times."""
    return Problem(
        code="duplicate-id",
        case=case.id,
        file=next(iter(case.files), None),
        found=f"{times} cases with this id",
        expected="one",
        fix="give each case an id of its own",
    )


def _clash(case: CaseFiles, others: set[str]) -> Iterator[Problem]:
    if others:
        yield Problem(
            code="name-clash",
            case=case.id,
            file=next(iter(case.files), None),
            found=f"ids that differ from {', '.join(sorted(others))} in upper and lower case only",
            expected="ids that differ in more",
            fix="rename one of them: on some file systems their results are one file",
        )


def _links(cases: Sequence[CaseFiles], root: Path) -> list[list[Problem]]:
    """Files that lie elsewhere than they are listed. Archives work like this, so it is only said."""
    home = os.path.realpath(root if root.is_dir() else root.parent)
    return [
        [
            Problem(
                code="link-outside",
                case=case.id,
                file=path,
                found=f"a link to {os.path.realpath(path)}",
                expected=f"a file inside {home}",
                fix="nothing, if the place it leads to is kept as safe as the folder; else copy the file",
            )
            for path in case.files
            if not any(problem.code == "path-outside" for problem in case.problems)
            and not Path(os.path.realpath(path)).is_relative_to(home)
        ]
        for case in cases
    ]


def _same_content(
    cases: Sequence[CaseFiles], inspections: Sequence[Inspection], task: Task
) -> list[list[Problem]]:
    """Images or labels with the same voxels as others, whatever their files are called."""
    images: dict[str, list[tuple[int, int]]] = {}
    labels: dict[str, list[int]] = {}
    for index, inspection in enumerate(inspections):
        if inspection.facts is None:
            continue
        for channel, image in enumerate(inspection.facts.images):
            images.setdefault(image.sha256, []).append((index, channel))
        if inspection.facts.label_values:
            labels.setdefault(inspection.facts.label_sha256, []).append(index)
    problems: list[list[Problem]] = [[] for _ in cases]
    for places in images.values():
        names = [f"{task.modalities[channel]} of {cases[index].id}" for index, channel in places]
        for number, (index, channel) in enumerate(places if len(places) > 1 else ()):
            files = cases[index].images
            file = files[channel] if len(files) == len(task.modalities) else files[0]
            what = f"{task.modalities[channel]} with the same voxels as {_others(names, number)}"
            problems[index].append(_duplicate("duplicate-image", cases[index], file, what))
    for members in labels.values():
        names = [cases[index].id for index in members]
        for number, index in enumerate(members if len(members) > 1 else ()):
            what = f"a label with the same voxels as that of {_others(names, number)}"
            problems[index].append(_duplicate("duplicate-label", cases[index], cases[index].label, what))
    return problems


def _duplicate(code: Code, case: CaseFiles, file: Path | None, found: str) -> Problem:
    return Problem(
        code=code,
        case=case.id,
        file=file,
        found=found,
        expected="a file of its own",
        fix="find out which case the file belongs to, and leave the others out",
    )


def _others(names: Sequence[str], own: int) -> str:
    """The first few names but for its own, and how many more there are."""
    first = [name for number, name in enumerate(names[:4]) if number != own][:3]
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(first) + more
