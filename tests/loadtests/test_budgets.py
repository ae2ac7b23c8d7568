"""The default budgets are the product's promises, number for number."""

import json
import subprocess
import sys

import pytest

from loadtests.budgets import promise, small, surge

BY_ENDPOINT = {b.endpoint: b for b in promise().endpoints}


@pytest.mark.parametrize(
    ("endpoint", "p99_ms", "per_s"), [("/v1/recommend", 100, 40), ("/v1/search", 120, 10), ("/v1/events", 30, 10)]
)
def test_the_promise_is_what_was_promised(endpoint: str, p99_ms: float, per_s: float):
    budget = BY_ENDPOINT[endpoint]
    assert budget.p99_ms == p99_ms
    assert budget.error_share == 0
    assert budget.min_samples == 1000
    assert budget.at_least_per_s is not None
    assert 0.8 * per_s < budget.at_least_per_s < per_s
    assert budget.p50_ms is not None
    assert budget.p95_ms is not None
    assert budget.p50_ms < budget.p95_ms < p99_ms


def test_at_most_one_answer_in_a_hundred_may_step_down_and_events_have_no_ladder():
    assert BY_ENDPOINT["/v1/recommend"].below_best_share == 0.01
    assert BY_ENDPOINT["/v1/recommend"].ranked_at_least == 200
    assert BY_ENDPOINT["/v1/events"].below_best_share is None
    assert BY_ENDPOINT["/v1/events"].stage_p99_ms == {}


def test_a_small_run_keeps_the_targets_and_asks_for_fewer_samples():
    assert [b.p99_ms for b in small(20).endpoints] == [b.p99_ms for b in promise().endpoints]
    assert {b.min_samples for b in small(20).endpoints} == {20}
    with pytest.raises(ValueError, match="at least one sample"):
        small(0)


def test_a_surge_forgives_steps_down_and_nothing_else():
    for budget in surge().endpoints:
        assert budget.below_best_share is None
        assert budget.error_share == 0
        assert budget.p99_ms == BY_ENDPOINT[budget.endpoint].p99_ms


def test_the_suites_shapes_give_their_budgets_the_samples_they_ask_for():
    # Locust patches the process that imports it, so the shapes are looked at from another one
    program = """
import json
from loadtests.shapes import SmokeShape, SteadyShape, SpikeShape
print(json.dumps([[[p.seconds * p.users for p in s.phases], max(b.min_samples for b in s.held_to().endpoints),
                   s().tick()] for s in (SmokeShape, SteadyShape, SpikeShape)]))
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    warmup_s, rarest_share = 5, 10 / 60
    for arrivals, min_samples, (users, _) in json.loads(said):
        judged = sum(arrivals) - warmup_s * users
        assert judged * rarest_share > 1.15 * min_samples
