"""The event log: the contract's `Event` in columns, and the report on rows that are not events.

`EventLog` is the one record from an adapter to a metric. It checks itself when it is made and never
changes afterwards. Its columns and the rules on each field are read from `contract.events.Event`, so
that a log and a wire message cannot disagree; only rules between fields are written twice. It knows
nothing of files, sources or what events are used for.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Final, Self

import msgspec
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from workloads.contract.events import POSITIVE_TYPES, Event, EventType

TYPE_DTYPE: Final = pl.Enum([kind.value for kind in EventType])

SCHEMA: Final[Mapping[str, pl.DataType]] = {
    "event_id": pl.String(),
    "type": TYPE_DTYPE,
    "timestamp_ms": pl.Int64(),
    "user": pl.String(),
    "item": pl.String(),
    "session": pl.String(),
    "query": pl.String(),
    "position": pl.Int32(),
    "quantity": pl.Int32(),
    "price": pl.Float64(),
    "rating": pl.Float64(),
}
"""Columns of a log in order. `context` and `schema_version` of an Event stay behind."""

POSITIVE: Final = tuple(sorted(kind.value for kind in POSITIVE_TYPES))
"""Values of `type` that say a person was drawn to an item."""

REQUIRED: Final = ("event_id", "type", "timestamp_ms")


@dataclass(frozen=True)
class Rule:
    """One thing every row must satisfy. `broken` is true on a row that does not; null counts as false."""

    field: str
    text: str
    broken: pl.Expr


def _rust(pattern: str) -> str:
    """A contract pattern for polars: strings there hold no surrogates, and `$` is the very end anyway."""
    return pattern.replace(r"\ud800-\udfff", "").replace(r"$(?!\n)", "$")


def _field_rules() -> Iterator[Rule]:
    described = msgspec.inspect.type_info(Event)
    if not isinstance(described, msgspec.inspect.StructType):  # pragma: no cover - it is one
        raise TypeError("contract.events.Event is no longer a struct")
    for spec in described.fields:
        if spec.name not in SCHEMA:
            continue
        column = pl.col(spec.name)
        if spec.required:
            yield Rule(spec.name, "is required", column.is_null())
        kinds = spec.type.types if isinstance(spec.type, msgspec.inspect.UnionType) else (spec.type,)
        for kind in kinds:
            if isinstance(kind, msgspec.inspect.StrType):
                if kind.pattern is not None:
                    text = f"must match {kind.pattern}"
                    yield Rule(spec.name, text, ~column.str.contains(_rust(kind.pattern)))
                else:
                    low, high = kind.min_length or 0, kind.max_length or 2**31
                    length = column.str.len_chars()
                    yield Rule(spec.name, f"must have {low} to {high} characters", (length < low) | (length > high))
            elif isinstance(kind, msgspec.inspect.FloatType):
                yield Rule(spec.name, "must be a number, not NaN", column.is_nan())
                bounds = (column < kind.ge) | (column > kind.le)
                yield Rule(spec.name, f"must be {kind.ge:g} to {kind.le:g}", bounds & column.is_not_nan())
            elif isinstance(kind, msgspec.inspect.IntType):
                yield Rule(spec.name, f"must be {kind.ge} to {kind.le}", (column < kind.ge) | (column > kind.le))


_TYPE = pl.col("type")

RULES: Final[tuple[Rule, ...]] = (
    *_field_rules(),
    Rule("query", "a search event carries the query that was typed", (_TYPE == "search") & pl.col("query").is_null()),
    Rule("item", "an event that is no search names its item", (_TYPE != "search") & pl.col("item").is_null()),
    Rule("rating", "a rating event carries its value", (_TYPE == "rating") & pl.col("rating").is_null()),
)
"""What every row satisfies; the last three are `Event.__post_init__` in columns."""

UNIQUE: Final = "must be unique; an earlier row has it"


class EventLogError(ValueError):
    """A frame that is not an event log; the message names columns, rules and counts."""


class EventLog:
    """Events in columns (`SCHEMA`), oldest first, each row a valid `Event`, no id twice.

    Raises EventLogError naming every broken rule with its count. The log never changes: `frame`
    hands out a clone, which shares memory.
    """

    __slots__ = ("_frame",)

    def __init__(self, frame: pl.DataFrame) -> None:
        if dict(frame.schema) != dict(SCHEMA):
            raise EventLogError(_schema_fault(frame))
        counts = frame.select(
            *(rule.broken.fill_null(value=False).sum().alias(str(number)) for number, rule in enumerate(RULES)),
            (pl.len() - pl.col("event_id").n_unique()).alias("duplicates"),
            (pl.col("timestamp_ms").diff() < 0).any().alias("disordered"),
        ).row(0, named=True)
        faults = [f"{r.field} {r.text} ({counts[str(n)]} rows)" for n, r in enumerate(RULES) if counts[str(n)]]
        if counts["duplicates"]:
            faults.append(f"event_id {UNIQUE} ({counts['duplicates']} rows)")
        if counts["disordered"]:
            faults.append("rows must be in order of timestamp_ms; sort them, or use EventLog.sorted")
        if faults:
            raise EventLogError("; ".join(faults))
        self._frame = frame.clone()

    @classmethod
    def sorted(cls, frame: pl.DataFrame) -> Self:
        """The log of these rows, put in order of time; rows of one moment keep their order."""
        return cls(frame.select(*SCHEMA).sort("timestamp_ms", maintain_order=True))

    @classmethod
    def from_events(cls, events: Iterable[Event]) -> Self:
        """The log of contract records in any order; `context` is left behind."""
        rows = [{name: getattr(event, name) for name in SCHEMA} for event in events]
        for row in rows:
            row["type"] = row["type"].value
        return cls.sorted(pl.DataFrame(rows, schema=dict(SCHEMA), orient="row"))

    @property
    def frame(self) -> pl.DataFrame:
        """The rows; a change to what is handed out does not reach the log."""
        return self._frame.clone()

    def events(self) -> Iterator[Event]:
        """Each row as a contract record."""
        for row in self._frame.iter_rows(named=True):
            yield Event(**{**row, "type": EventType(row["type"])})

    def where(self, predicate: pl.Expr) -> EventLog:
        """Rows on which `predicate` is true. Rows of a checked log need no second check."""
        kept = EventLog.__new__(EventLog)
        kept._frame = self._frame.filter(predicate)
        return kept

    def between(self, start_ms: int, end_ms: int) -> EventLog:
        """Rows with start_ms <= timestamp_ms < end_ms."""
        return self.where(pl.col("timestamp_ms").is_between(start_ms, end_ms, closed="left"))

    def counts(self) -> dict[str, int]:
        """Rows per event type, every type named, in the contract's order."""
        found = dict(self._frame["type"].value_counts().iter_rows())
        return {kind.value: int(found.get(kind.value, 0)) for kind in EventType}

    def __len__(self) -> int:
        return self._frame.height

    def __repr__(self) -> str:
        return f"EventLog({self._frame.height} rows)"


def _schema_fault(frame: pl.DataFrame) -> str:
    faults = []
    if missing := [name for name in SCHEMA if name not in frame.columns]:
        faults.append(f"missing columns: {', '.join(missing)}")
    if extra := [name for name in frame.columns if name not in SCHEMA]:
        faults.append(f"unknown columns: {', '.join(extra)}")
    faults += [
        f"{name} is {frame.schema[name]}, not {dtype}"
        for name, dtype in SCHEMA.items()
        if name in frame.columns and frame.schema[name] != dtype
    ]
    return "; ".join(faults) or f"columns must stand in this order: {', '.join(SCHEMA)}"


# --- rows that are not events ---------------------------------------------------------------------

SAMPLES_PER_RULE: Final = 1000
"""Faults kept in full per rule; further ones are only counted."""
VALUE_CUT: Final = 60
PERSONAL: Final = frozenset({"user", "session", "query"})
"""Fields whose values are never quoted."""

_UNPRINTABLE = re.compile(r"[^\x20-\x7e\u00a0-\ud7ff\ue000-\ufffd]")


def safe_sample(name: str, value: object) -> str:
    """A value that may stand in a report: cut, control characters escaped, personal values only measured."""
    if value is None:
        return ""
    text = str(value)
    if name in PERSONAL:
        return f"<{len(text)} characters>"
    cut = text if len(text) <= VALUE_CUT else text[:VALUE_CUT] + "…"
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found.group()):04x}", cut)


class RowFault(msgspec.Struct, frozen=True, kw_only=True):
    """One field of one row at fault. `row` is the file's line, or the row's number where there are no lines."""

    row: int
    field: str
    rule: str
    value: str


class FaultTotal(msgspec.Struct, frozen=True, kw_only=True):
    """How often one rule was broken."""

    field: str
    rule: str
    rows: int


class TooManyFaultsError(ValueError):
    """More rows are bad than the threshold allows; `faults` holds the report."""

    def __init__(self, faults: RowFaults, max_bad_share: float) -> None:
        self.faults = faults
        worst = "; ".join(f"{t.rows} x {t.field} {t.rule}" for t in faults.totals()[:4])
        super().__init__(
            f"{faults.bad_rows} of {faults.rows_read} rows are bad ({faults.bad_share:.1%}), "
            f"more than the allowed {max_bad_share:.1%}: {worst}"
        )


@dataclass
class RowFaults:
    """The row-level report of one input: what was read, what was left out and why."""

    rows_read: int = 0
    bad_rows: int = 0
    samples: list[RowFault] = field(default_factory=list)
    _totals: dict[tuple[str, str], int] = field(default_factory=dict)

    def add(self, name: str, rule: str, rows: Iterable[int], values: Iterable[object], *, count: int) -> None:
        """Record that `count` rows break a rule of a field; the first ones are kept in full.

        Does not touch `bad_rows`: one row may break several rules.
        """
        if not count:
            return
        before = self._totals.get((name, rule), 0)
        self._totals[name, rule] = before + count
        kept = islice(zip(rows, values, strict=True), max(0, SAMPLES_PER_RULE - before))
        self.samples += [
            RowFault(row=row, field=name, rule=rule, value=safe_sample(name, value)) for row, value in kept
        ]

    @property
    def bad_share(self) -> float:
        """Bad rows over rows read, 0 when nothing was read."""
        return self.bad_rows / self.rows_read if self.rows_read else 0.0

    def totals(self) -> list[FaultTotal]:
        """Counts per rule, most frequent first."""
        ordered = sorted(self._totals.items(), key=lambda entry: (-entry[1], entry[0]))
        return [FaultTotal(field=name, rule=rule, rows=rows) for (name, rule), rows in ordered]

    def stop_above(self, max_bad_share: float) -> None:
        """Raise TooManyFaultsError when more than this share of the rows is bad."""
        if self.bad_share > max_bad_share:
            raise TooManyFaultsError(self, max_bad_share)


ROW: Final = "__row"
"""Column with the line or row number that `sift` reports by."""


def sift(frame: pl.DataFrame, faults: RowFaults) -> pl.DataFrame:
    """Rows of `frame` (`SCHEMA` plus `ROW`) that are valid events; the others go to `faults`.

    Of rows with one event_id the first stays. Raises nothing: the threshold is the caller's.
    """
    broken: list[tuple[Rule, pl.Series]] = []
    bad = pl.repeat(value=False, n=frame.height, eager=True)
    rules = (
        *RULES,
        Rule("event_id", UNIQUE, ~pl.col("event_id").is_first_distinct() & pl.col("event_id").is_not_null()),
    )
    for rule in rules:
        mask = frame.select(rule.broken.fill_null(value=False).alias("broken"))["broken"]
        if mask.any():
            broken.append((rule, mask))
            bad = bad | mask
    for rule, mask in broken:
        rows = frame.filter(mask)
        head = rows.head(SAMPLES_PER_RULE)
        faults.add(rule.field, rule.text, head[ROW].to_list(), head[rule.field].to_list(), count=rows.height)
    faults.bad_rows += int(bad.sum())
    return frame.filter(~bad)


# --- event ids ------------------------------------------------------------------------------------

_HEX: Final = np.frombuffer("".join(f"{byte:02x}" for byte in range(256)).encode(), dtype="S2")


def uuid7_column(timestamp_ms: npt.NDArray[np.int64], random: npt.NDArray[np.uint8]) -> pl.Series:
    """UUID version 7 (RFC 9562 section 5.7) per row: its 48-bit time, and `random` (n, 10) for the rest."""
    count = len(timestamp_ms)
    raw = np.empty((count, 16), dtype=np.uint8)
    raw[:, :6] = timestamp_ms.astype(">u8").view(np.uint8).reshape(count, 8)[:, 2:]
    raw[:, 6:] = random
    raw[:, 6] = (raw[:, 6] & 0x0F) | 0x70
    raw[:, 8] = (raw[:, 8] & 0x3F) | 0x80
    digits = _HEX[raw].view(np.uint8).reshape(count, 32)
    text = np.full((count, 36), ord("-"), dtype=np.uint8)
    for start, end, at in ((0, 8, 0), (8, 12, 9), (12, 16, 14), (16, 20, 19), (20, 32, 24)):
        text[:, at : at + end - start] = digits[:, start:end]
    offsets = np.arange(0, 36 * (count + 1), 36, dtype=np.int64)
    array = pa.LargeStringArray.from_buffers(count, pa.py_buffer(offsets), pa.py_buffer(np.ascontiguousarray(text)))
    return pl.Series("event_id", array)
