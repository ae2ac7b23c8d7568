"""The shell of an internal server: how it listens, refuses, reports on itself, and stops.

A deployable gives its routes, what it waits for, and what to start and stop; this gives the ASGI
application with `/healthz`, `/readyz` and `/metrics` beside them, problem+json (RFC 9457) for every
refusal, and the uvicorn process around it. It knows no route's meaning, and nothing of the public API.
"""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from types import FrameType
from typing import Any, Final, NamedTuple, NoReturn

import msgspec
import uvicorn
from uvicorn.config import STARTUP_FAILURE

from workloads.contract.http import (
    BODY_MAX_BYTES,
    PATH_HEALTH,
    PATH_METRICS,
    PATH_READY,
    REQUEST_ID_HEADER,
    REQUEST_ID_PATTERN,
    Problem,
)
from workloads.telemetry import log
from workloads.telemetry.metrics import StageMetrics, render
from workloads.telemetry.wire import Gated, Wire

JSON: Final = "application/json"
MSGPACK: Final = "application/msgpack"
PROBLEM: Final = "application/problem+json"

STOP_WITHIN_S: Final = 3
"""Seconds that answers under way have to finish after SIGTERM; the whole stop stays below five."""
KEEP_ALIVE_S: Final = 75
"""Longer than a client's pool keeps an idle connection, so that it is never us who close under a request."""

ACCEPTED_AT_ONCE: Final = 16
"""Connections taken in one turn of the loop, which takes one from each socket that it listens at: with one socket a
loop whose turns are long takes so few that callers wait for seconds behind each other before anybody reads a byte."""

LISTEN_VARIABLE: Final = "RANKBRIDGE_LISTEN"
LISTEN_ANYWHERE: Final = "anywhere"
"""Lets a server listen beyond loopback: only for a pod, whose callers a NetworkPolicy chooses."""

Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
"""ASGI 3."""

_REQUEST_ID = REQUEST_ID_HEADER.lower().encode()
_REQUEST_ID_FORM = re.compile(REQUEST_ID_PATTERN.encode())
_encode_json = msgspec.json.Encoder().encode
_logger = log.get(component="service")


class Reply(NamedTuple):
    """A whole response; headers are lower-case name and value."""

    body: bytes
    content_type: str = MSGPACK
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


class Request(NamedTuple):
    """A whole request; the body is within the service's limit."""

    body: bytes
    content_type: str
    """Without parameters, lower case; empty when the caller named none."""
    request_id: str


Handler = Callable[[Request], Awaitable[Reply]]


class RefusalError(Exception):
    """Why a request is not answered, as the caller gets it."""

    def __init__(self, problem: Problem, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(problem.detail)
        self.problem = problem
        self.headers = headers

    @classmethod
    def of(
        cls,
        status: int,
        slug: str,
        title: str,
        detail: str,
        *,
        field: str | None = None,
        rule: str | None = None,
        remedy: str | None = None,
        retry_after_s: int | None = None,
        headers: tuple[tuple[str, str], ...] = (),
    ) -> RefusalError:
        """A refusal whose problem type is `/problems/<slug>`; `retry_after_s` becomes Retry-After."""
        problem = Problem(
            type=f"/problems/{slug}",
            title=title,
            status=status,
            detail=detail,
            field=field,
            rule=rule,
            remedy=remedy,
        )
        if retry_after_s is not None:
            headers = (*headers, ("retry-after", str(retry_after_s)))
        return cls(problem, headers)

    @classmethod
    def of_decoding(cls, error: Exception) -> RefusalError:
        """400 for a body that does not parse, 422 for one that parses and breaks a rule, with the field's path.

        `error` is what a decoder of msgspec raised: its own, UnicodeDecodeError or RecursionError.
        """
        if not isinstance(error, msgspec.ValidationError):
            return cls.of(400, "malformed-body", "The body does not parse", str(error))
        field, rule = field_and_rule(error)
        return cls.of(422, "invalid-field", "A field breaks its rule", str(error), field=field, rule=rule)

    def reply(self) -> Reply:
        """As problem+json."""
        return Reply(_encode_json(self.problem), PROBLEM, self.problem.status, self.headers)


def field_and_rule(error: msgspec.ValidationError) -> tuple[str, str]:
    """The path of the field at fault (`$.k`) and the rule that it breaks, from msgspec's message."""
    rule, _, path = str(error).rpartition(" - at `")
    return (path.rstrip("`"), rule) if rule else ("$", str(error))


class Service:
    """The ASGI application of one internal server.

    `routes` maps (method, path) to a handler, which returns a Reply or raises RefusalError; anything else it
    raises is logged and answered as 500. `missing` says in words what it still waits for, by name; empty is
    ready. `detail` is what else `/readyz` says, by name. `start` and `stop` run inside the server's event loop.
    """

    def __init__(
        self,
        *,
        routes: Mapping[tuple[str, str], Handler],
        metrics: StageMetrics,
        missing: Callable[[], Mapping[str, str]],
        detail: Callable[[], Mapping[str, object]] = dict,
        start: Callable[[], Awaitable[None]] | None = None,
        stop: Callable[[], Awaitable[None]] | None = None,
        body_max_bytes: int = BODY_MAX_BYTES,
    ) -> None:
        self._routes: dict[tuple[str, str], Handler] = {
            ("GET", PATH_HEALTH): self._health,
            ("GET", PATH_READY): self._ready,
            ("GET", PATH_METRICS): self._metrics_text,
            **routes,
        }
        self._measured = frozenset(path for _, path in routes)
        self._metrics = metrics
        self._missing = missing
        self._detail = detail
        self._start = start
        self._stop = stop
        self._body_max = body_max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI 3."""
        if scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        try:
            if self._start is not None:
                await self._start()
        except CannotStartError as error:
            _logger.error("cannot start", fault=error.fault, remedy=error.remedy)
            await send({"type": "lifespan.startup.failed", "message": error.fault})
            return
        except Exception as error:
            _logger.exception("cannot start")
            await send({"type": "lifespan.startup.failed", "message": str(error)})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        if self._stop is not None:
            await self._stop()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        path: str = scope["path"]
        begun = time.perf_counter()
        try:
            handler = self._handler(scope["method"], path)
            headers = dict(scope["headers"])
            body = await self._body(headers, receive)
            if body is None:
                return  # the caller has gone: nobody to answer
            begun = time.perf_counter()
            request = Request(
                body,
                headers.get(b"content-type", b"").decode("latin-1").partition(";")[0].strip().lower(),
                _request_id(scope),
            )
            if path in self._measured:
                with self._metrics.in_flight(path):
                    reply = await handler(request)
            else:
                reply = await handler(request)
        except RefusalError as refusal:
            reply = refusal.reply()
        except Exception:
            with log.request_context(_request_id(scope)):
                _logger.exception("request failed", path=path)
            reply = RefusalError.of(
                500, "internal", "The service failed", "See the service's log for the request id"
            ).reply()
        if path in self._measured:
            self._metrics.request(path, (time.perf_counter() - begun) * 1000)
            self._metrics.response(path, reply.status)
        out = [
            (b"content-type", reply.content_type.encode("latin-1")),
            (b"content-length", str(len(reply.body)).encode()),
            *((name.encode("latin-1"), value.encode("latin-1")) for name, value in reply.headers),
        ]
        await send({"type": "http.response.start", "status": reply.status, "headers": out})
        await send({"type": "http.response.body", "body": reply.body})

    def _handler(self, method: str, path: str) -> Handler:
        handler = self._routes.get((method, path))
        if handler is not None:
            return handler
        allowed = sorted(known for known, at in self._routes if at == path)
        if allowed:
            methods = ", ".join(allowed)
            raise RefusalError.of(
                405, "method", "Method not allowed", f"{path} takes {methods}", headers=(("allow", methods),)
            )
        raise RefusalError.of(404, "not-found", "No such path", f"{path} is not served here")

    async def _body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes | None:
        """The whole body, or None when the caller went away; reads no further than the limit."""
        too_large = RefusalError.of(
            413, "body-too-large", "The body is too large", f"at most {self._body_max} bytes", field="$"
        )
        length = headers.get(b"content-length", b"")
        if length.isdigit() and int(length) > self._body_max:
            raise too_large
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body: bytes = message.get("body", b"")
        if not message.get("more_body", False):
            if len(body) > self._body_max:
                raise too_large
            return body
        parts = bytearray(body)
        while message.get("more_body", False):
            if len(parts) > self._body_max:
                raise too_large
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts += message.get("body", b"")
        if len(parts) > self._body_max:
            raise too_large
        return bytes(parts)

    async def _health(self, _: Request) -> Reply:
        return Reply(b'{"alive":true}', JSON)

    async def _ready(self, _: Request) -> Reply:
        missing = dict(self._missing())
        body = _encode_json({"ready": not missing, "missing": missing, **self._detail()})
        return Reply(body, JSON, 503 if missing else 200)

    async def _metrics_text(self, _: Request) -> Reply:
        body, content_type = render(self._metrics.registry)
        return Reply(body, content_type)


def _request_id(scope: Scope) -> str:
    """The caller's id for this request; empty when it sent none that has the contract's form."""
    for name, value in scope["headers"]:
        if name == _REQUEST_ID and _REQUEST_ID_FORM.fullmatch(value):
            return str(value, "ascii")
    return ""


class CannotStartError(Exception):
    """Why a server did not come up, and what to do about it."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def listen(address: str, *, anywhere: bool = False) -> socket.socket:
    """A bound socket for `host:port`, not yet accepting; port 0 takes a free one.

    Bound before the rest is loaded, so that a taken port is known at once. Raises CannotStartError on an
    address that is not loopback (these servers ask nobody who they are; `anywhere` says that others see to that) or is
    taken.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    try:
        ip = ipaddress.ip_address(host)
        number = int(port)
        if not 0 <= number <= 65535:
            raise ValueError(port)
    except ValueError as error:
        raise CannotStartError(
            f"cannot listen at {address!r}", "give an IP address and a port, 127.0.0.1:8082"
        ) from error
    if not ip.is_loopback and not anywhere:
        raise CannotStartError(
            f"refuse to listen at {address}: internal servers do not authenticate their callers",
            "give a loopback address, 127.0.0.1:8082; "
            f"in a pod behind a NetworkPolicy set {LISTEN_VARIABLE}={LISTEN_ANYWHERE}",
        )
    bound = socket.socket(socket.AF_INET6 if ip.version == 6 else socket.AF_INET, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, number))
    except OSError as error:
        bound.close()
        raise CannotStartError(
            f"cannot listen at {address}: {error.strerror}", "stop what holds the port, or choose another"
        ) from error
    return bound


def run(role: str, site: str, address: str, build: Callable[[], Application]) -> int:
    """Be this server until SIGTERM or SIGINT; the exit code: 0 stopped when asked, 2 could not start.

    `build` loads what is served, a Service or any ASGI application, which may be `wire.Gated`; it and the service's
    `start` may raise CannotStartError.
    """
    log.configure(role, site)
    with _stop_while_starting():
        try:
            anywhere = os.environ.get(LISTEN_VARIABLE) == LISTEN_ANYWHERE
            with contextlib.ExitStack() as held:
                bound = held.enter_context(listen(address, anywhere=anywhere))
                host, port = bound.getsockname()[:2]
                service = build()
                config = uvicorn.Config(
                    service,
                    loop="uvloop",
                    http=_wire(service),  # type: ignore[arg-type]  # it is called, and never asked what it is
                    ws="none",
                    lifespan="on",
                    log_config=None,
                    log_level="warning",
                    access_log=False,
                    proxy_headers=False,
                    server_header=False,
                    date_header=False,
                    workers=1,
                    timeout_keep_alive=KEEP_ALIVE_S,
                    timeout_graceful_shutdown=STOP_WITHIN_S,
                )
                _logger.info("starting", address=f"{host}:{port}")
                handles = [bound, *(held.enter_context(bound.dup()) for _ in range(ACCEPTED_AT_ONCE - 1))]
                try:
                    _Server(config).run(sockets=handles)
                except SystemExit as end:  # how uvicorn says that the service's start failed
                    return 2 if end.code == STARTUP_FAILURE else 0
        except CannotStartError as error:
            _logger.error("cannot start", fault=error.fault, remedy=error.remedy)
            return 2
    _logger.info("stopped")
    return 0


def _wire(service: object) -> Callable[..., Wire]:
    """The protocol before it; uvicorn calls it for every connection."""
    return functools.partial(Wire, gate=service.gate) if isinstance(service, Gated) else Wire


class _Server(uvicorn.Server):
    """uvicorn, but a stop that was asked for ends the process with 0 and not by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        with super().capture_signals():
            yield
            self._captured_signals.clear()


@contextlib.contextmanager
def _stop_while_starting() -> Iterator[None]:
    """Until uvicorn takes over the signals, SIGTERM and SIGINT end the process with 0 as they do after."""

    def leave(_: int, __: FrameType | None) -> NoReturn:
        raise SystemExit(0)

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
