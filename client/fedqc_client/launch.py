"""`fedqc client`: connects a site with its coordinator and keeps it connected until it is stopped.

Flower's SuperNode runs beside this process, asks the coordinator for work over a connection that it opens,
and starts a process of ours for each message. Whatever leaves goes through `fedqc_client.guard`.
"""

import contextlib
import http.client
import json
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from fedqc.config import SiteConfig, load_site
from fedqc.credentials import credential_problems
from fedqc.errors import ConfigError
from fedqc.files import LineReader
from fedqc.supervision import Service, stopping_at_the_end
from fedqc_client.activity import ACTIVITY
from fedqc_client.supernode import meaning_of, news_of, supernode_services

CLOCK_BEHIND, CLOCK_AHEAD = -305.0, 5.0
"""Seconds that this machine's clock may be off the coordinator's: a signature counts until 305 s after it was
made by the coordinator's clock, and not more than 5 s before."""
_LOOK = 0.5  # seconds between two looks
_NEWS = 10.0  # seconds for which something is news to whoever starts to look

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


def serve_site(site_file: Path, *, say: Say, progress: Progress) -> None:
    """Take part in a federation until somebody stops it.

    Args:
        site_file: the `site.toml`.
        say: is told what a person at the terminal should know.
        progress: is told what is worked on, how much of it is done, and of how much.

    Raises:
        ConfigError: the configuration, key or certificate cannot be used; nothing is started.
        StopRequestedError: somebody stopped it.
    """
    site = load_site(site_file)
    check_credentials(site)
    say(greeting(site))
    services = supernode_services(site, site_file)
    activity = ActivityFollower(site.results / ACTIVITY, say, progress)
    connection = ConnectionFollower(services[0].log, say)
    with stopping_at_the_end(services):
        for service in services:
            service.start()
        while True:
            for service in services:
                _tend(service, say)
            connection.read()
            activity.read()
            time.sleep(_LOOK)


def check_credentials(site: SiteConfig) -> None:
    """Refuse to start without what the coordinator and the site know each other by.

    Raises:
        ConfigError: with what is missing, or who else may read the key.
    """
    values = site.coordinator.model_dump()
    missing = [f"[coordinator] {key}" for key in ("address", "ca", "key") if values[key] is None]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: missing in site.toml; the coordinator tells the address and sends the "
            "certificate, fedqc init site makes the key"
        )
    if problems := credential_problems(site.coordinator):
        raise ConfigError("; ".join(map(str, problems)))


def greeting(site: SiteConfig) -> str:
    """One look at the coordinator before Flower's program is started.

    Returns:
        What was seen. A coordinator that cannot be reached now may be there later.

    Raises:
        ConfigError: it is somebody else, or the clocks differ so much that no signature would count.
    """
    address = site.coordinator.address
    try:
        trusted = ssl.create_default_context(cafile=str(site.coordinator.ca))
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"{site.coordinator.ca}: is no certificate ({error}); ask the coordinator for ca.crt"
        ) from None
    request = urllib.request.Request(f"https://{address}/", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:  # noqa: S310
            date = answer.headers.get("Date")
    except urllib.error.HTTPError as refused:  # as it should be: nothing is to be seen there
        date = refused.headers.get("Date")
        refused.close()
    except urllib.error.URLError as error:
        if isinstance(error.reason, ssl.SSLCertVerificationError):
            raise ConfigError(
                f"{address}: {meaning_of('CERTIFICATE_VERIFY_FAILED')} ({error.reason.verify_message})"
            ) from None
        return f"{address} cannot be reached now ({error.reason}); it is tried again until it can"
    except (OSError, http.client.HTTPException) as error:
        return f"{address} cannot be reached now ({error!r}); it is tried again until it can"
    with contextlib.suppress(TypeError, ValueError):  # no date, or none that can be read
        ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds()
        if not CLOCK_BEHIND <= ahead <= CLOCK_AHEAD + 1:  # the date has whole seconds, cut off
            way = "ahead of" if ahead > 0 else "behind"
            raise ConfigError(
                f"this machine's clock is {abs(ahead):.0f} s {way} the coordinator's, and no signature would "
                "count; set it by NTP (timedatectl set-ntp true)"
            )
    return f"{address} answers, its certificate is vouched for, the clocks agree"


class ConnectionFollower:
    """Says whether the site is connected, from the log of Flower's program."""

    def __init__(self, log: Path, say: Say) -> None:
        self._lines = LineReader(log)
        self._lines.skip()
        self._say = say
        self._said: str | None = None

    def read(self) -> None:
        """Say what is new; the same is not said twice in a row."""
        for line in self._lines.read():
            news = news_of(line.decode("utf-8", "replace"))
            if news not in {None, self._said}:
                self._said = news
                self._say(str(news))


@dataclass
class ActivityFollower:
    """Shows what `fedqc_client.activity` writes down about messages as they come and go."""

    path: Path
    say: Say
    progress: Progress
    _seen: str | None = None
    _said: tuple[str, ...] = ()
    """What was shown of the latest work's notes."""

    def read(self) -> None:
        """Show what is new."""
        try:
            text = self.path.read_text(encoding="utf-8")
            now: dict[str, Any] = json.loads(text)
        except (OSError, ValueError):
            return
        before, self._seen = self._seen, text
        if text == before:
            return
        if before is None and _age(now) > _NEWS:  # of a time before
            return
        notes = tuple(f"{what_is_done(now)}: {note}" for note in now["notes"])
        # Notes of other work are all new, however many there were before.
        is_same = self._said == notes[: len(self._said)]
        for note in notes[len(self._said) if is_same else 0 :]:
            self.say(note)
        self._said = notes
        if now["state"] != "working":
            self.say(in_words(now))
        elif "total" in now:
            self.progress(what_is_done(now), now["done"], now["total"])


def what_is_done(activity: dict[str, Any]) -> str:
    """The phase, and the round of it."""
    what = str(activity["kind"])
    if activity["round"]:
        what += f", round {activity['round']}"
        if activity["rounds"]:
            what += f" of {activity['rounds']}"
    return what


def in_words(activity: dict[str, Any]) -> str:
    """What the site was asked or sends, as a line."""
    moment = datetime.fromisoformat(activity["time"]).astimezone().strftime("%H:%M:%S")
    what = what_is_done(activity)
    if activity["state"] == "asked":
        return f"{moment} {what}: asked by {activity['to']}, working"
    if activity["state"] == "failed":
        return f"{moment} {what}: could not be done: {activity['why']} (the coordinator learns one word)"
    return f"{moment} {what}: sends {', '.join(activity['records'])}, {activity['bytes']} bytes"


def _age(activity: dict[str, Any]) -> float:
    """Seconds since it was written down."""
    return (datetime.now(UTC) - datetime.fromisoformat(activity["time"])).total_seconds()


def _tend(service: Service, say: Say) -> None:
    status = service.tend()
    if status is not None:
        say(meaning_of(service.last_words()))
