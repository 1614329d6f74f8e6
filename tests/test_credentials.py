import os
import shlex
import subprocess
from pathlib import Path

import pytest

from fedqc.config import CoordinatorConfig
from fedqc.credentials import credential_problems

posix = pytest.mark.skipif(os.name != "posix", reason="rights of files are kept elsewhere")


@pytest.fixture
def coordinator(tmp_path: Path) -> CoordinatorConfig:
    """One with a certificate that all may read and a key that only its owner may."""
    ca, key = tmp_path / "ca.crt", tmp_path / "it's a.key"
    ca.write_text("certificate")
    ca.chmod(0o644)
    key.write_text("key")
    key.chmod(0o600)
    return CoordinatorConfig(address="fl.example.org:443", ca=ca, key=key)


def codes(coordinator: CoordinatorConfig) -> list[tuple[str, str | None]]:
    return [(one.code, one.file.name if one.file else None) for one in credential_problems(coordinator)]


def test_nothing_is_wrong_with_nothing_or_with_all_in_place(coordinator: CoordinatorConfig) -> None:
    assert credential_problems(CoordinatorConfig()) == []
    assert credential_problems(coordinator) == []


def test_missing_files(coordinator: CoordinatorConfig) -> None:
    assert coordinator.ca is not None
    assert coordinator.key is not None
    coordinator.ca.unlink()
    coordinator.key.unlink()
    problems = credential_problems(coordinator)
    assert [(one.code, one.severity, one.file, one.found) for one in problems] == [
        ("missing-credential", "warning", coordinator.ca, "no such file"),
        ("missing-credential", "warning", coordinator.key, "no such file"),
    ]
    assert "certificate that the coordinator sent" in problems[0].fix
    assert "[coordinator] key" in problems[1].expected


def test_a_folder_is_no_credential(coordinator: CoordinatorConfig, tmp_path: Path) -> None:
    for key in ("ca", "key"):
        (problem,) = credential_problems(coordinator.model_copy(update={key: tmp_path}))
        assert (problem.code, problem.found) == ("missing-credential", "something that is no file")


def test_a_file_that_cannot_be_read(coordinator: CoordinatorConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != coordinator.key)
    (problem,) = credential_problems(coordinator)
    assert (problem.file, problem.found) == (coordinator.key, "a file that this user may not read")


def test_a_path_that_cannot_be_followed(coordinator: CoordinatorConfig, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.symlink_to(other)
    other.symlink_to(one)
    assert codes(coordinator.model_copy(update={"ca": one})) == [("missing-credential", "one")]


@posix
@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o601, 0o777])
def test_a_key_that_others_may_use(coordinator: CoordinatorConfig, mode: int) -> None:
    assert coordinator.key is not None
    coordinator.key.chmod(mode)
    (problem,) = credential_problems(coordinator)
    assert (problem.code, problem.severity, problem.file) == ("key-exposed", "warning", coordinator.key)
    assert f"mode {mode:04o}" in problem.found
    command = problem.fix.removeprefix("run: ")
    assert shlex.split(command) == ["chmod", "600", str(coordinator.key)]
    subprocess.run(command, shell=True, check=True)  # noqa: S602 - a person would paste it
    assert credential_problems(coordinator) == []


@posix
@pytest.mark.parametrize("mode", [0o600, 0o400, 0o700])
def test_a_key_that_only_its_owner_may_use(coordinator: CoordinatorConfig, mode: int) -> None:
    assert coordinator.key is not None
    coordinator.key.chmod(mode)
    assert credential_problems(coordinator) == []


@posix
def test_the_rights_of_the_key_itself_count_not_those_of_a_link(
    coordinator: CoordinatorConfig, tmp_path: Path
) -> None:
    assert coordinator.key is not None
    link = tmp_path / "link.key"
    link.symlink_to(coordinator.key)  # a link always has mode 0777
    linked = coordinator.model_copy(update={"key": link})
    assert credential_problems(linked) == []
    coordinator.key.chmod(0o644)
    assert codes(linked) == [("key-exposed", "link.key")]
