"""Profiles made from an event log. Apart from `workloads.data.profiles`, so that the gateway loads no polars."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import polars as pl

from workloads.contract.events import EventType
from workloads.data.events import POSITIVE, EventLog
from workloads.data.profiles import TOUCHES_MAX, Profile, Touch

_STRONGEST_FIRST: Final = (EventType.PURCHASE, EventType.CART, EventType.RATING, EventType.VIEW, EventType.CLICK)
"""Order of `contract.tensors.STRENGTH`; of equal ones the view is the longer look."""


def build_profiles(log: EventLog) -> Iterator[Profile]:
    """One profile per user of the log with a positive event, in order of pseudonym."""
    rank = pl.col("type").replace_strict(
        {kind.value: number for number, kind in enumerate(_STRONGEST_FIRST)}, return_dtype=pl.Int8
    )
    touches = (
        log.frame.lazy()
        .filter(pl.col("type").is_in(POSITIVE), pl.col("user").is_not_null())
        .group_by("user", "item")
        .agg(
            rank.min().alias("strongest"),
            pl.len().alias("count"),
            (pl.col("type") == EventType.PURCHASE.value).sum().alias("bought"),
            pl.col("timestamp_ms").max().alias("last_ms"),
        )
        .sort("user", "last_ms", "item")
        .group_by("user", maintain_order=True)
        .agg(pl.col("item", "strongest", "count", "bought", "last_ms").tail(TOUCHES_MAX))
        .collect()
    )
    for user, items, strongest, counts, bought, last in touches.iter_rows():
        yield Profile(
            user,
            [
                Touch(item, _STRONGEST_FIRST[kind], count, purchases, at)
                for item, kind, count, purchases, at in zip(items, strongest, counts, bought, last, strict=True)
            ],
        )
