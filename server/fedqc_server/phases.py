"""The phases of a run, one function each.

A site that fails, is late or answers nonsense costs the run that site in that phase, never the run; a run
ends early only when fewer than `sites.minimum` are left. What a phase came to is on disk before the next one
starts, and a run that was cut off goes on with the first phase that was not finished.
"""

import dataclasses
import platform
from collections.abc import Callable, Collection
from itertools import product
from typing import Any, Literal

import flwr
import numpy as np
import torch
from flwr.serverapp import Grid
from torch import nn

import fedqc
from fedqc.config import FederationConfig, QCConfig
from fedqc.curation.calibration import BINS, Calibration
from fedqc.curation.rules import needs_calibration
from fedqc.degradation.samples import stored_shares
from fedqc.errors import ConfigError, FedQCError, ModelError, QuorumError
from fedqc.label_sources.making import SEGMENTER_SOURCES, segmenter_source
from fedqc.label_sources.segmenters import SegmenterSource
from fedqc.methods.base import Stage as MethodStage
from fedqc.methods.base import check_start, method_for_curation
from fedqc.model import ModelCard, load_model, save_model
from fedqc.protocol import (
    PROTOCOL_VERSION,
    CalibrateRequest,
    CrossCheckRequest,
    EvaluateSegmentationRequest,
    HandshakeReply,
    HandshakeRequest,
    Provenance,
    Request,
    ScoreRequest,
    StatisticsReply,
    SummariseRequest,
    TrainRequest,
    TrainSegmentationRequest,
    TrainSegmenterRequest,
    Weights,
)
from fedqc.reports.build import build_coordinator_report
from fedqc.reports.words import reason_in_words
from fedqc.seeding import derive_seed
from fedqc.segmentation import Segmentation
from fedqc.statistics.update_privacy import DELTA, epsilon
from fedqc.task import load_task
from fedqc_server.averaging import check_update, packed
from fedqc_server.checkpoint import TrainingState, load_checkpoint
from fedqc_server.cross_check import FEWEST_SITES, halves, suspect, usual_quality
from fedqc_server.exchange import Exchange
from fedqc_server.roster import Clock, Node, is_expected, wait_for_nodes
from fedqc_server.rounds import NothingToTrainError, Stage, train
from fedqc_server.run import EXCUSED, Run
from fedqc_server.run_folder import RunFolder, described


def run_federation(
    grid: Grid,
    config: FederationConfig,
    folder: RunFolder,
    *,
    seed: int,
    clock: Clock | None = None,
    only: Collection[str] | None = None,
) -> None:
    """Lead one run from the handshake to the report, or from where it was cut off.

    Args:
        grid: Flower's way to the sites.
        config: the federation.
        folder: where everything goes.
        seed: seed of the run; one seed gives one result.
        clock: time, for waiting.
        only: names of the phases wanted, out of `PHASES`; None: all of them. The handshake is always made.

    Raises:
        ConfigError: task, method, initial model or phases cannot be used; nothing is written.
        FedQCError: whatever ends the run; `run.json` says so too.
    """
    unknown = sorted(set(only or ()) - set(PHASES))
    if unknown:
        raise ConfigError(f"no phase is called {', '.join(unknown)}; phases are {', '.join(PHASES)}")
    task = load_task(config.task)
    exchange = Exchange(grid, clock or Clock(), task)
    method, segmentation = method_for_curation(config, task), Segmentation(task, config.segmentation)
    run = Run(exchange, config, task, method, segmentation, folder, seed)
    _initial_qc(run)  # a model that cannot be used is refused before anything is written
    folder.start(
        federation=config.name,
        config=described(config, task),
        task=task.digest,
        versions=_versions(),
        seed=seed,
    )
    if config.privacy.update_noise:
        folder.note(update_privacy=_privacy_of_updates(run))
    try:
        with folder.phase("handshake"):
            handshake(run)
        for name, work in _phases(run).items():
            if name not in folder.done and (only is None or name in only):
                with folder.phase(name):
                    work(run)
    except BaseException as error:
        # The text of an unexpected error may hold anything; its type is enough here, the traceback follows.
        reason = str(error) if isinstance(error, FedQCError) else type(error).__name__
        folder.finish("failed" if isinstance(error, Exception) else "interrupted", reason)
        build_coordinator_report(folder.path)
        raise
    folder.finish("completed")
    build_coordinator_report(folder.path)


# ----------------------------------------------------------------------------------------------- phases


def handshake(run: Run) -> None:
    """Find out which node is which site, and leave out by name those that do not fit."""
    sites, roster = run.config.sites, run.roster

    def tell(there: list[str], missing: list[str], seconds: float) -> None:
        run.folder.event("sites-awaited", online=there, missing=missing, seconds=round(seconds))

    nodes = wait_for_nodes(run.exchange.grid, sites, run.exchange.clock, tell)
    # Nodes without a registered name are asked under a made-up one.
    asked = {node.name or f"node-{node.id}": node for node in nodes}
    claims: dict[str, list[Node]] = {}
    request = HandshakeRequest(**run.common())
    targets = {label: node.id for label, node in sorted(asked.items())}
    run.folder.event("sites-asked", sites=len(targets))
    for label, reply in run.exchange.ask(request, targets, HandshakeReply, sites.wait):
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
        run.folder.event("site-left-out", site=name, reason=reason, meaning=reason_in_words(reason))
    run.folder.note(sites={"joined": sorted(roster.joined), "left_out": roster.left_out})
    run.check_quorum(len(roster.joined), sites.minimum, roster.left_out, "handshake")


def summarise(run: Run) -> None:
    """Ask the sites what their data look like."""
    _ask_statistics(run, SummariseRequest(**run.common()), "summarise", run.roster.joined)


def train_segmenters(run: Run) -> None:
    """Train the segmenters across the sites whose labels QC models learn from; the labels stay there."""
    for stage in _segmenter_stages(run):
        try:
            train(run, stage, set(run.roster.joined))
        except NothingToTrainError as error:  # QC training can do without
            run.folder.event("phase-skipped", reason=str(error))
            return


def cross_check(run: Run) -> None:
    """Have each half of the sites' references judged by a model of the other half; see `cross_check.py`."""
    rounds = run.config.qc.cross_check_rounds
    # Who may not tell how many references there are may not tell what they score either. Taken from what is
    # on disk, so that a run that goes on with other sites online deals them as before.
    told = run.folder.statistics.get("sites", {})
    sites = [site for site in told if "references" in told[site].get("summarise", {})]
    if rounds == 0 or len(sites) < FEWEST_SITES:
        few = f"{len(sites)} sites told of references; it takes {FEWEST_SITES}"
        why = few if rounds else "switched off"
        run.folder.event("phase-skipped", reason=why)
        return
    if not run.method.stages():
        run.folder.event("phase-skipped", reason=f"method {run.method.name!r} learns nothing from references")
        return
    parts = halves(sites, run.seed)
    try:
        models = [
            _train_stages(run, f"check-{number}", part, rounds=rounds, minimum=1)[0]
            for number, part in enumerate(parts, start=1)
        ]
    except QuorumError as error:  # nobody is judged, and the run can do without
        run.folder.event("phase-skipped", reason=str(error))
        return
    for judged, weights in zip(parts, reversed(models), strict=True):
        request = CrossCheckRequest(**run.common(), qc=_qc_for_sites(run), weights=weights)
        _ask_statistics(run, request, "cross-check", judged, minimum=0)
    told = run.folder.statistics["sites"]
    answers = {site: told[site]["cross-check"] for site in sites if "cross-check" in told[site]}
    usual, threshold = usual_quality(answers), run.config.curation.threshold
    is_dsc = "stars" not in run.method.figures
    if usual is not None and is_dsc and usual < threshold:
        run.folder.event(
            "phase-skipped",
            reason=f"the models predict a DSC of {usual:.2f} for the references of most sites, below the "
            f"threshold {threshold:g}: they are trained too little to judge; raise qc.cross_check_rounds",
        )
        return
    found = suspect(answers, parts)
    for site, suspicion in found.items():
        run.folder.event("site-suspected", site=site, quality=suspicion.quality, others=suspicion.others)
    run.folder.learned("suspected", {site: dataclasses.asdict(one) for site, one in found.items()})


def train_qc(run: Run) -> None:
    """Train the QC model at the sites whose references are trusted."""
    sites = set(run.roster.joined) - run.suspected
    weights, state = _train_stages(run, "qc", sites, minimum=run.config.sites.minimum)
    _store(run, "qc", weights, state)


def calibrate(run: Run) -> None:
    """Ask the sites how well the model judges labels of known quality; untrusted references know none."""
    weights, _ = _trained_qc(run)
    request = CalibrateRequest(
        **run.common(), qc=_qc_for_sites(run), weights=weights, curation=run.config.curation
    )
    _ask_statistics(run, request, "calibrate", set(run.roster.joined) - run.suspected)
    told = run.folder.statistics["sites"]
    answers = [told[site].get("calibrate", {}) for site in sorted(told) if site not in run.suspected]
    counts = {
        name: [sum(column) for column in zip(*(one[name] for one in answers if name in one), strict=True)]
        for name in ("failures", "others")
    }
    run.folder.learned("calibration", {name: found or [0] * BINS for name, found in counts.items()})


def score(run: Run) -> None:
    """Have the sites score their candidates; the model stays with them."""
    weights, state = _trained_qc(run)
    request = ScoreRequest(
        **run.common(),
        qc=_qc_for_sites(run),
        weights=weights,
        curation=run.config.curation,
        calibration=_pooled_calibration(run),
        provenance=_provenance(state),
    )
    suspected = set(run.roster.joined) & run.suspected
    if suspected:  # they are told apart in a request of their own, which no other site sees
        untrusted = request.model_copy(update={"trusted": False})
        _ask_statistics(run, untrusted, "score", suspected, minimum=0)
    minimum = max(0, run.config.sites.minimum - len(suspected))
    _ask_statistics(run, request, "score", set(run.roster.joined) - suspected, minimum=minimum)


def _pooled_calibration(run: Run) -> Calibration | None:
    """What all sites counted of labels of known quality; None where no rule asks, or none could tell."""
    counts = run.folder.statistics.get("calibration", {})
    if not (needs_calibration(run.config.curation) and any(map(any, counts.values()))):
        return None
    return Calibration.model_validate(counts)


def train_segmentation(run: Run) -> None:
    """Train the segmentation model on what each site kept, unless hardly any site kept anything."""
    config = run.config.segmentation

    def request(weights: Weights, number: int) -> Request:
        return TrainSegmentationRequest(
            **run.common(),
            segmentation=config,
            weights=weights,
            round=number,
            **_terms(run, config.rounds),
        )

    stage = Stage(
        name="segmentation",
        rounds=config.rounds,
        samples=config.local_steps * config.batch_size,
        deadline=config.deadline,
        minimum=run.config.sites.minimum,
        request=request,
        initial=lambda: _weights(run.segmentation.build(derive_seed(run.seed, "initial"))),
    )
    sites = set(run.roster.joined)
    if "score" in run.folder.done:  # whoever missed it has the decisions of an earlier run, if any
        told = run.folder.statistics.get("sites", {})
        sites = {site for site in sites if "score" in told.get(site, {})}
    if config.references:  # one request goes to all, and references that are not trusted are used for nothing
        sites -= run.suspected
    try:
        weights, state = train(run, stage, sites)
    except NothingToTrainError as error:
        run.folder.event("phase-skipped", reason=str(error))
        return
    _store(run, "segmentation", weights, state)


def evaluate_segmentation(run: Run) -> None:
    """Have the sites try the segmentation model on their references; it stays with them."""
    if "segmentation" not in run.folder.record.get("models", {}):
        run.folder.event("phase-skipped", reason="no segmentation model was trained")
        return
    if "train.segmentation" not in run.folder.done:
        raise _untrained(run, "segmentation")
    weights, state = _trained(run, "segmentation")
    request = EvaluateSegmentationRequest(
        **run.common(),
        segmentation=run.config.segmentation,
        weights=weights,
        provenance=_provenance(state),
    )
    deadline = run.config.segmentation.deadline
    _ask_statistics(run, request, "evaluate.segmentation", run.roster.joined, deadline=deadline)
    told = run.folder.statistics["sites"]
    for site in run.suspected:  # it gets the model, but references that are not trusted are no measure of it
        told.get(site, {}).pop("evaluate.segmentation", None)
    run.folder.learned("sites", told)


def report(run: Run) -> None:
    """Add up over the sites what they counted, each sum with the number of sites that told theirs."""
    pooled: dict[str, dict[str, dict[str, int]]] = {}
    for answers in run.folder.statistics.get("sites", {}).values():
        for phase in ("summarise", "score"):
            for key, value in answers.get(phase, {}).items():
                if isinstance(value, int):
                    total = pooled.setdefault(phase, {}).setdefault(key, {"sum": 0, "sites": 0})
                    total["sum"] += value
                    total["sites"] += 1
    run.folder.learned("pooled", pooled)


PHASES: dict[str, Callable[[Run], None]] = {
    "summarise": summarise,
    "train.segmenters": train_segmenters,
    "cross-check": cross_check,
    "train.qc": train_qc,
    "calibrate": calibrate,
    "score": score,
    "train.segmentation": train_segmentation,
    "evaluate.segmentation": evaluate_segmentation,
    "report": report,
}
"""The phases behind the handshake, in their order."""


def _phases(run: Run) -> dict[str, Callable[[Run], None]]:
    """Those that this run has a use for."""
    useless = set() if _segmenter_stages(run) else {"train.segmenters"}
    return {name: work for name, work in PHASES.items() if name not in useless}


# -------------------------------------------------------------------------------------------- exchanges


def _ask_statistics(
    run: Run,
    request: Request,
    phase: str,
    sites: Collection[str],
    *,
    minimum: int | None = None,
    deadline: float | None = None,
) -> None:
    """One phase of statistics; a site that a phase is not for counts as if it had answered."""
    targets, failed = run.online(sites)
    n_answers = 0
    statistics = run.folder.statistics.get("sites") or {site: {} for site in sorted(run.roster.joined)}
    run.folder.event("sites-asked", sites=len(targets))
    seconds = deadline or run.config.qc.deadline
    for site, reply in run.exchange.ask(request, targets, StatisticsReply, seconds):
        if isinstance(reply, str):
            failed[site] = reply
        else:
            statistics.setdefault(site, {})[phase] = reply.values
            n_answers += 1
            run.folder.event("statistics-received", site=site)
    run.report_failed(failed)
    before = run.folder.statistics.get("failed", {})
    others = {site: reason for site, reason in before.get(phase, {}).items() if site not in sites}
    run.folder.learned("failed", before | {phase: dict(sorted((others | failed).items()))})
    run.folder.learned("sites", statistics)
    excused = sum(reason in EXCUSED for reason in failed.values())
    needed = run.config.sites.minimum if minimum is None else minimum
    run.check_quorum(n_answers + excused, needed, failed, phase)


def _misfit(reply: HandshakeReply, node: Node, run: Run) -> str | None:
    """Why a site does not fit this federation, or None."""
    if node.name and reply.site != node.name:
        return "name-differs-from-key"
    if not is_expected(reply.site, run.config.sites):
        return "not-expected"
    if reply.protocol != PROTOCOL_VERSION:
        return "protocol-differs"
    return "task-differs" if reply.task != run.task.digest else None


# ----------------------------------------------------------------------------------------------- models


def _train_stages(
    run: Run, name: str, sites: Collection[str], *, minimum: int, rounds: int | None = None
) -> tuple[Weights, TrainingState]:
    """Train all stages of the QC method, one after another.

    Args:
        run: this one.
        name: of the training.
        sites: that take part.
        minimum: fewest sites whose updates make a round.
        rounds: of each stage at most; None: as many as it has.

    Returns:
        The weights of the whole network, and how they came about.
    """
    weights, states = _initial_qc(run), []
    for stage in run.method.stages():
        planned = _qc_stage(run, name, stage, weights, minimum=minimum, rounds=rounds)
        trained, state = train(run, planned, sites)
        weights = _with_part(weights, stage.part, trained)
        states.append(state)
    return weights, _joined(states)


def _trained_qc(run: Run) -> tuple[Weights, TrainingState]:
    """The QC model whose training is finished.

    Raises:
        ConfigError: it was not trained in this run.
    """
    weights, states = _initial_qc(run), []
    if "train.qc" not in run.folder.done:
        raise _untrained(run, "qc")
    for stage in run.method.stages():
        trained, state = _trained(run, _stage_name("qc", stage))
        weights = _with_part(weights, stage.part, trained)
        states.append(state)
    return weights, _joined(states)


def _joined(states: list[TrainingState]) -> TrainingState:
    """How a network of several parts came about; none is trained where there is no stage."""
    if not states:
        return TrainingState()
    return states[-1].model_copy(
        update={name: sum(getattr(state, name) for state in states) for name in ("rounds", "samples")}
    )


def _stage_name(training: str, stage: MethodStage) -> str:
    """Under which name a stage's rounds are kept; a method of one stage has its training's own."""
    return training if stage.name == "qc" else f"{training}-{stage.name}"


def _qc_stage(
    run: Run, training: str, stage: MethodStage, whole: Weights, *, minimum: int, rounds: int | None
) -> Stage:
    """Training of one part of a QC model."""
    rounds = stage.rounds if rounds is None else min(rounds, stage.rounds)
    frozen = {
        name: values
        for name, values in whole.items()
        if any(name.startswith(f"{part}.") for part in stage.needs)
    }

    def request(weights: Weights, number: int) -> Request:
        return TrainRequest(
            **run.common(),
            qc=_qc_for_sites(run),
            stage=stage.name,
            weights=weights,
            frozen=packed(frozen, run.config.averaging.transfer),
            round=number,
            **_terms(run, rounds),
        )

    return Stage(
        name=_stage_name(training, stage),
        rounds=rounds,
        samples=stage.local_steps * stage.batch_size,
        deadline=run.config.qc.deadline,
        minimum=minimum,
        request=request,
        initial=lambda: _part(whole, stage.starts_from or stage.part),
    )


def _part(whole: Weights, part: str) -> Weights:
    """The weights of a part, by the names that they have in it."""
    begin = f"{part}." if part else ""
    return {name.removeprefix(begin): values for name, values in whole.items() if name.startswith(begin)}


def _with_part(whole: Weights, part: str, weights: Weights) -> Weights:
    """The whole with other weights of a part, in the order that it had."""
    begin = f"{part}." if part else ""
    return whole | {f"{begin}{name}": values for name, values in weights.items()}


def _segmenter_stages(run: Run) -> list[Stage]:
    """Training of every network of every source that has a share, fold by fold."""
    sources = [
        segmenter_source(name, run.task, run.config.qc.sources)
        for name in stored_shares(run.config.qc.samples)
        if name in SEGMENTER_SOURCES
    ]
    return [
        _segmenter_stage(run, source, variant, fold)
        for source in sources
        for fold, variant in product(range(source.config.folds), source.variants)
    ]


def _segmenter_stage(run: Run, source: SegmenterSource, variant: str, fold: int) -> Stage:
    """Training of one of a source's networks, on what is not in a fold."""
    qc = run.config.qc

    def request(weights: Weights, number: int) -> Request:
        return TrainSegmenterRequest(
            **run.common(),
            qc=_qc_for_sites(run),
            weights=weights,
            round=number,
            source=source.name,
            variant=variant,
            fold=fold,
            **_terms(run, qc.sources.rounds),
        )

    return Stage(
        name=f"{source.name}-{variant}-{fold + 1}",
        rounds=qc.sources.rounds,
        samples=qc.sources.local_steps * qc.sources.batch_size,
        deadline=qc.deadline,
        minimum=run.config.sites.minimum,
        request=request,
        initial=lambda: _weights(source.build(variant, derive_seed(run.seed, "initial"))),
    )


def _terms(run: Run, rounds: int) -> dict[str, Any]:
    """What every request for training says."""
    averaging, privacy = run.config.averaging, run.config.privacy
    return {
        "rounds": rounds,
        "proximal": averaging.proximal if averaging.strategy == "fedprox" else 0.0,
        "update_clip": privacy.update_clip,
        "update_noise": privacy.update_noise,
    }


def _privacy_of_updates(run: Run) -> dict[str, Any]:
    """What all updates of a site in a training tell of its data at most; see `fedqc.statistics`."""
    config = run.config
    stages = run.method.stages()
    checks = [min(stage.rounds, config.qc.cross_check_rounds) for stage in stages]
    rounds = {
        "qc": sum(stage.rounds for stage in stages) + sum(checks),
        "segmentation": config.segmentation.rounds,
    }
    if segmenters := sum(stage.rounds for stage in _segmenter_stages(run)):
        rounds["segmenters"] = segmenters
    spent = {name: round(epsilon(config.privacy.update_noise, count), 3) for name, count in rounds.items()}
    return {"delta": DELTA, "epsilon": spent}


def _initial_qc(run: Run) -> Weights:
    """The QC model the run starts from: a stored one, or a fresh one that the seed decides."""
    check_start(run.method)
    weights = _weights(run.method.build(derive_seed(run.seed, "initial")))
    path = run.config.qc.initial
    if path is None:
        return weights
    stored = load_model(path, run.task)
    state = run.method.initial_state(stored.network.state_dict())
    initial = {name: tensor.numpy().copy() for name, tensor in state.items()}
    if stored.method.name != run.config.qc.method or check_update(initial, weights):
        raise ModelError(
            f"{path}: a model of method {stored.method.name!r} that does not fit qc.method "
            f"{run.config.qc.method!r}; start from a model of the same method, or without qc.initial"
        )
    return initial


def _weights(network: nn.Module) -> Weights:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def _qc_for_sites(run: Run) -> QCConfig:
    """The QC configuration without the coordinator's own path."""
    return run.config.qc.model_copy(update={"initial": None})


def _trained(run: Run, stage: str) -> tuple[Weights, TrainingState]:
    """What a finished training came to.

    Raises:
        ConfigError: it was not trained in this run.
    """
    found = load_checkpoint(run.folder.checkpoints / f"{stage}.safetensors")
    if found is None:
        raise _untrained(run, stage)
    return found.weights, found.state


def _untrained(run: Run, stage: str) -> ConfigError:
    return ConfigError(f"{run.folder.path}: no {stage} model was trained in this run; run train.{stage} too")


def _provenance(state: TrainingState) -> Provenance:
    return Provenance(rounds=state.rounds, samples=state.samples, sites=state.sites)


def _store(run: Run, stage: Literal["qc", "segmentation"], weights: Weights, state: TrainingState) -> None:
    """Put a trained model into the run's folder."""
    card = ModelCard(
        stage=stage,
        task=run.task,
        qc=run.config.qc if stage == "qc" else None,
        segmentation=run.config.segmentation if stage == "segmentation" else None,
        federation=run.config.name,
        seed=run.seed,
        **_provenance(state).model_dump(),
    )
    tensors = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    sha256 = save_model(run.folder.models / stage, tensors, card)
    known = run.folder.record.get("models", {})
    made = {"rounds": state.rounds, "samples": state.samples, "sha256": sha256}
    run.folder.note(models=known | {stage: made})


def _versions() -> dict[str, str]:
    return {
        "fedqc": fedqc.__version__,
        "flwr": flwr.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
