"""The one door to object storage: what may be asked of a bucket, what comes back, and what can go wrong.

`S3Objects` (`workloads.objects.s3`) is the real one, `MemoryObjects` (`workloads.objects.memory`) its fake. Every call
is synchronous and is over when it returns: an object is there whole or not at all. Writers say what they expect
(`put_new`: nothing there; `replace`: this very etag), so that of two racing writers one is told. Checksums of the
service are not relied on: readers of content-addressed objects give the sha256 and get `Damaged` for anything else.
No object carries metadata of ours. This module knows no keys and no meaning of what is stored.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

Content = bytes | Path
"""What is stored: bytes, or a file that is read while it is sent."""


class Sink(Protocol):
    """What a download is written to: a file that is open for writing bytes."""

    def write(self, data: bytes, /) -> object:
        """Take the next bytes."""


class ObjectsError(Exception):
    """Object storage did not do what was asked; `fault` says what, `remedy` what to do."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


class NotFound(ObjectsError):  # noqa: N818 - what it is called in the domain
    """There is no such object (or bucket, or upload)."""

    def __init__(
        self, key: str, where: str = "the bucket", remedy: str = "publish it, or name the right bucket"
    ) -> None:
        super().__init__(f"{key} is not in {where}", remedy)
        self.key = key


class Conflict(ObjectsError):  # noqa: N818 - as above
    """Somebody else wrote the object first: what is there is not what the writer expected."""

    def __init__(self, key: str, fault: str | None = None) -> None:
        super().__init__(fault or f"{key} was written by somebody else meanwhile", "read it again and decide anew")
        self.key = key


class Unavailable(ObjectsError):  # noqa: N818 - as above
    """The store could not be reached, or kept failing, after all tries. Whether a write happened is not known."""

    def __init__(
        self, fault: str, remedy: str = "look whether object storage and the way to it are up, and try again"
    ) -> None:
        super().__init__(fault, remedy)


class Denied(ObjectsError):  # noqa: N818 - as above
    """The store knows us and says no."""

    def __init__(self, fault: str, remedy: str = "check the credentials and the role's rights for this bucket") -> None:
        super().__init__(fault, remedy)


class Locked(Denied):
    """Object Lock keeps a version; nothing of the object was removed."""

    def __init__(self, key: str, until: datetime.datetime | None) -> None:
        """`until` is in UTC; None for a legal hold, which has no end."""
        end = f"until {until:%Y-%m-%d %H:%M} UTC" if until else "by a legal hold"
        super().__init__(f"{key} is kept {end} by Object Lock", "remove it after that")
        self.key = key
        self.until = until


class Damaged(ObjectsError):  # noqa: N818 - as above
    """The bytes that came are not the ones that the digest promises."""

    def __init__(self, key: str, found: str, wanted: str) -> None:
        super().__init__(
            f"{key} has the sha256 {found}, not {wanted}",
            "somebody wrote other bytes under this key: remove the object and publish it again",
        )
        self.key = key


@dataclasses.dataclass(frozen=True)
class Got:
    """A whole object in memory."""

    data: bytes
    etag: str
    """What `replace` wants to see still there; opaque."""


@dataclasses.dataclass(frozen=True)
class Head:
    """What is known of an object without reading it."""

    size: int
    """Bytes."""
    etag: str
    modified_ms: int
    """By the store's clock; S3 knows whole seconds."""


@dataclasses.dataclass(frozen=True)
class Listed:
    """One object of a listing."""

    key: str
    size: int
    etag: str
    modified_ms: int


@dataclasses.dataclass(frozen=True)
class Put:
    """How a `put_new` ended."""

    etag: str
    existed: bool
    """The same bytes were there already."""
    modified_ms: int = 0
    """When those were written; 0 where there was nothing."""


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of an upload that the store has; numbers begin at 1."""

    number: int
    etag: str
    size: int


class ObjectStore(Protocol):
    """One bucket. Every method may raise Unavailable and Denied."""

    def get(self, key: str, *, sha256: str | None = None) -> Got:
        """A whole small object. Raises NotFound; Damaged when its digest is not `sha256` (64 hex)."""

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer where the object ends. Raises NotFound."""

    def download(self, key: str, file: Sink, *, sha256: str | None = None) -> Head:
        """Stream an object into `file`, from where that stands. Raises NotFound; Damaged (the bytes are in `file`)."""

    def head(self, key: str) -> Head:
        """Raises NotFound."""

    def put_new(self, key: str, content: Content) -> Put:
        """Store under a key that is free.

        The same bytes there already are no fault (`existed`): they are read and compared. Raises Conflict when there
        are others.
        """

    def replace(self, key: str, content: Content, etag: str) -> str:
        """Store over the object that has this etag; returns the new one. Raises Conflict, NotFound.

        After Unavailable, and after a Conflict that follows one try of the transport, the write may be our own: who
        must know reads the object.
        """

    def list(self, prefix: str) -> Iterator[Listed]:
        """Every object whose key begins with `prefix`, by key."""

    def delete(self, key: str, *, written_before_ms: int | None = None) -> bool:
        """Remove an object with all its versions; False when there is none.

        With `written_before_ms` only what was written before then goes: an object that was written again meanwhile
        stays, and the answer is False. Raises Locked when Object Lock keeps a version; then nothing was removed.
        """

    def begin(self, key: str) -> str:
        """Open a multipart upload and return its name; parts wait with the store, invisible, until `complete`."""

    def uploads(self, key: str) -> Sequence[str]:
        """Open uploads of exactly this key, oldest first: what a writer that lost its own notes goes on with."""

    def parts(self, key: str, upload: str) -> Sequence[Part]:
        """Parts that have arrived, by number. Raises NotFound when there is no such upload."""

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> Part:
        """Send one part, again if need be; all but the last are 5 MiB or more. Raises NotFound."""

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> str:
        """Make one object of the parts, under a key that is free; returns its etag. Raises Conflict, NotFound."""

    def abort(self, key: str, upload: str) -> None:
        """Give up an upload and its parts; nothing happens when there is none."""


def digest_of(content: Content) -> str:
    """sha256 of what is to be stored, 64 hex digits."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    with content.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check(key: str, data: bytes, sha256: str | None) -> bytes:
    """`data`, if it has this digest. Raises Damaged."""
    if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise Damaged(key, found, sha256)
    return data


class Digesting:
    """A sink that hands bytes on to a file and digests them on the way."""

    def __init__(self, file: Sink) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes, /) -> None:
        """Take the next bytes."""
        self._sha256.update(data)
        self.size += len(data)
        self._file.write(data)

    def check(self, key: str, sha256: str | None) -> None:
        """Raises Damaged when what came has another digest."""
        if sha256 is not None and (found := self._sha256.hexdigest()) != sha256:
            raise Damaged(key, found, sha256)
