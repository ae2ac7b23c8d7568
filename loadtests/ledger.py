"""What became of every request of a drive: sent = ok + degraded + rejected + timed out + broken + wrong.

Pure. A request has one of these outcomes and no other, so that nothing can be lost between two of them; whether an
outcome is allowed is for others to say.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable

import msgspec

from loadtests.answers import OK
from loadtests.samples import Sample
from workloads.contract.slo import DEADLINE_MS, Endpoint

UNTYPED = "untyped"
"""A refusal that is no problem+json: nobody can switch on it."""


class Outcome(enum.StrEnum):
    """What became of a request."""

    OK = "ok"
    DEGRADED = "degraded"
    """Answered from below the best configured rung."""
    REJECTED = "rejected"
    """An HTTP status other than 200."""
    TIMED_OUT = "timed out"
    BROKEN = "broken"
    """The connection ended, or was none, before the answer was whole."""
    WRONG = "wrong"
    """Status 200, and not what was asked for."""


ANSWERED = frozenset({Outcome.OK, Outcome.DEGRADED})


class Ledger(msgspec.Struct, frozen=True, kw_only=True):
    """Every request of a drive, once."""

    sent: int
    """Requests that were due; each was sent, or given up before a connection was free."""
    ok: int
    degraded: int
    rejected: dict[str, int]
    """Status and type of the problem to their number: `503 /problems/overloaded`."""
    timed_out: int
    broken: int
    wrong: int
    stray: int
    """Answers that belong to no request: the second one of some request, or anything else that nobody asked for."""

    @property
    def refused(self) -> int:
        """Requests that were answered by a problem."""
        return sum(self.rejected.values())

    @property
    def balances(self) -> bool:
        """Whether every request has exactly one outcome and no answer is left over."""
        outcomes = self.ok + self.degraded + self.refused + self.timed_out + self.broken + self.wrong
        return self.sent == outcomes and not self.stray

    @property
    def untyped(self) -> int:
        """Refusals that say no type."""
        return sum(count for kind, count in self.rejected.items() if kind.endswith(UNTYPED))

    def said(self) -> str:
        """The sum, in words."""
        others = (
            ("degraded", self.degraded),
            ("rejected", self.refused),
            ("timed out", self.timed_out),
            ("broken", self.broken),
            ("wrong", self.wrong),
        )
        parts = [f"{self.sent} sent = {self.ok} ok", *(f"{count} {what}" for what, count in others if count)]
        return " + ".join(parts) + (f"; {self.stray} stray" if self.stray else "")


def outcome(sample: Sample) -> Outcome:
    """The one that a request had."""
    if sample.status == 0:
        return Outcome.TIMED_OUT if (sample.error or "").startswith("timeout") else Outcome.BROKEN
    if sample.status != OK:
        return Outcome.REJECTED
    if sample.error is not None:
        return Outcome.WRONG
    return Outcome.DEGRADED if sample.is_below_best else Outcome.OK


def is_late(sample: Sample) -> bool:
    """Whether a request was not answered by its endpoint's promise; who got no answer is late, too."""
    return outcome(sample) not in ANSWERED or sample.latency_ms > DEADLINE_MS[Endpoint(sample.endpoint)]


def ledger(samples: Iterable[Sample], *, sent: int, stray: int = 0) -> Ledger:
    """The sums. `sent` is how many requests were due, counted apart from the samples."""
    found: Counter[Outcome] = Counter()
    rejected: Counter[str] = Counter()
    for sample in samples:
        what = outcome(sample)
        found[what] += 1
        if what is Outcome.REJECTED:
            rejected[f"{sample.status} {sample.problem or UNTYPED}"] += 1
    return Ledger(
        sent=sent,
        ok=found[Outcome.OK],
        degraded=found[Outcome.DEGRADED],
        rejected=dict(rejected.most_common()),
        timed_out=found[Outcome.TIMED_OUT],
        broken=found[Outcome.BROKEN],
        wrong=found[Outcome.WRONG],
        stray=stray,
    )
