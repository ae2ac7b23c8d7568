"""Profiles made from an event log. Apart from `workloads.data.profiles`, so that the gateway loads no polars.

The aggregates are those of `workloads.data.point_in_time`, read at the end of the log.
"""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from workloads.data.definitions import STRONGEST_FIRST, TOUCHES_MAX, ItemActivity
from workloads.data.events import EventLog
from workloads.data.point_in_time import activity_of, signs_of
from workloads.data.profiles import Profile, Touch


def with_clocks(log: EventLog, clocks: pl.DataFrame | None) -> pl.DataFrame:
    """The log with `received_ms`, and when events happened by their own clock (`source.SourceData.clocks`)."""
    if clocks is None:
        return log.frame.with_columns(pl.col("timestamp_ms").alias("received_ms"))
    return (
        log.frame.join(clocks, on="event_id", how="left", maintain_order="left")
        .with_columns(
            pl.coalesce("received_ms", "timestamp_ms").alias("received_ms"),
            pl.coalesce("happened_ms", "timestamp_ms").alias("timestamp_ms"),
        )
        .drop("happened_ms")
    )


def build_profiles(
    log: EventLog, latest: int = TOUCHES_MAX, *, clocks: pl.DataFrame | None = None
) -> Iterator[Profile]:
    """One profile per user of the log with a positive event, in order of pseudonym, with the `latest` items of each."""
    touches = (
        signs_of(with_clocks(log, clocks))
        .lazy()
        .group_by("user", "item")
        .agg(
            pl.col("rank").min().alias("strongest"),
            pl.len().alias("count"),
            pl.col("bought").sum(),
            pl.col("at_ms").max().alias("last_ms"),
        )
        .sort("user", "last_ms", "item")
        .group_by("user", maintain_order=True)
        .agg(pl.col("item", "strongest", "count", "bought", "last_ms").tail(latest))
        .collect()
    )
    for user, items, strongest, counts, bought, last in touches.iter_rows():
        yield Profile(
            user,
            [
                Touch(item, STRONGEST_FIRST[kind], count, purchases, at)
                for item, kind, count, purchases, at in zip(items, strongest, counts, bought, last, strict=True)
            ],
        )


def build_activity(log: EventLog, clocks: pl.DataFrame | None = None) -> Iterator[tuple[str, ItemActivity]]:
    """What people did with each item of the log that somebody touched, as the online store goes on counting it."""
    return activity_of(signs_of(with_clocks(log, clocks)))
