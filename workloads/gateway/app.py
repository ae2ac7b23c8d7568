"""The public API over HTTP: which request goes where, what is refused before, and what an answer carries.

A plain ASGI application: routes are fixed paths, every message has a type, and a router with
dependency injection costs 0.06 to 0.16 ms of each request here (Litestar 2.25, measured on loopback),
which is a tenth of the time that the gateway allows itself. It knows no stage and no neighbour's protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from http import HTTPStatus
from importlib import metadata
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec
import uuid_utils

from workloads.bundle.manifest import SHORT
from workloads.contract.events import ID_PATTERN
from workloads.contract.http import (
    BODY_MAX_BYTES,
    DEADLINE_HEADER,
    DEADLINE_MAX_MS,
    DEADLINE_MIN_MS,
    PATH_DOCS,
    PATH_HEALTH,
    PATH_METRICS,
    PATH_OPENAPI,
    PATH_PROFILE,
    PATH_RANK,
    PATH_READY,
    PATH_SAMPLE,
    PRIORITY_HEADER,
    REQUEST_ID_HEADER,
    REQUEST_ID_PATTERN,
    RUNG_HEADER,
    SAMPLE_DEFAULT,
    SAMPLE_MAX,
    TENANT_HEADER,
    TENANT_PATTERN,
    EventsRequest,
    ItemsAnswer,
    RankedItem,
    Readiness,
    RecommendRequest,
    SearchRequest,
    Served,
    SimilarRequest,
)
from workloads.contract.slo import DEADLINE_MS, STAGE_P99_MS, Endpoint, Priority, Rung, Stage
from workloads.gateway import openapi, problems
from workloads.gateway.admission import Admission, AdmissionPolicy, Admitted, Shed, ShedReason
from workloads.gateway.doors import Intake, IntakeBusy, IntakeFault, Ranker, Retrieval
from workloads.gateway.editions import Editions, Serving
from workloads.gateway.identity import Edge, Forgetting
from workloads.gateway.ladder import Reason
from workloads.gateway.lending import Lending
from workloads.gateway.people import People
from workloads.gateway.pipeline import ANY, Wish
from workloads.gateway.problems import Refused
from workloads.gateway.timing import Clock, LoopLag, SystemClock, Timer
from workloads.telemetry import log
from workloads.telemetry.metrics import ReadWhenScraped, RouteMetrics, StageMetrics, render

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Header = tuple[bytes, bytes]

IN_FLIGHT_MAX: Final = 128
"""Requests served at once at the very most; at a service time of 10 ms that is far beyond what one process can do.
Answers share an adaptive limit below it. Events have as many places of their own: those that wait for a slow disk must
not take them from answers."""
STUDENT_FROM: Final = 0.6
"""With this share of the limit in flight a request is not ranked beyond this process: it leaves its place sooner."""
TABLES_FROM: Final = 0.8
"""With this share it is answered from the tables: 0.4 ms of this process (all stages: 0.9), and none of a neighbour."""
BODY_WAIT_S: Final = 5.0
"""How long a body may take to arrive after its headers."""
DRAIN_BYTES: Final = 4 * 1024 * 1024
"""How much of a body that is too large is read and dropped, so that its sender gets to read the answer."""

EVENTS_WAIT_MS: Final = 2000.0
"""How long events wait for the disk when the client sets no deadline: a late acknowledgement spares it a retry."""

_DEADLINE: Final = DEADLINE_HEADER.lower().encode()
_REQUEST_ID: Final = REQUEST_ID_HEADER.lower().encode()
_PRIORITY: Final = PRIORITY_HEADER.lower().encode()
_TENANT: Final = TENANT_HEADER.lower().encode()
_RUNG: Final = RUNG_HEADER.lower().encode()
_PRIORITIES: Final = {priority.value.encode(): priority for priority in Priority}
_TENANT_FORM: Final = re.compile(TENANT_PATTERN.encode())
_ASKED: Final = {b"%d" % rung: Wish(rung, Reason.ASKED) if rung > min(Rung) else ANY for rung in Rung}
_TO_STUDENT: Final = Wish(Rung.DISTILLED_RANKER, Reason.OVERLOAD)
_TO_TABLES: Final = Wish(Rung.TRADITIONAL, Reason.OVERLOAD)
_MSGPACK: Final = (b"content-type", b"application/msgpack")
_REQUEST_ID_FORM: Final = re.compile(REQUEST_ID_PATTERN.encode())
_PROFILE: Final = re.compile(re.escape(PATH_PROFILE).replace(r"\{id\}", "(.*)"), re.DOTALL)
_ID: Final = re.compile(ID_PATTERN)
_NUMBER: Final = re.compile(rb"[0-9]{1,6}(\.[0-9]{1,6})?")
_JSON: Final = (b"content-type", b"application/json")
_PROBLEM: Final = (b"content-type", problems.MEDIA_TYPE.encode())
_encode: Final = msgspec.json.Encoder().encode
_logger = log.get(component="app")


class Call(NamedTuple):
    """A POST request that came in whole; its timer has run since then."""

    endpoint: Endpoint
    request_id: str
    timer: Timer
    body: bytes
    serving: Serving | None
    """The edition that it began on and is answered from, whatever becomes current meanwhile; None: there is none."""
    wish: Wish = ANY

    def edition(self) -> Serving:
        """`serving`. Raises Refused when nothing is served yet."""
        if self.serving is None:
            raise problems.no_edition()
        return self.serving


class Aside(NamedTuple):
    """What the headers say of a request beside its deadline."""

    priority: Priority = Priority.NORMAL
    tenant: str = "default"
    wish: Wish = ANY


class Response(NamedTuple):
    """A whole response."""

    body: bytes
    headers: tuple[Header, ...] = (_JSON,)
    status: int = 200
    counted: Callable[[], None] | None = None
    """Tells the metrics about it, once it is on its way: nobody need wait for that."""


class Gateway:
    """The ASGI application. It closes its doors when the server stops.

    `follow` runs while the server does: it may bring another edition (`gateway.editions.follow`).
    """

    def __init__(
        self,
        *,
        site: str,
        editions: Editions,
        retrieval: Retrieval,
        intake: Intake,
        edge: Edge,
        people: People | None,
        metrics: StageMetrics,
        follow: Callable[[], Awaitable[None]] | None = None,
        forgetting: Forgetting | None = None,
        clock: Clock | None = None,
        routes: RouteMetrics | None = None,
        in_flight_max: int = IN_FLIGHT_MAX,
    ) -> None:
        self._site = site
        self._editions = editions
        self._retrieval = retrieval
        self._intake = intake
        self._edge = edge
        self._people = people
        self._forgetting = forgetting
        self._metrics = metrics
        self._follow = follow
        self._clock: Clock = clock or SystemClock()
        self._routes = routes or RouteMetrics(metrics.registry)
        self._in_flight_max = in_flight_max
        usual = AdmissionPolicy()
        policy = dataclasses.replace(
            usual, least=min(usual.least, in_flight_max), start=min(usual.start, in_flight_max), most=in_flight_max
        )
        self._admission = Admission(policy, random=random.random)
        self._lag = LoopLag()
        self._lending = Lending(site, self._routes)
        limits = {"answers": self._admission, "lending": self._lending.admission}
        metrics.registry.register(
            ReadWhenScraped(
                "rankbridge_limit",
                "Requests that may be in flight now",
                ("of",),
                lambda: [((name,), admission.limit) for name, admission in limits.items()],
            )
        )
        self._running = False
        self._description = b""
        self._decode_recommend = msgspec.json.Decoder(RecommendRequest).decode
        self._decode_search = msgspec.json.Decoder(SearchRequest).decode
        self._decode_similar = msgspec.json.Decoder(SimilarRequest).decode
        self._decode_events = msgspec.json.Decoder(EventsRequest).decode
        self._posts: dict[str, tuple[Endpoint, Callable[[Call], Awaitable[Response]]]] = {
            Endpoint.RECOMMEND.value: (Endpoint.RECOMMEND, self._recommend),
            Endpoint.SEARCH.value: (Endpoint.SEARCH, self._search),
            Endpoint.SIMILAR.value: (Endpoint.SIMILAR, self._similar),
            Endpoint.EVENTS.value: (Endpoint.EVENTS, self._events),
        }
        self._events_in_flight = 0
        self._gated = {path.encode("ascii"): path for path in self._posts}
        self._turning = False
        self._turn_s: float | None = None
        """When the loop began with the requests that it read last; None once it is past them."""
        self._gets: dict[str, Callable[[Scope], Awaitable[Response]]] = {
            PATH_SAMPLE: self._sample,
            PATH_HEALTH: self._health,
            PATH_READY: self._ready,
            PATH_METRICS: self._metrics_text,
            PATH_OPENAPI: self._openapi,
            PATH_DOCS: self._docs,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)

    def gate(self, method: bytes, target: bytes, headers: Sequence[Header]) -> bytes | None:
        """See `telemetry.wire.Gate`. What cannot be judged by headers alone is let in."""
        path = self._gated.get(target)
        if path is None or method != b"POST":
            return None
        given = dict(headers)
        try:
            aside = _aside(given)
        except Refused:
            return None
        if not self._turning:
            # Whoever is let in is begun before the loop reads again, and this runs before they do.
            self._turning = True
            asyncio.get_running_loop().call_soon(self._turn)
        admission, now_s = self._admission, self._clock.now_s()
        # Events have places of their own, but the same loop serves them: they come in by turns where others do not.
        if path == Endpoint.EVENTS.value and not admission.refusing(now_s):
            return None
        shed = admission.let_in(aside.priority, aside.tenant, now_s)
        if shed is None:
            return None
        self._routes.shed(shed.reason.value, aside.priority.value)
        self._metrics.response(path, shed.status)
        before, after = _refusal_on_wire(shed.reason, shed.retry_after_s)
        return b"%b%b%b" % (before, _request_id(given).encode("ascii"), after)

    def _turn(self) -> None:
        """The loop has read what there was and begins to work on it."""
        self._turning = False
        self._admission.turn()
        self._turn_s = self._clock.now_s()
        asyncio.get_running_loop().call_soon(self._turned)

    def _turned(self) -> None:
        if not self._turning:
            self._turn_s = None

    def _waited_s(self, now_s: float) -> float:
        """How long a request lay that is looked at now: in the socket, while the loop was behind, and then in line."""
        return self._lag.lag_s + (0.0 if self._turn_s is None else now_s - self._turn_s)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._running = True
        self._lag.start()
        following = None if self._follow is None else asyncio.ensure_future(self._follow())
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._running = False
        self._lag.stop()
        if following is not None:
            following.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await following
        await self._editions.close()
        for door in (self._retrieval, self._intake):
            await door.close()
        if self._people is not None:
            await self._people.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        headers = dict(scope["headers"])
        request_id = _request_id(headers)
        try:
            if scope["method"] == "POST" and path in self._posts:
                response = await self._post(path, headers, request_id, receive)
            elif path == PATH_RANK and scope["method"] == "POST":
                response = await self._rank(headers, receive)
            elif (person := _PROFILE.fullmatch(path)) is not None:
                response = await self._profile(scope, request_id, person[1])
            else:
                response = await self._get(path, scope)
        except _Gone:
            return
        except Refused as refusal:
            response = _problem(refusal)
        except Exception:
            with log.request_context(request_id):
                _logger.exception("request failed", path=self._label(path))
            response = _problem(problems.broken())
        more = [*response.headers, (_REQUEST_ID, request_id.encode("ascii"))]
        if response.status != HTTPStatus.NO_CONTENT:  # which has no length (RFC 9110, 8.6)
            more.append((b"content-length", b"%d" % len(response.body)))
        await send({"type": "http.response.start", "status": response.status, "headers": more})
        await send({"type": "http.response.body", "body": response.body})
        asyncio.get_running_loop().call_soon(self._count, path, response)

    def _count(self, path: str, response: Response) -> None:
        self._metrics.response(self._label(path), response.status)
        if response.counted is not None:
            response.counted()

    def _label(self, path: str) -> str:
        """The path as a metric's label: those that are not ours would be as many series as a stranger likes."""
        if path in self._posts or path in self._gets or path == PATH_RANK:
            return path
        return PATH_PROFILE if _PROFILE.fullmatch(path) is not None else "other"

    async def _get(self, path: str, scope: Scope) -> Response:
        answer = self._docs if path.startswith(PATH_DOCS + "/") else self._gets.get(path)
        if answer is not None and scope["method"] in {"GET", "HEAD"}:
            return await answer(scope)
        if answer is not None:
            raise problems.wrong_method("GET, HEAD")
        if path in self._posts:
            raise problems.wrong_method("POST")
        raise problems.unknown_path([*self._posts, *self._gets, PATH_PROFILE])

    async def _post(self, path: str, headers: dict[bytes, bytes], request_id: str, receive: Receive) -> Response:
        endpoint, answer = self._posts[path]
        deadline_ms = _deadline_ms(headers, endpoint)
        aside = _aside(headers)
        _check_media_type(headers)
        if endpoint is Endpoint.EVENTS:
            return await self._events_post(deadline_ms, request_id, await _body(headers, receive))
        admission, now_s = self._admission, self._clock.now_s
        waited_s = self._waited_s(now_s())
        if self._crowded(STUDENT_FROM):
            # Before the body is read: what is turned away should cost nothing. The place is not kept until the body is
            # in, for who sends slowly takes none from those who are being served.
            place = admission.admit(aside.priority, aside.tenant, now_s())
            if isinstance(place, Shed):
                return self._turned_away(place, aside.priority)
            admission.done(place, now_s(), learn=False)
        body = await _body(headers, receive)
        place = admission.admit(aside.priority, aside.tenant, now_s(), waited_s)
        if isinstance(place, Shed):
            return self._turned_away(place, aside.priority)
        serving, wish = self._editions.current, self._bearable(place, aside.wish)
        call = Call(endpoint, request_id, Timer(self._clock, deadline_ms - 1000.0 * waited_s), body, serving, wish)
        learn = False
        try:
            with self._metrics.in_flight(path), self._editions.on(serving):
                response = await answer(call)
            learn = aside.wish is ANY  # who wants less than could be had says nothing of what can be borne
        finally:
            admission.done(place, now_s(), learn=learn)
        return response

    async def _events_post(self, deadline_ms: float, request_id: str, body: bytes) -> Response:
        """Events, whose body is in: who sends slowly takes no place from those who are being served."""
        if self._events_in_flight >= self._in_flight_max:
            raise problems.overloaded()
        self._events_in_flight += 1
        try:
            with self._metrics.in_flight(Endpoint.EVENTS.value):
                return await self._events(
                    Call(Endpoint.EVENTS, request_id, Timer(self._clock, deadline_ms), body, None)
                )
        finally:
            self._events_in_flight -= 1

    def _crowded(self, share: float) -> bool:
        """Whether so much of what can be borne is in flight."""
        return self._admission.in_flight >= share * self._admission.limit

    def _bearable(self, place: Admitted, wish: Wish) -> Wish:
        """The rung that there is room for: before anybody is refused, all are answered from lower ones."""
        before = place.in_flight - 1
        limit = self._admission.limit
        if self._admission.refusing(place.began_s):
            lowered = _TO_TABLES  # the student's time is the loop's, too
        elif before < STUDENT_FROM * limit:
            return wish
        else:
            lowered = _TO_STUDENT if before < TABLES_FROM * limit else _TO_TABLES
        return max(wish, lowered, key=_rung_of)

    def _turned_away(self, shed: Shed, priority: Priority) -> Response:
        self._routes.shed(shed.reason.value, priority.value)
        return _refusal(shed.reason, shed.retry_after_s)

    async def _rank(self, headers: dict[bytes, bytes], receive: Receive) -> Response:
        """Scores for the other site's gateway."""
        if headers.get(b"content-type") != _MSGPACK[1]:
            raise problems.not_message_pack()
        deadline_ms = _deadline_of(headers, STAGE_P99_MS[Stage.RANK])
        lending, now_s = self._lending, self._clock.now_s
        body = await _body(headers, receive)
        serving = self._editions.current
        if serving is None:
            raise problems.no_edition()
        place = lending.enter(now_s(), crowded=self._crowded(STUDENT_FROM))
        learn = False
        try:
            with self._metrics.in_flight(PATH_RANK), self._editions.on(serving):
                answer = await lending.answer(body, serving, Timer(self._clock, deadline_ms))
            learn = True
        finally:
            lending.admission.done(place, now_s(), learn=learn)
        return Response(answer, (_MSGPACK,))

    async def _recommend(self, call: Call) -> Response:
        message = _decoded(self._decode_recommend, call.body)
        user = None if message.user is None else self._edge.user(message.user, "$.user")
        return self._items(call, *await call.edition().pipeline.recommend(message, user, call.timer, call.wish))

    async def _search(self, call: Call) -> Response:
        message = _decoded(self._decode_search, call.body)
        user = None if message.user is None else self._edge.user(message.user, "$.user")
        return self._items(call, *await call.edition().pipeline.search(message, user, call.timer, call.wish))

    async def _similar(self, call: Call) -> Response:
        message = _decoded(self._decode_similar, call.body)
        return self._items(call, *await call.edition().pipeline.similar(message, call.timer, call.wish))

    def _items(self, call: Call, items: list[RankedItem], served: Served) -> Response:
        """The answer, counted and with its times."""
        name, metrics, timer = call.endpoint.value, self._metrics, call.timer
        body = _encode(ItemsAnswer(request_id=call.request_id, items=items, served=served))
        total = timer.spent_ms()

        def counted() -> None:
            for stage, spent in served.stages_ms.items():
                metrics.stage(name, stage, spent)
            metrics.stage(name, "own", total - timer.waited_ms())
            metrics.request(name, total)
            metrics.answer(name, served.rung, served.reason)

        timing = ", ".join([f"{stage};dur={spent}" for stage, spent in served.stages_ms.items()])
        headers = (_JSON, (b"server-timing", f"{timing}, total;dur={total:.3f}".encode("ascii")))
        return Response(body, headers, counted=counted)

    async def _events(self, call: Call) -> Response:
        events = await self._edge.events(_decoded(self._decode_events, call.body).events)
        timer, name = call.timer, call.endpoint.value
        own_ms = timer.spent_ms()
        try:
            answer = await self._intake.append(events, max(timer.left_ms(), 0.0) / 1000.0)
        except IntakeBusy as busy:
            raise problems.slow_down(str(busy), busy.retry_after_s) from None
        except IntakeFault as fault:
            raise problems.not_acknowledged(str(fault), fault.retry_after_s) from None
        total = timer.spent_ms()
        self._metrics.stage(name, "intake", total - own_ms)
        self._metrics.stage(name, "own", own_ms)
        self._metrics.request(name, total)
        return Response(_encode(answer))

    async def _sample(self, scope: Scope) -> Response:
        query = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        size = query.get("size", str(SAMPLE_DEFAULT))
        if not re.fullmatch(r"[0-9]{1,6}", size) or not 1 <= int(size) <= SAMPLE_MAX:
            raise problems.bad_sample_size()
        serving = self._editions.current
        if serving is None:
            raise problems.no_edition()
        return Response(_encode(serving.sampler.sample(int(size))))

    async def _profile(self, scope: Scope, request_id: str, given: str) -> Response:
        """`/v1/users/{id}/profile`; `given` is the id as the server decoded it."""
        method = scope["method"]
        if method not in {"GET", "HEAD", "DELETE"}:
            raise problems.wrong_method("GET, HEAD, DELETE")
        if self._people is None:
            raise problems.not_at_home()
        user = _path_id(scope, given)
        if method == "DELETE":
            if self._forgetting is None:
                raise problems.cannot_forget()
            await self._people.forget(user, self._forgetting)
            return Response(b"", (), 204)
        serving = self._editions.current
        if serving is None:
            raise problems.no_edition()
        pipeline = serving.pipeline
        answer = await self._people.answer(self._edge.user(user, "id"), request_id, pipeline.bundle, pipeline.tables)
        return Response(_encode(answer), (_JSON, (b"cache-control", b"no-store")))

    async def _health(self, _: Scope) -> Response:
        return Response(b'{"alive":true}')

    async def _ready(self, _: Scope) -> Response:
        serving = self._editions.current
        asked: dict[str, Ranker | Retrieval | Intake] = {}
        if serving is not None:
            asked |= serving.pipeline.ranking.backends
        asked |= {"retrieval": self._retrieval, "intake": self._intake}
        states = await asyncio.gather(*(door.state() for door in asked.values()))
        backends = dict(zip(asked, states, strict=True))
        if self._people is not None:
            backends["profiles"] = self._people.state()
        readiness = Readiness(
            ready=self._running and serving is not None,
            site=self._site,
            bundle="" if serving is None else serving.edition.bundle[:SHORT],
            delta=0 if serving is None else serving.edition.delta,
            draining=self._editions.draining,
            revision=self._editions.revision,
            faults=self._editions.faults,
            backends=backends,
            missing=[name for name, state in backends.items() if not state.up and name != "peer"],
        )
        return Response(_encode(readiness), status=200 if readiness.ready else 503)

    async def _metrics_text(self, _: Scope) -> Response:
        body, kind = render(self._metrics.registry)
        return Response(body, ((b"content-type", kind.encode("latin-1")),))

    async def _openapi(self, _: Scope) -> Response:
        if not self._description:
            self._description = _encode(openapi.document(metadata.version("rankbridge")))
        return Response(self._description)

    async def _docs(self, scope: Scope) -> Response:
        found = openapi.page(scope["path"])
        if found is None:
            raise problems.unknown_path([*self._posts, *self._gets])
        body, kind = found
        return Response(
            body,
            (
                (b"content-type", kind.encode("latin-1")),
                (b"content-security-policy", openapi.DOCS_POLICY.encode("latin-1")),
                (b"x-content-type-options", b"nosniff"),
            ),
        )


_USUAL: Final = Aside()


class _Gone(Exception):  # noqa: N818 - no fault of anybody's
    """The client went away before its request was whole: there is nobody to answer."""


async def _body(headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
    """The whole body. Raises Refused when it is too large or does not come, _Gone when nobody waits any more."""
    length = headers.get(b"content-length", b"0")
    if length.isdigit() and int(length) > DRAIN_BYTES:
        raise problems.too_large()
    try:
        async with asyncio.timeout(BODY_WAIT_S):
            message = await receive()
            body: bytes = message.get("body", b"")
            if message.get("more_body", False):
                body = await _rest(body, receive)
            elif message["type"] == "http.disconnect":
                raise _Gone
    except TimeoutError:
        raise problems.too_slow(BODY_WAIT_S) from None
    if len(body) > BODY_MAX_BYTES:
        raise problems.too_large()
    return body


async def _rest(first: bytes, receive: Receive) -> bytes:
    """A body that comes in pieces. Beyond the limit it is read on and dropped, up to DRAIN_BYTES."""
    parts = bytearray(first)
    dropped = 0
    more = True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _Gone
        if len(parts) <= BODY_MAX_BYTES:
            parts += message.get("body", b"")
        else:
            dropped += len(message.get("body", b""))
            if dropped > DRAIN_BYTES:
                break
        more = message.get("more_body", False)
    return bytes(parts)


def _decoded(decode: Callable[[bytes], Any], body: bytes) -> Any:  # noqa: ANN401 - the decoder's own type
    try:
        return decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise problems.undecodable(error, body) from None


def _deadline_ms(headers: Mapping[bytes, bytes], endpoint: Endpoint) -> float:
    return _deadline_of(headers, EVENTS_WAIT_MS if endpoint is Endpoint.EVENTS else DEADLINE_MS[endpoint])


def _deadline_of(headers: Mapping[bytes, bytes], otherwise_ms: float) -> float:
    given = headers.get(_DEADLINE)
    if given is None:
        return otherwise_ms
    if _NUMBER.fullmatch(given) is None or not DEADLINE_MIN_MS <= float(given) <= DEADLINE_MAX_MS:
        raise problems.bad_deadline()
    return float(given)


def _aside(headers: Mapping[bytes, bytes]) -> Aside:
    """Priority, tenant and rung. Raises Refused for what is none."""
    priority, tenant, rung = headers.get(_PRIORITY), headers.get(_TENANT), headers.get(_RUNG)
    if priority is None and tenant is None and rung is None:
        return _USUAL
    if priority is not None and priority not in _PRIORITIES:
        raise problems.bad_priority()
    if tenant is not None and _TENANT_FORM.fullmatch(tenant) is None:
        raise problems.bad_tenant()
    if rung is not None and rung not in _ASKED:
        raise problems.bad_rung()
    return Aside(
        Priority.NORMAL if priority is None else _PRIORITIES[priority],
        _USUAL.tenant if tenant is None else tenant.decode("ascii"),
        ANY if rung is None else _ASKED[rung],
    )


def _rung_of(wish: Wish) -> int:
    return wish.rung


@functools.cache
def _refusal(reason: ShedReason, retry_after_s: int) -> Response:
    """A refusal for want of room, made once: a gateway that is crowded has no time to make each anew."""
    if reason is ShedReason.TENANT_SHARE:
        return _problem(problems.over_share(retry_after_s))
    return _problem(problems.overloaded(retry_after_s))


@functools.cache
def _refusal_on_wire(reason: ShedReason, retry_after_s: int) -> tuple[bytes, bytes]:
    """The same as it travels: what comes before the request's id, and what after it."""
    response = _refusal(reason, retry_after_s)
    lines = [b"HTTP/1.1 %d %b" % (response.status, HTTPStatus(response.status).phrase.encode("ascii"))]
    headers = (*response.headers, (b"content-length", b"%d" % len(response.body)), (_REQUEST_ID, b""))
    lines += [b"%b: %b" % header for header in headers]
    return b"\r\n".join(lines), b"\r\n\r\n" + response.body


def _check_media_type(headers: Mapping[bytes, bytes]) -> None:
    """Let JSON in UTF-8 pass, and what does not say what it is. Raises Refused for anything else."""
    given = headers.get(b"content-type", _JSON[1])
    if given != _JSON[1]:
        kind, *parameters = [part.strip().lower() for part in given.decode("latin-1").split(";")]
        if re.fullmatch(r"application/(json|[a-z0-9.-]+\+json)", kind) is None:
            raise problems.wrong_media_type("the header Content-Type names something else")
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            if name.strip() == "charset" and value.strip().strip('"') not in {"utf-8", "utf8"}:
                raise problems.wrong_media_type("the header Content-Type names another character set than UTF-8")
    if headers.get(b"content-encoding", b"identity") != b"identity":
        raise problems.wrong_media_type("the header Content-Encoding says that the body is compressed")


def _request_id(headers: Mapping[bytes, bytes]) -> str:
    """The client's id for this request, or one made here."""
    given = headers.get(_REQUEST_ID)
    if given is not None and _REQUEST_ID_FORM.fullmatch(given):
        return str(given, "ascii")
    return str(uuid_utils.uuid7())


def _path_id(scope: Scope, given: str) -> str:
    """The id in a path, percent-decoded from its bytes: the server's own decoding lets what is no UTF-8 pass."""
    raw: bytes | None = scope.get("raw_path")
    if raw is not None:
        parts = raw.partition(b"?")[0].split(b"/")
        try:
            _, _, _, part, _ = parts
            given = unquote_to_bytes(part).decode()
        except ValueError:  # a slash that is not encoded, or no UTF-8
            raise problems.bad_id() from None
    if _ID.fullmatch(given) is None:
        raise problems.bad_id()
    return given


def _problem(refusal: Refused) -> Response:
    return Response(_encode(refusal.problem), (_PROBLEM, *refusal.headers), refusal.problem.status)
