"""A gateway that goes to another edition: beside the answers, at once, and with nothing between the two."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import msgspec
import pytest

from workloads.bundle.fake import build_fake_bundle
from workloads.bundle.site import EditionsWatch, write_editions
from workloads.bundle.store import Bundle, BundleFault, open_bundle
from workloads.contract.editions import Edition, SiteEditions
from workloads.contract.http import CandidatesAnswer, CandidatesQuery, ItemsAnswer, Readiness
from workloads.contract.sites import SiteName
from workloads.gateway.app import Gateway
from workloads.gateway.catalogue_sample import Sampler
from workloads.gateway.doors import FakeIntake, FakeRanker, FakeRetrieval
from workloads.gateway.editions import Editions, Serving, follow
from workloads.gateway.identity import CloudEdge
from workloads.gateway.pipeline import Pipeline
from workloads.gateway.ranking import Ranking
from workloads.gateway.timing import SystemClock
from workloads.telemetry.metrics import StageMetrics, new_registry, render


class BothRetrieval(FakeRetrieval):
    """Holds every edition: answers of whichever a query names."""

    async def candidates(self, query: CandidatesQuery, timeout_s: float) -> CandidatesAnswer:
        answer = await super().candidates(query, timeout_s)
        return msgspec.structs.replace(answer, bundle=query.bundle, delta=query.delta)


class World:
    """A gateway over two bundles whose items have different ids."""

    def __init__(self, folder: Path, bundles: list[Bundle]) -> None:
        self.bundles = {bundle.id: bundle for bundle in bundles}
        self.metrics = StageMetrics(new_registry())
        self.editions = Editions(self.metrics.registry)
        self.retrieval = BothRetrieval("", range(1, 40))
        self.ranker = FakeRanker()
        self.file = folder / "editions.json"
        self.builds = 0
        self.app = Gateway(
            site=SiteName.AWS,
            editions=self.editions,
            retrieval=self.retrieval,
            intake=FakeIntake(),
            edge=CloudEdge(),
            people=None,
            metrics=self.metrics,
        )
        self.revision = 0

    def build(self, edition: Edition) -> Serving:
        self.builds += 1
        if edition.bundle not in self.bundles:
            raise BundleFault(self.file, "manifest.json", "there is no such directory")
        bundle = self.bundles[edition.bundle]
        pipeline = Pipeline(
            site=SiteName.AWS,
            bundle=bundle,
            delta=edition.delta,
            ranking=Ranking.alone(SiteName.AWS, self.ranker, SystemClock()),
            retrieval=self.retrieval,
            people=None,
            clock=SystemClock(),
        )
        return Serving(edition, pipeline, Sampler(bundle, [], pipeline.best_rung))

    def say(self, serve: Edition) -> None:
        self.revision += 1
        write_editions(self.file, SiteEditions(revision=self.revision, load=[serve], serve=serve))

    async def until(self, question: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not question():  # noqa: ASYNC110 - what is waited for is in code that has no event to give
                await asyncio.sleep(0.005)

    async def turned(self) -> None:
        await self.until(lambda: self.editions.revision == self.revision)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> list[Bundle]:
    folder = tmp_path_factory.mktemp("bundles")
    return [open_bundle(build_fake_bundle(folder, items=50, seed=seed, prefix=f"kind{seed}")) for seed in (1, 2)]


@pytest.fixture
async def world(tmp_path: Path, bundles: list[Bundle]) -> AsyncIterator[World]:
    made = World(tmp_path, bundles)
    following = asyncio.create_task(
        follow(made.editions, EditionsWatch(made.file), made.build, period_s=0.01, again_after_s=0.05)
    )
    yield made
    following.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await following


@pytest.fixture
async def client(world: World) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(world.app, raise_app_exceptions=True)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as made:
        yield made


async def _answer(client: httpx.AsyncClient) -> ItemsAnswer:
    found = await client.post("/v1/recommend", json={"k": 5})
    assert found.status_code == 200, found.text
    return msgspec.json.decode(found.content, type=ItemsAnswer)


async def _ready(client: httpx.AsyncClient) -> Readiness:
    return msgspec.json.decode((await client.get("/readyz")).content, type=Readiness)


async def test_before_the_first_edition_a_gateway_says_so_and_when_to_come_again(client: httpx.AsyncClient):
    for path in ("/v1/recommend", "/v1/search", "/v1/similar"):
        message = {"query": "x"} if path == "/v1/search" else {"item": "x"} if path == "/v1/similar" else {}
        found = await client.post(path, json=message)
        assert (found.status_code, found.json()["type"]) == (503, "/problems/nothing-served")
        assert found.headers["retry-after"] == "1"
    assert (await client.get("/v1/catalogue/sample")).status_code == 503
    assert (await client.get("/readyz")).status_code == 503


async def test_answers_and_samples_are_of_the_edition_that_the_site_names(
    world: World, client: httpx.AsyncClient, bundles: list[Bundle]
):
    for number in (0, 1, 0):
        world.say(Edition(bundle=bundles[number].id, delta=number))
        await world.turned()
        answer = await _answer(client)
        assert (answer.served.bundle, answer.served.delta) == (bundles[number].short, number)
        assert all(item.item.startswith(f"kind{number + 1}-") for item in answer.items)
        sample = (await client.get("/v1/catalogue/sample?size=10")).json()
        assert all(item.startswith(f"kind{number + 1}-") for item in sample["items"])
        ready = await _ready(client)
        assert (ready.bundle, ready.delta, ready.draining) == (bundles[number].short, number, 0)
    text = render(world.metrics.registry)[0].decode()
    assert "rankbridge_flips_total 2.0" in text
    assert f'rankbridge_edition{{bundle="{bundles[0].short}",delta="0"}} 1.0' in text
    assert bundles[1].short not in text


async def test_a_request_in_flight_finishes_on_the_edition_that_it_began_on(
    world: World, client: httpx.AsyncClient, bundles: list[Bundle]
):
    world.say(Edition(bundle=bundles[0].id))
    await world.turned()
    hold = asyncio.Event()

    async def slowly(_: float) -> None:
        await hold.wait()

    world.ranker.delay_s, world.ranker._sleep = 0.001, slowly
    first = asyncio.create_task(_answer(client))
    await world.until(lambda: world.ranker.calls == 1)
    world.say(Edition(bundle=bundles[1].id))
    await world.turned()
    ready = await _ready(client)
    assert (ready.bundle, ready.draining) == (bundles[1].short, 1)
    hold.set()
    answer = await first
    assert answer.served.bundle == bundles[0].short
    assert all(item.item.startswith("kind1-") for item in answer.items)
    assert (await _ready(client)).draining == 0
    assert (await _answer(client)).served.bundle == bundles[1].short


async def test_an_edition_that_cannot_be_opened_changes_nothing_is_said_and_tried_again_now_and_then(
    world: World, client: httpx.AsyncClient, bundles: list[Bundle]
):
    world.say(Edition(bundle=bundles[0].id))
    await world.turned()
    bad = Edition(bundle="f" * 64)
    world.say(bad)
    await world.turned()
    ready = await _ready(client)
    assert ready.bundle == bundles[0].short
    assert "there is no such directory" in ready.faults[str(bad)]
    await world.until(lambda: world.builds >= 4)
    world.say(Edition(bundle=bundles[0].id))
    await world.turned()
    assert (await _ready(client)).faults == {}


async def test_a_file_that_says_nonsense_changes_nothing(
    world: World, client: httpx.AsyncClient, bundles: list[Bundle]
):
    world.say(Edition(bundle=bundles[0].id))
    await world.turned()
    world.file.write_text('{"load": [')
    await world.until(lambda: bool(world.editions.faults))
    assert (await _answer(client)).served.bundle == bundles[0].short


async def test_candidates_of_another_number_of_deltas_are_refused_and_cost_a_rung(
    world: World, client: httpx.AsyncClient, bundles: list[Bundle], monkeypatch: pytest.MonkeyPatch
):
    world.say(Edition(bundle=bundles[0].id, delta=1))
    await world.turned()
    world.retrieval.bundle = bundles[0].id
    monkeypatch.setattr(BothRetrieval, "candidates", FakeRetrieval.candidates)  # answers with 0 deltas
    answer = await _answer(client)
    assert (answer.served.rung, answer.served.reason) == (4, "retrieval_other_bundle")
    assert all(item.item.startswith("kind1-") for item in answer.items)


async def test_an_edition_that_was_left_is_freed(world: World, client: httpx.AsyncClient, bundles: list[Bundle]):
    world.say(Edition(bundle=bundles[0].id))
    await world.turned()
    await _answer(client)
    assert world.editions.current is not None
    left = weakref.ref(world.editions.current.pipeline)
    world.say(Edition(bundle=bundles[1].id))
    await world.turned()
    await _answer(client)
    assert gc.isenabled()
    await world.until(lambda: left() is None)
