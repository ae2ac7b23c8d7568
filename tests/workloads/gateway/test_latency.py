"""The histogram whose evidence fades, the budgets, and the record of predictions that came true."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.gateway.budgets import TokenBudget
from workloads.gateway.calibration import Calibration
from workloads.gateway.latency import LONGEST_MS, DecayedHistogram

STEP = 2 ** (1 / 6)
"""One bucket's width."""

latencies = st.floats(min_value=0.2, max_value=50_000.0)


def steady(histogram: DecayedHistogram, ms: float, *, per_s: float, seconds: float, from_s: float = 0.0) -> float:
    """So many equal calls a second; the moment of the last."""
    now_s = from_s
    for _ in range(round(per_s * seconds)):
        now_s += 1.0 / per_s
        histogram.observe(ms, now_s)
    return now_s


def test_without_evidence_there_is_no_quantile():
    histogram = DecayedHistogram()
    assert histogram.quantile(0.95) is None
    assert histogram.share_over(1.0) == 0.0


@given(st.lists(latencies, min_size=1, max_size=200), st.floats(min_value=0.05, max_value=0.99))
def test_a_quantile_is_right_to_a_bucket(values: list[float], share: float):
    histogram = DecayedHistogram(half_life_s=1e9)
    for value in values:
        histogram.observe(value, 0.0)
    found = histogram.quantile(share)
    assert found is not None
    rank = min(max(round(share * len(values) + 0.4999), 1), len(values))
    ordered = sorted(values)
    around = ordered[max(rank - 2, 0)], ordered[min(rank, len(values) - 1)]
    assert around[0] / STEP <= found <= around[1] * STEP


@given(st.lists(latencies, min_size=1, max_size=50))
def test_quantiles_rise_with_their_share(values: list[float]):
    histogram = DecayedHistogram()
    for at, value in enumerate(values):
        histogram.observe(value, at / 100.0)
    quantiles = [histogram.quantile(share) or 0.0 for share in (0.1, 0.5, 0.9, 0.95, 0.99, 1.0)]
    assert quantiles == sorted(quantiles)


def test_a_backend_ten_times_slower_shows_in_the_quantile_within_a_fifth_of_a_second():
    histogram = DecayedHistogram(half_life_s=2.0)
    now_s = steady(histogram, 5.0, per_s=100, seconds=30)
    assert (histogram.quantile(0.95) or 0.0) < 6.0
    steady(histogram, 50.0, per_s=100, seconds=0.2, from_s=now_s)
    assert (histogram.quantile(0.95) or 0.0) > 40.0


def test_a_backend_that_is_fast_again_is_believed_within_ten_half_lives():
    histogram = DecayedHistogram(half_life_s=2.0)
    now_s = steady(histogram, 50.0, per_s=100, seconds=30)
    steady(histogram, 5.0, per_s=100, seconds=10, from_s=now_s)
    assert (histogram.quantile(0.95) or 0.0) < 6.0


def test_one_outlier_after_a_quiet_hour_is_not_the_quantile():
    histogram = DecayedHistogram(half_life_s=2.0)
    now_s = 0.0
    for _ in range(60):
        now_s += 60.0
        histogram.observe(5.0, now_s)
    histogram.observe(500.0, now_s + 3600.0)
    assert (histogram.quantile(0.95) or 0.0) < 6.0
    histogram.observe(500.0, now_s + 3601.0)
    assert (histogram.quantile(0.95) or 0.0) > 400.0


def test_what_is_known_stays_known_while_nobody_calls():
    histogram = DecayedHistogram()
    steady(histogram, 5.0, per_s=100, seconds=1)
    before = histogram.quantile(0.95)
    histogram.observe(5.0, 1e6)
    assert histogram.quantile(0.95) == pytest.approx(before)


def test_weights_are_renewed_before_they_overflow():
    histogram = DecayedHistogram(half_life_s=0.001)
    steady(histogram, 5.0, per_s=10, seconds=2000)
    assert histogram.samples == pytest.approx(1 / (1 - 2 ** (-1 / 16)), rel=0.01)
    assert (histogram.quantile(0.95) or 0.0) < 6.0


def test_a_call_given_up_counts_as_the_double_where_nothing_longer_is_known():
    histogram = DecayedHistogram()
    steady(histogram, 5.0, per_s=100, seconds=1)
    for at in range(20):
        histogram.observe_at_least(50.0, 1.0 + at / 100.0)
    assert 90.0 < (histogram.quantile(0.95) or 0.0) < 110.0


def test_an_impatient_client_does_not_make_a_neighbour_look_slow():
    histogram = DecayedHistogram()
    random = Random(1)
    now_s = 0.0
    for _ in range(2000):
        now_s += 0.01
        took = random.lognormvariate(2.0, 0.4)
        if random.random() < 0.3:
            histogram.observe_at_least(min(1.0, took), now_s)
        else:
            histogram.observe(took, now_s)
    # exp(2 + 1.645 x 0.4)
    assert histogram.quantile(0.95) == pytest.approx(14.3, rel=0.25)


@given(st.lists(st.tuples(st.floats(min_value=0.0, max_value=1e7), st.floats(min_value=-5.0, max_value=5.0))))
def test_clocks_that_jump_and_absurd_latencies_do_no_harm(samples: list[tuple[float, float]]):
    histogram = DecayedHistogram()
    now_s = 0.0
    for ms, step in samples:
        now_s += step
        histogram.observe(ms, now_s)
        histogram.observe_at_least(ms, now_s)
        assert 0.0 < (histogram.quantile(0.95) or 0.0) <= LONGEST_MS * STEP
        assert 0.0 <= histogram.share_over(ms) <= 1.0


@given(
    st.floats(min_value=0.0, max_value=1.0),
    st.floats(min_value=1.0, max_value=20.0),
    st.lists(st.sampled_from(["call", "take"]), max_size=300),
)
def test_a_budget_never_gives_more_than_its_share_and_one_burst(share: float, burst: float, steps: list[str]):
    budget = TokenBudget(share, burst)
    for step in steps:
        if step == "call":
            budget.earned()
        else:
            could = budget.left
            assert budget.take() == could
        assert budget.taken <= share * budget.calls + 1e-6


def test_a_quiet_hour_pays_for_one_burst_and_no_storm():
    budget = TokenBudget(share=0.05, burst=10.0)
    for _ in range(100_000):
        budget.earned()
    assert sum(budget.take() for _ in range(1000)) == 10


@pytest.mark.parametrize(("share", "burst"), [(-0.1, 10.0), (1.1, 10.0), (0.05, 0.5)])
def test_a_budget_that_makes_no_sense_is_refused(share: float, burst: float):
    with pytest.raises(ValueError, match="a budget of"):
        TokenBudget(share, burst)


def test_calibration_counts_kept_predictions_by_what_was_predicted():
    calibration = Calibration()
    assert calibration.share_within is None
    for predicted, within in [(3.0, True), (3.5, False), (30.0, True), (0.0, True), (1e9, False)]:
        calibration.observe(predicted, within=within)
    assert calibration.calls == 5
    assert calibration.share_within == pytest.approx(3 / 5)
    assert [(row.above_ms, row.up_to_ms, row.calls, row.within) for row in calibration.rows()][:2] == [
        (0.0, 0.125, 1, 1),
        (2.0, 4.0, 2, 1),
    ]
