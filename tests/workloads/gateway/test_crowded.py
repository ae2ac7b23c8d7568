"""More than can be answered well: lower rungs first, then low priority, then nobody's more than a share."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable

import httpx
import pytest

from workloads.gateway.admission import AdmissionPolicy
from workloads.gateway.app import STUDENT_FROM, TABLES_FROM, Gateway
from workloads.gateway.doors import FakeRanker, FakeRetrieval

PLACES = 20


class Crowd:
    """A gateway of 20 places whose retrieval answers when it is told to, so that requests stay in it."""

    def __init__(self, app: Gateway, client: httpx.AsyncClient, retrieval: FakeRetrieval) -> None:
        self.app = app
        self.client = client
        self.go_on = asyncio.Event()
        self.tasks: list[asyncio.Task[httpx.Response]] = []
        self._retrieval = retrieval
        retrieval.delay_s, retrieval._sleep = 0.001, self._hold

    async def _hold(self, _: float) -> None:
        await self.go_on.wait()

    async def come(self, count: int, **headers: str) -> None:
        """So many requests more, each as far as it gets."""
        for _ in range(count):
            sent = self.client.post(
                "/v1/recommend", json={}, headers={f"rankbridge-{k}": v for k, v in headers.items()}
            )
            self.tasks.append(asyncio.create_task(sent))
            for _ in range(20):
                await asyncio.sleep(0)

    async def end(self) -> list[httpx.Response]:
        self.go_on.set()
        return [await task for task in self.tasks]


@pytest.fixture
async def crowd(make_app: Callable[..., Gateway], retrieval: FakeRetrieval) -> AsyncIterator[Crowd]:
    app = make_app(in_flight_max=PLACES, with_student=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        yield Crowd(app, client, retrieval)


def rungs(answers: list[httpx.Response]) -> list[tuple[int, str | None]]:
    return [(one.json()["served"]["rung"], one.json()["served"]["reason"]) for one in answers]


async def test_before_anybody_is_turned_away_answers_come_from_lower_rungs(crowd: Crowd, ranker: FakeRanker):
    await crowd.come(18)
    answers = await crowd.end()
    assert {one.status_code for one in answers} == {200}
    best, student = round(STUDENT_FROM * PLACES), round(TABLES_FROM * PLACES)
    assert rungs(answers[:best]) == [(1, None)] * best
    assert rungs(answers[best:student]) == [(2, "overload")] * (student - best)
    # Tables hold nobody up: these were answered while the others waited, and took their places for no time.
    assert rungs(answers[student:]) == [(4, "overload")] * (18 - student)
    assert ranker.calls == best


async def test_low_priority_is_turned_away_first_and_high_last(crowd: Crowd, counted: Callable[[str], float]):
    # Retrieval holds those up that are not answered from the tables.
    await crowd.come(round(0.7 * PLACES))
    before = len(crowd.tasks)
    await crowd.come(3, priority="low")
    await crowd.come(3)
    await crowd.come(3, priority="high")
    answers = await crowd.end()
    statuses = [one.status_code for one in answers[before:]]
    assert statuses == [503] * 3 + [200] * 6
    assert answers[before].headers["content-type"] == "application/problem+json"
    assert 1 <= int(answers[before].headers["retry-after"]) <= 30
    assert counted('rankbridge_sheds_total{priority="low",reason="overloaded"}') == 3


async def test_a_refusal_needs_no_body(crowd: Crowd):
    await crowd.come(round(0.7 * PLACES))
    sent: list[dict[str, object]] = []

    async def receive() -> dict[str, object]:
        raise AssertionError("the body is not read")

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/recommend",
        "query_string": b"",
        "headers": [(b"rankbridge-priority", b"low")],
    }
    await crowd.app(scope, receive, send)
    assert sent[0]["status"] == 503
    await crowd.end()


async def test_who_comes_while_the_loop_reads_is_turned_away_before_there_is_work(
    crowd: Crowd, counted: Callable[[str], float]
):
    def knock(*headers: tuple[bytes, bytes], target: bytes = b"/v1/recommend") -> bytes | None:
        return crowd.app.gate(b"POST", target, headers)

    at_once = math.floor(0.9 * AdmissionPolicy().at_once) + 1
    assert [knock() for _ in range(at_once)] == [None] * at_once
    refusal = knock((b"rankbridge-request-id", b"mine"))
    assert refusal is not None
    head, _, body = refusal.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    assert lines[0] == b"HTTP/1.1 503 Service Unavailable"
    named = dict(line.split(b": ") for line in lines[1:])
    assert named.pop(b"retry-after") in {b"1", b"2"}
    assert named == {
        b"content-type": b"application/problem+json",
        b"content-length": b"%d" % len(body),
        b"rankbridge-request-id": b"mine",
    }
    assert json.loads(body)["type"] == "/problems/overloaded"
    await asyncio.sleep(0)  # counted once the answer is on its way
    assert counted('rankbridge_sheds_total{priority="normal",reason="overloaded"}') == 1
    assert counted('rankbridge_responses_total{endpoint="/v1/recommend",status="503"}') == 1
    # Nothing that is not about room is decided there, and nothing is refused that needs none.
    assert knock((b"rankbridge-priority", b"made up")) is None
    assert knock(target=b"/readyz") is None
    assert crowd.app.gate(b"GET", b"/v1/recommend", ()) is None
    await asyncio.sleep(0)
    assert knock() is None  # whoever was let in is being served now


async def test_events_come_in_by_turns_only_while_others_are_turned_away(crowd: Crowd):
    def knock(path: bytes) -> bytes | None:
        return crowd.app.gate(b"POST", path, ())

    assert [knock(b"/v1/events") for _ in range(3 * PLACES)] == [None] * 3 * PLACES
    for _ in range(2 * AdmissionPolicy().at_once):
        knock(b"/v1/recommend")
    assert knock(b"/v1/events") is not None
    await asyncio.sleep(0)
    assert knock(b"/v1/events") is None


async def test_one_tenant_cannot_fill_the_gateway_for_the_others(crowd: Crowd):
    await crowd.come(1, tenant="quiet")
    await crowd.come(15, tenant="loud")
    before = len(crowd.tasks)
    for _ in range(3):
        await crowd.come(1, tenant="loud")
        await crowd.come(1, tenant="quiet")
    statuses = [one.status_code for one in (await crowd.end())[before:]]
    assert statuses == [429, 200] * 3


async def test_after_the_crowd_all_is_as_before(crowd: Crowd, retrieval: FakeRetrieval):
    await crowd.come(60)
    await crowd.end()
    retrieval.delay_s = 0.0
    for _ in range(5):
        answer = await crowd.client.post("/v1/recommend", json={}, headers={"rankbridge-priority": "low"})
        assert rungs([answer]) == [(1, None)]
