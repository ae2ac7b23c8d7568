"""From the body of a request to rows: which events are sound, and why the others are not.

An event that breaks the contract does not cost its neighbours their acknowledgement: sound ones become
rows, each of the others a dead letter with its reason. Events of an older schema version are upgraded here,
those of a newer one wait as dead letters for a newer intake. Home's intake takes pseudonyms only; a raw id of a
person is refused and is not written down, in a dead letter neither: of a rejected event only what has the form that
the contract gives it is kept as it is. Knows no store and no server.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Final

import msgspec

from workloads.contract.events import (
    ANSWER_PATTERN,
    EVENTS_PER_BATCH,
    QUERY_MAX,
    REQUEST_ID_IN_CONTEXT,
    SCHEMA_VERSION,
    UUID7_PATTERN,
    Event,
    EventType,
)
from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN

DEAD_LETTER_MAX_BYTES: Final = 16 * 1024
"""What is kept of a rejected payload."""

Row = tuple[str | int | float | None, ...]
"""One event in the order of `store.COLUMNS`."""

_PSEUDONYM = re.compile(PSEUDONYM_PATTERN)
_SESSION = re.compile(SESSION_PATTERN)
_UUID7 = re.compile(UUID7_PATTERN)
_ANSWER = re.compile(ANSWER_PATTERN)
_NAME = re.compile(r"[a-z][a-z_]{0,31}")
"""A field's name as the contract's are; another may be an id that a sender took for a key."""
_HALF_A_TOKEN = re.compile(rb"[0-9a-z_-]{0,40}\Z")
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
        at = f"$.events[{place}]"
        try:
            event = one.decode(raw)
        except (msgspec.DecodeError, *_UNREADABLE) as error:
            dead.append(_dead_event(bytes(raw), error, at, msgpack=msgpack))
            continue
        if event.user is not None and _PSEUDONYM.fullmatch(event.user) is None:
            value = _generic(bytes(raw), msgpack=msgpack)
            dead.append(DeadLetter(f"Expected {_RULE_USER}", f"{at}.user", _payload(value, len(raw))))
            continue
        rows.append(_row(upgraded(event)))
    return Batch(rows, dead)


def _name_the_answer(event: Event) -> Event:
    """1 to 2: the answer's id moves from the context into the field. What is no id of an answer stays where it is."""
    named = event.context.get(REQUEST_ID_IN_CONTEXT)
    if named is None or event.request_id is not None or _ANSWER.fullmatch(named) is None:
        return event
    if named in (event.user, event.session):
        return event
    rest = {name: value for name, value in event.context.items() if name != REQUEST_ID_IN_CONTEXT}
    return msgspec.structs.replace(event, request_id=named, context=rest)


_UPGRADES: Final[Mapping[int, Callable[[Event], Event]]] = {1: _name_the_answer}
"""By the version that they take: the step to the next one."""


def upgraded(event: Event) -> Event:
    """The event in the form of `SCHEMA_VERSION`."""
    for version in range(event.schema_version, SCHEMA_VERSION):
        event = _UPGRADES[version](event)
    if event.schema_version == SCHEMA_VERSION:
        return event
    return msgspec.structs.replace(event, schema_version=SCHEMA_VERSION)


def _dead_event(raw: bytes, error: Exception, at: str, *, msgpack: bool) -> DeadLetter:
    value = _generic(raw, msgpack=msgpack)
    version = value.get("schema_version") if isinstance(value, dict) else None
    payload = _payload(value, len(raw))
    if isinstance(version, int) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        # Whatever else is strange about it comes of that: a newer form has fields and rules that are not known here.
        reason = f"Schema version {version} is newer than {SCHEMA_VERSION}, the newest that this intake takes"
        return DeadLetter(reason, f"{at}.schema_version", payload)
    rule, _, path = str(error).rpartition(" - at `$")
    return DeadLetter(_without_values(rule or str(error)), f"{at}{path.rstrip('`')}" if rule else at, payload)


def _without_values(reason: str) -> str:
    """A decoder's reason as it may be kept: it quotes what it met, and that may be an id of a person."""
    reason = re.sub(
        r"unknown field `(.*)`",
        lambda said: said[0] if _NAME.fullmatch(said[1]) else "unknown field",
        reason,
        flags=re.DOTALL,
    )
    return re.sub(r"(Invalid enum value) '.*'", r"\1", reason, flags=re.DOTALL)


def dead_body(body: bytes, error: msgspec.DecodeError) -> DeadLetter:
    """A whole body that could not be read. Its bytes may name people, so only its size and start are told."""
    return DeadLetter(_without_values(str(error)), None, f"{len(body)} bytes".encode())


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
        event.request_id,
        event.schema_version,
    )


_UNKNOWN: Final = object()


def _generic(raw: bytes, *, msgpack: bool) -> object:
    """The value that a rejected event is, or `_UNKNOWN`."""
    try:
        return msgspec.msgpack.decode(raw) if msgpack else msgspec.json.decode(raw)
    except (msgspec.DecodeError, TypeError, ValueError, RecursionError):
        return _UNKNOWN


def _payload(value: object, size: int) -> bytes:
    """A rejected event as JSON with what may be kept of it, cut to DEAD_LETTER_MAX_BYTES."""
    if value is _UNKNOWN:
        return f"{size} bytes that do not parse".encode()
    try:
        text = _encode_json(_harmless(value))
    except (TypeError, ValueError, RecursionError):
        return f"{size} bytes that cannot be written as JSON".encode()
    if len(text) <= DEAD_LETTER_MAX_BYTES:
        return text
    # A pseudonym cut in half could not be found again by an erasure.
    return _HALF_A_TOKEN.sub(b"", text[:DEAD_LETTER_MAX_BYTES])


def _harmless(value: object) -> object:
    if not isinstance(value, dict):
        return _removed(value)
    return {
        name if isinstance(name, str) and _NAME.fullmatch(name) else "[name removed]": _field(name, inner)
        for name, inner in value.items()
    }


def _field(name: object, value: object) -> object:
    """A field's value where the contract says what it is and that it names nobody; else what kind of value it was."""
    if value is None or (isinstance(name, str) and name in _KEPT and _KEPT[name](value)):
        return value
    if name == "context" and isinstance(value, dict):
        return {
            key if isinstance(key, str) and _NAME.fullmatch(key) else "[name removed]": inner
            if _is_keyed(inner)
            else _removed(inner)
            for key, inner in value.items()
        }
    return _removed(value)


def _removed(value: object) -> str:
    size = f" of {len(value)}" if isinstance(value, str | bytes | list | dict) else ""
    return f"[{type(value).__name__}{size} removed]"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _is_keyed(value: object) -> bool:
    return isinstance(value, str) and bool(_PSEUDONYM.fullmatch(value) or _SESSION.fullmatch(value))


_KEPT: Final[Mapping[str, Callable[[object], bool]]] = {
    "event_id": lambda value: isinstance(value, str) and _UUID7.fullmatch(value) is not None,
    "type": lambda value: isinstance(value, str) and value in set(EventType),
    "timestamp_ms": _is_number,
    "user": _is_keyed,
    "session": _is_keyed,
    "item": lambda value: isinstance(value, str) and len(value) <= 128,
    "query": lambda value: isinstance(value, str) and len(value) <= QUERY_MAX,
    "position": _is_number,
    "quantity": _is_number,
    "price": _is_number,
    "rating": _is_number,
    "request_id": lambda value: isinstance(value, str) and _ANSWER.fullmatch(value) is not None,
    "schema_version": _is_number,
}
"""Fields whose values are kept, and when; `user` and `session` only under the names that keys gave them."""
