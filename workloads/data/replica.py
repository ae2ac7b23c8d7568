"""The replica of a prepared data set: what of it may leave home, in a bucket, and the data set that is made of that.

`pack` puts both tables through the column policy and writes them as Parquet parts of bounded size, the same bytes for
the same input; `fetch` reads a manifest, gets and verifies its parts and writes a data set that `Dataset.load` takes.
The split report is made anew there, and what the simulator planted (`truth/`) never leaves. Parts lie under the digest
of their bytes, so that equal parts of two replicas are one object. Sending is `workloads.replication`'s; who decides
what may leave is `workloads.privacy.columns`.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workloads.contract.events import EventType
from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.contract.storage import Digest, replica_manifest_key, replica_object_key
from workloads.data.cleaning import ITEM_SCHEMA, CatalogueError, RuleCount
from workloads.data.dataset import (
    EVENTS,
    ITEMS,
    DatasetError,
    DatasetMeta,
    FaultSummary,
    Protocol,
    ReplicaOrigin,
    damaged,
    find_prepared,
    read_meta,
    write_dataset,
)
from workloads.data.events import SCHEMA, EventLog, EventLogError, uuid7_column
from workloads.data.split import Boundaries, compare
from workloads.objects.store import Damaged, NotFound, ObjectStore
from workloads.privacy.columns import Context, Policy
from workloads.telemetry.progress import Progress

SCHEMA_VERSION: Final = 1
TABLES: Final[Mapping[str, str]] = {"events": EVENTS, "items": ITEMS}
"""Table -> its file in a data set."""
PART_BYTES: Final = 64 << 20
"""A part is closed by the row group that fills it."""
ROWS_PER_GROUP: Final = 65_536
FETCH_RANGE: Final = 8 << 20
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$(?!\n)"
"""Names of data sets, which become keys and folder names."""

_FORMAT: Final = 1
"""Of the parts: a change here makes other bytes of the same input."""


class ReplicaError(Exception):
    """A replica that cannot be made, or read; the fault and the remedy."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(f"{fault}; {remedy}")
        self.fault = fault
        self.remedy = remedy


class ReplicaPart(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One packed Parquet file, under its digest."""

    sha256: Digest
    bytes: Annotated[int, msgspec.Meta(ge=1)]
    rows: Annotated[int, msgspec.Meta(ge=0)]


class ReplicaTable(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table in parts; their order is the order of its rows."""

    rows: Annotated[int, msgspec.Meta(ge=0)]
    kept_home: Annotated[int, msgspec.Meta(ge=0)]
    """Rows that the policy left too little of to be an event."""
    columns: list[str]
    parts: list[ReplicaPart]


class ReplicaManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`replica/manifests/<dataset>.json`: written last, so that what it names is there."""

    schema_version: int = SCHEMA_VERSION
    dataset: Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
    """The data set's directory at home."""
    digest: Digest
    """Of the data set's content at home."""
    name: str
    protocol: Protocol
    key_epoch: int
    boundaries: Boundaries
    """As exact as the policy lets times be."""
    policy: str
    policy_digest: Digest
    rules: list[RuleCount]
    faults: FaultSummary
    parameters: dict[str, int | float | str]
    """Of the simulator; empty for real data."""
    tables: dict[str, ReplicaTable]
    audit_head: str | None = None
    """Head of home's audit log with the line that tells of this export."""

    @property
    def parts(self) -> list[ReplicaPart]:
        """Every part, each once."""
        return list({part.sha256: part for table in self.tables.values() for part in table.parts}.values())


@dataclass(frozen=True)
class Packed:
    """A replica that is ready to be sent."""

    manifest: ReplicaManifest
    folder: Path
    """Holds `<sha256>.parquet` of each part."""

    def path(self, part: ReplicaPart) -> Path:
        """The file of a part."""
        return self.folder / f"{part.sha256}.parquet"


def checked_name(dataset: str) -> str:
    """The name, if a data set may have it. Raises ReplicaError."""
    if re.fullmatch(NAME_PATTERN, dataset) is None:
        raise ReplicaError(
            f"{dataset!r} is no data set's name", "give the name of its directory, such as simulator-a9c270b2fe7c"
        )
    return dataset


def encode(manifest: ReplicaManifest) -> bytes:
    """The manifest's bytes; the same for the same manifest."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=1) + b"\n"


# --- at home: pack --------------------------------------------------------------------------------


def pack(
    dataset: Path,
    folder: Path,
    progress: Progress,
    *,
    policy: Policy,
    policy_digest: str,
    context: Context,
    part_bytes: int = PART_BYTES,
) -> Packed:
    """Write what the policy lets out of a data set as parts into `folder`; memory is that of a part.

    Raises DatasetError for a damaged data set, PolicyError for a table that may not leave, and ReplicaError for a
    policy that leaves nothing to train on or lets a person's raw id out.
    """
    meta = read_meta(dataset)
    _must_be_whole(dataset, meta)
    total = sum(pq.read_metadata(dataset / file).num_rows for file in TABLES.values())
    done = 0

    def count(rows: int) -> None:
        nonlocal done
        done += rows
        progress.step("pack", done, total, "rows")

    tables = {}
    for name, file in TABLES.items():
        tables[name] = _packed(
            name,
            batches(dataset / file),
            policy=policy,
            context=context,
            writer=_PartWriter(folder, part_bytes),
            count=count,
        )
    manifest = ReplicaManifest(
        dataset=checked_name(dataset.name),
        digest=meta.digest,
        name=meta.name,
        protocol=meta.protocol,
        key_epoch=meta.key_epoch,
        boundaries=_coarse(meta.boundaries, policy, context),
        policy=Path(policy.source).name,
        policy_digest=policy_digest,
        rules=meta.rules,
        faults=meta.faults,
        parameters=meta.parameters if meta.source == "simulator" else {},
        tables=tables,
    )
    return Packed(manifest, folder)


def batches(path: Path) -> Iterator[pa.Table]:
    """A Parquet file as Arrow tables of `ROWS_PER_GROUP` rows."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_GROUP):
            yield pa.Table.from_batches([batch])


def _must_be_whole(dataset: Path, meta: DatasetMeta) -> None:
    faults = damaged(dataset, meta, digests=True)
    if faults:
        raise DatasetError(f"{dataset}: {'; '.join(faults)}; delete the directory and prepare the data again")


def _packed(
    name: str,
    given: Iterator[pa.Table],
    *,
    policy: Policy,
    context: Context,
    writer: _PartWriter,
    count: Callable[[int], None],
) -> ReplicaTable:
    parts: list[ReplicaPart] = []
    columns: list[str] = []
    rows = read = 0
    with writer:
        for table in given:
            allowed = policy.apply(name, table, context)
            if name == "events":
                allowed = _still_events(allowed, policy)
            columns = list(allowed.column_names)
            read += table.num_rows
            rows += allowed.num_rows
            if allowed.num_rows:
                parts += writer.add(allowed)
            count(table.num_rows)
        parts += writer.finish()
    return ReplicaTable(rows=rows, kept_home=read - rows, columns=columns, parts=parts)


def _still_events(table: pa.Table, policy: Policy) -> pa.Table:
    """Rows that are still events by `data.events.RULES`, when the policy has taken what it takes."""
    missing = [name for name in ("type", "timestamp_ms", "item") if name not in table.column_names]
    if missing:
        raise ReplicaError(
            f"{policy.source} keeps events' {', '.join(missing)} at home, and nothing can be trained without",
            "let it leave, generalised if need be",
        )
    for column, pattern in (("user", PSEUDONYM_PATTERN), ("session", SESSION_PATTERN)):
        if column in table.column_names:
            _no_raw_ids(table[column], column, pattern, policy)
    search = pc.equal(pc.cast(table["type"], pa.string()), EventType.SEARCH.value)
    rating = pc.equal(pc.cast(table["type"], pa.string()), EventType.RATING.value)
    keep = pc.and_(pc.is_valid(table["timestamp_ms"]), pc.or_(search, pc.is_valid(table["item"])))
    keep = pc.and_(keep, pc.or_(pc.invert(search), _there(table, "query")))
    keep = pc.and_(keep, pc.or_(pc.invert(rating), _there(table, "rating")))
    if "event_id" in table.column_names:
        keep = pc.and_(keep, pc.is_valid(table["event_id"]))
    return table.filter(keep)


def _there(table: pa.Table, column: str) -> pa.Array | pa.ChunkedArray:
    if column in table.column_names:
        return pc.is_valid(table[column])
    return pa.repeat(pa.scalar(value=False), table.num_rows)


def _no_raw_ids(column: pa.ChunkedArray, name: str, pattern: str, policy: Policy) -> None:
    """Whatever a policy says: nothing but a pseudonym leaves as a user or a session."""
    plain = pc.match_substring_regex(column, pattern.replace(r"$(?!\n)", "$"))
    raw = pc.sum(pc.invert(plain)).as_py() or 0
    if raw:
        raise ReplicaError(
            f"{raw} rows would leave with a {name} that is no pseudonym under {policy.source}",
            f'say {name} = {{ do = "pseudonymise", as = "{name}" }} under [tables.events]',
        )


def _coarse(exact: Boundaries, policy: Policy, context: Context) -> Boundaries:
    """The split's moments under the rule for times: an event on a boundary must not be told to the millisecond.

    Rounding times and boundaries by the same rule moves events of a boundary's own step into the later part, and none
    into an earlier one, so that nothing of the future gets into training.
    """
    moments = [exact.start_ms, exact.train_end_ms, exact.validation_end_ms, exact.end_ms - 1]
    table = pa.table({"timestamp_ms": pa.array(moments, pa.int64())})
    start, train, validation, last = policy.apply("events", table, context)["timestamp_ms"].to_pylist()
    try:
        return Boundaries(start_ms=start, train_end_ms=train, validation_end_ms=validation, end_ms=last + 1)
    except ValueError:
        raise ReplicaError(
            f"{policy.source} makes times so coarse that the split has an empty part", "choose a smaller to_ms"
        ) from None


class _PartWriter:
    """Row groups into files of bounded size, named by their digests."""

    def __init__(self, folder: Path, part_bytes: int) -> None:
        self._folder = folder
        self._part_bytes = part_bytes
        self._draft = folder / "part.draft"
        self._writer: pq.ParquetWriter | None = None
        self._rows = 0

    def __enter__(self) -> _PartWriter:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
        self._draft.unlink(missing_ok=True)

    def add(self, table: pa.Table) -> list[ReplicaPart]:
        """The next rows, a row group of their own; parts that are finished by them."""
        if self._writer is None:
            # No schema of Arrow's beside Parquet's: it would carry metadata that the policy has not seen.
            self._writer = pq.ParquetWriter(
                self._draft, table.schema, compression="zstd", compression_level=3, version="2.6", store_schema=False
            )
        self._writer.write_table(table, row_group_size=ROWS_PER_GROUP)
        self._rows += table.num_rows
        return self.finish() if self._draft.stat().st_size >= self._part_bytes else []

    def finish(self) -> list[ReplicaPart]:
        """Close the part that is being written, if any."""
        if self._writer is None:
            return []
        self._writer.close()
        self._writer = None
        with self._draft.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        part = ReplicaPart(sha256=digest, bytes=self._draft.stat().st_size, rows=self._rows)
        self._draft.rename(self._folder / f"{digest}.parquet")
        self._rows = 0
        return [part]


def packing_digest(meta: DatasetMeta, policy_digest: str, key_fingerprint: str, part_bytes: int) -> str:
    """sha256 of all that decides the parts' bytes: names a packing that may be used again."""
    facts = [_FORMAT, meta.digest, meta.files, policy_digest, key_fingerprint, part_bytes, ROWS_PER_GROUP]
    return hashlib.sha256(msgspec.json.encode([*facts, pa.__version__], order="sorted")).hexdigest()


# --- in the bucket --------------------------------------------------------------------------------


def read_manifest(store: ObjectStore, dataset: str) -> ReplicaManifest:
    """The manifest of a replicated data set. Raises ReplicaError, and ObjectsError."""
    return _read_manifest(store, dataset)[0]


def replicas(store: ObjectStore) -> list[str]:
    """Names of the data sets that have a replica."""
    prefix, suffix = replica_manifest_key("\0").split("\0")
    return [each.key.removeprefix(prefix).removesuffix(suffix) for each in store.list(prefix)]


def remove(store: ObjectStore, dataset: str, *, now_ms: int, unclaimed_ms: int = 24 * 3600 * 1000) -> int:
    """Take a replica out of the bucket, every version of it: parts that no other replica has, then the manifest.

    Parts that no manifest names go as well, when they are older than `unclaimed_ms`: younger ones may be those of a
    push that is not over. A killed removal is completed by the next. Returns the parts removed. Raises ReplicaError,
    and ObjectsError (Locked where Object Lock keeps one).
    """
    wanted: set[str] = set()
    mine: set[str] = set()
    for name in {*replicas(store), checked_name(dataset)}:
        with contextlib.suppress(NotFound):
            keys = {replica_object_key(part.sha256) for part in _decoded(store, name)[0].parts}
            if name == dataset:
                mine = keys
            else:
                wanted |= keys
    gone = sum(store.delete(key) for key in sorted(mine - wanted))
    store.delete(replica_manifest_key(dataset))
    for each in list(store.list(replica_object_key(""))):
        if each.key not in wanted:
            gone += store.delete(each.key, written_before_ms=now_ms - unclaimed_ms)
    return gone


def _read_manifest(store: ObjectStore, dataset: str) -> tuple[ReplicaManifest, str]:
    try:
        return _decoded(store, checked_name(dataset))
    except NotFound:
        raise ReplicaError(
            f"the bucket has no replica of {dataset}", "push it: `python -m workloads.replication push`"
        ) from None


def _decoded(store: ObjectStore, dataset: str) -> tuple[ReplicaManifest, str]:
    """The manifest and its digest. Raises ReplicaError, NotFound."""
    data = store.get(replica_manifest_key(dataset)).data
    try:
        manifest = msgspec.json.decode(data, type=ReplicaManifest)
    except (msgspec.DecodeError, ValueError) as error:
        raise ReplicaError(
            f"the manifest of {dataset} cannot be read ({error})", "remove the replica and push it again"
        ) from None
    if manifest.schema_version != SCHEMA_VERSION or manifest.dataset != dataset or set(manifest.tables) != set(TABLES):
        raise ReplicaError(
            f"the manifest of {dataset} is one of {manifest.dataset}, version {manifest.schema_version}, with "
            f"{', '.join(manifest.tables)}",
            "remove the replica and push it again",
        )
    return manifest, hashlib.sha256(data).hexdigest()


# --- in the cloud: fetch --------------------------------------------------------------------------


def fetch(store: ObjectStore, dataset: str, into: Path, progress: Progress, *, parallel: int = 4) -> Path:
    """Get a replica, verify every part and write it as a data set below `into`; returns its directory.

    Goes on from the bytes that an interrupted fetch has left. One that is there, whole and of this very manifest, is
    used as it is. Raises ReplicaError, and ObjectsError.
    """
    manifest, digest = _read_manifest(store, dataset)
    if (there := find_prepared(into, digest)) is not None:
        progress.note("fetch", f"{there.name} is here already, whole")
        return there
    draft = into / f".fetch-{dataset}"
    draft.mkdir(parents=True, exist_ok=True)
    wanted = {f"{part.sha256}.parquet" for part in manifest.parts}
    for file in draft.iterdir():
        if file.name not in wanted:
            file.unlink()
    _download(store, manifest.parts, draft, progress, parallel)
    progress.step("rebuild", 0, 1)
    made = _rebuilt(manifest, digest, draft, into)
    progress.step("rebuild", 1, 1)
    shutil.rmtree(draft)
    return made


def _download(store: ObjectStore, parts: Sequence[ReplicaPart], draft: Path, progress: Progress, parallel: int) -> None:
    total = sum(part.bytes for part in parts)
    sizes = dict.fromkeys((part.sha256 for part in parts), 0)
    pool = ThreadPoolExecutor(max_workers=parallel, thread_name_prefix="fetch")
    stopped = False

    def one(part: ReplicaPart) -> None:
        path = draft / f"{part.sha256}.parquet"
        for last in (False, True):
            with path.open("ab") as file:
                while (have := file.tell()) < part.bytes and not stopped:
                    wanted = min(FETCH_RANGE, part.bytes - have)
                    data = store.get_range(replica_object_key(part.sha256), have, wanted)
                    if len(data) != wanted:
                        break
                    file.write(data)
                    sizes[part.sha256] = have + wanted
                    progress.step("fetch", sum(sizes.values()), total, "bytes")
            if stopped:
                return
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found == part.sha256 and path.stat().st_size == part.bytes:
                sizes[part.sha256] = part.bytes
                progress.step("fetch", sum(sizes.values()), total, "bytes")
                return
            # What an earlier fetch left may be damaged here; what comes from the bucket twice is damaged there.
            path.unlink()
            if last:
                raise Damaged(replica_object_key(part.sha256), found, part.sha256)

    try:
        for future in [pool.submit(one, part) for part in parts]:
            future.result()
    finally:
        stopped = True
        pool.shutdown(cancel_futures=True)


def _rebuilt(manifest: ReplicaManifest, manifest_digest: str, folder: Path, into: Path) -> Path:
    try:
        log = EventLog.sorted(_events(manifest, _table(manifest, "events", folder)))
        items = _items(_table(manifest, "items", folder))
        made = write_dataset(
            into,
            name=manifest.name,
            source=f"replica of {manifest.dataset}",
            input_digest=manifest_digest,
            key_epoch=manifest.key_epoch,
            protocol=manifest.protocol,
            cut=manifest.boundaries,
            log=log,
            items=items,
            splits=compare(log, items, manifest.boundaries),
            rules=manifest.rules,
            faults=manifest.faults,
            parameters=manifest.parameters,
            replica=ReplicaOrigin(
                dataset=manifest.dataset,
                digest=manifest.digest,
                policy=manifest.policy,
                policy_digest=manifest.policy_digest,
            ),
        )
    except (EventLogError, CatalogueError, DatasetError, pl.exceptions.PolarsError) as error:
        raise ReplicaError(
            f"the replica of {manifest.dataset} makes no data set ({error})", "correct the column policy and push again"
        ) from None
    return made.path


def _table(manifest: ReplicaManifest, name: str, folder: Path) -> pl.DataFrame:
    table = manifest.tables[name]
    files = [folder / f"{part.sha256}.parquet" for part in table.parts]
    frame = pl.concat([pl.read_parquet(file) for file in files]) if files else pl.DataFrame()
    if frame.height != table.rows:
        raise ReplicaError(
            f"{name} of {manifest.dataset} has {frame.height} rows, not {table.rows} as its manifest says",
            "remove the replica and push it again",
        )
    return frame


def _events(manifest: ReplicaManifest, frame: pl.DataFrame) -> pl.DataFrame:
    """The log's columns: those that stayed at home are null, and ids that did are made up."""
    if "event_id" not in frame.columns:
        random = np.random.default_rng(int(manifest.digest[:16], 16)).integers(256, size=(frame.height, 10), dtype="u1")
        frame = frame.with_columns(uuid7_column(frame["timestamp_ms"].to_numpy(), random))
    return frame.select(
        pl.col(name).cast(dtype) if name in frame.columns else pl.lit(None, dtype).alias(name)
        for name, dtype in SCHEMA.items()
    )


_UNKNOWN: Final[Mapping[str, object]] = {"price": None, "image": [], "first_seen_ms": 0, "in_stock": True}
"""What stands in a catalogue for a column that stayed at home; texts are empty."""


def _items(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(
        pl.col(name).cast(dtype) if name in frame.columns else pl.lit(_UNKNOWN.get(name, ""), dtype).alias(name)
        for name, dtype in ITEM_SCHEMA.items()
    )
