"""Who comes in under overload: priorities in order, tenants by share, and a limit that comes back."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from workloads.contract.slo import Priority
from workloads.gateway.admission import Admission, AdmissionPolicy, Admitted, Shed, ShedReason

LOW, NORMAL, HIGH = Priority.LOW, Priority.NORMAL, Priority.HIGH


def admission(**numbers: float) -> Admission:
    return Admission(AdmissionPolicy(**{"start": 20, **numbers}), random=Random(1).random)  # type: ignore[arg-type]


def fill(at: Admission, priority: Priority, tenant: str = "default", most: int = 1000) -> list[Admitted]:
    """Come in until somebody is turned away."""
    inside: list[Admitted] = []
    while len(inside) < most and isinstance(place := at.admit(priority, tenant, 0.0), Admitted):
        inside.append(place)
    return inside


def refusal(at: Admission, priority: Priority, tenant: str = "default") -> Shed:
    shed = at.admit(priority, tenant, 0.0)
    assert isinstance(shed, Shed)
    return shed


def test_low_priority_is_turned_away_first_and_high_last():
    at = admission()
    assert len(fill(at, LOW)) == 14
    assert len(fill(at, NORMAL)) == 4
    assert len(fill(at, HIGH)) == 2
    assert at.in_flight == at.limit == 20
    for priority in Priority:
        assert refusal(at, priority).reason is ShedReason.OVERLOADED
    assert {priority for _, priority in at.shed} == set(Priority)


def test_a_refusal_says_when_to_come_back_and_later_the_more_are_refused():
    at = admission()
    fill(at, HIGH)
    first = refusal(at, HIGH)
    assert first.status == 503
    assert 1 <= first.retry_after_s <= 3
    many = [refusal(at, HIGH).retry_after_s for _ in range(500)][-100:]
    assert first.retry_after_s < min(many)
    assert max(many) <= 30
    assert len(set(many)) > 1  # who was turned away together does not come back together


def come(at: Admission, priority: Priority, tenant: str = "default", now_s: float = 0.0) -> int:
    """How many of two hundred are let in."""
    return sum(at.let_in(priority, tenant, now_s) is None for _ in range(200))


def test_no_more_are_let_in_at_once_than_can_be_served_soon_and_as_many_with_the_next_turn():
    at = admission(at_once=10, at_once_refusing=10)
    assert [come(at, priority) for priority in (LOW, NORMAL, HIGH)] == [7, 2, 1]
    assert at.in_flight == 0  # whoever is let in holds no place until it asks for one
    at.turn()
    assert come(at, NORMAL) == 9


def test_nobody_is_let_in_for_whom_there_is_no_place():
    at = admission(at_once=100, at_once_refusing=100)
    fill(at, NORMAL)
    assert [come(at, priority) for priority in (LOW, NORMAL)] == [0, 0]
    assert at.let_in(HIGH, "default", 0.0) is None


def test_of_those_that_are_let_in_at_once_no_tenant_has_more_than_its_share():
    at = admission(at_once=20)
    assert [at.let_in(NORMAL, "greedy", 0.0) for _ in range(16)] == [None] * 16
    assert at.let_in(NORMAL, "modest", 0.0) is None
    shed = at.let_in(NORMAL, "greedy", 0.0)
    assert shed is not None
    assert (shed.reason, shed.status) == (ShedReason.TENANT_SHARE, 429)


def test_while_it_is_overloaded_fewer_are_let_in_at_once_until_nobody_had_to_be_turned_away_for_a_moment():
    at = admission(at_once=100, at_once_refusing=10)
    assert not at.refusing(0.0)
    assert come(at, NORMAL) == 90
    assert at.refusing(0.0)
    at.turn()
    assert come(at, NORMAL, now_s=0.2) == 9
    at.turn()
    assert not at.refusing(0.8)
    assert come(at, NORMAL, now_s=0.8) == 90


def test_one_who_is_turned_away_among_many_makes_no_overload():
    at = admission(at_once=10)
    for _ in range(20):
        assert [at.let_in(NORMAL, "default", 0.0) for _ in range(9)] == [None] * 9
        at.turn()
    fill(at, HIGH)
    assert at.let_in(NORMAL, "default", 0.0) is not None
    assert not at.refusing(0.0)


def test_a_tenant_alone_may_have_every_place():
    at = admission()
    assert len(fill(at, HIGH, "one")) == 20


def test_where_it_is_crowded_a_tenant_beyond_its_share_is_turned_away_with_429():
    at = admission()
    greedy = fill(at, NORMAL, "greedy", most=16)
    assert len(greedy) == 16
    modest = at.admit(NORMAL, "modest", 0.0)
    assert isinstance(modest, Admitted)
    shed = refusal(at, NORMAL, "greedy")
    assert (shed.reason, shed.status) == (ShedReason.TENANT_SHARE, 429)
    assert isinstance(at.admit(NORMAL, "modest", 0.0), Admitted)


def test_a_greedy_tenant_is_brought_down_to_its_share_while_others_ask():
    at = admission(start=40)
    random = Random(2)
    inside: list[Admitted] = []
    for step in range(4000):
        tenant = "greedy" if random.random() < 0.9 else random.choice(["b", "c"])
        if isinstance(place := at.admit(NORMAL, tenant, step / 1000.0), Admitted):
            inside.append(place)
        if len(inside) > 34:
            at.done(inside.pop(random.randrange(len(inside))), step / 1000.0, learn=False)
        if step == 3000:
            at.shed.clear()
    held = sum(place.tenant == "greedy" for place in inside)
    assert held <= 0.6 * len(inside)  # of nine tenths that it asked for
    assert at.shed.get((ShedReason.OVERLOADED, NORMAL), 0) == 0
    assert at.shed[ShedReason.TENANT_SHARE, NORMAL] > 0


def play(at: Admission, *, took_ms: float, together: int, seconds: float, from_s: float = 0.0) -> float:
    """So many at a time, each taking so long."""
    now_s = from_s
    while now_s < from_s + seconds:
        inside = [at.admit(HIGH, "default", now_s) for _ in range(together)]
        now_s += took_ms / 1000.0
        for place in inside:
            if isinstance(place, Admitted):
                at.done(place, now_s)
    return now_s


def test_the_limit_shrinks_while_answers_take_longer_than_their_promise_allows():
    at = admission(start=64)
    play(at, took_ms=200.0, together=64, seconds=5.0)
    assert at.limit == 8


def test_the_limit_grows_back_when_answers_are_in_time_and_places_are_used():
    at = admission(start=64)
    now_s = play(at, took_ms=200.0, together=64, seconds=5.0)
    play(at, took_ms=10.0, together=200, seconds=20.0, from_s=now_s)
    assert at.limit > 64


def test_a_limit_that_nobody_comes_near_stays():
    at = admission(start=64)
    play(at, took_ms=10.0, together=4, seconds=20.0)
    assert at.limit == 64


def test_a_neighbour_that_becomes_slow_within_the_promise_turns_nobody_away():
    at = admission(start=64)
    now_s = play(at, took_ms=4.0, together=10, seconds=10.0)
    play(at, took_ms=45.0, together=10, seconds=20.0, from_s=now_s)
    assert not at.shed


def test_what_a_request_lay_at_the_door_counts():
    at = admission(start=64)
    now_s = 0.0
    for _ in range(2000):
        place = at.admit(HIGH, "default", now_s, waited_s=0.2)
        assert isinstance(place, Admitted)
        now_s += 0.005
        at.done(place, now_s)
    assert at.limit < 20


@settings(max_examples=60, stateful_step_count=60)
class Churn(RuleBasedStateMachine):
    """Requests come and go in every order; places are neither lost nor given twice."""

    def __init__(self) -> None:
        super().__init__()
        self.at = admission()
        self.now_s = 0.0
        self.inside: list[Admitted] = []
        self.gone: list[Admitted] = []

    @rule(priority=st.sampled_from(Priority), tenant=st.sampled_from("abc"), step=st.floats(0.0, 0.2))
    def comes(self, priority: Priority, tenant: str, step: float) -> None:
        self.now_s += step
        limit = self.at.limit
        place = self.at.admit(priority, tenant, self.now_s)
        if isinstance(place, Admitted):
            assert len(self.inside) <= limit
            self.inside.append(place)
        else:
            assert 1 <= place.retry_after_s <= 30
            assert place.status in {429, 503}

    @precondition(lambda self: self.inside)
    @rule(data=st.data(), learn=st.booleans())
    def goes(self, data: st.DataObject, learn: bool) -> None:  # noqa: FBT001 - a drawn value
        place = self.inside.pop(data.draw(st.integers(0, len(self.inside) - 1)))
        self.at.done(place, self.now_s, learn=learn)
        self.gone.append(place)

    @precondition(lambda self: self.gone)
    @rule()
    def goes_twice(self) -> None:
        self.at.done(self.gone[-1], self.now_s)

    @invariant()
    def places_add_up(self) -> None:
        assert self.at.in_flight == len(self.inside)
        assert 8 <= self.at.limit <= 256


TestChurn = Churn.TestCase


@pytest.mark.parametrize("priority", list(Priority))
def test_an_empty_gateway_lets_everybody_in(priority: Priority):
    assert isinstance(admission(least=1, start=1).admit(priority, "anybody", 0.0), Admitted)
