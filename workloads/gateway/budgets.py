"""What may be added to the traffic: a token per so many calls, saved up to a few.

One for hedges, one for retries. A budget is a share of what is really called, so that help can never become the
overload that it is meant against. Pure; it knows no clock.
"""

from __future__ import annotations

from typing import Final

from workloads.contract.slo import HEDGE_SHARE_MAX

RETRY_SHARE_MAX: Final = 0.1
"""Retries at an equal rung may add this share of calls at the most."""
BURST: Final = 10.0
"""Tokens that can be saved up: a quiet hour must not pay for a storm."""


class TokenBudget:
    """`earned` with every first call, `take` before every extra one."""

    def __init__(self, share: float = HEDGE_SHARE_MAX, burst: float = BURST) -> None:
        """`share` of calls that may be extra, 0 to 1; `burst` is the most that is saved."""
        if not 0.0 <= share <= 1.0 or burst < 1.0:
            raise ValueError(f"a budget of {share} with a burst of {burst}: shares are 0 to 1, bursts 1 or more")
        self._share = share
        self._burst = burst
        self._tokens = 0.0
        self.calls = 0
        self.taken = 0

    @property
    def left(self) -> bool:
        """Whether there is a token."""
        return self._tokens >= 1.0

    def earned(self) -> None:
        """A first call was made."""
        self.calls += 1
        self._tokens = min(self._tokens + self._share, self._burst)

    def take(self) -> bool:
        """Whether one extra call may be made now; it is paid for when True."""
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        self.taken += 1
        return True
