"""One plan for the rank stage: the route that was chosen, one beside it, one after it, and the student at the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import numpy as np
import pytest

from workloads.contract.tensors import RANKER_DENSE, RANKER_SPARSE
from workloads.gateway.doors import DoorFault, FakeRanker
from workloads.gateway.ladder import Reason
from workloads.gateway.ranking import DIFFERS_FOR_S, Ranking, Unwatched
from workloads.gateway.router import Route, RouteFacts, Router
from workloads.gateway.timing import FakeClock, SystemClock

OWN, PEER, STUDENT = Route("onprem", 1), Route("aws", 1), Route("onprem", 2)
ROWS = 200
SPARSE = np.zeros((ROWS, len(RANKER_SPARSE)), dtype=np.int64)
DENSE = np.zeros((ROWS, len(RANKER_DENSE)), dtype=np.float32)
DOWN = DoorFault(Reason.RANKER_DOWN, "connection refused")


class Counting(Unwatched):
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[tuple[object, ...]] = []

    def hedge(self, site: str) -> None:
        self.told.append(("hedge", site))

    def retry(self, site: str, rung: int) -> None:
        self.told.append(("retry", site, rung))

    def choice(self, site: str, rung: int, reason: str) -> None:
        self.told.append(("choice", site, rung, reason))


class Site:
    """A ranking with fakes behind every route, on a clock that only they move."""

    def __init__(self, *routes: Route, clock: FakeClock | SystemClock | None = None, quick: bool = False) -> None:
        self.clock = clock or FakeClock(0)
        sleep: Callable[[float], object] = self.clock.sleep if isinstance(self.clock, FakeClock) else asyncio.sleep
        self.fakes = {route: FakeRanker(sleep) for route in routes}
        for route, fake in self.fakes.items():
            fake.late = Reason.RANKER_LATE if route == OWN else Reason.PEER_LATE
            fake.delay_s = 0.0 if quick else {OWN: 0.005, PEER: 0.008, STUDENT: 0.0003}[route]
            fake.score = _constant(0.1 * (1 + list(self.fakes).index(route)))
        prior_ms = 80.0 if quick else 10.0
        facts = [
            RouteFacts(
                route,
                price=1.0 if route.site == "onprem" else 3.0,
                prior_ms=0.5 if route == STUDENT else prior_ms,
            )
            for route in self.fakes
        ]
        self.router = Router(facts, random=lambda: 0.5)
        self.faults: list[Reason] = []
        self.watch = Counting()
        self.ranking = Ranking(
            site="onprem",
            router=self.router,
            doors=self.fakes,
            clock=self.clock,
            on_fault=self.faults.append,
            watch=self.watch,
        )

    async def rank(self, left_ms: float = 50.0, best_rung: int = 1) -> tuple[Route, Reason | None]:
        ranked = await self.ranking.rank(SPARSE, DENSE, left_ms, best_rung)
        assert ranked.probabilities.shape == (ROWS,)
        return ranked.route, ranked.reason

    def nothing_in_flight(self) -> bool:
        return not any(state.in_flight for state in self.router.states(self.clock.now_s()))


def _constant(value: float) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    return lambda sparse, _: np.full(len(sparse), value, dtype=np.float32)


async def test_the_sites_own_ranker_ranks_when_it_is_in_time():
    site = Site(OWN, PEER, STUDENT)
    assert await site.rank() == (OWN, None)
    assert [fake.calls for fake in site.fakes.values()] == [1, 0, 0]
    assert site.watch.told == [("choice", "onprem", 1, "")]


async def test_after_a_failure_the_other_site_is_tried_and_then_the_student():
    site = Site(OWN, PEER, STUDENT)
    for _ in range(20):  # a retry at an equal rung has to be earned
        await site.rank()
    site.fakes[OWN].fault = DOWN
    assert await site.rank() == (PEER, None)
    site.fakes[PEER].fault = DoorFault(Reason.PEER_DOWN, "gone")
    assert await site.rank() == (STUDENT, Reason.RANKER_DOWN)
    assert ("retry", "aws", 1) in site.watch.told
    assert site.watch.told[-2:] == [("retry", "onprem", 2), ("choice", "onprem", 2, "ranker_down")]
    assert site.nothing_in_flight()


async def test_retries_never_become_a_second_load_and_the_student_needs_no_leave():
    site = Site(OWN, PEER, STUDENT)
    site.fakes[OWN].fault = DoorFault(Reason.RANKER_FAULT, "500")
    for number in range(200):
        site.fakes[OWN].fault = None if number % 5 else DoorFault(Reason.RANKER_FAULT, "500")
        await site.rank()
    assert site.fakes[PEER].calls <= 0.1 * 200 + 1
    assert site.fakes[STUDENT].calls > 0


async def test_when_all_have_failed_the_first_fault_is_the_reason():
    site = Site(OWN, STUDENT)
    site.fakes[OWN].fault, site.fakes[STUDENT].fault = DOWN, DoorFault(Reason.STUDENT_FAULT, "odd")
    with pytest.raises(DoorFault) as caught:
        await site.rank()
    assert caught.value.reason is Reason.RANKER_DOWN
    assert site.faults == [Reason.RANKER_DOWN, Reason.STUDENT_FAULT]
    assert site.nothing_in_flight()


async def test_no_time_is_no_call_over_a_network():
    site = Site(OWN, PEER, STUDENT)
    assert await site.rank(left_ms=0.5) == (STUDENT, Reason.NO_TIME)
    assert [fake.calls for fake in site.fakes.values()] == [0, 0, 1]
    without = Site(OWN, PEER)
    with pytest.raises(DoorFault) as caught:
        await without.rank(left_ms=0.5)
    assert caught.value.reason is Reason.NO_TIME
    assert [fake.calls for fake in without.fakes.values()] == [0, 0]


async def test_a_ranker_whose_lateness_is_noticed_late_still_costs_no_more_than_one_rung():
    site = Site(OWN, STUDENT)
    clock = site.clock
    assert isinstance(clock, FakeClock)

    async def oversleep(seconds: float) -> None:
        clock.run(seconds + 0.030)  # a busy machine: who waits is woken when the time of the next is over, too

    site.fakes[OWN].delay_s, site.fakes[OWN]._sleep = 60.0, oversleep
    for _ in range(20):
        assert await site.rank(left_ms=20.0) in {(STUDENT, Reason.RANKER_LATE), (STUDENT, Reason.RANKER_SLOW)}


async def test_a_deadline_that_only_the_student_can_keep_is_the_students():
    site = Site(OWN, PEER, STUDENT)
    for _ in range(20):
        await site.rank()
    assert await site.rank(left_ms=3.0) == (STUDENT, Reason.RANKER_SLOW)
    assert site.fakes[OWN].calls == 20


async def test_the_students_time_is_kept_back_of_a_ranker_that_hangs():
    site = Site(OWN, STUDENT)
    for _ in range(20):
        await site.rank()
        await site.rank(best_rung=2)
    site.fakes[OWN].delay_s = 60.0
    begun = site.clock.now_s()
    assert await site.rank(left_ms=20.0) == (STUDENT, Reason.RANKER_LATE)
    assert (site.clock.now_s() - begun) * 1000 <= 20.0


async def test_a_site_on_another_edition_is_no_broken_one_and_is_asked_again_soon():
    site = Site(OWN, PEER)
    for _ in range(50):
        await site.rank()
    site.fakes[OWN].fault = DOWN
    site.fakes[PEER].fault = DoorFault(Reason.PEER_OTHER_BUNDLE, "the other one")
    for _ in range(50):
        with pytest.raises(DoorFault):
            await site.rank()
    calls = site.fakes[PEER].calls
    assert 1 <= calls <= 3
    state = next(state for state in site.router.states(site.clock.now_s()) if state.route == PEER)
    assert (state.drained, state.error_share) == (None, 0.0)
    site.fakes[PEER].fault = None
    assert isinstance(site.clock, FakeClock)
    site.clock.run(DIFFERS_FOR_S)
    assert await site.rank() == (PEER, None)


async def test_what_the_other_site_asks_is_ranked_here_or_not_at_all():
    site = Site(OWN, PEER, STUDENT)
    assert (await site.ranking.rank_here(SPARSE, DENSE, 50.0)).shape == (ROWS,)
    site.fakes[OWN].fault = DOWN
    with pytest.raises(DoorFault):
        await site.ranking.rank_here(SPARSE, DENSE, 50.0)
    assert (site.fakes[PEER].calls, site.fakes[STUDENT].calls) == (0, 0)
    site.fakes[OWN].fault = None
    with pytest.raises(DoorFault) as caught:
        await site.ranking.rank_here(SPARSE, DENSE, 0.01)
    assert caught.value.reason in {Reason.RANKER_SLOW, Reason.RANKER_DOWN}
    assert site.nothing_in_flight()


class Held:
    """A sleep that ends when it is told to, and knows whether it was called off."""

    def __init__(self) -> None:
        self.begun, self.go_on = asyncio.Event(), asyncio.Event()
        self.called_off = False

    async def __call__(self, _: float) -> None:
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.called_off = True
            raise


@pytest.fixture
def hedging() -> tuple[Site, Held]:
    """A site whose own ranker hangs, with a hedge earned."""
    site, held = Site(OWN, PEER, STUDENT, clock=SystemClock(), quick=True), Held()
    for _ in range(40):
        site.router.hedges.earned()
    site.fakes[OWN].delay_s, site.fakes[OWN]._sleep = 0.001, held
    return site, held


async def test_a_call_that_is_out_too_long_gets_one_beside_it_and_the_loser_is_called_off(hedging: tuple[Site, Held]):
    site, held = hedging
    assert await asyncio.wait_for(site.rank(left_ms=400.0), 5) == (PEER, None)
    assert site.watch.told == [("hedge", "aws"), ("choice", "aws", 1, "")]
    await asyncio.sleep(0)
    assert held.called_off
    assert site.nothing_in_flight()


async def test_a_hedge_that_fails_leaves_the_first_call_to_answer(hedging: tuple[Site, Held]):
    site, held = hedging

    async def fail(_: float) -> None:
        held.go_on.set()

    site.fakes[PEER].fault, site.fakes[PEER].delay_s = DoorFault(Reason.PEER_BUSY, "503"), 0.001
    site.fakes[PEER]._sleep = fail
    assert await asyncio.wait_for(site.rank(left_ms=400.0), 5) == (OWN, None)
    assert site.faults == [Reason.PEER_BUSY]
    assert site.nothing_in_flight()


async def test_a_client_that_goes_away_calls_both_off(hedging: tuple[Site, Held]):
    site, held = hedging
    beside = Held()
    site.fakes[PEER].delay_s, site.fakes[PEER]._sleep = 0.001, beside
    ranking = asyncio.create_task(site.rank(left_ms=400.0))
    await asyncio.wait_for(beside.begun.wait(), 5)
    ranking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ranking
    await asyncio.sleep(0)
    assert held.called_off
    assert beside.called_off
    assert site.nothing_in_flight()


async def test_a_hedge_that_is_called_off_before_its_first_step_gives_its_place_back(
    hedging: tuple[Site, Held], monkeypatch: pytest.MonkeyPatch
):
    site, held = hedging
    monkeypatch.setattr(site.watch, "hedge", lambda _: held.go_on.set())  # the first answers in the same turn
    assert await asyncio.wait_for(site.rank(left_ms=400.0), 5) == (OWN, None)
    await asyncio.sleep(0)
    assert site.fakes[PEER].calls == 0
    assert site.nothing_in_flight()


async def test_without_a_token_a_slow_call_is_waited_for(hedging: tuple[Site, Held]):
    site, held = hedging
    while site.router.hedges.take():
        pass
    ranking = asyncio.create_task(site.rank(left_ms=400.0))
    await held.begun.wait()
    await asyncio.sleep(0.5)  # past the moment of the hedge; the fake itself knows no timeout
    assert not ranking.done()
    held.go_on.set()
    assert await ranking == (OWN, None)
    assert site.fakes[PEER].calls == 0


def test_a_door_without_a_route_is_a_mistake_of_ours():
    router = Router([RouteFacts(OWN)], random=lambda: 0.5)
    with pytest.raises(ValueError, match="doors are for"):
        Ranking(site="onprem", router=router, doors={PEER: FakeRanker()}, clock=FakeClock(0))
    with pytest.raises(ValueError, match="doors are for"):
        Ranking(site="aws", router=router, doors={OWN: FakeRanker()}, clock=FakeClock(0))
