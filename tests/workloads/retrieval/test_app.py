"""The retrieval's answers, spoken to in process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry

from workloads.contract.editions import RetrievalReadiness
from workloads.contract.http import BODY_MAX_BYTES, PATH_CANDIDATES, CandidatesAnswer, CandidatesQuery
from workloads.data.fusion import Candidates
from workloads.retrieval.app import create_app
from workloads.retrieval.editions import Editions
from workloads.retrieval.retriever import QueryFault
from workloads.telemetry.metrics import StageMetrics

BUNDLE = "b" * 64
MSGPACK = {"content-type": "application/msgpack"}


class EchoRetriever:
    """Answers the history it was asked with."""

    bundle_id = BUNDLE
    delta = 0

    def candidates(self, query: CandidatesQuery) -> CandidatesAnswer:
        if -1 in query.history:
            raise QueryFault("$.history[0]", "Expected an item index")
        rest = [0.0] * len(query.history)
        return Candidates.of(query.history, rest, rest, [0] * len(rest)).answer(BUNDLE, 0)


def query(**changes: object) -> dict[str, Any]:
    return {
        "bundle": BUNDLE,
        "kind": "recommend",
        "history": [],
        "history_strength": [],
        "history_age_hours": [],
        "context": [0.0, 1.0, 0.0, 1.0],
        "count": 10,
        **changes,
    }


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    metrics = StageMetrics(CollectorRegistry())
    editions = Editions(metrics.registry)
    editions.hold(EchoRetriever())
    app = create_app(editions, metrics)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://retrieval") as client:  # type: ignore[arg-type]  # ours is narrower than the ASGI union
        yield client


async def post(client: httpx.AsyncClient, content: bytes) -> httpx.Response:
    return await client.post(PATH_CANDIDATES, content=content, headers=MSGPACK)


async def test_a_query_is_answered_in_messagepack(client: httpx.AsyncClient):
    answer = await post(client, msgspec.msgpack.encode(query(history=[3, 4])))
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/msgpack")
    found = Candidates.read(msgspec.msgpack.decode(answer.content, type=CandidatesAnswer))
    assert found.items.tolist() == [3, 4]


@pytest.mark.parametrize("other", [{"bundle": "a" * 64}, {"bundle": "a" * 64, "delta": 1}])
async def test_a_query_of_another_bundle_is_refused_and_both_are_named(
    client: httpx.AsyncClient, other: dict[str, object]
):
    answer = await post(client, msgspec.msgpack.encode(query(**other)))
    assert (answer.status_code, answer.headers["content-type"]) == (409, "application/problem+json")
    assert "a" * 12 in answer.json()["detail"]
    assert "b" * 12 in answer.json()["detail"]


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        (b"", 400, None),
        (b"\xc1", 400, None),
        (b"\x81\xa1\x80\x01", 400, None),  # text that is not UTF-8
        (b"{}", 422, "$"),
        (msgspec.msgpack.encode(query())[:-3], 400, None),
        (msgspec.msgpack.encode([1, 2]), 422, "$"),
        (msgspec.msgpack.encode(query(count=0)), 422, "$.count"),
        (msgspec.msgpack.encode(query(count=10**9)), 422, "$.count"),
        (msgspec.msgpack.encode(query(count="ten")), 422, "$.count"),
        (msgspec.msgpack.encode(query(kind="ads")), 422, "$.kind"),
        (msgspec.msgpack.encode(query(history=["a"])), 422, "$.history[0]"),
        (msgspec.msgpack.encode(query(history=[-1])), 422, "$.history[0]"),
        (msgspec.msgpack.encode(query(colour="red")), 422, "$"),
        (b"\x00" * (BODY_MAX_BYTES + 1), 413, "$"),
    ],
)
async def test_bad_bodies_are_problems(client: httpx.AsyncClient, content: bytes, status: int, field: str | None):
    answer = await post(client, content)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    assert answer.json().get("field") == field


async def test_a_query_of_more_deltas_than_are_held_is_refused(client: httpx.AsyncClient):
    answer = await post(client, msgspec.msgpack.encode(query(delta=1)))
    assert answer.status_code == 409
    assert f"{BUNDLE[:12]}+0" in answer.json()["detail"]


async def test_json_is_not_spoken_here(client: httpx.AsyncClient):
    assert (await client.post(PATH_CANDIDATES, json=query())).status_code == 415


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(body=st.binary(max_size=300))
async def test_no_body_breaks_the_service(client: httpx.AsyncClient, body: bytes):
    assert (await post(client, body)).status_code in {400, 422}


async def test_it_is_ready_once_it_serves_and_counts_what_it_answers(client: httpx.AsyncClient):
    await post(client, msgspec.msgpack.encode(query()))
    ready = msgspec.json.decode((await client.get("/readyz")).content, type=RetrievalReadiness)
    assert ready == RetrievalReadiness(ready=True, missing={}, editions=[f"{BUNDLE[:12]}+0"])
    text = (await client.get("/metrics")).text
    assert f'rankbridge_responses_total{{endpoint="{PATH_CANDIDATES}",status="200"}} 1.0' in text
