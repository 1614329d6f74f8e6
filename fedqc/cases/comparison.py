"""What only shows beside the other cases of a site: ids, links, content that occurs twice, and outliers."""

import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fedqc.cases.facts import CaseFacts
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.problems import Code, Problem
from fedqc.task import Task

ENOUGH_CASES = 10
"""With a class, to say what is usual for it."""
MANY_TIMES = 10.0
"""A volume so many times the usual one, or so many times smaller, is unusual..."""
MANY_SDS = 5.0
"""...where it also lies so many (robust) standard deviations from it, on a logarithmic scale."""
USUAL_SHARE = 0.9
"""Of the cases that have a class, for the others to be named."""


def compare_cases(
    cases: Sequence[CaseFiles], facts: Sequence[CaseFacts | None], root: Path, task: Task
) -> list[list[Problem]]:
    """Compare the cases of a site with each other.

    Args:
        cases: all of them.
        facts: of each case without an error; the content of the others is not compared.
        root: their folder, or the table that lists them.
        task: what the data show.

    Returns:
        The problems of each case.
    """
    in_turn = (
        _shared_ids(cases),
        _links(cases, root),
        _same_content(cases, facts, task),
        _unusual_labels(cases, facts, task),
    )
    return [[problem for group in of_case for problem in group] for of_case in zip(*in_turn, strict=True)]


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
    cases: Sequence[CaseFiles], facts: Sequence[CaseFacts | None], task: Task
) -> list[list[Problem]]:
    """Images or labels with the same voxels as others, whatever their files are called."""
    images: dict[str, list[tuple[int, int]]] = {}
    labels: dict[str, list[int]] = {}
    for index, known in enumerate(facts):
        if known is None:
            continue
        for channel, image in enumerate(known.images):
            images.setdefault(image.sha256, []).append((index, channel))
        if known.label_values:
            labels.setdefault(known.label_sha256, []).append(index)
    problems: list[list[Problem]] = [[] for _ in cases]
    for places in images.values():
        names = [f"{task.modalities[channel]} of {cases[index].id}" for index, channel in places]
        for (index, channel), own in zip(places, names, strict=True):
            if others := _others(names, own):
                files = cases[index].images
                file = files[channel] if len(files) == len(task.modalities) else files[0]
                what = f"{task.modalities[channel]} with the same voxels as {others}"
                problems[index].append(_duplicate("duplicate-image", cases[index], file, what))
    for members in labels.values():
        ids = [cases[index].id for index in members]
        for index in members:
            if others := _others(ids, cases[index].id):
                what = f"a label with the same voxels as that of {others}"
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


def _others(names: Sequence[str], own: str) -> str:
    """The first few other names, and how many more there are; a case that is listed twice is no other."""
    others = list(dict.fromkeys(name for name in names if name != own))
    more = f" and {len(others) - 3} more" if len(others) > 3 else ""
    return ", ".join(others[:3]) + more


def _unusual_labels(
    cases: Sequence[CaseFiles], facts: Sequence[CaseFacts | None], task: Task
) -> list[list[Problem]]:
    """Volumes far from those of the other cases, and classes that nearly all others have."""
    problems: list[list[Problem]] = [[] for _ in cases]
    marked = [known for known in facts if known is not None and known.label_values]
    for name in task.classes:
        logs = [math.log(known.volumes_ml[name]) for known in marked if known.volumes_ml[name] > 0]
        if len(logs) < ENOUGH_CASES:
            continue
        usual = float(np.median(logs))
        # 1.4826: the standard deviation of a normal distribution by its median absolute deviation.
        spread = 1.4826 * float(np.median(np.abs(np.array(logs) - usual)))
        furthest = max(math.log(MANY_TIMES), MANY_SDS * spread)
        for case, known, found in zip(cases, facts, problems, strict=True):
            if known is None or not known.label_values:
                continue
            volume = known.volumes_ml[name]
            if volume > 0 and abs(math.log(volume) - usual) > furthest:
                found.append(_unusual_volume(case, name, volume, math.exp(usual), math.exp(furthest)))
            elif volume == 0 and len(logs) >= USUAL_SHARE * len(marked):
                found.append(_missing_class(case, name, len(logs), len(marked)))
    return problems


def _unusual_volume(case: CaseFiles, name: str, volume: float, usual: float, times: float) -> Problem:
    return Problem(
        code="unusual-volume",
        case=case.id,
        file=case.label,
        found=f"{volume:.3g} ml of {name}, {_times(volume / usual)} the median {usual:.3g} ml of this site",
        expected=f"{usual / times:.3g} to {usual * times:.3g} ml, as the spread of the others suggests",
        fix="look whether the label is whole, marks the right structure and is in mm",
    )


def _times(ratio: float) -> str:
    return f"{ratio:.3g} times" if ratio >= 1 else f"1/{1 / ratio:.3g} of"


def _missing_class(case: CaseFiles, name: str, n_with: int, n_marked: int) -> Problem:
    return Problem(
        code="missing-class",
        case=case.id,
        file=case.label,
        found=f"no {name}, which {n_with} of {n_marked} labels of this site have",
        expected=f"{name} in nearly every label",
        fix="look whether it was forgotten, or marked as another class",
    )
