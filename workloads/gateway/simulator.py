"""The routing policy without a network: requests, neighbours and time are events in a heap.

The very `Router` and `Admission` that serve are asked here, by a clock that jumps from event to event, and compared
with balancers that know no deadline and with an optimum that knows the future. Chance is drawn before anything runs:
every policy meets the same requests, and a request takes a route's worker as long under each of them. A neighbour has
so many workers and one queue, works on calls that were given up as on any, and can be slow, stopped or gone for a
while. It does not know what a call carries; what it says about a real site hangs on the service times that it was
given.
"""

from __future__ import annotations

import dataclasses
import enum
import heapq
import itertools
import math
from bisect import bisect_right
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from random import Random
from typing import Annotated, Final, Protocol

import msgspec

from workloads.contract.slo import CANDIDATES_RANKED, Priority, Rung
from workloads.gateway.admission import Admission, Admitted
from workloads.gateway.calibration import Calibration
from workloads.gateway.router import Choice, Outcome, Route, RouteFacts, Router, RouterPolicy, Ticket

PATIENCE: Final = 10.0
"""A balancer without deadlines gives a call up after so many times what the request had."""
NO_SITE: Final = ""
"""Where an answer below rung 2 was ranked."""


class Recorded(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Service times that were measured: `service-times.json` of `rankbridge bench`."""

    schema_version: int = 1
    measured: str
    """What was measured where, in a sentence."""
    candidates: int
    """Of each call."""
    ms: dict[str, Annotated[list[Annotated[float, msgspec.Meta(gt=0)]], msgspec.Meta(min_length=1)]]
    """Per `site/rung`, in the order in which they came."""


class Condition(enum.Enum):
    """How a neighbour is while a fault holds."""

    SLOW = "slow"
    STOPPED = "stopped"
    """SIGSTOP: takes calls and answers nothing until it goes on."""
    GONE = "gone"
    """Refuses every call at once, and loses those it had."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """A neighbour is not itself for a while."""

    route: Route
    condition: Condition
    from_s: float
    until_s: float
    factor: float = 10.0
    """SLOW: work that begins meanwhile takes so many times longer."""


@dataclasses.dataclass(frozen=True)
class Backend:
    """A neighbour and how long its calls take."""

    route: Route
    service_ms: Sequence[float]
    """Times of a worker alone, from which calls are drawn; at least one."""
    workers: int = 1
    price: float = 0.0
    way_ms: float = 0.0
    """There and back."""

    def facts(self) -> RouteFacts:
        """What a router may know of it beforehand."""
        mean_ms = math.fsum(self.service_ms) / len(self.service_ms)
        return RouteFacts(self.route, price=self.price, parallel=self.workers, prior_ms=2.0 * mean_ms + self.way_ms)


@dataclasses.dataclass(frozen=True)
class Front:
    """The gateway's own work: one event loop, first come, first served."""

    own_ms: float = 0.0
    """Of a request that came in: half before the neighbours are asked, half after."""
    door_ms: float = 0.0
    """To read any request and decide about it; all that one costs that is turned away."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One request, with everything that chance has to say about it."""

    at_s: float
    left_ms: float
    """For ranking."""
    service_ms: Mapping[Route, float]
    rows: int = CANDIDATES_RANKED
    priority: Priority = Priority.NORMAL
    tenant: str = "default"


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a request."""

    request: Request
    took_ms: float
    rung: int
    """3 where nobody ranked in time; that needs no call."""
    site: str
    shed: bool = False

    @property
    def late(self) -> bool:
        """Past what it had. A fallback at the last moment is not, but it is at rung 3."""
        return self.took_ms > self.request.left_ms + 1e-6


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """A whole run."""

    answers: Sequence[Answer]
    calls: Mapping[Route, int]
    cost: float
    hedges: int = 0

    @property
    def served(self) -> list[Answer]:
        """Those that were not turned away."""
        return [answer for answer in self.answers if not answer.shed]

    def quantile_ms(self, share: float) -> float:
        """Nearest rank, over what was not turned away."""
        took = sorted(answer.took_ms for answer in self.served)
        return took[min(max(math.ceil(share * len(took)) - 1, 0), len(took) - 1)] if took else 0.0

    @property
    def late_share(self) -> float:
        """Of what was not turned away."""
        served = self.served
        return sum(answer.late for answer in served) / max(1, len(served))

    @property
    def cost_per_1000(self) -> float:
        """Every call made, given up or not, per 1,000 answers."""
        return 1000.0 * self.cost / max(1, len(self.served))

    def rung_share(self, rung: int) -> float:
        """Of what was not turned away."""
        served = self.served
        return sum(answer.rung == rung for answer in served) / max(1, len(served))

    def bad_share(self, from_s: float, until_s: float) -> float:
        """Late, or fallen to rung 3, of the requests that came in `[from_s, until_s)`."""
        inside = [a for a in self.served if from_s <= a.request.at_s < until_s]
        return sum(a.late or a.rung >= Rung.RETRIEVAL_SCORE for a in inside) / max(1, len(inside))


class Policy(Protocol):
    """What decides; `Router` does."""

    def choose(
        self, rows: int, left_ms: float, now_s: float, best_rung: int = 1, exclude: Collection[Route] = ()
    ) -> Choice | None:
        """See `Router.choose`."""
        ...

    def began(self, choice: Choice, now_s: float) -> Ticket:
        """See `Router.began`."""
        ...

    def ended(self, ticket: Ticket, outcome: Outcome, now_s: float) -> None:
        """See `Router.ended`."""
        ...

    def hedge(self, ticket: Ticket, left_ms: float, now_s: float) -> Choice | None:
        """See `Router.hedge`."""
        ...

    def retry(self, first: Choice, left_ms: float, now_s: float, exclude: Collection[Route] = ()) -> Choice | None:
        """See `Router.retry`."""
        ...


class Balancer:
    """What all balancers without deadlines share: they pick a route, and wait for it."""

    def __init__(self, routes: Sequence[Route], random: Random) -> None:
        self._routes = sorted(routes)
        self._random = random
        self._in_flight = Counter[Route]()

    def pick(self) -> Route:
        """Where the next call goes."""
        raise NotImplementedError

    def choose(
        self,
        rows: int,
        left_ms: float,
        now_s: float,  # noqa: ARG002 - Policy's, as all below
        best_rung: int = 1,  # noqa: ARG002
        exclude: Collection[Route] = (),  # noqa: ARG002
    ) -> Choice | None:
        """See `Policy`."""
        return Choice(self.pick(), rows, left_ms, left_ms, PATIENCE * left_ms)

    def began(self, choice: Choice, now_s: float) -> Ticket:
        """See `Policy`."""
        self._in_flight[choice.route] += 1
        return Ticket(choice, now_s, 1.0)

    def ended(self, ticket: Ticket, outcome: Outcome, now_s: float) -> None:  # noqa: ARG002
        """See `Policy`."""
        self._in_flight[ticket.choice.route] -= 1

    def hedge(self, ticket: Ticket, left_ms: float, now_s: float) -> Choice | None:  # noqa: ARG002
        """See `Policy`: never."""
        return None

    def retry(self, first: Choice, left_ms: float, now_s: float, exclude: Collection[Route] = ()) -> Choice | None:  # noqa: ARG002
        """See `Policy`: never."""
        return None


class RoundRobin(Balancer):
    """One after the other."""

    _turn = 0

    def pick(self) -> Route:
        """See `Balancer`."""
        self._turn += 1
        return self._routes[self._turn % len(self._routes)]


class LeastRequest(Balancer):
    """Where the fewest calls are in flight; among equals by chance."""

    def pick(self) -> Route:
        """See `Balancer`."""
        return min(self._routes, key=lambda route: (self._in_flight[route], self._random.random()))


class PowerOfTwo(Balancer):
    """The less busy of two drawn by chance."""

    def pick(self) -> Route:
        """See `Balancer`."""
        drawn = self._random.sample(self._routes, min(2, len(self._routes)))
        return min(drawn, key=lambda route: self._in_flight[route])


BALANCERS: Final[Mapping[str, type[Balancer]]] = {
    "round-robin": RoundRobin,
    "least-request": LeastRequest,
    "power of two": PowerOfTwo,
}


def requests(
    backends: Sequence[Backend],
    *,
    rate: float,
    seconds: float,
    left_ms: float,
    random: Random,
    mix: Sequence[tuple[float, Priority, str]] = ((1.0, Priority.NORMAL, "default"),),
    from_s: float = 0.0,
) -> list[Request]:
    """Poisson arrivals at `rate` a second. `mix`: weights of (priority, tenant)."""
    found = []
    at_s = from_s
    weights = [weight for weight, _, _ in mix]
    while (at_s := at_s + random.expovariate(rate)) < from_s + seconds:
        _, priority, tenant = random.choices(mix, weights)[0]
        service = {backend.route: random.choice(backend.service_ms) for backend in backends}
        found.append(Request(at_s, left_ms, service, priority=priority, tenant=tenant))
    return found


def run(
    policy: Policy,
    backends: Sequence[Backend],
    asked: Sequence[Request],
    *,
    faults: Sequence[Fault] = (),
    front: Front | None = None,
    admission: Admission | None = None,
    watch: Callable[[float], None] = lambda _: None,
) -> Outcomes:
    """Let `policy` answer the requests. `watch` is called with the time at every arrival."""
    servers = {backend.route: _Server(backend, faults) for backend in backends}
    loop = _Run(policy, servers, front or Front(), admission)
    loop.expect(asked, watch)
    return loop.outcomes()


@dataclasses.dataclass(slots=True, eq=False)
class _Job:
    """A call at a neighbour."""

    client: _Client
    ticket: Ticket
    service_ms: float
    abandoned: bool = False


@dataclasses.dataclass(slots=True, eq=False)
class _Client:
    """A request that is being answered."""

    request: Request
    place: Admitted | None
    calls: list[_Job] = dataclasses.field(default_factory=list)
    tried: list[Route] = dataclasses.field(default_factory=list)
    first: Choice | None = None
    done: bool = False

    def left_ms(self, now_s: float) -> float:
        return self.request.left_ms - (now_s - self.request.at_s) * 1000.0


class _Server:
    """One queue, some workers."""

    def __init__(self, backend: Backend, faults: Sequence[Fault]) -> None:
        self.backend = backend
        self.faults = [fault for fault in faults if fault.route == backend.route]
        self.queue: deque[_Job] = deque()
        self.busy = 0

    def fault(self, condition: Condition, now_s: float) -> Fault | None:
        return next((f for f in self.faults if f.condition is condition and f.from_s <= now_s < f.until_s), None)

    def finish_s(self, service_ms: float, now_s: float) -> float:
        """When work that begins now is done: slow while it began in a slow time, and standing while stopped."""
        slow = self.fault(Condition.SLOW, now_s)
        left_s = service_ms * (slow.factor if slow else 1.0) / 1000.0
        at_s = now_s
        for stop in sorted((f for f in self.faults if f.condition is Condition.STOPPED), key=lambda f: f.from_s):
            if stop.until_s <= at_s or stop.from_s >= at_s + left_s:
                continue
            left_s -= max(0.0, stop.from_s - at_s)
            at_s = stop.until_s
        return at_s + left_s


class _Run:
    def __init__(
        self,
        policy: Policy,
        servers: Mapping[Route, _Server],
        front: Front,
        admission: Admission | None,
    ) -> None:
        self._policy = policy
        self._servers = servers
        self._front = front
        self._front_free_s = 0.0
        self._admission = admission
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._numbers = itertools.count()
        self._answers: list[Answer] = []
        self._calls = Counter[Route]()
        self._hedges = 0

    def expect(self, asked: Sequence[Request], watch: Callable[[float], None]) -> None:
        for request in asked:
            self._at(request.at_s, partial(self._arrives, request, watch))

    def outcomes(self) -> Outcomes:
        while self._events:
            now_s, _, happens = heapq.heappop(self._events)
            happens(now_s)
        cost = sum(self._servers[route].backend.price * calls for route, calls in self._calls.items())
        return Outcomes(self._answers, self._calls, cost, self._hedges)

    def _at(self, at_s: float, happens: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), happens))

    def _worked_on(self, cost_ms: float, now_s: float, happens: Callable[[float], None]) -> None:
        """The event loop does it when it has done everything before."""
        self._front_free_s = max(now_s, self._front_free_s) + cost_ms / 1000.0
        self._at(self._front_free_s, happens)

    # The client
    def _arrives(self, request: Request, watch: Callable[[float], None], now_s: float) -> None:
        watch(now_s)
        self._worked_on(self._front.door_ms, now_s, partial(self._at_the_door, request))

    def _at_the_door(self, request: Request, now_s: float) -> None:
        place = None
        if self._admission is not None:
            admitted = self._admission.admit(request.priority, request.tenant, now_s, waited_s=now_s - request.at_s)
            if not isinstance(admitted, Admitted):
                took_ms = (now_s - request.at_s) * 1000.0
                self._answers.append(Answer(request, took_ms, Rung.TRADITIONAL, NO_SITE, shed=True))
                return
            place = admitted
        client = _Client(request, place)
        self._worked_on(self._front.own_ms / 2.0, now_s, partial(self._ranks, client))

    def _ranks(self, client: _Client, now_s: float) -> None:
        choice = self._policy.choose(client.request.rows, client.left_ms(now_s), now_s)
        if choice is None:
            self._answered(client, Rung.RETRIEVAL_SCORE, NO_SITE, now_s)
            return
        client.first = choice
        self._call(client, choice, now_s)

    def _call(self, client: _Client, choice: Choice, now_s: float) -> None:
        ticket = self._policy.began(choice, now_s)
        job = _Job(client, ticket, client.request.service_ms[choice.route])
        client.calls.append(job)
        client.tried.append(choice.route)
        self._calls[choice.route] += 1
        server = self._servers[choice.route]
        if server.fault(Condition.GONE, now_s):
            self._at(now_s + server.backend.way_ms / 1000.0, partial(self._failed, job))
            return
        self._at(now_s + server.backend.way_ms / 2000.0, partial(self._reaches, server, job))
        self._at(now_s + choice.budget_ms / 1000.0, partial(self._expires, job, Outcome.LATE))
        if not choice.extra and choice.hedge_after_ms < choice.budget_ms:
            self._at(now_s + choice.hedge_after_ms / 1000.0, partial(self._hedges_now, job))

    def _hedges_now(self, job: _Job, now_s: float) -> None:
        if job.client.done or job.abandoned:
            return
        choice = self._policy.hedge(job.ticket, job.client.left_ms(now_s), now_s)
        if choice is not None:
            self._hedges += 1
            self._call(job.client, choice, now_s)

    def _failed(self, job: _Job, now_s: float) -> None:
        self._expires(job, Outcome.FAILED, now_s)

    def _expires(self, job: _Job, outcome: Outcome, now_s: float) -> None:
        client = job.client
        if client.done or job.abandoned:
            return
        job.abandoned = True
        self._policy.ended(job.ticket, outcome, now_s)
        if any(not call.abandoned for call in client.calls):
            return
        left_ms = client.left_ms(now_s)
        choice = None
        if client.first is not None and left_ms > 0.0:
            choice = self._policy.retry(client.first, left_ms, now_s, client.tried)
        if choice is None:
            self._answered(client, Rung.RETRIEVAL_SCORE, NO_SITE, now_s)
        else:
            self._call(client, choice, now_s)

    def _answered(self, client: _Client, rung: int, site: str, now_s: float) -> None:
        client.done = True
        for call in client.calls:
            if not call.abandoned:
                call.abandoned = True
                self._policy.ended(call.ticket, Outcome.CANCELLED, now_s)
        self._worked_on(self._front.own_ms / 2.0, now_s, partial(self._leaves, client, rung, site))

    def _leaves(self, client: _Client, rung: int, site: str, now_s: float) -> None:
        took_ms = (now_s - client.request.at_s) * 1000.0
        self._answers.append(Answer(client.request, took_ms, rung, site))
        if self._admission is not None and client.place is not None:
            self._admission.done(client.place, now_s)

    # The server
    def _reaches(self, server: _Server, job: _Job, now_s: float) -> None:
        server.queue.append(job)
        self._work(server, now_s)

    def _work(self, server: _Server, now_s: float) -> None:
        while server.queue and server.busy < server.backend.workers:
            job = server.queue.popleft()
            server.busy += 1
            self._at(server.finish_s(job.service_ms, now_s), partial(self._worked, server, job))

    def _worked(self, server: _Server, job: _Job, now_s: float) -> None:
        server.busy -= 1
        self._work(server, now_s)
        home_s = now_s + server.backend.way_ms / 2000.0
        if server.fault(Condition.GONE, now_s):
            self._at(home_s, partial(self._failed, job))
        else:
            self._at(home_s, partial(self._comes_home, job))

    def _comes_home(self, job: _Job, now_s: float) -> None:
        if job.client.done or job.abandoned:
            return
        job.abandoned = True
        self._policy.ended(job.ticket, Outcome.ANSWERED, now_s)
        route = job.ticket.choice.route
        self._answered(job.client, route.rung, route.site, now_s)


def least_cost(backends: Sequence[Backend], asked: Sequence[Request], *, clairvoyant: bool = True) -> float:
    """What the best plan for all of `asked` costs, everyone answered in time at rung 1: a lower bound for any policy.

    A clairvoyant plan knows each call's own service time; the other knows all arrivals, but takes every call for a mean
    one. The cheapest backend takes as many as it can finish in time, the next cheapest is taken to have room for all
    others. A backend of c workers is taken as one that works c times as fast, which can only do more. Requests with one
    patience are best served in their order, so for each number of them the earliest moment at which the backend can be
    free again says all: exact for one worker. Raises ValueError where patience differs, or nobody has the full ranker.
    """
    if len({request.left_ms for request in asked}) > 1:
        raise ValueError("requests with different patience may overtake each other; this bound does not look at that")
    best = sorted((b for b in backends if b.route.rung == Rung.FULL_RANKER), key=lambda backend: backend.price)
    if not best:
        raise ValueError("no backend has the full ranker")
    if len(best) == 1:
        return best[0].price * len(asked)
    cheap, dear = best[:2]
    services_ms = [request.service_ms[cheap.route] for request in asked]
    if not clairvoyant:
        services_ms = [math.fsum(services_ms) / len(services_ms)] * len(services_ms)
    taken = _most_in_time(cheap, asked, services_ms)
    return cheap.price * taken + dear.price * (len(asked) - taken)


def _most_in_time(backend: Backend, asked: Sequence[Request], services_ms: Sequence[float]) -> int:
    done = 0
    free_s = [0.0]
    """`free_s[k]`: the earliest moment at which `done` + k requests can be finished; rising."""
    way_s = backend.way_ms / 2000.0
    for request, service_ms in zip(asked, services_ms, strict=True):
        service_s = service_ms / backend.workers / 1000.0
        reaches_s = request.at_s + way_s
        until_s = request.at_s + request.left_ms / 1000.0 - way_s
        # Whoever is free when the request comes may as well be the one who has finished the most.
        idle = bisect_right(free_s, reaches_s) - 1
        if idle > 0:
            done, free_s = done + idle, free_s[idle:]
        for k in range(len(free_s) - 1, -1, -1):
            finish_s = max(free_s[k], reaches_s) + service_s
            if finish_s > until_s:
                continue
            if k + 1 == len(free_s):
                free_s.append(finish_s)
            else:
                free_s[k + 1] = min(free_s[k + 1], finish_s)
    return done + len(free_s) - 1


def exhaustive_cost(backends: Sequence[Backend], asked: Sequence[Request]) -> float:
    """The same by trying everything: each request at each backend of rung 1, in order; for a dozen requests."""
    best = [backend for backend in backends if backend.route.rung == Rung.FULL_RANKER]
    costs = []
    for assignment in itertools.product(best, repeat=len(asked)):
        free = {backend.route: [0.0] * backend.workers for backend in best}
        for backend, request in zip(assignment, asked, strict=True):
            workers = free[backend.route]
            way_s = backend.way_ms / 2000.0
            begins_s = max(heapq.heappop(workers), request.at_s + way_s)
            done_s = begins_s + request.service_ms[backend.route] / 1000.0
            heapq.heappush(workers, done_s)
            if done_s + way_s > request.at_s + request.left_ms / 1000.0:
                break
        else:
            costs.append(sum(backend.price for backend in assignment))
    return min(costs, default=math.inf)


@dataclasses.dataclass(frozen=True)
class Row:
    """One policy in a comparison."""

    name: str
    outcomes: Outcomes


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All policies on the same requests."""

    rows: Sequence[Row]
    least_cost_per_1000: float
    """Of a plan that knows every arrival, and no call's own luck."""
    clairvoyant_per_1000: float
    """Of one that knows each service time beforehand, too: nobody can get there."""
    calibration: Calibration
    """Of the router's predictions."""


def compare(
    backends: Sequence[Backend],
    asked: Sequence[Request],
    *,
    chance: Callable[[], Random],
    policy: RouterPolicy | None = None,
    faults: Sequence[Fault] = (),
) -> Comparison:
    """Ours, the balancers over the routes of rung 1, and the bounds. `chance` gives each policy the same."""
    router = Router([backend.facts() for backend in backends], policy, random=chance().random)
    rows = [Row("rankbridge", run(router, backends, asked, faults=faults))]
    best = [backend.route for backend in backends if backend.route.rung == Rung.FULL_RANKER]
    rows += [
        Row(name, run(balancer(best, chance()), backends, asked, faults=faults)) for name, balancer in BALANCERS.items()
    ]
    known, clairvoyant = (
        1000.0 * least_cost(backends, asked, clairvoyant=sees) / max(1, len(asked)) for sees in (False, True)
    )
    return Comparison(rows, known, clairvoyant, router.calibration)
