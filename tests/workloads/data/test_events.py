"""The event log takes exactly what the contract's Event takes, and reports the rest row by row."""

from __future__ import annotations

import math
import uuid

import msgspec
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.contract.events import Event, EventType, is_uuid7
from workloads.data.events import (
    ROW,
    SAMPLES_PER_RULE,
    SCHEMA,
    EventLog,
    EventLogError,
    RowFaults,
    TooManyFaultsError,
    safe_sample,
    sift,
    uuid7_column,
)

AT = 1_767_600_000_000


def an_id(number: int = 0) -> str:
    return f"019b8b7c-b201-7000-8000-{number:012x}"


def a_row(**changes: object) -> dict[str, object]:
    row = dict.fromkeys(SCHEMA) | {
        "event_id": an_id(),
        "type": "view",
        "timestamp_ms": AT,
        "user": "ada",
        "item": "sku-1",
    }
    return row | changes


def a_frame(*rows: dict[str, object]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=dict(SCHEMA), orient="row")


def test_a_log_of_valid_rows_is_made_and_gives_the_same_events_back():
    events = [
        Event(event_id=an_id(1), type=EventType.SEARCH, timestamp_ms=AT, user="ada", query="mug"),
        Event(event_id=an_id(2), type=EventType.CLICK, timestamp_ms=AT + 5, user="ada", item="sku-1", position=3),
        Event(event_id=an_id(3), type=EventType.RATING, timestamp_ms=AT + 9, item="sku-1", rating=4.0),
    ]
    log = EventLog.from_events(reversed(events))
    assert list(log.events()) == events
    assert log.counts()["click"] == 1
    assert log.counts()["cart"] == 0
    assert len(log) == 3


def test_an_empty_log_is_a_log():
    assert len(EventLog(a_frame())) == 0


def test_a_change_to_the_frame_handed_out_does_not_reach_the_log():
    log = EventLog(a_frame(a_row()))
    handed_out = log.frame
    handed_out.insert_column(0, pl.Series("stowaway", [1]))
    handed_out[0, "item"] = "sku-2"
    assert log.frame.columns == list(SCHEMA)
    assert log.frame["item"].to_list() == ["sku-1"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"event_id": "17"}, "event_id must match"),
        ({"event_id": an_id() + "\n"}, "event_id must"),
        ({"event_id": None}, "event_id is required"),
        ({"timestamp_ms": 1_000}, "timestamp_ms must be"),
        ({"user": ""}, "user must"),
        ({"user": "a\x00b"}, "user must match"),
        ({"user": "ada\n"}, "user must match"),
        ({"item": "x" * 129}, "item must"),
        ({"item": None}, "item an event that is no search names its item"),
        ({"type": "search"}, "query a search event carries the query"),
        ({"type": "rating"}, "rating a rating event carries its value"),
        ({"rating": 5.5}, "rating must be 0 to 5"),
        ({"price": math.nan}, "price must be a number, not NaN"),
        ({"price": -0.01}, "price must be 0 to"),
        ({"quantity": 0}, "quantity must be 1 to"),
        ({"position": -1}, "position must be 0 to"),
        ({"query": "q" * 257}, "query must have"),
    ],
)
def test_a_row_that_breaks_a_rule_names_field_rule_and_count(changes: dict[str, object], said: str):
    with pytest.raises(EventLogError) as caught:
        EventLog(a_frame(a_row(**changes)))
    assert said in str(caught.value)
    assert "(1 rows)" in str(caught.value)


def test_two_rows_with_one_id_are_refused():
    with pytest.raises(EventLogError, match="event_id must be unique"):
        EventLog(a_frame(a_row(), a_row(timestamp_ms=AT + 1)))


def test_rows_out_of_order_are_refused_and_sorted_takes_them():
    frame = a_frame(a_row(timestamp_ms=AT + 1), a_row(event_id=an_id(2)))
    with pytest.raises(EventLogError, match="order of timestamp_ms"):
        EventLog(frame)
    assert EventLog.sorted(frame).frame["timestamp_ms"].to_list() == [AT, AT + 1]


def test_missing_unknown_and_mistyped_columns_are_all_named_at_once():
    frame = a_frame(a_row()).drop("price").with_columns(pl.lit(1).alias("colour"), pl.col("position").cast(pl.Int64))
    with pytest.raises(EventLogError) as caught:
        EventLog(frame)
    for said in ("missing columns: price", "unknown columns: colour", "position is Int64, not Int32"):
        assert said in str(caught.value)


def test_between_is_half_open():
    log = EventLog(a_frame(a_row(), a_row(event_id=an_id(2), timestamp_ms=AT + 10)))
    assert len(log.between(AT, AT + 10)) == 1
    assert len(log.between(AT, AT + 11)) == 2


# Values at and around every rule, so that columns and records are compared where they could part.
IDS = st.one_of(
    st.none(),
    st.sampled_from(["", "ada", "x" * 128, "x" * 129, "a\tb", "b\x7f", "ada\n", "é漢字", " ", "\x85"]),
    st.text(max_size=6),
)
ROWS = st.fixed_dictionaries(
    {
        "event_id": st.one_of(
            st.none(),
            st.sampled_from(["", an_id(), an_id() + "\n", an_id().upper(), str(uuid.UUID(int=5, version=4))]),
        ),
        "type": st.sampled_from([kind.value for kind in EventType]),
        "timestamp_ms": st.sampled_from([None, 0, 946_684_799_999, 946_684_800_000, AT, 4_102_444_800_001]),
        "user": IDS,
        "item": IDS,
        "session": IDS,
        "query": st.one_of(st.none(), st.sampled_from(["", "q", "q" * 256, "q" * 257, "mug\x00"])),
        "position": st.sampled_from([None, -1, 0, 10_000, 10_001]),
        "quantity": st.sampled_from([None, 0, 1, 1_000_000, 1_000_001]),
        "price": st.sampled_from([None, -1.0, 0.0, 1e9, 1.1e9, math.nan, math.inf]),
        "rating": st.sampled_from([None, -0.1, 0.0, 5.0, 5.1, math.nan]),
    }
)


def contract_takes(row: dict[str, object]) -> bool:
    given_fields = {name: value for name, value in row.items() if value is not None}
    try:
        msgspec.convert(given_fields, Event)
    except (msgspec.ValidationError, ValueError):
        return False
    return True


@settings(max_examples=400, deadline=None)
@given(ROWS)
def test_columns_and_contract_records_agree_on_every_row(row: dict[str, object]):
    frame = a_frame(row).with_columns(pl.lit(1, dtype=pl.Int64).alias(ROW))
    assert (sift(frame, RowFaults()).height == 1) == contract_takes(row)


def test_sift_keeps_good_rows_and_reports_each_bad_field_of_the_others():
    rows = [a_row(event_id=an_id(n)) for n in range(4)]
    rows[1] |= {"price": -1.0, "rating": 9.0}
    rows[3] |= {"event_id": an_id(0)}
    faults = RowFaults(rows_read=4)
    good = sift(a_frame(*rows).with_columns(pl.Series(ROW, [2, 3, 4, 5])), faults)
    assert good[ROW].to_list() == [2, 4]
    assert faults.bad_rows == 2
    assert {(f.row, f.field, f.value) for f in faults.samples} == {
        (3, "price", "-1.0"),
        (3, "rating", "9.0"),
        (5, "event_id", an_id(0)),
    }


def test_a_report_keeps_the_first_faults_of_a_rule_and_counts_them_all():
    faults = RowFaults(rows_read=5_000)
    for start in (0, 2_000):
        faults.add("price", "must be a number", range(start, start + 2_000), ["?"] * 2_000, count=2_000)
    assert len(faults.samples) == SAMPLES_PER_RULE
    assert faults.totals()[0].rows == 4_000


def test_the_threshold_stops_with_counts_and_lets_the_exact_share_pass():
    faults = RowFaults(rows_read=100, bad_rows=5)
    faults.add("price", "must be a number", [7], ["cheap"], count=5)
    faults.stop_above(0.05)
    faults.bad_rows = 6
    with pytest.raises(
        TooManyFaultsError, match=r"6 of 100 rows are bad \(6.0%\), more than the allowed 5.0%: 5 x price"
    ):
        faults.stop_above(0.05)


def test_a_sample_is_cut_and_carries_no_control_character_and_no_person():
    assert safe_sample("item", "a\x1b[31mb\n") == "a\\u001b[31mb\\u000a"
    assert len(safe_sample("item", "x" * 500)) == 61
    assert "ada" not in safe_sample("user", "ada@example.com")
    assert "ada" not in safe_sample("session", "ada-2026-01-05")
    assert "ada" not in safe_sample("query", "ada lovelace, 12 St James's Square")
    assert safe_sample("item", None) == ""


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(946_684_800_000, 4_102_444_800_000), min_size=1, max_size=20), st.integers(0, 2**32))
def test_made_ids_are_uuid7_of_their_moment(times: list[int], seed: int):
    random = np.random.default_rng(seed).integers(0, 256, size=(len(times), 10), dtype=np.uint8)
    for text, at in zip(uuid7_column(np.array(times), random).to_list(), times, strict=True):
        assert is_uuid7(text)
        assert uuid.UUID(text).int >> 80 == at
