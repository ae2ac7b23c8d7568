"""What goes into the lake and comes out of it again."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.types import IntegerType, NestedField, StringType

from workloads.intake.records import Batch
from workloads.intake.store import COLUMNS, SqliteStore
from workloads.lake import durable
from workloads.lake import lake as lake_module
from workloads.lake.faults import LakeBusyError, LakeChangedError, LakeError
from workloads.lake.lake import TABLE, Lake
from workloads.lake.schema import SCHEMA, SchemaError
from workloads.lake.spool import MemorySpool, SpoolError, SqliteSpool

if TYPE_CHECKING:
    from tests.workloads.lake.conftest import Shop


def rows_of(lake: Lake) -> list[dict[str, object]]:
    return lake.events(ordered=True).read_all().to_pylist()


def ids_of(lake: Lake) -> list[object]:
    return lake.events(columns=["event_id"]).read_all()["event_id"].to_pylist()


def test_every_event_is_there_once_in_the_folder_of_its_day_and_type(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(30), days=2)
    done = lake.ingest(spool)
    assert (done.events, done.duplicates, done.taken, lake.taken) == (30, 0, 30, 30)
    assert sorted(ids_of(lake)) == sorted(row["event_id"] for row in spool.rows.values())
    places = {str(file.path.relative_to(lake.path / "events" / "data").parent) for file in lake.files()}
    assert places == {
        f"day=2026-03-0{day}/type={kind}/origin=intake" for day in (1, 2) for kind in ("view", "purchase")
    }
    first = rows_of(lake)[0]
    assert {name: first[name] for name in ("event_id", "user", "item", "seq", "origin", "query")} == {
        "event_id": spool.rows[1]["event_id"], "user": shop.user(0), "item": "item-0", "seq": 1, "origin": "intake",
        "query": None,
    }  # fmt: skip


def test_a_second_ingest_makes_no_file_and_no_snapshot(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(5))
    lake.ingest(spool)
    before = lake.snapshot_id, [file.path for file in lake.files()]
    assert lake.ingest(spool).events == 0
    assert (lake.snapshot_id, [file.path for file in lake.files()]) == before


def test_the_real_spool_is_read_while_its_writer_has_it_open(tmp_path: Path, lake: Lake, shop: Shop):
    store = SqliteStore(tmp_path / "events.sqlite")
    made = [shop.event(n, day=n % 3) for n in range(12)]
    store.append([Batch([tuple(event.get(name) for name in COLUMNS) for event in made], [])], 1)
    try:
        assert lake.ingest(tmp_path / "events.sqlite", chunk=5).commits == 3
        assert sorted(ids_of(lake)) == sorted(event["event_id"] for event in made)
        list(store.trim(12, 2, 2))
        store.append([Batch([tuple(shop.event(99).get(name) for name in COLUMNS)], [])], 2)
        assert lake.ingest(tmp_path / "events.sqlite").events == 1
    finally:
        store.close()
    assert SqliteSpool(tmp_path / "events.sqlite").bounds() == (13, 13)


def test_what_is_no_spool_is_refused_by_name(tmp_path: Path, lake: Lake):
    with pytest.raises(SpoolError, match=r"no such spool"):
        lake.ingest(tmp_path / "events.sqlite")
    (tmp_path / "events.sqlite").write_bytes(b"x" * 4096)
    with pytest.raises(SpoolError, match="cannot be read"):
        lake.ingest(tmp_path / "events.sqlite")


def test_a_late_event_goes_to_its_own_day(lake: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1, day=9))
    lake.ingest(spool)
    spool.add(**shop.event(2, day=0))
    lake.ingest(spool)
    assert [str(file.day) for file in lake.files()] == ["2026-03-01", "2026-03-10"]


def test_an_event_sent_again_after_a_trim_is_left_out_even_with_another_day(lake: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1))
    lake.ingest(spool)
    spool.rows.clear()
    spool.add(**shop.event(1))
    spool.add(**{**shop.event(2, day=4), "event_id": shop.event(1)["event_id"]})
    spool.add(**shop.event(3))
    spool.add(**shop.event(3))
    done = lake.ingest(spool)
    assert (done.events, done.duplicates) == (1, 3)
    assert sorted(ids_of(lake)) == sorted(shop.event(n)["event_id"] for n in (1, 3))


def test_a_number_that_was_given_twice_hides_no_event(lake: Lake, shop: Shop):
    spool = MemorySpool(keeps_numbers=False)
    for number in range(1, 5):
        spool.add(**shop.event(number))
    lake.ingest(spool)
    del spool.rows[4], spool.rows[3]  # the newest rows go: SQLite would give 3 and 4 again
    for number in (13, 14, 15):
        spool.add(**shop.event(number))
    assert lake.ingest(spool).events == 3
    assert len(ids_of(lake)) == 7


def test_a_spool_that_was_made_anew_is_read_from_its_start(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(10))
    lake.ingest(spool)
    anew = MemorySpool()
    shop.fill(anew, range(100, 112))
    assert lake.ingest(anew).events == 12
    assert len(ids_of(lake)) == 22


def test_a_spool_put_back_from_a_copy_hides_no_event_behind_a_number_that_nobody_has(lake: Lake, shop: Shop):
    spool = MemorySpool()
    shop.fill(spool, range(10))
    copy = {**spool.rows}
    shop.fill(spool, range(10, 20))
    assert lake.ingest(spool).taken == 20
    restored = MemorySpool()
    restored.rows, restored._last = copy, 10
    shop.fill(restored, range(100, 120))
    del restored.rows[20]  # erased, or left unused beside an event that was sent again
    assert lake.ingest(restored).events == 19
    assert lake.ingest(restored).events == 0
    assert len(ids_of(lake)) == 20 + 19


def test_what_a_spool_that_was_made_anew_never_had_is_not_said_to_be_taken(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(8))
    assert lake.ingest(spool).taken == 8
    anew = MemorySpool()
    assert lake.ingest(anew).taken == 0  # or a trim up to 8 would take the first events that arrive there
    shop.fill(anew, range(20, 23))
    assert lake.ingest(anew).taken == 3


def test_a_trimmed_spool_is_not_read_again(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(10))
    lake.ingest(spool)
    spool.rows.clear()
    spool.add(**shop.event(50))
    done = lake.ingest(spool)
    assert (done.events, done.duplicates, done.taken) == (1, 0, 11)


def test_a_column_that_the_spool_has_new_is_added_and_null_in_older_files(lake: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1))
    lake.ingest(spool)
    spool.types["campaign"] = StringType()
    spool.add(**shop.event(2), campaign="spring")
    lake.ingest(spool)
    assert [row["campaign"] for row in rows_of(lake)] == [None, "spring"]
    assert lake.query("SELECT count(campaign) FROM events").fetchall() == [(1,)]
    scanned = lake.catalog.load_table(TABLE).scan().to_arrow().sort_by("timestamp_ms")
    assert scanned["campaign"].to_pylist() == [None, "spring"]
    lake.compact()
    assert [row["campaign"] for row in rows_of(lake)] == [None, "spring"]


def test_a_type_that_became_wider_reads_old_and_new_files(tmp_path: Path, spool: MemorySpool, shop: Shop):
    narrow = Schema(
        *(
            NestedField(one.field_id, one.name, IntegerType(), one.required)
            if one.name in ("position", "quantity")
            else one
            for one in SCHEMA.fields
        )
    )
    Lake.catalogue_anew(_made(tmp_path / "lake"), narrow, {}, [])
    with Lake.open(tmp_path / "lake") as lake:
        assert str(lake.catalog.load_table(TABLE).schema().find_field("position").field_type) == "int"
        rows = pa.table({name: [value] for name, value in {**shop.event(1), "position": 7}.items()})
        table = lake.catalog.load_table(TABLE)
        old = lake_module.conform(lake_module.with_day(rows, "intake"), table.schema())
        files = lake._write(table, old)
        with table.transaction() as transaction:
            lake_module._append(transaction, files)
        assert pq.read_schema(lake.files()[0].path).field("position").type == pa.int32()
        spool.add(**shop.event(2), position=2**40)
        lake.ingest(spool)
        assert [row["position"] for row in rows_of(lake)] == [7, 2**40]
        assert lake.query("SELECT max(position), sum(position) FROM events").fetchall() == [(2**40, 2**40 + 7)]
        scanned = lake.catalog.load_table(TABLE).scan().to_arrow()
        assert sorted(scanned["position"].to_pylist()) == [7, 2**40]


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_a_column_that_changed_its_meaning_is_refused(lake: Lake, spool: MemorySpool, shop: Shop):
    spool.types["campaign"] = StringType()
    spool.add(**shop.event(1), campaign="spring")
    lake.ingest(spool)
    spool.types["campaign"] = IntegerType()
    spool.rows[1]["campaign"] = None
    with pytest.raises((SchemaError, KeyError), match=r"campaign|int"):
        lake.ingest(_with(spool, shop.event(2)))


def _with(spool: MemorySpool, event: dict[str, object]) -> MemorySpool:
    spool.add(**event)
    return spool


def test_pyiceberg_and_duckdb_read_the_same_rows_from_the_same_files(tmp_path: Path, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(200), days=4)
    with Lake.open(tmp_path / "lake", grace_s=0) as lake:
        for _ in range(2):
            lake.ingest(spool, chunk=60)
            shop.fill(spool, range(300, 340), days=2)
        lake.compact()
        catalog = SqlCatalog("lake", uri=f"sqlite:///{lake.path}/catalog.sqlite")  # as any other client opens it
        scanned = catalog.load_table(TABLE).scan().to_arrow()
        catalog.close()
        ours = lake.events(ordered=True).read_all()
    columns = ours.column_names
    glob = f"{tmp_path}/lake/events/data/*/*/*/*.parquet"
    alone = duckdb.read_parquet(glob, hive_partitioning=False).to_arrow_table().select(columns)
    order = [("timestamp_ms", "ascending"), ("event_id", "ascending")]
    expected = ours.to_pylist()
    assert len(expected) == 240
    assert scanned.select(columns).sort_by(order).to_pylist() == expected
    assert alone.sort_by(order).to_pylist() == expected
    hive = duckdb.read_parquet(glob, hive_partitioning=True).aggregate("day, type, count(*) AS n")
    assert sum(row[2] for row in hive.fetchall()) == 240


def test_events_are_chosen_by_origin_time_and_column(tmp_path: Path, lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(20), days=4)
    lake.ingest(spool)
    lake.load(shop.dataset(tmp_path / "shop-1", range(500, 510)))
    assert lake.events(origins=["shop-1"]).read_all().num_rows == 10
    assert lake.events(origins=["nobody"]).read_all().num_rows == 0
    chosen = lake.events(
        origins=["intake"],
        since_ms=shop.start + shop.day,
        until_ms=shop.start + 2 * shop.day,
        columns=["event_id", "item"],
    ).read_all()
    assert chosen.column_names == ["event_id", "item"]
    assert sorted(chosen["event_id"].to_pylist()) == sorted(shop.event(n, day=1)["event_id"] for n in range(1, 20, 4))
    with pytest.raises(LakeError, match="no column shoe"):
        lake.events(columns=["shoe"])


def test_an_empty_lake_answers_with_no_rows(lake: Lake):
    assert lake.snapshot_id is None
    assert lake.events().read_all().num_rows == 0
    assert lake.query("SELECT count(*) FROM events").fetchall() == [(0,)]
    assert lake.erase(["p1-" + "0" * 32]).events == 0
    assert lake.compact().after == 0


def test_a_lake_that_is_not_there_is_not_made_by_a_reader(tmp_path: Path):
    with pytest.raises(LakeError, match="no lake"):
        Lake.open(tmp_path / "lake", create=False)
    assert not (tmp_path / "lake").exists()


def test_a_data_set_that_somebody_was_erased_from_is_not_loaded_a_second_time(tmp_path: Path, lake: Lake, shop: Shop):
    made_of = '{"name": "shop", "input_digest": "ab12"}'
    first, without_one = shop.dataset(tmp_path / "shop-1", range(50)), shop.dataset(tmp_path / "shop-2", range(40))
    other = shop.dataset(tmp_path / "shop-3", range(30))
    for folder in (first, without_one):
        (folder / "dataset.json").write_text(made_of)
    (other / "dataset.json").write_text(made_of.replace("ab12", "cd34"))
    lake.load(first)
    again = lake.load(without_one)
    assert (again.origin, again.events, again.reused) == ("shop-1", 50, True)
    assert lake.load(other).origin == "shop-3"
    assert lake.origins() == {"shop-1": 50, "shop-3": 30}


def test_a_data_set_is_loaded_once_with_its_catalogue(tmp_path: Path, lake: Lake, shop: Shop):
    folder = shop.dataset(tmp_path / "shop-1", range(50))
    done = lake.load(folder)
    assert (done.origin, done.events, done.reused) == ("shop-1", 50, False)
    before = lake.snapshot_id
    assert lake.load(folder).reused
    assert lake.snapshot_id == before
    assert lake.origins() == {"shop-1": 50}
    assert (lake.origin_folder("shop-1") / "items.parquet").read_bytes() == (folder / "items.parquet").read_bytes()
    loaded = pl.from_arrow(lake.events(origins=["shop-1"], ordered=True).read_all())
    given = pl.read_parquet(folder / "events.parquet").sort("timestamp_ms")
    for name in ("event_id", "user", "item", "price", "timestamp_ms"):
        assert loaded[name].to_list() == given[name].to_list()


def test_another_data_set_of_the_same_name_is_refused(tmp_path: Path, lake: Lake, shop: Shop):
    lake.load(shop.dataset(tmp_path / "a", range(5)), origin="shop")
    with pytest.raises(LakeError, match="another data set was loaded as shop"):
        lake.load(shop.dataset(tmp_path / "b", range(6)), origin="shop")
    with pytest.raises(LakeError, match="no name of an origin"):
        lake.load(tmp_path / "a", origin="../shop")
    (tmp_path / "a" / "items.parquet").unlink()
    with pytest.raises(LakeError, match=r"has no items\.parquet"):
        lake.load(tmp_path / "a", origin="other")
    with pytest.raises(LakeError, match="was not loaded"):
        lake.origin_folder("other")


def test_the_same_event_may_be_in_two_origins(tmp_path: Path, lake: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1))
    lake.ingest(spool)
    assert lake.load(shop.dataset(tmp_path / "shop-1", range(1, 3))).events == 2


def test_a_type_that_the_contract_does_not_know_names_no_folder(lake: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1, kind="../../view"))
    with pytest.raises(SchemaError, match="unknown to the contract"):
        lake.ingest(spool)
    assert lake.taken == 0


def test_small_files_are_merged_as_they_add_up(
    monkeypatch: pytest.MonkeyPatch, lake: Lake, spool: MemorySpool, shop: Shop
):
    monkeypatch.setattr(lake_module, "MERGE_AT", 4)
    for number in range(14):
        spool.add(**shop.event(number))
        lake.ingest(spool)
    assert len(lake.files()) <= 2 * 4
    assert len(set(ids_of(lake))) == len(ids_of(lake)) == 14


def test_compaction_loses_no_reader_within_the_grace_period(tmp_path: Path, spool: MemorySpool, shop: Shop):
    with Lake.open(tmp_path / "lake", grace_s=3600) as lake:
        for number in range(5):
            spool.add(**shop.event(number))
            lake.ingest(spool)
        planned = lake.events()  # names the five files; opens them later
        table = lake.catalog.load_table(TABLE)
        assert lake.compact().after == 1
        assert planned.read_all().num_rows == 5
        assert table.scan().to_arrow().num_rows == 5
        assert len(list(tmp_path.rglob("*.parquet"))) == 6
    with Lake.open(tmp_path / "lake", grace_s=0) as lake:
        for number in range(20, 60):
            spool.add(**shop.event(number, day=number))
        lake.ingest(spool)
        stale = lake.events(columns=["event_id"], batch_rows=1)
        lake.erase([shop.user(1)])
        assert not list(tmp_path.rglob("*.parquet"))
        with pytest.raises(LakeChangedError, match="went away"):
            stale.read_all()
        assert ids_of(lake) == []


def test_files_reach_their_target_size_and_are_left_alone_then(tmp_path: Path, spool: MemorySpool, shop: Shop):
    with Lake.open(tmp_path / "lake", target_bytes=100_000) as lake:
        for number in range(240):
            noise = hashlib.shake_256(b"%d" % number).hexdigest(1000)
            spool.add(**shop.event(number, context=f'{{"noise":"{noise}"}}'))
            if number % 20 == 19:
                lake.ingest(spool)
        lake.compact()
        sizes = [file.bytes for file in lake.files()]
        assert 1 < len(sizes) < 12  # 12 files came in
        assert max(sizes) < 110_000
        assert lake.compact().bytes_rewritten == 0
        assert len(ids_of(lake)) == 240


def test_everything_that_a_commit_names_was_synced_before_it(
    monkeypatch: pytest.MonkeyPatch, lake: Lake, spool: MemorySpool, shop: Shop
):
    synced: set[str] = set()
    sync = os.fsync

    def note(descriptor: int) -> None:
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()).removesuffix(durable.PART))
        sync(descriptor)

    unsynced: list[object] = []
    commit = SqlCatalog.commit_table

    def checked(self: SqlCatalog, table: Table, requirements: object, updates: object) -> object:
        # Data files, manifests and lists are there before the metadata is; the metadata is written inside.
        unsynced.extend(
            path for path in lake.path.joinpath("events").rglob("*") if path.is_file() and str(path) not in synced
        )
        answer = commit(self, table, requirements, updates)
        if str(durable.path_of(answer.metadata_location)) not in synced:
            unsynced.append(answer.metadata_location)
        return answer

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(SqlCatalog, "commit_table", checked)
    synced |= {str(path) for path in lake.path.rglob("*")}
    shop.fill(spool, range(20), days=2)
    lake.ingest(spool)
    lake.compact()
    folders = {str(file.path.parent) for file in lake.files()}
    assert not unsynced
    assert folders <= synced


def test_a_second_writer_waits_and_says_so(tmp_path: Path, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(1))
    with Lake.open(tmp_path / "lake", wait_s=0.05) as lake, durable.locked(lake.path / "writer.lock", 1):
        with pytest.raises(LakeBusyError, match="another process has been writing"):
            lake.ingest(spool)
        assert lake.events().read_all().num_rows == 0  # readers need no lock


_WRITER = """
import sys
from pathlib import Path
from workloads.lake.lake import Lake
with Lake.open(Path(sys.argv[1])) as lake:
    for number in range(4):
        print(lake.load(Path(sys.argv[2]), origin=f"{sys.argv[3]}-{number}").events, flush=True)
"""


@pytest.mark.real_parts
def test_two_processes_write_one_lake_and_lose_nothing(tmp_path: Path, shop: Shop):
    folder = shop.dataset(tmp_path / "shop", range(40))
    started = [
        subprocess.Popen(
            [sys.executable, "-c", _WRITER, str(tmp_path / "lake"), str(folder), name], stdout=subprocess.PIPE
        )
        for name in ("a", "b")
    ]
    assert [process.communicate(timeout=120)[0].split() for process in started] == [[b"40"] * 4] * 2
    with Lake.open(tmp_path / "lake", create=False) as lake:
        assert len(lake.origins()) == 8
        assert lake.events().read_all().num_rows == 320


def test_metadata_stays_small_over_many_commits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, spool: MemorySpool, shop: Shop
):
    clock = [time.time()]
    monkeypatch.setattr(lake_module.time, "time", lambda: clock[0])
    with Lake.open(tmp_path / "lake") as lake:
        for number in range(36):
            clock[0] = time.time_ns() / 1e9 + 60 * number
            spool.add(**shop.event(number))
            lake.ingest(spool)
        assert len(lake.catalog.load_table(TABLE).metadata.snapshots) <= 20
        assert len(list((lake.path / "events" / "metadata").glob("*.metadata.json"))) <= 20
        assert len(ids_of(lake)) == 36
