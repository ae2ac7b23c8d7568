"""The public surface when all is well: events, samples, readiness, metrics, documentation, and who sees an id."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator

import httpx
import msgspec
import pytest
import structlog

from workloads.bundle.store import Bundle
from workloads.contract.http import CatalogueSample, EventsAnswer, Problem, Readiness
from workloads.data.profiles import MemoryProfiles
from workloads.gateway.app import EVENTS_WAIT_MS, Gateway
from workloads.gateway.doors import (
    DoorFault,
    FakeIntake,
    FakeNeighbour,
    FakeRanker,
    FakeRetrieval,
    IntakeBusy,
    IntakeFault,
)
from workloads.gateway.ladder import Reason
from workloads.gateway.timing import FakeClock, LoopLag
from workloads.privacy.vault import MemoryVault
from workloads.telemetry import log

SESSION = "raw-session-of-alice"


@pytest.fixture
def log_text() -> Iterator[io.StringIO]:
    out = io.StringIO()
    root = logging.getLogger()
    before = root.handlers[:], root.level
    log.configure("gateway", "onprem", level="debug", stream=out)
    yield out
    structlog.reset_defaults()
    root.handlers[:], root.level = before


def event(number: int = 0, **changes: object) -> dict[str, object]:
    return {
        "event_id": f"01890a5d-ac96-774b-bcce-{number:012x}",
        "type": "click",
        "timestamp_ms": 1_790_000_000_000,
        "item": "item-00001",
        **changes,
    }


async def test_an_answer_carries_the_id_of_its_request(client: httpx.AsyncClient):
    answer = await client.post("/v1/recommend", json={}, headers={"rankbridge-request-id": "abc-1"})
    assert answer.json()["request_id"] == answer.headers["rankbridge-request-id"] == "abc-1"


@pytest.mark.parametrize("given", ["", "with space", "x" * 129, "line\tbreak"])
async def test_an_id_that_cannot_be_carried_is_replaced(client: httpx.AsyncClient, given: str):
    answer = await client.post("/v1/recommend", json={}, headers={"rankbridge-request-id": given})
    made = answer.json()["request_id"]
    assert made == answer.headers["rankbridge-request-id"] != given
    assert made[14] == "7"


async def test_an_answer_tells_a_browser_where_its_time_went(client: httpx.AsyncClient, ranker: FakeRanker):
    ranker.delay_s = 0.030
    timing = (await client.post("/v1/recommend", json={})).headers["server-timing"]
    stages = dict(part.split(";dur=") for part in timing.split(", "))
    assert float(stages["rank"]) == pytest.approx(30)
    assert float(stages["total"]) >= float(stages["rank"])


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "application/ld+json", "APPLICATION/JSON", None])
async def test_json_under_any_of_its_names_is_read(client: httpx.AsyncClient, kind: str | None):
    headers = {} if kind is None else {"content-type": kind}
    assert (await client.post("/v1/recommend", content=b"{}", headers=headers)).status_code == 200


async def test_a_body_in_pieces_is_put_together(client: httpx.AsyncClient):
    async def pieces() -> AsyncIterator[bytes]:
        for letter in b'{"k": 3}':
            yield bytes([letter])

    answer = await client.post("/v1/recommend", content=pieces(), headers={"content-type": "application/json"})
    assert len(answer.json()["items"]) == 3


async def test_events_are_acknowledged_with_what_intake_says(client: httpx.AsyncClient, intake: FakeIntake):
    first = await client.post("/v1/events", json={"events": [event(1), event(2)]})
    again = await client.post("/v1/events", json={"events": [event(2), event(3)]})
    assert msgspec.json.decode(first.content, type=EventsAnswer) == EventsAnswer(accepted=2, duplicates=0)
    assert msgspec.json.decode(again.content, type=EventsAnswer) == EventsAnswer(accepted=1, duplicates=1)
    assert len(intake.kept) == 3


async def test_events_without_intake_are_not_acknowledged_and_may_be_sent_again(
    client: httpx.AsyncClient, intake: FakeIntake
):
    intake.fault = IntakeFault("the intake cannot be reached")
    answer = await client.post("/v1/events", json={"events": [event()]})
    assert answer.status_code == 503
    assert answer.headers["retry-after"] == "1"
    problem = msgspec.json.decode(answer.content, type=Problem)
    assert problem.type == "/problems/not-acknowledged"
    assert "again" in (problem.remedy or "")


async def test_a_client_is_told_to_slow_down_when_the_intake_has_no_room(client: httpx.AsyncClient, intake: FakeIntake):
    intake.fault = IntakeBusy("the intake takes no more events for now", 30)
    answer = await client.post("/v1/events", json={"events": [event()]})
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "30"
    assert not intake.kept


async def test_a_slow_disk_is_waited_for_unless_the_client_sets_a_deadline(
    client: httpx.AsyncClient, intake: FakeIntake, clock: FakeClock
):
    intake.delay_s = EVENTS_WAIT_MS / 2000
    assert (await client.post("/v1/events", json={"events": [event()]})).status_code == 200
    before = clock.now_s()
    hasty = await client.post("/v1/events", json={"events": [event(9)]}, headers={"rankbridge-deadline-ms": "50"})
    assert hasty.status_code == 503
    assert (clock.now_s() - before) * 1000 == pytest.approx(50)


async def test_a_full_gateway_says_when_to_come_back(narrow: httpx.AsyncClient, ranker: FakeRanker):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_: float) -> None:
        begun.set()
        await go_on.wait()

    ranker.delay_s, ranker._sleep = 0.001, hold
    held = asyncio.create_task(narrow.post("/v1/recommend", json={}))
    await begun.wait()
    full = await narrow.post("/v1/recommend", json={})
    assert full.status_code == 503
    assert 1 <= int(full.headers["retry-after"]) <= 3
    assert full.headers["content-type"] == "application/problem+json"
    assert (await narrow.get("/healthz")).status_code == 200
    go_on.set()
    assert (await held).status_code == 200
    ranker.delay_s = 0.0
    assert (await narrow.post("/v1/recommend", json={})).status_code == 200


async def test_events_that_wait_for_the_disk_take_no_place_from_answers(
    narrow: httpx.AsyncClient, intake: FakeIntake, monkeypatch: pytest.MonkeyPatch
):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_: float) -> None:
        begun.set()
        await go_on.wait()

    intake.delay_s = 0.001
    monkeypatch.setattr(intake, "_sleep", hold)
    held = asyncio.create_task(narrow.post("/v1/events", json={"events": [event()]}))
    await begun.wait()
    assert (await narrow.post("/v1/events", json={"events": [event(1)]})).status_code == 503
    assert (await narrow.post("/v1/recommend", json={})).status_code == 200
    go_on.set()
    assert (await held).status_code == 200


async def test_a_fault_of_our_own_is_a_problem_and_in_the_log_without_the_request(
    client: httpx.AsyncClient, retrieval: FakeRetrieval, user: str, log_text: io.StringIO
):
    retrieval.fault = RuntimeError("a bug")
    answer = await client.post("/v1/recommend", json={"user": user}, headers={"rankbridge-request-id": "find-me"})
    assert answer.status_code == 500
    assert "a bug" not in answer.text
    assert "find-me" in log_text.getvalue()
    assert "a bug" in log_text.getvalue()
    assert user not in log_text.getvalue()
    retrieval.fault = None
    assert (await client.post("/v1/recommend", json={})).status_code == 200


async def test_no_raw_id_leaves_the_edge_in_an_answer_a_message_or_a_log(
    client: httpx.AsyncClient,
    user: str,
    vault: MemoryVault,
    retrieval: FakeRetrieval,
    ranker: FakeRanker,
    intake: FakeIntake,
    profiles: MemoryProfiles,
    monkeypatch: pytest.MonkeyPatch,
    log_text: io.StringIO,
):
    asked: list[str] = []
    get = profiles.get
    monkeypatch.setattr(profiles, "get", lambda pseudonym: asked.append(pseudonym) or get(pseudonym))
    answers = [
        await client.post("/v1/recommend", json={"user": user, "history": ["item-00001"]}),
        await client.post("/v1/search", json={"user": user, "query": "lantern"}),
        await client.post("/v1/recommend", json={"user": user, "use_model": False}),
        await client.post(
            "/v1/events",
            json={
                "events": [
                    event(user=user, session=SESSION, context={"page": user, "surface": SESSION, "account": user})
                ]
            },
        ),
    ]
    for fault in (DoorFault(Reason.RANKER_DOWN, "gone"), RuntimeError("a bug")):
        ranker.fault = fault
        answers += [await client.post("/v1/recommend", json={"user": user}) for _ in range(10)]
    answers.append(await client.get("/readyz"))
    answers.append(await client.get("/metrics"))
    sent = msgspec.msgpack.encode([retrieval.queries, list(intake.kept.values())])
    assert asked
    assert set(asked) == {vault.pseudonym(user)}
    assert intake.kept
    assert log_text.getvalue()
    for raw in (user, SESSION):
        assert all(raw not in answer.text and raw not in str(answer.headers) for answer in answers)
        assert raw not in log_text.getvalue()
        assert raw.encode() not in sent
    kept = next(iter(intake.kept.values()))
    assert kept.user == kept.context["page"] == vault.pseudonym(user)
    assert kept.session == kept.context["surface"] == vault.session(SESSION)
    assert "account" not in kept.context


async def test_a_cloud_gateway_refuses_a_raw_id_without_repeating_it(
    cloud: httpx.AsyncClient, user: str, retrieval: FakeRetrieval, intake: FakeIntake
):
    for path, message, field in (
        ("/v1/recommend", {"user": user}, "$.user"),
        ("/v1/search", {"user": user, "query": "lantern"}, "$.user"),
        ("/v1/events", {"events": [event(), event(1, user=user)]}, "$.events[1].user"),
    ):
        answer = await cloud.post(path, json=message)
        problem = msgspec.json.decode(answer.content, type=Problem)
        assert (answer.status_code, problem.field) == (422, field)
        assert "home" in (problem.remedy or "")
        assert user not in answer.text
    assert (retrieval.calls, intake.calls) == (0, 0)


async def test_a_cloud_gateway_passes_events_of_pseudonyms_on_as_they_are(cloud: httpx.AsyncClient, intake: FakeIntake):
    pseudonym = "p1-" + "0a" * 16
    assert (await cloud.post("/v1/events", json={"events": [event(user=pseudonym)]})).status_code == 200
    assert next(iter(intake.kept.values())).user == pseudonym


async def test_a_raw_session_does_not_get_through_a_cloud_gateway(cloud: httpx.AsyncClient, intake: FakeIntake):
    answer = await cloud.post("/v1/events", json={"events": [event(session=SESSION, context={"visit": SESSION})]})
    assert answer.status_code == 200
    assert SESSION.encode() not in msgspec.msgpack.encode(list(intake.kept.values()))


async def test_ready_says_of_each_neighbour_how_it_is(make_app: Callable[[], Gateway]):
    app = make_app()
    async with _Running(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as running:
        answer = await running.get("/readyz")
    ready = msgspec.json.decode(answer.content, type=Readiness)
    assert (answer.status_code, ready.ready, ready.missing) == (200, True, [])
    assert set(ready.backends) == {"triton", "retrieval", "intake", "profiles"}


async def test_a_lost_neighbour_is_missing_and_the_gateway_still_ready(
    make_app: Callable[[], Gateway], ranker: FakeRanker
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused")
    app = make_app()
    async with _Running(app), httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://g") as running:
        answer = await running.get("/readyz")
    ready = msgspec.json.decode(answer.content, type=Readiness)
    assert (answer.status_code, ready.missing) == (200, ["triton"])
    assert ready.backends["triton"].detail == "connection refused"


async def test_a_gateway_that_does_not_run_yet_is_not_ready(client: httpx.AsyncClient):
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/healthz")).json() == {"alive": True}


class _Running:
    """An application between its start and its stop, as the server has it."""

    def __init__(self, app: Gateway) -> None:
        self._app = app
        self._in: asyncio.Queue[dict[str, str]] = asyncio.Queue()
        self._out: asyncio.Queue[dict[str, str]] = asyncio.Queue()

    async def __aenter__(self) -> None:
        self._task = asyncio.create_task(self._app({"type": "lifespan"}, self._in.get, self._out.put))
        await self._in.put({"type": "lifespan.startup"})
        assert (await self._out.get())["type"] == "lifespan.startup.complete"

    async def __aexit__(self, *_: object) -> None:
        await self._in.put({"type": "lifespan.shutdown"})
        assert (await self._out.get())["type"] == "lifespan.shutdown.complete"
        await self._task


async def test_a_stop_closes_every_door(
    make_app: Callable[[], Gateway],
    ranker: FakeRanker,
    retrieval: FakeRetrieval,
    intake: FakeIntake,
    monkeypatch: pytest.MonkeyPatch,
):
    closed: list[object] = []

    async def close(self: object) -> None:
        closed.append(self)

    monkeypatch.setattr(FakeNeighbour, "close", close)
    async with _Running(make_app()):
        assert closed == []
    assert closed == [ranker, retrieval, intake]


async def test_metrics_count_what_was_answered_by_endpoint_stage_and_rung(
    client: httpx.AsyncClient, counted: Callable[[str], float], ranker: FakeRanker
):
    ranker.delay_s = 0.0042
    for _ in range(3):
        await client.post("/v1/recommend", json={})
    await client.post("/v1/recommend", json={"k": 0})
    for number in range(5):
        await client.get(f"/somewhere/{number}")
    await asyncio.sleep(0)  # counted once the answer is on its way
    text = (await client.get("/metrics")).text
    assert counted('rankbridge_answers_total{endpoint="/v1/recommend",reason="",rung="1"}') == 3
    assert counted('rankbridge_responses_total{endpoint="/v1/recommend",status="200"}') == 3
    assert counted('rankbridge_responses_total{endpoint="/v1/recommend",status="422"}') == 1
    assert counted('rankbridge_responses_total{endpoint="other",status="404"}') == 5
    assert counted('rankbridge_stage_seconds_sum{endpoint="/v1/recommend",stage="rank"}') == pytest.approx(0.0126)
    assert counted('rankbridge_stage_seconds_count{endpoint="/v1/recommend",stage="own"}') == 3
    assert counted('rankbridge_in_flight{endpoint="/v1/recommend"}') == 0
    assert "somewhere" not in text


async def test_a_sample_is_what_load_users_need(client: httpx.AsyncClient, bundle: Bundle, user: str):
    answer = await client.get("/v1/catalogue/sample?size=500")
    sample = msgspec.json.decode(answer.content, type=CatalogueSample)
    assert set(sample.items) <= set(bundle.item_ids[1:])
    assert len(sample.items) == len(sample.item_weights)
    assert sum(sample.item_weights) == pytest.approx(1)
    assert sample.users[0] == user
    assert sample.best_rung == {"/v1/recommend": 1, "/v1/search": 3, "/v1/similar": 3}
    search = await client.post("/v1/search", json={"query": sample.queries[0]})
    assert search.status_code == 200


async def test_a_cloud_sample_names_no_people(cloud: httpx.AsyncClient):
    assert (await cloud.get("/v1/catalogue/sample")).json()["users"] == []


async def test_head_asks_like_get(client: httpx.AsyncClient):
    assert (await client.head("/healthz")).status_code == 200


async def test_the_loops_lag_is_what_a_request_waits_before_anybody_looks_at_it():
    lag = LoopLag()
    lag.start()
    await asyncio.sleep(3 * LoopLag.EVERY_S)
    assert lag.lag_s < 0.1
    time.sleep(0.15)  # noqa: ASYNC251 - that is the lag
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert lag.lag_s > 0.1
    lag.stop()
