"""What a QC method is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import QCConfig
from fedqc.degradation.samples import DrawnLabels, StoredLabels
from fedqc.errors import ConfigError
from fedqc.task import Task
from fedqc.training import Progress


@dataclass(frozen=True)
class Score:
    """What a method says of one image-label pair."""

    case_id: str
    quality: float
    """In [0, 1]; lower is worse."""
    regions: dict[str, float]
    """Quality of each region, in [0, 1]."""
    error_map: NDArray[np.float32] | None = None
    """`[X, Y, Z]` probability that the label is wrong, on the case's grid."""
    class_error_maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    """By class, `[X, Y, Z]` probability that its mask is wrong, where the method tells classes apart."""

    @property
    def quality_indicator(self) -> float | None:
        """Share of voxels that are not marked as wrong (QI, Zhang & Chung 2019, 2.3); None without a map.

        It estimates voxel accuracy, which is near 1 for any small structure: no quality to decide by.
        """
        return None if self.error_map is None else float(1 - (self.error_map >= 0.5).mean())


@dataclass(frozen=True)
class RoundPlan:
    """One site's share of one round of training."""

    seed: int
    site: str
    round: int
    """Counted from 1."""
    rounds: int
    steps: int
    batch_size: int
    proximal: float = 0.0
    """How strongly the network is held to where it starts from (FedProx's mu)."""


@dataclass(frozen=True)
class RoundResult:
    """What a site's round came to."""

    losses: dict[str, float]
    """Means over the steps."""
    samples: int
    """Training samples drawn (steps times batch size): the weight in federated averaging."""
    drawn: DrawnLabels | None = None
    """The labels of known quality that were trained on, where there are any."""


class Method(ABC):
    """A QC method: a network, how it is trained, and how it scores.

    Args:
        task: What is segmented.
        config: How the model is trained.

    Raises:
        ConfigError: task and configuration do not fit the method.
    """

    name: ClassVar[str]
    judges: ClassVar[Literal["label", "prediction"]]
    """Whether it judges the label it is given or only its own prediction; curation refuses the latter."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.task = task
        self.config = config

    def scored_regions(self) -> dict[str, tuple[int, ...]]:
        """What is scored: the class indices of each region by its name; the task's regions."""
        return dict(zip(self.task.regions, self.task.region_indices(), strict=True))

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The untrained network, on the CPU, the same for the same seed."""

    @abstractmethod
    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        stored: Mapping[str, StoredLabels] | None = None,
    ) -> RoundResult:
        """Train the network in place on one site's reference cases.

        Args:
            network: as `build` makes it.
            cases: the reference cases.
            plan: the round, and what part of it this is.
            compute: device and precision.
            progress: told after every step.
            stored: labels of the cases that lie on disk, by their source (see `SamplesConfig`).
        """

    @abstractmethod
    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        """Judge the label of each case, in order."""


def get_method(name: str) -> type[Method]:
    """A method by its name in the entry-point group `fedqc.methods`.

    Raises:
        ConfigError: there is no such method.
    """
    known = {point.name: point for point in entry_points(group="fedqc.methods")}
    if name not in known:
        raise ConfigError(f"qc.method {name!r} is unknown; installed: {', '.join(sorted(known))}")
    method: type[Method] = known[name].load()
    return method
