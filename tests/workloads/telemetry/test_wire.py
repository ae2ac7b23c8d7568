"""The gate of a server's wire: a refusal is one write, the connection goes on, and nothing overtakes anything."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from workloads.telemetry.wire import MESSAGE_MAX_BYTES, Wire

BUSY = b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 4\r\n\r\nbusy"
Header = tuple[bytes, bytes]


class Gatekept:
    """An application that says which path it answers and how long its body was; `/busy` does not get that far."""

    def __init__(self) -> None:
        self.asked: list[tuple[bytes, bytes, dict[bytes, bytes]]] = []
        self.answered: list[str] = []
        self.go_on = asyncio.Event()
        self.go_on.set()

    def gate(self, method: bytes, target: bytes, headers: Sequence[Header]) -> bytes | None:
        self.asked.append((method, target, dict(headers)))
        return BUSY if target == b"/busy" else None

    async def __call__(
        self,
        scope: dict[str, Any],
        receive: Callable[[], Awaitable[dict[str, Any]]],
        send: Callable[[dict[str, Any]], Awaitable[None]],
    ) -> None:
        length, more = 0, True
        while more:
            message = await receive()
            length, more = length + len(message.get("body", b"")), message.get("more_body", False)
        await self.go_on.wait()
        self.answered.append(scope["path"])
        body = b"%b %d" % (scope["path"].encode(), length)
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [(b"content-length", b"%d" % len(body))],
            }
        )
        await send({"type": "http.response.body", "body": body})


class Client:
    """One connection, by its bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def say(self, *parts: bytes) -> None:
        """Each part by itself."""
        for part in parts:
            self._writer.write(part)
            await self._writer.drain()
            await asyncio.sleep(0.01)

    async def hear(self) -> tuple[int, bytes]:
        """Status and body of the next response; what comes before a final one has none."""
        async with asyncio.timeout(5):
            head = await self._reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or b"0")
            return int(head.split(b" ")[1]), await self._reader.readexactly(length)

    async def silent(self) -> bool:
        """Whether nothing comes for now."""
        try:
            async with asyncio.timeout(0.05):
                await self._reader.read(1)
        except TimeoutError:
            return True
        return False

    async def chunk(self) -> bytes:
        """What comes at once."""
        async with asyncio.timeout(5):
            return await self._reader.read(4096)

    async def ended(self) -> bool:
        """Whether the server closed, and sent nothing before."""
        async with asyncio.timeout(5):
            return await self._reader.read() == b""


def post(path: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture
def app() -> Gatekept:
    return Gatekept()


@pytest.fixture
async def client(app: Gatekept) -> AsyncIterator[Client]:
    config = uvicorn.Config(app, http=Wire, ws="none", access_log=False, log_config=None)
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        lambda: Wire(config, state, {}, gate=app.gate), "127.0.0.1", 0
    )
    async with server:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
        yield Client(reader, writer)
        app.go_on.set()
        writer.close()
        await writer.wait_closed()


async def test_the_connection_goes_on_after_a_refusal(app: Gatekept, client: Client):
    for _ in range(3):
        await client.say(post("/busy", b"ab"))
        assert await client.hear() == (503, b"busy")
        await client.say(post("/in", b"abc"))
        assert await client.hear() == (200, b"/in 3")
    assert app.answered == ["/in"] * 3


async def test_the_gate_sees_method_target_and_headers(app: Gatekept, client: Client):
    await client.say(post("/busy?a=b", b"", "X-Who: Me"))
    await client.hear()
    (method, target, headers) = app.asked[0]
    assert (method, target, headers[b"x-who"]) == (b"POST", b"/busy?a=b", b"Me")


@pytest.mark.parametrize(
    "message",
    [
        [post("/busy", b"x" * 100_000)],
        [post("/busy", b"x" * 100_000)[:-100_000], b"x" * 50_000, b"x" * 50_000],
        [b"POST /busy HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"2\r\nab\r\n", b"0\r\n\r\n"],
    ],
)
async def test_the_body_of_a_refused_request_is_skipped(app: Gatekept, client: Client, message: list[bytes]):
    await client.say(*message)
    assert await client.hear() == (503, b"busy")
    await client.say(post("/in", b"after"))
    assert await client.hear() == (200, b"/in 5")
    assert app.answered == ["/in"]


async def test_a_refusal_waits_for_the_end_of_its_request(client: Client):
    whole = post("/busy", b"abcd")
    await client.say(whole[:-1])
    assert await client.silent()
    await client.say(whole[-1:])
    assert await client.hear() == (503, b"busy")


async def test_pipelined_requests_are_answered_in_their_order(app: Gatekept, client: Client):
    app.go_on.clear()
    await client.say(post("/busy") + post("/first", b"1") + post("/busy") + post("/second", b"22"))
    assert await client.hear() == (503, b"busy")
    assert await client.silent()
    app.go_on.set()
    # Behind an answer that is under way the gate is not asked: its refusal would overtake that.
    assert [await client.hear() for _ in range(3)] == [(200, b"/first 1"), (200, b"/busy 0"), (200, b"/second 2")]


@pytest.mark.parametrize("header", ["Connection: close", "Expect: 100-continue"])
async def test_who_closes_after_or_waits_to_send_its_body_is_left_to_the_application(
    app: Gatekept, client: Client, header: str
):
    await client.say(post("/busy", b"", header))
    if header.startswith("Expect"):
        assert await client.hear() == (100, b"")
    assert await client.hear() == (200, b"/busy 0")
    assert app.asked == []


async def test_a_refused_request_that_is_no_http_after_all_is_told_so_and_closed(app: Gatekept, client: Client):
    await client.say(b"POST /busy HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n", b"zz\r\n")
    assert (await client.hear())[0] == 400
    assert await client.ended()
    assert app.answered == []


async def test_a_refused_request_may_be_no_longer_than_another(client: Client):
    await client.say(post("/busy", b"x" * 2 * MESSAGE_MAX_BYTES)[: MESSAGE_MAX_BYTES + 1_000_000])
    assert (await client.hear())[0] == 413


async def test_an_answer_comes_whole_and_not_head_and_body_by_turns(client: Client):
    for _ in range(20):
        await client.say(post("/a", b"123"))
        assert await client.chunk() == b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n/a 3"


async def test_an_answer_without_a_body_is_not_kept_back(client: Client):
    await client.say(post("/a").replace(b"POST", b"HEAD"))
    assert await client.chunk() == b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\n"
    await client.say(post("/b", b"1", "Connection: close"))
    assert (await client.chunk()).endswith(b"/b 1")
    assert await client.ended()
