"""Files of strangers, read with care: encodings, compression, ragged lines, Parquet of any column type.

Everything comes out as a frame of strings plus the line (or row) number each row came from; what a
column means is the adapters' business.
"""

from __future__ import annotations

import _csv  # where the reader's type is named
import codecs
import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

import polars as pl

from workloads.data.events import ROW, RowFaults

HEAD_BYTES: Final = 65_536
CHUNK_ROWS: Final = 50_000
FIELD_MAX: Final = 131_072
CONTROL_SHARE_MAX: Final = 0.01
"""More control characters than this in the first 64 KiB, and the file is not text."""

_BOMS: Final = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
_OTHER_FORMATS: Final = (
    (b"PAR1", "a Parquet file", "give it the ending .parquet"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook", "unpack it, or export the sheet as CSV"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook", "export the sheet as CSV"),
    (b"\x28\xb5\x2f\xfd", "a zstd file", "unpack it first"),
    (b"BZh", "a bzip2 file", "unpack it first"),
    (b"\xfd7zXZ", "an xz file", "unpack it first"),
    (b"SQLite format 3", "an SQLite database", "export the table as CSV or Parquet"),
)
_TEXT_CONTROLS: Final = frozenset(b"\t\n\r\x0c")


class SourceError(ValueError):
    """An input that cannot be used at all: the fault in one sentence, the remedy in another."""

    def __init__(self, fault: str, remedy: str) -> None:
        super().__init__(fault)
        self.fault = fault
        self.remedy = remedy


def file_digest(path: Path) -> str:
    """sha256 of a file's bytes. Raises SourceError when it cannot be read."""
    with _readable(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what the file system or gzip says into a SourceError."""
    try:
        yield
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file", "check the path that was given") from None
    except IsADirectoryError:
        raise SourceError(f"{path}: is a directory", "give the file inside it") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SourceError(f"{path}: is damaged gzip ({error})", "fetch or compress the file again") from None
    except OSError as error:
        raise SourceError(f"{path}: cannot be read ({error.strerror})", "check that the file may be read") from None


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if it is gzip, whatever its name says."""
    with _readable(path):
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        return gzip.open(path, "rb") if packed else path.open("rb")  # type: ignore[return-value]  # GzipFile is one


def find_encoding(path: Path) -> tuple[str, str | None]:
    """(encoding, note): the note says why it is not UTF-8, None if it is.

    Tries a byte order mark, UTF-8, Windows-1252, Latin-1, in this order, on the whole file. Raises
    SourceError when the file is not text.
    """
    with _readable(path), open_bytes(path) as file:
        head = file.read(HEAD_BYTES)
        for magic, what, remedy in _OTHER_FORMATS:
            if head.startswith(magic):
                raise SourceError(f"{path}: is {what}, not text", remedy)
        for mark, encoding in _BOMS:
            if head.startswith(mark):
                return encoding, None if encoding == "utf-8-sig" else f"read as {encoding}, as its byte order mark says"
        controls = sum(byte < 32 and byte not in _TEXT_CONTROLS for byte in head)
        if b"\x00" in head or controls > CONTROL_SHARE_MAX * max(1, len(head)):
            raise SourceError(
                f"{path}: is binary, not text", "give a CSV file in UTF-8, or a Parquet file ending in .parquet"
            )
        fault = _first_undecodable(file, head)
        if fault is None:
            return "utf-8", None
        line, byte = fault
        file.seek(0)
        windows = all(not chunk.translate(None, _CP1252_ASSIGNED) for chunk in iter(lambda: file.read(1 << 20), b""))
        encoding = "cp1252" if windows else "latin-1"
        return encoding, f"read as {encoding}: line {line} has the byte 0x{byte:02x}, which is not UTF-8"


_CP1252_ASSIGNED: Final = bytes(set(range(256)) - {0x81, 0x8D, 0x8F, 0x90, 0x9D})


def _first_undecodable(file: IO[bytes], head: bytes) -> tuple[int, int] | None:
    """(line, byte) of the first thing that is not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    chunk, line = head, 1
    while True:
        try:
            decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            seen: bytes = error.object
            return line + seen.count(b"\n", 0, error.start), seen[error.start]
        if not chunk:
            return None
        line += chunk.count(b"\n")
        chunk = file.read(1 << 20)


def read_csv(
    path: Path,
    *,
    names: Callable[[list[str]], Mapping[str, str]],
    faults: RowFaults,
    note: Callable[[str], None],
) -> pl.DataFrame:
    """Columns of a CSV file as strings, empty ones null, plus `ROW`, the line each row begins on.

    `names` gets the header and says which columns are wanted: our name -> the file's name; it raises
    SourceError for what is missing. Lines with another number of fields than the header, and quoted
    fields that never end, go to `faults` and count as bad rows.
    """
    encoding, remark = find_encoding(path)
    if remark:
        note(f"{path.name}: {remark}")
    with _readable(path), open_bytes(path) as raw, io.TextIOWrapper(raw, encoding=encoding, newline="") as text:
        first = text.readline()
        delimiter = max(",;\t|", key=first.count)
        text.seek(0)
        limit = csv.field_size_limit(FIELD_MAX)
        try:
            return _rows_of(csv.reader(text, delimiter=delimiter), path, names, faults)
        finally:
            csv.field_size_limit(limit)


def _rows_of(
    reader: _csv.Reader, path: Path, names: Callable[[list[str]], Mapping[str, str]], faults: RowFaults
) -> pl.DataFrame:
    try:
        header = [name.strip() for name in next(reader)]
    except StopIteration:
        raise SourceError(f"{path}: is empty", "give a file with a header line and at least one row") from None
    except csv.Error as error:
        raise SourceError(
            f"{path}: its header line cannot be read ({error})", "give a CSV file with a header line"
        ) from None
    wanted = names(header)
    places = [header.index(theirs) for theirs in wanted.values()]
    schema = {ROW: pl.Int64(), **{ours: pl.String() for ours in wanted}}
    chunks: list[pl.DataFrame] = []
    columns: list[list[object]] = [[] for _ in schema]
    start = reader.line_num + 1
    while True:
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            lines = reader.line_num - start + 1
            faults.rows_read += lines
            faults.bad_rows += lines
            faults.add("line", f"must be readable as CSV ({error})", [start], [None], count=1)
            start = reader.line_num + 1
            continue
        if row:
            faults.rows_read += 1
            if len(row) == len(header):
                columns[0].append(start)
                for column, place in zip(columns[1:], places, strict=True):
                    column.append(row[place].strip() or None)
            else:
                faults.bad_rows += 1
                rule = f"must have {len(header)} fields like the header"
                faults.add("line", rule, [start], [f"{len(row)} fields"], count=1)
            if len(columns[0]) == CHUNK_ROWS:
                chunks.append(pl.DataFrame(dict(zip(schema, columns, strict=True)), schema=schema))
                columns = [[] for _ in schema]
        start = reader.line_num + 1
    chunks.append(pl.DataFrame(dict(zip(schema, columns, strict=True)), schema=schema))
    return pl.concat(chunks)


def read_parquet(path: Path, *, names: Callable[[list[str]], Mapping[str, str]], faults: RowFaults) -> pl.DataFrame:
    """Columns of a Parquet file as strings, plus `ROW`, counted from 1. Moments become epoch milliseconds.

    Raises SourceError when the file is no Parquet, or a wanted column holds lists or structs.
    """
    with _readable(path):
        try:
            lazy = pl.scan_parquet(path, glob=False)
            schema = lazy.collect_schema()
            wanted = names(schema.names())
            nested = [theirs for theirs in wanted.values() if schema[theirs].is_nested()]
            if nested:
                raise SourceError(
                    f"{path}: column {nested[0]!r} holds {schema[nested[0]]}, not single values",
                    "unnest it, or map another column in its place",
                )
            frame = lazy.select(
                _as_text(theirs, schema[theirs]).alias(ours) for ours, theirs in wanted.items()
            ).collect()
        except (pl.exceptions.PolarsError, OSError) as error:
            if isinstance(error, FileNotFoundError):
                raise
            first = str(error).splitlines()[0][:200]
            raise SourceError(
                f"{path}: is not readable as Parquet ({first})", "write or fetch the file again"
            ) from None
    faults.rows_read += frame.height
    return frame.with_columns(pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(ROW)).select(ROW, *wanted)


def _as_text(name: str, dtype: pl.DataType) -> pl.Expr:
    column = pl.col(name)
    if isinstance(dtype, pl.Datetime):
        return column.dt.epoch("ms").cast(pl.String)
    if isinstance(dtype, pl.Date):
        return column.cast(pl.Datetime("ms")).dt.epoch("ms").cast(pl.String)
    if dtype == pl.Binary:
        return column.cast(pl.String, strict=False)
    return column.cast(pl.String)
