"""The lake's door to the intake's spool: rows by number, read only, in short transactions.

The spool's writer never waits for this reader. Rows may be trimmed or erased there at any moment. Knows nothing of
the lake.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Protocol

import pyarrow as pa
from pyiceberg.types import IcebergType

from workloads.lake.schema import SCHEMA, of_sqlite

_ARROW: Final = {"string": pa.string(), "long": pa.int64(), "double": pa.float64()}


class SpoolError(ValueError):
    """A spool that cannot be read; the message names the fault."""


class Spool(Protocol):
    """Events in the order of arrival."""

    def columns(self) -> Mapping[str, IcebergType]:
        """Columns and their types."""
        ...

    def after(self, seq: int, limit: int) -> pa.Table:
        """Up to `limit` rows whose `seq` is larger, oldest first."""
        ...

    def event_at(self, seq: int) -> str | None:
        """The id of the event under this number, None where there is none."""
        ...

    def bounds(self) -> tuple[int, int] | None:
        """Smallest and largest number there is, None when empty."""
        ...

    def last_given(self) -> int | None:
        """The largest number ever given, where none is given twice; None where that is not promised.

        Without the promise SQLite gives the newest row's number again once that row is gone.
        """
        ...


class SqliteSpool:
    """The real spool, `onprem/events.sqlite`. Opens the file anew for each call. Raises SpoolError."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextlib.contextmanager
    def _reading(self) -> Iterator[sqlite3.Connection]:
        if not self.path.is_file():
            raise SpoolError(f"{self.path}: no such spool; start the intake once, or give another with --spool")
        try:
            with contextlib.closing(
                sqlite3.connect(f"{self.path.resolve().as_uri()}?mode=ro", uri=True, isolation_level=None, timeout=10)
            ) as connection:
                yield connection
        except sqlite3.Error as error:
            raise SpoolError(f"{self.path}: cannot be read as a spool: {error}") from error

    def columns(self) -> Mapping[str, IcebergType]:
        """See Spool."""
        with self._reading() as connection:
            found = connection.execute("SELECT name, type FROM pragma_table_info('events') ORDER BY cid").fetchall()
        if not {"seq", "event_id", "type", "timestamp_ms"} <= {name for name, _ in found}:
            raise SpoolError(f"{self.path}: has no table of events")
        known = {field.name: field.field_type for field in SCHEMA.fields}
        return {name: known.get(name) or of_sqlite(declared) for name, declared in found}

    def after(self, seq: int, limit: int) -> pa.Table:
        """See Spool."""
        columns = self.columns()
        names = ", ".join(f'"{name}"' for name in columns)
        with self._reading() as connection:
            rows = connection.execute(
                f"SELECT {names} FROM events WHERE seq > ? ORDER BY seq LIMIT ?",  # noqa: S608 - names are the table's own
                (seq, limit),
            ).fetchall()
        fields = [(name, _ARROW[str(kind)]) for name, kind in columns.items()]
        if not rows:
            return pa.table([pa.nulls(0, kind) for _, kind in fields], names=list(columns))
        try:
            return pa.table(
                [pa.array(values, kind) for values, (_, kind) in zip(zip(*rows, strict=True), fields, strict=True)],
                names=list(columns),
            )
        except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
            raise SpoolError(f"{self.path}: a value after seq {seq} is not of its column's type: {error}") from error

    def event_at(self, seq: int) -> str | None:
        """See Spool."""
        with self._reading() as connection:
            row = connection.execute("SELECT event_id FROM events WHERE seq = ?", (seq,)).fetchone()
        return None if row is None else str(row[0])

    def bounds(self) -> tuple[int, int] | None:
        """See Spool."""
        with self._reading() as connection:
            low, high = connection.execute(
                "SELECT (SELECT min(seq) FROM events), (SELECT max(seq) FROM events)"
            ).fetchone()
        return None if low is None else (int(low), int(high))

    def last_given(self) -> int | None:
        """See Spool. The intake keeps it in the table `spool`."""
        with self._reading() as connection:
            if (
                connection.execute("SELECT 1 FROM pragma_table_info('spool') WHERE name = 'last_seq'").fetchone()
                is None
            ):
                return None
            row = connection.execute("SELECT last_seq FROM spool").fetchone()
        return None if row is None else int(row[0])


class MemorySpool:
    """The fake: rows as they were put in, each a number and an event's columns."""

    def __init__(self, *, keeps_numbers: bool = True) -> None:
        self.rows: dict[int, dict[str, object]] = {}
        self.types: dict[str, IcebergType] = {
            field.name: field.field_type for field in SCHEMA.fields if field.name not in ("day", "origin")
        }
        self._last = 0
        self._keeps_numbers = keeps_numbers

    def add(self, **event: object) -> int:
        """Append one event; its number."""
        self._last = self._last + 1 if self._keeps_numbers else max(self.rows, default=0) + 1
        self.rows[self._last] = {"received_ms": event.get("timestamp_ms"), **event, "seq": self._last}
        return self._last

    def columns(self) -> Mapping[str, IcebergType]:
        """See Spool."""
        return self.types

    def after(self, seq: int, limit: int) -> pa.Table:
        """See Spool."""
        rows = [self.rows[number] for number in sorted(self.rows) if number > seq][:limit]
        return pa.table(
            {name: pa.array([row.get(name) for row in rows], _ARROW[str(kind)]) for name, kind in self.types.items()}
        )

    def event_at(self, seq: int) -> str | None:
        """See Spool."""
        row = self.rows.get(seq)
        return None if row is None else str(row["event_id"])

    def bounds(self) -> tuple[int, int] | None:
        """See Spool."""
        return (min(self.rows), max(self.rows)) if self.rows else None

    def last_given(self) -> int | None:
        """See Spool."""
        return self._last if self._keeps_numbers else None
