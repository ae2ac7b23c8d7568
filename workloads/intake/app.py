"""The intake service: events in, acknowledgement out once they are on disk.

`POST /internal/events` takes an EventsRequest as JSON or MessagePack and answers an EventsAnswer in
kind. Sending an event twice is safe: its id is counted as a duplicate. Nothing is acknowledged that is
not on disk, whatever fails. Knows the writer's door and nothing of SQL.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import msgspec
from prometheus_client import Counter, Gauge

from workloads.contract.http import BODY_MAX_BYTES, PATH_INTAKE, EventsAnswer
from workloads.intake import records
from workloads.intake.store import Appended, StorageFullError, StoreError
from workloads.intake.writer import BusyError, Writer
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import JSON, MSGPACK, RefusalError, Reply, Request, Service

INTAKE_BODY_MAX_BYTES: Final = 8 * BODY_MAX_BYTES
"""The gateway's limit, with room for what it adds: a context whose every value is an id of one letter grows fivefold
by its pseudonyms, and what the gateway took must not be refused here for good."""

_MSGPACK_TYPES = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})
_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode


def create_app(writer: Writer, metrics: StageMetrics) -> Service:
    """The ASGI application around a writer that it starts and stops."""
    events = Counter("rankbridge_events", "Events by what became of them", ("outcome",), registry=metrics.registry)
    outcomes = [events.labels(name) for name in Appended._fields]
    queued = Gauge("rankbridge_events_queued", "Events that wait for the disk", registry=metrics.registry)
    queued.set_function(lambda: writer.queued_events)

    async def take(request: Request) -> Reply:
        msgpack = request.content_type in _MSGPACK_TYPES
        if not msgpack and request.content_type not in ("", JSON):
            raise RefusalError.of(
                415, "media-type", "Unknown media type", f"{request.content_type} is neither {JSON} nor {MSGPACK}"
            )
        try:
            batch = records.read(request.body, msgpack=msgpack)
        except msgspec.DecodeError as error:
            await _append(writer, records.Batch([], [records.dead_body(request.body, error)]))
            outcomes[2].inc()
            raise RefusalError.of_decoding(error) from error
        appended = await _append(writer, batch)
        for outcome, number in zip(outcomes, appended, strict=True):
            outcome.inc(number)
        if not batch.rows:
            first = batch.dead[0]
            raise RefusalError.of(
                422, "invalid-field", "A field breaks its rule", first.reason, field=first.field, rule=first.reason
            )
        answer = EventsAnswer(accepted=appended.accepted, duplicates=appended.duplicates, rejected=appended.rejected)
        return Reply(_encode_msgpack(answer), MSGPACK) if msgpack else Reply(_encode_json(answer), JSON)

    def missing() -> Mapping[str, str]:
        return {} if writer.fault is None else {"store": writer.fault}

    return Service(
        routes={("POST", PATH_INTAKE): take},
        metrics=metrics,
        missing=missing,
        start=writer.start,
        stop=writer.stop,
        body_max_bytes=INTAKE_BODY_MAX_BYTES,
    )


async def _append(writer: Writer, batch: records.Batch) -> Appended:
    """`writer.append`, with its faults as refusals."""
    try:
        return await writer.append(batch)
    except BusyError as error:
        raise RefusalError.of(
            503, "intake-busy", "Too many events wait", str(error), remedy="send them again", retry_after_s=1
        ) from error
    except StorageFullError as error:
        raise RefusalError.of(
            507,
            "storage-full",
            "No room for events",
            str(error),
            remedy="free disk space; nothing of this request was stored, send it again",
            retry_after_s=30,
        ) from error
    except StoreError as error:
        raise RefusalError.of(
            503,
            "store-failed",
            "Events cannot be stored",
            str(error),
            remedy="nothing of this request was stored, send it again",
            retry_after_s=5,
        ) from error
