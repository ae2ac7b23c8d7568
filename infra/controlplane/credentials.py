"""Keys, certificates and tokens of one control plane, made at its start. Worth nothing outside it."""

from __future__ import annotations

import dataclasses
import datetime
import ipaddress
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

USERS: Final = ("admin", "controller-manager", "scheduler", "kwok")
_DAY: Final = datetime.timedelta(days=1)


@dataclasses.dataclass(frozen=True)
class Credentials:
    """Where each lies; `tokens` by user."""

    ca: Path
    serving_certificate: Path
    serving_key: Path
    service_account_key: Path
    service_account_public: Path
    front_proxy_ca: Path
    front_proxy_certificate: Path
    front_proxy_key: Path
    tokens: Mapping[str, str]


def make_credentials(folder: Path) -> Credentials:
    """Everything that a control plane on loopback needs, in `folder` (mode 0700, keys 0600)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority, front = _Authority(folder, "ca"), _Authority(folder, "front-proxy-ca")
    serving, serving_key = authority.issue("kube-apiserver", server=True)
    client, client_key = front.issue("front-proxy", server=False)
    account_key = folder / "service-account.key"
    signer = ec.generate_private_key(ec.SECP256R1())
    _write(account_key, _pem(signer))
    public = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    account_public = folder / "service-account.pub"
    _write(account_public, signer.public_key().public_bytes(*public))
    return Credentials(
        ca=authority.path,
        serving_certificate=serving,
        serving_key=serving_key,
        service_account_key=account_key,
        service_account_public=account_public,
        front_proxy_ca=front.path,
        front_proxy_certificate=client,
        front_proxy_key=client_key,
        tokens={user: secrets.token_urlsafe(32) for user in USERS},
    )


def serving_pair(folder: Path, name: str, hosts: tuple[str, ...] = ()) -> tuple[Path, Path, bytes]:
    """Certificate, key and CA bundle of a server that the API server shall call (webhook, aggregated API)."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = _Authority(folder, f"{name}-ca")
    certificate, key = authority.issue(name, server=True, hosts=hosts)
    return certificate, key, authority.path.read_bytes()


class _Authority:
    """A CA with its certificate at `path`; its key stays in memory."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = _name(name)
        self.path = folder / f"{name}.crt"
        constraints = x509.BasicConstraints(ca=True, path_length=0)
        certificate = (
            _builder(self._name, self._name, self._key)
            .add_extension(constraints, critical=True)
            .sign(self._key, hashes.SHA256())
        )
        _write(self.path, certificate.public_bytes(serialization.Encoding.PEM))

    def issue(self, name: str, *, server: bool, hosts: tuple[str, ...] = ()) -> tuple[Path, Path]:
        """A certificate and its key: of a server on loopback, or of a client."""
        key = ec.generate_private_key(ec.SECP256R1())
        usage = ExtendedKeyUsageOID.SERVER_AUTH if server else ExtendedKeyUsageOID.CLIENT_AUTH
        builder = _builder(_name(name), self._name, key).add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        if server:
            names: list[x509.GeneralName] = [x509.DNSName(host) for host in ("localhost", *hosts)]
            names += [
                x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
                x509.IPAddress(ipaddress.ip_address("10.243.0.1")),
            ]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        certificate_path, key_path = self._folder / f"{name}.crt", self._folder / f"{name}.key"
        certificate = builder.sign(self._key, hashes.SHA256())
        _write(certificate_path, certificate.public_bytes(serialization.Encoding.PEM))
        _write(key_path, _pem(key))
        return certificate_path, key_path


def _name(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _DAY)
        .not_valid_after(now + 30 * _DAY)
    )


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _write(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
