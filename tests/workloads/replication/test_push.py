"""A data set into the bucket and out again: what leaves, what comes back, and what a crash at any call leaves."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import msgspec
import polars as pl
import pyarrow.parquet as pq
import pytest

from workloads.contract.storage import replica_manifest_key, replica_object_key
from workloads.data import replica
from workloads.data.dataset import Dataset, DatasetMeta, read_meta
from workloads.data.replica import ReplicaError
from workloads.objects.memory import Crash, Kind, MemoryObjects
from workloads.objects.store import Damaged, NotFound
from workloads.privacy.audit import MemoryAudit
from workloads.privacy.columns import DEFAULT, PolicyError
from workloads.replication.push import BusyError, Pushed, Settings, _alone, push
from workloads.telemetry.progress import Progress

NOW = 1_800_000_000_000


class Shop(Protocol):
    """What the fixture `shop` is."""

    home: Path
    dataset: Path
    meta: DatasetMeta


def pushed(
    shop: Shop,
    store: MemoryObjects,
    *,
    audit: MemoryAudit | None = None,
    dataset: Path | None = None,
    **settings: object,
) -> Pushed:
    return push(
        dataset or shop.dataset,
        shop.home,
        store,
        "bucket",
        Progress(io.StringIO()),
        audit=audit or MemoryAudit(),
        settings=Settings(**settings),  # type: ignore[arg-type]  # what a test gives
    )


def test_what_the_policy_leaves_alone_comes_back_as_the_same_data_set(
    shop: Shop, open_policy: Path, tmp_path: Path, quiet: Progress
):
    """The same content digest: a training on it is the training on the original."""
    store = MemoryObjects()
    pushed(shop, store, policy=open_policy)
    got = Dataset.load(replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet))
    original = Dataset.load(shop.dataset)
    assert got.path.name == shop.dataset.name
    assert got.meta.digest == original.meta.digest
    assert got.events.equals(original.events)
    assert got.items.equals(original.items)
    assert (got.splits.counts, got.splits.statements) == (original.splits.counts, original.splits.statements)
    assert got.meta.replica is not None
    assert (got.meta.replica.dataset, got.meta.replica.policy) == (shop.dataset.name, "open.toml")
    assert original.meta.replica is None


def test_the_default_policy_leaves_a_data_set_that_trains(shop: Shop, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    manifest = pushed(shop, store).manifest
    got = Dataset.load(replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet))
    assert got.meta.digest != shop.meta.digest
    assert set(got.events["timestamp_ms"] % 60_000) == {0}
    assert got.events.height == manifest.tables["events"].rows
    assert (
        manifest.tables["events"].rows + manifest.tables["events"].kept_home == Dataset.load(shop.dataset).events.height
    )
    assert not got.part("train").frame.is_empty()
    assert "path" not in str(store.get(replica_manifest_key(shop.dataset.name)).data)


def test_rounded_times_bring_nothing_of_the_future_into_training(shop: Shop, tmp_path: Path, quiet: Progress):
    """With an hour's step many events share a step with a boundary; none of them gets into an earlier part."""
    policy = tmp_path / "hours.toml"
    text = DEFAULT.read_text(encoding="utf-8").replace("to_ms = 60_000", "to_ms = 3_600_000")
    policy.write_text(text, encoding="utf-8")
    store = MemoryObjects()
    pushed(shop, store, policy=policy)
    got = Dataset.load(replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet))
    original = Dataset.load(shop.dataset)
    for name in ("train", "validation"):
        assert len(got.part(name)) <= len(original.part(name))
        last = original.part(name).frame["timestamp_ms"].max()
        assert got.part(name).frame["timestamp_ms"].max() <= last
    assert sum(len(got.part(name)) for name in ("train", "validation", "test")) == got.events.height


def test_parts_are_bounded_and_the_same_bytes_for_the_same_input(
    shop: Shop, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, quiet: Progress
):
    monkeypatch.setattr(replica, "ROWS_PER_GROUP", 500)
    first, second = MemoryObjects(), MemoryObjects()
    sizes = [part.bytes for part in pushed(shop, first, part_bytes=30_000).manifest.tables["events"].parts]
    pushed(shop, second, part_bytes=30_000)
    assert len(sizes) > 3
    assert all(30_000 <= size < 60_000 for size in sizes[:-1])
    assert first.keys() == second.keys()
    assert all(first.get(key).data == second.get(key).data for key in list(first.keys()) if "manifest" not in key)
    got = Dataset.load(replica.fetch(first, shop.dataset.name, tmp_path / "in", quiet))
    assert got.events["timestamp_ms"].is_sorted()


def test_what_is_there_is_not_sent_again_and_not_told_again(shop: Shop):
    store, audit = MemoryObjects(), MemoryAudit()
    before = pushed(shop, store, audit=audit).manifest
    store.revive()
    again = pushed(shop, store, audit=audit)
    assert again.manifest == before
    assert again.sums.sent == 0
    assert not {"put_new", "put_part", "get_range"} & {name for name, _ in store.calls}
    (entry,) = audit.entries
    assert (entry.action, entry.subject) == ("replica.export", shop.dataset.name)
    assert entry.detail["events_rows"] == before.tables["events"].rows
    assert before.audit_head == entry.head
    assert not list((shop.home / "onprem" / "replication").glob("*-*/"))


def test_another_policy_for_the_same_data_set_is_a_fault_until_the_first_is_removed(
    shop: Shop, open_policy: Path, tmp_path: Path, quiet: Progress
):
    store = MemoryObjects()
    pushed(shop, store)
    with pytest.raises(ReplicaError, match="remove it first"):
        pushed(shop, store, policy=open_policy)
    assert replica.remove(store, shop.dataset.name, now_ms=NOW) == 2
    assert store.keys() == []
    pushed(shop, store, policy=open_policy)
    assert replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet).name == shop.dataset.name


@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER, Kind.ERROR, Kind.RESET])
def test_a_push_that_dies_at_any_call_leaves_no_manifest_or_a_whole_replica(
    shop: Shop, kind: Kind, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica, "ROWS_PER_GROUP", 2000)
    settings = {"part_bytes": 100_000, "chunk": 40_000}
    reference = MemoryObjects()
    pushed(shop, reference, **settings)
    wanted = set(reference.keys())
    died = 0
    for at in range(1, 300):
        store, audit = MemoryObjects({at: kind}), MemoryAudit()
        try:
            pushed(shop, store, audit=audit, **settings)
        except (Crash, Exception) as error:
            if not isinstance(error, Crash) and "500" not in str(error) and "reset" not in str(error):
                raise
            died += 1
            if replica_manifest_key(shop.dataset.name) in set(store.keys()):
                assert set(store.keys()) == wanted
            store.revive()
            again = pushed(shop, store, audit=audit, **settings)
            assert set(store.keys()) == wanted
            assert len(audit.entries) == 1
            assert again.manifest.audit_head == audit.entries[0].head
        if at > len(store.calls):
            break
    assert died > 10


def test_two_pushes_of_one_data_set_do_not_run_at_once(shop: Shop):
    with _alone(shop.home / "onprem" / "replication", shop.dataset.name), pytest.raises(BusyError, match="wait for it"):
        pushed(shop, MemoryObjects())


# --- what may not leave ---------------------------------------------------------------------------


def test_a_column_that_nobody_decided_about_stops_the_export(
    shop: Shop, rewritten: Callable[[Path, Path, pl.DataFrame], Path], tmp_path: Path
):
    frame = Dataset.load(shop.dataset).events.with_columns(pl.lit("12 Elm Street").alias("address"))
    store = MemoryObjects()
    with pytest.raises(PolicyError, match="'address'"):
        pushed(shop, store, dataset=rewritten(shop.dataset, tmp_path, frame))
    assert store.keys() == []


@pytest.mark.parametrize("column", ["user", "session"])
def test_a_raw_id_does_not_leave_even_where_the_policy_lets_it(
    shop: Shop, open_policy: Path, rewritten: Callable[[Path, Path, pl.DataFrame], Path], tmp_path: Path, column: str
):
    frame = Dataset.load(shop.dataset).events.with_columns(
        pl.when(pl.int_range(pl.len()) == 5000).then(pl.lit("ann@example.org")).otherwise(column).alias(column)
    )
    store = MemoryObjects()
    with pytest.raises(ReplicaError, match=f"1 rows would leave with a {column} that is no pseudonym") as caught:
        pushed(shop, store, policy=open_policy, dataset=rewritten(shop.dataset, tmp_path, frame))
    assert "ann@" not in str(caught.value)
    assert store.keys() == []


def test_columns_that_stay_at_home_are_null_in_the_cloud_and_ids_are_made_up(
    shop: Shop, tmp_path: Path, quiet: Progress
):
    policy = tmp_path / "strict.toml"
    lines = DEFAULT.read_text(encoding="utf-8").splitlines()
    stay = ("event_id", "session", "query", "rating", "price", "description")
    lines = [f'{line.split(" = ")[0]} = {{ do = "never" }}' if line.startswith(stay) else line for line in lines]
    policy.write_text("\n".join(lines), encoding="utf-8")
    store = MemoryObjects()
    manifest = pushed(shop, store, policy=policy).manifest
    got = Dataset.load(replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet))
    assert not set(stay) & set(manifest.tables["events"].columns)
    assert got.meta.events["search"] == got.meta.events["rating"] == 0
    assert got.events["session"].null_count() == got.events.height
    assert got.events["event_id"].n_unique() == got.events.height
    assert set(got.items["description"]) == {""}


def test_a_policy_that_keeps_times_at_home_is_refused(shop: Shop, tmp_path: Path):
    policy = tmp_path / "timeless.toml"
    lines = DEFAULT.read_text(encoding="utf-8").splitlines()
    lines = ['timestamp_ms = { do = "never" }' if line.startswith("timestamp_ms") else line for line in lines]
    policy.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(ReplicaError, match="timestamp_ms"):
        pushed(shop, MemoryObjects(), policy=policy)


def test_no_metadata_of_arrow_travels_with_the_parts(shop: Shop):
    """Arrow's schema, as Parquet keeps it, would hold what the policy has not looked at."""
    store = MemoryObjects()
    manifest = pushed(shop, store).manifest
    for part in manifest.parts:
        file = pq.ParquetFile(io.BytesIO(store.get(replica_object_key(part.sha256)).data))
        assert file.metadata.metadata is None


# --- fetching -------------------------------------------------------------------------------------


def test_a_fetch_that_dies_anywhere_is_completed_by_the_next(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(replica, "ROWS_PER_GROUP", 2000)
    monkeypatch.setattr(replica, "FETCH_RANGE", 50_000)
    store = MemoryObjects()
    pushed(shop, store, part_bytes=100_000)
    died = 0
    for at in range(1, 100):
        store.revive({at: Kind.CRASH_BEFORE})
        into = tmp_path / f"in-{at}"
        try:
            made = replica.fetch(store, shop.dataset.name, into, Progress(io.StringIO()))
        except Crash:
            died += 1
            assert not [each for each in into.glob("*") if not each.name.startswith(".")]
            got = sum(file.stat().st_size for file in into.rglob("*.parquet"))
            store.revive()
            made = replica.fetch(store, shop.dataset.name, into, Progress(io.StringIO()))
            fetched = sum(name == "get_range" for name, _ in store.calls)
            assert fetched <= 20
            assert not got or fetched < 11
        if at > len(store.calls) and at > 3:
            break
        assert read_meta(made).replica is not None
        assert [each.name for each in into.iterdir()] == [made.name]
        if died > 6:
            break
    assert died > 5


def test_bytes_that_were_altered_on_the_way_are_fetched_again_and_in_the_bucket_refused(
    shop: Shop, tmp_path: Path, quiet: Progress
):
    store = MemoryObjects()
    manifest = pushed(shop, store).manifest
    store.revive({2: Kind.ALTER})
    assert replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet).is_dir()
    key = replica_object_key(manifest.parts[0].sha256)
    data = store.get(key).data
    store.plant(key, data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(Damaged) as caught:
        replica.fetch(store, shop.dataset.name, tmp_path / "other", quiet)
    assert key in caught.value.fault
    assert not [each for each in (tmp_path / "other").iterdir() if not each.name.startswith(".")]


def test_what_was_fetched_is_used_again_unless_it_was_damaged(shop: Shop, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    pushed(shop, store)
    made = replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet)
    store.revive()
    assert replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet) == made
    assert [name for name, _ in store.calls] == ["get"]
    with (made / "events.parquet").open("r+b") as file:
        file.write(b"xxxx")
    assert replica.fetch(store, shop.dataset.name, tmp_path / "in", quiet) == made
    assert Dataset.load(made).events.height


@pytest.mark.parametrize("name", ["../secret", "a/b", "", ".hidden", "x" * 200, "shop\n"])
def test_a_name_that_leads_elsewhere_is_refused(name: str, tmp_path: Path, quiet: Progress):
    with pytest.raises(ReplicaError, match="no data set's name"):
        replica.fetch(MemoryObjects(), name, tmp_path, quiet)


def test_a_manifest_that_names_another_data_set_is_refused(shop: Shop, tmp_path: Path, quiet: Progress):
    store = MemoryObjects()
    pushed(shop, store)
    data = store.get(replica_manifest_key(shop.dataset.name)).data
    store.plant(replica_manifest_key("other-0123456789ab"), data)
    with pytest.raises(ReplicaError, match="is one of shop"):
        replica.fetch(store, "other-0123456789ab", tmp_path, quiet)
    store.plant(replica_manifest_key("torn"), data[: len(data) // 2])
    with pytest.raises(ReplicaError, match="cannot be read"):
        replica.fetch(store, "torn", tmp_path, quiet)
    with pytest.raises(ReplicaError, match="push it"):
        replica.fetch(store, "none", tmp_path, quiet)


# --- removing -------------------------------------------------------------------------------------


def test_a_part_that_two_replicas_share_goes_with_the_second(shop: Shop, made_again: Path):
    store = MemoryObjects()
    first, second = pushed(shop, store).manifest, pushed(shop, store, dataset=made_again).manifest
    shared = {part.sha256 for part in first.parts} & {part.sha256 for part in second.parts}
    assert len(shared) == 1
    assert replica.replicas(store) == sorted([first.dataset, second.dataset])
    replica.remove(store, first.dataset, now_ms=NOW)
    assert {replica_object_key(part.sha256) for part in second.parts} <= set(store.keys())
    replica.remove(store, second.dataset, now_ms=NOW)
    assert store.keys() == []


def test_a_killed_removal_is_completed_by_the_next(shop: Shop):
    for at in range(1, 30):
        store = MemoryObjects()
        pushed(shop, store)
        store.revive({at: Kind.CRASH_AFTER})
        try:
            replica.remove(store, shop.dataset.name, now_ms=NOW)
        except Crash:
            store.revive()
            replica.remove(store, shop.dataset.name, now_ms=NOW)
            assert store.keys() == []
        else:
            break
    assert at > 4


def test_what_nobody_claims_goes_after_a_day_and_not_before():
    """It may belong to a push that is not over."""
    now = [NOW]
    store = MemoryObjects(clock_ms=lambda: now[0])
    store.put_new(replica_object_key("0" * 64), b"of a push that has no manifest yet")
    replica.remove(store, "nothing", now_ms=NOW + 1000)
    assert len(store.keys()) == 1
    assert replica.remove(store, "nothing", now_ms=NOW + 25 * 3600 * 1000) == 1
    with pytest.raises(NotFound):
        store.head(replica_object_key("0" * 64))


@pytest.fixture
def made_again(shop: Shop, rewritten: Callable[[Path, Path, pl.DataFrame], Path], tmp_path: Path) -> Path:
    """The same catalogue, other events, another name."""
    copy = rewritten(shop.dataset, tmp_path / "again", Dataset.load(shop.dataset).events.head(9_000))
    meta = msgspec.structs.replace(read_meta(copy), digest="f" * 64)
    (copy / "dataset.json").write_bytes(msgspec.json.encode(meta))
    return copy.rename(copy.with_name("shop-ffffffffffff"))
