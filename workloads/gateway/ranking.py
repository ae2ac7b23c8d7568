"""The rank stage: the calls that the router chooses, made, timed and given back, until somebody has scored.

Routes are the site's own Triton and the other site's (both rung 1), and the student in this process (rung 2). One plan:
the route that the router chooses; beside it, when it is out too long, a second one (a hedge); after it, when it failed
and time is left, the next (the one layer that tries again); and last the student, whose time was kept back. It knows no
candidate, only rows of features, and no edition but by the doors that it was given.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from workloads.contract.slo import STAGE_P99_MS, Rung, Stage
from workloads.gateway.doors import DoorFault, Ranker
from workloads.gateway.ladder import WORTH_TRYING_MS, Reason
from workloads.gateway.router import Choice, Outcome, Route, RouteFacts, Router, Ticket
from workloads.gateway.timing import Clock
from workloads.telemetry import log

DIFFERS_FOR_S: Final = 0.5
"""How long a site on another edition is left alone before it is asked again: flips of two sites are seconds apart."""

TELL_EVERY_S: Final = 5.0
"""A route that fails is in the log as often: a line per request would bury what else is said."""

_LATE: Final = frozenset({Reason.RANKER_LATE, Reason.PEER_LATE})
_logger = log.get(component="ranking")


class Ranked(NamedTuple):
    """Scores, and how they came about."""

    probabilities: npt.NDArray[np.float32]
    route: Route
    predicted_ms: float
    """What was expected of the first call."""
    reason: Reason | None
    """Why the rung is below what was asked for; None when it is not."""


class Watch(Protocol):
    """Is told what becomes of calls; `telemetry.metrics.RouteMetrics` counts it."""

    def call(self, site: str, rung: int, took_ms: float | None) -> None:
        """A call was answered in so many ms; None: it gave nothing that could be used."""
        ...

    def hedge(self, site: str) -> None:
        """A second call went to this site beside the first."""
        ...

    def retry(self, site: str, rung: int) -> None:
        """After a failure this route was tried."""
        ...

    def choice(self, site: str, rung: int, reason: str) -> None:
        """This route ranked a request, for this reason when it is below the best."""
        ...


class Unwatched:
    """Tells nobody."""

    def call(self, site: str, rung: int, took_ms: float | None) -> None:
        """See `Watch`."""

    def hedge(self, site: str) -> None:
        """See `Watch`."""

    def retry(self, site: str, rung: int) -> None:
        """See `Watch`."""

    def choice(self, site: str, rung: int, reason: str) -> None:
        """See `Watch`."""


class Ranking:
    """The rankers of one edition behind one call. The router is the gateway's, and outlives editions."""

    def __init__(
        self,
        *,
        site: str,
        router: Router,
        doors: Mapping[Route, Ranker],
        clock: Clock,
        on_fault: Callable[[Reason], None] = lambda _: None,
        watch: Watch | None = None,
    ) -> None:
        """`doors` are of one edition; a route of the router that has none here is not taken.

        `site` is this one, whose rung 1 is its own Triton. `on_fault` is told of every call without a usable answer.
        Raises ValueError when a door has no route, or the site's own ranker is not among them.
        """
        self._own = Route(site, Rung.FULL_RANKER)
        routes = [state.route for state in router.states(clock.now_s())]
        if not set(doors) <= set(routes) or self._own not in doors:
            raise ValueError(f"doors are for {sorted(doors)}, and the router has {sorted(routes)}")
        self._router = router
        self._doors = dict(doors)
        self._clock = clock
        self._on_fault = on_fault
        self._watch: Watch = watch or Unwatched()
        self._absent = tuple(route for route in routes if route not in doors)
        self._others = tuple(route for route in routes if route != self._own)
        self._full = tuple(route for route in doors if route.rung == Rung.FULL_RANKER)
        self._has_student = any(route.rung > Rung.FULL_RANKER for route in doors)
        self._differs_until_s = dict.fromkeys(self._full, 0.0)
        self._lost: dict[Route, Reason] = {}
        """Why a route brought nothing the last time; empty of those that answered since."""
        self._told_s: dict[Route, float] = {}

    @classmethod
    def alone(
        cls, site: str, ranker: Ranker, clock: Clock, on_fault: Callable[[Reason], None] = lambda _: None
    ) -> Ranking:
        """One ranker, no other site and no student."""
        own = Route(site, Rung.FULL_RANKER)
        router = Router([RouteFacts(own)], random=lambda: 0.5)
        return cls(site=site, router=router, doors={own: ranker}, clock=clock, on_fault=on_fault)

    @property
    def backends(self) -> dict[str, Ranker]:
        """The doors as `/readyz` names them."""
        names = {self._own: "triton"}
        return {
            names.get(route, "student" if route.rung > Rung.FULL_RANKER else "peer"): door
            for route, door in self._doors.items()
        }

    async def close(self) -> None:
        """Close every door."""
        for door in self._doors.values():
            await door.close()

    async def rank(
        self,
        sparse: npt.NDArray[np.int64],
        dense: npt.NDArray[np.float32],
        left_ms: float,
        best_rung: int = Rung.FULL_RANKER,
    ) -> Ranked:
        """Probabilities of all rows, [C], within `left_ms`, from `best_rung` or the next that answers.

        Raises DoorFault when no ranker has scored: with the first fault met, or why none was tried.
        """
        router, rows = self._router, len(sparse)
        begun = now = self._clock.now_s()
        left_out = self._left_out(now)
        fault: DoorFault | None = None
        if left_ms < WORTH_TRYING_MS:
            fault, choice = DoorFault(Reason.NO_TIME, "the deadline leaves no time"), None
        else:
            choice = router.choose(rows, left_ms, now, best_rung, left_out)
        choice = choice or self._last(None, rows, now, left_out)
        predicted_ms = 0.0 if choice is None else choice.predicted_ms
        while choice is not None:
            if choice.extra:
                self._watch.retry(*choice.route)
            ticket = router.began(choice, now)
            try:
                probabilities, route = await self._called(ticket, sparse, dense, left_out)
            except DoorFault as met:
                fault = fault or met
                now = self._clock.now_s()
                left = left_ms - (now - begun) * 1000.0
                choice = router.retry(choice, left, now, left_out) or self._last(choice, rows, now, left_out)
                continue
            reason = None if route.rung <= best_rung else self._why(fault)
            self._watch.choice(*route, "" if reason is None else reason.value)
            return Ranked(probabilities, route, predicted_ms, reason)
        raise fault or DoorFault(self._why(None), "no ranker was expected to answer in time")

    def _last(self, first: Choice | None, rows: int, now_s: float, left_out: list[Route]) -> Choice | None:
        """The student, whatever is left: a busy machine may wake us late, and it takes less than is kept back."""
        if not self._has_student:
            return None
        tried, left_ms = (*self._full, *left_out), STAGE_P99_MS[Stage.RANK]
        if first is not None:
            return self._router.retry(first, left_ms, now_s, tried)
        return self._router.choose(rows, left_ms, now_s, Rung.DISTILLED_RANKER, tried)

    async def rank_here(
        self, sparse: npt.NDArray[np.int64], dense: npt.NDArray[np.float32], left_ms: float
    ) -> npt.NDArray[np.float32]:
        """As `rank`, by this site's own Triton or not at all: what the other site asks for is never passed on."""
        now = self._clock.now_s()
        choice = self._router.choose(len(sparse), left_ms, now, Rung.FULL_RANKER, self._others)
        if choice is None:
            raise DoorFault(self._why(None), "this site's own ranker is not expected to answer in time")
        return await self._timed(self._router.began(choice, now), sparse, dense)

    def _left_out(self, now_s: float) -> list[Route]:
        """Routes that this edition has no door for, or that are known to be on another edition; then those tried."""
        left_out = [*self._absent]
        if len(self._full) > 1:
            left_out += [route for route in self._full if now_s < self._differs_until_s[route]]
        return left_out

    def _why(self, fault: DoorFault | None) -> Reason:
        """Why this site's own ranker did not rank."""
        own = self._lost.get(self._own)
        if own is not None:
            return own
        return Reason.RANKER_SLOW if fault is None else fault.reason

    async def _called(
        self,
        ticket: Ticket,
        sparse: npt.NDArray[np.int64],
        dense: npt.NDArray[np.float32],
        left_out: list[Route],
    ) -> tuple[npt.NDArray[np.float32], Route]:
        """One call, and a second beside it when it is out too long and there is somewhere to go. Raises DoorFault.

        Both routes are added to `left_out`.
        """
        choice = ticket.choice
        left_out.append(choice.route)
        if choice.hedge_after_ms >= choice.budget_ms:
            return await self._timed(ticket, sparse, dense), choice.route
        second = _Second()

        def hedge() -> None:
            now = self._clock.now_s()
            left_ms = choice.left_ms - (now - ticket.began_s) * 1000.0
            other = self._router.hedge(ticket, left_ms, now, left_out)
            if other is None:
                return
            left_out.append(other.route)
            self._watch.hedge(other.route.site)
            beside = self._router.began(other, now)
            # A task that is called off before its first step never comes to give its ticket back.
            second.start(
                self._timed(beside, sparse, dense),
                other.route,
                lambda: self._router.ended(beside, Outcome.CANCELLED, self._clock.now_s()),
            )

        timer = asyncio.get_running_loop().call_later(choice.hedge_after_ms / 1000.0, hedge)
        try:
            # The first call is no task of its own: most answers come with nothing beside it, and wait for nobody.
            async with asyncio.timeout(None) as second.beaten:
                return await self._timed(ticket, sparse, dense), choice.route
        except TimeoutError:
            return await second.answer()
        except DoorFault as fault:
            if second.call is None:
                raise
            with contextlib.suppress(DoorFault):
                return await second.answer()
            raise fault from None  # the first that was met
        finally:
            timer.cancel()
            second.end()

    async def _timed(
        self, ticket: Ticket, sparse: npt.NDArray[np.int64], dense: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float32]:
        """The call of a ticket, which is given back however it ends. Raises DoorFault."""
        choice, outcome = ticket.choice, Outcome.CANCELLED
        route = choice.route
        try:
            probabilities = await self._doors[route].probabilities(sparse, dense, choice.budget_ms / 1000.0)
            outcome = Outcome.ANSWERED
        except DoorFault as fault:
            outcome = self._failed(route, fault)
            raise
        finally:
            now = self._clock.now_s()
            self._router.ended(ticket, outcome, now)
            if outcome is not Outcome.CANCELLED:
                took_ms = (now - ticket.began_s) * 1000.0 if outcome is Outcome.ANSWERED else None
                self._watch.call(*route, took_ms)
        if self._lost and self._lost.pop(route, None) is not None and self._told_s.pop(route, None) is not None:
            _logger.info("a ranker is back", site=route.site, rung=route.rung)
        return probabilities

    def _failed(self, route: Route, fault: DoorFault) -> Outcome:
        """What a fault says of its route."""
        self._on_fault(fault.reason)
        if fault.reason is Reason.PEER_OTHER_BUNDLE:
            self._differs_until_s[route] = self._clock.now_s() + DIFFERS_FOR_S
            return Outcome.CANCELLED
        now = self._clock.now_s()
        if now - self._told_s.get(route, -TELL_EVERY_S) >= TELL_EVERY_S:
            self._told_s[route] = now
            _logger.warning(
                "a ranker gave no answer",
                site=route.site,
                rung=route.rung,
                reason=fault.reason.value,
                fault=fault.detail,
            )
        self._lost[route] = fault.reason
        return Outcome.LATE if fault.reason in _LATE else Outcome.FAILED


class _Second:
    """The call beside a first one, if there is any: its answer ends the wait for the first."""

    def __init__(self) -> None:
        self.beaten: asyncio.Timeout | None = None
        """Runs out, at once, when this call has answered before the first."""
        self.call: asyncio.Task[npt.NDArray[np.float32]] | None = None
        self._route: Route | None = None
        self._over = False

    def start(
        self, call: Coroutine[Any, Any, npt.NDArray[np.float32]], route: Route, ended: Callable[[], None]
    ) -> None:
        """Make the call; `ended` is told when it is over, however it was."""
        self._route = route
        self.call = asyncio.get_running_loop().create_task(call)
        self.call.add_done_callback(self._done)
        self.call.add_done_callback(lambda _: ended())

    async def answer(self) -> tuple[npt.NDArray[np.float32], Route]:
        """What it brings. Raises DoorFault; there must be a call."""
        self._over = True
        if self.call is None or self._route is None:
            raise AssertionError("nobody was called")
        return await self.call, self._route

    def end(self) -> None:
        """Call it off, where it is still out."""
        self._over = True
        if self.call is not None:
            self.call.cancel()

    def _done(self, call: asyncio.Task[npt.NDArray[np.float32]]) -> None:
        # Asked for its fault, whether anybody cares or not: one that nobody asks about would be reported.
        if call.cancelled() or call.exception() is not None or self._over or self.beaten is None:
            return
        self.beaten.reschedule(asyncio.get_running_loop().time())
