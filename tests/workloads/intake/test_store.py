"""The real file: what it promises about durability, and what it does when it cannot keep a promise."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import re
import sqlite3
import uuid
from collections.abc import Iterator
from typing import TypeVar

import pytest

from workloads.intake import store as store_module
from workloads.intake.records import Batch, DeadLetter, Row
from workloads.intake.store import (
    IDS_KEPT_MS,
    Appended,
    Erased,
    EventStore,
    MemoryStore,
    SqliteStore,
    Steps,
    StorageFullError,
    StoreError,
    Trimmed,
)

LONG = os.environ.get("RANKBRIDGE_LONG") == "1"
T = TypeVar("T")
NOW = 1_700_000_000_000


def name(number: int, moment_ms: int = NOW) -> str:
    """An event's id: a uuid7 of that moment."""
    return str(uuid.UUID(f"{moment_ms:012x}70008{number:015x}"))


def row(
    number: int, item: str = "mug", user: str | None = None, context: str | None = None, moment_ms: int = NOW
) -> Row:
    event_id = name(number, moment_ms)
    return (event_id, "click", moment_ms, user, item, None, None, None, None, None, None, context, None, 2)


def batch(*numbers: int, dead: int = 0) -> Batch:
    return Batch([row(number) for number in numbers], [DeadLetter("r", "$.f", b"{}")] * dead)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "home" / "events.sqlite"


def ids(path: pathlib.Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        found = [event_id for (event_id,) in connection.execute("SELECT event_id FROM events ORDER BY seq")]
    connection.close()
    return found


def test_the_settings_read_back_are_durable_ones(path: pathlib.Path):
    store = SqliteStore(path)
    assert store.settings() == {"journal_mode": "wal", "synchronous": 2, "secure_delete": 1}
    store.close()


def test_appended_rows_are_in_the_file_while_the_store_is_open(path: pathlib.Path):
    store = SqliteStore(path)
    assert store.append([batch(1, 2), batch(3)], NOW) == [Appended(2, 0, 0), Appended(1, 0, 0)]
    assert ids(path) == [name(1), name(2), name(3)]
    store.close()


@pytest.mark.parametrize("make", [SqliteStore, lambda _: MemoryStore()])
def test_the_store_and_its_fake_count_alike(path: pathlib.Path, make: type[SqliteStore]):
    store: EventStore = make(path)
    first = store.append([batch(1, 2, 2), batch(2, 3, dead=2)], NOW)
    again = store.append([batch(1, 2, 3)], NOW)
    assert first == [Appended(2, 1, 0), Appended(1, 1, 2)]
    assert again == [Appended(0, 3, 0)]
    assert store.probe() >= 0
    store.tidy()
    store.close()


def test_the_first_writing_of_an_event_stays(path: pathlib.Path):
    store = SqliteStore(path)
    store.append([batch(1)], NOW)
    store.append([Batch([row(1, item="other")], [])], NOW)
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT item, received_ms FROM events").fetchall() == [("mug", NOW)]
    reader.close()
    store.close()


def test_dead_letters_keep_their_reason_and_only_the_newest_stay(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "DEAD_LETTERS_KEPT", 3)
    store = SqliteStore(path)
    for number in range(5):
        store.append([Batch([], [DeadLetter(f"reason {number}", "$.f", b"{}")])], NOW)
    with sqlite3.connect(path) as reader:
        kept = reader.execute("SELECT reason, field, payload FROM dead_letters ORDER BY seq").fetchall()
    reader.close()
    assert kept == [(f"reason {number}", "$.f", b"{}") for number in (2, 3, 4)]
    store.close()


def test_a_full_disk_stores_nothing_of_the_group_and_recovers_when_there_is_room(path: pathlib.Path):
    store = SqliteStore(path)
    store.append([batch(1)], NOW)
    connection = store._connected()
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(StorageFullError, match="full"):
        store.append([batch(2), Batch([row(number, item="x" * 100) for number in range(3, 300)], [])], NOW)
    assert ids(path) == [name(1)]
    connection.execute("PRAGMA max_page_count=1000000")
    assert store.append([batch(2)], NOW) == [Appended(1, 0, 0)]
    store.close()


def test_a_row_that_sqlite_cannot_hold_costs_the_next_group_nothing(path: pathlib.Path):
    store = SqliteStore(path)
    impossible = (*row(2)[:8], 2**70, *row(2)[9:])
    with pytest.raises(OverflowError):
        store.append([batch(1), Batch([impossible], [])], NOW)
    assert store.append([batch(3)], NOW) == [Appended(1, 0, 0)]
    assert ids(path) == [name(3)]
    store.close()


def test_a_file_held_by_another_writer_is_a_fault_and_not_a_loss(path: pathlib.Path):
    store = SqliteStore(path)
    store._connected().execute("PRAGMA busy_timeout=10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.append([batch(1)], NOW)
    other.execute("ROLLBACK")
    other.close()
    assert store.append([batch(1)], NOW) == [Appended(1, 0, 0)]
    store.close()


def test_after_an_input_output_error_the_file_is_opened_anew(path: pathlib.Path):
    store = SqliteStore(path)
    connection = store._connected()
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR | (4 << 8)  # SQLITE_IOERR_FSYNC
    assert isinstance(store._failed(connection, error), StoreError)
    assert store.append([batch(1)], NOW) == [Appended(1, 0, 0)]
    assert store._connected() is not connection
    assert store.settings()["synchronous"] == 2
    store.close()


def test_the_log_is_folded_into_the_database_once_it_has_grown(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "CHECKPOINT_BYTES", 10_000)
    store = SqliteStore(path)
    store.append([batch(*range(500))], NOW)
    before = path.stat().st_size
    store.tidy()
    assert path.stat().st_size > before
    assert len(ids(path)) == 500
    store.close()
    assert not path.with_name(path.name + "-wal").exists()


def test_a_log_is_overdue_once_it_is_full_and_not_after_it_was_moved(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_module, "OVERDUE_BYTES", 200_000)
    monkeypatch.setattr(store_module, "CHECKPOINT_BYTES", 10_000)
    store = SqliteStore(path)
    assert not store.is_overdue()
    for start in range(0, 4000, 500):
        store.append([batch(*range(start, start + 500))], NOW)
    assert store.is_overdue()
    store.tidy()
    store.append([batch(4000)], NOW)  # the first writing after it begins the log anew, and cuts it
    assert not store.is_overdue()
    assert len(ids(path)) == 4001
    store.close()


def test_a_file_that_is_no_database_is_refused_by_name(tmp_path: pathlib.Path):
    path = tmp_path / "notes.txt"
    path.write_text("not a database, long enough to be looked at " * 40)
    with pytest.raises(StoreError, match=r"notes\.txt"):
        SqliteStore(path)


def test_a_file_of_a_newer_schema_is_refused(path: pathlib.Path):
    SqliteStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreError, match="schema 99"):
        SqliteStore(path)


FIRST_SCHEMA = """
CREATE TABLE events (
  seq INTEGER PRIMARY KEY, event_id TEXT NOT NULL UNIQUE, type TEXT NOT NULL, timestamp_ms INTEGER NOT NULL,
  user TEXT, item TEXT, session TEXT, query TEXT, position INTEGER, quantity INTEGER, price REAL, rating REAL,
  context TEXT, schema_version INTEGER NOT NULL, received_ms INTEGER NOT NULL
);
CREATE TABLE dead_letters (
  seq INTEGER PRIMARY KEY, received_ms INTEGER NOT NULL, reason TEXT NOT NULL, field TEXT, payload BLOB NOT NULL
);
CREATE TABLE probe (id INTEGER PRIMARY KEY, moment INTEGER NOT NULL);
PRAGMA user_version=1;
"""


def run(steps: Steps[T]) -> T:
    """All steps of long work, and what comes of it."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            done: T = end.value
            return done


def person(number: int) -> str:
    return f"p1-{hashlib.sha256(str(number).encode()).hexdigest()[:32]}"


def raw_bytes(path: pathlib.Path) -> bytes:
    """What a thief of the disk reads."""
    return b"".join(file.read_bytes() for file in sorted(path.parent.iterdir()))


def test_a_file_of_the_first_schema_keeps_its_events_their_numbers_and_knows_their_ids(path: pathlib.Path):
    path.parent.mkdir()
    with sqlite3.connect(path) as earlier:
        earlier.executescript(FIRST_SCHEMA)
        for seq, number in ((1, 11), (2, 12), (5, 15)):
            earlier.execute(
                "INSERT INTO events (seq, event_id, type, timestamp_ms, schema_version, received_ms)"
                " VALUES (?, ?, 'view', 1, 1, 2)",
                (seq, name(number)),
            )
    earlier.close()
    store = SqliteStore(path)
    assert store.append([batch(12, 16)], NOW) == [Appended(1, 1, 0)]
    store.close()
    with sqlite3.connect(path) as reader:
        rows = reader.execute("SELECT seq, event_id, request_id FROM events ORDER BY seq").fetchall()
    reader.close()
    assert rows == [
        (1, name(11), None),
        (2, name(12), None),
        (5, name(15), None),
        (7, name(16), None),
    ]  # the number meant for the known one stays unused
    SqliteStore(path).close()


def test_a_number_is_never_given_twice_even_when_all_rows_are_gone(path: pathlib.Path):
    store = SqliteStore(path)
    store.append([Batch([row(1, user=person(1)), row(2, user=person(1))], [])], NOW)
    assert run(store.erase(frozenset({person(1)}))) == Erased(2, 0)
    store.append([batch(3)], NOW)
    assert run(store.trim(3, NOW + 1, NOW)) == Trimmed(1, 3, 3)
    store.close()
    store = SqliteStore(path)
    store.append([batch(4)], NOW)
    with sqlite3.connect(path) as reader:
        assert reader.execute("SELECT seq, event_id FROM events").fetchall() == [(4, name(4))]
    reader.close()
    store.close()


def test_a_trim_removes_the_beginning_up_to_the_number_and_the_retention(path: pathlib.Path):
    store = SqliteStore(path)
    for number in range(1, 7):
        store.append([batch(number)], NOW + number)
    assert run(store.trim(2, NOW + 100, NOW)) == Trimmed(2, 2, 6)
    assert run(store.trim(6, NOW + 5, NOW)) == Trimmed(2, 4, 6)  # the fifth arrived at the moment that stays
    assert run(store.trim(1, NOW + 100, NOW)) == Trimmed(0, 4, 6)
    assert ids(path) == [name(5), name(6)]
    store.close()


def test_a_trim_in_chunks_removes_no_less(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "CHUNK", 10)
    store = SqliteStore(path)
    store.append([batch(*range(100))], NOW)
    assert run(store.trim(95, NOW + 1, NOW + 2 * IDS_KEPT_MS)) == Trimmed(95, 95, 100)
    assert store.append([batch(*range(100))], NOW) == [Appended(95, 5, 0)]  # beyond the window they are new again
    store.close()


def test_an_id_outlives_its_row_for_the_window_and_is_known_while_the_row_is_here(path: pathlib.Path):
    store = SqliteStore(path)
    old, young, ahead = NOW - IDS_KEPT_MS - 1, NOW - IDS_KEPT_MS, NOW + 10 * IDS_KEPT_MS
    rows = [row(number, moment_ms=moment) for number, moment in enumerate((old, young, ahead, old))]
    store.append([Batch(rows, [])], NOW)
    assert run(store.trim(3, NOW + 1, NOW)).events == 3
    # Of the trimmed ones only the one within the window is known; the last has its row, so that its age is no matter.
    assert store.append([Batch(rows, [])], NOW) == [Appended(2, 2, 0)]
    store.close()


def test_an_erased_event_that_is_sent_again_does_not_come_back(path: pathlib.Path):
    store = SqliteStore(path)
    store.append([Batch([row(1, user=person(1)), row(2, user=person(2))], [])], NOW)
    assert run(store.erase(frozenset({person(1)}))) == Erased(1, 0)
    assert store.append([Batch([row(1, user=person(1))], [])], NOW) == [Appended(0, 1, 0)]
    assert ids(path) == [name(2)]
    store.close()


def test_an_erasure_finds_a_person_wherever_an_event_names_one(path: pathlib.Path):
    store = SqliteStore(path)
    context = f'{{"who":"{person(1)}"}}'
    letter = DeadLetter("r", "$.f", f'{{"user":"{person(1)}"}}'.encode())
    other = DeadLetter("r", "$.f", f'{{"user":"{person(2)}", "cut'.encode() + "é".encode()[:1])
    rows = [row(1, user=person(1)), row(2, context=context), row(3, user=person(2)), row(4)]
    store.append([Batch(rows, [letter, other])], NOW)
    assert run(store.erase(frozenset({person(1), person(9)}))) == Erased(2, 1)
    assert run(store.erase(frozenset({person(1)}))) == Erased(0, 0)
    assert ids(path) == [name(3), name(4)]
    assert person(1)[:20].encode() not in raw_bytes(path)
    assert person(2).encode() in raw_bytes(path)
    store.close()


def test_an_erasure_covers_what_arrives_between_its_steps(path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(store_module, "CHUNK", 5)
    store = SqliteStore(path)
    store.append([Batch([row(number, user=person(number % 2)) for number in range(30)], [])], NOW)
    erasure = store.erase(frozenset({person(1)}))
    next(erasure)
    store.append([Batch([row(100, user=person(1)), row(101, user=person(2))], [])], NOW)
    assert run(erasure) == Erased(16, 0)
    assert person(1).encode() not in raw_bytes(path)
    store.close()


def people_come_and_leave(path: pathlib.Path, seed: int) -> Iterator[set[bytes]]:
    """Events, erasures and trims; after each erasure the names of those who left that are still on disk."""
    draw = random.Random(seed)
    store = SqliteStore(path)
    here, gone = list(range(300)), set[int]()
    number = 0
    for step in range(20):
        rows = []
        for _ in range(400):
            number += 1
            context = json.dumps({"note": "x" * draw.choice((0, 10, 300, 6000))}) if draw.random() < 0.3 else None
            rows.append(row(number, user=person(draw.choice(here)), context=context))
        store.append([Batch(rows, [])], NOW + step)
        leaving = set(draw.sample(here, 4))
        here, gone = [one for one in here if one not in leaving], gone | leaving
        run(store.erase(frozenset(map(person, leaving))))
        if step % 7 == 3:
            run(store.trim(number - draw.randint(1000, 6000), NOW + step, NOW))
        yield {person(one)[3:].encode() for one in gone} & set(re.findall(rb"[0-9a-f]{32}", raw_bytes(path)))
    store.close()


@pytest.mark.parametrize("seed", range(20 if LONG else 2))
def test_after_many_erasures_no_byte_on_disk_names_anybody_who_left(path: pathlib.Path, seed: int):
    assert not any(people_come_and_leave(path, seed))


def test_without_its_search_an_erasure_would_leave_names_between_the_cells(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    def find_nothing(_: SqliteStore, __: object) -> Steps[bool]:
        yield
        return False

    monkeypatch.setattr(SqliteStore, "_search", find_nothing)
    assert any(any(people_come_and_leave(path.with_name(f"{seed}") / "e.sqlite", seed)) for seed in range(5))


def test_a_reader_of_older_rows_delays_an_erasure_and_is_named_when_it_stays(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_module, "READERS_WAIT_S", 0.05)
    store = SqliteStore(path)
    store.append([Batch([row(1, user=person(1)), row(2)], [])], NOW)
    reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None)
    reader.execute("BEGIN")
    reader.execute("SELECT count(*) FROM events").fetchone()
    with pytest.raises(StoreError, match="reader has held"):
        run(store.erase(frozenset({person(1)})))
    assert store.append([batch(3)], NOW) == [Appended(1, 0, 0)]
    reader.close()
    assert run(store.erase(frozenset({person(1)}))) == Erased(0, 0)
    assert person(1).encode() not in raw_bytes(path)
    store.close()


def test_what_a_trim_freed_is_room_for_the_next_events(path: pathlib.Path):
    store = SqliteStore(path)
    store.append([Batch([row(number, context="x" * 500) for number in range(2000)], [])], NOW)
    assert store.reusable_bytes() == 0
    run(store.trim(2000, NOW + 1, NOW))
    freed = store.reusable_bytes()
    assert freed > 500_000
    store.append([Batch([row(number, context="x" * 500) for number in range(3000, 4000)], [])], NOW)
    assert store.reusable_bytes() < freed - 300_000
    store.close()


def test_a_log_that_was_moved_is_not_moved_again_by_every_small_write(
    path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(store_module, "CHECKPOINT_BYTES", 50_000)
    store = SqliteStore(path)
    store.append([batch(*range(1000))], NOW)
    store.tidy()
    store.append([batch(2000)], NOW)
    moved = path.stat().st_mtime_ns
    for number in range(2001, 2004):
        store.append([batch(number)], NOW)
        store.tidy()
    assert path.stat().st_mtime_ns == moved
    store.close()


@pytest.mark.parametrize("others", [0, 100])
def test_half_of_a_name_is_found_wherever_it_begins_and_a_strangers_is_not(others: int):
    names = store_module._Names([person(1), *(person(number) for number in range(2, 2 + others))])
    digits = person(1)[3:].encode()
    for at in range(17):
        assert names.are_in(b"zz " + digits[at : at + 16] + b"|")
        assert not names.are_in(b"zz " + digits[at : at + 15] + b"g" + digits[at + 16 :][:15])
    assert not names.are_in(person(500).encode() * 3)
