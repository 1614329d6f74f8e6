"""Whole runs: the real ServerApp, the real ClientApp, and everything that can go wrong between them."""

import csv
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import nibabel
import numpy as np
import pytest
from fedqc_client import tasks
from fedqc_client.guard import Outcome
from fedqc_server.app import app as server_app
from fedqc_simulations.engine import LocalGrid, run_local
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict

from fedqc.config import QCConfig, SiteConfig, load_site
from fedqc.curation.diagnosis import Kind
from fedqc.curation.manifest import kept, read_manifest
from fedqc.errors import ConfigError, FedQCError, QuorumError
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.model import load_model
from fedqc.protocol import STATISTICS, Request, content_digest
from fedqc.reports.build import build_coordinator_report
from fedqc.task import load_task
from tests.federation.runs import (
    USUAL_PHASES,
    RecordingGrid,
    Sites,
    events,
    model_bytes,
    record,
    run,
    statistics,
    weights,
)

pytestmark = pytest.mark.usefixtures("tiny_method", "no_report")
QC_ONLY = ("summarise", "train.qc")


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Sites:
    return {name: make_site(name) for name in ("b", "a", "c")}


def voxels(path: Path) -> np.ndarray:
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj)


def test_a_whole_run(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc_server.phases.build_coordinator_report", build_coordinator_report)
    heard: list[dict[str, Any]] = []
    out = tmp_path / "run"
    run_local(make_federation(sites), sites, out, seed=0, listener=heard.append)

    written = record(out)
    assert written["outcome"] == "completed"
    assert written["sites"] == {"joined": ["a", "b", "c"], "left_out": {}}
    assert list(written["seconds"]) == ["handshake", *USUAL_PHASES]
    assert written["done"] == ["handshake", *USUAL_PHASES]
    assert written["seed"] == 0
    assert written["config"]["qc"]["method"] == "tiny"
    assert set(written["versions"]) == {"fedqc", "flwr", "torch", "numpy", "python"}
    assert heard == [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    progress = [
        (e["round"], e["rounds"], e["site"], e["loss"])
        for e in heard
        if e["event"] == "update-received" and e["stage"] == "qc"
    ]
    assert progress == [(r, 2, site, 0.5) for r in (1, 2) for site in "abc"]
    finished = [(e["stage"], e["round"], e["rounds"]) for e in heard if e["event"] == "round-finished"]
    assert finished == [("qc", 1, 2), ("qc", 2, 2), ("segmentation", 1, 1)]
    assert {name: (made["rounds"], made["samples"]) for name, made in record(out)["models"].items()} == {
        "qc": (2, 24),
        "segmentation": (1, 6),
    }
    assert heard[-1]["event"] == "run-finished"
    assert "<html" in (out / "report.html").read_text()

    told = statistics(out)
    site = told["sites"]["a"]
    assert site["summarise"]["cases"] == 8
    assert site["summarise"]["references"] == 4
    labels = (sites["a"].parent / "data").glob("*-label.nii.gz")
    seen = [voxels(path).sum() / 1000 for path in labels]  # voxels of 1 mm
    assert site["summarise"]["volume_ml.ball.mean"] == float(f"{np.mean(seen):.3g}")
    assert site["summarise"]["volume_ml.ball.sd"] == float(f"{np.std(seen, ddof=1):.3g}")
    assert site["calibrate"]["mae"] < 0.01
    assert site["score"]["candidates"] == 4
    assert site["score"]["decisions.keep"] == 3
    assert site["score"]["decisions.drop"] == 1
    assert site["evaluate.segmentation"]["cases"] == 4
    assert [(entry["round"], entry["loss"]) for entry in told["train"]["qc"]] == [(1, 0.5), (2, 0.5)]
    assert [set(entry["sites"]) for entry in told["train"]["qc"]] == [{"a", "b", "c"}] * 2
    assert [set(entry["sites"]) for entry in told["train"]["segmentation"]] == [{"a", "b", "c"}]
    assert told["train"]["qc"][0]["sites"]["a"] == {"samples": 4, "losses": {"loss": 0.5, "quality": 0.25}}
    assert "out" not in told
    assert told["failed"] == {p: {} for p in ("summarise", "calibrate", "score", "evaluate.segmentation")}
    assert told["pooled"]["score"]["candidates"] == {"sum": 12, "sites": 3}
    assert told["pooled"]["score"]["decisions.drop"] == {"sum": 3, "sites": 3}
    assert told["pooled"]["summarise"]["references"] == {"sum": 12, "sites": 3}
    asked = [(e["phase"], e["sites"]) for e in heard if e["event"] == "sites-asked"]
    assert asked == [
        (p, 3) for p in ("handshake", "summarise", "calibrate", "score", "evaluate.segmentation")
    ]


def test_what_a_site_keeps_for_itself(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    (sites["a"].parent / "data" / "good-4.nii.gz").write_bytes(b"damaged")
    with (sites["a"].parent / "reference.csv").open("a") as file:
        file.write("stranger\n")
    out = tmp_path / "run"
    run(LocalGrid(sites), make_federation(sites), out)
    site = load_site(sites["a"])
    manifest = read_manifest(site.results / "manifest.json")
    assert [entry.id for entry in kept(manifest)] == ["good-5", "good-6"]
    assert [entry.id for entry in manifest.entries] == ["bad-7", "good-5", "good-6"]
    assert "below the threshold 0.75" in manifest.entries[0].reason
    assert set(manifest.entries[0].files) == {"t1", "label"}
    assert manifest.entries[0].files["t1"].path == "bad-7.nii.gz"
    assert [(item.case, item.code) for item in manifest.left_out] == [
        ("stranger", "unknown-reference"),
        ("good-4", "not-nifti"),
    ]
    assert manifest.model.sha256 == record(out)["models"]["qc"]["sha256"]
    for stage in ("qc", "segmentation"):
        mine, global_ = weights(site.results, stage), weights(out, stage)
        assert mine.keys() == global_.keys()
        assert all(np.array_equal(mine[name], values) for name, values in global_.items())
    card = json.loads((site.results / "models" / "qc" / "card.json").read_text())
    assert (card["rounds"], card["samples"], card["sites"]) == (2, 24, ["a", "b", "c"])

    with (site.results / "scores.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["id"], row["decision"]) for row in rows] == [
        ("bad-7", "drop"),
        ("good-5", "keep"),
        ("good-6", "keep"),
    ]
    error: Any = nibabel.load(site.results / "error_maps" / "bad-7.nii.gz")
    label: Any = nibabel.load(site.data.path / "bad-7-label.nii.gz")
    np.testing.assert_allclose(error.affine, label.affine)
    assert error.get_data_dtype() == np.uint8
    wrong = (voxels(site.data.path / "bad-7.nii.gz") > 50) != (np.asarray(label.dataobj) > 0)
    seen = np.zeros_like(wrong)
    seen[2:18, 2:18, 2:18] = True  # the network sees the middle 16 voxels
    np.testing.assert_array_equal(np.asarray(error.dataobj) > 50, wrong & seen)
    assert sorted(p.name for p in (site.results / "error_maps").iterdir()) == [
        "bad-7.nii.gz",
        "good-5.nii.gz",
        "good-6.nii.gz",
    ]


def test_scoring_writes_the_sheet_and_does_not_need_it(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    for name in "ab":
        sites[name].write_text(sites[name].read_text().replace("sheet = false", "sheet = true"))
    results = {name: load_site(sites[name]).results for name in sites}
    (results["b"] / "review.html").mkdir(parents=True)  # it cannot be written
    out = tmp_path / "run"
    run(LocalGrid(sites), make_federation(sites), out, only=("train.qc", "score"))
    assert statistics(out)["failed"]["score"] == {}
    page = (results["a"] / "review.html").read_text()
    assert "1. bad-7" in page
    assert page.count("data:image/png") == 3
    assert "bad-7" in {entry.id for entry in read_manifest(results["b"] / "manifest.json").entries}
    assert not (results["c"] / "review.html").exists()
    sites["a"].write_text(sites["a"].read_text().replace("sheet = true", "sheet = false"))
    run(LocalGrid(sites), make_federation(sites), tmp_path / "again", only=("train.qc", "score"))
    assert not (results["a"] / "review.html").exists()  # it shows what was decided before


def test_a_second_run_leaves_nothing_of_the_first(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites)
    only = ("train.qc", "score")
    run(LocalGrid(sites), federation, tmp_path / "one", only=only)
    results = load_site(sites["a"]).results
    (results / "error_maps" / "gone.nii.gz").write_bytes(b"of a case that is no more")
    n_lines = len((results / "ledger.jsonl").read_text().splitlines())
    run(LocalGrid(sites), federation, tmp_path / "two", only=only)
    assert not (results / "error_maps" / "gone.nii.gz").exists()
    assert len((results / "ledger.jsonl").read_text().splitlines()) == 2 * n_lines
    with pytest.raises(ConfigError, match="already holds a run"):
        run(LocalGrid(sites), federation, tmp_path / "one")


# All that may leave a site in a run of this task, key by key. Written out here, not taken from the code.
ALLOWED: dict[str, dict[str, Any]] = {
    "query.handshake": {"handshake": {"site": str, "protocol": int, "fedqc": str, "task": str}},
    "query.summarise": {
        "statistics": {
            "cases": int,
            "patients": int,
            "references": int,
            "volume_ml.ball.mean": float,
            "volume_ml.ball.sd": float,
            "spacing_mm.x": float,
            "spacing_mm.y": float,
            "spacing_mm.z": float,
            "shape.x": float,
            "shape.y": float,
            "shape.z": float,
            "intensity.t1": float,
            "left_out.not-nifti": int,
        }
    },
    "train.qc": {
        "weights": {
            "0.weight": ("float32", (2, 3)),
            "0.bias": ("float32", (2,)),
            "1.weight": ("float32", (2,)),
            "1.bias": ("float32", (2,)),
            "1.running_mean": ("float32", (2,)),
            "1.running_var": ("float32", (2,)),
            "1.num_batches_tracked": ("int64", ()),
        },
        "training": {"samples": int, "loss.loss": float, "loss.quality": float},
    },
    "query.cross_check": {"statistics": {"references": int, "quality_mean": float, "quality_sd": float}},
    "query.calibrate": {
        "statistics": {
            "samples": int,
            "r": float,
            "mae": float,
            "rmse": float,
            "auroc": float,
            "bias": float,
            "difference_sd": float,
            "profile.labels": [int],
            "profile.predicted": [float],
            "profile.true": [float],
            "profile.sd": [float],
            "failures": [int],
            "others": [int],
            "regions_mae.ball": float,
            "regions_r.ball": float,
        }
    },
    "query.score": {
        "statistics": {
            "candidates": int,
            "curated": int,
            "gatherings": int,
            **{f"not_kept.{size}": int for size in ("small", "medium", "large", "empty")},
            "quality": [int],
            "quality_mean": float,
            "quality_sd": float,
            "decisions.keep": int,
            "decisions.drop": int,
            "decisions.review": int,
            **{f"diagnosis.{kind}": int for kind in Kind},
            "regions_mean.ball": float,
        }
    },
    "train.segmentation": {
        "weights": {
            f"model.{part}": ("float32", shape)
            for part, shape in {
                "0.conv.unit0.conv.weight": (4, 1, 3, 3, 3),
                "0.conv.unit0.conv.bias": (4,),
                "0.conv.unit0.adn.A.weight": (1,),
                "0.residual.weight": (4, 1, 3, 3, 3),
                "0.residual.bias": (4,),
                "1.submodule.conv.unit0.conv.weight": (8, 4, 3, 3, 3),
                "1.submodule.conv.unit0.conv.bias": (8,),
                "1.submodule.conv.unit0.adn.A.weight": (1,),
                "1.submodule.residual.weight": (8, 4, 1, 1, 1),
                "1.submodule.residual.bias": (8,),
                "2.0.conv.weight": (12, 2, 3, 3, 3),
                "2.0.conv.bias": (2,),
                "2.0.adn.A.weight": (1,),
                "2.1.conv.unit0.conv.weight": (2, 2, 3, 3, 3),
                "2.1.conv.unit0.conv.bias": (2,),
            }.items()
        },
        "training": {"samples": int, "loss.loss": float, "loss.dice": float, "loss.cross_entropy": float},
    },
    "evaluate.segmentation": {
        "statistics": {"cases": int, "dice_mean": float, "dice_sd": float, "dice.ball": float}
    },
}


def assert_allowed(message: Message) -> None:
    kind = message.metadata.message_type
    assert not message.has_error()
    if set(message.content) == {"error"}:
        assert list(message.content["error"]) == ["code"]
        assert re.fullmatch("[a-z]+-[a-z]+(-[a-z]+)?", str(message.content["error"]["code"]))
        return
    assert set(message.content) == set(ALLOWED[kind])
    for name, found in message.content.items():
        allowed = ALLOWED[kind][name]
        assert set(found) <= set(allowed), (kind, name, list(found))
        if isinstance(found, ArrayRecord):
            assert list(found) == list(allowed)
        for key, value in found.items():
            if isinstance(value, Array):
                assert (value.dtype, tuple(value.shape)) == allowed[key]
                assert value.numpy().dtype == value.dtype
                assert value.numpy().shape == tuple(value.shape)
            elif isinstance(value, list):
                assert {type(item) for item in value} == set(allowed[key])
                bins = 5 if key.startswith("profile.") else 10 if key == "quality" else 100
                assert len(value) == bins
            else:
                assert type(value) is allowed[key]


def test_a_site_sends_nothing_but_the_documented_records(
    sites: Sites, make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites |= {"d": make_site("d")}
    # One site of which much must stay: patients with names, a broken file, a phase that fails.
    (sites["b"].parent / "data" / "good-5.nii.gz").write_bytes(b"broken")
    table = sites["b"].parent / "data" / "cases.csv"
    table.write_text(table.read_text().replace("P1", "Maria Muster"))
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites), tmp_path / "run")
    # Handshake, summarise, one round for the cross-check and the check, two rounds of QC, calibrate, score,
    # one round of segmentation and its evaluation.
    assert len(grid.sent) == 4 * (1 + 1 + 1 + 1 + 2 + 1 + 1 + 1 + 1)
    assert {message.metadata.message_type for _, message in grid.sent} == set(ALLOWED)
    for _, message in grid.sent:
        assert_allowed(message)
    text = "".join(
        str({name: dict(record) for name, record in message.content.items() if name != "weights"})
        for _, message in grid.sent
    )
    for secret in ("Maria", "good-5", "ref-", "P0", str(tmp_path), "nii"):
        assert secret not in text


@pytest.mark.parametrize(
    "failing",
    [
        "summarise",
        "train",
        "cross_check",
        "calibrate",
        "score",
        "train_segmentation",
        "evaluate_segmentation",
    ],
)
def test_a_failing_site_sends_a_word_and_the_run_goes_on(
    failing: str,
    make_site: Callable[..., Path],
    make_federation: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sites = {name: make_site(name) for name in ("abcd" if failing == "cross_check" else "abc")}
    path = load_site(sites["b"]).data.path / "Maria_Muster.nii.gz"
    work = getattr(tasks, failing)

    def fail(site: SiteConfig, request: Request) -> Outcome:
        if site.name == "b":
            raise OSError(5, "Input/output error", str(path))
        outcome: Outcome = work(site, request)
        return outcome

    monkeypatch.setattr(tasks, failing, fail)
    grid = RecordingGrid(sites)
    out = tmp_path / "run"
    run(grid, make_federation(sites, rounds=1), out)
    for _, message in grid.sent:
        assert_allowed(message)
    failed = events(out, "site-failed")
    assert {(e["site"], e["reason"]) for e in failed} == {("b", "internal-error")}
    assert all("site.log" in e["meaning"] for e in failed)
    everything = "".join(p.read_text() for p in out.glob("*.json*"))
    assert "Maria" not in everything
    assert "Maria_Muster" in (load_site(sites["b"]).results / "site.log").read_text()
    assert record(out)["outcome"] == "completed"
    assert record(out)["sites"]["joined"] == sorted(sites)


def test_the_ledger_lists_exactly_what_was_sent(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites), tmp_path / "run")
    for site, path in sites.items():
        sent = [message for name, message in grid.sent if name == site]
        lines = (load_site(path).results / "ledger.jsonl").read_text().splitlines()
        ledger = [json.loads(line) for line in lines]
        assert [(e["kind"], e["bytes"], e["sha256"]) for e in ledger] == [
            (message.metadata.message_type, *content_digest(message.content)) for message in sent
        ]
        assert [{name: list(told) for name, told in e["content"].items()} for e in ledger] == [
            {name: list(record) for name, record in message.content.items()} for message in sent
        ]
        numbers = [message.content[STATISTICS] for message in sent if STATISTICS in message.content]
        assert [e["content"][STATISTICS] for e in ledger if STATISTICS in e["content"]] == list(
            map(dict, numbers)
        )
        assert [e["round"] for e in ledger] == [0, 0, 1, 2, 0, 0, 1, 0]
        assert {e["to"] for e in ledger} == {"test"}


class ShuffledGrid(LocalGrid):
    """Sites that all work at once and answer in a random order, some only after being asked several times."""

    def __init__(self, sites: Mapping[str, Path], seed: int) -> None:
        super().__init__(sites)
        self._random = random.Random(seed)  # noqa: S311 - no secret
        self._done: dict[str, tuple[int, Message]] = {}
        self.order: list[int] = []

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        ids = list(super().push_messages(messages))
        for message_id in self._random.sample(ids, len(ids)):
            (reply,) = super().pull_messages([message_id])
            self.order.append(reply.metadata.src_node_id)
            self._done[message_id] = (self._random.randint(0, 2), reply)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ready = []
        for message_id in message_ids:
            if message_id in self._done:
                wait, reply = self._done.pop(message_id)
                if wait:
                    self._done[message_id] = (wait - 1, reply)
                else:
                    ready.append(reply)
        return ready


def test_the_order_of_arrival_does_not_change_the_result(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites)
    run(LocalGrid(sites), federation, tmp_path / "straight")
    grid = ShuffledGrid(sites, seed=1)
    run(grid, federation, tmp_path / "shuffled")
    assert grid.order != sorted(grid.order)
    models = model_bytes(tmp_path / "straight")
    assert list(models) == ["qc", "segmentation"]
    assert models == model_bytes(tmp_path / "shuffled")
    assert (tmp_path / "straight" / "statistics.json").read_bytes() == (
        tmp_path / "shuffled" / "statistics.json"
    ).read_bytes()


def test_the_seed_decides(sites: Sites, make_federation: Callable[..., Path], tmp_path: Path) -> None:
    federation = make_federation(sites)
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        run(LocalGrid(sites), federation, tmp_path / name, seed=seed, only=QC_ONLY)
    one, again, other = (weights(tmp_path / name) for name in ("one", "again", "other"))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["0.weight"], other["0.weight"])


def test_the_model_is_the_mean_of_the_updates(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites, rounds=1), tmp_path / "run", only=QC_ONLY)
    updates = [
        m.content.array_records["weights"] for _, m in grid.sent if m.metadata.message_type == "train.qc"
    ]
    expected = np.mean([np.asarray(u["0.weight"].numpy(), np.float64) for u in updates], axis=0)
    np.testing.assert_allclose(weights(tmp_path / "run")["0.weight"], expected, rtol=1e-6)


def test_a_reply_that_breaks_its_reader_costs_that_site(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    class Breaking(LocalGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            replies = list(super().pull_messages(message_ids))
            if replies[0].metadata.src_node_id == 2 and replies[0].metadata.message_type == "query.score":
                raise ValueError("Maria")
            return replies

    out = tmp_path / "run"
    run(Breaking(sites), make_federation(sites), out)
    assert [(e["site"], e["reason"]) for e in events(out, "site-failed")] == [
        ("a", "unreadable-reply-ValueError")
    ]
    assert statistics(out)["failed"]["score"] == {"a": "unreadable-reply-ValueError"}
    assert "Maria" not in "".join(p.read_text() for p in out.glob("*.json*"))


def test_errors_of_flower_are_codes(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    def go_away(site: str, reply: Message) -> Message | None:
        if site == "a" and reply.metadata.message_type == "train.qc":
            reply = Message(Error(5 if reply.metadata.group_id == "1" else 8, "/data/Maria"), reply_to=reply)
            reply.metadata.__dict__["_reply_to_message_id"] = self_id[0]
            return reply
        return None

    self_id: list[str] = [""]

    class Grid(RecordingGrid):
        def _work(self, message: Message) -> Message:
            self_id[0] = message.metadata.message_id
            return super()._work(message)

    out = tmp_path / "run"
    run(Grid(sites, go_away), make_federation(sites), out)
    assert [e["reason"] for e in events(out, "site-failed")] == ["unavailable", "flower-error-8"]
    assert "Maria" not in "".join(p.read_text() for p in out.glob("*.json*"))


def test_no_wait_is_unbounded(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, fake_time: Any
) -> None:
    # They shake hands and never answer again.
    grid = RecordingGrid(sites, silent=lambda _, message: message.metadata.message_type != "query.handshake")
    with pytest.raises(QuorumError, match=r"summarise: 0 sites answered, .* \(a: late, b: late, c: late\)"):
        run(grid, make_federation(sites, deadline="60s"), tmp_path / "run", clock=fake_time.clock)
    # One deadline for all of them, not one after another.
    assert 50 < fake_time.now < 60  # the messages expire then, and replies with them


def test_sites_that_do_not_fit_are_left_out_by_name(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path, task_file: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(task_file.read_text().replace("size = [16", "size = [8"))
    sites = {"a": make_site("a"), "b": make_site("b", task=other), "c": make_site("c")}
    sites |= {"d": sites["c"], "stranger": make_site("stranger")}
    out = tmp_path / "run"
    run(LocalGrid(sites), make_federation(["a", "b", "d", "absent"], rounds=1), out, only=("summarise",))
    assert record(out)["sites"] == {
        "joined": ["a"],
        "left_out": {"b": "task-differs", "d": "name-differs-from-key", "absent": "offline"},
    }
    assert not (sites["stranger"].parent / "results").exists()


def test_nodes_without_a_name_say_it_themselves(
    sites: Sites, make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    class Unnamed(LocalGrid):
        def get_nodes(self) -> Any:
            for info in super().get_nodes():
                info.ClearField("name")
                yield info

    many = sites | {"copy-of-c": sites["c"], "stranger": make_site("stranger")}
    out = tmp_path / "run"
    run(Unnamed(many), make_federation(sites, rounds=1), out, only=("summarise",))
    found = record(out)["sites"]
    assert found["joined"] == ["a", "b"]
    assert sorted(found["left_out"].values()) == ["name-claimed-twice", "not-expected"]


def test_a_site_without_references_is_scored_and_not_asked_to_train_again(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {"a": make_site("a"), "b": make_site("b", references=0)}
    grid = RecordingGrid(sites)
    out = tmp_path / "run"
    run(grid, make_federation(sites, minimum=1, rounds=3), out)
    assert grid.kinds("b").count("train.qc") == 1
    assert statistics(out)["sites"]["b"]["score"]["candidates"] == 4
    excused = events(out, "site-excused")
    assert [(e["site"], e["phase"], e["reason"]) for e in excused] == [
        ("b", phase, "no-reference") for phase in ("train.qc", "calibrate", "evaluate.segmentation")
    ]
    assert events(out, "site-failed", "site-out") == []


def test_a_run_starts_from_a_stored_model(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    run(LocalGrid(sites), make_federation(sites, rounds=1), tmp_path / "one", only=QC_ONLY)
    federation = make_federation(sites, rounds=1)
    initial = tmp_path / "one" / "models" / "qc"
    federation.write_text(federation.read_text().replace("[qc]\n", f'[qc]\ninitial = "{initial}"\n'))
    grid = RecordingGrid(sites)
    run(grid, federation, tmp_path / "two")
    first = next(m for _, m in grid.asked if m.metadata.message_type == "train.qc")
    np.testing.assert_array_equal(
        first.content.array_records["weights"]["0.weight"].numpy(), weights(tmp_path / "one")["0.weight"]
    )
    # The path of the coordinator stays with the coordinator.
    assert str(tmp_path) not in "".join(str(m.content["request"]["body"]) for _, m in grid.asked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (('method = "tiny"', 'method = "tinny"'), "'tinny' is unknown"),
        (("ball.toml", "bowl.toml"), "no such file"),
        (("[qc]\n", '[qc]\ninitial = "nowhere"\n'), "not a model"),
    ],
)
def test_a_wrong_configuration_writes_nothing(
    change: tuple[str, str],
    message: str,
    sites: Sites,
    make_federation: Callable[..., Path],
    tmp_path: Path,
) -> None:
    federation = make_federation(sites)
    federation.write_text(federation.read_text().replace(*change))
    with pytest.raises(FedQCError, match=message):
        run_local(federation, sites, tmp_path / "run", seed=0)
    assert not (tmp_path / "run").exists()


def test_a_method_that_never_looks_at_the_label_is_refused(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedqc.methods.base.get_method", lambda name: Mock(judges="prediction"))
    with pytest.raises(ConfigError, match="never looks at the annotation"):
        run(LocalGrid(sites), make_federation(sites), tmp_path / "run")


def test_the_server_app_says_what_it_lacks() -> None:
    context = Context(1, 1, {}, RecordDict(), {"federation": "x"})
    with pytest.raises(ConfigError, match="lacks out, seed"):
        server_app(LocalGrid({}), context)


def test_with_the_real_method(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # the installed plug-ins again
    grid = RecordingGrid({"a": sites["a"], "b": sites["b"]})
    out = tmp_path / "run"
    only = ("summarise", "train.qc", "score")
    run(grid, make_federation(["a", "b"], rounds=1, method="qcresunet"), out, only=only)
    expected = QCResUNetMethod(load_task(str(tmp_path / "ball.toml")), QCConfig()).build(0).state_dict()
    for _, message in grid.sent:
        if message.metadata.message_type == "train.qc":
            sent = message.content.array_records["weights"]
            assert list(sent) == list(expected)
            assert [tuple(sent[name].shape) for name in sent] == [tuple(t.shape) for t in expected.values()]
            assert {array.dtype for array in sent.values()} == {"float32"}
            told = set(message.content["training"])
            labels = {key for key in told if key.startswith("labels.")}  # as far as patients are behind them
            losses = told - labels - {"samples"}
            assert losses == {"loss.loss", "loss.quality", "loss.dice", "loss.cross_entropy"}
    assert not np.array_equal(next(iter(weights(out).values())), next(iter(expected.values())).numpy())
    assert load_model(out / "models" / "qc").card.samples == 8
    manifest = read_manifest(load_site(sites["a"]).results / "manifest.json")
    assert [set(entry.regions) for entry in manifest.entries] == [{"ball"}] * 4


def test_an_interrupted_run_says_so(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tasks, "load_site_data", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(LocalGrid(sites), make_federation(sites), tmp_path / "run")
    found = record(tmp_path / "run")
    assert (found["outcome"], found["reason"]) == ("interrupted", "KeyboardInterrupt")


def test_phases_that_are_not_wanted_are_left_out(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation, out = make_federation(sites, rounds=1), tmp_path / "run"
    run(LocalGrid(sites), federation, out, only=("summarise", "train.qc"))
    assert record(out)["done"] == ["handshake", "summarise", "train.qc"]
    run(LocalGrid(sites), federation, out, resume=True)
    assert record(out)["done"] == ["handshake", "summarise", "train.qc", "cross-check", *USUAL_PHASES[3:]]
    with pytest.raises(ConfigError, match="no phase is called training; phases are summarise"):
        run(LocalGrid(sites), federation, tmp_path / "other", only=("training",))
    assert not (tmp_path / "other").exists()


def test_a_model_that_was_not_trained_to_the_end_scores_nothing(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation, out = make_federation(sites, minimum=2), tmp_path / "run"
    message = r"no qc model was trained in this run; run train.qc too"
    with pytest.raises(ConfigError, match=message):
        run(LocalGrid(sites), federation, out, only=("score",))

    def lie(site: str, reply: Message) -> None:
        if reply.metadata.message_type == "train.qc" and reply.metadata.group_id == "2":
            reply.content["more"] = MetricRecord({"n": 1})

    with pytest.raises(QuorumError):
        run(RecordingGrid(sites, lie), federation, out, resume=True, only=("train.qc",))
    with pytest.raises(ConfigError, match=message):  # one round of two was
        run(LocalGrid(sites), federation, out, resume=True, only=("score",))
