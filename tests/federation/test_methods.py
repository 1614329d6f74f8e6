"""Every QC method that is installed, in a federation of two sites: what it sends, and what stays there."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from fedqc_client import tasks
from fedqc_client.dry_run import what_would_leave
from fedqc_client.guard import Told

from fedqc.cases.layouts import find_cases
from fedqc.config import DQEConfig, QCConfig, load_federation, load_site
from fedqc.curation.manifest import read_manifest
from fedqc.errors import ConfigError
from fedqc.methods.base import get_method, part_of
from fedqc.model import ModelCard, load_model, save_model
from fedqc.protocol import (
    REPLIES,
    CrossCheckRequest,
    TrainReply,
    TrainRequest,
    reply_from_records,
    request_from_records,
)
from fedqc.statistics.site import CrossCheckSummary
from fedqc.task import load_task
from tests.federation.runs import RecordingGrid, run, write_federation, write_site, write_task

Sites = dict[str, Path]
pytestmark = pytest.mark.usefixtures("no_report")

PHASES = ("summarise", "train.qc", "calibrate", "score")
FITTED = ("calibration", "interval", "fitted")
"""How parts are called that are fitted at each site and never leave it."""
NETWORK = "[qc.network]\nwidth = 4\nblocks = [1, 1]\n"
SEGMENTER = "[qc.segmenter]\nrounds = 1\nlocal_steps = 1\nchannels = [4, 8]\npasses = 2\n"
RCA = "[qc.rca]\nreferences = 2\ncalibration = 1\nvoxels = 200\n"
DQE = "[qc.dqe]\nside = 32\nbatch_size = 4\n"


@dataclass(frozen=True)
class Kind:
    """A method as it is set up."""

    method: str
    qc: str
    teacher: bool = False
    """Whether it begins with a trained network of the same method."""


KINDS = {
    "combine": Kind(
        "combine", f'{NETWORK}{SEGMENTER}[qc.combine]\nmethods = ["resnet34", "expected-dice"]\n'
    ),
    "combine with rca": Kind(
        "combine", f'{NETWORK}{RCA}[qc.combine]\nmethods = ["resnet34", "rca", "rca-labels"]\n'
    ),
    **{
        f"dice-regression of {shown}": Kind(
            "dice-regression",
            f'{SEGMENTER}[qc.network]\nwidth = 4\n[qc.regression]\ninput = "{shown}"\n',
        )
        for shown in ("image", "uncertainty", "error")
    },
    "dqe of ratings": Kind("dqe", DQE),
    "dqe distilled": Kind("dqe", f'{DQE}targets = "distilled"\n', teacher=True),
    "ensemble": Kind("ensemble", f"{SEGMENTER}snapshots = 2\n"),
    "expected-dice": Kind("expected-dice", SEGMENTER),
    "qcresunet": Kind("qcresunet", NETWORK),
    "rca by features": Kind("rca", RCA),
    "rca by registration": Kind("rca", f'{RCA}form = "registration"\n'),
    "rca-labels": Kind("rca-labels", f"{NETWORK}{RCA}[qc.samples]\nforest = 0.5\n[qc.sources]\ntrees = 2\n"),
    "resnet34": Kind("resnet34", NETWORK),
    "resnet50": Kind("resnet50", NETWORK),
    "robinson": Kind("robinson", NETWORK),
    "unet": Kind("unet", "[qc.network]\nwidth = 4\n"),
    "voxresnet": Kind("voxresnet", "[qc.network]\nwidth = 4\npatch = [16, 16, 16]\n"),
}
OF_PREDICTIONS = ("error-sum", "uncertainty-sum")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the sites lie, which are the same for all methods."""
    return tmp_path_factory.mktemp("methods")


@pytest.fixture(scope="module")
def task_file(folder: Path) -> Path:
    path = write_task(folder)
    path.write_text(path.read_text().replace("[16, 16, 16]", "[16, 16, 32]"))  # the U-Net halves four times
    return path


@pytest.fixture(scope="module")
def sites(folder: Path, task_file: Path) -> Sites:
    """Two sites, at each of which one candidate and one reference are rated."""
    found = {name: write_site(folder, name, task_file, good=2) for name in ("a", "b")}
    for path in found.values():
        (path.parent / "ratings.csv").write_text(
            "id,rater,view,stars\nref-0,ann,all,5\nref-1,ann,all,5\ngood-4,ann,all,5.5\nbad-6,ann,all,1.5\n"
        )
        path.write_text(path.read_text().replace("[data]", '[data]\nratings = "ratings.csv"'))
    return found


@pytest.fixture
def planned(tmp_path: Path, sites: Sites, task_file: Path) -> Callable[[Kind], Path]:
    """Writes a federation.toml."""

    def plan(kind: Kind) -> Path:
        qc = kind.qc
        if kind.teacher:
            config, task = QCConfig(method=kind.method, dqe=DQEConfig(side=32)), load_task(str(task_file))
            network = get_method(kind.method)(task, config).build(5)
            card = ModelCard(task=task, qc=config, federation="", seed=5, rounds=0, samples=0, sites=())
            save_model(tmp_path / "teacher", network.state_dict(), card)
            qc = f'initial = "{tmp_path / "teacher"}"\n{qc}'
        return write_federation(
            tmp_path,
            sites,
            task_file,
            minimum=2,
            rounds=1,
            local_steps=1,
            method=kind.method,
            cross_check_rounds=0,
            qc=qc,
        )

    return plan


def test_none_is_forgotten() -> None:
    installed = {point.name for point in entry_points(group="fedqc.methods")}
    assert {kind.method for kind in KINDS.values()} | set(OF_PREDICTIONS) == installed


@pytest.mark.parametrize("kind", KINDS.values(), ids=list(KINDS))
def test_a_run(
    kind: Kind,
    sites: Sites,
    planned: Callable[[Kind], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedqc.methods.dqe.DISCOUNT_LABELS", 4)
    federation, out = planned(kind), tmp_path / "run"
    config = load_federation(federation)
    grid = RecordingGrid(sites)
    run(grid, federation, out, only=PHASES)

    method = get_method(kind.method)(load_task(config.task), config.qc)
    network = method.build(0)
    parts = [
        list(part_of(network, stage.part).state_dict())
        for stage in method.stages()
        for _ in range(stage.rounds)
    ]
    assert not any(set(name.split(".")) & set(FITTED) for part in parts for name in part)
    for site, site_file in sites.items():
        # What left is what the protocol names, and of the network only the part that was trained.
        sent = [reply for name, reply in grid.sent if name == site]
        assert {reply.metadata.message_type for reply in sent} >= {"query.calibrate", "query.score"}
        back = []
        for reply in sent:
            kind_of_message = reply.metadata.message_type
            assert set(reply.content) == set(REPLIES[kind_of_message])  # an error is a record of its own
            found = reply_from_records(reply.content, kind_of_message)
            back += [list(found.weights)] if isinstance(found, TrainReply) else []
        assert back == parts

        # What stayed: a quality for every candidate, and a model that works there.
        configured = load_site(site_file)
        manifest = read_manifest(configured.results / "manifest.json")
        task = load_task(configured.task)
        cases = {case.id for case in find_cases(configured.data.path, task).cases}
        assert {entry.id for entry in manifest.entries} == {
            case for case in cases if not case.startswith("ref")
        }
        for entry in manifest.entries:
            assert all(math.isfinite(value) for value in (entry.quality, *entry.regions.values()))
            assert 0 <= entry.quality <= 1
            assert set(entry.regions) == set(method.scored_regions())
        stored = load_model(configured.results / "models" / "qc", task)
        assert bool(stored.card.references) == method.needs_references

    # The coordinator has the whole network, in which nothing is fitted.
    whole = load_model(out / "models" / "qc", load_task(config.task)).network.state_dict()
    assert list(whole) == list(network.state_dict())
    for name, values in network.state_dict().items():
        if set(name.split(".")) & set(FITTED):
            torch.testing.assert_close(whole[name], values)


@pytest.mark.parametrize("name", OF_PREDICTIONS)
def test_who_judges_a_prediction_is_refused(
    name: str, sites: Sites, planned: Callable[[Kind], Path], tmp_path: Path
) -> None:
    grid = RecordingGrid(sites)
    with pytest.raises(ConfigError, match="judges its own prediction and never looks at the annotation"):
        run(grid, planned(Kind(name, SEGMENTER)), tmp_path / "run")
    assert grid.asked == []


def test_a_site_without_two_references_is_excused_from_what_compares(
    planned: Callable[[Kind], Path], task_file: Path, tmp_path: Path, sites: Sites
) -> None:
    lone = write_site(tmp_path, "a", task_file, references=2)  # one of them is held back
    federation = planned(KINDS["rca-labels"])
    federation.write_text(federation.read_text().replace("minimum = 2", "minimum = 1"))
    grid = RecordingGrid({"a": lone, "b": sites["b"]})
    run(grid, federation, tmp_path / "run", only=("summarise", "train.qc"))
    (reply,) = (
        reply.content
        for name, reply in grid.sent
        if name == "a" and reply.metadata.message_type == TrainRequest.kind
    )
    assert reply["error"]["code"] == "no-reference"


@pytest.mark.parametrize("name", ["rca by features", "combine with rca"])
def test_a_site_without_two_references_is_excused_from_scoring_by_comparison(
    name: str, planned: Callable[[Kind], Path], task_file: Path, tmp_path: Path, sites: Sites
) -> None:
    lone = write_site(tmp_path, "a", task_file, references=2)  # one of them is held back
    federation = planned(KINDS[name])
    federation.write_text(federation.read_text().replace("minimum = 2", "minimum = 1"))
    grid = RecordingGrid({"a": lone, "b": sites["b"]})
    run(grid, federation, tmp_path / "run", only=PHASES)
    errors = {
        (name, reply.metadata.message_type): reply.content["error"]["code"]
        for name, reply in grid.sent
        if "error" in reply.content
    }
    later = {(name, kind) for name, kind in errors if kind in {"query.calibrate", "query.score"}}
    assert later == {("a", "query.calibrate"), ("a", "query.score")}
    assert set(errors.values()) == {"no-reference"}
    assert not (lone.parent / "results" / "manifest.json").exists()
    activity = json.loads((lone.parent / "results" / "activity.json").read_text())
    assert "references of 2 patients or more, beside those held back; found 1" in activity["notes"][-1]


def test_references_are_checked_by_what_compares_with_references(
    sites: Sites, planned: Callable[[Kind], Path]
) -> None:
    config = load_federation(planned(KINDS["combine with rca"]))
    task = load_task(config.task)
    network = get_method("combine")(task, config.qc).build(0)
    request = CrossCheckRequest(
        federation="methods",
        task=task.digest,
        seed=0,
        min_count=1,
        qc=config.qc,
        weights={name: values.numpy() for name, values in network.state_dict().items()},
    )
    found = tasks.cross_check(load_site(sites["a"]), request)
    assert isinstance(found, Told)
    assert isinstance(found.summary, CrossCheckSummary)
    assert found.summary.references.value == 4


def test_all_stages_are_shown_before_anything_is_sent(
    sites: Sites, planned: Callable[[Kind], Path], tmp_path: Path
) -> None:
    federation = planned(KINDS["dice-regression of error"])
    forms = [
        one.content
        for one in what_would_leave(sites["a"], load_federation(federation))
        if (one.kind, one.record) == (TrainRequest.kind, "weights")
    ]
    grid = RecordingGrid(sites)
    run(grid, federation, tmp_path / "run", only=("summarise", "train.qc"))
    stages = [
        request_from_records(message.content, TrainRequest).stage
        for name, message in grid.asked
        if name == "a" and message.metadata.message_type == TrainRequest.kind
    ]
    replies = [
        reply_from_records(reply.content, TrainRequest.kind)
        for name, reply in grid.sent
        if name == "a" and reply.metadata.message_type == TrainRequest.kind
    ]
    assert len(forms) == len(stages) == len(replies) == 3
    assert stages[-1] == "qc"
    for form, reply in zip(forms, replies, strict=True):
        assert isinstance(reply, TrainReply)
        assert form.startswith(f"{len(reply.weights)} arrays of ")
        assert all(f"{name} {values.shape}" in form for name, values in reply.weights.items())
