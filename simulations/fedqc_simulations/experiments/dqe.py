"""Table 1 of Kofler et al. (2022), its Bland-Altman plot and its external evaluation, on simulated ratings.

The ratings of the paper are not public. Here raters are simulated whose bias and noise are known
(`fedqc_simulations.raters`): five of them rate every label in the axial, the coronal and the sagittal view,
with whole stars, and a fifth of them again. A case has five labels, its own and four with errors that people
make, chosen so that all stars occur. So a prediction can be held against the mean rater, as in
the paper, and also against the stars that a label deserves, which no rater's noise is in. Raters look at the
slices where the reference is largest (`view_qualities`), the network at those through the label's core.

A half of the patients is learned from, a quarter is the internal test. The last quarter is the external one:
its labels are made by random forests, and by SegGen's deformations, which no rated label was; equally many of
each tenth of DSC are taken.

OUT/
├── rated/PART/     labels/, ratings.csv as a site has it, and labels.json: what each label is and deserves
└── rows/           ROW.jsonl of the internal test, ROW-external.jsonl of the other
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.volumes import Case, write_volume
from fedqc.config import DQEConfig, QCConfig, SamplesConfig, SourcesConfig
from fedqc.degradation.annotator import ANNOTATOR_KINDS
from fedqc.degradation.base import Untouched
from fedqc.degradation.samples import LabelFactory
from fedqc.degradation.seggen import SegGen
from fedqc.errors import DataError
from fedqc.files import write_json
from fedqc.geometry import Sides
from fedqc.label_sources.making import FOREST, label_store
from fedqc.methods.dqe import stars_by_view
from fedqc.metrics.agreement import limits_of_agreement, mae, mae_sd, pearson, rmse
from fedqc.metrics.raters import Repeats, rater_agreement
from fedqc.metrics.surface import surface_dsc
from fedqc.model import StoredModel
from fedqc.ratings import FEWEST_STARS, MOST_STARS, Rating, View, ratings_by_case
from fedqc.scoring import judge
from fedqc.seeding import generator
from fedqc.views import VIEWS
from fedqc_simulations.consortium import as_file, fitted_to, label_sides, read_label
from fedqc_simulations.experiments.base import (
    Row,
    Sample,
    Table,
    TestLabels,
    Workshop,
    evenly,
    kept,
    make_labels,
    n_parameters,
    trained,
    write_tables,
)
from fedqc_simulations.experiments.figures import draw_agreement, draw_stars
from fedqc_simulations.experiments.measures import Estimate, estimate
from fedqc_simulations.experiments.qcresunet import deformed
from fedqc_simulations.raters import draw_raters, rate, stars_of, view_qualities, write_ratings

NAME = "dqe"
TITLE = "Kofler et al. 2022, Table 1"
QUICK_CASES = 32
TRAINING_SHARE, TEST_SHARE = 0.5, 0.25
RATERS = 5
AGAIN = 0.2
"""Share of the ratings that are given twice."""
LABELS_A_CASE = 5
"""Rated labels of each case, its own among them."""
SEGGEN_A_CASE = 8
"""SegGen labels of each case of the external evaluation."""
TRIES = 2
"""Labels of each kind of error that are made of a case, to choose from."""
MEAN = "mean"
"""What stands for the mean of the three views where views have a name."""

Stars = Mapping[str, float]
"""Stars by view, and `MEAN`."""


def rows(quick: bool) -> tuple[Row, ...]:
    """The six variants of the table, in its order."""
    variants = (
        ("densenet121", "sgd", "percentile", "tissue"),
        ("densenet121", "adamw", "percentile", "tissue"),
        ("densenet121", "ranger21", "percentile", "tissue"),
        ("densenet201", "ranger21", "percentile", "tissue"),
        ("densenet121", "ranger21", "min-max", "regions"),
        ("densenet121", "ranger21", "percentile", "regions"),
    )
    shown = {"densenet121": "DenseNet121", "densenet201": "DenseNet201"}
    shown |= {"sgd": "SGD", "adamw": "AdamW", "ranger21": "Ranger21"}
    return tuple(
        Row(
            "-".join(parts),
            ", ".join(shown.get(part, part) for part in parts),
            QCConfig.model_validate(
                {
                    "method": "dqe",
                    "optimizer": parts[1],
                    "rounds": 2 if quick else 10,
                    "local_steps": 25 if quick else 50,
                    "cross_check_rounds": 0,
                    "dqe": DQEConfig.model_validate(
                        {
                            "architecture": parts[0],
                            "normalisation": parts[2],
                            "encoding": parts[3],
                            "batch_size": 16 if quick else 24,
                        }
                    ),
                }
            ),
        )
        for parts in variants
    )


def forests(quick: bool) -> QCConfig:
    """How the labels of the external evaluation are made."""
    return QCConfig(
        samples=SamplesConfig(seggen=0, annotator=0, untouched=0, forest=1),
        sources=SourcesConfig(folds=2, trees=20 if quick else 50),
    )


def reproduce(workshop: Workshop) -> None:
    """Train what is missing, try it, and write tables and figures.

    Raises:
        DataError: there are too few patients.
    """
    rest = 1 - TRAINING_SHARE - TEST_SHARE
    training, test, external = parts = workshop.split([TRAINING_SHARE, TEST_SHARE, rest])
    if any(len({files.patient for files in part}) < 2 for part in parts):
        raise DataError(
            f"{workshop.settings.data or workshop.out}: {len({files.patient for files in workshop.cases})} "
            "patients can be used; they are dealt out to learn from, to be tried on, and for the external "
            "evaluation, two or more to each; use a larger data set"
        )
    learned, seen = (
        rated_labels(workshop, part, files) for part, files in (("training", training), ("test", test))
    )
    variants = [row.over(workshop.settings.rounds) for row in rows(workshop.settings.quick)]
    others = external_labels(workshop, external)
    inside: dict[str, list[Rated]] = {}
    outside: dict[str, list[Measured]] = {}
    for row in variants:
        model = cache(partial(trained, workshop, row, learned.files, learned.ratings))
        inside[row.name], outside[row.name] = _tried(workshop, row, model, seen, others)
    best = min(variants, key=lambda row: _error(inside[row.name]))
    _draw(workshop, best, inside[best.name], outside[best.name])
    write_tables(
        workshop,
        [
            _variant_table(workshop, variants, inside, learned),
            _view_table(workshop, variants, inside),
            _rater_table(workshop, learned, seen, inside[best.name]),
            _limits_table(best, inside[best.name]),
            _external_table(workshop, variants, outside),
            _source_table(others),
            _star_table({"training": learned, "test": seen}),
        ],
    )


@dataclass(frozen=True)
class External:
    """Labels that nobody rated."""

    labels: TestLabels
    samples: tuple[Sample, ...]
    """Those that are taken."""
    nsd: tuple[float, ...]
    """Surface DSC of each of them."""


def external_labels(workshop: Workshop, cases: Sequence[CaseFiles]) -> External:
    """Labels that no person made: of forests that did not see the patient, and SegGen's."""
    source = forests(workshop.settings.quick)
    make_labels(workshop, workshop.opened(cases), source)
    forest = label_store(workshop.labels, FOREST, workshop.task, source.sources, workshop.seed)
    stores = {FOREST: forest, SegGen.kind: deformed(workshop, cases, SEGGEN_A_CASE)}
    labels = TestLabels(workshop.opened(cases), stores)
    dsc = np.array([one.known.mean for one in labels.samples])
    chosen = evenly(dsc, generator(workshop.seed, "balance"))
    samples = tuple(labels.samples[index] for index in chosen)
    path = workshop.out / "cache" / "surface-dsc.json"
    if not path.is_file():
        write_json(path, [_surface_dsc(workshop, labels, sample) for sample in samples])
    return External(labels, samples, tuple(json.loads(path.read_text(encoding="utf-8"))))


def _surface_dsc(workshop: Workshop, labels: TestLabels, sample: Sample) -> float:
    task = workshop.task
    label, right = (np.array(case.label) for case in labels.spoiled(sample))
    return surface_dsc(label, right, task.region_indices(), task.spacing, tolerance(workshop))


# ---------------------------------------------------------------------------------------------- rated labels


@dataclass(frozen=True)
class KnownLabel:
    """A label that was rated, and what it deserves."""

    id: str
    """Stands where a case's id does."""
    case: str
    """The case that it is of."""
    kind: str
    """Kind of error, or `untouched`."""
    qualities: Mapping[View, float]
    """True quality in [0, 1] in each view that was rated."""


@dataclass(frozen=True)
class RatedLabels:
    """Cases with labels that were rated, several of each patient."""

    files: tuple[CaseFiles, ...]
    known: tuple[KnownLabel, ...]
    """In the order of the files."""
    ratings: Mapping[str, Sequence[Rating]]
    """By the label's id."""


def rated_labels(workshop: Workshop, part: str, cases: Sequence[CaseFiles]) -> RatedLabels:
    """Labels of cases, with ratings; kept in `rated/PART`, and not made again.

    Args:
        workshop: where they are made.
        part: name of the folder.
        cases: with right labels; of two patients at least.
    """
    folder = workshop.out / "rated" / part
    if not (folder / "labels.json").is_file():
        known = list(_write_labels(workshop, folder / "labels", cases))
        raters = draw_raters(generator(workshop.seed, "raters"), RATERS)  # the same for all parts
        rng = generator(workshop.seed, "ratings", part)
        ratings = rate(rng, {one.id: one.qualities for one in known}, raters, again=AGAIN, step=1)
        write_ratings(folder / "ratings.csv", ratings)
        write_json(folder / "labels.json", [asdict(one) for one in known])
    listed = json.loads((folder / "labels.json").read_text(encoding="utf-8"))
    known = [KnownLabel(**values) for values in listed]
    by_id = {case.id: case for case in cases}
    return RatedLabels(
        tuple(_with_label(by_id[one.case], one.id, _file(folder / "labels", one.id)) for one in known),
        tuple(known),
        ratings_by_case(folder / "ratings.csv"),
    )


def _with_label(case: CaseFiles, label_id: str, label: Path) -> CaseFiles:
    return CaseFiles(id=label_id, patient=case.patient, images=case.images, label=label)


def _file(folder: Path, label_id: str) -> Path:
    return folder / f"{label_id}.nii.gz"


def _write_labels(workshop: Workshop, folder: Path, cases: Sequence[CaseFiles]) -> Iterator[KnownLabel]:
    """Write the labels of cases, each on the grid and in the values of its own file."""
    task, regions = workshop.task, workshop.task.region_indices()
    for done, case in enumerate(cases, start=1):
        rng = generator(workshop.seed, "labels", case.id)
        right = read_label(case, task)
        others = [other for other in cases if other.patient != case.patient]
        donor = fitted_to(read_label(others[int(rng.integers(len(others)))], task), right.shape)
        made = _of_all_stars(right, donor, regions, rng, label_sides(case))
        for number, (kind, label) in enumerate(made, start=1):
            name = f"{case.id}-{number}"
            write_volume(_file(folder, name), *as_file(case, label, task))
            qualities = view_qualities(label, right, regions)
            in_views = {view: quality for view, quality in qualities.items() if view in VIEWS}
            yield KnownLabel(name, case.id, kind, in_views)
        workshop.display.progress("making labels to rate", done, len(cases))


def _of_all_stars(
    right: NDArray[np.uint8],
    donor: NDArray[np.uint8],
    regions: Sequence[Sequence[int]],
    rng: np.random.Generator,
    sides: Sides,
) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The label itself, and for each equal part of the scale the degraded label that is nearest to it."""
    yield Untouched.kind, right
    factory = LabelFactory([right, donor], regions, ANNOTATOR_KINDS, sides=sides)
    drawn = [factory.draw(rng, 0, kind) for kind in factory.kinds for _ in range(TRIES)]
    made = factory.make([recipe for recipe in drawn if recipe is not None])
    stars = np.array([stars_of(dsc) for dsc in made.mean.tolist()])
    usable = set(np.flatnonzero(made.label.flatten(1).any(dim=1).numpy()).tolist())
    parts = LABELS_A_CASE - 1
    for part in range(min(parts, len(usable))):
        wanted = FEWEST_STARS + (MOST_STARS - FEWEST_STARS) * (part + rng.random()) / parts
        nearest = min(usable, key=lambda index: abs(stars[index] - wanted))
        usable.remove(nearest)
        yield made.recipes[nearest].kind, made.label[nearest].numpy()


# ---------------------------------------------------------------------------------------------------- trying


@dataclass(frozen=True)
class Rated:
    """What a model, the raters and the truth say of one label."""

    label: str
    patient: str
    predicted: Stars
    rated: Stars
    """Of the mean rater."""
    deserved: Stars
    """Without anybody's noise."""


@dataclass(frozen=True)
class Measured:
    """What a model says of a label that nobody rated, and how far that is from the reference."""

    label: str
    patient: str
    predicted: Stars
    dsc: float
    """Mean over the regions that are there."""
    nsd: float
    """Surface DSC, mean over the same regions."""


def tolerance(workshop: Workshop) -> float:
    """Of the surface DSC in mm: the longest side of a voxel."""
    return max(workshop.task.spacing)


def _tried(
    workshop: Workshop,
    row: Row,
    model: Callable[[], StoredModel],
    seen: RatedLabels,
    others: External,
) -> tuple[list[Rated], list[Measured]]:
    """What a variant says of both tests; it is trained only where something of that is missing."""

    def predictions(cases: Iterable[Case], count: int) -> Iterator[tuple[Case, dict[str, float]]]:
        stored = model()
        judged = judge(stored.method, stored.network, cases, workshop.compute)
        for done, (case, score) in enumerate(judged, start=1):
            yield case, with_mean(score.views)
            workshop.display.progress(f"trying {row.title}", done, count)

    def inside() -> Iterator[Rated]:
        known = {one.id: one for one in seen.known}
        for case, stars in predictions(workshop.opened(seen.files), len(seen.files)):
            yield Rated(
                case.id,
                case.patient,
                stars,
                with_mean(stars_by_view(seen.ratings[case.id])),
                with_mean({view: stars_of(quality) for view, quality in known[case.id].qualities.items()}),
            )

    def outside() -> Iterator[Measured]:
        pending = iter(zip(others.samples, others.nsd, strict=True))
        spoiled = (others.labels.spoiled(sample)[0] for sample in others.samples)
        for case, stars in predictions(spoiled, len(others.samples)):
            sample, nsd = next(pending)
            name = f"{case.id}-{sample.source}-{sample.index}"
            yield Measured(name, case.patient, stars, sample.known.mean, nsd)

    folder = workshop.out / "rows"
    return (
        kept(folder / f"{row.name}.jsonl", inside, lambda values: Rated(**values)),
        kept(folder / f"{row.name}-external.jsonl", outside, lambda values: Measured(**values)),
    )


def with_mean(views: Mapping[str, float]) -> dict[str, float]:
    """Stars of the views, and their mean."""
    stars = {view: views[view] for view in VIEWS}
    return stars | {MEAN: float(np.mean(list(stars.values())))}


# ---------------------------------------------------------------------------------------------------- tables


@dataclass(frozen=True)
class Errors:
    """How far stars lie from others, with intervals over patients."""

    mae: Estimate
    mae_sd: float | None
    rmse: float | None
    r: Estimate

    def cells(self) -> tuple[str, str, float | None, str]:
        """MAE with its SD, MAE with its interval, RMSE, r."""
        spread = "—" if self.mae.value is None else f"{self.mae.value:.2f}"
        if self.mae_sd is not None:
            spread += f" ± {self.mae_sd:.2f}"
        return spread, str(self.mae), self.rmse, str(self.r)


ERROR_COLUMNS = ("MAE ± SD", "MAE (95 %)", "RMSE", "r (95 %)")


def errors_of(
    predicted: Sequence[float], true: Sequence[float], patients: Sequence[str], rng: np.random.Generator
) -> Errors:
    """Mean absolute error and correlation, with intervals over patients.

    Args:
        predicted: stars of each label.
        true: those that it is held against.
        patients: whose label it is.
        rng: draws the patients.
    """
    x, y = np.array(predicted), np.array(true)
    return Errors(
        mae=estimate(lambda chosen: mae(x[chosen], y[chosen]), patients, rng),
        mae_sd=mae_sd(x, y),
        rmse=rmse(x, y),
        r=estimate(lambda chosen: pearson(x[chosen], y[chosen]), patients, rng),
    )


def against(judged: Sequence[Rated], view: str, other: str, rng: np.random.Generator) -> Errors:
    """A model's stars of a view, or of `MEAN`, against those that were `rated` or are `deserved`."""
    return errors_of(
        [one.predicted[view] for one in judged],
        [getattr(one, other)[view] for one in judged],
        [one.patient for one in judged],
        rng,
    )


def _error(judged: Sequence[Rated]) -> float:
    """By which the best variant is chosen, as in the paper: MAE of the mean of the views."""
    return float(np.mean([abs(one.predicted[MEAN] - one.rated[MEAN]) for one in judged]))


def _variant_table(
    workshop: Workshop, variants: Sequence[Row], inside: Mapping[str, list[Rated]], learned: RatedLabels
) -> Table:
    lines: list[tuple[str | float | int | None, ...]] = []
    for row in variants:
        judged = inside[row.name]
        with_raters, with_truth = (
            against(judged, MEAN, other, generator(workshop.seed, "bootstrap", row.name, other))
            for other in ("rated", "deserved")
        )
        truth = with_truth.cells()
        lines.append(
            (
                *row.title.split(", "),
                f"{n_parameters(workshop.task, row):,}",
                *with_raters.cells(),
                truth[1],
                truth[3],
            )
        )
    qc, judged = variants[0].qc, inside[variants[0].name]
    patients = {files.patient for files in learned.files}
    return Table(
        title=f"{TITLE}, on simulated ratings: stars of the mean of the views, against the mean rater "
        f"({len(judged)} labels of {len({one.patient for one in judged})} patients)",
        columns=(
            "architecture",
            "optimiser",
            "normalisation",
            "labels",
            "parameters",
            *ERROR_COLUMNS,
            "MAE to the truth (95 %)",
            "r with the truth (95 %)",
        ),
        rows=tuple(lines),
        notes=(
            f"Trained on {len(learned.files)} labels of {len(patients)} other patients, each in three views; "
            f"{qc.rounds} rounds of {qc.local_steps} steps of {qc.dqe.batch_size} slices for each variant, "
            "where the paper has 500 epochs in batches of 80. Learning rate 0.001, as there.",
            f"{RATERS} simulated raters, whose mean is the mean rater. The truth is the stars that a label "
            "deserves, without any rater's noise. Intervals resample patients.",
        ),
    )


def _view_table(workshop: Workshop, variants: Sequence[Row], inside: Mapping[str, list[Rated]]) -> Table:
    return Table(
        title="View by view",
        columns=(
            "variant",
            "view",
            *(f"{column}, mean rater" for column in ERROR_COLUMNS),
            *(f"{column}, truth" for column in ERROR_COLUMNS),
        ),
        rows=tuple(
            (
                row.title,
                view,
                *itertools.chain.from_iterable(
                    against(
                        inside[row.name],
                        view,
                        other,
                        generator(workshop.seed, "bootstrap", row.name, view, other),
                    ).cells()
                    for other in ("rated", "deserved")
                ),
            )
            for row in variants
            for view in (*VIEWS, MEAN)
        ),
    )


def _rater_table(
    workshop: Workshop, learned: RatedLabels, seen: RatedLabels, judged: Sequence[Rated]
) -> Table:
    """How far raters lie apart: what a model can hope for."""
    found = rater_agreement([rating for of_label in seen.ratings.values() for rating in of_label])
    patient = {files.id: files.patient for files in seen.files}

    def repeats(name: str, one: Repeats) -> tuple[str | float | int | None, ...]:
        return name, one.n_pairs, _number(one.mean_absolute), _number(one.sd), _number(one.icc_1)

    def compared(
        name: str, pairs: Sequence[tuple[str, float, float]]
    ) -> tuple[str | float | int | None, ...]:
        labels, first, second = zip(*pairs, strict=True)
        errors = errors_of(
            first, second, [patient[label] for label in labels], generator(workshop.seed, "bootstrap", name)
        )
        return name, len(pairs), str(errors.mae), _number(errors.rmse), None

    singles = rater_and_others(seen.ratings)
    usual = float(np.mean([with_mean(stars_by_view(given))[MEAN] for given in learned.ratings.values()]))
    return Table(
        title="How far the raters agree, on the labels of the internal test",
        columns=("compared", "pairs", "mean absolute difference", "SD about zero", "ICC(1,1)"),
        rows=(
            repeats("the same rater again, one view", found.intra),
            repeats("two raters, one view", found.inter),
            compared(
                "a rater and the mean of the others, one view",
                [one[0:1] + one[2:] for one in singles if one[1] != MEAN],
            ),
            compared(
                "a rater and the mean of the others, mean of the views",
                [one[0:1] + one[2:] for one in singles if one[1] == MEAN],
            ),
            compared(
                "the mean rater and the truth, mean of the views",
                [(one.label, one.rated[MEAN], one.deserved[MEAN]) for one in judged],
            ),
            compared(
                f"always {usual:.2f} stars, the mean in training, and the mean rater, mean of the views",
                [(one.label, usual, one.rated[MEAN]) for one in judged],
            ),
        ),
        notes=(
            f"{found.raters} raters; ICC(2,1) of all of them {_number(found.icc_2) or '—'}. Intervals over "
            "patients, where there are any.",
        ),
    )


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:.3f}"


def rater_and_others(ratings: Mapping[str, Sequence[Rating]]) -> list[tuple[str, str, float, float]]:
    """Label, view or `MEAN`, a rater's stars, the others' mean stars; of labels with two raters or more.

    Args:
        ratings: by label; each rater's in all three views.
    """
    found = []
    for label, given in ratings.items():
        stars = {
            name: with_mean(stars_by_view([one for one in given if one.rater == name]))
            for name in sorted({one.rater for one in given})
        }
        for name in stars if len(stars) > 1 else ():
            others = [one for other, one in stars.items() if other != name]
            found += [
                (label, view, stars[name][view], float(np.mean([one[view] for one in others])))
                for view in (*VIEWS, MEAN)
            ]
    return found


def _limits_table(best: Row, judged: Sequence[Rated]) -> Table:
    lines: list[tuple[str | float | int | None, ...]] = []
    for name, other in (("mean rater", "rated"), ("truth", "deserved")):
        for view in (*VIEWS, MEAN):
            limits = limits_of_agreement(
                [one.predicted[view] for one in judged], [getattr(one, other)[view] for one in judged]
            )
            numbers = (None,) * 4 if limits is None else (limits.bias, limits.sd, limits.lower, limits.upper)
            lines.append((name, view, len(judged), *numbers))
    return Table(
        title=f"Bland-Altman: {best.title}",
        columns=("held against", "view", "n", "mean difference", "SD", "lower limit", "upper limit"),
        rows=tuple(lines),
        notes=(
            "In stars, prediction minus the other; limits of agreement at 1.96 SD. The variant is that with "
            "the smallest MAE to the mean rater on these very labels, as in the paper.",
        ),
    )


def _external_table(
    workshop: Workshop, variants: Sequence[Row], outside: Mapping[str, list[Measured]]
) -> Table:
    lines: list[tuple[str | float | int | None, ...]] = []
    for row in variants:
        measured = outside[row.name]
        correlations = [
            str(correlation(measured, view, of, generator(workshop.seed, "bootstrap", row.name, view, of)))
            for view, of in [*((view, "dsc") for view in (*VIEWS, MEAN)), (MEAN, "nsd")]
        ]
        lines.append((row.title, len(measured), *correlations))
    first = outside[variants[0].name]
    dsc = np.array([one.dsc for one in first])
    return Table(
        title=f"External evaluation: predicted stars and overlap ({len(first)} labels of "
        f"{len({one.patient for one in first})} patients)",
        columns=(
            "variant",
            "n",
            *(f"r with DSC, {view} (95 %)" for view in VIEWS),
            "r with DSC, mean of the views (95 %)",
            "r with surface DSC, mean of the views (95 %)",
        ),
        rows=tuple(lines),
        notes=(
            "Labels of random forests at ten depths and of SegGen, of patients that neither networks nor "
            f"raters saw, equally many of each tenth of DSC. DSC from {np.quantile(dsc, 0.05):.2f} to "
            f"{np.quantile(dsc, 0.95):.2f} (5 and 95 %), median {np.median(dsc):.2f}; both means over the "
            f"regions {', '.join(workshop.task.regions)}.",
            f"Surface DSC: share of the surfaces no further apart than {tolerance(workshop):g} mm, the "
            "longest side of a voxel. Intervals resample patients.",
        ),
    )


def _source_table(others: External) -> Table:
    lines: list[tuple[str | float | int | None, ...]] = []
    for source in dict.fromkeys(one.source for one in others.labels.samples):
        made, taken = (
            [one.known.mean for one in group if one.source == source]
            for group in (others.labels.samples, others.samples)
        )
        lines.append((source, len(made), *np.quantile(made, (0.05, 0.5, 0.95)).tolist(), len(taken)))
    return Table(
        title="The labels of the external evaluation",
        columns=("source", "made", "DSC, 5 %", "DSC, 50 %", "DSC, 95 %", "taken"),
        rows=tuple(lines),
    )


def correlation(measured: Sequence[Measured], view: str, of: str, rng: np.random.Generator) -> Estimate:
    """Pearson r of predicted stars with `dsc` or `nsd`, with an interval over patients."""
    stars = np.array([one.predicted[view] for one in measured])
    truth = np.array([getattr(one, of) for one in measured])
    return estimate(
        lambda chosen: pearson(stars[chosen], truth[chosen]), [one.patient for one in measured], rng
    )


def _star_table(parts: Mapping[str, RatedLabels]) -> Table:
    """Which stars the labels deserve, so that it can be seen that all occur."""
    counts = {part: star_counts(labels.known) for part, labels in parts.items()}
    return Table(
        title="Stars that the rated labels deserve, rounded, in all views",
        columns=("stars", *(f"{part}, slices" for part in parts)),
        rows=tuple((stars, *(counts[part][stars] for part in parts)) for stars in counts["training"]),
        notes=tuple(f"Kinds in {part}: {_kinds(labels.known)}." for part, labels in parts.items()),
    )


def star_counts(known: Sequence[KnownLabel]) -> dict[int, int]:
    """How many slices deserve each number of stars, rounded."""
    deserved = np.rint([stars_of(quality) for one in known for quality in one.qualities.values()])
    return {stars: int((deserved == stars).sum()) for stars in range(int(FEWEST_STARS), int(MOST_STARS) + 1)}


def _kinds(known: Sequence[KnownLabel]) -> str:
    kinds, counts = np.unique([one.kind for one in known], return_counts=True)
    return ", ".join(f"{kind} {count}" for kind, count in zip(kinds, counts, strict=True))


# --------------------------------------------------------------------------------------------------- figures


def _draw(workshop: Workshop, best: Row, inside: Sequence[Rated], outside: Sequence[Measured]) -> None:
    predicted, rated = ([getattr(one, name)[MEAN] for one in inside] for name in ("predicted", "rated"))
    draw_agreement(workshop.out / "bland-altman.png", best.title, predicted, rated)
    draw_stars(workshop.out / "stars.png", best.title, rated, predicted, "mean rater, stars")
    draw_stars(
        workshop.out / "external.png",
        best.title,
        [one.dsc for one in outside],
        [one.predicted[MEAN] for one in outside],
        "true DSC",
    )
