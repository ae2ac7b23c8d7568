"""The lake: one Iceberg table of events, its files by day, type and origin, and everything that may happen to it.

The table's snapshot is the one truth: a file that no snapshot names is not there. How far the spool was taken and which
data sets were loaded are properties of the table, changed in the same commit as the files, so that a crash leaves both
or neither. A commit is one compare-and-swap of a row in `catalog.sqlite`; what it names was fsynced before. One
process writes at a time (`writer.lock`); readers need no lock: files leave the disk a grace period after the last
snapshot that named them was superseded, but for an erasure, which takes them at once.

    onprem/lake/catalog.sqlite                  where the newest metadata is (pyiceberg's SqlCatalog)
    onprem/lake/events/metadata/...             Iceberg's metadata
    onprem/lake/events/data/day=2026-03-01/type=view/origin=intake/<id>.parquet
    onprem/lake/origins/<data set>/             catalogue and description of a data set that was loaded

Users and sessions are pseudonyms here. Knows no vault and no key.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import itertools
import math
import os
import re
import time
import uuid
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, NoReturn

import duckdb
import msgspec
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.exceptions import NoSuchTableError
from pyiceberg.io.fileformat import FileFormatFactory
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.schema import Schema
from pyiceberg.table import Table, Transaction
from pyiceberg.typedef import Record
from pyiceberg.types import IcebergType
from sqlalchemy.exc import SQLAlchemyError

from workloads.contract.events import EventType
from workloads.lake import durable
from workloads.lake.faults import LakeChangedError, LakeError
from workloads.lake.schema import (
    INTAKE,
    PARTITION_SPEC,
    PARTITIONS,
    PROPERTIES,
    SCHEMA,
    SchemaError,
    by_partition,
    conform,
    duckdb_source,
    wanted,
    with_day,
)
from workloads.lake.snapshots import PLANNING_S, LakeFile, Manifests, expire, may_hold, mergeable, superseded
from workloads.lake.spool import Spool, SqliteSpool
from workloads.telemetry.progress import Progress

TABLE: Final = ("rankbridge", "events")
CHUNK: Final = 100_000
"""Rows that are in memory at once and committed together."""
TARGET_BYTES: Final = 64 * 1024 * 1024
"""Size of a file that compaction makes; one of three quarters of it is left as it is."""
MERGE_AT: Final = 16
"""So many files of like size in one partition are merged while events come in."""
TIDY_EVERY: Final = 16
"""Commits between two looks for files that nothing names."""
GRACE_S: Final = 600.0
"""How long a reader may keep reading a snapshot that is no longer the newest."""
WAIT_S: Final = 60.0
WRITERS: Final = 8
"""Files that are written and fsynced at once."""
ROW_GROUP: Final = 131_072
COMPACT_BYTES: Final = 256 * 1024 * 1024
"""Input of one compaction commit: writers of events wait no longer than this takes."""
MEMORY: Final = "1GB"
"""DuckDB's share; beyond it, it spills to the lake's own folder."""
ORIGIN_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}"

_NAMES: Final = "[ps][0-9]{1,3}-[0-9a-f]{32}"
"""Pseudonyms within a context: an id that a client put there became one as well."""
_NAME: Final = re.compile(_NAMES)

_SEQ: Final = "rankbridge.spool.seq"
_MARK: Final = "rankbridge.spool.mark"
_ORIGIN: Final = "rankbridge.origin."
_ITEMS: Final = "items.parquet"
_DATASET: Final = "dataset.json"


@dataclass(frozen=True)
class Ingested:
    """What one `ingest` did."""

    taken: int
    """Number of the newest row that is in the lake: the spool may be trimmed up to it. 0 for another, empty spool."""
    events: int = 0
    duplicates: int = 0
    commits: int = 0


class _Described(msgspec.Struct, frozen=True):
    """What the lake must know of a `dataset.json`."""

    input_digest: str | None = None


def _input_of(description: Path) -> str | None:
    try:
        return msgspec.json.decode(description.read_bytes(), type=_Described).input_digest
    except (OSError, msgspec.DecodeError):
        return None


@dataclass(frozen=True)
class Loaded:
    """What one `load` did; `events` is what the origin has in the lake."""

    origin: str
    events: int
    duplicates: int
    reused: bool


@dataclass(frozen=True)
class Compacted:
    """What one `compact` did."""

    before: int
    after: int
    bytes_rewritten: int


@dataclass(frozen=True)
class Erased:
    """What one `erase` did. Whom it erased is not said, and not kept."""

    events: int
    files_rewritten: int
    files_deleted: int


class _Origin(msgspec.Struct, frozen=True, kw_only=True):
    """What the table's properties say of a data set that was loaded."""

    digest: str
    events: int
    duplicates: int


class Lake:
    """The lake in one folder. Made by `open`; not for several threads at once.

    Every call looks at the newest snapshot. Raises LakeError, LakeBusyError (from `durable`), SpoolError and
    SchemaError; OSError when the disk fails. After any of them the lake is as it was before the last commit.
    """

    def __init__(self, path: Path, *, grace_s: float, wait_s: float, target_bytes: int) -> None:
        self.path = path.resolve()
        self._grace_s = grace_s
        self._wait_s = wait_s
        self._target = target_bytes
        self._commits = TIDY_EVERY  # what a crash left is looked for at the first commit
        self._catalog: SqlCatalog | None = None
        self._manifests = Manifests()

    # --- opening ----------------------------------------------------------------------------------

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        create: bool = True,
        grace_s: float = GRACE_S,
        wait_s: float = WAIT_S,
        target_bytes: int = TARGET_BYTES,
    ) -> Lake:
        """The lake in this folder, made if there is none. Raises LakeError when it may not be made, or was moved."""
        lake = cls(path, grace_s=grace_s, wait_s=wait_s, target_bytes=target_bytes)
        try:
            if not lake._catalog_file.is_file() or not lake._is_made():
                if not create:
                    raise LakeError(f"{path}: there is no lake", "load a data set or take in a spool first")
                lake._make()
            lake._table()
        except SQLAlchemyError as error:
            lake.close()
            raise LakeError(
                f"{lake._catalog_file}: cannot be read: {error}", "restore the folder from a copy"
            ) from error
        return lake

    @property
    def _catalog_file(self) -> Path:
        return self.path / "catalog.sqlite"

    @property
    def catalog(self) -> SqlCatalog:
        """PyIceberg's catalogue; the table is `rankbridge.events`."""
        if self._catalog is None:
            self._catalog = _connected(self._catalog_file, self.path)
        return self._catalog

    def _is_made(self) -> bool:
        try:
            return self.catalog.table_exists(TABLE)
        except FileNotFoundError:  # it names a table whose metadata is elsewhere; `_table` says so
            return True
        finally:
            self.close()

    def _make(self) -> None:
        with durable.locked(self.path / "writer.lock", self._wait_s):
            if not (self._catalog_file.is_file() and self._is_made()):
                self.catalogue_anew(self.path, SCHEMA, {}, [])

    @staticmethod
    def catalogue_anew(path: Path, schema: Schema, properties: Mapping[str, str], files: Sequence[DataFile]) -> None:
        """Write a catalogue over these files beside the present one and put it in its place. For the only writer."""
        draft = path / f"catalog.sqlite{durable.PART}"
        for litter in path.glob(f"{draft.name}*"):
            durable.remove(litter)
        catalog = _connected(draft, path)
        try:
            catalog.create_namespace(TABLE[0])
            table = catalog.create_table(
                TABLE,
                schema=schema,
                location=durable.location(path / "events"),
                partition_spec=PARTITION_SPEC,
                properties={**PROPERTIES, **properties},
            )
            if [(one.field_id, one.name) for one in table.schema().fields] != [
                (one.field_id, one.name) for one in schema.fields
            ]:
                raise LakeError(f"{path}: columns were numbered anew", "their files cannot be read so; report this")
            if files:
                with table.transaction() as transaction:
                    _append(transaction, files)
        finally:
            catalog.close()
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        durable.place(draft, path / "catalog.sqlite")

    def _table(self) -> Table:
        for attempt in range(3):
            try:
                table = self.catalog.load_table(TABLE)
                break
            except FileNotFoundError as error:
                # Superseded and swept between the look at the catalogue and at the file; or the folder was moved.
                if not Path(str(error.filename)).is_relative_to(self.path):
                    self._refuse_moved(str(error.filename))
                if attempt == 2:
                    raise LakeError(f"{error.filename} is missing", "restore the folder from a copy") from error
                time.sleep(0.05)
            except NoSuchTableError:
                raise LakeError(
                    f"{self.path}: the catalogue names no table", "restore the folder from a copy"
                ) from None
        if durable.path_of(table.location()) != self.path / "events":
            self._refuse_moved(table.location())
        return table

    def _refuse_moved(self, was: str) -> NoReturn:
        raise LakeError(
            f"{self.path}: the catalogue names {was}, which is another folder",
            "if the folder was moved or copied, run python -m workloads.lake relocate",
        ) from None

    def close(self) -> None:
        """Let go of the catalogue; the lake may be used again, which opens it anew."""
        if self._catalog is not None:
            self._catalog.close()
            self._catalog = None

    def __enter__(self) -> Lake:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- reading ----------------------------------------------------------------------------------

    @property
    def snapshot_id(self) -> int | None:
        """The newest snapshot, None before the first event."""
        found = self._table().current_snapshot()
        return None if found is None else found.snapshot_id

    @property
    def taken(self) -> int:
        """Number of the newest row of the spool that is in the lake, 0 before the first."""
        return int(self._table().properties.get(_SEQ, "0"))

    def origins(self) -> dict[str, int]:
        """Data sets that were loaded, with the events each had, in order of name."""
        return {
            key.removeprefix(_ORIGIN): msgspec.json.decode(value, type=_Origin).events
            for key, value in sorted(self._table().properties.items())
            if key.startswith(_ORIGIN)
        }

    def origin_folder(self, origin: str) -> Path:
        """Where a loaded data set's `items.parquet` and `dataset.json` are. Raises LakeError when it was not loaded."""
        if f"{_ORIGIN}{origin}" not in self._table().properties:
            there = ", ".join(self.origins()) or "none"
            raise LakeError(f"data set {origin!r} was not loaded into {self.path}", f"there are: {there}")
        return self.path / "origins" / origin

    def files(self) -> list[LakeFile]:
        """Files of the newest snapshot, by day, type and origin."""
        return self._newest()[1]

    def _newest(self) -> tuple[Table, list[LakeFile]]:
        """The table and its files. An erasure may take the metadata away in between: then there is newer."""
        for _ in range(3):
            table = self._table()
            try:
                return table, self._manifests.files(table)
            except FileNotFoundError:
                continue
        raise LakeChangedError(f"{self.path}: metadata of the newest snapshot is missing", "read again") from None

    def events(
        self,
        origins: Collection[str] | None = None,
        since_ms: int | None = None,
        until_ms: int | None = None,
        columns: Sequence[str] | None = None,
        *,
        ordered: bool = False,
        batch_rows: int = 65_536,
    ) -> pa.RecordBatchReader:
        """Events of the newest snapshot, in batches: since_ms <= timestamp_ms < until_ms, of these origins or of all.

        Not in any order unless `ordered` (by time, then id). Files that cannot hold such events are not opened.
        `read_all()` makes a table. Raises LakeError for an unknown column; the reader raises LakeChangedError where it
        outlives the grace period or an erasure.
        """
        table, files = self._newest()
        names = [field.name for field in table.schema().fields]
        if unknown := [name for name in columns or () if name not in names]:
            raise LakeError(f"the lake has no column {', '.join(unknown)}", f"there are: {', '.join(names)}")
        first = None if since_ms is None else _day(since_ms)
        last = None if until_ms is None else _day(until_ms - 1)
        chosen = [
            file
            for file in files
            if (origins is None or file.origin in origins)
            and (first is None or file.day >= first)
            and (last is None or file.day <= last)
        ]
        low, high = since_ms if since_ms is not None else -(2**62), until_ms if until_ms is not None else 2**62
        picked = ", ".join(f'"{name}"' for name in (columns or names))
        order = "ORDER BY timestamp_ms, event_id" if ordered else ""
        source = duckdb_source(table.schema(), [str(file.path) for file in chosen])
        question = f"SELECT {picked} FROM {source} WHERE timestamp_ms >= {low} AND timestamp_ms < {high} {order}"  # noqa: S608 - names and numbers are checked
        with _guarding([file.path for file in chosen]):
            reader = self._duckdb().sql(question).to_arrow_reader(batch_rows)
        return pa.RecordBatchReader.from_batches(reader.schema, _guarded(reader, [file.path for file in chosen]))

    def query(self, sql: str) -> duckdb.DuckDBPyRelation:
        """The answer to a question about the view `events`, of the newest snapshot, in DuckDB's SQL.

        Raises duckdb.Error for a bad question.
        """
        return self.connection().sql(sql)

    def connection(self) -> duckdb.DuckDBPyConnection:
        """DuckDB, in memory, with the view `events` of the newest snapshot. The caller closes it, or drops it."""
        table, files = self._newest()
        connection = self._duckdb()
        source = duckdb_source(table.schema(), [str(file.path) for file in files])
        connection.execute(f"CREATE VIEW events AS SELECT * EXCLUDE (filename) FROM {source}")  # noqa: S608 - paths are ours, quoted
        return connection

    def _duckdb(self) -> duckdb.DuckDBPyConnection:
        spill = self.path / "spill" / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        return duckdb.connect(
            config={
                "memory_limit": MEMORY,
                "temp_directory": str(spill),
                "preserve_insertion_order": False,
                "autoinstall_known_extensions": False,
                "autoload_known_extensions": False,
            }
        )

    # --- taking in --------------------------------------------------------------------------------

    def ingest(self, spool: Spool | Path, *, chunk: int = CHUNK, progress: Progress | None = None) -> Ingested:
        """Take what is new in the spool, each event once, and commit it chunk by chunk.

        An event whose id the lake has already (sent again after the spool was trimmed) is left out and counted.
        Where the spool may have given a number twice, all of it is read again. Small files are merged as they add up.
        """
        source = SqliteSpool(spool) if isinstance(spool, Path) else spool
        done = Ingested(taken=self.taken)
        begun: int | None = None
        while True:
            with self._writing() as table:
                own = begun is not None and table.properties.get(_SEQ) == str(done.taken)
                seq = done.taken if own else self._resume(table, source)
                begun = seq if begun is None else begun
                rows = source.after(seq, chunk)
                done = dataclasses.replace(done, taken=seq)  # of another spool that is still empty: nothing
                if rows.num_rows:
                    done = self._take(table, source, rows, done)
            if progress is not None and (ends := source.bounds()) is not None:
                total = max(1, ends[1] - begun)
                progress.step("ingest", min(done.taken - begun, total), total, "events", events=done.events)
            if rows.num_rows < chunk:
                return done

    def _resume(self, table: Table, spool: Spool) -> int:
        """The number after which rows are new; 0 where the spool may have given numbers a second time."""
        seq = int(table.properties.get(_SEQ, "0"))
        if seq == 0:
            return 0
        at, last = spool.event_at(seq), spool.last_given()
        same = at is not None and _mark(at) == table.properties.get(_MARK)
        if last is None:
            return seq if same else 0
        if same:
            return seq
        # A spool that was made anew, or put back from an older copy, has not come so far or has another event there:
        # or none, where the number went unused or its event was erased. Then only a spool that begins later is known to
        # be the same one, trimmed; any other is read again, which costs time and no event.
        ends = spool.bounds()
        return seq if at is None and last >= seq and (ends is None or ends[0] > seq) else 0

    def _take(self, table: Table, spool: Spool, rows: pa.Table, before: Ingested) -> Ingested:
        seq = int(rows["seq"][-1].as_py())
        mark = _mark(rows["event_id"][-1].as_py())
        extra = {name: kind for name, kind in spool.columns().items() if name in rows.column_names}
        table = _evolved(table, wanted(table.schema(), extra))
        fresh, duplicates = self._unknown(table, conform(with_day(rows, INTAKE), table.schema()), INTAKE)
        written = self._write(table, fresh)
        with table.transaction() as transaction:
            transaction.set_properties({_SEQ: str(seq), _MARK: mark})
            _append(transaction, written)
        self._merge_small(table)
        return Ingested(
            taken=seq,
            events=before.events + fresh.num_rows,
            duplicates=before.duplicates + duplicates,
            commits=before.commits + 1,
        )

    def load(self, dataset: Path, *, origin: str | None = None, progress: Progress | None = None) -> Loaded:
        """Load a prepared data set (a folder with events.parquet, items.parquet and dataset.json) as one origin.

        All of it or nothing; a second time changes nothing, and neither does a data set that was made anew of the same
        input without people who were erased since: the lake has forgotten them by itself. `origin` is the folder's name
        unless given. Raises LakeError when it is no data set, or another of that name was loaded.
        """
        name = origin if origin is not None else dataset.resolve().name
        if re.fullmatch(ORIGIN_PATTERN, name) is None or name == INTAKE:
            raise LakeError(f"{name!r} is no name of an origin", "use letters, digits, dots and hyphens; not 'intake'")
        source = dataset / "events.parquet"
        if missing := [file for file in ("events.parquet", _ITEMS, _DATASET) if not (dataset / file).is_file()]:
            raise LakeError(f"{dataset}: has no {', '.join(missing)}", "give the folder of a prepared data set")
        digest = _file_digest(source)
        with self._writing() as table:
            if origin is None and (earlier := self._of_same_input(table, dataset / _DATASET)) is not None:
                return earlier
            known = table.properties.get(f"{_ORIGIN}{name}")
            if known is not None:
                there = msgspec.json.decode(known, type=_Origin)
                if there.digest != digest:
                    raise LakeError(f"another data set was loaded as {name}", "load this one under another --origin")
                return Loaded(name, there.events, there.duplicates, reused=True)
            try:
                return self._load(table, dataset, name, digest, progress)
            except pa.ArrowException as error:
                raise LakeError(f"{source}: cannot be read as events: {error}", "prepare the data set again") from error

    def _of_same_input(self, table: Table, description: Path) -> Loaded | None:
        """The origin that was loaded from the same input, whatever its data set is called now."""
        made_of = _input_of(description)
        for key, value in table.properties.items():
            name = key.removeprefix(_ORIGIN)
            if key != name and made_of is not None and _input_of(self.path / "origins" / name / _DATASET) == made_of:
                there = msgspec.json.decode(value, type=_Origin)
                return Loaded(name, there.events, there.duplicates, reused=True)
        return None

    def _load(self, table: Table, dataset: Path, name: str, digest: str, progress: Progress | None) -> Loaded:
        table = _evolved(table, wanted(table.schema(), {}))
        written: list[DataFile] = []
        events = duplicates = 0
        with pq.ParquetFile(dataset / "events.parquet") as file:
            total = file.metadata.num_rows
            for batch in file.iter_batches(CHUNK):
                rows = conform(with_day(pa.Table.from_batches([batch]), name), table.schema())
                fresh, again = first_of_each(rows)
                fresh, known = self._without_known(table, fresh, written)
                written += self._write(table, fresh)
                events += fresh.num_rows
                duplicates += again + known
                if progress is not None:
                    progress.step("load", events + duplicates, total, "events")
        folder = self.path / "origins" / name
        for part in (_ITEMS, _DATASET):
            durable.write_whole(folder / part, (dataset / part).read_bytes())
        value = msgspec.json.encode(_Origin(digest=digest, events=events, duplicates=duplicates)).decode()
        with table.transaction() as transaction:
            transaction.set_properties({f"{_ORIGIN}{name}": value})
            _append(transaction, written)
        return Loaded(name, events, duplicates, reused=False)

    def _unknown(self, table: Table, rows: pa.Table, origin: str) -> tuple[pa.Table, int]:
        """Rows whose ids the origin does not have yet, and the number of the others."""
        fresh, repeated = first_of_each(rows)
        present = [file.entry for file in self._manifests.files(table) if file.origin == origin]
        fresh, known = self._without_known(table, fresh, present)
        return fresh, repeated + known

    def _without_known(self, table: Table, rows: pa.Table, files: Iterable[DataFile]) -> tuple[pa.Table, int]:
        """Rows that are not in `files`. Ids begin with time: only files whose range has one of these are opened."""
        if not rows.num_rows:
            return rows, 0
        number = SCHEMA.find_field("event_id").field_id
        ids = pc.sort_indices(rows["event_id"])
        ordered = rows["event_id"].take(ids).to_pylist()
        suspects = [str(durable.path_of(file.file_path)) for file in files if may_hold(file, number, ordered)]
        if not suspects:
            return rows, 0
        connection = self._duckdb()
        try:
            connection.register("arrived", rows.select(["event_id"]))
            source = duckdb_source(table.schema(), suspects)
            known: pa.Table = connection.sql(
                f"SELECT DISTINCT event_id FROM {source} WHERE event_id BETWEEN ? AND ? "  # noqa: S608 - paths are ours, quoted
                "AND event_id IN (SELECT event_id FROM arrived)",
                params=[ordered[0], ordered[-1]],
            ).to_arrow_table()
        finally:
            connection.close()
        if not known.num_rows:
            return rows, 0
        kept = rows.filter(pc.invert(pc.is_in(rows["event_id"], value_set=known["event_id"].combine_chunks())))
        return kept, rows.num_rows - kept.num_rows

    # --- writing ----------------------------------------------------------------------------------

    @contextmanager
    def _writing(self) -> Iterator[Table]:
        """The newest table, for the only writer. Now and then what nothing names is cleared away first."""
        with durable.locked(self.path / "writer.lock", self._wait_s):
            table = self._table()
            if self._commits >= TIDY_EVERY:
                self._tidy(table, self._grace_s)
                self._commits = 0
            self._commits += 1
            yield table

    def _write(self, table: Table, rows: pa.Table) -> list[DataFile]:
        """One durable file per partition of these rows; not yet part of any snapshot."""
        if not rows.num_rows:
            return []
        if unknown := set(pc.unique(rows["type"]).to_pylist()) - {kind.value for kind in EventType}:
            raise SchemaError(f"{len(unknown)} types of event are unknown to the contract")
        pieces = list(by_partition(rows))
        with ThreadPoolExecutor(min(WRITERS, len(pieces))) as writers:  # they wait for the disk side by side
            return list(writers.map(lambda piece: self._write_file(table, iter([piece])), pieces))

    def _write_file(self, table: Table, pieces: Iterator[pa.Table]) -> DataFile:
        """One durable file of rows of one partition, a row group per piece."""
        first = next(pieces)
        values = [first[name][0].as_py() for name in PARTITIONS]
        folder = self.path / "events" / "data"
        for name, value in zip(PARTITIONS, values, strict=True):
            folder /= f"{name}={value}"
        path = folder / f"{uuid.uuid4().hex}.parquet"
        output = table.io.new_output(durable.location(path))
        writer = FileFormatFactory.get(FileFormat.PARQUET).create_writer(output, table.schema(), table.properties)
        with writer:
            writer.write(first)
            for piece in pieces:
                writer.write(piece)
        return DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=durable.location(path),
            file_format=FileFormat.PARQUET,
            partition=Record((values[0] - datetime.date(1970, 1, 1)).days, *values[1:]),
            file_size_in_bytes=len(output),
            sort_order_id=None,
            spec_id=table.spec().spec_id,
            equality_ids=None,
            key_metadata=None,
            **writer.result().to_serialized_dict(),
        )

    # --- compaction -------------------------------------------------------------------------------

    def compact(self, *, progress: Progress | None = None) -> Compacted:
        """Merge files that are smaller than the target size, partition by partition, and clear away what is old.

        Readers of the snapshots before keep their files for the grace period.
        """
        before = after = rewritten = done = 0
        total = sum(len(group) for group in mergeable(self.files(), self._target))
        while True:
            with self._writing() as table:
                batch: list[list[LakeFile]] = []
                for group in mergeable(self._manifests.files(table), self._target):
                    if batch and sum(file.bytes for chosen in batch for file in chosen) > COMPACT_BYTES:
                        break
                    batch.append(group)
                before, after = before or len(self._manifests.files(table)), len(self._manifests.files(table))
                if not batch:
                    self._tidy(table, self._grace_s)
                    break
                self._merge(table, batch)
                rewritten += sum(file.bytes for chosen in batch for file in chosen)
                done += sum(len(chosen) for chosen in batch)
            if progress is not None:
                progress.step("compact", min(done, total), max(total, 1), "files")
        return Compacted(before, after, rewritten)

    def _merge_small(self, table: Table) -> None:
        """Merge files of like size where there are many: each event is rewritten once per size class."""
        classes: dict[tuple[object, ...], list[LakeFile]] = defaultdict(list)
        for file in self._manifests.files(table):
            if file.bytes < self._target * 3 // 4:
                size = int(math.log(max(file.bytes, 16_384) / 16_384, MERGE_AT))
                classes[file.day, file.type, file.origin, size].append(file)
        groups = [group for group in classes.values() if len(group) >= MERGE_AT]
        if groups:
            self._merge(table, groups)

    def _merge(self, table: Table, groups: Sequence[Sequence[LakeFile]]) -> None:
        schema = table.schema()
        made = [self._write_file(table, _grouped(_tables(group, schema))) for group in groups]
        self._replace(table, [file for group in groups for file in group], made)

    def _replace(self, table: Table, old: Iterable[LakeFile], new: Iterable[DataFile], *, forget: bool = False) -> None:
        """One commit that puts files in the place of others; with `forget` no older snapshot stays."""
        with table.transaction() as transaction:
            with transaction.update_snapshot().overwrite() as snapshot:
                for file in old:
                    snapshot.delete_data_file(file.entry)
                for made in new:
                    snapshot.append_data_file(made)
            if forget:
                expire(transaction, [snapshot.snapshot_id for snapshot in table.metadata.snapshots])

    # --- erasure ----------------------------------------------------------------------------------

    def erase(self, pseudonyms: Collection[str], *, progress: Progress | None = None) -> Erased:
        """Remove every event of these users (or sessions), and the bytes that held them, from the disk.

        Only the files that hold them are rewritten, in one commit that leaves no older snapshot; then every file that
        the new one does not name is deleted, without grace. A call after a crash does what was left. Take the person
        out of the spool first, or the next `ingest` brings them back.
        """
        if not pseudonyms:
            return Erased(0, 0, 0)
        with self._writing() as table:
            held = self._holding(table, pseudonyms)
            names = pa.array(sorted(pseudonyms), pa.string())
            made: list[DataFile] = []
            for number, file in enumerate(held):
                kept = _grouped(_without(_tables([file], table.schema()), names))
                if (first := next(kept, None)) is not None:
                    made.append(self._write_file(table, itertools.chain([first], kept)))
                if progress is not None:
                    progress.step("erase", number + 1, len(held), "files")
            if held:
                self._replace(table, held, made, forget=True)
            elif len(table.metadata.snapshots) > 1:
                self._forget(table)
            deleted = self._tidy(self._table(), 0.0)
        events = sum(file.rows for file in held) - sum(file.record_count for file in made)
        return Erased(events=events, files_rewritten=len(made), files_deleted=deleted)

    def _holding(self, table: Table, pseudonyms: Collection[str]) -> list[LakeFile]:
        files = self._manifests.files(table)
        if not files:
            return []
        connection = self._duckdb()
        try:
            connection.register("wanted", pa.table({"name": pa.array(sorted(pseudonyms), pa.string())}))
            source = duckdb_source(table.schema(), [str(file.path) for file in files])
            found = connection.execute(
                f'SELECT DISTINCT filename FROM {source} WHERE "user" IN (SELECT name FROM wanted) '  # noqa: S608 - paths are ours, quoted
                "OR session IN (SELECT name FROM wanted) OR list_has_any("
                f"regexp_extract_all(context, '{_NAMES}'), (SELECT list(name) FROM wanted))"
            ).fetchall()
        finally:
            connection.close()
        named = {Path(name) for (name,) in found}
        return [file for file in files if file.path in named]

    def _forget(self, table: Table) -> None:
        current = table.current_snapshot()
        with table.transaction() as transaction:
            expire(
                transaction,
                [one.snapshot_id for one in table.metadata.snapshots if current is None or one != current],
            )

    # --- clearing away ----------------------------------------------------------------------------

    def _tidy(self, table: Table, grace_s: float) -> int:
        """Expire snapshots superseded more than `grace_s` ago; delete what no snapshot names. For the only writer."""
        if old := superseded(table, time.time() * 1000, grace_s):
            with table.transaction() as transaction:
                expire(transaction, old)
        named = self._manifests.named(table)
        deleted = 0
        for folder, _, files in os.walk(self.path / "events"):
            for name in files:
                path = Path(folder) / name
                if path in named:
                    continue
                # A reader may be between the catalogue and the metadata file that it named a moment ago.
                if name.endswith(".metadata.json") and path.stat().st_mtime > time.time() - min(grace_s, PLANNING_S):
                    continue
                durable.remove(path)
                deleted += 1
            if not os.listdir(folder) and Path(folder).name.startswith("origin="):  # noqa: PTH208 - os.walk's companion
                os.removedirs(folder)
        for litter in self.path.glob(f"*{durable.PART}"):
            durable.remove(litter)
        for spill in (self.path / "spill").glob("*"):
            if not Path(f"/proc/{spill.name.partition('-')[0]}").exists() or spill.name.startswith(f"{os.getpid()}-"):
                durable.remove(spill)
        for origin in (self.path / "origins").glob("*"):
            if f"{_ORIGIN}{origin.name}" not in table.properties:
                durable.remove(origin)
        return deleted


def _connected(file: Path, lake: Path) -> SqlCatalog:
    return SqlCatalog(
        "lake",
        **{
            "uri": f"sqlite:///{file}",
            "warehouse": durable.location(lake),
            "py-io-impl": "workloads.lake.durable.DurableFileIO",
        },
    )


def _mark(event_id: str) -> str:
    """What is kept of the newest event's id, so that a number that was given twice is noticed."""
    return hashlib.sha256(event_id.encode()).hexdigest()[:16]


def _day(moment_ms: int) -> datetime.date:
    return datetime.datetime.fromtimestamp(moment_ms / 1000, tz=datetime.UTC).date()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _evolved(table: Table, changes: Sequence[tuple[str, IcebergType]]) -> Table:
    """The table with columns added or widened, in a commit of its own; older files stay as they are."""
    if changes:
        with table.update_schema() as update:
            for name, kind in changes:
                if name in table.schema().column_names:
                    update.update_column(name, field_type=kind)
                else:
                    update.add_column(name, kind)
    return table


def _append(transaction: Transaction, files: Sequence[DataFile]) -> None:
    if files:
        with transaction.update_snapshot().merge_append() as snapshot:
            for file in files:
                snapshot.append_data_file(file)


def first_of_each(rows: pa.Table) -> tuple[pa.Table, int]:
    """Rows without those that repeat an earlier one's id, and the number of these."""
    if len(pc.unique(rows["event_id"])) == rows.num_rows:
        return rows, 0
    places = pa.table({"event_id": rows["event_id"], "place": pa.array(range(rows.num_rows), pa.int64())})
    firsts = places.group_by("event_id").aggregate([("place", "min")])["place_min"]
    kept = rows.take(firsts.take(pc.sort_indices(firsts)))
    return kept, rows.num_rows - kept.num_rows


def _tables(files: Iterable[LakeFile], schema: Schema) -> Iterator[pa.Table]:
    """Rows of files one after the other under the schema of today, a batch at a time."""
    for file in files:
        with pq.ParquetFile(file.path) as reader:
            for batch in reader.iter_batches(ROW_GROUP):
                yield conform(pa.Table.from_batches([batch]), schema)


def _without(tables: Iterable[pa.Table], names: pa.Array) -> Iterator[pa.Table]:
    """Rows of anybody else."""
    for table in tables:
        held = pc.or_(pc.is_in(table["user"], value_set=names), pc.is_in(table["session"], value_set=names))
        if table["context"].null_count < table.num_rows:
            wanted_names = set(names.to_pylist())
            told = [
                text is not None and not wanted_names.isdisjoint(_NAME.findall(text))
                for text in table["context"].to_pylist()
            ]
            held = pc.or_(held, pa.array(told, pa.bool_()))
        yield table.filter(pc.invert(held))


def _grouped(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in pieces of about a row group, each in order of time; nothing where there are none."""
    waiting: list[pa.Table] = []
    for table in tables:
        if table.num_rows:
            waiting.append(table)
        if sum(one.num_rows for one in waiting) >= ROW_GROUP:
            yield _in_order(waiting)
            waiting = []
    if waiting:
        yield _in_order(waiting)


def _in_order(tables: Sequence[pa.Table]) -> pa.Table:
    return pa.concat_tables(tables).sort_by([("timestamp_ms", "ascending"), ("event_id", "ascending")])


def _guarded(reader: pa.RecordBatchReader, files: Sequence[Path]) -> Iterator[pa.RecordBatch]:
    """The same batches."""
    with _guarding(files):
        yield from reader


@contextmanager
def _guarding(files: Sequence[Path]) -> Iterator[None]:
    """A file that went away while it was read is named as what it is."""
    try:
        yield
    except (OSError, pa.ArrowException, duckdb.Error) as error:
        if all(file.exists() for file in files):
            raise
        raise LakeChangedError("files of the lake went away while they were read", "read again") from error
