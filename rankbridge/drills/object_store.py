"""Stands between the sites and their object store and does to them what an object store can do: 500, 503, slow, reset.

It answers in S3's form where it answers itself, and passes bytes on otherwise. It knows no bucket and no key.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from rankbridge.drills.relay import Background
from rankbridge.drills.scene import StoreFault

SLOW_S: Final = 3.0
_CHUNK: Final = 64 * 1024
_ERRORS: Final[Mapping[StoreFault, tuple[int, str, str]]] = MappingProxyType(
    {
        StoreFault.ERROR_500: (500, "InternalError", "We encountered an internal error. Please try again."),
        StoreFault.ERROR_503: (503, "SlowDown", "Please reduce your request rate."),
        StoreFault.EXPIRED: (403, "ExpiredToken", "The provided token has expired."),
    }
)


class StoreProxy:
    """A door to the object store that can be told to misbehave. Use as a context manager; thread-safe."""

    def __init__(self, target: tuple[str, int], at: tuple[str, int] | socket.socket = ("127.0.0.1", 0)) -> None:
        self._target = target
        self._at = at
        self._fault = StoreFault.NONE
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = Background()
        self.address = ("", 0)
        """Where it listens."""
        self.met = 0
        """Requests and connections that met a fault."""

    def __enter__(self) -> StoreProxy:
        self._loop.start()
        self.address = self._loop.listen(self._at, self._serve)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.stop()

    def tell(self, fault: StoreFault) -> None:
        """From now on do this; connections that are open are closed, so that the next request meets it."""
        self._fault = fault
        self._loop.call(self._close_all)

    def _close_all(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        fault = self._fault
        self._writers.add(writer)
        try:
            if fault in _ERRORS:
                await self._refuse(reader, writer, fault)
            elif fault is StoreFault.RESET:
                await reader.read(_CHUNK)
                self.met += 1
                writer.transport.abort()
            else:
                await self._pass_on(reader, writer, SLOW_S if fault is StoreFault.SLOW else 0.0)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, asyncio.CancelledError):
            pass  # whoever asked has gone, or the door closes
        finally:
            self._writers.discard(writer)
            writer.transport.abort() if fault is StoreFault.RESET else writer.close()

    async def _refuse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, fault: StoreFault) -> None:
        """Answer one request, of whatever body, and close."""
        head = await reader.readuntil(b"\r\n\r\n")
        self.met += 1
        status, code, message = _ERRORS[fault]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
        if head.startswith(b"HEAD "):
            body = b""
        lines = [f"HTTP/1.1 {status} {code}", "content-type: application/xml", f"content-length: {len(body)}"]
        writer.write("\r\n".join([*lines, "connection: close", "", ""]).encode() + body)
        await writer.drain()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, wait_s: float) -> None:
        far_reader, far_writer = await asyncio.open_connection(*self._target)
        self._writers.add(far_writer)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, wait: float) -> None:
            while data := await source.read(_CHUNK):
                if wait:
                    self.met += 1
                    await asyncio.sleep(wait)
                sink.write(data)
                await sink.drain()
            if sink.can_write_eof():
                sink.write_eof()

        try:
            await asyncio.gather(pump(reader, far_writer, 0.0), pump(far_reader, writer, wait_s))
        finally:
            self._writers.discard(far_writer)
            far_writer.close()
