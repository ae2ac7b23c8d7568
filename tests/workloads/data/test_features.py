"""Features: the same offline and online, blind to the future, each number by hand."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.contract.events import EventType
from workloads.contract.http import SOURCES
from workloads.contract.tensors import (
    CONTEXT,
    HISTORY_LENGTH,
    ITEM_TOWER,
    PAD,
    RANKER_DENSE,
    RANKER_SPARSE,
    STRENGTH,
    USER_TOWER,
    FeatureSchema,
)
from workloads.data.events import SCHEMA, EventLog, uuid7_column
from workloads.data.features import (
    DAY_MS,
    DAYS_NEVER,
    EVENT_TYPES,
    HOUR_MS,
    ItemTables,
    UserState,
    context_of,
    item_inputs,
    price_bands,
    rank_features,
    raw_features,
    touch_strength,
    user_inputs,
)
from workloads.data.fusion import Candidates, touch_weights
from workloads.data.profile_builder import build_profiles
from workloads.data.profiles import TOUCHES_MAX, Touch

NOW = 1_800_000_000_000
ITEMS = 12
CODE = {kind: code for code, kind in enumerate(EVENT_TYPES)}
INDEX = {f"item-{at:02d}": at for at in range(1, ITEMS + 1)}


def tables(**changes: np.ndarray) -> ItemTables:
    random = np.random.default_rng(0)
    arrays = {
        "vectors": random.normal(size=(ITEMS + 1, 64)).astype(np.float32),
        "category": np.array([0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4], dtype=np.int32),
        "price": np.arange(ITEMS + 1, dtype=np.float32),
        "price_band": np.arange(ITEMS + 1, dtype=np.int32) % 5,
        "popularity": np.full(ITEMS + 1, 1 / ITEMS, dtype=np.float32),
        "popularity_recent": np.full(ITEMS + 1, 1 / ITEMS, dtype=np.float32),
        "popularity_category": np.full(ITEMS + 1, 0.25, dtype=np.float32),
        "first_seen_ms": np.full(ITEMS + 1, NOW - 10 * DAY_MS, dtype=np.int64),
        "in_stock": np.ones(ITEMS + 1, dtype=np.uint8),
        "neighbours": np.zeros((ITEMS + 1, 50), dtype=np.int32),
        "neighbour_scores": np.zeros((ITEMS + 1, 50), dtype=np.float32),
    }
    return ItemTables.of(arrays | changes)


def candidates(*items: int) -> Candidates:
    count = len(items)
    return Candidates(
        items=np.array(items, dtype=np.int32),
        scores=np.linspace(1, 0, count).astype(np.float32),
        ann=np.linspace(2, 1, count).astype(np.float32),
        source=np.zeros(count, dtype=np.int32),
    )


def events(*rows: tuple[int, EventType, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of (item, type, hours before NOW; negative is the future), oldest first."""
    ordered = sorted(rows, key=lambda row: -row[2])
    return (
        np.array([row[0] for row in ordered], dtype=np.int64),
        np.array([CODE[row[1]] for row in ordered], dtype=np.int64),
        np.array([NOW - row[2] * HOUR_MS for row in ordered], dtype=np.int64),
    )


def column(dense: np.ndarray, name: str) -> list[float]:
    return dense[:, RANKER_DENSE.index(name)].tolist()


def assert_same(left: UserState, right: UserState) -> None:
    for field in dataclasses.fields(UserState):
        assert np.array_equal(getattr(left, field.name), getattr(right, field.name)), field.name


# --- state ----------------------------------------------------------------------------------------


def test_a_state_holds_each_item_once_oldest_touch_first():
    state = UserState.from_events(
        *events((3, EventType.VIEW, 50), (1, EventType.CLICK, 40), (3, EventType.PURCHASE, 2)), NOW
    )
    assert state.items.tolist() == [1, 3]
    assert state.count.tolist() == [1, 2]
    assert state.bought.tolist() == [0, 1]
    assert state.age_hours.tolist() == [40, 2]
    assert state.strength.tolist() == [pytest.approx(0.3), pytest.approx(1 + math.log(2))]
    assert state.bought_items.tolist() == [3]


def test_impressions_and_unknown_items_say_nothing_about_taste():
    state = UserState.from_events(*events((3, EventType.IMPRESSION, 5), (PAD, EventType.PURCHASE, 4)), NOW)
    assert len(state.items) == 0


def test_what_happens_at_the_moment_itself_is_already_the_future():
    state = UserState.from_events(*events((1, EventType.VIEW, 1), (2, EventType.VIEW, 0), (3, EventType.CART, -1)), NOW)
    assert state.items.tolist() == [1]


def test_a_planted_leak_would_be_seen_and_is_not():
    """The item bought next is planted right after the moment: features may not move, but would if they saw it."""
    before = ((1, EventType.VIEW, 30), (2, EventType.PURCHASE, 9))
    honest = UserState.from_events(*events(*before), NOW)
    planted = events(*before, (7, EventType.PURCHASE, 0), (7, EventType.PURCHASE, -24))
    shop, found = tables(), candidates(7, 1, 9)
    blind = raw_features(UserState.from_events(*planted, NOW), found, shop)
    for seen, expected in zip(blind, raw_features(honest, found, shop), strict=True):
        assert np.array_equal(seen, expected)
    leaking = raw_features(
        dataclasses.replace(UserState.from_events(*planted, NOW + DAY_MS * 2), now_ms=NOW), found, shop
    )
    assert column(leaking[1], "times_bought")[0] > 0, "the test itself can see a leak"


@st.composite
def logs(draw: st.DrawFn) -> list[tuple[int, EventType, int]]:
    kinds = st.sampled_from(EventType)
    return draw(st.lists(st.tuples(st.integers(1, ITEMS), kinds, st.integers(-50, 2_000)), max_size=40))


@settings(deadline=None, max_examples=50)
@given(rows=logs())
def test_a_profile_online_and_the_log_offline_make_the_same_state(rows: list[tuple[int, EventType, int]]):
    past = [row for row in rows if row[2] > 0]
    frame = pl.DataFrame(
        {
            "event_id": uuid7_column(
                np.array([NOW - row[2] * HOUR_MS for row in past], dtype=np.int64),
                np.random.default_rng(0).integers(0, 256, (len(past), 10), dtype=np.uint8),
            ),
            "type": [row[1].value for row in past],
            "timestamp_ms": [NOW - row[2] * HOUR_MS for row in past],
            "user": ["p1-" + "0" * 32 for _ in past],
            "item": [f"item-{row[0]:02d}" for row in past],
            "query": ["words" if row[1] is EventType.SEARCH else None for row in past],
            "rating": [3.0 if row[1] is EventType.RATING else None for row in past],
            **{
                name: pl.Series([None] * len(past), dtype=SCHEMA[name])
                for name in ("session", "position", "quantity", "price")
            },
        }
    )
    log = EventLog.sorted(frame.select(*SCHEMA).cast(dict(SCHEMA)))
    profiles = list(build_profiles(log))
    touches = profiles[0].touches if profiles else []
    assert_same(UserState.of(touches, [], NOW, INDEX), UserState.from_events(*events(*rows), NOW))


def test_a_session_item_is_one_more_click_just_now():
    touches = [
        Touch("item-01", EventType.PURCHASE, 2, 1, NOW - 9 * HOUR_MS),
        Touch("item-02", EventType.VIEW, 1, 0, NOW - HOUR_MS),
    ]
    state = UserState.of(touches, ["item-05", "item-01", "item-05", "who knows"], NOW, INDEX)
    assert state.items.tolist() == [2, 1, 5]
    assert state.count.tolist() == [1, 3, 2]
    assert state.bought.tolist() == [0, 1, 0]
    assert state.age_hours.tolist() == [1, 0, 0]
    assert state.strength[2] == pytest.approx(STRENGTH[EventType.CLICK] * (1 + math.log(2)))


def test_the_oldest_touches_go_when_there_are_too_many():
    index = {f"i{at}": at for at in range(1, 400)}
    touches = [Touch(f"i{at}", EventType.VIEW, 1, 0, NOW - (500 - at) * HOUR_MS) for at in range(1, 350)]
    state = UserState.of(touches, [], NOW, index)
    assert len(state.items) == TOUCHES_MAX
    assert state.items[-1] == 349
    many = (
        np.arange(1, 350),
        np.full(349, CODE[EventType.VIEW]),
        np.array([NOW - (500 - at) * HOUR_MS for at in range(1, 350)]),
    )
    assert_same(UserState.from_events(*many, NOW), state)


def test_a_clock_that_runs_ahead_makes_no_negative_age():
    state = UserState.of([Touch("item-01", EventType.VIEW, 1, 0, NOW + HOUR_MS)], [], NOW, INDEX)
    assert state.age_hours.tolist() == [0]


def test_strength_grows_slowly_with_repetition():
    strength = touch_strength(np.float32([0.3, 0.3, 1.0]), np.float32([1, 10, 1]))
    assert strength[0] < strength[1] < strength[2] * 1.01


def test_context_turns_with_the_day_and_the_week():
    noon, next_week = context_of(DAY_MS // 2), context_of(DAY_MS // 2 + 7 * DAY_MS)
    assert len(noon) == len(CONTEXT)
    assert noon == pytest.approx(next_week, abs=1e-6)
    assert noon[:2] == pytest.approx([0, -1], abs=1e-6)
    assert context_of(0) == pytest.approx([0, 1, 0, 1])


# --- tensors --------------------------------------------------------------------------------------


def test_the_user_tower_reads_the_latest_items_padded_on_the_left():
    inputs = user_inputs(np.arange(1, 61), np.ones(60), np.zeros(60), np.zeros(4))
    assert {name: values.shape[1:] for name, values in inputs.items()} == {s.name: s.shape for s in USER_TOWER.inputs}
    assert {name: str(values.dtype) for name, values in inputs.items()} == {s.name: s.dtype for s in USER_TOWER.inputs}
    assert inputs["history"][0].tolist() == list(range(11, 61))
    short = user_inputs([4, 5], [0.3, 1.0], [9.0, 1.0], np.zeros(4))
    assert short["history"][0, -2:].tolist() == [4, 5]
    assert not short["history"][0, : HISTORY_LENGTH - 2].any()
    assert not user_inputs([], [], [], np.zeros(4))["history"].any()


def test_the_item_tower_reads_prices_popularity_and_age_as_of_the_reference():
    shop = tables()
    inputs = item_inputs(
        category=shop.category,
        price=shop.price,
        popularity=shop.popularity,
        first_seen_ms=np.array([0, NOW + DAY_MS, *[NOW - 365 * DAY_MS] * 11], dtype=np.int64),
        tokens=np.zeros((ITEMS + 1, 32), dtype=np.int64),
        image=np.zeros((ITEMS + 1, 16), dtype=np.float32),
        reference_ms=NOW,
    )
    assert {name: values.shape[1:] for name, values in inputs.items()} == {s.name: s.shape for s in ITEM_TOWER.inputs}
    assert inputs["numeric"][1].tolist() == [pytest.approx(math.log(2)), pytest.approx(math.log(2)), 0.0]
    assert inputs["numeric"][2, 2] == pytest.approx(1.0)
    assert not inputs["numeric"][PAD].any()


def test_every_ranker_feature_by_hand():
    neighbours, scores = np.zeros((ITEMS + 1, 50), dtype=np.int32), np.zeros((ITEMS + 1, 50), dtype=np.float32)
    neighbours[2, 0], scores[2, 0] = 9, 0.5
    shop = tables(neighbours=neighbours, neighbour_scores=scores)
    state = UserState.from_events(*events((1, EventType.VIEW, 48), (2, EventType.PURCHASE, 24)), NOW)
    weight = touch_weights(state.strength, state.age_hours)
    sparse, dense = raw_features(state, candidates(9, 2), shop)
    assert sparse.dtype == np.int64
    assert dense.dtype == np.float32
    named = dict(zip(RANKER_SPARSE, sparse[0].tolist(), strict=True))
    assert named == {
        "item": 9,
        "category": 3,
        "price_band": 4,
        "last_item": 2,
        "last_category": 1,
        "source": SOURCES.index("ann"),
    }
    expected = {
        "ann_score": [2, 1],
        "fused_score": [1, 0],
        "fused_rank": [0, math.log(2)],
        "item_to_item": [math.log1p(0.5 * weight[1]), 0],
        "popularity": [math.log(2), math.log(2)],
        "popularity_recent": [math.log(2), math.log(2)],
        "popularity_category": [0.5, 0.5],
        "item_age_days": [math.log(11), math.log(11)],
        "price": [math.log(10), math.log(3)],
        "price_to_taste": [math.log(10) - (t := float(weight @ np.log1p([1.0, 2.0]) / weight.sum())), math.log(3) - t],
        "category_affinity": [0, 1],
        "times_touched": [0, math.log(2)],
        "times_bought": [0, math.log(2)],
        "days_since_touch": [math.log1p(DAYS_NEVER), math.log(2)],
        "touch_share": [0, weight[1] / weight.sum()],
        "history_length": [math.log(3), math.log(3)],
    }
    assert set(expected) | set(CONTEXT) == set(RANKER_DENSE), "a new feature wants its number here"
    for name, values in expected.items():
        assert column(dense, name) == pytest.approx(values, abs=1e-5), name
    for name, value in zip(CONTEXT, context_of(NOW), strict=True):
        assert column(dense, name) == pytest.approx([value, value]), name


def test_somebody_unknown_has_features_and_none_is_nan():
    state = UserState.of([], [], NOW, INDEX)
    sparse, dense = raw_features(state, candidates(1, 2, 3), tables())
    assert np.isfinite(dense).all()
    assert not sparse[:, RANKER_SPARSE.index("last_item")].any()
    assert column(dense, "price_to_taste") == [0, 0, 0]


def test_no_candidates_are_no_rows():
    sparse, dense = raw_features(UserState.of([], [], NOW, INDEX), candidates(), tables())
    assert sparse.shape == (0, len(RANKER_SPARSE))
    assert dense.shape == (0, len(RANKER_DENSE))


def test_features_are_standardised_by_the_schema():
    state = UserState.from_events(*events((1, EventType.VIEW, 48)), NOW)
    schema = FeatureSchema(
        items=ITEMS,
        categories=["a", "b", "c", "d"],
        price_edges=[1.0],
        dense_mean=[2.0] * len(RANKER_DENSE),
        dense_scale=[4.0] * len(RANKER_DENSE),
        reference_ms=NOW,
    )
    raw_sparse, raw = raw_features(state, candidates(3, 1), tables())
    sparse, dense = rank_features(state, candidates(3, 1), tables(), schema)
    assert np.array_equal(sparse, raw_sparse)
    assert np.allclose(dense, (raw - 2.0) / 4.0)


def test_price_bands_are_the_edges_that_a_price_does_not_exceed():
    bands = price_bands(np.float32([0.0, 1.0, 1.5, 5.0, 9.0]), [1.0, 5.0])
    assert bands.tolist() == [0, 1, 2, 2, 3]


def test_tables_of_the_wrong_shape_or_type_are_named():
    shop = tables()
    arrays = {field.name: getattr(shop, field.name) for field in dataclasses.fields(ItemTables)}
    with pytest.raises(ValueError, match="'price' is missing"):
        ItemTables.of({name: values for name, values in arrays.items() if name != "price"})
    with pytest.raises(ValueError, match="'price' is float64"):
        ItemTables.of(arrays | {"price": arrays["price"].astype(np.float64)})
    with pytest.raises(ValueError, match="'popularity'"):
        ItemTables.of(arrays | {"popularity": arrays["popularity"][:-1]})


def test_the_gateway_loads_neither_torch_nor_polars_for_features():
    code = "import sys, workloads.data.features; assert not {'torch', 'polars', 'pyarrow'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
