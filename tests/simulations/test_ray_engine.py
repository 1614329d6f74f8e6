"""Flower's simulation engine against the one in this process. Ray runs beside pytest, as with users."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from fedqc_simulations import ray_engine
from fedqc_simulations.engine import run_local
from fedqc_simulations.ray_engine import run_ray
from flwr.app import Context, Message, RecordDict
from safetensors.numpy import load_file

from fedqc.cases.layouts import CaseFiles
from fedqc.errors import ConfigError, RunError

SITES = ("east", "north", "south")
LEARNED = ("summarise", "train.qc", "calibrate", "score")
TASK = """
name = "blobs"
modalities = ["T1"]
spacing = [1.0, 1.0, 1.0]
size = [16, 16, 16]
[classes]
core = [3]
rim = [1, 5]
[regions]
whole = ["core", "rim"]
"""

# Runs one federation after the other and writes down what it saw; anything it prints is not its own.
SCRIPT = """
import json, os, subprocess, sys, tempfile
from pathlib import Path
from fedqc.errors import FedQCError
from fedqc_simulations.ray_engine import run_ray

def others():
    listing = ["ps", "-A", "-o", "pgid=,pid=,stat=,command="]
    lines = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
    group = [line.split(maxsplit=3)[1:] for line in lines if line.split()[0] == str(os.getpid())]
    mine = str(os.getpid())
    return [name for pid, stat, name in group if pid != mine and stat[0] != "Z" and name[:3] != "ps "]

def run(federation, sites, out, phases):
    seen = {"events": [], "workers": [], "during": [], "raised": None}
    def listen(event):
        seen["events"].append(event["event"])
        if event["event"] == "phase-finished":
            seen["during"] = others()
            notes = Path(tempfile.gettempdir()).glob("fedqc-*/worker-*")
            seen["workers"] = sorted({*seen["workers"], *(note.name for note in notes)})
    sites = {name: Path(path) for name, path in sites.items()}
    try:
        run_ray(Path(federation), sites, Path(out), seed=0, workers=2, phases=phases, listener=listen)
    except FedQCError as error:
        seen["raised"] = [type(error).__name__, str(error), error.exit_code]
    seen["after"] = others()
    seen["temporary"] = os.listdir(tempfile.gettempdir())
    return seen

for one in json.loads(sys.argv[1]):
    Path(one.pop("report")).write_text(json.dumps(run(**one)))
    print("finished", flush=True)
"""


@pytest.fixture
def make_federation(tmp_path: Path, make_cases: Callable[..., list[CaseFiles]]) -> Callable[..., Any]:
    """Three sites on the same few cases, a network as small as it gets; returns federation.toml and sites."""
    cases = make_cases(5)
    (tmp_path / "blobs.toml").write_text(TASK)

    def make(name: str, *, steps: int, deadline: str) -> tuple[Path, dict[str, Path]]:
        sites = {site: tmp_path / name / site / "site.toml" for site in SITES}
        for number, (site, file) in enumerate(sites.items()):
            table, reference = (tmp_path / "data" / f"{name}-{site}{end}.csv" for end in ("", "-reference"))
            mine = cases[number : number + 4]
            rows = [",".join([case.id, *(path.name for path in case.files)]) for case in mine]
            table.write_text("\n".join(["id,T1,label", *rows]) + "\n")
            reference.write_text("\n".join(["id", *(case.id for case in mine[:3])]) + "\n")
            file.parent.mkdir(parents=True)
            file.write_text(
                f'name = "{site}"\ntask = "{tmp_path / "blobs.toml"}"\n'
                f'[data]\npath = "{table}"\nlayout = "csv"\nreference = "{reference}"\n'
                '[compute]\ndevice = "cpu"\nprecision = "fp32"\nworkers = 1\n[policy]\nmin_count = 1\n'
            )
        federation = tmp_path / f"{name}.toml"
        federation.write_text(
            f'name = "{name}"\ntask = "{tmp_path / "blobs.toml"}"\n'
            f"[sites]\nexpected = {sorted(sites)}\nminimum = 3\n"
            f'[qc]\nrounds = 2\nlocal_steps = {steps}\nbatch_size = 2\ndeadline = "{deadline}"\n'
            "network = { width = 4, blocks = [1, 1, 1] }\n[privacy]\nmin_count = 1\n"
        )
        return federation, sites

    return make


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files; pytest's own has too long a name for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="q") as folder:
        yield Path(folder)


def learned(out: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((out / "statistics.json").read_text())
    return values


def test_several_workers_come_to_the_same_and_are_gone(
    make_federation: Callable[..., Any], tmp_path: Path, temporary: Path
) -> None:
    federation, sites = make_federation("here", steps=2, deadline="300s")
    run_local(federation, sites, tmp_path / "local", seed=0, phases=LEARNED)

    runs = []
    # The second run fails while all workers have hours of work.
    for name, steps, deadline, phases in (("whole", 2, "300s", LEARNED), ("late", 10**6, "2s", ["train.qc"])):
        federation, sites = make_federation(name, steps=steps, deadline=deadline)
        one = {"federation": federation, "sites": sites, "out": tmp_path / name, "phases": phases}
        runs.append(one | {"report": tmp_path / f"{name}.json"})
    home = tmp_path / "home"
    home.mkdir()
    own = {"HOME": str(home), "TMPDIR": str(temporary), "MPLCONFIGDIR": str(tmp_path / "matplotlib")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(runs, default=str)],
        env=os.environ | own,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    whole, late = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("whole", "late"))

    assert whole["raised"] is None
    ours, theirs = (
        load_file(tmp_path / name / "models" / "qc" / "weights.safetensors") for name in ("local", "whole")
    )
    assert ours.keys() == theirs.keys()
    for name, values in ours.items():
        np.testing.assert_allclose(theirs[name], values, atol=1e-4)
    local, ray = learned(tmp_path / "local"), learned(tmp_path / "whole")
    assert ray["sites"] == local["sites"]
    assert ray["failed"] == local["failed"]
    assert [entry["sites"].keys() for entry in ray["train"]["qc"]] == [set(SITES), set(SITES)]
    lines = (tmp_path / "whole" / "events.jsonl").read_text().splitlines()
    assert whole["events"] == [json.loads(line)["event"] for line in lines]
    assert len(whole["workers"]) == 2

    kind, message, code = late["raised"]
    assert (kind, code) == ("QuorumError", 3)
    assert "east: late, north: late, south: late" in message
    assert json.loads((tmp_path / "late" / "run.json").read_text())["reason"] == message

    for seen in (whole, late):
        assert any("raylet" in command for command in seen["during"])
        assert seen["after"] == []
        assert seen["temporary"] == []
    assert list(home.iterdir()) == []
    assert done.stdout.startswith("finished\n")
    assert done.stderr == ""


def test_without_ray_the_sentence_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedqc\[ray\]'"):
        run_ray(tmp_path / "federation.toml", {}, tmp_path / "out", seed=0, workers=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("workers", "threads", "each"), [(2, 5, 2), (8, 6, 2), (3, 1, 1)])
def test_the_workers_share_the_threads(
    workers: int, threads: int, each: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = []

    @contextmanager
    def fake(*arguments: Any) -> Iterator[None]:
        started.append(arguments)
        yield

    monkeypatch.setattr(ray_engine, "_ray", fake)
    monkeypatch.setattr(ray_engine, "_runtime", fake)
    monkeypatch.setattr(ray_engine, "lead", lambda *_: None)
    sites = {name: tmp_path / f"{name}.toml" for name in reversed(SITES)}
    run_ray(tmp_path / "f.toml", sites, tmp_path / "out", seed=0, workers=workers, threads=threads)
    (n_workers, _), (app, names, _) = started
    assert n_workers == min(workers, 3)
    assert names == list(SITES)

    answered = []
    monkeypatch.setattr(ray_engine, "_end_with", lambda stop: None)
    monkeypatch.setattr(ray_engine, "client_app", lambda message, context: answered.append(context))
    before = torch.get_num_threads()
    try:
        context = Context(1, 1, {"partition-id": 1}, RecordDict(), {})
        app(Mock(spec=Message), context)
        assert torch.get_num_threads() == each
    finally:
        torch.set_num_threads(before)
    assert answered[0].node_config["site"] == str(tmp_path / "north.toml")


def test_a_runtime_that_breaks_ends_the_run(
    make_federation: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(**_: Any) -> None:
        raise RuntimeError("no actor fits")

    @contextmanager
    def no_ray(*_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(ray_engine, "start_vce", broken)
    monkeypatch.setattr(ray_engine, "_ray", no_ray)
    federation, sites = make_federation("broken", steps=2, deadline="300s")
    begin = time.monotonic()
    federation.write_text(federation.read_text().replace("minimum = 3", 'minimum = 3\nwait = "3s"'))
    with pytest.raises(RunError, match="engine broke: no actor fits"):
        run_ray(federation, sites, tmp_path / "out", seed=0, workers=2)
    assert time.monotonic() - begin < 60
    assert json.loads((tmp_path / "out" / "run.json").read_text())["outcome"] == "failed"


def test_ctrl_c_waits_until_ray_has_started(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    started = []

    class SlowRay(ModuleType):
        @staticmethod
        def init(**_: Any) -> None:
            signal.raise_signal(signal.SIGINT)
            started.append("all of it")

    with pytest.raises(KeyboardInterrupt):
        ray_engine._start(SlowRay("ray"), 2, tmp_path)
    assert started == ["all of it"]


def test_a_ray_that_others_could_reach_is_refused(tmp_path: Path) -> None:
    class OpenRay(ModuleType):
        @staticmethod
        def init(**_: Any) -> SimpleNamespace:
            return SimpleNamespace(address_info={"node_ip_address": "192.0.2.7"})

    with pytest.raises(RunError, match=r"listens on 192\.0\.2\.7, expected 127\.0\.0\.1"):
        ray_engine._start(OpenRay("ray"), 2, tmp_path)
