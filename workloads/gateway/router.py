"""Which site ranks a request, and at which rung: the best that finishes in time, and of those the cheapest.

A route is a (site, rung). Its histogram of latencies, its calls in flight and their ages say when a call would be
finished at `contract.slo.ROUTE_QUANTILE`; a call that is out longer than predicted is evidence too, so that a stopped
neighbour is noticed without a single answer. The order of preference, exactly:

1. Only routes at the rung that was asked for or below, that are not excluded, that are not drained, and whose predicted
   finish fits what is left of the deadline.
2. Among those the best rung; within a rung first those that leave time to step down when the call fails, then the
   lowest price, then the earlier finish. A dearer site so gets only what the cheaper one cannot finish. With
   `RouterPolicy.loss_price` set, quality has a price instead: price + loss_price x loss comes first, then the same.
3. Nothing fits: None, and the caller answers from a rung that needs no call.

Slow is down. A route whose quantile passes `slow_ms`, or that fails too often, is drained; a few requests that can
afford it probe it, one at a time, and when so many in a row were good, traffic comes back in steps. A route that
relapses is asked for more good probes, further apart. Pure: time and chance come in as numbers. It does not know what a
call carries or how it is made.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Collection, Sequence
from typing import Final, NamedTuple

from workloads.contract.slo import CANDIDATES_RANKED, HEDGE_SHARE_MAX, ROUTE_QUANTILE, STAGE_P99_MS, Rung, Stage
from workloads.gateway.budgets import BURST, RETRY_SHARE_MAX, TokenBudget
from workloads.gateway.calibration import Calibration
from workloads.gateway.latency import SAMPLES_HALF_LIFE, DecayedHistogram

_LOST_AFTER_S: Final = 60.0
"""A probe that nobody ended by then was lost by its caller."""
_PROBE_ANYWAY_S: Final = 1.0
"""A probe this long after the last is paid by nobody: where hardly anybody calls, a share of calls is none."""
_STARVED_S: Final = 0.5
"""A route that nobody called for so long because it does not fit is worth a probe, too."""
_SMALLEST: Final = 5
_USUAL: Final = (CANDIDATES_RANKED - 1).bit_length()
_QUIET: Final = 20.0
"""With fewer calls' worth of evidence a share of errors says nothing."""
_RELAPSES_MOST: Final = 4


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
    """Numbers of a `Router`. Units as the names say; shares are 0 to 1."""

    quantile: float = ROUTE_QUANTILE
    half_life_s: float = 2.0
    slow_ms: float = STAGE_P99_MS[Stage.RANK]
    """A route whose quantile is beyond this, for the usual number of candidates and with nobody before, is drained."""
    good: float = 0.5
    """Share of `slow_ms` that a probe may take to be a good one: what lies between keeps a route from flapping."""
    slow_calls_least: float = 3.0
    """So many slow calls it takes to drain a route, however few there were in all."""
    failures_in_a_row: int = 8
    """So many drain a route at once. Fewer can be one client's requests that a neighbour cannot digest."""
    error_share: float = 0.25
    """Beyond this share of failed calls a route is drained."""
    loss_price: float | None = None
    """None: the best rung that fits, whatever it costs. A number: what a loss of 1 (all of NDCG) would be worth, in the
    unit of prices."""
    probe_share: float = 0.05
    """Of the requests, this share may be probes."""
    probe_first_s: float = 0.1
    probe_last_s: float = 0.5
    """Between two probes of a route: this at first, and doubling up to the last while they are bad."""
    probes_good: int = 4
    """So many good probes in a row bring a route back; twice as many after each relapse, up to sixteen times."""
    ramp_first: float = 0.1
    ramp_double_s: float = 0.25
    """A route that is back gets this share of its requests at first, and twice as much after each such time."""
    relapse_s: float = 30.0
    """Drained again within this time after it came back is a relapse."""
    fallback_room: float = 1.25
    """A fallback is kept so many times what it is predicted to take, or it would not fit when its time comes."""
    probe_room: float = 2.0
    """The same for what follows a probe, which is not expected to succeed."""
    hedge_room: float = 1.25
    """A hedge begins, at the earliest, when only so many times what the other route is predicted to take is left."""
    hedge_share: float = HEDGE_SHARE_MAX
    retry_share: float = RETRY_SHARE_MAX
    burst: float = BURST


class Drained(enum.StrEnum):
    """Why a route is drained. Fixed words: metrics carry them as labels."""

    SLOW = "slow"
    FAILING = "failing"


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
    """When it is finished, at the quantile; of a probe what the route was last known to take."""
    budget_ms: float
    """Give it up after this: what is left of the deadline, less what `fallback` takes where there is room for both."""
    hedge_after_ms: float = math.inf
    """When it is out this long, a second call may be worth it: not before the quantile, and not before the deadline is
    in danger, because a hedge that saves no deadline is only dear. Infinity: no other route would help."""
    probe: bool = False
    """The route is down or slow, and this call is to find out whether it is back."""
    extra: bool = False
    """A hedge or a retry, not a request's first call."""
    fallback: Route | None = None
    """The quickest other route, when the budget leaves it room; `Router.retry` chooses anew when it comes to that."""


@dataclasses.dataclass(slots=True, eq=False)
class Ticket:
    """A call in flight; hand it back with `Router.ended`, however the call ended."""

    choice: Choice
    began_s: float
    waiting: float
    """How many times longer than alone it takes, by the calls that were before it."""
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class RouteState:
    """A route as a metric or a table shows it."""

    route: Route
    predicted_ms: float
    """Of a call with the usual number of candidates that began now."""
    in_flight: int
    drained: Drained | None
    error_share: float
    share: float
    """Of the requests that would take it, this part may: 0 while drained, below 1 while traffic comes back."""
    probes: int
    drains: int


class Router:
    """One per gateway; outlives editions, because a site's speed does. Not for several threads."""

    def __init__(
        self, routes: Sequence[RouteFacts], policy: RouterPolicy | None = None, *, random: Callable[[], float]
    ) -> None:
        """`random` gives 0 to 1. Raises ValueError for a route that is there twice."""
        self.policy = policy or RouterPolicy()
        self._random = random
        self._lanes = {facts.route: _Lane(facts, self.policy) for facts in routes}
        if len(self._lanes) != len(routes):
            raise ValueError("a route is there twice")
        self._ordered = sorted(self._lanes.values(), key=lambda lane: (lane.rank, lane.facts.route))
        self.hedges = TokenBudget(self.policy.hedge_share, self.policy.burst)
        self.retries = TokenBudget(self.policy.retry_share, self.policy.burst)
        self._probes = TokenBudget(self.policy.probe_share, burst=2.0)
        self.calibration = Calibration()

    def choose(
        self,
        rows: int,
        left_ms: float,
        now_s: float,
        best_rung: int = Rung.FULL_RANKER,
        exclude: Collection[Route] = (),
    ) -> Choice | None:
        """The first call of a request with `rows` candidates and `left_ms` for it; None when nothing fits."""
        self._probes.earned()
        return self._choose(rows, left_ms, now_s, best_rung, exclude, extra=False)

    def _choose(
        self, rows: int, left_ms: float, now_s: float, best_rung: int, exclude: Collection[Route], *, extra: bool
    ) -> Choice | None:
        fitting: list[tuple[_Lane, float]] = []
        probed: tuple[_Lane, float] | None = None
        for lane in self._ordered:
            route = lane.facts.route
            if lane.rung < best_rung or route in exclude:
                continue
            predicted = lane.predicted_ms(rows, now_s)
            if lane.drained is None and predicted <= left_ms:
                fitting.append((lane, predicted))
            elif not extra and probed is None and not fitting and lane.probe_due(now_s):
                probed = lane, predicted  # it would be better than whatever fits
        if probed is not None and (choice := self._probe(probed, fitting, rows, left_ms, now_s)) is not None:
            return choice
        if not fitting:
            return None
        best, predicted = self._preferred(fitting, left_ms, now_s)
        rung = best.rung
        quickest: _Lane | None = None
        after = helping = math.inf
        """What the quickest other route takes, and the quickest other of no lower rung."""
        for lane, ms in fitting:
            if lane is not best:
                if ms < after:
                    quickest, after = lane, ms
                if ms < helping and lane.rung <= rung:
                    helping = ms
        fallback, budget = None, left_ms
        kept = self.policy.fallback_room * after
        if quickest is not None and predicted + kept <= left_ms:
            fallback, budget = quickest.facts.route, left_ms - kept
        second = after if fallback is None else helping
        hedge_after = math.inf if second == math.inf else max(predicted, left_ms - self.policy.hedge_room * second)
        return Choice(best.facts.route, rows, left_ms, predicted, budget, hedge_after, extra=extra, fallback=fallback)

    def _preferred(self, fitting: Sequence[tuple[_Lane, float]], left_ms: float, now_s: float) -> tuple[_Lane, float]:
        if len(fitting) == 1:
            return fitting[0]
        may = [found for found in fitting if found[0].open_to(now_s, self._random)] or fitting
        chosen = may[0]
        least: tuple[float, bool, float, float] | None = None
        for found in may:
            lane, predicted = found
            reserve = min((ms for other, ms in fitting if other.rung > lane.rung), default=0.0)
            tight = predicted + self.policy.fallback_room * reserve > left_ms
            order = (lane.rank[0], tight, lane.rank[1], predicted)
            if least is None or order < least:
                chosen, least = found, order
        return chosen

    def _probe(
        self,
        passed: tuple[_Lane, float],
        fitting: Sequence[tuple[_Lane, float]],
        rows: int,
        left_ms: float,
        now_s: float,
    ) -> Choice | None:
        """A probe by a request that can still be answered by what fits, or by no call at all, when the probe fails."""
        lane, predicted = passed
        if not (self._probes.left or now_s - lane.probed_s >= _PROBE_ANYWAY_S):
            return None
        fallback, after = None, 0.0
        if fitting:
            quickest, after = min(fitting, key=_finish)
            after *= self.policy.probe_room
            fallback = quickest.facts.route
        budget = left_ms - after
        if budget < min(left_ms / 2.0, self.policy.good * self.policy.slow_ms):
            return None
        return Choice(lane.facts.route, rows, left_ms, predicted, budget, probe=True, fallback=fallback)

    def began(self, choice: Choice, now_s: float) -> Ticket:
        """The call is being made."""
        if not choice.extra:
            self.hedges.earned()
            self.retries.earned()
        lane = self._lanes[choice.route]
        ticket = Ticket(choice, now_s, lane.waiting())
        lane.in_flight[id(ticket)] = ticket
        if choice.probe:
            self._probes.take()
            lane.probe_began(ticket)
        return ticket

    def ended(self, ticket: Ticket, outcome: Outcome, now_s: float) -> None:
        """The call is over; told twice is told once. Belongs in a `finally`."""
        if ticket.ended:
            return
        ticket.ended = True
        choice = ticket.choice
        lane = self._lanes[choice.route]
        del lane.in_flight[id(ticket)]
        took_ms = max(now_s - ticket.began_s, 0.0) * 1000.0
        if not choice.probe and outcome is not Outcome.FAILED:
            within = took_ms <= choice.predicted_ms
            if outcome is Outcome.ANSWERED or not within:  # a call given up earlier might have kept it, or not
                self.calibration.observe(choice.predicted_ms, within=within)
        lane.learn(ticket, outcome, took_ms, now_s)

    def hedge(self, ticket: Ticket, left_ms: float, now_s: float, exclude: Collection[Route] = ()) -> Choice | None:
        """A second call beside one that is out too long, within the budget; None: just wait.

        At another site and no lower rung; lower only where the time does not suffice for a fallback after this call.
        Take whichever answers first, end the other as CANCELLED.
        """
        first = ticket.choice
        other = self._choose(first.rows, left_ms, now_s, first.route.rung, (first.route, *exclude), extra=True)
        if other is None or (other.route.rung > first.route.rung and first.fallback is not None):
            return None
        return other if self.hedges.take() else None

    def retry(self, first: Choice, left_ms: float, now_s: float, exclude: Collection[Route] = ()) -> Choice | None:
        """What to call after a call that failed or was given up; the one layer that tries again. None: no more calls.

        Another site at the same rung takes a token of the retry budget. A lower rung takes none: a step down is an
        answer, and has a place of its own.
        """
        tried = (first.route, *exclude)
        other = self._choose(first.rows, left_ms, now_s, first.route.rung, tried, extra=True)
        if other is None or other.route.rung > first.route.rung or self.retries.take():
            return other
        return self._choose(first.rows, left_ms, now_s, first.route.rung + 1, tried, extra=True)

    def states(self, now_s: float) -> list[RouteState]:
        """Every route in the order of preference, for metrics."""
        return [lane.state(now_s) for lane in self._ordered]


def _finish(found: tuple[_Lane, float]) -> float:
    return found[1]


class _Lane:
    """What is known of one route, and whether requests go there."""

    def __init__(self, facts: RouteFacts, policy: RouterPolicy) -> None:
        self.facts = facts
        self.rung = facts.route.rung
        self.in_flight: dict[int, Ticket] = {}
        """Oldest first."""
        self.drained: Drained | None = None
        self.probed_s = float("-inf")
        if policy.loss_price is None:
            self.rank = (float(facts.route.rung), facts.price)
        else:
            self.rank = (facts.price + policy.loss_price * facts.loss, float(facts.route.rung))
        self._policy = policy
        self._histograms: dict[int, DecayedHistogram] = {}
        self._known: dict[int, float] = {}
        """The quantile per size with nobody overdue, until more is learnt."""
        self._learnt_s: float | None = None
        self._failures = 0
        self._calls = 0.0
        self._errors = 0.0
        self._probe: Ticket | None = None
        self._probe_wait_s = policy.probe_first_s
        self._good: list[tuple[int, float]] = []
        self._relapses = 0
        self._back_s: float | None = None
        self._probes = 0
        self._drains = 0

    def waiting(self) -> float:
        """How many times longer than alone a call takes that begins now."""
        return max(1.0, (len(self.in_flight) + 1) / self.facts.parallel)

    def predicted_ms(self, rows: int, now_s: float) -> float:
        """When a call that begins now is finished, at the quantile. A look at it may drain the route."""
        return self._alone_ms(_size(rows), now_s) * self.waiting()

    def _alone_ms(self, size: int, now_s: float) -> float:
        """The quantile of a call that finds nobody before it; calls out longer than predicted count as endless."""
        eldest = next(iter(self.in_flight.values()), None)
        nobody_overdue = eldest is None or (now_s - eldest.began_s) * 1000.0 <= eldest.choice.predicted_ms
        if nobody_overdue and (known := self._known.get(size)) is not None:
            return known
        histogram, scale = self._histogram(size)
        samples = 0.0 if histogram is None else histogram.samples
        overdue, longest_ms = (0, 0.0) if nobody_overdue else self._overdue(samples, now_s)
        if histogram is None:
            alone = 2.0 * longest_ms if overdue > 1 else self.facts.prior_ms
        else:
            beyond = (1.0 - self._policy.quantile) * (samples + overdue) - overdue
            alone = scale * (histogram.quantile(1.0 - max(beyond, 0.0) / samples) or self.facts.prior_ms)
            if beyond <= 0.0 and overdue > 1:
                alone = max(alone, 2.0 * longest_ms)
        if self.drained is None and alone > self._slow_ms(size):
            slow = 0.0 if histogram is None else histogram.share_over(self._slow_ms(size) / scale) * samples
            if slow + overdue >= self._policy.slow_calls_least:
                self._drain(Drained.SLOW, now_s)
        if nobody_overdue:
            self._known[size] = alone
        return alone

    def _overdue(self, samples: float, now_s: float) -> tuple[int, float]:
        """How many calls are out longer than predicted, up to what makes the quantile endless; and the longest age."""
        most = max(1.0, (1.0 - self._policy.quantile) / self._policy.quantile * samples)
        overdue, longest_ms = 0, 0.0
        for ticket in self.in_flight.values():
            age_ms = (now_s - ticket.began_s) * 1000.0
            if age_ms <= ticket.choice.predicted_ms or overdue > most:
                break
            overdue += 1
            longest_ms = max(longest_ms, age_ms / ticket.waiting)
        return overdue, longest_ms

    def _histogram(self, size: int) -> tuple[DecayedHistogram | None, float]:
        """What is known of calls of that size; else of the next size, and how many times longer this one takes."""
        found = self._histograms.get(size)
        if found is not None:
            return found, 1.0
        if not self._histograms:
            return None, 1.0
        nearest = min(self._histograms, key=lambda known: (abs(known - size), known))
        return self._histograms[nearest], max(1.0, 2.0 ** (size - nearest))

    def _slow_ms(self, size: int) -> float:
        return float(self._policy.slow_ms * max(1.0, 2.0 ** (size - _USUAL)))

    def learn(self, ticket: Ticket, outcome: Outcome, took_ms: float, now_s: float) -> None:
        """A call has ended."""
        self._known.clear()
        size = _size(ticket.choice.rows)
        alone_ms = took_ms / ticket.waiting
        if ticket.choice.probe and ticket is self._probe:
            self._probe_ended(size, outcome, alone_ms, now_s)
        # A call that was called off early says nothing of a route that nobody knows yet.
        unknown = outcome is Outcome.CANCELLED and not self._histograms and alone_ms < self.facts.prior_ms
        if outcome is not Outcome.FAILED and not unknown:
            histogram = self._histograms.get(size)
            if histogram is None:
                histogram = self._histograms[size] = DecayedHistogram(self._policy.half_life_s)
            if ticket.choice.probe and self.drained is None:
                histogram.fade()  # nobody else asks, and the route must be able to prove itself
            if outcome is Outcome.ANSWERED:
                histogram.observe(alone_ms, now_s)
            else:
                histogram.observe_at_least(alone_ms, now_s)
        if outcome in {Outcome.ANSWERED, Outcome.FAILED}:
            self._count(failed=outcome is Outcome.FAILED, now_s=now_s)
        self._learnt_s = now_s

    def _count(self, *, failed: bool, now_s: float) -> None:
        passed = 0.0 if self._learnt_s is None else max(now_s - self._learnt_s, 0.0) / self._policy.half_life_s
        kept = 2.0 ** -min(passed, 1.0 / SAMPLES_HALF_LIFE)
        self._calls = self._calls * kept + 1.0
        self._errors = self._errors * kept + failed
        self._failures = self._failures + 1 if failed else 0
        often = self._calls >= _QUIET and self._errors > self._policy.error_share * self._calls
        if self.drained is None and (self._failures >= self._policy.failures_in_a_row or often):
            self._drain(Drained.FAILING, now_s)

    def _drain(self, why: Drained, now_s: float) -> None:
        relapsed = self._back_s is not None and now_s - self._back_s < self._policy.relapse_s
        self._relapses = min(self._relapses + 1, _RELAPSES_MOST) if relapsed else 0
        self.drained, self._back_s = why, None
        self._good = []
        self._probe_wait_s = self._policy.probe_first_s
        self.probed_s = now_s
        self._drains += 1

    def probe_due(self, now_s: float) -> bool:
        """Whether a request may find out now how the route is."""
        if self._probe is not None and now_s - self._probe.began_s < _LOST_AFTER_S:
            return False
        if self.drained is None and (self._learnt_s is None or now_s - self._learnt_s < _STARVED_S or self.in_flight):
            return False  # others still find out
        return now_s - self.probed_s >= self._probe_wait_s

    def probe_began(self, ticket: Ticket) -> None:
        """The route is being probed."""
        self._probe = ticket
        self.probed_s = ticket.began_s
        self._probes += 1

    def _probe_ended(self, size: int, outcome: Outcome, alone_ms: float, now_s: float) -> None:
        self._probe = None
        if outcome is Outcome.CANCELLED:
            return
        if outcome is not Outcome.ANSWERED or alone_ms > self._policy.good * self._slow_ms(size):
            self._good = []
            self._probe_wait_s = min(2.0 * self._probe_wait_s, self._policy.probe_last_s)
            return
        self._probe_wait_s = self._policy.probe_first_s
        if self.drained is None:
            return
        self._good.append((size, alone_ms))
        if len(self._good) < self._policy.probes_good * 2**self._relapses:
            return
        # What was known is of the time when it was down; the good probes are what is known now.
        self._histograms = {}
        for known, ms in self._good[:-1]:
            self._histograms.setdefault(known, DecayedHistogram(self._policy.half_life_s)).observe(ms, now_s)
        self.drained, self._good, self._back_s = None, [], now_s
        self._failures, self._calls, self._errors = 0, 0.0, 0.0

    def open_to(self, now_s: float, random: Callable[[], float]) -> bool:
        """Whether one more request may come: while traffic comes back, only a share may."""
        if self._back_s is None:
            return True
        share = self._share(now_s)
        return share >= 1.0 or random() < share

    def _share(self, now_s: float) -> float:
        if self.drained is not None:
            return 0.0
        if self._back_s is None:
            return 1.0
        doubled = (now_s - self._back_s) / self._policy.ramp_double_s
        return min(1.0, float(self._policy.ramp_first * 2.0 ** min(doubled, 10.0)))

    def state(self, now_s: float) -> RouteState:
        """See `RouteState`."""
        return RouteState(
            route=self.facts.route,
            predicted_ms=self.predicted_ms(CANDIDATES_RANKED, now_s),
            in_flight=len(self.in_flight),
            drained=self.drained,
            error_share=self._errors / self._calls if self._calls else 0.0,
            share=self._share(now_s),
            probes=self._probes,
            drains=self._drains,
        )


def _size(rows: int) -> int:
    """Calls are told apart by size: up to 32 candidates, then up to each power of two."""
    return max((rows - 1).bit_length(), _SMALLEST)
