"""Flower's server side as processes and commands: the one place of the coordinator that knows their names.

SuperLink keeps messages and speaks with the sites; SuperExec starts the ServerApp. Flower has no stable way
in from Python, so its commands are called, with a home folder of their own.
"""

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tomllib
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomli_w

from fedqc.certificates import make_server_files
from fedqc.errors import ConfigError, RunError
from fedqc.files import write_json, write_secret
from fedqc.supervision import Service, find_program, flower_environment
from fedqc_server.gateway import Upstream
from fedqc_server.limits import UPLOAD_VARIABLE, Limit

LOOPBACK = "127.0.0.1"
RUN_VARIABLE = "FEDQC_RUN"
"""Environment variable with what the ServerApp is told, as JSON. The run's configuration goes to the sites,
too, and they need not know the coordinator's paths."""

_CONNECTION = "fedqc"
_REGISTERED = "registered.json"
_UNREGISTERED = "unregistered"
_SECONDS = 60  # for a command of Flower
# What every site gets: no code, only the names of what it has installed.
_BUNDLE = {
    "project": {"name": "fedqc-run", "version": "1.0.0", "description": "", "dependencies": []},
    "tool": {
        "flwr": {
            "app": {
                "publisher": "fedqc",
                "fab-include": ["README.md"],
                "components": {"serverapp": "fedqc_server.app:app", "clientapp": "fedqc_client.app:app"},
                "config": {},
            }
        }
    },
}


@dataclass(frozen=True)
class SuperLink:
    """Flower's server of one run."""

    folder: Path
    """Of everything that it and its commands write; for the owner only."""
    database: Path
    port: int

    @classmethod
    def prepare(cls, folder: Path, database: Path, *, port: int | None = None) -> "SuperLink":
        """Make ready what it needs: a home, a certificate for the loopback address, a secret, the bundle.

        Args:
            folder: of all that.
            database: where Flower's server keeps messages.
            port: to listen on; None: any that is free.

        Port and certificate stay what they were before, for an administrator's gateway may know them; nobody
        else but Flower's own processes does.
        """
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o700)
        before = cls.running(folder, database)
        self = cls(folder, database, port or _free_port(before.port if before else 0))
        if not database.exists():  # then nobody is let in yet
            (folder / _REGISTERED).unlink(missing_ok=True)
        if not (self._tls / "server.crt").exists():  # the last of them
            shutil.rmtree(self._tls, ignore_errors=True)  # half of it, of a start that was cut off
            make_server_files(self._tls, [LOOPBACK], name="fedqc on this machine")
        write_secret(self._secret)
        connection = {"address": self.address, "root-certificates": str(self._tls / "ca.crt")}
        settings = {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}
        (folder / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        bundle = folder / "bundle"
        bundle.mkdir(exist_ok=True)
        (bundle / "pyproject.toml").write_text(tomli_w.dumps(_BUNDLE), encoding="utf-8")
        (bundle / "README.md").write_text("Every site runs its own fedqc; this bundle has no code.\n")
        return self

    @classmethod
    def running(cls, folder: Path, database: Path) -> "SuperLink | None":
        """The one that was last prepared in this folder, running or not; None where there was none."""
        try:
            settings = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
            port = int(str(settings["superlink"][_CONNECTION]["address"]).rpartition(":")[2])
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return cls(folder, database, port)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def upstream(self) -> Upstream:
        """What the gateway has to know."""
        return Upstream(self.port, self._tls / "ca.crt")

    @property
    def _tls(self) -> Path:
        return self.folder / "tls"

    @property
    def _secret(self) -> Path:
        return self.folder / "superexec.secret"

    def services(self, logs: Path, run: Mapping[str, Any], largest: Limit) -> tuple[Service, Service]:
        """SuperLink and SuperExec.

        Args:
            logs: folder of their logs.
            run: what the ServerApp is told, see `fedqc_server.app`.
            largest: the largest answer that a site may send.
        """
        environment = self._environment()
        superlink = Service(
            "superlink",
            [
                *(sys.executable, "-m", "fedqc_server.limits"),  # flower-superlink with a bound
                *("--host", LOOPBACK, "--port", str(self.port)),
                *("--ssl-certfile", str(self._tls / "server.crt")),
                *("--ssl-keyfile", str(self._tls / "server.key")),
                *("--ssl-ca-certfile", str(self._tls / "ca.crt")),
                *("--isolation", "process", "--database", str(self.database)),
                *("--superexec-auth-secret-file", str(self._secret)),
                "--enable-supernode-auth",
                "--disable-runtime-dependency-installation",
            ],
            logs / "superlink.log",
            {**environment, UPLOAD_VARIABLE: str(largest.on_disk)},
        )
        superexec = Service(
            "superexec",
            [
                find_program("flower-superexec"),
                *("--runtime-api-address", self.address),
                *("--root-certificates", str(self._tls / "ca.crt")),
                *("--superexec-auth-secret-file", str(self._secret)),
                *("--parent-pid", str(os.getpid())),
            ],
            logs / "superexec.log",
            {**environment, RUN_VARIABLE: json.dumps(dict(run))},
        )
        return superlink, superexec

    def is_up(self) -> bool:
        """Whether it answers."""
        trusted = ssl.create_default_context(cafile=str(self._tls / "ca.crt"))
        directly = urllib.request.build_opener(
            urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=trusted)
        )
        try:
            with directly.open(f"https://{self.address}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def register(self, keys: Mapping[str, Path]) -> None:
        """Let in exactly these sites, by their public keys.

        A key that was let in before and is not among them any more is shut out, for good: Flower takes none
        twice.

        Raises:
            ConfigError: a key was shut out before.
            RunError: Flower refuses a key.
        """
        memory = self.folder / _REGISTERED
        known: dict[str, dict[str, str]] = json.loads(memory.read_text()) if memory.exists() else {}
        wanted = {site: " ".join(path.read_text().split()[:2]) for site, path in keys.items()}
        for site in [name for name, entry in known.items() if wanted.get(name) != entry["key"]]:
            if self._nodes().get(known[site]["node"], _UNREGISTERED) != _UNREGISTERED:
                self._flwr("supernode", "unregister", known[site]["node"], _CONNECTION)
            del known[site]
            write_json(memory, known)
        for site in sorted(set(wanted) - set(known)):
            known[site] = {"key": wanted[site], "node": self._let_in(site, keys[site], known)}
            write_json(memory, known)

    def _let_in(self, site: str, key: Path, known: Mapping[str, Mapping[str, str]]) -> str:
        """Flower's id of a site that it did not know."""
        try:
            answer = self._flwr("supernode", "register", str(key), _CONNECTION, "--name", site)
        except RunError:
            # Perhaps it was let in just before a start that was cut off, and nobody wrote it down.
            ours = {entry["node"] for entry in known.values()}
            nodes = self._nodes()
            strangers = [node for node, state in nodes.items() if state != _UNREGISTERED and node not in ours]
            if len(strangers) == 1:
                return strangers[0]
            if _UNREGISTERED in nodes.values():
                raise ConfigError(
                    f"{key}: Flower's server does not take this key; one that was shut out before is never "
                    "let in again, so have the site make another one with fedqc init key"
                ) from None
            raise
        return str(answer["node-id"])

    def _nodes(self) -> dict[str, str]:
        """Status of every node that Flower knows, by id."""
        answer = self._flwr("supernode", "list", _CONNECTION)
        return {str(node["node-id"]): str(node["status"]) for node in answer["nodes"]}

    def sites(self) -> dict[str, str]:
        """What Flower says of each site: `online`, `offline`, or `registered` where it never came.

        Raises:
            RunError: Flower does not say.
        """
        known: dict[str, dict[str, str]] = json.loads((self.folder / _REGISTERED).read_text())
        status = self._nodes()
        return {site: status.get(entry["node"], "unknown") for site, entry in sorted(known.items())}

    def submit(self) -> str:
        """Start the run; returns Flower's id of it.

        Raises:
            RunError: Flower does not take it.
        """
        return str(self._flwr("run", str(self.folder / "bundle"), _CONNECTION)["run-id"])

    def status(self, run_id: str) -> str:
        """What Flower says of a run: `pending`, `running`, `finished:completed` and so on.

        Raises:
            RunError: Flower does not say.
        """
        runs = self._flwr("list", "--run-id", run_id, _CONNECTION)["runs"]
        return str(runs[0]["status"]) if runs else "unknown"

    def stop_all(self) -> None:
        """Stop every run that is not finished: two must not lead one folder."""
        for run in self._flwr("list", _CONNECTION)["runs"]:
            if not str(run["status"]).startswith("finished"):
                with contextlib.suppress(RunError):  # it has just ended
                    self._flwr("stop", str(run["run-id"]), _CONNECTION)

    def keep_log(self, run_id: str, path: Path) -> None:
        """Add what a run's own process said to a file; Flower shows it nowhere else."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            said = self._call("log", run_id, _CONNECTION, "--show").stdout
            with path.open("a", encoding="utf-8", errors="replace") as file:
                file.write(said)

    def _environment(self) -> dict[str, str]:
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        return {**flower_environment(), "FLWR_HOME": str(self.folder), "PATH": path}

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        """Call `flwr`, which prints JSON."""
        try:
            done = self._call(*arguments, "--format", "json")
            answer = json.loads(done.stdout[done.stdout.index("{") :])
        except subprocess.TimeoutExpired:
            raise RunError(
                f"flwr {arguments[0]}: no answer from Flower's server within {_SECONDS} s"
            ) from None
        except ValueError:
            raise RunError(f"flwr {arguments[0]}: {(done.stderr or done.stdout).strip()}") from None
        if not isinstance(answer, dict) or not answer.get("success", True):
            raise RunError(f"flwr {arguments[0]}: {answer}")
        return answer

    def _call(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603 - a list, no shell
            [find_program("flwr"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            timeout=_SECONDS,
            env={**os.environ, **self._environment()},
        )


def _free_port(wanted: int) -> int:
    """This port of the loopback address, or another one where it is taken or 0."""
    try:
        with socket.create_server((LOOPBACK, wanted)) as probe:
            port: int = probe.getsockname()[1]
            return port
    except OSError:
        return _free_port(0)
