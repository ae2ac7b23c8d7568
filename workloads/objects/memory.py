"""A bucket in memory: the fake of `ObjectStore`, with faults that a test plans.

It keeps S3's promises (strong consistency, conditional writes, versions, Object Lock in governance mode, multipart
uploads) and, by plan, breaks the way S3 and the way to it do: 500 and 503, an answer that is lost, altered bytes, and
the death of the caller before or after a call. Calls are numbered from 1 over all threads.
"""

from __future__ import annotations

import dataclasses
import datetime
import enum
import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from workloads.objects.store import (
    Conflict,
    Content,
    Digesting,
    Got,
    Head,
    Listed,
    Locked,
    NotFound,
    Part,
    Put,
    Sink,
    Unavailable,
    check,
)

T = TypeVar("T")


class Crash(BaseException):
    """The caller's process dies here; it stands for SIGKILL, so nothing may catch it as an error."""


class Kind(enum.Enum):
    """What happens at a planned call."""

    ERROR = "500"
    """The store fails and did nothing."""
    SLOW_DOWN = "503"
    """The store is too busy and did nothing."""
    RESET = "reset"
    """The store did it, and the answer was lost on the way."""
    DELAY = "delay"
    """It takes `delay_s` longer."""
    ALTER = "alter"
    """A read gives other bytes of the same length."""
    CRASH_BEFORE = "crash before"
    CRASH_AFTER = "crash after"


@dataclasses.dataclass
class _Version:
    data: bytes
    etag: str
    modified_ms: int
    locked_until_ms: int = 0


@dataclasses.dataclass
class _Upload:
    key: str
    parts: dict[int, bytes] = dataclasses.field(default_factory=dict)


class MemoryObjects:
    """One bucket. `lock_ms` is the default retention of new versions; 0 is no Object Lock.

    `faults` maps the number of a call to what happens there; `calls` says afterwards which call was which. After a
    crash every call dies, until `revive`: threads of a dead process do nothing more.
    """

    def __init__(
        self,
        faults: dict[int, Kind] | None = None,
        *,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
        lock_ms: int = 0,
        delay_s: float = 0.0,
    ) -> None:
        self.faults = dict(faults or {})
        self.calls: list[tuple[str, str]] = []
        """(method, key) of every call so far."""
        self._clock_ms = clock_ms
        self._lock_ms = lock_ms
        self._delay_s = delay_s
        self._versions: dict[str, list[_Version]] = {}
        self._uploads: dict[str, _Upload] = {}
        self._mutex = threading.RLock()
        self._made = 0
        self._dead = False

    def revive(self, faults: dict[int, Kind] | None = None) -> None:
        """A new process begins: calls are counted from 1 again; what is stored stays."""
        with self._mutex:
            self._dead = False
            self.calls.clear()
            self.faults = dict(faults or {})

    # the door

    def get(self, key: str, *, sha256: str | None = None) -> Got:
        """See ObjectStore."""

        def run(altered: bool) -> Got:  # noqa: FBT001 - a call's one circumstance
            version = self._current(key)
            return Got(check(key, _altered(version.data) if altered else version.data, sha256), version.etag)

        return self._call("get", key, run)

    def get_range(self, key: str, start: int, length: int) -> bytes:
        """See ObjectStore."""

        def run(altered: bool) -> bytes:  # noqa: FBT001 - as above
            data = self._current(key).data[start : start + length]
            return _altered(data) if altered else data

        return self._call("get_range", key, run)

    def download(self, key: str, file: Sink, *, sha256: str | None = None) -> Head:
        """See ObjectStore."""

        def run(altered: bool) -> Head:  # noqa: FBT001 - as above
            version = self._current(key)
            sink = Digesting(file)
            sink.write(_altered(version.data) if altered else version.data)
            sink.check(key, sha256)
            return _head(version)

        return self._call("download", key, run)

    def head(self, key: str) -> Head:
        """See ObjectStore."""
        return self._call("head", key, lambda _: _head(self._current(key)))

    def put_new(self, key: str, content: Content) -> Put:
        """See ObjectStore."""
        data = content if isinstance(content, bytes) else content.read_bytes()

        def run(_altered: bool) -> Put:  # noqa: FBT001 - as above
            if key not in self._versions:
                return Put(self._store(key, data).etag, existed=False)
            there = self._current(key)
            if there.data != data:
                raise Conflict(key, f"{key} is there already, with other bytes")
            return Put(there.etag, existed=True, modified_ms=there.modified_ms)

        return self._call("put_new", key, run)

    def replace(self, key: str, content: Content, etag: str) -> str:
        """See ObjectStore."""
        data = content if isinstance(content, bytes) else content.read_bytes()

        def run(_altered: bool) -> str:  # noqa: FBT001 - as above
            if self._current(key).etag != etag:
                raise Conflict(key)
            return self._store(key, data).etag

        return self._call("replace", key, run)

    def list(self, prefix: str) -> Iterator[Listed]:
        """See ObjectStore."""
        return iter(
            self._call(
                "list",
                prefix,
                lambda _: [
                    Listed(key, len(versions[-1].data), versions[-1].etag, versions[-1].modified_ms)
                    for key, versions in sorted(self._versions.items())
                    if key.startswith(prefix)
                ],
            )
        )

    def delete(self, key: str, *, written_before_ms: int | None = None) -> bool:
        """See ObjectStore."""

        def run(_altered: bool) -> bool:  # noqa: FBT001 - as above
            versions = self._versions.get(key)
            if not versions:
                return False
            if written_before_ms is not None and versions[-1].modified_ms >= written_before_ms:
                return False
            until = max(version.locked_until_ms for version in versions)
            if until > self._clock_ms():
                raise Locked(key, datetime.datetime.fromtimestamp(until / 1000, datetime.UTC))
            del self._versions[key]
            return True

        return self._call("delete", key, run)

    def begin(self, key: str) -> str:
        """See ObjectStore."""

        def run(_altered: bool) -> str:  # noqa: FBT001 - as above
            self._made += 1
            name = f"upload-{self._made:06d}"
            self._uploads[name] = _Upload(key)
            return name

        return self._call("begin", key, run)

    def uploads(self, key: str) -> Sequence[str]:
        """See ObjectStore."""
        return self._call("uploads", key, lambda _: [name for name, one in self._uploads.items() if one.key == key])

    def parts(self, key: str, upload: str) -> Sequence[Part]:
        """See ObjectStore."""
        return self._call(
            "parts",
            key,
            lambda _: [_part(number, data) for number, data in sorted(self._upload(key, upload).parts.items())],
        )

    def put_part(self, key: str, upload: str, number: int, data: bytes) -> Part:
        """See ObjectStore."""

        def run(_altered: bool) -> Part:  # noqa: FBT001 - as above
            self._upload(key, upload).parts[number] = data
            return _part(number, data)

        return self._call("put_part", key, run)

    def complete(self, key: str, upload: str, parts: Sequence[Part]) -> str:
        """See ObjectStore."""

        def run(_altered: bool) -> str:  # noqa: FBT001 - as above
            kept = self._upload(key, upload).parts
            if key in self._versions:
                raise Conflict(key, f"{key} is there already")
            for part in parts:
                if part.number not in kept or _part(part.number, kept[part.number]).etag != part.etag:
                    raise Conflict(key, f"part {part.number} of {key} is not the one that was sent")
            version = self._store(key, b"".join(kept[part.number] for part in parts))
            del self._uploads[upload]
            return version.etag

        return self._call("complete", key, run)

    def abort(self, key: str, upload: str) -> None:
        """See ObjectStore."""
        self._call("abort", key, lambda _: self._uploads.pop(upload, None))

    # what a test looks at and does behind the door's back

    def keys(self) -> Sequence[str]:
        """Every key."""
        return sorted(self._versions)

    def plant(self, key: str, data: bytes) -> None:
        """Put bytes there whatever was there before, as somebody with stolen credentials would."""
        with self._mutex:
            self._store(key, data)

    def remove(self, key: str) -> None:
        """Take an object away whatever keeps it."""
        with self._mutex:
            del self._versions[key]

    # inside

    def _call(self, name: str, key: str, run: Callable[[bool], T]) -> T:
        with self._mutex:
            if self._dead:
                raise Crash(f"{name} {key}: this process is dead")
            self.calls.append((name, key))
            kind = self.faults.get(len(self.calls))
            if kind is Kind.CRASH_BEFORE:
                self._dead = True
                raise Crash(f"before {name} {key}")
            if kind in {Kind.ERROR, Kind.SLOW_DOWN}:
                raise Unavailable(f"{name} {key}: the store answered {kind.value}")
            result = run(kind is Kind.ALTER)
            if kind is Kind.CRASH_AFTER:
                self._dead = True
                raise Crash(f"after {name} {key}")
            if kind is Kind.RESET:
                raise Unavailable(f"{name} {key}: the connection was reset")
        if kind is Kind.DELAY:
            time.sleep(self._delay_s)
        return result

    def _current(self, key: str) -> _Version:
        if key not in self._versions:
            raise NotFound(key)
        return self._versions[key][-1]

    def _store(self, key: str, data: bytes) -> _Version:
        now = self._clock_ms()
        # The number makes the etags of equal bytes differ: nobody may take an etag for a digest.
        self._made += 1
        etag = f'"{hashlib.sha256(data).hexdigest()[:24]}-{self._made}"'
        version = _Version(data, etag, now, now + self._lock_ms if self._lock_ms else 0)
        self._versions.setdefault(key, []).append(version)
        return version

    def _upload(self, key: str, upload: str) -> _Upload:
        found = self._uploads.get(upload)
        if found is None or found.key != key:
            raise NotFound(key, "the open uploads", "begin a new upload")
        return found


def _head(version: _Version) -> Head:
    return Head(len(version.data), version.etag, version.modified_ms)


def _part(number: int, data: bytes) -> Part:
    return Part(number, f'"{hashlib.sha256(data).hexdigest()[:24]}"', len(data))


def _altered(data: bytes) -> bytes:
    return bytes([data[0] ^ 1]) + data[1:] if data else data
