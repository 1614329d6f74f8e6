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
        self._begun: dict[str, tuple[float, int]] = {}
        self._done: dict[str, int] = {}

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
        if done < self._done.get(what, total + 1):  # the first time, or the same work once more
            self._begun[what] = (now, done)
        self._done[what] = done
        if done == total or now - self._last_line.get(what, -PLAIN_INTERVAL) >= PLAIN_INTERVAL:
            self._last_line[what] = now
            parts = (f"{what}: {done} of {total}", note, self._time_left(what, done, total, now))
            self.say(", ".join(part for part in parts if part))

    def _time_left(self, what: str, done: int, total: int, now: float) -> str:
        """How long it will still take at the pace so far; nothing before there is a pace."""
        begin, done_before = self._begun[what]
        if not done_before < done < total:
            return ""
        seconds = (now - begin) / (done - done_before) * (total - done)
        return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"

    def say(self, line: str) -> None:
        """One line that stays."""
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def listen(self, event: dict[str, Any]) -> None:
        """Show an event of a run."""
        match event["event"]:
            case "phase-started" if "arm" not in event:
                self.say(f"phase {event['phase']}")
            case "round-started":
                self.progress(_training(event), event["round"] - 1, event["rounds"])
            case "update-received" if self.console.is_terminal:
                self.progress(
                    _training(event), event["round"] - 1, event["rounds"], f"{event['site']} is done"
                )
            case "round-finished":
                loss = "" if event.get("loss") is None else f"loss {event['loss']:.3f}"
                self.progress(_training(event), event["round"], event["rounds"], loss)
            case "site-failed" | "site-left-out" | "site-excused":
                round_ = f", round {event['round']}" if "round" in event else ""
                self.say(f"{event['site']} ({event['phase']}{round_}): {event['meaning']}")
            case "phase-skipped":
                self.say(f"phase {event['phase']} is skipped: {event['reason']}")
            case "sites-awaited":
                there, missing = (", ".join(event[key]) or "nobody" for key in ("online", "missing"))
                minutes = event["seconds"] / 60
                self.say(f"there: {there}; missing: {missing}; waiting for {minutes:.0f} min at most")
            case "site-out":
                self.say(f"{event['site']} ({event['phase']}): out after three failed rounds in a row")
            case "site-suspected":
                self.say(
                    f"{event['site']}: its references look wrong to a model that never saw them "
                    f"(predicted DSC {event['quality']:.2f}, other sites {event['others']:.2f}); not used"
                )


def _training(event: dict[str, Any]) -> str:
    """What is trained in an event's round."""
    from fedqc.reports.words import stage_in_words  # noqa: PLC0415 - loads Flower, which runs have loaded

    what = f"training: {stage_in_words(event['stage'])}"
    return f"{what} ({event['arm']}), rounds" if "arm" in event else f"{what}, rounds"
