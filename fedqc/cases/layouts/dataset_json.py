"""`dataset.json` as the Decathlon and nnU-Net write it: what both layouts read from it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from fedqc.cases.layouts.base import CaseFiles, is_file, is_folder, nifti_names, read_json, unexpected
from fedqc.cases.layouts.modalities import common_name
from fedqc.cases.problems import Problem
from fedqc.errors import DataError
from fedqc.task import Task

NAME = "dataset.json"
_IGNORE = "ignore"
"""nnU-Net's name for the value of voxels that nobody annotated."""


def is_nnunet(root: Path) -> bool:
    """Whether a folder with a `dataset.json` is nnU-Net's rather than the Decathlon's.

    Version 1 has the Decathlon's list, so the files decide: there are images called `ID_0000`, which the list
    calls `ID`. Images of the Decathlon may be numbered with four digits, too, but are listed as they are.
    """
    path = root / NAME
    if not is_file(path):
        return False
    content: dict[str, Any] = {}
    with contextlib.suppress(DataError):  # said by whichever layout reads it
        content = read_json(path, "nnunet")
    if isinstance(content.get("dataset"), dict):
        return True
    try:
        names = {file.name for file in (root / "imagesTr").iterdir()}
    except OSError:
        return False
    training = content.get("training")
    entries = training if isinstance(training, list) else []
    listed = {Path(str(entry.get("image"))).name for entry in entries if isinstance(entry, dict)}
    return any("_0000." in name for name in names) and not names & listed


def channel_names(path: Path, dataset: Mapping[str, Any], task: Task) -> dict[str, str]:
    """The channels listed (`modality`, or `channel_names` in newer files), as many as the task's.

    Returns:
        Name of each channel by its number as written, in the order of the file.

    Raises:
        DataError: there is no such list, or it has another length than the task's modalities.
    """
    key = "modality" if "modality" in dataset else "channel_names"
    listed = dataset.get(key)
    if isinstance(listed, list):
        listed = dict(enumerate(listed))
    if not isinstance(listed, dict):
        raise DataError(
            f"{path}: neither 'modality' nor 'channel_names' is there; list the images' modalities"
        )
    names = {str(number): str(name) for number, name in listed.items()}
    if len(names) != len(task.modalities):
        raise DataError(
            f"{path}: '{key}' lists {len(names)} ({', '.join(names.values())}), task {task.name!r} needs "
            f"{len(task.modalities)} ({', '.join(task.modalities)}); choose the task that fits the data"
        )
    return names


def channel_order(path: Path, dataset: Mapping[str, Any], task: Task) -> list[int]:
    """The number of the channel for each of the task's modalities.

    Channels are told by their names, in any case and by synonyms. Where none of them is a modality of the
    task (`MRI`), they are taken as they come.

    Raises:
        DataError: as `channel_names`, or the channels are not numbered 0, 1, ..., or only some of their names
            are modalities of the task and these are in another order.
    """
    names = channel_names(path, dataset, task)
    numbers = [str(number) for number in range(len(names))]
    if set(names) != set(numbers):
        raise DataError(
            f"{path}: channels are numbered {', '.join(names)}, expected {', '.join(numbers)}; "
            "number them as the files are"
        )
    listed = [names[number] for number in numbers]
    ways: Sequence[Callable[[str], str]] = (str, str.casefold, common_name)
    for way in ways:
        here, wanted = [way(name) for name in listed], [way(name) for name in task.modalities]
        if set(here) == set(wanted) and len(set(wanted)) == len(wanted):
            return [here.index(name) for name in wanted]
    if any(name != other and name in wanted for name, other in zip(here, wanted, strict=True)):
        raise DataError(
            f"{path}: the channels are {', '.join(listed)}, task {task.name!r} needs "
            f"{', '.join(task.modalities)}; call the channels as the task does, or choose the task that fits"
        )
    return list(range(len(names)))


def count_problems(path: Path, dataset: Mapping[str, Any], found: int) -> list[Problem]:
    """Where `numTraining` is there and not the number of cases."""
    expected = dataset.get("numTraining", found)
    if expected == found:
        return []
    return [
        Problem(
            code="case-count",
            case=None,
            file=path,
            found=f"{found} cases",
            expected=f"{expected!r} as 'numTraining' says",
            fix="copy or list the missing cases, or correct the number",
        )
    ]


def unlisted_problems(path: Path, cases: Sequence[CaseFiles]) -> list[Problem]:
    """The NIfTI files that lie beside those of the list and are not listed themselves."""
    listed = {file for case in cases for file in case.files}
    folders = {file.parent for file in listed if file.is_relative_to(path.parent)}
    return [
        unexpected(
            folder / name,
            f"a file that {path.name} does not list",
            f"a listed file, as the others in {folder.name} are",
            "list it if it belongs to a case; else move it away",
        )
        for folder in sorted(folders)
        if is_folder(folder)
        for name in nifti_names(folder)
        if folder / name not in listed
    ]


def convention_problems(path: Path, dataset: Mapping[str, Any], task: Task) -> list[Problem]:
    """Where `labels` says that a value means something else than in the task.

    Two forms are read: a value for each name (nnU-Net 2; a name for each value in version 1 and the
    Decathlon), and regions, a list of values for each name. A name is compared with the task's where they
    have it in common. Where there are regions, the other names are compared as sets of values with the task's
    classes and regions, for these are the same whatever they are called.
    """
    named = _values_by_name(dataset.get("labels"))
    expected = {name.casefold(): set(values) for name, values in task.classes.items()} | {
        name.casefold(): {value for member in members for value in task.classes[member]}
        for name, members in task.regions.items()
    }
    ignored = named.pop(_IGNORE, set()) if _IGNORE not in expected else set()
    problems = [
        _convention(path, f"{label!r} as {_listed(values)}", _listed(expected[label.casefold()]), task)
        for label, values in named.items()
        if not values <= expected.get(label.casefold(), values)
    ]
    if any(len(values) > 1 for values in named.values()) and not problems:
        used = set().union(*named.values())
        # As far as the values in use go: a task may know further values of a class.
        known = {frozenset(values & used) for values in expected.values()} - {frozenset()}
        strange = {
            label: values
            for label, values in named.items()
            if label.casefold() not in expected and values not in known
        }
        if strange:
            what = "; ".join(f"{label!r} as {_listed(values)}" for label, values in strange.items())
            problems.append(_convention(path, what, " or ".join(sorted(map(_listed, known))), task))
    annotated = {value for values in task.classes.values() for value in values}
    if ignored & annotated:  # else the cases that have the value are reported
        what = f"{_IGNORE!r} (not annotated) as {_listed(ignored)}"
        problems.append(_convention(path, what, f"{_listed(ignored)} as a class", task))
    return problems


def _values_by_name(labels: object) -> dict[str, set[int]]:
    """`labels` in any of its forms as values by name, without background; what is no number is left out."""
    named: dict[str, set[int]] = {}
    if not isinstance(labels, dict):
        return named
    for key, value in labels.items():
        if isinstance(value, str):  # {"1": "core"}
            name, values = value, [key]
        else:
            name, values = str(key), value if isinstance(value, list) else [value]
        numbers = set()
        for number in values:
            with contextlib.suppress(TypeError, ValueError, OverflowError):
                numbers.add(int(number))
        if numbers - {0}:
            named.setdefault(name, set()).update(numbers - {0})
    return named


def _convention(path: Path, found: str, expected: str, task: Task) -> Problem:
    return Problem(
        code="label-convention",
        case=None,
        file=path,
        found=f"labels that list {found}",
        expected=f"{expected} in task {task.name!r}",
        fix="look what the values mean in the files; write a task of your own if they differ",
    )


def _listed(values: Set[int]) -> str:
    return ", ".join(map(str, sorted(values)))
