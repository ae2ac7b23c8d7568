"""HTTP/1.1 as a server takes it from strangers: bounded in bytes and in time, and every refusal a problem+json.

uvicorn's protocol on httptools limits neither the size of a request's head nor the time in which a request must come:
a single connection could fill the memory, and slow ones would hold their places for ever. This one counts and waits
before anything reaches an application, and what is no HTTP is told in the same form as every other fault (RFC 9457). An
application with a gate is asked there first: a refusal that is one write, and not a task with a scope, a body and two
sends, is what lets a server that is asked for ten times what it can do keep its time for what it can. It knows no path
and reads no body.
"""

from __future__ import annotations

import asyncio
import functools
import resource
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, runtime_checkable

import httptools
import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from workloads.contract.http import Problem

URL_MAX_BYTES: Final = 8 * 1024
HEAD_MAX_BYTES: Final = 32 * 1024
"""Names and values of all header and trailer lines of one request."""
HEADERS_MAX: Final = 100
MESSAGE_MAX_BYTES: Final = 8 * 1024 * 1024
"""A request as it travels: one-byte chunks make six bytes of one, and the largest body that is read on is 4 MiB."""
MESSAGE_WAIT_S: Final = 10.0
"""From the first byte of a request, or from the connection, to its last."""
READ_WAIT_S: Final = 10.0
"""How long a client may leave an answer unread once its connection is full."""
LINGER_S: Final = 1.0
"""How long bytes of a refused sender are dropped, so that it gets to read why: a close at once would be a reset."""
PLACES_MAX: Final = 4096
"""Connections at once; beyond it, the one that has waited longest without asking anything makes room."""
FILES_KEPT: Final = 200
"""Of the files that the system lets a process open, those that are not for callers."""


Gate = Callable[[bytes, bytes, Sequence[tuple[bytes, bytes]]], bytes | None]
"""Method, target and headers (names in lower case) of a request, in microseconds: a whole response that keeps the
connection, or None to let it in. Its body may not have come."""


@runtime_checkable
class Gated(Protocol):
    """An application that turns requests away before they reach it."""

    def gate(self, method: bytes, target: bytes, headers: Sequence[tuple[bytes, bytes]]) -> bytes | None:
        """See `Gate`."""
        ...


def _refusal(status: int, kind: str, title: str, detail: str, remedy: str) -> bytes:
    """A whole response, after which the connection closes."""
    body = msgspec.json.encode(
        Problem(type=f"/problems/{kind}", title=title, status=status, detail=detail, remedy=remedy)
    )
    head = b"content-type: application/problem+json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n" % len(body)
    return STATUS_LINE[status] + head + body


_MALFORMED: Final = _refusal(
    400, "not-http", "The request is not HTTP/1.1", "the request breaks RFC 9112", "send one Host and one framing"
)
_SLOW: Final = _refusal(
    408, "slow-request", "The request did not arrive", f"it was not whole after {MESSAGE_WAIT_S:g} s", "send it again"
)
_LARGE: Final = _refusal(
    413, "too-large", "The request is too large", f"at most {MESSAGE_MAX_BYTES} bytes", "send less at once"
)
_LONG_URL: Final = _refusal(
    414, "long-target", "The path is too long", f"at most {URL_MAX_BYTES} bytes", "see /docs for the paths"
)
_LARGE_HEAD: Final = _refusal(
    431,
    "large-head",
    "The headers are too large",
    f"at most {HEADERS_MAX} lines of {HEAD_MAX_BYTES} bytes together",
    "send only the headers that are needed",
)


_CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"


class _Refuse(Exception):  # noqa: N818 - ends the parsing of a request, is no mistake of ours
    """The request is refused by what `Wire._answer` holds."""


class _Joined:
    """One answer's transport: its head goes out with what comes next, for two segments wake the caller twice."""

    __slots__ = ("_begun", "_head", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._begun = False
        self._head = b""

    def write(self, data: bytes) -> None:
        """The first is the head, and waits; an interim answer is none."""
        if not self._begun and data != _CONTINUE:
            self._begun, self._head = True, data
            return
        head, self._head = self._head, b""
        self._transport.write(head + data)

    def flush(self) -> None:
        """Nothing comes next: an answer to HEAD has no body."""
        if self._head and not self._transport.is_closing():
            self._transport.write(self._head)
        self._head = b""

    def close(self) -> None:
        """See `asyncio.Transport`."""
        self.flush()
        self._transport.close()

    def is_closing(self) -> bool:
        """See `asyncio.Transport`."""
        return self._transport.is_closing()


class Wire(HttpToolsProtocol):
    """One connection. A request is passed on when its head is whole, as before; its body as it comes."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        gate: Gate | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate = gate
        self._turned_away: bytes | None = None
        """What the gate said of the request that is being read; it is told once that is whole."""
        self._answer = _MALFORMED
        self._running: RequestResponseCycle | None = None
        self._answering: _Joined | None = None
        self._dropping = 0
        self._begun = self._complete = 0
        self._in_head = False
        self._head = self._lines = self._hosts = self._codings = 0
        self._received = 0
        self._since = self.loop.time()
        self._patience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(MESSAGE_WAIT_S, self._too_slow)
        if len(self.connections) > _places():
            waiting = [other for other in self.connections if isinstance(other, Wire) and other.idle]
            if waiting:
                min(waiting, key=lambda other: other._since).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """See `asyncio.Protocol`."""
        for timer in (self._patience, self._unread):
            if timer is not None:
                timer.cancel()
        self._patience = self._unread = None
        if self._running is not None:  # uvicorn tells only the one that was asked last, and pipelined ones wait behind
            self._running.disconnected = True
        super().connection_lost(exc)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for an answer on it."""
        if self._turned_away is not None:
            return False
        return self._running is None or (self._running.response_complete and not self.pipeline)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        if self._dropping:
            self._dropping += len(data)
            if self._dropping > MESSAGE_MAX_BYTES:
                self.transport.abort()
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        begun, complete = self._begun, self._complete
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:  # not logged: a line for each would be a way to fill the disk
            self._refuse(self._answer)
        except httptools.HttpParserUpgrade:
            self.cycle.keep_alive = False  # the parser takes what follows for another protocol; none is spoken here
        if self._dropping or self.transport.is_closing():
            return
        if self._complete != complete:
            self._settle()
            if self._complete == self._begun:
                return
        # Bytes that began a request, or none at all, as empty lines do: it must become whole in time.
        if self._patience is None:
            self._patience = self.loop.call_later(MESSAGE_WAIT_S, self._too_slow)
        self._received = self._received + len(data) if begun == self._begun else 0
        if self._in_head and self._received > HEAD_MAX_BYTES + URL_MAX_BYTES:
            self._refuse(_LARGE_HEAD)
        elif self._received > MESSAGE_MAX_BYTES:
            self._refuse(_LARGE)

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        self._answering = cycle.transport = _Joined(self.transport)  # type: ignore[assignment]  # a cycle needs no more
        super()._start_asgi_task(cycle, app)

    def on_response_complete(self) -> None:
        """See `HttpToolsProtocol`."""
        if self._answering is not None:
            self._answering.flush()
            self._answering = None
        super().on_response_complete()

    # httptools' callbacks
    def on_message_begin(self) -> None:
        """See `httptools.HttpRequestParser`."""
        super().on_message_begin()
        self._begun += 1
        self._in_head = True
        self._head = self._lines = self._hosts = self._codings = 0

    def on_url(self, url: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        super().on_url(url)
        if len(self.url) > URL_MAX_BYTES:
            self._stop(_LONG_URL)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        self._head += len(name) + len(value)
        self._lines += 1
        if self._lines > HEADERS_MAX or self._head > HEAD_MAX_BYTES:
            self._stop(_LARGE_HEAD)
        if self._in_head:  # a trailer is no header (RFC 9110, 6.5.1), and may not become one
            super().on_header(name, value)
            name = self.headers[-1][0]
            if name == b"host":
                self._hosts += 1
            elif name == b"transfer-encoding":
                self._codings += 1 if value.lower() == b"chunked" else 2

    def on_headers_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        version = self.parser.get_http_version()
        # One Host, and chunks as the only coding, but neither is needed nor known in 1.0 (RFC 9112, 3.2 and 6.1).
        good = (
            (self._hosts == 1 and self._codings <= 1) if version == "1.1" else (self._hosts <= 1 and not self._codings)
        )
        if not good or version not in {"1.0", "1.1"}:
            self._stop(_MALFORMED)
        if self._gate is not None and version == "1.1" and self._may_turn_away():
            self._turned_away = self._gate(self.parser.get_method(), self.url, self.headers)
        if self._turned_away is None:
            super().on_headers_complete()
        self._in_head = False

    def on_body(self, body: bytes) -> None:
        """See `httptools.HttpRequestParser`."""
        if self._turned_away is None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """See `httptools.HttpRequestParser`."""
        if self._turned_away is None:
            super().on_message_complete()
        else:
            answer, self._turned_away = self._turned_away, None
            self.transport.write(answer)
            self.on_response_complete()
        self._complete += 1

    def _may_turn_away(self) -> bool:
        """Whether a refusal can be written as soon as the request is whole, and another request follow it.

        Not before answers that are under way, nor to one who reads none; who waits for 100 Continue may send no body.
        """
        return (
            self.idle
            and not self.flow.write_paused
            and not self.expect_100_continue
            and self.parser.should_keep_alive()
            and not self.parser.should_upgrade()
        )

    # asyncio.Protocol
    def pause_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().pause_writing()
        self._unread = self.loop.call_later(READ_WAIT_S, self.transport.abort)

    def resume_writing(self) -> None:
        """See `asyncio.Protocol`."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _settle(self) -> None:
        """A request is whole, or refused: nobody waits for it any more."""
        self._since = self.loop.time()
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _too_slow(self) -> None:
        if self._begun == self._complete:  # opened ahead of need: nothing was asked
            self.transport.close()
        else:
            self._refuse(_SLOW)

    def _stop(self, answer: bytes) -> None:
        self._answer = answer
        raise _Refuse

    def _refuse(self, answer: bytes) -> None:
        """Answer, unless another answer is under way, and take nothing more from this connection."""
        if self.transport.is_closing():
            return
        self._dropping = 1
        self._settle()
        self._unset_keepalive_if_required()
        if self._turned_away is not None:
            self._turned_away = None
        elif self._begun != self._complete and not self._in_head:  # the application has it, and waits for its body
            if self.pipeline or self.cycle.response_started:
                self.transport.close()
                return
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        elif not self.idle:
            self.cycle.keep_alive = False  # what came whole before this is still answered, and nothing after it
            return
        self.transport.write(answer)
        self.transport.write_eof()
        self._patience = self.loop.call_later(LINGER_S, self.transport.abort)


@functools.cache
def _places() -> int:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return PLACES_MAX if soft == resource.RLIM_INFINITY else max(min(PLACES_MAX, soft - FILES_KEPT), FILES_KEPT)
