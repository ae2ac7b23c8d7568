"""Retrieval over several editions: each query its own, opened beside the answers, dropped when not wanted."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import pytest
from prometheus_client import CollectorRegistry

from workloads.bundle.site import EditionsWatch, write_editions
from workloads.contract.editions import Edition, RetrievalReadiness, SiteEditions
from workloads.contract.http import PATH_CANDIDATES, CandidatesAnswer, CandidatesQuery
from workloads.data.fusion import Candidates
from workloads.retrieval.app import create_app
from workloads.retrieval.dense import ModelFault
from workloads.retrieval.editions import Editions, follow
from workloads.telemetry.metrics import StageMetrics

OLD, NEW = Edition(bundle="a" * 64), Edition(bundle="b" * 64, delta=2)


class Echo:
    """Answers the history it was asked with, as its edition."""

    def __init__(self, edition: Edition) -> None:
        self.bundle_id, self.delta = edition.bundle, edition.delta

    def candidates(self, query: CandidatesQuery) -> CandidatesAnswer:
        rest = [0.0] * len(query.history)
        return Candidates.of(query.history, rest, rest, [0] * len(rest)).answer(self.bundle_id, self.delta)


class World:
    """A retrieval whose editions are echoes."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "editions.json"
        self.metrics = StageMetrics(CollectorRegistry())
        self.editions = Editions(self.metrics.registry)
        self.app = create_app(self.editions, self.metrics)
        self.faults: dict[Edition, Exception] = {}
        self.gate = threading.Event()
        self.gate.set()
        self.opens: list[Edition] = []
        self.revision = 0

    def open(self, edition: Edition) -> Echo:
        self.opens.append(edition)
        self.gate.wait(20)
        if edition in self.faults:
            raise self.faults[edition]
        return Echo(edition)

    def say(self, *load: Edition, serve: Edition) -> None:
        self.revision += 1
        write_editions(self.file, SiteEditions(revision=self.revision, load=list(load), serve=serve))

    async def until(self, question: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not question():  # noqa: ASYNC110 - what is waited for is in code that has no event to give
                await asyncio.sleep(0.005)

    async def done(self) -> None:
        await self.until(lambda: self.editions.revision == self.revision)


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    made = World(tmp_path)
    following = asyncio.create_task(
        follow(made.editions, EditionsWatch(made.file), made.open, period_s=0.01, again_after_s=0.05)
    )
    yield made
    made.gate.set()
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app)  # type: ignore[arg-type]  # ours is narrower than the ASGI union
    async with httpx.AsyncClient(transport=transport, base_url="http://retrieval") as made:
        yield made


async def _ask(client: httpx.AsyncClient, edition: Edition) -> httpx.Response:
    query = CandidatesQuery(
        bundle=edition.bundle,
        delta=edition.delta,
        kind="recommend",
        history=[1],
        history_strength=[1.0],
        history_age_hours=[1.0],
        context=[0.0, 1.0, 0.0, 1.0],
        count=5,
    )
    content, headers = msgspec.msgpack.encode(query), {"content-type": "application/msgpack"}
    return await client.post(PATH_CANDIDATES, content=content, headers=headers)


async def _ready(client: httpx.AsyncClient) -> RetrievalReadiness:
    return msgspec.json.decode((await client.get("/readyz")).content, type=RetrievalReadiness)


async def test_it_is_not_ready_before_it_holds_what_gateways_answer_from(world: World, client: httpx.AsyncClient):
    assert (await _ready(client)).missing == {"editions": "the site's agent has brought nothing yet"}
    world.gate.clear()
    world.say(OLD, serve=OLD)
    await world.until(lambda: bool(world.opens))
    assert (await _ready(client)).missing == {str(OLD): "is being opened"}
    world.gate.set()
    await world.done()
    assert (await _ready(client)).ready


async def test_two_editions_are_answered_each_as_itself_and_the_one_not_wanted_any_more_is_refused(
    world: World, client: httpx.AsyncClient
):
    world.say(OLD, NEW, serve=OLD)
    await world.done()
    for edition in (OLD, NEW):
        answer = msgspec.msgpack.decode((await _ask(client, edition)).content, type=CandidatesAnswer)
        assert (answer.bundle, answer.delta) == (edition.bundle, edition.delta)
    world.say(NEW, serve=NEW)
    await world.done()
    assert (await _ask(client, OLD)).status_code == 409
    assert (await _ready(client)).editions == [str(NEW)]


async def test_answers_go_on_while_another_edition_is_being_opened(world: World, client: httpx.AsyncClient):
    world.say(OLD, serve=OLD)
    await world.done()
    world.gate.clear()
    world.say(OLD, NEW, serve=OLD)
    await world.until(lambda: NEW in world.opens)
    assert (await _ask(client, OLD)).status_code == 200
    assert (await _ask(client, NEW)).status_code == 409
    assert (await _ready(client)).revision < world.revision
    world.gate.set()
    await world.done()
    assert (await _ask(client, NEW)).status_code == 200


@pytest.mark.parametrize("fault", [ModelFault("ann.faiss cannot be read"), OSError("no room"), KeyError("surprise")])
async def test_an_edition_that_cannot_be_opened_is_a_fault_and_the_others_serve_on(
    world: World, client: httpx.AsyncClient, fault: Exception
):
    world.faults[NEW] = fault
    world.say(OLD, NEW, serve=OLD)
    await world.done()
    ready = await _ready(client)
    assert ready.ready
    assert ready.editions == [str(OLD)]
    assert str(fault) in ready.faults[str(NEW)]
    assert (await _ask(client, OLD)).status_code == 200
    world.faults.clear()  # it is tried again after a while
    await world.until(lambda: str(NEW) in world.editions.names)
    assert (await _ready(client)).faults == {}


async def test_what_gateways_answer_from_is_opened_first(world: World):
    world.say(NEW, OLD, serve=OLD)
    await world.done()
    assert world.opens == [OLD, NEW]
