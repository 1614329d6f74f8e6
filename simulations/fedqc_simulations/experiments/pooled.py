"""Training across sites beside training on the pooled data, on the same labels."""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import tomli_w

from fedqc.cases.layouts import CaseFiles
from fedqc.cases.splits import split_references
from fedqc.config import FederationConfig, PrivacyConfig, SegmentationConfig, SitesConfig
from fedqc.model import StoredModel, load_model
from fedqc.seeding import generator
from fedqc_simulations.consortium import site_files, write_federation, write_site
from fedqc_simulations.engine import run_local
from fedqc_simulations.experiments.base import (
    Row,
    Sample,
    Table,
    TestLabels,
    Workshop,
    of_region,
    trained,
    tried,
)
from fedqc_simulations.experiments.measures import figures_of
from fedqc_simulations.simulate import site_names

PHASES = ("summarise", "train.segmenters", "train.qc")


def federated_rows(
    workshop: Workshop,
    row: Row,
    training: Sequence[CaseFiles],
    labels: TestLabels,
    samples: Sequence[Sample],
    *,
    region: str | None = None,
) -> Table:
    """One model trained on pooled data and one across sites, both on the cases that sites train on.

    Args:
        workshop: where it is made.
        row: the model.
        training: cases to be dealt to the sites; each holds a quarter back, as in any federation.
        labels: of the test cases.
        samples: those of them that the models are tried on.
        region: whose DSC is told; None: the mean over the task's.
    """
    names = site_names(workshop.settings.sites)
    patients = sorted({files.patient for files in training})
    order = generator(workshop.seed, "sites").permutation(len(patients))
    home = {patients[index]: names[place % len(names)] for place, index in enumerate(order)}
    shares = {name: [files for files in training if home[files.patient] == name] for name in names}
    used = [files for share in shares.values() for files in split_references(share, workshop.seed)[0]]
    out = workshop.out / f"federated-{row.name}"
    pooled = replace(row, name=f"{row.name}-pooled", title=f"{row.title}, pooled data")
    lines: list[tuple[Any, ...]] = []
    models = (
        (pooled.name, pooled.title, lambda: trained(workshop, pooled, used)),
        (
            f"{row.name}-federated",
            f"{row.title}, {len(names)} sites",
            lambda: _federated(workshop, row, shares),
        ),
    )
    for name, title, model in models:
        judged = tried(workshop, name, model, labels, samples)
        if region is not None:
            judged = [of_region(one, region) for one in judged]
        figures = figures_of(judged, generator(workshop.seed, "bootstrap", name))
        lines.append((title, *figures.cells()))
    rounds = json.loads((out / "run" / "run.json").read_text(encoding="utf-8"))["rounds"]
    sent, received = (
        sum(one[key] for stage in rounds.values() for one in stage)
        for key in ("bytes_sent", "bytes_received")
    )
    return Table(
        title=f"{row.title}: trained across {len(names)} sites, and on pooled data",
        columns=("training", "r (95 %)", "MAE ± SD", "MAE (95 %)", "DSC_err (95 %)"),
        rows=tuple(lines),
        notes=(
            f"{len(used)} training cases. Each site takes as many steps as the pooled training: "
            f"{row.qc.rounds} rounds of {row.qc.local_steps}.",
            f"To the sites went {sent / 1e6:.1f} MB, from them {received / 1e6:.1f} MB: segmenters and QC.",
        ),
    )


def _federated(workshop: Workshop, row: Row, shares: dict[str, list[CaseFiles]]) -> StoredModel:
    """The model that the sites train together; goes on where it was cut off."""
    out = workshop.out / f"federated-{row.name}"
    run = out / "run"
    if not (out / "federation.toml").is_file():
        out.mkdir(parents=True, exist_ok=True)
        task = workshop.task.model_dump(mode="json", exclude_none=True)
        (out / "task.toml").write_text(tomli_w.dumps(task), encoding="utf-8")
        for name, cases in shares.items():
            write_site(
                out / "sites" / name,
                name,
                references=cases,
                candidates=(),
                task=workshop.task,
                min_count=1,
                compute=workshop.settings.compute,
            )
        config = FederationConfig(
            name=row.name,
            task="task.toml",
            sites=SitesConfig(expected=tuple(shares), minimum=len(shares)),
            qc=row.qc,
            segmentation=SegmentationConfig(),
            privacy=PrivacyConfig(min_count=1),
        )
        write_federation(out, config)
    if not (run / "models" / "qc").is_dir():
        run_local(
            out / "federation.toml",
            site_files(out, list(shares)),
            run,
            seed=workshop.seed,
            resume=run.exists(),
            phases=PHASES,
            listener=workshop.display.listen,
        )
    return load_model(run / "models" / "qc", workshop.task)
