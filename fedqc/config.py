"""The two TOML files people write: `site.toml` at a hospital, `federation.toml` at the coordinator.

Both are read into frozen models. Whatever is wrong with a file (syntax, an unknown key, a value out of range)
becomes one `ConfigError` that names the file, the key, what was found and what is allowed.
"""

import ipaddress
import re
import tomllib
from datetime import time
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fedqc.errors import ConfigError, did_you_mean

SITE_NAME = r"^[a-z0-9][a-z0-9-]{0,62}$"
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,251}[A-Za-z0-9])?|\[[0-9A-Fa-f:.]{2,45}\]"
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class FrozenModel(BaseModel):
    """A model that refuses unknown keys and cannot be changed."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _seconds(value: object) -> object:
    """'90s', '30m', '2h' or '1d' as seconds; numbers pass."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", value.strip())
        if match is None:
            msg = "a duration is a number and a unit, such as '90s', '30m', '2h' or '1d'"
            raise ValueError(msg)
        return float(match[1]) * _DURATION_UNITS[match[2]]
    return value


def _site_name(name: str) -> str:
    """Refuse a name that cannot be a folder, a key file and a host name alike."""
    if re.fullmatch(SITE_NAME.removeprefix("^").removesuffix("$"), name) is None:
        msg = "a site's name is up to 63 lower-case letters, digits and hyphens, the first no hyphen"
        raise ValueError(msg)
    return name


def _federation_name(name: str) -> str:
    """Refuse a name that cannot be part of a file's name."""
    if re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name) is None:
        msg = (
            "a federation's name is up to 63 letters, digits, dots, hyphens and underscores, "
            "the first a letter or digit"
        )
        raise ValueError(msg)
    return name


def _device(device: str) -> str:
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", device) is None:
        msg = "a device is 'auto', 'cpu', 'cuda' or one GPU of several, such as 'cuda:1'"
        raise ValueError(msg)
    return device


def _address(address: str) -> str:
    match = re.fullmatch(rf"(?:{_HOST}):([0-9]{{1,5}})", address)
    if match is None or not 1 <= int(match[1]) <= 65535:
        msg = "an address is a host and a port from 1 to 65535, such as 'fl.example.org:443', and no more"
        raise ValueError(msg)
    return address


def _hours(value: object) -> object:
    """'20:00-06:00' as two times."""
    if isinstance(value, str):
        match = re.fullmatch(r"(\d{1,2}:\d{2})\s*-\s*(\d{1,2}:\d{2})", value.strip())
        try:
            begin, end = (time.fromisoformat(part.zfill(5)) for part in (match.groups() if match else ()))
        except ValueError:
            msg = "hours are two times of the day with a hyphen, such as '20:00-06:00'"
            raise ValueError(msg) from None
        return begin, end
    return value


Seconds = Annotated[float, BeforeValidator(_seconds), Field(gt=0)]
SiteName = Annotated[str, AfterValidator(_site_name)]
FederationName = Annotated[str, AfterValidator(_federation_name)]
Share = Annotated[float, Field(ge=0, le=1)]
Voxels = Annotated[int, Field(ge=8)]


# ---------------------------------------------------------------------------------------------- site.toml


class DataConfig(FrozenModel):
    """Where a site's cases are. Relative paths are relative to the file."""

    path: Path
    layout: str | None = None
    reference: Path | None = None
    """A table with a column `id`: the cases whose label the site vouches for."""
    ratings: Path | None = None
    """A table with the columns `id`, `rater`, `view` and `stars`: what people thought of labels."""

    @property
    def folder(self) -> Path:
        """The folder that holds the data, where `path` may be a table."""
        return self.path.parent if self.path.is_file() else self.path


class ComputeConfig(FrozenModel):
    """How a site computes."""

    device: Annotated[str, AfterValidator(_device)] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    memory: float | None = Field(default=None, gt=0)
    """The most that fedqc may take of a GPU's memory, in GiB; left out: all of it."""
    workers: int = Field(default=2, ge=1)
    cache: Path = Path("cache")


class PolicyConfig(FrozenModel):
    """What a site allows."""

    min_count: int = Field(default=10, ge=1)
    segmentation: bool = True
    """Whether the site takes part in segmentation training."""
    refuse: tuple[Literal["summarise", "cross-check", "training", "calibrate", "score"], ...] = ()
    """Further phases that the site takes no part in."""
    largest_model: int = Field(default=200_000_000, ge=1)
    """Numbers in the largest network that the site trains or applies."""
    hours: Annotated[tuple[time, time] | None, BeforeValidator(_hours)] = None
    """When the site computes with networks, on its own clock; left out: always."""
    sheet: bool = True
    """Whether a sheet with slices of the worst cases is written into the results when cases are scored."""


class CoordinatorConfig(FrozenModel):
    """Where the coordinator is, and what the two know each other by."""

    address: Annotated[str, AfterValidator(_address)] | None = None
    """Host and port."""
    ca: Path | None = None
    """Certificate of the authority that vouches for the coordinator."""
    key: Path | None = None
    """The site's own private key."""


class SiteConfig(FrozenModel):
    """`site.toml`: one hospital."""

    name: SiteName
    task: str
    data: DataConfig
    results: Path = Path("results")
    compute: ComputeConfig = ComputeConfig()
    policy: PolicyConfig = PolicyConfig()
    coordinator: CoordinatorConfig = CoordinatorConfig()


# ---------------------------------------------------------------------------------------- federation.toml


class SitesConfig(FrozenModel):
    """The roster: who takes part and how many are needed."""

    expected: tuple[SiteName, ...] = ()
    minimum: int = Field(default=2, ge=1)
    wait: Seconds = 1800.0
    keys: Path = Path("keys")
    """Folder of the sites' public keys, NAME.pub each."""

    @model_validator(mode="after")
    def _no_site_twice(self) -> Self:
        twice = sorted({name for name in self.expected if self.expected.count(name) > 1})
        if twice:
            msg = f"site named twice: {', '.join(twice)}; every site has a name of its own"
            raise ValueError(msg)
        return self


class SamplesConfig(FrozenModel):
    """Shares of the sources of QC samples; they are normalised to one."""

    seggen: float = Field(default=0.3, ge=0)
    annotator: float = Field(default=0.6, ge=0)
    untouched: float = Field(default=0.1, ge=0)
    snapshots: float = Field(default=0.0, ge=0)
    """Of labels that a segmenter makes as it learns (Qiu et al. 2023)."""
    forest: float = Field(default=0.0, ge=0)
    """Of labels that a random forest makes, read at ten depths (Robinson et al. 2018)."""
    side_outputs: float = Field(default=0.0, ge=0)
    """Of labels that the heads of two VoxResNets make (Zhang & Chung 2019)."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if sum(self.model_dump().values()) <= 0:
            msg = "all shares are 0; at least one source of samples must have a share above 0"
            raise ValueError(msg)
        return self


class SourcesConfig(FrozenModel):
    """How the segmenters are trained that make labels for QC training, for sources with a share."""

    folds: int = Field(default=2, ge=2, le=10)
    """Parts of the patients; a case is only segmented by what was trained on the other parts."""
    rounds: int = Field(default=8, ge=1)
    """Rounds of training of each network; `snapshots` makes a label after each."""
    local_steps: int = Field(default=25, ge=1)
    batch_size: int = Field(default=2, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    """The highest of the networks; left out, the source's own."""
    width: int = Field(default=64, ge=4, le=1024, multiple_of=2)
    """Channels of the VoxResNets of `side-outputs`."""
    trees: int = Field(default=50, ge=1, le=1000)
    """Trees of `forest`; 350 in the paper."""


class NetworkConfig(FrozenModel):
    """The network of the QC method, which refuses keys that it has no use for.

    Sizes that are left out are the architecture's own.
    """

    architecture: Literal["corrective", "published"] = "corrective"
    """Of `qcresunet` and `voxresnet`."""
    width: int | None = Field(default=None, ge=4, le=1024, multiple_of=2)
    """Channels of the first layer: 16 (corrective `qcresunet`, `dice-regression`), 32 (`unet`, `qcresunet` in
    its journal version) or 64 (published `qcresunet`, all others)."""
    blocks: tuple[Annotated[int, Field(ge=1, le=100)], ...] | None = Field(
        default=None, min_length=2, max_length=8
    )
    """Residual blocks of each layer, (1, 2, 3) (corrective) or (3, 4, 6, 3) (published, ResNets)."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    attention: bool = False
    """Channel attention and error maps joined with the label, as in `qcresunet`'s journal version."""
    error_maps: Literal["binary", "classes"] = "binary"
    """One error map for the label (`qcresunet`'s default), or one for the mask of each class."""
    patch: tuple[Voxels, Voxels, Voxels] | None = None
    """Voxels of the patches on which `voxresnet` is trained; a smaller volume is taken whole."""

    @model_validator(mode="after")
    def _deep_enough(self) -> Self:
        if self.architecture == "published" and self.blocks is not None and len(self.blocks) < 3:
            msg = f"the published network has three layers or more; blocks names {len(self.blocks)}"
            raise ValueError(msg)
        return self


class SegmenterConfig(FrozenModel):
    """The segmenters of methods that compare a label with what segmenters make of the image.

    They are trained in two folds on all valid cases (cross-fitting).
    """

    rounds: int | None = Field(default=None, ge=1)
    """Of each fold's segmenter; left out: half of `qc.rounds`, as there are two folds."""
    local_steps: int | None = Field(default=None, ge=1)
    """Left out: as `qc.local_steps`."""
    batch_size: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    channels: tuple[Annotated[int, Field(ge=4, le=2048)], ...] = Field(
        default=(8, 16, 32, 64), min_length=2, max_length=8
    )
    """Channels of each level of the U-Net; every further level halves the volume."""
    dropout: float = Field(default=0.2, ge=0, lt=1)
    """Share of the features that are left out, in use too (Monte-Carlo dropout)."""
    passes: int = Field(default=20, ge=1, le=200)
    """How often a case is segmented, each time with other features left out (N in Williams et al.)."""
    snapshots: int | None = Field(default=None, ge=1, le=10)
    """Segmenters of each fold of `ensemble`: the trained one, and further ones of half as many rounds."""


class ReconstructionConfig(FrozenModel):
    """The networks that give back an image from which what a label marks was cut out.

    They are trained as `[qc.segmenter]` says.
    """

    modalities: tuple[str, ...] = ()
    """Which of the task's they are given and give back; left out: all."""


class RegressionConfig(FrozenModel):
    """What method `dice-regression` sees beside the label."""

    input: Literal["image", "uncertainty", "error"] = "uncertainty"
    """The image; the entropy of segmenters; or where reconstructions without what the label marks differ."""


class CombineConfig(FrozenModel):
    """Of `combine`."""

    methods: tuple[str, ...] = Field(default=("qcresunet", "expected-dice"), min_length=2, max_length=8)
    """Whose scores are joined."""

    @model_validator(mode="after")
    def _no_method_twice(self) -> Self:
        if len(set(self.methods)) < len(self.methods) or "combine" in self.methods:
            msg = f"names methods twice, or itself: {', '.join(self.methods)}; name different methods"
            raise ValueError(msg)
        return self


class RCAConfig(FrozenModel):
    """Of method `rca`, which compares a label with those of the site's reference cases."""

    form: Literal["features", "registration"] = "features"
    """How the label is brought onto a reference: by what voxels look like, or by registering the images."""
    references: int = Field(default=20, ge=1)
    """How many a label is compared with: those whose images are most similar."""
    seconds: Seconds | None = 60.0
    """After which a label is compared with no further reference; one at least is. What is done of a reference
    once for all labels does not count."""
    calibration: int = Field(default=20, ge=0)
    """Reference cases whose labels are spoiled to learn what an estimate means; 0: it is taken as it is."""
    voxels: int = Field(default=6000, ge=100)
    """Form `features`: voxels drawn of each case."""
    position: float | None = Field(default=None, ge=0)
    """Form `features`: weight of a voxel's place; left out: the less references vary in it, the more."""
    threads: int = Field(default=1, ge=1)
    """Form `registration`: threads of SimpleITK."""


class DQEConfig(FrozenModel):
    """Of `dqe`, which rates slices with stars (Kofler et al. 2022); the defaults are the paper's best row."""

    architecture: Literal["densenet121", "densenet201"] = "densenet121"
    normalisation: Literal["percentile", "min-max"] = "percentile"
    """Intensities to [0, 1]: from the 0.5th to the 99.5th percentile of a view, or between a slice's ends."""
    encoding: Literal["regions", "tissue"] = "regions"
    """A mask for each region of the task, or for each class."""
    side: int | None = Field(default=None, ge=32, le=512)
    """Of the square slices, in voxels; left out: 240, or for a small task a multiple of 32 that holds it."""
    targets: Literal["ratings", "distilled"] = "ratings"
    """What is learned: the site's ratings, or what a trained model (`initial`) says of untouched labels."""
    batch_size: int = Field(default=80, ge=2)
    """Slices of a batch."""


class QCConfig(FrozenModel):
    """How the QC model is trained."""

    method: str = "qcresunet"
    rounds: int = Field(default=20, ge=1)
    local_steps: int = Field(default=50, ge=1)
    batch_size: int = Field(default=4, ge=1)
    learning_rate: float | None = Field(default=None, gt=0)
    """The highest; this and the next three are the method's own where they are left out."""
    optimizer: Literal["adam", "adamw", "sgd", "ranger21"] | None = None
    schedule: Literal["cosine", "exponential", "constant"] | None = None
    weight_decay: float | None = Field(default=None, ge=0)
    error_weight: float = Field(default=1.0, ge=0)
    """Weight of the error map's losses beside the quality's (lambda in Qiu et al. 2023, eq. 3)."""
    deadline: Seconds = 7200.0
    cross_check_rounds: int = Field(default=6, ge=0)
    """Rounds that each half of the sites trains to check the other half's references; 0: no check."""
    initial: Path | None = None
    network: NetworkConfig = NetworkConfig()
    samples: SamplesConfig = SamplesConfig()
    sources: SourcesConfig = SourcesConfig()
    segmenter: SegmenterConfig = SegmenterConfig()
    reconstruction: ReconstructionConfig = ReconstructionConfig()
    regression: RegressionConfig = RegressionConfig()
    combine: CombineConfig = CombineConfig()
    rca: RCAConfig = RCAConfig()
    dqe: DQEConfig = DQEConfig()
    leave_out: tuple[str, ...] = ()
    """Kinds of annotator error never used in training (a simulation's unseen kinds)."""
    balance: Literal["quantile", "histogram", "none"] = "quantile"


class AveragingConfig(FrozenModel):
    """How updates become the next global model."""

    strategy: Literal["fedavg", "fedprox", "fedadam", "trimmed-mean", "median"] = "fedavg"
    norm_factor: float = Field(default=10.0, gt=1)
    """An update is refused when its L2 norm is more than this many times the round's median."""
    transfer: Literal["fp32", "fp16"] = "fp32"
    """How weights travel; fp16 halves the bytes, and the coordinator still averages in float64."""
    proximal: float = Field(default=0.01, gt=0)
    """FedProx: how strongly a site's training is held to the model it started from (mu)."""
    learning_rate: float = Field(default=0.01, gt=0)
    """FedAdam: of the server's Adam (eta)."""
    momentum: float = Field(default=0.9, ge=0, lt=1)
    """FedAdam: share of the mean that stays from the rounds before (beta 1)."""
    second_momentum: float = Field(default=0.99, ge=0, lt=1)
    """FedAdam: share of the mean square that stays (beta 2)."""
    adaptivity: float = Field(default=1e-3, gt=0)
    """FedAdam: the larger, the less steps adapt to each weight (tau)."""
    trim: float = Field(default=0.2, gt=0, lt=0.5)
    """Trimmed mean: share of the sites that is left out at each end; one at least, of three or more."""

    @model_validator(mode="after")
    def _only_what_the_strategy_uses(self) -> Self:
        own = {
            "proximal": "fedprox",
            **dict.fromkeys(("learning_rate", "momentum", "second_momentum", "adaptivity"), "fedadam"),
            "trim": "trimmed-mean",
        }
        for key, strategy in own.items():
            is_changed = getattr(self, key) != type(self).model_fields[key].default
            if is_changed and strategy != self.strategy:
                msg = f"{key} is for strategy {strategy!r}, the strategy is {self.strategy!r}; leave it out"
                raise ValueError(msg)
        return self


class CurationConfig(FrozenModel):
    """How scores become decisions."""

    rule: Literal["threshold", "stars", "target", "conformal", "quantile", "weights"] = "threshold"
    threshold: Share = 0.75
    """A true DSC below it is a failure; rules `threshold` and `weights` drop a predicted DSC below it."""
    review: Share = 0.0
    """Width of the band above the bound that a person has to look at; it counts as dropped until then."""
    stars: float = Field(default=4.0, ge=1, le=6)
    """Rule `stars`: the fewest that are not dropped."""
    target: Literal["recall", "precision"] = "recall"
    """Rule `target`: of finding failures among labels of known quality, what has to reach `level`."""
    level: float = Field(default=0.95, gt=0, le=1)
    alpha: float = Field(default=0.1, gt=0, lt=1)
    """Rule `conformal`: the largest share of failures among what is kept, on average."""
    pooled: bool = True
    """Rules `target` and `conformal`: labels of known quality of all sites; else each site's own only."""
    share: Share = 0.1
    """Rule `quantile`: the share of each site's candidates that is dropped."""
    most_dropped: Share = 0.5
    """The largest share of a site that is dropped without being looked at; the rest is left to a person."""
    max_mae: Share = 0.3
    """A site on whose own labels of known quality the model errs by more on average keeps all candidates."""
    min_auroc: Share = 0.75
    """So does one where the model finds failures among them with a lower AUROC."""

    @model_validator(mode="after")
    def _only_what_the_rule_uses(self) -> Self:
        own: dict[str, tuple[str, ...]] = {
            "review": ("threshold", "stars", "target"),
            "stars": ("stars",),
            **dict.fromkeys(("target", "level"), ("target",)),
            "alpha": ("conformal",),
            "pooled": ("target", "conformal"),
            "share": ("quantile",),
        }
        for key, rules in own.items():
            if getattr(self, key) != type(self).model_fields[key].default and self.rule not in rules:
                msg = f"{key} is for rule {' or '.join(rules)}, the rule is {self.rule!r}; leave it out"
                raise ValueError(msg)
        return self

    @model_validator(mode="after")
    def _keeps_something(self) -> Self:
        key, lowest, most = (
            ("stars", self.stars, 6.0) if self.rule == "stars" else ("threshold", self.threshold, 1.0)
        )
        total = round(lowest + self.review, 9)
        if self.rule in {"threshold", "stars"} and total > most:
            msg = (
                f"{key} {lowest} and review {self.review} add up to {total}, so no case could be "
                f"kept; make review {round(most - lowest, 6)} or less"
            )
            raise ValueError(msg)
        if self.rule == "target" and self.target == "precision" and self.level <= 0.5:
            msg = f"level {self.level}: half of all labels count as failures, so a precision is above 0.5"
            raise ValueError(msg)
        if self.rule == "weights" and self.threshold == 1:
            msg = "threshold 1: with rule 'weights' no case could be kept; make it lower"
            raise ValueError(msg)
        return self


class SegmentationConfig(FrozenModel):
    """How the segmentation model is trained, on what each site kept."""

    rounds: int = Field(default=10, ge=1)
    local_steps: int = Field(default=50, ge=1)
    batch_size: int = Field(default=2, ge=1)
    learning_rate: float = Field(default=3e-3, gt=0)
    deadline: Seconds = 7200.0
    channels: tuple[Annotated[int, Field(ge=4, le=2048)], ...] = Field(
        default=(16, 32, 64), min_length=2, max_length=8
    )
    """Channels of each level of the U-Net; every further level halves the volume."""
    references: bool = False
    """Whether the site's reference cases for training take part too."""


class PrivacyConfig(FrozenModel):
    """What the federation demands of what leaves a site."""

    min_count: int = Field(default=10, ge=1)
    update_clip: float | None = Field(default=None, gt=0)
    """Largest L2 norm of what an update changes; a larger one is scaled down at the site."""
    update_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise on every number of an update, as a multiple of `update_clip`."""

    @model_validator(mode="after")
    def _noise_needs_a_bound(self) -> Self:
        if self.update_noise and self.update_clip is None:
            msg = "update_noise is a multiple of update_clip; name both"
            raise ValueError(msg)
        return self


class ServerConfig(FrozenModel):
    """Where the coordinator listens, and what stands in front of it."""

    address: Annotated[str, AfterValidator(_address)] = "127.0.0.1:8443"
    """Host and port that sites reach; 0.0.0.0 is every address of this machine."""
    gateway: Literal["nginx", "external", "none"] = "nginx"
    """nginx: started here; external: an administrator runs it; none: only on a loopback address."""
    certificate: Path | None = None
    """What sites are shown, with all that vouches for it but their own authority (PEM)."""
    key: Path | None = None
    """Private key of the certificate."""

    @property
    def host(self) -> str:
        """The host of the address, without the brackets of an IPv6 one."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port of the address."""
        return int(self.address.rpartition(":")[2])

    @property
    def is_loopback(self) -> bool:
        """Whether nobody but this machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @model_validator(mode="after")
    def _is_guarded(self) -> Self:
        if self.gateway == "none" and not self.is_loopback:
            msg = (
                f"gateway 'none' with the address {self.address}: Flower's server lets anyone who reaches it "
                "run code at every site, so without a gateway it may only listen on 127.0.0.1"
            )
            raise ValueError(msg)
        if (self.certificate is None) != (self.key is None):
            msg = "certificate and key belong together; name both"
            raise ValueError(msg)
        return self


class FederationConfig(FrozenModel):
    """`federation.toml`: one consortium and its run."""

    name: FederationName = "federation"
    task: str
    sites: SitesConfig = SitesConfig()
    qc: QCConfig = QCConfig()
    averaging: AveragingConfig = AveragingConfig()
    curation: CurationConfig = CurationConfig()
    segmentation: SegmentationConfig = SegmentationConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    server: ServerConfig = ServerConfig()


# ------------------------------------------------------------------------------------------------ reading

Model = TypeVar("Model", bound=FrozenModel)


def load_site(path: Path) -> SiteConfig:
    """Read a `site.toml`; its relative paths become absolute, seen from the file's folder."""
    site = read_toml(path, SiteConfig)
    here = path.resolve().parent
    return site.model_copy(
        update={
            "task": _task(here, site.task),
            "data": _with_absolute(here, site.data, "path", "reference", "ratings"),
            "results": _absolute(here, site.results),
            "compute": _with_absolute(here, site.compute, "cache"),
            "coordinator": _with_absolute(here, site.coordinator, "ca", "key"),
        }
    )


def load_federation(path: Path) -> FederationConfig:
    """Read a `federation.toml`; its relative paths become absolute, seen from the file's folder."""
    federation = read_toml(path, FederationConfig)
    here = path.resolve().parent
    return federation.model_copy(
        update={
            "task": _task(here, federation.task),
            "sites": _with_absolute(here, federation.sites, "keys"),
            "qc": _with_absolute(here, federation.qc, "initial"),
            "server": _with_absolute(here, federation.server, "certificate", "key"),
        }
    )


def _with_absolute(here: Path, table: Model, *keys: str) -> Model:
    """A table whose paths under `keys`, where given, are absolute."""
    paths = {key: getattr(table, key) for key in keys}
    return table.model_copy(update={key: _absolute(here, path) for key, path in paths.items() if path})


def _absolute(here: Path, path: Path) -> Path:
    """`path` as seen from the folder `here`; `~` is the home of whoever runs this."""
    return (here / expand(path)).resolve()


def expand(path: Path) -> Path:
    """`path` with the home folder in place of `~`.

    Raises:
        ConfigError: there is no such user, or no file can have this name.
    """
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r}: no file can have this name; correct it")
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigError(f"{path}: there is no such user on this machine; write the whole path") from None


def _task(here: Path, task: str) -> str:
    """The name of a built-in task as it is, the path of a task's own TOML file made absolute."""
    return str(_absolute(here, Path(task))) if task.endswith(".toml") else task


def read_toml(path: Path, model: type[Model]) -> Model:
    """Read a TOML file into `model`.

    Raises:
        ConfigError: naming the file, the key, what was found and what is allowed.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows editors put a byte-order mark in front
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: it cannot be read: {error}") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        hint = "; a path with backslashes stands in 'single quotes'" if "\\" in str(error) else ""
        raise ConfigError(f"{path}: not valid TOML: {error}{hint}") from None
    return parse(values, model, source=str(path))


def parse(values: dict[str, Any], model: type[Model], *, source: str) -> Model:
    """Check `values` against `model`; `source` names where they come from.

    Raises:
        ConfigError: one sentence for each key that is wrong.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        sentences = [_sentence(detail, model) for detail in error.errors(include_url=False)]
        raise ConfigError(f"{source}: " + "; ".join(sentences)) from None


def parse_value(value: object, model: type[BaseModel], key: str) -> Any:
    """Check the value of one key of `model`, such as `qc.rounds`; text becomes what the key holds.

    Raises:
        ConfigError: with the value and what is allowed.
    """
    try:
        return TypeAdapter(field_of(model, key).rebuild_annotation()).validate_python(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        raise ConfigError(f"{_message(detail)} (found {detail['input']!r})") from None


def field_of(model: type[BaseModel], key: str) -> FieldInfo:
    """What `model` knows of a key such as `qc.rounds`."""
    *tables, name = key.split(".")
    for table in tables:
        inner = model.model_fields[table].annotation
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            raise KeyError(key)
        model = inner
    return model.model_fields[name]


def _message(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]}"


def _sentence(detail: ErrorDetails, model: type[BaseModel]) -> str:
    """One pydantic error as a sentence with the key, what was found and what is allowed."""
    key = ".".join(str(part) for part in detail["loc"])
    if detail["type"] == "extra_forbidden":
        known = _keys_at(model, detail["loc"][:-1])
        hint = did_you_mean(str(detail["loc"][-1]), known)
        return f"unknown key {key!r}; {hint}known here: {', '.join(known)}"
    if detail["type"] == "missing":
        if isinstance(detail["loc"][-1], int):
            return f"{key.rpartition('.')[0]}: too few values (found {detail['input']!r})"
        return f"key {key!r} is missing"
    if not key:
        return _message(detail)
    if detail["type"] in {"model_type", "dict_type"}:
        return f"{key}: must be a table, written [{key}] (found {detail['input']!r})"
    found = "" if isinstance(detail["input"], dict) else f" (found {detail['input']!r})"
    return f"{key}: {_message(detail)}{found}"


def _keys_at(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """The keys that the table at `location` may hold."""
    for part in location:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return sorted(model.model_fields)
