"""Quantiles and sums are what the samples say, and nothing smooths them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.measures import OUTSIDE, measure, quantile, suspect
from loadtests.samples import Run, RunHeader, Sample

HEADER = RunHeader(suite="mix", started_ms=0.0, warmup_s=5.0, arrivals="poisson", rate_per_user=1.0, seed=1, targets=[])


def sample(latency_ms: float, **changes: object) -> Sample:
    fields: dict[str, object] = {
        "endpoint": "/v1/recommend",
        "site": "onprem",
        "at_s": 6.0,
        "latency_ms": latency_ms,
        "lateness_ms": 0.1,
        "status": 200,
    }
    return Sample(**(fields | changes))  # type: ignore[arg-type]  # the test's own keyword arguments


def run_of(*samples: Sample, seconds: float = 10.0) -> Run:
    return Run(header=HEADER, samples=list(samples), seconds=seconds)


def test_the_99th_percentile_of_one_to_a_hundred_is_99():
    values = [float(v) for v in range(1, 101)]
    assert quantile(values, 0.99) == 99.0
    assert quantile(values, 0.5) == 50.0
    assert quantile(values, 1.0) == 100.0


def test_one_slow_request_in_a_hundred_does_not_touch_p99_and_two_do():
    assert quantile([1.0] * 99 + [1000.0], 0.99) == 1.0
    assert quantile([1.0] * 98 + [1000.0] * 2, 0.99) == 1000.0


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=400), st.floats(0.001, 1))
def test_a_quantile_is_a_measured_value_that_at_least_that_share_does_not_exceed(values: list[float], share: float):
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert found in ordered
    assert sum(v <= found for v in ordered) >= share * len(ordered) - 1e-6
    assert sum(v < found for v in ordered) < share * len(ordered) + 1e-6


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_a_quantile_of_nothing_or_of_no_share_is_refused(values: list[float], share: float):
    with pytest.raises(ValueError, match=r"quantile of nothing|must be above 0"):
        quantile(values, share)


def test_failing_fast_does_not_improve_a_quantile():
    answered = [sample(50.0) for _ in range(90)]
    failed = [sample(0.5, status=503, error="http 503") for _ in range(10)]
    found = measure(run_of(*answered, *failed)).endpoints[0]
    assert found.p50_ms == 50.0
    assert found.p95_ms is None
    assert found.p99_ms is None
    assert found.errors == {"http 503": 10}


def test_warm_up_is_counted_and_left_out():
    found = measure(run_of(sample(900.0, at_s=1.0, warmup=True), sample(10.0)))
    assert found.warmup_requests == 1
    assert found.endpoints[0].max_ms == 10.0
    assert sum(b.requests for b in found.timeline) == 2, "the timeline shows all of it"


def test_the_curve_ends_at_the_slowest_answer_and_never_falls():
    rng = random.Random(3)
    found = measure(run_of(*(sample(rng.expovariate(0.1)) for _ in range(1000)))).endpoints[0]
    times = [ms for _, ms in found.curve]
    assert times == sorted(times)
    assert times[-1] == found.max_ms
    assert dict(found.curve)[found.curve[-1][0]] == found.max_ms
    assert math.isclose(found.curve[-1][0], 1 - 0.5 / 1000)


def test_sites_are_measured_apart_and_together():
    found = measure(run_of(sample(10.0), sample(30.0, site="aws"), sample(20.0)))
    assert [(m.site, m.requests) for m in found.sites] == [("aws", 1), ("onprem", 2)]
    assert found.endpoints[0].requests == 3
    assert found.endpoints[0].offered_per_s == 0.3


def test_answers_below_the_best_rung_of_their_site_are_counted_with_their_reasons():
    found = measure(
        run_of(
            sample(10.0, rung=1, best_rung=1),
            sample(10.0, rung=3, best_rung=1, reason="rank: late"),
            sample(10.0, rung=2, best_rung=2, site="aws"),
        )
    ).endpoints[0]
    assert found.below_best == 1
    assert found.reasons == {"rank: late": 1}
    assert found.rungs == {"1": 1, "2": 1, "3": 1}


def test_stages_come_in_the_order_of_a_request_and_leave_the_rest_to_outside():
    found = measure(run_of(sample(10.0, stages_ms={"rank": 4.0, "features": 1.0}))).endpoints[0]
    assert [s.stage for s in found.stages] == ["features", "rank", OUTSIDE]
    assert found.stages[-1].p50_ms == 5.0


def test_the_suspect_is_the_stage_that_the_slow_answers_waited_for():
    usual = [sample(20.0, stages_ms={"candidates": 10.0, "rank": 5.0}) for _ in range(95)]
    slow = [sample(120.0, stages_ms={"candidates": 10.0, "rank": 105.0}) for _ in range(5)]
    found = suspect(usual + slow, slower_than_ms=100.0)
    assert found is not None
    assert (found.stage, found.slow_answers, found.slow_ms, found.usual_ms) == ("rank", 5, 105.0, 5.0)


def test_time_lost_outside_all_stages_is_blamed_on_none_of_them():
    usual = [sample(20.0, stages_ms={"rank": 5.0}) for _ in range(95)]
    slow = [sample(500.0, stages_ms={"rank": 6.0}) for _ in range(5)]
    found = suspect(usual + slow, slower_than_ms=100.0)
    assert found is not None
    assert found.stage == OUTSIDE


def test_nobody_is_suspected_when_nothing_was_slow():
    assert suspect([sample(1.0, stages_ms={"rank": 1.0})], slower_than_ms=100.0) is None


def test_a_run_without_samples_is_measured_as_nothing():
    found = measure(run_of())
    assert found.requests == 0
    assert found.endpoints == []
    assert found.timeline == []
