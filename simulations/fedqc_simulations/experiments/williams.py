"""Table 1 of Williams et al., on a segmenter's own predictions, and the same methods on spoiled annotations.

Table 1: in each of five folds an MC-dropout U-Net and a reconstruction U-Net learn from the other four and
predict the fold (`fedqc_simulations.experiments.predictions`). Five ways tell the DSC of a prediction: the
voxel-wise sum of its uncertainty or of its error, brought to DSC by a monotone map fitted to the other folds,
and a regression on the prediction beside image, uncertainty or error, trained on the predictions of the other
folds. Neither has seen a patient whom it judges, nor has the segmenter. But the segmenters of the other folds
have: what is learned about their predictions is about slightly other networks. All folds are pooled, where
the paper has means over folds; the mean of the folds' own correlations stands beside the pooled one, which
also tells how well folds are told apart.

Three things differ from the paper. Its regressions learned from predictions for images that the segmenter was
trained on, which are better than elsewhere; ours learn from out-of-fold predictions only. Its thresholds of
the sums were read off a plot; ours is a DSC of 0.75 behind the map, or where hardly any prediction is so bad,
the tenth percentile. And its precision and recall are not those of finding failures: the published code reads
scikit-learn's confusion matrix as TP, FP, FN, TN, which is TN, FP, FN, TP, so that they are specificity and
negative predictive value.

The second table asks what the paper does not: how such methods, and others, find spoiled annotations, each
with an error of its own (`fedqc reproduce methods` has habits of sites, too). There a regression learns from
degraded labels, and the sums have no row, for they never look at a label.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import nn

from fedqc.config import QCConfig, ReconstructionConfig, RegressionConfig, SamplesConfig, SegmenterConfig
from fedqc.errors import DataError
from fedqc.label_sources.making import CaseLabels
from fedqc.methods.base import Known, Method
from fedqc.methods.calibration import MonotoneMap
from fedqc.methods.dice_regression import DiceRegressionMethod
from fedqc.methods.pair_maps import PairMaps
from fedqc.metrics.agreement import mae, pearson, rmse
from fedqc.metrics.filtering import filtering
from fedqc.seeding import derive_seed, generator
from fedqc.task import Task
from fedqc_simulations.consortium import FEWEST_PATIENTS
from fedqc_simulations.experiments import methods
from fedqc_simulations.experiments.base import Judged, Table, TestLabels, Workshop, tried, write_tables
from fedqc_simulations.experiments.figures import Example, draw_comparison, draw_filter, draw_maps
from fedqc_simulations.experiments.measures import Values, estimate
from fedqc_simulations.experiments.predictions import (
    FOLDS,
    MAPS,
    SOURCE,
    KeptMap,
    Predictions,
    make_predictions,
    train_all_rounds,
)

NAME = "williams"
TITLE = "Williams et al., Table 1"
ON_ANNOTATIONS = "The methods on spoiled annotations"
QUICK_CASES = 40
FAILURE, FEWEST_FAILURES, WORST = 0.75, 0.05, 0.1
"""A prediction with a true DSC below the first is a failure; what is predicted to be below it is sorted out.
Where a smaller share than the second is so bad, the worst share of all, the third, are the failures."""
REBUILT = "FLAIR"
"""The modality that is reconstructed, where a task has it; else all are."""
INPUTS = ("image", "uncertainty", "error")
"""What a regression sees beside the prediction."""
PREDICTED = "snapshots"
"""Kind of stored label under which a regression is given the predictions: what one segmenter makes."""
SUM_TITLES = {name: f"Sum of {name}" for name in MAPS}
REGRESSION_TITLES = {name: f"Regression on {name}" for name in INPUTS}


def config(task: Task, quick: bool, rounds: int | None = None) -> QCConfig:
    """How networks and regressions of Table 1 are trained.

    Args:
        task: decides which modality is reconstructed.
        quick: in minutes.
        rounds: of every training; None: the table's own.
    """
    return QCConfig(
        method=DiceRegressionMethod.name,
        rounds=rounds or (2 if quick else 8),
        local_steps=15 if quick else 50,
        batch_size=4 if quick else 8,
        cross_check_rounds=0,
        segmenter=SegmenterConfig(
            rounds=rounds or (2 if quick else 12), local_steps=30 if quick else 50, passes=20
        ),
        reconstruction=_rebuilt(task),
        regression=RegressionConfig(input="image"),
        samples=SamplesConfig(seggen=0, annotator=0, untouched=0, snapshots=1),
        balance="none",
    )


def entries(task: Task, quick: bool) -> tuple[methods.Entry, ...]:
    """The methods of the table of annotations."""
    known = {entry.name: entry for entry in methods.entries(quick)}
    usual = known[DiceRegressionMethod.name]
    regressions = [
        methods.Entry(
            f"{usual.name}-{name}",
            REGRESSION_TITLES[name],
            usual.qc.model_copy(
                update={"regression": RegressionConfig(input=name), "reconstruction": _rebuilt(task)}
            ),
        )
        for name in INPUTS
    ]
    first, *others = (known[name] for name in ("expected-dice", "ensemble", "rca", "qcresunet", "combine"))
    return first, *regressions, *others


def reproduce(workshop: Workshop) -> None:
    """Train and try what is missing, and write tables and figures.

    Raises:
        DataError: there are too few patients.
    """
    fewest, patients = methods.SITES * FEWEST_PATIENTS, {files.patient for files in workshop.cases}
    if len(patients) < fewest:
        raise DataError(
            f"{workshop.settings.data or workshop.out}: {len(patients)} patients can be used; five folds and "
            f"{methods.SITES} sites take {fewest} at least; use a larger data set"
        )
    quick, rounds = workshop.settings.quick, workshop.settings.rounds
    qc = config(workshop.task, quick, rounds)
    predictions = make_predictions(workshop, qc)
    rows = judged_predictions(workshop, qc, predictions)
    draw_filter(workshop.out / "predictions.png", rows, failure_bound(_true(rows)))
    draw_maps(workshop.out / "maps.png", _examples(workshop, predictions, rows[REGRESSION_TITLES["image"]]))
    on_annotations, points = methods.compare(
        workshop, entries(workshop.task, quick), ON_ANNOTATIONS, noises=("mixed",)
    )
    draw_comparison(workshop.out / "annotations.png", points)
    write_tables(workshop, [_table(workshop, qc, predictions, rows), *on_annotations])


# -------------------------------------------------------------------------------------------- predictions


def judged_predictions(workshop: Workshop, qc: QCConfig, predictions: Predictions) -> dict[str, list[Judged]]:
    """What each way says of all predictions, by the title of its row."""
    labels = TestLabels(workshop.opened(workshop.cases), {SOURCE: predictions.labels})
    regressions = {
        REGRESSION_TITLES[name]: _by_regression(workshop, qc, predictions, labels, name) for name in INPUTS
    }
    facts = regressions[REGRESSION_TITLES["image"]]
    fold_of = {files.id: predictions.fold_of(files) for files in workshop.cases}
    sums = {}
    for name in MAPS:
        values = {one.case: predictions.sum_of(one.case, name) for one in facts}
        sums[SUM_TITLES[name]] = by_sum(facts, values, fold_of)
    return {**sums, **regressions}


def by_sum(facts: Sequence[Judged], values: Mapping[str, float], fold_of: Mapping[str, int]) -> list[Judged]:
    """The DSC that a voxel-wise sum means, by a monotone map fitted to the other folds, its direction too.

    Args:
        facts: the truth about each prediction.
        values: the sum of each case.
        fold_of: the fold of each case.
    """
    value = np.array([values[one.case] for one in facts])
    true = np.array([one.true for one in facts])
    fold = np.array([fold_of[one.case] for one in facts])
    predicted = np.empty(len(facts))
    for number in set(fold_of.values()):
        mine = fold == number
        to_dsc = MonotoneMap(sign="learned")
        to_dsc.fit(value[~mine], true[~mine])
        predicted[mine] = to_dsc(value[mine])
    return [
        replace(one, predicted=float(quality), regions={})
        for one, quality in zip(facts, predicted, strict=True)
    ]


class PredictionRegression(DiceRegressionMethod):
    """Dice regression beside whose label lies a map that was made before, or the image.

    Args:
        task: What is segmented.
        config: How it is trained.
        maps: Makes the maps; None: the image.
    """

    def __init__(self, task: Task, config: QCConfig, maps: PairMaps | None) -> None:
        super().__init__(task, config)
        if maps is not None:
            self.maps = maps


@dataclass(frozen=True)
class _Regression:
    """A trained regression."""

    method: Method
    network: nn.Module


def _by_regression(
    workshop: Workshop, qc: QCConfig, predictions: Predictions, labels: TestLabels, name: str
) -> list[Judged]:
    """What regressions say, each of the fold that it has not learned from."""
    maps = None if name == "image" else KeptMap(predictions, name)
    method = PredictionRegression(workshop.task, qc, maps)
    (stage,) = method.stages()
    judged: list[Judged] = []
    for fold in range(FOLDS):

        def trained(fold: int = fold) -> _Regression:
            training = [files for files in workshop.cases if predictions.fold_of(files) != fold]
            cases = workshop.opened(training)
            seed = derive_seed(workshop.seed, name, fold)
            network = method.build(seed)
            train_all_rounds(
                workshop,
                method,
                network,
                cases,
                stage,
                seed=seed,
                what=f"the regression on {name}, fold {fold + 1}",
                known=Known(labels={PREDICTED: CaseLabels(predictions.labels, cases)}),
            )
            return _Regression(method, network)

        samples = [one for one in labels.samples if predictions.fold_of(workshop.cases[one.case]) == fold]
        judged += tried(workshop, f"{name}-fold-{fold + 1}", trained, labels, samples)
    return judged


def _rebuilt(task: Task) -> ReconstructionConfig:
    return ReconstructionConfig(modalities=tuple(name for name in task.modalities if name == REBUILT))


# ------------------------------------------------------------------------------------------------- tables


def failure_bound(true: Values) -> float:
    """Below which DSC a prediction is a failure, given the true DSC `[n]` of all."""
    if (true < FAILURE).mean() >= FEWEST_FAILURES:
        return FAILURE
    return float(np.round(np.quantile(true, WORST), 3))


def cells(
    title: str, judged: Sequence[Judged], fold_of: Mapping[str, int], rng: np.random.Generator
) -> tuple[str | float | int | None, ...]:
    """A row of Table 1.

    Args:
        title: of the row.
        judged: every prediction once.
        fold_of: the fold of each case.
        rng: draws the patients of the intervals.
    """
    true, predicted = (np.array([getattr(one, name) for one in judged]) for name in ("true", "predicted"))
    patients = [one.patient for one in judged]
    bound = failure_bound(true)
    dropped = predicted < bound
    found = filtering(predicted, true, dropped, bound)
    r = estimate(lambda chosen: pearson(predicted[chosen], true[chosen]), patients, rng)
    error = estimate(lambda chosen: mae(predicted[chosen], true[chosen]), patients, rng)
    deviation = rmse(predicted, true)
    return (
        title,
        str(r),
        _r_in_folds(predicted, true, [fold_of[one.case] for one in judged]),
        str(error),
        None if deviation is None else f"{deviation**2:.4f}",
        found.mean_dsc_before,
        found.mean_dsc_after,
        found.precision,
        found.recall,
        f"{int((dropped & (true < bound)).sum())} of {found.n_failures}",
        f"{dropped.mean():.1%}",
    )


def _table(
    workshop: Workshop, qc: QCConfig, predictions: Predictions, rows: Mapping[str, Sequence[Judged]]
) -> Table:
    first = next(iter(rows.values()))
    fold_of = {files.id: predictions.fold_of(files) for files in workshop.cases}
    rebuilt = ", ".join(qc.reconstruction.modalities or workshop.task.modalities)
    true = _true(rows)
    bound = failure_bound(true)
    n_failures = int((true < bound).sum())
    share = f"{(true < FAILURE).mean():.0%}"
    few = "" if bound == FAILURE else f", the lowest tenth, since {share} only are below {FAILURE:g}"
    plain = []
    for name in MAPS:
        value = np.array([predictions.sum_of(one.case, name) for one in first])
        r = _r_in_folds(value, true, [fold_of[one.case] for one in first])
        plain.append(f"{name} {'—' if r is None else f'{r:.3f}'}")
    segmenter = qc.segmenter
    return Table(
        title=f"{TITLE}: the segmenter's own predictions",
        columns=(
            "quality by",
            "r (95 %)",
            "r, mean of folds",
            "MAE (95 %)",
            "MSE",
            "DSC before",
            "DSC after",
            "precision",
            "recall",
            "failures found",
            "left for review",
        ),
        rows=tuple(
            cells(title, judged, fold_of, generator(workshop.seed, "bootstrap", title))
            for title, judged in rows.items()
        ),
        notes=(
            f"{len(first)} predictions for {len({one.patient for one in first})} patients in {FOLDS} folds, "
            f"{n_failures} of them failures (true DSC below {bound:g}{few}). What is predicted to be below "
            "is left for review; DSC after is the mean of the rest. Intervals over patients.",
            "Precision and recall of finding failures. The paper's are another thing: its code reads the "
            "confusion matrix in the wrong order and prints specificity and negative predictive value.",
            f"r of the sums themselves with the true DSC, mean of folds: {', '.join(plain)}. Their maps "
            "to DSC, and the regressions, learned from predictions of the other folds.",
            f"Each segmenter and each reconstruction (of {rebuilt}): {segmenter.rounds} rounds of "
            f"{segmenter.local_steps} steps of {segmenter.batch_size}, {segmenter.passes} passes. Each "
            f"regression: {qc.rounds} rounds of {qc.local_steps} steps of {qc.batch_size}.",
        ),
    )


def _true(rows: Mapping[str, Sequence[Judged]]) -> Values:
    """True DSC of all predictions, which is the same in all rows."""
    return np.array([one.true for one in next(iter(rows.values()))])


def _r_in_folds(value: Values, true: Values, folds: Sequence[int]) -> float | None:
    """Mean over the folds of the correlation in each, as in the paper; None where no fold has one."""
    fold = np.array(folds)
    found = [pearson(value[fold == one], true[fold == one]) for one in sorted(set(folds))]
    known = [r for r in found if r is not None]
    return float(np.mean(known)) if known else None


def _examples(workshop: Workshop, predictions: Predictions, judged: Sequence[Judged]) -> list[Example]:
    """The worst, the middle and the best prediction, each in the slice with most of it."""
    ordered = sorted(judged, key=lambda one: (one.true, one.case))
    position = {files.id: index for index, files in enumerate(workshop.cases)}
    cases = workshop.opened(workshop.cases)
    found = []
    for one in (ordered[0], ordered[len(ordered) // 2], ordered[-1]):
        case = cases[position[one.case]]
        reference = np.array(case.label) > 0
        prediction = predictions.labels.read(case, 0) > 0
        z = int((reference | prediction).sum(axis=(0, 1)).argmax())
        uncertainty, error = (predictions.map_of(case.id, name)[:, :, z].astype(np.float32) for name in MAPS)
        image = np.array(case.image[-1])
        found.append(
            Example(one.true, image[:, :, z], reference[:, :, z], prediction[:, :, z], uncertainty, error)
        )
    return found
