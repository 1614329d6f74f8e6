import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from fedqc_server.run_folder import RunFolder, check_new_folder, listening

from fedqc.errors import ConfigError


def lines(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_run_is_written_as_it_goes(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    with listening(heard.append):
        folder = RunFolder(tmp_path / "run")
    folder.start(seed=3)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"] == "running"
    with folder.phase("train"):
        folder.event("update-received", round=1, site="a", loss=0.5, nothing=None)
    folder.finish("completed")
    written = lines(tmp_path / "run")
    assert written == heard
    assert [line["event"] for line in written] == [
        "run-started",
        "phase-started",
        "update-received",
        "phase-finished",
        "run-finished",
    ]
    update = {key: value for key, value in written[2].items() if key != "time"}
    assert update == {"phase": "train", "round": 1, "site": "a", "event": "update-received", "loss": 0.5}
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["outcome"] == "completed"
    assert record["seed"] == 3
    assert list(record["seconds"]) == ["train"]
    assert "phase" not in written[-1]


def test_the_time_of_a_phase_that_fails_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.start()
    with pytest.raises(ZeroDivisionError), folder.phase("score"):
        raise ZeroDivisionError
    assert "score" in json.loads((tmp_path / "run.json").read_text())["seconds"]


def test_nobody_listens_after_the_block(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    with listening(heard.append):
        pass
    RunFolder(tmp_path).event("run-started")
    assert heard == []


def test_a_run_is_not_written_over(tmp_path: Path) -> None:
    RunFolder(tmp_path / "run").start()
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(
        ConfigError, match=r"run: the run's folder already holds a run \(run.json, events.jsonl\)"
    ):
        RunFolder(tmp_path / "run")
    assert (tmp_path / "run" / "run.json").read_bytes() == before


def test_a_folder_with_the_sites_of_a_simulation_is_taken(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    RunFolder(tmp_path).start()
    assert (tmp_path / "run.json").is_file()


def test_check_new_folder(tmp_path: Path) -> None:
    check_new_folder(tmp_path / "not-there")
    check_new_folder(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="is not empty"):
        check_new_folder(tmp_path)
    with pytest.raises(ConfigError, match="is a file"):
        check_new_folder(tmp_path / "file")
    with pytest.raises(ConfigError, match="is a file"):
        RunFolder(tmp_path / "file")


def test_numbers_that_json_does_not_know_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        RunFolder(tmp_path).write_json("statistics.json", {"r": float("nan")})
    assert not (tmp_path / "statistics.json").exists()


# ------------------------------------------------------------------------------------------------- resuming

START: dict[str, Any] = {"seed": 3, "task": "a" * 64, "config": {"name": "north"}}


def record(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "run.json").read_text())
    return values


def begin(path: Path) -> RunFolder:
    """A run that was cut off in its second phase."""
    folder = RunFolder(path, now=lambda: datetime(2026, 1, 2, tzinfo=UTC))
    folder.start(**START)
    with folder.phase("summarise"):
        folder.learned("sites", {"a": {"summarise": {"cases": 3}}})
    with pytest.raises(KeyboardInterrupt), folder.phase("train.qc"):
        raise KeyboardInterrupt
    folder.finish("interrupted", "KeyboardInterrupt")
    return folder


def resume(path: Path) -> RunFolder:
    folder = RunFolder(path, resume=True)
    folder.start(**START)
    return folder


def test_a_run_goes_on_with_what_it_knew(tmp_path: Path) -> None:
    begin(tmp_path)
    folder = resume(tmp_path)
    assert folder.done == ("summarise",)
    assert folder.statistics == {"sites": {"a": {"summarise": {"cases": 3}}}}
    found = record(tmp_path)
    assert (found["outcome"], found["reason"], found["finished"]) == ("running", None, None)
    assert found["started"] == "2026-01-02T00:00:00.000+00:00"
    assert [line["event"] for line in lines(tmp_path)].count("run-started") == 1
    assert lines(tmp_path)[-1]["event"] == "run-resumed"


def test_seconds_of_a_phase_add_up_and_done_keeps_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([0.0, 10.0, 100.0, 102.5, 200.0, 201.0, 300.0, 304.0])
    monkeypatch.setattr("fedqc_server.run_folder.time.monotonic", lambda: next(seconds))
    folder = begin(tmp_path)
    assert record(tmp_path)["seconds"] == {"summarise": 10.0, "train.qc": 2.5}
    folder = resume(tmp_path)
    for name in ("summarise", "train.qc"):
        with folder.phase(name):
            pass
    assert record(tmp_path)["seconds"] == {"summarise": 11.0, "train.qc": 6.5}
    assert record(tmp_path)["done"] == ["summarise", "train.qc"]


@pytest.mark.parametrize("kept", [0, 1, -1], ids=["all of it", "but a byte", "but the line's end"])
def test_the_torn_last_line_of_the_events_is_dropped(tmp_path: Path, kept: int) -> None:
    begin(tmp_path)
    path = tmp_path / "events.jsonl"
    whole = path.read_bytes()
    last = whole.rindex(b"\n", 0, len(whole) - 1) + 1
    path.write_bytes(whole[: last + kept] if kept >= 0 else whole[:kept])
    resume(tmp_path)
    written = lines(tmp_path)  # every line is JSON
    assert [line["event"] for line in written] == [
        *(json.loads(line)["event"] for line in whole.splitlines()[:-1]),
        "run-resumed",
    ]
    assert path.read_bytes().startswith(whole[:last])


def test_whole_events_are_left_alone(tmp_path: Path) -> None:
    begin(tmp_path)
    before = (tmp_path / "events.jsonl").read_bytes()
    RunFolder(tmp_path, resume=True)
    assert (tmp_path / "events.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seed", 4, "seed"),
        ("task", "b" * 64, "task file"),
        ("config", {"name": "north", "rounds": 2}, "rounds"),
    ],
)
def test_another_run_is_not_gone_on_with(tmp_path: Path, key: str, value: object, named: str) -> None:
    begin(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(
        ConfigError, match=rf"run.json: the run has another {named} than the one to resume it with; resume it"
    ):
        RunFolder(tmp_path, resume=True).start(**START | {key: value})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("run.json", b"{", r"run.json: cannot be read \(.*restore the file or start anew"),
        ("run.json", b"\xff", "run.json: cannot be read"),
        ("run.json", b"[" * 100_000, "run.json: cannot be read"),
        ("run.json", b"[]", "run.json: holds a list, expected an object; restore the file"),
        ("statistics.json", b"", "statistics.json: cannot be read"),
        ("statistics.json", b"3", "statistics.json: holds a int, expected an object"),
    ],
)
def test_a_damaged_file_is_a_sentence(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    begin(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        RunFolder(tmp_path, resume=True)


def test_a_run_without_its_run_json_is_not_begun_again_on_top(tmp_path: Path) -> None:
    """Its checkpoints would be taken over, whatever seed they are of."""
    begin(tmp_path)
    (tmp_path / "run.json").unlink()
    with pytest.raises(ConfigError, match=r"holds events.jsonl, statistics.json but no run.json"):
        RunFolder(tmp_path, resume=True)


def test_nothing_to_resume_is_a_new_run(tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    folder = resume(tmp_path)
    assert [line["event"] for line in lines(tmp_path)] == ["run-started"]
    assert folder.done == ()


def test_what_a_round_that_was_cut_off_left_is_removed(tmp_path: Path) -> None:
    begin(tmp_path)
    (tmp_path / ".updates-abc").mkdir()
    (tmp_path / ".updates-abc" / "0.safetensors").write_bytes(b"an update")
    resume(tmp_path)
    assert list(tmp_path.glob(".updates-*")) == []
