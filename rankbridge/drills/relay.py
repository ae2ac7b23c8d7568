"""The way between the two sites where nobody is root: a TCP relay that every connection between them passes.

Two tunnels, as the real VPN has: connections are shared out between them, and what is on a tunnel that is cut stands
still (it is not reset: in a real cut packets vanish) until the route has moved to the other one, or until it is healed.
Loss resets the connection that it meets; there are no packets here, and no MTU. Runs in a thread of its own; it knows
addresses and nothing of what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import random
import socket
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Final, NamedTuple

from rankbridge.link import Direction, Shape

MOVES_AFTER_S: Final = 8.1
"""A tunnel that is cut loses its route after this: what BGP with timers of 3 and 9 s took in a real rig."""
_CHUNK: Final = 16 * 1024
_WAITING_MAX: Final = 64
"""Chunks on their way in one direction of a connection; more and its sender is not read from."""
_LOOK_S: Final = 0.05
_STARTS_WITHIN_S: Final = 5.0


class Way(NamedTuple):
    """Who connects to `listen` reaches `target`; `asks` is the direction in which requests go."""

    listen: tuple[str, int]
    target: tuple[str, int]
    asks: Direction


@dataclasses.dataclass
class _Tunnel:
    """One tunnel: what it does, since when, and when its wire is free again, by direction."""

    shape: Shape = dataclasses.field(default_factory=Shape)
    since: float = 0.0
    free_at: dict[Direction, float] = dataclasses.field(default_factory=dict)

    def does(self, direction: Direction) -> Shape:
        """What happens to what goes in a direction."""
        return self.shape.toward(direction)

    def is_cut(self, direction: Direction) -> bool:
        return self.does(direction).cut


class _Flow:
    """One connection through the relay."""

    def __init__(self, tunnel: int) -> None:
        self.tunnel = tunnel
        self.writers: list[asyncio.StreamWriter] = []

    def reset(self) -> None:
        for writer in self.writers:
            writer.transport.abort()


class TcpLink:
    """Keeps the door `rankbridge.link.Link`. Use as a context manager; thread-safe."""

    def __init__(self, ways: Sequence[Way], *, seed: int = 1, moves_after_s: float = MOVES_AFTER_S) -> None:
        self.tunnels: Sequence[int] = (1, 2)
        self._ways = ways
        self._moves_after_s = moves_after_s
        self._state = {number: _Tunnel() for number in self.tunnels}
        self._chance = random.Random(seed)  # noqa: S311 - losses, no secrets
        self._flows: set[_Flow] = set()
        self._next = 0
        self._loop = Background()

    def __enter__(self) -> TcpLink:
        self._loop.start()
        try:
            for way in self._ways:
                self._loop.listen(way.listen, self._serve(way))
        except BaseException:
            self._loop.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.stop()

    def shape(self, shape: Shape, tunnel: int | None = None) -> None:
        """See Link."""
        for number in self.tunnels if tunnel is None else (tunnel,):
            self._state[number] = _Tunnel(shape, time.monotonic())

    def heal(self) -> None:
        """See Link."""
        self.shape(Shape())

    def _serve(self, way: Way) -> Handler:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            flow = _Flow(self.tunnels[self._next % len(self.tunnels)])
            self._next += 1
            flow.writers.append(writer)
            self._flows.add(flow)
            back = Direction.FROM_CLOUD if way.asks is Direction.TO_CLOUD else Direction.TO_CLOUD
            try:
                # The first packet of a connection is stopped by a cut, too.
                await self._passage(flow, way.asks)
                far_reader, far_writer = await asyncio.open_connection(*way.target)
                flow.writers.append(far_writer)
                await asyncio.gather(
                    self._pump(flow, reader, far_writer, way.asks), self._pump(flow, far_reader, writer, back)
                )
            except (OSError, asyncio.CancelledError):
                pass  # refused, or one of the two has gone, or the link ends: who is left is told by a reset
            finally:
                flow.reset()
                self._flows.discard(flow)

        return serve

    async def _pump(
        self, flow: _Flow, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction
    ) -> None:
        """Pass on what comes, when it is due; an end is passed on like everything else."""
        waiting: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_WAITING_MAX)

        async def take() -> None:
            data = b"-"
            while data:
                data = await reader.read(_CHUNK)
                await waiting.put((self._due(flow, direction, len(data)), data))

        async def give() -> None:
            while True:
                due, data = await waiting.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._passage(flow, direction)
                if not data:
                    if writer.can_write_eof():
                        writer.write_eof()
                    return
                does = self._state[flow.tunnel].does(direction)
                if does.loss and self._chance.random() < does.loss:
                    flow.reset()
                    raise ConnectionResetError
                writer.write(data)
                await writer.drain()

        both = [asyncio.ensure_future(take()), asyncio.ensure_future(give())]
        try:
            await asyncio.gather(*both)
        finally:
            for task in both:
                task.cancel()

    def _due(self, flow: _Flow, direction: Direction, size: int) -> float:
        """When a chunk comes out at the other end, but for cuts."""
        tunnel, now = self._state[flow.tunnel], time.monotonic()
        does = tunnel.does(direction)
        leaves = now
        if does.rate_mbit is not None:
            begins = max(now, tunnel.free_at.get(direction, now))
            leaves = tunnel.free_at[direction] = begins + does.occupies_s(size)
        return leaves + does.late_s(self._chance)

    async def _passage(self, flow: _Flow, direction: Direction) -> None:
        """Wait until something can pass: healed, or moved to a tunnel that is whole."""
        while self._state[flow.tunnel].is_cut(direction):
            gone = time.monotonic() - self._state[flow.tunnel].since
            whole = [number for number in self.tunnels if not self._state[number].is_cut(direction)]
            if whole and gone >= self._moves_after_s:
                flow.tunnel = whole[0]
            else:
                await asyncio.sleep(_LOOK_S)


Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Coroutine[None, None, None]]


class Background:
    """An event loop in a thread of its own, with listening sockets."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._servers: list[asyncio.Server] = []

    def start(self) -> None:
        """Begin to run."""
        self._thread.start()

    def listen(self, at: tuple[str, int] | socket.socket, handler: Handler) -> tuple[str, int]:
        """Serve at an address, or on a socket that listens; where that is. Raises OSError where it is taken."""

        async def open_server() -> asyncio.Server:
            if isinstance(at, socket.socket):
                return await asyncio.start_server(handler, sock=at)
            return await asyncio.start_server(handler, *at, reuse_address=True)

        server = asyncio.run_coroutine_threadsafe(open_server(), self._loop).result(_STARTS_WITHIN_S)
        self._servers.append(server)
        host, port = server.sockets[0].getsockname()[:2]
        return str(host), int(port)

    def call(self, do: Callable[[], None]) -> None:
        """Do something in the loop's thread, soon."""
        self._loop.call_soon_threadsafe(do)

    def stop(self) -> None:
        """Close everything, and end the thread."""

        async def close() -> None:
            for server in self._servers:
                server.close()
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        with contextlib.suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(close(), self._loop).result(_STARTS_WITHIN_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STARTS_WITHIN_S)
        self._loop.close()
