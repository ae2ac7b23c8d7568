"""Messages refuse what they must: the rules of `contract.http` and `contract.events`, as they are met on the wire."""

from __future__ import annotations

import re
from typing import Any, TypeVar

import msgspec
import pytest

from workloads.contract.events import Event
from workloads.contract.http import (
    HISTORY_MAX,
    K_MAX,
    PSEUDONYM_PATTERN,
    CandidatesAnswer,
    CandidatesQuery,
    EventsRequest,
    RecommendRequest,
    SearchRequest,
    SimilarRequest,
)

EVENT = {
    "event_id": "01890a5d-ac96-774b-bcce-b302099a8057",
    "type": "view",
    "timestamp_ms": 1_700_000_000_000,
    "item": "sku-1",
}


Message = TypeVar("Message")


def decode(message: type[Message], body: object) -> Message:
    return msgspec.json.decode(msgspec.json.encode(body), type=message)


def test_a_recommend_request_needs_nothing_and_asks_for_ten_items_from_the_model():
    request = decode(RecommendRequest, {})
    assert (request.user, request.history, request.k, request.repeats, request.use_model) == (None, [], 10, False, True)


@pytest.mark.parametrize(
    ("message", "body", "path"),
    [
        (RecommendRequest, {"k": 0}, "$.k"),
        (RecommendRequest, {"k": -1}, "$.k"),
        (RecommendRequest, {"k": 10**9}, "$.k"),
        (RecommendRequest, {"k": K_MAX + 1}, "$.k"),
        (RecommendRequest, {"k": "10"}, "$.k"),
        (RecommendRequest, {"k": 1.5}, "$.k"),
        (RecommendRequest, {"user": ""}, "$.user"),
        (RecommendRequest, {"user": "u" * 129}, "$.user"),
        (RecommendRequest, {"user": "a\u0000b"}, "$.user"),
        (RecommendRequest, {"user": "ends with a newline\n"}, "$.user"),
        (RecommendRequest, {"history": ["i"] * (HISTORY_MAX + 1)}, "$.history"),
        (RecommendRequest, {"history": ["i", 5]}, "$.history[1]"),
        (SearchRequest, {"query": ""}, "$.query"),
        (SearchRequest, {"query": " \t "}, "$.query"),
        (SearchRequest, {"query": "q" * 257}, "$.query"),
        (SimilarRequest, {"item": None}, "$.item"),
        (EventsRequest, {"events": []}, "$.events"),
        (EventsRequest, {"events": [EVENT] * 1001}, "$.events"),
        (EventsRequest, {"events": [EVENT, {**EVENT, "type": "stare"}]}, "$.events[1].type"),
        (EventsRequest, {"events": [{**EVENT, "event_id": EVENT["event_id"].upper()}]}, "$.events[0].event_id"),
        (EventsRequest, {"events": [{**EVENT, "event_id": EVENT["event_id"] + "\n"}]}, "$.events[0].event_id"),
        (EventsRequest, {"events": [{**EVENT, "timestamp_ms": 12}]}, "$.events[0].timestamp_ms"),
        (EventsRequest, {"events": [{**EVENT, "type": "rating"}]}, "$.events[0]"),
        (EventsRequest, {"events": [{**EVENT, "item": None}]}, "$.events[0]"),
    ],
)
def test_a_value_outside_its_rule_is_refused_with_its_path(message: type[Any], body: object, path: str):
    with pytest.raises(msgspec.ValidationError, match=re.escape(f"`{path}`")):
        decode(message, body)


@pytest.mark.parametrize("message", [RecommendRequest, SearchRequest, SimilarRequest, EventsRequest])
def test_an_unknown_field_is_refused_by_its_name(message: type[Any]):
    with pytest.raises(msgspec.ValidationError, match="unknown field `colour`"):
        decode(message, {"colour": "red"})


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_that_json_does_not_have_is_refused(number: str):
    with pytest.raises(msgspec.DecodeError):
        msgspec.json.decode(f'{{"k": {number}}}', type=RecommendRequest)


def test_a_price_that_is_not_a_number_is_refused_from_message_pack_too():
    body = msgspec.msgpack.encode({**EVENT, "price": float("nan")})
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(body, type=Event)


def test_events_and_candidates_come_back_from_message_pack_as_they_went():
    event = decode(Event, {**EVENT, "user": "p1-" + "0" * 32, "context": {"page": "home"}})
    query = CandidatesQuery(
        bundle="a" * 64,
        kind="recommend",
        history=[3],
        history_strength=[1.0],
        history_age_hours=[0.5],
        context=[0.0, 1.0, 0.0, 1.0],
        count=200,
    )
    answer = CandidatesAnswer(bundle="a" * 64, items=b"\7\0\0\0", scores=bytes(4), ann=bytes(4), source=bytes(4))
    for message in (event, query, answer):
        assert msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=type(message)) == message


def test_a_pseudonym_is_an_epoch_and_128_bits_and_nothing_else():
    assert re.fullmatch(PSEUDONYM_PATTERN, "p1-" + "0a" * 16)
    for other in ("p1-" + "0a" * 15, "p1-" + "0A" * 16, "u1-" + "0a" * 16, "p-" + "0a" * 16, " p1-" + "0a" * 16):
        assert not re.fullmatch(PSEUDONYM_PATTERN, other)
