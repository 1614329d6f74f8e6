"""Segmenters trained across the sites make labels there, and QC training draws from them."""

import json
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import pytest
from fedqc_client import tasks
from fedqc_client.guard import Trained
from fedqc_client.policy import refusal
from fedqc_client.site_data import load_site_data

from fedqc.cases.cache import CaseCache
from fedqc.cases.cached import CachedCases
from fedqc.cases.splits import split_references
from fedqc.config import QCConfig, load_federation, load_site
from fedqc.errors import ConfigError
from fedqc.label_sources.folds import folds_of, learned_from, out_of_fold
from fedqc.label_sources.making import label_store, segmenter_source
from fedqc.protocol import ErrorCode, TrainSegmenterRequest
from fedqc.task import load_task
from tests.federation.runs import (
    RecordingGrid,
    events,
    record,
    run,
    statistics,
    weights,
    write_site,
    write_task,
)

PHASES = ("summarise", "train.segmenters", "train.qc")


def write(folder: Path, samples: str, names: Sequence[str] = ("a", "b"), references: int = 6) -> Path:
    """A federation of two sites with a small network, and these shares of samples."""
    task = write_task(folder)
    for name in names:
        write_site(folder, name, task, references=references, good=1, spoiled=0)
    path = folder / "federation.toml"
    path.write_text(
        f'name = "test"\ntask = "{task}"\n[sites]\nexpected = {list(names)}\nminimum = 1\nwait = "1s"\n'
        "[qc]\nrounds = 1\nlocal_steps = 2\nbatch_size = 2\ncross_check_rounds = 0\n"
        "[qc.network]\nwidth = 4\nblocks = [1, 1]\n"
        f"[qc.samples]\nseggen = 0\nannotator = 0\nuntouched = 0\n{samples}\n"
        "[qc.sources]\nrounds = 2\nlocal_steps = 1\nwidth = 4\ntrees = 2\n"
        "[segmentation]\nchannels = [4, 8]\n[privacy]\nmin_count = 1\n"
    )
    return path


def lead(folder: Path, federation: Path, names: Sequence[str] = ("a", "b")) -> RecordingGrid:
    grid = RecordingGrid({name: folder / "sites" / name / "site.toml" for name in names})
    run(grid, federation, folder / "run", only=PHASES)
    return grid


def recipes(folder: Path, site: str, qc: QCConfig, source: str) -> dict[str, list[dict[str, object]]]:
    """The recipes of the labels that a site has of each reference it trains on, by patient."""
    config = load_site(folder / "sites" / site / "site.toml")
    task = load_task(config.task)
    training, held_back = split_references(load_site_data(config, task).references, 0)
    cache = CaseCache(config.compute.cache, task)
    store = label_store(config.compute.cache / "labels", source, task, qc.sources, 0)
    assert not any(store.of(case) for case in CachedCases(cache, held_back))
    return {
        case.patient: [dict(label.recipe) for label in store.of(case)]
        for case in CachedCases(cache, training)
    }


def test_snapshots_of_every_round_are_made_by_networks_that_never_saw_the_patient(tmp_path: Path) -> None:
    federation = write(tmp_path, "snapshots = 1")
    grid = lead(tmp_path, federation)
    qc = load_federation(federation).qc
    for site in ("a", "b"):
        made = recipes(tmp_path, site, qc, "snapshots")
        fold_of = folds_of(made, 0, qc.sources.folds)
        for patient, labels in made.items():
            expected = [("all-modalities", fold_of[patient], number) for number in (1, 2)]
            assert [(one["variant"], one["fold"], one["round"]) for one in labels] == expected
    asked = [message.metadata.message_type for site, message in grid.asked if site == "a"]
    assert asked.count("train.segmenter") == 2 * 2  # folds and rounds
    assert asked.count("train.qc") == 1
    stages = statistics(tmp_path / "run")["train"]
    assert set(stages) == {"snapshots-all-modalities-1", "snapshots-all-modalities-2", "qc"}
    assert not events(tmp_path / "run", "site-failed", "site-excused")


def forget(folder: Path, patient: str) -> None:
    """Take a patient out of the references of site a, and make room for another run."""
    table = folder / "sites" / "a" / "reference.csv"
    table.write_text(table.read_text().replace(f"ref-{patient.removeprefix('P')}\n", ""))
    (folder / "run").rename(folder / "before")


@pytest.mark.parametrize("source", ["snapshots", "forest"])
def test_labels_of_an_earlier_run_are_replaced_where_a_reference_is_gone(tmp_path: Path, source: str) -> None:
    federation = write(tmp_path, f"{source} = 1")
    lead(tmp_path, federation)
    qc = load_federation(federation).qc
    before = recipes(tmp_path, "a", qc, source)
    first = min(before)
    forget(tmp_path, first)
    lead(tmp_path, federation)

    after = recipes(tmp_path, "a", qc, source)
    assert first not in after
    site = load_site(tmp_path / "sites" / "a" / "site.toml")
    task = load_task(site.task)
    references, _ = split_references(load_site_data(site, task).references, 0)
    cases = CachedCases(CaseCache(site.compute.cache, task), references)
    for patient, labels in after.items():
        fold = folds_of(after, 0, qc.sources.folds)[patient]
        training, _ = out_of_fold(cases, fold, 0, qc.sources.folds)
        assert {one["learned_from"] for one in labels} == {learned_from(training)}
        assert len(labels) == len(next(iter(before.values())))


def test_what_leaves_with_a_segmenter_is_an_update_and_nothing_of_the_labels(tmp_path: Path) -> None:
    federation = write(tmp_path, "snapshots = 1")
    grid = lead(tmp_path, federation)
    sent = [reply for _, reply in grid.sent if reply.metadata.message_type == "train.segmenter"]
    assert len(sent) == 2 * 2 * 2
    for reply in sent:
        assert set(reply.content) == {"weights", "training"}
        assert set(reply.content.metric_records["training"]) == {
            "samples",
            "loss.loss",
            "loss.dice",
            "loss.cross_entropy",
        }


def test_behind_a_segmenters_losses_are_the_patients_outside_its_fold(tmp_path: Path) -> None:
    """Two of the four patients that it may learn from, for each fold: too few for three."""
    federation = write(tmp_path, "snapshots = 1")
    site = load_site(tmp_path / "sites" / "a" / "site.toml")
    config = load_federation(federation)
    task = load_task(config.task)
    source = segmenter_source("snapshots", task, config.qc.sources)
    data = load_site_data(site, task)
    training, _ = split_references(data.references, 0)
    fold_of = folds_of((files.patient for files in training), 0, config.qc.sources.folds)
    variant = source.variants[0]
    for fold in (0, 1):
        request = TrainSegmenterRequest(
            federation="test",
            task=task.digest,
            seed=0,
            min_count=1,
            qc=config.qc,
            weights={k: v.numpy() for k, v in source.build(variant, 0).state_dict().items()},
            round=1,
            rounds=2,
            source="snapshots",
            variant=variant,
            fold=fold,
        )
        trained = tasks.train_segmenter(site, request)
        assert isinstance(trained, Trained)
        outside = sum(number != fold for number in fold_of.values())
        assert 1 < outside < len(fold_of)
        assert {figure.patients for figure in trained.losses.values()} == {min(outside, trained.samples)}


def test_side_outputs_are_ten_labels_of_each_case(tmp_path: Path) -> None:
    federation = write(tmp_path, "side_outputs = 1")
    lead(tmp_path, federation)
    made = recipes(tmp_path, "b", load_federation(federation).qc, "side-outputs")
    outputs = {"final", "side-2", "side-3", "side-4", "side-5"}
    for labels in made.values():
        assert {(label["variant"], label["output"]) for label in labels} == {
            (variant, output) for variant in ("3d", "2d") for output in outputs
        }
        assert len(labels) == 10
        assert {label["round"] for label in labels} == {2}


def test_a_forest_is_grown_at_the_site_alone(tmp_path: Path) -> None:
    federation = write(tmp_path, "forest = 1")
    grid = lead(tmp_path, federation)
    made = recipes(tmp_path, "a", load_federation(federation).qc, "forest")
    assert all(len(labels) == 10 for labels in made.values())
    assert "train.segmenter" not in grid.kinds("a")
    assert "train.segmenters" not in record(tmp_path / "run")["done"]
    assert weights(tmp_path / "run")


def test_a_site_of_one_patient_has_no_stored_labels_and_costs_the_others_nothing(tmp_path: Path) -> None:
    federation = write(tmp_path, "snapshots = 0.5")
    federation.write_text(federation.read_text().replace("untouched = 0\n", "untouched = 0.5\n"))
    task = tmp_path / "ball.toml"
    write_site(tmp_path, "c", task, references=1, good=1, spoiled=0)
    federation.write_text(federation.read_text().replace("['a', 'b']", "['a', 'b', 'c']"))
    lead(tmp_path, federation, ("a", "b", "c"))
    excused = events(tmp_path / "run", "site-excused")
    assert {(event["site"], event["reason"]) for event in excused} == {("c", ErrorCode.NO_REFERENCE.value)}
    (round_,) = statistics(tmp_path / "run")["train"]["qc"]
    assert set(round_["sites"]) == {"a", "b", "c"}  # it trains on untouched labels
    activity = json.loads((tmp_path / "sites" / "c" / "results" / "activity.json").read_text())
    assert activity["notes"] == ["no labels of snapshots here; trains without them"]


@pytest.mark.parametrize("source", ["snapshots", "forest"])
def test_a_site_of_one_patient_has_none_of_an_earlier_run_either(tmp_path: Path, source: str) -> None:
    """Their segmenters learned from somebody who is no reference any more."""
    federation = write(tmp_path, f"{source} = 0.5", references=3)
    federation.write_text(federation.read_text().replace("untouched = 0\n", "untouched = 0.5\n"))
    lead(tmp_path, federation)
    made = recipes(tmp_path, "a", load_federation(federation).qc, source)
    assert len(made) == 2
    assert all(made.values())
    forget(tmp_path, min(made))
    lead(tmp_path, federation)
    activity = json.loads((tmp_path / "sites" / "a" / "results" / "activity.json").read_text())
    assert activity["notes"] == [f"no labels of {source} here; trains without them"]


def test_a_network_that_the_source_does_not_have_is_refused(tmp_path: Path) -> None:
    federation = write(tmp_path, "snapshots = 1")
    qc = load_federation(federation).qc
    task = load_task(str(tmp_path / "ball.toml"))
    source = segmenter_source("snapshots", task, qc.sources)
    network = source.build("all-modalities", 0)
    request = TrainSegmenterRequest(
        federation="test",
        task=task.digest,
        seed=0,
        min_count=1,
        qc=qc,
        weights={name: tensor.numpy() for name, tensor in network.state_dict().items()},
        round=1,
        rounds=2,
        source="snapshots",
        variant="another",
        fold=0,
    )
    with pytest.raises(ConfigError, match="has no network 'another'"):
        refusal(load_site(tmp_path / "sites" / "a" / "site.toml"), request, datetime(2026, 1, 1))
