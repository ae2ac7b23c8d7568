"""The router: one test per rule of its choice, drains and probes, and counters that survive every way to end."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workloads.gateway.router import Choice, Drained, Outcome, Route, RouteFacts, Router, RouterPolicy, Ticket

HOME, CLOUD, STUDENT = Route("onprem", 1), Route("aws", 1), Route("onprem", 2)
ROWS = 200
TAKES_MS = {HOME: 5.0, CLOUD: 15.0, STUDENT: 1.0}


def router(policy: RouterPolicy | None = None, *, parallel: int = 4, random: Random | None = None) -> Router:
    facts = [
        RouteFacts(CLOUD, price=5.0, parallel=16),
        RouteFacts(STUDENT, price=0.1, loss=0.04, parallel=parallel),
        RouteFacts(HOME, price=1.0, parallel=parallel),
    ]
    return Router(facts, policy, random=(random or Random(1)).random)


def call(at: Router, route: Route, ms: float, now_s: float, outcome: Outcome = Outcome.ANSWERED) -> float:
    """One call made for its own sake; the moment it ended."""
    choice = Choice(route, ROWS, 1000.0, 1000.0, 1000.0)
    ticket = at.began(choice, now_s)
    now_s += ms / 1000.0
    at.ended(ticket, outcome, now_s)
    return now_s


def warm(at: Router, *, calls: int = 100, takes_ms: dict[Route, float] | None = None) -> float:
    """Every route is known; the moment after."""
    now_s = 0.0
    for _ in range(calls):
        for route, ms in (takes_ms or TAKES_MS).items():
            now_s = call(at, route, ms, now_s) + 0.001
    return now_s


def chosen(at: Router, left_ms: float, now_s: float, **asked: object) -> Route | None:
    choice = at.choose(ROWS, left_ms, now_s, **asked)  # type: ignore[arg-type]  # as the test says
    return None if choice is None else choice.route


def test_the_best_rung_that_fits_is_chosen_before_a_cheaper_lower_one():
    at = router()
    assert chosen(at, 50.0, warm(at)) == HOME


def test_within_a_rung_the_cheapest_site_is_chosen_though_another_is_quicker():
    at = router()
    now_s = warm(at, takes_ms={HOME: 20.0, CLOUD: 5.0, STUDENT: 1.0})
    assert chosen(at, 50.0, now_s) == HOME


def test_the_dearer_site_gets_what_the_cheap_one_cannot_finish():
    at = router()
    now_s = warm(at, takes_ms={HOME: 40.0, CLOUD: 15.0, STUDENT: 1.0})
    assert chosen(at, 30.0, now_s) == CLOUD


def test_calls_in_flight_count_so_that_a_burst_overflows():
    at = router(parallel=1)
    now_s = warm(at)
    went = []
    for _ in range(12):
        choice = at.choose(ROWS, 30.0, now_s)
        assert choice is not None
        at.began(choice, now_s)
        went.append(choice.route)
    # 5 ms each, one after the other, and a fallback kept: five fit into 30 ms
    assert went == [HOME] * 5 + [CLOUD] * 7


def test_what_fits_on_no_route_of_the_best_rung_steps_down():
    at = router()
    now_s = warm(at)
    assert chosen(at, 3.0, now_s) == STUDENT
    assert chosen(at, 0.5, now_s) is None


def test_a_client_may_ask_for_a_lower_rung():
    at = router()
    now_s = warm(at)
    assert chosen(at, 50.0, now_s, best_rung=2) == STUDENT
    assert chosen(at, 50.0, now_s, best_rung=3) is None


def test_excluded_routes_are_not_chosen():
    at = router()
    now_s = warm(at)
    assert chosen(at, 50.0, now_s, exclude=(HOME,)) == CLOUD
    assert chosen(at, 50.0, now_s, exclude=(HOME, CLOUD)) == STUDENT


def test_at_equal_price_the_earlier_finish_wins():
    at = Router(
        [RouteFacts(HOME, price=1.0, parallel=4), RouteFacts(CLOUD, price=1.0, parallel=4)], random=Random(1).random
    )
    assert chosen(at, 50.0, warm(at, takes_ms={HOME: 9.0, CLOUD: 3.0})) == CLOUD


def test_a_site_that_leaves_time_to_step_down_is_preferred():
    at = router()
    now_s = warm(at, takes_ms={HOME: 25.0, CLOUD: 15.0, STUDENT: 8.0})
    assert chosen(at, 50.0, now_s) == HOME
    assert chosen(at, 30.0, now_s) == CLOUD  # 25 ms fit, but after them there is no time for the student
    assert chosen(at, 30.0, now_s, exclude=(CLOUD,)) == HOME  # and that is better than the student at once


def test_with_a_price_of_loss_a_cheap_rung_may_win():
    mild, strict = RouterPolicy(loss_price=10.0), RouterPolicy(loss_price=100.0)
    for policy, expected in ((mild, STUDENT), (strict, HOME)):  # 0.1 + 10 x 0.04 < 1.0 < 0.1 + 100 x 0.04
        at = router(policy)
        assert chosen(at, 50.0, warm(at)) == expected


def test_a_call_that_was_called_off_at_once_says_nothing_of_an_unknown_route():
    at = router()
    call(at, HOME, 0.5, 0.0, Outcome.CANCELLED)
    choice = at.choose(ROWS, 50.0, 1.0)
    assert choice is not None
    assert choice.predicted_ms == 10.0


def test_large_calls_are_predicted_from_small_ones_until_they_are_known():
    at = router()
    now_s = warm(at)
    large = at.choose(800, 50.0, now_s)
    assert large is not None
    assert large.route == HOME
    assert large.predicted_ms == pytest.approx(20.0, rel=0.15)


def test_the_budget_leaves_the_fallback_its_time():
    at = router()
    choice = at.choose(ROWS, 50.0, warm(at))
    assert choice is not None
    assert choice.fallback == STUDENT
    assert choice.budget_ms == pytest.approx(50.0 - 1.25 * 1.0, rel=0.05)


def test_a_route_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Router([RouteFacts(HOME), RouteFacts(HOME)], random=Random(1).random)


def test_a_slow_route_is_drained_although_it_answers():
    at = router()
    now_s = warm(at)
    for _ in range(12):
        now_s = call(at, HOME, 80.0, now_s)
    assert chosen(at, 500.0, now_s) == CLOUD
    assert next(s for s in at.states(now_s) if s.route == HOME).drained is Drained.SLOW


def test_a_stopped_route_is_left_without_a_single_answer():
    at = router(parallel=16)
    now_s = warm(at)
    went = []
    for _ in range(100):
        choice = at.choose(ROWS, 60.0, now_s)
        assert choice is not None
        if choice.route == HOME:
            at.began(choice, now_s)
        went.append(choice.route)
        now_s += 0.01
    assert went[0] == HOME
    assert HOME not in went[40:]


def test_failures_in_a_row_drain_a_route_and_good_probes_bring_it_back():
    at = router()
    now_s = warm(at)
    for _ in range(8):
        now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
    assert next(s for s in at.states(now_s) if s.route == HOME).drained is Drained.FAILING
    probes = 0
    for _ in range(200):
        now_s += 0.01
        choice = at.choose(ROWS, 60.0, now_s)
        assert choice is not None
        if choice.probe:
            probes += 1
            assert choice.route == HOME
            assert choice.fallback is not None
        ticket = at.began(choice, now_s)
        at.ended(ticket, Outcome.ANSWERED, now_s + TAKES_MS[choice.route] / 1000.0)
    assert probes == 4
    assert next(s for s in at.states(now_s) if s.route == HOME).drained is None
    assert chosen(at, 60.0, now_s + 1.0) == HOME


def test_traffic_comes_back_in_steps():
    at = router(random=Random(4))
    now_s = warm(at)
    for _ in range(8):
        now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
    while next(s for s in at.states(now_s) if s.route == HOME).drained:
        now_s += 0.01
        choice = at.choose(ROWS, 60.0, now_s)
        assert choice is not None
        at.ended(at.began(choice, now_s), Outcome.ANSWERED, now_s + 0.005)
    at_once = sum(chosen(at, 60.0, now_s) == HOME for _ in range(200))
    later = sum(chosen(at, 60.0, now_s + 0.5) == HOME for _ in range(200))
    assert 5 < at_once < 40 < later < 120
    assert all(chosen(at, 60.0, now_s + 1.0) == HOME for _ in range(50))


def test_only_requests_with_room_for_a_fallback_probe():
    at = router()
    now_s = warm(at, takes_ms={HOME: 5.0, STUDENT: 10.0})
    for _ in range(8):
        now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
    now_s += 1.0
    tight = at.choose(ROWS, 22.0, now_s, exclude=(CLOUD,))
    roomy = at.choose(ROWS, 60.0, now_s, exclude=(CLOUD,))
    assert tight is not None
    assert not tight.probe
    assert roomy is not None
    assert roomy.probe
    assert roomy.budget_ms <= 60.0 - 2 * 10.0 * 0.9


def test_probes_are_one_at_a_time_and_a_small_share():
    at = router()
    now_s = warm(at)
    for _ in range(8):
        now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
    probes = 0
    out: list[Ticket] = []
    for _ in range(3000):
        now_s += 0.001
        if out and now_s - out[0].began_s > 0.05:
            at.ended(out.pop(), Outcome.LATE, now_s)
        choice = at.choose(ROWS, 60.0, now_s)
        assert choice is not None
        if choice.probe:
            assert not out
            probes += 1
            out.append(at.began(choice, now_s))
    assert 3 <= probes <= 3 / 0.5 + 4


def test_a_relapse_asks_for_more_good_probes():
    at = router()
    now_s = warm(at)
    needed = []
    for _ in range(3):
        for _ in range(8):
            now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
        probes = 0
        while next(s for s in at.states(now_s) if s.route == HOME).drained:
            now_s += 0.01
            choice = at.choose(ROWS, 60.0, now_s)
            assert choice is not None
            probes += choice.probe
            at.ended(at.began(choice, now_s), Outcome.ANSWERED, now_s + 0.005)
        needed.append(probes)
    assert needed == [4, 8, 16]


def test_a_route_that_did_not_fit_proves_itself_again():
    at = router()
    now_s = warm(at, takes_ms={HOME: 45.0, CLOUD: 5.0})
    assert chosen(at, 30.0, now_s) == CLOUD
    for _ in range(600):
        now_s += 0.01
        choice = at.choose(ROWS, 30.0, now_s)
        assert choice is not None
        at.ended(at.began(choice, now_s), Outcome.ANSWERED, now_s + 0.005)
    assert chosen(at, 30.0, now_s) == HOME


def test_a_probe_that_its_caller_lost_does_not_keep_a_route_drained_for_ever():
    at = router()
    now_s = warm(at)
    for _ in range(8):
        now_s = call(at, HOME, 0.2, now_s, Outcome.FAILED)
    now_s += 1.0
    lost = at.choose(ROWS, 60.0, now_s)
    assert lost is not None
    assert lost.probe
    at.began(lost, now_s)
    assert chosen(at, 60.0, now_s + 30.0) == CLOUD
    assert chosen(at, 60.0, now_s + 90.0) == HOME


def test_a_hedge_begins_when_the_deadline_is_in_danger_and_not_before_the_quantile():
    at = router()
    now_s = warm(at)
    roomy = at.choose(ROWS, 60.0, now_s)
    assert roomy is not None
    assert roomy.hedge_after_ms == pytest.approx(60.0 - 1.25 * 15.0, rel=0.05)
    tight = at.choose(ROWS, 20.0, now_s)
    assert tight is not None
    assert tight.hedge_after_ms == tight.predicted_ms


def test_hedges_go_to_another_site_within_the_budget():
    at = router()
    now_s = warm(at)
    hedges = 0
    for _ in range(1000):
        now_s += 0.01
        choice = at.choose(ROWS, 60.0, now_s)
        assert choice is not None
        ticket = at.began(choice, now_s)
        second = at.hedge(ticket, 40.0, now_s)
        if second is not None:
            hedges += 1
            assert second.route == CLOUD
            at.ended(at.began(second, now_s), Outcome.CANCELLED, now_s + 0.002)
        at.ended(ticket, Outcome.ANSWERED, now_s + 0.005)
    assert hedges <= 0.05 * (1000 + 300) + 1
    assert hedges == at.hedges.taken


def test_no_hedge_where_the_step_down_will_do():
    at = router()
    now_s = warm(at)
    choice = at.choose(ROWS, 60.0, now_s, exclude=(CLOUD,))
    assert choice is not None
    ticket = at.began(choice, now_s)
    assert at.hedge(ticket, 30.0, now_s + 0.03, exclude=(CLOUD,)) is None


def test_a_retry_at_the_same_rung_costs_a_token_and_a_step_down_does_not():
    at = router()
    now_s = warm(at, calls=31)
    first = at.choose(ROWS, 60.0, now_s)
    assert first is not None
    went = [at.retry(first, 50.0, now_s) for _ in range(20)]
    routes = [choice.route for choice in went if choice is not None]
    tokens = 9  # of 3 x 31 first calls, a tenth
    assert routes == [CLOUD] * tokens + [STUDENT] * (20 - tokens)
    assert all(choice is not None and choice.extra and not choice.probe for choice in went)


def test_a_late_retry_goes_only_where_it_fits():
    at = router()
    now_s = warm(at)
    first = at.choose(ROWS, 60.0, now_s)
    assert first is not None
    assert (second := at.retry(first, 2.0, now_s)) is not None
    assert second.route == STUDENT
    assert at.retry(first, 0.2, now_s) is None


def test_predictions_of_a_steady_route_are_calibrated():
    at = router(parallel=1)
    random = Random(3)
    now_s = 0.0
    for _ in range(5000):
        now_s += 0.02
        choice = at.choose(ROWS, 100.0, now_s)
        assert choice is not None
        at.ended(at.began(choice, now_s), Outcome.ANSWERED, now_s + random.lognormvariate(1.5, 0.4) / 1000.0)
    assert at.calibration.share_within == pytest.approx(0.95, abs=0.01)


@settings(max_examples=60, stateful_step_count=60)
class Churn(RuleBasedStateMachine):
    """Calls begin and end in every way and order, and what is counted stays true."""

    def __init__(self) -> None:
        super().__init__()
        self.at = router(parallel=2)
        self.now_s = 0.0
        self.out: list[Ticket] = []
        self.over: list[Ticket] = []
        self.firsts = 0

    @rule(step=st.floats(min_value=0.0, max_value=2.0))
    def time_passes(self, step: float) -> None:
        self.now_s += step

    @rule(left=st.floats(min_value=-5.0, max_value=500.0), rows=st.integers(1, 1024), begins=st.booleans())
    def asks(self, left: float, rows: int, begins: bool) -> None:  # noqa: FBT001 - a drawn value
        choice = self.at.choose(rows, left, self.now_s)
        if choice is None:
            return
        assert choice.probe or choice.predicted_ms <= left
        assert choice.budget_ms <= left
        if begins:
            self.firsts += 1
            self.out.append(self.at.began(choice, self.now_s))

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def ends(self, data: st.DataObject, outcome: Outcome) -> None:
        ticket = self.out.pop(data.draw(st.integers(0, len(self.out) - 1)))
        self.at.ended(ticket, outcome, self.now_s)
        self.over.append(ticket)

    @precondition(lambda self: self.over)
    @rule(outcome=st.sampled_from(Outcome))
    def ends_twice(self, outcome: Outcome) -> None:
        self.at.ended(self.over[-1], outcome, self.now_s)

    @precondition(lambda self: self.out)
    @rule(left=st.floats(min_value=0.0, max_value=200.0), again=st.booleans())
    def asks_for_more(self, left: float, again: bool) -> None:  # noqa: FBT001 - as above
        ticket = self.out[0]
        second = self.at.retry(ticket.choice, left, self.now_s) if again else self.at.hedge(ticket, left, self.now_s)
        if second is not None:
            assert second.route != ticket.choice.route
            self.out.append(self.at.began(second, self.now_s))

    @invariant()
    def in_flight_is_what_is_out(self) -> None:
        states = {state.route: state for state in self.at.states(self.now_s)}
        for route, state in states.items():
            assert state.in_flight == sum(ticket.choice.route == route for ticket in self.out)
            assert 0.0 <= state.error_share <= 1.0
            assert state.predicted_ms > 0.0
        assert self.at.hedges.taken <= 0.05 * self.firsts + 1e-6
        assert self.at.retries.taken <= 0.1 * self.firsts + 1e-6


TestChurn = Churn.TestCase
