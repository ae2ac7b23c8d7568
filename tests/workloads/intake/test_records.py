"""From bodies to rows and dead letters."""

from __future__ import annotations

import itertools
import json
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from workloads.contract.events import SCHEMA_VERSION
from workloads.intake import records
from workloads.intake.store import COLUMNS

PSEUDONYM = "p1-" + "0f" * 16
ENCODERS = {"json": msgspec.json.encode, "msgpack": msgspec.msgpack.encode}


def read_encoded(events: list[object], encoding: str) -> records.Batch:
    return records.read(ENCODERS[encoding]({"events": events}), msgpack=encoding == "msgpack")


def event(number: int = 0, **changes: object) -> dict[str, Any]:
    return {
        "event_id": f"0190a5b4-7c00-7000-8000-{number:012x}",
        "type": "click",
        "timestamp_ms": 1_700_000_000_000,
        "user": PSEUDONYM,
        "item": "mug",
        **changes,
    }


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_a_sound_event_becomes_a_row_in_the_order_of_the_columns(encoding: str):
    sent = event(context={"page": "home"}, price=2.5, position=3, type="purchase", quantity=2, session="s")
    batch = read_encoded([sent], encoding)
    assert batch.dead == []
    row = dict(zip(COLUMNS, batch.rows[0], strict=True))
    assert json.loads(str(row.pop("context"))) == {"page": "home"}
    assert row == {
        **{name: None for name in COLUMNS if name != "context"},
        **{name: value for name, value in sent.items() if name != "context"},
        "schema_version": SCHEMA_VERSION,
    }


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize(
    ("broken", "field", "rule", "kept"),
    [
        (event(1, item=None), "$.events[1]", "a click event names its item", event(1, item=None)),
        (
            *(event(1, timestamp_ms="now"), "$.events[1].timestamp_ms", "Expected `int`"),
            event(1, timestamp_ms="[str of 3 removed]"),
        ),
        (event(1, event_id="1"), "$.events[1].event_id", "regex", event(1, event_id="[str of 1 removed]")),
        (
            *(event(1, colour="red"), "$.events[1]", "unknown field `colour`"),
            event(1, colour="[str of 3 removed]"),
        ),
        (event(1, type="buy"), "$.events[1].type", "Invalid enum value", event(1, type="[str of 3 removed]")),
        ("not an event", "$.events[1]", "Expected `object`", "[str of 12 removed]"),
        (None, "$.events[1]", "Expected `object`", "[NoneType removed]"),
    ],
)
def test_a_broken_event_is_a_dead_letter_and_its_neighbours_are_rows(
    broken: object, field: str, rule: str, kept: object, encoding: str
):
    batch = read_encoded([event(0), broken, event(2)], encoding)
    assert [row[0] for row in batch.rows] == [event(0)["event_id"], event(2)["event_id"]]
    (letter,) = batch.dead
    assert letter.field == field
    assert rule in letter.reason
    assert json.loads(letter.payload) == kept


@pytest.mark.parametrize("user", ["17850", PSEUDONYM + "\n", "p1-" + "0F" * 16, 17850])
def test_a_raw_id_of_a_person_is_refused_and_not_written_down(user: object):
    batch = records.read(msgspec.json.encode({"events": [event(user=user)]}), msgpack=False)
    assert batch.rows == []
    (letter,) = batch.dead
    assert letter.field == "$.events[0].user"
    assert b"17850" not in letter.payload
    assert b"0F0F" not in letter.payload
    assert b"removed" in letter.payload
    assert json.loads(letter.payload)["item"] == "mug"


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_text_that_is_not_utf8_costs_its_own_event_alone(encoding: str):
    body = ENCODERS[encoding]({"events": [event(0), event(1, query="?!?!"), event(2)]}).replace(b"?!?!", b"\x80" * 4)
    batch = records.read(body, msgpack=encoding == "msgpack")
    assert len(batch.rows) == 2
    (letter,) = batch.dead
    assert (letter.field, letter.payload.count(b"do not parse")) == ("$.events[1]", 1)
    assert "utf-8" in letter.reason


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize(
    "changes",
    [
        {"type": "alice@example.com"},
        {"alice@example.com": 1},
        {"alice@example.com\n": 1},
        {"customer": "alice@example.com"},
        {"customer": {"mail": ["alice@example.com"]}},
        {"session": "alice@example.com", "item": None},
        {"context": {"alice@example.com": "alice@example.com"}, "item": None},
        {"context": "alice@example.com"},
        {"event_id": "alice@example.com"},
        {"timestamp_ms": "alice@example.com"},
        {"schema_version": "alice@example.com"},
    ],
)
def test_no_part_of_a_dead_letter_holds_what_may_be_a_raw_id(changes: dict[str, Any], encoding: str):
    batch = read_encoded([{**event(), **changes}], encoding)
    (letter,) = batch.dead
    assert b"alice" not in letter.payload
    assert "alice" not in letter.reason + str(letter.field)


@pytest.mark.parametrize("encoding", ["json", "msgpack"])
@pytest.mark.parametrize("change", [{"channel": "app"}, {"item": None}, {"type": "wish"}, {}])
def test_an_event_of_a_newer_version_is_a_dead_letter_that_says_so(change: dict[str, Any], encoding: str):
    newer = event(1, schema_version=SCHEMA_VERSION + 1, **change)
    batch = read_encoded([event(0), newer, event(2)], encoding)
    assert [row[0] for row in batch.rows] == [event(0)["event_id"], event(2)["event_id"]]
    (letter,) = batch.dead
    assert letter.field == "$.events[1].schema_version"
    assert f"version {SCHEMA_VERSION + 1} is newer than {SCHEMA_VERSION}" in letter.reason
    assert json.loads(letter.payload)["event_id"] == newer["event_id"]


@pytest.mark.parametrize(
    ("sent", "request_id", "context"),
    [
        ({"context": {"request_id": "r-1", "page": "home"}}, "r-1", {"page": "home"}),
        ({"context": {"request_id": "r-1"}, "schema_version": 1}, "r-1", None),
        ({"context": {"request_id": "no id"}}, None, {"request_id": "no id"}),
        ({"context": {"request_id": "old"}, "request_id": "new"}, "new", {"request_id": "old"}),
        ({"context": {"request_id": PSEUDONYM}}, None, {"request_id": PSEUDONYM}),
        ({}, None, None),
        # Today's version means what it says: its context is the client's own.
        ({"context": {"request_id": "r-1"}, "schema_version": 2}, None, {"request_id": "r-1"}),
        ({"request_id": "r-2", "schema_version": 2}, "r-2", None),
    ],
)
@pytest.mark.parametrize("encoding", ["json", "msgpack"])
def test_an_event_of_the_first_version_is_upgraded_and_todays_is_taken_as_it_is(
    sent: dict[str, Any], request_id: str | None, context: dict[str, str] | None, encoding: str
):
    batch = read_encoded([event(**sent)], encoding)
    row = dict(zip(COLUMNS, batch.rows[0], strict=True))
    assert row["request_id"] == request_id
    assert (json.loads(str(row["context"])) if row["context"] else None) == context
    assert row["schema_version"] == SCHEMA_VERSION


def test_a_dead_letter_that_is_cut_keeps_no_half_of_a_pseudonym():
    start = {"type": "buy", "timestamp_ms": 1}
    for padding in range(60):
        wide = {"item": "x" * 100, "query": "y" * (100 + padding)}
        context = {"".join(letters): PSEUDONYM for letters in itertools.product("abcdefgh", repeat=3)}
        (letter,) = read_encoded([{**start, **wide, "context": context}], "json").dead
        assert records.DEAD_LETTER_MAX_BYTES - 50 < len(letter.payload) <= records.DEAD_LETTER_MAX_BYTES
        assert letter.payload.count(b"p1-") == letter.payload.count(PSEUDONYM.encode())


def test_an_event_without_a_user_is_an_anonymous_one():
    assert len(records.read(msgspec.json.encode({"events": [event(user=None)]}), msgpack=False).rows) == 1


def test_a_dead_letter_is_cut_to_a_bounded_size():
    strange = {"".join(letters): "é" * 30 for letters in itertools.product("abcdefgh", repeat=4)}
    batch = records.read(msgspec.json.encode({"events": [event(**strange)]}), msgpack=False)
    assert records.DEAD_LETTER_MAX_BYTES - 50 < len(batch.dead[0].payload) <= records.DEAD_LETTER_MAX_BYTES


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'{"events":{}}', b'{"events":[]}', b'{"event":[]}', b"\xff\xfe", b'{"events":[{},]}', b"null"],
)
def test_a_body_that_is_no_list_of_events_is_refused_whole(body: bytes):
    with pytest.raises(msgspec.DecodeError):
        records.read(body, msgpack=False)


def test_more_events_than_a_batch_may_hold_are_refused():
    with pytest.raises(msgspec.ValidationError, match=r"1 to 1000 - at `\$\.events`"):
        records.read(msgspec.json.encode({"events": [event(n) for n in range(1001)]}), msgpack=False)


def test_not_a_number_is_no_price():
    batch = records.read(msgspec.msgpack.encode({"events": [event(price=float("nan"))]}), msgpack=True)
    assert batch.rows == []
    assert batch.dead[0].field == "$.events[0].price"


@given(st.binary(max_size=200), st.sampled_from(list(ENCODERS)))
@example(b"\x81\xa6\x00\x00\x00\x00\x00\x80", "msgpack")  # a field's name that is not UTF-8
@example(b'{"\x80": 1}', "json")
@example(b"\x81\xa6events" + b"\x91" * 5000, "msgpack")
def test_no_body_makes_the_reader_fail_in_another_way(body: bytes, encoding: str):
    try:
        records.read(body, msgpack=encoding == "msgpack")
    except msgspec.DecodeError as error:
        records.dead_body(body, error)


_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(st.lists(_values, min_size=1, max_size=4), st.dictionaries(st.sampled_from(COLUMNS), _values))
def test_any_event_is_a_row_or_a_dead_letter(strange: list[object], changes: dict[str, Any]):
    sent = [*strange, {**event(), **changes}]
    batch = records.read(msgspec.msgpack.encode({"events": sent}), msgpack=True)
    assert len(batch.rows) + len(batch.dead) == len(sent)
