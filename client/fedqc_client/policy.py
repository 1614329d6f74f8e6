"""What a site allows is the site's own decision, and wins over whatever a coordinator asks."""

from datetime import datetime, time

import torch

from fedqc.config import SiteConfig
from fedqc.errors import ProtocolError
from fedqc.label_sources.making import segmenter_source
from fedqc.methods.base import get_method
from fedqc.protocol import (
    ErrorCode,
    ModelRequest,
    QCModelRequest,
    Request,
    SegmentationRequest,
    TrainRequest,
    TrainSegmenterRequest,
)
from fedqc.segmentation import Segmentation
from fedqc.task import load_task


def refusal(site: SiteConfig, request: Request, now: datetime) -> ErrorCode | None:
    """Why this site does not do what a request asks, or None.

    Args:
        site: with its policy.
        request: of the coordinator.
        now: the time on the site's own clock, for `policy.hours`.

    Raises:
        ProtocolError: the request is one that no coordinator of ours makes.
    """
    policy = site.policy
    if isinstance(request, QCModelRequest) and request.qc.initial is not None:
        raise ProtocolError(
            f"{request.kind}: the request names a path on this machine ({request.qc.initial})"
        )
    if takes_no_part(site, request.kind):
        return ErrorCode.NO_PART
    if isinstance(request, ModelRequest):
        frozen = request.frozen if isinstance(request, TrainRequest) else {}
        sent = sum(values.size for values in (*request.weights.values(), *frozen.values()))
        if max(sent, planned_size(site, request)) > policy.largest_model:
            return ErrorCode.TOO_LARGE
        if policy.hours is not None and not is_within(policy.hours, now.time()):
            return ErrorCode.NOT_NOW
    return None


def planned_size(site: SiteConfig, request: ModelRequest) -> int:
    """Numbers in the network that a request describes; none of them is made.

    What comes along may be smaller, and would be found out only once the network is built.

    Raises:
        ConfigError: task and configuration do not fit.
    """
    task = load_task(site.task)
    with torch.device("meta"):
        if isinstance(request, TrainSegmenterRequest):
            source = segmenter_source(request.source, task, request.qc.sources)
            network = source.build(source.checked(request.variant), 0)
        elif isinstance(request, QCModelRequest):
            network = get_method(request.qc.method)(task, request.qc).build(0)
        elif isinstance(request, SegmentationRequest):
            network = Segmentation(task, request.segmentation).build(0)
        else:
            return 0
    return sum(values.numel() for values in network.state_dict().values())


def takes_no_part(site: SiteConfig, kind: str) -> bool:
    """Whether a site's policy is to take no part in the phase of a kind of message."""
    if kind == "train.segmentation" and not site.policy.segmentation:
        return True
    return phase_of(kind) in site.policy.refuse


def phase_of(kind: str) -> str:
    """The name in `policy.refuse` for a kind of message: `train.segmentation` is `segmentation`."""
    action, _, name = kind.partition(".")
    if name == "segmentation":
        return name
    return "training" if action == "train" else name.replace("_", "-")


def is_within(hours: tuple[time, time], moment: time) -> bool:
    """Whether a moment lies in the hours, which may go past midnight."""
    begin, end = hours
    return begin <= moment < end if begin <= end else moment >= begin or moment < end
