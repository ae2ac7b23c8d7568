"""Cleaning leaves out what was sent twice, and says how much."""

from __future__ import annotations

import polars as pl
import pytest

from workloads.data.cleaning import (
    ITEM_SCHEMA,
    CatalogueError,
    check_items,
    drop_repeats,
    drop_unknown_items,
    drop_unseen_items,
)
from workloads.data.events import SCHEMA, EventLog

AT = 1_767_600_000_000


def a_log(*rows: dict[str, object]) -> EventLog:
    base = {"type": "view", "timestamp_ms": AT, "user": "ada", "item": "mug"}
    full = [
        dict.fromkeys(SCHEMA) | base | {"event_id": f"019b8b7c-b201-7000-8000-{n:012x}"} | row
        for n, row in enumerate(rows)
    ]
    return EventLog.sorted(pl.DataFrame(full, schema=dict(SCHEMA), orient="row"))


def a_catalogue(**columns: list[object]) -> pl.DataFrame:
    rows = {
        "item": ["mug", "lamp"],
        "title": ["Mug", "Lamp"],
        "description": ["", ""],
        "category": ["", ""],
        "price": [1.0, None],
        "image": [[], []],
        "first_seen_ms": [AT, AT],
        "in_stock": [True, True],
    }
    return pl.DataFrame(rows | columns, schema=ITEM_SCHEMA)


def test_what_was_sent_twice_counts_once_and_what_was_done_twice_stays():
    log = a_log({}, {}, {"timestamp_ms": AT + 1}, {"item": "lamp"}, {"session": "s"})
    kept, count = drop_repeats(log)
    assert (len(kept), count.rows, count.effect) == (4, 1, "dropped")


def test_rows_that_nothing_ties_to_anybody_are_not_taken_for_repeats():
    kept, count = drop_repeats(a_log({"user": None}, {"user": None}))
    assert (len(kept), count.rows) == (2, 0)


def test_the_first_of_repeated_events_is_the_one_that_stays():
    kept, _ = drop_repeats(a_log({}, {}))
    assert kept.frame["event_id"].to_list() == ["019b8b7c-b201-7000-8000-000000000000"]


def test_events_on_items_that_the_catalogue_lacks_go_and_searches_stay():
    log = a_log({}, {"item": "stool"}, {"type": "search", "item": None, "query": "stool"})
    kept, count = drop_unknown_items(log, a_catalogue())
    assert kept.frame["item"].to_list() == ["mug", None]
    assert count.rows == 1


def test_items_that_came_after_the_last_event_go():
    kept, count = drop_unseen_items(a_log({}), a_catalogue(first_seen_ms=[AT, AT + 1]))
    assert kept["item"].to_list() == ["mug"]
    assert count.rows == 1


def test_a_rule_that_found_nothing_still_says_so():
    log = a_log({})
    assert drop_repeats(log)[1].rows == 0
    assert drop_unknown_items(log, a_catalogue())[1].rows == 0


def test_a_catalogue_with_repeats_nulls_or_other_columns_is_refused():
    assert check_items(a_catalogue()).height == 2
    with pytest.raises(CatalogueError, match="1 rows repeat an item"):
        check_items(a_catalogue(item=["mug", "mug"]))
    with pytest.raises(CatalogueError, match="title is null in 1 rows"):
        check_items(a_catalogue(title=["Mug", None]))
    with pytest.raises(CatalogueError, match="catalogue columns"):
        check_items(a_catalogue().drop("image"))
