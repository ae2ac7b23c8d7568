"""How long a neighbour's calls take now: a histogram whose evidence fades.

Buckets are spaced by logarithm, so that one shape serves 0.1 ms and a minute. A sample's weight halves with every half-
life; where calls are rare it halves with every so many samples instead, because one slow answer after a quiet hour says
little. Pure: time comes in as numbers. It does not know whose calls these are, nor what anybody does about them.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from itertools import accumulate
from typing import Final

SHORTEST_MS: Final = 0.1
LONGEST_MS: Final = 60_000.0
PER_OCTAVE: Final = 6
"""Buckets per doubling: each is 12 % wide, and a quantile is interpolated inside."""

BUCKETS: Final = math.ceil(math.log2(LONGEST_MS / SHORTEST_MS) * PER_OCTAVE) + 1
SAMPLES_HALF_LIFE: Final = 16
"""Evidence halves no faster than with so many samples: one outlier is then 4 % of a quiet route's evidence, below its
p95."""

_RENEW_AT: Final = 64.0
"""Half-lives after which the growing weights are scaled back, long before a float could not add 1 to them."""


class DecayedHistogram:
    """Latencies of one kind of call. An observation or a quantile takes a few microseconds."""

    __slots__ = ("_counts", "_half_life_s", "_last_s", "_now", "_sums", "_total")

    def __init__(self, half_life_s: float = 2.0) -> None:
        self._half_life_s = half_life_s
        self._counts = [0.0] * BUCKETS
        self._total = 0.0
        self._now = 0.0
        """Half-lives passed: a sample weighs 2 to this power. Weights grow, so that nothing has to shrink."""
        self._last_s: float | None = None
        self._sums: list[float] | None = None
        """Running sums of the counts, until the next observation."""

    def observe(self, ms: float, now_s: float) -> None:
        """One call took `ms`."""
        self._add(_bucket(ms), now_s)

    def observe_at_least(self, ms: float, now_s: float) -> None:
        """One call was given up after `ms`: it would have taken longer.

        It counts as the median of what took longer than that; as the double where nothing is known to have.
        """
        at = _bucket(ms)
        beyond = sum(self._counts[at + 1 :])
        if beyond < self._unit():
            self._add(_bucket(2.0 * ms), now_s)
            return
        sums = list(accumulate(self._counts[at + 1 :]))
        self._add(at + 1 + bisect_left(sums, beyond / 2.0), now_s)

    def quantile(self, share: float) -> float | None:
        """The latency in ms that this share of calls stays under; None without any evidence.

        It does not change while nothing is observed: what is known stays known, until somebody knows better.
        """
        if self._total <= 0.0:
            return None
        sums = self._sums
        if sums is None:
            sums = self._sums = list(accumulate(self._counts))
        wanted = share * sums[-1]
        at = min(bisect_left(sums, wanted), BUCKETS - 1)
        if not at:
            return SHORTEST_MS
        inside = (wanted - sums[at - 1]) / self._counts[at] if self._counts[at] > 0.0 else 1.0
        return float(SHORTEST_MS * 2.0 ** ((at - 1 + min(max(inside, 0.0), 1.0)) / PER_OCTAVE))

    def share_over(self, ms: float) -> float:
        """Share of calls that took longer than `ms`, to a bucket; 0 without evidence."""
        return sum(self._counts[_bucket(ms) + 1 :]) / self._total if self._total > 0.0 else 0.0

    @property
    def samples(self) -> float:
        """How many samples of now the evidence is worth."""
        return self._total / self._unit()

    def fade(self) -> None:
        """All evidence so far weighs half as much against what comes."""
        self._now += 1.0

    def _unit(self) -> float:
        return float(2.0**self._now)

    def _add(self, bucket: int, now_s: float) -> None:
        if self._last_s is not None:
            passed = max(now_s - self._last_s, 0.0) / self._half_life_s
            self._now += min(passed, 1.0 / SAMPLES_HALF_LIFE)
        self._last_s = now_s
        if self._now > _RENEW_AT:
            scale = 2.0**-self._now
            self._counts = [count * scale for count in self._counts]
            self._total, self._now = self._total * scale, 0.0
        weight = self._unit()
        self._counts[bucket] += weight
        self._total += weight
        self._sums = None


def _bucket(ms: float) -> int:
    """Bucket b > 0 holds what lies above SHORTEST x 2^((b-1)/PER_OCTAVE), up to the next; 0 everything shorter."""
    if ms <= SHORTEST_MS:
        return 0
    if ms >= LONGEST_MS:
        return BUCKETS - 1
    return min(math.ceil(math.log2(ms / SHORTEST_MS) * PER_OCTAVE), BUCKETS - 1)
