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
    refusing: float = 0.1
    """Share of those who came lately that were turned away, from which on it is overloaded and not just full once."""
    refusing_s: float = 0.5
    """And so long ago, at the most, was the last of them."""
    at_once: int = 48
    """Let in between two turns at the most: a few tens of milliseconds of work from the tables."""
    at_once_refusing: int = 16
    """The same while it is overloaded: whoever is let in waits for all that is let in and turned away with it, and as
    many more come in with the next turn anyway."""
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
        self._coming = 0
        self._coming_by_tenant: dict[str, int] = {}
        self._turned = 0.0
        """Share of the last hundred requests or so that were turned away."""
        self._turned_s = -math.inf
        """When the last of them was."""
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
        mine = self._by_tenant.get(tenant, 0)
        reason = self._why_not(priority, self._limit, self.in_flight, mine, len(self._by_tenant))
        if reason is not None:
            return self._turned_away(reason, priority, now_s)
        self._by_tenant[tenant] = mine + 1
        self.in_flight += 1
        self._turned *= 0.99
        return Admitted(tenant, now_s - waited_s, self.in_flight)

    def let_in(self, priority: Priority, tenant: str, now_s: float) -> Shed | None:
        """Why a request may not come as far as `admit`, before any work for it; None lets it come. O(1).

        Of those let in since the last `turn` there are places for so many, too, and shared out alike: a server reads
        from a thousand connections before it works on any of them, and would promise each of them the same place.
        """
        mine, tenants = self._by_tenant.get(tenant, 0), len(self._by_tenant)
        coming, among = self._coming_by_tenant.get(tenant, 0), len(self._coming_by_tenant)
        at_once = self._policy.at_once_refusing if self.refusing(now_s) else self._policy.at_once
        reason = self._why_not(priority, self._limit, self.in_flight, mine, tenants) or self._why_not(
            priority, at_once, self._coming, coming, among
        )
        if reason is not None:
            return self._turned_away(reason, priority, now_s)
        self._turned *= 0.99
        self._coming += 1
        self._coming_by_tenant[tenant] = coming + 1
        return None

    def turn(self) -> None:
        """Work begins on those let in so far; each asks for its own place now."""
        self._coming = 0
        self._coming_by_tenant.clear()

    def refusing(self, now_s: float) -> bool:
        """Whether many are turned away just now: what is done for one of the others is then not done for someone."""
        return self._turned >= self._policy.refusing and now_s - self._turned_s < self._policy.refusing_s

    def _why_not(self, priority: Priority, limit: float, inside: int, mine: int, tenants: int) -> ShedReason | None:
        """With so many inside of at most so many, so many of them of the same tenant, and so many tenants."""
        places = max(1.0, limit * self._policy.places[priority])
        if inside >= places:
            return ShedReason.OVERLOADED
        share = max(1.0, places / (tenants + (0 if mine else 1)))
        if inside >= places * self._policy.crowded and mine >= share:
            return ShedReason.TENANT_SHARE
        return None

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

    def _turned_away(self, reason: ShedReason, priority: Priority, now_s: float) -> Shed:
        self._turned_s = now_s
        self.shed[reason, priority] = self.shed.get((reason, priority), 0) + 1
        self._turned += 0.01 * (1.0 - self._turned)
        # What comes per request that is served says how long the queue of all would be; chance parts who came together.
        most = self._policy.retry_after_max_s
        after = min(1.0 / max(1.0 - self._turned, 1e-9), most / 2.0) * (1.0 + self._random())
        return Shed(reason, STATUS[reason], min(max(1, round(after)), most))
