"""Table 1 of QCResUNet (Qiu et al., MICCAI 2023): its network beside others, on labels of two kinds.

In-sample labels: those of the project's segmenter after every round of its training, once for each modality
and once for all of them (`snapshots`), and three SegGen deformations of each reference. Out-of-sample: labels
of a VoxResNet, an architecture that no label in training came from, all five outputs after every round. The
segmenters behind the test labels were trained on the training patients, as the paper's were; those behind
the training labels on the other fold of them. Of the test labels, equally many of each tenth of DSC are
taken.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from fedqc.cases.layouts import CaseFiles
from fedqc.config import NetworkConfig, QCConfig, SamplesConfig, SourcesConfig
from fedqc.degradation.samples import LabelFactory
from fedqc.degradation.seggen import SegGen
from fedqc.geometry import sides_of
from fedqc.label_sources.making import label_store
from fedqc.label_sources.segmenters import SegmenterSource
from fedqc.label_sources.side_outputs import SideOutputSource
from fedqc.label_sources.snapshots import SnapshotSource
from fedqc.label_sources.store import LabelStore
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
    n_parameters,
    trained,
    tried,
    write_tables,
)
from fedqc_simulations.experiments.figures import draw_balance, draw_scatter
from fedqc_simulations.experiments.measures import figures_of, p_value, paired
from fedqc_simulations.experiments.pooled import federated_rows

NAME = "qcresunet"
TITLE = "Qiu et al. 2023, Table 1"
QUICK_CASES = 60
TEST_SHARE = 0.3
SEGGEN_A_CASE = 3
OURS = "qcresunet"
"""The row that the others are compared with."""


def rows(quick: bool) -> tuple[Row, ...]:
    """The models of the table, each with the same number of samples."""
    common = QCConfig(
        rounds=6 if quick else 24,
        local_steps=25 if quick else 75,
        batch_size=4,
        cross_check_rounds=0,
        samples=SamplesConfig(annotator=0, untouched=0, seggen=0.5, snapshots=0.5),
        sources=sources(quick),
    )
    small = 16 if quick else 32
    published = {"learning_rate": 1e-3, "network": NetworkConfig(width=small)}
    # A U-Net works at full resolution; of the same width it takes ten times as long as a ResNet.
    unet = published | {"network": NetworkConfig(width=small // 4)}
    form = NetworkConfig(architecture="published", width=small, attention=True)
    return (
        Row("unet", "UNet", common.model_copy(update={"method": "unet"} | unet)),
        Row("resnet34", "ResNet-34", common.model_copy(update={"method": "resnet34"} | published)),
        Row("resnet50", "ResNet-50", common.model_copy(update={"method": "resnet50"} | published)),
        Row(
            "qcresunet-published",
            "QCResUNet, published network",
            common.model_copy(update=published | {"network": form}),
        ),
        Row(
            OURS,
            "QCResUNet, corrective network",
            common.model_copy(update={"network": NetworkConfig(width=16)}),
        ),
    )


def sources(quick: bool) -> SourcesConfig:
    """How the segmenters are trained, for training labels and test labels alike."""
    return SourcesConfig(
        folds=2, rounds=5 if quick else 10, local_steps=15 if quick else 25, width=8 if quick else 16
    )


def reproduce(workshop: Workshop) -> None:
    """Train what is missing, try it, and write table and figures."""
    training, test = workshop.split([1 - TEST_SHARE, TEST_SHARE])
    settings = sources(workshop.settings.quick)
    labels, groups = test_labels(workshop, settings, training, test)
    models = [row.over(workshop.settings.rounds) for row in rows(workshop.settings.quick)]
    make_labels(workshop, workshop.opened(training), models[0].qc)
    tables = [*_tables(workshop, models, training, labels, groups), _label_table(labels, groups)]
    if workshop.settings.sites:
        model = next(row for row in models if row.name == OURS)
        tables.append(federated_rows(workshop, model, training, labels, groups["in-sample"]))
    write_tables(workshop, tables)


def test_labels(
    workshop: Workshop, settings: SourcesConfig, training: Sequence[CaseFiles], test: Sequence[CaseFiles]
) -> tuple[TestLabels, dict[str, list[Sample]]]:
    """The labels that all rows are tried on, and which of them are in-sample and which are not."""
    cases = workshop.opened(test)
    snapshots, side = SnapshotSource(workshop.task, settings), _EveryRound(workshop.task, settings)
    stores = {
        "snapshots": _segmented(workshop, snapshots, training, test),
        "voxresnet": _segmented(workshop, side, training, test),
        "seggen": deformed(workshop, test, SEGGEN_A_CASE),
    }
    labels = TestLabels(cases, stores)
    inside = [one for one in labels.samples if one.source != "voxresnet"]
    outside = [one for one in labels.samples if one.source == "voxresnet"]
    groups = {}
    for name, samples in (("in-sample", inside), ("out-of-sample", outside)):
        dsc = np.array([one.known.mean for one in samples])
        chosen = evenly(dsc, generator(workshop.seed, "balance", name))
        groups[name] = [samples[index] for index in chosen]
        draw_balance(workshop.out / f"balance-{name}.png", name, dsc, dsc[chosen])
    return labels, groups


class _EveryRound(SideOutputSource):
    """All outputs of the 3D VoxResNet after every round: labels from poor to good of another architecture."""

    @property
    def variants(self) -> tuple[str, ...]:
        """The 3D network alone."""
        return ("3d",)

    def is_kept(self, round_number: int, rounds: int) -> bool:
        """Every round."""
        return True


def _segmented(
    workshop: Workshop, source: SegmenterSource, training: Sequence[CaseFiles], test: Sequence[CaseFiles]
) -> LabelStore:
    """Labels of the test cases by segmenters that learned from all training cases."""
    config = source.config
    folder = workshop.out / "cache" / "test-labels"
    store = label_store(folder, source.name, workshop.task, config, workshop.seed)
    learned, unseen = workshop.opened(training), workshop.opened(test)
    regions = workshop.task.region_indices()
    for variant in source.variants:
        if all(
            {(variant, number) for number in range(1, config.rounds + 1)}
            <= {(known.recipe["variant"], known.recipe["round"]) for known in store.of(case)}
            for case in unseen
        ):
            continue
        network = source.build(variant, workshop.seed)
        for number in range(1, config.rounds + 1):
            plan = source.plan(workshop.seed, f"test-{variant}", number)
            source.train_round(variant, network, learned, plan, workshop.compute)
            for case in unseen:
                made = source.segment(variant, network, case, workshop.compute)
                recipe = {"variant": variant, "round": number}
                store.add(case, [({**recipe, **more}, label) for more, label in made], regions)
            workshop.display.progress(f"making test labels: {source.name} {variant}", number, config.rounds)
    return store


def deformed(workshop: Workshop, test: Sequence[CaseFiles], a_case: int) -> LabelStore:
    """SegGen labels of test cases, so many of each."""
    settings = {"task": workshop.task.digest, "seed": workshop.seed, "a case": a_case}
    store = LabelStore(workshop.out / "cache" / "test-labels", SegGen.kind, settings)
    regions = workshop.task.region_indices()
    for case in workshop.opened(test):
        factory = LabelFactory([case.label], regions, [SegGen.kind], sides=sides_of(case.spacing))
        rng = generator(workshop.seed, "test", SegGen.kind, case.id)
        recipes = [factory.draw(rng, 0, SegGen.kind) for _ in range(a_case)]
        drawn = [recipe for recipe in recipes if recipe is not None]
        made = factory.make(drawn)
        labels = [
            (dict(recipe.params), label.numpy()) for recipe, label in zip(drawn, made.label, strict=True)
        ]
        store.add(case, labels, regions)
    return store


def _label_table(labels: TestLabels, groups: Mapping[str, Sequence[Sample]]) -> Table:
    """Which labels the networks are tried on, of each segmenter: those that were made, and those taken."""
    taken = Counter(_maker(one) for samples in groups.values() for one in samples)
    made: dict[tuple[str, str], list[float]] = {}
    for one in labels.samples:
        made.setdefault(_maker(one), []).append(one.known.mean)
    lines: list[tuple[str | float | int | None, ...]] = [
        (*maker, len(dsc), *(float(np.quantile(dsc, share)) for share in (0.05, 0.5, 0.95)), taken[maker])
        for maker, dsc in made.items()
    ]
    return Table(
        title="The labels that they are tried on",
        columns=("source", "network", "made", "DSC, 5 %", "DSC, 50 %", "DSC, 95 %", "taken"),
        rows=tuple(lines),
        notes=("Taken: equally many of each tenth of DSC, in-sample and out-of-sample.",),
    )


def _maker(sample: Sample) -> tuple[str, str]:
    """The source of a label, and which of its networks made it: of snapshots one for each modality."""
    return sample.source, str(sample.known.recipe.get("variant", "-"))


def _tables(
    workshop: Workshop,
    models: Sequence[Row],
    training: Sequence[CaseFiles],
    labels: TestLabels,
    groups: Mapping[str, Sequence[Sample]],
) -> Sequence[Table]:
    everyone: dict[str, dict[str, list[Judged]]] = {}
    for row in models:
        for group, samples in groups.items():
            judged = tried(
                workshop,
                f"{row.name}-{group}",
                lambda row=row: trained(workshop, row, training),  # type: ignore[misc]  # mypy: no defaults
                labels,
                samples,
            )
            everyone.setdefault(group, {})[row.name] = judged
    found = []
    for group, judged_by in everyone.items():
        lines = []
        for row in models:
            judged = judged_by[row.name]
            figures = figures_of(judged, generator(workshop.seed, "bootstrap", row.name, group))
            tests = paired(judged, judged_by[OURS]) if row.name != OURS else None
            lines.append(
                (
                    row.title,
                    row.qc.network.width,
                    f"{n_parameters(workshop.task, row):,}",
                    *figures.cells(),
                    *((None, None) if tests is None else map(p_value, (tests.predictions, tests.errors))),
                )
            )
            draw_scatter(workshop.out / f"{row.name}-{group}.png", f"{row.title}, {group}", judged)
        count = f"{len(groups[group])} labels of {len({one.patient for one in judged_by[OURS]})} patients"
        found.append(
            Table(
                title=f"{TITLE}: {group} ({count})",
                columns=(
                    "network",
                    "width",
                    "parameters",
                    "r (95 %)",
                    "MAE ± SD",
                    "MAE (95 %)",
                    "DSC_err (95 %)",
                    "p, predictions",
                    "p, errors",
                ),
                rows=tuple(lines),
                notes=(
                    f"{len(training)} training cases of other patients; {models[0].qc.rounds} rounds "
                    f"of {models[0].qc.local_steps} steps of {models[0].qc.batch_size} for each network.",
                    "p: paired t-tests with the corrective network, of the predicted DSC as in the paper and "
                    "of the patients' mean absolute errors. Intervals resample patients.",
                ),
            )
        )
    return found
