"""The folder of a run: everything the coordinator learns, written as it learns it.

run.json          configuration, versions, seed, sites, finished phases and their seconds, outcome
events.jsonl      one line an event: time, phase, round, site, event and what belongs to it
statistics.json   what the sites said, phase by phase
checkpoints/      of each network in training, the state after the last finished round
models/           qc and segmentation, each as it was when its training ended
report.html       all of it for people
report/           the numbers of its figures and tables
"""

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from fedqc.config import FederationConfig
from fedqc.errors import ConfigError
from fedqc.files import write_json
from fedqc.task import Task

Listener = Callable[[dict[str, Any]], None]
Outcome = Literal["running", "completed", "failed", "interrupted"]

_CHANGEABLE = ("sites.", "server.")  # tables of the configuration that a run may go on with another of
_OWN = ("run.json", "events.jsonl", "statistics.json", "checkpoints", "models")
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
    """One run on disk. Files are written aside and renamed, so a reader never sees half of one.

    Args:
        path: of the folder; it is made when the run starts.
        resume: go on with the run that the folder holds, if it holds one.
        now: the time.

    Raises:
        ConfigError: the folder holds a run and is not to be resumed, or what it holds cannot be read.
    """

    def __init__(
        self, path: Path, *, resume: bool = False, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        if path.exists() and not path.is_dir():
            raise ConfigError(
                f"{path}: the run's folder is a file; nothing is written over, so name a new one"
            )
        there = [name for name in _OWN if (path / name).exists()]
        if there and not resume:
            raise ConfigError(
                f"{path}: the run's folder already holds a run ({', '.join(there)}); "
                "nothing is written over, so name a new one, or resume the run that is there"
            )
        if there and "run.json" not in there:
            raise ConfigError(
                f"{path}: holds {', '.join(there)} but no run.json, so there is no run to resume; "
                "restore the file or name a new folder"
            )
        self.path = path
        self._now = now
        self._listener = _LISTENER.get()
        self._phase: str | None = None
        self._record: dict[str, Any] = {}
        self.statistics: dict[str, Any] = {}
        """What was learned; the content of `statistics.json`."""
        if (path / "run.json").exists():  # the first file of a run
            self._record = _read_object(path / "run.json")
            if (path / "statistics.json").exists():
                self.statistics = _read_object(path / "statistics.json")
            _drop_torn_line(path / "events.jsonl")

    @property
    def models(self) -> Path:
        """Where the trained models go."""
        return self.path / "models"

    @property
    def checkpoints(self) -> Path:
        """Where networks in training are kept."""
        return self.path / "checkpoints"

    @property
    def done(self) -> tuple[str, ...]:
        """The phases that were finished."""
        return tuple(self._record.get("done", ()))

    @property
    def record(self) -> dict[str, Any]:
        """The content of `run.json`."""
        return dict(self._record)

    def check(self, *, seed: int, task: str, config: Mapping[str, Any]) -> None:
        """Look whether the run in the folder, if there is one, can go on like this.

        Who takes part, where the server listens and how long it waits may change; what decides the result may
        not.

        Args:
            seed: of the run.
            task: digest of the task.
            config: see `described`.

        Raises:
            ConfigError: what may not change has changed; it is named.
        """
        if not self._record:
            return
        before = _decisive({"seed": self._record.get("seed"), "task file": self._record.get("task")})
        before |= _decisive(self._record.get("config", {}))
        now = _decisive({"seed": seed, "task file": task}) | _decisive(config)
        changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
        if changed:
            raise ConfigError(
                f"{self.path / 'run.json'}: the run has another {', '.join(changed)} than the one to resume "
                "it with; resume it as it was started, or begin a new run in another folder"
            )

    def start(self, **record: Any) -> None:
        """Make the folder and write `run.json` with what is known at the start, or go on with the run in it.

        Raises:
            ConfigError: as `check` says.
        """
        resumed = bool(self._record)
        if resumed:
            self.check(seed=record["seed"], task=record["task"], config=record["config"])
        self.path.mkdir(parents=True, exist_ok=True)
        for left_behind in self.path.glob(".updates-*"):  # of a round that was cut off
            shutil.rmtree(left_behind, ignore_errors=True)
        if resumed:
            self._record |= {
                "config": record["config"],
                "outcome": "running",
                "reason": None,
                "finished": None,
            }
        else:
            self._record = {
                **record,
                "started": self._time(),
                "done": [],
                "seconds": {},
                "outcome": "running",
            }
        self._save()
        self.event("run-resumed" if resumed else "run-started")

    def note(self, **record: Any) -> None:
        """Add to `run.json`."""
        self._record |= record
        self._save()

    def note_round(self, stage: str, **record: Any) -> None:
        """Add what a round of training took to `run.json`; a round that is done again takes its place."""
        rounds = self._record.get("rounds", {})
        before = [one for one in rounds.get(stage, []) if one["round"] < record["round"]]
        self.note(rounds=rounds | {stage: [*before, record]})

    def finish(self, outcome: Outcome, reason: str | None = None) -> None:
        """Write how the run ended."""
        self.note(finished=self._time(), outcome=outcome, reason=reason)
        self.event("run-finished", outcome=outcome, reason=reason)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the run: its events carry its name, its seconds go to `run.json`.

        A phase that was cut off before goes on: its seconds add up.
        """
        self._phase = name
        begin = time.monotonic()
        self.event("phase-started")
        done = list(self.done)
        try:
            yield
            done = done if name in done else [*done, name]
        finally:
            before = self._record.get("seconds", {})
            seconds = round(time.monotonic() - begin, 3)
            self.note(seconds=before | {name: round(before.get(name, 0.0) + seconds, 3)}, done=done)
            self.event("phase-finished", seconds=seconds)
            self._phase = None

    def learned(self, key: str, values: object) -> None:
        """Write into `statistics.json` what a phase came to."""
        self.statistics[key] = values
        self.write_json("statistics.json", self.statistics)

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
        write_json(self.path / name, values)

    def _save(self) -> None:
        self.write_json("run.json", self._record)

    def _time(self) -> str:
        return self._now().isoformat(timespec="milliseconds")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object that a run has written."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}), so the run cannot be resumed; restore the file or start anew"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: holds a {type(values).__name__}, expected an object; restore the file or start anew"
        )
    return values


def _drop_torn_line(path: Path) -> None:
    """A run that was killed while it wrote an event leaves half a line."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        content = file.read()
        file.truncate(content.rfind(b"\n") + 1)


def described(config: FederationConfig, task: Task) -> dict[str, Any]:
    """A configuration as `run.json` has it: the task's name in place of its file, which may move one day."""
    return config.model_dump(mode="json") | {"task": task.name}


def _decisive(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The keys that decide what a run comes to, those of tables with the table's name in front."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found |= _decisive(value, f"{name}.")
        elif not name.startswith(_CHANGEABLE) and key != "deadline":
            found[name] = value
    return found
