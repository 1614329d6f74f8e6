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
    smallest_case: str
    """Id of the case with the smallest, the first of several."""
    largest_case: str


class DataSheet(FrozenModel):
    """What the usable cases of a site are like; numbers of cases unless said otherwise."""

    cases: int
    patients: int
    references: int
    reference_patients: int
    """Distinct patients of the references."""
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
    by_id = {case.id: facts[case.id] for case in cases}
    known = list(by_id.values())
    conventions = Counter(fact.convention or "undecided" for fact in known) if task.conventions else {}
    return DataSheet(
        cases=len(cases),
        patients=len({case.patient for case in cases}),
        references=sum(case.id in references for case in cases),
        reference_patients=len({case.patient for case in cases if case.id in references}),
        ratings=n_ratings,
        spacing_mm=_by_axis({name: fact.spacing for name, fact in by_id.items()}),
        shape=_by_axis({name: fact.shape for name, fact in by_id.items()}),
        orientations=_counts([fact.orientation for fact in known]),
        intensities={
            modality: spread
            for index, modality in enumerate(task.modalities)
            if (spread := _spread({name: fact.images[index].median for name, fact in by_id.items()}))
        },
        volumes_ml={
            member: _spread(
                {name: volume for name, fact in by_id.items() if (volume := fact.volumes_ml[member]) > 0}
            )
            for member in task.classes
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


def _by_axis(sides: Mapping[str, tuple[float, float, float]]) -> dict[str, Spread]:
    spreads = {
        axis: _spread({case: of_case[index] for case, of_case in sides.items()})
        for index, axis in enumerate(AXES)
    }
    return {axis: spread for axis, spread in spreads.items() if spread is not None}


def _spread(values: Mapping[str, float]) -> Spread | None:
    """Of a number for each case, by its id."""
    if not values:
        return None
    smallest, largest = min(values, key=values.__getitem__), max(values, key=values.__getitem__)
    return Spread(
        n=len(values),
        smallest=values[smallest],
        median=float(np.median(list(values.values()))),
        largest=values[largest],
        smallest_case=smallest,
        largest_case=largest,
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
