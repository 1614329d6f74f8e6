"""The coordinator's live page: how the run stands, seen on 127.0.0.1 while it goes on.

Everything comes from the run's folder, so that it shows what is there, also behind a restart: the events as
they are written, and the report made of what the run has learned so far.
"""

import contextlib
import json
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from fedqc.files import LineReader
from fedqc.loopback import LoopbackPage, Server, listening
from fedqc.reports.build import build_coordinator_report
from fedqc.reports.words import reason_in_words, stage_in_words

STATIC = Path(__file__).parent / "static"
LAST_EVENTS = 12
_ROUNDS_FOR_PACE = 5
_IDLE = {"time", "event"}
"""Keys of an event that say nothing of their own."""
_FAILED = {"site-failed", "site-left-out", "site-out"}
_HEARD = {"site-joined", "statistics-received", "update-received"}


@dataclass
class Site:
    """What is known of a site."""

    state: str = "awaited"
    seen: str | None = None
    """When it was heard of last."""
    what: str = ""
    """What it did last, or what is wrong."""


@dataclass
class Training:
    """One network in training."""

    title: str
    rounds: int = 0
    done: int = 0
    losses: list[float | None] = field(default_factory=list)
    """Mean over the sites, round by round; None where none told it."""
    seconds: list[float] = field(default_factory=list)
    """Of the rounds of this start."""


class Watch:
    """How a run stands, by its events.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines = LineReader(folder / "events.jsonl")
        self._lock = threading.Lock()
        self._sites: dict[str, Site] = {}
        self._trainings: dict[str, Training] = {}
        self._begun: dict[str, str] = {}
        self._events: list[dict[str, Any]] = []
        self._phase: str | None = None
        self._stage: str | None = None

    def now(self) -> dict[str, Any]:
        """How it stands now, for the page."""
        with self._lock:
            for line in self._lines.read():
                with contextlib.suppress(ValueError):  # not a whole line
                    self._take(json.loads(line))
            run = _json(self._folder / "run.json")
            training = self._trainings.get(self._stage or "")
            return {
                "federation": run.get("federation", self._folder.name),
                "started": run.get("started"),
                "finished": run.get("finished"),
                "outcome": run.get("outcome", "not begun"),
                "reason": run.get("reason"),
                "done": list(run.get("done", ())),
                "phase": self._phase,
                "training": asdict(training) if training else None,
                "seconds_left": _seconds_left(training) if training else None,
                "sites": {name: asdict(site) for name, site in sorted(self._sites.items())},
                "trainings": {stage: asdict(one) for stage, one in self._trainings.items()},
                "events": self._events[-LAST_EVENTS:],
                "now": datetime.now(UTC).isoformat(timespec="seconds"),
            }

    def _take(self, event: dict[str, Any]) -> None:
        """Note what an event tells."""
        name, stage = event.get("event"), str(event.get("stage", ""))
        if name == "phase-started":
            self._phase, self._stage = event.get("phase"), None
        elif name == "round-started":
            self._stage = stage
            training = self._trainings.setdefault(stage, Training(stage_in_words(stage)))
            training.rounds, training.done = int(event.get("rounds", 0)), int(event.get("round", 1)) - 1
            del training.losses[training.done :]  # a round that was cut off is done again
            self._begun[stage] = str(event.get("time"))
        elif name == "round-finished" and stage in self._trainings:
            training = self._trainings[stage]
            training.done = int(event.get("round", 0))
            training.losses.append(event.get("loss"))
            training.seconds.append(_seconds(self._begun[stage], str(event.get("time"))))
        elif name == "run-finished":
            self._phase = self._stage = None
        self._take_site(event)
        details = {key: value for key, value in event.items() if key not in _IDLE}
        self._events.append({"time": event.get("time"), "event": name, "details": details})
        del self._events[:-LAST_EVENTS]

    def _take_site(self, event: dict[str, Any]) -> None:
        name = event.get("event")
        if name == "sites-awaited":
            for missing in event.get("missing", ()):
                self._sites.setdefault(str(missing), Site())
        if event.get("site") is None:
            return
        site = self._sites.setdefault(str(event["site"]), Site())
        if name in _HEARD:
            site.state, site.seen = "there", event.get("time")
            round_ = f", round {event['round']}" if event.get("round") else ""
            site.what = f"{event.get('phase')}{round_}"
        elif name in _FAILED:
            site.state = "left out" if name != "site-failed" else "failed"
            meaning = event.get("meaning") or reason_in_words(str(event.get("reason", "")))
            site.what = f"{event.get('phase')}: {meaning}"
        elif name == "site-suspected":
            site.what = "its references are not trusted"


class LivePage:
    """The page of a run.

    Args:
        folder: of the run.
        port: on which it is served, on 127.0.0.1.
    """

    def __init__(self, folder: Path, port: int) -> None:
        self._folder = folder
        self._watch = Watch(folder)
        self._report: tuple[list[str], str] | None = None
        self._making = threading.Lock()
        page = LoopbackPage(
            port, {f"page{ending}": STATIC / f"live{ending}" for ending in (".html", ".css", ".js")}
        )
        self.address = page.address
        """To open once."""
        self.app = page.app(
            [Route("/api/now", page.known(self._now)), Route("/api/report", page.known(self._made_report))]
        )

    async def _now(self, request: Request) -> Response:
        del request
        return JSONResponse(await run_in_threadpool(self._watch.now))

    async def _made_report(self, request: Request) -> Response:
        del request
        return PlainTextResponse(await run_in_threadpool(self._current_report))

    def _current_report(self) -> str:
        """The report of what the run has learned so far, made anew behind each phase."""
        with self._making:
            run = _json(self._folder / "run.json")
            basis = [*run.get("done", ()), str(run.get("outcome"))]
            if self._report is None or self._report[0] != basis:
                with tempfile.TemporaryDirectory() as folder:  # the run writes its own
                    path = Path(folder) / "report.html"
                    build_coordinator_report(self._folder, path, numbers=None)  # the page serves no files
                    self._report = (basis, path.read_text(encoding="utf-8"))
            return self._report[1]


@contextlib.contextmanager
def live_page(folder: Path, port: int, opened: Callable[[str], None]) -> Iterator[None]:
    """Serve the page while something else goes on.

    Args:
        folder: of the run.
        port: on 127.0.0.1; 0: one that is free.
        opened: told the address, which works once.

    Raises:
        ConfigError: the port is taken.
    """
    with listening(port, "--page-port") as found:
        page = LivePage(folder, found.getsockname()[1])
        server = Server(page.app, lambda: opened(page.address))
        thread = threading.Thread(target=server.run, args=([found],), daemon=True)
        thread.start()
        try:
            yield
        finally:
            server.should_exit = True
            thread.join(timeout=5)


def _seconds_left(training: Training) -> float | None:
    """Until a training is at its end, at the pace of its last rounds."""
    if not training.seconds or training.done >= training.rounds:
        return None
    pace = statistics.median(training.seconds[-_ROUNDS_FOR_PACE:])
    return pace * (training.rounds - training.done)


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()


def _json(path: Path) -> Mapping[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
