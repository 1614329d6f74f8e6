"""The one way out of a site.

Whatever a phase comes to passes through `answer`: the privacy filters, then a check against the list of what
may leave, then a line in the ledger, then the message. An exception becomes one word of a fixed vocabulary;
its text and traceback stay in the site's own `site.log`.
"""

import contextlib
import secrets
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import numpy as np
from flwr.app import Context, Message, RecordDict

from fedqc.config import SiteConfig, load_site
from fedqc.errors import (
    ConfigError,
    DataError,
    DeviceError,
    FedQCError,
    ModelError,
    ProtocolError,
    TrainingError,
)
from fedqc.protocol import (
    ERROR,
    ErrorCode,
    ErrorReply,
    HandshakeReply,
    ModelRequest,
    Reply,
    Request,
    StatisticsReply,
    TrainReply,
    TrainRequest,
    TrainSegmentationRequest,
    TrainSegmenterRequest,
    Weights,
    content_digest,
    reply_from_records,
    reply_to_records,
    request_from_records,
)
from fedqc.statistics.allowed import not_allowed
from fedqc.statistics.privacy import release
from fedqc.statistics.releases import RELEASES, release_of, settle
from fedqc.statistics.site import (
    CalibrationSummary,
    CrossCheckSummary,
    CurationSummary,
    DataSummary,
    Figure,
    LabelsSummary,
    SegmentationSummary,
)
from fedqc.statistics.update_privacy import clipped_and_noised
from fedqc.task import load_task
from fedqc_client.activity import Activity
from fedqc_client.ledger import Ledger
from fedqc_client.policy import refusal

_TRAINING = (TrainSegmenterRequest, TrainRequest, TrainSegmentationRequest)


@dataclass(frozen=True)
class Trained:
    """What a training round came to, before the privacy filters."""

    weights: Weights
    samples: int
    losses: dict[str, Figure]
    labels: LabelsSummary | None = None


@dataclass(frozen=True)
class Told:
    """Statistics before the privacy filters, and of whom they are."""

    summary: "Summary"
    about: Mapping[str, str]
    """By patient, what of the patient the numbers rest on."""
    weights: str = ""
    """The model that they rest on."""
    settings: str = ""
    """What else they rest on."""


Summary = DataSummary | CrossCheckSummary | CalibrationSummary | CurationSummary | SegmentationSummary
Outcome = HandshakeReply | Trained | Told | ErrorReply
R = TypeVar("R", bound=Request)


class GuardError(FedQCError):
    """Something was about to leave that may not."""


def answer(
    message: Message, context: Context, model: type[R], work: Callable[[SiteConfig, R], Outcome]
) -> Message:
    """Answer a message from the coordinator; never raises.

    Args:
        message: the coordinator's message.
        context: its `node_config["site"]` is the path of the site's `site.toml`.
        model: the kind of request.
        work: the phase's function.
    """
    watch = Activity(Path("results"), model.kind)
    try:
        site_file = Path(str(context.node_config["site"]))
        watch.results = site_file.parent / "results"  # until the file has said otherwise
        site = load_site(site_file)
        watch.results = site.results
        request = request_from_records(message.content, model)
        watch = Activity.of(site.results, request)
        watch.begin()
        refused = refusal(site, request, datetime.now())
        outcome = work(site, request) if refused is None else ErrorReply(refused)
        why = outcome.code.sentence if isinstance(outcome, ErrorReply) else ""
        records = outgoing(outcome, site, request)
    except Exception as error:
        # Whatever it is: Flower would send its text.
        why = _log(watch.results, model.kind, error)
        records = reply_to_records(ErrorReply(error_code(error)))
    try:
        Ledger(watch.results / "ledger.jsonl").write(records, to=watch.to, kind=model.kind, round=watch.round)
    except Exception as error:
        # What is not written down does not leave; only this one word does.
        why = _log(watch.results, model.kind, error)
        records = reply_to_records(ErrorReply(ErrorCode.LEDGER))
    size, _ = content_digest(records)
    state = "failed" if ERROR in records else "sent"
    watch.tell(state, records=sorted(records), bytes=size, why=why)
    return Message(records, reply_to=message)


def outgoing(outcome: Outcome, site: SiteConfig, request: Request, *, remember: bool = True) -> RecordDict:
    """The records that may leave for `outcome`.

    Without `remember`, for a message that goes nowhere, what is told is not kept for later runs to heed.

    Raises:
        GuardError: it holds anything that may not.
    """
    if isinstance(outcome, Trained) and isinstance(request, _TRAINING) and request.update_clip:
        blurred = clipped_and_noised(
            outcome.weights,
            request.weights,
            clip=request.update_clip,
            noise=request.update_noise,
            # Not of the run's seed, which the coordinator knows and could take the noise away with.
            rng=np.random.default_rng(secrets.randbits(128)),
        )
        outcome = replace(outcome, weights=blurred)
    try:
        min_count = max(site.policy.min_count, request.min_count)
        reply = _filtered(outcome, min_count)
        if isinstance(outcome, Told) and isinstance(reply, StatisticsReply):
            settings = f"{request.federation} {request.task} {outcome.settings}"
            new = release_of(reply.values, outcome.about, outcome.weights, settings, min_count)
            reply = StatisticsReply(settle(site.results / RELEASES, request.kind, new, remember=remember))
        records = reply_to_records(reply)
        _check(reply_from_records(records, request.kind), site, request)
    except (ProtocolError, TypeError) as error:
        raise GuardError(str(error)) from error
    return records


def error_code(error: Exception) -> ErrorCode:
    """The word that stands for an exception."""
    codes: tuple[tuple[type[Exception], ErrorCode], ...] = (
        (GuardError, ErrorCode.REFUSED),
        (ConfigError, ErrorCode.CONFIG),
        (DataError, ErrorCode.DATA),
        (ModelError, ErrorCode.MODEL),
        (TrainingError, ErrorCode.TRAINING),
        (DeviceError, ErrorCode.DEVICE),
        (ProtocolError, ErrorCode.PROTOCOL),
    )
    return next((code for kind, code in codes if isinstance(error, kind)), ErrorCode.INTERNAL)


def _filtered(outcome: Outcome, min_count: int) -> Reply:
    """The outcome behind the privacy filters."""
    match outcome:
        case HandshakeReply() | ErrorReply():
            return outcome
        case Trained():
            released = release(outcome.losses, min_count)
            losses = {name: value for name, value in released.items() if isinstance(value, float)}
            labels = dict(release(outcome.labels or {}, min_count))
            return TrainReply(weights=outcome.weights, samples=outcome.samples, losses=losses, labels=labels)
        case Told():
            return StatisticsReply(values=dict(release(outcome.summary, min_count)))
    raise GuardError(f"{type(outcome).__name__} is nothing that may leave a site")


def _check(reply: Reply, site: SiteConfig, request: Request) -> None:
    """What the protocol allows to anyone, narrowed to what this site may say in answer to this request."""
    match reply:
        case HandshakeReply():
            if reply.site != site.name:
                raise GuardError(f"the handshake names {reply.site!r}, this site is {site.name!r}")
        case StatisticsReply() | TrainReply():
            if why := not_allowed(reply, request.kind, load_task(site.task)):
                raise GuardError(f"{request.kind}: {why}")
    if isinstance(reply, TrainReply):
        if not isinstance(request, ModelRequest):
            raise GuardError(f"{request.kind}: weights may only answer weights")
        _check_weights(reply.weights, request.weights)


def _check_weights(sent: Weights, received: Weights) -> None:
    """Weights leave as exactly the arrays that came: same names in the same order, shapes and dtypes."""
    if list(sent) != list(received):
        raise GuardError("the weights do not have the names that came from the coordinator")
    for name, values in sent.items():
        expected = received[name]
        if values.shape != expected.shape or values.dtype != expected.dtype:
            found, came = f"{values.dtype} {values.shape}", f"{expected.dtype} {expected.shape}"
            raise GuardError(f"weight {name!r} is {found}, it came as {came}")
        if not np.isfinite(values).all():
            raise GuardError(f"weight {name!r} is not finite")


def _log(results: Path, kind: str, error: Exception) -> str:
    """Tell the site, and nobody else, what went wrong.

    Returns:
        The same as one line, for whoever watches at the site.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    # A log that cannot be written must not turn into a message that says so.
    with contextlib.suppress(OSError):
        results.mkdir(parents=True, exist_ok=True)
        with (results / "site.log").open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(f"{now} {kind}\n{''.join(traceback.format_exception(error))}\n")
    return str(error) if isinstance(error, FedQCError | OSError) else "an error of fedqc; see site.log"
