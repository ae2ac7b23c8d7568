"""What a run's samples add up to: quantiles, error kinds, rung mix, stages, timeline.

Pure arithmetic; it knows no budget (`gate` does) and no file.

The quantile estimator is the nearest rank (inverse of the empirical distribution function; type 1 of
Hyndman and Fan, "Sample Quantiles in Statistical Packages", 1996): the smallest measured value that
at least the share q of all samples does not exceed. Nothing is interpolated, bucketed, trimmed or
averaged over quantiles, and a request that failed counts as slower than every answer, so that
failing fast never improves a quantile.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.samples import Run, Sample
from workloads.contract.slo import Stage

CURVE_POINTS = 120
TIMELINE_BINS = 120
OUTSIDE = "outside"
"""Pseudo-stage: what is left of a request's time when all its stages are taken off."""


class StageMeasure(msgspec.Struct, frozen=True, kw_only=True):
    """Time in one stage, milliseconds, over the answers that went through it."""

    stage: str
    samples: int
    p50_ms: float
    p95_ms: float
    p99_ms: float


class Measure(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint over all sites, or at one site."""

    endpoint: str
    site: str | None
    requests: int
    offered_per_s: float
    errors: dict[str, int]
    """Kind of error to its count."""
    p50_ms: float | None
    """None: the request at this quantile failed. The same holds for the next two."""
    p95_ms: float | None
    p99_ms: float | None
    max_ms: float | None
    """Slowest answer; None when there was none."""
    curve: list[tuple[float, float]]
    """(share of requests, milliseconds that it stayed within); spaced evenly in log(1 - share)."""
    answers: int
    """Answers with a rung."""
    rungs: dict[str, int]
    below_best: int
    reasons: dict[str, int]
    ranked_told: int
    """Answers that said how many candidates were ranked."""
    ranked_min: int | None
    stages: list[StageMeasure]

    @property
    def failed(self) -> int:
        """Requests with any error."""
        return sum(self.errors.values())

    def stage(self, name: str) -> StageMeasure | None:
        """One stage's measure, or None when no answer went through it."""
        return next((s for s in self.stages if s.stage == name), None)


class Bin(msgspec.Struct, frozen=True, kw_only=True):
    """One endpoint during one slice of the run; times of answers only."""

    at_s: float
    endpoint: str
    requests: int
    failed: int
    p50_ms: float | None
    p95_ms: float | None
    max_ms: float | None
    rungs: dict[str, int]


class Measures(msgspec.Struct, frozen=True, kw_only=True):
    """A whole run. Everything but the timeline leaves warm-up out."""

    seconds: float
    requests: int
    warmup_requests: int
    endpoints: list[Measure]
    sites: list[Measure]
    """The same per (endpoint, site)."""
    lateness_p50_ms: float
    lateness_p99_ms: float
    lateness_max_ms: float
    bundles: dict[str, list[str]]
    """Site to the bundles it answered from."""
    bin_s: float
    timeline: list[Bin]


class Suspect(msgspec.Struct, frozen=True, kw_only=True):
    """The part of a request that the slow answers spent their extra time in."""

    stage: str
    slow_ms: float
    """Mean time in it over the slow answers."""
    usual_ms: float
    """Median time in it over all answers."""
    slow_answers: int
    usual: bool
    """Most answers were that slow, so that there is no usual time to compare with."""


def quantile(ordered: Sequence[float], share: float) -> float:
    """Nearest-rank quantile of values in ascending order.

    Raises ValueError when there are no values or `share` is not in (0, 1].
    """
    if not ordered:
        raise ValueError("no values: a quantile of nothing is not zero")
    if not 0 < share <= 1:
        raise ValueError(f"share {share}: must be above 0 and at most 1")
    # the subtraction keeps 0.99 * 100 = 99.00000000000001 from asking for the 100th value
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1]


def measure(run: Run) -> Measures:
    """Everything that a verdict says about a run's times and answers."""
    judged = [s for s in run.samples if not s.warmup]
    by_endpoint: dict[str, list[Sample]] = defaultdict(list)
    by_site: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    bundles: dict[str, set[str]] = defaultdict(set)
    for sample in judged:
        by_endpoint[sample.endpoint].append(sample)
        by_site[sample.endpoint, sample.site].append(sample)
        if sample.bundle is not None:
            bundles[sample.site].add(sample.bundle)
    lateness = sorted(s.lateness_ms for s in judged) or [0.0]
    bin_s, timeline = _timeline(run.samples)
    return Measures(
        seconds=run.seconds,
        requests=len(judged),
        warmup_requests=len(run.samples) - len(judged),
        endpoints=[_measure(name, None, found, run.seconds) for name, found in sorted(by_endpoint.items())],
        sites=[_measure(name, site, found, run.seconds) for (name, site), found in sorted(by_site.items())],
        lateness_p50_ms=quantile(lateness, 0.5),
        lateness_p99_ms=quantile(lateness, 0.99),
        lateness_max_ms=lateness[-1],
        bundles={site: sorted(found) for site, found in sorted(bundles.items())},
        bin_s=bin_s,
        timeline=timeline,
    )


def suspect(samples: Iterable[Sample], slower_than_ms: float) -> Suspect | None:
    """Which stage the answers slower than `slower_than_ms` spent their extra time in.

    The one whose mean over the slow answers exceeds its median over all answers by most; where most
    answers are slow, the one that they spent most time in. None when no answer was that slow.
    `OUTSIDE` stands for network, queues and the generator itself.
    """
    parts: dict[str, list[float]] = defaultdict(list)
    slow: dict[str, list[float]] = defaultdict(list)
    answers = slow_answers = 0
    for sample in samples:
        if sample.error is not None:
            continue
        is_slow = sample.latency_ms > slower_than_ms
        answers += 1
        slow_answers += is_slow
        for stage, spent in _parts(sample):
            parts[stage].append(spent)
            if is_slow:
                slow[stage].append(spent)
    if not slow_answers:
        return None
    candidates = [
        Suspect(
            stage=stage,
            slow_ms=sum(spent) / len(spent),
            usual_ms=quantile(sorted(parts[stage]), 0.5),
            slow_answers=slow_answers,
            usual=slow_answers * 2 > answers,
        )
        for stage, spent in slow.items()
    ]
    return max(candidates, key=lambda c: c.slow_ms if c.usual else c.slow_ms - c.usual_ms)


def _parts(sample: Sample) -> Iterable[tuple[str, float]]:
    yield from sample.stages_ms.items()
    yield OUTSIDE, max(0.0, sample.latency_ms - sum(sample.stages_ms.values()))


def _measure(endpoint: str, site: str | None, samples: Sequence[Sample], seconds: float) -> Measure:
    latency = sorted(math.inf if s.error is not None else s.latency_ms for s in samples)
    answered = [s for s in samples if s.error is None]
    rungs = Counter(str(s.rung) for s in answered if s.rung is not None)
    below = [s for s in answered if s.is_below_best]
    ranked = [s.ranked for s in answered if s.ranked is not None]
    parts: dict[str, list[float]] = defaultdict(list)
    for sample in answered:
        if sample.stages_ms:
            for stage, spent in _parts(sample):
                parts[stage].append(spent)
    return Measure(
        endpoint=endpoint,
        site=site,
        requests=len(samples),
        offered_per_s=len(samples) / seconds if seconds > 0 else 0.0,
        errors=dict(Counter(s.error for s in samples if s.error is not None).most_common()),
        p50_ms=_finite(quantile(latency, 0.5)),
        p95_ms=_finite(quantile(latency, 0.95)),
        p99_ms=_finite(quantile(latency, 0.99)),
        max_ms=max((s.latency_ms for s in answered), default=None),
        curve=_curve(latency),
        answers=sum(rungs.values()),
        rungs=dict(sorted(rungs.items())),
        below_best=len(below),
        reasons=dict(Counter(s.reason or "not told" for s in below).most_common()),
        ranked_told=len(ranked),
        ranked_min=min(ranked, default=None),
        stages=[_stage(stage, sorted(parts[stage])) for stage in sorted(parts, key=_stage_order)],
    )


def _stage_order(stage: str) -> tuple[int, str]:
    """In the order of a request; stages that the contract does not know come after, the rest of the time last."""
    known = [s.value for s in Stage]
    if stage in known:
        return known.index(stage), stage
    return len(known) + (stage == OUTSIDE), stage


def _stage(stage: str, ordered: Sequence[float]) -> StageMeasure:
    return StageMeasure(
        stage=stage,
        samples=len(ordered),
        p50_ms=quantile(ordered, 0.5),
        p95_ms=quantile(ordered, 0.95),
        p99_ms=quantile(ordered, 0.99),
    )


def _finite(value: float) -> float | None:
    return None if math.isinf(value) else value


def _curve(ordered: Sequence[float]) -> list[tuple[float, float]]:
    """Points of the distribution; the tail gets as many as the middle.

    The slowest sample stands at 1 - 1/(2n) (Hazen's plotting position): at 1 a log axis has no place for it.
    """
    last = 0.5 / len(ordered)
    curve: list[tuple[float, float]] = []
    for i in range(CURVE_POINTS + 1):
        share = min(1.0, max(last, 1 - last ** (i / CURVE_POINTS)))
        value = quantile(ordered, share)
        if math.isinf(value):
            break
        if not curve or share > curve[-1][0]:
            curve.append((share, value))
    return curve


def _timeline(samples: Sequence[Sample]) -> tuple[float, list[Bin]]:
    if not samples:
        return 1.0, []
    bin_s = max(1.0, float(math.ceil(max(s.at_s for s in samples) / TIMELINE_BINS)))
    bins: dict[tuple[int, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        bins[int(sample.at_s // bin_s), sample.endpoint].append(sample)
    timeline = []
    for (index, endpoint), found in sorted(bins.items()):
        answered = sorted(s.latency_ms for s in found if s.error is None)
        rungs = Counter(str(s.rung) for s in found if s.rung is not None and s.error is None)
        timeline.append(
            Bin(
                at_s=index * bin_s,
                endpoint=endpoint,
                requests=len(found),
                failed=len(found) - len(answered),
                p50_ms=quantile(answered, 0.5) if answered else None,
                p95_ms=quantile(answered, 0.95) if answered else None,
                max_ms=answered[-1] if answered else None,
                rungs=dict(sorted(rungs.items())),
            )
        )
    return bin_s, timeline
