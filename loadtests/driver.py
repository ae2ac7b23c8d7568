"""A constant-rate load generator: requests are sent when they are due, whatever became of those before (open loop).

`python -m loadtests.driver DRIVE.json --samples FILE`. One process, one event loop, kept-alive HTTP/1.1 connections
with nothing in between: several thousand requests a second from one core, where Locust (`users`) makes several hundred.
A request is timed from the moment it was due and gets exactly one outcome: an answer, a time-out, or a broken
connection. Nothing is sent twice. It draws from `draws`, reads answers with `answers`, and judges nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import random
import sys
import time
import urllib.request
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

from loadtests import answers, draws
from loadtests.answers import Reading
from loadtests.draws import K, Shopper
from loadtests.drive import Aim, Drive
from loadtests.samples import RunHeader, Sample, SampleFile, Target, write_whole
from workloads.contract.http import (
    DEADLINE_HEADER,
    DEADLINE_MIN_MS,
    PATH_READY,
    PATH_SAMPLE,
    PRIORITY_HEADER,
    TENANT_HEADER,
    CatalogueSample,
    Readiness,
)
from workloads.contract.slo import Endpoint

SUITE: Final = "driver"
TIMEOUT: Final = "timeout"
UNSENT: Final = "timeout: no connection was free"
BROKEN: Final = "connection broke"
CORES_TO_SHARE: Final = 4
"""From so many cores on the driver takes the last one for itself; with fewer it would take it from the servers."""

_DRAWN: Final = 2048
"""Different reads of each kind that are made before the start, and sent in turn."""
_SWEEP_S: Final = 0.01
"""How often it is looked who waited too long."""
_LEAD_S: Final = 0.2
"""From the word that it starts to the first request: whoever plants a fault can prepare."""
_FETCH_S: Final = 10.0
_BURST: Final = 64
"""Requests sent in one turn of the loop at the most: a generator that is behind still reads answers between them."""

_DEADLINE: Final = DEADLINE_HEADER.lower().encode()
_T = TypeVar("_T")


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """The driver's first line: when its first request is due, by the machine's monotonic clock and by the world's."""

    monotonic_s: float
    unix_s: float
    note: str


class DriveError(Exception):
    """A drive cannot begin as asked; the text says why."""


class Shot:
    """One request from the moment it is due until it has its outcome."""

    __slots__ = (
        *("aim", "at_s", "body", "connection", "deadline_ms", "done", "due", "endpoint", "fired", "head"),
        *("ids", "priority", "sent", "size"),
    )

    def __init__(self, aim: Target, endpoint: str, at_s: float, due: float) -> None:
        self.aim, self.endpoint, self.at_s, self.due = aim, endpoint, at_s, due
        self.head = b""
        self.body = b""
        self.deadline_ms: float | None = None
        self.fired = due
        self.size = K
        self.ids: tuple[str, ...] = ()
        self.priority: str | None = None
        self.sent: float | None = None
        self.connection: _Connection | None = None
        self.done = False

    def message(self, now: float) -> tuple[bytes, bytes] | None:
        """What to send now. A wait for a connection is taken off its deadline; None when nothing is left of that."""
        if self.deadline_ms is None:
            return b"%bcontent-length: %d\r\n\r\n" % (self.head, len(self.body)), self.body
        left = self.deadline_ms - (now - self.fired) * 1000
        if left < DEADLINE_MIN_MS:
            return None
        return b"%b%b: %.1f\r\ncontent-length: %d\r\n\r\n" % (self.head, _DEADLINE, left, len(self.body)), self.body


class Ammunition:
    """Requests for one gateway: reads drawn in advance, events drawn as they are sent (their ids must be new)."""

    def __init__(self, aim: Aim, catalogue: CatalogueSample, rng: random.Random) -> None:
        self._shopper = Shopper(catalogue, rng)
        makers: dict[str, Callable[[], msgspec.Struct]] = {
            Endpoint.RECOMMEND.value: self._shopper.recommend,
            Endpoint.SEARCH.value: self._shopper.search,
        }
        self._reads = {
            name: [msgspec.json.encode(make()) for _ in range(_DRAWN)]
            for name, make in makers.items()
            if aim.mix.get(name)
        }
        self._turn = 0

    def load(self, shot: Shot) -> bytes:
        """The body for a shot; notes in it what its answer must hold."""
        if shot.endpoint == Endpoint.EVENTS:
            drawn = self._shopper.events(int(time.time() * 1000))
            shot.ids = tuple(event.event_id for event in drawn.events)
            shot.size = len(shot.ids)
            return msgspec.json.encode(drawn)
        self._turn += 1
        reads = self._reads[shot.endpoint]
        return reads[self._turn % len(reads)]


class Record:
    """The samples of a run and the ids of its acknowledged events."""

    def __init__(self, file: SampleFile, warmup_s: float) -> None:
        self._file = file
        self._warmup_s = warmup_s
        self.acknowledged: list[str] = []
        self.stray = 0
        self.open = 0

    def end(self, shot: Shot, now: float, status: int, reading: Reading) -> None:
        """The one outcome of a shot."""
        if shot.done:
            self.stray += 1
            return
        shot.done = True
        self.open -= 1
        served = reading.served
        if shot.ids and reading.error is None:
            self.acknowledged += shot.ids
        self._file.add(
            Sample(
                endpoint=shot.endpoint,
                site=served.site if served is not None else shot.aim.site,
                at_s=shot.at_s,
                latency_ms=(now - shot.due) * 1000,
                lateness_ms=((shot.sent if shot.sent is not None else now) - shot.due) * 1000,
                status=status,
                error=reading.error,
                rung=served.rung if served is not None else None,
                best_rung=shot.aim.best_rung.get(shot.endpoint),
                reason=served.reason if served is not None else None,
                ranked=served.ranked if served is not None else None,
                stages_ms=served.stages_ms if served is not None else {},
                bundle=served.bundle if served is not None else None,
                warmup=shot.at_s < self._warmup_s,
                problem=reading.problem,
                sent_to=shot.aim.site,
                ranked_at=served.ranked_at if served is not None else None,
                priority=shot.priority,
            )
        )


class Connections:
    """To one gateway: at most so many, the one used last first. A shot that finds none free waits in line."""

    def __init__(self, url: str, limit: int, timeout_s: float, record: Record) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "", parts.port or 80
        self._limit, self._timeout_s, self._record = limit, timeout_s, record
        self._idle: list[_Connection] = []
        self._open = 0
        self._waiting: deque[Shot] = deque()
        self._dialling: set[asyncio.Task[None]] = set()

    def fire(self, shot: Shot) -> None:
        """Send it now, or as soon as a connection is there."""
        while self._idle:
            if self._idle[-1].send(shot):
                self._idle.pop()
                return
            if shot.done:
                return
            self._idle.pop()
        self._waiting.append(shot)
        self._dial()

    def free(self, connection: _Connection) -> None:
        """A connection has its answer and takes the next in line, or waits for one."""
        while self._waiting:
            shot = self._waiting.popleft()
            if shot.done:
                continue
            if connection.send(shot):
                return
            if not shot.done:  # the connection is no more
                self._waiting.appendleft(shot)
                self._dial()
                return
        self._idle.append(connection)

    def lost(self, connection: _Connection) -> None:
        """A connection is gone."""
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        self._dial()

    def ended(self, shot: Shot, status: int, body: bytes) -> None:
        """The answer to a shot is whole."""
        now = time.monotonic()
        if shot.endpoint == Endpoint.EVENTS:
            reading = answers.read_events(status, body, sent=shot.size)
        else:
            reading = answers.read_items(status, body, k=shot.size)
        self._record.end(shot, now, status, reading)

    def broke(self, shot: Shot, why: str) -> None:
        """A shot gets no answer any more."""
        self._record.end(shot, time.monotonic(), 0, Reading(error=why))

    def stray(self) -> None:
        """Something came for nobody."""
        self._record.stray += 1

    def close(self) -> None:
        """Close what is idle; what is dialled is called off."""
        for task in self._dialling:
            task.cancel()
        for connection in list(self._idle):
            connection.abort()

    def _dial(self) -> None:
        """One more connection where somebody waits and the limit allows it."""
        while self._waiting and self._waiting[0].done:
            self._waiting.popleft()
        if self._open < self._limit and len(self._dialling) < len(self._waiting):
            self._open += 1
            task = asyncio.get_running_loop().create_task(self._connect())
            self._dialling.add(task)
            task.add_done_callback(self._dialling.discard)

    async def _connect(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Connection(self), self.host, self.port
                )
        except OSError as error:  # TimeoutError is one
            self._open -= 1
            while self._waiting:
                shot = self._waiting.popleft()
                if not shot.done:
                    self.broke(shot, f"no connection: {(error.strerror or type(error).__name__).lower()}")
                    break
            asyncio.get_running_loop().call_soon(self._dial)
        except asyncio.CancelledError:
            self._open -= 1
            raise
        else:
            self.free(connection)


class _Connection(asyncio.Protocol):
    """One connection, one exchange at a time."""

    def __init__(self, pool: Connections) -> None:
        self._pool = pool
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._shot: Shot | None = None
        self._body: list[bytes] = []

    def send(self, shot: Shot) -> bool:
        """Begin the exchange; False when this connection is no more, or when it is too late to ask (`shot.done`)."""
        if self._transport is None or self._transport.is_closing():
            return False
        now = time.monotonic()
        message = shot.message(now)
        if message is None:
            self._pool.broke(shot, UNSENT)
            return False
        self._shot = shot
        self._body = []
        shot.connection = self
        shot.sent = now
        self._transport.writelines(message)
        return True

    def abort(self) -> None:
        """Close at once: what may still come belongs to nobody."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]  # a TCP transport reads and writes

    def data_received(self, data: bytes) -> None:
        if self._shot is None:
            self._pool.stray()
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._fail("an answer that is not HTTP")
            self.abort()

    def connection_lost(self, _: Exception | None) -> None:
        self._transport = None
        self._fail(BROKEN)
        self._pool.lost(self)

    def on_body(self, body: bytes) -> None:
        self._body.append(body)

    def on_message_complete(self) -> None:
        shot, self._shot = self._shot, None
        if shot is None:
            self._pool.stray()
            self.abort()
            return
        body = self._body[0] if len(self._body) == 1 else b"".join(self._body)
        self._pool.ended(shot, self._parser.get_status_code(), body)
        if self._parser.should_keep_alive():
            self._pool.free(self)
        else:
            self.abort()

    def _fail(self, why: str) -> None:
        shot, self._shot = self._shot, None
        if shot is not None and not shot.done:
            self._pool.broke(shot, why)


class Driver:
    """One drive; `run` does it once."""

    def __init__(self, drive: Drive, entries: Sequence[tuple[Target, CatalogueSample]], record: Record) -> None:
        self._drive = drive
        self._record = record
        self._rng = random.Random(drive.seed)  # noqa: S311 - reproducible on purpose
        self._targets = [target for target, _ in entries]
        self._shares = [target.share for target in self._targets]
        self._ammunition = [
            Ammunition(aim, catalogue, self._rng) for aim, (_, catalogue) in zip(drive.aims, entries, strict=True)
        ]
        self._pools = [Connections(aim.url, drive.connections, drive.timeout_s, record) for aim in drive.aims]
        self._mixes = [(list(aim.mix), list(aim.mix.values())) for aim in drive.aims]
        self._heads: dict[tuple[int, str, str | None, str | None], bytes] = {}
        self._outstanding: deque[Shot] = deque()

    async def run(self, begin: float) -> None:
        """Send everything, the first at `begin` (monotonic), and wait for the last outcome."""
        dues = self._drive.due()
        at_s = next(dues, None)
        swept = begin
        while at_s is not None or self._record.open:
            now = time.monotonic()
            sent = 0
            while at_s is not None and begin + at_s <= now and sent < _BURST:
                self._fire(at_s, begin + at_s)
                at_s = next(dues, None)
                sent += 1
            if now - swept >= _SWEEP_S:
                self._sweep(now)
                swept = now
            # Never a wait of nothing: answers must be read between two requests, however far behind this is.
            wait = _SWEEP_S if at_s is None else min(max(begin + at_s - time.monotonic(), 0.0), _SWEEP_S)
            await asyncio.sleep(wait)
        for pool in self._pools:
            pool.close()
        await asyncio.sleep(0)

    def _fire(self, at_s: float, due: float) -> None:
        number = self._one_of(range(len(self._targets)), self._shares)
        names, weights = self._mixes[number]
        shot = Shot(self._targets[number], self._one_of(names, weights), at_s, due)
        drive = self._drive
        if drive.priorities:
            shot.priority = self._one_of(list(drive.priorities), list(drive.priorities.values()))
        tenant = self._one_of(list(drive.tenants), list(drive.tenants.values())) if drive.tenants else None
        shot.body = self._ammunition[number].load(shot)
        shot.head = self._head(number, shot.endpoint, shot.priority, tenant)
        shot.deadline_ms = drive.deadlines.get(shot.endpoint)
        shot.fired = time.monotonic()  # what the generator is late by is the generator's, and counts all the same
        self._record.open += 1
        self._outstanding.append(shot)
        self._pools[number].fire(shot)

    def _one_of(self, values: Sequence[_T], weights: Sequence[float]) -> _T:
        return values[0] if len(values) == 1 else self._rng.choices(values, weights)[0]

    def _head(self, number: int, endpoint: str, priority: str | None, tenant: str | None) -> bytes:
        """Everything before deadline and length of the body."""
        found = self._heads.get((number, endpoint, priority, tenant))
        if found is not None:
            return found
        pool = self._pools[number]
        lines = [
            f"POST {endpoint} HTTP/1.1",
            f"host: {pool.host}:{pool.port}",
            "content-type: application/json",
            "accept: application/json",
            *([f"{PRIORITY_HEADER.lower()}: {priority}"] if priority is not None else []),
            *([f"{TENANT_HEADER.lower()}: {tenant}"] if tenant is not None else []),
            "",
        ]
        head = "\r\n".join(lines).encode("ascii")
        self._heads[number, endpoint, priority, tenant] = head
        return head

    def _sweep(self, now: float) -> None:
        """Give up who waited too long; requests are outstanding in the order in which they were due."""
        outstanding, timeout_s = self._outstanding, self._drive.timeout_s
        while outstanding and (outstanding[0].done or now - outstanding[0].due >= timeout_s):
            shot = outstanding.popleft()
            if not shot.done:
                self._record.end(shot, now, 0, Reading(error=TIMEOUT if shot.sent is not None else UNSENT))
                if shot.connection is not None:  # a late answer must not be taken for the next one's
                    shot.connection.abort()


def enter(aims: Sequence[Aim]) -> list[tuple[Target, CatalogueSample]]:
    """Ask every gateway who it is and what may be asked for. Raises DriveError."""
    whole = sum(aim.share for aim in aims)
    entries = []
    for aim in aims:
        if urlsplit(aim.url).scheme != "http":
            raise DriveError(f"{aim.url} is no address of a gateway: http://HOST:PORT")
        try:
            catalogue = msgspec.json.decode(_fetch(aim.url + PATH_SAMPLE), type=CatalogueSample)
            site = msgspec.json.decode(_fetch(aim.url + PATH_READY), type=Readiness).site
        except (OSError, msgspec.DecodeError) as fault:
            raise DriveError(f"{aim.url} tells no catalogue sample to draw requests from ({fault})") from fault
        wrong = draws.check(catalogue, list(aim.mix))
        if wrong is not None:
            raise DriveError(f"requests cannot be drawn from the catalogue sample of {aim.url}: {wrong}")
        entries.append((Target(site=site, share=aim.share / whole, best_rung=catalogue.best_rung), catalogue))
    return entries


def take_a_core() -> str:
    """Pin this process to the last core where there are enough; says what was done."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < CORES_TO_SHARE:
        return f"the generator shares {len(cores)} cores with the servers"
    os.sched_setaffinity(0, {cores[-1]})
    return f"the generator has core {cores[-1]} of {len(cores)}"


def main() -> int:
    """Exit code: 0 done, 2 could not begin."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.driver", description=__doc__)
    parser.add_argument("drive", type=Path, metavar="DRIVE.json", help="a `loadtests.drive.Drive`")
    parser.add_argument("--samples", type=Path, required=True, metavar="FILE", help="every sample, JSON lines")
    parser.add_argument("--acknowledged", type=Path, metavar="FILE", help="ids of acknowledged events, one a line")
    options = parser.parse_args()
    try:
        drive = msgspec.json.decode(options.drive.read_bytes(), type=Drive)
        entries = enter(drive.aims)
    except (OSError, msgspec.DecodeError, DriveError) as fault:
        print(f"error: {fault}", file=sys.stderr)  # noqa: T201 - a program of its own
        return 2
    note = take_a_core()
    with SampleFile(options.samples) as file:
        record = Record(file, drive.warmup_s)
        driver = Driver(drive, entries, record)
        # What was drawn lives as long as the run; a full collection in its midst would be late requests.
        gc.collect()
        gc.freeze()
        begin = time.monotonic() + _LEAD_S
        unix_s = time.time() + _LEAD_S
        file.header(
            RunHeader(
                suite=SUITE,
                started_ms=unix_s * 1000,
                warmup_s=drive.warmup_s,
                arrivals="constant",
                rate_per_user=drive.legs[0].rate,
                seed=drive.seed,
                targets=[target for target, _ in entries],
                note=note,
            )
        )
        sys.stdout.buffer.write(msgspec.json.encode(Begun(monotonic_s=begin, unix_s=unix_s, note=note)) + b"\n")
        sys.stdout.buffer.flush()
        uvloop.run(driver.run(begin))
        file.finish(seconds=max(0.0, drive.seconds - drive.warmup_s), fault=None, stray=record.stray)
    if options.acknowledged is not None:
        write_whole(options.acknowledged, "".join(f"{one}\n" for one in record.acknowledged).encode())
    return 0


def _fetch(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=_FETCH_S) as answer:  # noqa: S310 - the scheme was checked
        content: bytes = answer.read()
        return content


if __name__ == "__main__":
    sys.exit(main())
