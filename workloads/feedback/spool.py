"""The feedback process's door to the intake's spool: rows by number, read only, and how far the spool goes.

The intake writes the file (WAL) and waits for no reader; it may trim or erase rows at any moment. A number is never
given twice. Knows neither profiles nor the lake.
"""

from __future__ import annotations

import contextlib
import sqlite3
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

_COLUMNS: Final = "seq, type, timestamp_ms, user, item, price, received_ms"
_BUSY_S: Final = 5.0


class Row(NamedTuple):
    """What profiles need of an event in the spool or the lake."""

    seq: int
    type: str
    timestamp_ms: int
    user: str | None
    item: str | None
    price: float | None
    received_ms: int


class Bounds(NamedTuple):
    """How far the spool goes."""

    trimmed: int
    """No row at or below it is in the spool; the lake has them."""
    last: int
    """The highest number that was given."""


class SpoolError(Exception):
    """The spool cannot be read now; the message says why."""


class Spool(Protocol):
    """Events in the order of arrival. Methods raise SpoolError."""

    def bounds(self) -> Bounds:
        """Where it begins and ends."""
        ...

    def after(self, seq: int, limit: int) -> Sequence[Row]:
        """Up to `limit` rows whose number is larger, oldest first."""
        ...

    def close(self) -> None:
        """Let go of it."""
        ...


class MemorySpool:
    """The fake: rows in a list; `trim` takes the beginning away."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)
        self.trimmed = 0
        self.fault: str | None = None

    def bounds(self) -> Bounds:
        """See `Spool`."""
        self._usable()
        return Bounds(self.trimmed, max((row.seq for row in self.rows), default=self.trimmed))

    def after(self, seq: int, limit: int) -> Sequence[Row]:
        """See `Spool`."""
        self._usable()
        return [row for row in self.rows if row.seq > seq][:limit]

    def trim(self, seq: int) -> None:
        """As the intake does."""
        self.rows = [row for row in self.rows if row.seq > seq]
        self.trimmed = max(self.trimmed, seq)

    def close(self) -> None:
        """See `Spool`."""

    def _usable(self) -> None:
        if self.fault is not None:
            raise SpoolError(self.fault)


class SqliteSpool:
    """The real spool, `onprem/events.sqlite`. Used by one thread at a time; opened when it is first needed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None
        self._opened: tuple[int, int] | None = None

    def bounds(self) -> Bounds:
        """See `Spool`."""
        ((trimmed, last),) = self._rows("SELECT trimmed_seq, last_seq FROM spool") or [(0, 0)]
        return Bounds(trimmed, last)

    def after(self, seq: int, limit: int) -> Sequence[Row]:
        """See `Spool`."""
        rows = self._rows(f"SELECT {_COLUMNS} FROM events WHERE seq > ? ORDER BY seq LIMIT ?", seq, limit)  # noqa: S608 - names are ours
        return [Row(*row) for row in rows]

    def close(self) -> None:
        """See `Spool`."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _rows(self, query: str, *parameters: int) -> list[tuple[Any, ...]]:
        """All rows at once, so that no reading transaction outlives the call and keeps the log from being moved."""
        try:
            found = self._identity()
            if found != self._opened:  # another file was put there: one that is gone says nothing new for ever
                self.close()
            if self._connection is None:
                if found is None:
                    raise SpoolError(f"{self.path.name}: not there yet; the intake makes it when it starts")
                self._opened = found
                uri = f"{self.path.absolute().as_uri()}?mode=ro"
                self._connection = sqlite3.connect(
                    uri, uri=True, isolation_level=None, timeout=_BUSY_S, check_same_thread=False
                )
            return self._connection.execute(query, parameters).fetchall()
        except sqlite3.Error as error:
            with contextlib.suppress(sqlite3.Error):
                self.close()
            raise SpoolError(f"{self.path.name}: {error}") from None

    def _identity(self) -> tuple[int, int] | None:
        """Which file it is; None for none."""
        try:
            state = self.path.stat()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise SpoolError(f"{self.path.name}: {error.strerror}") from None
        return (state.st_dev, state.st_ino) if stat.S_ISREG(state.st_mode) else None
