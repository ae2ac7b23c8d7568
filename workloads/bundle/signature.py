"""Who made this directory: signatures after OpenSSF model-signing, with EC P-256 keys, and whom a site trusts.

A signature covers the name and every byte of a directory and lies beside it (`<id>.sig`), because a bundle is closed.
It names its signer by the *fingerprint* of the public key (sha256 of its PEM), so that a stranger is refused by name
before anything is read. A site trusts the keys in its `trust/*.pub`, and nobody else. Private keys are files with mode
0600, PKCS#8, encrypted where a password is given. This module reads no environment and knows no object store.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

SIGNATURE_SUFFIX: Final = ".sig"
PUBLIC_SUFFIX: Final = ".pub"
SIGNATURE_MAX: Final = 4 << 20
"""Bytes."""


class SignatureFault(ValueError):  # noqa: N818 - as BundleFault
    """A signature, a key or a folder of keys that nothing may be built on: which file, and why."""

    def __init__(self, file: Path | str, reason: str, remedy: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = str(file)
        self.reason = reason
        self.remedy = remedy


@dataclasses.dataclass(frozen=True)
class Key:
    """Where the two halves of a key lie, and its fingerprint."""

    private: Path
    public: Path
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Signer:
    """Whom a valid signature is by."""

    name: str
    """Name of the key's file in the folder of trust, without its suffix."""
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class Statement:
    """What somebody trusted has signed: a directory's name, and the sha256 of each of its files."""

    signer: Signer
    name: str
    files: Mapping[str, str]


class Trust:
    """The public keys whose signatures are accepted; a fixed set, read once."""

    def __init__(self, keys: Mapping[str, tuple[str, bytes]], where: str = "the trusted keys") -> None:
        """`keys`: fingerprint to (name, PEM)."""
        self._keys = dict(keys)
        self._where = where

    @classmethod
    def read(cls, folder: Path) -> Trust:
        """The keys in `folder/*.pub`. Raises SignatureFault: no key there, or a file that is no P-256 key."""
        found: dict[str, tuple[str, bytes]] = {}
        for path in sorted(folder.glob(f"*{PUBLIC_SUFFIX}")):
            pem = _public(path)
            found[_fingerprint(pem)] = (path.stem, pem)
        if not found:
            raise SignatureFault(folder, "holds no public key (*.pub)", "copy the .pub of the signer to trust there")
        return cls(found, str(folder))

    @classmethod
    def of(cls, *keys: Key) -> Trust:
        """Trust in these keys themselves, as their owner has it."""
        return cls({key.fingerprint: (key.public.stem, key.public.read_bytes()) for key in keys})

    @property
    def fingerprints(self) -> frozenset[str]:
        """Of every key."""
        return frozenset(self._keys)

    def signer(self, signature: bytes, name: str) -> Signer:
        """Whose key a signature names, before anything is believed. `name` is its file, for the fault.

        Raises SignatureFault for what is no signature, and for one whose signer is not trusted.
        """
        fingerprint = _hint(signature, name)
        if fingerprint not in self._keys:
            raise SignatureFault(
                name,
                f"is signed by the key {fingerprint}, which is not in {self._where}",
                "if that signer is to be trusted, put its .pub there; if not, find out who published this",
            )
        return Signer(self._keys[fingerprint][0], fingerprint)

    def statement(self, signature: bytes, name: str) -> Statement:
        """What a signature says, its signer's key held against it; files are not looked at. `name` as in `signer`.

        So that a forged signature is refused before anything is fetched. Raises SignatureFault.
        """
        signer = self.signer(signature, name)
        try:
            envelope = msgspec.json.decode(signature, type=_Sidecar).dsse_envelope
            payload = base64.b64decode(envelope.payload, validate=True)
            proof = base64.b64decode(envelope.signatures[0].sig, validate=True)
            key = serialization.load_pem_public_key(self.pem(signer.fingerprint))
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise SignatureFault(name, "is by a key of another kind", _REMEDY)
            # What is signed is the payload in the envelope of https://github.com/secure-systems-lab/dsse, version 1.
            signed = b"DSSEv1 %d %s %d %s" % (len(_PAYLOAD), _PAYLOAD, len(payload), payload)
            key.verify(proof, signed, ec.ECDSA(hashes.SHA256()))
            statement = msgspec.json.decode(payload, type=_Payload)
        except InvalidSignature:
            raise SignatureFault(name, f"was not made with the key {signer.fingerprint}", _REMEDY) from None
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, binascii.Error, IndexError) as error:
            raise SignatureFault(name, f"holds no signed statement ({error})", _REMEDY) from None
        if len(statement.subject) != 1:
            raise SignatureFault(name, f"is of {len(statement.subject)} directories, not of one", _REMEDY)
        files = {one.name: one.digest for one in statement.predicate.resources if one.algorithm == "sha256"}
        return Statement(signer, statement.subject[0].name, files)

    def pem(self, fingerprint: str) -> bytes:
        """A trusted key."""
        return self._keys[fingerprint][1]


def make_key(path: Path, *, password: str | None = None) -> Key:
    """An EC P-256 key at `path` (mode 0600, encrypted under `password`) with its public half at `<stem>.pub` beside it.

    A key that is there already is kept, and its public half made again. Raises SignatureFault when that is no such
    key, or the password is not its.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        locker: serialization.KeySerializationEncryption = (
            serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
        )
        _write(
            path,
            ec.generate_private_key(ec.SECP256R1()).private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, locker
            ),
            0o600,
            fresh=True,
        )
    pem = _pem(_private(path, password).public_key())
    public = path.with_suffix(PUBLIC_SUFFIX)
    if not public.exists() or public.read_bytes() != pem:
        _write(public, pem, 0o644)
    return Key(path, public, _fingerprint(pem))


def fingerprint(public: Path) -> str:
    """What a public key is known by. Raises SignatureFault."""
    return _fingerprint(_public(public))


def signature_path(directory: Path) -> Path:
    """Where the signature of a bundle or delta lies: beside it."""
    return directory.with_name(directory.name + SIGNATURE_SUFFIX)


def sign(directory: Path, key: Path, *, password: str | None = None, signature: Path | None = None) -> Path:
    """Sign every byte of `directory` and return the signature's path (default: beside it).

    Raises SignatureFault: a key that cannot be used, or a directory that holds what cannot be signed (a link).
    """
    _private(key, password)
    from model_signing import hashing, signing  # noqa: PLC0415 - takes a second to import; readers of keys need not wait

    target = signature or signature_path(directory)
    config: Any = signing.Config()  # type: ignore[no-untyped-call]  # its constructors have no annotations
    config.set_hashing_config(hashing.Config())  # type: ignore[no-untyped-call]  # as above
    config.use_elliptic_key_signer(private_key=key, password=password.encode() if password else None)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".signing-") as scratch:
        fresh = Path(scratch) / target.name
        try:
            config.sign(directory, fresh)
        except (OSError, ValueError) as error:
            raise SignatureFault(directory, f"cannot be signed: {error}", "sign a verified bundle") from None
        _force(fresh)
        fresh.replace(target)
    _force(target.parent)
    return target


def verify_signature(directory: Path, signature: Path, trust: Trust, *, name: str | None = None) -> Signer:
    """Whom `directory`, every byte of it, is signed by. Raises SignatureFault with the file and the reason.

    `name` is what it was called when it was signed, where that is not what it is called here.
    """
    try:
        if signature.stat().st_size > SIGNATURE_MAX:
            raise SignatureFault(signature, f"is larger than {SIGNATURE_MAX} bytes", "publish the bundle again")
        data = signature.read_bytes()
    except OSError as error:
        raise SignatureFault(
            signature, f"is missing ({error.strerror})", "sign the bundle and publish it again"
        ) from None
    statement = trust.statement(data, str(signature))
    signer = statement.signer
    if statement.name != (name or directory.name):
        # Bytes that are right under another name are still not what was signed.
        raise SignatureFault(signature, f"is of {statement.name}, not of {name or directory.name}", _REMEDY)
    from model_signing import hashing, verifying  # noqa: PLC0415 - as in sign

    with tempfile.TemporaryDirectory() as scratch:
        public = Path(scratch) / "key.pub"
        public.write_bytes(trust.pem(signer.fingerprint))
        # Our own hashing configuration, not the one that the signature asks for: it could ask to look away.
        config: Any = verifying.Config()  # type: ignore[no-untyped-call]  # as in sign
        config.set_hashing_config(hashing.Config())  # type: ignore[no-untyped-call]  # as in sign
        config.use_elliptic_key_verifier(public_key=public)
        try:
            config.verify(directory, signature)
        except InvalidSignature:
            raise SignatureFault(signature, f"was not made with the key {signer.fingerprint}", _REMEDY) from None
        except (
            Exception
        ) as error:  # the library parses hostile bytes with several others: whatever it raises is a refusal
            reason = str(error) or type(error).__name__
            raise SignatureFault(signature, f"does not fit {directory.name}: {reason}", _REMEDY) from None
    return signer


_REMEDY: Final = "fetch it again; if it happens again, find out who wrote to the bucket"


class _PublicKey(msgspec.Struct, frozen=True):
    hint: str


class _Material(msgspec.Struct, frozen=True, rename="camel"):
    public_key: _PublicKey


class _Proof(msgspec.Struct, frozen=True):
    sig: str


class _Envelope(msgspec.Struct, frozen=True):
    payload: str
    signatures: list[_Proof]


class _Sidecar(msgspec.Struct, frozen=True, rename="camel"):
    """A signature: a sigstore bundle v0.3 around a DSSE envelope."""

    verification_material: _Material
    dsse_envelope: _Envelope


class _Subject(msgspec.Struct, frozen=True):
    name: str


class _Resource(msgspec.Struct, frozen=True):
    name: str
    digest: str
    algorithm: str


class _Predicate(msgspec.Struct, frozen=True):
    resources: list[_Resource]


class _Payload(msgspec.Struct, frozen=True):
    """An in-toto statement of https://model_signing/signature/v1.0."""

    subject: list[_Subject]
    predicate: _Predicate


_PAYLOAD: Final = b"application/vnd.in-toto+json"


def _hint(signature: bytes, name: str) -> str:
    if len(signature) > SIGNATURE_MAX:
        raise SignatureFault(name, f"is larger than {SIGNATURE_MAX} bytes", "publish the bundle again")
    try:
        return msgspec.json.decode(signature, type=_Sidecar).verification_material.public_key.hint
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise SignatureFault(
            name, f"is no signature by a key ({error})", "sign the bundle and publish it again"
        ) from None


def _private(path: Path, password: str | None) -> ec.EllipticCurvePrivateKey:
    try:
        mode = path.stat().st_mode & 0o777
        data = path.read_bytes()
    except OSError as error:
        raise SignatureFault(
            path, f"cannot be read ({error.strerror})", "make a key: `rankbridge bundle key`"
        ) from None
    if mode & 0o077:
        raise SignatureFault(path, f"may be read by others (mode {mode:o})", f"chmod 600 {path}, and doubt the key")
    try:
        key = serialization.load_pem_private_key(data, password.encode() if password else None)
    except (TypeError, ValueError, UnsupportedAlgorithm) as error:
        # cryptography's messages name neither the key's bytes nor the password
        raise SignatureFault(
            path, f"cannot be opened ({error})", "give the key's password in the environment"
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.curve.name != "secp256r1":
        raise SignatureFault(path, "is not an EC P-256 key", "make one: `rankbridge bundle key`")
    return key


def _public(path: Path) -> bytes:
    """The PEM of a public key, in the one form that fingerprints are taken of."""
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureFault(path, f"is not a public key in PEM ({error})", "put the signer's .pub there") from None
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp256r1":
        raise SignatureFault(path, "is not an EC P-256 key", "make one: `rankbridge bundle key`")
    return _pem(key)


def _pem(key: ec.EllipticCurvePublicKey) -> bytes:
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)


def _fingerprint(pem: bytes) -> str:
    return hashlib.sha256(pem).hexdigest()


def _write(path: Path, data: bytes, mode: int, *, fresh: bool = False) -> None:
    """Bytes into a file that appears whole, under `mode` from its first moment; with `fresh` only where none is."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.unlink(missing_ok=True)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if fresh:
            with contextlib.suppress(FileExistsError):  # two made one at a time: the first is the key
                os.link(scratch, path)
        else:
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    _force(path.parent)


def _force(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
