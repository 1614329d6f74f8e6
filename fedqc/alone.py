"""A QC model trained on one machine, without a federation, from cases whose labels are right.

OUT/              the model, once it is trained and tried
OUT.training/     until then, so that it can go on where it was cut off:
    plan.json     what is trained
    model/        the network after the last finished round
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.splits import split_references
from fedqc.compute import Compute, with_smaller_batches
from fedqc.config import FrozenModel, QCConfig, parse
from fedqc.degradation.samples import ChosenLabels
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError, ModelError, TrainingError
from fedqc.files import write_json
from fedqc.label_sources.making import CaseLabels, make_stored_labels, stored_labels
from fedqc.methods.base import (
    FEWEST_REFERENCE_PATIENTS,
    Known,
    Method,
    RoundPlan,
    RoundResult,
    Stage,
    begin_stage,
    check_start,
    get_method,
)
from fedqc.model import ModelCard, has_model, load_model, load_weights, reference_files, save_model
from fedqc.ratings import Rating
from fedqc.seeding import generator
from fedqc.task import Task
from fedqc.trial import Tried, trial_figures, try_model

NAME = "alone"
"""Stands in what is drawn where a federation has the name of a site."""


@dataclass(frozen=True)
class Job:
    """What is to be trained."""

    task: Task
    qc: QCConfig
    seed: int
    """Decides everything that is drawn."""
    licence: str | None = None
    """Of the weights, for the model's card."""
    ratings: Mapping[str, Sequence[Rating]] = field(default_factory=dict)
    """What people thought of the cases' labels, by the case's id."""


@dataclass(frozen=True)
class TrainedAlone:
    """A model, and how well it does."""

    card: ModelCard
    tried: Sequence[Tried]
    """Labels of the held-back cases; none where no patient could be spared."""


class _Plan(FrozenModel):
    """What decides the weights: a training goes on only with the same."""

    task: Task
    qc: QCConfig
    seed: int
    cases: str
    """SHA-256 of the ids, the patients and the files' contents of all cases."""
    ratings: str
    """SHA-256 of all ratings."""


def train_alone(
    job: Job,
    references: Sequence[CaseFiles],
    out: Path,
    *,
    cache: Path,
    compute: Compute,
    workers: int,
    display: Display,
) -> TrainedAlone:
    """Train a QC model on three quarters of the patients, try it on the others, and store it.

    A training that was cut off goes on after its last finished round.

    Args:
        job: What to train.
        references: Usable cases, one or more, whose labels are right.
        out: Absolute path of the model's folder, which is not there or empty.
        cache: Folder for prepared cases, and for labels that are made of them.
        compute: Device and precision.
        workers: Threads that prepare cases.
        display: Told how it goes.

    Raises:
        ConfigError: task and configuration do not fit the method, or beside `out` lies another training.
        DataError: a case cannot be read any more, references of too few patients are there to compare with,
            or the cache cannot be written.
        ModelError: the model that training starts from or goes on from cannot be used.
        TrainingError: training cannot go on.
        DeviceError: the GPU's memory is too small for one sample.
    """
    method = get_method(job.qc.method)(job.task, job.qc)
    parts = split_references(references, job.seed)
    _check_references(method, *parts)
    cases = CaseCache(cache, job.task)
    cases.prepare(references, workers=workers, progress=partial(display.progress, "preparing the cases"))
    training, held_back = (CachedCases(cases, part) for part in parts)
    display.say(f"learns from {len(training)} cases; {len(held_back)} of other patients are held back")
    folder = out.with_name(f"{out.name}.training")
    _begin(folder, job, CachedCases(cases, references).digest())
    labels = _stored_labels(job, training, cache / "labels", compute, display)
    known = Known(labels=labels, ratings=job.ratings, kept=cache / "estimates")
    network, card = train_and_fit(
        job, method, training, known, folder / "model", compute=compute, display=display
    )

    def progress(done: int, total: int) -> None:
        display.progress("trying the model on held-back cases", done, total)

    rng = generator(job.seed, NAME, "trial")
    tried = try_model(method, network, held_back, rng, compute, progress=progress)
    figures = trial_figures(tried, generator(job.seed, NAME, "bootstrap")) if tried else {}
    card = card.model_copy(update={"figures": figures})
    save_model(out, network.state_dict(), card)
    shutil.rmtree(folder, ignore_errors=True)
    return TrainedAlone(card, tried)


def _check_references(method: Method, training: Sequence[CaseFiles], held_back: Sequence[CaseFiles]) -> None:
    """Refuse references of too few patients where they are compared with.

    Raises:
        DataError: they are.
    """
    patients, spared = ({files.patient for files in part} for part in (training, held_back))
    compares = method.needs_references or any(stage.needs_references for stage in method.stages())
    if compares and len(patients) < FEWEST_REFERENCE_PATIENTS:
        raise DataError(
            f"method {method.name!r} compares with reference cases of {FEWEST_REFERENCE_PATIENTS} patients "
            f"or more, beside those held back; found {len(patients)}, and {len(spared)} held back; give it "
            f"cases of {FEWEST_REFERENCE_PATIENTS + 1} patients or more"
        )


def _begin(folder: Path, job: Job, cases: str) -> None:
    """Write down what is trained, or look whether it is what was begun in `folder`.

    Raises:
        ConfigError: something else was begun, or what it was cannot be read.
    """
    rated = [asdict(rating) for case in sorted(job.ratings) for rating in job.ratings[case]]
    ratings = hashlib.sha256(json.dumps(rated).encode()).hexdigest()
    plan = _Plan(task=job.task, qc=job.qc, seed=job.seed, cases=cases, ratings=ratings)
    path = folder / "plan.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan.model_dump(mode="json"))
        return
    anew = f"or remove {folder} to begin anew"
    try:
        before = parse(json.loads(path.read_bytes()), _Plan, source=str(path))
    except (ConfigError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); restore it, {anew}") from None
    then, now = (_flat(one.model_dump(mode="json")) for one in (before, plan))
    changed = sorted(key for key in then.keys() | now.keys() if then.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{folder}: holds an unfinished training with other {', '.join(changed)}; give what was given "
            f"then, {anew}"
        )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of `qc`, dotted, beside the others; a task is one value."""
    rest = {key: value for key, value in values.items() if key != "qc"}
    return rest | {f"qc.{key}": value for key, value in values["qc"].items()}


def _stored_labels(
    job: Job, cases: CachedCases, folder: Path, compute: Compute, display: Display
) -> dict[str, CaseLabels]:
    """The labels that segmenters make of the cases, of the sources that have a share in training."""

    def progress(source: str, done: int, total: int) -> None:
        display.progress(f"making labels ({source})", done, total)

    make_stored_labels(folder, cases, job.task, job.qc, seed=job.seed, compute=compute, progress=progress)
    return stored_labels(folder, cases, job.task, job.qc, job.seed)


def train_and_fit(
    job: Job,
    method: Method,
    cases: CachedCases,
    known: Known,
    folder: Path,
    *,
    compute: Compute,
    display: Display,
    references: CachedCases | None = None,
) -> tuple[nn.Module, ModelCard]:
    """Train all rounds that a folder does not hold yet, then fit what is fitted (see `train_rounds`).

    The folder then holds a model that is ready to score. Only `references` are compared with and fitted to;
    without them all cases are.
    """
    references = cases if references is None else references
    method.references = references
    network, card = train_rounds(job, method, cases, known, folder, compute=compute, display=display)
    rng, progress = generator(job.seed, NAME, "fit"), partial(display.progress, "fitting to references")
    method.fit(network, references, compute, rng, progress)
    card = card.model_copy(update={"references": reference_files(method, references)})
    save_model(folder, network.state_dict(), card)
    return network, card


def train_rounds(
    job: Job,
    method: Method,
    cases: CachedCases,
    known: Known,
    folder: Path,
    *,
    compute: Compute,
    display: Display,
) -> tuple[nn.Module, ModelCard]:
    """Train all rounds of all stages that a folder does not hold yet.

    Args:
        job: What to train.
        method: The method of the job.
        cases: To train on; each stage takes those that it may learn from.
        known: What else is known of the cases.
        folder: Where the network is stored after each round, and was where the training was cut off.
        compute: Device and precision.
        display: Told how it goes.

    Returns:
        The trained network, and its card.

    Raises:
        ModelError: the model that training starts from or goes on from cannot be used.
        TrainingError: training cannot go on.
        DeviceError: the GPU's memory is too small for one sample.
    """
    if has_model(folder):
        stored = load_model(folder, job.task)
        network, card = stored.network, stored.card.model_copy(update={"licence": job.licence})
        display.say(f"goes on after round {card.rounds} of {sum(one.rounds for one in method.stages())}")
    else:
        network, card = _untrained(job, method), _card(job, cases)
    done = card.rounds
    for stage in method.stages():
        note, what = "", "training" if stage.name == "qc" else f"training {stage.name}"
        chosen, own = _learned_by(stage, cases, known)
        for number in range(done + 1, stage.rounds + 1):
            if number == 1:
                begin_stage(network, stage)
            plan = RoundPlan(
                seed=job.seed,
                site=NAME,
                round=number,
                rounds=stage.rounds,
                steps=stage.local_steps,
                batch_size=stage.batch_size,
                stage=stage.name,
            )
            progress = partial(display.progress, f"{what}, steps", note=note)
            result = _train_round(
                partial(method.train_round, network, chosen, compute=compute, progress=progress, known=own),
                network,
                plan,
                display.say,
            )
            loss = result.losses.get("loss")
            note = "" if loss is None else f"loss {loss:.3f}"
            card = card.model_copy(
                update={"rounds": card.rounds + 1, "samples": card.samples + result.samples}
            )
            save_model(folder, network.state_dict(), card)
        done = max(0, done - stage.rounds)
    return network, card


def _learned_by(stage: Stage, cases: CachedCases, known: Known) -> tuple[CachedCases, Known]:
    """The cases that a stage learns from, and what is known of them.

    Raises:
        TrainingError: there are none.
    """
    chosen = cases.where(lambda files: stage.may_learn_from(files, known.ratings))
    if not chosen:
        rated = stage.learns_from == "rated"
        raise TrainingError(
            f"stage {stage.name!r} has nothing to learn from: there are {len(cases)} cases of "
            f"{len(cases.patients)} patients, and ratings of {len(known.ratings)} cases; it takes "
            + ("a table that rates some of the cases" if rated else "more patients")
        )
    indices = {files.id: index for index, files in enumerate(cases.files)}  # by which stored labels go
    its = [indices[files.id] for files in chosen.files]
    labels = {source: ChosenLabels(made, its) for source, made in known.labels.items()}
    return chosen, replace(known, labels=labels)


def _untrained(job: Job, method: Method) -> nn.Module:
    """The network that training starts from: a fresh one, or that of `qc.initial`."""
    check_start(method)
    network = method.build(job.seed)
    path = job.qc.initial
    if path is not None:
        stored = load_model(path, job.task)
        if stored.method.name != method.name:
            raise ModelError(
                f"{path}: a model of method {stored.method.name!r}, not of {method.name!r}; start from a "
                "model of the same method, or without qc.initial"
            )
        state = method.initial_state(stored.network.state_dict())
        load_weights(network, state, source=str(path))
    return network


def _card(job: Job, cases: CachedCases) -> ModelCard:
    return ModelCard(
        task=job.task,
        qc=job.qc,
        federation="",
        seed=job.seed,
        rounds=0,
        samples=0,
        sites=(),
        cases=len(cases),
        patients=len(cases.patients),
        licence=job.licence,
    )


def _train_round(
    train_round: Callable[..., RoundResult], network: nn.Module, plan: RoundPlan, say: Callable[[str], None]
) -> RoundResult:
    """One round, in place; with smaller batches where the GPU's memory is too small."""
    before = {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}

    def attempt(batch_size: int) -> RoundResult:
        if batch_size < plan.batch_size:  # the attempt before may have taken some steps
            load_weights(network, before, source="the network before this round")
        return train_round(plan=replace(plan, batch_size=batch_size))

    return with_smaller_batches(attempt, plan.batch_size, say)
