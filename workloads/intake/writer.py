"""One thread that owns the store, and the group commit that lets many requests share one fsync.

Requests queue; whenever the disk is free, all that wait are written in one transaction and answered
together, so that the time to an acknowledgement stays near two commits however many callers there are.
The queue is bounded: beyond it callers are told to come back. Knows no HTTP and no SQL.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from workloads.intake.records import Batch
from workloads.intake.store import Appended, EventStore, StoreError
from workloads.telemetry import log

PENDING_EVENTS_MAX: Final = 20_000
GROUP_EVENTS: Final = 4_000
"""Events after which a group is closed, so that one commit stays short."""
IDLE_S: Final = 0.05
"""Quiet time after which housekeeping is thought to disturb nobody."""
RETRY_S: Final = 1.0
"""Pause between attempts to write to a store that failed, while no request tries it."""

Observe = Callable[[str, float], None]
"""Called with a stage (`queue`, `commit`) and its milliseconds."""

_logger = log.get(component="writer")


class BusyError(Exception):
    """Too many events wait for the disk already."""


class _Waiting(NamedTuple):
    batch: Batch
    since: float
    answer: asyncio.Future[Appended]


class Writer:
    """The store as seen from the event loop.

    `open_store` is called in the writer's own thread, since SQLite connections stay in theirs.
    """

    def __init__(
        self,
        open_store: Callable[[], EventStore],
        *,
        observe: Observe = lambda _stage, _ms: None,
        pending_events_max: int = PENDING_EVENTS_MAX,
        group_events: int = GROUP_EVENTS,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._open_store = open_store
        self._observe = observe
        self._pending_max = pending_events_max
        self._group_events = group_events
        self._clock_ms = clock_ms
        self._queue: deque[_Waiting] = deque()
        self._queued_events = 0
        self._changed = threading.Condition()
        self._stopping = False
        self._fault: str | None = "not opened yet"
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def fault(self) -> str | None:
        """Why events cannot be stored now, None when they can."""
        return self._fault

    @property
    def queued_events(self) -> int:
        """Events that wait for the disk."""
        return self._queued_events

    async def start(self) -> None:
        """Open the store. Raises StoreError when it cannot be opened."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(self._loop, opened), name="event-writer", daemon=True)
        self._thread.start()
        await opened

    async def append(self, batch: Batch) -> Appended:
        """Store a batch; returns when it is on disk.

        Raises BusyError when too much is waiting, StoreError when the store cannot take it.
        """
        if self._loop is None:
            raise StoreError("the writer was not started")
        events = _size(batch)
        answer: asyncio.Future[Appended] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                raise BusyError("intake is stopping")
            if self._queued_events and self._queued_events + events > self._pending_max:
                raise BusyError(f"{self._queued_events} events wait for the disk")
            self._queued_events += events
            self._queue.append(_Waiting(batch, time.perf_counter(), answer))
            self._changed.notify()
        return await answer

    async def stop(self) -> None:
        """Write what waits, close the store, end the thread."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)

    def _run(self, loop: asyncio.AbstractEventLoop, opened: asyncio.Future[None]) -> None:
        try:
            store = self._open_store()
        except Exception as error:  # told to the one who waits for the start
            loop.call_soon_threadsafe(opened.set_exception, error)
            return
        self._fault = None
        loop.call_soon_threadsafe(opened.set_result, None)
        try:
            while (group := self._next_group(store)) is not None:
                self._write(loop, store, group)
                if store.is_overdue():
                    store.tidy()
        finally:
            store.close()

    def _next_group(self, store: EventStore) -> list[_Waiting] | None:
        """What waits now, up to `group_events`; None when stopping and nothing waits."""
        tidied = False
        while True:
            with self._changed:
                if not self._queue and not self._stopping:
                    self._changed.wait(RETRY_S if self._fault else None if tidied else IDLE_S)
                if self._queue:
                    return self._take()
                if self._stopping:
                    return None
            if self._fault:
                self._try_again(store)
            elif not tidied:
                store.tidy()
                tidied = True

    def _take(self) -> list[_Waiting]:
        group: list[_Waiting] = []
        events = 0
        while self._queue and (not group or events + _size(self._queue[0].batch) <= self._group_events):
            waiting = self._queue.popleft()
            events += _size(waiting.batch)
            group.append(waiting)
        self._queued_events -= events
        return group

    def _try_again(self, store: EventStore) -> None:
        try:
            store.probe()
        except Exception:  # as in `_write`: nobody else would ever answer those who wait
            return
        self._fault = None
        _logger.info("store is back")

    def _write(self, loop: asyncio.AbstractEventLoop, store: EventStore, group: list[_Waiting]) -> None:
        begun = time.perf_counter()
        for waiting in group:
            self._observe("queue", (begun - waiting.since) * 1000)
        try:
            done = store.append([waiting.batch for waiting in group], self._clock_ms())
        except Exception as error:  # the thread must outlive any fault, and every caller be told
            if self._fault is None:
                _logger.error("store failed", fault=str(error))
            self._fault = str(error)
            failure = error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")
            loop.call_soon_threadsafe(_fail, group, failure)
            return
        self._observe("commit", (time.perf_counter() - begun) * 1000)
        if self._fault is not None:
            self._fault = None
            _logger.info("store is back")
        loop.call_soon_threadsafe(_answer, group, done)


def _size(batch: Batch) -> int:
    return len(batch.rows) + len(batch.dead)


def _answer(group: list[_Waiting], done: list[Appended]) -> None:
    for waiting, appended in zip(group, done, strict=True):
        if not waiting.answer.done():
            waiting.answer.set_result(appended)


def _fail(group: list[_Waiting], error: StoreError) -> None:
    for waiting in group:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
