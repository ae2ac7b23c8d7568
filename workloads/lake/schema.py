"""What a row of the lake is, and how other tables become such rows.

The columns are those of `contract.events.Event`, and four of the lake's own. The schema grows: a column that a newer
spool has is added, a type may widen; older files stay as they are. Knows no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import (
    BooleanType,
    DateType,
    DoubleType,
    FloatType,
    IcebergType,
    IntegerType,
    LongType,
    NestedField,
    StringType,
)

DAY_MS: Final = 86_400_000
INTAKE: Final = "intake"
"""Origin of events that came through the intake."""
PERSONAL: Final = ("user", "session", "query", "context", "request_id")
"""Columns of which Iceberg's metadata keeps counts only: a bound is a value, and would outlive an erasure."""

_FIELDS: Final[tuple[tuple[str, IcebergType, bool], ...]] = (
    ("event_id", StringType(), True),
    ("type", StringType(), True),
    ("timestamp_ms", LongType(), True),
    ("user", StringType(), False),
    ("item", StringType(), False),
    ("session", StringType(), False),
    ("query", StringType(), False),
    ("position", LongType(), False),
    ("quantity", LongType(), False),
    ("price", DoubleType(), False),
    ("rating", DoubleType(), False),
    ("context", StringType(), False),
    ("request_id", StringType(), False),
    ("schema_version", LongType(), False),
    ("received_ms", LongType(), False),
    ("seq", LongType(), False),
    ("origin", StringType(), True),
    ("day", DateType(), True),
)
SCHEMA: Final = Schema(
    *(NestedField(number, name, kind, required) for number, (name, kind, required) in enumerate(_FIELDS, 1))
)
"""`context` is a JSON object; `received_ms` is the intake's clock and `seq` its spool's number, both null for what was
loaded; `origin` is `intake` or a data set's name; `day` is the UTC day of `timestamp_ms`."""
PARTITIONS: Final = ("day", "type", "origin")
PARTITION_SPEC: Final = PartitionSpec(
    *(
        PartitionField(SCHEMA.find_field(name).field_id, 1000 + number, IdentityTransform(), name)
        for number, name in enumerate(PARTITIONS)
    )
)
PROPERTIES: Final[Mapping[str, str]] = {
    "format-version": "2",
    "write.parquet.compression-codec": "zstd",
    "commit.manifest-merge.enabled": "true",
    "commit.manifest.min-count-to-merge": "24",
    "commit.retry.num-retries": "0",  # the lock keeps writers apart: a conflict is a fault
    "write.metadata.previous-versions-max": "1",
    **{f"write.metadata.metrics.column.{name}": "counts" for name in PERSONAL},
}

_DUCKDB: Final[Mapping[type[IcebergType], str]] = {
    StringType: "VARCHAR",
    LongType: "BIGINT",
    IntegerType: "INTEGER",
    DoubleType: "DOUBLE",
    FloatType: "FLOAT",
    BooleanType: "BOOLEAN",
    DateType: "DATE",
}
_WIDER: Final = {(IntegerType, LongType), (FloatType, DoubleType)}
_SQLITE: Final = (("INT", LongType()), ("REAL", DoubleType()), ("FLOA", DoubleType()), ("DOUB", DoubleType()))


class SchemaError(ValueError):
    """A table that cannot become rows of the lake; the message names the column."""


def of_sqlite(declared: str) -> IcebergType:
    """The type of a column by SQLite's affinity rules (https://www.sqlite.org/datatype3.html#determination_of_column_affinity)."""
    return next((kind for part, kind in _SQLITE if part in declared.upper()), StringType())


def wanted(schema: Schema, extra: Mapping[str, IcebergType]) -> list[tuple[str, IcebergType]]:
    """Columns that `schema` lacks or has too narrow: of this code's schema, and of a spool's own columns."""
    changes = []
    for name, kind in {**extra, **{name: kind for name, kind, _ in _FIELDS}}.items():
        if name not in schema.column_names:
            changes.append((name, kind))
            continue
        present = schema.find_field(name).field_type
        if present != kind and (type(present), type(kind)) in _WIDER:
            changes.append((name, kind))
        elif present != kind and (type(kind), type(present)) not in _WIDER:
            raise SchemaError(f"column {name} is {present} in the lake and {kind} now: one of them must be renamed")
    return changes


def arrow_schema(schema: Schema) -> pa.Schema:
    """Iceberg's schema as Arrow's, with field ids."""
    return schema_to_pyarrow(schema, include_field_ids=True)


def conform(table: pa.Table, schema: Schema) -> pa.Table:
    """The rows under the lake's schema: columns by name, cast, null where the table has none.

    Raises SchemaError when a value does not fit or a required one is missing.
    """
    columns = []
    target = arrow_schema(schema)
    for field in target:
        if field.name not in table.column_names:
            column = pa.nulls(table.num_rows, field.type)
        else:
            try:
                column = table[field.name].cast(field.type)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise SchemaError(f"column {field.name} does not fit {field.type}: {error}") from error
        if not field.nullable and column.null_count:
            raise SchemaError(f"column {field.name} is required and missing in {column.null_count} rows")
        columns.append(column)
    return pa.table(columns, schema=target)


def with_day(table: pa.Table, origin: str) -> pa.Table:
    """Add `day` and `origin`."""
    days = pc.cast(pc.divide(pc.cast(table["timestamp_ms"], pa.int64()), DAY_MS), pa.int32()).cast(pa.date32())
    names = pa.repeat(pa.scalar(origin), table.num_rows)
    return table.append_column("day", days).append_column("origin", names)


def by_partition(table: pa.Table) -> Iterator[pa.Table]:
    """Pieces of one day, type and origin each; rows within in order of time."""
    ordered = table.sort_by([(name, "ascending") for name in (*PARTITIONS, "timestamp_ms", "event_id")])
    counts = ordered.group_by(list(PARTITIONS), use_threads=False).aggregate([([], "count_all")])
    start = 0
    for count in counts["count_all"].to_pylist():
        yield ordered.slice(start, count)
        start += count


def duckdb_source(schema: Schema, files: Iterable[str]) -> str:
    """DuckDB's FROM clause over Parquet files, columns found by field id: those a file lacks are null, types widen."""
    fields = ", ".join(
        f"{field.field_id}: {{'name': {quoted(field.name)}, 'type': '{_DUCKDB[type(field.field_type)]}', "
        "'default_value': NULL}"
        for field in schema.fields
    )
    listed = ", ".join(quoted(file) for file in files)
    if not listed:
        nothing = ", ".join(f'NULL::{_DUCKDB[type(field.field_type)]} AS "{field.name}"' for field in schema.fields)
        return f"(SELECT {nothing}, NULL::VARCHAR AS filename WHERE false)"
    return f"read_parquet([{listed}], schema=MAP{{{fields}}}, hive_partitioning=false, filename=true)"


def quoted(text: str) -> str:
    """An SQL literal."""
    return "'" + text.replace("'", "''") + "'"
