"""From the body of a request to rows: which events are sound, and why the others are not.

An event that breaks the contract does not cost its neighbours their acknowledgement: sound ones become
rows, each of the others a dead letter with its reason. Home's intake takes pseudonyms only; a raw id of
a person is refused and is not written down, in a dead letter neither. Knows no store and no server.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, Final

import msgspec

from workloads.contract.events import EVENTS_PER_BATCH, Event
from workloads.contract.http import PSEUDONYM_PATTERN

DEAD_LETTER_MAX_BYTES: Final = 16 * 1024
"""What is kept of a rejected payload."""

Row = tuple[str | int | float | None, ...]
"""One event in the order of `store.COLUMNS`."""

_PSEUDONYM = re.compile(PSEUDONYM_PATTERN)
_RULE_USER = "a pseudonym, p<key epoch>-<32 hex>; the gateway makes it from the raw id"


@dataclasses.dataclass(frozen=True)
class DeadLetter:
    """A payload that was not taken, and why."""

    reason: str
    field: str | None
    payload: bytes


@dataclasses.dataclass(frozen=True)
class Batch:
    """What one request brought."""

    rows: list[Row]
    dead: list[DeadLetter]


class _Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`contract.http.EventsRequest` with its events still unread, so that each can be judged alone."""

    events: list[msgspec.Raw]


_json_envelope = msgspec.json.Decoder(_Envelope)
_json_event = msgspec.json.Decoder(Event)
_msgpack_envelope = msgspec.msgpack.Decoder(_Envelope)
_msgpack_event = msgspec.msgpack.Decoder(Event)
_UNREADABLE = (UnicodeDecodeError, RecursionError)
"""What msgspec's decoders raise beside their own errors: for text that is not UTF-8, and for nesting without end."""
_encode_json = msgspec.json.Encoder(enc_hook=str).encode


def read(body: bytes, *, msgpack: bool) -> Batch:
    """The rows and dead letters of a request's body.

    Raises msgspec.DecodeError when the body as a whole is not a list of 1 to 1,000 events.
    """
    envelope, one = (_msgpack_envelope, _msgpack_event) if msgpack else (_json_envelope, _json_event)
    try:
        raws = envelope.decode(body).events
    except _UNREADABLE as error:
        raise msgspec.DecodeError(f"The body cannot be read: {error}") from None
    if not 1 <= len(raws) <= EVENTS_PER_BATCH:
        raise msgspec.ValidationError(f"Expected `array` of length 1 to {EVENTS_PER_BATCH} - at `$.events`")
    rows: list[Row] = []
    dead: list[DeadLetter] = []
    for place, raw in enumerate(raws):
        try:
            event = one.decode(raw)
        except (msgspec.DecodeError, *_UNREADABLE) as error:
            rule, _, path = str(error).rpartition(" - at `$")
            field = f"$.events[{place}]{path.rstrip('`')}" if rule else f"$.events[{place}]"
            dead.append(DeadLetter(rule or str(error), field, _payload(bytes(raw), msgpack=msgpack)))
            continue
        if event.user is not None and _PSEUDONYM.fullmatch(event.user) is None:
            dead.append(
                DeadLetter(f"Expected {_RULE_USER}", f"$.events[{place}].user", _payload(bytes(raw), msgpack=msgpack))
            )
            continue
        rows.append(_row(event))
    return Batch(rows, dead)


def dead_body(body: bytes, error: msgspec.DecodeError) -> DeadLetter:
    """A whole body that could not be read. Its bytes may name people, so only its size and start are told."""
    return DeadLetter(str(error), None, f"{len(body)} bytes".encode())


def _row(event: Event) -> Row:
    return (
        event.event_id,
        event.type.value,
        event.timestamp_ms,
        event.user,
        event.item,
        event.session,
        event.query,
        event.position,
        event.quantity,
        event.price,
        event.rating,
        _encode_json(event.context).decode() if event.context else None,
        event.schema_version,
    )


def _payload(raw: bytes, *, msgpack: bool) -> bytes:
    """A rejected event as JSON without a raw user id, cut to DEAD_LETTER_MAX_BYTES."""
    try:
        value: Any = msgspec.msgpack.decode(raw) if msgpack else msgspec.json.decode(raw)
        if isinstance(value, dict) and not (
            value.get("user") is None or (isinstance(value["user"], str) and _PSEUDONYM.fullmatch(value["user"]))
        ):
            value["user"] = "[raw id removed]"
        return _encode_json(value)[:DEAD_LETTER_MAX_BYTES]
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError):
        return f"{len(raw)} bytes that do not parse".encode()
