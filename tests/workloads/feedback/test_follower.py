"""From the spool into the profiles: in order, each event once, from wherever a kill, a trim or a new store left off."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from workloads.contract.events import EventType
from workloads.data.definitions import Touch
from workloads.data.profiles import MemoryProfiles, Watermark
from workloads.feedback import follower as module
from workloads.feedback.archive import MemoryArchive
from workloads.feedback.follower import Follower, Position
from workloads.feedback.gauges import Gauges
from workloads.feedback.keeper import FakeTrimmer, HttpTrimmer, Keeper, TrimError
from workloads.feedback.lake_archive import LakeArchive
from workloads.feedback.service import Loops
from workloads.feedback.spool import MemorySpool, Row, SqliteSpool
from workloads.intake.records import Batch
from workloads.intake.store import COLUMNS, SqliteStore
from workloads.lake import durable
from workloads.telemetry.metrics import new_registry, render

AT = 1_767_600_000_000
ADA = "p1-" + "a" * 32


def a_row(seq: int, kind: str = "view", item: str | None = None, user: str | None = ADA, *, age_ms: int = 0) -> Row:
    return Row(seq, kind, AT + seq - age_ms, user, item or f"sku-{seq}", None, AT + seq)


class Place:
    """A follower over fakes, and the clock."""

    def __init__(self, rows: list[Row], *, archive: MemoryArchive | None = None) -> None:
        self.now = AT + 100
        self.spool = MemorySpool(rows)
        self.store = MemoryProfiles()
        self.archive = archive
        self.registry = new_registry()
        self.position = Position()
        self.gauges = Gauges(self.registry, self.position, lambda: self.now)
        self.follower = self.again()

    def again(self) -> Follower:
        """What a new process begins with."""
        return Follower(
            self.spool,
            self.store,
            self.archive,
            meter=self.gauges,
            position=self.position,
            clock_ms=lambda: self.now,
        )

    def run(self) -> None:
        while self.follower.step():
            pass

    def items(self) -> list[str]:
        profile = self.store.get(ADA)
        return [] if profile is None else [touch.item for touch in profile.touches]

    def metric(self, name: str) -> float:
        lines = render(self.registry)[0].decode().splitlines()
        (value,) = [line.rsplit(" ", 1)[1] for line in lines if line.startswith(name + " ")]
        return float(value)


def test_events_become_touches_in_order_and_the_rest_only_moves_the_watermark():
    rows = [a_row(1), a_row(2, "impression"), a_row(3, user=None), a_row(5, "purchase", "sku-1"), a_row(6, "search")]
    place = Place(rows)
    assert place.follower.step() is False
    profile = place.store.get(ADA)
    assert profile is not None
    assert profile.touches == [Touch("sku-1", EventType.PURCHASE, 2, 1, AT + 5)]
    assert place.store.watermark() == Watermark(6, AT + 6)
    assert place.position.faults == {}
    assert (place.position.applied, place.position.last) == (6, 6)
    assert place.metric('rankbridge_feedback_events_total{outcome="applied"}') == 2
    assert place.metric('rankbridge_feedback_events_total{outcome="passed"}') == 3


def test_a_kill_after_any_batch_leaves_each_event_applied_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 3)
    place = Place([a_row(seq) for seq in range(1, 20)])
    while True:
        place.follower = place.again()  # every batch by a process of its own
        if not place.follower.step():
            break
    profile = place.store.get(ADA)
    assert profile is not None
    assert [(touch.item, touch.count) for touch in profile.touches] == [(f"sku-{n}", 1) for n in range(1, 20)]


def test_what_the_spool_no_longer_has_comes_from_the_lake(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "BATCH", 3)
    rows = [a_row(seq) for seq in range(1, 13) if seq not in {4, 8}]  # two were erased in both
    place = Place(rows, archive=MemoryArchive(rows))
    place.spool.trim(9)
    place.run()
    assert place.items() == [row.item for row in rows]
    assert place.store.watermark().seq == 12
    # a store that is filled anew begins again, from the lake on
    place.store = MemoryProfiles()
    place.follower = place.again()
    place.run()
    assert place.items() == [row.item for row in rows]


def test_a_gap_that_was_wholly_erased_is_stepped_over():
    place = Place([a_row(7)], archive=MemoryArchive())
    place.spool.trimmed = 5
    place.run()
    assert place.items() == ["sku-7"]


def test_without_a_lake_a_trimmed_spool_is_a_fault_that_says_what_to_give():
    place = Place([a_row(7)])
    place.spool.trimmed = 5
    assert place.follower.step() is False
    assert "give --lake" in place.position.faults["lake"]
    assert place.items() == []


def test_a_lake_that_is_down_leaves_no_gap():
    archive = MemoryArchive([a_row(3)])
    place = Place([a_row(7)], archive=archive)
    place.spool.trimmed = 5
    archive.fault = "no such lake"
    place.run()
    assert place.items() == []
    assert place.position.faults == {"lake": "no such lake"}
    archive.fault = None
    place.run()
    assert place.items() == ["sku-3", "sku-7"]


def test_another_spool_than_the_profiles_know_is_refused_and_nothing_is_applied_twice():
    place = Place([a_row(1)])
    place.store.apply([], Watermark(40, AT))
    place.run()
    assert place.items() == []
    assert "another spool" in place.position.faults["profiles"]
    assert "prepare the data again" in place.position.faults["profiles"]


def test_while_the_store_is_down_what_waits_grows_old_and_is_applied_when_it_is_back():
    place = Place([a_row(1)])
    place.run()
    place.store.fault = "redis at 127.0.0.1:6379: connection refused"
    place.spool.rows.append(a_row(2))
    place.now = AT + 2 + 5000
    place.run()
    assert place.position.faults == {"profiles": "redis at 127.0.0.1:6379: connection refused"}
    assert place.metric("rankbridge_feedback_staleness_seconds") == 5
    assert place.metric("rankbridge_feedback_lag_events") == 1
    place.store.fault = None
    place.run()
    assert place.items() == ["sku-1", "sku-2"]
    assert place.metric("rankbridge_feedback_staleness_seconds") == 0
    assert place.metric("rankbridge_feedback_lag_events") == 0


def test_a_spool_that_is_not_there_yet_is_waited_for():
    place = Place([])
    place.spool.fault = "events.sqlite: not there yet; the intake makes it when it starts"
    place.run()
    assert place.position.faults == {"spool": place.spool.fault}
    place.spool.fault = None
    place.run()
    assert place.position.faults == {}


def test_freshness_is_counted_from_the_event_and_from_its_receipt():
    place = Place([a_row(1, age_ms=2000)])
    place.now = AT + 1 + 250
    place.run()
    assert place.metric('rankbridge_freshness_seconds_sum{since="received"}') == pytest.approx(0.25)
    assert place.metric('rankbridge_freshness_seconds_sum{since="happened"}') == pytest.approx(2.25)


# --- the lake's side ------------------------------------------------------------------------------


def a_keeper(archive: MemoryArchive, spool: Path, trimmer: FakeTrimmer, applied: int) -> Keeper:
    return Keeper(archive, spool, trimmer, applied=lambda: applied, keep_ms=1000, clock_ms=lambda: AT)


def test_only_what_lake_and_profiles_have_leaves_the_spool_and_nothing_young(tmp_path: Path):
    spool = tmp_path / "events.sqlite"
    archive, trimmer = MemoryArchive(), FakeTrimmer()
    a_keeper(archive, spool, trimmer, 5).round()
    assert trimmer.asked == []  # there is no spool yet
    spool.touch()
    archive.taken = 9
    a_keeper(archive, spool, trimmer, 5).round()
    a_keeper(archive, spool, trimmer, 20).round()
    assert trimmer.asked == [(5, AT - 1000), (9, AT - 1000)]


def test_a_lake_that_cannot_take_keeps_everything_in_the_spool(tmp_path: Path):
    spool = tmp_path / "events.sqlite"
    spool.touch()
    archive, trimmer = MemoryArchive(), FakeTrimmer()
    archive.fault = "no space left on device"
    keeper = a_keeper(archive, spool, trimmer, 5)
    keeper.round()
    assert (trimmer.asked, keeper.fault) == ([], "no space left on device")
    archive.fault = None
    keeper.round()
    assert (len(trimmer.asked), keeper.fault) == (1, None)


def test_an_intake_that_is_down_is_a_fault_of_the_round_and_no_more():
    with pytest.raises(TrimError, match="cannot be asked"):
        HttpTrimmer("http://127.0.0.1:9").trim(1, 1)
    for wrong in ("127.0.0.1:8082", "https://127.0.0.1:8082", "http://127.0.0.1:8082/path"):
        with pytest.raises(ValueError, match="no address of an intake"):
            HttpTrimmer(wrong)


# --- over real files ------------------------------------------------------------------------------


def acknowledge(path: Path, numbers: range) -> None:
    """What an intake does, and goes."""
    store = SqliteStore(path)
    row = {"type": "view", "user": ADA, "schema_version": 2}
    rows = [
        tuple(
            {
                **row,
                "event_id": f"{AT + n >> 16:08x}-{AT + n & 0xFFFF:04x}-7{n:03x}-8000-{n:012x}",
                "timestamp_ms": AT + n,
                "item": f"sku-{n}",
            }.get(name)
            for name in COLUMNS
        )
        for n in numbers
    ]
    store.append([Batch(rows, [])], AT + numbers[-1])
    store.close()


def test_a_spool_that_another_was_put_in_the_place_of_is_not_followed_any_more(tmp_path: Path):
    path, other = tmp_path / "events.sqlite", tmp_path / "copy.sqlite"
    acknowledge(path, range(1, 3))
    acknowledge(other, range(11, 16))
    spool = SqliteSpool(path)
    assert spool.bounds().last == 2
    other.replace(path)
    assert spool.bounds().last == 5
    assert [row.item for row in spool.after(2, 10)] == ["sku-13", "sku-14", "sku-15"]
    spool.close()


def test_a_lake_that_is_being_loaded_makes_no_profile_wait(tmp_path: Path):
    spool, lake = tmp_path / "events.sqlite", tmp_path / "lake"
    acknowledge(spool, range(1, 3))
    LakeArchive(lake).take(spool)
    place = Place([])
    place.spool = SqliteSpool(spool)  # type: ignore[assignment]  # the real one
    place.follower = place.again()
    keeper = Keeper(
        LakeArchive(lake, wait_s=0.3),
        spool,
        FakeTrimmer(),
        applied=lambda: place.position.applied,
        keep_ms=0,
        clock_ms=lambda: AT,
    )
    loops = Loops(place.follower, keeper, lake_every_s=0.05)
    with durable.locked(lake / "writer.lock", 1.0):
        loops.start()
        eventually(lambda: place.position.applied == 2)
        acknowledge(spool, range(3, 6))
        eventually(lambda: place.position.applied == 5)
        eventually(lambda: keeper.fault is not None)
        assert place.position.faults == {}
        assert place.items() == [f"sku-{n}" for n in range(1, 6)]
    eventually(lambda: keeper.fault is None)
    loops.stop()
    assert LakeArchive(lake).take(spool) == 5


def eventually(question: Callable[[], bool], patience_s: float = 20.0) -> None:
    until = time.monotonic() + patience_s
    while not question():
        assert time.monotonic() < until
        time.sleep(0.01)
