"""Compares a run with its budgets and lists every breach in plain words.

Pure. It fails on a run without requests and on too few of them, it looks at every endpoint by itself and
never at a total, and it judges a run once: a run that breached is not done again until it passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.budgets import Budget, Budgets
from loadtests.measures import OUTSIDE, Measure, Measures, Suspect, measure, quantile, suspect
from loadtests.samples import Run, RunHeader, Sample
from workloads.contract.slo import Rung, Stage

SCHEMA_VERSION = 1

EXIT_PASSED = 0
EXIT_BREACHED = 1
EXIT_REFUSED = 2
"""The run could not be started as asked."""

WAITED_MS = 1.0
"""From here on a stage that gave up was waited for."""

BLAMED = {
    Stage.FEATURES.value: "the profile store",
    Stage.CANDIDATES.value: "retrieval",
    Stage.RANK.value: "the ranker",
    Stage.RULES.value: "the gateway's rules",
    OUTSIDE: "no stage (network, queueing, encoding or the load generator)",
}
"""Who does the work of a stage, as a sentence calls it."""


class Breach(msgspec.Struct, frozen=True, kw_only=True):
    """One promise that was not kept."""

    what: str
    """`no_requests`, `few_samples`, `rate`, `errors`, `p50`, `p95`, `p99`, `stage_p99`, `rung_mix`, `ranked`,
    `lateness` or `run`; a verdict adds its own."""
    sentence: str
    measured: float | None = None
    """None where nothing was measured, or where the request at the judged quantile failed."""
    allowed: float | None = None
    unit: str = ""
    endpoint: str | None = None
    site: str | None = None
    """None: over all sites."""
    stage: str | None = None
    """The guilty stage, where there is one."""


class LoadResult(msgspec.Struct, frozen=True, kw_only=True):
    """A judged run: what was asked, what was measured, what was breached. The gate's JSON file."""

    schema_version: int = SCHEMA_VERSION
    passed: bool
    breaches: list[Breach]
    header: RunHeader
    budgets: Budgets
    measures: Measures
    notes: list[str] = []
    """What could not be judged, and why."""

    @property
    def exit_code(self) -> int:
        """Of the process that made the run."""
        return EXIT_PASSED if self.passed else EXIT_BREACHED


def judge(run: Run, budgets: Budgets) -> LoadResult:
    """Every breach of `budgets` by `run`, the worst kind first."""
    measures = measure(run)
    breaches: list[Breach] = []
    notes: list[str] = []
    if run.fault is not None:
        breaches.append(Breach(what="run", sentence=run.fault))
    if not budgets.endpoints:
        breaches.append(Breach(what="run", sentence="The run has no budget to keep to, so it proves nothing."))
    if measures.requests == 0:
        breaches.append(_no_requests("at all", None, 1))
    else:
        breaches += _generator(measures, budgets)
        for budget in budgets.endpoints:
            breaches += _endpoint(budget, run, measures, notes)
    return LoadResult(
        passed=not breaches, breaches=breaches, header=run.header, budgets=budgets, measures=measures, notes=notes
    )


def _generator(measures: Measures, budgets: Budgets) -> Iterable[Breach]:
    if measures.lateness_p99_ms > budgets.lateness_p99_ms:
        yield Breach(
            what="lateness",
            sentence=(
                f"The load generator was late: it sent 1 % of the requests more than {_ms(measures.lateness_p99_ms)} "
                f"after they were due (allowed {_ms(budgets.lateness_p99_ms)}). It lacked processor time, so the "
                "arrivals were not the ones that the run claims; give it a core of its own or lower the rate."
            ),
            measured=measures.lateness_p99_ms,
            allowed=budgets.lateness_p99_ms,
            unit="ms",
        )


def _endpoint(budget: Budget, run: Run, measures: Measures, notes: list[str]) -> Iterable[Breach]:
    whole = next((m for m in measures.endpoints if m.endpoint == budget.endpoint), None)
    if whole is None:
        yield _no_requests(f"to {budget.endpoint}", budget.endpoint, budget.min_samples)
        return
    samples = [s for s in run.samples if s.endpoint == budget.endpoint and not s.warmup]
    sites = [m for m in measures.sites if m.endpoint == budget.endpoint]
    if whole.requests < budget.min_samples:
        yield Breach(
            what="few_samples",
            sentence=(
                f"{budget.endpoint}: {whole.requests} requests were made and {budget.min_samples} must stand behind "
                "a p99; run longer or faster."
            ),
            measured=whole.requests,
            allowed=budget.min_samples,
            unit="requests",
            endpoint=budget.endpoint,
        )
    if budget.at_least_per_s is not None and whole.offered_per_s < budget.at_least_per_s:
        yield Breach(
            what="rate",
            sentence=(
                f"{budget.endpoint}: {whole.offered_per_s:.1f} requests/s were offered and the promise is made at "
                f"{budget.at_least_per_s:.0f} or more; what held under less says nothing about it."
            ),
            measured=whole.offered_per_s,
            allowed=budget.at_least_per_s,
            unit="1/s",
            endpoint=budget.endpoint,
        )
    yield from _errors(budget, whole)
    for name, limit in (("p50", budget.p50_ms), ("p95", budget.p95_ms), ("p99", budget.p99_ms)):
        if limit is not None:
            yield from _latency(budget, name, limit, whole=whole, sites=sites, samples=samples)
    for stage, limit in budget.stage_p99_ms.items():
        yield from _stage(budget, stage, limit, whole, sites)
    if budget.below_best_share is not None:
        yield from _rung_mix(budget, budget.below_best_share, whole, samples, notes)
    if budget.ranked_at_least is not None:
        yield from _ranked(budget, budget.ranked_at_least, whole, notes)


def _no_requests(where: str, endpoint: str | None, allowed: int) -> Breach:
    return Breach(
        what="no_requests",
        sentence=f"No request was made {where}: a run that asked nothing passes nothing.",
        measured=0,
        allowed=allowed,
        unit="requests",
        endpoint=endpoint,
    )


def _errors(budget: Budget, whole: Measure) -> Iterable[Breach]:
    share = whole.failed / whole.requests
    if share > budget.error_share:
        kinds = ", ".join(f"{kind} ({count})" for kind, count in whole.errors.items())
        yield Breach(
            what="errors",
            sentence=(
                f"{budget.endpoint}: {whole.failed} of {whole.requests} requests failed "
                f"({_share(share)}, allowed {_share(budget.error_share)}): {kinds}."
            ),
            measured=share,
            allowed=budget.error_share,
            unit="share",
            endpoint=budget.endpoint,
        )


def _latency(
    budget: Budget, name: str, limit: float, *, whole: Measure, sites: Sequence[Measure], samples: Sequence[Sample]
) -> Iterable[Breach]:
    """The quantile over all sites; where that holds, at each site that has the samples to stand alone."""
    if _breaches(whole, name, limit):
        yield _latency_breach(budget, name, limit, found=whole, sites=sites, samples=samples)
        return
    for site in sites:
        if site.requests >= budget.min_samples and _breaches(site, name, limit):
            there = [s for s in samples if s.site == site.site]
            yield _latency_breach(budget, name, limit, found=site, sites=[], samples=there)


def _breaches(found: Measure, name: str, limit: float) -> bool:
    value = _quantile_of(found, name)
    return value is None or value > limit


def _latency_breach(
    budget: Budget, name: str, limit: float, *, found: Measure, sites: Sequence[Measure], samples: Sequence[Sample]
) -> Breach:
    value = _quantile_of(found, name)
    where = f" at {found.site}" if found.site is not None else ""
    measured = "a failed request" if value is None else _ms(value)
    sentence = f"{budget.endpoint}{where}: {name} is {measured}, allowed {_ms(limit)}"
    if len(sites) > 1:
        per_site = (f"{m.site} {_ms_or_failed(_quantile_of(m, name))}" for m in sites)
        sentence += f" ({', '.join(per_site)})"
    blamed = suspect(samples, limit)
    if blamed is not None:
        sentence += f". {_blame(blamed)}"
    return Breach(
        what=name,
        sentence=sentence if sentence.endswith(".") else sentence + ".",
        measured=value,
        allowed=limit,
        unit="ms",
        endpoint=budget.endpoint,
        site=found.site,
        stage=blamed.stage if blamed is not None else None,
    )


def _blame(found: Suspect) -> str:
    whom = BLAMED.get(found.stage, f"stage {found.stage}")
    stage = "" if found.stage == OUTSIDE or found.stage not in BLAMED else f" (stage {found.stage})"
    slower = f"The {_count(found.slow_answers, 'slower answer')} spent"
    if found.usual:
        return f"{slower} most of their time in {whom}{stage}: {_ms(found.slow_ms)} on average."
    return (
        f"{slower} the extra time in {whom}{stage}: "
        f"{_ms(found.slow_ms)} on average against {_ms(found.usual_ms)} usually."
    )


def _stage(budget: Budget, stage: str, limit: float, whole: Measure, sites: Sequence[Measure]) -> Iterable[Breach]:
    for found in (whole, *sites):
        timed = found.stage(stage)
        if timed is None or timed.p99_ms <= limit:
            continue
        if found.site is not None and timed.samples < budget.min_samples:
            continue
        whom = BLAMED.get(stage, f"stage {stage}")
        where = f" at {found.site}" if found.site is not None else ""
        yield Breach(
            what="stage_p99",
            sentence=(
                f"{budget.endpoint}{where}: {whom} (stage {stage}) took {_ms(timed.p99_ms)} at p99, "
                f"allowed {_ms(limit)}."
            ),
            measured=timed.p99_ms,
            allowed=limit,
            unit="ms",
            endpoint=budget.endpoint,
            site=found.site,
            stage=stage,
        )
        return


def _rung_mix(
    budget: Budget, limit: float, whole: Measure, samples: Sequence[Sample], notes: list[str]
) -> Iterable[Breach]:
    answered = [s for s in samples if s.error is None]
    unknown = sum(1 for s in answered if s.rung is None or s.best_rung is None)
    if unknown:
        notes.append(
            f"{budget.endpoint}: {unknown} answers could not be placed on the ladder, because the gateway named no "
            "best rung for this endpoint."
        )
    if unknown == len(answered):
        if answered:
            yield Breach(
                what="rung_mix",
                sentence=(
                    f"{budget.endpoint}: no answer could be placed on the quality ladder, because the catalogue "
                    "sample names no best rung for it."
                ),
                allowed=limit,
                unit="share",
                endpoint=budget.endpoint,
            )
        return
    below = [s for s in answered if s.is_below_best]
    share = len(below) / len(answered)
    if share <= limit:
        return
    stage, cause = _cause(below)
    reasons = ", ".join(f"{reason} ({count})" for reason, count in whole.reasons.items())
    per_site = ", ".join(
        f"{site} {_share(sum(s.site == site for s in below) / sum(s.site == site for s in answered))}"
        for site in sorted({s.site for s in answered})
    )
    yield Breach(
        what="rung_mix",
        sentence=(
            f"{budget.endpoint}: {_share(share)} of the answers came from below the best configured rung, allowed "
            f"{_share(limit)} ({per_site}). {cause} Reasons given: {reasons}."
        ),
        measured=share,
        allowed=limit,
        unit="share",
        endpoint=budget.endpoint,
        stage=stage,
    )


def _cause(below: Sequence[Sample]) -> tuple[str | None, str]:
    """The stage whose loss or lateness cost most of the steps that were taken down."""
    guilty, count = Counter(_lost_stage(s) for s in below).most_common(1)[0]
    most = "" if count == len(below) else "Most of these "
    if guilty == Stage.CANDIDATES.value:
        return guilty, f"{most or 'They '}lack candidates: retrieval was late or gone (stage candidates)."
    if guilty is None:
        return guilty, f"{most or 'They '}had too little time left."
    # once the ranker is known to be lost most answers do not wait for it any more
    spent = sorted(s.stages_ms[guilty] for s in below if s.stages_ms.get(guilty, 0.0) >= WAITED_MS)
    waited = f"; {len(spent)} had waited for it, {_ms(quantile(spent, 0.5))} at the median" if spent else ""
    return guilty, f"{most or 'They '}lack the ranker's scores: the ranker was late or gone (stage rank){waited}."


def _lost_stage(sample: Sample) -> str | None:
    """By the gateway's own reason; where it gives none that is known, by how far the answer stepped down."""
    reason = sample.reason or ""
    if reason.startswith("ranker"):
        return Stage.RANK.value
    if reason.startswith("retrieval"):
        return Stage.CANDIDATES.value
    if reason in {"no_time", "overload"}:
        return None
    stepped_past_retrieval = sample.rung is not None and sample.rung >= Rung.TRADITIONAL
    return Stage.CANDIDATES.value if stepped_past_retrieval else Stage.RANK.value


def _ranked(budget: Budget, limit: int, whole: Measure, notes: list[str]) -> Iterable[Breach]:
    if whole.ranked_min is None:
        notes.append(
            f"{budget.endpoint}: no answer said how many candidates were ranked, so that number is not judged."
        )
    elif whole.ranked_min < limit:
        yield Breach(
            what="ranked",
            sentence=(
                f"{budget.endpoint}: an answer was made from {whole.ranked_min} ranked candidates, and at least "
                f"{limit} are promised."
            ),
            measured=whole.ranked_min,
            allowed=limit,
            unit="candidates",
            endpoint=budget.endpoint,
            stage=Stage.CANDIDATES.value,
        )


def _quantile_of(found: Measure, name: str) -> float | None:
    match name:
        case "p50":
            return found.p50_ms
        case "p95":
            return found.p95_ms
        case _:
            return found.p99_ms


def _ms(value: float) -> str:
    return f"{value:.1f} ms"


def _ms_or_failed(value: float | None) -> str:
    return "failed" if value is None else _ms(value)


def _share(value: float) -> str:
    return f"{value * 100:.3g} %"


def _count(count: int, noun: str) -> str:
    return noun if count == 1 else f"{count} {noun}s"
