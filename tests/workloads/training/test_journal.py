"""Frames become arrays in one place; nothing later knows an id or a column."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from workloads.contract.events import EventType
from workloads.contract.tensors import PAD
from workloads.data.cleaning import ITEM_SCHEMA
from workloads.data.events import SCHEMA
from workloads.data.features import EVENT_TYPES
from workloads.training.journal import VISIT_GAP_MS, Catalogue, Journal

START = 1_800_000_000_000
CODE = {kind: code for code, kind in enumerate(EVENT_TYPES)}


def frame(*rows: dict[str, object]) -> pl.DataFrame:
    base = {"event_id": "", "type": "view", "timestamp_ms": START, "user": "u1", "item": "a", "session": "s1"}
    columns = {name: [(base | row).get(name) for row in rows] for name in SCHEMA}
    return pl.DataFrame({name: pl.Series(values, dtype=SCHEMA[name], strict=False) for name, values in columns.items()})


def journal(*rows: dict[str, object]) -> Journal:
    return Journal.of(frame(*rows), ["a", "b", "c"])


def test_items_are_numbered_by_their_row_from_one_and_unknown_ones_are_left_out():
    made = journal(
        {"item": "c"}, {"item": "a"}, {"item": "not in the catalogue"}, {"type": "search", "item": None, "query": "q"}
    )
    assert made.item.tolist() == [3, 1]
    assert len(made) == 2


def test_nobody_known_is_no_person_but_a_sequence_of_their_own():
    made = journal({"user": None, "session": "s1"}, {"user": None, "session": "s2"}, {"user": "u1"})
    assert made.person.tolist() == [-1, -1, 0]
    assert len(set(made.sequences().tolist())) == 3
    assert made.sequences()[2] == 0


def test_events_without_a_session_are_one_visit_until_a_long_gap():
    made = journal(
        {"session": None, "timestamp_ms": START},
        {"session": None, "timestamp_ms": START + VISIT_GAP_MS},
        {"session": None, "timestamp_ms": START + 2 * VISIT_GAP_MS + 1},
        {"session": None, "user": "u2", "timestamp_ms": START + 2 * VISIT_GAP_MS + 1},
        {"session": "s1", "timestamp_ms": START + 2 * VISIT_GAP_MS + 2},
    )
    assert made.visit[0] == made.visit[1]
    assert len(set(made.visit[1:].tolist())) == 4


def test_two_sessionless_events_of_nobody_are_two_visits():
    made = journal({"user": None, "session": None}, {"user": None, "session": None})
    assert made.visit[0] != made.visit[1]


def test_before_a_moment_is_strictly_before_it():
    made = journal({"timestamp_ms": START}, {"timestamp_ms": START + 1}, {"timestamp_ms": START + 2})
    assert made.before(START + 1).time_ms.tolist() == [START]
    assert made.between(START + 1, START + 2).time_ms.tolist() == [START + 1]


def test_what_is_wanted_is_neither_an_impression_nor_a_rating_nor_of_nobody():
    made = journal(
        *({"type": kind.value, "rating": 3.0, "query": "q"} for kind in EventType), {"type": "view", "user": None}
    )
    assert {EVENT_TYPES[code] for code in made.wanted().kind} == {
        EventType.CLICK,
        EventType.VIEW,
        EventType.CART,
        EventType.PURCHASE,
    }
    assert CODE[EventType.RATING] in made.positives().kind


def catalogue(**columns: list[object]) -> Catalogue:
    base: dict[str, list[object]] = {
        "item": ["a", "b", "c"],
        "title": ["Red mug", "Blue mug", ""],
        "description": ["", "", ""],
        "category": ["mugs", "", "cups"],
        "price": [2.0, None, 4.0],
        "image": [[1.0] * 16, [], []],
        "first_seen_ms": [1, 2, 3],
        "in_stock": [True, True, False],
    }
    return Catalogue.of(pl.DataFrame(base | columns, schema=ITEM_SCHEMA))


def test_row_zero_of_every_table_is_padding():
    made = catalogue()
    assert made.items == 3
    for table in (
        made.category,
        made.price,
        made.price_band,
        made.tokens,
        made.image,
        made.first_seen_ms,
        made.in_stock,
    ):
        assert len(table) == 4
        assert not np.any(table[PAD])


def test_what_a_catalogue_does_not_know_is_zero():
    made = catalogue()
    assert made.categories == ["cups", "mugs"]
    assert made.category.tolist() == [0, 2, 0, 1]
    assert made.price.tolist() == [0, 2, 0, 4]
    assert made.price_band[2] == 0
    assert made.image[1].tolist() == [1.0] * 16
    assert not made.image[2].any()
    assert not made.tokens[3, 1:].all(), "a category's words remain where there is no title"


@pytest.mark.parametrize("prices", [[None, None, None], [3.0, 3.0, 3.0]])
def test_a_catalogue_without_prices_or_with_one_has_bands_all_the_same(prices: list[object]):
    made = catalogue(price=prices)
    assert made.price_edges
    assert len(made.price_band) == 4
