"""A drive second by second: when a fault was seen in its answers, and from when on everything was well again.

Pure arithmetic over samples. A request belongs to the second in which it was due, and failed requests count as slower
than every answer. Seconds are counted from the start of the drive.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from loadtests.ledger import ANSWERED, is_late, outcome
from loadtests.measures import quantile
from loadtests.samples import Sample
from workloads.contract.slo import BELOW_BEST_RUNG_SHARE, Endpoint

LATE_SHARE_MAX = 0.01
"""The promises are p99s: a second in which more than this share is late is not within them."""
CALM_S = 3
"""So many seconds on end must be within all budgets for a drive to count as recovered."""
_STEP_S = 0.25


class Window(msgspec.Struct, frozen=True, kw_only=True):
    """One stretch of a drive, over the reads that were due in it; events are counted by the ledger."""

    at_s: float
    requests: int
    answered: int
    late: int
    below_best: int
    p50_ms: float | None
    """None: the request at this quantile failed, or there was none. The same holds for p99."""
    p99_ms: float | None
    rungs: dict[str, int]
    """Of recommendations, which have the whole ladder."""
    ranked_at: dict[str, int]

    @property
    def late_share(self) -> float:
        """Late requests over all."""
        return self.late / self.requests if self.requests else 0.0

    @property
    def is_on_time(self) -> bool:
        """Whether no more requests are late than may be; a single one is not a share of anything."""
        return self.late <= max(1.0, LATE_SHARE_MAX * self.requests)

    @property
    def is_calm(self) -> bool:
        """Whether all budgets held: everything answered, in time, at the best rung."""
        return (
            self.requests > 0
            and self.answered == self.requests
            and self.is_on_time
            and self.below_best <= BELOW_BEST_RUNG_SHARE * self.requests
        )


def reads(samples: Iterable[Sample]) -> list[Sample]:
    """Without events, which have no ladder and no hurry."""
    return [sample for sample in samples if sample.endpoint != Endpoint.EVENTS]


def between(samples: Iterable[Sample], start_s: float, end_s: float) -> list[Sample]:
    """Those that were due in a stretch of time."""
    return [sample for sample in samples if start_s <= sample.at_s < end_s]


def window(samples: Sequence[Sample], at_s: float) -> Window:
    """What a stretch's reads add up to."""
    answered = [sample for sample in samples if outcome(sample) in ANSWERED]
    ordered = sorted(sample.latency_ms if outcome(sample) in ANSWERED else math.inf for sample in samples)
    return Window(
        at_s=at_s,
        requests=len(samples),
        answered=len(answered),
        late=sum(map(is_late, samples)),
        below_best=sum(sample.is_below_best for sample in answered),
        p50_ms=_finite(ordered, 0.5),
        p99_ms=_finite(ordered, 0.99),
        rungs=dict(sorted(Counter(str(sample.rung) for sample in answered if _has_ladder(sample)).items())),
        ranked_at=dict(sorted(Counter(sample.ranked_at for sample in answered if sample.ranked_at).items())),
    )


def windows(samples: Iterable[Sample], *, start_s: float, end_s: float, width_s: float = 1.0) -> list[Window]:
    """Whole windows from `start_s` on, without a gap."""
    count = int((end_s - start_s) / width_s + 1e-9)
    found: list[list[Sample]] = [[] for _ in range(count)]
    for sample in reads(samples):
        place = math.floor((sample.at_s - start_s) / width_s)
        if 0 <= place < count:
            found[place].append(sample)
    return [window(some, start_s + place * width_s) for place, some in enumerate(found)]


def seen_after_s(samples: Iterable[Sample], fault_s: float) -> float | None:
    """From a fault to the first answer that shows it: a reason, a lower rung, another site's ranker, a refusal, none.

    None when none did. An answer shows something when it is there, not when it was asked for.
    """
    asked = reads(samples)
    usual = {(sample.sent_to, sample.ranked_at) for sample in asked if sample.at_s < fault_s}
    moments = [
        moment
        for sample in asked
        if (moment := sample.at_s + sample.latency_ms / 1000) >= fault_s
        and (
            outcome(sample) not in ANSWERED
            or sample.is_below_best
            or sample.reason is not None
            or (sample.ranked_at is not None and (sample.sent_to, sample.ranked_at) not in usual)
        )
    ]
    return min(moments) - fault_s if moments else None


def recovered_after_s(samples: Iterable[Sample], since_s: float, end_s: float) -> float | None:
    """From a moment to the first of CALM_S seconds on end within all budgets; None when there were none."""
    asked = sorted(reads(samples), key=lambda sample: sample.at_s)
    start = since_s
    while start + CALM_S <= end_s + 1e-9:
        following = between(asked, start, start + CALM_S)
        if all(one.is_calm for one in windows(following, start_s=start, end_s=start + CALM_S)):
            return start - since_s
        start += _STEP_S
    return None


def on_time_after_s(samples: Iterable[Sample], since_s: float, end_s: float) -> float | None:
    """From a moment to the first second from which on, to the end, no second has more late requests than it may."""
    late = [one for one in windows(samples, start_s=since_s, end_s=end_s) if not one.is_on_time]
    if not late:
        return 0.0
    after = late[-1].at_s + 1.0 - since_s
    return after if since_s + after + 1.0 <= end_s else None


def goodput_per_s(samples: Iterable[Sample], start_s: float, end_s: float) -> float:
    """Requests a second of those due in a stretch, times the share of its reads that were answered in time."""
    found = between(samples, start_s, end_s)
    asked = reads(found)
    if not asked:
        return 0.0
    return len(found) / (end_s - start_s) * sum(not is_late(sample) for sample in asked) / len(asked)


def _has_ladder(sample: Sample) -> bool:
    return sample.endpoint == Endpoint.RECOMMEND and sample.rung is not None


def _finite(ordered: Sequence[float], share: float) -> float | None:
    if not ordered:
        return None
    value = quantile(ordered, share)
    return None if math.isinf(value) else value
