"""The lake as a source: what was loaded and what the intake took since, under pseudonyms already.

Events are those of one data set that was loaded and of the intake; the catalogue is that data set's. Events of the
intake alone bring a catalogue derived from them. An event that came in late is in the log where it was received: put
where it happened, it would be in histories, and train on them, that nobody could have known. Knows no key: users stay
as they are.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import polars as pl

from workloads.contract.http import PSEUDONYM_PATTERN
from workloads.data.adapters import derive_items
from workloads.data.cleaning import ITEM_SCHEMA, RuleCount
from workloads.data.dataset import DatasetMeta
from workloads.data.events import ROW, SCHEMA, EventLog, RowFaults, sift
from workloads.data.reading import SourceError
from workloads.data.source import Note, SourceData
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.lake.schema import INTAKE


def state(path: Path, origin: str) -> list[str]:
    """What tells one content of the lake from another: equal lists need no second preparation. Raises SourceError."""
    try:
        with Lake.open(path, create=False) as lake:
            return [_chosen(lake, origin), str(lake.snapshot_id)]
    except LakeError as error:
        raise SourceError(error.fault, error.remedy) from error


def load_lake(path: Path, origin: str, note: Note) -> SourceData:
    """Events of `origin` and of the intake, oldest first, with the catalogue of `origin`.

    Without a name it is the one data set that was loaded. Raises SourceError.
    """
    try:
        with Lake.open(path, create=False) as lake:
            return _load(lake, _chosen(lake, origin), note)
    except LakeError as error:
        raise SourceError(error.fault, error.remedy) from error


def _chosen(lake: Lake, origin: str) -> str:
    loaded = lake.origins()
    if origin:
        if origin != INTAKE:
            lake.origin_folder(origin)
        return origin
    if len(loaded) > 1:
        raise SourceError(
            f"the lake has several data sets: {', '.join(loaded)}", "name one of them, as in --source lake=NAME"
        )
    return next(iter(loaded), INTAKE)


def _load(lake: Lake, origin: str, note: Note) -> SourceData:
    table = lake.events(
        origins={origin, INTAKE}, columns=[*SCHEMA, "origin", "seq", "received_ms"], ordered=True
    ).read_all()
    frame = pl.from_arrow(table)
    if not isinstance(frame, pl.DataFrame) or not frame.height:
        raise SourceError(f"the lake has no events of {origin}", "load a data set or take in a spool first")
    of_intake = frame.filter(pl.col("origin") == INTAKE).height
    taken = frame.filter(pl.col("origin") == INTAKE).select(pl.col("seq").max().fill_null(0)).item()
    note(f"{frame.height} events from the lake, {of_intake} of them taken in since")
    faults = RowFaults(rows_read=frame.height)
    apart = frame.filter(pl.col("received_ms") != pl.col("timestamp_ms"))
    clocks = apart.select("event_id", pl.col("timestamp_ms").alias("happened_ms"), "received_ms").unique("event_id")
    late = apart.filter(pl.col("received_ms") > pl.col("timestamp_ms")).height
    frame = frame.with_columns(pl.max_horizontal("timestamp_ms", "received_ms").alias("timestamp_ms"))
    rows = frame.select(
        pl.int_range(pl.len()).alias(ROW), *(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())
    )
    # The same event under the data set's origin and the intake's is one: the earlier, whose clocks may differ.
    rows = rows.sort("timestamp_ms", maintain_order=True)
    twice = rows.height - rows["event_id"].n_unique()
    rows = rows.filter(pl.col("event_id").is_first_distinct())
    named = pl.col("user").is_null() | pl.col("user").str.contains(PSEUDONYM_PATTERN)
    if strangers := rows.filter(~named).height:
        raise SourceError(
            f"{strangers} events of the lake name their user by something else than a pseudonym",
            "take the data set out and load one that was prepared here",
        )
    log = EventLog.sorted(sift(rows, faults))
    rules = [
        RuleCount(rule="event of the data set and of the intake", rows=twice, effect="dropped"),
        RuleCount(rule="received after it happened: counts from then on", rows=late, effect="changed"),
    ]
    if origin == INTAKE:
        return SourceData(
            name="lake",
            source=f"lake {INTAKE}",
            log=log,
            items=derive_items(log, None),
            protocol="next_item",
            rules=rules,
            faults=faults,
            pseudonymous=True,
            clocks=clocks,
            spool_seq=taken,
        )
    folder = lake.origin_folder(origin)
    meta = msgspec.json.decode((folder / "dataset.json").read_bytes(), type=DatasetMeta)
    items = pl.read_parquet(folder / "items.parquet", glob=False).select(*ITEM_SCHEMA)
    return SourceData(
        name="lake",
        source=f"lake {origin}",
        log=log,
        items=items,
        protocol=meta.protocol,
        cut=None if of_intake else meta.boundaries,
        rules=rules,
        faults=faults,
        pseudonymous=True,
        clocks=clocks,
        spool_seq=taken,
    )
