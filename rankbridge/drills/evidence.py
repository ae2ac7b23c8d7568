"""What a drive under a fault shows, and the expectations that may be had of it. Pure.

An expectation reads evidence and says what it measured, beside the bound. What was not measured has not held.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from loadtests import windows
from loadtests.ledger import ANSWERED, Ledger, is_late, outcome
from loadtests.samples import Sample
from rankbridge.drills.records import Check, Kept, Phase
from workloads.contract.sites import HOME
from workloads.contract.slo import HEDGE_SHARE_MAX, Endpoint, Rung

REFUSED: Final = "refused, "
"""How a script's note begins that says why a bundle was not brought."""
_OVERLOADED: Final = 429


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A drive: every sample, the moments of the fault, and what was looked up around it."""

    samples: Sequence[Sample]
    ledger: Ledger
    fault_s: float
    heal_s: float
    seconds: float
    kept: Kept
    published: frozenset[str]
    """Bundles (12 hex digits) that were published by a good way."""
    hedges: float | None = None
    ranked: int = 0
    """Answers that a ranker made: what hedges are a share of."""
    peak_per_s: float = 0.0
    facts: dict[str, str] = dataclasses.field(default_factory=dict)
    """What a script found out by itself, by name."""

    def phase(self, start_s: float, end_s: float) -> Phase:
        """Reads that were due in a stretch."""
        found = windows.window(windows.between(windows.reads(self.samples), start_s, end_s), start_s)
        return Phase(
            requests=found.requests,
            p50_ms=found.p50_ms,
            p99_ms=found.p99_ms,
            rungs=found.rungs,
            ranked_at=found.ranked_at,
        )

    @property
    def reads(self) -> list[Sample]:
        """All requests but events, of the whole drive."""
        return windows.reads(self.samples)

    @property
    def since_fault(self) -> list[Sample]:
        """Reads from the fault to the end."""
        return windows.between(self.reads, self.fault_s, self.seconds)

    @property
    def bundles(self) -> list[str]:
        """From which bundles answers came."""
        return sorted({sample.bundle for sample in self.samples if sample.bundle is not None})


Expectation = Callable[[Evidence], Check]


def always() -> tuple[Expectation, ...]:
    """What holds under every fault."""
    return (_balances, _stored_once, _published_only, _typed)


def _balances(seen: Evidence) -> Check:
    return Check(
        what="every request has one outcome",
        bound="sent = sum of outcomes, no stray answer, none wrong",
        measured=seen.ledger.said(),
        held=seen.ledger.balances and not seen.ledger.wrong,
    )


def _stored_once(seen: Evidence) -> Check:
    kept = seen.kept
    return Check(
        what="acknowledged events stored once",
        bound=f"{kept.acknowledged} of {kept.acknowledged}",
        measured=f"{kept.stored} in {kept.rows} rows",
        held=kept.stored == kept.rows == kept.acknowledged,
    )


def _published_only(seen: Evidence) -> Check:
    strangers = [bundle for bundle in seen.bundles if bundle not in seen.published]
    return Check(
        what="answers come from published bundles",
        bound="no other",
        measured=f"{', '.join(strangers)} served" if strangers else f"{', '.join(seen.bundles) or 'no bundle'}",
        held=not strangers and bool(seen.bundles),
    )


def _typed(seen: Evidence) -> Check:
    return Check(
        what="refusals say their type",
        bound="0 without",
        measured=f"{seen.ledger.untyped} of {seen.ledger.refused}",
        held=seen.ledger.untyped == 0,
    )


def refuses_nobody(at: str = HOME.name.value) -> Expectation:
    """No 5xx and no 429 to anybody who asked one site, and no broken connection."""

    def check(seen: Evidence) -> Check:
        asked = [sample for sample in seen.samples if sample.sent_to == at]
        refused = [one for one in asked if one.status >= 500 or one.status in {0, _OVERLOADED}]
        return Check(
            what=f"nobody who asks {at} is refused",
            bound="0 of 5xx, 429 or no answer",
            measured=f"{len(refused)} of {len(asked)}",
            held=bool(asked) and not refused,
        )

    return check


def reads_are_answered() -> Expectation:
    """Every recommendation and search is answered, at whatever rung; events may be refused meanwhile."""

    def check(seen: Evidence) -> Check:
        lost = sum(outcome(sample) not in ANSWERED for sample in seen.reads)
        return Check(
            what="every read is answered",
            bound="0 without an answer",
            measured=f"{lost} of {len(seen.reads)}",
            held=bool(seen.reads) and not lost,
        )

    return check


def late_at_most(share: float, *, of_at_least: int = 100, at: str | None = None) -> Expectation:
    """From the fault on, so many reads past their deadline at the most; of the whole drive so many at the least."""

    def check(seen: Evidence) -> Check:
        asked = [sample for sample in seen.since_fault if at is None or sample.sent_to == at]
        late = sum(map(is_late, asked))
        return Check(
            what="late" + (f" at {at}" if at else ""),
            bound=f"<= {share:.1%} of >= {of_at_least:,} requests",
            measured=f"{late} of {len(asked):,} ({late / max(1, len(asked)):.2%})",
            held=len(seen.samples) >= of_at_least and bool(asked) and late <= share * len(asked),
            timed=True,
        )

    return check


def answers_at_rung(rung: Rung, *, at: str | None = None, share: float = 1.0) -> Expectation:
    """While the fault lasts, so large a share of recommendations comes from this rung or a better one."""

    def check(seen: Evidence) -> Check:
        found = [
            sample.rung
            for sample in windows.between(seen.samples, seen.fault_s, seen.heal_s)
            if sample.endpoint == Endpoint.RECOMMEND and sample.rung is not None and at in {None, sample.sent_to}
        ]
        below = sum(one > rung for one in found)
        return Check(
            what=f"recommended at rung {rung.value} or better",
            bound=f">= {share:.0%} of answers",
            measured=f"{len(found) - below} of {len(found)}",
            held=bool(found) and len(found) - below >= share * len(found),
            timed=True,
        )

    return check


def says(reason: str) -> Expectation:
    """While the fault lasts, answers name it."""

    def check(seen: Evidence) -> Check:
        asked = windows.between(seen.reads, seen.fault_s, seen.heal_s)
        named = sum(sample.reason == reason for sample in asked)
        return Check(
            what=f"answers say {reason}",
            bound="some of those meanwhile",
            measured=f"{named} of {len(asked)}",
            held=named > 0,
        )

    return check


def on_time_within(seconds: float) -> Expectation:
    """So long after the fault begins, each second of it has its late share within budget again."""

    def check(seen: Evidence) -> Check:
        after = windows.on_time_after_s(seen.samples, seen.fault_s, seen.heal_s)
        return Check(
            what=f"late share of each second back under {windows.LATE_SHARE_MAX:.0%}",
            bound=f"<= {seconds:g} s after the fault begins",
            measured="never" if after is None else f"{after:.0f} s",
            held=after is not None and after <= seconds,
            timed=True,
        )

    return check


def recovers_within(seconds: float) -> Expectation:
    """So long after healing, at the latest, three seconds on end are within all budgets, at the best rung."""

    def check(seen: Evidence) -> Check:
        after = windows.recovered_after_s(seen.samples, seen.heal_s, seen.seconds)
        return Check(
            what="recovered",
            bound=f"<= {seconds:g} s after healing",
            measured="never" if after is None else f"{after:.2f} s",
            held=after is not None and after <= seconds,
            timed=True,
        )

    return check


def hedges_at_most(share: float = HEDGE_SHARE_MAX) -> Expectation:
    """Second calls, of all that a ranker answered."""

    def check(seen: Evidence) -> Check:
        hedged = None if seen.hedges is None else seen.hedges / max(1, seen.ranked)
        return Check(
            what="hedges",
            bound=f"<= {share:.0%} of ranked answers",
            measured="the gateway counts none" if hedged is None else f"{seen.hedges:.0f} ({hedged:.1%})",
            held=hedged is not None and hedged <= share,
            timed=True,
        )

    return check


def goodput_at_least(share: float, start_s: float, end_s: float) -> Expectation:
    """Reads answered in time between two moments of the drive, against the measured peak."""

    def check(seen: Evidence) -> Check:
        good = windows.goodput_per_s(seen.samples, start_s, end_s)
        return Check(
            what="answered in time at the highest load",
            bound=f">= {share:.0%} of {seen.peak_per_s:.0f}/s",
            measured=f"{good:.0f}/s ({good / seen.peak_per_s:.0%})" if seen.peak_per_s else f"{good:.0f}/s",
            held=bool(seen.peak_per_s) and good >= share * seen.peak_per_s,
            timed=True,
        )

    return check


def fact(name: str, expected: str, bound: str = "") -> Expectation:
    """What a script found out by itself is just this."""

    def check(seen: Evidence) -> Check:
        found = seen.facts.get(name, "not looked at")
        return Check(what=name, bound=bound or expected, measured=found, held=found == expected)

    return check


def fact_within(name: str, seconds: float) -> Expectation:
    """A script measured so many seconds at the most."""

    def check(seen: Evidence) -> Check:
        found = seen.facts.get(name, "not looked at")
        held = found.replace(".", "", 1).isdecimal() and float(found) <= seconds
        return Check(
            what=name, bound=f"<= {seconds:g} s", measured=f"{found} s" if held else found, held=held, timed=True
        )

    return check


def refused_at(site: str) -> Expectation:
    """A site's agent says that it does not bring the bad bundle, and why."""

    def check(seen: Evidence) -> Check:
        found = seen.facts.get(f"bad bundle at {site}", "not looked at")
        return Check(
            what=f"bad bundle at {site}",
            bound="refused, with the reason",
            measured=found,
            held=found.startswith(REFUSED),
        )

    return check
