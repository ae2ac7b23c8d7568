"""The policy in simulated time: faults, overload, and its cost beside balancers and optimum.

Service times here are drawn (lognormal), not measured: what is tested is the policy, and not a site.
"""

from __future__ import annotations

import functools
import itertools
import math
from random import Random

import pytest

from workloads.contract.slo import Priority
from workloads.gateway.admission import Admission
from workloads.gateway.router import Route, Router
from workloads.gateway.simulator import (
    Backend,
    Comparison,
    Condition,
    Fault,
    Front,
    Outcomes,
    Request,
    compare,
    exhaustive_cost,
    least_cost,
    requests,
    run,
)

HOME, CLOUD, STUDENT = Route("onprem", 1), Route("aws", 1), Route("onprem", 2)
LEFT_MS = 50.0


def drawn(median_ms: float, seed: int) -> list[float]:
    random = Random(seed)
    return [random.lognormvariate(math.log(median_ms), 0.3) for _ in range(2000)]


BACKENDS = (
    Backend(HOME, drawn(4.0, 1), workers=1, price=1.0),
    Backend(CLOUD, drawn(2.0, 2), workers=8, price=5.0, way_ms=10.0),
    Backend(STUDENT, drawn(0.8, 3), workers=1, price=0.2),
)


def router(seed: int = 1) -> Router:
    return Router([backend.facts() for backend in BACKENDS], random=Random(seed).random)


def through(*faults: Fault, rate: float = 100.0, seconds: float = 40.0) -> tuple[Outcomes, Router]:
    asked = requests(BACKENDS, rate=rate, seconds=seconds, left_ms=LEFT_MS, random=Random(5))
    at = router()
    return run(at, BACKENDS, asked, faults=faults), at


def drains(at: Router, route: Route) -> int:
    return next(state.drains for state in at.states(1000.0) if state.route == route)


@pytest.mark.parametrize(
    ("condition", "rate"),
    [(Condition.SLOW, 100.0), (Condition.SLOW, 180.0), (Condition.STOPPED, 100.0), (Condition.GONE, 100.0)],
)
def test_a_home_ranker_that_fails_in_any_way_is_out_of_the_way_in_three_seconds_and_back_in_three(
    condition: Condition, rate: float
):
    outcomes, at = through(Fault(HOME, condition, 8.0, 14.0), rate=rate, seconds=21.0)
    for second in range(11, 21):
        assert outcomes.bad_share(second, second + 1.0) <= 0.01, second
    assert outcomes.bad_share(8.0, 11.0) <= 0.05
    assert outcomes.late_share == 0.0
    assert outcomes.hedges <= 0.05 * len(outcomes.answers)
    assert drains(at, HOME) <= 1  # it went once and came back once
    back = [answer for answer in outcomes.answers if answer.request.at_s > 17.0]
    assert sum(answer.site == "onprem" and answer.rung == 1 for answer in back) > 0.95 * len(back)


def test_with_the_cloud_gone_and_the_home_ranker_grey_the_student_answers():
    outcomes, _ = through(Fault(CLOUD, Condition.GONE, 3.0, 60.0), Fault(HOME, Condition.SLOW, 5.0, 60.0), seconds=18.0)
    assert outcomes.bad_share(8.0, 18.0) <= 0.001
    late = [answer for answer in outcomes.answers if answer.request.at_s > 8.0]
    assert sum(answer.rung == 2 for answer in late) > 0.9 * len(late)


def test_a_ranker_that_comes_and_goes_does_not_flap():
    spells = [Fault(HOME, Condition.SLOW, 5.0 + 4.0 * turn, 7.0 + 4.0 * turn) for turn in range(10)]
    outcomes, at = through(*spells, seconds=50.0)
    assert drains(at, HOME) <= 6
    assert outcomes.bad_share(5.0, 45.0) <= 0.01


def test_one_call_in_ten_that_hangs_costs_few_answers_their_rung():
    hanging = [*drawn(4.0, 1)[:900], *([400.0] * 100)]
    Random(9).shuffle(hanging)
    backends = (Backend(HOME, hanging, workers=16, price=1.0), *BACKENDS[1:])
    asked = requests(backends, rate=100.0, seconds=30.0, left_ms=LEFT_MS, random=Random(5))
    at = Router([backend.facts() for backend in backends], random=Random(1).random)
    outcomes = run(at, backends, asked)
    assert outcomes.rung_share(3) <= 0.01
    assert outcomes.hedges <= 0.05 * len(asked)
    assert drains(at, HOME) <= 12


def test_predictions_are_calibrated_from_a_quiet_site_to_a_full_one():
    for rate in (50.0, 150.0, 300.0):
        _, at = through(rate=rate, seconds=15.0)
        assert at.calibration.share_within == pytest.approx(0.96, abs=0.025)


@functools.cache
def comparison(rate: float) -> Comparison:
    asked = requests(BACKENDS, rate=rate, seconds=20.0, left_ms=LEFT_MS, random=Random(5))
    return compare(BACKENDS, asked, chance=lambda: Random(1))


@pytest.mark.parametrize("rate", [60.0, 215.0, 300.0])
def test_ours_keeps_the_deadline_at_a_tenth_above_the_least_cost_and_below_every_balancer(rate: float):
    found = comparison(rate)
    ours, *balancers = (row.outcomes for row in found.rows)
    assert ours.quantile_ms(0.99) <= LEFT_MS
    assert ours.late_share == 0.0
    assert ours.rung_share(1) >= 0.99
    assert ours.cost_per_1000 <= 1.1 * found.least_cost_per_1000
    assert len(balancers) == 3
    for other in balancers:
        assert ours.cost_per_1000 < other.cost_per_1000


def test_knowing_each_calls_own_time_can_only_be_cheaper():
    for rate in (215.0, 300.0):
        found = comparison(rate)
        assert found.clairvoyant_per_1000 <= found.least_cost_per_1000


def test_the_least_cost_is_what_trying_everything_finds():
    for seed in range(30):
        random = Random(seed)
        backends = (
            Backend(HOME, [random.uniform(5.0, 30.0) for _ in range(20)], price=1.0, way_ms=random.choice([0.0, 4.0])),
            Backend(CLOUD, [1.0], workers=10, price=3.0),
        )
        asked = requests(backends, rate=150.0, seconds=0.06, left_ms=50.0, random=random)[:9]
        assert least_cost(backends, asked) == exhaustive_cost(backends, asked)


def test_with_several_workers_the_bound_is_never_above_what_trying_everything_finds():
    for seed in range(15):
        random = Random(seed)
        backends = (
            Backend(HOME, [random.uniform(5.0, 30.0) for _ in range(20)], workers=2, price=1.0),
            Backend(CLOUD, [1.0], workers=10, price=3.0),
        )
        asked = requests(backends, rate=300.0, seconds=0.04, left_ms=40.0, random=random)[:9]
        assert least_cost(backends, asked) <= exhaustive_cost(backends, asked)


def test_the_bound_refuses_what_it_cannot_see_through():
    early = Request(0.0, 50.0, {HOME: 1.0, CLOUD: 1.0})
    late = Request(0.1, 60.0, {HOME: 1.0, CLOUD: 1.0})
    with pytest.raises(ValueError, match="patience"):
        least_cost(BACKENDS, [early, late])
    with pytest.raises(ValueError, match="full ranker"):
        least_cost(BACKENDS[2:], [early])


def test_the_same_seed_gives_the_same_run():
    one, other = (through(Fault(HOME, Condition.SLOW, 5.0, 8.0), seconds=15.0)[0] for _ in range(2))
    assert [(a.took_ms, a.rung, a.site) for a in one.answers] == [(a.took_ms, a.rung, a.site) for a in other.answers]


def test_every_request_gets_one_answer_and_every_call_is_over():
    outcomes, at = through(
        Fault(HOME, Condition.STOPPED, 3.0, 6.0), Fault(CLOUD, Condition.GONE, 4.0, 9.0), rate=300.0, seconds=15.0
    )
    asked = requests(BACKENDS, rate=300.0, seconds=15.0, left_ms=LEFT_MS, random=Random(5))
    assert sorted(a.request.at_s for a in outcomes.answers) == [request.at_s for request in asked]
    assert all(state.in_flight == 0 for state in at.states(1000.0))


FRONT = Front(own_ms=2.0, door_ms=0.05)
PEAK = 1000.0 / 2.05
MIX = ((0.2, Priority.HIGH, "a"), (0.5, Priority.NORMAL, "a"), (0.3, Priority.LOW, "b"))
BACKENDS_WIDE = (Backend(HOME, drawn(4.0, 1), workers=2, price=1.0), *BACKENDS[1:])


@functools.cache
def overload(factor: float, *, guarded: bool = True) -> Outcomes:
    """2 s at half of what the gateway can do, 5 s at `factor` times what it can do, 6 s at half again."""
    random = Random(7)
    asked: list[Request] = []
    phases = ((PEAK / 2, 2.0), (factor * PEAK, 5.0), (PEAK / 2, 6.0))
    starts = itertools.accumulate((seconds for _, seconds in phases), initial=0.0)
    for (rate, seconds), from_s in zip(phases, starts, strict=False):
        asked += requests(
            BACKENDS_WIDE, rate=rate, seconds=seconds, left_ms=100.0, random=random, mix=MIX, from_s=from_s
        )
    at = Router([backend.facts() for backend in BACKENDS_WIDE], random=Random(1).random)
    admission = Admission(random=Random(3).random) if guarded else None
    return run(at, BACKENDS_WIDE, asked, front=FRONT, admission=admission)


def good_per_s(outcomes: Outcomes, from_s: float, until_s: float) -> float:
    """Answers in time."""
    good = sum(not a.shed and not a.late and from_s <= a.request.at_s < until_s for a in outcomes.answers)
    return good / (until_s - from_s)


def shed_share(outcomes: Outcomes, priority: Priority, from_s: float, until_s: float) -> float:
    inside = [a for a in outcomes.answers if a.request.priority is priority and from_s <= a.request.at_s < until_s]
    return sum(a.shed for a in inside) / len(inside)


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_goodput_stays_at_three_quarters_of_the_peak_under_overload_and_nobody_is_refused_a_second_after(factor: float):
    outcomes = overload(factor)
    assert good_per_s(outcomes, 3.5, 7.0) >= 0.75 * PEAK
    after = [a for a in outcomes.answers if a.request.at_s >= 8.0]
    assert not any(a.shed or a.late for a in after)


def test_low_priority_pays_first_and_high_last():
    outcomes = overload(2.0)
    high, normal, low = (shed_share(outcomes, p, 3.0, 7.0) for p in (Priority.HIGH, Priority.NORMAL, Priority.LOW))
    assert high < 0.1
    assert 0.1 < normal < 0.7
    assert low > 0.9


def test_without_admission_an_overload_outlives_its_cause():
    """What the admission is there for; should this pass one day without it, it can go."""
    outcomes = overload(2.0, guarded=False)
    assert good_per_s(outcomes, 7.0, 11.0) < 0.1 * PEAK
