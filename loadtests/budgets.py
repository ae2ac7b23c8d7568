"""What a run must keep to, per endpoint; the numbers come from `workloads.contract.slo`.

Pure: it knows neither Locust nor files. `gate` compares a run with it. Three sets are made here:
`promise` (the product's targets under the traffic they were promised for), `small` (the same
targets for a run too short for the full number of samples) and `surge` (a spike, during which a step
down the ladder is the right answer).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from workloads.contract.slo import (
    BELOW_BEST_RUNG_SHARE,
    CANDIDATES_RANKED,
    DEADLINE_MS,
    P99_SAMPLES,
    QUANTILE_SHARE,
    STAGE_P99_MS,
    TRAFFIC_PER_S,
    Endpoint,
)

GENERATOR_LATENESS_P99_MS = min(DEADLINE_MS.values()) / 2
"""A generator that sends later than this does not offer the schedule that it claims. Its lateness is part of
every latency, so up to here it costs a verdict and cannot better one."""

OFFERED_SHARE = 0.85
"""Arrivals are random: a run counts as the promised traffic from this share of its rate on. For 1,200
Poisson arrivals that is five standard deviations below the mean."""


class Budget(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one endpoint must keep to. Times in milliseconds; None means that it is not judged."""

    endpoint: str
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None
    error_share: float
    """Failed requests over all requests, at the most."""
    min_samples: int
    """Requests that must stand behind the quantiles."""
    at_least_per_s: float | None
    """Requests a second that must have been offered for the run to say anything."""
    below_best_share: float | None
    """Answers from below the best configured rung over all answers, at the most; None where there is no ladder."""
    ranked_at_least: int | None
    """Candidates that the ranker must score for an answer of its rungs."""
    stage_p99_ms: dict[str, float]


class Budgets(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Budgets of a whole run: one per endpoint that its suite sends to, and one for the generator itself."""

    name: str
    endpoints: tuple[Budget, ...]
    lateness_p99_ms: float = GENERATOR_LATENESS_P99_MS

    def only(self, endpoints: Collection[str]) -> Budgets:
        """The same budgets for a suite that sends to these endpoints alone."""
        kept = tuple(b for b in self.endpoints if b.endpoint in endpoints)
        return msgspec.structs.replace(self, endpoints=kept)

    def with_min_samples(self, count: int) -> Budgets:
        """The same budgets for a smaller run: `count` samples are enough, and no rate is asked for."""
        if count < 1:
            raise ValueError(f"min_samples is {count}: at least one sample must stand behind a quantile")
        kept = tuple(msgspec.structs.replace(b, min_samples=count, at_least_per_s=None) for b in self.endpoints)
        return msgspec.structs.replace(self, name=f"{self.name}, from {count} samples on", endpoints=kept)


_LADDER: Mapping[Endpoint, bool] = {
    Endpoint.RECOMMEND: True,
    Endpoint.SEARCH: True,
    Endpoint.SIMILAR: True,
    Endpoint.EVENTS: False,
}


def promise() -> Budgets:
    """The product's targets, judged under the traffic they were promised for."""
    return Budgets(name="promise", endpoints=tuple(_budget(endpoint) for endpoint in TRAFFIC_PER_S))


def small(min_samples: int) -> Budgets:
    """The product's targets for a run of a few seconds."""
    return promise().with_min_samples(min_samples)


def surge() -> Budgets:
    """A spike above the promised traffic: no errors, answers in time, and any rung that makes that possible.

    Stages are not judged: a stage that gives up in time is how a step down is made.
    """
    loosened = tuple(
        msgspec.structs.replace(b, p50_ms=None, p95_ms=None, below_best_share=None, stage_p99_ms={})
        for b in promise().endpoints
    )
    return Budgets(name="surge", endpoints=loosened)


def _budget(endpoint: Endpoint) -> Budget:
    target = DEADLINE_MS[endpoint]
    ladder = _LADDER[endpoint]
    return Budget(
        endpoint=endpoint.value,
        p50_ms=target * QUANTILE_SHARE["p50"],
        p95_ms=target * QUANTILE_SHARE["p95"],
        p99_ms=target * QUANTILE_SHARE["p99"],
        error_share=0.0,
        min_samples=P99_SAMPLES,
        at_least_per_s=TRAFFIC_PER_S[endpoint] * OFFERED_SHARE,
        below_best_share=BELOW_BEST_RUNG_SHARE if ladder else None,
        ranked_at_least=CANDIDATES_RANKED if endpoint is Endpoint.RECOMMEND else None,
        stage_p99_ms={stage.value: limit for stage, limit in STAGE_P99_MS.items()} if ladder else {},
    )
