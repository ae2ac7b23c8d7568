"""What `/metrics` says."""

from __future__ import annotations

import os

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families

from workloads.contract.slo import DEADLINE_MS, STAGE_P99_MS
from workloads.telemetry import metrics


def samples(registry: CollectorRegistry) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    body, _ = metrics.render(registry)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(body.decode())
        for sample in family.samples
    }


def test_a_stage_of_three_milliseconds_lands_in_the_three_millisecond_bucket():
    registry = CollectorRegistry()
    metrics.StageMetrics(registry).stage("/v1/recommend", "rank", 3.0)
    seen = samples(registry)
    labels = (("endpoint", "/v1/recommend"), ("le", "0.003"), ("stage", "rank"))
    below = (("endpoint", "/v1/recommend"), ("le", "0.002"), ("stage", "rank"))
    assert seen["rankbridge_stage_seconds_bucket", labels] == 1
    assert seen["rankbridge_stage_seconds_bucket", below] == 0


def test_every_promise_is_an_edge_of_a_bucket():
    assert set(DEADLINE_MS.values()) | set(STAGE_P99_MS.values()) <= set(metrics.BUCKETS_MS)
    assert list(metrics.BUCKETS_MS) == sorted(set(metrics.BUCKETS_MS))


def test_answers_are_counted_by_rung_and_reason():
    registry = CollectorRegistry()
    stage_metrics = metrics.StageMetrics(registry)
    stage_metrics.answer("/v1/recommend", 1)
    stage_metrics.answer("/v1/recommend", 3, "ranker_late")
    stage_metrics.answer("/v1/recommend", 3, "ranker_late")
    stage_metrics.response("/v1/recommend", 200)
    seen = samples(registry)
    assert (
        seen["rankbridge_answers_total", (("endpoint", "/v1/recommend"), ("reason", "ranker_late"), ("rung", "3"))] == 2
    )
    assert seen["rankbridge_answers_total", (("endpoint", "/v1/recommend"), ("reason", ""), ("rung", "1"))] == 1
    assert seen["rankbridge_responses_total", (("endpoint", "/v1/recommend"), ("status", "200"))] == 1


def test_a_request_that_raises_leaves_nothing_in_flight():
    registry = CollectorRegistry()
    stage_metrics = metrics.StageMetrics(registry)
    with pytest.raises(ZeroDivisionError), stage_metrics.in_flight("e"):
        raise ZeroDivisionError
    seen = samples(registry)
    assert seen["rankbridge_in_flight", (("endpoint", "e"),)] == 0


def test_two_applications_in_one_process_share_no_counter():
    first, second = CollectorRegistry(), CollectorRegistry()
    metrics.StageMetrics(first).request("e", 1)
    metrics.StageMetrics(second)
    assert ("rankbridge_request_seconds_count", (("endpoint", "e"),)) not in samples(second)


def test_a_process_knows_its_proportional_set_size():
    own = metrics.pss_bytes()
    assert own is not None
    assert own > 1_000_000
    assert metrics.pss_bytes(os.getpid()) is not None
    assert metrics.pss_bytes(2**22 + 1) is None
    assert samples(metrics.new_registry())["rankbridge_process_pss_bytes", ()] > 1_000_000
