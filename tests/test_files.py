import json
import os
from pathlib import Path

import pytest

from fedqc.files import private_files, replacing, write_json


def test_the_file_is_there_once_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "scan.nii.gz"
    path.write_text("old")
    with replacing(path) as aside:
        aside.write_text("new")
        assert aside.name.endswith(".nii.gz")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"round": 1})

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    owner, name = {
        "write": (Path, "write_text"),
        "fsync": (os, "fsync"),
        "replace": (Path, "replace"),
    }[step]
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, full)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"round": 2})
    assert json.loads(path.read_text()) == {"round": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_json_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(tmp_path / "run.json", float("nan"))
    assert not list(tmp_path.iterdir())


def test_what_is_written_in_private_only_its_user_may_read(tmp_path: Path) -> None:
    with private_files():
        (tmp_path / "folder").mkdir()
        (tmp_path / "folder" / "scores.csv").write_text("id")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "folder" / "scores.csv").stat().st_mode & 0o777 == 0o600
    (tmp_path / "after").write_text("")
    assert (tmp_path / "after").stat().st_mode & 0o077
