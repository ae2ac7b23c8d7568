"""Calls over kept-alive connections to a server that misbehaves in every way a server can."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from workloads.gateway.neighbour import Late, Neighbour, Unreachable

Behaviour = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-Who: me\r\n\r\nok"


class Server:
    """Reads requests with a length and answers as told; counts connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.behave: Behaviour = self.answer
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None] | None] = set()

    async def answer(self, _: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        self._tasks.add(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
                body = await reader.readexactly(length)
                self.requests.append(head + body)
                await self.behave(body, writer)
        writer.close()

    async def drop_all(self) -> None:
        for writer in self._writers:
            writer.close()
        await asyncio.sleep(0.01)

    async def end(self) -> None:
        for task in self._tasks:
            if task is not None:
                task.cancel()
        await asyncio.gather(*(task for task in self._tasks if task is not None), return_exceptions=True)


@pytest.fixture
async def server() -> AsyncIterator[tuple[Server, Neighbour]]:
    made = Server()
    listening = await asyncio.start_server(made.serve, "127.0.0.1", 0)
    neighbour = Neighbour("127.0.0.1", listening.sockets[0].getsockname()[1])
    yield made, neighbour
    await neighbour.close()
    listening.close()
    await made.end()


def post(neighbour: Neighbour) -> bytes:
    return neighbour.head("POST", "/do", [("content-type", "text/plain")])


async def test_a_call_carries_head_and_body_and_brings_back_status_headers_and_body(server: tuple[Server, Neighbour]):
    made, neighbour = server
    reply = await neighbour.send(post(neighbour), (b"one ", memoryview(b"two")), more_head=b"x-more: 1\r\n")
    assert (reply.status, reply.headers[b"x-who"], reply.body) == (200, b"me", b"ok")
    head, _, body = made.requests[0].partition(b"\r\n\r\n")
    assert head.split(b"\r\n")[0] == b"POST /do HTTP/1.1"
    assert {b"content-type: text/plain", b"x-more: 1", b"content-length: 7"} <= set(head.split(b"\r\n"))
    assert body == b"one two"


async def test_calls_one_after_the_other_share_a_connection_and_calls_at_once_do_not(
    server: tuple[Server, Neighbour],
):
    made, neighbour = server
    for _ in range(5):
        await neighbour.send(post(neighbour))
    assert made.connections == 1
    await asyncio.gather(*(neighbour.send(post(neighbour)) for _ in range(3)))
    assert made.connections == 3


async def test_an_answer_in_chunks_is_put_together(server: tuple[Server, Neighbour]):
    made, neighbour = server

    async def chunks(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\none\r\n")
        await writer.drain()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    made.behave = chunks
    assert (await neighbour.send(post(neighbour))).body == b"onetwo"


async def test_nobody_listening_is_unreachable():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        neighbour = Neighbour("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(Unreachable, match="takes no connection"):
            await neighbour.send(post(neighbour))


async def test_a_late_answer_is_given_up_and_never_taken_for_the_next_one(server: tuple[Server, Neighbour]):
    made, neighbour = server

    async def echo_slowly(body: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.05 if body == b"slow" else 0)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n" + body)

    made.behave = echo_slowly
    with pytest.raises(Late):
        await neighbour.send(post(neighbour), (b"slow",), timeout_s=0.01)
    for _ in range(3):
        await asyncio.sleep(0.03)
        assert (await neighbour.send(post(neighbour), (b"fast",))).body == b"fast"


async def test_a_call_that_is_called_off_leaves_no_connection_behind(server: tuple[Server, Neighbour]):
    made, neighbour = server
    never = asyncio.Event()

    async def hang(_: bytes, __: asyncio.StreamWriter) -> None:
        await never.wait()

    made.behave = hang
    call = asyncio.create_task(neighbour.send(post(neighbour), timeout_s=60))
    await asyncio.sleep(0.02)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    made.behave = made.answer
    assert (await neighbour.send(post(neighbour))).status == 200
    assert made.connections == 2


async def test_a_connection_that_was_closed_while_idle_costs_no_call(server: tuple[Server, Neighbour]):
    made, neighbour = server
    await neighbour.send(post(neighbour))
    await made.drop_all()
    assert (await neighbour.send(post(neighbour))).status == 200
    assert made.connections == 2


async def test_a_connection_that_closes_just_as_it_is_used_again_is_tried_once_more(server: tuple[Server, Neighbour]):
    made, neighbour = server
    await neighbour.send(post(neighbour))
    hung_up = 0

    async def hang_up_once(body: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal hung_up
        hung_up += 1
        if hung_up == 1:
            writer.close()
        else:
            await made.answer(body, writer)

    made.behave = hang_up_once
    assert (await neighbour.send(post(neighbour))).status == 200
    assert hung_up == 2


async def test_a_new_connection_that_breaks_is_not_tried_again(server: tuple[Server, Neighbour]):
    made, neighbour = server

    async def hang_up(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.close()

    made.behave = hang_up
    with pytest.raises(Unreachable):
        await neighbour.send(post(neighbour))
    assert len(made.requests) == 1


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"what is this\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 2\r\n\r\n",
    ],
)
async def test_half_an_answer_and_no_answer_at_all_are_unreachable(server: tuple[Server, Neighbour], answer: bytes):
    made, neighbour = server

    async def break_off(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(answer)
        await writer.drain()
        writer.close()

    made.behave = break_off
    with pytest.raises(Unreachable):
        await neighbour.send(post(neighbour))


async def test_an_answer_that_says_close_is_taken_and_its_connection_not_used_again(server: tuple[Server, Neighbour]):
    made, neighbour = server

    async def say_close(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
        writer.close()

    made.behave = say_close
    for _ in range(2):
        assert (await neighbour.send(post(neighbour))).body == b"ok"
    assert made.connections == 2


async def test_bytes_that_nobody_asked_for_end_a_connection(server: tuple[Server, Neighbour]):
    made, neighbour = server

    async def answer_twice(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)
        await writer.drain()
        await asyncio.sleep(0.01)
        writer.write(OK.replace(b"ok", b"no"))

    made.behave = answer_twice
    assert (await neighbour.send(post(neighbour))).body == b"ok"
    await asyncio.sleep(0.03)
    assert (await neighbour.send(post(neighbour))).body == b"ok"
    assert made.connections == 2


async def test_connections_that_nobody_answers_any_more_cost_one_late_call_and_not_one_each(
    server: tuple[Server, Neighbour],
):
    made, neighbour = server
    await asyncio.gather(*(neighbour.send(post(neighbour)) for _ in range(5)))
    old = made.connections
    never = asyncio.Event()

    async def only_new_ones(body: bytes, writer: asyncio.StreamWriter) -> None:
        if made.connections == old:
            await never.wait()
        await made.answer(body, writer)

    made.behave = only_new_ones
    with pytest.raises(Late):
        await neighbour.send(post(neighbour), timeout_s=0.02)
    assert (await neighbour.send(post(neighbour), timeout_s=5)).status == 200


async def test_closing_ends_calls_in_progress(server: tuple[Server, Neighbour]):
    made, neighbour = server
    never = asyncio.Event()

    async def hang(_: bytes, __: asyncio.StreamWriter) -> None:
        await never.wait()

    made.behave = hang
    call = asyncio.create_task(neighbour.send(post(neighbour), timeout_s=60))
    await asyncio.sleep(0.02)
    await neighbour.close()
    with pytest.raises(Unreachable):
        await call
