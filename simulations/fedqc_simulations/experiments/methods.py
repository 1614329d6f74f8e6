"""All methods over one set of spoiled annotations: which method when.

A consortium of four sites is built twice from the same cases, with the same references and candidates of the
same patients: once every spoiled candidate has an error of its own (`mixed`), once half of the sites have a
habit (`systematic`). Each method is trained across the sites, fits at each site what it fits there, and
judges the candidates. What learns from references alone is trained once, for these are the same in both.
So are segmenters and whatever else learns from every case: a method takes them over from the run of another.

OUT/
├── mixed/, systematic/   the consortia, see `fedqc_simulations.consortium`
│   └── runs/METHOD/      the federated training
└── rows/NOISE-METHOD.json   what each candidate was judged, and what that took
"""

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fedqc_client.site_data import load_site_data

from fedqc.cases.cached import CachedCases
from fedqc.cases.splits import split_references
from fedqc.config import (
    CombineConfig,
    DQEConfig,
    FederationConfig,
    NetworkConfig,
    PrivacyConfig,
    QCConfig,
    SegmenterConfig,
    SitesConfig,
    load_site,
)
from fedqc.files import replacing, write_json
from fedqc.methods.base import Method, Stage, get_method
from fedqc.metrics.agreement import mae, pearson, spearman
from fedqc.metrics.filtering import aurc, auroc
from fedqc.model import load_model
from fedqc.ratings import Rating
from fedqc.scoring import judge
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc_simulations.consortium import (
    KnownLabel,
    borrow_sites,
    build_consortium,
    read_candidates,
    site_files,
    write_federation,
)
from fedqc_simulations.engine import run_local
from fedqc_simulations.experiments.base import Table, Workshop, write_tables
from fedqc_simulations.experiments.figures import draw_comparison
from fedqc_simulations.experiments.measures import Estimate, estimate
from fedqc_simulations.raters import draw_raters, rate, view_qualities, write_ratings
from fedqc_simulations.simulate import site_names

NAME = "methods"
TITLE = "All methods on spoiled annotations"
QUICK_CASES = 60
SITES = 4
FAILURE = 0.75
"""A candidate with a true DSC below this is a failure."""
RATERS = 3
PHASES = ("summarise", "train.segmenters", "train.qc")

SpoiledBy = Literal["mixed", "systematic"]
NOISES: tuple[SpoiledBy, ...] = ("mixed", "systematic")


@dataclass(frozen=True)
class Entry:
    """A method as it is compared."""

    name: str
    """Of its files."""
    title: str
    qc: QCConfig

    def method(self, task: Task) -> Method:
        """The method for a task."""
        return get_method(self.qc.method)(task, self.qc)


@dataclass(frozen=True)
class Candidate:
    """A candidate, and what a method said of its label."""

    site: str
    id: str
    patient: str
    kind: str
    true: float
    predicted: float
    rated: bool
    """Whether the method learned from people's opinion of this very label."""


@dataclass(frozen=True)
class Effort:
    """What a method takes; of two threads or one, as it was run."""

    seconds_per_round: float | None
    """Of one site."""
    bytes_per_round: float | None
    """To and from one site together."""
    seconds_to_fit: float
    """At one site."""
    seconds_per_case: float


@dataclass(frozen=True)
class Row:
    """One method on one consortium."""

    candidates: tuple[Candidate, ...]
    effort: Effort


def entries(quick: bool) -> tuple[Entry, ...]:
    """The methods of the table."""
    common = QCConfig(
        rounds=2 if quick else 16, local_steps=8 if quick else 25, batch_size=4, cross_check_rounds=0
    )
    segmenter = SegmenterConfig(
        rounds=2 if quick else 8, local_steps=8 if quick else 25, passes=5 if quick else 20
    )
    small = NetworkConfig(width=8 if quick else 16)

    def entry(name: str, title: str, **values: Any) -> Entry:
        update = {"segmenter": segmenter, **values}
        return Entry(name, title, common.model_copy(update={"method": name, **update}))

    return (
        entry("qcresunet", "QCResUNet, corrective", network=small),
        entry("voxresnet", "VoxResNet", network=small),
        entry("resnet50", "ResNet-50", network=small, learning_rate=1e-3),
        entry("dqe", "DQE on simulated ratings", dqe=DQEConfig(batch_size=24)),
        entry("expected-dice", "Expected DSC"),
        entry("ensemble", "Ensemble agreement"),
        entry("dice-regression", "Dice regression, uncertainty"),
        entry("rca", "RCA by features"),
        entry(
            "combine",
            "QCResUNet and expected DSC combined",
            network=small,
            combine=CombineConfig(methods=("qcresunet", "expected-dice")),
        ),
    )


def reproduce(workshop: Workshop) -> None:
    """Train and try what is missing, and write tables and figure."""
    tables, points = compare(workshop, entries(workshop.settings.quick))
    draw_comparison(workshop.out / "methods.png", points)
    write_tables(workshop, tables)


Points = dict[str, dict[str, tuple[float | None, float | None]]]
"""By consortium and method: AUROC of finding failures, and mean absolute error."""


def compare(
    workshop: Workshop,
    compared: Sequence[Entry],
    title: str = TITLE,
    noises: Sequence[SpoiledBy] = NOISES,
) -> tuple[list[Table], Points]:
    """One table for each consortium, and what is drawn of them."""
    compared = [_over(entry, workshop.settings.rounds) for entry in compared]
    for noise in noises:
        _build(workshop, noise)
    rows = {noise: {entry.name: _row(workshop, noise, entry) for entry in compared} for noise in noises}
    points: Points = {
        noise: {entry.title: _point(rows[noise][entry.name].candidates) for entry in compared}
        for noise in noises
    }
    return [_table(workshop, noise, compared, rows[noise], title) for noise in noises], points


def _over(entry: Entry, rounds: int | None) -> Entry:
    if rounds is None:
        return entry
    segmenter = entry.qc.segmenter.model_copy(update={"rounds": rounds})
    return Entry(
        entry.name, entry.title, entry.qc.model_copy(update={"rounds": rounds, "segmenter": segmenter})
    )


# ---------------------------------------------------------------------------------------------- consortia


def _build(workshop: Workshop, noise: SpoiledBy) -> None:
    """Build a consortium and have its labels rated, where that is not done."""
    out = workshop.out / noise
    if (out / "rated.json").is_file():
        return
    names = site_names(SITES)
    for name in ("sites", "truth"):
        shutil.rmtree(out / name, ignore_errors=True)  # half built
    build_consortium(
        workshop.cases,
        workshop.task,
        out,
        names=names,
        seed=workshop.seed,
        noise=noise,
        min_count=1,
        compute=workshop.settings.compute,
        progress=workshop.display.progress,
    )
    rated = {}
    for name, file in site_files(out, names).items():
        ratings = _ratings(workshop, out, name, file)
        write_ratings(file.parent / "data" / "ratings.csv", ratings)
        rated[name] = sorted({rating.case for rating in ratings})
    write_json(out / "rated.json", rated)


def _ratings(workshop: Workshop, out: Path, name: str, file: Path) -> list[Rating]:
    """What three simulated raters think of every other candidate's label."""
    site = load_site(file)
    data = load_site_data(site, workshop.task)
    right = dict(zip((files.id for files in workshop.cases), workshop.opened(workshop.cases), strict=True))
    regions = workshop.task.region_indices()
    chosen = sorted(data.candidates, key=lambda one: derive_seed(workshop.seed, "rated", one.id))[::2]
    qualities = {
        case.id: view_qualities(np.array(case.label), np.array(right[case.id].label), regions)
        for case in CachedCases(data.cache, chosen)
    }
    raters = draw_raters(generator(workshop.seed, "raters"), RATERS)
    return rate(generator(workshop.seed, "ratings", out.name, name), qualities, raters)


# --------------------------------------------------------------------------------------------------- rows


def _row(workshop: Workshop, noise: SpoiledBy, entry: Entry) -> Row:
    """A method on a consortium; kept, and not made again."""
    path = workshop.out / "rows" / f"{noise}-{entry.name}.json"
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        return Row(tuple(Candidate(**one) for one in values["candidates"]), Effort(**values["effort"]))
    row = _judged(workshop, noise, entry, _trained(workshop, noise, entry))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(row))
    return row


def _trained(workshop: Workshop, noise: SpoiledBy, entry: Entry) -> Path:
    """The folder of the run in which a method was trained."""
    stages = entry.method(workshop.task).stages()
    alone = all(stage.learns_from == "references" for stage in stages)
    consortium = workshop.out / (NOISES[0] if alone else noise)
    folder = consortium / "runs" / entry.name
    names = site_names(SITES)
    if not (folder / "federation.toml").is_file():
        borrow_sites(folder, names, min_count=1, compute=workshop.settings.compute, ratings=True)
        config = FederationConfig(
            name=entry.name,
            task="task.toml",
            sites=SitesConfig(expected=names, minimum=2),  # one may have nobody in one of two folds
            qc=entry.qc,
            privacy=PrivacyConfig(min_count=1),
        )
        write_federation(folder, config, task="../../task.toml")
    if not (folder / "models" / "qc").is_dir():
        workshop.display.say(f"training {entry.title} across {SITES} sites ({consortium.name})")
        *before, training = PHASES
        for phases in (before, [training]):
            if phases == [training]:
                _take_over(folder, stages, workshop.out / NOISES[0] / "runs" / entry.name)
            run_local(
                folder / "federation.toml",
                site_files(folder, names),
                folder,
                seed=workshop.seed,
                resume=True,
                phases=phases,
                listener=workshop.display.listen,
            )
    return folder


def _take_over(run: Path, stages: Sequence[Stage], elsewhere: Path) -> None:
    """Put networks that another run has trained where this one would train them alike.

    What learns from every case goes by the same name in each method, behind the method's own name where it is
    a part of another; a finished run beside this one may have it. What learns from references alone, the
    same method's run in the other consortium has.

    Args:
        run: was begun, and trained nothing.
        stages: of its method.
        elsewhere: the run of the same method in the first consortium, if there is one.
    """
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    beside = sorted(run.parent.iterdir())
    for stage in stages:
        others, name = beside, f"qc-*{stage.part.rpartition('.')[2]}"
        if stage.learns_from != "all":
            others = [elsewhere] if stage.learns_from == "references" and not stage.needs else []
            name = f"qc-{stage.name}"
        finished = [other for other in others if other != run and (other / "models" / "qc").is_dir()]
        found = next(
            (path for other in finished for path in other.glob(f"checkpoints/{name}.safetensors")), None
        )
        if found is None:
            continue
        taken = run / "checkpoints" / f"qc-{stage.name}.safetensors"
        taken.parent.mkdir(exist_ok=True)
        with replacing(taken) as aside:
            shutil.copyfile(found, aside)
        rounds = json.loads((found.parents[1] / "run.json").read_text(encoding="utf-8"))["rounds"]
        record.setdefault("rounds", {})[taken.stem] = rounds[found.stem]
    write_json(run / "run.json", record)


def _judged(workshop: Workshop, noise: SpoiledBy, entry: Entry, run: Path) -> Row:
    """Let every site judge its candidates with what was trained."""
    out = workshop.out / noise
    truth = {(one.site, one.id): one for one in read_candidates(out)}
    rated: dict[str, list[str]] = json.loads((out / "rated.json").read_text(encoding="utf-8"))
    candidates: list[Candidate] = []
    fitting = scoring = 0.0
    for name, file in site_files(out, site_names(SITES)).items():
        site = load_site(file)
        data = load_site_data(site, workshop.task)
        model = load_model(run / "models" / "qc", workshop.task)  # anew: each site fits for itself
        learns_from = {stage.learns_from for stage in model.method.stages()}
        known = set(rated[name]) if "rated" in learns_from else set()
        training, _ = split_references(data.references, workshop.seed)
        references = CachedCases(data.cache, training)
        model.method.references = references
        begin = time.perf_counter()
        model.method.fit(model.network, references, workshop.compute, generator(workshop.seed, name, "fit"))
        fitting += time.perf_counter() - begin
        begin = time.perf_counter()
        cases = CachedCases(data.cache, data.candidates)
        for case, score in judge(model.method, model.network, cases, workshop.compute):
            one = truth[name, case.id]
            candidates.append(_candidate(one, score.quality, case.id in known))
            workshop.display.progress(f"judging: {entry.name}, {noise}", len(candidates), len(truth))
        scoring += time.perf_counter() - begin
    return Row(tuple(candidates), _effort(run, fitting, scoring, len(candidates)))


def _candidate(known: KnownLabel, quality: float, rated: bool) -> Candidate:
    return Candidate(known.site, known.id, known.patient, known.kind, known.dsc, quality, rated)


def _effort(run: Path, fitting: float, scoring: float, count: int) -> Effort:
    record = json.loads((run / "run.json").read_text(encoding="utf-8"))
    rounds = [one for stage in record.get("rounds", {}).values() for one in stage]
    moved = sum(one["bytes_sent"] + one["bytes_received"] for one in rounds)
    return Effort(
        seconds_per_round=sum(one["seconds"] for one in rounds) / len(rounds) / SITES if rounds else None,
        bytes_per_round=moved / len(rounds) / SITES if rounds else None,
        seconds_to_fit=fitting / SITES,
        seconds_per_case=scoring / max(1, count),
    )


# ------------------------------------------------------------------------------------------------- tables


def _table(
    workshop: Workshop, noise: SpoiledBy, compared: Sequence[Entry], rows: dict[str, Row], title: str
) -> Table:
    first = rows[compared[0].name].candidates
    failures = sum(one.true < FAILURE for one in first)
    described = {
        "mixed": "a third of the candidates is spoiled, each by an error of its own",
        "systematic": "half of the sites have a habit that spoils most of their candidates",
    }
    return Table(
        title=f"{title}: {described[noise]}",
        columns=(
            "method",
            "learns from",
            "n",
            "r (95 %)",
            "rho",
            "MAE (95 %)",
            "AUROC (95 %)",
            "AURC",
            "rounds",
            "s a round",
            "MB a round",
            "s to fit",
            "s a case",
        ),
        rows=tuple(_cells(workshop, noise, entry, rows[entry.name]) for entry in compared),
        notes=(
            f"{len(first)} candidates of {SITES} sites, {failures} of them failures (true DSC below "
            f"{FAILURE:g}). AUROC of finding failures; AURC with 1 - DSC as risk, lower is better. Intervals "
            "over patients.",
            "Seconds of one site. MB to and from one site. Fitted is at each site, to labels of its own "
            "references that are degraded in every known way; what needs a rating is tried on labels that "
            "nobody has rated.",
        ),
    )


def _cells(
    workshop: Workshop, noise: SpoiledBy, entry: Entry, row: Row
) -> tuple[str | float | int | None, ...]:
    tried = [one for one in row.candidates if not one.rated]
    true, predicted = (np.array([getattr(one, name) for one in tried]) for name in ("true", "predicted"))
    patients = [one.patient for one in tried]
    effort = row.effort

    def interval(figure: str) -> Estimate:
        measure = {
            "r": lambda i: pearson(predicted[i], true[i]),
            "mae": lambda i: mae(predicted[i], true[i]),
            "auroc": lambda i: auroc(-predicted[i], true[i] < FAILURE),
        }[figure]
        return estimate(measure, patients, generator(workshop.seed, "bootstrap", noise, entry.name, figure))

    return (
        entry.title,
        _needs(entry.method(workshop.task)),
        len(tried),
        str(interval("r")),
        spearman(predicted, true),
        str(interval("mae")),
        str(interval("auroc")),
        aurc(predicted, 1 - true),
        sum(stage.rounds for stage in entry.method(workshop.task).stages()),
        _number(effort.seconds_per_round),
        None if effort.bytes_per_round is None else f"{effort.bytes_per_round / 1e6:.1f}",
        _number(effort.seconds_to_fit),
        _number(effort.seconds_per_case),
    )


def _number(value: float | None) -> str | None:
    if value is None:
        return None
    if value < 0.001:  # there was nothing to do
        return "0"
    return f"{value:.2g}" if value < 10 else f"{value:.0f}"


def _needs(method: Method) -> str:
    """What a method learns from, in words; from its stages."""
    words = {"references": "references", "all": "all cases", "rated": "ratings"}
    learned = dict.fromkeys(words[stage.learns_from] for stage in method.stages())
    if method.needs_references:
        learned["references, also to judge"] = None
    return ", ".join(learned) or "nothing"


def _point(candidates: Sequence[Candidate]) -> tuple[float | None, float | None]:
    tried = [one for one in candidates if not one.rated]
    true, predicted = (np.array([getattr(one, name) for one in tried]) for name in ("true", "predicted"))
    return auroc(-predicted, true < FAILURE), mae(predicted, true)
