"""Table 1 of Zhang & Chung (2019): error maps of a VoxResNet for the outputs of two others, in five folds.

Both segmenters (3D and 2D) are trained once for each fold, on the other four, and segment the fold by all
five outputs: ten labels a case, by networks that never saw it. The error map of a fold's labels is predicted
by a network that was trained on the labels of the other folds. References are a label of their own kind (GT):
one of eleven that the predictor learns from is the reference itself, since one that never saw a right label
takes a part of every label to be wrong. Whether the paper's predictor saw them it does not say.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from fedqc.config import NetworkConfig, QCConfig, SamplesConfig, SourcesConfig
from fedqc.label_sources.folds import folds_of
from fedqc.label_sources.making import label_store
from fedqc.label_sources.store import LabelStore
from fedqc.metrics.agreement import mae, pearson
from fedqc.seeding import generator
from fedqc_simulations.experiments.base import (
    Judged,
    Row,
    Table,
    TestLabels,
    Workshop,
    make_labels,
    trained,
    tried,
    write_tables,
)
from fedqc_simulations.experiments.figures import draw_indicator
from fedqc_simulations.experiments.measures import estimate
from fedqc_simulations.experiments.pooled import federated_rows

NAME = "voxresnet"
TITLE = "Zhang & Chung 2019, Table 1"
QUICK_CASES = 40
FOLDS = 5
SOURCE = "side-outputs"
GROUPS: tuple[tuple[str, Callable[[Judged], bool]], ...] = (
    ("3D final", lambda one: _is(one, "3d", "final")),
    ("3D-2", lambda one: _is(one, "3d", "side-2")),
    ("3D-3", lambda one: _is(one, "3d", "side-3")),
    ("3D-4", lambda one: _is(one, "3d", "side-4")),
    ("3D-5", lambda one: _is(one, "3d", "side-5")),
    ("GT", lambda one: one.source == "reference"),
    ("3D average", lambda one: one.recipe.get("variant") == "3d"),
    ("2D average", lambda one: one.recipe.get("variant") == "2d"),
    ("overall-auto", lambda one: one.source == SOURCE),
    ("overall-GT", lambda one: True),
)


def model(quick: bool) -> Row:
    """The predictor of error maps."""
    return Row(
        "voxresnet",
        "VoxResNet",
        QCConfig(
            method="voxresnet",
            rounds=4 if quick else 12,
            local_steps=25 if quick else 50,
            batch_size=4,
            learning_rate=2e-3,
            cross_check_rounds=0,
            network=NetworkConfig(width=8 if quick else 32),
            samples=SamplesConfig(seggen=0, annotator=0, untouched=1 / 11, side_outputs=10 / 11),
            sources=SourcesConfig(
                folds=FOLDS,
                rounds=2 if quick else 6,
                local_steps=40 if quick else 50,
                width=8 if quick else 32,
            ),
            balance="none",
        ),
    )


def reproduce(workshop: Workshop) -> None:
    """Train what is missing, try it, and write table and figures."""
    row = model(workshop.settings.quick).over(workshop.settings.rounds)
    cases = workshop.opened(workshop.cases)
    make_labels(workshop, cases, row.qc)
    made = label_store(workshop.labels, SOURCE, workshop.task, row.qc.sources, workshop.seed)
    labels = TestLabels(cases, {SOURCE: made, "reference": _references(workshop)})
    fold_of = folds_of((files.patient for files in workshop.cases), workshop.seed, FOLDS)
    judged: list[Judged] = []
    for fold in range(FOLDS):
        training = [files for files in workshop.cases if fold_of[files.patient] != fold]
        samples = [one for one in labels.samples if fold_of[workshop.cases[one.case].patient] == fold]
        of_fold = replace(row, name=f"fold-{fold + 1}", title=f"error maps, fold {fold + 1} of {FOLDS}")
        judged += tried(
            workshop,
            of_fold.name,
            lambda of_fold=of_fold, training=training: trained(workshop, of_fold, training),  # type: ignore[misc]
            labels,
            samples,
        )
    draw_indicator(workshop.out / "quality-indicator.png", judged)
    tables = [_table(judged, row), _indicator_table(workshop, judged)]
    if workshop.settings.sites:
        training = [files for files in workshop.cases if fold_of[files.patient] != 0]
        samples = [
            one
            for one in labels.samples
            if fold_of[workshop.cases[one.case].patient] == 0 and one.source == SOURCE
        ]
        tables.append(federated_rows(workshop, row, training, labels, samples))
    write_tables(workshop, tables)


def _references(workshop: Workshop) -> LabelStore:
    """The references themselves, as labels."""
    store = LabelStore(workshop.labels, "reference", {"task": workshop.task.digest})
    for case in workshop.opened(workshop.cases):
        store.add(case, [({}, np.array(case.label))], workshop.task.region_indices())
    return store


def _is(one: Judged, variant: str, output: str) -> bool:
    return (one.recipe.get("variant"), one.recipe.get("output")) == (variant, output)


def _table(judged: Sequence[Judged], row: Row) -> Table:
    lines = []
    for title, belongs in GROUPS:
        group = [one for one in judged if belongs(one)]
        lines.append(
            (
                title,
                len(group),
                _mean([_error_dsc(one) for one in group]),
                *(_mean([one.error[key] for one in group]) for key in ("accuracy", "precision", "recall")),
                _mean([one.true for one in group]),
                _mean([one.accuracy for one in group]),
            )
        )
    return Table(
        title=TITLE,
        columns=("labels", "n", "DSC", "Acc", "Prec", "Recl", "Seg. DSC", "Seg. Acc"),
        rows=tuple(lines),
        notes=(
            "Means over labels of the error map's figures, errors as the positive class. Where nothing is "
            "wrong, as in GT, DSC is 1 if nothing is marked and else 0; recall and, where nothing is marked, "
            "precision are left out of the means.",
            f"{row.qc.rounds} rounds of {row.qc.local_steps} steps of {row.qc.batch_size} in each fold.",
        ),
    )


def _indicator_table(workshop: Workshop, judged: Sequence[Judged]) -> Table:
    """How the quality indicator, and the quality that label and error map imply, agree with the truth."""
    rng = generator(workshop.seed, "bootstrap", "indicator")
    automatic = [one for one in judged if one.source == SOURCE]
    pairs = (
        ("QI and accuracy", "indicator", "accuracy"),
        ("QI and DSC", "indicator", "true"),
        ("implied quality and DSC", "predicted", "true"),
    )
    lines: list[tuple[str | float | int | None, ...]] = []
    for labels, some in (("overall-auto", automatic), ("overall-GT", judged)):
        for title, predicted, true in pairs:
            r, error = _agreement(some, predicted, true, rng)
            # The share of voxels that are right is no DSC, and no error of one.
            lines.append((labels, len(some), title, r, None if title == "QI and DSC" else error))
    return Table(
        title="Zhang & Chung 2019, eq. 4",
        columns=("labels", "n", "pair", "r (95 %)", "MAE (95 %)"),
        rows=tuple(lines),
        notes=(
            "Of the labels that the predictor learned from, one in eleven was a reference of another fold.",
        ),
    )


def _agreement(
    judged: Sequence[Judged], predicted: str, true: str, rng: np.random.Generator
) -> tuple[str, str]:
    """Correlation and mean absolute error of two of the figures, with their intervals."""
    patients = [one.patient for one in judged]
    a, b = (np.array([getattr(one, name) for one in judged], np.float64) for name in (predicted, true))
    r = estimate(lambda chosen: pearson(a[chosen], b[chosen]), patients, rng)
    error = estimate(lambda chosen: mae(a[chosen], b[chosen]), patients, rng)
    return str(r), str(error)


def _error_dsc(one: Judged) -> float | None:
    """DSC of the error map; of an empty truth 1 where nothing is marked, else 0, as in the paper."""
    if one.error["dsc"] is None:
        return float(one.error["marked"] == 0)
    return one.error["dsc"]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None
