"""Where acknowledged events are: one SQLite file at home, written by one process.

`append` returns only when the rows are on disk: journal_mode=WAL with synchronous=FULL makes SQLite
fsync the write-ahead log at every commit (https://www.sqlite.org/pragma.html#pragma_synchronous), and
the settings are read back because SQLite ignores what it cannot do. The file may be read by others while
it is written. Knows no thread, no queue and no network; `writer` gives it those.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sqlite3
import time
from collections.abc import Sequence
from typing import Final, NamedTuple, Protocol

from workloads.intake.records import Batch

COLUMNS: tuple[str, ...] = (
    *("event_id", "type", "timestamp_ms", "user", "item", "session", "query"),
    *("position", "quantity", "price", "rating", "context", "schema_version"),
)
"""Columns of `events` that come from an event; `seq` orders rows by arrival, `received_ms` is the clock here."""

DEAD_LETTERS_KEPT: Final = 100_000
"""Newest dead letters that are kept, so that a broken sender cannot fill the disk."""

CHECKPOINT_BYTES: Final = 4 * 1024 * 1024
"""A write-ahead log longer than this is moved into the database when nobody waits."""
OVERDUE_BYTES: Final = 64 * 1024 * 1024
"""A log longer than this is moved even when somebody waits: under traffic that never pauses it would fill the disk."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS events (
  seq INTEGER PRIMARY KEY,
  event_id TEXT NOT NULL UNIQUE,
  type TEXT NOT NULL,
  timestamp_ms INTEGER NOT NULL,
  user TEXT, item TEXT, session TEXT, query TEXT,
  position INTEGER, quantity INTEGER, price REAL, rating REAL,
  context TEXT,
  schema_version INTEGER NOT NULL,
  received_ms INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS dead_letters (
  seq INTEGER PRIMARY KEY,
  received_ms INTEGER NOT NULL,
  reason TEXT NOT NULL,
  field TEXT,
  payload BLOB NOT NULL
);
CREATE TABLE IF NOT EXISTS probe (id INTEGER PRIMARY KEY, moment INTEGER NOT NULL);
"""
_SCHEMA_VERSION: Final = 1
_INSERT = (
    f"INSERT INTO events ({', '.join(COLUMNS)}, received_ms) VALUES ({', '.join('?' * (len(COLUMNS) + 1))}) "  # noqa: S608 - names are ours
    "ON CONFLICT(event_id) DO NOTHING"
)


class StoreError(Exception):
    """The store could not take rows; nothing of the group is in it."""


class StorageFullError(StoreError):
    """The disk, or the file's size limit, is used up."""


class Appended(NamedTuple):
    """What became of one batch that is now on disk."""

    accepted: int
    duplicates: int
    rejected: int


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

    def close(self) -> None:
        """Let go of the file."""


class SqliteStore:
    """The real store. Made and used by one thread.

    Raises StoreError when the file cannot be opened, is of a newer schema, or will not be durable.
    """

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path
        self._wal = path.with_name(path.name + "-wal")
        path.parent.mkdir(parents=True, exist_ok=True)
        self._connection: sqlite3.Connection | None = self._open()

    def _open(self) -> sqlite3.Connection:
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=2.0, cached_statements=16)
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

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        # Checkpoints are `tidy`'s: one inside a commit would make an acknowledgement wait for it.
        connection.execute("PRAGMA wal_autocheckpoint=0")
        connection.execute(f"PRAGMA journal_size_limit={OVERDUE_BYTES}")
        version = int(connection.execute("PRAGMA user_version").fetchone()[0])
        if version > _SCHEMA_VERSION:
            raise StoreError(f"{self.path} has schema {version}, this intake knows {_SCHEMA_VERSION}")
        connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={_SCHEMA_VERSION}; COMMIT;")
        settings = self._settings(connection)
        if settings != {"journal_mode": "wal", "synchronous": 2}:
            raise StoreError(f"{self.path} cannot be written durably here: {settings}")

    @staticmethod
    def _settings(connection: sqlite3.Connection) -> dict[str, str | int]:
        return {name: connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("journal_mode", "synchronous")}

    def settings(self) -> dict[str, str | int]:
        """What SQLite says of its durability: journal_mode and synchronous (2 is FULL)."""
        return self._settings(self._connected())

    def _connected(self) -> sqlite3.Connection:
        """The connection, opened again if a fault closed it."""
        if self._connection is None:
            self._connection = self._open()
        return self._connection

    def append(self, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
        """See EventStore."""
        connection = self._connected()
        try:
            connection.execute("BEGIN IMMEDIATE")
            done = [_write(connection, batch, received_ms) for batch in batches]
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            raise self._failed(connection, error) from error
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

    def _failed(self, connection: sqlite3.Connection, error: sqlite3.Error) -> StoreError:
        """The typed form of a failure, with the transaction undone."""
        with contextlib.suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
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
            if self._connection is not None and self._wal.stat().st_size > CHECKPOINT_BYTES:
                self._connection.execute("PRAGMA wal_checkpoint(PASSIVE)")

    def is_overdue(self) -> bool:
        """See EventStore. A log that was moved keeps at most this size, so it is overdue only when full anew."""
        try:
            return self._wal.stat().st_size > OVERDUE_BYTES
        except OSError:
            return False

    def close(self) -> None:
        """Checkpoint and let go of the file."""
        if self._connection is not None:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._connection.close()
            self._connection = None


def _write(connection: sqlite3.Connection, batch: Batch, received_ms: int) -> Appended:
    accepted = 0
    if batch.rows:
        accepted = connection.executemany(_INSERT, [(*row, received_ms) for row in batch.rows]).rowcount
    if batch.dead:
        connection.executemany(
            "INSERT INTO dead_letters (received_ms, reason, field, payload) VALUES (?, ?, ?, ?)",
            [(received_ms, letter.reason, letter.field, letter.payload) for letter in batch.dead],
        )
        connection.execute(
            "DELETE FROM dead_letters WHERE seq <= (SELECT max(seq) FROM dead_letters) - ?", (DEAD_LETTERS_KEPT,)
        )
    return Appended(accepted, len(batch.rows) - accepted, len(batch.dead))


class MemoryStore:
    """The fake: keeps what it was given and remembers the order of `steps`; fails once told to."""

    def __init__(self) -> None:
        self.events: dict[object, tuple[object, ...]] = {}
        self.groups: list[int] = []
        self.steps: list[str] = []
        self.fail_with: Exception | None = None
        self.overdue = False

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

    def close(self) -> None:
        """Remember it."""
        self.steps.append("closed")
