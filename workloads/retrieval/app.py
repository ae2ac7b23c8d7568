"""The retrieval service: `POST /internal/candidates`, MessagePack in and out.

A query names the bundle it was made for; one of another bundle is refused (409), because item indices of
two bundles mean different items. Requests are answered one after the other on the event loop: each is
about a millisecond of arithmetic, and a thread for it measured worse at every load (the interpreter lock is
handed over late to the one who has an answer to send). Knows HTTP and the retriever's door.
"""

from __future__ import annotations

from typing import Protocol

import msgspec

from workloads.bundle.manifest import SHORT
from workloads.contract.http import BODY_MAX_BYTES, PATH_CANDIDATES, CandidatesAnswer, CandidatesQuery
from workloads.retrieval.retriever import QueryFault
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import MSGPACK, RefusalError, Reply, Request, Service


class Candidates(Protocol):
    """Answers queries of one bundle."""

    bundle_id: str

    def candidates(self, query: CandidatesQuery) -> CandidatesAnswer:
        """The answer. Raises QueryFault."""
        ...


def create_app(retriever: Candidates, metrics: StageMetrics) -> Service:
    """The ASGI application over one opened bundle."""
    decode = msgspec.msgpack.Decoder(CandidatesQuery).decode
    encode = msgspec.msgpack.Encoder().encode
    bundle_id = retriever.bundle_id

    async def candidates(request: Request) -> Reply:
        if request.content_type not in ("", MSGPACK):
            raise RefusalError.of(415, "media-type", "Unknown media type", f"{request.content_type} is not {MSGPACK}")
        try:
            query = decode(request.body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RefusalError.of_decoding(error) from error
        if query.bundle != bundle_id:
            raise RefusalError.of(
                409,
                "other-bundle",
                "Another bundle is served here",
                f"the query is of bundle {query.bundle[:SHORT]!r}, this retrieval serves {bundle_id[:SHORT]!r}",
                field="$.bundle",
                remedy="start gateway and retrieval of a site with the same bundle",
            )
        try:
            return Reply(encode(retriever.candidates(query)), MSGPACK)
        except QueryFault as fault:
            raise RefusalError.of(
                422, "invalid-field", "A field breaks its rule", str(fault), field=fault.field, rule=fault.rule
            ) from fault

    return Service(
        routes={("POST", PATH_CANDIDATES): candidates},
        metrics=metrics,
        missing=dict,
        body_max_bytes=BODY_MAX_BYTES,
    )
