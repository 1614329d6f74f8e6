"""The data sheet of a site: what its usable cases are like. It stays at the site, unfiltered."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from pydantic import FiniteFloat

from fedqc.cases.facts import CaseFacts
from fedqc.cases.layouts import CaseFiles
from fedqc.config import FrozenModel
from fedqc.statistics.site import DataSummary, summarise_data
from fedqc.task import Task

AXES = ("x", "y", "z")
MAX_GROUPS = 20
"""A column with more different values names no groups."""


class Spread(FrozenModel):
    """How a number is spread over n cases."""

    n: int
    smallest: FiniteFloat
    median: FiniteFloat
    largest: FiniteFloat


class DataSheet(FrozenModel):
    """What the usable cases of a site are like; numbers of cases unless said otherwise."""

    cases: int
    patients: int
    references: int
    ratings: int
    """Ratings in the site's table, one of each line."""
    spacing_mm: dict[str, Spread]
    """By axis of the files' grids."""
    shape: dict[str, Spread]
    """Voxels, by axis of the files' grids."""
    orientations: dict[str, int]
    intensities: dict[str, Spread]
    """By modality, over the medians of each case's non-zero voxels."""
    volumes_ml: dict[str, Spread | None]
    """By class, over the cases that have it."""
    label_values: dict[str, int]
    """By value in the files, the cases that hold it."""
    conventions: dict[str, int]
    """By convention of the label values, as guessed; `undecided` where nothing speaks for one."""
    groups: dict[str, dict[str, int]]
    """By column of the list, such as scanner, and by value."""


def describe_data(
    cases: Sequence[CaseFiles],
    facts: Mapping[str, CaseFacts],
    references: Collection[str],
    n_ratings: int,
    task: Task,
) -> DataSheet:
    """Describe the usable cases of a site.

    Args:
        cases: the usable ones.
        facts: of each, by its id.
        references: ids of the cases whose label the site vouches for.
        n_ratings: lines of the site's table of ratings.
        task: what the data show.
    """
    known = [facts[case.id] for case in cases]
    conventions = Counter(fact.convention or "undecided" for fact in known) if task.conventions else {}
    return DataSheet(
        cases=len(cases),
        patients=len({case.patient for case in cases}),
        references=sum(case.id in references for case in cases),
        ratings=n_ratings,
        spacing_mm=_by_axis([fact.spacing for fact in known]),
        shape=_by_axis([fact.shape for fact in known]),
        orientations=_counts([fact.orientation for fact in known]),
        intensities={
            name: spread
            for index, name in enumerate(task.modalities)
            if (spread := _spread([fact.images[index].median for fact in known])) is not None
        },
        volumes_ml={
            name: _spread([fact.volumes_ml[name] for fact in known if fact.volumes_ml[name] > 0])
            for name in task.classes
        },
        label_values=_counts([str(value) for fact in known for value in fact.label_values]),
        conventions=dict(sorted(conventions.items())),
        groups=_groups(cases),
    )


def summarise_cases(
    cases: Sequence[CaseFiles],
    facts: Mapping[str, CaseFacts],
    references: Collection[str],
    left_out: Mapping[str, Sequence[str]],
    task: Task,
) -> DataSummary:
    """The part of it that leaves the site, once it has passed the privacy filters.

    Args:
        cases: the usable ones.
        facts: of each, by its id.
        references: ids of the cases whose label the site vouches for.
        left_out: by the code of the problem, the patient of each case that was left out for it.
        task: what the data show.
    """
    known = [facts[case.id] for case in cases]
    return summarise_data(
        patients=[case.patient for case in cases],
        reference=[case.id in references for case in cases],
        volumes_ml={name: [fact.volumes_ml[name] for fact in known] for name in task.classes},
        left_out=left_out,
        spacing_mm={axis: [fact.spacing[index] for fact in known] for index, axis in enumerate(AXES)},
        shape={axis: [fact.shape[index] for fact in known] for index, axis in enumerate(AXES)},
        intensity={
            name: [fact.images[index].median for fact in known] for index, name in enumerate(task.modalities)
        },
    )


def _by_axis(sides: Sequence[tuple[float, float, float]]) -> dict[str, Spread]:
    spreads = {axis: _spread([side[index] for side in sides]) for index, axis in enumerate(AXES)}
    return {axis: spread for axis, spread in spreads.items() if spread is not None}


def _spread(values: Sequence[float]) -> Spread | None:
    if not values:
        return None
    return Spread(
        n=len(values),
        smallest=float(min(values)),
        median=float(np.median(values)),
        largest=float(max(values)),
    )


def _counts(names: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(names).items()))


def _groups(cases: Sequence[CaseFiles]) -> dict[str, dict[str, int]]:
    """Columns whose values are shared; one with a value of its own for nearly each case tells no groups."""
    columns = sorted({name for case in cases for name in case.groups})
    counted = {
        name: _counts([case.groups[name] for case in cases if name in case.groups]) for name in columns
    }
    return {
        name: counts
        for name, counts in counted.items()
        if len(counts) <= min(MAX_GROUPS, max(1, sum(counts.values()) // 2))
    }
