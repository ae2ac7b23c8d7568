"""The feedback process's door to the lake: events go in from the spool, and come back where the spool was trimmed.

Not for several threads at once: who reads and who writes have one each. The real one is `lake_archive.LakeArchive`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from workloads.feedback.spool import Row


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
