"""Split by time, and the report that says whether the parts look alike.

Train is before validation is before test, so that nothing is learnt from the future. The report
compares distributions by the Jensen-Shannon divergence (Lin 1991; base 2: 0 is equal, 1 is disjoint).
A part that differs is no fault of the data, it is something to know when reading the metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl

from workloads.contract.events import EventType
from workloads.data.events import EventLog

PARTS: Final = ("train", "validation", "test")
Basis = Literal["rows", "period"]


class Boundaries(msgspec.Struct, frozen=True, kw_only=True):
    """Half-open intervals: train [start, train_end), validation [train_end, validation_end), test [.., end)."""

    start_ms: int
    train_end_ms: int
    validation_end_ms: int
    end_ms: int

    def __post_init__(self) -> None:
        """Refuse a split with an empty interval."""
        if not self.start_ms < self.train_end_ms < self.validation_end_ms < self.end_ms:
            raise ValueError(f"boundaries must rise: {self}")

    def part(self, log: EventLog, name: str) -> EventLog:
        """The rows of `train`, `validation` or `test`."""
        edges = (self.start_ms, self.train_end_ms, self.validation_end_ms, self.end_ms)
        number = PARTS.index(name)
        return log.between(edges[number], edges[number + 1])


class SplitError(ValueError):
    """A log that cannot be split by time."""


def boundaries(log: EventLog, *, validation_share: float, test_share: float, basis: Basis) -> Boundaries:
    """Cut the end of the log off as test, and the end of what is left before it as validation.

    Shares are of the whole, of its rows or of its period. Events of one moment stay together. Raises
    SplitError when a part would be empty.
    """
    times = log.frame["timestamp_ms"].to_numpy()
    if not len(times):
        raise SplitError("there are no events to split")
    start, end = int(times[0]), int(times[-1]) + 1
    cuts = []
    for share in (test_share + validation_share, test_share):
        if basis == "rows":
            cuts.append(int(times[min(len(times) - 1, round(len(times) * (1 - share)))]))
        else:
            cuts.append(start + round((end - start) * (1 - share)))
    result = (start, cuts[0], cuts[1], end)
    sizes = np.diff(np.searchsorted(times, result))
    if (sizes <= 0).any():
        raise SplitError(
            f"a split by time leaves {sizes[0]} train, {sizes[1]} validation and {sizes[2]} test events; "
            "give a log that covers a longer time"
        )
    return Boundaries(start_ms=start, train_end_ms=cuts[0], validation_end_ms=cuts[1], end_ms=end)


# --- the comparison -------------------------------------------------------------------------------

THRESHOLDS: Final = {
    "event type": 0.05,
    "hour of day": 0.05,
    "day of week": 0.05,
    "category": 0.05,
    "price": 0.05,
    "popularity of the item": 0.10,
    "list position": 0.02,
}
"""Largest Jensen-Shannon divergence from train at which a part still agrees."""
NEW_USERS_MAX: Final = 0.30
NEW_ITEMS_MAX: Final = 0.10
"""Largest share of a part's events on users or items that train has not seen."""


class SplitRow(msgspec.Struct, frozen=True, kw_only=True):
    """One measure of one part beside train."""

    measure: str
    part: str
    value: float
    threshold: float
    verdict: Literal["agrees", "differs", "not measured"]
    train: dict[str, float] = {}
    """The distribution in train, bucket -> share."""
    observed: dict[str, float] = {}


class PartCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Size of one part."""

    part: str
    start_ms: int
    end_ms: int
    events: int
    users: int
    items: int
    sessions: int
    by_type: dict[str, int]


class SplitReport(msgspec.Struct, frozen=True, kw_only=True):
    """`splits.json`: sizes of the parts and how far validation and test are from train."""

    schema_version: int = 1
    counts: list[PartCounts]
    rows: list[SplitRow]
    statements: list[str]
    """Every row that differs, in plain words; or that none does."""


def jensen_shannon(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    """Jensen-Shannon divergence in bits, 0 to 1, of two non-negative weight vectors over the same buckets."""
    p, q = left / left.sum(), right / right.sum()
    middle = (p + q) / 2

    def gain(part: npt.NDArray[np.float64]) -> float:
        there = part > 0
        return float((part[there] * np.log2(part[there] / middle[there])).sum())

    return min(1.0, max(0.0, (gain(p) + gain(q)) / 2))


def compare(log: EventLog, items: pl.DataFrame, cut: Boundaries) -> SplitReport:
    """Measure validation and test against train."""
    parts = {name: _described(cut.part(log, name), items) for name in PARTS}
    train = parts["train"]
    parts = {name: _with_popularity(part, train) for name, part in parts.items()}
    edges = (cut.start_ms, cut.train_end_ms, cut.validation_end_ms, cut.end_ms)
    counts = [_counts(name, parts[name], edges[n], edges[n + 1]) for n, name in enumerate(PARTS)]
    rows: list[SplitRow] = []
    for name in PARTS[1:]:
        rows += [_compared(measure, name, parts["train"], parts[name]) for measure in THRESHOLDS]
        rows.append(_new_share("events of new users", "user", name, parts, NEW_USERS_MAX))
        rows.append(_new_share("events on new items", "item", name, parts, NEW_ITEMS_MAX))
    differing = [
        f"{row.part}: {row.measure} differs from train ({row.value:.3f}, agrees up to {row.threshold:.3f})"
        for row in rows
        if row.verdict == "differs"
    ]
    return SplitReport(
        counts=counts, rows=rows, statements=differing or ["train, validation and test agree in every measure"]
    )


_POPULARITY_EDGES: Final = (1, 3, 10, 30, 100, 300, 1000, 3000)


def _described(part: EventLog, items: pl.DataFrame) -> pl.DataFrame:
    moment = pl.from_epoch("timestamp_ms", time_unit="ms")
    known = items.select("item", "category", pl.col("price").alias("item_price"))
    return part.frame.join(known, on="item", how="left", maintain_order="left").with_columns(
        moment.dt.hour().cast(pl.String).alias("hour of day"),
        moment.dt.weekday().cast(pl.String).alias("day of week"),
        pl.col("type").cast(pl.String).alias("event type"),
        pl.when(pl.col("category") != "").then(pl.col("category")).alias("category"),
        pl.col("position").cast(pl.String).alias("list position"),
        pl.coalesce("price", "item_price").alias("paid"),
    )


def _with_popularity(part: pl.DataFrame, train: pl.DataFrame) -> pl.DataFrame:
    """Buckets that train defines: how often it saw the item, and its deciles of price."""
    drawn = train.filter(pl.col("type") != EventType.IMPRESSION.value, pl.col("item").is_not_null())
    seen = drawn.group_by("item").agg(pl.len().alias("seen"))
    prices = train["paid"].drop_nulls().to_numpy()
    cuts = sorted({float(cut) for cut in np.quantile(prices, np.arange(1, 10) / 10)}) if len(prices) else []
    joined = part.join(seen, on="item", how="left", maintain_order="left")
    counted = joined.select(
        pl.when(pl.col("item").is_not_null() & (pl.col("type") != EventType.IMPRESSION.value)).then(
            pl.col("seen").fill_null(0)
        )
    ).to_series()
    return joined.with_columns(
        _bucketed(counted, _POPULARITY_EDGES).alias("popularity of the item"),
        _bucketed(joined["paid"], cuts).alias("price"),
    )


def _bucketed(values: pl.Series, edges: Sequence[float]) -> pl.Series:
    """The bucket each value falls into, named by its lower edge: `0+`, `2.5+`; null stays null."""
    names = pl.Series([f"{low:g}+" for low in (0, *edges)])
    bucket = pl.Series(np.searchsorted(np.array(edges, dtype=float), values.fill_null(0).to_numpy(), side="right"))
    return pl.select(pl.when(values.is_not_null()).then(names.gather(bucket))).to_series()


def _counts(name: str, part: pl.DataFrame, start_ms: int, end_ms: int) -> PartCounts:
    kinds = dict(part["event type"].value_counts().iter_rows())
    return PartCounts(
        part=name,
        start_ms=start_ms,
        end_ms=end_ms,
        events=part.height,
        users=part["user"].drop_nulls().n_unique(),
        items=part["item"].drop_nulls().n_unique(),
        sessions=part["session"].drop_nulls().n_unique(),
        by_type={kind.value: int(kinds.get(kind.value, 0)) for kind in EventType},
    )


def _compared(measure: str, name: str, train: pl.DataFrame, part: pl.DataFrame) -> SplitRow:
    left, right = (dict(f[measure].drop_nulls().value_counts().iter_rows()) for f in (train, part))
    threshold = THRESHOLDS[measure]
    if not left or not right:
        return SplitRow(measure=measure, part=name, value=0.0, threshold=threshold, verdict="not measured")
    buckets = sorted(left | right, key=lambda bucket: -left.get(bucket, 0))
    p, q = (np.array([float(found.get(bucket, 0)) for bucket in buckets]) for found in (left, right))
    value = jensen_shannon(p, q)
    shown = buckets[:24]
    return SplitRow(
        measure=measure,
        part=name,
        value=value,
        threshold=threshold,
        verdict="agrees" if value <= threshold else "differs",
        train={b: round(float(x), 5) for b, x in zip(shown, p / p.sum(), strict=False)},
        observed={b: round(float(x), 5) for b, x in zip(shown, q / q.sum(), strict=False)},
    )


def _new_share(measure: str, column: str, name: str, parts: dict[str, pl.DataFrame], threshold: float) -> SplitRow:
    part = parts[name][column].drop_nulls()
    if not len(part):
        return SplitRow(measure=measure, part=name, value=0.0, threshold=threshold, verdict="not measured")
    known = part.is_in(parts["train"][column].drop_nulls().unique().implode())
    value = 1.0 - int(known.sum()) / len(known)
    verdict: Literal["agrees", "differs"] = "agrees" if value <= threshold else "differs"
    return SplitRow(measure=measure, part=name, value=value, threshold=threshold, verdict=verdict)
