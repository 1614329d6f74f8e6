import socket
import ssl
import stat
import subprocess
import threading
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from flwr.supercore.primitives.asymmetric import uses_nist_ec_curve

from fedqc.certificates import (
    ServerFiles,
    check_site_key,
    make_server_files,
    make_site_key,
    renew_server_files,
)
from fedqc.errors import ConfigError

BROKEN = b"-----BEGIN PRIVATE KEY-----\nbroken\n-----END PRIVATE KEY-----\n"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def files(tmp_path: Path) -> ServerFiles:
    return make_server_files(tmp_path / "keys", ["fl.example.org", "127.0.0.1"], name="glioma")


def greet(files: ServerFiles, trusted: Path, host: str) -> str | None:
    """A TLS handshake on loopback as `host`; the version, or None where the client refuses."""
    server_side = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_side.load_cert_chain(files.certificate, files.key)
    client_side = ssl.create_default_context(cafile=str(trusted))
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            connection, _ = listener.accept()
            try:
                server_side.wrap_socket(connection, server_side=True).close()
            except (ssl.SSLError, OSError):
                connection.close()

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            with (
                socket.create_connection(listener.getsockname()) as plain,
                client_side.wrap_socket(plain, server_hostname=host) as secure,
            ):
                return secure.version()
        except ssl.SSLCertVerificationError:
            return None
        finally:
            thread.join(10)


def test_a_renewed_certificate_is_trusted_as_the_one_before(files: ServerFiles) -> None:
    before = {path: path.read_bytes() for path in (files.authority, files.certificate, files.key)}
    assert renew_server_files(files.certificate.parent) == files
    assert [path for path, content in before.items() if path.read_bytes() == content] == [files.authority]
    assert mode(files.key) == 0o600
    for host in ("fl.example.org", "127.0.0.1"):
        assert greet(files, files.authority, host) == "TLSv1.3"
    renew_server_files(files.certificate.parent, ["new.example.org"])
    assert greet(files, files.authority, "new.example.org") == "TLSv1.3"
    assert greet(files, files.authority, "fl.example.org") is None


@pytest.mark.parametrize(
    ("name", "content"),
    [("ca.key", None), ("ca.crt", b"hello"), ("ca.key", b""), ("ca.key", BROKEN), ("server.crt", BROKEN)],
)
def test_without_its_authority_nothing_is_renewed(
    files: ServerFiles, name: str, content: bytes | None
) -> None:
    folder = files.certificate.parent
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    before = files.certificate.read_bytes()
    with pytest.raises(ConfigError, match=rf"{name}: .*restore"):
        renew_server_files(folder)
    assert files.certificate.read_bytes() == before


def test_who_trusts_the_authority_trusts_the_server(files: ServerFiles, tmp_path: Path) -> None:
    assert greet(files, files.authority, "fl.example.org") == "TLSv1.3"
    assert greet(files, files.authority, "127.0.0.1") == "TLSv1.3"
    assert greet(files, files.authority, "other.example.org") is None
    other = make_server_files(tmp_path / "others", ["fl.example.org"], name="glioma")
    assert greet(files, other.authority, "fl.example.org") is None


def test_secrets_are_for_their_owner_only(files: ServerFiles, tmp_path: Path) -> None:
    assert mode(files.key) == mode(files.authority.with_name("ca.key")) == 0o600
    public = make_site_key(tmp_path / "a.key", "hospital-a")
    assert mode(tmp_path / "a.key") == 0o600
    assert public == tmp_path / "a.pub"


def test_the_authority_vouches_for_servers_only(files: ServerFiles) -> None:
    authority = x509.load_pem_x509_certificate(files.authority.read_bytes())
    server = x509.load_pem_x509_certificate(files.certificate.read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length == 0
    assert not server.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    server.verify_directly_issued_by(authority)


def test_a_site_key_is_one_that_flower_takes(tmp_path: Path) -> None:
    public = make_site_key(tmp_path / "hospital-a.key", "hospital-a")
    private = serialization.load_ssh_private_key((tmp_path / "hospital-a.key").read_bytes(), None)
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    key = serialization.load_ssh_public_key(public.read_bytes())
    assert isinstance(key, ec.EllipticCurvePublicKey)
    assert uses_nist_ec_curve(key)
    assert key == private.public_key()
    assert key.key_size == 384
    assert public.read_text().endswith(" hospital-a\n")
    check_site_key(public)


def test_the_private_key_is_not_lost_to_the_public_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"a\.pub: \.pub is the ending of the public key beside it"):
        make_site_key(tmp_path / "a.pub", "a")
    assert list(tmp_path.iterdir()) == []


def test_openssh_reads_the_key(tmp_path: Path) -> None:
    public = make_site_key(tmp_path / "a.key", "hospital-a")
    try:
        done = subprocess.run(
            ["ssh-keygen", "-y", "-f", str(tmp_path / "a.key")], capture_output=True, text=True, check=True
        )
    except FileNotFoundError:
        pytest.skip("OpenSSH is not installed")
    assert done.stdout.split()[:2] == public.read_text().split()[:2]


def test_nothing_is_written_over(files: ServerFiles, tmp_path: Path) -> None:
    before = files.key.read_bytes()
    with pytest.raises(ConfigError, match=r"ca\.key: is there already"):
        make_server_files(files.key.parent, ["x"], name="again")
    assert files.key.read_bytes() == before
    (tmp_path / "b.pub").write_text("mine")
    with pytest.raises(ConfigError, match=r"b\.pub: is there already"):
        make_site_key(tmp_path / "b.key", "b")
    assert not (tmp_path / "b.key").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"ssh-rsa nonsense", "is no public key in OpenSSH's form"),
        (b"-----BEGIN PRIVATE KEY-----", "is no public key"),
        (
            ed25519.Ed25519PrivateKey.generate()
            .public_key()
            .public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH),
            "is a key of another kind than ECDSA",
        ),
    ],
)
def test_what_is_no_site_key_is_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "hospital-a.pub"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=rf"hospital-a\.pub: {reason}"):
        check_site_key(path)
