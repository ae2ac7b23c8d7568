"""The lake behind `archive.Archive`. Apart from it, because the lake's libraries take seconds to load."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import duckdb

from workloads.feedback.archive import ArchiveError
from workloads.feedback.spool import Row
from workloads.lake.faults import LakeError
from workloads.lake.lake import WAIT_S, Lake
from workloads.lake.schema import INTAKE, SchemaError
from workloads.lake.spool import SpoolError as UnreadableSpoolError

_FAULTS: Final = (LakeError, SchemaError, UnreadableSpoolError, duckdb.Error, OSError)


class LakeArchive:
    """The real lake, opened when it is first needed; `take` makes one where there is none.

    Another writer (a load, an erasure) is waited for `wait_s` seconds; then the next round tries again.
    """

    def __init__(self, path: Path, *, wait_s: float = WAIT_S) -> None:
        self._path = path
        self._wait_s = wait_s
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
            self._lake = Lake.open(self._path, create=create, wait_s=self._wait_s)
        return self._lake
