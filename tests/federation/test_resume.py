"""Runs that are cut off anywhere and go on: nothing is lost, nothing is done twice, and nothing changes."""

import itertools
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fedqc_client import tasks
from fedqc_server.checkpoint import load_checkpoint
from fedqc_server.run_folder import RunFolder, listening

from fedqc.config import load_site
from fedqc.curation.manifest import read_manifest
from fedqc.errors import ConfigError
from tests.federation.runs import (
    USUAL_PHASES,
    MemoGrid,
    RecordingGrid,
    Sites,
    events,
    model_bytes,
    record,
    run,
    statistics,
    write_federation,
    write_site,
    write_task,
)

pytestmark = [
    pytest.mark.usefixtures("tiny_method_throughout", "no_report"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="a run is killed in a child process"),
]
STAGES = {"check-1": 1, "check-2": 1, "qc": 2, "segmentation": 2}
KILLED = 9


@dataclass(frozen=True)
class Undisturbed:
    """A run of four sites that nobody cut off, and all that the sites answered in it."""

    sites: Sites
    federation: Path
    out: Path
    memo: dict[Any, Any]
    models: dict[str, bytes]
    statistics: dict[str, Any] = field(repr=False)

    def go(self, out: Path, *, resume: bool = False) -> MemoGrid:
        """Start a run, or go on with it."""
        grid = MemoGrid(self.sites, self.memo)
        run(grid, self.federation, out, resume=resume)
        return grid


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_method_throughout: None) -> Undisturbed:
    folder = tmp_path_factory.mktemp("undisturbed")
    task, out, memo = write_task(folder), folder / "run", dict[Any, Any]()
    sites = {name: write_site(folder, name, task, references=2, good=2) for name in "abcd"}
    federation = write_federation(folder, sites, task, rounds=2, segmentation_rounds=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedqc_server.phases.build_coordinator_report", lambda folder: None)
        run(MemoGrid(sites, memo), federation, out)
    return Undisturbed(sites, federation, out, memo, model_bytes(out), statistics(out))


def assert_as_undisturbed(out: Path, undisturbed: Undisturbed, n_answers: int) -> None:
    """The run in `out` came to what the undisturbed one came to, and did nothing twice."""
    assert model_bytes(out) == undisturbed.models
    assert json.dumps(statistics(out)) == json.dumps(undisturbed.statistics)
    found, expected = record(out), record(undisturbed.out)
    assert (found["outcome"], found["reason"]) == ("completed", None)
    assert found["models"] == expected["models"]
    assert found["done"] == expected["done"] == ["handshake", *USUAL_PHASES]
    assert list(found["seconds"]) == list(expected["seconds"])
    # No question but those of the undisturbed run: a site would have had to work on it.
    assert len(undisturbed.memo) == n_answers
    rounds = Counter((e["stage"], e["round"]) for e in events(out, "round-finished"))
    # A kill between a round's checkpoint and its event leaves it without one.
    assert set(rounds.values()) == {1}
    assert set(rounds) <= {(stage, n) for stage, last in STAGES.items() for n in range(1, last + 1)}
    assert len(rounds) >= sum(STAGES.values()) - 1
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == sorted(
        f"{stage}.safetensors" for stage in STAGES
    )
    assert sorted(path.name for path in (out / "models").iterdir()) == ["qc", "segmentation"]


def finished(out: Path) -> set[Any]:
    """The phases and rounds that were finished when a run stopped."""
    done: set[Any] = set(record(out)["done"]) if (out / "run.json").exists() else set()
    for stage in STAGES:
        found = load_checkpoint(out / "checkpoints" / f"{stage}.safetensors")
        done |= {(number, stage) for number in range(1, found[1].rounds + 1)} if found else set()
    return done - {"handshake"}


def begun_since_the_stop(out: Path) -> list[Any]:
    """The phases and rounds that were begun after the last stop."""
    after: list[Any] = []
    for event in events(out):
        match event["event"]:
            case "run-started" | "run-resumed":
                after = []
            case "phase-started":
                after.append(event["phase"])
            case "round-started":
                after.append((event["round"], event["stage"]))
    return after


def assert_nothing_is_done_again(out: Path, before: set[Any]) -> None:
    after = begun_since_the_stop(out)
    assert after[0] == "handshake"
    assert len(after) == len(set(after))
    assert before.isdisjoint(after)
    everything = {*USUAL_PHASES, *((n, stage) for stage, last in STAGES.items() for n in range(1, last + 1))}
    assert before | set(after) == everything | {"handshake"}


class Stopped(Exception):  # noqa: N818 - a test's own
    """Somebody else's code failed."""


def stop_at(number: int) -> Callable[[dict[str, Any]], None]:
    """A listener that raises at an event, counted from 0; it raises once."""
    count = itertools.count()

    def listen(event: dict[str, Any]) -> None:
        if next(count) == number:
            raise Stopped

    return listen


def test_a_run_that_fails_at_any_event_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    n_answers, n_events = len(undisturbed.memo), len(events(undisturbed.out))
    for number in range(0, n_events, 4):
        out = tmp_path / str(number)
        with listening(stop_at(number)), pytest.raises(Stopped):
            undisturbed.go(out)
        before = finished(out)
        undisturbed.go(out, resume=True)
        assert_as_undisturbed(out, undisturbed, n_answers)
        assert_nothing_is_done_again(out, before)


def killed_at(number: int, undisturbed: Undisturbed, out: Path) -> bool:
    """Lead a run in a process that is killed before its `number`th change of the disk.

    An event is cut off in the middle of its line. Returns whether it came to that.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # threads that pytest may have
        child = os.fork()
    if child == 0:
        try:
            _die_at(number)
            undisturbed.go(out, resume=True)
        except BaseException:
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in {0, KILLED}
    return code == KILLED


def _die_at(number: int) -> None:
    """Let this process end at once, without a `finally`, before a change of the disk."""
    count = itertools.count()

    def deadly(owner: type, name: str, last_act: Callable[[Any], None]) -> None:
        real = getattr(owner, name)

        def step(self: Any, *arguments: Any, **options: Any) -> Any:
            if next(count) == number:
                last_act(self)
                os._exit(KILLED)
            return real(self, *arguments, **options)

        setattr(owner, name, step)

    def half_a_line(folder: Any) -> None:
        with (folder.path / "events.jsonl").open("a") as file:
            file.write('{"time": "2026-01-02T')

    deadly(Path, "replace", lambda _: None)
    deadly(Path, "rename", lambda _: None)
    deadly(RunFolder, "event", half_a_line)


def test_a_run_that_is_killed_anywhere_goes_on(undisturbed: Undisturbed, tmp_path: Path) -> None:
    n_answers, killed = len(undisturbed.memo), 0
    for number in itertools.count(0, 7):
        out = tmp_path / str(number)
        if not killed_at(number, undisturbed, out):
            break
        killed += 1
        before = finished(out)
        undisturbed.go(out, resume=True)
        assert_as_undisturbed(out, undisturbed, n_answers)
        assert_nothing_is_done_again(out, before)
    assert killed > 15


def test_a_run_that_is_killed_over_and_over_comes_to_its_end(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    n_answers, killed = len(undisturbed.memo), 0
    while killed_at(31, undisturbed, tmp_path):
        killed += 1
        assert killed < 20
    assert killed > 3
    assert_as_undisturbed(tmp_path, undisturbed, n_answers)


# -------------------------------------------------------------------------------- with sites that really work


def results(site: Path) -> dict[str, Any]:
    """What a site has in its results folder, apart from times and from what it wrote down on the way."""
    folder = load_site(site).results
    files = {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in {"manifest.json", "ledger.jsonl", "site.log", "activity.json"}
    }
    manifest = read_manifest(folder / "manifest.json")
    return files | {"manifest.json": manifest.model_copy(update={"created": ""})}


def test_a_run_that_is_interrupted_in_every_phase_leaves_the_same_everywhere(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the third site each time, in the second round where there are two."""
    task = write_task(tmp_path)
    sites = {name: write_site(tmp_path, name, task, references=2, good=2) for name in "abcd"}
    federation = write_federation(tmp_path, sites, task, rounds=2, segmentation_rounds=2)
    out, asked = tmp_path / "run", Counter[tuple[str, ...]]()

    def interrupted_once(name: str, *, round: int = 0) -> None:  # noqa: A002 - the word of a request
        work = getattr(tasks, name)
        already: list[bool] = []

        def interrupt(site: Any, request: Any) -> Any:
            if site.name == "c" and request.round == round and not already:
                already.append(True)
                raise KeyboardInterrupt
            return work(site, request)

        monkeypatch.setattr(tasks, name, interrupt)

    works = {
        "handshake": 0,
        "summarise": 0,
        "cross_check": 0,
        "train": 2,
        "calibrate": 0,
        "score": 0,
        "train_segmentation": 2,
        "evaluate_segmentation": 0,
    }
    for name, number in works.items():
        interrupted_once(name, round=number)
    for _ in works:
        grid = RecordingGrid(sites)
        with pytest.raises(KeyboardInterrupt):
            run(grid, federation, out, resume=True)
        asked.update((site, m.metadata.message_type, m.metadata.group_id) for site, m in grid.sent)
        assert record(out)["outcome"] == "interrupted"
    grid = RecordingGrid(sites)
    run(grid, federation, out, resume=True)
    asked.update((site, m.metadata.message_type, m.metadata.group_id) for site, m in grid.sent)

    assert model_bytes(out) == undisturbed.models
    assert statistics(out) == undisturbed.statistics
    assert [e["phase"] for e in events(out, "phase-started")].count("train.qc") == 2
    for name, path in sites.items():
        assert results(path) == results(undisturbed.sites[name])
        # Only what was cut off was asked again, of the sites before the one it was cut off at.
        again = 2 if name in "ab" else 1
        for kind in ("query.summarise", "query.calibrate", "query.score", "evaluate.segmentation"):
            assert asked[name, kind, "0"] == again
        for kind in ("train.qc", "train.segmentation"):
            assert asked[name, kind, "2"] == again
    # Two first rounds: of the cross-check and of the training itself.
    assert [asked[name, "train.qc", "1"] for name in "abcd"] == [2, 2, 2, 2]
    assert [asked[name, "train.segmentation", "1"] for name in "abcd"] == [1, 1, 1, 1]


# -------------------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ("local_steps = 2", "local_steps = 3", r"qc\.local_steps"),
        ('strategy = "fedavg"', 'strategy = "median"', r"averaging\.strategy"),
        ("size = [16, 16, 16]", "size = [16, 16, 8]", "task file"),
    ],
)
def test_another_run_is_not_gone_on_with(
    undisturbed: Undisturbed, tmp_path: Path, old: str, new: str, key: str
) -> None:
    task, out = write_task(tmp_path), tmp_path / "run"
    federation = write_federation(tmp_path, undisturbed.sites, task, rounds=2, segmentation_rounds=2)
    grid = MemoGrid(undisturbed.sites, undisturbed.memo)
    run(grid, federation, out, only=("summarise",))
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    changed = [path for path in (task, federation) if old in path.read_text()]
    assert len(changed) == 1
    changed[0].write_text(changed[0].read_text().replace(old, new))
    with pytest.raises(ConfigError, match=rf"run\.json: the run has another {key} than the one to resume"):
        run(grid, federation, out, resume=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_who_takes_part_and_how_long_is_waited_may_change(undisturbed: Undisturbed, tmp_path: Path) -> None:
    federation, out = tmp_path / "federation.toml", tmp_path / "run"
    text = undisturbed.federation.read_text()
    federation.write_text(text)
    grid = MemoGrid(undisturbed.sites, undisturbed.memo)
    run(grid, federation, out, only=("summarise",))
    for old, new in (("minimum = 1", "minimum = 2"), ('deadline = "60s"', 'deadline = "90s"')):
        assert old in text
        text = text.replace(old, new)
    federation.write_text(f'{text}[server]\naddress = "127.0.0.1:9000"\n')
    run(grid, federation, out, only=("summarise",), resume=True)
    assert record(out)["config"]["sites"]["minimum"] == 2


def test_another_seed_is_not_gone_on_with(undisturbed: Undisturbed, tmp_path: Path) -> None:
    grid = MemoGrid(undisturbed.sites, undisturbed.memo)
    run(grid, undisturbed.federation, tmp_path, only=("summarise",))
    with pytest.raises(ConfigError, match=r"run\.json: the run has another seed than the one to resume"):
        run(grid, undisturbed.federation, tmp_path, resume=True, seed=1)


def test_a_run_that_is_complete_is_only_greeted_again(undisturbed: Undisturbed, tmp_path: Path) -> None:
    undisturbed.go(tmp_path)
    grid = undisturbed.go(tmp_path, resume=True)
    assert {message.metadata.message_type for _, message in grid.asked} == {"query.handshake"}
    assert record(tmp_path)["outcome"] == "completed"
