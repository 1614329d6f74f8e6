"""A federation on Flower's simulation engine: sites that are asked at once work at once, in processes of Ray.

The ServerApp stays in this process, so its errors and its events need no way back. Flower's runtime (the
links' state, the queues, the Ray actors that call the ClientApp) works beside it in a thread. Flower's own
ways in are left aside: `flwr run` leaves a server behind, `run_simulation` is deprecated, reports its use and
waits for a site's work to end before it stops.
"""

import contextlib
import importlib
import importlib.util
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from fedqc_client.app import app as client_app
from fedqc_server.run_folder import Listener
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.common.constant import (
    HEARTBEAT_INTERVAL_INF,
    NOOP_ACCOUNT_NAME,
    NOOP_FLWR_AID,
    PARTITION_ID_KEY,
    SUPERLINK_NODE_ID,
)
from flwr.proto.task_pb2 import Task
from flwr.server.superlink.fleet.vce import start_vce
from flwr.server.superlink.fleet.vce.metrics import VceMetrics
from flwr.server.superlink.linkstate import InMemoryLinkState, LinkStateFactory
from flwr.server.superlink.linkstate.in_memory_linkstate import RunRecord
from flwr.serverapp import Grid
from flwr.supercore.constant import FLWR_IN_MEMORY_DB_NAME, NOOP_FEDERATION_ID
from flwr.supercore.object_store import ObjectStoreFactory
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.federation import NoOpFederationManager
from flwr.superlink.grid import InMemoryGrid

from fedqc.errors import ConfigError, FedQCError, RunError
from fedqc_simulations.engine import lead, run_config

_RUN, _TASK = 1, 1
_LOOPBACK = "127.0.0.1"
# What Ray reads when it is imported and when it starts; its processes inherit it.
_ENVIRONMENT = {
    # Off, Ray listens on the loopback address; on, which is its default on Linux, on every address.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Whoever may talk to Ray may run code as this user, and others may work on this machine. Ray keeps the
    # token for as long as the process lives, so there is one for all runs.
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # the priority of this process, not a low one
    # Every worker sees the same GPUs; `compute.device` of a site decides, as with the other engine.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}


class SitesApp(ClientApp):
    """The ClientApp of all sites, as the workers get it: Flower numbers the nodes, this knows their files.

    Args:
        files: `site.toml` of each site, in the order of Flower's numbers.
        threads: CPU threads of a worker.
        stop: the worker ends, whatever it is at, when this file appears.
    """

    def __init__(self, files: Sequence[Path], *, threads: int, stop: Path) -> None:
        super().__init__()
        self._files = [file.resolve() for file in files]
        self._threads = threads
        self._stop = stop

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer for the site that the message went to."""
        _end_with(self._stop)
        torch.set_num_threads(self._threads)
        site = self._files[int(context.node_config[PARTITION_ID_KEY])]
        context.node_config["site"] = str(site)
        return client_app(message, context)


def check_ray() -> None:
    """Refuse to go on where Ray is not installed.

    Raises:
        ConfigError: it is not.
    """
    if importlib.util.find_spec("ray") is None:
        raise ConfigError("engine ray: Ray is not installed; pip install 'fedqc[ray]', or use --engine local")


def run_ray(
    federation: Path,
    sites: Mapping[str, Path],
    out: Path,
    *,
    seed: int,
    workers: int,
    threads: int | None = None,
    resume: bool = False,
    phases: Sequence[str] = (),
    listener: Listener | None = None,
) -> None:
    """Run a whole federation with the sites in worker processes; none is left when this returns or raises.

    A deadline counts for all sites of a phase together, as in a hospital's federation: with fewer workers
    than sites it must be long enough for the sites that wait for a worker.

    Args:
        federation: the `federation.toml`.
        sites: `site.toml` of each site, by name.
        out: the run's folder. What Flower and Ray have to complain about goes to `ray.log` in it.
        seed: seed of the run.
        workers: processes; never more than there are sites.
        threads: CPU threads of all workers together; None is what this process would use.
        resume: go on with the run that the folder may hold.
        phases: the phases wanted; all of them where none is named.
        listener: is told every event, in this process and thread.

    Raises:
        ConfigError: Ray is not installed.
        FedQCError: whatever ends the run.
    """
    check_ray()
    names = sorted(sites)
    workers = min(workers, len(names))
    each = max(1, (threads or torch.get_num_threads()) // workers)
    with tempfile.TemporaryDirectory(prefix="fedqc-", dir=_short(), ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        stop = folder / "stop"
        app = SitesApp([sites[name] for name in names], threads=each, stop=stop)
        with (
            _complaints(folder / "ray.log", out, stop),
            _ray(workers, folder),
            _runtime(app, names, stop) as grid,
        ):
            lead(grid, run_config(federation, out, seed=seed, resume=resume, phases=phases), listener)


def _short() -> str:
    """Where temporary folders go, unless Ray's sockets would get paths longer than systems allow there."""
    usual = tempfile.gettempdir()
    # 104 characters on macOS, of which Ray and the folder's own name take 79.
    return usual if len(usual) <= 25 else "/tmp"  # noqa: S108 - the folder made in it is ours alone


@contextmanager
def _ray(workers: int, folder: Path) -> Iterator[None]:
    """Ray on this machine alone, for as long as the block lasts.

    Raises:
        RunError: it does not start, or other machines could reach it.
    """
    with _environment(_ENVIRONMENT), _on(signal.SIGTERM, _exit):
        ray = importlib.import_module("ray")
        try:
            _start(ray, workers, folder)
            # Once more: Ray puts a handler of its own in its place, which aborts after three seconds.
            with _on(signal.SIGTERM, _exit):
                yield
        finally:
            ray.shutdown()


def _start(ray: ModuleType, workers: int, folder: Path) -> None:
    try:
        # Ctrl-C has to wait: an interrupted start would leave half of Ray behind.
        with _uninterrupted():
            context = ray.init(
                address="local",
                num_cpus=workers,
                num_gpus=0,
                include_dashboard=False,
                configure_logging=False,
                log_to_driver=False,
                _temp_dir=str(folder),
            )
    except Exception as error:
        raise RunError(f"Ray does not start: {error}; use --engine local") from error
    address = context.address_info["node_ip_address"]
    if address != _LOOPBACK:
        raise RunError(
            f"Ray listens on {address}, expected {_LOOPBACK}: it was imported before fedqc could set it up; "
            "start fedqc in a process of its own"
        )


@contextmanager
def _runtime(app: ClientApp, names: Sequence[str], stop_file: Path) -> Iterator[Grid]:
    """Flower's simulation runtime with one node for each name.

    Raises:
        RunError: the run failed because the runtime broke.
    """
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = _RUN, SUPERLINK_NODE_ID, _TASK
    run = Run.create_empty(_RUN)
    run.primary_task_id, run.federation_id = _TASK, NOOP_FEDERATION_ID
    links = LinkStateFactory(FLWR_IN_MEMORY_DB_NAME, NoOpFederationManager(), ObjectStoreFactory())
    state = cast(InMemoryLinkState, links.state())
    state.run_ids[_RUN] = RunRecord(run)
    state.task_store[_TASK] = Task(task_id=_TASK, run_id=_RUN)
    nodes: dict[int, int] = {}
    for number, name in enumerate(names):
        key = secrets.token_bytes(32)
        node = state.create_node(NOOP_FLWR_AID, NOOP_ACCOUNT_NAME, key, HEARTBEAT_INTERVAL_INF, name=name)
        state.acknowledge_node_heartbeat(node, HEARTBEAT_INTERVAL_INF)
        nodes[node] = number
    grid = InMemoryGrid(links)
    grid.set_run(run)
    stop = threading.Event()
    broken: list[Exception] = []
    # A worker that was killed, for its memory, say, starts again and gets its message once more.
    resources = {"num_cpus": 1, "max_restarts": -1, "max_task_retries": 1}

    def work() -> None:
        try:
            start_vce(
                backend_name="ray",
                backend_config_json_stream=json.dumps({"client_resources": resources}),
                app_dir="",
                is_app=False,
                f_stop=stop,
                run=run,
                metrics=VceMetrics(),
                client_app=app,
                state_factory=links,
                existing_nodes_mapping=nodes,
            )
        except Exception as error:
            broken.append(error)
        finally:
            for node in nodes:
                state.deactivate_node(node)  # nobody waits for what will never come

    thread = threading.Thread(target=work, name="flower-runtime")
    thread.start()
    try:
        yield grid
    except FedQCError as error:
        if broken:
            raise RunError(f"Flower's simulation engine broke: {broken[0]}; use --engine local") from error
        raise
    finally:
        # Flower's threads end when the workers' answers are there, or the workers gone. A thread that still
        # asks Ray for an answer when Ray is shut down waits for ever.
        stop_file.touch()
        _await_end_of_workers(stop_file.parent)
        stop.set()
        thread.join()


@cache
def _end_with(stop: Path) -> None:
    """Have this worker end when the file appears, in the middle of a round if need be."""
    ray = importlib.import_module("ray")
    worker = ray.get_runtime_context().current_actor
    (stop.parent / f"worker-{os.getpid()}").touch()

    def watch() -> None:
        while not stop.exists():
            time.sleep(0.2)
        ray.kill(worker)

    threading.Thread(target=watch, name="end-with-run", daemon=True).start()


def _await_end_of_workers(folder: Path, patience: float = 10.0) -> None:
    """Wait for the processes that `_end_with` has noted: Ray, once shut down, does not."""
    end = time.monotonic() + patience
    for note in folder.glob("worker-*"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            while time.monotonic() < end:
                os.kill(int(note.name.removeprefix("worker-")), 0)  # asks whether it is there
                time.sleep(0.05)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment until the end of the block."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _on(number: signal.Signals, handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Handle a signal this way until the end of the block; threads other than the main one cannot."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _exit(number: int, _: object) -> None:
    """End the process as a signal would, but in order."""
    sys.exit(128 + number)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put Ctrl-C off until the end of the block."""
    asked = threading.Event()
    with _on(signal.SIGINT, lambda *_: asked.set()):
        yield
    if asked.is_set():
        signal.raise_signal(signal.SIGINT)


@contextmanager
def _complaints(log: Path, out: Path, stop: Path) -> Iterator[None]:
    """Have Flower and Ray write to `out` instead of the terminal what goes wrong before the run stops.

    Args:
        log: where it is written as long as the run's folder may not be there.
        out: the run's folder; `ray.log` in it is only made where there is something to say.
        stop: there when the run stops; that workers go away then is no news.
    """
    handler = logging.FileHandler(log, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(message)s"))
    handler.addFilter(lambda _: not stop.exists())
    loggers = [logging.getLogger(name) for name in ("flwr", "ray")]
    before = [(logger.handlers, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    try:
        yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()
        if log.exists() and out.is_dir():
            with (out / "ray.log").open("a", encoding="utf-8") as file:
                file.write(log.read_text(encoding="utf-8"))
