"""Whether the spool and the lake hold the same events: counted per day and type, and compared id by id.

Looks at what the lake has taken: rows of the spool up to that number, and rows of the lake from the spool's first
number on. Trimmed rows are in the lake alone and are not compared. An erasure that is done in one of them only shows
as a difference until it is done in both.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Final

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from workloads.lake.lake import Lake
from workloads.lake.schema import INTAKE, with_day
from workloads.lake.spool import Spool
from workloads.telemetry.progress import Progress

_CHUNK: Final = 200_000


@dataclass(frozen=True)
class DayCount:
    """One day (UTC) and type. In order: `spool` equals `lake` + `again`, and the others are 0."""

    day: datetime.date
    type: str
    spool: int
    """Rows of the spool."""
    lake: int
    """Rows of the lake with the spool's numbers."""
    again: int
    """Rows of the spool whose event the lake has from before: it was sent again after a trim."""
    missing: int
    """Rows of the spool whose event is not in the lake."""
    extra: int
    """Rows of the lake whose event is not in the spool."""
    doubled: int
    """Rows of the lake, of any time, whose id another row has too."""

    @property
    def agrees(self) -> bool:
        """Whether nothing is lost and nothing doubled."""
        return self.spool == self.lake + self.again and not (self.missing or self.extra or self.doubled)


@dataclass(frozen=True)
class Reconciliation:
    """The comparison of a spool with the lake."""

    taken: int
    """Number up to which the spool was compared."""
    waiting: int
    """Rows of the spool behind it, which no one took yet."""
    days: list[DayCount] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether every day and type agrees."""
        return all(day.agrees for day in self.days)


def reconcile(lake: Lake, spool: Spool, *, progress: Progress | None = None) -> Reconciliation:
    """Compare by id, in DuckDB, which spills to disk where memory ends. Raises LakeError and SpoolError."""
    taken = lake.taken
    connection = lake.connection()
    try:
        connection.execute(
            "CREATE TEMP TABLE spooled (event_id VARCHAR, seq BIGINT, day DATE, type VARCHAR, received_ms BIGINT)"
        )
        _copy(connection, spool, taken, progress)
        rows = connection.execute(_COMPARISON, [INTAKE, taken]).fetchall()
        ends = spool.bounds()
        last = connection.execute("SELECT coalesce(max(seq), 0) FROM spooled").fetchone()
    finally:
        connection.close()
    seen = max(taken, int(last[0]) if last else 0)
    waiting = 0 if ends is None else max(0, ends[1] - seen)
    return Reconciliation(taken, waiting, [DayCount(*row) for row in rows])


def _copy(connection: duckdb.DuckDBPyConnection, spool: Spool, taken: int, progress: Progress | None) -> None:
    seq = 0
    while seq < taken:
        rows = spool.after(seq, _CHUNK)
        if not rows.num_rows:
            return
        seq = int(rows["seq"][-1].as_py())
        if "received_ms" not in rows.column_names:
            rows = rows.append_column("received_ms", pa.nulls(rows.num_rows, pa.int64()))
        rows = with_day(rows, INTAKE).select(["event_id", "seq", "day", "type", "received_ms"])
        connection.register("arrived", rows.filter(pc.less_equal(rows["seq"], taken)))
        connection.execute("INSERT INTO spooled SELECT * FROM arrived")
        connection.unregister("arrived")
        if progress is not None:
            progress.step("verify", min(seq, taken), taken, "events")


_COMPARISON: Final = """
WITH
  edge AS (SELECT coalesce(min(seq), 9223372036854775807) AS seq, coalesce(min(received_ms), 0) AS ms FROM spooled),
  stored AS (SELECT event_id, day, type, seq, received_ms FROM events WHERE origin = $1),
  -- Numbers that an older spool gave as well are told apart by the clock.
  shared AS (
    SELECT stored.* FROM stored, edge
    WHERE stored.seq BETWEEN edge.seq AND $2 AND coalesce(stored.received_ms, edge.ms) >= edge.ms
  ),
  counts AS (
    SELECT day, type, count(*) AS spool, 0 AS lake, 0 AS again, 0 AS missing, 0 AS extra, 0 AS doubled
    FROM spooled GROUP BY ALL
    UNION ALL
    SELECT day, type, 0, count(*), 0, 0, 0, 0 FROM shared GROUP BY ALL
    UNION ALL
    SELECT day, type, 0, 0, count(*), 0, 0, 0 FROM spooled
    WHERE event_id IN (SELECT event_id FROM stored) AND event_id NOT IN (SELECT event_id FROM shared) GROUP BY ALL
    UNION ALL
    SELECT day, type, 0, 0, 0, count(*), 0, 0 FROM spooled
    WHERE event_id NOT IN (SELECT event_id FROM stored) GROUP BY ALL
    UNION ALL
    SELECT day, type, 0, 0, 0, 0, count(*), 0 FROM shared
    WHERE event_id NOT IN (SELECT event_id FROM spooled) GROUP BY ALL
    UNION ALL
    SELECT day, type, 0, 0, 0, 0, 0, count(*) FROM stored
    WHERE event_id IN (SELECT event_id FROM stored GROUP BY event_id HAVING count(*) > 1) GROUP BY ALL
  )
SELECT day, type, sum(spool)::BIGINT, sum(lake)::BIGINT, sum(again)::BIGINT, sum(missing)::BIGINT, sum(extra)::BIGINT,
       sum(doubled)::BIGINT
FROM counts GROUP BY day, type ORDER BY day, type
"""
