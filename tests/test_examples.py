"""The files that people copy: what the program writes, and what Docker, systemd and nginx would take.

After a change of a template: python -m tests.test_examples
"""

import configparser
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from fedqc_server.gateway import Upstream, configuration

from fedqc.config import FederationConfig, ServerConfig, SiteConfig, load_federation, load_site
from fedqc.init import render

ROOT = Path(__file__).resolve().parents[1]
SITE = {
    "name": "hospital-a",
    "task": "brats-glioma",
    "data.path": "/data/glioma",
    "data.reference": "verified.csv",
    "coordinator.address": "fl.example.org:8443",
    "coordinator.ca": "ca.crt",
    "coordinator.key": "hospital-a.key",
}
FEDERATION = {
    "name": "glioma-2026",
    "task": "brats-glioma",
    "sites.expected": ["hospital-a", "hospital-b", "hospital-c"],
    "server.address": "0.0.0.0:8443",
    "server.certificate": "certificates/server.crt",
    "server.key": "certificates/server.key",
}
FOLDER = Path("/srv/federation")
SERVER = ServerConfig(
    address="0.0.0.0:8443",
    gateway="external",
    certificate=FOLDER / "certificates" / "server.crt",
    key=FOLDER / "certificates" / "server.key",
)
RUN = FOLDER / "runs" / "glioma-2026"
EXAMPLES: dict[str, Callable[[], str]] = {
    "examples/site.example.toml": lambda: render("site.toml.jinja", SiteConfig, SITE),
    "examples/federation.example.toml": lambda: render("federation.toml.jinja", FederationConfig, FEDERATION),
    "examples/nginx.example.conf": lambda: configuration(
        SERVER, Upstream(40000, RUN / "flower" / "tls" / "ca.crt"), RUN / "gateway", name="glioma-2026"
    ),
}
DOCKERFILES = [ROOT / "server" / "Dockerfile", ROOT / "client" / "Dockerfile"]
UNITS = [ROOT / "server" / "fedqc-server.service", ROOT / "client" / "fedqc-client.service"]
INSTRUCTIONS = {
    "FROM",
    "RUN",
    "WORKDIR",
    "COPY",
    "USER",
    "VOLUME",
    "EXPOSE",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_the_program_writes(name: str) -> None:
    assert (ROOT / name).read_text() == EXAMPLES[name](), "run: python -m tests.test_examples"


def test_examples_are_valid() -> None:
    site = load_site(ROOT / "examples" / "site.example.toml")
    federation = load_federation(ROOT / "examples" / "federation.example.toml")
    assert site.name in federation.sites.expected
    assert site.task == federation.task
    assert site.coordinator.address is not None
    assert site.coordinator.address.endswith(f":{federation.server.port}")


# The Docker engine is not needed: what hadolint would say of such short files is said here.


def instructions(path: Path) -> list[tuple[str, str]]:
    """Every instruction of a Dockerfile, its lines joined."""
    joined = re.sub(r"\\\n\s*", "", path.read_text())
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines)]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.parent.name)
def test_dockerfiles(path: Path) -> None:
    steps = instructions(path)
    words = [word for word, _ in steps]
    assert set(words) <= INSTRUCTIONS
    assert words[0] == "FROM"
    assert re.fullmatch(r"python:3\.\d+-slim", steps[0][1])  # a version, not `latest`
    given = dict(steps)
    assert given["USER"].isdecimal()
    assert given["USER"] != "0"
    assert words.index("USER") > max(index for index, word in enumerate(words) if word == "RUN")
    for word in ("ENTRYPOINT", "CMD"):  # as lists: a shell would keep SIGTERM for itself
        assert re.fullmatch(r'\["[^"]+"(, "[^"]+")*\]', given[word])
    for command in (rest for word, rest in steps if word == "RUN"):
        shlex.split(command)
        assert "sudo" not in command
        if "apt-get install" in command:
            assert "--no-install-recommends" in command
            assert "rm -rf /var/lib/apt/lists" in command
        if "pip install" in command:
            assert "--no-cache-dir" in command
            assert "-c constraints.txt" in command


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.name)
def test_units(path: Path) -> None:
    unit = configparser.ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(path.read_text())
    assert set(unit.sections()) == {"Unit", "Service", "Install"}
    service = unit["Service"]
    command = shlex.split(service["ExecStart"])
    assert command[0].startswith("/")
    assert command[1] == path.stem.removeprefix("fedqc-")
    assert service["User"] != "root"
    assert service["NoNewPrivileges"] == "true"
    assert service["ProtectSystem"] == "strict"
    assert service["WorkingDirectory"] in service["ReadWritePaths"].split()  # else nothing could be written
    assert service["SuccessExitStatus"] == "130"  # of SIGTERM


if __name__ == "__main__":
    for name, text in EXAMPLES.items():
        (ROOT / name).write_text(text())
