"""Federated training of one network: rounds of local training and averaging.

A site that raises, is late, or sends what cannot be averaged costs the run that site in that round; after
`MAX_STRIKES` such rounds in a row it is out of the training. After every round the state is on disk, and
training that was cut off goes on behind the last finished round.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from fedqc.errors import QuorumError
from fedqc.protocol import ErrorCode, Request, TrainReply, Weights
from fedqc_server.averaging import Updates, check_update, packed, rule_of
from fedqc_server.checkpoint import Checkpoint, TrainingState, load_checkpoint, save_checkpoint
from fedqc_server.fedadam import adam_step
from fedqc_server.run import EXCUSED, Run

MAX_STRIKES = 3
"""Rounds in a row that a site may fail before it is out of the training."""


class NothingToTrainError(QuorumError):
    """Too few sites have anything to train on; asking again would not help."""


@dataclass(frozen=True)
class Stage:
    """What is trained, and how."""

    name: str
    rounds: int
    samples: int
    """The most training samples that a site may say it drew in a round: steps times batch size."""
    deadline: float
    """Seconds a round."""
    minimum: int
    """Fewest sites whose updates make a round."""
    request: Callable[[Weights, int], Request]
    """What the sites are asked, from the weights and the number of the round."""
    initial: Callable[[], Weights]
    """The weights before the first round."""


def train(run: Run, stage: Stage, sites: Collection[str]) -> tuple[Weights, TrainingState]:
    """Train a network at `sites`, from the start or from where it was cut off.

    Returns:
        The weights after the last round, and how they came about.

    Raises:
        NothingToTrainError: so many sites are excused that fewer than `stage.minimum` are left.
        QuorumError: fewer than `stage.minimum` sites sent an update that can be averaged.
    """
    checkpoint = run.folder.checkpoints / f"{stage.name}.safetensors"
    now = load_checkpoint(checkpoint) or Checkpoint(stage.initial(), TrainingState())
    while now.state.rounds < stage.rounds:
        now = _round(run, stage, sites, now)
        save_checkpoint(checkpoint, *now)
        state = now.state
        _tell(run, stage, state)
        loss = state.history[-1]["loss"]
        run.folder.event(
            "round-finished", round=state.rounds, rounds=stage.rounds, stage=stage.name, loss=loss
        )
    if not checkpoint.exists():  # no round at all
        save_checkpoint(checkpoint, *now)
    _tell(run, stage, now.state)
    return now.weights, now.state


def _round(run: Run, stage: Stage, sites: Collection[str], before: Checkpoint) -> Checkpoint:
    """One round: everybody trains, fit updates are averaged."""
    weights, state, moments = before
    averaging, number = run.config.averaging, state.rounds + 1
    where: dict[str, Any] = {"round": number, "rounds": stage.rounds, "stage": stage.name}
    run.folder.event("round-started", **where)
    begin, received = time.monotonic(), 0
    sent = packed(weights, averaging.transfer)
    targets, failed = run.online(set(sites) - set(state.excused) - set(state.out))
    told: dict[str, dict[str, Any]] = {}
    with Updates(run.folder.path) as updates:
        for site, reply in run.exchange.ask(stage.request(sent, number), targets, TrainReply, stage.deadline):
            reason = reply if isinstance(reply, str) else _unfit(reply, sent, stage.samples)
            if isinstance(reply, str) or reason is not None:
                failed[site] = str(reason)
                continue
            updates.add(site, reply.weights, reply.samples, sent)
            received += _size(reply.weights)
            told[site] = {"samples": reply.samples, "losses": reply.losses}
            if reply.labels:
                told[site]["labels"] = dict(reply.labels)
            run.folder.event("update-received", site=site, loss=reply.losses.get("loss"), **where)
        for site in updates.refuse_huge(averaging.norm_factor):
            failed[site] = "norm-exceeds-bound"
            del told[site]
        told, failed = dict(sorted(told.items())), dict(sorted(failed.items()))  # not as they came
        run.report_failed(failed, **where)
        excused = {*state.excused, *(site for site, reason in failed.items() if reason in EXCUSED)}
        able = set(sites) & set(run.roster.joined) - excused  # those that fail, or are out, too
        if excused and len(able) < stage.minimum:
            raise NothingToTrainError(
                f"{stage.name}: {len(able)} sites have something to train on, at least {stage.minimum} are "
                f"needed (nothing: {', '.join(sorted(excused))})"
            )
        run.check_quorum(len(told), stage.minimum, failed, f"{stage.name}, round {number} of {stage.rounds}")
        after, samples, averaged = updates.combined(rule_of(averaging)), updates.samples, updates.sites
    run.folder.note_round(
        stage.name,
        round=number,
        seconds=round(time.monotonic() - begin, 3),
        bytes_sent=_size(sent) * len(targets),
        bytes_received=received,
    )
    if averaging.strategy == "fedadam":
        after, moments = adam_step(weights, after, moments, number, averaging)

    strikes = {
        site: state.strikes.get(site, 0) + (reason != ErrorCode.NOT_NOW)
        for site, reason in failed.items()
        if site not in excused
    }
    out = {site: failed[site] for site, count in strikes.items() if count >= MAX_STRIKES}
    for site, reason in out.items():
        run.folder.event("site-out", site=site, reason=reason, **where)
    entry = {"round": number, "loss": _mean_loss(told), "sites": told, "failed": failed}
    now = TrainingState(
        rounds=number,
        samples=state.samples + samples,
        sites=averaged,
        excused=tuple(sorted(excused)),
        strikes=strikes,
        out=state.out | out,
        history=(*state.history, entry),
    )
    return Checkpoint(after, now, moments)


def _size(weights: Weights) -> int:
    """Bytes of the numbers."""
    return sum(values.nbytes for values in weights.values())


def _tell(run: Run, stage: Stage, state: TrainingState) -> None:
    """Write the training so far into `statistics.json`."""
    if state.out:
        run.folder.learned("out", run.folder.statistics.get("out", {}) | {stage.name: state.out})
    run.folder.learned("train", run.folder.statistics.get("train", {}) | {stage.name: list(state.history)})


def _unfit(reply: TrainReply, current: Weights, most_samples: int) -> str | None:
    """Why an update is not averaged, or None."""
    # A site cannot buy weight with samples it was not asked to draw.
    return "samples-differ" if reply.samples > most_samples else check_update(reply.weights, current)


def _mean_loss(sites: dict[str, dict[str, Any]]) -> float | None:
    """Mean loss over the sites that told theirs, by samples."""
    told = [(site["losses"]["loss"], site["samples"]) for site in sites.values() if "loss" in site["losses"]]
    total = sum(samples for _, samples in told)
    return sum(loss * samples for loss, samples in told) / total if total else None
