"""Who is not let in, and what each of them is told."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedqc.certificates import make_server_files, make_site_key
from fedqc.protocol import PROTOCOL_VERSION
from fedqc.supervision import find_program
from tests.deployment.consortium import SITES, Consortium, free_port, running, wait_until, write_consortium

pytestmark = pytest.mark.deploy


@pytest.fixture
def consortium(tmp_path: Path) -> Iterator[Consortium]:
    with running(write_consortium(tmp_path, wait="60s", minimum=3)) as made:
        yield made


def change(site: Path, old: str, new: str) -> Path:
    text = site.read_text()
    assert old in text
    site.write_text(text.replace(old, new))
    return site


def logs(consortium: Consortium) -> str:
    """All that the coordinator wrote down."""
    folders = (consortium.run / "logs", consortium.run / "gateway")
    return "\n".join(path.read_text(errors="replace") for folder in folders for path in folder.glob("*.log"))


def test_without_the_right_key_and_authority(consortium: Consortium) -> None:
    """No key, an unknown key, and a coordinator that another authority vouches for."""
    stranger = change(consortium.site("hospital-a"), 'key = "hospital-a.key"', 'key = "other.key"')
    make_site_key(stranger.parent / "other.key", "hospital-a")
    other = make_server_files(consortium.folder / "other", ["127.0.0.1"], name="test")
    change(consortium.site("hospital-b"), "../../certificates/ca.crt", str(other.authority))
    server = consortium.serve()
    wait_until(lambda: "listening" in server.said(), say=server.said)
    unknown, misled = consortium.join("hospital-a"), consortium.join("hospital-b")
    good = consortium.join("hospital-c")
    assert misled.process.wait(60) == 2
    assert "certificate is not vouched for by [coordinator] ca" in misled.said()
    wait_until(lambda: "does not know this site's key" in unknown.said(), say=unknown.said)
    assert "answers, its certificate is vouched for" in good.said()
    wait_until(lambda: "connected to the coordinator; waiting for work" in good.said(), say=good.said)

    # Flower's own program, for fedqc client does not even start without a key.
    programs = os.pathsep.join([str(Path(find_program("flower-superexec")).parent), os.environ["PATH"]])
    keyless = subprocess.run(
        [
            *(sys.executable, "-m", "fedqc_client.supernode"),
            *("--superlink", f"127.0.0.1:{consortium.port}"),
            *("--root-certificates", str(consortium.folder / "certificates" / "ca.crt")),
            *("--port", str(free_port()), "--isolation", "process"),
        ],
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
        env={**os.environ, "FLWR_HOME": str(consortium.folder / "keyless"), "PATH": programs},
    )
    assert keyless.returncode not in {0, None}
    change(consortium.site("hospital-b"), 'key = "hospital-b.key"\n', "")
    ours = consortium.join("hospital-b")
    assert ours.process.wait(60) == 2
    assert "[coordinator] key: missing in site.toml" in ours.said()

    assert server.process.wait(180) == 3
    assert "1 of at least 3 sites came online" in server.said()
    assert "hospital-c" in server.said()
    written = logs(consortium)
    assert '"POST /v1/fleet/activate-node" 4' in written  # the unknown key
    assert '"POST /v1/fleet/register-node" 4' in written  # no key
    assert "alert unknown ca" in written  # the other authority


def test_another_protocol_and_another_task(consortium: Consortium) -> None:
    task = consortium.folder / "other.toml"
    task.write_text((consortium.folder / "ball.toml").read_text().replace("ball", "bowl"))
    change(consortium.site("hospital-b"), str(consortium.folder / "ball.toml"), str(task))
    server = consortium.serve()
    old = consortium.join_hostile("hospital-a", {"old": "protocol"})
    other, good = consortium.join("hospital-b"), consortium.join("hospital-c")
    assert server.process.wait(180) == 3
    left_out = {event["site"]: event["reason"] for event in consortium.events("site-left-out")}
    assert left_out == {"hospital-a": "protocol-error", "hospital-b": "task-differs"}
    assert "hospital-a (handshake): the site does not understand the request" in server.said()
    assert "hospital-b (handshake): its task is another one" in server.said()
    assert f"the coordinator speaks protocol version {PROTOCOL_VERSION}, this site version 0" in old.said()
    assert "is not the federation's" in other.said()
    assert "query.handshake: sends handshake" in good.said()
    assert {event["site"] for event in consortium.events("site-joined")} == {SITES[2]}
