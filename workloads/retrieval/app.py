"""The retrieval service: `POST /internal/candidates`, MessagePack in and out.

A query names the bundle and the deltas that it was made for; one of an edition that is not held is refused (409),
because item indices of two editions mean different items. Requests are answered one after the other on the event
loop: each is about a millisecond of arithmetic, and a thread for it measured worse at every load (the interpreter
lock is handed over late to the one who has an answer to send). Knows HTTP and the editions' door.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import msgspec

from workloads.bundle.manifest import SHORT
from workloads.contract.http import BODY_MAX_BYTES, PATH_CANDIDATES, CandidatesQuery
from workloads.retrieval.editions import Editions
from workloads.retrieval.retriever import QueryFault
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import MSGPACK, RefusalError, Reply, Request, Service


def create_app(
    editions: Editions, metrics: StageMetrics, follow: Callable[[], Awaitable[None]] | None = None
) -> Service:
    """The ASGI application over what `editions` holds; `follow` runs while the server does and may change that."""
    decode = msgspec.msgpack.Decoder(CandidatesQuery).decode
    encode = msgspec.msgpack.Encoder().encode
    held = editions.held
    following: list[asyncio.Future[None]] = []

    async def candidates(request: Request) -> Reply:
        if request.content_type not in ("", MSGPACK):
            raise RefusalError.of(415, "media-type", "Unknown media type", f"{request.content_type} is not {MSGPACK}")
        try:
            query = decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusalError.of_decoding(error) from error
        retriever = held.get((query.bundle, query.delta))
        if retriever is None:
            raise RefusalError.of(
                409,
                "other-edition",
                "This edition is not held here",
                f"the query is of {query.bundle[:SHORT]!r}+{query.delta}, "
                f"held are {', '.join(editions.names) or 'none'}",
                field="$.bundle",
                remedy="start gateway and retrieval of a site with the same editions file, or the same bundle",
            )
        try:
            return Reply(encode(retriever.candidates(query)), MSGPACK)
        except QueryFault as fault:
            raise RefusalError.of(
                422, "invalid-field", "A field breaks its rule", str(fault), field=fault.field, rule=fault.rule
            ) from fault

    async def start() -> None:
        if follow is not None:
            following.append(asyncio.ensure_future(follow()))

    async def stop() -> None:
        for task in following:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    return Service(
        routes={("POST", PATH_CANDIDATES): candidates},
        metrics=metrics,
        missing=editions.missing,
        detail=lambda: {"revision": editions.revision, "editions": editions.names, "faults": editions.faults},
        start=start,
        stop=stop,
        body_max_bytes=BODY_MAX_BYTES,
    )
