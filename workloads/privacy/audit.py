"""What left, what was promoted and who was forgotten: a log of lines that vouch for one another.

One JSON object a line. Its `hash` is the sha256 of the same object's bytes without `hash`, and `prev` is the hash of
the line before, so that a line which is altered, removed, put in or moved breaks the chain at a place that `verify`
names. Whoever may write the file can make a new chain from any line on: against that, and against a cut tail, stand
*heads* (`<seq>:<hash>`, what `append` returns) that others keep: channel pointers, replica manifests. Several processes
may append. The log names no person: an erasure goes by its random ticket. What the actions mean is its writers' affair.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Final, NamedTuple, Protocol

import msgspec

GENESIS: Final = "0" * 64
"""`prev` of the first line."""
LINE_MAX: Final = 64 * 1024
"""Longest line in bytes; who has more to say puts a digest of it here."""
REPAIRED: Final = "audit.repaired"
"""Action of the line that says how many bytes of an unfinished one were dropped."""

Fact = str | int | float | bool | None
_Hash = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}$")]
_HEAD: Final = re.compile(r"([1-9][0-9]{0,17}):([0-9a-f]{64})")
_PERSON: Final = re.compile(r"p[0-9]{1,3}-[0-9a-f]{32}")


class AuditError(Exception):
    """A log that cannot be added to or read; the message names fault and remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line. Field order is the order of bytes that are hashed."""

    seq: Annotated[int, msgspec.Meta(ge=1)]
    """Line number, from 1."""
    time_ms: int
    actor: str
    """Who did it: a job, or `user@host` at the desk."""
    action: str
    """`bundle.promote`, `replica.export`, `person.erased`: a room, a dot, a verb."""
    subject: str
    """What it was done to: a bundle's id, a data set's name, an erasure's ticket."""
    detail: dict[str, Fact] = {}
    prev: _Hash
    hash: _Hash

    @property
    def head(self) -> str:
        """What stands for this line and all before it: `<seq>:<hash>`."""
        return f"{self.seq}:{self.hash}"


class Audit(Protocol):
    """The door to the log."""

    def append(self, *, action: str, actor: str, subject: str, detail: Mapping[str, Fact] | None = None) -> str:
        """Write a line and return the new head once it is on disk. Raises AuditError, ValueError for a bad line."""
        ...


class MemoryAudit:
    """The fake: entries in a list, chained as in the file."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def append(self, *, action: str, actor: str, subject: str, detail: Mapping[str, Fact] | None = None) -> str:
        """See `Audit`."""
        last = self.entries[-1] if self.entries else None
        entry = _entry(last, time.time_ns() // 1_000_000, action, actor, subject, detail)
        self.entries.append(entry)
        return entry.head


class AuditLog:
    """The log in a file, mode 0600, made at the first line. Safe between threads and processes (flock).

    An unfinished last line, as a crash leaves it, was never acknowledged: the next append drops it and says so in a
    line of its own. A last line that is whole and wrong is refused: that was no crash.
    """

    def __init__(self, path: Path, *, clock: Callable[[], int] = lambda: time.time_ns() // 1_000_000) -> None:
        self.path = path
        self._clock = clock

    def append(self, *, action: str, actor: str, subject: str, detail: Mapping[str, Fact] | None = None) -> str:
        """See `Audit`."""
        _entry(None, 0, action, actor, subject, detail)  # a bad line is refused before the file is touched
        with self._locked() as descriptor:
            last, torn = self._tail(descriptor)
            lines = []
            if torn:
                os.ftruncate(descriptor, os.fstat(descriptor).st_size - torn)
                last = _entry(last, self._clock(), REPAIRED, "audit", self.path.name, {"dropped_bytes": torn})
                lines.append(last)
            entry = _entry(last, self._clock(), action, actor, subject, detail)
            lines.append(entry)
            os.lseek(descriptor, 0, os.SEEK_END)
            _write_all(descriptor, b"".join(_line(each) for each in lines))
            os.fsync(descriptor)
            return entry.head

    def head(self) -> str | None:
        """The newest head, or None of a log without lines. Raises AuditError."""
        if not self.path.exists():
            return None
        with self._locked() as descriptor:
            last, _ = self._tail(descriptor)
        return None if last is None else last.head

    @contextlib.contextmanager
    def _locked(self) -> Iterator[int]:
        new = not self.path.exists()
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise AuditError(
                f"{self.path}: cannot be opened ({error.strerror})", "see who owns it, and that it is a file"
            ) from None
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise AuditError(f"{self.path}: is no file", "move it away")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if new:
                _sync_folder(self.path.parent)
            yield descriptor
        finally:
            os.close(descriptor)

    def _tail(self, descriptor: int) -> tuple[Entry | None, int]:
        """The last whole line, and how many bytes of an unfinished one follow it."""
        size = os.fstat(descriptor).st_size
        tail = os.pread(descriptor, 2 * LINE_MAX + 2, max(0, size - 2 * LINE_MAX - 2))
        end = tail.rfind(b"\n") + 1
        torn = len(tail) - end
        if end == 0:
            if size > len(tail):
                raise AuditError(
                    f"{self.path}: ends with {torn} bytes that are no line", "run `rankbridge audit verify`"
                )
            return None, torn
        start = tail.rfind(b"\n", 0, end - 1) + 1
        entry, fault = _read_line(tail[start : end - 1])
        if entry is None:
            raise AuditError(
                f"{self.path}: the last line is not one of this log's ({fault})",
                "run `rankbridge audit verify`, keep the file as evidence, and move it away to begin a new one",
            )
        return entry, torn


class AuditFault(NamedTuple):
    """One thing wrong with a log. `kind`: altered, removed, inserted, reordered, truncated, torn."""

    line: int
    """1-based place in the file; for `truncated` the first line that is missing."""
    kind: str
    text: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.kind}: {self.text}"


class Anchor(NamedTuple):
    """A head that somebody else kept, and who (`channel stable`)."""

    head: str
    source: str = "a head kept elsewhere"


class Verified(NamedTuple):
    """What `verify` found; `faults` is empty for a log that is whole."""

    entries: int
    head: str | None
    faults: tuple[AuditFault, ...]


def verify(path: Path, anchors: Iterable[Anchor | str] = ()) -> Verified:
    """Hold every line of a log against the one before it, and the whole against heads that others kept.

    Changes nothing. Raises AuditError when the file cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        data, exists = b"", False
    except OSError as error:
        raise AuditError(f"{path}: cannot be read ({error.strerror})", "see who owns it") from None
    else:
        with os.fdopen(descriptor, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            data, exists = file.read(), True
    *lines, torn = data.split(b"\n")
    read = [_read_line(line) for line in lines]
    faults = _broken_links(read)
    if torn:
        text = f"{len(torn)} bytes of an unfinished line, as a crash leaves them; the next append drops them"
        faults.append(AuditFault(len(lines) + 1, "torn", text))
    faults += _against(anchors, read, missing="" if exists else f"{path.name} does not exist")
    last = read[-1][0] if read else None
    return Verified(len(lines), None if last is None else last.head, tuple(sorted(faults)))


def entries(path: Path) -> Iterator[Entry]:
    """The lines of a log in order, unverified; what is not a line of ours is passed over."""
    with path.open("rb") as file:
        for line in file:
            entry, _ = _read_line(line.rstrip(b"\n"))
            if entry is not None:
                yield entry


def _broken_links(read: list[tuple[Entry | None, str]]) -> list[AuditFault]:
    faults = []
    places = {entry.seq for entry, _ in read if entry is not None}
    expected, prev, trusted = 1, GENESIS, True
    for number, (entry, fault) in enumerate(read, start=1):
        if entry is None:
            faults.append(AuditFault(number, "altered", fault))
            expected, trusted = expected + 1, False  # its hash is unknown: the next line cannot be held against it
            continue
        if entry.seq > expected:
            gap = f"{expected}" if entry.seq == expected + 1 else f"{expected} to {entry.seq - 1}"
            if expected in places:
                text = f"it says that it is line {entry.seq}, and line {expected} stands elsewhere"
                faults.append(AuditFault(number, "reordered", text))
            else:
                faults.append(AuditFault(number, "removed", f"what was line {gap} is missing before it"))
        elif entry.seq < expected:
            earlier = sum(1 for other, _ in read[: number - 1] if other is not None and other.seq == entry.seq)
            if earlier:
                text = f"a line before it says as well that it is line {entry.seq}; one of them was put in"
                faults.append(AuditFault(number, "inserted", text))
            else:
                faults.append(AuditFault(number, "reordered", f"it says that it is line {entry.seq}"))
        elif trusted and entry.prev != prev:
            text = "it does not follow from the line before; one of the two was put in the place of another"
            faults.append(AuditFault(number, "inserted", text))
        expected, prev, trusted = entry.seq + 1, entry.hash, True
    return faults


def _against(anchors: Iterable[Anchor | str], read: list[tuple[Entry | None, str]], missing: str) -> list[AuditFault]:
    faults = []
    by_seq = {entry.seq: entry for entry, _ in read if entry is not None}
    for each in anchors:
        anchor = Anchor(each) if isinstance(each, str) else each
        form = _HEAD.fullmatch(anchor.head)
        if form is None:
            raise AuditError(f"{anchor.source}: {anchor.head!r} is no head of a log", "give <line>:<64 hex digits>")
        seq, digest = int(form.group(1)), form.group(2)
        found = by_seq.get(seq)
        if found is not None and found.hash != digest:
            faults.append(AuditFault(seq, "altered", f"{anchor.source} recorded another line; history was rewritten"))
        elif found is None and seq > len(read):
            text = missing or f"the log ends at line {len(read)}"
            faults.append(AuditFault(len(read) + 1, "truncated", f"{text}, but {anchor.source} recorded line {seq}"))
        elif found is None:
            faults.append(AuditFault(seq, "removed", f"{anchor.source} recorded a line that is not there"))
    return faults


def _entry(  # noqa: PLR0917 - what an append gives, with what goes before it
    last: Entry | None,
    time_ms: int,
    action: str,
    actor: str,
    subject: str,
    detail: Mapping[str, Fact] | None,
) -> Entry:
    """The entry that follows `last`. Raises ValueError for one that cannot stand in a log."""
    facts = dict(detail or {})
    if not action or not actor:
        raise ValueError("action and actor: a line says what was done and by whom")
    for text in (action, actor, subject, *facts, *(value for value in facts.values() if isinstance(value, str))):
        if _PERSON.search(text):
            raise ValueError("an audit line names no person: give a count or the erasure's ticket, not a pseudonym")
    draft = Entry(
        seq=1 if last is None else last.seq + 1,
        time_ms=time_ms,
        actor=actor,
        action=action,
        subject=subject,
        detail=facts,
        prev=GENESIS if last is None else last.hash,
        hash=GENESIS,
    )
    entry = msgspec.structs.replace(draft, hash=_digest(draft))
    line = _line(entry)
    if len(line) > LINE_MAX:
        raise ValueError(f"detail: the line would have {len(line)} bytes, the limit is {LINE_MAX}; give a digest")
    if _read_line(line[:-1])[0] != entry:
        raise ValueError("detail: holds a value that JSON does not give back as it was (NaN, an infinity)")
    return entry


_encode: Final = msgspec.json.Encoder(order="deterministic").encode
_decode: Final = msgspec.json.Decoder(Entry).decode
_HASH_BYTES: Final = len(f',"hash":"{GENESIS}"}}')


def _digest(entry: Entry) -> str:
    """The sha256 of the line's bytes without its last field."""
    return hashlib.sha256(_encode(entry)[:-_HASH_BYTES] + b"}").hexdigest()


def _line(entry: Entry) -> bytes:
    return _encode(entry) + b"\n"


def _read_line(line: bytes) -> tuple[Entry | None, str]:
    """A line that vouches for itself, or None and why it does not."""
    try:
        entry = _decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        return None, f"it cannot be read ({error})"
    if _encode(entry) != line:
        return None, "its bytes are not those that this log writes"
    if _digest(entry) != entry.hash:
        return None, "its content does not have its hash"
    return entry, ""


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
