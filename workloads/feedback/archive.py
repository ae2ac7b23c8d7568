"""The feedback process's door to the lake: events go in from the spool, and come back where the spool was trimmed.

Not for several threads at once: who reads and who writes have one each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Protocol

import duckdb

from workloads.feedback.spool import Row
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.lake.schema import INTAKE, SchemaError
from workloads.lake.spool import SpoolError as UnreadableSpoolError

_FAULTS: Final = (LakeError, SchemaError, UnreadableSpoolError, duckdb.Error, OSError)


class ArchiveError(Exception):
    """The lake could not take or give events now; nothing is lost by it. The message says why."""


class Archive(Protocol):
    """What becomes of events after the spool. Methods raise ArchiveError."""

    def take(self, spool: Path) -> int:
        """Move what is new in the spool into the lake; the number up to which the lake has everything durably."""
        ...

    def between(self, after: int, up_to: int, limit: int) -> Sequence[Row]:
        """Up to `limit` events of the intake with after < seq <= up_to, in order of `seq`."""
        ...


class MemoryArchive:
    """The fake: rows in a list."""

    def __init__(self, rows: Sequence[Row] = ()) -> None:
        self.rows = list(rows)
        self.taken = 0
        self.fault: str | None = None

    def take(self, spool: Path) -> int:  # noqa: ARG002 - the door's signature
        """See `Archive`."""
        self._usable()
        return self.taken

    def between(self, after: int, up_to: int, limit: int) -> Sequence[Row]:
        """See `Archive`."""
        self._usable()
        return [row for row in self.rows if after < row.seq <= up_to][:limit]

    def _usable(self) -> None:
        if self.fault is not None:
            raise ArchiveError(self.fault)


class LakeArchive:
    """The real lake, opened when it is first needed; `take` makes one where there is none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lake: Lake | None = None

    def take(self, spool: Path) -> int:
        """See `Archive`."""
        try:
            return self._opened(create=True).ingest(spool).taken
        except _FAULTS as error:
            raise ArchiveError(f"the lake cannot take events: {error}") from None

    def between(self, after: int, up_to: int, limit: int) -> Sequence[Row]:
        """See `Archive`."""
        question = (
            'SELECT seq, type, timestamp_ms, "user", item, price, received_ms FROM events '  # noqa: S608 - numbers and a name of ours
            f"WHERE origin = '{INTAKE}' AND seq > {after:d} AND seq <= {up_to:d} ORDER BY seq LIMIT {limit:d}"
        )
        try:
            with contextlib.closing(self._opened(create=False).connection()) as connection:
                return [Row(*row) for row in connection.execute(question).fetchall()]
        except _FAULTS as error:
            raise ArchiveError(f"the lake cannot give events back: {error}") from None

    def _opened(self, *, create: bool) -> Lake:
        if self._lake is None:
            self._lake = Lake.open(self._path, create=create)
        return self._lake
