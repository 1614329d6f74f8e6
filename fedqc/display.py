"""What a person sees of long work: bars with the time left, or plain lines without a terminal."""

import time
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines about the same work."""


class Display:
    """Shows progress; use it as a context manager around the work."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._last_line: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        """Say how much of some work is done."""
        if self.console.is_terminal:
            if what not in self._tasks:
                self._tasks[what] = self._bars.add_task(what, total=total, note=note)
            self._bars.update(self._tasks[what], completed=done, total=total, note=note)
            return
        now = time.monotonic()
        if done == total or now - self._last_line.get(what, -PLAIN_INTERVAL) >= PLAIN_INTERVAL:
            self._last_line[what] = now
            self.say(f"{what}: {done} of {total} {note}".rstrip())

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def listen(self, event: dict[str, Any]) -> None:
        """Show an event of a run."""
        match event["event"]:
            case "phase-started":
                if event["phase"] != "train":
                    self.say(f"phase {event['phase']}")
            case "round-started":
                self.progress("training the QC model, rounds", event["round"] - 1, event["rounds"])
            case "update-accepted" if self.console.is_terminal:
                note = f"{event['site']} is done"
                self.progress("training the QC model, rounds", event["round"] - 1, event["rounds"], note)
            case "round-finished":
                loss = "" if event.get("loss") is None else f"loss {event['loss']:.3f}"
                self.progress("training the QC model, rounds", event["round"], event["rounds"], loss)
            case "site-failed" | "site-left-out":
                round_ = f", round {event['round']}" if "round" in event else ""
                reason = event.get("meaning") or event["reason"]
                self.say(f"{event['site']} ({event['phase']}{round_}): {reason}")
