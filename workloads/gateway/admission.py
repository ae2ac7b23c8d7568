"""Who comes in when not all can: a limit on requests in flight that follows latency, and who is turned away first.

The limit is of the gradient kind (Netflix' concurrency-limits, Gradient2, in windows): it grows while answers come well
within their promise and places are used, and shrinks by how much later than that they come. It is held against the
promise and not against how fast answers used to be: a neighbour that becomes slow is the router's to leave, and no
reason to turn people away. Low priority is turned away first, high last, and where it is crowded no tenant gets more
places than an equal share of them. Pure: time and chance come in. It does not know what is asked for.
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
    start: int = 64
    target_ms: float = DEADLINE_MS[Endpoint.RECOMMEND] / 2.0
    """The limit shrinks while the mean answer takes longer. A queue that is let grow to the limit makes all wait alike,
    so this is well below the deadline."""
    window_s: float = 0.1
    """The limit moves at most so often, by what ended meanwhile."""
    window_answers: int = 10
    """And by so many at the least."""
    smoothing: float = 0.3
    growth: float = 0.5
    """Times the limit's root: places added per window before smoothing."""
    places: Mapping[Priority, float] = dataclasses.field(
        default_factory=lambda: {Priority.LOW: 0.7, Priority.NORMAL: 0.9, Priority.HIGH: 1.0}
    )
    """Share of the limit that requests of a priority may fill."""
    crowded: float = 0.85
    """Share of a priority's places from which on tenants are held to their shares."""
    retry_after_max_s: int = 30


@dataclasses.dataclass(slots=True, eq=False)
class Admitted:
    """A place; give it back with `Admission.done`, however the request ended."""

    tenant: str
    began_s: float
    """When it arrived."""
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
        self._window_s: float | None = None
        self._ended = 0
        self._took_ms = 0.0
        self._fullest = 0
        self._by_tenant: dict[str, int] = {}
        self._turned = 0.0
        """Share of the last hundred requests or so that were turned away."""
        self.in_flight = 0
        self.shed: dict[tuple[ShedReason, Priority], int] = {}

    @property
    def limit(self) -> int:
        """Requests that may be in flight now."""
        return int(self._limit)

    def admit(self, priority: Priority, tenant: str, now_s: float, waited_s: float = 0.0) -> Admitted | Shed:
        """A place, or why not. O(1).

        `waited_s`: how long the request lay before anybody looked at it, as the event loop's lag says. It is
        part of what its answer took; without it, an overloaded loop looks half as slow as it is.
        """
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
        self._turned *= 0.99
        return Admitted(tenant, now_s - waited_s, self.in_flight)

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
            self._ended += 1
            self._took_ms += max(now_s - admitted.began_s, 0.0) * 1000.0
            self._fullest = max(self._fullest, admitted.in_flight)
            self._learn(now_s)

    def _learn(self, now_s: float) -> None:
        policy = self._policy
        if self._window_s is None:
            self._window_s = now_s
        if self._ended < policy.window_answers or now_s - self._window_s < policy.window_s:
            return
        gradient = min(1.0, max(0.5, policy.target_ms * self._ended / max(self._took_ms, 1e-9)))
        # A limit that nobody came near says nothing about what could be borne.
        if gradient < 1.0 or self._fullest >= self._limit / 2.0:
            wanted = self._limit * gradient + policy.growth * math.sqrt(self._limit)
            limit = self._limit + policy.smoothing * (wanted - self._limit)
            self._limit = min(max(limit, policy.least), policy.most)
        self._window_s, self._ended, self._took_ms, self._fullest = now_s, 0, 0.0, 0

    def _turned_away(self, reason: ShedReason, priority: Priority) -> Shed:
        self.shed[reason, priority] = self.shed.get((reason, priority), 0) + 1
        self._turned += 0.01 * (1.0 - self._turned)
        # What comes per request that is served says how long the queue of all would be; chance parts who came together.
        most = self._policy.retry_after_max_s
        after = min(1.0 / max(1.0 - self._turned, 1e-9), most / 2.0) * (1.0 + self._random())
        return Shed(reason, STATUS[reason], min(max(1, round(after)), most))
