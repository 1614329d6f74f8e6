"""Flower's client side as processes: the one place of a site that knows their names."""

import os
import re
import shlex
import shutil
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import tomli_w

from fedqc.config import SiteConfig
from fedqc.errors import ConfigError
from fedqc.files import write_secret
from fedqc.supervision import Service, find_program, flower_environment

LOOPBACK = "127.0.0.1"
_CLIENTAPP = "flwr-clientapp"
# What Flower's program says when it ends, and what a person should know of it; the first that fits.
_MEANINGS: Sequence[tuple[str, str]] = (
    (
        r"CERTIFICATE_VERIFY_FAILED",
        "the coordinator's certificate is not vouched for by [coordinator] ca; ask the coordinator for the "
        "right ca.crt, and see that the address is the one in the certificate",
    ),
    (
        # Flower says the same in both cases.
        r"(?i)failed to activate|unauthenticated|unauthori[sz]ed|public key|\b401\b",
        "the coordinator does not let this site in: it does not know this site's key (then send it the .pub "
        "file that belongs to [coordinator] key), or it still waits for this site's connection from before "
        "(then it lets it in within a minute), or the clocks differ (then set this one by NTP)",
    ),
    (
        r"(?i)incompatible|runtime version|\b(426|412)\b",
        "the coordinator runs another version of Flower; install the same version of fedqc",
    ),
    (
        r"(?i)connect|timed? ?out|\b50[234]\b|name or service",
        "the coordinator cannot be reached; it is tried again",
    ),
)
# The same for what it says while it runs.
_NEWS: Sequence[tuple[str, str]] = (
    (r"SuperNode ID:", "connected to the coordinator; waiting for work"),
    (r"Connection attempt failed", "no connection to the coordinator; it is tried again until there is one"),
    (r"Connection successful after", "connected to the coordinator again"),
)


def supernode_services(site: SiteConfig, site_file: Path) -> tuple[Service, Service]:
    """Flower's SuperNode of a site, which only ever connects to the coordinator, and its SuperExec.

    The second starts the ClientApp for each message. Both speak with each other on the loopback address, with
    a secret, so that no other user of this machine can answer in the site's name.

    Args:
        site: with address, ca and key of the coordinator.
        site_file: its `site.toml`, which the ClientApp reads anew for every message.
    """
    coordinator, logs = site.coordinator, site.results / "logs"
    folder = site.results / "flower"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    shutil.rmtree(folder / "apps", ignore_errors=True)  # bundles of runs before
    (folder / "node.toml").write_text(tomli_w.dumps({"site": str(site_file.resolve())}), encoding="utf-8")
    secret = folder / "superexec.secret"
    write_secret(secret)
    with socket.create_server((LOOPBACK, 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**flower_environment(), "FLWR_HOME": str(folder)}
    supernode = Service(
        "supernode",
        [
            *(sys.executable, "-m", "fedqc_client.supernode"),  # flower-supernode that ends when it is broken
            *("--superlink", str(coordinator.address)),
            *("--root-certificates", str(coordinator.ca)),
            *("--auth-supernode-private-key", str(coordinator.key)),
            *("--node-config", str(folder / "node.toml")),
            *("--host", LOOPBACK, "--port", str(port)),
            *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        ],
        logs / "supernode.log",
        environment,
    )
    path = [str(_own_programs(folder)), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    superexec = Service(
        "superexec",
        [
            find_program("flower-superexec"),
            *("--runtime-api-address", f"{LOOPBACK}:{port}", "--insecure"),
            *("--superexec-auth-secret-file", str(secret)),
            *("--parent-pid", str(os.getpid())),
        ],
        logs / "superexec.log",
        {**environment, "PATH": os.pathsep.join(path)},
    )
    return supernode, superexec


def meaning_of(last_words: str) -> str:
    """What a person should know of a SuperNode that ended, from the end of its log."""
    end = last_words[max(last_words.rfind("Exit Code"), 0) :]
    for pattern, meaning in _MEANINGS:
        if re.search(pattern, end):
            return meaning
    return "Flower's program ended; the site's supernode.log says why"


def news_of(line: str) -> str | None:
    """What a person should know of a line that a SuperNode logs."""
    return next((meaning for pattern, meaning in _NEWS if re.search(pattern, line)), None)


def _own_programs(folder: Path) -> Path:
    """A folder, first on the path, with the programs that Flower starts for a site.

    `flwr-clientapp` is ours (see `fedqc_client.bundle`). Flower would start others, too, if the coordinator
    says that its run is of another kind, and these would run the code that comes with it.
    """
    commands = import_module("flwr.supercore.constant").TASK_TYPE_TO_COMMAND.values()
    if _CLIENTAPP not in commands:
        raise ConfigError("this version of Flower starts sites in another way than fedqc knows")
    programs = folder / "bin"
    shutil.rmtree(programs, ignore_errors=True)
    programs.mkdir()
    for command in commands:
        does = f'exec {shlex.quote(sys.executable)} -m fedqc_client.bundle "$@"'
        program = programs / command
        program.write_text(f"#!/bin/sh\n{does if command == _CLIENTAPP else 'exit 1'}\n")
        program.chmod(0o700)
    return programs


def main() -> NoReturn:
    """Run Flower's `flower-supernode`, and end when any part of it does.

    After an error that it does not expect Flower stops asking for work or saying that it is there, and the
    process stays; ended, it is started again.
    """

    def end(told: threading.ExceptHookArgs) -> None:
        threading.__excepthook__(told)
        os._exit(1)

    threading.excepthook = end
    status = 1
    try:
        import_module("flwr.supernode.cli").flower_supernode()
    except SystemExit as asked:
        status = asked.code % 256 if isinstance(asked.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    main()
