"""Deltas: items that came after a bundle was made, ready to be served on top of it without training.

A delta is a closed directory, `<number>-<id>`: `delta.json` says which bundle it is for, which delta it stands
on and what its two files are; `items.parquet` has the catalogue's columns, `item_tables.safetensors` the rows
of the new items in the contract's tables, without row 0. The id is the sha256 of `delta.json`'s bytes, which
are canonical. New items follow the items that were there: the first has index `first_index`. Neighbours
are indices, too, and may point to any item up to the delta's own last.

A delta adds items and changes no facts of those before. Items that it names as neighbours get its items as neighbours
in turn (`mutual_neighbours`), or nobody would come to them from there. It knows neither signatures
(`workloads.bundle.signature`) nor how vectors are made (`workloads.delta`); `workloads.bundle.store.open_bundle`
puts a chain on top of its bundle.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import numpy as np

from workloads.bundle import manifest as m
from workloads.bundle.incoming import file_entry, incoming_directory, publish_directory
from workloads.bundle.tables import Array, item_tables_fault, open_tables, read_header
from workloads.bundle.verification import BundleFault, check_files, is_plain_file
from workloads.contract.events import ID_PATTERN
from workloads.contract.storage import Digest
from workloads.contract.tensors import IMAGE_DIM, PAD

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION: Final = 1
DELTA_MANIFEST: Final = "delta.json"
FILES: Final = frozenset({m.CATALOGUE, m.ITEM_TABLES_FILE})
NEW_NEIGHBOURS: Final = 10
"""Places of an item's neighbours that new items may take: the last ones of those learned from people."""
MANIFEST_MAX: Final = 1 << 16
"""Bytes; ours are below 1 KB."""


class DeltaFault(BundleFault):
    """A directory that is not a delta, or not one that fits here: which file, and why."""

    def __init__(self, delta: Path, file: str, reason: str) -> None:
        super().__init__(delta, file, reason)
        self.remedy = "fetch the delta again, or make it again for this bundle: python -m workloads.delta make"


class DeltaFacts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a delta stands."""

    bundle: Digest
    number: Annotated[int, msgspec.Meta(ge=1)]
    """1 is the first on its bundle."""
    previous: Digest | None
    """Id of the delta that it stands on; None for number 1."""
    first_index: Annotated[int, msgspec.Meta(ge=1)]
    """Item index of its first item."""
    created_ms: Annotated[int, msgspec.Meta(ge=0)]


class DeltaManifest(DeltaFacts, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`delta.json`."""

    schema_version: int = SCHEMA_VERSION
    items: Annotated[int, msgspec.Meta(ge=1)]
    """New items."""
    files: dict[str, m.FileEntry]


class _Version(msgspec.Struct, frozen=True):
    """The one field that can be read from a manifest of any schema."""

    schema_version: int


@dataclasses.dataclass(frozen=True)
class Delta:
    """An opened delta. Lists and tables have one row for each of its items, in the order of their indices."""

    path: Path
    id: str
    manifest: DeltaManifest
    tables: Mapping[str, Array]
    item_ids: list[str]

    def text(self, column: str) -> list[str]:
        """A text column of its items."""
        values: list[str] = _catalogue(self.path).column(column).to_pylist()
        return values

    def images(self) -> list[list[float]]:
        """Image features of its items, `IMAGE_DIM` numbers or none."""
        values: list[list[float]] = _catalogue(self.path).column("image").to_pylist()
        return values


def encode(manifest: DeltaManifest) -> bytes:
    """Canonical bytes: fields in their order, files by name, two-space indent, one newline at the end."""
    return msgspec.json.format(msgspec.json.encode(manifest, order="deterministic"), indent=2) + b"\n"


def decode(data: bytes) -> DeltaManifest:
    """The manifest in `data`. Raises ValueError: not JSON, an unknown schema version, a field at fault by its path."""
    try:
        version = msgspec.json.decode(data, type=_Version).schema_version
    except RecursionError:
        raise ValueError("is nested too deep to be read") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"schema version {version}; this release reads version {SCHEMA_VERSION}")
    manifest = msgspec.json.decode(data, type=DeltaManifest)
    if (manifest.number == 1) != (manifest.previous is None):
        raise ValueError("delta 1 stands on its bundle alone and every later one on a delta - at `$.previous`")
    if encode(manifest) != data:
        raise ValueError("is not in the one form that we write: order of fields, two spaces, a newline at the end")
    return manifest


def directory_name(number: int, identity: str) -> str:
    """`<number>-<delta id>`."""
    return f"{number}-{identity}"


def write_delta(
    deltas: Path, facts: DeltaFacts, catalogue: Mapping[str, Sequence[object]], tables: Mapping[str, Array]
) -> Path:
    """Write a delta and return its directory `<deltas>/<bundle id>/<number>-<delta id>`.

    `catalogue` has the columns of `catalogue_schema`, `tables` the contract's tables, one row per new item. It
    appears whole or not at all. Raises DeltaFault when what was given makes no delta.
    """
    import pyarrow as pa  # noqa: PLC0415 - late: nobody pays for Arrow who only reads manifests
    import pyarrow.parquet as pq  # noqa: PLC0415
    from safetensors.numpy import save_file  # noqa: PLC0415

    with incoming_directory(deltas / facts.bundle) as incoming:
        table = pa.table(dict(catalogue), schema=catalogue_schema())
        pq.write_table(table, incoming / m.CATALOGUE)
        save_file({name: np.ascontiguousarray(rows) for name, rows in tables.items()}, incoming / m.ITEM_TABLES_FILE)
        fields = {name: getattr(facts, name) for name in DeltaFacts.__struct_fields__}
        files = {name: file_entry(incoming / name) for name in sorted(FILES)}
        data = encode(DeltaManifest(**fields, items=table.num_rows, files=files))
        (incoming / DELTA_MANIFEST).write_bytes(data)
        check_delta(incoming)
        final = incoming.with_name(directory_name(facts.number, m.identity(data)))
        return publish_directory(incoming, final, verify_delta)


def verify_delta(delta: Path) -> DeltaManifest:
    """The manifest of a delta that is whole, unaltered and named as it should be. Raises DeltaFault."""
    delta = delta.resolve()
    manifest, identity = check_delta(delta)
    if delta.name != directory_name(manifest.number, identity):
        raise DeltaFault(
            delta,
            DELTA_MANIFEST,
            f"it is {directory_name(manifest.number, identity)}, which is not the directory's name",
        )
    return manifest


def check_delta(directory: Path) -> tuple[DeltaManifest, str]:
    """Manifest and id of a delta whatever its directory is called (one that is still on its way). Raises DeltaFault."""
    manifest, identity = read_delta_manifest(directory)
    try:
        check_files(directory, manifest.files, DELTA_MANIFEST)
    except BundleFault as fault:
        raise DeltaFault(directory, fault.file, fault.reason) from None
    _check_tables(directory, manifest)
    _check_catalogue(directory, manifest)
    return manifest, identity


def read_delta_manifest(directory: Path) -> tuple[DeltaManifest, str]:
    """The manifest and the id it stands for; files are not looked at. Raises DeltaFault."""
    if not directory.is_dir():
        raise DeltaFault(directory, "", "there is no such directory")
    path = directory / DELTA_MANIFEST
    if not is_plain_file(path):
        raise DeltaFault(directory, DELTA_MANIFEST, "is missing, or is not a plain file")
    if path.stat().st_size > MANIFEST_MAX:
        raise DeltaFault(directory, DELTA_MANIFEST, f"is larger than {MANIFEST_MAX} bytes")
    data = path.read_bytes()
    try:
        manifest = decode(data)
    except ValueError as error:
        raise DeltaFault(directory, DELTA_MANIFEST, str(error)) from None
    for name in manifest.files:
        if fault := m.path_fault(name):
            raise DeltaFault(directory, DELTA_MANIFEST, f"the path {name!r} {fault}")
    for name in sorted(FILES.symmetric_difference(manifest.files)):
        what = "every delta has this file, and the manifest does not list it" if name in FILES else "no delta has it"
        raise DeltaFault(directory, name, what)
    return manifest, m.identity(data)


def open_delta(delta: Path) -> Delta:
    """Verify a delta and open it: it is small, and read whole. Raises DeltaFault."""
    manifest = verify_delta(delta)
    delta = delta.resolve()
    return Delta(
        path=delta,
        id=delta.name.partition("-")[2],
        manifest=manifest,
        tables=open_tables(delta / m.ITEM_TABLES_FILE),
        item_ids=_catalogue(delta).column("item").to_pylist(),
    )


def mutual_neighbours(neighbours: Array, scores: Array, known: int) -> None:
    """Let items that new ones (indices beyond `known`) name as neighbours name them in turn, in place.

    Both are tables [N+1, NEIGHBOURS], best first. A pair has one score both ways; learned neighbours win ties. An
    item takes its best `NEW_NEIGHBOURS` at most, so that no flood of new items drives out what people taught.
    """
    new = np.repeat(np.arange(known + 1, len(neighbours), dtype=neighbours.dtype), neighbours.shape[1])
    named, score = neighbours[known + 1 :].ravel(), scores[known + 1 :].ravel()
    new, named, score = (values[(named != PAD) & (score > 0)] for values in (new, named, score))
    present = (neighbours[named] == new[:, None]).any(axis=1)
    new, named, score = new[~present], named[~present], score[~present]
    order = np.lexsort((new, -score, named))
    new, named, score = new[order], named[order], score[order]
    rows, starts, counts = np.unique(named, return_index=True, return_counts=True)
    place = np.arange(len(named)) - np.repeat(starts, counts)
    row = np.repeat(np.arange(len(rows)), counts)
    kept = place < NEW_NEIGHBOURS
    more = np.full((len(rows), NEW_NEIGHBOURS), PAD, dtype=neighbours.dtype)
    more_scores = np.full((len(rows), NEW_NEIGHBOURS), -1.0, dtype=scores.dtype)  # below PAD's 0: always cut off
    more[row[kept], place[kept]], more_scores[row[kept], place[kept]] = new[kept], score[kept]
    joined = np.concatenate([neighbours[rows], more], axis=1)
    joined_scores = np.concatenate([scores[rows], more_scores], axis=1)
    best = np.argsort(-joined_scores, axis=1, kind="stable")[:, : neighbours.shape[1]]
    neighbours[rows] = np.take_along_axis(joined, best, axis=1)
    scores[rows] = np.take_along_axis(joined_scores, best, axis=1)


def catalogue_schema() -> pa.Schema:
    """Columns and types of `items.parquet` in a delta; none is ever null but `price`."""
    import pyarrow as pa  # noqa: PLC0415 - as above

    return pa.schema(
        [
            pa.field("item", pa.string(), nullable=False),
            pa.field("title", pa.string(), nullable=False),
            pa.field("description", pa.string(), nullable=False),
            pa.field("category", pa.string(), nullable=False),
            pa.field("price", pa.float64()),
            pa.field("image", pa.list_(pa.float32()), nullable=False),
            pa.field("first_seen_ms", pa.int64(), nullable=False),
            pa.field("in_stock", pa.bool_(), nullable=False),
        ]
    )


def _catalogue(delta: Path) -> pa.Table:
    """Raises DeltaFault."""
    import pyarrow as pa  # noqa: PLC0415 - as above
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        return pq.read_table(delta / m.CATALOGUE, use_threads=False)
    except (pa.ArrowException, OSError) as error:
        raise DeltaFault(delta, m.CATALOGUE, f"is not a Parquet file: {error}") from None


def _check_catalogue(delta: Path, manifest: DeltaManifest) -> None:
    table = _catalogue(delta)
    if not table.schema.equals(catalogue_schema()):
        raise DeltaFault(delta, m.CATALOGUE, f"its columns are not a delta's: {table.schema.to_string()}")
    if table.num_rows != manifest.items:
        raise DeltaFault(delta, m.CATALOGUE, f"has {table.num_rows} rows; the manifest says {manifest.items} items")
    for field in table.schema:
        if not field.nullable and table.column(field.name).null_count:
            raise DeltaFault(delta, m.CATALOGUE, f"the column {field.name!r} has rows without a value")
    for length in {len(image) for image in table.column("image").to_pylist()} - {0, IMAGE_DIM}:
        raise DeltaFault(delta, m.CATALOGUE, f"an image has {length} numbers; it has {IMAGE_DIM} or none")
    seen: set[str] = set()
    for item in table.column("item").to_pylist():
        if re.fullmatch(ID_PATTERN, item) is None:
            raise DeltaFault(delta, m.CATALOGUE, f"{item[:128]!r} is no item id")
        if item in seen:
            raise DeltaFault(delta, m.CATALOGUE, f"the item {item!r} stands twice")
        seen.add(item)


def _check_tables(delta: Path, manifest: DeltaManifest) -> None:
    """Form and range of every number: what is served from must be safe to index with."""
    try:
        header = read_header(delta / m.ITEM_TABLES_FILE)
    except ValueError as error:
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, str(error)) from None
    if fault := item_tables_fault(header, manifest.items):
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, fault)
    tables = open_tables(delta / m.ITEM_TABLES_FILE)
    for name, table in tables.items():
        if not np.isfinite(table).all():
            raise DeltaFault(delta, m.ITEM_TABLES_FILE, f"the table {name!r} has numbers that are not finite")
        if name != "vectors" and table.min(initial=0) < 0:
            raise DeltaFault(delta, m.ITEM_TABLES_FILE, f"the table {name!r} has numbers below 0")
    own = manifest.first_index + np.arange(manifest.items)
    neighbours, scores = tables["neighbours"], tables["neighbour_scores"]
    if neighbours.max(initial=PAD) > own[-1]:
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, f"a neighbour has index {neighbours.max()}; the last is {own[-1]}")
    if (neighbours == own[:, None]).any():
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, "an item is its own neighbour")
    if scores[neighbours == PAD].any():
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, "a place without a neighbour has a score")
    if tables["in_stock"].max(initial=0) > 1:
        raise DeltaFault(delta, m.ITEM_TABLES_FILE, "the table 'in_stock' is of 0 and 1")
