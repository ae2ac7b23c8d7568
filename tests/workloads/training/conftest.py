"""A small shop that several training tests share."""

from __future__ import annotations

import msgspec
import polars as pl
import pytest

from workloads.data.dataset import Dataset, FaultSummary, write_dataset
from workloads.data.events import EventLog
from workloads.data.simulator import SimulatorConfig, simulate
from workloads.data.split import boundaries, compare
from workloads.training.job import TrainingConfig


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """12,000 events of 250 people on 150 items, with pseudonyms, as a prepared data set."""
    made = simulate(SimulatorConfig(users=250, items=150, events=12_000, seed=3))
    frame = made.log.frame.with_columns(
        pl.when(pl.col("user").is_not_null())
        .then(pl.lit("p1-") + pl.col("user").str.slice(5).str.pad_start(32, "0"))
        .alias("user")
    )
    log = EventLog(frame)
    cut = boundaries(log, validation_share=0.1, test_share=0.1, basis="rows")
    return write_dataset(
        tmp_path_factory.mktemp("datasets"),
        name="simulator",
        source="simulator",
        input_digest="in",
        key_epoch=1,
        protocol="next_item",
        cut=cut,
        log=log,
        items=made.items,
        splits=compare(log, made.items, cut),
        rules=[],
        faults=FaultSummary(rows_read=0, bad_rows=0, max_bad_share=0.05, totals=[]),
        parameters={},
    )


@pytest.fixture(scope="session")
def quick() -> TrainingConfig:
    """Seconds of training."""
    replace = msgspec.structs.replace
    config = TrainingConfig(threads=1).small()
    return replace(
        config,
        half_lives_days=(60.0,),
        towers=replace(config.towers, rounds=2, refit_rounds=1, batch=32, uniform=32, query_batch=32, requests=2_000),
        ranker=replace(config.ranker, epochs=2, lists=150, shown_lists=60, validation_lists=60, batch=512),
        student=replace(config.student, epochs=3),
        choice_requests=30,
        test_requests=80,
        test_queries=40,
    )
