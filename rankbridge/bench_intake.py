"""What an acknowledged event costs: the intake's store against a plain SQLite loop, and single posts at a fixed rate.

Both loops write the same rows in batches of 100, each batch a transaction that is fsynced (WAL, synchronous=FULL),
by turns into files of the same folder. The plain one knows no duplicates, keeps no ids and has no index: it is what
the disk and SQLite cost at least; a second one has its ids unique, as a loop needs that may be sent an event twice.
The posts go to an intake that is started for them, at moments that are fixed before
(Poisson), and each is timed from the moment at which it was due. What an fsync costs here is measured beside it.
A bench measures and fails nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import random
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec
import uuid_utils
from rich.console import Console
from rich.table import Table

from loadtests.measures import quantile
from loadtests.samples import write_whole
from rankbridge.bench import Part, Spread
from rankbridge.faults import DeskError
from rankbridge.verdict import Machine, machine
from workloads.contract.events import SCHEMA_VERSION as EVENT_VERSION
from workloads.contract.events import Event, EventType
from workloads.contract.http import PATH_INTAKE, PATH_READY, EventsAnswer
from workloads.gateway.neighbour import Late, Neighbour, Unreachable
from workloads.intake import records
from workloads.intake.store import COLUMNS, SqliteStore

SCHEMA_VERSION: Final = 1
GOAL_RATIO: Final = 0.5
GOAL_P99_MS: Final = 30.0
"""Where the intake is to get; a bench measures and fails nothing."""
BATCH: Final = 100
BATCHES: Final = 100
ROUNDS: Final = 7
RATE: Final = 500.0
SECONDS: Final = 20.0
FSYNCS: Final = 50
PAGE: Final = 4096
READY_WITHIN_S: Final = 30.0
TIMEOUT_S: Final = 10.0


@dataclasses.dataclass(frozen=True)
class Options:
    """What is asked for; `folder` is on the disk that is meant."""

    folder: Path
    out: Path
    rounds: int = ROUNDS
    batches: int = BATCHES
    rate: float = RATE
    seconds: float = SECONDS
    seed: int = 1


class Posts(msgspec.Struct, frozen=True, kw_only=True):
    """Single posts, each timed from the moment at which it was due."""

    rate: float
    sent: int
    failed: int
    latency: Part
    generator_late: Part
    """What of it is the generator's own: how late a post began."""


class IntakeBench(msgspec.Struct, frozen=True, kw_only=True):
    """`bench-intake.json`. Rates are events a second, median of the rounds."""

    schema_version: int = SCHEMA_VERSION
    rounds: int
    batch: int
    batches: int
    plain_per_s: float
    unique_per_s: float
    """A plain loop into a table whose ids are unique."""
    store_per_s: float
    decoded_per_s: float
    """The store, and before it the decoding and checking of the request's body (JSON)."""
    ratio: Spread
    """Store over plain, round by round."""
    unique_ratio: Spread
    """Store over the plain loop with unique ids."""
    decoded_ratio: Spread
    fsync: Part
    posts: Posts
    goal_ratio: float = GOAL_RATIO
    goal_p99_ms: float = GOAL_P99_MS
    machine: Machine
    load_average: float
    """Of the minute before: what else ran."""


def run(options: Options, console: Console) -> IntakeBench:
    """Measure, write `bench-intake.json` to `options.out`, show. Raises DeskError where it cannot be done."""
    options.folder.mkdir(parents=True, exist_ok=True)
    busy = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="bench-intake-") as name:
        folder = Path(name)
        rounds, fsyncs = compare(folder, rounds=options.rounds, batches=options.batches)
        posts = measure_posts(folder, rate=options.rate, seconds=options.seconds, seed=options.seed)
    per_s = [{loop: options.batches * BATCH / spent for loop, spent in one.items()} for one in rounds]
    result = IntakeBench(
        rounds=options.rounds,
        batch=BATCH,
        batches=options.batches,
        plain_per_s=statistics.median(one["plain"] for one in per_s),
        unique_per_s=statistics.median(one["unique"] for one in per_s),
        store_per_s=statistics.median(one["store"] for one in per_s),
        decoded_per_s=statistics.median(one["decoded"] for one in per_s),
        ratio=_spread([one["store"] / one["plain"] for one in per_s]),
        unique_ratio=_spread([one["store"] / one["unique"] for one in per_s]),
        decoded_ratio=_spread([one["decoded"] / one["plain"] for one in per_s]),
        fsync=_part(fsyncs),
        posts=posts,
        machine=machine(),
        load_average=busy,
    )
    options.out.mkdir(parents=True, exist_ok=True)
    write_whole(options.out / "bench-intake.json", msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")
    show(result, console)
    return result


def compare(folder: Path, *, rounds: int, batches: int) -> tuple[list[dict[str, float]], list[float]]:
    """Seconds of each loop in each round, in turns of changing order; and milliseconds of fsyncs between them."""
    plain = _plain(folder / "plain.sqlite", COLUMNS)
    unique = _plain(folder / "unique.sqlite", ("event_id TEXT PRIMARY KEY", *COLUMNS[1:]))
    store, decoding = SqliteStore(folder / "store.sqlite"), SqliteStore(folder / "decoded.sqlite")

    def loop(connection: sqlite3.Connection, body: bytes) -> None:
        rows = ready[body].rows
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(_INSERT, [(*row, 1) for row in rows])
        connection.execute("COMMIT")

    def stored(body: bytes) -> None:
        store.append([ready[body]], 1)
        store.tidy()  # where the plain loop checkpoints, in the commit

    def decoded(body: bytes) -> None:
        decoding.append([records.read(body, msgpack=False)], 1)
        decoding.tidy()

    loops: dict[str, Callable[[bytes], None]] = {
        "plain": lambda body: loop(plain, body),
        "unique": lambda body: loop(unique, body),
        "store": stored,
        "decoded": decoded,
    }
    results: list[dict[str, float]] = []
    fsyncs: list[float] = []
    try:
        for number in range(rounds + 1):
            bodies = [msgspec.json.encode({"events": [_event() for _ in range(BATCH)]}) for _ in range(batches)]
            ready = {body: records.read(body, msgpack=False) for body in bodies}
            turn = number % len(loops)
            order = list(loops)[turn:] + list(loops)[:turn]
            spent = {name: _spent(loops[name], bodies) for name in order}
            measured = list(_fsyncs(folder / "fsync"))
            if number:  # the first round warms caches and files up
                results.append(spent)
                fsyncs += measured
    finally:
        plain.close()
        unique.close()
        store.close()
        decoding.close()
    return results, fsyncs


_INSERT: Final = f"INSERT OR IGNORE INTO events VALUES ({', '.join('?' * (len(COLUMNS) + 1))})"  # noqa: S608 - names are ours


def _plain(path: Path, columns: Sequence[str]) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode=WAL")
    connection.execute("PRAGMA synchronous=FULL")
    connection.execute(f"CREATE TABLE events ({', '.join(columns)}, received_ms)")
    return connection


def measure_posts(folder: Path, *, rate: float, seconds: float, seed: int) -> Posts:
    """Single posts to an intake of their own. Raises DeskError when it does not start."""
    with _intake(folder / "posts.sqlite") as port:
        return asyncio.run(_post_all(port, rate=rate, seconds=seconds, seed=seed))


async def _post_all(port: int, *, rate: float, seconds: float, seed: int) -> Posts:
    at = Neighbour("127.0.0.1", port)
    await _until_ready(at)
    draw = random.Random(seed)  # noqa: S311 - reproducible on purpose
    dues, moment = [], 0.0
    while (moment := moment + draw.expovariate(rate)) < seconds:
        dues.append(moment)
    head = at.head("POST", PATH_INTAKE, (("content-type", "application/msgpack"),))
    decode = msgspec.msgpack.Decoder(EventsAnswer).decode
    bodies = [msgspec.msgpack.encode({"events": [_event()]}) for _ in dues]
    latencies, lates = [], []
    failed = 0

    async def post(body: bytes, due: float) -> None:
        nonlocal failed
        lates.append((time.perf_counter() - due) * 1000)
        try:
            reply = await at.send(head, (body,), TIMEOUT_S)
            good = reply.status == 200 and decode(reply.body).accepted == 1
        except (Late, Unreachable):
            good = False
        if not good:
            failed += 1
        latencies.append((time.perf_counter() - due) * 1000 if good else TIMEOUT_S * 1000)

    begun = time.perf_counter() + 0.5
    async with asyncio.TaskGroup() as group:
        for body, due in zip(bodies, dues, strict=True):
            await asyncio.sleep(max(0.0, begun + due - time.perf_counter()))
            group.create_task(post(body, begun + due))
    await at.close()
    return Posts(rate=rate, sent=len(dues), failed=failed, latency=_part(latencies), generator_late=_part(lates))


async def _until_ready(at: Neighbour) -> None:
    head = at.head("GET", PATH_READY)
    until = time.monotonic() + READY_WITHIN_S
    while time.monotonic() < until:
        with contextlib.suppress(Late, Unreachable):
            if (await at.send(head)).status == 200:
                return
        await asyncio.sleep(0.05)
    raise DeskError("the intake of the bench did not become ready", "free disk space? try `python -m workloads.intake`")


@contextlib.contextmanager
def _intake(path: Path) -> Iterator[int]:
    """A real intake, and its port, for as long as it is needed."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    command = [sys.executable, "-m", "workloads.intake", "--listen", f"127.0.0.1:{port}", "--store", str(path)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _event() -> Event:
    return Event(
        event_id=str(uuid_utils.uuid7()),
        type=EventType.CLICK,
        timestamp_ms=time.time_ns() // 1_000_000,
        user=f"p1-{random.getrandbits(128):032x}",
        item=f"item-{random.randrange(10_000)}",  # noqa: S311 - nobody's
        position=3,
        context={"page": "home"},
        schema_version=EVENT_VERSION,
    )


def _spent(work: Callable[[bytes], None], bodies: Sequence[bytes]) -> float:
    begun = time.perf_counter()
    for body in bodies:
        work(body)
    return time.perf_counter() - begun


def _fsyncs(path: Path) -> Iterator[float]:
    """Milliseconds of one page written and synced, over and over, into a file that has its size."""
    with path.open("wb", buffering=0) as file:
        file.write(bytes(PAGE * FSYNCS))
        os.fsync(file.fileno())
        for number in range(FSYNCS):
            os.pwrite(file.fileno(), os.urandom(PAGE), number * PAGE)
            begun = time.perf_counter()
            os.fdatasync(file.fileno())
            yield (time.perf_counter() - begun) * 1000


def _part(values: Sequence[float]) -> Part:
    ordered = sorted(values)
    return Part(p50_ms=quantile(ordered, 0.5), p99_ms=quantile(ordered, 0.99))


def _spread(values: Sequence[float]) -> Spread:
    return Spread(median=statistics.median(values), low=min(values), high=max(values))


def show(result: IntakeBench, console: Console) -> None:
    """The figures as a table."""
    console.print(
        f"{result.rounds} rounds of {result.batches} batches of {result.batch} events, each batch fsynced; "
        f"{result.machine.cores} cores, load average {result.load_average:.1f} before",
        highlight=False,
    )
    table = Table("loop", "events/s", "of the plain loop (rounds)")
    table.add_row("plain SQLite, no index, no ids", f"{result.plain_per_s:,.0f}", "")
    table.add_row("plain SQLite, unique ids", f"{result.unique_per_s:,.0f}", "")
    for name, per_s, ratio in (
        ("intake's store", result.store_per_s, result.ratio),
        ("decoded, checked and stored", result.decoded_per_s, result.decoded_ratio),
    ):
        table.add_row(name, f"{per_s:,.0f}", f"{ratio.median:.2f} ({ratio.low:.2f} to {ratio.high:.2f})")
    console.print(table)
    posts = result.posts
    console.print(
        f"store over plain: {result.ratio.median:.2f} (goal {result.goal_ratio:g} or more), over the one with unique "
        f"ids: {result.unique_ratio.median:.2f} ({result.unique_ratio.low:.2f} to {result.unique_ratio.high:.2f})\n"
        f"fsync of a page: p50 {result.fsync.p50_ms:.2f} ms, p99 {result.fsync.p99_ms:.2f} ms\n"
        f"{posts.sent} single posts at {posts.rate:g}/s, {posts.failed} failed: p50 {posts.latency.p50_ms:.2f} ms, "
        f"p99 {posts.latency.p99_ms:.2f} ms (goal {result.goal_p99_ms:g} ms); of it the generator was late "
        f"p50 {posts.generator_late.p50_ms:.2f} ms, p99 {posts.generator_late.p99_ms:.2f} ms",
        highlight=False,
        soft_wrap=True,
    )
