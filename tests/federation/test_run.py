"""Whole runs: the real ServerApp, the real ClientApp, and everything that can go wrong between them."""

import csv
import json
import random
import re
import time
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
from fedqc_server.phases import run_federation
from fedqc_server.roster import Clock
from fedqc_server.run_folder import RunFolder
from fedqc_simulations.engine import LocalGrid, run_local
from flwr.app import Array, ArrayRecord, Context, Error, Message, MetricRecord, RecordDict
from safetensors.numpy import load_file

from fedqc.config import QCConfig, SiteConfig, load_federation, load_site
from fedqc.curation.manifest import kept, read_manifest
from fedqc.errors import ConfigError, FedQCError, QuorumError
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.model import load_model
from fedqc.protocol import Request, TrainRequest, content_digest
from fedqc.task import load_task

pytestmark = pytest.mark.usefixtures("tiny_method")
Sites = dict[str, Path]


class RecordingGrid(LocalGrid):
    """Keeps what the sites sent; `change` may change it on the way."""

    def __init__(
        self, sites: Mapping[str, Path], change: Callable[[str, Message], Message | None] | None = None
    ) -> None:
        super().__init__(sites)
        self.sent: list[tuple[str, Message]] = []
        self._change = change or (lambda site, reply: reply)

    def _work(self, message: Message) -> Message:
        reply = super()._work(message)
        site = self._names[message.metadata.dst_node_id]
        self.sent.append((site, reply))
        return self._change(site, reply) or reply


@pytest.fixture
def sites(make_site: Callable[..., Path]) -> Sites:
    return {name: make_site(name) for name in ("b", "a", "c")}


def run(grid: LocalGrid, federation: Path, out: Path, *, seed: int = 0, clock: Clock | None = None) -> None:
    quick = clock or Clock(poll=0.01)
    run_federation(grid, load_federation(federation), RunFolder(out), seed=seed, clock=quick)


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def voxels(path: Path) -> np.ndarray:
    image: Any = nibabel.load(path)
    return np.asarray(image.dataobj)


def weights(out: Path) -> dict[str, np.ndarray]:
    return load_file(out / "models" / "qc" / "weights.safetensors")


def test_a_whole_run(sites: Sites, make_federation: Callable[..., Path], tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    out = tmp_path / "run"
    run_local(make_federation(sites), sites, out, seed=0, listener=heard.append)

    record = json.loads((out / "run.json").read_text())
    assert record["outcome"] == "completed"
    assert record["sites"] == {"joined": ["a", "b", "c"], "left_out": {}}
    assert list(record["seconds"]) == ["handshake", "summarise", "train", "calibrate", "score", "report"]
    assert record["seed"] == 0
    assert record["config"]["qc"]["method"] == "tiny"
    assert set(record["versions"]) == {"fedqc", "flwr", "torch", "numpy", "python"}
    assert heard == [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    progress = [
        (e["round"], e["rounds"], e["site"], e["loss"]) for e in heard if e["event"] == "update-accepted"
    ]
    assert progress == [(r, 2, site, 0.5) for r in (1, 2) for site in "abc"]

    statistics = json.loads((out / "statistics.json").read_text())
    site = statistics["sites"]["a"]
    assert site["summarise"]["cases"] == 8
    assert site["summarise"]["references"] == 4
    labels = (sites["a"].parent / "data").glob("*-label.nii.gz")
    # Voxels of 1 mm; the network sees the middle 16 of 20.
    seen = [voxels(path)[2:18, 2:18, 2:18].sum() / 1000 for path in labels]
    assert site["summarise"]["volume_ml.ball.mean"] == float(f"{np.mean(seen):.3g}")
    assert site["summarise"]["volume_ml.ball.sd"] == float(f"{np.std(seen, ddof=1):.3g}")
    assert site["calibrate"]["mae"] < 0.01
    assert site["score"]["candidates"] == 4
    assert site["score"]["decisions.keep"] == 3
    assert site["score"]["decisions.drop"] == 1
    assert [len(entry["sites"]) for entry in statistics["train"]] == [3, 3]
    assert statistics["pooled"]["score"]["candidates"] == {"sum": 12, "sites": 3}
    assert statistics["pooled"]["score"]["decisions.drop"] == {"sum": 3, "sites": 3}
    assert statistics["pooled"]["summarise"]["references"] == {"sum": 12, "sites": 3}
    asked = [(e["phase"], e["sites"]) for e in heard if e["event"] == "sites-asked"]
    assert asked == [(p, 3) for p in ("handshake", "summarise", "train", "train", "calibrate", "score")]


def test_what_a_site_keeps_for_itself(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    (sites["a"].parent / "data" / "good-4.nii.gz").write_bytes(b"damaged")
    out = tmp_path / "run"
    run(LocalGrid(sites), make_federation(sites), out)
    site = load_site(sites["a"])
    manifest = read_manifest(site.results / "manifest.json")
    assert kept(manifest) == ("good-5", "good-6")
    assert [entry.id for entry in manifest.entries] == ["bad-7", "good-5", "good-6"]
    assert "below the threshold 0.75" in manifest.entries[0].reason
    assert set(manifest.entries[0].files) == {"t1", "label"}
    assert manifest.entries[0].files["t1"].path == "bad-7.nii.gz"
    assert [(item.case, item.code) for item in manifest.left_out] == [("good-4", "unreadable")]
    assert manifest.model.sha256 == json.loads((out / "run.json").read_text())["model"]["sha256"]
    mine, global_ = (
        load_file(folder / "weights.safetensors")
        for folder in (site.results / "model", out / "models" / "qc")
    )
    assert all(np.array_equal(mine[name], values) for name, values in global_.items())
    card = json.loads((site.results / "model" / "card.json").read_text())
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


def test_a_second_run_leaves_nothing_of_the_first(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    federation = make_federation(sites)
    run(LocalGrid(sites), federation, tmp_path / "one")
    results = load_site(sites["a"]).results
    (results / "error_maps" / "gone.nii.gz").write_bytes(b"of a case that is no more")
    n_lines = len((results / "ledger.jsonl").read_text().splitlines())
    run(LocalGrid(sites), federation, tmp_path / "two")
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
            "left_out.unreadable": int,
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
    "query.calibrate": {
        "statistics": {"samples": int, "r": float, "mae": float, "rmse": float, "auroc": float}
    },
    "query.score": {
        "statistics": {
            "candidates": int,
            "quality": [int],
            "quality_mean": float,
            "quality_sd": float,
            "decisions.keep": int,
            "decisions.drop": int,
            "decisions.review": int,
            "regions_mean.ball": float,
        }
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
    for name, record in message.content.items():
        allowed = ALLOWED[kind][name]
        assert set(record) <= set(allowed), (kind, name, list(record))
        if isinstance(record, ArrayRecord):
            assert list(record) == list(allowed)
        for key, value in record.items():
            if isinstance(value, Array):
                assert (value.dtype, tuple(value.shape)) == allowed[key]
                assert value.numpy().dtype == value.dtype
                assert value.numpy().shape == tuple(value.shape)
            elif isinstance(value, list):
                assert {type(item) for item in value} == set(allowed[key])
                assert len(value) == 10
            else:
                assert type(value) is allowed[key]


def test_a_site_sends_nothing_but_the_documented_records(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    # One site of which much must stay: patients with names, a broken file, a phase that fails.
    (sites["b"].parent / "data" / "good-5.nii.gz").write_bytes(b"broken")
    table = sites["b"].parent / "data" / "cases.csv"
    table.write_text(table.read_text().replace("P1", "Maria Muster"))
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites), tmp_path / "run")
    assert len(grid.sent) == 3 * (1 + 1 + 2 + 1 + 1)
    for _, message in grid.sent:
        assert_allowed(message)
    text = "".join(
        str({name: dict(record) for name, record in message.content.items() if name != "weights"})
        for _, message in grid.sent
    )
    for secret in ("Maria", "good-5", "ref-", "P0", str(tmp_path), "nii"):
        assert secret not in text


@pytest.mark.parametrize("failing", ["summarise", "train", "calibrate", "score"])
def test_a_failing_site_sends_a_word_and_the_run_goes_on(
    failing: str,
    sites: Sites,
    make_federation: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
    run(grid, make_federation(sites), out)
    for _, message in grid.sent:
        assert_allowed(message)
    failed = events(out, "site-failed")
    assert {(e["site"], e["reason"]) for e in failed} == {("b", "internal-error")}
    assert all("site.log" in e["meaning"] for e in failed)
    everything = "".join(p.read_text() for p in out.glob("*.json*"))
    assert "Maria" not in everything
    assert "Maria_Muster" in (load_site(sites["b"]).results / "site.log").read_text()
    assert json.loads((out / "run.json").read_text())["outcome"] == "completed"
    assert {"a", "b", "c"} == set(json.loads((out / "run.json").read_text())["sites"]["joined"])


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
        assert [e["keys"] for e in ledger] == [
            {name: list(record) for name, record in message.content.items()} for message in sent
        ]
        assert [e["round"] for e in ledger] == [0, 0, 1, 2, 0, 0]
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
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "shuffled")
    assert {name: values.tobytes() for name, values in one.items()} == {
        name: values.tobytes() for name, values in two.items()
    }
    assert (tmp_path / "straight" / "statistics.json").read_bytes() == (
        tmp_path / "shuffled" / "statistics.json"
    ).read_bytes()


def test_the_seed_decides(sites: Sites, make_federation: Callable[..., Path], tmp_path: Path) -> None:
    federation = make_federation(sites)
    for name, seed in (("one", 3), ("again", 3), ("other", 4)):
        run(LocalGrid(sites), federation, tmp_path / name, seed=seed)
    one, again, other = (weights(tmp_path / name) for name in ("one", "again", "other"))
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["0.weight"], other["0.weight"])


def test_the_model_is_the_mean_of_the_updates(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(sites)
    run(grid, make_federation(sites, rounds=1), tmp_path / "run")
    updates = [
        m.content.array_records["weights"] for _, m in grid.sent if m.metadata.message_type == "train.qc"
    ]
    expected = np.mean([np.asarray(u["0.weight"].numpy(), np.float64) for u in updates], axis=0)
    np.testing.assert_allclose(weights(tmp_path / "run")["0.weight"], expected, rtol=1e-6)


def _replace_weights(values: float, dtype: type = np.float32, shape: tuple[int, ...] = (2, 3)) -> Any:
    def change(reply: Message) -> None:
        reply.content.array_records["weights"]["0.weight"] = Array(np.full(shape, values, dtype))

    return change


def _change_samples(reply: Message) -> None:
    reply.content.metric_records["training"]["samples"] = 10**9


def _add_record(reply: Message) -> None:
    reply.content["more"] = MetricRecord({"n": 1})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_replace_weights(np.nan), "not-finite"),
        (_replace_weights(0.0, np.float64), "dtype-differs"),
        (_replace_weights(0.0, shape=(3, 2)), "shape-differs"),
        (lambda reply: reply.content.array_records["weights"].pop("0.bias"), "names-differ"),
        (_change_samples, "samples-differ"),
        (_add_record, "bad-reply"),
    ],
)
def test_a_site_that_lies_costs_that_site_this_round(
    change: Callable[[Message], None],
    reason: str,
    sites: Sites,
    make_federation: Callable[..., Path],
    tmp_path: Path,
) -> None:
    honest = RecordingGrid(sites)

    def lie(site: str, reply: Message) -> None:
        if site == "b" and reply.metadata.message_type == "train.qc" and reply.metadata.group_id == "1":
            change(reply)

    grid = RecordingGrid(sites, lie)
    out = tmp_path / "run"
    run(grid, make_federation(sites), out)
    failed = events(out, "site-failed")
    assert [(e["site"], e["round"], e["reason"]) for e in failed] == [("b", 1, reason)]
    training = json.loads((out / "statistics.json").read_text())["train"]
    assert [list(entry["sites"]) for entry in training] == [["a", "c"], ["a", "b", "c"]]
    assert training[0]["failed"] == {"b": reason}
    run(honest, make_federation(sites), tmp_path / "honest")
    assert not np.array_equal(weights(out)["0.weight"], weights(tmp_path / "honest")["0.weight"])


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
    statistics = json.loads((out / "statistics.json").read_text())
    assert statistics["failed"]["score"] == {"a": "unreadable-reply-ValueError"}
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


def test_a_late_site_costs_that_site(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = tasks.train

    def slow(site: SiteConfig, request: TrainRequest) -> Outcome:
        if site.name == "a":
            time.sleep(3.2)
        return train(site, request)

    monkeypatch.setattr(tasks, "train", slow)
    out = tmp_path / "run"
    begin = time.monotonic()
    run(LocalGrid(sites), make_federation(sites, deadline="3s", rounds=1), out)
    assert time.monotonic() - begin < 10
    assert [(e["site"], e["reason"]) for e in events(out, "site-failed")] == [("a", "late")]
    assert [e["site"] for e in events(out, "update-accepted")] == ["b", "c"]


class SilentGrid(LocalGrid):
    """Sites that take every message and never answer, once they have shaken hands."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        ids = list(message_ids)
        kinds = {self._waiting[i].metadata.message_type for i in ids if i in self._waiting}
        return super().pull_messages(ids) if kinds == {"query.handshake"} else []


def test_no_wait_is_unbounded(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, fake_time: Any
) -> None:
    with pytest.raises(QuorumError, match=r"summarise: 0 sites answered, .* \(a: late, b: late, c: late\)"):
        run(
            SilentGrid(sites), make_federation(sites, deadline="60s"), tmp_path / "run", clock=fake_time.clock
        )
    # One deadline for all of them, not one after another.
    assert fake_time.now == 60


def test_a_lost_quorum_ends_the_run_and_is_written_down(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    def lie(site: str, reply: Message) -> None:
        if (
            site in {"a", "b"}
            and reply.metadata.message_type == "train.qc"
            and reply.metadata.group_id == "2"
        ):
            _add_record(reply)

    out = tmp_path / "run"
    with pytest.raises(
        QuorumError, match=r"training round 2 of 3: 1 sites answered, sites.minimum is 2"
    ) as error:
        run(RecordingGrid(sites, lie), make_federation(sites, minimum=2, rounds=3), out)
    assert error.value.exit_code == 3
    record = json.loads((out / "run.json").read_text())
    assert (record["outcome"], record["reason"]) == ("failed", str(error.value))
    assert events(out, "run-finished")[0]["outcome"] == "failed"
    # What was learned before is there.
    assert len(json.loads((out / "statistics.json").read_text())["train"]) == 1
    assert record["model"]["rounds"] == 1
    assert set(weights(out))


def test_sites_that_do_not_fit_are_left_out_by_name(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path, task_file: Path
) -> None:
    other = tmp_path / "other.toml"
    other.write_text(task_file.read_text().replace("size = [16", "size = [8"))
    sites = {"a": make_site("a"), "b": make_site("b", task=other), "c": make_site("c")}
    sites |= {"d": sites["c"], "stranger": make_site("stranger")}
    out = tmp_path / "run"
    run(LocalGrid(sites), make_federation(["a", "b", "d", "absent"], rounds=1), out)
    record = json.loads((out / "run.json").read_text())
    assert record["sites"] == {
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
    run(Unnamed(many), make_federation(sites, rounds=1), out)
    record = json.loads((out / "run.json").read_text())
    assert record["sites"]["joined"] == ["a", "b"]
    assert sorted(record["sites"]["left_out"].values()) == ["name-claimed-twice", "not-expected"]


def test_a_site_without_references_is_scored_and_not_asked_to_train_again(
    make_site: Callable[..., Path], make_federation: Callable[..., Path], tmp_path: Path
) -> None:
    sites = {"a": make_site("a"), "b": make_site("b", references=0)}
    grid = RecordingGrid(sites)
    out = tmp_path / "run"
    run(grid, make_federation(sites, minimum=1, rounds=3), out)
    asked = [m.metadata.message_type for site, m in grid.sent if site == "b"]
    assert asked.count("train.qc") == 1
    assert "query.score" in asked
    assert json.loads((out / "statistics.json").read_text())["sites"]["b"]["score"]["candidates"] == 4


def test_a_run_starts_from_a_stored_model(
    sites: Sites, make_federation: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(LocalGrid(sites), make_federation(sites, rounds=1), tmp_path / "one")
    federation = make_federation(sites, rounds=1)
    initial = tmp_path / "one" / "models" / "qc"
    federation.write_text(federation.read_text().replace("[qc]\n", f'[qc]\ninitial = "{initial}"\n'))
    grid = RecordingGrid(sites)
    sent: list[Any] = []
    push = grid.push_messages

    def watched(messages: Iterable[Message]) -> Iterable[str]:
        sent.extend(messages)
        return push(messages)

    monkeypatch.setattr(grid, "push_messages", watched)
    run(grid, federation, tmp_path / "two")
    first = next(m for m in sent if m.metadata.message_type == "train.qc")
    np.testing.assert_array_equal(
        first.content["weights"]["0.weight"].numpy(), weights(tmp_path / "one")["0.weight"]
    )
    # The path of the coordinator stays with the coordinator.
    assert str(tmp_path) not in "".join(str(m.content["request"]["body"]) for m in sent)


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
    monkeypatch.setattr("fedqc_server.phases.get_method", lambda name: Mock(judges="prediction"))
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
    run(grid, make_federation(["a", "b"], rounds=1, method="qcresunet"), out)
    expected = QCResUNetMethod(load_task(str(tmp_path / "ball.toml")), QCConfig()).build(0).state_dict()
    for _, message in grid.sent:
        if message.metadata.message_type == "train.qc":
            sent = message.content.array_records["weights"]
            assert list(sent) == list(expected)
            assert [tuple(sent[name].shape) for name in sent] == [tuple(t.shape) for t in expected.values()]
            assert {array.dtype for array in sent.values()} == {"float32"}
            losses = {key for key in message.content["training"] if key != "samples"}
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
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["outcome"], record["reason"]) == ("interrupted", "KeyboardInterrupt")
