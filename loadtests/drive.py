"""What the constant-rate driver is asked to send: to whom, how fast, for how long, and what of it.

Pure: moments at which requests are due follow from the legs alone and wait for nobody. `driver` sends them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated

import msgspec

from workloads.contract.slo import DEADLINE_MS, TRAFFIC_PER_S, Endpoint, Priority

Rate = Annotated[float, msgspec.Meta(gt=0, le=100_000)]
Seconds = Annotated[float, msgspec.Meta(gt=0, le=86_400)]

MIX: Mapping[str, float] = {endpoint.value: rate for endpoint, rate in TRAFFIC_PER_S.items()}
"""The shop's traffic: weights by endpoint."""
READS: Mapping[str, float] = {name: rate for name, rate in MIX.items() if name != Endpoint.EVENTS}
"""The same without events: what a site is asked that cannot reach the intake."""
HASTE: Mapping[str, float] = {name: DEADLINE_MS[Endpoint(name)] for name in READS}
"""Deadlines that requests bring along. Events bring none: a late acknowledgement is cheaper than a retry."""


class Leg(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """So many requests a second, evenly spaced, for so long."""

    seconds: Seconds
    rate: Rate


class Aim(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A gateway, its share of the requests, and weights of what it is asked."""

    url: str
    share: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    mix: dict[str, float] = msgspec.field(default_factory=lambda: dict(MIX))


class Drive(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One run of the driver."""

    aims: Annotated[list[Aim], msgspec.Meta(min_length=1)]
    legs: Annotated[list[Leg], msgspec.Meta(min_length=1)]
    seed: int = 1
    warmup_s: float = 0.0
    timeout_s: Seconds = 2.0
    """After so long a request is given up: nobody waits for a shop longer."""
    connections: Annotated[int, msgspec.Meta(ge=1, le=10_000)] = 2048
    """To each gateway, at the most. Shoppers do not queue for each other's connections: a bound that is reached costs
    requests their time, so it is far above what a gateway that answers in time has open."""
    deadlines: dict[str, float] = msgspec.field(default_factory=lambda: dict(HASTE))
    """By endpoint; `Rankbridge-Deadline-Ms` says what is left of it when the request is really sent."""
    priorities: dict[Priority, float] = {}
    """Weights of priorities; none sends no header."""
    tenants: dict[str, float] = {}
    """Weights of tenants; none sends no header."""

    @property
    def seconds(self) -> float:
        """From the first arrival to the end of the last leg."""
        return sum(leg.seconds for leg in self.legs)

    def due(self) -> Iterator[float]:
        """Seconds after the start at which each request is due, in order."""
        began = 0.0
        for leg in self.legs:
            for number in range(round(leg.seconds * leg.rate)):
                yield began + number / leg.rate
            began += leg.seconds

    def rate_at(self, at_s: float) -> float:
        """Requests a second that are due at a moment; 0 after the end."""
        for leg in self.legs:
            if at_s < leg.seconds:
                return leg.rate
            at_s -= leg.seconds
        return 0.0
