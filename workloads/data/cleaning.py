"""What every source goes through before it is a data set: doubles out, items and events made to agree.

Each rule says how many rows it touched, also when that is none. What only one source needs is in
`workloads.data.adapters`.
"""

from __future__ import annotations

from typing import Final

import msgspec
import polars as pl

from workloads.data.events import SCHEMA, EventLog

ITEM_SCHEMA: Final = {
    "item": pl.String(),
    "title": pl.String(),
    "description": pl.String(),
    "category": pl.String(),
    "price": pl.Float64(),
    "image": pl.List(pl.Float32()),
    "first_seen_ms": pl.Int64(),
    "in_stock": pl.Boolean(),
}
"""Columns of a catalogue. `price` is null where nobody knows it; texts are empty then, `image` is an empty list."""


class RuleCount(msgspec.Struct, frozen=True, kw_only=True):
    """What one cleaning rule did."""

    rule: str
    rows: int
    effect: str
    """`dropped`, `changed` or `kept`: what happened to the rows."""


class CatalogueError(ValueError):
    """A frame that is not a catalogue; the message says why."""


def check_items(items: pl.DataFrame) -> pl.DataFrame:
    """The same frame, or CatalogueError: `ITEM_SCHEMA`, one row per item, nothing null but `price`."""
    if dict(items.schema) != ITEM_SCHEMA:
        raise CatalogueError(f"catalogue columns are {dict(items.schema)}, not {ITEM_SCHEMA}")
    counts = items.select(pl.all().exclude("price").null_count()).row(0, named=True)
    faults = [f"{name} is null in {count} rows" for name, count in counts.items() if count]
    if twice := items.height - items["item"].n_unique():
        faults.append(f"{twice} rows repeat an item")
    if faults:
        raise CatalogueError("; ".join(faults))
    return items


def drop_repeats(log: EventLog) -> tuple[EventLog, RuleCount]:
    """Leave out events that say the same as another under a different id: sent twice, not done twice.

    Rows without a user and a session say too little to be told apart and all stay.
    """
    said = [name for name in SCHEMA if name != "event_id"]
    known = pl.col("user").is_not_null() | pl.col("session").is_not_null()
    kept = log.where(~known | pl.struct(said).is_first_distinct())
    return kept, RuleCount(rule="event repeated under another id", rows=len(log) - len(kept), effect="dropped")


def drop_unknown_items(log: EventLog, items: pl.DataFrame) -> tuple[EventLog, RuleCount]:
    """Leave out events on items that the catalogue does not have."""
    kept = log.where(pl.col("item").is_null() | pl.col("item").is_in(items["item"].implode()))
    return kept, RuleCount(
        rule="event on an item that the catalogue lacks", rows=len(log) - len(kept), effect="dropped"
    )


def drop_unseen_items(log: EventLog, items: pl.DataFrame) -> tuple[pl.DataFrame, RuleCount]:
    """Leave out catalogue rows that came after the log's end: nobody can have seen them."""
    end = int(log.frame["timestamp_ms"][-1])
    kept = items.filter(pl.col("first_seen_ms") <= end)
    return kept, RuleCount(
        rule="item first seen after the last event", rows=items.height - kept.height, effect="dropped"
    )
