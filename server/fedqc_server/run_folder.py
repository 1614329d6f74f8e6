"""The folder of a run: everything the coordinator learns, written as it learns it.

run.json          configuration, versions, seed, sites, seconds a phase, outcome
events.jsonl      one line an event: time, phase, round, site, event and what belongs to it
statistics.json   what the sites said, phase by phase
models/qc/        the QC model after the last finished round
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedqc.errors import ConfigError

Listener = Callable[[dict[str, Any]], None]
Outcome = Literal["running", "completed", "failed", "interrupted"]

_OWN = ("run.json", "events.jsonl", "statistics.json", "models")
# A ServerApp gets its settings from Flower as scalars; a listener in the same process reaches it this way.
_LISTENER: ContextVar[Listener | None] = ContextVar("fedqc_listener", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """Send every event of runs started inside the block to `listener` too (a progress bar, say)."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def check_new_folder(path: Path) -> None:
    """Refuse a folder that already holds something.

    Raises:
        ConfigError: `path` is a file or a folder that is not empty.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        found = "is not empty" if path.is_dir() else "is a file"
        raise ConfigError(
            f"{path}: the run's folder {found}; nothing is written over, so name a new or an empty one"
        )


class RunFolder:
    """One run on disk. Files are written aside and renamed, so a reader never sees half of one."""

    def __init__(self, path: Path, *, now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        """Name the folder; it is made when the run starts.

        Raises:
            ConfigError: it holds a run already.
        """
        there = [name for name in _OWN if (path / name).exists()]
        if there or (path.exists() and not path.is_dir()):
            found = f"already holds a run ({', '.join(there)})" if there else "is a file"
            raise ConfigError(f"{path}: the run's folder {found}; nothing is written over, so name a new one")
        self.path = path
        self._now = now
        self._listener = _LISTENER.get()
        self._record: dict[str, Any] = {}
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None

    @property
    def model(self) -> Path:
        """Where the QC model goes."""
        return self.path / "models" / "qc"

    def start(self, **record: Any) -> None:
        """Make the folder and write `run.json` with what is known at the start."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._record = {**record, "started": self._time(), "outcome": "running"}
        self._save()
        self.event("run-started")

    def note(self, **record: Any) -> None:
        """Add to `run.json`."""
        self._record |= record
        self._save()

    def finish(self, outcome: Outcome, reason: str | None = None) -> None:
        """Write how the run ended."""
        self.note(finished=self._time(), outcome=outcome, reason=reason)
        self.event("run-finished", outcome=outcome, reason=reason)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the run: its events carry its name, its seconds go to `run.json`."""
        self._phase = name
        begin = time.monotonic()
        self.event("phase-started")
        try:
            yield
        finally:
            self._seconds[name] = round(time.monotonic() - begin, 3)
            self.note(seconds=self._seconds)
            self.event("phase-finished", seconds=self._seconds[name])
            self._phase = None

    def event(self, event: str, *, round: int | None = None, site: str | None = None, **details: Any) -> None:  # noqa: A002 - the word of the file
        """Append a line to `events.jsonl` and tell the listener."""
        line = {
            "time": self._time(),
            "phase": self._phase,
            "round": round,
            "site": site,
            "event": event,
            **details,
        }
        line = {key: value for key, value in line.items() if value is not None}
        with (self.path / "events.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
        if self._listener:
            self._listener(line)

    def write_json(self, name: str, values: object) -> None:
        """Write a JSON file of the folder."""
        aside = self.path / f".{name}.new"
        aside.write_text(json.dumps(values, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(self.path / name)

    def _save(self) -> None:
        self.write_json("run.json", self._record)

    def _time(self) -> str:
        return self._now().isoformat(timespec="milliseconds")
