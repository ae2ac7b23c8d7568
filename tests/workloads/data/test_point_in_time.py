"""Features offline and online are one: any log, any moment, whatever came late; and whoever looks ahead is caught."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.contract.events import EventType
from workloads.contract.tensors import STRENGTH
from workloads.data.definitions import (
    DAY_MS,
    FEATURES,
    HOUR_MS,
    RECENT_MS,
    STRONGEST_FIRST,
    Sign,
    Touch,
    sign_of,
    window_start_ms,
)
from workloads.data.events import SCHEMA, EventLog
from workloads.data.features import EVENT_TYPES, UserState
from workloads.data.point_in_time import LeakError, find_leaks, items_at, require_no_leak, signs_of, touches_at
from workloads.data.profile_builder import build_activity, build_profiles
from workloads.data.profiles import MemoryProfiles, Watermark
from workloads.models import popularity

START = 1_767_600_000_000
USERS = ("ada", "bob")
ITEMS = ("mug", "lamp", "sofa", "rug")

Row = tuple[str, str | None, str, int, int, float | None]
"""(type, user, item, timestamp, received, price)"""


def a_log(rows: list[Row]) -> pl.DataFrame:
    frame = pl.DataFrame(
        [
            dict.fromkeys(SCHEMA)
            | {
                "event_id": f"019b8b7c-b201-7000-8000-{number:012x}",
                "type": kind,
                "timestamp_ms": at,
                "user": user,
                "item": item,
                "price": price,
                "rating": 4.0 if kind == "rating" else None,
                "received_ms": received,
            }
            for number, (kind, user, item, at, received, price) in enumerate(rows)
        ],
        schema={**SCHEMA, "received_ms": pl.Int64},
        orient="row",
    )
    return frame.sort("timestamp_ms", maintain_order=True)


def asked(of: str, names: tuple[str, ...], moment: int) -> pl.DataFrame:
    return pl.DataFrame({of: names, "moment_ms": [moment] * len(names)})


@st.composite
def rows(draw: st.DrawFn) -> list[Row]:
    """Events over two months; most are received at once, some hours later, some from clocks that run ahead."""
    made: list[Row] = []
    for _ in range(draw(st.integers(0, 30))):
        kind = draw(st.sampled_from([each.value for each in EventType if each is not EventType.SEARCH]))
        at = START + draw(st.integers(0, 60 * 24)) * HOUR_MS + draw(st.integers(0, 3)) * 600_000
        delay = draw(st.sampled_from([0, 0, 0, 1, HOUR_MS, 3 * DAY_MS, -HOUR_MS]))
        price = draw(st.sampled_from([None, None, 5.0, 7.5]))
        user = draw(st.sampled_from([*USERS, None]))
        made.append((kind, user, draw(st.sampled_from(ITEMS)), at, at + delay, price))
    return made


def online(log: pl.DataFrame, moment: int) -> MemoryProfiles:
    """A store that consumed what was received before the moment, in that order, in batches of four."""
    spool = log.filter(pl.col("received_ms") < moment).sort("received_ms", maintain_order=True)
    signs: list[Sign] = []
    for seq, row in enumerate(spool.iter_rows(named=True), start=1):
        sign = sign_of(
            seq=seq,
            kind=row["type"],
            timestamp_ms=row["timestamp_ms"],
            user=row["user"],
            item=row["item"],
            price=row["price"],
            received_ms=row["received_ms"],
        )
        if sign is not None:
            signs.append(sign)
    store = MemoryProfiles()
    for start in range(0, len(signs), 4):
        batch = signs[start : start + 4]
        store.apply(batch, Watermark(batch[-1].seq, batch[-1].known_ms))
    return store


@settings(max_examples=120, deadline=None)
@given(rows(), st.integers(-1, 62 * 24), st.sampled_from([0, 1, -1]))
def test_what_was_consumed_online_is_the_offline_row_of_any_moment(made: list[Row], hours: int, nudge: int):
    log, moment = a_log(made), START + hours * HOUR_MS + nudge
    store = online(log, moment)
    for row in touches_at(log, asked("user", USERS, moment)).iter_rows(named=True):
        profile = store.get(row["user"])
        touches = [] if profile is None else profile.touches
        assert touches == [
            Touch(t["item"], STRONGEST_FIRST[t["strongest"]], t["count"], t["bought"], t["last_ms"])
            for t in row["touches"]
        ]
        assert row["history_length"] == len(touches)
        assert row["events"] == sum(touch.count for touch in touches)
        assert row["purchases"] == sum(touch.bought for touch in touches)
        assert row["last_touch_ms"] == max((touch.last_ms for touch in touches), default=None)
    for row in items_at(log, asked("item", ITEMS, moment)).iter_rows(named=True):
        activity = store.activity(row["item"])
        if activity is None:
            assert (row["people"], row["strength_recent"], row["first_ms"], row["price"]) == (0, 0.0, None, None)
            continue
        assert (row["people"], row["first_ms"], row["price"]) == (activity.people, activity.first_ms, activity.price)
        assert row["strength_recent"] == pytest.approx(activity.strength_recent(moment))


@settings(max_examples=60, deadline=None)
@given(rows(), st.integers(0, 62 * 24))
def test_training_reads_the_state_that_is_declared(made: list[Row], hours: int):
    prepared = [(kind, user, item, at, at, price) for kind, user, item, at, _, price in made]  # as a data set has it
    log, moment = a_log(prepared), START + hours * HOUR_MS
    index = {item: number for number, item in enumerate(sorted(ITEMS), start=1)}
    codes = {kind.value: code for code, kind in enumerate(EVENT_TYPES)}
    for row in touches_at(log, asked("user", USERS, moment)).iter_rows(named=True):
        own = log.filter(pl.col("user") == row["user"])
        trained = UserState.from_events(
            own["item"].replace_strict(index, return_dtype=pl.Int32).to_numpy(),
            own["type"].cast(pl.String).replace_strict(codes, return_dtype=pl.Int32).to_numpy(),
            own["timestamp_ms"].to_numpy(),
            moment,
        )
        touches = [
            Touch(t["item"], STRONGEST_FIRST[t["strongest"]], t["count"], t["bought"], t["last_ms"])
            for t in row["touches"]
        ]
        declared = UserState.of(touches, (), moment, index)
        for name in ("items", "strength", "age_hours", "count", "bought"):
            np.testing.assert_array_equal(getattr(trained, name), getattr(declared, name), err_msg=name)


@settings(max_examples=40, deadline=None)
@given(rows())
def test_a_store_filled_from_a_log_goes_on_as_if_it_had_seen_all_of_it(made: list[Row]):
    prepared = [(kind, user, item, at, at, price) for kind, user, item, at, _, price in made]
    log = a_log(prepared)
    end = START + 70 * DAY_MS
    whole = online(log, end)
    built = EventLog(log.select(*SCHEMA))
    for profile in build_profiles(built):
        assert whole.get(profile.pseudonym) == profile
    activities = dict(build_activity(built))
    for item in ITEMS:
        consumed = whole.activity(item)
        assert (consumed is None) == (item not in activities)
        if consumed is not None:
            filled = activities[item]
            assert (filled.people, filled.first_ms, filled.price) == (
                consumed.people,
                consumed.first_ms,
                consumed.price,
            )
            assert filled.strength_recent(end) == pytest.approx(consumed.strength_recent(end))


def test_popularity_in_training_is_the_declared_feature_as_a_share():
    log = a_log(
        [
            ("view", user, item, START + n * DAY_MS, START + n * DAY_MS, None)
            for n, (user, item) in enumerate(
                [("ada", "mug"), ("bob", "mug"), ("ada", "lamp"), ("ada", "mug"), ("bob", "rug")] * 9
            )
        ]
    )
    moment = START + 45 * DAY_MS + 1_234_567
    declared = items_at(log, asked("item", ITEMS, moment))
    index = {item: number for number, item in enumerate(ITEMS, start=1)}
    item = log["item"].replace_strict(index, return_dtype=pl.Int64).to_numpy()
    person = log["user"].replace_strict({"ada": 0, "bob": 1}, return_dtype=pl.Int64).to_numpy()
    strength = np.full(len(log), STRENGTH[EventType.VIEW], dtype=np.float32)
    trained = popularity.all_time(person, item, len(ITEMS))
    recent = popularity.recent(item, strength, log["timestamp_ms"].to_numpy(), items=len(ITEMS), cut_ms=moment)
    people, strengths = declared["people"].to_numpy(), declared["strength_recent"].to_numpy()
    np.testing.assert_allclose(trained[1:], people / people.sum(), rtol=1e-6)
    np.testing.assert_allclose(recent[1:], strengths / strengths.sum(), rtol=1e-6)
    assert strengths.sum() < STRENGTH[EventType.VIEW] * len(log)  # the window leaves something out


# --- the future -----------------------------------------------------------------------------------

MOMENT = START + 10 * DAY_MS
PAST: list[Row] = [
    ("view", "ada", "mug", START, START, 5.0),
    ("cart", "bob", "mug", START + HOUR_MS, START + HOUR_MS, 6.0),
]
PLANTED: dict[str, Row] = {
    "after the request": ("purchase", "ada", "mug", MOMENT + 1, MOMENT + 1, 9.0),
    "at the request": ("purchase", "ada", "mug", MOMENT, MOMENT, 9.0),
    "before it, received after": ("purchase", "ada", "mug", MOMENT - HOUR_MS, MOMENT + HOUR_MS, 9.0),
}


@pytest.mark.parametrize("planted", PLANTED)
def test_no_feature_knows_an_event_that_was_not_known_at_the_request(planted: str):
    log = a_log([*PAST, PLANTED[planted]])
    require_no_leak(touches_at, log, asked("user", USERS, MOMENT))
    require_no_leak(items_at, log, asked("item", ITEMS, MOMENT))
    assert touches_at(log, asked("user", ("ada",), MOMENT)).row(0, named=True)["purchases"] == 0


def by_event_time_alone(log: pl.DataFrame, questions: pl.DataFrame) -> pl.DataFrame:
    """What a careless join does: an event counts from when it happened."""
    return touches_at(log.with_columns(received_ms=pl.col("timestamp_ms")), questions)


def with_the_moment_itself(log: pl.DataFrame, questions: pl.DataFrame) -> pl.DataFrame:
    """An off-by-one: up to and with the request's own moment."""
    later = touches_at(log, questions.with_columns(pl.col("moment_ms") + 1))
    return later.with_columns(pl.col("moment_ms") - 1)


def of_the_whole_log(log: pl.DataFrame, questions: pl.DataFrame) -> pl.DataFrame:
    """No join at all: the newest state for every request."""
    return touches_at(log, questions.with_columns(pl.lit(MOMENT + DAY_MS).alias("moment_ms"))).with_columns(
        questions["moment_ms"]
    )


@pytest.mark.parametrize(
    ("planted", "leaking"),
    [
        ("after the request", of_the_whole_log),
        ("at the request", of_the_whole_log),
        ("at the request", with_the_moment_itself),
        ("before it, received after", of_the_whole_log),
        ("before it, received after", by_event_time_alone),
    ],
)
def test_the_check_catches_whoever_looks_ahead(
    planted: str, leaking: Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame]
):
    log, questions = a_log([*PAST, PLANTED[planted]]), asked("user", USERS, MOMENT)
    leaks = find_leaks(leaking, log, questions)
    assert any(leak.startswith("purchases of user 0") for leak in leaks), leaks
    assert not any("bob" in leak for leak in leaks)
    with pytest.raises(LeakError, match="know the future"):
        require_no_leak(leaking, log, questions)
    assert find_leaks(leaking, a_log(PAST), questions) == []


def test_every_declared_feature_of_events_is_computed_and_the_catalogues_are_not():
    log = a_log(PAST)
    columns = {
        "user": set(touches_at(log, asked("user", USERS, MOMENT)).columns),
        "item": set(items_at(log, asked("item", ITEMS, MOMENT)).columns),
    }
    derived = {"category_share", "price_taste"}  # of the touches, with the catalogue: features.Taste
    for feature in FEATURES:
        if feature.name not in derived:
            assert (feature.name in columns[feature.entity]) == bool(feature.events), feature.name


def test_a_clock_that_runs_ahead_makes_no_event_of_the_future():
    log = a_log([("view", "ada", "mug", MOMENT + DAY_MS, MOMENT - 1, None)])
    (row,) = touches_at(log, asked("user", ("ada",), MOMENT)).to_dicts()
    assert row["last_touch_ms"] == MOMENT - 1


def test_the_window_begins_with_a_whole_hour():
    assert window_start_ms(MOMENT + 1, RECENT_MS) == (MOMENT - RECENT_MS) // HOUR_MS * HOUR_MS
    assert signs_of(a_log([])).is_empty()
