"""What a run's folder tells its coordinator, and the sentences about it that several sections need."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedqc.curation.calibration import Calibration
from fedqc.reports import figures
from fedqc.reports.page import Note
from fedqc.reports.words import plural, reason_in_words

OUTCOMES = ("keep", "review", "drop")
FAULTS = {
    "site-left-out": "left out of the run",
    "site-failed": "gave no usable answer",
    "site-out": "out of this phase after three rounds in a row without it",
    "site-suspected": "its references look wrong",
    "site-excused": "takes no part in this phase, no fault of its own",
}
"""Events that cost a site something, and what they say."""


@dataclass(frozen=True)
class RunRecord:
    """What a run's folder holds; whatever is missing is empty."""

    run: dict[str, Any]
    statistics: dict[str, Any]
    faults: tuple[dict[str, Any], ...] = ()
    """The events that cost a site something, in their order."""
    last_phase: str | None = None
    """The phase that started last."""
    last_round: tuple[int, int] | None = None
    """The round that started last in it, and how many were planned."""
    check_skipped: str | None = None
    """Why the references were not cross-checked."""
    resumed: int = 0
    """How often the run was taken up again."""
    sites: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What each site told, by phase; those that joined first, then any other."""

    @property
    def config(self) -> dict[str, Any]:
        """The configuration of the run."""
        config: dict[str, Any] = self.run.get("config", {})
        return config

    @property
    def joined(self) -> list[str]:
        """The sites that took part."""
        return list(self.run.get("sites", {}).get("joined", ()))

    @property
    def left_out(self) -> dict[str, str]:
        """The sites that did not, with the reason."""
        return dict(self.run.get("sites", {}).get("left_out", {}))

    @property
    def min_count(self) -> int | None:
        """Fewest patients behind a number that a site tells."""
        found: int | None = self.config.get("privacy", {}).get("min_count")
        return found

    @property
    def threshold(self) -> float | None:
        """The lowest predicted DSC that is not dropped."""
        found: float | None = self.config.get("curation", {}).get("threshold")
        return found

    @property
    def calibration(self) -> Calibration | None:
        """Labels of known quality by predicted quality, over all sites that may tell of them."""
        counts = self.statistics.get("calibration") or {}
        return Calibration(**counts) if any(map(any, counts.values())) else None

    def told(self, phase: str) -> dict[str, dict[str, Any]]:
        """What each site told in a phase, for those that told anything."""
        return {site: phases[phase] for site, phases in self.sites.items() if phases.get(phase)}


_READ = re.compile(
    "|".join(('-started"', '"phase-skipped"', '"run-resumed"', *(f'"{one}"' for one in FAULTS)))
)
"""In the lines of `events.jsonl` that a report rests on; nearly all others are of single updates."""


def read_run(folder: Path) -> RunRecord:
    """Read what a run has written so far; a run may have ended anywhere."""
    run, statistics = _json(folder / "run.json"), _json(folder / "statistics.json")
    faults, last_phase, last_round, check_skipped, resumed = [], None, None, None, 0
    for event in _events(folder / "events.jsonl"):
        name = event.get("event")
        if name in FAULTS:
            faults.append(event)
        elif name == "phase-started":
            last_phase, last_round = event.get("phase"), None
        elif name == "round-started":
            last_round = (event.get("round", 0), event.get("rounds", 0))
        elif name == "phase-skipped" and event.get("phase") == "cross-check":
            check_skipped = event.get("reason")
        elif name == "run-resumed":
            resumed += 1
    told = statistics.get("sites", {})
    names = [*run.get("sites", {}).get("joined", ()), *told]
    sites = {name: told.get(name, {}) for name in dict.fromkeys(names)}
    return RunRecord(run, statistics, tuple(faults), last_phase, last_round, check_skipped, resumed, sites)


def decisions(scored: Mapping[str, Any]) -> dict[str, int | None]:
    """How many annotations of a site are kept, in review and dropped; None is a number it may not tell."""
    told = {outcome: scored.get(f"decisions.{outcome}") for outcome in OUTCOMES}
    known = sum(number_of for number_of in told.values() if number_of is not None)
    # An outcome that nobody has is not told either; where the others are everybody, it is 0.
    missing = 0 if known == scored.get("candidates") else None
    return {outcome: missing if one is None else one for outcome, one in told.items()}


def ending_sentence(record: RunRecord) -> str:
    """How a run ended that did not end well; empty where it completed."""
    outcome, reason = record.run.get("outcome"), record.run.get("reason")
    where = ""
    if record.last_phase:
        where = f" in phase {record.last_phase}"
        if record.last_round:
            where += f", round {record.last_round[0]} of {record.last_round[1]}"
    if outcome == "completed":
        return ""
    if outcome == "failed":
        return f"The run failed{where}."
    if outcome == "interrupted":
        return f"The run was interrupted{where}."
    if outcome is None:
        return "There is no run.json: the run never started, or this is not a run's folder."
    return (
        f"The run has not ended: it is still at work{where}, or was killed there ({reason or 'no reason'})."
    )


def dash(record: RunRecord) -> str:
    """What a dash means in the tables and figures of a run."""
    if record.min_count is None:
        return "A dash is a number that was not told."
    return (
        f"A dash is a number that was not told, mostly for fewer than {record.min_count} patients behind it."
    )


def not_reached(record: RunRecord, phase: str) -> Note:
    """Why there is nothing from a phase."""
    failed = record.statistics.get("failed", {}).get(phase, {})
    if failed:
        reasons = Counter(reason_in_words(reason) for reason in failed.values())
        why = "; ".join(f"{plural(times, 'site')}: {reason}" for reason, times in reasons.items())
        return Note(f"No site answered in phase {phase} ({why}).", "bad")
    return Note(f"Nothing to show: the run has nothing from phase {phase}. {ending_sentence(record)}".strip())


def first(sites: Mapping[str, object]) -> list[str]:
    """The sites that figures and tables show."""
    return list(sites)[: figures.MOST_NAMES]


def more(sites: Mapping[str, object], most: int = figures.MOST_NAMES) -> str:
    """Says so where not all sites are shown."""
    if len(sites) <= most:
        return ""
    return f" The first {most} of {len(sites)} sites are shown; `statistics.json` has all."


def around(
    mean: float | None, sd: float | None, highest: float = math.inf
) -> tuple[float | None, float | None]:
    """One standard deviation to each side of a mean, as far as there can be values."""
    return (None, None) if mean is None or sd is None else (max(0.0, mean - sd), min(highest, mean + sd))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def _events(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of `events.jsonl`; the last one of a killed run may be half."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not _READ.search(line):
                continue
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event
