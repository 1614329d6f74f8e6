"""Flower's client side as a process: the one place of a site that knows its names."""

import os
import re
import shlex
import shutil
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import tomli_w

from fedqc.config import SiteConfig
from fedqc.supervision import Service, find_program, without_proxy

_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "PYTHONUNBUFFERED": "1",
}
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
    (r"Connection attempt failed", "the connection is lost; it is tried again until it is back"),
    (r"Connection successful after", "connected to the coordinator again"),
)


def supernode_service(site: SiteConfig, site_file: Path) -> Service:
    """Flower's SuperNode of a site; it only ever connects to the coordinator.

    Args:
        site: with address, ca and key of the coordinator.
        site_file: its `site.toml`, which the ClientApp reads anew for every message.
    """
    coordinator = site.coordinator
    folder = site.results / "flower"
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o700)
    for left_behind in ("apps",):  # bundles of runs before
        shutil.rmtree(folder / left_behind, ignore_errors=True)
    (folder / "node.toml").write_text(tomli_w.dumps({"site": str(site_file.resolve())}), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    command = [
        find_program("flower-supernode"),
        *("--superlink", str(coordinator.address)),
        *("--root-certificates", str(coordinator.ca)),
        *("--auth-supernode-private-key", str(coordinator.key)),
        *("--node-config", str(folder / "node.toml")),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--isolation", "subprocess"),
    ]
    path = os.pathsep.join(
        [str(_own_programs(folder)), str(Path(sys.executable).parent), os.environ.get("PATH", "")]
    )
    environment = {**_ENVIRONMENT, **without_proxy(), "FLWR_HOME": str(folder), "PATH": path}
    return Service("supernode", command, site.results / "logs" / "supernode.log", environment)


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
    """A folder, first on the path, where `flwr-clientapp` is ours (see `fedqc_client.bundle`)."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    program = programs / "flwr-clientapp"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fedqc_client.bundle "$@"\n')
    program.chmod(0o700)
    return programs
