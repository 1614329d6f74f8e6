"""What `fedqc client` looks at before Flower's program is started, and what it says of it."""

import http.server
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from fedqc_client.activity import ACTIVITY, Activity
from fedqc_client.launch import ActivityFollower, ConnectionFollower, check_credentials, greeting
from fedqc_client.supernode import meaning_of, supernode_services
from flwr.supercore.constant import TASK_TYPE_TO_COMMAND

from fedqc.certificates import ServerFiles, make_server_files, make_site_key
from fedqc.config import CoordinatorConfig, DataConfig, SiteConfig
from fedqc.errors import ConfigError


class Gate(http.server.BaseHTTPRequestHandler):
    """Shows nothing, as the gateway does, and says what time it is there."""

    offset = timedelta()

    def do_HEAD(self) -> None:
        self.send_response_only(404)
        self.send_header("Date", format_datetime(datetime.now(UTC) + self.offset, usegmt=True))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """No news."""


@pytest.fixture
def files(tmp_path: Path) -> ServerFiles:
    return make_server_files(tmp_path / "certificates", ["127.0.0.1"], name="test")


@pytest.fixture
def port(files: ServerFiles) -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gate)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.certificate, files.key)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def site(tmp_path: Path, address: str | None, ca: Path | None) -> SiteConfig:
    key = tmp_path / "hospital-a.key"
    if not key.exists():
        make_site_key(key, "hospital-a")
    return SiteConfig(
        name="hospital-a",
        task="wmh",
        data=DataConfig(path=tmp_path),
        results=tmp_path / "results",
        coordinator=CoordinatorConfig(address=address, ca=ca, key=key),
    )


def test_a_coordinator_that_is_there(port: int, files: ServerFiles, tmp_path: Path) -> None:
    said = greeting(site(tmp_path, f"127.0.0.1:{port}", files.authority))
    assert said == f"127.0.0.1:{port} answers, its certificate is vouched for, the clocks agree"


def test_somebody_else_in_its_place_is_refused(port: int, tmp_path: Path) -> None:
    other = make_server_files(tmp_path / "other", ["127.0.0.1"], name="test")
    with pytest.raises(ConfigError, match="not vouched for by"):
        greeting(site(tmp_path, f"127.0.0.1:{port}", other.authority))


@pytest.mark.parametrize(
    ("seconds", "said"), [(-60, "60 s ahead of"), (400, "400 s behind"), (200, None), (-2, None)]
)
def test_clocks_that_differ_too_much_are_named(
    port: int,
    files: ServerFiles,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    seconds: int,
    said: str | None,
) -> None:
    monkeypatch.setattr(Gate, "offset", timedelta(seconds=seconds))
    connect = site(tmp_path, f"127.0.0.1:{port}", files.authority)
    if said is None:
        assert "clocks agree" in greeting(connect)
        return
    with pytest.raises(ConfigError) as caught:
        greeting(connect)
    how_much, way = said.split(" s ")
    assert way in str(caught.value)
    assert abs(int(str(caught.value).split(" s ")[0].split()[-1]) - int(how_much)) <= 2


def test_a_coordinator_that_is_not_there_yet(files: ServerFiles, tmp_path: Path) -> None:
    said = greeting(site(tmp_path, "127.0.0.1:1", files.authority))
    assert said.startswith("127.0.0.1:1 cannot be reached now")
    assert "it is tried again" in said


def test_what_is_no_certificate(tmp_path: Path) -> None:
    (tmp_path / "ca.crt").write_text("hello")
    with pytest.raises(ConfigError, match=r"ca\.crt: is no certificate"):
        greeting(site(tmp_path, "127.0.0.1:1", tmp_path / "ca.crt"))


def test_without_credentials_nothing_starts(files: ServerFiles, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\[coordinator\] address, \[coordinator\] ca: missing"):
        check_credentials(site(tmp_path, None, None))
    good = site(tmp_path, "127.0.0.1:1", files.authority)
    check_credentials(good)
    assert good.coordinator.key is not None
    good.coordinator.key.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        check_credentials(good)


def test_flower_is_started_with_our_own_program_first(files: ServerFiles, tmp_path: Path) -> None:
    supernode, superexec = supernode_services(
        site(tmp_path, "127.0.0.1:1", files.authority), tmp_path / "site.toml"
    )
    first = Path(superexec.environment["PATH"].split(":")[0])
    assert "fedqc_client.bundle" in (first / "flwr-clientapp").read_text()
    for service in (supernode, superexec):
        assert service.environment["FLWR_HOME"] == str(tmp_path / "results" / "flower")
    command = " ".join(supernode.command)
    assert "--superlink 127.0.0.1:1" in command
    assert "--host 127.0.0.1" in command
    assert "--insecure" not in command
    # Nobody else on this machine may answer for the site.
    secret = tmp_path / "results" / "flower" / "superexec.secret"
    assert secret.stat().st_mode & 0o777 == 0o600
    for service in (supernode, superexec):
        assert f"--superexec-auth-secret-file {secret}" in " ".join(service.command)


def test_no_other_program_of_flower_is_started(files: ServerFiles, tmp_path: Path) -> None:
    """What Flower would start for a run of another kind runs the code that comes with it."""
    _, superexec = supernode_services(site(tmp_path, "127.0.0.1:1", files.authority), tmp_path / "site.toml")
    for command in TASK_TYPE_TO_COMMAND.values():
        found = shutil.which(command, path=superexec.environment["PATH"])
        assert found == str(tmp_path / "results" / "flower" / "bin" / command)
        if command != "flwr-clientapp":
            assert subprocess.run([found], check=False).returncode == 1


def test_a_supernode_that_is_broken_ends() -> None:
    """Flower would stay, and do nothing."""
    program = (
        "import threading, flwr.supernode.cli as cli\n"
        "def broken(): raise RuntimeError('a part of it')\n"
        "def stays():\n"
        "    threading.Thread(target=threading.Event().wait).start()\n"
        "    part = threading.Thread(target=broken)\n"
        "    part.start()\n"
        "    part.join()\n"
        "    threading.Event().wait()\n"
        "cli.flower_supernode = stays\n"
        "from fedqc_client.supernode import main\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 1
    assert b"a part of it" in done.stderr


@pytest.mark.parametrize(
    ("log", "meaning"),
    [
        ("Exit Code: 305\n[SSL: CERTIFICATE_VERIFY_FAILED] self-signed", "not vouched for"),
        (
            "Exit Code: 305\nFailed to initialize the connection\n[code: 2004] Failed to activate SuperNode.",
            "does not know this site's key",
        ),
        ("Exit Code: 606\nincompatible runtime version", "another version of Flower"),
        ("Exit Code: 305\n[Errno 111] Connection refused", "cannot be reached"),
        ("public key read\nExit Code: 9\nsomething else", "supernode.log says why"),
        ("", "supernode.log says why"),
    ],
)
def test_how_flower_ended_in_words(log: str, meaning: str) -> None:
    assert meaning in meaning_of(log)


@dataclass
class Screen:
    """What somebody at the site sees."""

    lines: list[str] = field(default_factory=list)
    bars: list[tuple[str, int, int]] = field(default_factory=list)

    def follow(self, results: Path) -> ActivityFollower:
        return ActivityFollower(results / ACTIVITY, self.lines.append, lambda *bar: self.bars.append(bar))


def test_whether_the_site_is_connected_is_said_when_it_changes(tmp_path: Path) -> None:
    log, screen = tmp_path / "supernode.log", Screen()
    log.write_text("INFO : SuperNode ID: 1\n")  # of a time before
    follower = ConnectionFollower(log, screen.lines.append)
    lost = "WARNING : Connection attempt failed, retrying in 1.00 seconds\n"
    with log.open("a") as file:
        for text in ("INFO : SuperNode ID: 2\n", "INFO : [RUN 3]\n", lost, lost, lost[:20]):
            file.write(text)
        file.flush()
        follower.read()
        file.write(f"{lost[20:]}INFO : Connection successful after 9.00 seconds and 3 tries.\n")
    follower.read()
    first, second, third = screen.lines
    assert first.startswith("connected")
    assert second.startswith("no connection")
    assert third.endswith("again")


def test_what_comes_and_goes_is_said_once(tmp_path: Path) -> None:
    screen = Screen()
    follower = screen.follow(tmp_path)
    follower.read()
    work = Activity(tmp_path, "train.qc", "glioma", round=2, rounds=20)
    work.tell("asked")
    follower.read()
    follower.read()
    assert len(screen.lines) == 1
    assert screen.lines[0].endswith("train.qc, round 2 of 20: asked by glioma, working")
    work.tell("sent", records=["training", "weights"], bytes=1234)
    follower.read()
    assert screen.lines[1].endswith("train.qc, round 2 of 20: sends training, weights, 1234 bytes")
    Activity(tmp_path, "query.score", "glioma").tell("failed", records=["error"], bytes=80, why="no space")
    follower.read()
    assert "query.score: could not be done: no space (the coordinator learns one word)" in screen.lines[2]
    (tmp_path / ACTIVITY).write_text("{half")
    follower.read()
    assert len(screen.lines) == 3
    assert screen.bars == []


def test_work_that_goes_on_is_a_bar_and_what_went_wrong_a_line(tmp_path: Path) -> None:
    screen = Screen()
    follower = screen.follow(tmp_path)
    work = Activity(tmp_path, "train.qc", "glioma", round=1, rounds=20)
    work.tell("asked")
    follower.read()
    work.progress(1, 50)
    work.progress(2, 50)  # so soon that nobody is told
    follower.read()
    work.note("trains with batches of 2 instead")
    follower.read()
    work.progress(50, 50)
    follower.read()
    assert screen.bars == [("train.qc, round 1 of 20", done, 50) for done in (1, 50)]
    assert screen.lines[1:] == ["train.qc, round 1 of 20: trains with batches of 2 instead"]


def test_notes_of_the_next_work_are_shown_though_nobody_looked_in_between(tmp_path: Path) -> None:
    screen = Screen()
    follower = screen.follow(tmp_path)
    work = Activity(tmp_path, "query.calibrate", "glioma")
    work.note("one")
    follower.read()
    work.note("two")
    follower.read()
    Activity(tmp_path, "query.score", "glioma").note("all candidates are kept")
    follower.read()
    assert screen.lines == [
        "query.calibrate: one",
        "query.calibrate: two",
        "query.score: all candidates are kept",
    ]


def test_what_was_done_yesterday_is_no_news(tmp_path: Path) -> None:
    Activity(tmp_path, "query.handshake").tell("asked")
    path = tmp_path / ACTIVITY
    path.write_text(re.sub(r"20\d\d-", "2025-", path.read_text()))
    screen = Screen()
    screen.follow(tmp_path).read()
    assert screen.lines == []


def test_where_nothing_can_be_written_the_work_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    Activity(tmp_path / "file" / "results", "query.handshake").tell("asked")
