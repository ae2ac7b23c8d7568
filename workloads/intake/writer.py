"""One thread that owns the store, and the group commit that lets many requests share one fsync.

Requests queue; whenever the disk is free, all that wait are written in one transaction and answered
together, so that the time to an acknowledgement stays near two commits however many callers there are.
The queue is bounded, and the disk has a reserve: beyond them callers are told to come back, before anything
breaks. Long work (an erasure, a trim) goes on a step at a time between groups. Knows no HTTP and no SQL.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Final, NamedTuple, TypeVar

from workloads.intake.pressure import OPENS_AT, RESERVE_BYTES, FreeBytes, Gate
from workloads.intake.records import Batch
from workloads.intake.store import Appended, Erased, EventStore, Steps, StoreError, Trimmed
from workloads.telemetry import log

PENDING_EVENTS_MAX: Final = 20_000
GROUP_EVENTS: Final = 4_000
"""Events after which a group is closed, so that one commit stays short."""
IDLE_S: Final = 0.05
"""Quiet time after which housekeeping is thought to disturb nobody."""
QUEUE_RETRY_S: Final = 1
DISK_RETRY_S: Final = 30
"""What callers are told to wait: a queue drains in a second, a disk needs somebody, or a trim."""
RETRY_S: Final = 1.0
"""Pause between attempts to write to a store that failed, while no request tries it."""

Observe = Callable[[str, float], None]
"""Called with a stage (`queue`, `commit`) and its milliseconds."""

_T = TypeVar("_T")
_logger = log.get(component="writer")


class BusyError(Exception):
    """Why no event is taken now, though nothing is broken, and when to try again."""

    def __init__(self, cause: str, retry_after_s: int) -> None:
        super().__init__(cause)
        self.retry_after_s = retry_after_s


class StoppingError(Exception):
    """The intake is stopping."""


class _Waiting(NamedTuple):
    batch: Batch
    since: float
    answer: asyncio.Future[Appended]


@dataclasses.dataclass
class _Errand:
    """Long work for the store, and who waits for it."""

    begin: Callable[[EventStore], Steps[Any]]
    answer: asyncio.Future[Any]
    steps: Steps[Any] | None = None


class Writer:
    """The store as seen from the event loop.

    `open_store` is called in the writer's own thread, since SQLite connections stay in theirs. `free_bytes` says
    what the disk has left; below `reserve_bytes`, with what the store can use again, events are turned away.
    """

    def __init__(
        self,
        open_store: Callable[[], EventStore],
        *,
        observe: Observe = lambda _stage, _ms: None,
        pending_events_max: int = PENDING_EVENTS_MAX,
        group_events: int = GROUP_EVENTS,
        free_bytes: FreeBytes = lambda: sys.maxsize,
        reserve_bytes: int = RESERVE_BYTES,
        clock_ms: Callable[[], int] = lambda: time.time_ns() // 1_000_000,
    ) -> None:
        self._open_store = open_store
        self._observe = observe
        self._pending_max = pending_events_max
        self._queue_gate = Gate(0, (pending_events_max + 1) // 2)
        self._free_bytes = free_bytes
        self._disk_gate = Gate(reserve_bytes, int(reserve_bytes * OPENS_AT))
        self._reusable = 0
        self._group_events = group_events
        self._clock_ms = clock_ms
        self._queue: deque[_Waiting] = deque()
        self._errands: deque[_Errand] = deque()
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

    def pressure(self) -> dict[str, str]:
        """Why events are turned away now though nothing is broken: `queue` and `disk`; empty when they are taken."""
        with self._changed:
            return {
                name: str(error) for name, error in (("queue", self._crowded(0)), ("disk", self._cramped())) if error
            }

    def _crowded(self, events: int) -> BusyError | None:
        """Too many events wait; a batch larger than the queue itself is taken when nothing does."""
        room = self._pending_max - self._queued_events
        if self._queue_gate.is_closed(room - events if self._queued_events else max(room, 0)):
            return BusyError(f"{self._queued_events} events wait for the disk", QUEUE_RETRY_S)
        return None

    def _cramped(self) -> BusyError | None:
        """Too little room on the disk. Raises StoreError when the disk cannot be asked."""
        try:
            free = self._free_bytes()
        except OSError as error:
            raise StoreError(f"the disk does not say what it has left: {error}") from error
        if not self._disk_gate.is_closed(free + self._reusable):
            return None
        return BusyError(
            f"{free >> 20} MiB are free on the disk and {self._reusable >> 20} MiB in the store; events are taken "
            f"again from {self._disk_gate.opens_at >> 20} MiB",
            DISK_RETRY_S,
        )

    async def start(self) -> None:
        """Open the store. Raises StoreError when it cannot be opened."""
        self._loop = asyncio.get_running_loop()
        opened: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, args=(self._loop, opened), name="event-writer", daemon=True)
        self._thread.start()
        await opened

    async def append(self, batch: Batch) -> Appended:
        """Store a batch; returns when it is on disk.

        Raises BusyError under pressure, StoreError when the store cannot take it, StoppingError at the end.
        """
        if self._loop is None:
            raise StoreError("the writer was not started")
        events = _size(batch)
        answer: asyncio.Future[Appended] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                raise StoppingError("intake is stopping")
            if (busy := self._crowded(events) or self._cramped()) is not None:
                raise busy
            self._queued_events += events
            self._queue.append(_Waiting(batch, time.perf_counter(), answer))
            self._changed.notify()
        return await answer

    async def erase(self, pseudonyms: frozenset[str]) -> Erased:
        """Remove what names one of them; returns when it is gone from the disk. Raises as `append`, never BusyError."""
        return await self._run_errand(lambda store: store.erase(pseudonyms))

    async def trim(self, up_to_seq: int, received_before_ms: int) -> Trimmed:
        """Remove the spool's beginning; returns when it is on disk. Raises as `append`, never BusyError."""
        now_ms = self._clock_ms()
        return await self._run_errand(lambda store: store.trim(up_to_seq, received_before_ms, now_ms))

    async def _run_errand(self, begin: Callable[[EventStore], Steps[_T]]) -> _T:
        if self._loop is None:
            raise StoreError("the writer was not started")
        answer: asyncio.Future[_T] = self._loop.create_future()
        with self._changed:
            if self._stopping:
                raise StoppingError("intake is stopping")
            self._errands.append(_Errand(begin, answer))
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
                if group:
                    self._write(loop, store, group)
                if self._errands:
                    self._step(loop, store, self._errands[0])
                if store.is_overdue():
                    store.tidy()
                self._reusable = store.reusable_bytes()
        finally:
            for errand in self._errands:
                loop.call_soon_threadsafe(_give, errand, None, StoppingError("intake is stopping"))
            store.close()

    def _next_group(self, store: EventStore) -> list[_Waiting] | None:
        """What waits now, up to `group_events`; none while an errand is all there is to do; None when stopping."""
        tidied = False
        while True:
            with self._changed:
                if not self._queue and not self._stopping and not self._errands:
                    self._changed.wait(RETRY_S if self._fault else None if tidied else IDLE_S)
                if self._queue:
                    return self._take()
                if self._stopping:
                    return None
                if self._errands:
                    return []
            if self._fault:
                self._try_again(store)
            elif not tidied:
                store.tidy()
                tidied = True

    def _step(self, loop: asyncio.AbstractEventLoop, store: EventStore, errand: _Errand) -> None:
        """One step of the first errand; those after it wait until it is done."""
        done: Any = None
        failure: Exception | None = None
        try:
            if errand.steps is None:
                errand.steps = errand.begin(store)
            next(errand.steps)
            return
        except StopIteration as end:
            done = end.value
        except Exception as error:  # as in `_write`: the thread outlives it, and who waits is told
            _logger.error("errand failed", fault=str(error))
            failure = error if isinstance(error, StoreError) else StoreError(f"{type(error).__name__}: {error}")
        self._errands.popleft()
        loop.call_soon_threadsafe(_give, errand, done, failure)

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


def _give(errand: _Errand, done: object, failure: Exception | None) -> None:
    if errand.answer.done():
        return
    if failure is not None:
        errand.answer.set_exception(failure)
    else:
        errand.answer.set_result(done)


def _answer(group: list[_Waiting], done: list[Appended]) -> None:
    for waiting, appended in zip(group, done, strict=True):
        if not waiting.answer.done():
            waiting.answer.set_result(appended)


def _fail(group: list[_Waiting], error: StoreError) -> None:
    for waiting in group:
        if not waiting.answer.done():
            waiting.answer.set_exception(error)
