"""Events from the spool into the profiles, in order, each once, and how fresh that makes them.

The store's own watermark says where to go on, so that a process that is killed anywhere, and a store that is filled
anew, are the same case: whatever is not in yet is applied. What the spool no longer has is read from the lake. Knows
doors only: no file, no clock but what it is given, no thread.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from workloads.data.definitions import Sign, sign_of
from workloads.data.profiles import ProfilesDownError, ProfileStore, Watermark
from workloads.feedback.archive import Archive, ArchiveError
from workloads.feedback.spool import Bounds, Row, Spool, SpoolError

BATCH: Final = 2000
"""Events applied at once: one commit of the store."""


class Meter(Protocol):
    """Who is told how fresh profiles are."""

    def applied(self, happened_ms: int, received_ms: int, applied_ms: int) -> None:
        """One event is in the profiles now."""
        ...

    def passed(self, events: int) -> None:
        """So many events were read that say nothing of taste."""
        ...


@dataclasses.dataclass
class Position:
    """Where the follower is, for whoever looks at it from another thread."""

    applied: int = 0
    """The last number that is in the profiles."""
    last: int = 0
    """The last number that was given."""
    oldest_waiting_ms: int | None = None
    """When the oldest event that is not applied was received; None: there is none."""
    faults: dict[str, str] = dataclasses.field(default_factory=lambda: {"profiles": "not begun yet"})
    """What it waits for, by name; empty while all is well."""

    def staleness_ms(self, now_ms: int) -> int:
        """Age of the oldest event that is not applied; 0 where there is none."""
        return 0 if self.oldest_waiting_ms is None else max(now_ms - self.oldest_waiting_ms, 0)


class Follower:
    """One step at a time; used by one thread."""

    def __init__(
        self,
        spool: Spool,
        store: ProfileStore,
        archive: Archive | None,
        *,
        meter: Meter,
        position: Position,
        clock_ms: Callable[[], int],
    ) -> None:
        self._spool = spool
        self._store = store
        self._archive = archive
        self._meter = meter
        self._clock_ms = clock_ms
        self.position = position

    def step(self) -> bool:
        """Apply the next batch; whether there may be more at once. Faults go into `position.faults`."""
        place = self.position
        try:
            bounds = self._spool.bounds()
            place.last = bounds.last
            more = self._apply_next(bounds)
        except SpoolError as error:
            place.faults = {"spool": str(error)}
        except ArchiveError as error:
            place.faults = {"lake": str(error)}
        except ProfilesDownError as error:
            place.faults = {"profiles": str(error)}
            self._look_at_what_waits()
        else:
            return more
        return False

    def _apply_next(self, bounds: Bounds) -> bool:
        place = self.position
        mark = self._store.watermark()
        place.applied = mark.seq
        if mark.seq > bounds.last:
            place.faults = {
                "profiles": f"they are at event {mark.seq} and the spool ends at {bounds.last}: it is another spool; "
                "prepare the data again to fill the profiles anew"
            }
            return False
        trimmed = mark.seq < bounds.trimmed
        rows = self._gone(mark.seq, bounds.trimmed) if trimmed else self._spool.after(mark.seq, BATCH)
        place.oldest_waiting_ms = rows[0].received_ms if rows else None
        if rows:
            self._apply(rows)
        elif trimmed:  # the rest of it was erased
            self._store.apply([], Watermark(bounds.trimmed, mark.known_ms))
        place.faults = {}
        if len(rows) < BATCH and not trimmed:
            place.oldest_waiting_ms = None
        return len(rows) == BATCH or trimmed

    def _gone(self, after: int, trimmed: int) -> Sequence[Row]:
        if self._archive is None:
            raise ArchiveError(
                f"the profiles are at event {after} and the spool begins after {trimmed}; give --lake to go on"
            )
        return self._archive.between(after, trimmed, BATCH)

    def _apply(self, rows: Sequence[Row]) -> None:
        signs: list[Sign] = []
        for row in rows:
            sign = sign_of(
                seq=row.seq,
                kind=row.type,
                timestamp_ms=row.timestamp_ms,
                user=row.user,
                item=row.item,
                price=row.price,
                received_ms=row.received_ms,
            )
            if sign is not None:
                signs.append(sign)
        mark = Watermark(rows[-1].seq, rows[-1].received_ms)
        self._store.apply(signs, mark)
        now = self._clock_ms()
        self.position.applied = mark.seq
        for sign in signs:
            self._meter.applied(sign.at_ms, sign.known_ms, now)
        self._meter.passed(len(rows) - len(signs))

    def _look_at_what_waits(self) -> None:
        """While the store is down, what was received since it was last seen grows old."""
        try:
            waiting = self._spool.after(self.position.applied, 1)
        except SpoolError:
            return
        self.position.oldest_waiting_ms = waiting[0].received_ms if waiting else None
