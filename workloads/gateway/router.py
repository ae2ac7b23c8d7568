"""Which site ranks a request, and at which rung: the best that finishes in time, and of those the cheapest.

A route is a (site, rung). Its histogram of latencies, its calls in flight and their ages say when a call would be
finished at `contract.slo.ROUTE_QUANTILE`; a call that is out longer than predicted is evidence too, so that a stopped
neighbour is noticed without a single answer. The order of preference, exactly:

1. Only routes at the rung that was asked for or below, that are not excluded, that are not drained, and whose predicted
   finish fits what is left of the deadline.
2. Among those the best rung; within a rung the lowest price; at equal price the earlier finish. A dearer site so gets
   only what the cheaper one cannot finish. With `RouterPolicy.loss_price` set, quality has a price instead: the lowest
   price + loss_price x loss.
3. Nothing fits: None, and the caller answers from a rung that needs no call.

Slow is down. A route whose quantile passes `slow_ms`, or that fails too often, is drained; a few requests that can
afford it probe it, one at a time, and when so many in a row were good, traffic comes back in steps. Pure: time and
chance come in as numbers. It does not know what a call carries or how it is made.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from workloads.contract.slo import HEDGE_SHARE_MAX, ROUTE_QUANTILE, STAGE_P99_MS, Rung, Stage
from workloads.gateway.budgets import BURST, RETRY_SHARE_MAX, TokenBudget
from workloads.gateway.latency import DecayedHistogram


class Route(NamedTuple):
    """Where a call goes: to the ranker of this rung at this site."""

    site: str
    rung: int


@dataclasses.dataclass(frozen=True)
class RouteFacts:
    """What is known of a route before anything was measured."""

    route: Route
    price: float = 0.0
    """Of one call; only its order and ratios matter, but for `loss_price`."""
    loss: float = 0.0
    """Share of rung 1's NDCG@10 that this rung loses; used with `RouterPolicy.loss_price` only."""
    parallel: int = 1
    """Calls that the neighbour works on at once; what is beyond them waits."""
    prior_ms: float = 10.0
    """Predicted until something was measured."""


@dataclasses.dataclass(frozen=True)
class RouterPolicy:
    """Numbers of a `Router`. Times as their names say."""

    quantile: float = ROUTE_QUANTILE
    half_life_s: float = 2.0
    slow_ms: float = STAGE_P99_MS[Stage.RANK]
    """A route whose quantile is beyond this is down."""
    loss_price: float | None = None
    """None: the best rung that fits, whatever it costs. A number: what a loss of 1 (all of NDCG) would be worth, in the
    unit of prices."""
    hedge_share: float = HEDGE_SHARE_MAX
    retry_share: float = RETRY_SHARE_MAX
    burst: float = BURST


class Outcome(enum.Enum):
    """How a call ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    """An error, a broken connection, nonsense: the route's fault."""
    LATE = "late"
    """Given up at the end of its time."""
    CANCELLED = "cancelled"
    """Given up for another reason (the hedge won, the client left): says only that it took longer than so far."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """One call to make."""

    route: Route
    rows: int
    left_ms: float
    predicted_ms: float
    """When it is finished, at the quantile."""
    budget_ms: float
    """Give it up after this: what is left of the deadline, less what `fallback` takes where there is room for both."""
    probe: bool = False
    """The route is down or slow, and this call is to find out whether it is back."""
    fallback: Route | None = None
    """What would be tried after it."""


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A call in flight; hand it back with `Router.ended`, however the call ended."""

    choice: Choice
    began_s: float
    ahead: int
    """Calls that were in flight on the route when it began."""
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class RouteState:
    """A route as a metric or a table shows it."""

    route: Route
    predicted_ms: float
    in_flight: int
    drained: bool
    error_share: float
    share: float
    """Of the requests that would take it, this part may: below 1 while traffic comes back."""


class Router:
    """One per gateway and edition-independent; not for several threads."""

    def __init__(
        self, routes: Sequence[RouteFacts], policy: RouterPolicy | None = None, *, random: Callable[[], float]
    ) -> None:
        """`random` gives 0 to 1. Raises ValueError for a route that is there twice."""
        self.policy = policy or RouterPolicy()
        self._random = random
        self._lanes = {facts.route: _Lane(facts, self.policy) for facts in routes}
        if len(self._lanes) != len(routes):
            raise ValueError("a route is there twice")
        self.hedges = TokenBudget(self.policy.hedge_share, self.policy.burst)
        self.retries = TokenBudget(self.policy.retry_share, self.policy.burst)

    def choose(
        self,
        rows: int,
        left_ms: float,
        now_s: float,
        best_rung: int = Rung.FULL_RANKER,
        exclude: Collection[Route] = (),
    ) -> Choice | None:
        """The first call of a request with `rows` candidates and `left_ms` for it; None when nothing fits."""
        fitting = []
        for lane in self._lanes.values():
            facts = lane.facts
            if facts.route.rung < best_rung or facts.route in exclude:
                continue
            predicted = lane.predicted_ms(now_s)
            if predicted <= left_ms:
                fitting.append((facts.route.rung, facts.price, predicted, facts.route))
        if not fitting:
            return None
        fitting.sort()
        _, _, predicted, route = fitting[0]
        return Choice(route, rows, left_ms, predicted, left_ms)

    def began(self, choice: Choice, now_s: float) -> Ticket:
        """The call is being made."""
        lane = self._lanes[choice.route]
        ticket = Ticket(choice, now_s, len(lane.in_flight))
        lane.in_flight[id(ticket)] = ticket
        return ticket

    def ended(self, ticket: Ticket, outcome: Outcome, now_s: float) -> None:
        """The call is over. Twice is once."""
        if ticket.ended:
            return
        ticket.ended = True
        lane = self._lanes[ticket.choice.route]
        del lane.in_flight[id(ticket)]
        took_ms = (now_s - ticket.began_s) * 1000.0
        if outcome is Outcome.ANSWERED:
            lane.histogram.observe(took_ms, now_s)
        elif outcome is not Outcome.FAILED:
            lane.histogram.observe_at_least(took_ms, now_s)

    def hedge_after_ms(self, choice: Choice) -> float:
        """Since the call began: later than this, a second one may be worth it."""
        return choice.predicted_ms

    def hedge(self, ticket: Ticket, left_ms: float, now_s: float, exclude: Collection[Route] = ()) -> Choice | None:
        """A second call beside one that is out too long, at another route, within the budget; None: just wait."""
        other = self.choose(
            ticket.choice.rows, left_ms, now_s, ticket.choice.route.rung, exclude=(ticket.choice.route, *exclude)
        )
        return other if other is not None and self.hedges.take() else None

    def retry(
        self,
        ticket: Ticket,
        left_ms: float,
        now_s: float,
        best_rung: int = Rung.FULL_RANKER,
        exclude: Collection[Route] = (),
    ) -> Choice | None:
        """What to do after a call that failed or was late: the one place that tries again.

        A step down to a lower rung is always free, as an answer must be; another site at an equal rung needs a token.
        """
        return self.choose(ticket.choice.rows, left_ms, now_s, best_rung, exclude=(ticket.choice.route, *exclude))

    def states(self, now_s: float) -> list[RouteState]:
        """Every route, for metrics."""
        return [
            RouteState(
                lane.facts.route,
                lane.predicted_ms(now_s),
                len(lane.in_flight),
                drained=False,
                error_share=0.0,
                share=1.0,
            )
            for lane in self._lanes.values()
        ]


class _Lane:
    """What is known of one route."""

    def __init__(self, facts: RouteFacts, policy: RouterPolicy) -> None:
        self.facts = facts
        self.histogram = DecayedHistogram(policy.half_life_s)
        self.in_flight: dict[int, Ticket] = {}
        self._quantile = policy.quantile

    def predicted_ms(self, now_s: float) -> float:  # noqa: ARG002 - overdue calls follow
        return self.histogram.quantile(self._quantile) or self.facts.prior_ms
