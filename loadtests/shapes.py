"""How many users there are at each moment of a suite, and the budgets that suite is held to.

A user is one arrival process (`users`), so with `--rate-per-user 1` users are requests a second.
"""

from __future__ import annotations

from locust import LoadTestShape  # isort: skip - first, because it brings gevent in

import itertools
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from loadtests import budgets
from loadtests.budgets import Budgets
from workloads.contract.slo import TRAFFIC_PER_S

PROMISED_USERS = int(sum(TRAFFIC_PER_S.values()))
JOIN_PER_S = 100.0
"""Locust warns of more."""


class Phase(NamedTuple):
    """So many users for so long."""

    seconds: float
    users: int


class PhasedShape(LoadTestShape):
    """Goes through `phases`, then ends the run. Users join and leave within two seconds."""

    abstract = True
    phases: ClassVar[tuple[Phase, ...]]
    held_to: ClassVar[Callable[[], Budgets]]

    def tick(self) -> tuple[int, float] | None:
        """Users at this moment, and how many may join a second."""
        now: float = self.get_run_time()  # type: ignore[no-untyped-call]  # Locust's own, without annotations
        ends = itertools.accumulate(phase.seconds for phase in self.phases)
        for end, phase in zip(ends, self.phases, strict=True):
            if now < end:
                return phase.users, JOIN_PER_S
        return None


class SmokeShape(PhasedShape):
    """Is everything there and answering right: 20 seconds at a fifth of the promised traffic."""

    phases = (Phase(20, PROMISED_USERS // 5),)
    held_to = staticmethod(lambda: budgets.small(10))


class SteadyShape(PhasedShape):
    """The promised traffic, long enough for 1,000 samples of the rarest endpoint after warm-up."""

    phases = (Phase(125, PROMISED_USERS),)
    held_to = staticmethod(budgets.promise)


class SpikeShape(PhasedShape):
    """Three times the promised traffic out of the blue, and back."""

    phases = (Phase(45, PROMISED_USERS), Phase(20, 3 * PROMISED_USERS), Phase(45, PROMISED_USERS))
    held_to = staticmethod(budgets.surge)
