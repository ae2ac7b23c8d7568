"""Where acknowledged events are: one SQLite file at home, written by one process.

`append` returns only when the rows are on disk: journal_mode=WAL with synchronous=FULL makes SQLite
fsync the write-ahead log at every commit (https://www.sqlite.org/pragma.html#pragma_synchronous), and
the settings are read back because SQLite ignores what it cannot do. The file may be read by others while
it is written, read-only; `seq` orders events by arrival and is never given twice.

The file is a spool: `trim` takes away its beginning once the lake has it, while `seen` keeps the ids of events
for longer than their rows, so that an event sent again is still known. `erase` takes away what names a person,
down to the bytes. Knows no thread, no queue and no network; `writer` gives it those.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import sqlite3
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Final, NamedTuple, Protocol, TypeVar

from workloads.intake.records import Batch, Row

COLUMNS: tuple[str, ...] = (
    *("event_id", "type", "timestamp_ms", "user", "item", "session", "query"),
    *("position", "quantity", "price", "rating", "context", "request_id", "schema_version"),
)
"""Columns of `events` that come from an event; `seq` orders rows by arrival, `received_ms` is the clock here."""

DEAD_LETTERS_KEPT: Final = 100_000
"""Newest dead letters that are kept, so that a broken sender cannot fill the disk."""

CHECKPOINT_BYTES: Final = 4 * 1024 * 1024
"""A write-ahead log longer than this is moved into the database when nobody waits."""
BUSY_MS: Final = 2_000
"""How long a statement waits for a lock; only an erasure's checkpoint ever meets one."""
OVERDUE_BYTES: Final = 64 * 1024 * 1024
"""A log longer than this is moved even when somebody waits: under traffic that never pauses it would fill the disk."""

IDS_KEPT_MS: Final = 48 * 3600 * 1000
"""How long an id is known at least, from the moment that a uuid7 tells, once the row is trimmed. While the row is
here its id is known, however old. Beyond both the lake finds duplicates. 500 events a second make 2 GB of ids."""
CLOCK_AHEAD_MS: Final = 24 * 3600 * 1000
"""An id from further in the future comes of a wrong clock and would be kept for ever; it goes with its row."""
CHUNK: Final = 5_000
"""Rows that one step of housekeeping looks at, so that no acknowledgement waits long behind it."""
SEARCH_BYTES: Final = 1024 * 1024
"""Bytes of the file that one step of an erasure searches."""
READERS_WAIT_S: Final = 10.0
"""How long an erasure waits for readers that still look at the rows that it removed."""

_SCHEMA: Final = (
    """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY,
  event_id TEXT NOT NULL,
  type TEXT NOT NULL,
  timestamp_ms INTEGER NOT NULL,
  user TEXT, item TEXT, session TEXT, query TEXT,
  position INTEGER, quantity INTEGER, price REAL, rating REAL,
  context TEXT,
  request_id TEXT,
  schema_version INTEGER NOT NULL,
  received_ms INTEGER NOT NULL
)""",
    """
CREATE TABLE IF NOT EXISTS dead_letters (
  seq INTEGER PRIMARY KEY,
  received_ms INTEGER NOT NULL,
  reason TEXT NOT NULL,
  field TEXT,
  payload BLOB NOT NULL
)""",
    # 16 bytes an id, in the order of the time in them: new ones go to the end, old ones leave at the beginning.
    "CREATE TABLE IF NOT EXISTS seen (id BLOB PRIMARY KEY, seq INTEGER NOT NULL) WITHOUT ROWID",
    """
CREATE TABLE IF NOT EXISTS spool (
  id INTEGER PRIMARY KEY CHECK (id = 1), last_seq INTEGER NOT NULL, trimmed_seq INTEGER NOT NULL
)""",
    "CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY, moment INTEGER NOT NULL)",
    "INSERT OR IGNORE INTO spool VALUES (1, 0, 0)",
)
_SCHEMA_VERSION: Final = 2
_FIRST_SCHEMA_VERSION: Final = 1
"""Had its ids in `events` alone, and no `request_id`."""
_INSERT: Final = (
    f"INSERT INTO events (seq, {', '.join(COLUMNS)}, received_ms) VALUES ({', '.join('?' * (len(COLUMNS) + 2))})"  # noqa: S608 - names are ours
)
_SEEN: Final = "INSERT INTO seen (id, seq) VALUES (?, ?) ON CONFLICT (id) DO NOTHING"

_FRAGMENT: Final = 16
"""Hex digits of a pseudonym that still tell whom it means: a stale copy may be half overwritten."""
_BLOCKS_MAX: Final = 64
_HEX_RUN: Final = re.compile(rb"[0-9a-f]{16,}")


class StoreError(Exception):
    """The store could not take rows; nothing of the group is in it."""


class StorageFullError(StoreError):
    """The disk, or the file's size limit, is used up."""


class Appended(NamedTuple):
    """What became of one batch that is now on disk."""

    accepted: int
    duplicates: int
    rejected: int


class Erased(NamedTuple):
    """What an erasure removed."""

    events: int
    dead_letters: int


class Trimmed(NamedTuple):
    """What a trim removed, and where the spool is now."""

    events: int
    trimmed_seq: int
    last_seq: int


_T = TypeVar("_T")
Steps = Generator[None, None, _T]
"""Long work in steps, each durable by itself; between two of them the store may take events."""


class EventStore(Protocol):
    """The door to the disk."""

    def append(self, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
        """Write all batches in one transaction and return when it is on disk, one entry per batch.

        An event whose id is known already is counted and not written. Raises StoreError, and then
        nothing of these batches is stored.
        """

    def probe(self) -> float:
        """Make one durable write and return its milliseconds. Raises StoreError."""

    def tidy(self) -> None:
        """Housekeeping that may take a while; called when nobody waits, or when it is overdue."""

    def is_overdue(self) -> bool:
        """Whether housekeeping can wait for a quiet moment no longer; asked after each group."""
        ...

    def reusable_bytes(self) -> int:
        """Room inside the store that its next rows take before they ask the disk for more."""
        ...

    def erase(self, pseudonyms: frozenset[str]) -> Steps[Erased]:
        """Remove all events and dead letters that name one of them, and their bytes.

        When the steps are done it is on disk, and covers all that was appended up to the last of them. Ids of the
        removed events stay known: a client that sends one again does not bring it back. Raises StoreError.
        """
        ...

    def trim(self, up_to_seq: int, received_before_ms: int, now_ms: int) -> Steps[Trimmed]:
        """Remove the spool's beginning up to `up_to_seq`, as far as it arrived before `received_before_ms`.

        Forgets ids that are out of their time. Raises StoreError.
        """
        ...

    def close(self) -> None:
        """Let go of the file."""


class Rows(Protocol):
    """What a statement gives, as sqlite3.Cursor does."""

    @property
    def rowcount(self) -> int:
        """Rows that the statement changed."""
        ...

    def fetchone(self) -> Any:  # noqa: ANN401 - a row is what its statement selects
        """The next row, or None."""
        ...

    def fetchall(self) -> list[Any]:
        """All that are left."""
        ...


class Connection(Protocol):
    """What the store needs of SQLite, as sqlite3.Connection in autocommit gives it; raises sqlite3.Error."""

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction is open."""
        ...

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Rows:
        """Run one statement."""
        ...

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Rows:
        """Run one statement for each row of parameters."""
        ...

    def close(self) -> None:
        """Let go of the file."""


def connect(path: pathlib.Path) -> Connection:
    """The interpreter's own SQLite, as it is used in production."""
    return sqlite3.connect(path, isolation_level=None, timeout=BUSY_MS / 1000, cached_statements=32)


class SqliteStore:
    """The real store. Made and used by one thread.

    `connect` opens the file; tests give one whose disk loses power. `log_bytes` instead of OVERDUE_BYTES suits a
    small disk. Raises StoreError when the file cannot be
    opened, is of a newer schema, or will not be durable.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        connect: Callable[[pathlib.Path], Connection] = connect,
        ids_kept_ms: int = IDS_KEPT_MS,
        log_bytes: int | None = None,
    ) -> None:
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        self._connect = connect
        self._ids_kept_ms = ids_kept_ms
        self._log_bytes = OVERDUE_BYTES if log_bytes is None else log_bytes
        self._moved_bytes = min(CHECKPOINT_BYTES, self._log_bytes)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection: Connection | None = self._open()

    def _open(self) -> Connection:
        try:
            connection = self._connect(self.path)
        except sqlite3.Error as error:
            raise StoreError(f"cannot open {self.path}: {error}") from error
        try:
            self._prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            raise StoreError(f"cannot use {self.path}: {error}") from error
        except StoreError:
            connection.close()
            raise
        # The names of the database and of its log must outlive a power cut as their contents do.
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return connection

    def _prepare(self, connection: Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        # What is deleted is overwritten with zeros: most of an erasure, see `_search`.
        connection.execute("PRAGMA secure_delete=ON")
        # Checkpoints are `tidy`'s: one inside a commit would make an acknowledgement wait for it.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        # A log that was moved is cut to this by the next write: a longer one holds what was not moved yet.
        connection.execute(f"PRAGMA journal_size_limit={self._moved_bytes}")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA_VERSION:
            raise StoreError(f"{self.path} has schema {version}, this intake knows {_SCHEMA_VERSION}")
        if version < _SCHEMA_VERSION:
            connection.execute("BEGIN IMMEDIATE")
            _migrate(connection, version)
            connection.execute("COMMIT")
        settings = self._settings(connection)
        if settings != {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}:
            raise StoreError(f"{self.path} cannot be written durably here: {settings}")

    @staticmethod
    def _settings(connection: Connection) -> dict[str, str | int]:
        names = ("journal_mode", "synchronous", "secure_delete")
        return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in names}

    def settings(self) -> dict[str, str | int]:
        """What SQLite says of its durability: journal_mode, synchronous (2 is FULL) and secure_delete."""
        return self._settings(self._connected())

    def _connected(self) -> Connection:
        """The connection, opened again if a fault closed it."""
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def append(self, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
        """See EventStore."""
        return self._commit(lambda connection: _write_all(connection, batches, received_ms))

    def _commit(self, work: Callable[[Connection], _T]) -> _T:
        """One transaction around `work`, on disk when this returns. Raises StoreError."""
        connection = self._connected()
        try:
            connection.execute("BEGIN IMMEDIATE")
            done = work(connection)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(connection, error) from error
        except Exception:  # a value that SQLite cannot hold is no sqlite3.Error; the next group must not pay for it
            _roll_back(connection)
            raise
        return done

    def probe(self) -> float:
        """See EventStore."""
        connection = self._connected()
        begun = time.perf_counter()
        try:
            connection.execute("INSERT OR REPLACE INTO probe VALUES (1, ?)", (time.time_ns(),))
        except sqlite3.Error as error:
            raise self._failed(connection, error) from error
        return (time.perf_counter() - begun) * 1000

    def _failed(self, connection: Connection, error: sqlite3.Error) -> StoreError:
        """The typed form of a failure, with the transaction undone."""
        _roll_back(connection)
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if code == sqlite3.SQLITE_FULL:
            return StorageFullError(f"{self.path}: {error}")
        if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT):
            # After a failed fsync the kernel may have dropped the pages and will report success next time:
            # only a fresh look at the file is to be trusted.
            with contextlib.suppress(sqlite3.Error):
                connection.close()
            self._connection = None
        return StoreError(f"{self.path}: {error}")

    def tidy(self) -> None:
        """Move the write-ahead log into the database once it has grown; waits for no reader."""
        # A checkpoint that fails leaves the log a little longer; commits report real faults.
        with contextlib.suppress(sqlite3.Error, OSError):
            if self._connection is not None and self._wal.stat().st_size > self._moved_bytes:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def is_overdue(self) -> bool:
        """See EventStore."""
        try:
            return self._wal.stat().st_size > self._log_bytes
        except OSError:
            return False

    def reusable_bytes(self) -> int:
        """See EventStore. Pages that a trim or an erasure freed; the file does not shrink."""
        if self._connection is None:
            return 0
        try:
            free, size = (
                int(self._connection.execute(f"PRAGMA {name}").fetchone()[0])
                for name in ("freelist_count", "page_size")
            )
        except sqlite3.Error:
            return 0
        return free * size

    def erase(self, pseudonyms: frozenset[str]) -> Steps[Erased]:
        """See EventStore.

        Rows go first, in chunks; then the log, which holds earlier pages, is emptied into the file. secure_delete
        zeroes what is deleted, but a page that SQLite rebuilt may keep a stale copy of a row that moved, between
        its cells: so the file is searched, and rewritten whole (VACUUM) where it still names somebody.
        """
        names = _Names(pseudonyms)
        places = {"events": 0, "dead_letters": 0}
        removed = dict.fromkeys(places, 0)
        more = True
        while more:
            more = self._commit(lambda connection: _erase_chunk(connection, names, places, removed))
            yield
        yield from self._empty_log()
        if (yield from self._search(names)):
            self._alone("VACUUM")
            yield
            yield from self._empty_log()
            if (yield from self._search(names)):
                raise StoreError(f"{self.path} still names somebody who was removed from it; erase again")
        return Erased(removed["events"], removed["dead_letters"])

    def _alone(self, statement: str) -> Any:  # noqa: ANN401 - a row is what its statement selects
        """The first row of a statement that is a transaction by itself. Raises StoreError."""
        connection = self._connected()
        try:
            return connection.execute(statement).fetchone()
        except sqlite3.Error as error:
            raise self._failed(connection, error) from error

    def _empty_log(self) -> Steps[None]:
        """Move the whole log into the file and cut it to nothing, which must wait for readers of older rows."""
        until = time.monotonic() + READERS_WAIT_S
        while True:
            self._alone("PRAGMA busy_timeout=0")  # events must not wait as well
            try:
                busy = bool(self._alone("PRAGMA wal_checkpoint(TRUNCATE)")[0])
            finally:
                self._alone(f"PRAGMA busy_timeout={BUSY_MS}")
            if not busy:
                return
            if time.monotonic() > until:
                raise StoreError(
                    f"{self.path}: removed rows are still in its log, which a reader has held for {READERS_WAIT_S:g} s"
                )
            time.sleep(0.005)
            yield

    def _search(self, names: _Names) -> Steps[bool]:
        """Whether one of the names, or half of one, is anywhere in the file."""
        with self.path.open("rb") as file:
            before = b""
            while block := file.read(SEARCH_BYTES):
                if names.are_in(before + block):
                    return True
                before = block[-_FRAGMENT:]
                yield
        return False

    def trim(self, up_to_seq: int, received_before_ms: int, now_ms: int) -> Steps[Trimmed]:
        """See EventStore."""
        removed = 0
        while True:
            gone = self._commit(lambda connection: _trim_chunk(connection, up_to_seq, received_before_ms))
            removed += gone
            yield
            if gone < CHUNK:
                break
        oldest = _moment_key(now_ms - self._ids_kept_ms)
        latest = _moment_key(now_ms + CLOCK_AHEAD_MS)
        while self._commit(lambda connection: _forget_chunk(connection, oldest, latest)) == CHUNK:
            yield
        trimmed_seq, last_seq = self._alone("SELECT trimmed_seq, last_seq FROM spool")
        return Trimmed(removed, trimmed_seq, last_seq)

    def close(self) -> None:
        """Checkpoint and let go of the file."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.close()
            self._connection = None


def _roll_back(connection: Connection) -> None:
    with contextlib.suppress(sqlite3.Error):
        if connection.in_transaction:
            connection.execute("ROLLBACK")


def _key(event_id: str) -> bytes:
    """A uuid's 16 bytes; a uuid7's first six are its moment."""
    return bytes.fromhex(event_id.replace("-", ""))


def _moment_key(moment_ms: int) -> bytes:
    """The lowest key of a moment."""
    return min(max(moment_ms, 0), 2**48 - 1).to_bytes(6, "big")


def _migrate(connection: Connection, version: int) -> None:
    """Bring an empty file, or one of an earlier schema, to `_SCHEMA_VERSION`."""
    if version == _FIRST_SCHEMA_VERSION:
        connection.execute("ALTER TABLE events RENAME TO earlier")
    for statement in _SCHEMA:
        connection.execute(statement)
    if version == _FIRST_SCHEMA_VERSION:
        names = ", ".join(("seq", *(name for name in COLUMNS if name != "request_id"), "received_ms"))
        connection.execute(f"INSERT INTO events ({names}) SELECT {names} FROM earlier")  # noqa: S608 - names are ours
        known = connection.execute("SELECT event_id, seq FROM earlier").fetchall()
        connection.executemany(_SEEN, [(_key(event_id), seq) for event_id, seq in known])
        connection.execute("UPDATE spool SET last_seq = (SELECT coalesce(max(seq), 0) FROM earlier)")
        connection.execute("DROP TABLE earlier")
    connection.execute(f"PRAGMA user_version={_SCHEMA_VERSION}")


def _write_all(connection: Connection, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
    (before,) = connection.execute("SELECT last_seq FROM spool").fetchone()
    seq = int(before)
    done = []
    for batch in batches:
        fresh = _number(connection, batch.rows, seq)
        if fresh:
            seq = fresh[-1][0]
            connection.executemany(_INSERT, [(number, *row, received_ms) for number, row in fresh])
        if batch.dead:
            _bury(connection, batch, received_ms)
        done.append(Appended(len(fresh), len(batch.rows) - len(fresh), len(batch.dead)))
    if seq != before:
        connection.execute("UPDATE spool SET last_seq = ?", (seq,))
    return done


def _number(connection: Connection, rows: Sequence[Row], last_seq: int) -> list[tuple[int, Row]]:
    """The rows whose ids are not known yet, each once, with their numbers; from now on they are known.

    One statement for all, since one for each would take most of the time of a commit. Where some were known, those
    that are new have the number that was meant for them; the numbers of the others stay unused.
    """
    numbered = list(enumerate(rows, last_seq + 1))
    meant = [(_key(str(row[0])), number) for number, row in numbered]
    if not meant or connection.executemany(_SEEN, meant).rowcount == len(meant):
        return numbered
    find = "SELECT seq FROM seen WHERE id = ?"
    known = [connection.execute(find, (key,)).fetchone()[0] for key, _ in meant]
    return [one for one, number in zip(numbered, known, strict=True) if one[0] == number]


def _bury(connection: Connection, batch: Batch, received_ms: int) -> None:
    connection.executemany(
        "INSERT INTO dead_letters (received_ms, reason, field, payload) VALUES (?, ?, ?, ?)",
        [(received_ms, letter.reason, letter.field, letter.payload) for letter in batch.dead],
    )
    connection.execute(
        "DELETE FROM dead_letters WHERE seq <= (SELECT max(seq) FROM dead_letters) - ?", (DEAD_LETTERS_KEPT,)
    )


_NAMING: Final = {
    "events": "SELECT seq, user, session, context, item, query, request_id FROM events",
    "dead_letters": "SELECT seq, payload FROM dead_letters",
}
"""All text of an event: an id that a client put into the context as well became the pseudonym there, too."""


def _bytes(text: str | bytes) -> bytes:
    return text.encode() if isinstance(text, str) else text


class _Names:
    """Pseudonyms that are looked for, whole or in part: every run of `_FRAGMENT` of their hex digits.

    The chance that a stranger's id has such a run is that of 64 bits.
    """

    def __init__(self, pseudonyms: Iterable[str]) -> None:
        digits = [name.partition("-")[2].encode() for name in pseudonyms]
        self._windows = frozenset(window for whole in digits for window in self._of(whole))
        # A fragment holds one of these whole. Looking for a few is many times faster than looking at every run.
        half = _FRAGMENT // 2
        blocks = [whole[at : at + half] for whole in digits for at in range(0, len(whole), half)]
        self._blocks = blocks if len(blocks) <= _BLOCKS_MAX else None

    @staticmethod
    def _of(digits: bytes) -> Iterable[bytes]:
        return (digits[at : at + _FRAGMENT] for at in range(len(digits) - _FRAGMENT + 1))

    def are_in(self, text: bytes) -> bool:
        """Whether a fragment of one of them is in the text."""
        if self._blocks is not None and not any(block in text for block in self._blocks):
            return False
        return any(window in self._windows for run in _HEX_RUN.findall(text) for window in self._of(run))


def _erase_chunk(connection: Connection, names: _Names, places: dict[str, int], removed: dict[str, int]) -> bool:
    """Remove from the next rows of both tables; moves `places`, adds to `removed`; whether there is more."""
    more = False
    for table, naming in _NAMING.items():
        rows = connection.execute(f"{naming} WHERE seq > ? ORDER BY seq LIMIT ?", (places[table], CHUNK)).fetchall()
        gone = [(seq,) for seq, *texts in rows if names.are_in(b" ".join(_bytes(text) for text in texts if text))]
        if gone:
            connection.executemany(f"DELETE FROM {table} WHERE seq = ?", gone)  # noqa: S608 - names are ours
        if rows:
            places[table] = rows[-1][0]
        removed[table] += len(gone)
        more = more or len(rows) == CHUNK
    return more


def _trim_chunk(connection: Connection, up_to_seq: int, received_before_ms: int) -> int:
    """Remove the first rows as far as they may go; how many. Fewer than CHUNK: no more may."""
    rows = connection.execute("SELECT seq, received_ms FROM events ORDER BY seq LIMIT ?", (CHUNK,)).fetchall()
    gone = 0
    while gone < len(rows) and rows[gone][0] <= up_to_seq and rows[gone][1] < received_before_ms:
        gone += 1
    if gone:
        connection.execute("DELETE FROM events WHERE seq <= ?", (rows[gone - 1][0],))
        connection.execute("UPDATE spool SET trimmed_seq = ?", (rows[gone - 1][0],))
    return gone


def _forget_chunk(connection: Connection, oldest: bytes, latest: bytes) -> int:
    """Forget ids out of their time whose rows are trimmed; how many."""
    statement = (
        "DELETE FROM seen WHERE id IN (SELECT id FROM seen WHERE (id < ? OR id >= ?)"
        " AND seq <= (SELECT trimmed_seq FROM spool) LIMIT ?)"
    )
    return connection.execute(statement, (oldest, latest, CHUNK)).rowcount


class MemoryStore:
    """The fake: keeps what it was given and remembers the order of `steps`; fails once told to."""

    def __init__(self) -> None:
        self.events: dict[object, tuple[object, ...]] = {}
        self.groups: list[int] = []
        self.steps: list[str] = []
        self.fail_with: Exception | None = None
        self.overdue = False
        self.reusable = 0

    def append(self, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
        """See EventStore."""
        if self.fail_with is not None:
            raise self.fail_with
        done = []
        for batch in batches:
            before = len(self.events)
            for row in batch.rows:
                self.events.setdefault(row[0], (*row, received_ms))
            accepted = len(self.events) - before
            done.append(Appended(accepted, len(batch.rows) - accepted, len(batch.dead)))
        self.groups.append(len(batches))
        self.steps.append("on disk")
        return done

    def probe(self) -> float:
        """See EventStore."""
        if self.fail_with is not None:
            raise self.fail_with
        return 0.0

    def tidy(self) -> None:
        """Remember it."""
        self.steps.append("tidied")
        self.overdue = False

    def is_overdue(self) -> bool:
        """`overdue`."""
        return self.overdue

    def reusable_bytes(self) -> int:
        """`reusable`."""
        return self.reusable

    def erase(self, pseudonyms: frozenset[str]) -> Steps[Erased]:
        """See EventStore; one step an event, so that others can come between."""
        if self.fail_with is not None:
            raise self.fail_with
        gone = [key for key, row in self.events.items() if not pseudonyms.isdisjoint(map(str, row))]
        for key in gone:
            self.steps.append("erased")
            self.events[key] = ()
            yield
        return Erased(len(gone), 0)

    def trim(
        self,
        up_to_seq: int,
        received_before_ms: int,
        now_ms: int,  # noqa: ARG002 - the door's signature; the fake forgets no id
    ) -> Steps[Trimmed]:
        """See EventStore; `seq` is the place in `events`."""
        keys = list(self.events)[:up_to_seq]
        gone = [key for key in keys if self.events[key] and int(str(self.events[key][-1])) < received_before_ms]
        for key in gone:
            self.events[key] = ()
            yield
        return Trimmed(len(gone), len(gone), len(self.events))

    def close(self) -> None:
        """Remember it."""
        self.steps.append("closed")
