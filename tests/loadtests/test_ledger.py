"""One outcome for each request, whatever became of it, and sums that show a request that got lost."""

from __future__ import annotations

import pytest

from loadtests.ledger import Outcome, is_late, ledger, outcome
from loadtests.samples import Sample


def a_sample(
    status: int = 200,
    *,
    error: str | None = None,
    rung: int | None = 1,
    latency_ms: float = 20.0,
    problem: str | None = None,
    at_s: float = 0.0,
    endpoint: str = "/v1/recommend",
    ranked_at: str | None = "onprem",
) -> Sample:
    return Sample(
        endpoint=endpoint,
        site="onprem",
        at_s=at_s,
        latency_ms=latency_ms,
        lateness_ms=0.1,
        status=status,
        error=error,
        rung=rung if status == 200 else None,
        best_rung=1,
        problem=problem,
        sent_to="onprem",
        ranked_at=ranked_at if status == 200 else None,
    )


@pytest.mark.parametrize(
    ("sample", "expected"),
    [
        (a_sample(), Outcome.OK),
        (a_sample(rung=3), Outcome.DEGRADED),
        (a_sample(error="9 items instead of 10"), Outcome.WRONG),
        (a_sample(503, error="http 503: Busy"), Outcome.REJECTED),
        (a_sample(0, error="timeout"), Outcome.TIMED_OUT),
        (a_sample(0, error="timeout: no connection was free"), Outcome.TIMED_OUT),
        (a_sample(0, error="connection broke"), Outcome.BROKEN),
        (a_sample(0), Outcome.BROKEN),
    ],
)
def test_every_request_has_one_outcome(sample: Sample, expected: Outcome):
    assert outcome(sample) is expected


def test_a_ledger_balances_until_a_request_is_missing_or_answered_twice():
    samples = [a_sample(), a_sample(rung=3), a_sample(503, error="busy", problem="/problems/busy"), a_sample(0)]
    whole = ledger(samples, sent=4)
    assert whole.balances
    assert whole.rejected == {"503 /problems/busy": 1}
    assert not ledger(samples, sent=5).balances
    assert not ledger(samples, sent=4, stray=1).balances
    assert whole.said() == "4 sent = 1 ok + 1 degraded + 1 rejected + 1 broken"


def test_a_refusal_without_a_type_is_counted_as_such():
    found = ledger([a_sample(502, error="http 502"), a_sample(429, error="x", problem="/problems/slow-down")], sent=2)
    assert (found.untyped, found.refused) == (1, 2)


def test_a_request_is_late_past_its_endpoints_promise_and_when_nobody_answered_it():
    assert not is_late(a_sample(latency_ms=99.0))
    assert is_late(a_sample(latency_ms=101.0))
    assert is_late(a_sample(0, latency_ms=5.0))
    assert not is_late(a_sample(latency_ms=101.0, endpoint="/v1/search"))
