"""Table 1 of Robinson et al. (MICCAI 2018): DSC of every class, from labels of a random forest.

The forest segments each case at ten depths, and never a case of a patient that it learned from. Of the test
labels, equally many of each tenth of the DSC of all classes are taken.

Experiment 1 learns from the true DSC. Experiment 2 learns from the estimates of reverse classification
accuracy (RCA), which compares the same labels with 20 of the training cases; whether the other training cases
are labelled rightly does not matter to it. Both are tried against the truth, and so is RCA itself. In the
paper RCA has 100 references and experiment 2 fewer labels than experiment 1; here it has the same.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from fedqc.alone import Job, train_and_fit
from fedqc.cases.layouts import CaseFiles
from fedqc.config import NetworkConfig, QCConfig, RCAConfig, SamplesConfig, SourcesConfig
from fedqc.label_sources.making import FOREST, label_store
from fedqc.methods.base import Known, with_own_settings
from fedqc.methods.rca import RCAMethod
from fedqc.methods.rca_labels import class_task
from fedqc.methods.robinson import WHOLE
from fedqc.metrics.agreement import mae, mae_sd
from fedqc.metrics.overlap import binary_dice
from fedqc.model import StoredModel
from fedqc.seeding import generator
from fedqc_simulations.experiments.base import (
    Judged,
    Row,
    Sample,
    Table,
    TestLabels,
    Workshop,
    evenly,
    make_labels,
    of_region,
    trained,
    tried,
    write_tables,
)
from fedqc_simulations.experiments.figures import draw_balance, draw_scatter
from fedqc_simulations.experiments.measures import estimate, figures_of
from fedqc_simulations.experiments.pooled import federated_rows

NAME = "robinson"
TITLE = "Robinson et al. 2018, Table 1"
QUICK_CASES = 60
TEST_SHARE = 0.2
REFERENCES = 20
"""Training cases whose labels are right, in experiment 2."""
GOOD = 0.7
"""DSC from which a label is good (section 3)."""
NEAR, FAR = 0.05, 0.12
"""Errors under the one are near, those from the other on are outliers (section 3)."""


def model(quick: bool) -> Row:
    """The network of the table."""
    return Row(
        "robinson",
        "ResNet-50",
        QCConfig(
            method="robinson",
            rounds=6 if quick else 30,
            local_steps=25 if quick else 75,
            batch_size=8,
            learning_rate=1e-3,
            schedule="cosine",
            cross_check_rounds=0,
            network=NetworkConfig(width=16 if quick else 32),
            samples=SamplesConfig(seggen=0, annotator=0, untouched=0, forest=1),
            sources=SourcesConfig(folds=2, trees=20 if quick else 50),
            balance="histogram",
        ),
    )


def from_rca(quick: bool) -> Row:
    """The same network, trained on what RCA says."""
    rca = RCAConfig(references=5, calibration=5, voxels=1500) if quick else RCAConfig(voxels=3000)
    qc = model(quick).qc.model_copy(update={"method": "rca-labels", "rca": rca})
    return Row("rca-labels", "ResNet-50 from RCA", qc)


def reproduce(workshop: Workshop) -> None:
    """Train what is missing, try it, and write tables and figures."""
    quick, rounds = workshop.settings.quick, workshop.settings.rounds
    row, second = model(quick).over(rounds), from_rca(quick).over(rounds)
    training, test = workshop.split([1 - TEST_SHARE, TEST_SHARE])
    # One dealing of all patients: a test label comes from a forest that saw no case of its patient.
    make_labels(workshop, workshop.opened(workshop.cases), row.qc)
    store = label_store(workshop.labels, FOREST, workshop.task, row.qc.sources, workshop.seed)
    labels = TestLabels(workshop.opened(test), {FOREST: store})
    dsc = np.array([_whole_dsc(labels, one) for one in labels.samples])
    chosen = evenly(dsc, generator(workshop.seed, "balance"))
    draw_balance(workshop.out / "balance.png", "forest", dsc, dsc[chosen])
    samples = [labels.samples[index] for index in chosen]
    vouched = _vouched(training, workshop.seed)
    models = (
        (row, 1, lambda: trained(workshop, row, training)),
        (second, 2, lambda: trained(workshop, second, training, references=vouched)),
        (replace(second, name="rca", title="RCA itself"), 2, lambda: _rca(workshop, second.qc, vouched)),
    )
    learned = (
        f"{len(training)} training cases; {row.qc.rounds} rounds of {row.qc.local_steps} steps of "
        f"{row.qc.batch_size}.",
        f"{len(training)} training cases, of which {len(vouched)} have labels that are known to be right; "
        f"RCA compares with the {second.qc.rca.references} of these that look most alike.",
    )
    tables = []
    for one, experiment, stored in models:
        judged = _whole(tried(workshop, one.name, stored, labels, samples))
        draw_scatter(workshop.out / f"{one.name}.png", one.title, judged)
        title = f"{TITLE}, experiment {experiment}: {one.title}"
        tables += [
            _errors(workshop, judged, title, learned[experiment - 1]),
            _good_or_not(workshop, judged, title),
        ]
    if workshop.settings.sites:
        tables.append(federated_rows(workshop, row, training, labels, samples, region=WHOLE))
    write_tables(workshop, tables)


def _vouched(training: Sequence[CaseFiles], seed: int) -> tuple[CaseFiles, ...]:
    """The references of experiment 2: a third of the cases where there are few."""
    order = generator(seed, "references").permutation(len(training))
    return tuple(training[index] for index in sorted(order[: min(REFERENCES, max(2, len(training) // 3))]))


def _rca(workshop: Workshop, config: QCConfig, references: Sequence[CaseFiles]) -> StoredModel:
    """RCA of classes and all of them together, calibrated on its references."""
    own = {"method": RCAMethod.name, "network": NetworkConfig()}
    qc, task = with_own_settings(config).model_copy(update=own), class_task(workshop.task)
    method, cases = RCAMethod(task, qc, together=True), workshop.opened(references)
    network, card = train_and_fit(
        Job(task, qc, workshop.seed),
        method,
        cases,
        Known(),
        workshop.out / "models" / RCAMethod.name,
        compute=workshop.compute,
        display=workshop.display,
    )
    return StoredModel(card, method, network, sha256="")


def _whole(judged: Sequence[Judged]) -> list[Judged]:
    """By the DSC of all classes together, as the paper has it."""
    return [of_region(one, WHOLE) for one in judged]


def _whole_dsc(labels: TestLabels, sample: Sample) -> float:
    """DSC of all classes together."""
    spoiled, case = labels.spoiled(sample)
    masks = [torch.from_numpy(np.array(one.label))[None] > 0 for one in (spoiled, case)]
    return float(binary_dice(masks[0], masks[1]))


def _errors(workshop: Workshop, judged: Sequence[Judged], title: str, learned: str) -> Table:
    whole = np.array([one.regions[WHOLE][0] for one in judged])
    lines = []
    for region in judged[0].regions:
        true = np.array([one.regions[region][0] for one in judged])
        predicted = np.array([one.regions[region][1] for one in judged], dtype=np.float64)
        parts = (np.ones(len(whole), dtype=bool), whole < 0.5, whole >= 0.5)
        lines.append((region, *(_spread(predicted[part], true[part]) for part in parts)))
    n_poor = int((whole < 0.5).sum())
    overall = figures_of(judged, generator(workshop.seed, "bootstrap"))
    return Table(
        title=f"{title}: mean absolute error (SD)",
        columns=(
            "class",
            f"all DSC, n = {len(whole)}",
            f"DSC < 0.5, n = {n_poor}",
            f"DSC >= 0.5, n = {len(whole) - n_poor}",
        ),
        rows=tuple(lines),
        notes=(
            f"{len({one.patient for one in judged})} patients; all classes together: r {overall.r}, MAE "
            f"{overall.mae}, intervals over patients.",
            learned,
        ),
    )


def _good_or_not(workshop: Workshop, judged: Sequence[Judged], title: str) -> Table:
    """Good labels as the positive class, as in the paper, at the DSC of all classes together."""
    true = np.array([one.regions[WHOLE][0] for one in judged])
    predicted = np.array([one.predicted for one in judged])
    patients = [one.patient for one in judged]
    rng = generator(workshop.seed, "bootstrap", "good")
    good, said = true >= GOOD, predicted >= GOOD
    difference = np.abs(true - predicted)

    def share(of: NDArray[np.bool_], among: NDArray[np.bool_]) -> str:
        def figure(chosen: NDArray[np.intp]) -> float | None:
            inside = among[chosen]
            return float(of[chosen][inside].mean()) if inside.any() else None

        return str(estimate(figure, patients, rng))

    everyone = np.ones(len(true), dtype=bool)
    return Table(
        title=f"{title}: good or poor at a DSC of {GOOD:g}",
        columns=("figure", "share (95 %)"),
        rows=(
            ("true positive rate", share(said, good)),
            ("false positive rate", share(said, ~good)),
            ("accuracy", share(said == good, everyone)),
            (f"error under {NEAR:g}", share(difference < NEAR, everyone)),
            (f"error of {FAR:g} or more", share(difference >= FAR, everyone)),
        ),
    )


def _spread(predicted: NDArray[np.float64], true: NDArray[np.float64]) -> str:
    error, spread = mae(predicted, true), mae_sd(predicted, true)
    if error is None:
        return "—"
    return f"{error:.3f}" if spread is None else f"{error:.3f} ({spread:.3f})"
