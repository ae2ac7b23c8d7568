"""After an erasure nobody can tell from any byte of the lake that the person was there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest
from pyiceberg.avro.file import AvroFile
from pyiceberg.manifest import read_manifest_list

from workloads.lake import durable
from workloads.lake.lake import TABLE, Lake
from workloads.lake.reconciliation import reconcile
from workloads.lake.spool import MemorySpool

if TYPE_CHECKING:
    from tests.workloads.lake.conftest import Shop


def raw(path: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}


def decoded(path: Path) -> str:
    """Every value of every Parquet and Avro file below, as text: compression and dictionaries hide nothing."""
    texts = []
    for file in path.rglob("*"):
        if file.suffix == ".parquet":
            texts.append(str(pq.read_table(file, partitioning=None).to_pylist()))
            texts.append(str(pq.read_metadata(file).to_dict()))
        elif file.suffix == ".avro":
            texts.append(_avro(file))
        elif file.suffix == ".json":
            texts.append(file.read_text())
    return "\n".join(texts)


def _avro(file: Path) -> str:
    with AvroFile(durable.Input(durable.location(file))) as records:
        return "\n".join(str(record) for record in records)


@pytest.fixture
def filled(tmp_path: Path, spool: MemorySpool, shop: Shop):
    with Lake.open(tmp_path / "lake") as lake:
        for start in range(0, 60, 20):
            shop.fill(spool, range(start, start + 20), days=3, users=5)
            lake.ingest(spool)
        lake.load(shop.dataset(tmp_path / "shop-1", range(100, 130), users=5))
        yield lake


def test_no_byte_of_any_file_names_the_person(filled: Lake, shop: Shop):
    gone, stays = shop.user(2), shop.user(3)
    assert gone in decoded(filled.path)
    done = filled.erase([gone])
    assert done.events == 12 + 6
    assert gone not in decoded(filled.path)
    assert stays in decoded(filled.path)
    digits = gone.partition("-")[2].encode()
    assert not [file for file, content in raw(filled.path).items() if gone.encode() in content or digits in content]
    users = filled.events(columns=["user"]).read_all()["user"].to_pylist()
    assert len(users) == 90 - 18
    assert gone not in users


def test_only_the_files_that_held_the_person_are_rewritten(filled: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(900, day=20, user=77))
    spool.add(**shop.event(901, day=21, user=78))
    filled.ingest(spool)
    before = {file.path: file.path.stat().st_mtime_ns for file in filled.files()}
    done = filled.erase([shop.user(77)])
    after = {file.path: file.path.stat().st_mtime_ns for file in filled.files()}
    assert (done.events, done.files_rewritten) == (1, 0)
    assert len(set(before) - set(after)) == 1
    assert set(after.items()) <= set(before.items())


def test_no_older_snapshot_and_no_unnamed_file_is_left(filled: Lake, shop: Shop):
    orphan = filled.files()[0].path.with_name("orphan.parquet")
    orphan.write_bytes(shop.user(2).encode())
    draft = filled.path / "events" / "data" / f"half{durable.PART}"
    draft.write_bytes(shop.user(2).encode())
    filled.erase([shop.user(2)])
    table = filled.catalog.load_table(TABLE)
    assert len(table.metadata.snapshots) == 1
    assert not orphan.exists()
    assert not draft.exists()
    manifests = list(read_manifest_list(table.io.new_input(table.current_snapshot().manifest_list)))
    named = {file.path for file in filled.files()} | {durable.path_of(one.manifest_path) for one in manifests}
    named |= {durable.path_of(table.metadata_location), durable.path_of(table.current_snapshot().manifest_list)}
    assert {file for file in (filled.path / "events").rglob("*") if file.is_file()} == named


def test_an_erasure_sweeps_even_when_nobody_is_found(filled: Lake, shop: Shop):
    orphan = filled.files()[0].path.with_name("orphan.parquet")
    orphan.write_bytes(b"from an ingest that was killed")
    assert filled.erase([shop.user(4242)]).events == 0
    assert not orphan.exists()


def test_a_session_and_a_name_within_a_context_are_the_person_too(filled: Lake, spool: MemorySpool, shop: Shop):
    spool.add(**shop.event(800, user=None, session=shop.session(9)))
    spool.add(**shop.event(801, user=8, context=f'{{"friend":"{shop.user(9)}"}}'))
    spool.add(**shop.event(802, user=8, context='{"page":"home"}'))
    filled.ingest(spool)
    assert filled.erase([shop.user(9), shop.session(9)]).events == 2
    assert shop.user(9) not in decoded(filled.path)
    assert filled.events(columns=["user"]).read_all()["user"].to_pylist().count(shop.user(8)) == 1


def test_pyiceberg_reads_the_rest_and_the_spool_agrees_once_it_has_erased_too(
    filled: Lake, spool: MemorySpool, shop: Shop
):
    filled.erase([shop.user(1), shop.user(2)])
    assert filled.catalog.load_table(TABLE).scan().to_arrow().num_rows == 90 - 36
    found = reconcile(filled, spool)
    assert not found.agrees
    assert sum(day.missing for day in found.days) == 24
    spool.rows = {seq: row for seq, row in spool.rows.items() if row["user"] not in (shop.user(1), shop.user(2))}
    assert reconcile(filled, spool).agrees
    assert filled.ingest(spool).events == 0


def test_everybody_may_be_erased(filled: Lake, spool: MemorySpool, shop: Shop):
    filled.erase([shop.user(number) for number in range(5)])
    assert filled.events().read_all().num_rows == 0
    assert not list(filled.path.rglob("day=*/*/*/*.parquet"))
    spool.add(**shop.event(990))
    assert filled.ingest(spool).events == 1


def test_metadata_holds_no_bound_of_a_personal_column(filled: Lake):
    for file in filled.files():
        for name in ("user", "session", "query", "context", "request_id"):
            number = filled.catalog.load_table(TABLE).schema().find_field(name).field_id
            assert number not in (file.entry.lower_bounds or {})
            assert number not in (file.entry.upper_bounds or {})
