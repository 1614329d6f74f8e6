"""The ledger: one line for every message that left this site."""

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from flwr.app import RecordDict

from fedqc.protocol import content_digest


class Ledger:
    """`ledger.jsonl`; lines are only ever added.

    A line says when (`time`, UTC), to whom (`to`), what `kind` of message, its training `round` (0 outside of
    training), its size in `bytes`, the `sha256` of its content and the `keys` of each record in it.
    """

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
            "keys": {name: list(record) for name, record in records.items()},
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab+") as file:
            # Whoever was killed while writing left half a line: it stays, and the new one stands alone.
            if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
                file.write(b"\n")
            file.write(json.dumps(line).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
