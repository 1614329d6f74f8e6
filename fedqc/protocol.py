"""What coordinator and sites say to each other: the only place that knows our types and Flower's records.

One phase is one message type. The coordinator sends a record `request` (a protocol version and one JSON body)
and, where the site needs the model, a record `weights`; what is applied in a training and not trained comes
in a record `frozen`. A site answers with exactly the records that `REPLIES` lists for that message type, or
with a record `error` that holds one word of a fixed vocabulary.

    message type             request                       reply
    query.handshake          HandshakeRequest              handshake: site, protocol, fedqc, task
    query.summarise          SummariseRequest              statistics: numbers
    train.segmenter          TrainSegmenterRequest         weights, training: numbers
    train.qc                 TrainRequest                  weights, training: numbers
    query.cross_check        CrossCheckRequest             statistics: numbers
    query.calibrate          CalibrateRequest              statistics: numbers
    query.score              ScoreRequest                  statistics: numbers
    train.segmentation       TrainSegmentationRequest      weights, training: numbers
    evaluate.segmentation    EvaluateSegmentationRequest   statistics: numbers
"""

import io
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, ClassVar, TypeVar

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from numpy.typing import NDArray
from pydantic import ConfigDict, Field, SkipValidation, ValidationError

from fedqc.config import CurationConfig, FederationName, FrozenModel, QCConfig, SegmentationConfig, SiteName
from fedqc.curation.calibration import Calibration
from fedqc.errors import ProtocolError
from fedqc.statistics.privacy import HIDDEN
from fedqc.statistics.site import N_BINS

PROTOCOL_VERSION = 4

REQUEST, WEIGHTS, FROZEN, HANDSHAKE, STATISTICS, TRAINING, ERROR = (
    "request",
    "weights",
    "frozen",
    "handshake",
    "statistics",
    "training",
    "error",
)

REPLIES: dict[str, dict[str, type[ArrayRecord] | type[MetricRecord] | type[ConfigRecord]]] = {
    "query.handshake": {HANDSHAKE: ConfigRecord},
    "query.summarise": {STATISTICS: MetricRecord},
    "train.segmenter": {WEIGHTS: ArrayRecord, TRAINING: MetricRecord},
    "train.qc": {WEIGHTS: ArrayRecord, TRAINING: MetricRecord},
    "query.cross_check": {STATISTICS: MetricRecord},
    "query.calibrate": {STATISTICS: MetricRecord},
    "query.score": {STATISTICS: MetricRecord},
    "train.segmentation": {WEIGHTS: ArrayRecord, TRAINING: MetricRecord},
    "evaluate.segmentation": {STATISTICS: MetricRecord},
}
"""The records of a reply, by message type. Nothing else leaves a site."""

WEIGHT_DTYPES = ("float16", "float32", "float64", "int64")
STATISTIC_KEY = re.compile(r"[A-Za-z0-9_-]{1,64}(\.[A-Za-z0-9_-]{1,64}){0,5}")
MAX_STATISTICS = 2000
MAX_LIST = 200
MAX_NUMBER = 1e15
"""No count, volume or loss is larger; sums and figures of such numbers stay finite."""

Weights = dict[str, NDArray[Any]]
"""A network's arrays by name, in the network's order."""

Number = int | float
Statistics = dict[str, Number | list[int] | list[float]]


class ErrorCode(StrEnum):
    """Why a site could not answer: all that the coordinator learns."""

    CONFIG = "config-error"
    DATA = "data-error"
    MODEL = "model-error"
    TRAINING = "training-error"
    PROTOCOL = "protocol-error"
    DEVICE = "device-error"
    NO_REFERENCE = "no-reference"
    NOTHING_KEPT = "nothing-kept"
    NO_PART = "takes-no-part"
    TOO_LARGE = "model-too-large"
    NOT_NOW = "outside-its-hours"
    REFUSED = "refused-by-guard"
    LEDGER = "ledger-error"
    INTERNAL = "internal-error"

    @property
    def sentence(self) -> str:
        """The code in words, for the coordinator's log."""
        return _SENTENCES[self]


_SENTENCES = {
    ErrorCode.CONFIG: "the site's configuration is wrong; its site.log says what",
    ErrorCode.DATA: "the site's data cannot be used; its site.log says why",
    ErrorCode.MODEL: "the model does not fit the site's task or method",
    ErrorCode.TRAINING: "training at the site could not go on; its site.log says why",
    ErrorCode.PROTOCOL: "the site does not understand the request; compare versions of fedqc and tasks",
    ErrorCode.DEVICE: "the site's GPU has too little memory for the network",
    ErrorCode.NO_REFERENCE: "the site has no reference case for this phase",
    ErrorCode.NOTHING_KEPT: "the site kept no case to train segmentation on",
    ErrorCode.NO_PART: "the site's policy is to take no part in this phase",
    ErrorCode.TOO_LARGE: "the model has more numbers than the site's policy allows",
    ErrorCode.NOT_NOW: "the site's policy is to compute at other hours",
    ErrorCode.REFUSED: "the site's guard refused to let the answer out; its site.log says why",
    ErrorCode.LEDGER: "the site cannot write its ledger, so nothing leaves it",
    ErrorCode.INTERNAL: "something went wrong at the site; its site.log holds the traceback",
}


# --------------------------------------------------------------------------------------------- requests


class Request(FrozenModel):
    """What every request says."""

    kind: ClassVar[str]
    """Message type."""

    federation: FederationName
    task: str
    """Digest of the federation's task."""
    seed: int = Field(ge=0)
    """Seed of the run; a site derives its own generators from it."""
    min_count: int = Field(ge=1)
    """Fewest distinct patients behind a number; a site may demand more."""
    round: int = Field(default=0, ge=0)
    """Round of a training phase, from 1; 0 elsewhere."""


class HandshakeRequest(Request):
    """Who are you, and which version of what?"""

    kind: ClassVar[str] = "query.handshake"


class SummariseRequest(Request):
    """What do your data look like?"""

    kind: ClassVar[str] = "query.summarise"


class ModelRequest(Request):
    """A request that carries a global model."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    weights: Annotated[Weights, SkipValidation] = Field(exclude=True, repr=False)


class Provenance(FrozenModel):
    """Where a model that stays at a site comes from."""

    rounds: int = Field(ge=0)
    """Rounds of training behind the weights."""
    samples: int = Field(ge=0)
    """Training samples behind them, over all sites."""
    sites: tuple[SiteName, ...]
    """The sites in the last mean."""


class QCModelRequest(ModelRequest):
    """A request that carries the QC model."""

    qc: QCConfig


class TrainingTerms(FrozenModel):
    """What every request says that asks for training."""

    rounds: int = Field(ge=1)
    proximal: float = Field(default=0.0, ge=0)
    """mu of FedProx; 0 with every other strategy."""
    update_clip: float | None = Field(default=None, gt=0)
    """Largest L2 norm of the change that may come back; None: any."""
    update_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of the noise on it, as a multiple of `update_clip`."""


class TrainSegmenterRequest(TrainingTerms, QCModelRequest):
    """Train a segmenter for one round on references outside a fold; it makes labels of those in the fold."""

    kind: ClassVar[str] = "train.segmenter"

    source: str = Field(pattern=r"^[a-z][a-z-]{0,31}$")
    """Whose labels they are, such as `snapshots`."""
    variant: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
    """Which of the source's networks."""
    fold: int = Field(ge=0, lt=10)


class TrainRequest(TrainingTerms, QCModelRequest):
    """Train one stage of the QC method for one round; the weights are those of the stage's part."""

    kind: ClassVar[str] = "train.qc"

    stage: str = Field(default="qc", pattern=r"^[a-z][a-z0-9-]{0,63}$")
    frozen: Annotated[Weights, SkipValidation] = Field(default_factory=dict, exclude=True, repr=False)
    """Of other parts that the stage applies, by the names that they have in the whole network."""


class CrossCheckRequest(QCModelRequest):
    """How good are your reference labels to a model that never saw them?"""

    kind: ClassVar[str] = "query.cross_check"


class CalibrateRequest(QCModelRequest):
    """How well does the model judge labels of known quality at your site?"""

    kind: ClassVar[str] = "query.calibrate"

    curation: CurationConfig


class ScoreRequest(QCModelRequest):
    """Score and decide; the model stays at the site."""

    kind: ClassVar[str] = "query.score"

    curation: CurationConfig
    calibration: Calibration | None = None
    """What the sites counted of labels of known quality, added up; None where no rule needs it."""
    trusted: bool = True
    """Whether the site's references are; else there is no self-test, for nobody knows a label's quality."""
    provenance: Provenance


class SegmentationRequest(ModelRequest):
    """A request that carries the segmentation model."""

    segmentation: SegmentationConfig


class TrainSegmentationRequest(TrainingTerms, SegmentationRequest):
    """Train the segmentation model for one round on what you kept."""

    kind: ClassVar[str] = "train.segmentation"


class EvaluateSegmentationRequest(SegmentationRequest):
    """How well does the segmentation model do on your references? The model stays at the site."""

    kind: ClassVar[str] = "evaluate.segmentation"

    provenance: Provenance


R = TypeVar("R", bound=Request)


def request_to_records(request: Request) -> RecordDict:
    """A request as Flower records."""
    records = RecordDict(
        {REQUEST: ConfigRecord({"version": PROTOCOL_VERSION, "body": request.model_dump_json()})}
    )
    if isinstance(request, ModelRequest):
        records[WEIGHTS] = weights_to_record(request.weights)
    if isinstance(request, TrainRequest) and request.frozen:
        records[FROZEN] = weights_to_record(request.frozen)
    return records


def request_from_records(records: RecordDict, model: type[R]) -> R:
    """Read a request.

    Raises:
        ProtocolError: another protocol version, or not a request of this kind.
    """
    record = records.get(REQUEST)
    if not isinstance(record, ConfigRecord):
        raise ProtocolError(
            f"{model.kind}: the message has no record {REQUEST!r}; it does not come from fedqc"
        )
    if record.get("version") != PROTOCOL_VERSION:
        raise ProtocolError(
            f"{model.kind}: the coordinator speaks protocol version {record.get('version')!r}, "
            f"this site version {PROTOCOL_VERSION}; install the same version of fedqc on both"
        )
    try:
        values = FrozenBody.model_validate_json(str(record.get("body"))).model_dump()
        if issubclass(model, ModelRequest):
            weights = records.get(WEIGHTS)
            values["weights"] = weights_from_record(weights) if isinstance(weights, ArrayRecord) else None
            if values["weights"] is None:
                raise ProtocolError(f"{model.kind}: the message carries no weights")
        if issubclass(model, TrainRequest):
            frozen = records.get(FROZEN)
            values["frozen"] = weights_from_record(frozen) if isinstance(frozen, ArrayRecord) else {}
        return model.model_validate(values)
    except ValidationError as error:
        raise ProtocolError(
            f"{model.kind}: the request cannot be read: {error.error_count()} fields differ"
        ) from None


class FrozenBody(FrozenModel):
    """Any JSON object; what it must hold is checked by the request it becomes."""

    model_config = ConfigDict(extra="allow")


# ---------------------------------------------------------------------------------------------- replies


class HandshakeReply(FrozenModel):
    """Who a site is and what it speaks."""

    site: SiteName
    protocol: int
    fedqc: str = Field(pattern=r"^[0-9A-Za-z.+-]{1,40}$")
    task: str = Field(pattern=r"^[0-9a-f]{64}$")


@dataclass(frozen=True)
class StatisticsReply:
    """Numbers that passed the privacy filters."""

    values: Statistics


@dataclass(frozen=True)
class TrainReply:
    """A site's update."""

    weights: Weights
    samples: int
    """Training samples drawn (steps times batch): the averaging weight."""
    losses: dict[str, float]
    """Means over the round; empty where too few patients are behind them."""
    labels: Mapping[str, Number | list[int] | list[float]] = field(default_factory=dict)
    """What the QC model was trained on, as counts of labels: `made`, `chosen` and `sources.NAME`."""


@dataclass(frozen=True)
class ErrorReply:
    """A site could not answer."""

    code: ErrorCode


Reply = HandshakeReply | StatisticsReply | TrainReply | ErrorReply


def reply_to_records(reply: Reply) -> RecordDict:
    """A reply as Flower records."""
    match reply:
        case HandshakeReply():
            return RecordDict({HANDSHAKE: ConfigRecord(reply.model_dump())})
        case StatisticsReply():
            return RecordDict({STATISTICS: MetricRecord(dict(reply.values))})
        case TrainReply():
            training: Statistics = {"samples": reply.samples}
            training |= {f"loss.{name}": value for name, value in reply.losses.items()}
            training |= {f"labels.{name}": value for name, value in reply.labels.items()}
            return RecordDict(
                {WEIGHTS: weights_to_record(reply.weights), TRAINING: MetricRecord(dict(training))}
            )
        case ErrorReply():
            return RecordDict({ERROR: ConfigRecord({"code": str(reply.code)})})


def reply_from_records(records: RecordDict, kind: str) -> Reply:
    """Read a reply to a message of type `kind`; the very check that a site's guard makes before it sends.

    Raises:
        ProtocolError: a record, a key, a type or a value that the protocol does not allow.
    """
    if ERROR in records:
        return ErrorReply(code=_error_code(records))
    allowed = REPLIES[kind]
    found = {name: type(record) for name, record in records.items()}
    if found != allowed:
        raise ProtocolError(
            f"{kind}: the reply holds the records {sorted(found)}, expected {sorted(allowed)}"
        )
    if HANDSHAKE in records:
        return _handshake(records.config_records[HANDSHAKE], kind)
    if STATISTICS in records:
        return StatisticsReply(values=_numbers(records.metric_records[STATISTICS], kind))
    numbers = _numbers(records.metric_records[TRAINING], kind)
    samples = numbers.pop("samples", None)
    if not isinstance(samples, int) or samples < 1:
        raise ProtocolError(f"{kind}: 'samples' is missing or is no count above 0")
    losses: dict[str, float] = {}
    labels: Statistics = {}
    for key, value in numbers.items():
        prefix, _, name = key.partition(".")
        if prefix == "loss" and isinstance(value, float):
            losses[name] = value
        elif prefix == "labels" and kind == TrainRequest.kind and _counts_labels(name, value):
            labels[name] = value
        else:
            raise ProtocolError(f"{kind}: {key!r} is neither a loss nor a count of labels")
    weights = weights_from_record(records.array_records[WEIGHTS])
    return TrainReply(weights=weights, samples=samples, losses=losses, labels=labels)


def _counts_labels(name: str, value: object) -> bool:
    """Whether it is a histogram of labels before or after balancing, or a number of labels of one source."""
    if name in {"made", "chosen"}:
        counts = value if isinstance(value, list) else []
        return len(counts) == N_BINS and all(isinstance(count, int) and count >= HIDDEN for count in counts)
    return name.startswith("sources.") and isinstance(value, int) and value >= 0


def _error_code(records: RecordDict) -> ErrorCode:
    record = records[ERROR]
    if set(records) != {ERROR} or not isinstance(record, ConfigRecord) or set(record) != {"code"}:
        raise ProtocolError("an error reply holds one record 'error' with one key 'code' and nothing else")
    try:
        return ErrorCode(str(record["code"]))
    except ValueError:
        raise ProtocolError(f"an error reply holds one of {', '.join(ErrorCode)}") from None


def _handshake(record: ConfigRecord, kind: str) -> HandshakeReply:
    try:
        return HandshakeReply.model_validate(dict(record), strict=True)
    except ValidationError as error:
        raise ProtocolError(f"{kind}: {error.error_count()} fields of the handshake differ") from None


def _numbers(record: MetricRecord, kind: str) -> Statistics:
    """The numbers of a record, when neither they nor keys nor lists are out of bounds."""
    if len(record) > MAX_STATISTICS:
        raise ProtocolError(f"{kind}: {len(record)} numbers, at most {MAX_STATISTICS} are allowed")
    for key, value in record.items():
        if not STATISTIC_KEY.fullmatch(key):
            raise ProtocolError(f"{kind}: a key is no dotted name")
        numbers = value if isinstance(value, list) else [value]
        if len(numbers) > MAX_LIST or not all(abs(number) <= MAX_NUMBER for number in numbers):
            raise ProtocolError(
                f"{kind}: {key!r} is not finite, above {MAX_NUMBER:g} or a list of more than {MAX_LIST}"
            )
    return dict(record)


# ---------------------------------------------------------------------------------------------- weights


def weights_to_record(weights: Mapping[str, NDArray[Any]]) -> ArrayRecord:
    """Named arrays as a Flower record, in their order.

    Raises:
        ProtocolError: an array of a dtype outside `WEIGHT_DTYPES`.
    """
    record = ArrayRecord()
    for name, values in weights.items():
        if values.dtype.name not in WEIGHT_DTYPES:
            raise ProtocolError(
                f"weight {name!r} is {values.dtype.name}, allowed are {', '.join(WEIGHT_DTYPES)}"
            )
        # C order, so that the bytes are the one form that `weights_from_record` accepts.
        record[name] = Array(np.asarray(values, order="C"))
    return record


def weights_from_record(record: ArrayRecord) -> Weights:
    """The arrays of a record, read-only and without a copy.

    The bytes must be exactly what `numpy.save` writes for the declared dtype and shape: a longer header, or
    bytes behind the last number, could carry anything, and a false shape could ask for any amount of memory.

    Raises:
        ProtocolError: an array is not in that form.
    """
    weights: Weights = {}
    for name, array in record.items():
        if array.stype != "numpy.ndarray" or array.dtype not in WEIGHT_DTYPES:
            raise ProtocolError(f"weight {name!r} is {array.stype} of {array.dtype}, which is not allowed")
        dtype = np.dtype(array.dtype)
        header = _npy_header(dtype, array.shape)
        if (
            any(n < 0 for n in array.shape)
            or len(array.data) != len(header) + math.prod(array.shape) * dtype.itemsize
        ):
            raise ProtocolError(
                f"weight {name!r} does not have the length that its shape {array.shape} promises"
            )
        if not array.data.startswith(header):
            raise ProtocolError(
                f"weight {name!r} does not start with the header that its shape {array.shape} has"
            )
        weights[name] = np.frombuffer(array.data, dtype, offset=len(header)).reshape(array.shape)
    return weights


def _npy_header(dtype: np.dtype[Any], shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    description = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": tuple(shape),
    }
    np.lib.format.write_array_header_1_0(buffer, description)
    return buffer.getvalue()


# ---------------------------------------------------------------------------------------------- digests


def content_digest(records: RecordDict) -> tuple[int, str]:
    """Size in bytes and SHA-256 of records as they travel.

    Flower sends records as a tree of objects, each named by the SHA-256 of its bytes, which in turn list the
    names of its parts. So the name of the root covers every byte; it is the id under which the SuperLink
    stores them. Equal parts travel once and count once.
    """
    sizes: dict[str, int] = {}
    pending: list[Any] = [records]
    while pending:
        part = pending.pop()
        if part.object_id not in sizes:
            sizes[part.object_id] = len(part.deflate())
            pending.extend((part.children or {}).values())
    return sum(sizes.values()), records.object_id
