"""The ledger: one line for every message that left this site."""

import json
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from pydantic import ConfigDict, Field
from rich.filesize import decimal

from fedqc.config import FrozenModel, parse
from fedqc.errors import ConfigError, DataError
from fedqc.protocol import WEIGHTS, content_digest
from fedqc.reports.words import plural

NAME = "ledger.jsonl"
"""In the site's results folder."""

Told = str | int | float | list[int] | list[float]


class Line(FrozenModel):
    """One message that left."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    time: datetime
    """When, in UTC."""
    to: str
    """The federation."""
    kind: str
    """Type of the message."""
    round: int
    """Of its training; 0 outside of one."""
    bytes: int
    """Its size as it travels."""
    sha256: str
    """Of its content."""
    content: dict[str, dict[str, Told]] = Field(default_factory=dict)
    """By record: numbers and words in full; of weights type and shape by name, as `float32 16x4x3x3x3`."""


class Ledger:
    """`ledger.jsonl`; lines are only ever added, see `Line`."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.path = path
        self._now = now

    def write(self, records: RecordDict, *, to: str, kind: str, round: int) -> None:  # noqa: A002 - the word of the file
        """Add a line for `records` and have it on disk before returning.

        Raises:
            OSError: it cannot be written; then nothing may leave.
        """
        size, sha256 = content_digest(records)
        line = {
            "time": self._now().isoformat(timespec="milliseconds"),
            "to": to,
            "kind": kind,
            "round": round,
            "bytes": size,
            "sha256": sha256,
            "content": {name: _content(record) for name, record in records.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # Whoever was killed while writing left half a line: it stays, and the new one stands alone.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def lines(self) -> Iterator[tuple[str, Line | None]]:
        """What is written down, in its order, and as text; None where it is no whole line.

        Raises:
            DataError: there is no such file, or it cannot be read.
        """
        try:
            with self.path.open(encoding="utf-8", errors="backslashreplace") as file:
                for text in filter(None, map(str.strip, file)):
                    yield text, _line(text, self.path)
        except FileNotFoundError:
            raise DataError(f"{self.path}: there is no such file; nothing has left this site yet") from None
        except OSError as error:
            raise DataError(
                f"{self.path}: cannot be read: {error.strerror}; check the path and its permissions"
            ) from None


def in_words(line: Line, *, weights: bool = False) -> Iterator[str]:
    """A message as people read it: when, to whom, what, and below it every number and word that it told.

    Args:
        line: of the ledger.
        weights: say name, type and shape of each array, too.
    """
    training = f", round {line.round}" if line.round else ""
    yield (
        f"{line.time:%Y-%m-%d %H:%M:%S} UTC to {line.to}: {line.kind}{training}, "
        f"{decimal(line.bytes)}, SHA-256 {line.sha256}"
    )
    for name, told in line.content.items():
        if name == WEIGHTS:
            yield f"    {name}: {plural(len(told), 'array')}"
        if name != WEIGHTS or weights:
            yield from (f"    {name}.{key} = {value}" for key, value in told.items())


def _content(record: ArrayRecord | MetricRecord | ConfigRecord) -> dict[str, Any]:
    """What a record tells."""
    if isinstance(record, ArrayRecord):
        return {name: _form(array) for name, array in record.items()}
    return dict(record.items())


def _form(array: Array) -> str:
    return f"{array.dtype} {'x'.join(map(str, array.shape)) or 'scalar'}"


def _line(text: str, path: Path) -> Line | None:
    try:
        values = json.loads(text)
        return parse(values, Line, source=str(path)) if isinstance(values, dict) else None
    except (ValueError, RecursionError, ConfigError):
        return None
