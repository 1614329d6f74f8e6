"""All sources of stored labels behind one door: which there are, where labels lie, how they are made."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig, SourcesConfig
from fedqc.degradation.samples import stored_shares
from fedqc.errors import ConfigError
from fedqc.label_sources.forest import ForestSettings, make_forest_labels
from fedqc.label_sources.segmenters import SegmenterSource, make_labels
from fedqc.label_sources.side_outputs import SideOutputSource
from fedqc.label_sources.snapshots import SnapshotSource
from fedqc.label_sources.store import LabelStore
from fedqc.task import Task

SEGMENTER_SOURCES: dict[str, type[SegmenterSource]] = {
    kind.name: kind for kind in (SnapshotSource, SideOutputSource)
}
"""Sources whose labels networks make; in a federation these are trained across the sites."""
VERSION = 1
"""To be raised whenever a source makes other labels from the same settings."""
FOREST = "forest"
"""The source whose segmenters cannot be averaged: every site grows its own."""


class CaseLabels:
    """The labels that a store holds of some cases, each read when it is drawn."""

    def __init__(self, store: LabelStore, cases: Sequence[Case]) -> None:
        self._store = store
        self._cases = cases
        self._counts = [len(store.of(case)) for case in cases]

    def count(self, case: int) -> int:
        """How many labels there are of the case at an index."""
        return self._counts[case]

    def read(self, case: int, index: int) -> NDArray[np.uint8]:
        """One of them, `[X, Y, Z]` class indices on the case's grid."""
        return self._store.read(self._cases[case], index)

    @property
    def total(self) -> int:
        """Labels of all cases."""
        return sum(self._counts)


def segmenter_source(name: str, task: Task, config: SourcesConfig) -> SegmenterSource:
    """A source whose labels networks make.

    Raises:
        ConfigError: there is no such source.
    """
    if name not in SEGMENTER_SOURCES:
        raise ConfigError(
            f"no networks make labels of kind {name!r}; those that do: {', '.join(SEGMENTER_SOURCES)}"
        )
    return SEGMENTER_SOURCES[name](task, config)


def label_store(folder: Path, source: str, task: Task, config: SourcesConfig, seed: int) -> LabelStore:
    """Where the labels of a source lie that were made for a task, with these settings and this seed."""
    settings = {"version": VERSION, "task": task.digest, "seed": seed, **config.model_dump(mode="json")}
    return LabelStore(folder, source, settings)


def stored_labels(
    folder: Path, cases: Sequence[Case], task: Task, config: QCConfig, seed: int
) -> dict[str, CaseLabels]:
    """What was made of the sources that have a share in training, by their name; some may hold nothing."""
    return {
        kind: CaseLabels(label_store(folder, kind, task, config.sources, seed), cases)
        for kind in stored_shares(config.samples)
    }


def make_stored_labels(
    folder: Path,
    cases: Sequence[Case],
    task: Task,
    config: QCConfig,
    *,
    seed: int,
    compute: Compute,
    kinds: Sequence[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> None:
    """Make the labels of all sources that have a share in training; what is there is not made again.

    It is, where the cases that its segmenters learned from have changed.

    Args:
        folder: the stores of all sources.
        cases: reference cases.
        task: what is segmented.
        config: with the shares of the sources, and how their segmenters are trained.
        seed: decides folds, segmenters and their training.
        compute: device and precision.
        kinds: only these sources; None: all that have a share.
        progress: told the source, and how much of it is done of how much.

    Raises:
        TrainingError: there are too few patients.
        DataError: the folder cannot be written.
    """
    for kind in stored_shares(config.samples) if kinds is None else kinds:
        store = label_store(folder, kind, task, config.sources, seed)

        def tell(done: int, total: int, kind: str = kind) -> None:
            if progress is not None:
                progress(kind, done, total)

        if kind == FOREST:
            settings = ForestSettings(trees=config.sources.trees, folds=config.sources.folds)
            make_forest_labels(cases, store, task.region_indices(), settings, seed, progress=tell)
        else:
            source = segmenter_source(kind, task, config.sources)
            make_labels(source, cases, store, seed=seed, compute=compute, progress=tell)
