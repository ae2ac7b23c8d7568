"""Ranking for the other site: the same edition or a refusal, checked before Triton sees it, and after one's own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import httpx
import msgspec
import numpy as np
import pytest

from workloads.bundle.store import Bundle
from workloads.contract.http import Problem, RankAnswer
from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.gateway.app import Gateway
from workloads.gateway.doors import DoorFault, FakeRanker
from workloads.gateway.ladder import Reason
from workloads.gateway.timing import FakeClock

ROWS = 5
HEADERS = {"content-type": "application/msgpack"}


def query(of: Bundle, **changes: object) -> bytes:
    sparse = np.zeros((ROWS, len(RANKER_SPARSE)), dtype=np.int64)
    sparse[:, 0] = np.arange(1, ROWS + 1)
    dense = np.zeros((ROWS, len(RANKER_DENSE)), dtype=np.float32)
    fields = {"bundle": of.id, "rows": ROWS, "sparse": sparse.tobytes(), "dense": dense.tobytes()}
    return msgspec.msgpack.encode(fields | changes)


async def lend(client: httpx.AsyncClient, body: bytes, **headers: str) -> httpx.Response:
    return await client.post("/internal/rank", content=body, headers=HEADERS | headers)


def problem(answer: httpx.Response, status: int) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    return msgspec.json.decode(answer.content, type=Problem)


async def test_scores_of_the_same_edition_are_lent(client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker):
    ranker.delay_s = 0.004
    found = await lend(client, query(bundle))
    assert found.headers["content-type"] == "application/msgpack"
    answer = msgspec.msgpack.decode(found.content, type=RankAnswer)
    assert (answer.bundle, answer.delta, answer.site) == (bundle.id, 0, "onprem")
    assert answer.rank_ms == pytest.approx(4.0)
    scores = np.frombuffer(answer.probability, dtype="<f4")
    assert scores.tolist() == pytest.approx([(place + 1) / (ROWS + 1) for place in range(ROWS)])


@pytest.mark.parametrize("changes", [{"bundle": "cd" * 32}, {"delta": 1}])
async def test_another_edition_is_refused_and_counted(
    client: httpx.AsyncClient,
    bundle: Bundle,
    ranker: FakeRanker,
    counted: Callable[[str], float],
    changes: dict[str, object],
):
    found = problem(await lend(client, query(bundle, **changes)), 409)
    assert found.type == "/problems/other-edition"
    assert ranker.calls == 0
    assert counted('rankbridge_bundle_mismatch_total{met="asked"}') == 1


def _sparse(column: int, value: int) -> bytes:
    sparse = np.zeros((ROWS, len(RANKER_SPARSE)), dtype=np.int64)
    sparse[2, column] = value
    return sparse.tobytes()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rows": 4}, "$.sparse"),
        ({"rows": 0}, "$.rows"),
        ({"rows": 2000}, "$.rows"),
        ({"sparse": b""}, "$.sparse"),
        ({"dense": b"\x00" * 7}, "$.dense"),
        ({"sparse": "text"}, "$.sparse"),
        ({"sparse": _sparse(0, -1)}, "$.sparse"),
        ({"sparse": _sparse(0, 201)}, "$.sparse"),
        ({"sparse": _sparse(1, 10**6)}, "$.sparse"),
        ({"sparse": _sparse(5, 6)}, "$.sparse"),
        ({"dense": np.full((ROWS, len(RANKER_DENSE)), np.nan, dtype=np.float32).tobytes()}, "$.dense"),
        ({"dense": np.full((ROWS, len(RANKER_DENSE)), np.inf, dtype=np.float32).tobytes()}, "$.dense"),
        ({"user": "somebody"}, "$.user"),
    ],
)
async def test_what_the_model_cannot_read_is_refused_before_it_is_asked(
    client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker, changes: dict[str, object], field: str
):
    assert problem(await lend(client, query(bundle, **changes)), 422).field == field
    assert ranker.calls == 0


async def test_what_is_no_message_pack_is_refused(client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker):
    problem(await lend(client, b"\xc1"), 400)
    problem(await lend(client, b""), 400)
    problem(await client.post("/internal/rank", content=query(bundle)), 415)
    problem(await lend(client, query(bundle), **{"rankbridge-deadline-ms": "soon"}), 400)
    problem(await client.get("/internal/rank"), 404)
    assert ranker.calls == 0


async def test_a_ranker_that_is_lost_here_is_a_busy_one_to_the_other_site(
    client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "connection refused to 127.0.0.1")
    found = await lend(client, query(bundle))
    assert problem(found, 503).detail == "ranker_down"
    assert int(found.headers["retry-after"]) >= 1


async def test_nothing_is_passed_on_to_a_third_and_the_student_is_for_ones_own(
    paired: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker, peer: FakeRanker, student: FakeRanker
):
    ranker.fault = DoorFault(Reason.RANKER_DOWN, "gone")
    for _ in range(30):
        problem(await lend(paired, query(bundle)), 503)
    assert (peer.calls, student.calls) == (0, 0)


async def test_the_other_sites_haste_is_kept(
    client: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker, clock: FakeClock
):
    ranker.delay_s = 5.0
    begun = clock.now_s()
    problem(await lend(client, query(bundle), **{"rankbridge-deadline-ms": "20"}), 503)
    assert (clock.now_s() - begun) * 1000 <= 20


async def test_while_own_requests_crowd_the_gateway_nothing_is_lent(
    narrow: httpx.AsyncClient, bundle: Bundle, ranker: FakeRanker, counted: Callable[[str], float]
):
    begun, go_on = asyncio.Event(), asyncio.Event()

    async def hold(_: float) -> None:
        begun.set()
        await go_on.wait()

    ranker.delay_s, ranker._sleep = 0.001, hold
    held = asyncio.create_task(narrow.post("/v1/recommend", json={}))
    await begun.wait()
    problem(await lend(narrow, query(bundle)), 503)
    assert counted('rankbridge_sheds_total{priority="peer",reason="crowded"}') == 1
    go_on.set()
    assert (await held).json()["served"]["rung"] == 1


async def test_what_is_lent_takes_no_place_from_ones_own_and_has_an_end(
    make_app: Callable[..., Gateway], bundle: Bundle, ranker: FakeRanker, clock: FakeClock
):
    go_on = asyncio.Event()

    async def hold(_: float) -> None:
        await go_on.wait()

    app = make_app(with_student=True)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://gateway") as client:
        ranker.delay_s, ranker._sleep = 0.001, hold
        lent = [asyncio.create_task(lend(client, query(bundle))) for _ in range(100)]
        async with asyncio.timeout(10):
            while sum(task.done() for task in lent) < 60:  # noqa: ASYNC110 - those beyond the limit are refused at once
                await asyncio.sleep(0.001)
            clock.run(0.2)  # those that hang are evidence, and one's own requests are answered at the rung that is left
            assert (await client.post("/v1/recommend", json={})).json()["served"]["rung"] == 2
            go_on.set()
            statuses = [(await task).status_code for task in lent]
    assert set(statuses) == {200, 503}


async def test_the_public_description_does_not_name_it(client: httpx.AsyncClient):
    assert "/internal" not in (await client.get("/openapi.json")).text
    assert "/internal" not in (await client.get("/nothing")).text
