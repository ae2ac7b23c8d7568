"""Group commit: nobody is answered before the disk, many share one write, and a fault loses nothing."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence

import pytest

from workloads.intake.records import Batch
from workloads.intake.store import Appended, MemoryStore, StorageFullError, StoreError
from workloads.intake.writer import BusyError, StoppingError, Writer


def batch(*numbers: int) -> Batch:
    return Batch([(f"id-{number}",) for number in numbers], [])


class GatedStore(MemoryStore):
    """A store whose disk works only while `gate` is open; `entered` says that a commit waits at it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.entered = threading.Event()

    def append(self, batches: Sequence[Batch], received_ms: int) -> list[Appended]:
        self.entered.set()
        assert self.gate.wait(20)
        return super().append(batches, received_ms)


@pytest.fixture
async def store() -> GatedStore:
    return GatedStore()


@pytest.fixture
async def writer(store: GatedStore) -> AsyncIterator[Writer]:
    made = Writer(lambda: store, pending_events_max=10, group_events=4)
    await made.start()
    yield made
    store.gate.set()
    await made.stop()


async def reached(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 20)


async def test_nobody_is_answered_before_the_rows_are_on_disk(store: GatedStore, writer: Writer):
    answer = asyncio.create_task(writer.append(batch(1)))
    answer.add_done_callback(lambda _: store.steps.append("answered"))
    await reached(store.entered)
    assert not answer.done()
    store.gate.set()
    assert await answer == Appended(1, 0, 0)
    assert store.steps[:2] == ["on disk", "answered"]


async def test_a_caller_that_goes_away_costs_nobody_else_an_answer(store: GatedStore, writer: Writer):
    first = asyncio.create_task(writer.append(batch(0)))
    await reached(store.entered)
    gone, waits = (asyncio.create_task(writer.append(batch(number))) for number in (1, 2))
    await asyncio.sleep(0)
    gone.cancel()
    store.gate.set()
    assert await asyncio.wait_for(asyncio.gather(first, waits), 20) == [Appended(1, 0, 0)] * 2
    assert len(store.events) == 3  # it was not acknowledged, and may be on disk


async def test_requests_that_wait_together_share_one_write(store: GatedStore, writer: Writer):
    first = asyncio.create_task(writer.append(batch(0)))
    await reached(store.entered)
    rest = [asyncio.create_task(writer.append(batch(number))) for number in range(1, 7)]
    await asyncio.sleep(0)
    assert writer.queued_events == 6
    store.gate.set()
    await asyncio.gather(first, *rest)
    assert store.groups == [1, 4, 2]  # a group closes at four events


async def test_a_full_queue_turns_callers_away_and_keeps_what_it_took(store: GatedStore, writer: Writer):
    taken = [asyncio.create_task(writer.append(batch(0)))]
    await reached(store.entered)
    taken += [asyncio.create_task(writer.append(batch(*range(start, start + 5)))) for start in (1, 6)]
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match="10 events wait"):
        await writer.append(batch(99))
    store.gate.set()
    await asyncio.gather(*taken)
    assert len(store.events) == 11
    assert await writer.append(batch(99)) == Appended(1, 0, 0)


async def test_a_full_queue_takes_callers_again_once_half_of_it_is_written(store: GatedStore):
    writer = Writer(lambda: store, pending_events_max=8, group_events=1)
    await writer.start()
    taken = [asyncio.create_task(writer.append(batch(0)))]
    await reached(store.entered)
    taken += [asyncio.create_task(writer.append(batch(number))) for number in range(1, 9)]
    await asyncio.sleep(0)
    with pytest.raises(BusyError, match="wait for the disk") as told:
        await writer.append(batch(99))
    assert told.value.retry_after_s >= 1
    assert "queue" in writer.pressure()
    store.gate.set()
    await asyncio.gather(*taken)
    assert writer.pressure() == {}
    assert (await writer.append(batch(200))).accepted == 1
    await writer.stop()


async def test_events_are_acknowledged_between_the_steps_of_an_erasure(store: GatedStore, writer: Writer):
    store.gate.set()
    for number in range(6):
        await writer.append(Batch([(f"id-{number}", "p1")], []))
    erasure = asyncio.create_task(writer.erase(frozenset({"p1"})))
    while not erasure.done():
        await writer.append(batch(100 + len(store.groups)))
    assert (await erasure).events == 6
    between = "".join(step[0] for step in store.steps)
    assert "eo" in between  # an event went to disk while the erasure was under way


async def test_a_fault_of_an_erasure_is_told_to_who_asked_and_the_next_one_goes_on(store: GatedStore, writer: Writer):
    store.gate.set()
    store.fail_with = StoreError("gone")
    with pytest.raises(StoreError, match="gone"):
        await writer.erase(frozenset({"p1"}))
    store.fail_with = None
    assert (await writer.erase(frozenset({"p1"}))).events == 0
    assert (await writer.trim(5, 0)).events == 0


async def test_a_batch_larger_than_the_queue_is_taken_when_nothing_waits(store: GatedStore, writer: Writer):
    store.gate.set()
    assert await writer.append(batch(*range(50))) == Appended(50, 0, 0)


async def test_a_fault_is_told_to_every_caller_of_the_group_and_readiness_falls(store: GatedStore, writer: Writer):
    store.fail_with = StorageFullError("full")
    store.gate.set()
    answers = await asyncio.gather(*(writer.append(batch(n)) for n in range(3)), return_exceptions=True)
    assert all(isinstance(answer, StorageFullError) for answer in answers)
    assert writer.fault == "full"
    assert store.events == {}


async def test_a_store_that_is_back_is_noticed_by_the_next_write(store: GatedStore, writer: Writer):
    store.gate.set()
    store.fail_with = StoreError("gone")
    with pytest.raises(StoreError):
        await writer.append(batch(1))
    store.fail_with = None
    assert await writer.append(batch(1)) == Appended(1, 0, 0)
    assert writer.fault is None


async def test_a_store_that_is_back_is_noticed_without_any_traffic(
    store: GatedStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workloads.intake.writer.RETRY_S", 0.01)
    store.gate.set()
    store.fail_with = StoreError("gone")
    with pytest.raises(StoreError):
        await writer.append(batch(1))
    store.fail_with = None
    for _ in range(1000):
        if writer.fault is None:
            break
        await asyncio.sleep(0.01)
    assert writer.fault is None


async def test_a_bug_in_the_store_is_told_as_a_fault_and_the_writer_lives_on(store: GatedStore, writer: Writer):
    store.gate.set()
    with pytest.raises(StoreError, match="IndexError"):
        await writer.append(Batch([()], []))
    assert await writer.append(batch(1)) == Appended(1, 0, 0)


async def test_housekeeping_happens_when_nobody_waits(store: GatedStore, writer: Writer):
    store.gate.set()
    await writer.append(batch(1))
    for _ in range(1000):
        if store.steps[-1] == "tidied":
            break
        await asyncio.sleep(0.01)
    assert store.steps[-1] == "tidied"


async def test_housekeeping_that_is_overdue_does_not_wait_for_a_pause(store: GatedStore, writer: Writer):
    first = asyncio.create_task(writer.append(batch(0)))
    await reached(store.entered)
    rest = [asyncio.create_task(writer.append(batch(*range(start, start + 4)))) for start in (1, 5)]
    await asyncio.sleep(0)
    store.overdue = True
    store.gate.set()
    await asyncio.gather(first, *rest)
    assert store.steps[:3] == ["on disk", "tidied", "on disk"]


async def test_a_strange_fault_while_nobody_writes_does_not_end_the_writer(
    store: GatedStore, writer: Writer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workloads.intake.writer.RETRY_S", 0.01)
    probed = threading.Event()

    def probe() -> float:
        probed.set()
        raise OSError("too many open files")

    monkeypatch.setattr(store, "probe", probe)
    store.gate.set()
    store.fail_with = StoreError("gone")
    with pytest.raises(StoreError):
        await writer.append(batch(1))
    await reached(probed)
    store.fail_with = None
    assert await asyncio.wait_for(writer.append(batch(1)), 20) == Appended(1, 0, 0)


async def test_a_stop_writes_what_waits_and_closes_the_store(store: GatedStore):
    writer = Writer(lambda: store)
    await writer.start()
    answers = [asyncio.create_task(writer.append(batch(number))) for number in range(3)]
    await reached(store.entered)
    stopped = asyncio.create_task(writer.stop())
    await asyncio.sleep(0)
    with pytest.raises(StoppingError):
        await writer.append(batch(9))
    store.gate.set()
    assert await asyncio.gather(*answers) == [Appended(1, 0, 0)] * 3
    await stopped
    assert store.steps[-1] == "closed"


async def test_a_store_that_cannot_be_opened_fails_the_start():
    def refuse() -> MemoryStore:
        raise StoreError("no such disk")

    writer = Writer(refuse)
    with pytest.raises(StoreError, match="no such disk"):
        await writer.start()
    assert writer.fault is not None
    await writer.stop()
