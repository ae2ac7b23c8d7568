"""The split keeps the future out of training, and the report says when the parts are not alike."""

from __future__ import annotations

import itertools

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workloads.data.events import SCHEMA, EventLog
from workloads.data.simulator import Simulation
from workloads.data.split import (
    PARTS,
    THRESHOLDS,
    Boundaries,
    SplitError,
    SplitReport,
    SplitRow,
    boundaries,
    compare,
    jensen_shannon,
)

AT = 1_767_600_000_000


def a_log(times: list[int]) -> EventLog:
    count = len(times)
    columns = {
        "event_id": [f"019b8b7c-b201-7000-8000-{n:012x}" for n in range(count)],
        "type": ["view"] * count,
        "timestamp_ms": [AT + time for time in times],
        "user": ["ada"] * count,
        "item": ["mug"] * count,
    }
    frame = pl.DataFrame(columns).with_columns(
        pl.lit(None, dtype=dtype).alias(name) for name, dtype in SCHEMA.items() if name not in columns
    )
    return EventLog.sorted(frame.select(*SCHEMA).cast(pl.Schema(SCHEMA)))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 10_000), min_size=5, max_size=200),
    st.sampled_from(["rows", "period"]),
    st.floats(0.05, 0.3),
    st.floats(0.05, 0.3),
)
def test_parts_are_whole_disjoint_and_in_order_of_time_or_the_split_is_refused(
    times: list[int], basis: str, validation: float, test: float
):
    log = a_log(times)
    try:
        cut = boundaries(log, validation_share=validation, test_share=test, basis=basis)  # type: ignore[arg-type]  # sampled
    except (SplitError, ValueError):
        assert len(set(times)) < 50  # only short logs cannot be cut in three
        return
    parts = [cut.part(log, name).frame for name in PARTS]
    assert sum(part.height for part in parts) == len(log)
    assert all(part.height for part in parts)
    for earlier, later in itertools.pairwise(parts):
        assert earlier["timestamp_ms"].max() < later["timestamp_ms"].min()


def test_shares_are_of_rows_or_of_the_period():
    log = a_log([*range(0, 1000, 10), *range(1000, 2000, 100)])
    by_rows = boundaries(log, validation_share=0.1, test_share=0.1, basis="rows")
    assert [len(by_rows.part(log, name)) for name in PARTS] == [88, 11, 11]
    by_period = boundaries(log, validation_share=0.1, test_share=0.1, basis="period")
    assert by_period.train_end_ms == AT + 1521


def test_a_log_too_short_to_split_is_refused_with_the_sizes():
    with pytest.raises(SplitError, match="no events"):
        boundaries(a_log([]), validation_share=0.1, test_share=0.1, basis="rows")
    with pytest.raises(SplitError, match="test events; give a log that covers a longer time"):
        boundaries(a_log([0] * 50 + [1]), validation_share=0.1, test_share=0.1, basis="rows")


def test_boundaries_must_rise():
    with pytest.raises(ValueError, match="must rise"):
        Boundaries(start_ms=0, train_end_ms=5, validation_end_ms=5, end_ms=6)


def test_divergence_is_nothing_between_equals_and_one_bit_between_strangers():
    p = np.array([0.2, 0.3, 0.5])
    assert jensen_shannon(p, p * 7) == pytest.approx(0.0, abs=1e-12)
    assert jensen_shannon(np.array([1.0, 0.0]), np.array([0.0, 1.0])) == 1.0
    expected = 0.5 * (0.5 * np.log2(0.5 / 0.7) + 0.5 * np.log2(0.5 / 0.3)) + 0.5 * (
        0.9 * np.log2(0.9 / 0.7) + 0.1 * np.log2(0.1 / 0.3)
    )
    assert jensen_shannon(np.array([5.0, 5.0]), np.array([9.0, 1.0])) == pytest.approx(expected)


def row(report: SplitReport, measure: str, part: str = "test") -> SplitRow:
    (found,) = [r for r in report.rows if (r.measure, r.part) == (measure, part)]
    return found


def test_parts_of_one_process_agree_in_every_measure(simulation: Simulation):
    cut = boundaries(simulation.log, validation_share=0.12, test_share=0.12, basis="rows")
    report = compare(simulation.log, simulation.items, cut)
    assert {r.measure for r in report.rows} == {*THRESHOLDS, "events of new users", "events on new items"}
    for measure in ("event type", "hour of day", "category", "price", "list position"):
        assert row(report, measure).verdict == "agrees", measure
    assert sum(part.events for part in report.counts) == len(simulation.log)
    assert sum(row(report, "event type").train.values()) == pytest.approx(1.0, abs=1e-3)


def test_a_test_period_at_another_hour_with_new_people_is_said(simulation: Simulation):
    cut = boundaries(simulation.log, validation_share=0.12, test_share=0.12, basis="rows")
    night = pl.col("timestamp_ms") - pl.col("timestamp_ms") % 3_600_000
    moved = simulation.log.frame.with_columns(
        pl.when(pl.col("timestamp_ms") >= cut.validation_end_ms).then(night - night % 86_400_000 + 86_400_000 * 30)
        .otherwise(pl.col("timestamp_ms")).alias("timestamp_ms"),
        pl.when(pl.col("timestamp_ms") >= cut.validation_end_ms).then(pl.lit("new-") + pl.col("user"))
        .otherwise(pl.col("user")).alias("user"),
    )  # fmt: skip
    log = EventLog.sorted(moved)
    end = int(log.frame["timestamp_ms"][-1]) + 1
    late = Boundaries(
        start_ms=cut.start_ms, train_end_ms=cut.train_end_ms, validation_end_ms=cut.validation_end_ms, end_ms=end
    )
    report = compare(log, simulation.items, late)
    assert row(report, "hour of day").verdict == "differs"
    assert row(report, "events of new users").value == 1.0
    assert row(report, "events of new users").verdict == "differs"
    assert any(said.startswith("test: hour of day differs from train") for said in report.statements)
    assert row(report, "hour of day", "validation").verdict == "agrees"


def test_what_a_log_does_not_hold_is_not_measured_rather_than_equal():
    log = a_log(list(range(100)))
    items = pl.DataFrame({"item": ["mug"], "category": [""], "price": [None]}, schema_overrides={"price": pl.Float64})
    report = compare(log, items, boundaries(log, validation_share=0.1, test_share=0.1, basis="rows"))
    for measure in ("category", "price", "list position"):
        assert row(report, measure).verdict == "not measured"
    assert row(report, "event type").verdict == "agrees"
