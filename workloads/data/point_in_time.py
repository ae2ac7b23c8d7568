"""The declared features of `workloads.data.definitions` over a whole log, as they stood at any moment.

Every aggregate is first made *running*: a row per change, valid from the moment at which it was known. What a request
may read is then one ASOF join, backwards and strictly before the request, so that nothing of its own moment or later
can get in, nor an event that happened before and came in after. `find_leaks` holds any such computation against
itself with the future cut off, and names what differs.

A log has the columns of `workloads.data.events.SCHEMA`, and `received_ms` where it comes from the spool or the lake; of
prepared history, which has none, an event was known when it happened. Loads polars: nothing online imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import polars as pl

from workloads.contract.events import EventType
from workloads.contract.tensors import STRENGTH
from workloads.data.definitions import (
    DAY_MS,
    HOUR_MS,
    RECENT_MS,
    STRONGEST_FIRST,
    TOUCHES_MAX,
    ItemActivity,
    window_start_ms,
)
from workloads.data.events import POSITIVE

Compute = Callable[[pl.DataFrame, pl.DataFrame], pl.DataFrame]
"""(log, asked) to features: `asked` has `user` or `item`, and `moment_ms`; so have the features, a row for each."""

TOUCH: Final = pl.Struct(
    {"item": pl.String, "strongest": pl.Int8, "count": pl.Int64, "bought": pl.Int64, "last_ms": pl.Int64}
)
"""A `definitions.Touch`; `strongest` is a place in STRONGEST_FIRST."""


def signs_of(frame: pl.DataFrame) -> pl.DataFrame:
    """The signs of a log in the order in which they were known.

    Columns user, item, rank (place in STRONGEST_FIRST), bought (0 or 1), strength, price, at_ms, known_ms.
    """
    received = pl.col("received_ms" if "received_ms" in frame.columns else "timestamp_ms")
    kind = pl.col("type").cast(pl.String)
    return (
        frame.lazy()
        .filter(kind.is_in(POSITIVE), pl.col("user").is_not_null(), pl.col("item").is_not_null())
        .select(
            "user",
            "item",
            kind.replace_strict(
                {each.value: number for number, each in enumerate(STRONGEST_FIRST)}, return_dtype=pl.Int8
            ).alias("rank"),
            (kind == EventType.PURCHASE.value).cast(pl.Int64).alias("bought"),
            kind.replace_strict(
                {each.value: strength for each, strength in STRENGTH.items()}, return_dtype=pl.Float64
            ).alias("strength"),
            "price",
            pl.min_horizontal("timestamp_ms", received).alias("at_ms"),
            received.alias("known_ms"),
        )
        .sort("known_ms", maintain_order=True)
        .collect()
    )


def touches_at(log: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """User features: `touches`, `history_length`, `events`, `purchases`, `last_touch_ms` for each (user, moment_ms).

    `touches` is a list of TOUCH, the item touched longest ago first, the latest TOUCHES_MAX; `events` and `purchases`
    are counts over them. Nobody's: an empty list, zeros, and a null time.
    """
    asked = asked.select("user", "moment_ms")
    running = signs_of(log).select(
        "user",
        "item",
        "known_ms",
        pl.col("rank").cum_min().over("user", "item").alias("strongest"),
        pl.col("rank").cum_count().over("user", "item").cast(pl.Int64).alias("count"),
        pl.col("bought").cum_sum().over("user", "item").alias("bought"),
        pl.col("at_ms").cum_max().over("user", "item").alias("last_ms"),
    )
    pairs = asked.unique().join(running.select("user", "item").unique(), on="user").sort("moment_ms")
    read = _asof(pairs, running, ("user", "item")).drop_nulls("count").sort("user", "moment_ms", "last_ms", "item")
    rows = read.group_by("user", "moment_ms", maintain_order=True).agg(
        pl.struct("item", "strongest", "count", "bought", "last_ms").tail(TOUCHES_MAX).alias("touches"),
        pl.len().clip(upper_bound=TOUCHES_MAX).cast(pl.Int64).alias("history_length"),
        pl.col("count").tail(TOUCHES_MAX).sum().alias("events"),
        pl.col("bought").tail(TOUCHES_MAX).sum().alias("purchases"),
        pl.col("last_ms").max().alias("last_touch_ms"),
    )
    return asked.join(rows, on=("user", "moment_ms"), how="left", maintain_order="left").with_columns(
        pl.col("touches").fill_null(pl.lit([], dtype=pl.List(TOUCH))),
        pl.col("history_length", "events", "purchases").fill_null(0),
    )


def items_at(log: pl.DataFrame, asked: pl.DataFrame) -> pl.DataFrame:
    """Item features: `people`, `strength_recent`, `first_ms`, `price` for each (item, moment_ms).

    Of an item that nobody touched: zeros, and null for time and price.
    """
    asked = asked.select("item", "moment_ms")
    signs = signs_of(log).with_columns(pl.struct("at_ms", "price").rank("dense").alias("recency"))
    priced = pl.when(pl.col("price").is_not_null()).then("recency")
    running = signs.select(
        "item",
        "known_ms",
        pl.struct("user", "item").is_first_distinct().cast(pl.Int64).cum_sum().over("item").alias("people"),
        pl.col("at_ms").cum_min().over("item").alias("first_ms"),
        priced.cum_max().forward_fill().over("item").alias("recency"),
    )
    prices = signs.filter(pl.col("price").is_not_null()).select("recency", "price").unique("recency")
    questions = asked.unique().sort("moment_ms")
    found = _asof(questions, running, ("item",)).join(prices, on="recency", how="left").drop("recency")
    rows = found.join(_recent_at(signs, questions), on=("item", "moment_ms"), how="left")
    return (
        asked.join(rows, on=("item", "moment_ms"), how="left", maintain_order="left")
        .with_columns(pl.col("people").fill_null(0), pl.col("strength_recent").fill_null(0.0))
        .select("item", "moment_ms", "people", "strength_recent", "first_ms", "price")
    )


def _recent_at(signs: pl.DataFrame, questions: pl.DataFrame) -> pl.DataFrame:
    """`strength_recent`: each hour's running sum has an ASOF join of its own, so that late events count where due."""
    hourly = signs.with_columns((pl.col("at_ms") // HOUR_MS).alias("hour")).select(
        "item", "hour", "known_ms", pl.col("strength").cum_sum().over("item", "hour").alias("strength")
    )
    start = (pl.col("moment_ms") - RECENT_MS) // HOUR_MS
    pairs = (
        questions.join(hourly.select("item", "hour").unique(), on="item")
        .filter(pl.col("hour") >= start, pl.col("hour") * HOUR_MS < pl.col("moment_ms"))
        .sort("moment_ms")
    )
    read = _asof(pairs, hourly, ("item", "hour"))
    return read.group_by("item", "moment_ms").agg(pl.col("strength").sum().alias("strength_recent"))


def _asof(questions: pl.DataFrame, running: pl.DataFrame, by: tuple[str, ...]) -> pl.DataFrame:
    """The newest row of `running` that was known strictly before each question's moment."""
    return questions.join_asof(
        running.sort("known_ms", maintain_order=True),
        left_on="moment_ms",
        right_on="known_ms",
        by=list(by),
        strategy="backward",
        allow_exact_matches=False,
        check_sortedness=False,  # both are sorted here; polars cannot see it within groups
    ).drop("known_ms", strict=False)


def activity_of(signs: pl.DataFrame) -> Iterator[tuple[str, ItemActivity]]:
    """Each touched item's state at the end of the log, in order of id, from which an online store goes on."""
    if signs.is_empty():
        return
    end_ms = int(signs["known_ms"].max())  # type: ignore[arg-type]  # a column of Int64 that is not empty
    first_hour = window_start_ms(end_ms, RECENT_MS + DAY_MS) // HOUR_MS
    hours: dict[str, list[tuple[int, float]]] = {}
    by_hour = (
        signs.group_by("item", (pl.col("at_ms") // HOUR_MS).alias("hour"))
        .agg(pl.col("strength").sum())
        .filter(pl.col("hour") >= first_hour)
        .sort("item", "hour")
    )
    for item, hour, strength in by_hour.iter_rows():
        hours.setdefault(item, []).append((hour, strength))
    priced = signs.filter(pl.col("price").is_not_null()).sort("at_ms", "price")
    prices = {
        item: (price, at)
        for item, price, at in priced.group_by("item").agg(pl.col("price", "at_ms").last()).iter_rows()
    }
    totals = signs.group_by("item").agg(pl.col("user").n_unique(), pl.col("at_ms").min()).sort("item")
    for item, people, first_ms in totals.iter_rows():
        price, price_ms = prices.get(item, (None, 0))
        yield item, ItemActivity(people, first_ms, price, price_ms, hours.get(item, []))


class LeakError(AssertionError):
    """A computation knows the future: the message says which feature, whose, and at which moment."""


def find_leaks(compute: Compute, log: pl.DataFrame, asked: pl.DataFrame) -> list[str]:
    """What `compute` reads at a moment of events that were not known before it, one sentence each; empty: nothing.

    Each moment is computed twice, on the whole log and on what was known strictly before, and must come out the same.
    """
    received = "received_ms" if "received_ms" in log.columns else "timestamp_ms"
    leaks = []
    for moment in asked["moment_ms"].unique().sort():
        at_once = asked.filter(pl.col("moment_ms") == moment)
        whole = compute(log, at_once)
        past = compute(log.filter(pl.col(received) < moment), at_once)
        key = "user" if "user" in at_once.columns else "item"
        for number, (seen, known) in enumerate(zip(whole.to_dicts(), past.to_dicts(), strict=True)):
            leaks += [
                f"{name} of {key} {number} at {moment}: {seen[name]} with the future, {known[name]} without"
                for name in seen
                if not _same(seen[name], known[name])
            ]
    return leaks


def require_no_leak(compute: Compute, log: pl.DataFrame, asked: pl.DataFrame) -> None:
    """Raise LeakError with the first leaks that `find_leaks` finds."""
    leaks = find_leaks(compute, log, asked)
    if leaks:
        raise LeakError(f"{len(leaks)} features know the future: " + "; ".join(leaks[:3]))


def _same(seen: Any, known: Any) -> bool:  # noqa: ANN401 - values of any feature
    if isinstance(seen, float) and isinstance(known, float):
        return abs(seen - known) <= 1e-9 * max(1.0, abs(seen))
    return bool(seen == known)
