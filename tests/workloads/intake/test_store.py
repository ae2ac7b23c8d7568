"""The real file: what it promises about durability, and what it does when it cannot keep a promise."""

from __future__ import annotations

import pathlib
import sqlite3

import pytest

from workloads.intake import store as store_module
from workloads.intake.records import Batch, DeadLetter, Row
from workloads.intake.store import Appended, EventStore, MemoryStore, SqliteStore, StorageFullError, StoreError

NOW = 1_700_000_000_000


def row(number: int, item: str = "mug") -> Row:
    return (f"id-{number}", "click", NOW, None, item, None, None, None, None, None, None, None, 1)


def batch(*numbers: int, dead: int = 0) -> Batch:
    return Batch([row(number) for number in numbers], [DeadLetter("r", "$.f", b"{}")] * dead)


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    return tmp_path / "home" / "events.sqlite"


def ids(path: pathlib.Path) -> list[str]:
    with sqlite3.connect(path) as connection:
        found = [name for (name,) in connection.execute("SELECT event_id FROM events ORDER BY seq")]
    connection.close()
    return found


def test_the_settings_read_back_are_durable_ones(path: pathlib.Path):
    store = SqliteStore(path)
    assert store.settings() == {"journal_mode": "wal", "synchronous": 2}
    store.close()


def test_appended_rows_are_in_the_file_while_the_store_is_open(path: pathlib.Path):
    store = SqliteStore(path)
    assert store.append([batch(1, 2), batch(3)], NOW) == [Appended(2, 0, 0), Appended(1, 0, 0)]
    assert ids(path) == ["id-1", "id-2", "id-3"]
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
    assert ids(path) == ["id-1"]
    connection.execute("PRAGMA max_page_count=1000000")
    assert store.append([batch(2)], NOW) == [Appended(1, 0, 0)]
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
