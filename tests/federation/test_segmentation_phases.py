"""Segmentation at the sites: what it is trained on, who takes part, and what comes of it."""

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fedqc_client import tasks
from fedqc_client.guard import Told, Trained
from fedqc_client.site_data import forget_roles, load_site_data
from fedqc_simulations.engine import LocalGrid

from fedqc.cases.splits import split_references
from fedqc.cases.volumes import Case, write_volume
from fedqc.compute import Compute
from fedqc.config import SegmentationConfig, load_site
from fedqc.curation.manifest import kept, overrule, read_manifest
from fedqc.errors import DataError, ModelError
from fedqc.methods.base import RoundPlan, RoundResult
from fedqc.model import load_segmentation
from fedqc.protocol import ErrorCode, ErrorReply, Provenance, TrainingTerms, TrainSegmentationRequest
from fedqc.protocol import EvaluateSegmentationRequest as EvaluateRequest
from fedqc.segmentation import Segmentation
from fedqc.statistics.site import SegmentationSummary
from fedqc.task import load_task
from tests.federation.runs import RecordingGrid, Sites, events, record, run, statistics, weights

pytestmark = pytest.mark.usefixtures("tiny_method", "no_report")
CONFIG = SegmentationConfig(rounds=1, local_steps=1, batch_size=2, channels=(4, 8))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The cases that each site trained segmentation on."""
    trained_on: dict[str, list[str]] = {}
    real = Segmentation.train_round

    def spy(
        self: Segmentation,
        network: torch.nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        compute: Compute,
        *how: Any,
        **weights: Any,
    ) -> RoundResult:
        trained_on[plan.site] = [case.id for case in cases]
        return real(self, network, cases, plan, compute, *how, **weights)

    monkeypatch.setattr(Segmentation, "train_round", spy)
    return trained_on


@pytest.fixture
def site(make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path) -> Path:
    """A site that has scored its cases."""
    path = make_site("a")
    only = ("train.qc", "score")
    run(LocalGrid({"a": path}), make_federation(["a"], rounds=1), tmp_path / "scored", only=only)
    return path


def request(site: Path, **changes: Any) -> TrainSegmentationRequest:
    task = load_task(load_site(site).task)
    config = CONFIG.model_copy(update=changes)
    return TrainSegmentationRequest(
        federation="test",
        task=task.digest,
        seed=0,
        min_count=1,
        round=1,
        rounds=1,
        segmentation=config,
        weights=_weights(Segmentation(task, config).build(3)),
    )


def _weights(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: tensor.numpy().copy() for name, tensor in network.state_dict().items()}


def train(site: Path, **changes: Any) -> Trained | ErrorReply:
    return tasks.train_segmentation(load_site(site), request(site, **changes))


# ---------------------------------------------------------------------------------------- what it learns from


def test_a_gpu_that_is_too_small_gets_smaller_batches(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes back is what a round with batches of that size comes to, from the weights that were sent."""
    real, sizes = Segmentation.train_round, list[int]()

    def full(
        self: Segmentation,
        network: torch.nn.Module,
        cases: Sequence[Case],
        plan: RoundPlan,
        *where: Any,
        **how: Any,
    ) -> RoundResult:
        sizes.append(plan.batch_size)
        done = real(self, network, cases, plan, *where, **how)
        if plan.batch_size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")  # behind a step that changed the weights
        return done

    monkeypatch.setattr(Segmentation, "train_round", full)
    small, fitted = train(site, batch_size=2), train(site, batch_size=4)
    assert isinstance(fitted, Trained)
    assert isinstance(small, Trained)
    assert sizes == [2, 4, 2]
    assert fitted.samples == small.samples == 2
    for name, values in small.weights.items():
        np.testing.assert_array_equal(fitted.weights[name], values)
    (note,) = json.loads((load_site(site).results / "activity.json").read_text())["notes"]
    assert "batches of 2" in note


def test_segmentation_is_trained_on_kept_cases_only(site: Path, seen: dict[str, list[str]]) -> None:
    trained = train(site)
    assert isinstance(trained, Trained)
    assert seen == {"a": ["good-4", "good-5", "good-6"]}
    manifest = read_manifest(load_site(site).results / "manifest.json")
    assert set(seen["a"]) == {entry.id for entry in kept(manifest)}
    assert trained.samples == 2
    assert list(trained.weights) == list(request(site).weights)
    assert any(not np.array_equal(trained.weights[n], v) for n, v in request(site).weights.items())
    # Two samples were drawn, so two of the three patients stand behind the losses at most.
    assert {name: figure.patients for name, figure in trained.losses.items()} == {
        "loss": 2,
        "dice": 2,
        "cross_entropy": 2,
    }


def test_behind_a_loss_are_those_drawn_and_whoever_has_most_cases_is_hardly_more_than_one(site: Path) -> None:
    def behind(**changes: Any) -> set[int]:
        trained = train(site, **changes)
        assert isinstance(trained, Trained)
        return {figure.patients for figure in trained.losses.values()}

    assert behind(local_steps=1, batch_size=1) == {1}
    assert behind(local_steps=2, batch_size=2) == {3}  # four samples of three cases
    table = load_site(site).data.path / "cases.csv"
    table.write_text(table.read_text().replace("P5", "P4"))  # two of the three cases, as 9 / 5 equal ones
    assert behind(local_steps=2, batch_size=2) == {1}


def test_what_a_person_decided_counts(site: Path, seen: dict[str, list[str]]) -> None:
    """And the manifest is what is read, not the scores."""
    results, task = load_site(site).results, load_task(load_site(site).task)
    for case, decision in (("bad-7", "keep"), ("good-5", "drop")):
        overrule(results, task, case, decision, by="Dr. Doe", reason="")
    manifest = json.loads((results / "manifest.json").read_text())
    manifest["entries"][1]["decision"] = "review"
    (results / "manifest.json").write_text(json.dumps(manifest))
    train(site)
    assert seen == {"a": ["bad-7", "good-6"]}


def test_what_is_verified_during_a_run_counts_from_the_next_one_on(
    site: Path, seen: dict[str, list[str]]
) -> None:
    loaded = load_site(site)
    reference = loaded.data.reference
    assert reference is not None
    train(site)
    with reference.open("a") as file:
        file.write("good-4\n")
    train(site, round=2)
    assert seen == {"a": ["good-4", "good-5", "good-6"]}  # in both rounds, and the site did not fail
    forget_roles(loaded)
    with pytest.raises(DataError, match="kept cases changed or vanished since they were scored: good-4"):
        train(site)


def test_references_for_training_take_part_where_the_federation_wants_it(
    site: Path, seen: dict[str, list[str]]
) -> None:
    train(site, references=True)
    loaded = load_site(site)
    data = load_site_data(loaded, load_task(loaded.task))
    training, held_back = split_references(data.references, 0)
    assert (len(training), len(held_back)) == (3, 1)
    assert set(seen["a"]) == {"good-4", "good-5", "good-6", *(case.id for case in training)}
    assert len(seen["a"]) == 6


def test_a_file_behind_a_link_is_known_by_its_place_in_the_folder(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    """As in an archive of DataLad or git-annex."""
    path = make_site("a")
    folder, archive = load_site(path).data.path, tmp_path / "archive"
    archive.mkdir()
    for name in ("good-4.nii.gz", "good-5-label.nii.gz"):
        (folder / name).rename(archive / name)
        (folder / name).symlink_to(archive / name)
    run(
        LocalGrid({"a": path}),
        make_federation(["a"], rounds=1),
        tmp_path / "scored",
        only=("train.qc", "score"),
    )
    manifest = read_manifest(load_site(path).results / "manifest.json")
    files = {entry.id: {role: file.path for role, file in entry.files.items()} for entry in manifest.entries}
    assert files["good-4"]["t1"] == "good-4.nii.gz"
    assert files["good-5"]["label"] == "good-5-label.nii.gz"
    assert isinstance(train(path), Trained)


def test_whoever_missed_the_scoring_does_not_train_on_decisions_of_an_earlier_run(
    site: Path, make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites, out = {"a": site, "b": make_site("b")}, tmp_path / "second"
    away = RecordingGrid(
        sites, silent=lambda name, message: (name, message.metadata.message_type) == ("a", "query.score")
    )
    federation = make_federation(sites, minimum=1, rounds=1, cross_check_rounds=0)
    run(away, federation, out, only=("summarise", "train.qc", "score", "train.segmentation"))
    assert "score" not in statistics(out)["sites"]["a"]
    assert [set(entry["sites"]) for entry in statistics(out)["train"]["segmentation"]] == [{"b"}]


@pytest.mark.parametrize("references", [False, True])
def test_nobody_is_learned_from_on_whom_the_model_is_tried(
    references: bool, site: Path, seen: dict[str, list[str]]
) -> None:
    """A follow-up scan among the candidates is left out, where the baseline is a reference to be tried on."""
    loaded = load_site(site)
    table = loaded.data.path / "cases.csv"
    data = load_site_data(loaded, load_task(loaded.task))
    _, held_back = split_references(data.references, 0)
    rows = list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))
    for row in rows:
        if row["id"] == "good-5":
            row["patient"] = held_back[0].patient
    with table.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    train(site, references=references)
    candidates = {name for name in seen["a"] if not name.startswith("ref")}
    assert candidates == {"good-4", "good-6"}
    assert held_back[0].id not in seen["a"]


@pytest.mark.parametrize("change", ["image", "label", "gone"])
def test_a_kept_case_that_changed_since_it_was_scored_is_refused(
    change: str, site: Path, seen: dict[str, list[str]]
) -> None:
    folder = load_site(site).data.path
    match change:
        case "image":
            write_volume(folder / "good-5.nii.gz", np.ones((20, 20, 20), np.float32), np.eye(4))
        case "label":
            label = np.zeros((20, 20, 20), np.uint8)
            label[8:12, 8:12, 8:12] = 1
            write_volume(folder / "good-5-label.nii.gz", label, np.diag([-1.0, 1, 1, 1]))
        case "gone":
            (folder / "good-5.nii.gz").unlink()
    message = (
        r"manifest.json: kept cases changed or vanished since they were scored: good-5; score the site's"
    )
    with pytest.raises(DataError, match=message):
        train(site)
    assert seen == {}


def test_a_dropped_case_may_change(site: Path, seen: dict[str, list[str]]) -> None:
    (load_site(site).data.path / "bad-7.nii.gz").write_bytes(b"broken")
    train(site)
    assert seen == {"a": ["good-4", "good-5", "good-6"]}


@pytest.mark.parametrize(("key", "value"), [("site", "b"), ("task", "other")])
def test_the_manifest_of_another_site_or_task_is_refused(
    site: Path, key: str, value: str, seen: dict[str, list[str]]
) -> None:
    path = load_site(site).results / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(DataError, match=f"is of site .*'{value}'"):
        train(site)
    assert seen == {}


def test_without_a_manifest_there_is_nothing_to_go_by(
    make_site: Callable[..., Path], seen: dict[str, list[str]]
) -> None:
    site = make_site("a")
    with pytest.raises(DataError, match="there is no such file; score the site's cases first"):
        train(site)
    assert seen == {}


def test_weights_that_are_not_this_network_s_are_refused(site: Path) -> None:
    other = request(site).model_copy(update={"segmentation": CONFIG.model_copy(update={"channels": (4, 16)})})
    with pytest.raises(ModelError, match="the coordinator's request"):
        tasks.train_segmentation(load_site(site), other)
    broken = request(site)
    next(iter(broken.weights.values())).flat[0] = np.nan
    with pytest.raises(ModelError, match="are not finite"):
        tasks.train_segmentation(load_site(site), broken)


# -------------------------------------------------------------------------------------------- who takes part


def test_who_kept_nothing_or_takes_no_part_is_excused(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {
        "a": make_site("a"),
        "b": make_site("b"),
        "bad": make_site("bad", good=0, spoiled=3),
        "shy": make_site("shy", segmentation=False),
    }
    grid, out = RecordingGrid(sites), tmp_path / "run"
    federation = make_federation(sites, segmentation_rounds=2, minimum=2, cross_check_rounds=0)
    run(grid, federation, out)
    excused = events(out, "site-excused")
    assert [(e["site"], e["reason"], e["phase"], e["round"]) for e in excused] == [
        ("bad", "nothing-kept", "train.segmentation", 1),
        ("shy", "takes-no-part", "train.segmentation", 1),
    ]
    assert excused[0]["meaning"] == ErrorCode.NOTHING_KEPT.sentence
    assert events(out, "site-failed", "site-out") == []
    assert "out" not in statistics(out)
    for name in ("bad", "shy"):
        assert grid.kinds(name).count("train.segmentation") == 1  # and not in the second round
        # Both models are theirs too, and they try them.
        ours, theirs = (weights(f, "segmentation") for f in (out, load_site(sites[name]).results))
        assert all(np.array_equal(theirs[tensor], values) for tensor, values in ours.items())
        assert statistics(out)["sites"][name]["evaluate.segmentation"]["cases"] == 4
    assert [set(entry["sites"]) for entry in statistics(out)["train"]["segmentation"]] == [{"a", "b"}] * 2
    assert record(out)["models"]["segmentation"]["samples"] == 2 * 2 * 2


def test_where_hardly_anyone_kept_anything_segmentation_is_skipped(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {"a": make_site("a"), "b": make_site("b", good=0, spoiled=3)}
    grid, out = RecordingGrid(sites), tmp_path / "run"
    run(grid, make_federation(sites, minimum=2), out)
    assert record(out)["outcome"] == "completed"
    assert list(record(out)["models"]) == ["qc"]
    assert [e["phase"] for e in events(out, "phase-skipped")] == [
        "cross-check",
        "train.segmentation",
        "evaluate.segmentation",
    ]
    reason = events(out, "phase-skipped")[1]["reason"]
    assert reason.startswith("segmentation: 1 sites have something to train on, at least 2 are needed")
    assert "b" in reason
    assert "evaluate.segmentation" not in grid.kinds("a")
    assert not (load_site(sites["a"]).results / "models" / "segmentation").exists()


def test_a_refusal_is_a_word_to_the_coordinator(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {"a": make_site("a"), "b": make_site("b")}
    federation, out = make_federation(sites), tmp_path / "run"
    run(LocalGrid(sites), federation, out, only=("summarise", "train.qc", "score"))
    (load_site(sites["b"]).data.path / "good-5.nii.gz").unlink()
    run(LocalGrid(sites), federation, out, resume=True)
    assert [(e["site"], e["reason"], e["phase"]) for e in events(out, "site-failed")] == [
        ("b", "data-error", "train.segmentation")
    ]
    assert "good-5" in (load_site(sites["b"]).results / "site.log").read_text()
    assert "good-5" not in "".join(path.read_text() for path in out.glob("*.json*"))


# ------------------------------------------------------------------------------------------ what comes of it


def dice_by_hand(folder: Path, site: Path, cases: Sequence[str]) -> np.ndarray:
    """DSC of the model in `folder` on cases of a site, with as little of fedqc as can be."""
    task = load_task(load_site(site).task)
    network = load_segmentation(folder, task).network.eval()
    data = load_site_data(load_site(site), task)
    found = []
    for files in data.references:
        if files.id in cases:
            case = data.cache.get(files)
            with torch.inference_mode():
                logits = network(torch.from_numpy(np.array(case.image))[None])[0].numpy()
            ours, truth = logits[1] > logits[0], np.asarray(case.label) == 1
            found.append(2 * (ours & truth).sum() / (ours.sum() + truth.sum()))
    return np.array(found)


def three_digits(value: float) -> float:
    return float(f"{value:.3g}")


@pytest.mark.parametrize("references", [False, True])
def test_the_model_reaches_every_site_and_is_tried_on_what_it_never_saw(
    references: bool, make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites: Sites = {name: make_site(name, references=8) for name in "ab"}
    out = tmp_path / "run"
    federation = make_federation(sites, references=references, segmentation_rounds=2)
    federation.write_text(federation.read_text().replace("local_steps = 1", "local_steps = 3"))
    run(LocalGrid(sites), federation, out)
    model = (out / "models" / "segmentation" / "weights.safetensors").read_bytes()
    for name, path in sites.items():
        results, task = load_site(path).results, load_task(load_site(path).task)
        folder = results / "models" / "segmentation"
        assert (folder / "weights.safetensors").read_bytes() == model
        card = load_segmentation(folder, task).card
        assert (card.stage, card.rounds, card.samples, card.sites) == (
            "segmentation",
            2,
            2 * 2 * 3 * 2,
            ("a", "b"),
        )
        assert card == load_segmentation(out / "models" / "segmentation").card
        usable = load_site_data(load_site(path), task).references
        tried = split_references(usable, 0)[1] if references else usable
        assert len(tried) == (2 if references else 8)
        expected = dice_by_hand(folder, path, [case.id for case in tried])
        told = statistics(out)["sites"][name]["evaluate.segmentation"]
        assert told == {
            "cases": len(tried),
            "dice_mean": three_digits(expected.mean()),
            "dice_sd": three_digits(expected.std(ddof=1)),
            "dice.ball": three_digits(expected.mean()),
        }
        assert 0 < told["dice_mean"] < 1


def test_a_site_without_references_keeps_the_model_and_says_so(site: Path) -> None:
    (load_site(site).data.path.parent / "reference.csv").write_text("id\n")
    loaded, asked = load_site(site), request(site)
    forget_roles(loaded)
    evaluate = EvaluateRequest(
        **asked.model_dump(exclude={"round", *TrainingTerms.model_fields}),
        weights=asked.weights,
        provenance=Provenance(rounds=1, samples=2, sites=("a",)),
    )
    assert tasks.evaluate_segmentation(loaded, evaluate) == ErrorReply(ErrorCode.NO_REFERENCE)
    stored = load_segmentation(loaded.results / "models" / "segmentation")
    assert all(np.array_equal(t.numpy(), asked.weights[n]) for n, t in stored.network.state_dict().items())


def test_patients_stand_behind_the_evaluation(site: Path) -> None:
    """Two cases of one patient are one patient."""
    table = load_site(site).data.path / "cases.csv"
    table.write_text(table.read_text().replace(",P1\n", ",P0\n").replace(",P1\r\n", ",P0\r\n"))
    asked = request(site)
    evaluate = EvaluateRequest(
        **asked.model_dump(exclude={"round", *TrainingTerms.model_fields}),
        weights=asked.weights,
        provenance=Provenance(rounds=1, samples=2, sites=("a",)),
    )
    told = tasks.evaluate_segmentation(load_site(site), evaluate)
    assert isinstance(told, Told)
    summary = told.summary
    assert isinstance(summary, SegmentationSummary)
    assert (summary.cases.value, summary.cases.patients) == (4, 3)
    assert summary.dice["ball"].patients == 3
