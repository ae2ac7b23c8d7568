"""The home edge's keys and the names of people that are made with them.

A pseudonym is `p<epoch>-<first 128 bits of HMAC-SHA256(key, salt || user id)>` in hex (RFC 2104, FIPS 180-4): the only
form of a user that leaves home. The salt is the user's own and lies in the vault (`workloads.privacy.vault`): with key
and salt the same user always gets the same name, without either nobody can compute or undo it, and when the salt is
gone not even home can. This module knows nothing of data sets and loads no data library: the gateway imports it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import re
import secrets
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

KEY_BYTES: Final = 32
SALT_BYTES: Final = 16
DIGEST_BYTES: Final = 16
FIRST_EPOCH: Final = 1

_USER: Final = b"rankbridge/user\x00"
_SESSION: Final = b"rankbridge/session\x00"
_NAME: Final = re.compile(r"pseudonym-([0-9]{1,3})\.key")


class KeyFileError(ValueError):
    """A key file that must not be used; the message names both the fault and the remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


@dataclass(frozen=True)
class PseudonymKey:
    """A secret and its epoch. The secret is in no repr and no message."""

    epoch: int
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        """Refuse a key that would be weak or could not be named."""
        if len(self.secret) != KEY_BYTES:
            raise KeyFileError(
                f"a pseudonym key has {KEY_BYTES} bytes, not {len(self.secret)}", "restore it from a copy"
            )
        if not 0 <= self.epoch <= 999:
            raise KeyFileError(f"key epoch {self.epoch}: must be 0 to 999", "rename the key file")

    def pseudonym(self, user: str, salt: bytes) -> str:
        """The pseudonym of a raw user id with its salt of SALT_BYTES; matches `contract.http.PSEUDONYM_PATTERN`."""
        if len(salt) != SALT_BYTES:
            raise ValueError(f"a salt has {SALT_BYTES} bytes, not {len(salt)}")
        return f"p{self.epoch}-{self._digest(_USER + salt, user)}"

    def session(self, session: str) -> str:
        """The name under which a session may be kept: a raw one often has the user's id in it."""
        return f"s{self.epoch}-{self._digest(_SESSION, session)}"

    @property
    def fingerprint(self) -> str:
        """12 hex digits that tell keys apart and say nothing about the secret."""
        return hmac.digest(self.secret, b"rankbridge/fingerprint", hashlib.sha256).hex()[:12]

    def _digest(self, domain: bytes, text: str) -> str:
        message = domain + text.encode("utf-8", "surrogatepass")
        return hmac.digest(self.secret, message, "sha256")[:DIGEST_BYTES].hex()


def read_key(path: Path) -> PseudonymKey:
    """Read `pseudonym-<epoch>.key`. Raises KeyFileError when it is missing, short, misnamed or open to others."""
    named = _NAME.fullmatch(path.name)
    if named is None:
        raise KeyFileError(f"{path}: a key file is called pseudonym-<epoch>.key", "rename it")
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        raise KeyFileError(f"{path}: no such key", "prepare the data on this machine first") from None
    except OSError as error:
        reason = f"{path}: cannot be read ({error.strerror})"
        raise KeyFileError(reason, "check its owner, and that it is a file and no link") from None
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        if mode & 0o077:
            raise KeyFileError(f"{path}: mode {mode:04o} lets others read it", "run chmod 600 on it")
        secret = file.read(KEY_BYTES + 1)
    if len(secret) != KEY_BYTES:
        raise KeyFileError(f"{path}: holds {len(secret)} bytes instead of {KEY_BYTES}", "restore it from a copy")
    return PseudonymKey(epoch=int(named.group(1)), secret=secret)


def key_path(folder: Path, epoch: int) -> Path:
    """Where the key of an epoch lies."""
    return folder / f"pseudonym-{epoch}.key"


def destroy_key(path: Path) -> bool:
    """Overwrite a key's bytes and remove its name; whether there was one. What was made with it stays unreadable.

    A journaling or copy-on-write file system, or a copy elsewhere, may still hold the old bytes.
    """
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink(missing_ok=True)  # another process may be doing the same
    _sync_folder(path.parent)
    return True


def read_or_create_key(path: Path) -> PseudonymKey:
    """Read the key, or make it if there is none: 32 random bytes, mode 0600, on disk before anyone can see the name.

    Two processes that start at once end up with the same key: the name is taken by a hard link, which
    only one can win.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        draft = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(secrets.token_bytes(KEY_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another process was first; its key is the key
                path.hardlink_to(draft)
        finally:
            draft.unlink()
        _sync_folder(path.parent)
    return read_key(path)


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
