"""What a QC method is, and how one is found by name."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.sources import Source
from fedqc.cases.volumes import Case
from fedqc.compute import Compute
from fedqc.config import FederationConfig, NetworkConfig, QCConfig
from fedqc.degradation.samples import ALL_KINDS, DrawnLabels, StoredLabels
from fedqc.errors import ConfigError, ProtocolError
from fedqc.methods.cross_fitting import fold_of, is_for_fitting
from fedqc.ratings import Rating
from fedqc.task import Task
from fedqc.training import Progress, TrainSettings
from fedqc.views import VIEWS

ERROR_FROM = 0.5
"""Probability from which an error map says that a voxel is wrong."""


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
    corrected: NDArray[np.uint8] | None = None
    """`[X, Y, Z]` class indices, what the label should be, on the case's grid, where the method tells."""
    stars: float | None = None
    """From 1 to 6, of methods that rate as people do."""
    views: dict[str, float] = field(default_factory=dict)
    """Stars of the axial, the coronal and the sagittal view."""
    interval: tuple[float, float] | None = None
    """Between which the true DSC is expected, of methods with several passes."""

    @property
    def figures(self) -> dict[str, float | None]:
        """All further numbers by the name that `Method.figures` has for them."""
        low, high = self.interval or (None, None)
        return {
            "qi": self.quality_indicator,
            "stars": self.stars,
            **{view: self.views.get(view) for view in VIEWS},
            "low": low,
            "high": high,
        }

    @property
    def quality_indicator(self) -> float | None:
        """Share of voxels that are not marked as wrong (QI, Zhang & Chung 2019, 2.3); None without a map.

        It estimates voxel accuracy, which is near 1 for any small structure: no quality to decide by.
        """
        return None if self.error_map is None else float(1 - (self.error_map >= ERROR_FROM).mean())


HOW_TO_OPTIMISE = ("learning_rate", "optimizer", "schedule", "weight_decay")
"""Keys of `[qc]` for `Method.settings`."""
FEWEST_REFERENCE_PATIENTS = 2
"""Where references are compared with one another: each is with those of other patients."""
LearnsFrom = Literal["references", "all", "rated"]
"""Reference cases; every valid case; cases that people have rated. None of them is held back for trials."""


@dataclass(frozen=True)
class Stage:
    """One network of a method, and how it is trained."""

    name: str
    rounds: int
    local_steps: int
    batch_size: int
    part: str = ""
    """The part of the method's network that is trained, a child of it; empty: the whole."""
    needs: tuple[str, ...] = ()
    """Other parts that it applies, as they are."""
    starts_from: str = ""
    """The part whose weights it begins with, once that is trained; empty: its own."""
    learns_from: LearnsFrom = "references"
    fold: int | None = None
    """Patients of this fold have no share in it (see `fedqc.methods.cross_fitting`)."""
    spares_fitting: bool = False
    """Whether patients on whose references something is fitted afterwards have no share in it."""
    needs_references: bool = False
    """Whether it compares with the site's own reference cases (`Method.references`) to learn."""

    def may_learn_from(self, case: CaseFiles, rated: Collection[str]) -> bool:
        """Whether a case that is there for training has a share in this stage.

        Args:
            case: one case.
            rated: ids of the cases that people have rated.
        """
        if self.fold is not None and fold_of(case.patient) == self.fold:
            return False
        if self.spares_fitting and is_for_fitting(case.patient):
            return False
        return self.learns_from != "rated" or case.id in rated


@dataclass(frozen=True)
class Known:
    """What a site knows of the cases it trains on, beside image and label."""

    labels: Mapping[str, StoredLabels] = field(default_factory=dict)
    """Labels of known quality that lie on disk, by their source (see `SamplesConfig`)."""
    ratings: Mapping[str, Sequence[Rating]] = field(default_factory=dict)
    """What people thought of a case's label, by the case's id."""
    kept: Path | None = None
    """Folder for what takes long to find out about cases, is the same in every round, and stays here."""


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
    stage: str = "qc"
    """Name of the stage that is trained."""


@dataclass(frozen=True)
class RoundResult:
    """What a site's round came to."""

    losses: dict[str, float]
    """Means over the steps."""
    samples: int
    """Training samples drawn (steps times batch size): the weight in federated averaging."""
    drawn: DrawnLabels | None = None
    """The labels of known quality that were trained on, where there are any."""
    patients: tuple[str, ...] = ()
    """Whose each sample was: the losses leave a site where enough patients stand behind them."""


class Method(ABC):
    """A QC method: a network, the stages in which it is trained, and how it scores.

    A method of one network has one stage. A method of several has a network whose children are its parts, and
    a stage for each part that is trained. Whatever is learned, fitted numbers too, is among the network's
    tensors, so that saving, loading and averaging need nothing else.

    Args:
        task: What is segmented.
        config: How the model is trained.

    Raises:
        ConfigError: task and configuration do not fit the method.
    """

    name: ClassVar[str]
    judges: ClassVar[Literal["label", "prediction"]]
    """Whether it judges the label it is given or only its own prediction; curation refuses the latter."""
    network_options: ClassVar[frozenset[str]] = frozenset()
    """Keys of `qc.network` that it has a use for; it refuses the others."""
    figures: ClassVar[tuple[str, ...]] = ("qi",)
    """Which of `Score.figures` it has."""
    needs_references: ClassVar[bool] = False
    """Whether it scores by comparison with reference cases, which then have to be at hand."""

    needs_initial: bool = False
    """Whether training has to begin with a trained network of the same method (`qc.initial`)."""
    own_settings: ClassVar[TrainSettings]
    """How `settings` optimises where the configuration does not say; methods without have no use for it."""
    references: Sequence[Case] = ()
    """The site's own reference cases, for methods and stages that need them; set before anything is done."""

    def __init__(self, task: Task, config: QCConfig) -> None:
        self.task = task
        self.config = config
        unknown = [kind for kind in config.leave_out if kind not in ALL_KINDS]
        if unknown:
            raise ConfigError(
                f"qc.leave_out names {', '.join(unknown)}; kinds of label error are {', '.join(ALL_KINDS)}"
            )
        self.kinds = [kind for kind in ALL_KINDS if kind not in config.leave_out]
        if useless := sorted(chosen_options(config.network) - self.network_options):
            raise ConfigError(
                f"qc.network.{useless[0]} is of no use to qc.method {self.name!r}, which takes "
                f"{', '.join(sorted(self.network_options)) or 'none of these keys'}; leave it out"
            )
        chosen = [name for name in HOW_TO_OPTIMISE if getattr(config, name) is not None]
        if chosen and not self.uses_settings:
            raise ConfigError(
                f"qc.{chosen[0]} is of no use to qc.method {self.name!r}, which trains nothing or as "
                "[qc.segmenter] says; leave it out"
            )

    @property
    def uses_settings(self) -> bool:
        """Whether anything is optimised as `settings` says."""
        return hasattr(self, "own_settings")

    def scored_regions(self) -> dict[str, tuple[int, ...]]:
        """What is scored: the class indices of each region by its name; the task's regions."""
        return dict(zip(self.task.regions, self.task.region_indices(), strict=True))

    def stages(self) -> tuple[Stage, ...]:
        """What is trained, in this order; none where nothing is."""
        config = self.config
        return (Stage("qc", config.rounds, config.local_steps, config.batch_size),)

    def stage(self, name: str) -> Stage:
        """One of the stages.

        Raises:
            ProtocolError: there is none of that name.
        """
        known = {stage.name: stage for stage in self.stages()}
        if name not in known:
            raise ProtocolError(
                f"method {self.name!r} has no stage {name!r}; it has {', '.join(known) or 'none at all'}"
            )
        return known[name]

    def settings(self, plan: RoundPlan) -> TrainSettings:
        """How a round is optimised: what the configuration says, and else the method's own."""
        named = {name: getattr(self.config, name) for name in HOW_TO_OPTIMISE}
        chosen = {name: value for name, value in named.items() if value is not None}
        return replace(
            self.own_settings,
            total_steps=plan.rounds * plan.steps,
            first_step=(plan.round - 1) * plan.steps,
            proximal=plan.proximal,
            **chosen,
        )

    @abstractmethod
    def build(self, seed: int) -> nn.Module:
        """The untrained network, on the CPU, the same for the same seed."""

    def initial_state(self, trained: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors to begin training with, where it begins with a trained network of the same method."""
        return trained

    @abstractmethod
    def train_round(
        self,
        network: nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        progress: Progress | None = None,
        *,
        known: Known | None = None,
    ) -> RoundResult:
        """Train one stage of the network in place on one site's cases.

        Args:
            network: as `build` makes it, with the weights of earlier stages.
            cases: those that the stage learns from.
            plan: the round, its stage, and what part of it this is.
            compute: device and precision.
            progress: told after every step.
            known: what else the site knows of the cases.
        """

    def fit(  # noqa: B027 - most methods have nothing to fit
        self,
        network: nn.Module,
        cases: Sequence[Case],
        compute: Compute,
        rng: np.random.Generator,
        progress: Progress | None = None,
    ) -> None:
        """Fit what is no weight of a stage, such as a calibration, in place; each site does so for itself.

        Args:
            network: trained.
            cases: reference cases that stages may have learned from.
            compute: device and precision.
            rng: draws what is drawn.
            progress: told how far it is.
        """

    @abstractmethod
    def score(
        self, network: nn.Module, cases: Iterable[Case], compute: Compute, batch_size: int = 8
    ) -> Iterator[Score]:
        """Judge the label of each case, in order."""

    def cannot_judge(self, files: CaseFiles) -> str | None:
        """Why a case cannot be judged, whatever its label is, as a sentence; None where it can be."""
        return None

    def score_sources(
        self, network: nn.Module, images: Sequence[Source], label: Source, compute: Compute
    ) -> Score | None:
        """Judge a label straight from its files or arrays, where a method needs no prepared case for it.

        Args:
            network: as `build` makes it.
            images: one for each modality of the task, or one that holds all of them.
            label: the label.
            compute: device and precision.

        Returns:
            What `score` would say of the prepared case, without an id. None where it has to be prepared:
            always, unless a method knows better, and where anything is wrong with it, for preparing it says
            what.
        """
        return None


def chosen_options(network: NetworkConfig) -> frozenset[str]:
    """The keys of `qc.network` that are not as they are where nobody sets them."""
    default = NetworkConfig().model_dump()
    return frozenset(name for name, value in network.model_dump().items() if value != default[name])


def has_too_few_references(method: Method, patients: Collection[str]) -> bool:
    """Whether a method scores by comparison with reference cases, and those of these patients are too few."""
    return method.needs_references and len(patients) < FEWEST_REFERENCE_PATIENTS


def with_own_settings(config: QCConfig) -> QCConfig:
    """A configuration that does not say how to optimise."""
    return config.model_copy(update=dict.fromkeys(HOW_TO_OPTIMISE))


def part_of(network: nn.Module, part: str) -> nn.Module:
    """A part of a method's network, or all of it for the empty name."""
    return network.get_submodule(part) if part else network


def begin_stage(network: nn.Module, stage: Stage) -> None:
    """Give a stage's part the weights that it begins with, where those are another part's."""
    if stage.starts_from:
        part_of(network, stage.part).load_state_dict(part_of(network, stage.starts_from).state_dict())


def check_start(method: Method) -> None:
    """Refuse a training that has to begin with a trained network and names none.

    Raises:
        ConfigError: it does.
    """
    if method.needs_initial and method.config.initial is None:
        raise ConfigError(
            f"qc.method {method.name!r} as it is set up learns from a trained network of its own kind; name "
            "one as qc.initial"
        )


def method_for_curation(config: FederationConfig, task: Task) -> Method:
    """The QC method of a federation.

    Raises:
        ConfigError: it cannot judge annotations, does not fit the task, or has not what the rule goes by.
    """
    kind = get_method(config.qc.method)
    if kind.judges != "label":
        raise ConfigError(
            f"qc.method {config.qc.method!r} judges its own prediction and never looks at the annotation; "
            "curation needs a method that judges the label"
        )
    if config.curation.rule == "stars" and "stars" not in kind.figures:
        raise ConfigError(
            f"curation.rule 'stars' goes by stars, which qc.method {config.qc.method!r} does not give; use "
            "rule 'threshold', or qc.method 'dqe'"
        )
    return kind(task, config.qc)


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
