"""Whether predictions come true: how many calls took no longer than was predicted, by what was predicted.

A prediction at the quantile 0.95 is right when 95 of 100 calls keep it: fewer, and requests are late; many more, and a
dear site gets what a cheap one could have done. Pure counting; it does not know where predictions come from.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Final

STEPS: Final = 20
"""Buckets of predicted time, each a doubling: bucket b is what lies below 2^b/8 ms, and not in the one before."""


@dataclasses.dataclass(frozen=True)
class CalibrationRow:
    """Calls whose prediction was in `(above_ms, up_to_ms]`."""

    above_ms: float
    up_to_ms: float
    calls: int
    within: int
    """Took no longer than predicted."""


class Calibration:
    """Counts since its start."""

    def __init__(self) -> None:
        self._calls = [0] * STEPS
        self._within = [0] * STEPS

    def observe(self, predicted_ms: float, *, within: bool) -> None:
        """One call is over, or is out longer than predicted."""
        at = _bucket(predicted_ms)
        self._calls[at] += 1
        self._within[at] += within

    @property
    def calls(self) -> int:
        """All calls."""
        return sum(self._calls)

    @property
    def share_within(self) -> float | None:
        """Of all calls; to be held against the quantile. None before the first."""
        calls = self.calls
        return sum(self._within) / calls if calls else None

    def rows(self) -> list[CalibrationRow]:
        """Buckets that have calls, shortest prediction first."""
        return [
            CalibrationRow(2.0 ** (at - 1) / 8.0 if at else 0.0, 2.0**at / 8.0, calls, within)
            for at, (calls, within) in enumerate(zip(self._calls, self._within, strict=True))
            if calls
        ]


def _bucket(ms: float) -> int:
    return min(max(math.ceil(math.log2(ms * 8.0)), 0), STEPS - 1) if ms > 0.0 else 0
