"""A simulation that is killed again and again comes to the figures of one that was left alone."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedqc.seeding import generator

KILLS = int(os.environ.get("FEDQC_KILLS", "4"))
SETTINGS = """
name = "killed"
task = "{task}"
[sites]
expected = ["a", "b", "c", "d"]
[qc]
rounds = 3
local_steps = 2
batch_size = 2
cross_check_rounds = 1
[qc.network]
width = 4
[curation]
threshold = 0.0
[segmentation]
rounds = 2
local_steps = 1
batch_size = 2
channels = [4, 8]
"""


def start(*arguments: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from fedqc.cli import main; main()", "simulate", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def events(out: Path) -> list[dict[str, Any]]:
    """The events of all runs below `out`; the last line may be half written."""
    found: list[dict[str, Any]] = []
    for path in filter(Path.exists, [out / "events.jsonl", *sorted(out.glob("arms/*/events.jsonl"))]):
        whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        found.extend({"run": str(path.parent.relative_to(out)), **json.loads(line)} for line in whole)
    return found


def finish(process: subprocess.Popen[bytes]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output.decode()


def test_killed_and_resumed(data_set: Callable[[Path, int], Path], task_file: Path, tmp_path: Path) -> None:
    data = data_set(tmp_path / "data", 18)
    federation = tmp_path / "federation.toml"
    federation.write_text(SETTINGS.format(task=task_file))
    given = (federation, "--data", data, "--layout", "msd", "--precision", "fp32", "--threads", 1)
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    finish(start(*given, "--out", undisturbed))
    expected = events(undisturbed)

    rng = generator(0, "kills")
    moments = sorted(rng.choice(len(expected), KILLS, replace=False).tolist())
    for moment in moments:
        resumed = ("--resume", killed) if (killed / "simulation.json").exists() else (*given, "--out", killed)
        process = start(*resumed)
        # Killed a random while after as many events, so in the middle of anything.
        while len(events(killed)) <= moment and process.poll() is None:
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()[0].decode()
        process.send_signal(signal.SIGKILL)
        process.communicate()
    finish(start("--resume", killed))

    for file in (
        "evaluation.json",
        "statistics.json",
        "models/qc/weights.safetensors",
        "models/segmentation/weights.safetensors",
        "arms/random/statistics.json",
        "arms/oracle/models/segmentation/weights.safetensors",
        "truth/test_scores.csv",
        "truth/segmentation_scores.csv",
    ):
        assert (killed / file).read_bytes() == (undisturbed / file).read_bytes(), file

    seen = events(killed)
    assert sum(event["event"] == "run-resumed" for event in seen) >= 1
    finished = [(e["run"], e["stage"], e["round"]) for e in seen if e["event"] == "round-finished"]
    assert len(finished) == len(set(finished))
    rounds = [(e["run"], e["stage"], e["round"]) for e in expected if e["event"] == "round-finished"]
    # A kill between a round's checkpoint and its event leaves the event out, and the round is not repeated.
    assert set(finished) <= set(rounds)
    assert len(rounds) - len(finished) <= KILLS
    started = [(e["run"], e["stage"], e["round"]) for e in seen if e["event"] == "round-started"]
    assert set(started) == set(rounds)
    assert len(started) <= len(rounds) + KILLS
    assert not list(killed.rglob(".updates-*"))


def test_nothing_to_resume(tmp_path: Path) -> None:
    process = start("--resume", tmp_path)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert b"holds no simulation to resume" in output


@pytest.mark.parametrize("option", [("--seed", "1"), ("--out", "elsewhere")])
def test_resume_stands_alone(option: tuple[str, str], tmp_path: Path) -> None:
    process = start("--resume", tmp_path, *option)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert option[0].removeprefix("--").encode() in output
