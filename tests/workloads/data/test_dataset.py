"""A data set is whole or is not there, is named by its content, and holds no raw id."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import polars as pl
import pytest

from workloads.contract.events import EventType
from workloads.data.cleaning import RuleCount
from workloads.data.dataset import (
    Dataset,
    DatasetError,
    FaultSummary,
    content_digest,
    find_prepared,
    read_meta,
    write_dataset,
)
from workloads.data.events import EventLog
from workloads.data.simulator import Simulation, SimulatorConfig, simulate
from workloads.data.split import boundaries, compare


@pytest.fixture(scope="module")
def source() -> Simulation:
    made = simulate(SimulatorConfig(users=60, items=80, events=2_000, seed=5))
    frame = made.log.frame.with_columns(
        pl.when(pl.col("user").is_not_null())
        .then(pl.lit("p1-") + pl.col("user").str.slice(5).str.pad_start(32, "0"))
        .alias("user")
    )
    return Simulation(log=EventLog(frame), items=made.items, truth=made.truth)


def write(folder: Path, source: Simulation, *, input_digest: str = "in-1", log: EventLog | None = None) -> Dataset:
    cut = boundaries(source.log, validation_share=0.1, test_share=0.1, basis="rows")
    return write_dataset(
        folder,
        name="simulator",
        source="simulator",
        input_digest=input_digest,
        key_epoch=1,
        protocol="next_item",
        cut=cut,
        log=log or source.log,
        items=source.items,
        splits=compare(source.log, source.items, cut),
        rules=[RuleCount(rule="a rule", rows=3, effect="dropped")],
        faults=FaultSummary(rows_read=10, bad_rows=1, max_bad_share=0.05, totals=[]),
        parameters={"seed": 5},
    )


def test_what_is_written_is_read_back(tmp_path: Path, source: Simulation):
    made = write(tmp_path, source)
    read = Dataset.load(made.path)
    assert read.events.equals(source.log.frame)
    assert read.items.equals(source.items)
    assert read.meta == made.meta
    assert read.meta.events == source.log.counts()
    assert read.meta.train_end_ms < read.meta.validation_end_ms < read.meta.end_ms
    assert len(read.part("train")) + len(read.part("validation")) + len(read.part("test")) == len(source.log)
    assert read.splits.counts[0].part == "train"
    assert read.truth is None
    assert read.events["type"].dtype == pl.Enum([kind.value for kind in EventType])


def test_the_directory_is_named_by_the_content(tmp_path: Path, source: Simulation):
    made = write(tmp_path, source)
    assert made.path.name == f"simulator-{made.meta.digest[:12]}"
    assert write(tmp_path, source, input_digest="in-2").path == made.path
    assert read_meta(made.path).input_digest == "in-2"
    other = write(tmp_path, source, log=EventLog(source.log.frame.head(1900)))
    assert other.path != made.path


def test_the_digest_sees_every_column_and_no_file_format(source: Simulation):
    facts: dict[str, object] = {"name": "x"}
    digest = content_digest(source.log, source.items, facts)
    assert digest == content_digest(EventLog(source.log.frame.rechunk()), source.items.clone(), facts)
    assert digest != content_digest(source.log, source.items, {"name": "y"})
    frame = source.log.frame
    changes = [
        pl.col("rating") + 0.0 * pl.col("rating") if name == "rating" else pl.col(name).reverse()
        for name in frame.columns
        if name not in {"event_id", "timestamp_ms", "rating"}
    ]
    for change in changes:
        changed = frame.with_columns(change)
        if changed.equals(frame):
            continue
        forced = source.log.where(pl.lit(value=True))
        forced._frame = changed
        assert content_digest(forced, source.items, facts) != digest
    assert content_digest(source.log, source.items.with_columns(pl.col("image").reverse()), facts) != digest
    moved = source.items.with_columns(pl.col("title") + pl.col("description"), pl.lit("").alias("description"))
    assert content_digest(source.log, moved, facts) != digest


def test_a_raw_user_id_is_refused(tmp_path: Path, source: Simulation):
    raw = EventLog(source.log.frame.with_columns(pl.col("user").str.replace("^p1-0*", "user-")))
    with pytest.raises(DatasetError, match="carry a user that is no pseudonym"):
        write(tmp_path, source, log=raw)
    assert list(tmp_path.iterdir()) == []


def test_missing_cut_and_changed_files_are_each_named(tmp_path: Path, source: Simulation):
    path = write(tmp_path, source).path
    events = path / "events.parquet"
    content = events.read_bytes()
    events.write_bytes(content[:-1])
    with pytest.raises(DatasetError, match=r"events.parquet has \d+ bytes, not \d+; delete the directory"):
        Dataset.load(path)
    events.write_bytes(content[:-1] + b"?")
    with pytest.raises(DatasetError, match=r"events\.parquet was changed"):
        Dataset.load(path)
    events.unlink()
    with pytest.raises(DatasetError, match=r"events\.parquet is missing"):
        Dataset.load(path)
    with pytest.raises(DatasetError, match=r"no dataset\.json there"):
        Dataset.load(tmp_path)


def test_an_unreadable_and_a_future_description_are_refused(tmp_path: Path, source: Simulation):
    path = write(tmp_path, source).path
    meta = (path / "dataset.json").read_bytes()
    (path / "dataset.json").write_bytes(meta[:100])
    with pytest.raises(DatasetError, match="cannot be read"):
        read_meta(path)
    (path / "dataset.json").write_bytes(meta.replace(b'"schema_version": 1', b'"schema_version": 2', 1))
    with pytest.raises(DatasetError, match="schema version 2, not 1"):
        read_meta(path)


def test_prepared_data_is_found_by_its_input_unless_it_is_damaged(tmp_path: Path, source: Simulation):
    assert find_prepared(tmp_path / "none", "in-1") is None
    path = write(tmp_path, source).path
    assert find_prepared(tmp_path, "in-1") == path
    assert find_prepared(tmp_path, "in-2") is None
    items = path / "items.parquet"
    items.write_bytes(items.read_bytes()[:-1] + b"?")
    assert find_prepared(tmp_path, "in-1") is None
    assert write(tmp_path, source).path == path
    assert find_prepared(tmp_path, "in-1") == path


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, source: Simulation, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(msgspec.json, "format", full)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, source)
    assert list(tmp_path.iterdir()) == []


def test_drafts_of_killed_processes_are_swept_and_those_of_living_ones_are_not(tmp_path: Path, source: Simulation):
    dead = tmp_path / ".draft-4194999-abc"  # above the largest pid there can be
    living = tmp_path / f".draft-{os.getppid()}-abc"
    dead.mkdir()
    living.mkdir()
    write(tmp_path, source)
    assert not dead.exists()
    assert living.exists()
