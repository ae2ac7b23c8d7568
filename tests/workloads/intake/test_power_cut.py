# ruff: noqa: N802 - SQLite's VFS has these names
"""A disk that loses power: what was acknowledged is there when it is back.

The disk is an SQLite VFS that remembers what was written and not yet synced, under the very store that the intake
runs. Its files are real and show what the operating system would. Beside them it keeps the last synced contents of
each and every write since. A cut makes new files: the synced contents, and of the writes after them some whole, some
torn at a sector, some not at all. What a crash of the process leaves in the kernel's memory is lost here, so that a
store that does not fsync fails. The files found after a cut are opened by the interpreter's own SQLite, as in
production; the engine that writes them is the one that APSW brings, which is newer.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pathlib
import random
import shutil
import sqlite3
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import apsw
import pytest

from workloads.intake import store as store_module
from workloads.intake.records import Batch, DeadLetter, Row
from workloads.intake.store import SqliteStore, Steps

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
SEEDS = 40 if LONG else 2
CUTS = 40
NOW = 1_700_000_000_000
SECTOR = 512
PEOPLE = [f"p1-{hashlib.sha256(bytes([number])).hexdigest()[:32]}" for number in range(40)]


class Synced:
    """One file as the platter has it, and what waits in the disk's cache."""

    def __init__(self) -> None:
        self.contents = b""
        self.waiting: list[tuple[int, bytes | None]] = []
        """Writes (offset, bytes) and truncations (size, None) since the last sync, oldest first."""


class Disk:
    """What survives; `at_each` is called before every write, truncation, sync and removal: there the power may fail.

    A disk that is not `honest` says that it has synced and has not.
    """

    def __init__(self, *, honest: bool = True) -> None:
        self.files: dict[str, Synced] = {}
        self.honest = honest
        self.at_each: Callable[[], None] = lambda: None

    def write(self, name: str, at: int, data: bytes | None) -> None:
        self.at_each()
        self.files.setdefault(name, Synced()).waiting.append((at, data))

    def sync(self, name: str) -> None:
        self.at_each()
        if self.honest:
            file = self.files.setdefault(name, Synced())
            file.contents = after(file.contents, file.waiting)
            file.waiting = []

    def remove(self, name: str) -> None:
        self.at_each()
        self.files.pop(name, None)

    def cut(self, draw: random.Random, into: pathlib.Path) -> None:
        """Write to the new folder `into` what is found when the power is back."""
        into.mkdir()
        chance = draw.choice((0.0, 0.5, 0.9, 1.0))
        for name, file in self.files.items():
            kept = [part for write in file.waiting for part in survivors(write, draw, chance)]
            (into / pathlib.Path(name).name).write_bytes(after(file.contents, kept))


def survivors(
    write: tuple[int, bytes | None], draw: random.Random, chance: float
) -> Iterator[tuple[int, bytes | None]]:
    """The sectors of one write that reached the platter."""
    at, data = write
    if data is None or draw.random() < 0.5:  # the whole of it has one fate
        if draw.random() < chance:
            yield write
        return
    end = at + len(data)
    edges = [at, *range(at - at % SECTOR + SECTOR, end, SECTOR), end]
    for low, high in itertools.pairwise(edges):
        if draw.random() < chance:
            yield low, data[low - at : high - at]


def after(contents: bytes, writes: Iterable[tuple[int, bytes | None]]) -> bytes:
    done = bytearray(contents)
    for at, data in writes:
        if data is None:
            del done[at:]
        else:
            done.extend(bytes(max(0, at - len(done))))
            done[at : at + len(data)] = data
    return bytes(done)


class File(apsw.VFSFile):
    """A real file that tells the disk."""

    def __init__(self, disk: Disk, name: str | apsw.URIFilename | None, flags: list[int]) -> None:
        super().__init__("unix", name, flags)
        self.disk = disk
        self.name = name.filename() if isinstance(name, apsw.URIFilename) else str(name)

    def xWrite(self, data: bytes, offset: int) -> None:
        self.disk.write(self.name, offset, bytes(data))
        super().xWrite(data, offset)

    def xTruncate(self, newsize: int) -> None:
        self.disk.write(self.name, newsize, None)
        super().xTruncate(newsize)

    def xSync(self, flags: int) -> None:
        super().xSync(flags)
        self.disk.sync(self.name)


class Vfs(apsw.VFS):
    """The real file system that tells the disk."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.vfs_name = f"power-cut-{id(disk)}"
        super().__init__(self.vfs_name, "unix")

    def xOpen(self, name: str | apsw.URIFilename | None, flags: list[int]) -> apsw.VFSFile:
        return File(self.disk, name, flags)

    def xDelete(self, filename: str, syncdir: bool) -> None:  # noqa: FBT001 - SQLite's signature
        self.disk.remove(filename)
        super().xDelete(filename, syncdir)


class Cursor:
    """APSW's cursor with sqlite3's count."""

    def __init__(self, cursor: apsw.Cursor, rowcount: int) -> None:
        self.cursor = cursor
        self.rowcount = rowcount

    def fetchone(self) -> Any:  # noqa: ANN401 - a row is what its statement selects
        return self.cursor.fetchone()

    def fetchall(self) -> list[Any]:
        return self.cursor.fetchall()


class PoweredConnection:
    """APSW's connection as the store wants it: with sqlite3's counts and errors."""

    def __init__(self, path: pathlib.Path, vfs: Vfs, synchronous: str) -> None:
        self.connection = apsw.Connection(str(path), vfs=vfs.vfs_name)
        self.synchronous = synchronous

    @property
    def in_transaction(self) -> bool:
        return self.connection.in_transaction

    def run(self, work: Callable[[], apsw.Cursor]) -> Cursor:
        before = self.connection.total_changes()
        try:
            cursor = work()
        except apsw.Error as error:
            failed = sqlite3.OperationalError(str(error))
            failed.sqlite_errorcode = error.extendedresult
            raise failed from error
        return Cursor(cursor, self.connection.total_changes() - before)

    def execute(self, sql: str, parameters: Sequence[Any] = (), /) -> Cursor:
        if sql == "PRAGMA synchronous=FULL":
            sql = f"PRAGMA synchronous={self.synchronous}"
        elif sql == "PRAGMA synchronous":
            sql = "SELECT 2"  # says what it was asked for, whatever it does
        return self.run(lambda: self.connection.execute(sql, parameters))

    def executemany(self, sql: str, parameters: Iterable[Sequence[Any]], /) -> Cursor:
        return self.run(lambda: self.connection.executemany(sql, parameters))

    def close(self) -> None:
        self.connection.close()


class Intake:
    """A client's memory beside the store: what it was told, and what the disk must therefore still tell."""

    def __init__(self, home: pathlib.Path, seed: int, *, synchronous: str = "FULL", honest: bool = True) -> None:
        self.home = home
        self.draw = random.Random(seed)
        self.disk = Disk(honest=honest)
        self.acknowledged: dict[str, str] = {}
        """Person by event, of all events that were acknowledged and not erased or trimmed since."""
        self.asked: dict[str, str] = {}
        """The same of all that were ever sent."""
        self.leaving: set[str] = set()
        """Whose erasure was asked for."""
        self.left: set[str] = set()
        """Whose erasure was answered."""
        self.cuts = 0
        vfs = Vfs(self.disk)
        self.store = SqliteStore(
            home / "live" / "events.sqlite", connect=lambda path: PoweredConnection(path, vfs, synchronous)
        )

    def live(self, turns: int, cuts: int) -> None:
        """Take events, erase, trim and tidy for some turns; the power fails at random places of it."""
        begun = {"places": 0}

        def count() -> None:
            begun["places"] += 1

        self.disk.at_each = count
        self.turn(0)
        chance = cuts / max(1, begun["places"] * turns)
        self.disk.at_each = lambda: self.fail() if self.draw.random() < chance else None
        for number in range(1, turns):
            self.turn(number)
        self.fail()
        self.disk.at_each = lambda: None
        self.store.close()

    def turn(self, number: int) -> None:
        people = [person for person in PEOPLE if person not in self.leaving]
        batches = [self.batch(people) for _ in range(self.draw.randint(1, 4))]
        self.asked |= {str(row[0]): str(row[3]) for batch in batches for row in batch.rows}
        self.store.append(batches, NOW + number)
        self.acknowledged |= {str(row[0]): str(row[3]) for batch in batches for row in batch.rows}
        if number % 7 == 3:
            gone = {self.draw.choice(people)}
            self.leaving |= gone
            self.acknowledged = {name: who for name, who in self.acknowledged.items() if who not in gone}
            self.run(self.store.erase(frozenset(gone)))
            self.left |= gone
        if number % 5 == 4:
            before = NOW + number - 8
            kept = [name for name, at in self.arrived().items() if at >= before]
            self.acknowledged = {name: who for name, who in self.acknowledged.items() if name in set(kept)}
            self.run(self.store.trim(10**9, before, NOW))
        if self.draw.random() < 0.5:
            self.store.tidy()

    def run(self, steps: Steps[Any]) -> None:
        for _ in steps:
            self.store.append([Batch([], [DeadLetter("between", None, b"")])], NOW)

    def arrived(self) -> dict[str, int]:
        rows = self.store._connected().execute("SELECT event_id, received_ms FROM events").fetchall()
        return {name: at for name, at in rows if name in self.acknowledged}

    def batch(self, people: list[str]) -> Batch:
        rows: list[Row] = []
        for _ in range(self.draw.randint(1, 30)):
            name = str(uuid.UUID(f"{NOW:012x}7000{self.draw.getrandbits(64) & 0x3FFFFFFFFFFFFFFF | 1 << 63:016x}"))
            context = "x" * self.draw.choice((0, 0, 100, 9000))
            rows.append((name, "click", NOW, self.draw.choice(people), "mug", *(None,) * 6, context or None, None, 2))
        return Batch(rows, [])

    def fail(self) -> None:
        """The power fails here: what is found on the disk must hold what was said."""
        self.cuts += 1
        found = self.home / f"cut-{self.cuts}"
        self.disk.cut(self.draw, found)
        try:
            self.judge(found / "events.sqlite")
        except (sqlite3.Error, store_module.StoreError) as error:  # those the store itself may expect of its disk
            raise AssertionError(f"the file is damaged: {error}") from error
        shutil.rmtree(found)

    def judge(self, path: pathlib.Path) -> None:
        store = SqliteStore(path)
        rows = dict(store._connected().execute("SELECT event_id, user FROM events").fetchall())
        (count,) = store._connected().execute("SELECT count(*) FROM events").fetchone()
        (sound,) = store._connected().execute("PRAGMA integrity_check").fetchone()
        again = store.append([Batch([self.row_of(name) for name in rows], [])], NOW)[0]
        store.close()
        missing = set(self.acknowledged) - set(rows)
        assert not missing, f"{len(missing)} acknowledged events are lost"
        assert sound == "ok", "the file is damaged"
        assert count == len(rows), "events are doubled"
        assert again.duplicates == len(rows), "ids are forgotten"
        assert set(rows) <= set(self.asked)
        assert not self.left & set(rows.values()), "an erasure that was answered is undone"

    def row_of(self, name: str) -> Row:
        return (name, "click", NOW, self.asked.get(name), "mug", *(None,) * 7, None, 2)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs that are moved often, work in many steps."""
    monkeypatch.setattr(store_module, "CHECKPOINT_BYTES", 100_000)
    monkeypatch.setattr(store_module, "CHUNK", 50)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_what_was_acknowledged_is_there_after_a_power_cut_at_any_place(tmp_path: pathlib.Path, seed: int):
    intake = Intake(tmp_path, seed)
    intake.live(turns=40, cuts=CUTS)
    assert intake.cuts > CUTS / 4
    assert intake.left


@pytest.mark.parametrize("synchronous", ["OFF", "NORMAL"])
def test_a_store_that_does_not_sync_before_it_answers_loses_what_it_acknowledged(
    tmp_path: pathlib.Path, synchronous: str
):
    with pytest.raises(AssertionError, match=r"events are lost|is damaged"):
        Intake(tmp_path, 0, synchronous=synchronous).live(turns=40, cuts=CUTS)


def test_a_disk_that_only_says_that_it_has_synced_loses_what_was_acknowledged(tmp_path: pathlib.Path):
    with pytest.raises(AssertionError, match=r"events are lost|is damaged"):
        Intake(tmp_path, 0, honest=False).live(turns=40, cuts=CUTS)


def test_a_torn_last_record_costs_itself_alone(tmp_path: pathlib.Path):
    """The log cut off at every sector of its last commit: all commits before it are there."""
    intake = Intake(tmp_path, 1)
    for number in (1, 2):
        intake.turn(number)
    (log,) = [name for name in intake.disk.files if name.endswith("-wal")]
    at_last: list[int] = []
    intake.disk.at_each = lambda: at_last.append(len(intake.disk.files[log].waiting))
    before, first = dict(intake.acknowledged), len(after(intake.disk.files[log].contents, []))
    intake.turn(5)
    whole = after(intake.disk.files[log].contents, intake.disk.files[log].waiting)
    for place, end in enumerate(range(first, len(whole), SECTOR)):
        found = tmp_path / f"torn-{place}"
        found.mkdir()
        (found / "events.sqlite").write_bytes((tmp_path / "live" / "events.sqlite").read_bytes())
        (found / "events.sqlite-wal").write_bytes(whole[:end])
        store = SqliteStore(found / "events.sqlite")
        rows = {name for (name,) in store._connected().execute("SELECT event_id FROM events").fetchall()}
        store.close()
        assert rows == set(before)
    assert place > 3
    intake.store.close()
