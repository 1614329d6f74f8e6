"""The real nginx in front of a stub of Flower's server, on loopback."""

import http.client
import http.server
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fedqc_server import gateway
from fedqc_server.gateway import CALLS, Upstream, gateway_service, write_configuration

from fedqc.certificates import make_server_files
from fedqc.config import ServerConfig
from fedqc.errors import ConfigError
from fedqc.supervision import Service
from tests.deployment.consortium import free_port

pytestmark = pytest.mark.deploy


class Stub(http.server.BaseHTTPRequestHandler):
    """Answers every request with its own path, so that what gets through is seen."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length", 0))
        while length > 0:
            length -= len(self.rfile.read(min(length, 1 << 20)))
        body = self.path.encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_PUT = do_POST  # noqa: N815 - the names of the base class

    def log_message(self, *_: Any) -> None:
        """No news."""


@dataclass
class Gate:
    port: int
    folder: Path
    authority: Path

    def connection(self, **options: Any) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.authority))
        return http.client.HTTPSConnection("127.0.0.1", self.port, context=context, timeout=60, **options)

    def ask(self, path: str, method: str = "POST", body: bytes = b"x") -> tuple[int, bytes]:
        connection = self.connection()
        try:
            # Not through `request`, which would make a trick into something else.
            connection.putrequest(method, path, skip_accept_encoding=True)
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    folder = tmp_path_factory.mktemp("gate")
    outside = make_server_files(folder / "outside", ["127.0.0.1"], name="test")
    inside = make_server_files(folder / "inside", ["127.0.0.1"], name="inside")
    upstream = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(inside.certificate, inside.key)
    upstream.socket = context.wrap_socket(upstream.socket, server_side=True)
    thread = threading.Thread(target=upstream.serve_forever, daemon=True)
    thread.start()
    port = free_port()
    config = ServerConfig(address=f"127.0.0.1:{port}", certificate=outside.certificate, key=outside.key)
    behind = Upstream(upstream.server_address[1], inside.authority)
    written = write_configuration(config, behind, folder / "nginx", name="test")
    service = gateway_service(written, config)
    service.start()
    wait_for_port(port, service)
    yield Gate(port, folder / "nginx", outside.authority)
    service.stop()
    upstream.shutdown()
    upstream.server_close()


def wait_for_port(port: int, service: Service) -> None:
    for _ in range(200):
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(service.last_words())


@pytest.mark.parametrize("call", CALLS)
def test_what_sites_ask_comes_through(gate: Gate, call: str) -> None:
    assert gate.ask(f"/v1/fleet/{call}") == (200, f"/v1/fleet/{call}".encode())


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/health",
        "/docs",
        "/v1/control/start-run",
        "/v1/runtime/pull-task-input",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages/../push-messages",
        "/v1/fleet/../control/start-run",
        "/v1/control/../fleet/pull-messages",
        "/v1/fleet/pull%2dmessages",
        "/v1/fleet/%2e%2e/control/start-run",
        "/v1/%66leet/pull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/PULL-MESSAGES",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%2f..%2fpush-messages",
    ],
)
def test_nothing_else_does(gate: Gate, path: str) -> None:
    status, body = gate.ask(path)
    assert status in {400, 404}
    assert b"/v1/" not in body  # the stub would have said its path


@pytest.mark.parametrize("method", ["GET", "PUT", "HEAD", "OPTIONS", "DELETE"])
def test_no_other_method_does(gate: Gate, method: str) -> None:
    status, _ = gate.ask("/v1/fleet/pull-messages", method, b"")
    assert status == 405


def test_an_object_comes_through_and_a_body_without_end_does_not(gate: Gate) -> None:
    status, _ = gate.ask("/v1/fleet/push-object", body=bytes(6 << 20))
    assert status == 200
    connection = gate.connection()
    connection.putrequest("POST", "/v1/fleet/push-object")
    connection.putheader("Content-Length", str((gateway.BODY_MIB << 20) + 1))
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.filterwarnings("ignore:ssl.TLSVersion:DeprecationWarning")
def test_old_tls_is_refused(gate: Gate) -> None:
    context = ssl.create_default_context(cafile=str(gate.authority))
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.TLSv1
    context.maximum_version = ssl.TLSVersion.TLSv1_1
    with socket.create_connection(("127.0.0.1", gate.port)) as plain, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(plain, server_hostname="127.0.0.1")
    status, _ = gate.ask("/v1/fleet/get-run")
    assert status == 200


def test_a_sender_of_single_bytes_is_cut_off(gate: Gate) -> None:
    context = ssl.create_default_context(cafile=str(gate.authority))
    with (
        socket.create_connection(("127.0.0.1", gate.port)) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1") as slow,
    ):
        slow.settimeout(0.5)
        begin, sent = time.monotonic(), b"POST /v1/fleet/push-object HTTP/1.1\r\nX-Slow: "
        while time.monotonic() - begin < 30:
            try:
                slow.sendall(sent)
                if slow.recv(100) == b"":
                    break
            except TimeoutError:
                sent = b"a"
            except OSError:
                break
        else:
            pytest.fail("30 s of single bytes were listened to")
        assert time.monotonic() - begin > 5


def test_the_log_has_what_was_refused_and_not_every_poll(gate: Gate) -> None:
    gate.ask("/v1/control/stop-run")
    gate.ask("/v1/fleet/pull-messages")
    gate.ask("/v1/fleet/get-fab")
    time.sleep(0.2)
    log = (gate.folder / "access.log").read_text()
    assert '"POST /v1/control/stop-run" 404' in log
    assert '"POST /v1/fleet/get-fab" 200' in log
    assert '"POST /v1/fleet/pull-messages" 200' not in log


def test_too_many_requests_are_slowed_down(gate: Gate) -> None:
    connection = gate.connection()
    answers = []
    for _ in range(3 * gateway.BURST):
        connection.request("POST", "/v1/control/x", body=b"")  # nginx alone answers, and fast
        answer = connection.getresponse()
        answer.read()
        answers.append(answer.status)
    connection.close()
    assert set(answers) == {404, 503}
    time.sleep(1.0)
    assert gate.ask("/v1/fleet/get-run")[0] == 200


def test_an_address_in_use_is_a_sentence(gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_PATIENCE", 0.3)
    files = make_server_files(tmp_path / "keys", ["127.0.0.1"], name="test")
    config = ServerConfig(address=f"127.0.0.1:{gate.port}", certificate=files.certificate, key=files.key)
    written = write_configuration(config, Upstream(1, files.authority), tmp_path / "nginx", name="test")
    with pytest.raises(ConfigError, match=r"cannot be had \(Address already in use\)"):
        gateway_service(written, config)
    written.write_text("nonsense;")
    with pytest.raises(ConfigError, match=r"nginx refuses .*nginx\.conf: .*unknown directive"):
        gateway_service(written, config.model_copy(update={"address": f"127.0.0.1:{free_port()}"}))


def test_without_nginx_the_command_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(gateway, "_PLACES", ())
    with pytest.raises(ConfigError, match="sudo apt install nginx-light"):
        gateway.find_nginx()
