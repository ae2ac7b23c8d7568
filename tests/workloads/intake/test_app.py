"""The intake's answers, spoken to in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from workloads.contract.http import PATH_ERASE, PATH_INTAKE, PATH_TRIM, ErasureAnswer, ErasureRequest, EventsAnswer
from workloads.intake.app import INTAKE_BODY_MAX_BYTES, create_app
from workloads.intake.store import MemoryStore, StorageFullError, StoreError
from workloads.intake.writer import Writer
from workloads.telemetry.metrics import StageMetrics

PSEUDONYM = "p1-" + "0f" * 16
JSON = {"content-type": "application/json"}


def event(number: int = 0, **changes: object) -> dict[str, Any]:
    return {
        "event_id": f"0190a5b4-7c00-7000-8000-{number:012x}",
        "type": "view",
        "timestamp_ms": 1_700_000_000_000,
        "user": PSEUDONYM,
        "item": "mug",
        **changes,
    }


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
async def client(store: MemoryStore) -> AsyncIterator[httpx.AsyncClient]:
    writer = Writer(lambda: store, pending_events_max=100)
    await writer.start()
    app = create_app(writer, StageMetrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://intake") as client:  # type: ignore[arg-type]  # ours is narrower than the ASGI union
        yield client
    await writer.stop()


async def test_events_are_acknowledged_with_their_numbers(client: httpx.AsyncClient, store: MemoryStore):
    answer = await client.post(PATH_INTAKE, json={"events": [event(1), event(2), event(2)]})
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    assert msgspec.json.decode(answer.content, type=EventsAnswer) == EventsAnswer(accepted=2, duplicates=1)
    assert len(store.events) == 2


async def test_messagepack_is_answered_in_kind(client: httpx.AsyncClient):
    body = msgspec.msgpack.encode({"events": [event(1)]})
    answer = await client.post(PATH_INTAKE, content=body, headers={"content-type": "application/msgpack; v=1"})
    assert answer.headers["content-type"] == "application/msgpack"
    assert msgspec.msgpack.decode(answer.content, type=EventsAnswer) == EventsAnswer(accepted=1, duplicates=0)


async def test_a_batch_sent_again_is_all_duplicates(client: httpx.AsyncClient):
    await client.post(PATH_INTAKE, json={"events": [event(1), event(2)]})
    answer = await client.post(PATH_INTAKE, json={"events": [event(1), event(2)]})
    assert answer.json() == {"accepted": 0, "duplicates": 2, "rejected": 0}


async def test_sound_events_are_kept_when_a_neighbour_is_rejected(client: httpx.AsyncClient):
    answer = await client.post(PATH_INTAKE, json={"events": [event(1), event(2, item=None)]})
    assert (answer.status_code, answer.json()) == (200, {"accepted": 1, "duplicates": 0, "rejected": 1})


@pytest.mark.parametrize(
    ("events", "field"),
    [
        ([event(timestamp_ms=1)], "$.events[0].timestamp_ms"),
        ([event(user="17850")], "$.events[0].user"),
        ([event(type="rating")], "$.events[0]"),
    ],
)
async def test_a_request_without_one_sound_event_is_a_problem_with_field_and_rule(
    client: httpx.AsyncClient, events: list[object], field: str
):
    answer = await client.post(PATH_INTAKE, json={"events": events})
    assert (answer.status_code, answer.headers["content-type"]) == (422, "application/problem+json")
    assert answer.json()["field"] == field
    assert answer.json()["rule"]


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"", JSON, 400),
        (b"\xc1", {"content-type": "application/msgpack"}, 400),
        (b"[]", JSON, 422),
        (b'{"events":[]}', JSON, 422),
        (b"a=1", {"content-type": "application/x-www-form-urlencoded"}, 415),
        (b"x" * (INTAKE_BODY_MAX_BYTES + 1), JSON, 413),
    ],
)
async def test_bad_bodies_are_problems(
    client: httpx.AsyncClient, store: MemoryStore, body: bytes, headers: dict[str, str], status: int
):
    answer = await client.post(PATH_INTAKE, content=body, headers=headers)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json()["status"] == status
    assert store.groups == ([1] if status in {400, 422} else [])  # what could be read at all is a dead letter


@pytest.mark.parametrize(("fault", "status"), [(StorageFullError("full"), 507), (StoreError("gone"), 503)])
async def test_what_is_not_on_disk_is_not_acknowledged(
    client: httpx.AsyncClient, store: MemoryStore, fault: StoreError, status: int
):
    store.fail_with = fault
    answer = await client.post(PATH_INTAKE, json={"events": [event(1)]})
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert int(answer.headers["retry-after"]) > 0
    assert "not" in answer.json()["remedy"] or "nothing" in answer.json()["remedy"]
    assert (await client.get("/readyz")).json() == {"ready": False, "missing": {"store": str(fault)}}
    store.fail_with = None
    assert (await client.post(PATH_INTAKE, json={"events": [event(1)]})).status_code == 200
    assert (await client.get("/readyz")).status_code == 200


async def test_too_much_waiting_is_told_with_a_time_to_come_back(store: MemoryStore):
    writer = Writer(lambda: store, pending_events_max=100)
    await writer.start()
    writer._queued_events = 100
    app = create_app(writer, StageMetrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://intake") as client:  # type: ignore[arg-type]  # ours is narrower than the ASGI union
        answer = await client.post(PATH_INTAKE, json={"events": [event(1)]})
        ready = await client.get("/readyz")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert store.events == {}
    assert (ready.status_code, ready.json()["missing"]) == (503, {"queue": "100 events wait for the disk"})
    await writer.stop()


async def test_a_disk_below_its_reserve_turns_callers_away_before_it_is_full(store: MemoryStore):
    free = [20 << 20]
    writer = Writer(lambda: store, free_bytes=lambda: free[0], reserve_bytes=8 << 20)
    await writer.start()
    app = create_app(writer, StageMetrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://intake") as client:  # type: ignore[arg-type]  # ours is narrower than the ASGI union
        seen = []
        for number, mib in enumerate((8, 7, 9, 10, 9)):
            free[0] = mib << 20
            answer = await client.post(PATH_INTAKE, json={"events": [event(number)]})
            seen.append((mib, answer.status_code, answer.headers.get("retry-after")))
            ready = await client.get("/readyz")
            assert ready.status_code == (200 if answer.status_code == 200 else 503)
            assert ("disk" in ready.json()["missing"]) == (answer.status_code == 429)
        # closed below 8, it opens at 10 and not in between
        assert seen == [(8, 200, None), (7, 429, "30"), (9, 429, "30"), (10, 200, None), (9, 200, None)]
        free[0] = 7 << 20
        erasure = await client.post(PATH_ERASE, json={"pseudonyms": [PSEUDONYM]})
        assert (erasure.status_code, erasure.json()) == (200, {"events": 3, "dead_letters": 0})
        trimmed = await client.post(PATH_TRIM, json={"up_to_seq": 9, "received_before_ms": 0})
        assert trimmed.status_code == 200
    await writer.stop()


async def test_a_disk_that_cannot_be_asked_is_a_fault_that_readiness_names(store: MemoryStore):
    def gone() -> int:
        raise OSError("no such device")

    writer = Writer(lambda: store, free_bytes=gone)
    await writer.start()
    app = create_app(writer, StageMetrics(CollectorRegistry()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://intake") as client:  # type: ignore[arg-type]  # ours is narrower than the ASGI union
        assert (await client.post(PATH_INTAKE, json={"events": [event(1)]})).status_code == 503
        assert "no such device" in (await client.get("/readyz")).json()["missing"]["disk"]
    await writer.stop()


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (PATH_ERASE, {"pseudonyms": ["17850"]}, "$.pseudonyms[0]"),
        (PATH_ERASE, {"pseudonyms": [PSEUDONYM, PSEUDONYM + "\n"]}, "$.pseudonyms[1]"),
        (PATH_ERASE, {"pseudonyms": []}, "$.pseudonyms"),
        (PATH_TRIM, {"up_to_seq": -1, "received_before_ms": 0}, "$.up_to_seq"),
    ],
)
async def test_what_cannot_be_removed_is_refused_and_no_id_is_repeated(
    client: httpx.AsyncClient, path: str, body: dict[str, object], field: str
):
    answer = await client.post(path, json=body)
    assert (answer.status_code, answer.json()["field"]) == (422, field)
    assert "17850" not in answer.text


async def test_an_erasure_speaks_messagepack(client: httpx.AsyncClient):
    body = msgspec.msgpack.encode(ErasureRequest(pseudonyms=[PSEUDONYM]))
    answer = await client.post(PATH_ERASE, content=body, headers={"content-type": "application/msgpack"})
    assert msgspec.msgpack.decode(answer.content, type=ErasureAnswer) == ErasureAnswer(events=0, dead_letters=0)


async def test_outcomes_are_counted(client: httpx.AsyncClient):
    await client.post(PATH_INTAKE, json={"events": [event(1), event(1), event(2, item=None)]})
    text = (await client.get("/metrics")).text
    for outcome in ("accepted", "duplicates", "rejected"):
        assert f'rankbridge_events_total{{outcome="{outcome}"}} 1.0' in text
    assert "rankbridge_events_queued 0.0" in text
