"""The gateway: nginx in front of Flower's server, which lets nothing but the sites' requests through."""

import errno
import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

import jinja2

from fedqc.config import ServerConfig
from fedqc.credentials import is_exposed
from fedqc.errors import ConfigError
from fedqc.files import replacing
from fedqc.supervision import Service

CALLS = (
    "register-node",
    "activate-node",
    "deactivate-node",
    "unregister-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
"""Requests of a SuperNode, `POST /v1/fleet/...`; all else stays outside."""

BODY_MIB = 8
"""Largest request; Flower cuts messages into objects of 5 MiB."""
REQUESTS_PER_SECOND, BURST, CONNECTIONS = 100, 400, 64
"""Of one address, behind which there may be several sites."""
_PATIENCE = 15.0
"""Seconds to wait for the address."""
_PLACES = ("/usr/sbin/nginx", "/usr/local/sbin/nginx", "/opt/homebrew/bin/nginx")  # often not on PATH


@dataclass(frozen=True)
class Upstream:
    """Flower's server behind the gateway."""

    port: int
    authority: Path
    """The certificate that vouches for it."""


def write_configuration(server: ServerConfig, upstream: Upstream, folder: Path, *, name: str) -> Path:
    """Write the gateway's configuration.

    Args:
        server: address and certificate; with gateway `external`, a file to be included in an `http` block.
        upstream: where requests go.
        folder: of the configuration and of what nginx writes.
        name: of the federation.

    Returns:
        Path of the file.

    Raises:
        ConfigError: there is no certificate, or a path that nginx cannot read.
    """
    if server.certificate is None or server.key is None:
        raise ConfigError(
            "[server] certificate and key are missing; make them with fedqc init federation --host "
            "fl.example.org, or name the consortium's own"
        )
    for path in (server.certificate, server.key):
        if not path.is_file():
            raise ConfigError(f"{path}: there is no such file; correct [server], or restore the file")
    if is_exposed(server.key):
        raise ConfigError(
            f"{server.key}: a private key that others on this machine may read; run: chmod 600 "
            f"{shlex.quote(str(server.key))}"
        )
    paths = (folder, server.certificate, server.key, upstream.authority)
    if strange := [path for path in paths if any(letter in str(path) for letter in " ;{}\"'\\$\n")]:
        raise ConfigError(
            f"{strange[0]}: nginx takes no path with spaces, quotes or any of ;{{}}\\$; use another place"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "nginx.conf"
    with replacing(path) as aside:
        aside.write_text(configuration(server, upstream, folder, name=name), encoding="utf-8")
    return path


def configuration(server: ServerConfig, upstream: Upstream, folder: Path, *, name: str) -> str:
    """The text of the gateway's configuration; arguments as in `write_configuration`."""
    environment = jinja2.Environment(  # noqa: S701 - a configuration file, not HTML
        loader=jinja2.PackageLoader("fedqc_server"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    host = f"[{server.host}]" if ":" in server.host else server.host
    return environment.get_template("nginx.conf.jinja").render(
        name=name,
        zone=f"fedqc_{re.sub(r'[^a-z0-9]', '_', name.lower())}",  # an nginx may be the gateway of several
        external=server.gateway == "external",
        folder=folder,
        listen=f"{host}:{server.port}",
        certificate=server.certificate,
        key=server.key,
        upstream_port=upstream.port,
        upstream_authority=upstream.authority,
        calls=CALLS,
        body_mib=BODY_MIB,
        requests_per_second=REQUESTS_PER_SECOND,
        burst=BURST,
        connections=CONNECTIONS,
    )


def find_nginx() -> str:
    """The program.

    Raises:
        ConfigError: it is not installed.
    """
    found = shutil.which("nginx") or next((place for place in _PLACES if Path(place).is_file()), None)
    if found is None:
        raise ConfigError(
            "nginx is not installed, and without it sites may not reach this machine: sudo apt install "
            'nginx-light, or set [server] gateway = "external" and have an administrator run a proxy'
        )
    return found


def gateway_service(configuration: Path, server: ServerConfig) -> Service:
    """Nginx with a configuration that it has found to be right, for an address that is free.

    Raises:
        ConfigError: nginx is not installed or refuses the configuration, or the address cannot be had.
    """
    _wait_until_free(server)
    nginx, folder = find_nginx(), configuration.parent
    options = ["-p", str(folder), "-e", str(folder / "error.log"), "-c", str(configuration)]
    tried = subprocess.run(  # noqa: S603 - a list, no shell
        [nginx, *options, "-t"], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        said = " ".join(line for line in tried.stderr.splitlines() if "[emerg]" in line) or tried.stderr
        raise ConfigError(f"nginx refuses {configuration}: {said.strip()}")
    return Service("gateway", [nginx, *options], folder / "nginx.log")


def _wait_until_free(server: ServerConfig) -> None:
    """A gateway of a server that was killed takes a moment to end."""
    end = time.monotonic() + _PATIENCE
    family = socket.AF_INET6 if ":" in server.host else socket.AF_INET
    while True:
        try:
            socket.create_server((server.host, server.port), family=family).close()
        except OSError as error:
            if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                reason = os.strerror(error.errno) if error.errno else str(error)
                raise ConfigError(
                    f"[server] address {server.address} cannot be had ({reason}); {_remedy(error.errno)}"
                ) from None
            time.sleep(0.2)
        else:
            return


def _remedy(number: int | None) -> str:
    if number == errno.EACCES:
        return (
            "ports below 1024 are for root or a service with the right to them (AmbientCapabilities="
            "CAP_NET_BIND_SERVICE in its systemd unit); name a higher one"
        )
    if number == errno.EADDRNOTAVAIL:
        return "this machine has no such address; 0.0.0.0 is every address it has"
    return "end what uses it, or name another one"
