"""Which rung with how much time: the shares of a deadline, and the memory of a lost neighbour."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from workloads.contract.slo import ANSWER_RESERVE_MS, DEADLINE_MS, STAGE_P99_MS, Endpoint, Stage
from workloads.gateway.ladder import (
    BEST_RUNG,
    FAILURES_IN_A_ROW,
    PROBE_FIRST_S,
    PROBE_LAST_S,
    Circuit,
    Leave,
    Reason,
    candidates_budget_ms,
    counts_as_late,
    rank_budget_ms,
    ranks,
)

deadlines = st.floats(min_value=1.0, max_value=60_000.0)
spans = st.floats(min_value=0.0, max_value=100_000.0)


@given(deadlines, spans)
def test_no_budget_reaches_into_the_reserve_for_the_answer(deadline: float, spent: float):
    left = deadline - ANSWER_RESERVE_MS - spent
    for budget in (
        candidates_budget_ms(deadline, spent, ranked_after=True),
        candidates_budget_ms(deadline, spent, ranked_after=False),
        rank_budget_ms(deadline, spent),
    ):
        assert budget <= left + 1e-6


@given(deadlines)
def test_candidates_and_rank_at_their_latest_still_leave_the_reserve(deadline: float):
    candidates = candidates_budget_ms(deadline, 0.0, ranked_after=True)
    rank = rank_budget_ms(deadline, max(candidates, 0.0))
    assert max(candidates, 0.0) + max(rank, 0.0) <= max(deadline - ANSWER_RESERVE_MS, 0.0) + 1e-6


@given(deadlines, spans)
def test_without_ranking_candidates_may_use_all_that_is_left(deadline: float, spent: float):
    alone = candidates_budget_ms(deadline, spent, ranked_after=False)
    assert alone == deadline - ANSWER_RESERVE_MS - spent
    assert candidates_budget_ms(deadline, spent, ranked_after=True) <= alone


def test_the_default_deadline_gives_stages_at_least_what_they_promise():
    deadline = DEADLINE_MS[Endpoint.RECOMMEND]
    assert candidates_budget_ms(deadline, 0.0, ranked_after=True) >= STAGE_P99_MS[Stage.CANDIDATES]
    assert rank_budget_ms(deadline, STAGE_P99_MS[Stage.CANDIDATES]) >= STAGE_P99_MS[Stage.RANK]


def test_a_ranker_that_takes_80_ms_is_beyond_its_share_of_the_default_deadline():
    assert rank_budget_ms(DEADLINE_MS[Endpoint.RECOMMEND], 0.0) < 80.0


def test_only_recommend_passes_the_ranker_where_a_bundle_says_nothing_else():
    assert [path for path, rung in BEST_RUNG.items() if ranks(rung)] == ["/v1/recommend"]


def test_who_asks_in_haste_does_not_make_a_neighbour_late():
    assert counts_as_late(Stage.RANK, STAGE_P99_MS[Stage.RANK])
    assert not counts_as_late(Stage.RANK, 5.0)


def fail(circuit: Circuit, now_s: float, times: int = FAILURES_IN_A_ROW) -> None:
    for _ in range(times):
        circuit.failed(Reason.RANKER_LATE, circuit.leave(now_s), now_s)


def test_a_circuit_opens_after_failures_in_a_row_and_says_why():
    circuit = Circuit()
    fail(circuit, 0.0, FAILURES_IN_A_ROW - 1)
    assert circuit.leave(0.0) is Leave.CALL
    assert circuit.failed(Reason.RANKER_DOWN, Leave.CALL, 0.0)
    assert circuit.leave(0.0) is Leave.NO
    assert circuit.reason is Reason.RANKER_DOWN


def test_failures_between_successes_never_open_a_circuit():
    circuit = Circuit()
    for _ in range(10):
        fail(circuit, 0.0, FAILURES_IN_A_ROW - 1)
        circuit.succeeded()
    assert circuit.leave(0.0) is Leave.CALL


def test_one_probe_at_a_time_finds_out_whether_a_neighbour_is_back():
    circuit = Circuit()
    fail(circuit, 0.0)
    assert circuit.leave(PROBE_FIRST_S / 2) is Leave.NO
    assert circuit.leave(PROBE_FIRST_S) is Leave.PROBE
    assert circuit.leave(PROBE_FIRST_S) is Leave.NO
    assert circuit.succeeded()
    assert circuit.leave(PROBE_FIRST_S) is Leave.CALL
    assert circuit.reason is None


def test_a_probe_that_was_called_off_lets_the_next_one_go():
    circuit = Circuit()
    fail(circuit, 0.0)
    given = circuit.leave(1.0)
    circuit.abandoned(given)
    assert circuit.leave(1.0) is Leave.PROBE


def test_an_old_call_that_fails_late_does_not_end_a_probe():
    circuit = Circuit()
    old = circuit.leave(0.0)
    fail(circuit, 0.0)
    assert circuit.leave(PROBE_FIRST_S) is Leave.PROBE
    circuit.failed(Reason.RANKER_LATE, old, PROBE_FIRST_S)
    assert circuit.leave(PROBE_FIRST_S) is Leave.NO


@settings(max_examples=50)
@given(st.integers(min_value=0, max_value=50))
def test_recovery_is_noticed_within_a_second_however_long_the_neighbour_was_gone(probes: int):
    circuit, now = Circuit(), 0.0
    fail(circuit, now)
    for _ in range(probes):
        while (given := circuit.leave(now)) is Leave.NO:
            now += 0.01
        circuit.failed(Reason.RANKER_DOWN, given, now)
    back = now
    while circuit.leave(now) is Leave.NO:
        now += 0.01
    assert now - back <= PROBE_LAST_S + 0.02 < 1.0


class CircuitMachine(RuleBasedStateMachine):
    """Calls begin, end well or badly, or are called off, in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.circuit = Circuit()
        self.now = 0.0
        self.probes = 0

    calls = Bundle("calls")

    @rule(target=calls, wait=st.floats(min_value=0, max_value=1))
    def begin(self, wait: float) -> Leave:
        self.now += wait
        open_before = self.circuit.reason is not None
        given = self.circuit.leave(self.now)
        assert (given is Leave.CALL) == (not open_before)
        if given is Leave.PROBE:
            assert self.probes == 0
            self.probes += 1
        return given

    @rule(given=consumes(calls))
    def end_well(self, given: Leave) -> None:
        if given is not Leave.NO:
            self.circuit.succeeded()
            self.probes = 0  # whoever succeeded, the neighbour is back
            assert self.circuit.reason is None

    @rule(given=consumes(calls))
    def end_badly(self, given: Leave) -> None:
        if given is Leave.PROBE and self.circuit.reason is None:
            return  # a probe whose circuit another call closed: begin again from there
        if given is not Leave.NO:
            self.circuit.failed(Reason.RANKER_LATE, given, self.now)
        if given is Leave.PROBE:
            self.probes = 0

    @precondition(lambda self: self.circuit.reason is None)
    @rule()
    def call_freely(self) -> None:
        assert self.circuit.leave(self.now) is Leave.CALL

    @invariant()
    def never_locked_for_ever(self) -> None:
        if self.probes == 0 and self.circuit.reason is not None:
            assert self.circuit.leave(self.now + PROBE_LAST_S + 1e-6) is Leave.PROBE
            self.circuit.abandoned(Leave.PROBE)


TestCircuitMachine = CircuitMachine.TestCase


@pytest.mark.parametrize("reason", list(Reason))
def test_reasons_are_plain_words_for_a_metrics_label(reason: Reason):
    assert reason.value.replace("_", "").isalpha()
