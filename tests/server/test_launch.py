"""What `fedqc server` decides before anything is started, and how it reads along."""

import fcntl
import json
import socket
from pathlib import Path
from typing import Any

import pytest
from fedqc_server.launch import Follower, largest_reply, serve, site_keys
from fedqc_server.limits import Limit
from fedqc_server.status import status_lines
from fedqc_server.superlink import SuperLink

from fedqc.certificates import make_server_files, make_site_key
from fedqc.config import FederationConfig, load_federation
from fedqc.errors import ConfigError
from fedqc.label_sources.making import segmenter_source
from fedqc.methods.qcresunet import QCResUNetMethod
from fedqc.task import load_task


def federation(tmp_path: Path, text: str = "") -> Path:
    path = tmp_path / "federation.toml"
    path.write_text(f'task = "wmh"\n[sites]\nexpected = ["a", "b"]\n{text}')
    return path


def with_keys(tmp_path: Path, *names: str) -> FederationConfig:
    for name in names:
        make_site_key(tmp_path / "keys" / f"{name}.key", name)
    return load_federation(federation(tmp_path))


def test_each_site_has_its_key(tmp_path: Path) -> None:
    keys = site_keys(with_keys(tmp_path, "a", "b"))
    assert keys == {"a": tmp_path / "keys" / "a.pub", "b": tmp_path / "keys" / "b.pub"}


def test_a_key_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys/b\.pub: there is no such file; put the public key there"):
        site_keys(with_keys(tmp_path, "a"))


def test_without_names_nobody_can_be_let_in(tmp_path: Path) -> None:
    (tmp_path / "federation.toml").write_text('task = "wmh"\n')
    with pytest.raises(ConfigError, match=r"\[sites\] expected is empty"):
        site_keys(load_federation(tmp_path / "federation.toml"))


def test_the_larger_network_bounds_what_a_site_may_send(tmp_path: Path) -> None:
    config = load_federation(federation(tmp_path, "[qc.network]\nwidth = 32\n"))
    network = QCResUNetMethod(load_task("wmh"), config.qc).build(0).state_dict()
    size = sum(values.numel() * values.element_size() for values in network.values())
    assert largest_reply(config) == Limit.of(size, len(network))


def test_networks_that_make_labels_may_be_the_largest(tmp_path: Path) -> None:
    config = load_federation(
        federation(tmp_path, "[qc.network]\nwidth = 8\n[qc.samples]\nside_outputs = 0.2\n")
    )
    source = segmenter_source("side-outputs", load_task("wmh"), config.qc.sources)
    networks = [source.build(variant, 0).state_dict() for variant in source.variants]
    sizes = [sum(values.nbytes for values in network.values()) for network in networks]
    assert largest_reply(config).size == Limit.of(max(sizes), 1).size


@pytest.mark.parametrize("address", ["0.0.0.0:8443", "192.168.1.2:443", "fl.example.org:443", "[::]:443"])
def test_without_a_gateway_only_this_machine(tmp_path: Path, address: str) -> None:
    path = federation(tmp_path, f'[server]\naddress = "{address}"\ngateway = "none"\n')
    with pytest.raises(ConfigError, match="lets anyone who reaches it run code at every site"):
        serve(path, tmp_path / "run", seed=0, say=print, listener=print)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:8443", "localhost:1", "[::1]:443", "127.3.2.1:80"])
def test_loopback_needs_none(tmp_path: Path, address: str) -> None:
    config = load_federation(federation(tmp_path, f'[server]\naddress = "{address}"\ngateway = "none"\n'))
    assert config.server.is_loopback


def test_a_gateway_needs_a_certificate(tmp_path: Path) -> None:
    with_keys(tmp_path, "a", "b")
    with pytest.raises(ConfigError, match="fedqc init federation --host"):
        serve(federation(tmp_path), tmp_path / "run", seed=0, say=print, listener=print)


def test_a_servers_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    with_keys(tmp_path, "a", "b")
    files = make_server_files(tmp_path / "certificates", ["127.0.0.1"], name="test")
    files.key.chmod(0o640)
    text = f'[server]\ncertificate = "{files.certificate}"\nkey = "{files.key}"\n'
    with pytest.raises(ConfigError, match=r"server\.key: a private key that others .* chmod 600"):
        serve(federation(tmp_path, text), tmp_path / "run", seed=0, say=print, listener=print)


def test_a_completed_run_is_left_alone(tmp_path: Path) -> None:
    with_keys(tmp_path, "a", "b")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"outcome": "completed"}')
    said: list[str] = []
    serve(federation(tmp_path), tmp_path / "run", seed=0, say=said.append, listener=print)
    assert "completed already" in said[0]


def test_a_run_is_led_by_one_server(tmp_path: Path) -> None:
    with_keys(tmp_path, "a", "b")
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another fedqc server leads this run"):
            serve(federation(tmp_path), tmp_path / "run", seed=0, say=print, listener=print)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_events_are_read_once_and_whole(tmp_path: Path) -> None:
    heard: list[dict[str, Any]] = []
    follower = Follower(tmp_path, heard.append)
    follower.read()
    path = tmp_path / "events.jsonl"
    path.write_text('{"event": "old"}\n')
    follower.skip()
    follower.read()
    assert heard == []
    with path.open("a") as file:
        file.write('{"event": "one"}\n{"event": "t')
        file.flush()
        follower.read()
        follower.read()
        assert [event["event"] for event in heard] == ["one"]
        file.write('wo"}\n')
    follower.read()
    assert [event["event"] for event in heard] == ["one", "two"]
    assert follower.count == 2


def test_what_flower_needs_is_for_its_owner_only(tmp_path: Path) -> None:
    folder = tmp_path / "flower"
    superlink = SuperLink.prepare(folder, tmp_path / "state.db")
    assert folder.stat().st_mode & 0o777 == 0o700
    for secret in (folder / "superexec.secret", folder / "tls" / "server.key"):
        assert secret.stat().st_mode & 0o777 == 0o600
    again = SuperLink.prepare(folder, tmp_path / "state.db")  # as after a restart
    assert SuperLink.running(folder, tmp_path / "state.db") == again == superlink
    with socket.create_server(("127.0.0.1", again.port)):
        assert SuperLink.prepare(folder, tmp_path / "state.db").port != again.port  # somebody has taken it
    again = SuperLink.prepare(folder, tmp_path / "state.db")
    assert again.upstream.authority == folder / "tls" / "ca.crt"
    assert not again.is_up()
    services = again.services(tmp_path / "logs", {"seed": 0}, Limit(1000, 10))
    commands = [" ".join(service.command) for service in services]
    assert "--host 127.0.0.1" in commands[0]
    assert "--enable-supernode-auth" in commands[0]
    assert not any("--insecure" in command for command in commands)


def test_how_a_run_stands(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no run that can be read"):
        list(status_lines(tmp_path))
    record = {
        "federation": "glioma",
        "started": "2026-11-21T10:00:00",
        "outcome": "running",
        "done": ["summarise"],
        "sites": {"joined": ["a"], "left_out": {"b": "offline"}},
    }
    (tmp_path / "run.json").write_text(json.dumps(record))
    event = {"time": "2026-11-21T10:05:00.000", "event": "round-finished", "round": 3}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + '\n{"time": "2026')
    lines = list(status_lines(tmp_path))
    assert "server: not running; start it with fedqc server to go on" in lines
    assert "phases done: summarise" in lines
    assert "left out: b (offline)" in lines
    assert lines[-1] == "  2026-11-21T10:05:00 round-finished: round 3"
