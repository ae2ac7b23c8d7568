"""A gateway over a small bundle, fakes for its neighbours, and clients that speak to it in process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx
import numpy as np
import pytest

from workloads.bundle.fake import CREATED_MS, build_fake_bundle
from workloads.bundle.store import Bundle, open_bundle
from workloads.contract.editions import Edition
from workloads.contract.events import EventType
from workloads.contract.sites import SiteName
from workloads.data.profiles import MemoryProfiles, Profile, Touch
from workloads.gateway.app import IN_FLIGHT_MAX, Gateway
from workloads.gateway.catalogue_sample import Sampler
from workloads.gateway.doors import FakeIntake, FakeRanker, FakeRetrieval
from workloads.gateway.editions import Editions, Serving
from workloads.gateway.identity import CloudEdge, HomeEdge
from workloads.gateway.ladder import Reason
from workloads.gateway.people import People
from workloads.gateway.pipeline import Pipeline
from workloads.gateway.ranking import Ranking
from workloads.gateway.router import Route, RouteFacts, Router
from workloads.gateway.timing import FakeClock
from workloads.privacy.vault import MemoryVault
from workloads.telemetry.metrics import RouteMetrics, StageMetrics, new_registry, render

ITEMS = 200
DAY_MS = 86_400_000


@pytest.fixture(scope="session")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_bundle(tmp_path_factory.mktemp("bundles"), items=ITEMS)


@pytest.fixture(scope="session")
def bundle(bundle_path: Path) -> Bundle:
    return open_bundle(bundle_path)


@pytest.fixture
def user() -> str:
    """A raw id, whose profile says: item-00003 bought 40 days ago, item-00004 viewed yesterday."""
    return "raw-user-alice@example.org"


@pytest.fixture
def vault(user: str) -> MemoryVault:
    """Knows one person."""
    made = MemoryVault()
    made.admit([user])
    return made


@pytest.fixture
def profiles(user: str, vault: MemoryVault) -> MemoryProfiles:
    touches = [
        Touch("item-00003", EventType.PURCHASE, 2, 1, CREATED_MS - 40 * DAY_MS),
        Touch("item-00004", EventType.VIEW, 1, 0, CREATED_MS - DAY_MS),
    ]
    return MemoryProfiles([Profile(vault.admit([user])[user], touches)])


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock(CREATED_MS)


@pytest.fixture
def ranker(clock: FakeClock) -> FakeRanker:
    return FakeRanker(clock.sleep)


@pytest.fixture
def student(clock: FakeClock) -> FakeRanker:
    """Prefers low item indices, unlike the ranker."""
    made = FakeRanker(clock.sleep)
    made.delay_s = 0.0003
    made.score = lambda sparse, _: (1.0 / (1.0 + sparse[:, 0])).astype(np.float32)
    return made


@pytest.fixture
def peer(clock: FakeClock) -> FakeRanker:
    """The other site's; takes part where a test asks for it."""
    made = FakeRanker(clock.sleep)
    made.late = Reason.PEER_LATE
    made.delay_s = 0.004
    return made


@pytest.fixture
def retrieval(bundle: Bundle, clock: FakeClock) -> FakeRetrieval:
    """Proposes every item in the order of its index."""
    return FakeRetrieval(bundle.id, range(1, ITEMS + 1), clock.sleep)


@pytest.fixture
def intake(clock: FakeClock) -> FakeIntake:
    return FakeIntake(clock.sleep)


@pytest.fixture
def metrics() -> StageMetrics:
    return StageMetrics(new_registry())


@pytest.fixture
def routes(metrics: StageMetrics) -> RouteMetrics:
    return RouteMetrics(metrics.registry)


@pytest.fixture
def counted(metrics: StageMetrics) -> Callable[[str], float]:
    """A sample of /metrics by its name with labels; 0 where there is none."""

    def value(name: str) -> float:
        for line in render(metrics.registry)[0].decode().splitlines():
            if line.startswith(name + " "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    return value


@pytest.fixture
def faults() -> list[Reason]:
    """What the pipeline said of calls that brought nothing."""
    return []


MakeApp = Callable[..., Gateway]


@pytest.fixture
def make_app(
    bundle: Bundle,
    vault: MemoryVault,
    user: str,
    profiles: MemoryProfiles,
    clock: FakeClock,
    ranker: FakeRanker,
    retrieval: FakeRetrieval,
    intake: FakeIntake,
    metrics: StageMetrics,
    routes: RouteMetrics,
    faults: list[Reason],
    student: FakeRanker,
    peer: FakeRanker,
) -> MakeApp:
    def make(
        site: SiteName = SiteName.ONPREM,
        in_flight_max: int = IN_FLIGHT_MAX,
        *,
        with_student: bool = False,
        with_peer: bool = False,
    ) -> Gateway:
        home = site is SiteName.ONPREM
        other = SiteName.AWS if home else SiteName.ONPREM
        doors = {Route(site, 1): ranker}
        if with_student:
            doors[Route(site, 2)] = student
        if with_peer:
            doors[Route(other, 1)] = peer
        router = Router(
            [RouteFacts(route, price=1.0 if route.site == site else 3.0) for route in doors], random=lambda: 0.5
        )
        ranking = Ranking(site=site, router=router, doors=doors, clock=clock, on_fault=faults.append, watch=routes)
        people = People(profiles, clock) if home else None
        at_home = HomeEdge(vault)
        pipeline = Pipeline(
            site=site,
            bundle=bundle,
            ranking=ranking,
            retrieval=retrieval,
            people=people,
            clock=clock,
            on_fault=faults.append,
        )
        sampler = Sampler(bundle, [user, "raw-user-bob"] if home else [], pipeline.best_rung)
        return Gateway(
            site=site,
            editions=Editions(metrics.registry, Serving(Edition(bundle=bundle.id), pipeline, sampler)),
            retrieval=retrieval,
            intake=intake,
            edge=at_home if home else CloudEdge(),
            people=people,
            forgetting=at_home if home else None,
            metrics=metrics,
            clock=clock,
            routes=routes,
            in_flight_max=in_flight_max,
        )

    return make


def client_of(app: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, raise_app_exceptions=True), base_url="http://gateway")


@pytest.fixture
async def client(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """To a gateway at home."""
    async with client_of(make_app()) as made:
        yield made


@pytest.fixture
async def cloud(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """To a gateway in the cloud."""
    async with client_of(make_app(SiteName.AWS)) as made:
        yield made


@pytest.fixture
async def laddered(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """To a gateway at home with a student."""
    async with client_of(make_app(with_student=True)) as made:
        yield made


@pytest.fixture
async def paired(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """To a gateway at home with a student and another site."""
    async with client_of(make_app(with_student=True, with_peer=True)) as made:
        yield made


@pytest.fixture
async def narrow(make_app: MakeApp) -> AsyncIterator[httpx.AsyncClient]:
    """To a gateway that serves one request at a time."""
    async with client_of(make_app(in_flight_max=1)) as made:
        yield made
