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


def build_profiles(log: EventLog, latest: int = TOUCHES_MAX) -> Iterator[Profile]:
    """One profile per user of the log with a positive event, in order of pseudonym, with the `latest` items of each."""
    touches = (
        signs_of(log.frame)
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


def build_activity(log: EventLog) -> Iterator[tuple[str, ItemActivity]]:
    """What people did with each item of the log that somebody touched, as the online store goes on counting it."""
    return activity_of(signs_of(log.frame))
