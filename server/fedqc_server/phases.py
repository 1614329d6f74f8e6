"""The phases of a run, one function each.

A site that fails, is late or answers nonsense costs the run that site in that phase, never the run; a run
ends early only when fewer than `sites.minimum` are left.
"""

import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import flwr
import numpy as np
import torch
from flwr.app import Message
from flwr.serverapp import Grid

import fedqc
from fedqc.config import FederationConfig, QCConfig
from fedqc.errors import ConfigError, FedQCError, ModelError, ProtocolError, QuorumError
from fedqc.methods.base import Method, get_method
from fedqc.model import ModelCard, load_model, save_model
from fedqc.protocol import (
    PROTOCOL_VERSION,
    CalibrateRequest,
    ErrorCode,
    ErrorReply,
    HandshakeReply,
    HandshakeRequest,
    Reply,
    Request,
    ScoreRequest,
    StatisticsReply,
    SummariseRequest,
    TrainReply,
    TrainRequest,
    Weights,
    reply_from_records,
    request_to_records,
    task_digest,
)
from fedqc.seeding import derive_seed
from fedqc.task import Task, load_task
from fedqc_server.averaging import RunningMean, check_update
from fedqc_server.roster import Clock, Node, Roster, is_expected, wait_for_nodes
from fedqc_server.run_folder import RunFolder

# Flower's own codes: a message or its reply outlived its time, or the node went away.
_FLOWER_ERRORS = {3: "late", 4: "late", 5: "unavailable"}
Answer = TypeVar("Answer", HandshakeReply, StatisticsReply, TrainReply)


@dataclass(frozen=True)
class Trained:
    """How far the model has come."""

    rounds: int = 0
    samples: int = 0
    """Training samples drawn in all."""
    sites: tuple[str, ...] = ()
    """The sites in the last mean."""


@dataclass
class Run:
    """What all phases of a run share."""

    grid: Grid
    config: FederationConfig
    task: Task
    method: Method
    folder: RunFolder
    seed: int
    clock: Clock
    roster: Roster = field(default_factory=Roster)
    statistics: dict[str, Any] = field(default_factory=dict)
    """What was learned; the content of `statistics.json`."""
    trained: Trained = Trained()

    def common(self) -> dict[str, Any]:
        """The fields of every request."""
        return {
            "federation": self.config.name,
            "task": task_digest(self.task),
            "seed": self.seed,
            "min_count": self.config.privacy.min_count,
        }

    def learned(self, key: str, values: object) -> None:
        """Write what a phase came to before the next one starts."""
        self.statistics[key] = values
        self.folder.write_json("statistics.json", self.statistics)

    def report_failed(self, failed: dict[str, str], **where: int) -> None:
        """Write down which sites failed, and what the word they sent means."""
        for site, reason in failed.items():
            meaning = ErrorCode(reason).sentence if reason in set(ErrorCode) else None
            self.folder.event("site-failed", site=site, reason=reason, meaning=meaning, **where)

    def check_quorum(self, answered: int, failed: dict[str, str], what: str) -> None:
        """Stop where fewer sites than needed are left.

        Raises:
            QuorumError: with the sites that failed and why.
        """
        if answered < self.config.sites.minimum:
            reasons = ", ".join(f"{site}: {reason}" for site, reason in failed.items()) or "none failed"
            raise QuorumError(
                f"{what}: {answered} sites answered, sites.minimum is {self.config.sites.minimum} "
                f"({reasons}); mend the sites (their site.log says more) or lower sites.minimum"
            )


def run_federation(
    grid: Grid, config: FederationConfig, folder: RunFolder, *, seed: int, clock: Clock | None = None
) -> None:
    """Lead one run from the handshake to the report.

    Args:
        grid: Flower's way to the sites.
        config: the federation.
        folder: where everything goes.
        seed: seed of the run; one seed gives one result.
        clock: time, for waiting.

    Raises:
        ConfigError: task, method or initial model cannot be used; nothing is written.
        FedQCError: whatever ends the run; `run.json` says so too.
    """
    task = load_task(config.task)
    run = Run(grid, config, task, _method(config, task), folder, seed, clock or Clock())
    weights = _initial_weights(run)
    folder.start(
        federation=config.name,
        config=config.model_dump(mode="json"),
        versions=_versions(),
        seed=seed,
    )
    try:
        with folder.phase("handshake"):
            handshake(run)
        with folder.phase("summarise"):
            summarise(run)
        with folder.phase("train"):
            weights = train(run, weights)
        with folder.phase("calibrate"):
            calibrate(run, weights)
        with folder.phase("score"):
            score(run, weights)
        with folder.phase("report"):
            report(run)
    except BaseException as error:
        # The text of an unexpected error may hold anything; its type is enough here, the traceback follows.
        reason = str(error) if isinstance(error, FedQCError) else type(error).__name__
        folder.finish("failed" if isinstance(error, Exception) else "interrupted", reason)
        raise
    folder.finish("completed")


# ----------------------------------------------------------------------------------------------- phases


def handshake(run: Run) -> None:
    """Find out which node is which site, and leave out by name those that do not fit."""
    sites, roster = run.config.sites, run.roster
    nodes = wait_for_nodes(run.grid, sites, run.clock)
    # Nodes without a registered name are asked under a made-up one.
    asked = {node.name or f"node-{node.id}": node for node in nodes}
    claims: dict[str, list[Node]] = {}
    request = HandshakeRequest(**run.common())
    targets = {label: node.id for label, node in sorted(asked.items())}
    for label, reply in exchange(run, request, targets, HandshakeReply, sites.wait):
        if isinstance(reply, str):
            roster.left_out[label] = reply
        elif reason := _misfit(reply, asked[label], run):
            roster.left_out[label] = reason
        else:
            claims.setdefault(reply.site, []).append(asked[label])
    for name, claimants in sorted(claims.items()):
        if len(claimants) > 1:
            roster.left_out[name] = "name-claimed-twice"
        else:
            roster.joined[name] = claimants[0].id
            run.folder.event("site-joined", site=name)
    missing = set(sites.expected) - set(roster.joined) - set(roster.left_out)
    roster.left_out |= dict.fromkeys(sorted(missing), "offline")
    for name, reason in roster.left_out.items():
        run.folder.event("site-left-out", site=name, reason=reason)
    run.folder.note(sites={"joined": sorted(roster.joined), "left_out": roster.left_out})
    run.check_quorum(len(roster.joined), roster.left_out, "handshake")


def summarise(run: Run) -> None:
    """Ask the sites what their data look like."""
    _ask_statistics(run, SummariseRequest(**run.common()), "summarise")


def train(run: Run, weights: Weights) -> Weights:
    """Train the QC model by federated averaging.

    Args:
        run: the run.
        weights: the initial model.

    Returns:
        The model after the last round; it is in the run's folder after every round.

    Raises:
        QuorumError: fewer than `sites.minimum` fit updates in a round.
    """
    qc = run.config.qc
    history: list[dict[str, Any]] = []
    without_reference: set[str] = set()
    for number in range(1, qc.rounds + 1):
        run.folder.event("round-started", round=number, rounds=qc.rounds)
        targets = {
            site: node for site, node in run.roster.online(run.grid).items() if site not in without_reference
        }
        failed = dict.fromkeys(sorted(set(run.roster.joined) - set(targets) - without_reference), "offline")
        request = TrainRequest(
            **run.common(), qc=_qc_for_sites(run), weights=weights, round=number, rounds=qc.rounds
        )
        mean, sites = RunningMean(), {}
        for site, reply in exchange(run, request, targets, TrainReply, qc.deadline):
            reason = (
                reply if isinstance(reply, str) else _unfit(reply, weights, qc.local_steps * qc.batch_size)
            )
            if isinstance(reply, str) or reason:
                failed[site] = str(reason)
                continue
            mean.add(site, reply.weights, reply.samples)
            sites[site] = {"samples": reply.samples, "losses": reply.losses}
            run.folder.event(
                "update-accepted", round=number, rounds=qc.rounds, site=site, loss=reply.losses.get("loss")
            )
        run.report_failed(failed, round=number)
        without_reference |= {site for site, reason in failed.items() if reason == ErrorCode.NO_REFERENCE}
        run.check_quorum(len(sites), failed, f"training round {number} of {qc.rounds}")
        weights = mean.mean()
        run.trained = Trained(number, run.trained.samples + mean.samples, mean.sites)
        _store(run, weights)
        loss = _mean_loss(sites)
        history.append({"round": number, "loss": loss, "sites": sites, "failed": failed})
        run.learned("train", history)
        run.folder.event("round-finished", round=number, rounds=qc.rounds, loss=loss)
    return weights


def calibrate(run: Run, weights: Weights) -> None:
    """Ask the sites how well the model judges labels of known quality."""
    request = CalibrateRequest(
        **run.common(), qc=_qc_for_sites(run), weights=weights, curation=run.config.curation
    )
    _ask_statistics(run, request, "calibrate")


def score(run: Run, weights: Weights) -> None:
    """Have the sites score their candidates; the model stays with them."""
    request = ScoreRequest(
        **run.common(),
        qc=_qc_for_sites(run),
        weights=weights,
        curation=run.config.curation,
        rounds=run.trained.rounds,
        samples=run.trained.samples,
        sites=run.trained.sites,
    )
    _ask_statistics(run, request, "score")


def report(run: Run) -> None:
    """Add up over the sites what they counted, each sum with the number of sites that told theirs."""
    pooled: dict[str, dict[str, dict[str, int]]] = {}
    for answers in run.statistics.get("sites", {}).values():
        for phase in ("summarise", "score"):
            for key, value in answers.get(phase, {}).items():
                if isinstance(value, int):
                    total = pooled.setdefault(phase, {}).setdefault(key, {"sum": 0, "sites": 0})
                    total["sum"] += value
                    total["sites"] += 1
    run.learned("pooled", pooled)


# -------------------------------------------------------------------------------------------- exchanges


def exchange(
    run: Run, request: Request, targets: dict[str, int], kind: type[Answer], deadline: float
) -> Iterator[tuple[str, Answer | str]]:
    """Send one request to many sites and hand on their replies one at a time.

    Replies are pulled in the order of `targets`, so that one of them is in memory, and so that what is summed
    up does not depend on which arrives first. After the deadline each site left is looked at once more and
    then late.

    Args:
        run: the run.
        request: what every site is asked.
        targets: node id of each site, in the order of the names.
        kind: the reply that answers the request.
        deadline: seconds for all of them together; also the messages' time to live, so that a straggler does
            not work through stale ones.

    Yields:
        Site, and its reply or the code of the reason why there is none.
    """
    if not targets:
        return
    content = request_to_records(request)
    messages = [
        Message(content, node, request.kind, ttl=deadline, group_id=str(request.round))
        for node in targets.values()
    ]
    run.folder.event("sites-asked", round=request.round or None, sites=len(targets))
    ids = list(run.grid.push_messages(messages))
    end = run.clock.now() + deadline
    del content, messages
    for position, site in enumerate(targets):
        message_id = ids[position] if position < len(ids) else None
        yield site, _await_reply(run, message_id, request.kind, kind, end) if message_id else "not-sent"


def _await_reply(
    run: Run, message_id: str, message_type: str, kind: type[Answer], end: float
) -> Answer | str:
    """The reply to one message, or why there is none."""
    while True:
        remaining = end - run.clock.now()
        try:
            for message in run.grid.pull_messages([message_id]):
                if message.metadata.reply_to_message_id == message_id:
                    return _read(message, message_type, kind)
        except Exception as error:
            # Bytes made to break their reader cost that site, not the run.
            return f"unreadable-reply-{type(error).__name__}"
        if remaining <= 0:
            return "late"
        run.clock.sleep(min(run.clock.poll, remaining))


def _read(message: Message, message_type: str, kind: type[Answer]) -> Answer | str:
    if message.has_error():
        # Its text was written at the site by code other than ours; only the number is taken over.
        code = message.error.code
        return _FLOWER_ERRORS.get(code, f"flower-error-{code}")
    try:
        reply: Reply = reply_from_records(message.content, message_type)
    except ProtocolError:
        return "bad-reply"
    if isinstance(reply, ErrorReply):
        return str(reply.code)
    return reply if isinstance(reply, kind) else "bad-reply"


def _ask_statistics(run: Run, request: Request, phase: str) -> None:
    """One phase of statistics, all sites; a site without reference case has nothing to calibrate with."""
    targets = run.roster.online(run.grid)
    failed = dict.fromkeys(sorted(set(run.roster.joined) - set(targets)), "offline")
    n_answers = 0
    sites = run.statistics.setdefault("sites", {site: {} for site in sorted(run.roster.joined)})
    for site, reply in exchange(run, request, targets, StatisticsReply, run.config.qc.deadline):
        if isinstance(reply, str):
            failed[site] = reply
        else:
            sites[site][phase] = reply.values
            n_answers += 1
            run.folder.event("statistics-received", site=site)
    run.report_failed(failed)
    run.learned("failed", run.statistics.get("failed", {}) | {phase: failed})
    excused = sum(reason == ErrorCode.NO_REFERENCE for reason in failed.values())
    run.check_quorum(n_answers + excused, failed, phase)


def _misfit(reply: HandshakeReply, node: Node, run: Run) -> str | None:
    """Why a site does not fit this federation, or None."""
    if node.name and reply.site != node.name:
        return "name-differs-from-key"
    if not is_expected(reply.site, run.config.sites):
        return "not-expected"
    if reply.protocol != PROTOCOL_VERSION:
        return "protocol-differs"
    return "task-differs" if reply.task != task_digest(run.task) else None


def _unfit(reply: TrainReply, current: Weights, most_samples: int) -> str | None:
    """Why an update is not averaged, or None."""
    # A site cannot buy weight with samples it was not asked to draw.
    return "samples-differ" if reply.samples > most_samples else check_update(reply.weights, current)


def _mean_loss(sites: dict[str, dict[str, Any]]) -> float | None:
    """Mean loss over the sites that told theirs, by samples."""
    told = [(site["losses"]["loss"], site["samples"]) for site in sites.values() if "loss" in site["losses"]]
    total = sum(samples for _, samples in told)
    return sum(loss * samples for loss, samples in told) / total if total else None


# ----------------------------------------------------------------------------------------------- models


def _method(config: FederationConfig, task: Task) -> Method:
    kind = get_method(config.qc.method)
    if kind.judges != "label":
        raise ConfigError(
            f"qc.method {config.qc.method!r} judges its own prediction and never looks at the annotation; "
            "curation needs a method that judges the label"
        )
    return kind(task, config.qc)


def _initial_weights(run: Run) -> Weights:
    """The model the run starts from: a stored one, or a fresh one that the seed decides."""
    fresh = run.method.build(derive_seed(run.seed, "initial")).state_dict()
    weights: Weights = {name: tensor.numpy().copy() for name, tensor in fresh.items()}
    path = run.config.qc.initial
    if path is None:
        return weights
    stored = load_model(path, run.task)
    initial: Weights = {name: tensor.numpy() for name, tensor in stored.network.state_dict().items()}
    if stored.card.qc.method != run.config.qc.method or check_update(initial, weights):
        raise ModelError(
            f"{path}: a model of method {stored.card.qc.method!r} that does not fit qc.method "
            f"{run.config.qc.method!r}; start from a model of the same method, or without qc.initial"
        )
    return initial


def _qc_for_sites(run: Run) -> QCConfig:
    """The QC configuration without the coordinator's own path."""
    return run.config.qc.model_copy(update={"initial": None})


def _store(run: Run, weights: Weights) -> None:
    """Keep the model of the last round in the run's folder."""
    card = ModelCard(
        task=run.task,
        qc=run.config.qc,
        federation=run.config.name,
        seed=run.seed,
        rounds=run.trained.rounds,
        samples=run.trained.samples,
        sites=run.trained.sites,
    )
    state = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    sha256 = save_model(run.folder.model, state, card)
    run.folder.note(model={"rounds": run.trained.rounds, "samples": run.trained.samples, "sha256": sha256})


def _versions() -> dict[str, str]:
    return {
        "fedqc": fedqc.__version__,
        "flwr": flwr.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
