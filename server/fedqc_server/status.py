"""`fedqc server --status`: how a run stands, seen from another terminal."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fedqc.errors import ConfigError
from fedqc_server.superlink import SuperLink

_LAST_EVENTS = 8


def status_lines(folder: Path) -> Iterator[str]:
    """How the run in a folder stands, as lines for people.

    Raises:
        ConfigError: there is no run in the folder.
    """
    try:
        record: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ConfigError(
            f"{folder}: holds no run that can be read; name the run's folder with --out"
        ) from None
    superlink = SuperLink.running(folder / "flower", folder / "state.db")
    is_up = superlink is not None and superlink.is_up()
    yield f"federation {record['federation']}, begun {record['started']}"
    yield f"server: {'up' if is_up else 'not running; start it with fedqc server to go on'}"
    if superlink is not None and is_up:
        yield f"sites now: {', '.join(f'{name} {state}' for name, state in superlink.sites().items())}"
    outcome, reason = record.get("outcome"), record.get("reason")
    yield f"run: {outcome}{f' ({reason})' if reason else ''}"
    yield f"phases done: {', '.join(record.get('done', ())) or 'none'}"
    sites = record.get("sites", {})
    yield f"sites that joined: {', '.join(sites.get('joined', ())) or 'none yet'}"
    for site, why in sites.get("left_out", {}).items():
        yield f"left out: {site} ({why})"
    yield "last events:"
    for event in _events(folder / "events.jsonl"):
        what = {key: value for key, value in event.items() if key not in ("time", "event")}
        details = ", ".join(f"{key} {value}" for key, value in what.items())
        yield f"  {event['time'][:19]} {event['event']}{f': {details}' if details else ''}"


def _events(path: Path) -> list[dict[str, Any]]:
    """The last events that were written whole."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()[-_LAST_EVENTS:]
    except OSError:
        return []
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:  # half a line, which is being written
            continue
    return events
