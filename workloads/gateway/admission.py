"""Who comes in when not all can: a limit on requests in flight that follows latency, and who is turned away first.

The limit is of the gradient kind (Netflix' concurrency-limits, Gradient2): it grows while answers come as fast as they
used to, and shrinks when they come slower, or slower than their promise. Below it low priority is turned away first,
high last, and where it is crowded nobody gets more places than an equal share of them. Pure: time and chance come in.
It does not know what is asked for.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Final

from workloads.contract.slo import DEADLINE_MS, Endpoint, Priority


class ShedReason(enum.StrEnum):
    """Why a request was turned away. Fixed words: metrics carry them as labels."""

    OVERLOADED = "overloaded"
    """No place for its priority: 503."""
    TENANT_SHARE = "tenant_share"
    """The tenant has its share already, and it is crowded: 429."""


STATUS: Final[Mapping[ShedReason, int]] = MappingProxyType({ShedReason.OVERLOADED: 503, ShedReason.TENANT_SHARE: 429})


@dataclasses.dataclass(frozen=True)
class AdmissionPolicy:
    """Numbers of an `Admission`. Times in milliseconds."""

    least: int = 8
    most: int = 256
    start: int = 32
    target_ms: float = DEADLINE_MS[Endpoint.RECOMMEND]
    """An answer slower than this shrinks the limit, however slow answers used to be."""
    tolerance: float = 1.5
    """Answers may come this much slower than they used to before the limit shrinks."""
    smoothing: float = 0.2
    used_to: int = 600
    """Answers over which "used to" is averaged."""
    places: Mapping[Priority, float] = dataclasses.field(
        default_factory=lambda: {Priority.LOW: 0.7, Priority.NORMAL: 0.9, Priority.HIGH: 1.0}
    )
    """Share of the limit that requests of a priority may fill."""
    crowded: float = 0.7
    """Share of a priority's places from which on tenants are held to their shares."""
    retry_after_max_s: int = 30


@dataclasses.dataclass(slots=True, eq=False)
class Admitted:
    """A place; give it back with `Admission.done`, however the request ended."""

    tenant: str
    began_s: float
    in_flight: int
    """With this one, when it came in."""
    done: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Shed:
    """A refusal."""

    reason: ShedReason
    status: int
    retry_after_s: int


class Admission:
    """Ask `admit` before any work, call `done` in a `finally`."""

    def __init__(self, policy: AdmissionPolicy | None = None, *, random: Callable[[], float]) -> None:
        """`random` gives 0 to 1; it spreads Retry-After, so that who was turned away together comes back apart."""
        self._policy = policy or AdmissionPolicy()
        self._random = random
        self._limit = float(self._policy.start)
        self._used_to_ms: float | None = None
        self._by_tenant: dict[str, int] = {}
        self._pressure = 1.0
        self.in_flight = 0
        self.shed: dict[tuple[ShedReason, Priority], int] = {}

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    def admit(self, priority: Priority, tenant: str, now_s: float) -> Admitted | Shed:
        """A place, or why not. O(1)."""
        places = max(1.0, self._limit * self._policy.places[priority])
        if self.in_flight >= places:
            return self._turned_away(ShedReason.OVERLOADED, priority)
        mine = self._by_tenant.get(tenant, 0)
        if self.in_flight >= places * self._policy.crowded:
            others = len(self._by_tenant) + (0 if mine else 1)
            if mine >= max(1.0, places / others):
                return self._turned_away(ShedReason.TENANT_SHARE, priority)
        self._by_tenant[tenant] = mine + 1
        self.in_flight += 1
        self._pressure += 0.01 * (1.0 - self._pressure)
        return Admitted(tenant, now_s, self.in_flight)

    def done(self, admitted: Admitted, now_s: float, *, learn: bool = True) -> None:
        """The request has ended; told twice is told once.

        `learn=False` where its time says nothing: the client went away, or it was answered without work.
        """
        if admitted.done:
            return
        admitted.done = True
        self.in_flight -= 1
        left = self._by_tenant[admitted.tenant] - 1
        if left:
            self._by_tenant[admitted.tenant] = left
        else:
            del self._by_tenant[admitted.tenant]
        if learn:
            self._learn(max((now_s - admitted.began_s) * 1000.0, 0.01), admitted.in_flight)

    def _learn(self, took_ms: float, in_flight: int) -> None:
        policy = self._policy
        used_to = self._used_to_ms
        used_to = took_ms if used_to is None else used_to + (took_ms - used_to) / policy.used_to
        if used_to > 2.0 * took_ms:
            used_to *= 0.95  # after an overload: what it used to be then is not what it used to be
        self._used_to_ms = used_to
        expected = min(policy.tolerance * used_to, policy.target_ms)
        gradient = min(1.0, max(0.5, expected / took_ms))
        if gradient == 1.0 and in_flight < self._limit / 2:
            return  # a limit that nobody comes near says nothing about what could be borne
        wanted = self._limit * gradient + math.sqrt(self._limit)
        limit = self._limit + policy.smoothing * (wanted - self._limit)
        self._limit = min(max(limit, policy.least), policy.most)

    def _turned_away(self, reason: ShedReason, priority: Priority) -> Shed:
        self.shed[reason, priority] = self.shed.get((reason, priority), 0) + 1
        self._pressure += 0.01 * (self._policy.retry_after_max_s - self._pressure)
        after = self._pressure * (1.0 + self._random())
        return Shed(reason, STATUS[reason], min(max(1, round(after)), self._policy.retry_after_max_s))
