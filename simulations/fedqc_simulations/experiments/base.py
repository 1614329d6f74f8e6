"""What all reproductions share: the cases and their split, models and rows that are kept, and the table.

OUT/
├── settings.json      what is reproduced, on what: other settings need another folder
├── phantoms/          the data, where no others are named
├── cache/             preprocessed cases, and labels of known quality
├── models/ROW/        the model of each row
├── rows/ROW.jsonl     every label that a row was tried on: the truth, and what the model said
├── table.json         the table, table.md the same to read
└── *.png              figures
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedqc import __version__
from fedqc.alone import Job, train_and_fit
from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case
from fedqc.commands.folders import checked_cases
from fedqc.compute import Compute, choose_compute
from fedqc.config import ComputeConfig, DataConfig, QCConfig, SiteConfig
from fedqc.display import Display
from fedqc.errors import ConfigError, DataError
from fedqc.files import replacing, write_json
from fedqc.label_sources.making import make_stored_labels, stored_labels
from fedqc.label_sources.store import LabelStore, StoredLabel
from fedqc.methods.base import ERROR_FROM, Known, Method, get_method
from fedqc.metrics.overlap import overlap
from fedqc.model import StoredModel, load_model
from fedqc.ratings import Rating
from fedqc.scoring import judge
from fedqc.seeding import derive_seed
from fedqc.task import Task, load_task
from fedqc_simulations.pathology import Kind, kind_for
from fedqc_simulations.phantoms import write_phantoms

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PHANTOMS, SCANNERS = 120, 4
"""Phantoms that are drawn for a table where no data are named, and the scanners that they come from."""


@dataclass(frozen=True)
class Settings:
    """What a reproduction is made on."""

    data: Path | None
    """Folder of the data set, which is only read; None: phantoms, of the kind that the task is for."""
    layout: str | None
    task: str
    seed: int
    quick: bool
    """Small enough for minutes: the figures say that it runs, not how good a method is."""
    sites: int
    """0: on one machine; else training is federated over so many sites, beside training on pooled data."""
    compute: ComputeConfig
    rounds: int | None = None
    """Of every QC model's training; None: as many as the table says."""


@dataclass(frozen=True)
class Workshop:
    """Where a reproduction is made, and with what."""

    out: Path
    task: Task
    cases: tuple[CaseFiles, ...]
    cache: CaseCache
    settings: Settings
    compute: Compute
    display: Display

    @property
    def seed(self) -> int:
        """Decides everything that is drawn."""
        return self.settings.seed

    @property
    def labels(self) -> Path:
        """Folder of the labels that segmenters made."""
        return self.out / "cache" / "labels"

    def opened(self, files: Sequence[CaseFiles]) -> CachedCases:
        """Preprocessed cases, each read when it is asked for."""
        return CachedCases(self.cache, files)

    def split(self, shares: Sequence[float], name: str = "split") -> list[tuple[CaseFiles, ...]]:
        """The cases dealt out by patient in these shares, which add up to 1."""
        patients = sorted(
            {files.patient for files in self.cases}, key=lambda one: derive_seed(self.seed, name, one)
        )
        ends = np.rint(np.cumsum([0, *shares]) * len(patients)).astype(int)
        parts = [set(patients[begin:end]) for begin, end in pairwise(ends)]
        return [tuple(files for files in self.cases if files.patient in part) for part in parts]


def open_workshop(
    name: str, settings: Settings, out: Path, display: Display, at_most: int | None
) -> Workshop:
    """Find, check and prepare the cases.

    Args:
        name: what is reproduced.
        settings: on what.
        out: a new folder, or one in which the same was begun.
        display: told how it goes.
        at_most: so many cases, drawn at random; None: all.

    Raises:
        ConfigError: the folder holds something else, or no phantoms are drawn for the task.
        DataError: there is no such data folder, or no case can be used.
    """
    task = load_task(settings.task)
    kind = kind_for(task) if settings.data is None else None  # asked before the folder is bound to the data
    if settings.data is not None and not settings.data.exists():
        raise DataError(f"{settings.data}: there is no such folder; correct the path of the data")
    _begin(name, settings, task, out)
    data = settings.data or out / "phantoms"
    if kind is not None:
        _draw(kind, data, at_most or PHANTOMS, settings.seed, display)
    site = SiteConfig(
        name="reproduction", task=settings.task, data=DataConfig(path=data, layout=settings.layout)
    )
    checked = checked_cases(site, task, memory=out / "cache" / "checks", display=display).checked
    usable = sorted(checked.usable, key=lambda one: derive_seed(settings.seed, "order", one.patient, one.id))
    compute = choose_compute(settings.compute.device, settings.compute.precision, settings.compute.memory)
    cases = tuple(sorted(usable[:at_most], key=lambda one: one.id))
    cache = CaseCache(out / "cache", task)
    for done, files in enumerate(cases, start=1):
        cache.get(files)
        display.progress("preparing the cases", done, len(cases))
    return Workshop(out, task, cases, cache, settings, compute, display)


def _draw(kind: Kind, folder: Path, count: int, seed: int, display: Display) -> None:
    """Draw phantoms where that is not done: `count` of them or a few more, from four scanners."""
    if not (folder / "dataset.json").is_file():  # which is written last
        write_phantoms(folder, SCANNERS, -(-count // SCANNERS), seed, display.progress, kind=kind)


def _begin(name: str, settings: Settings, task: Task, out: Path) -> None:
    """Write down what is made, or look whether it is what was begun here."""
    values = {
        "reproduces": name,
        "fedqc": __version__,
        "data": None if settings.data is None else str(settings.data),
        "layout": settings.layout,
        "task": task.digest,
        "seed": settings.seed,
        "quick": settings.quick,
        "sites": settings.sites,
        "rounds": settings.rounds,
    }
    path = out / "settings.json"
    if path.exists():
        try:
            before = dict(json.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise ConfigError(f"{path}: cannot be read; restore it, or name another folder") from None
        changed = sorted(key for key in values if before.get(key) != values[key])
        if changed:
            raise ConfigError(
                f"{out}: holds a reproduction with other {', '.join(changed)}; name another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out}: is not empty and holds no reproduction; name a new folder")
    out.mkdir(parents=True, exist_ok=True)
    write_json(path, values)


# ------------------------------------------------------------------------------------------------ training


@dataclass(frozen=True)
class Row:
    """A model of the table."""

    name: str
    """Of its folder."""
    title: str
    qc: QCConfig

    def over(self, rounds: int | None) -> "Row":
        """The same, trained over so many rounds; None: over its own."""
        if rounds is None:
            return self
        return replace(self, qc=self.qc.model_copy(update={"rounds": rounds}))


def n_parameters(task: Task, row: Row) -> int:
    """Parameters of a row's network."""
    with torch.device("meta"):
        network = get_method(row.qc.method)(task, row.qc).build(0)
    return sum(parameter.numel() for parameter in network.parameters())


def make_labels(workshop: Workshop, cases: CachedCases, qc: QCConfig) -> None:
    """Make the labels of the sources that have a share in a training, where they are missing.

    Args:
        workshop: where they are kept.
        cases: dealt into folds together; each is segmented by what learned from the other folds.
        qc: of the training.
    """
    make_stored_labels(
        workshop.labels,
        cases,
        workshop.task,
        qc,
        seed=workshop.seed,
        compute=workshop.compute,
        progress=lambda kind, done, total: workshop.display.progress(f"making labels: {kind}", done, total),
    )


def trained(
    workshop: Workshop,
    row: Row,
    training: Sequence[CaseFiles],
    ratings: Mapping[str, Sequence[Rating]] | None = None,
    references: Sequence[CaseFiles] | None = None,
) -> StoredModel:
    """The model of a row, trained on cases whose labels `make_labels` has made, alone or among others.

    Args:
        workshop: where it is made.
        row: the model.
        training: cases to train on.
        ratings: what people thought of their labels, by the case's id.
        references: those of them whose labels are right, for methods that compare; None: all are.
    """
    folder = workshop.out / "models" / row.name
    cases = workshop.opened(training)
    labels = stored_labels(workshop.labels, cases, workshop.task, row.qc, workshop.seed)
    workshop.display.say(f"training {row.title} on {len(cases)} cases")
    job = Job(workshop.task, row.qc, workshop.seed, ratings=ratings or {})
    method = get_method(row.qc.method)(workshop.task, row.qc)
    known = Known(labels=labels, ratings=job.ratings, kept=workshop.out / "cache" / "estimates")
    train_and_fit(
        job,
        method,
        cases,
        known,
        folder,
        compute=workshop.compute,
        display=workshop.display,
        references=None if references is None else workshop.opened(references),
    )
    return load_model(folder, workshop.task)


# ------------------------------------------------------------------------------------------------- trying


@dataclass(frozen=True)
class Sample:
    """A label of known quality that models are tried on."""

    case: int
    """Index among the test cases."""
    source: str
    index: int
    """Among the labels of its source."""
    known: StoredLabel


BINS = 10
RARE = 20
"""Labels of a tenth of DSC below which it does not say how many are taken of the others."""


def evenly(dsc: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.intp]:
    """Indices of labels of all qualities: equally many of each tenth of DSC, and none twice.

    As many as the rarest tenth holds that has 20 or more; rarer ones are taken whole.

    Args:
        dsc: `[n]` in [0, 1].
        rng: chooses among the labels of a tenth.
    """
    tenth = np.minimum((dsc * BINS).astype(int), BINS - 1)
    counts = np.bincount(tenth, minlength=BINS)
    most = min(counts[counts >= RARE], default=counts.max())
    chosen = [rng.permutation(np.flatnonzero(tenth == index))[:most] for index in range(BINS)]
    return np.sort(np.concatenate(chosen))


class TestLabels:
    """Labels of the test cases, from several stores."""

    __test__ = False  # no test of pytest's

    def __init__(self, cases: Sequence[Case], stores: Mapping[str, LabelStore]) -> None:
        self.cases = cases
        self._stores = dict(stores)
        self.samples = tuple(
            Sample(number, source, index, known)
            for source, store in self._stores.items()
            for number in range(len(cases))
            for index, known in enumerate(store.of(cases[number]))
        )

    def spoiled(self, sample: Sample) -> tuple[Case, Case]:
        """The case with the label in place of its own, and as it is."""
        case = self.cases[sample.case]
        return replace(case, label=self._stores[sample.source].read(case, sample.index)), case


@dataclass(frozen=True)
class Judged:
    """What a model said of one label, and the truth."""

    case: str
    patient: str
    source: str
    recipe: Mapping[str, Any]
    true: float
    """Mean DSC over the regions that are there."""
    predicted: float
    regions: Mapping[str, tuple[float, float | None]]
    """True and predicted DSC of each region that the method scores."""
    accuracy: float
    """Share of voxels whose class is right."""
    indicator: float | None = None
    """The same as the error map has it (QI)."""
    error: Mapping[str, float | None] = field(default_factory=dict)
    """`dsc`, `accuracy`, `precision` and `recall` of the error map; None where there is nothing to find."""


class Judge(Protocol):
    """A trained model, stored or not."""

    @property
    def method(self) -> Method:
        """How it scores."""

    @property
    def network(self) -> nn.Module:
        """What it learned."""


def tried(
    workshop: Workshop,
    name: str,
    model: Callable[[], Judge],
    labels: TestLabels,
    samples: Sequence[Sample],
) -> list[Judged]:
    """What a model says of labels; kept in `rows/NAME.jsonl`, and not made again."""
    return kept(
        workshop.out / "rows" / f"{name}.jsonl",
        lambda: _judged(workshop, model(), labels, samples, name),
        _as_judged,
    )


Kept = TypeVar("Kept", bound="DataclassInstance")


def kept(
    path: Path, make: Callable[[], Iterable[Kept]], read: Callable[[dict[str, Any]], Kept]
) -> list[Kept]:
    """What lies in a file, one JSON object a line; made and written where there is none.

    Args:
        path: of the file.
        make: dataclasses that JSON can write.
        read: makes one of them again from its values.
    """
    if path.is_file():
        return [read(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    made = list(make())
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        aside.write_text("".join(f"{json.dumps(asdict(one))}\n" for one in made), encoding="utf-8")
    return made


def _judged(
    workshop: Workshop, model: Judge, labels: TestLabels, samples: Sequence[Sample], name: str
) -> Iterator[Judged]:
    pending: list[Sample] = list(reversed(samples))
    spoiled = (labels.spoiled(sample)[0] for sample in samples)
    regions = model.method.scored_regions()
    for done, (case, score) in enumerate(
        judge(model.method, model.network, spoiled, workshop.compute), start=1
    ):
        sample = pending.pop()
        reference = torch.from_numpy(np.array(labels.cases[sample.case].label))[None]
        label = torch.from_numpy(np.array(case.label))[None]
        truth = overlap(label, reference, tuple(regions.values())).dsc[0].tolist()
        wrong = (label != reference)[0].numpy()
        yield Judged(
            case=case.id,
            patient=case.patient,
            source=sample.source,
            recipe=sample.known.recipe,
            true=sample.known.mean,
            predicted=score.quality,
            regions={
                region: (value, score.regions.get(region))
                for region, value in zip(regions, truth, strict=True)
            },
            accuracy=float(1 - wrong.mean()),
            indicator=score.quality_indicator,
            error={} if score.error_map is None else _error_figures(score.error_map >= ERROR_FROM, wrong),
        )
        workshop.display.progress(f"trying {name}", done, len(samples))


def of_region(judged: Judged, region: str) -> Judged:
    """With true and predicted DSC of a region in place of the mean's."""
    true, predicted = judged.regions[region]
    assert predicted is not None  # noqa: S101 - for the type checker
    return replace(judged, true=true, predicted=predicted)


def _error_figures(marked: np.ndarray, wrong: np.ndarray) -> dict[str, float | None]:
    """How well an error map finds what is wrong, errors as the positive class."""
    found, n_marked, n_wrong = (int(part.sum()) for part in (marked & wrong, marked, wrong))
    return {
        "dsc": 2 * found / (n_marked + n_wrong) if n_wrong else None,
        "accuracy": float((marked == wrong).mean()),
        "precision": found / n_marked if n_marked else None,
        "recall": found / n_wrong if n_wrong else None,
        "marked": float(marked.mean()),
    }


def _as_judged(values: dict[str, Any]) -> Judged:
    values["regions"] = {name: tuple(pair) for name, pair in values["regions"].items()}
    return Judged(**values)


# -------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Table:
    """A table of figures; None is shown as a dash."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | int | None, ...], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table to read."""
        head = f"## {self.title}\n\n| {' | '.join(self.columns)} |\n|{' --- |' * len(self.columns)}\n"
        lines = "".join(f"| {' | '.join(map(_shown, row))} |\n" for row in self.rows)
        return head + lines + "".join(f"\n{note}\n" for note in self.notes)


def _shown(value: str | float | None) -> str:
    if value is None:
        return "—"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_tables(workshop: Workshop, tables: Sequence[Table]) -> None:
    """Write `table.json` and `table.md`."""
    write_json(workshop.out / "table.json", {"tables": [asdict(table) for table in tables]})
    text = "\n".join(table.markdown() for table in tables)
    if workshop.settings.quick:
        text = "Made with --quick: that it runs is shown here, not how good a method is.\n\n" + text
    with replacing(workshop.out / "table.md") as aside:
        aside.write_text(text, encoding="utf-8")
