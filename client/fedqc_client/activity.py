"""What a site is doing right now, for people who watch it; nothing depends on it.

Flower starts a process for each message, so what that process does goes to whoever watches through a file.
"""

import contextlib
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fedqc.config import SiteConfig
from fedqc.files import write_json
from fedqc.protocol import Request

ACTIVITY = "activity.json"
"""In the site's results: the last message that came or went, and how far the work on it is."""
_INTERVAL = 1.0  # seconds between two notes of progress


@dataclass
class Activity:
    """The work on one message."""

    results: Path
    """Folder of the site's results."""
    kind: str
    """Type of the message."""
    to: str = "unknown"
    """The federation."""
    round: int = 0
    rounds: int | None = None
    _notes: list[str] = field(default_factory=list)
    _told: float = 0.0

    @classmethod
    def of(cls, results: Path, request: Request) -> "Activity":
        """The work on a request."""
        rounds = getattr(request, "rounds", None)
        return cls(results, request.kind, request.federation, request.round, rounds)

    @classmethod
    def at(cls, site: SiteConfig, request: Request) -> "Activity":
        """The work of a site on a request: what the guard began, where it did."""
        now, another = _NOW.get(), cls.of(site.results, request)
        is_same = now is not None and (now.results, now.kind, now.round) == (
            another.results,
            another.kind,
            another.round,
        )
        return now if now is not None and is_same else another

    def begin(self) -> None:
        """The work of this process, from now on."""
        _NOW.set(self)
        self.tell("asked")

    def tell(self, state: str, **more: Any) -> None:
        """Write down where the work is: `asked`, `working`, `sent` or `failed`."""
        values = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "kind": self.kind,
            "to": self.to,
            "round": self.round,
            "rounds": self.rounds,
            "notes": self._notes,
            "state": state,
        }
        with contextlib.suppress(OSError):
            write_json(self.results / ACTIVITY, {**values, **more})

    def progress(self, done: int, total: int) -> None:
        """Say how much of the work is done; most calls are passed over."""
        now = time.monotonic()
        if done == total or now - self._told >= _INTERVAL:
            self._told = now
            self.tell("working", done=done, total=total)

    def note(self, text: str) -> None:
        """Say something that a person should know."""
        self._notes.append(text)
        self.tell("working")


_NOW: ContextVar[Activity | None] = ContextVar("fedqc_activity", default=None)
