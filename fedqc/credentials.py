"""The files by which a site and its coordinator know each other: are they there, and is the key private."""

import os
import shlex
import stat
from pathlib import Path

from fedqc.cases.problems import Problem
from fedqc.config import CoordinatorConfig

_OTHERS = stat.S_IRWXG | stat.S_IRWXO


def credential_problems(coordinator: CoordinatorConfig) -> list[Problem]:
    """What is wrong with the certificate and the key that `site.toml` names; nothing is read of them."""
    problems = []
    if coordinator.ca is not None and (found := _unusable(coordinator.ca)) is not None:
        problems.append(
            _missing(
                coordinator.ca,
                found,
                "the certificate that [coordinator] ca names",
                "copy the certificate that the coordinator sent to this place, or correct the path",
            )
        )
    if coordinator.key is not None:
        if (found := _unusable(coordinator.key)) is not None:
            problems.append(
                _missing(
                    coordinator.key,
                    found,
                    "the private key that [coordinator] key names",
                    "correct the path, or copy the site's own key to this place; it has to belong to the "
                    "user that runs fedqc",
                )
            )
        elif is_exposed(coordinator.key):
            problems.append(
                Problem(
                    code="key-exposed",
                    case=None,
                    file=coordinator.key,
                    found=f"a private key with mode {_mode(coordinator.key):04o}, open to others here",
                    expected="mode 0600: only its owner may read it",
                    fix=f"run: chmod 600 {shlex.quote(str(coordinator.key))}",
                )
            )
    return problems


def is_exposed(key: Path) -> bool:
    """Whether other users of this machine may read or change a private key."""
    return bool(_mode(key) & _OTHERS)


def _unusable(path: Path) -> str | None:
    """Why a file cannot be read; None where it can."""
    try:
        if not path.exists():
            return "no such file"
        if not path.is_file():
            return "something that is no file"
    except OSError as error:  # a folder above it that is closed to this user
        return f"a path that cannot be followed ({error.strerror})"
    return None if os.access(path, os.R_OK) else "a file that this user may not read"


def _mode(path: Path) -> int:
    """The permission bits; Windows keeps rights elsewhere, and shows every file as open to all."""
    return stat.S_IMODE(path.stat().st_mode) if os.name == "posix" else 0


def _missing(path: Path, found: str, expected: str, fix: str) -> Problem:
    return Problem(code="missing-credential", case=None, file=path, found=found, expected=expected, fix=fix)
