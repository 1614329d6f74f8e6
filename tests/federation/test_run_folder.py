import json
from pathlib import Path

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
        folder.event("update-accepted", round=1, site="a", loss=0.5, nothing=None)
    folder.finish("completed")
    written = lines(tmp_path / "run")
    assert written == heard
    assert [line["event"] for line in written] == [
        "run-started",
        "phase-started",
        "update-accepted",
        "phase-finished",
        "run-finished",
    ]
    update = {key: value for key, value in written[2].items() if key != "time"}
    assert update == {"phase": "train", "round": 1, "site": "a", "event": "update-accepted", "loss": 0.5}
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
