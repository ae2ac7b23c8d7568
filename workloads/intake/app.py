"""The intake service: events in, acknowledgement out once they are on disk.

`POST /internal/events` takes an EventsRequest as JSON or MessagePack and answers an EventsAnswer in
kind. Sending an event twice is safe: its id is counted as a duplicate. Nothing is acknowledged that is
not on disk, whatever fails; under pressure callers get 429 before anything does. `POST /internal/erasures` and
`POST /internal/spool/trim` remove rows and are answered when that is on disk, under pressure too. Knows the
writer's door and nothing of SQL.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

import msgspec
from prometheus_client import Counter, Gauge

from workloads.contract.http import (
    BODY_MAX_BYTES,
    PATH_ERASE,
    PATH_INTAKE,
    PATH_TRIM,
    PSEUDONYM_PATTERN,
    ErasureAnswer,
    ErasureRequest,
    EventsAnswer,
    TrimAnswer,
    TrimRequest,
)
from workloads.intake import records
from workloads.intake.store import Appended, StorageFullError, StoreError
from workloads.intake.writer import BusyError, StoppingError, Writer
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import JSON, MSGPACK, RefusalError, Reply, Request, Service

INTAKE_BODY_MAX_BYTES: Final = 8 * BODY_MAX_BYTES
"""The gateway's limit, with room for what it adds: a context whose every value is an id of one letter grows fivefold
by its pseudonyms, and what the gateway took must not be refused here for good."""

_T = TypeVar("_T")
_MSGPACK_TYPES = frozenset({MSGPACK, "application/x-msgpack", "application/vnd.msgpack"})
_PSEUDONYM: Final = re.compile(PSEUDONYM_PATTERN + r"(?!\n)")
_UNREADABLE: Final = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_encode_json = msgspec.json.Encoder().encode
_encode_msgpack = msgspec.msgpack.Encoder().encode


def create_app(writer: Writer, metrics: StageMetrics) -> Service:
    """The ASGI application around a writer that it starts and stops."""
    events = Counter("rankbridge_events", "Events by what became of them", ("outcome",), registry=metrics.registry)
    outcomes = [events.labels(name) for name in Appended._fields]
    queued = Gauge("rankbridge_events_queued", "Events that wait for the disk", registry=metrics.registry)
    queued.set_function(lambda: writer.queued_events)

    async def take(request: Request) -> Reply:
        msgpack = _is_msgpack(request)
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
        return _reply(answer, msgpack=msgpack)

    async def erase(request: Request) -> Reply:
        msgpack = _is_msgpack(request)
        asked = _decoded(request, ErasureRequest, msgpack=msgpack)
        for place, name in enumerate(asked.pseudonyms):
            if _PSEUDONYM.fullmatch(name) is None:  # not repeated: it may be a raw id
                rule = "a pseudonym, p<key epoch>-<32 hex>"
                raise RefusalError.of(
                    422, "invalid-field", "A field breaks its rule", rule, field=f"$.pseudonyms[{place}]", rule=rule
                )
        with _faults():
            erased = await writer.erase(frozenset(asked.pseudonyms))
        return _reply(ErasureAnswer(events=erased.events, dead_letters=erased.dead_letters), msgpack=msgpack)

    async def trim(request: Request) -> Reply:
        msgpack = _is_msgpack(request)
        asked = _decoded(request, TrimRequest, msgpack=msgpack)
        with _faults():
            done = await writer.trim(asked.up_to_seq, asked.received_before_ms)
        answer = TrimAnswer(events=done.events, trimmed_seq=done.trimmed_seq, last_seq=done.last_seq)
        return _reply(answer, msgpack=msgpack)

    def missing() -> Mapping[str, str]:
        try:
            pressure = writer.pressure()
        except StoreError as error:
            pressure = {"disk": str(error)}
        return pressure if writer.fault is None else {"store": writer.fault, **pressure}

    return Service(
        routes={("POST", PATH_INTAKE): take, ("POST", PATH_ERASE): erase, ("POST", PATH_TRIM): trim},
        metrics=metrics,
        missing=missing,
        start=writer.start,
        stop=writer.stop,
        body_max_bytes=INTAKE_BODY_MAX_BYTES,
    )


def _is_msgpack(request: Request) -> bool:
    """Whether the body is MessagePack and not JSON. Raises RefusalError for anything else."""
    if request.content_type in _MSGPACK_TYPES:
        return True
    if request.content_type not in ("", JSON):
        raise RefusalError.of(
            415, "media-type", "Unknown media type", f"{request.content_type} is neither {JSON} nor {MSGPACK}"
        )
    return False


def _decoded(request: Request, form: type[_T], *, msgpack: bool) -> _T:
    try:
        decode = msgspec.msgpack.decode if msgpack else msgspec.json.decode
        return decode(request.body, type=form)
    except _UNREADABLE as error:
        raise RefusalError.of_decoding(error) from error


def _reply(answer: msgspec.Struct, *, msgpack: bool) -> Reply:
    return Reply(_encode_msgpack(answer), MSGPACK) if msgpack else Reply(_encode_json(answer), JSON)


async def _append(writer: Writer, batch: records.Batch) -> Appended:
    """`writer.append`, with its faults as refusals."""
    with _faults():
        return await writer.append(batch)


@contextlib.contextmanager
def _faults() -> Iterator[None]:
    """The writer's faults as refusals."""
    try:
        yield
    except BusyError as error:
        raise RefusalError.of(
            429,
            "intake-busy",
            "No event is taken now",
            str(error),
            remedy="nothing of this request was stored, send it again later",
            retry_after_s=error.retry_after_s,
        ) from error
    except StoppingError as error:
        raise RefusalError.of(
            503, "stopping", "The intake stops", str(error), remedy="send it again", retry_after_s=1
        ) from error
    except StorageFullError as error:
        raise RefusalError.of(
            507,
            "storage-full",
            "No room for events",
            str(error),
            remedy="free disk space; nothing of this request is known to be done, send it again",
            retry_after_s=30,
        ) from error
    except StoreError as error:
        raise RefusalError.of(
            503,
            "store-failed",
            "Events cannot be stored",
            str(error),
            remedy="nothing of this request is known to be done, send it again",
            retry_after_s=5,
        ) from error
