"""Files that are there whole or not at all, and lines that are read once they are whole."""

import contextlib
import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to; what was written takes the place of `path` once it is on the disk.

    It always has the same name, so that what a kill leaves there is written over by the next; two processes
    must not write one file at the same time.
    """
    aside = path.with_name(f".new-{path.name}")  # with the same ending, for writers that go by it
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())  # or a power cut could leave a renamed file full of zeros
        aside.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the new name, too
        finally:
            os.close(folder)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, values: object) -> None:
    """Write a JSON file for programs and people."""
    with replacing(path) as aside:
        aside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """Whatever this process and those that it starts write meanwhile, only its user may read."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def write_secret(path: Path) -> None:
    """Write a new random secret that only its owner may read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))


@dataclass
class LineReader:
    """Reads the lines of a file that others write to, each once, as soon as it is whole."""

    path: Path
    position: int = 0
    """Bytes read so far."""

    def skip(self) -> None:
        """Pass over what is there already."""
        self.position = self.path.stat().st_size if self.path.exists() else 0

    def read(self) -> list[bytes]:
        """The lines that are new."""
        try:
            with self.path.open("rb") as file:
                file.seek(self.position)
                content = file.read()
        except FileNotFoundError:
            return []
        whole = content[: content.rfind(b"\n") + 1]
        self.position += len(whole)
        return whole.splitlines()
