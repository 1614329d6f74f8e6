"""What the sources have in common whose labels are made by networks that are trained for it.

A source has one or more networks (`variants`). Patients are dealt into folds; each network is trained once
for every fold, on all cases but the fold's, and then segments these: a label is always made by a network that
saw neither the case nor its patient, or its quality would be overestimated. The same functions serve one
machine (`make_labels`) and a site in a federation, where a round's network comes from the coordinator.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import SourcesConfig
from fedqc.errors import ConfigError
from fedqc.label_sources.folds import learned_from, out_of_fold
from fedqc.label_sources.store import LEARNED_FROM, LabelStore
from fedqc.methods.base import RoundPlan, RoundResult
from fedqc.task import Task
from fedqc.training import Progress

MadeLabels = list[tuple[Mapping[str, Any], NDArray[np.uint8]]]
"""Recipe and label `[X, Y, Z]` of each label of a case."""


class SegmenterSource(ABC):
    """Networks that are trained to make labels of all qualities.

    Args:
        task: What is segmented.
        config: How they are trained.
    """

    name: ClassVar[str]
    own_rate: ClassVar[float]
    """Learning rate where the configuration does not say."""

    def __init__(self, task: Task, config: SourcesConfig) -> None:
        self.task = task
        self.config = config

    @property
    def learning_rate(self) -> float:
        """The highest in training."""
        return self.own_rate if self.config.learning_rate is None else self.config.learning_rate

    @property
    @abstractmethod
    def variants(self) -> tuple[str, ...]:
        """Names of the networks."""

    def checked(self, variant: str) -> str:
        """The name of a network, which must be one of the source's.

        Raises:
            ConfigError: it is none.
        """
        if variant not in self.variants:
            raise ConfigError(
                f"source {self.name!r} has no network {variant!r}; it has {', '.join(self.variants)}"
            )
        return variant

    @abstractmethod
    def build(self, variant: str, seed: int) -> nn.Module:
        """An untrained network, on the CPU, the same for the same seed."""

    @abstractmethod
    def train_round(
        self,
        variant: str,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        *,
        progress: Progress | None = None,
    ) -> RoundResult:
        """One round of local steps on the labels as they are, in place."""

    @abstractmethod
    def is_kept(self, round_number: int, rounds: int) -> bool:
        """Whether labels are made with a network as it is after this round (counted from 1)."""

    @abstractmethod
    def segment(self, variant: str, network: nn.Module, case: Case, compute: Compute) -> MadeLabels:
        """The labels that a network makes of a case."""

    def round(
        self,
        variant: str,
        network: nn.Module,
        cases: Sequence[Case],
        *,
        fold: int,
        plan: RoundPlan,
        compute: Compute,
        store: LabelStore,
        progress: Progress | None = None,
    ) -> RoundResult:
        """Train a fold's network for one round, and where its labels are kept, segment the fold with it.

        Raises:
            TrainingError: no case is left to train on.
        """
        training, unseen = out_of_fold(cases, fold, plan.seed, self.config.folds)
        result = self.train_round(variant, network, training, plan, compute, progress=progress)
        if self.is_kept(plan.round, plan.rounds):
            common = {"variant": variant, "fold": fold, "round": plan.round}
            common |= {LEARNED_FROM: learned_from(training)}
            for case in unseen:
                made = self.segment(variant, network, case, compute)
                labels = [({**common, **recipe}, label) for recipe, label in made]
                store.add(case, labels, self.task.region_indices())
        return result

    def plan(self, seed: int, site: str, round_number: int) -> RoundPlan:
        """The plan of one round."""
        config = self.config
        return RoundPlan(seed, site, round_number, config.rounds, config.local_steps, config.batch_size)


def make_labels(
    source: SegmenterSource,
    cases: Sequence[Case],
    store: LabelStore,
    *,
    seed: int,
    compute: Compute,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Make all labels of a source on one machine; a network whose labels are all there is not trained again.

    Labels whose network learned from other cases, or from other labels of theirs, are made again.

    Args:
        source: makes the labels.
        cases: reference cases.
        store: where the labels go.
        seed: decides the folds, the networks and their training.
        compute: device and precision.
        progress: told of rounds done and rounds in all.

    Raises:
        TrainingError: there are too few patients for the folds.
    """
    config = source.config
    total = config.folds * len(source.variants) * config.rounds
    done = 0
    for fold in range(config.folds):
        training, unseen = out_of_fold(cases, fold, seed, config.folds)
        of = learned_from(training)
        for variant in source.variants:
            done += config.rounds
            if _is_complete(source, store, unseen, variant, of):
                continue
            network = source.build(variant, seed)
            for number in range(1, config.rounds + 1):
                plan = source.plan(seed, f"{variant}-{fold}", number)
                source.round(variant, network, cases, fold=fold, plan=plan, compute=compute, store=store)
                if progress is not None:
                    progress(done - config.rounds + number, total)


def _is_complete(
    source: SegmenterSource, store: LabelStore, cases: Sequence[Case], variant: str, of: str
) -> bool:
    """Whether each case has a label of every kept round, of this network, which learned from these cases."""
    rounds = source.config.rounds
    wanted = {number for number in range(1, rounds + 1) if source.is_kept(number, rounds)}

    def there(case: Case) -> set[int]:
        recipes = (label.recipe for label in store.of(case))
        return {
            recipe["round"]
            for recipe in recipes
            if (recipe["variant"], recipe.get(LEARNED_FROM)) == (variant, of)
        }

    return all(wanted <= there(case) for case in cases)
