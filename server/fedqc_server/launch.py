"""`fedqc server`: everything a coordinator runs, started, watched and stopped by one command.

The gateway, Flower's server and the starter of its processes run beside this process. The run itself is led
by the ServerApp, which Flower starts; what it learns lies in the run's folder, and this process reads along.
When a part dies it is started again, and when the ServerApp dies the run goes on as a new run of Flower's,
from the last finished round.
"""

import contextlib
import fcntl
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedqc.certificates import check_site_key
from fedqc.config import FederationConfig, load_federation
from fedqc.degradation.samples import stored_shares
from fedqc.errors import ConfigError, RunError
from fedqc.files import LineReader
from fedqc.label_sources.making import SEGMENTER_SOURCES, segmenter_source
from fedqc.methods.base import get_method
from fedqc.segmentation import Segmentation
from fedqc.supervision import Service, stopping_at_the_end
from fedqc.task import load_task
from fedqc_server.gateway import gateway_service, write_configuration
from fedqc_server.limits import Limit
from fedqc_server.live import live_page
from fedqc_server.run_folder import Listener, RunFolder, described
from fedqc_server.superlink import SuperLink

PATIENCE = 60.0
"""Seconds for Flower's server to answer after it was started."""
GONE = 600.0
"""Seconds for it to come back after it died."""
TRIES_WITHOUT_PROGRESS = 3
"""So many runs of Flower in a row may end without a new event of ours."""
_LOOK = 0.5  # seconds between two looks
_ASK_FLOWER = 15.0  # seconds without news before Flower is asked how the run is

Say = Callable[[str], None]


@dataclass
class Follower:
    """Reads the events of a run as they are written."""

    folder: Path
    listener: Listener
    news: float = field(default_factory=time.monotonic)
    """When the last event came."""
    count: int = 0

    def __post_init__(self) -> None:
        self._lines = LineReader(self.folder / "events.jsonl")

    def read(self) -> None:
        """Hand on what is new."""
        for line in self._lines.read():
            self.news = time.monotonic()
            self.count += 1
            self.listener(json.loads(line))

    def skip(self) -> None:
        """Pass over what was there before."""
        self._lines.skip()


def serve(
    federation: Path, out: Path, *, seed: int, say: Say, listener: Listener, page: int | None = None
) -> None:
    """Lead a federation to its end, or go on with one that was cut off.

    Args:
        federation: the `federation.toml`.
        out: the run's folder; a run that is in it goes on.
        seed: of the run.
        say: is told what a person at the terminal should know.
        listener: is told every event of the run.
        page: port of the live page on 127.0.0.1, 0 for one that is free; None: there is none.

    Raises:
        ConfigError: the configuration cannot be used; nothing is started.
        FedQCError: the run failed; starting the same command again goes on with it.
        StopRequestedError: somebody stopped it.
    """
    config = load_federation(federation)
    keys, largest, task = site_keys(config), largest_reply(config), load_task(config.task)
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    out.chmod(0o700)  # updates of single sites pass through its database
    with _alone(out):
        folder = RunFolder(out, resume=True)
        if folder.record.get("outcome") == "completed":
            say(f"the run in {out} is completed already; for another one name another folder with --out")
            return
        folder.check(seed=seed, task=task.digest, config=described(config, task))
        told = {"federation": str(federation.resolve()), "out": str(out), "seed": seed, "resume": True}
        superlink, services = _parts(config, out, told, largest, say)
        with _watched(out, page, say), stopping_at_the_end(services):
            flowers, gateway = services[:2], services[2:]
            for service in flowers:
                service.start()
            _wait_until_up(superlink, services)
            superlink.stop_all()
            superlink.register(keys)
            for service in gateway:  # not before the sites are known, or they would be told that they are not
                service.start()
            is_open = config.server.gateway == "none"
            reached = superlink.address if is_open else config.server.address
            say(f"listening on {reached}; sites: {', '.join(sorted(keys))}; the run's folder is {out}")
            _lead(superlink, services, out, say, listener)


def _watched(folder: Path, port: int | None, say: Say) -> contextlib.AbstractContextManager[None]:
    """The live page, where one is wanted."""
    if port is None:
        return contextlib.nullcontext()
    return live_page(folder, port, lambda address: say(f"watch it on this machine: {address}"))


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse to lead a run that another process leads; the system lets go of the lock when that one ends."""
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{folder}: another fedqc server leads this run; --status says how it stands, and another "
                "folder is named with --out"
            ) from None
        yield


def _parts(
    config: FederationConfig, folder: Path, told: Mapping[str, Any], largest: Limit, say: Say
) -> tuple[SuperLink, list[Service]]:
    """Flower's server and all that has to run, in the order in which it is started."""
    server = config.server
    port = server.port if server.gateway == "none" else None
    superlink = SuperLink.prepare(folder / "flower", folder / "state.db", port=port)
    services = list(superlink.services(folder / "logs", told, largest))
    if server.gateway != "none":
        written = write_configuration(server, superlink.upstream, folder / "gateway", name=config.name)
        if server.gateway == "nginx":
            services.append(gateway_service(written, server))
        else:
            say(f"the gateway's configuration is in {written}; include it in the http block of your nginx")
    return superlink, services


def site_keys(config: FederationConfig) -> dict[str, Path]:
    """The public key of each expected site.

    Raises:
        ConfigError: no site is named, or a key is missing or none that Flower can use.
    """
    if not config.sites.expected:
        raise ConfigError(
            "[sites] expected is empty; a federation between machines names its sites, for each is let in by "
            "its own key"
        )
    keys = {site: config.sites.keys / f"{site}.pub" for site in config.sites.expected}
    missing = [str(path) for path in keys.values() if not path.is_file()]
    if missing:
        raise ConfigError(
            f"{', '.join(missing)}: there is no such file; put the public key there that fedqc init site "
            "made at the hospital, or take the site out of [sites] expected"
        )
    for path in keys.values():
        check_site_key(path)
    return keys


def largest_reply(config: FederationConfig) -> Limit:
    """The most that an honest site answers in a run: the largest of the networks that are trained.

    Raises:
        ConfigError: task, method or network cannot be used.
    """
    task = load_task(config.task)
    method, segmentation = (
        get_method(config.qc.method)(task, config.qc),
        Segmentation(task, config.segmentation),
    )
    sources = [
        segmenter_source(kind, task, config.qc.sources)
        for kind in stored_shares(config.qc.samples)
        if kind in SEGMENTER_SOURCES
    ]
    with torch.device("meta"):  # only sizes are asked for
        networks = [method.build(0), segmentation.build(0)]
        networks += [source.build(variant, 0) for source in sources for variant in source.variants]
        states = [network.state_dict() for network in networks]
    return max(
        (Limit.of(sum(values.nbytes for values in state.values()), len(state)) for state in states),
        key=lambda limit: limit.size,
    )


def _wait_until_up(superlink: SuperLink, services: list[Service]) -> None:
    end = time.monotonic() + PATIENCE
    while not superlink.is_up():
        if time.monotonic() > end or not services[0].is_running:
            raise RunError(f"Flower's server does not start; {_end_of(services[0])}")
        time.sleep(_LOOK)


def _lead(superlink: SuperLink, services: list[Service], folder: Path, say: Say, listener: Listener) -> None:
    """Have Flower run the ServerApp until the run is at its end."""
    follower = Follower(folder, listener)
    follower.skip()
    log = folder / "logs" / "serverapp.log"
    tries = 0
    while tries < TRIES_WITHOUT_PROGRESS:
        before, ended = follower.count, _record(folder).get("finished")
        run_id = superlink.submit()
        _follow(superlink, services, run_id, follower, say)
        record = _record(folder)
        is_new = record.get("finished") != ended  # else that is how the run before ended
        if is_new and record.get("outcome") == "completed":
            return
        superlink.keep_log(run_id, log)
        if is_new and record.get("outcome") == "failed":
            raise RunError(f"{record.get('reason')}; start the same command again to go on")
        tries = tries + 1 if follower.count == before else 0
        say("the run was cut off; it goes on from the last finished round")
    raise RunError(f"the run ended {tries} times in a row before anything was done; {log} says why")


def _follow(superlink: SuperLink, services: list[Service], run_id: str, follower: Follower, say: Say) -> None:
    """Watch one run of Flower's until it ended, and keep the services alive meanwhile.

    Raises:
        RunError: Flower's server does not come back.
    """
    ended = _record(follower.folder).get("finished")
    asked = heard = time.monotonic()
    while True:
        for service in services:
            status = service.tend()
            if status is not None:
                say(f"{service.name} ended with status {status}; it is started again")
        follower.read()
        now = time.monotonic()
        is_over = _record(follower.folder).get("finished") not in (ended, None)
        if is_over or now - max(asked, follower.news) > _ASK_FLOWER:
            asked = now
            finished = _is_finished(superlink, run_id)
            silent = now - max(heard, follower.news)
            if finished is None and silent > (_ASK_FLOWER if is_over else GONE):
                if is_over:
                    return
                raise RunError(f"Flower's server does not come back; {_end_of(services[0])}")
            if finished:
                follower.read()
                return
            if finished is not None:
                heard = now
        time.sleep(_LOOK)


def _is_finished(superlink: SuperLink, run_id: str) -> bool | None:
    """Whether Flower says that a run is over; None where it says nothing, as while it starts again."""
    try:
        return superlink.status(run_id).startswith(("finished", "unknown"))
    except RunError:
        return None


def _end_of(service: Service) -> str:
    """Where its log is, and the last line of it."""
    return f"{service.log} says why, at its end: {service.last_words(1).strip() or 'nothing'}"


def _record(folder: Path) -> Mapping[str, Any]:
    """`run.json`, where it is there."""
    try:
        values: dict[str, Any] = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values
