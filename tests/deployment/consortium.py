"""A coordinator and sites as processes of their own, with folders of their own, on loopback."""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

from fedqc.certificates import make_server_files, make_site_key
from fedqc.curation.manifest import read_manifest
from tests.federation.runs import write_site, write_task

SITES = ("hospital-a", "hospital-b", "hospital-c")
HERE = Path(__file__).parent
PROGRAM = [sys.executable, "-c", "from fedqc.cli import main; main()"]


@dataclass
class Program:
    """A command of ours that runs in the background."""

    process: subprocess.Popen[str]
    output: Path

    def said(self) -> str:
        """All that it printed."""
        return self.output.read_text(encoding="utf-8")

    def stop(self) -> int:
        """End it as a service manager does; returns its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()


@dataclass
class Consortium:
    """The folders of a coordinator and its sites, and what runs of them."""

    folder: Path
    port: int
    programs: list[Program] = field(default_factory=list)

    @property
    def federation(self) -> Path:
        return self.folder / "federation.toml"

    @property
    def run(self) -> Path:
        return self.folder / "run"

    def site(self, name: str) -> Path:
        return self.folder / "sites" / name / "site.toml"

    def serve(self) -> Program:
        """Start the coordinator."""
        return self._start("server", "server", str(self.federation), "--out", str(self.run))

    def join(self, name: str, **environment: str) -> Program:
        """Start a site."""
        return self._start(name, "client", str(self.site(name)), **environment)

    def status(self) -> str:
        """What `--status` says from another terminal."""
        command = [*PROGRAM, "server", str(self.federation), "--out", str(self.run), "--status"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def join_hostile(self, name: str, tricks: Mapping[str, str]) -> Program:
        """Start a site that does not do as it should; see `hostile_site.py`."""
        environment = {"HOSTILE": json.dumps(dict(tricks)), "HOSTILE_FILE": str(self.folder / "unpickled")}
        program = (sys.executable, str(HERE / "hostile_site.py"))
        return self._start(name, "client", str(self.site(name)), program=program, **environment)

    def _start(
        self, name: str, *arguments: str, program: Sequence[str] = PROGRAM, **environment: str
    ) -> Program:
        output = self.folder / f"{name}-{len(self.programs)}.out"
        with output.open("w") as file:
            process = subprocess.Popen(
                [*program, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
                start_new_session=True,
            )
        self.programs.append(Program(process, output))
        return self.programs[-1]

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Events of the run that were written whole."""
        try:
            lines = (self.run / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines:
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
        return [event for event in found if not kinds or event["event"] in kinds]

    def record(self) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads((self.run / "run.json").read_text())
        except (FileNotFoundError, ValueError):
            return {}
        return values

    def finish(self, server: Program, seconds: float = 420) -> None:
        """Wait for the coordinator to end well."""
        try:
            status = server.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not done in {seconds} s:\n{server.said()}") from None
        assert status == 0, server.said()
        assert self.record()["outcome"] == "completed"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def write_consortium(
    folder: Path,
    *,
    rounds: int = 2,
    local_steps: int = 2,
    segmentation_rounds: int = 1,
    wait: str = "120s",
    minimum: int = 2,
) -> Consortium:
    """Folders with phantoms, keys and certificates; nothing runs yet."""
    port = free_port()
    task = write_task(folder)
    make_server_files(folder / "certificates", ["127.0.0.1", "localhost"], name="test")
    (folder / "keys").mkdir()
    for name in SITES:
        site = write_site(folder, name, task, references=4, good=3)
        shutil.copy(make_site_key(site.parent / f"{name}.key", name), folder / "keys" / f"{name}.pub")
        coordinator = f'address = "127.0.0.1:{port}"\nca = "../../certificates/ca.crt"\nkey = "{name}.key"\n'
        site.write_text(f"{site.read_text()}[coordinator]\n{coordinator}")
    (folder / "federation.toml").write_text(
        f'name = "test"\ntask = "{task}"\n'
        f'[sites]\nexpected = {list(SITES)}\nminimum = {minimum}\nwait = "{wait}"\n'
        f"[qc]\nrounds = {rounds}\nlocal_steps = {local_steps}\nbatch_size = 2\n"
        'deadline = "180s"\ncross_check_rounds = 0\n'
        "[qc.network]\nwidth = 4\nblocks = [1, 1]\n"
        f"[segmentation]\nrounds = {segmentation_rounds}\nlocal_steps = 1\nchannels = [4, 8]\n"
        'deadline = "180s"\n'
        "[curation]\nthreshold = 0.0\n"  # so little training makes no judge; there is something to segment
        "[privacy]\nmin_count = 1\n"
        f'[server]\naddress = "127.0.0.1:{port}"\n'
        'certificate = "certificates/server.crt"\nkey = "certificates/server.key"\n'
    )
    return Consortium(folder, port)


@contextlib.contextmanager
def running(consortium: Consortium) -> Iterator[Consortium]:
    """Stop what was started, and see that nothing of it is left."""
    try:
        yield consortium
    finally:
        for program in reversed(consortium.programs):
            program.stop()
        deadline = time.monotonic() + 30
        while left := processes_of(consortium.folder):
            assert time.monotonic() < deadline, f"still running: {left}"
            time.sleep(0.2)


def processes_of(folder: Path) -> dict[int, str]:
    """Command lines of the processes that name a folder, by their ids."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                environment = (entry / "environ").read_bytes().decode("utf-8", "replace")
                if str(folder) in line or f"FLWR_HOME={folder}" in environment:
                    found[int(entry.name)] = line.strip()
    return found


def process_called(folder: Path, name: str) -> int | None:
    """A process that names a folder, by a part of its command line."""
    return next((pid for pid, line in processes_of(folder).items() if name in line), None)


def weights(run: Path, stage: str = "qc") -> dict[str, NDArray[Any]]:
    """A model of a run."""
    return load_file(run / "models" / stage / "weights.safetensors")


def finished_rounds(consortium: Consortium, stage: str | None = None) -> list[tuple[str, int]]:
    """Stage and number of every round that was finished, in turn."""
    events = consortium.events("round-finished")
    return [(event["stage"], event["round"]) for event in events if stage in {None, event["stage"]}]


def assert_nothing_was_done_twice(consortium: Consortium, sites: Sequence[str] = SITES) -> None:
    """Neither a round, and what lies at the sites is whole."""
    rounds = finished_rounds(consortium)
    assert len(rounds) == len(set(rounds))
    for name in sites:
        results = consortium.site(name).parent / "results"
        assert len(read_manifest(results / "manifest.json").entries) == 4
        lines = (results / "ledger.jsonl").read_text().splitlines()
        assert all(line.endswith("}") for line in lines)


def wait_until(is_true: Callable[[], object], seconds: float = 240, say: Callable[[], str] = str) -> None:
    end = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < end, f"it did not come to that in {seconds} s: {say()}"
        time.sleep(0.1)
