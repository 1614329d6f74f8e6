from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fedqc import importing
from fedqc.errors import ModelError
from fedqc.importing import import_dqe


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importing, "DQE_PACKAGE", "no-such-package-of-fedqc")
    with pytest.raises(
        ModelError, match="is missing; install it with: pip install --no-deps deep-quality-est"
    ):
        import_dqe(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def installed(monkeypatch: pytest.MonkeyPatch, version: str, *files: Path) -> None:
    def found(name: str) -> Any:
        return SimpleNamespace(version=version, files=[Listed(path) for path in files])

    monkeypatch.setattr(importing, "distribution", found)


class Listed:
    def __init__(self, path: Path) -> None:
        self._path = path

    def as_posix(self) -> str:
        return self._path.as_posix()

    def locate(self) -> Path:
        return self._path


def test_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    installed(monkeypatch, "0.1.0")
    with pytest.raises(ModelError, match=r"is version 0\.1\.0; install it with: .*==0\.0\.3"):
        import_dqe(tmp_path / "model")


def test_other_weights_are_not_opened(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "deep_quality_estimation" / "weights" / "dqe_weights.pth"
    installed(monkeypatch, "0.0.3", path)
    with pytest.raises(ModelError, match=r"holds no weights/dqe_weights\.pth; .* --force-reinstall"):
        import_dqe(tmp_path / "model")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"something else")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was opened"))
    with pytest.raises(
        ModelError, match=r"dqe_weights\.pth: SHA-256 [0-9a-f]{12}\.\.\., expected 6d35ecc74095\.\.\."
    ):
        import_dqe(tmp_path / "model")
