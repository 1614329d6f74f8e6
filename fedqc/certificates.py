"""Keys and certificates: made here, so that a consortium needs no authority of its own.

The coordinator's certificate is vouched for by a private authority whose certificate (`ca.crt`) each hospital
gets on a safe way; a site is known by an ECDSA P-384 key, the kind that Flower asks for.
"""

import ipaddress
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedqc.errors import ConfigError

YEARS_OF_AUTHORITY, YEARS_OF_SERVER = 10, 2
_CURVE = ec.SECP384R1()
T = TypeVar("T")
_CLOCKS_DIFFER = timedelta(minutes=10)


@dataclass(frozen=True)
class ServerFiles:
    """Where the coordinator's files are."""

    authority: Path
    """The certificate that sites trust."""
    certificate: Path
    key: Path
    """Mode 0600."""


def make_server_files(folder: Path, hosts: Sequence[str], *, name: str) -> ServerFiles:
    """Make an authority and a server certificate that it vouches for.

    The authority's own key is written too (`ca.key`, mode 0600): with it the next server certificate is made
    without a visit to the hospitals.

    Args:
        folder: is made where it is missing.
        hosts: names and addresses under which sites reach the server.
        name: of the federation, which stands in the certificates.

    Raises:
        ConfigError: a file is there already; nothing is written over.
    """
    files = ServerFiles(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key, key = (ec.generate_private_key(_CURVE) for _ in range(2))
    authority = _authority(authority_key, name)
    certificate = _server(key, hosts, authority, authority_key)
    secret, public = 0o600, 0o644
    _write_new(
        {
            folder / "ca.key": (_pem(authority_key), secret),
            files.authority: (authority.public_bytes(serialization.Encoding.PEM), public),
            files.key: (_pem(key), secret),
            files.certificate: (certificate.public_bytes(serialization.Encoding.PEM), public),
        }
    )
    return files


def renew_server_files(folder: Path, hosts: Sequence[str] = ()) -> ServerFiles:
    """Make another server certificate, with a key of its own, that the authority in the folder vouches for.

    The sites trust it as they did the one before, which is written over.

    Args:
        folder: with `ca.crt` and `ca.key`.
        hosts: as in `make_server_files`; those of the certificate before where none is named.

    Raises:
        ConfigError: the authority's files are missing or no such files, or no host is known.
    """
    files = ServerFiles(folder / "ca.crt", folder / "server.crt", folder / "server.key")
    authority_key = _read(folder / "ca.key", lambda pem: serialization.load_pem_private_key(pem, None))
    authority = _read(files.authority, x509.load_pem_x509_certificate)
    if not isinstance(authority_key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{folder / 'ca.key'}: is no key that fedqc made; restore the file")
    hosts = hosts or _hosts_of(_read(files.certificate, x509.load_pem_x509_certificate))
    key = ec.generate_private_key(_CURVE)
    certificate = _server(key, hosts, authority, authority_key)
    content = {files.key: _pem(key), files.certificate: certificate.public_bytes(serialization.Encoding.PEM)}
    for path, text in content.items():
        aside = path.with_name(f".new-{path.name}")
        aside.unlink(missing_ok=True)
        _write_new({aside: (text, 0o600 if path == files.key else 0o644)})
        aside.replace(path)
    return files


def make_site_key(path: Path, site: str) -> Path:
    """Make a site's private key (mode 0600) and beside it its public key (`.pub`), for the coordinator.

    Args:
        path: of the private key.
        site: stands in the public key as its comment.

    Returns:
        Path of the public key.

    Raises:
        ConfigError: one of them is there already and nothing is written over, or the path ends in `.pub`.
    """
    public = path.with_suffix(".pub")
    if public == path:
        raise ConfigError(f"{path}: .pub is the ending of the public key beside it; leave it out")
    key = ec.generate_private_key(_CURVE)
    private_text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    public_text = key.public_key().public_bytes(
        serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    )
    _write_new({path: (private_text, 0o600), public: (public_text + f" {site}\n".encode(), 0o644)})
    return public


def check_site_key(path: Path) -> None:
    """Refuse a public key that Flower could not use.

    Raises:
        ConfigError: it is missing, or no ECDSA key of a NIST curve in OpenSSH's form.
    """
    try:
        key = serialization.load_ssh_public_key(path.read_bytes())
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); put the public key that the site sent there"
        ) from None
    except (ValueError, UnsupportedAlgorithm):
        raise ConfigError(f"{path}: is no public key in OpenSSH's form; ask the site for its .pub") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(
            f"{path}: is a key of another kind than ECDSA; the site makes the right one with fedqc init site"
        )


def _authority(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"fedqc authority of {name}"[:64])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    return (
        _builder(subject, subject, key, YEARS_OF_AUTHORITY)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA384())
    )


def _server(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, hosts[0][:64])])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    return (
        _builder(subject, authority.subject, key, YEARS_OF_SERVER)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(issuer, critical=False)
        .sign(authority_key, hashes.SHA384())
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, years: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_DIFFER)
        .not_valid_after(now + timedelta(days=365 * years))
    )


def _host(host: str) -> x509.GeneralName:
    """An address as an address, anything else as a name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _hosts_of(certificate: x509.Certificate) -> list[str]:
    """The names and addresses that a certificate is for."""
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return [str(name.value) for name in names]


def _read(path: Path, load: Callable[[bytes], T]) -> T:
    """What a PEM file holds.

    Raises:
        ConfigError: it is missing, or something else.
    """
    try:
        return load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); restore the file") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):  # TypeError: with a password
        raise ConfigError(f"{path}: is not what fedqc made there; restore the file") from None


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write_new(files: dict[Path, tuple[bytes, int]]) -> None:
    """Write files with their modes, none of which may be there."""
    for path in files:
        if os.path.lexists(path):
            raise ConfigError(f"{path}: is there already, and nothing is written over; move it away first")
    for path, (content, mode) in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        # Never open to others, not even before its mode is set.
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
