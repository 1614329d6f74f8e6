"""What a site does in each phase. Nothing here sends anything: the guard decides about the outcome."""

import contextlib
import hashlib
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

import fedqc
from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.memo import digest
from fedqc.cases.splits import split_references
from fedqc.cases.volumes import Case
from fedqc.compute import Compute, choose_compute, with_smaller_batches
from fedqc.config import SamplesConfig, SegmentationConfig, SiteConfig, SourcesConfig
from fedqc.curation.deciding import decide
from fedqc.curation.diagnosing import corrected_label, diagnose_cases
from fedqc.curation.diagnosis import Diagnosis, Kind
from fedqc.curation.guards import gatherings, groups_of
from fedqc.curation.manifest import (
    MANIFEST,
    Entry,
    InputFile,
    LeftOut,
    Manifest,
    UsedModel,
    carried_over,
    changing,
    kept,
    manifest_of,
    write_manifest,
    write_scores,
)
from fedqc.curation.rules import Outcome
from fedqc.curation.self_test import SELF_TEST, KnownLabel, SelfTest, read_self_test, write_self_test
from fedqc.degradation.samples import DrawnLabels, degrade_cases, source_of
from fedqc.errors import DataError, ModelError, ProtocolError
from fedqc.files import replacing
from fedqc.label_sources.folds import folds_of
from fedqc.label_sources.making import (
    FOREST,
    CaseLabels,
    label_store,
    make_stored_labels,
    segmenter_source,
    stored_labels,
)
from fedqc.methods.base import (
    FEWEST_REFERENCE_PATIENTS,
    Known,
    Method,
    RoundPlan,
    RoundResult,
    Score,
    Stage,
    get_method,
    has_too_few_references,
    part_of,
)
from fedqc.model import ModelCard, ReferenceFiles, load_weights, reference_files, save_model
from fedqc.protocol import (
    PROTOCOL_VERSION,
    CalibrateRequest,
    CrossCheckRequest,
    ErrorCode,
    ErrorReply,
    EvaluateSegmentationRequest,
    HandshakeReply,
    HandshakeRequest,
    ModelRequest,
    QCModelRequest,
    Request,
    ScoreRequest,
    SegmentationRequest,
    SummariseRequest,
    TrainRequest,
    TrainSegmentationRequest,
    TrainSegmenterRequest,
    Weights,
)
from fedqc.ratings import ratings_by_case
from fedqc.review.worklist import SHEET
from fedqc.scoring import judge, write_error_maps
from fedqc.seeding import generator
from fedqc.segmentation import Segmentation
from fedqc.statistics.site import (
    Figure,
    LabelsSummary,
    effective_number,
    summarise_calibration,
    summarise_cross_check,
    summarise_curation,
    summarise_labels,
    summarise_segmentation,
)
from fedqc.task import Task, load_task
from fedqc.training import Progress
from fedqc_client.activity import Activity
from fedqc_client.guard import Told, Trained
from fedqc_client.site_data import (
    SiteData,
    earlier_manifest,
    forget_roles,
    load_site_data,
    training_references,
)

MICROLITRES_PER_MILLILITRE = 1000


def handshake(site: SiteConfig, request: HandshakeRequest) -> HandshakeReply:
    """Say who this site is and what it speaks; whether that fits is the coordinator's question."""
    task = load_task(site.task)
    if task.digest != request.task:
        Activity.at(site, request).note(
            f"this site's task {site.task!r} is not the federation's, so the coordinator will leave the site "
            "out; compare the two task files, and the versions of fedqc"
        )
    return HandshakeReply(
        site=site.name,
        protocol=PROTOCOL_VERSION,
        fedqc=fedqc.__version__,
        task=task.digest,
    )


def summarise(site: SiteConfig, request: SummariseRequest, *, begins: bool = True) -> Told:
    """Check and preprocess the site's cases and describe them.

    A run begins with it, unless `begins` says that it only looks like one.

    Raises:
        DataError: no case can be used.
    """
    task = _task(site, request)
    if begins:
        forget_roles(site)
    data = load_site_data(site, task, request if begins else None)
    data.cache.prepare(data.usable, workers=site.compute.workers)
    roles = dict.fromkeys((files.id for files in data.references), "reference")
    about = _about(data.usable, data.cache, roles)
    for code, patients in data.check.left_out.items():
        about |= {patient: f"{about.get(patient, '')} {code}" for patient in patients}
    return Told(data.check.summary, about)


def train_segmenter(site: SiteConfig, request: TrainSegmenterRequest) -> Trained | ErrorReply:
    """Train a segmenter on the references outside of a fold, and keep the labels that it makes inside."""
    task = _task(site, request)
    data = load_site_data(site, task, request)
    training, _ = training_references(site, task, data, request)
    cases = CachedCases(data.cache, training)
    config = request.qc.sources
    if len(cases.patients) < config.folds:  # whoever is segmented would have been learned from
        return ErrorReply(ErrorCode.NO_REFERENCE)
    source = segmenter_source(request.source, task, config)
    network = source.build(source.checked(request.variant), 0)
    _load(request, network)
    store = label_store(_labels_folder(site), source.name, task, config, request.seed)

    def train_round(plan: RoundPlan, compute: Compute, progress: Progress) -> RoundResult:
        return source.round(
            request.variant,
            network,
            cases,
            fold=request.fold,
            plan=plan,
            compute=compute,
            store=store,
            progress=progress,
        )

    fold_of = folds_of(cases.patients, request.seed, config.folds)
    owners = [files.patient for files in training if fold_of[files.patient] != request.fold]
    return _trained(site, request, config, network, owners, train_round)


def train(site: SiteConfig, request: TrainRequest) -> Trained | ErrorReply:
    """Train one stage of the QC method for one round on the cases here that it may learn from."""
    task = _task(site, request)
    data = load_site_data(site, task, request)
    stage = get_method(request.qc.method)(task, request.qc).stage(request.stage)
    ratings = ratings_by_case(site.data.ratings) if stage.learns_from == "rated" else {}
    vouched_for, held_back = training_references(site, task, data, request)
    references, _ = split_references(data.references, request.seed)  # which are compared with and fitted to
    training, trusted = vouched_for, {files.patient for files in references}
    if stage.learns_from != "references":
        patients = {files.patient for files in held_back}
        vouched = {files.id for files in vouched_for}
        others = (files for files in data.candidates if files.id not in vouched)
        training += tuple(files for files in others if files.patient not in patients)
    everyone = CachedCases(data.cache, training)
    training = tuple(files for files in training if stage.may_learn_from(files, ratings))
    if not training or (stage.needs_references and len(trusted) < FEWEST_REFERENCE_PATIENTS):
        return ErrorReply(ErrorCode.NO_REFERENCE)
    cases = CachedCases(data.cache, training)
    draws_labels = stage.learns_from == "references" or stage.needs_references
    stored = _stored_labels(site, request, task, everyone, cases) if draws_labels else {}
    # A source without labels at this site has no share in its training.
    gone = {kind.replace("-", "_"): 0.0 for kind, labels in stored.items() if not labels.total}
    shares = request.qc.samples.model_dump() | gone
    if not any(shares.values()):
        return ErrorReply(ErrorCode.NO_REFERENCE)
    if gone:
        Activity.at(site, request).note(f"no labels of {', '.join(sorted(gone))} here; trains without them")
    qc = request.qc.model_copy(update={"samples": SamplesConfig.model_validate(shares)})
    method = get_method(qc.method)(task, qc)
    method.references = CachedCases(data.cache, references)
    network = method.build(0)
    _load_frozen(request, network, stage)
    part = part_of(network, stage.part)
    _load(request, part)
    known = Known(labels=stored, ratings=ratings, kept=site.compute.cache / "estimates")

    def train_round(plan: RoundPlan, compute: Compute, progress: Progress) -> RoundResult:
        plan = replace(plan, stage=stage.name)
        return method.train_round(network, cases, plan, compute, progress, known=known)

    owners = [files.patient for files in training]
    return _trained(site, request, stage, part, owners, train_round)


def cross_check(site: SiteConfig, request: CrossCheckRequest) -> Told | ErrorReply:
    """Score the labels of all references, as they are, with a model that was trained at other sites."""
    task = _task(site, request)
    data = load_site_data(site, task, request)
    if not data.references:
        return ErrorReply(ErrorCode.NO_REFERENCE)
    method, network = _qc_model(request, task)
    if has_too_few_references(method, {files.patient for files in data.references}):
        return ErrorReply(ErrorCode.NO_REFERENCE)
    compute = _compute(site)
    method.references = CachedCases(data.cache, data.references)
    scores = method.score(network, iter(method.references), compute)
    summary = summarise_cross_check(
        [score.quality for score in scores], [case.patient for case in data.references]
    )
    return Told(summary, _about(data.references, data.cache), _digest(request.weights))


def calibrate(site: SiteConfig, request: CalibrateRequest) -> Told | ErrorReply:
    """Degrade the site's calibration cases in every trained way and compare predicted with true quality."""
    task = _task(site, request)
    data = load_site_data(site, task, request)
    training, held_back = split_references(data.references, request.seed)
    if not held_back:
        return ErrorReply(ErrorCode.NO_REFERENCE)
    method, network = _qc_model(request, task)
    references = CachedCases(data.cache, training)
    if has_too_few_references(method, references.patients):
        return ErrorReply(ErrorCode.NO_REFERENCE)
    compute = _compute(site)
    _fit(site, request, method, network, references, compute)
    test = _self_test(site, request, data, method, network, compute)
    summary = summarise_calibration(
        [one.predicted for one in test.labels],
        [one.true for one in test.labels],
        [one.patient for one in test.labels],
        tau=request.curation.threshold,
        is_dsc=test.is_dsc,
        regions={
            name: [one.regions.get(name, (math.nan, math.nan)) for one in test.labels]
            for name in task.regions
        },
    )
    settings = f"{request.curation.threshold} {request.qc.model_dump_json()} {_about(training, data.cache)}"
    return Told(summary, _about(held_back, data.cache), _digest(request.weights), settings)


def _self_test(  # noqa: PLR0917 - what is tested, and on what
    site: SiteConfig,
    request: CalibrateRequest | ScoreRequest,
    data: SiteData,
    method: Method,
    network: nn.Module,
    compute: Compute,
) -> SelfTest:
    """What the model says of the site's own calibration cases, degraded in every trained way; it stays here.

    It is needed twice, to calibrate and to score: the latest is kept in the results folder.
    """
    training, held_back = split_references(data.references, request.seed)
    files = [data.cache.hashes(one) for one in (*training, *held_back)]
    how = [fedqc.__version__, method.task.digest, request.qc.model_dump(mode="json"), request.seed, site.name]
    key = digest([how, _digest(request.weights), len(held_back), files])
    known = read_self_test(site.results / SELF_TEST)
    if known is not None and known.key == key:
        return known
    rng = generator(request.seed, site.name, "calibrate", 0)
    truth: list[tuple[str, float, dict[str, float]]] = []

    def samples() -> Iterator[Case]:
        for sample in degrade_cases(CachedCases(data.cache, held_back), method.task, method.kinds, rng):
            truth.append((sample.case.patient, sample.mean_dsc, sample.dsc))
            yield sample.case

    is_dsc = "stars" not in method.figures
    told = [(one.quality, one.regions) for one in method.score(network, samples(), compute)]  # no maps
    labels = tuple(
        KnownLabel(
            patient=patient,
            true=true,
            predicted=quality,
            regions={name: (dsc[name], regions[name]) for name in regions if is_dsc and name in dsc},
        )
        for (patient, true, dsc), (quality, regions) in zip(truth, told, strict=True)
    )
    test = SelfTest(key=key, is_dsc=is_dsc, labels=labels)
    write_self_test(site.results / SELF_TEST, test)
    return test


def score(site: SiteConfig, request: ScoreRequest) -> Told | ErrorReply:
    """Score the site's candidates, decide, and leave everything a person needs in the site's results folder.

    The folder then holds `manifest.json`, `scores.csv`, `models/qc/`, `error_maps/<id>.nii.gz` (the
    probability in per cent (uint8) that the label is wrong, on the grid of the case's own files), and
    `review.html` where the site wants it.
    """
    task = _task(site, request)
    data = load_site_data(site, task, request)
    method, network = _qc_model(request, task)
    compute = _compute(site)
    training, held_back = split_references(data.references, request.seed)
    references = CachedCases(data.cache, training)
    if has_too_few_references(method, references.patients):
        Activity.at(site, request).note(
            f"no candidate is judged: method {method.name!r} compares with references of "
            f"{FEWEST_REFERENCE_PATIENTS} patients or more, beside those held back; found "
            f"{len(references.patients)}; vouch for more cases"
        )
        return ErrorReply(ErrorCode.NO_REFERENCE)
    _fit(site, request, method, network, references, compute)
    has_test = bool(held_back) and request.trusted
    test = _self_test(site, request, data, method, network, compute) if has_test else None
    if test is None:
        (site.results / SELF_TEST).unlink(missing_ok=True)  # of an earlier run
    model_sha256 = _store_model(site, request, network, task, reference_files(method, references))

    watch = Activity.at(site, request)
    candidates = CachedCases(data.cache, data.candidates)
    scores, tells = _scores(site, method, network, candidates, compute, watch)
    qualities = {judgement.case_id: judgement.quality for judgement in scores}
    rule, decisions = decide(qualities, request.curation, test, request.calibration)
    if rule.suspended:
        watch.note(f"all candidates are kept: {rule.suspended}")
    suspects = candidates.where(lambda files: decisions[files.id].outcome is not Outcome.KEEP)
    diagnoses = _diagnoses(method, network, suspects, compute, watch) if tells else {}
    entries = tuple(
        Entry(
            id=files.id,
            patient=files.patient,
            quality=judgement.quality,
            regions=judgement.regions,
            interval=judgement.interval,
            stars=judgement.stars,
            decision=decisions[files.id].outcome,
            reason=decisions[files.id].reason,
            weight=decisions[files.id].weight,
            diagnosis=diagnoses.get(files.id),
            files=_input_files(site, task, data.cache, files),
        )
        for files, judgement in zip(data.candidates, scores, strict=True)
    )
    groups = groups_of(data.candidates, data.check.checked.facts)
    gathered = gatherings(groups, [entry.decision is not Outcome.KEEP for entry in entries])
    for one in gathered:
        watch.note(f"warning: {one.sentence}")
    with changing(site.results):  # somebody may be overruling
        earlier = earlier_manifest(site, task)
        if earlier is None and (site.results / MANIFEST).exists():
            aside = site.results / f"manifest-until-{datetime.now(UTC):%Y%m%dT%H%M%S}.json"
            (site.results / MANIFEST).replace(aside)
            watch.note(
                f"the manifest that was there is of another site or task, or damaged; it is {aside.name}"
            )
        entries, remembered = carried_over(earlier, entries)
        manifest = Manifest(
            site=site.name,
            federation=request.federation,
            task=task.name,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            model=UsedModel(method=method.name, sha256=model_sha256, fedqc=fedqc.__version__),
            rule=rule,
            entries=entries,
            gatherings=gathered,
            left_out=_left_out(data),
            remembered=remembered,
        )
        write_scores(site.results / "scores.csv", manifest, task)
        write_manifest(site.results / MANIFEST, manifest)
    _write_sheet(site, task, watch)
    summary = summarise_curation(
        quality=[entry.quality for entry in entries],
        regions={
            name: [entry.regions[name] for entry in entries]
            for name in task.regions
            if all(name in entry.regions for entry in entries)
        },
        outcomes=[entry.outcome for entry in entries],
        patients=[entry.patient for entry in entries],
        curated=rule.suspended is None,
        tested=test.patients if test else None,
        diagnoses=[_diagnosed(entry) for entry in entries] if any(diagnoses.values()) else None,
        groups=groups,
        gathered=gathered,
    )
    more = {entry.id: entry.overruled.decision.value for entry in entries if entry.overruled}
    about = _about(data.candidates, data.cache, more)
    # Decisions may rest on references, but none of them is counted: few candidates must not hide among them.
    rests_on = _about(data.references, data.cache)
    settings = [
        request.curation,
        request.calibration,
        request.qc.model_dump_json(),
        request.trusted,
        rests_on,
    ]
    return Told(summary, about, _digest(request.weights), " ".join(map(str, settings)))


def _scores(  # noqa: PLR0917 - what is scored, and how
    site: SiteConfig,
    method: Method,
    network: nn.Module,
    cases: CachedCases,
    compute: Compute,
    watch: Activity,
) -> tuple[list[Score], bool]:
    """Score cases; their error maps lie in the results folder then, in place of those of an earlier run.

    Returns:
        The scores, and whether the method tells what any label should be.
    """
    maps = site.results / ".error_maps.new"
    shutil.rmtree(maps, ignore_errors=True)
    maps.mkdir(parents=True)
    scores: list[Score] = []
    tells = False
    for case, score in judge(method, network, cases, compute):
        write_error_maps(maps, score, case)
        tells = tells or corrected_label(case.label, score, method.task) is not None
        scores.append(replace(score, error_map=None, class_error_maps={}, corrected=None))  # which are large
        watch.progress(len(scores), len(cases))
    shutil.rmtree(site.results / "error_maps", ignore_errors=True)
    maps.replace(site.results / "error_maps")
    return scores, tells


def _diagnoses(
    method: Method, network: nn.Module, cases: CachedCases, compute: Compute, watch: Activity
) -> dict[str, Diagnosis | None]:
    """What is wrong with labels that are not kept, by the case's id."""
    diagnoses: dict[str, Diagnosis | None] = {}
    try:
        for case, diagnosis in diagnose_cases(method, network, cases, compute):
            diagnoses[case.id] = diagnosis
            watch.progress(len(diagnoses), len(cases))
    except Exception as error:  # a diagnosis is an extra: the scores stand, whatever became of it
        watch.note(f"{len(diagnoses)} of {len(cases)} labels that are not kept are diagnosed: {error}")
    return diagnoses


def _diagnosed(entry: Entry) -> Kind | None:
    """What is wrong with a candidate's label; None where it is kept in the end."""
    if entry.outcome is Outcome.KEEP:
        return None
    return entry.diagnosis.kind if entry.diagnosis else Kind.UNCLEAR


def _write_sheet(site: SiteConfig, task: Task, watch: Activity) -> None:
    """Draw the worst cases for a person to look at, where the site wants it; an earlier run's sheet goes."""
    with contextlib.suppress(OSError):
        (site.results / SHEET).unlink()
    if not site.policy.sheet:
        return
    from fedqc.review.sheet import write_sheet  # noqa: PLC0415 - Matplotlib, which no other phase needs

    try:
        not_drawn = write_sheet(site, task, watch.progress)
    except Exception as error:  # the sheet is an extra: the scores stand, whatever became of it
        watch.note(f"review.html could not be written: {error}; `fedqc review SITE.toml --sheet` tries again")
        return
    for sentence in not_drawn:
        watch.note(f"not drawn in review.html: {sentence}")


def train_segmentation(site: SiteConfig, request: TrainSegmentationRequest) -> Trained | ErrorReply:
    """Train the segmentation model for one round on the cases that the site's manifest keeps.

    Those of a patient on whose references it will be tried have no share in it.

    Raises:
        DataError: the site has not curated its cases, or a kept case's files have changed since.
    """
    task = _task(site, request)
    data = load_site_data(site, task, request)
    training, tried = _references_for_segmentation(data, request)
    patients = {files.patient for files in tried}
    weights = _kept_weights(site, task, data)
    cases = tuple(files for files in data.candidates if files.id in weights and files.patient not in patients)
    cases += training
    if not cases:
        return ErrorReply(ErrorCode.NOTHING_KEPT)
    segmentation, network = _segmentation_model(request, task)
    kept = CachedCases(data.cache, cases)

    drawn = [weights.get(files.id, 1.0) for files in cases]

    def train_round(plan: RoundPlan, compute: Compute, progress: Progress) -> RoundResult:
        return segmentation.train_round(network, kept, plan, compute, progress, weights=drawn)

    owners = [files.patient for files in cases]
    return _trained(site, request, request.segmentation, network, owners, train_round, weights=drawn)


def evaluate_segmentation(site: SiteConfig, request: EvaluateSegmentationRequest) -> Told | ErrorReply:
    """Keep the segmentation model, and try it on the references that it was not trained on."""
    task = _task(site, request)
    segmentation, network = _segmentation_model(request, task)
    _store_model(site, request, network, task)
    data = load_site_data(site, task, request)
    forget_roles(site)  # the run ends here
    _, references = _references_for_segmentation(data, request)
    if not references:
        return ErrorReply(ErrorCode.NO_REFERENCE)
    compute = _compute(site)
    scores = list(segmentation.evaluate(network, iter(CachedCases(data.cache, references)), compute))
    summary = summarise_segmentation(
        dice=[score.dice for score in scores],
        regions={
            name: [score.regions[name] if name in score.present else math.nan for score in scores]
            for name in task.regions
        },
        patients=[score.patient for score in scores],
    )
    return Told(summary, _about(references, data.cache), _digest(request.weights))


def _about(
    cases: Sequence[CaseFiles], cache: CaseCache, more: Mapping[str, str] | None = None
) -> dict[str, str]:
    """By patient, what statistics of cases rest on: the content of their files, and what more is known."""
    about: dict[str, list[str]] = {}
    for files in cases:
        about.setdefault(files.patient, []).append(digest([cache.hashes(files), (more or {}).get(files.id)]))
    return {patient: " ".join(sorted(of_cases)) for patient, of_cases in about.items()}


def _references_for_segmentation(
    data: SiteData, request: TrainSegmentationRequest | EvaluateSegmentationRequest
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """The references that the segmentation model is trained on, and those that it is tried on."""
    if request.segmentation.references:
        return split_references(data.references, request.seed)
    return (), tuple(data.references)


def _task(site: SiteConfig, request: Request) -> Task:
    """The site's task, which must be the federation's.

    Raises:
        ProtocolError: they differ.
    """
    task = load_task(site.task)
    if task.digest != request.task:
        raise ProtocolError(
            f"the site's task {site.task!r} is not the federation's; compare the two task files"
        )
    return task


def _qc_model(request: QCModelRequest, task: Task) -> tuple[Method, nn.Module]:
    """The method and its network with the weights of the request.

    Raises:
        ModelError: the weights are not those of this network, or not finite.
    """
    method = get_method(request.qc.method)(task, request.qc)
    network = method.build(0)
    _load(request, network)
    return method, network


def _segmentation_model(request: SegmentationRequest, task: Task) -> tuple[Segmentation, nn.Module]:
    """The segmentation network with the weights of the request; raises as `_qc_model` does."""
    segmentation = Segmentation(task, request.segmentation)
    network = segmentation.build(0)
    _load(request, network)
    return segmentation, network


def _fit(  # noqa: PLR0917 - what is fitted, on what, and where
    site: SiteConfig,
    request: QCModelRequest,
    method: Method,
    network: nn.Module,
    references: CachedCases,
    compute: Compute,
) -> None:
    """Give a trained method what it takes from the site's own references; it stays here.

    It may take long and is needed twice, to calibrate and to score: the latest is kept in the site's cache.
    """
    method.references = references
    if type(method).fit is Method.fit:  # there is nothing to fit
        return
    weights = hashlib.sha256(save_tensors(_contiguous(network))).hexdigest()
    how = [fedqc.__version__, method.task.digest, method.config.model_dump(mode="json"), request.seed]
    key = digest([site.name, how, weights, references.digest()])
    kept = site.compute.cache / "fitted" / f"{key}.safetensors"
    try:
        fitted = load_file(kept)
    except (OSError, SafetensorError):  # not there, or damaged
        watch = Activity.at(site, request)
        method.fit(network, references, compute, generator(request.seed, site.name, "fit"), watch.progress)
        kept.parent.mkdir(parents=True, exist_ok=True)
        with replacing(kept) as aside:
            save_file(_contiguous(network), aside)
        for older in set(kept.parent.glob("*.safetensors")) - {kept}:
            older.unlink(missing_ok=True)
        return
    load_weights(network, fitted, source=str(kept))


def _digest(weights: Weights) -> str:
    """SHA-256 of a model as it came."""
    digest = hashlib.sha256()
    for name, values in weights.items():
        digest.update(f"{name} {values.dtype} {values.shape}".encode())
        digest.update(values.tobytes())
    return digest.hexdigest()


def _contiguous(network: nn.Module) -> dict[str, Tensor]:
    return {name: values.contiguous() for name, values in network.state_dict().items()}


def _load_frozen(request: TrainRequest, network: nn.Module, stage: Stage) -> None:
    """Put in place the weights of the parts that a stage applies."""
    for part in stage.needs:
        begin = f"{part}."
        weights = {
            name.removeprefix(begin): values
            for name, values in request.frozen.items()
            if name.startswith(begin)
        }
        _load_state(weights, part_of(network, part))


def _load(request: ModelRequest, network: nn.Module) -> None:
    _load_state(request.weights, network)


def _load_state(weights: Weights, network: nn.Module) -> None:
    state = {name: torch.from_numpy(np.array(values)) for name, values in weights.items()}
    if not all(bool(torch.isfinite(tensor).all()) for tensor in state.values()):
        raise ModelError(
            "the weights from the coordinator are not finite; it has to start from another model"
        )
    load_weights(network, state, source="the coordinator's request")


def _stored_labels(
    site: SiteConfig, request: TrainRequest, task: Task, everyone: CachedCases, cases: CachedCases
) -> dict[str, CaseLabels]:
    """The labels on disk that have a share in training; forests are grown here, where they are missing.

    Args:
        site: this one.
        request: of training.
        task: what is segmented.
        everyone: whom forests learn from, the same in all stages of a method.
        cases: whose labels these are, those that a stage learns from.
    """
    if len(everyone.patients) < request.qc.sources.folds:  # those of an earlier run learned from others
        return stored_labels(_labels_folder(site), (), task, request.qc, request.seed)
    if request.qc.samples.forest:
        watch = Activity.at(site, request)
        make_stored_labels(
            _labels_folder(site),
            everyone,
            task,
            request.qc,
            seed=request.seed,
            compute=_compute(site),
            kinds=[FOREST],
            progress=lambda _, done, total: watch.progress(done, total),
        )
    return stored_labels(_labels_folder(site), cases, task, request.qc, request.seed)


def _labels_folder(site: SiteConfig) -> Path:
    return site.compute.cache / "labels"


def _trained(  # noqa: PLR0917 - a request, and what it means here
    site: SiteConfig,
    request: TrainRequest | TrainSegmentationRequest | TrainSegmenterRequest,
    config: Stage | SegmentationConfig | SourcesConfig,
    network: nn.Module,
    owners: Sequence[str],
    train_round: Callable[[RoundPlan, Compute, Progress], RoundResult],
    *,
    weights: Sequence[float] | None = None,
) -> Trained:
    """This site's share of a round of training.

    Weights go back in the precision that they came in.

    Args:
        site: this one.
        request: what is asked for.
        config: steps of a round, and samples in a step.
        network: with the weights of the request, or the part of one that they are of.
        owners: the patient of each case that is trained on, one or more.
        train_round: trains the network in place.
        weights: how often each case is drawn beside the others; None: all alike.
    """
    compute, watch = _compute(site), Activity.at(site, request)
    before = (request.round - 1) * config.local_steps

    def attempt(batch_size: int) -> RoundResult:
        if batch_size < config.batch_size:  # the attempt before may have taken some steps
            _load(request, network)
        plan = RoundPlan(
            seed=request.seed,
            site=site.name,
            round=request.round,
            rounds=request.rounds,
            steps=config.local_steps,
            batch_size=batch_size,
            proximal=request.proximal,
        )

        def progress(step: int, _: int) -> None:
            watch.progress(step - before, config.local_steps)

        return train_round(plan, compute, progress)

    result = with_smaller_batches(attempt, config.batch_size, watch.note)
    # The losses tell something about those drawn, and mostly about a patient who has most of the cases.
    behind = effective_number([1.0] * len(owners) if weights is None else weights, owners)
    n_patients = min(len(set(result.patients)), behind)
    return Trained(
        weights={
            name: tensor.detach().cpu().numpy().astype(request.weights[name].dtype, copy=False)
            for name, tensor in network.state_dict().items()
        },
        samples=result.samples,
        losses={
            name: Figure(value=float(value), patients=n_patients) for name, value in result.losses.items()
        },
        labels=None if result.drawn is None else _labels_summary(result.drawn, owners),
    )


def _labels_summary(drawn: DrawnLabels, owners: Sequence[str]) -> LabelsSummary:
    return summarise_labels(
        [(owners[case], dsc) for case, _, dsc in drawn.made],
        [(owners[case], source_of(kind), dsc) for case, kind, dsc in drawn.chosen],
    )


def _compute(site: SiteConfig) -> Compute:
    return choose_compute(site.compute.device, site.compute.precision, site.compute.memory)


def _kept_weights(site: SiteConfig, task: Task, data: SiteData) -> dict[str, float]:
    """The weight of each candidate that the site's manifest keeps, by its id; all are as they were scored.

    Raises:
        DataError: there is no manifest, it is not this site's, or a kept case's files have changed since.
    """
    entries = {entry.id: entry for entry in kept(manifest_of(site, task))}
    cases = [case for case in data.candidates if case.id in entries]
    changed = [
        case.id for case in cases if _input_files(site, task, data.cache, case) != entries[case.id].files
    ]
    changed += sorted(set(entries) - {case.id for case in cases})
    if changed:
        raise DataError(
            f"{site.results / MANIFEST}: kept cases changed or vanished since they were scored: "
            f"{', '.join(changed[:5])}; score the site's cases again"
        )
    # What a person vouched for counts in full, whatever the rule thought of it.
    return {case: 1.0 if entry.overruled else entry.weight for case, entry in entries.items()}


def _input_files(site: SiteConfig, task: Task, cache: CaseCache, files: CaseFiles) -> dict[str, InputFile]:
    """A case's files by role, as the manifest names them."""
    roles = task.modalities if len(files.images) == len(task.modalities) else ("image",)
    return {
        role: InputFile(path=_place(path, site.data.folder), sha256=sha256)
        for role, path, sha256 in zip([*roles, "label"], files.files, cache.hashes(files), strict=True)
    }


def _place(path: Path, folder: Path) -> str:
    """Where a file lies in the data folder, as it is listed there; a link may lead to somewhere else."""
    listed, root = path.absolute(), folder.absolute()
    if listed.is_relative_to(root) and ".." not in listed.parts:
        return listed.relative_to(root).as_posix()
    return path.resolve().relative_to(folder.resolve()).as_posix()


def _left_out(data: SiteData) -> tuple[LeftOut, ...]:
    """Every error of every case that could not be used, and references that are no case."""
    return tuple(
        LeftOut(
            case=problem.case,
            code=problem.code,
            file=str(problem.file) if problem.file else None,
            found=problem.found,
            fix=problem.fix,
        )
        for problem in data.check.problems
        if problem.case is not None and (problem.is_error or problem.code == "unknown-reference")
    )


def _store_model(
    site: SiteConfig,
    request: ScoreRequest | EvaluateSegmentationRequest,
    network: nn.Module,
    task: Task,
    references: tuple[ReferenceFiles, ...] = (),
) -> str:
    """Keep a trained model in the site's results folder.

    Returns:
        SHA-256 of the stored weights.
    """
    card = ModelCard(
        stage="qc" if isinstance(request, ScoreRequest) else "segmentation",
        task=task,
        qc=request.qc if isinstance(request, ScoreRequest) else None,
        segmentation=None if isinstance(request, ScoreRequest) else request.segmentation,
        federation=request.federation,
        seed=request.seed,
        references=references,
        **request.provenance.model_dump(),
    )
    return save_model(site.results / "models" / card.stage, network.state_dict(), card)
