"""`fedqc client --dry-run`: what would leave a site, shown before anything does.

The two phases that need no model are gone through as in a run, up to the message, which goes nowhere. Of the
others the form is shown: every record, every key that may be in it, and of weights names, shapes and bytes.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import ConfigRecord, MetricRecord, RecordDict
from torch import nn

from fedqc.config import FederationConfig, load_site
from fedqc.degradation.samples import stored_shares
from fedqc.label_sources.making import SEGMENTER_SOURCES, segmenter_source
from fedqc.methods.base import get_method, part_of
from fedqc.protocol import (
    ERROR,
    REPLIES,
    ErrorCode,
    HandshakeRequest,
    Request,
    SummariseRequest,
    content_digest,
)
from fedqc.segmentation import Segmentation
from fedqc.statistics.allowed import statistic_keys
from fedqc.task import Task, load_task
from fedqc_client import tasks
from fedqc_client.guard import outgoing
from fedqc_client.policy import takes_no_part


@dataclass(frozen=True)
class Leaving:
    """One record that would leave."""

    kind: str
    """Type of the message."""
    record: str
    content: str
    """What is in it, or its form where that depends on training."""


def what_would_leave(site_file: Path, federation: FederationConfig | None = None) -> Iterator[Leaving]:
    """Every record of every message that this site would send in a run.

    Args:
        site_file: the `site.toml`.
        federation: as the coordinator plans it; left out, one with the defaults.

    Raises:
        FedQCError: the site's configuration or data cannot be used.
    """
    site = load_site(site_file)
    task = load_task(site.task)
    config = federation or FederationConfig(task=site.task)
    common = {
        "federation": config.name,
        "task": task.digest,
        "seed": 0,
        "min_count": config.privacy.min_count,
    }
    handshake, summarise = HandshakeRequest.model_validate(common), SummariseRequest.model_validate(common)
    yield from _records(handshake, outgoing(tasks.handshake(site, handshake), site, handshake))
    if not takes_no_part(site, summarise.kind):
        yield from _records(
            summarise,
            outgoing(tasks.summarise(site, summarise, begins=False), site, summarise, remember=False),
        )
    networks = {
        "train.segmenter": _segmenters(config, task),
        "train.qc": _stages(config, task),
        "train.segmentation": [Segmentation(task, config.segmentation).build(0)],
    }
    for kind, records in REPLIES.items():
        if takes_no_part(site, kind):
            yield Leaving(kind, ERROR, f"code = {ErrorCode.NO_PART}: this site's policy")
            continue
        if kind in (handshake.kind, summarise.kind):
            continue
        if kind in networks:
            for network in networks[kind]:
                yield Leaving(kind, "weights", _form(network))
                numbers = "samples (steps times batch size), means of the parts of a loss"
                if kind == "train.qc":
                    numbers += ", counts of the labels that were trained on, by their DSC and their source"
                yield Leaving(kind, "training", numbers)
        else:
            keys = ", ".join(sorted(statistic_keys(kind, task)))
            yield Leaving(kind, next(iter(records)), f"at most the numbers {keys}")
    yield Leaving("any", "error", "one word of a fixed list, where a phase cannot be done")


def _segmenters(config: FederationConfig, task: Task) -> list[nn.Module]:
    """The networks that make labels for QC training, each of which is trained once for every fold."""
    sources = [
        segmenter_source(name, task, config.qc.sources)
        for name in stored_shares(config.qc.samples)
        if name in SEGMENTER_SOURCES
    ]
    return [source.build(variant, 0) for source in sources for variant in source.variants]


def _stages(config: FederationConfig, task: Task) -> list[nn.Module]:
    """What is trained in each stage of the QC method."""
    method = get_method(config.qc.method)(task, config.qc)
    network = method.build(0)
    return [part_of(network, stage.part) for stage in method.stages()]


def _form(network: nn.Module) -> str:
    state = network.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items())
    return f"{len(state)} arrays of {size} bytes, the network after training here: {shapes}"


def _records(request: Request, records: RecordDict) -> Iterator[Leaving]:
    size, sha256 = content_digest(records)
    for name, record in records.items():
        values: Mapping[str, object] = dict(record) if isinstance(record, ConfigRecord | MetricRecord) else {}
        content = ", ".join(f"{key} = {value}" for key, value in values.items()) or "nothing"
        yield Leaving(request.kind, name, f"{content} ({size} bytes, sha256 {sha256[:12]})")
