"""The coordinator's live page, by the folder of a run."""

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest
from fedqc_server.live import LivePage, Watch, live_page

PORT = 8124
HOME = f"http://127.0.0.1:{PORT}"


class Folder:
    """A run's folder that grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._time = 0

    def event(self, name: str, **details: Any) -> None:
        self._time += 10
        time = f"2026-03-01T12:{self._time // 60:02}:{self._time % 60:02}.000+00:00"
        with (self.path / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time, "event": name, **details}) + "\n")

    def record(self, **values: Any) -> None:
        (self.path / "run.json").write_text(json.dumps(values))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


def round_of(folder: Folder, number: int, loss: float | None, rounds: int = 5) -> None:
    terms = {"phase": "train.qc", "stage": "qc", "round": number, "rounds": rounds}
    folder.event("round-started", **terms)
    if loss is not None:
        folder.event("update-received", **terms, site="a", loss=loss)
        folder.event("round-finished", **terms, loss=loss)


def test_a_run_that_has_not_begun(folder: Folder) -> None:
    now = Watch(folder.path).now()
    assert (now["outcome"], now["phase"], now["training"], now["sites"]) == ("not begun", None, None, {})


def test_sites_are_followed_from_awaited_to_what_they_did_last(folder: Folder) -> None:
    watch = Watch(folder.path)
    folder.event("sites-awaited", online=["a"], missing=["b", "c"], seconds=60)
    assert {name: one["state"] for name, one in watch.now()["sites"].items()} == {
        "b": "awaited",
        "c": "awaited",
    }
    folder.event("site-joined", phase="handshake", site="a")
    folder.event("site-joined", phase="handshake", site="b")
    folder.event("site-left-out", phase="handshake", site="c", reason="offline", meaning="it was not there")
    folder.event("statistics-received", phase="summarise", site="a")
    folder.event("site-failed", phase="summarise", site="b", reason="late")
    sites = watch.now()["sites"]
    assert sites["a"] == {"state": "there", "seen": "2026-03-01T12:00:50.000+00:00", "what": "summarise"}
    assert (sites["b"]["state"], sites["c"]["state"]) == ("failed", "left out")
    assert sites["b"]["what"] == "summarise: no answer came before the deadline"
    assert sites["c"]["what"] == "handshake: it was not there"
    folder.event("site-suspected", phase="cross-check", site="a", quality=0.3, others=0.9)
    assert watch.now()["sites"]["a"]["what"] == "its references are not trusted"


def test_a_training_has_a_pace_and_time_left(folder: Folder) -> None:
    watch = Watch(folder.path)
    folder.event("phase-started", phase="train.qc")
    round_of(folder, 1, None)
    now = watch.now()
    assert (now["training"]["done"], now["seconds_left"]) == (0, None)
    folder.event("round-finished", phase="train.qc", stage="qc", round=1, rounds=5, loss=0.5)
    round_of(folder, 2, 0.25)
    now = watch.now()
    assert now["phase"] == "train.qc"
    assert (now["training"]["title"], now["training"]["done"], now["training"]["rounds"]) == (
        "QC model",
        2,
        5,
    )
    assert now["training"]["losses"] == [0.5, 0.25]
    assert now["seconds_left"] == 3 * 15  # rounds of 10 and 20 s
    assert now["sites"]["a"]["what"] == "train.qc, round 2"
    folder.event("phase-started", phase="score")
    assert (watch.now()["training"], list(watch.now()["trainings"])) == (None, ["qc"])


def test_a_loss_that_nobody_told_is_none(folder: Folder) -> None:
    watch = Watch(folder.path)
    terms = {"phase": "train.qc", "stage": "qc", "round": 1, "rounds": 2}
    folder.event("round-started", **terms)
    folder.event("round-finished", **terms)
    assert watch.now()["training"]["losses"] == [None]


def test_a_round_that_was_cut_off_is_counted_once(folder: Folder) -> None:
    watch = Watch(folder.path)
    for number, loss in ((1, 0.5), (2, 0.4), (3, None), (3, 0.3)):
        round_of(folder, number, loss)
    assert watch.now()["training"]["losses"] == [0.5, 0.4, 0.3]
    round_of(folder, 2, 0.35)  # a run that goes on from an older state
    assert watch.now()["training"]["losses"] == [0.5, 0.35]


def test_half_a_line_is_waited_for_and_a_broken_one_passed_over(folder: Folder) -> None:
    watch = Watch(folder.path)
    folder.event("site-joined", phase="handshake", site="a")
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('{"event": "site-joined", "site": "br\n{"time": "x", "event": "site-joi')
    assert list(watch.now()["sites"]) == ["a"]
    with (folder.path / "events.jsonl").open("a") as file:
        file.write('ned", "site": "b"}\n')
    assert list(watch.now()["sites"]) == ["a", "b"]


def test_the_end_of_a_run_is_told_with_its_reason(folder: Folder) -> None:
    folder.record(
        federation="alps", outcome="failed", reason="too few sites", finished="x", done=["handshake"]
    )
    folder.event("phase-started", phase="summarise")
    folder.event("run-finished", outcome="failed", reason="too few sites")
    now = Watch(folder.path).now()
    assert (now["federation"], now["outcome"], now["reason"]) == ("alps", "failed", "too few sites")
    assert (now["phase"], now["done"]) == (None, ["handshake"])
    assert now["events"][-1]["event"] == "run-finished"


def ask(page: LivePage, path: str, given: str | None = "") -> httpx.Response:
    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(page.app), base_url=HOME) as client:
            found = given
            if found is None:
                token = page.address.partition("#")[2]
                found = str((await client.post("/api/enter", content=token)).json()["secret"])
            return await client.get(path, headers={"x-fedqc": found})

    return asyncio.run(asked())


def test_only_who_has_the_address_sees_it(folder: Folder) -> None:
    folder.record(federation="alps", outcome="running", done=[])
    page = LivePage(folder.path, PORT)
    for path in ("/api/now", "/api/report"):
        assert ask(page, path).status_code == 403
        assert ask(page, path, "guess").status_code == 403
    assert ask(page, "/api/now", None).json()["federation"] == "alps"
    assert "alps" not in ask(page, "/").text


def test_the_report_is_made_anew_behind_each_phase(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def build(folder: Path, path: Path, *, numbers: str | None) -> Path:
        assert numbers is None  # nobody could open them
        made.append(len(made))
        path.write_text(f"report {len(made)}")
        return path

    monkeypatch.setattr("fedqc_server.live.build_coordinator_report", build)
    page = LivePage(folder.path, PORT)
    folder.record(outcome="running", done=["handshake"])
    assert page._current_report() == page._current_report() == "report 1"
    folder.record(outcome="running", done=["handshake", "summarise"])
    assert page._current_report() == "report 2"


def test_it_is_served_while_something_else_goes_on(folder: Folder) -> None:
    folder.record(federation="alps", outcome="running", done=[])
    told: list[str] = []
    is_there = threading.Event()

    def opened(address: str) -> None:
        told.append(address)
        is_there.set()

    with live_page(folder.path, 0, opened):
        assert is_there.wait(30)
        home, _, token = told[0].partition("/#")
        with httpx.Client(base_url=home, trust_env=False) as client:
            secret = client.post("/api/enter", content=token).json()["secret"]
            assert client.get("/api/now", headers={"x-fedqc": secret}).json()["federation"] == "alps"
            assert "<title>fedqc server</title>" in client.get("/").text
    with pytest.raises(httpx.ConnectError):
        httpx.get(home, trust_env=False)
