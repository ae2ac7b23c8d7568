"""Files of strangers: what is readable is read, what is not is refused with its name, line and remedy."""

from __future__ import annotations

import gzip
from collections.abc import Mapping
from datetime import UTC, date, datetime
from pathlib import Path

import polars as pl
import pytest

from workloads.data.events import ROW, RowFaults
from workloads.data.reading import FIELD_MAX, SourceError, find_encoding, read_csv, read_parquet


def all_columns(header: list[str]) -> Mapping[str, str]:
    return {name: name for name in header}


def read(path: Path, faults: RowFaults | None = None) -> pl.DataFrame:
    return read_csv(path, names=all_columns, faults=faults or RowFaults(), note=lambda _: None)


def a_file(folder: Path, content: str | bytes, name: str = "log.csv") -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_rows_come_with_the_line_they_begin_on_even_after_a_field_with_line_breaks(tmp_path: Path):
    frame = read(a_file(tmp_path, 'a,b\n1,x\n"two\nlines",y\n\n3,\n'))
    assert frame[ROW].to_list() == [2, 3, 6]
    assert frame["a"].to_list() == ["1", "two\nlines", "3"]
    assert frame["b"].to_list() == ["x", "y", None]


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_delimiters_and_line_endings_are_found(tmp_path: Path, delimiter: str, ending: str):
    frame = read(a_file(tmp_path, ending.join([f"a{delimiter}b", f"1{delimiter}2", ""])))
    assert frame.select("a", "b").rows() == [("1", "2")]


def test_gzip_is_seen_by_content_and_not_by_name(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_bytes(gzip.compress(b"a,b\n1,2\n"))
    assert read(path)["b"].to_list() == ["2"]


def test_damaged_gzip_is_refused(tmp_path: Path):
    packed = gzip.compress(b"a,b\n" + b"1,2\n" * 50_000)
    with pytest.raises(SourceError, match="damaged gzip") as caught:
        read(a_file(tmp_path, packed[: len(packed) // 2]))
    assert "again" in caught.value.remedy


def test_ragged_lines_are_reported_and_the_others_kept(tmp_path: Path):
    faults = RowFaults()
    frame = read(a_file(tmp_path, "a,b\n1,2\n3\n4,5,6\n7,8\n"), faults)
    assert frame["a"].to_list() == ["1", "7"]
    assert (faults.rows_read, faults.bad_rows) == (4, 2)
    assert [(f.row, f.field, f.value) for f in faults.samples] == [(3, "line", "1 fields"), (4, "line", "3 fields")]


def test_a_quote_that_never_ends_costs_its_lines_and_not_the_file(tmp_path: Path):
    faults = RowFaults()
    swallowed = "3,filler\n" * (FIELD_MAX // 9 + 10)
    frame = read(a_file(tmp_path, f'a,b\n1,2\n"5,6\n{swallowed}7,8\n'), faults)
    assert frame["a"].to_list()[0] == "1"
    assert frame["a"].to_list()[-1] == "7"
    assert faults.bad_rows > 10_000
    assert faults.samples[0].row == 3
    assert "larger than field limit" in faults.samples[0].rule


@pytest.mark.parametrize(
    ("content", "encoding", "said"),
    [
        ("a,b\n1,é\n".encode(), "utf-8", None),
        ("a,b\n1,é\n".encode("utf-8-sig"), "utf-8-sig", None),
        ("a,b\n1,£\n".encode("cp1252"), "cp1252", "line 2 has the byte 0xa3"),
        ("a,b\n1,“x”\n".encode("cp1252"), "cp1252", "line 2 has the byte 0x93"),
        (b"a,b\n1,2\n3,\x81\xe9\n", "latin-1", "line 3 has the byte 0x81"),
        ("a,b\n1,é\n".encode("utf-16"), "utf-16", "byte order mark"),
    ],
)
def test_encodings_are_found_and_said(tmp_path: Path, content: bytes, encoding: str, said: str | None):
    path = a_file(tmp_path, content)
    found, note = find_encoding(path)
    assert found == encoding
    assert (note is None) if said is None else (said in (note or ""))
    assert read(path).columns == [ROW, "a", "b"]


def test_an_undecodable_byte_is_found_far_into_the_file_and_across_chunks(tmp_path: Path):
    head = "a,b\n" + "1,é\n" * 300_000
    path = a_file(tmp_path, head.encode() + b"1,\xa3\n")
    assert find_encoding(path) == ("cp1252", "read as cp1252: line 300002 has the byte 0xa3, which is not UTF-8")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PAR1" + bytes(100), "Parquet"),
        (b"PK\x03\x04" + bytes(100), "zip archive or an Excel workbook"),
        (b"\x28\xb5\x2f\xfd" + bytes(20), "zstd"),
        (b"SQLite format 3\x00", "SQLite"),
        (bytes(range(256)) * 10, "binary"),
        (b"\x7fELF" + b"\x01\x02\x03\x04" * 30, "binary"),
    ],
)
def test_what_is_not_text_is_refused_by_what_it_is(tmp_path: Path, content: bytes, said: str):
    with pytest.raises(SourceError, match=said) as caught:
        read(a_file(tmp_path, content))
    assert caught.value.remedy


def test_an_empty_file_a_missing_file_and_a_directory_are_refused(tmp_path: Path):
    with pytest.raises(SourceError, match="is empty"):
        read(a_file(tmp_path, b""))
    with pytest.raises(SourceError, match="no such file"):
        read(tmp_path / "none.csv")
    with pytest.raises(SourceError, match="is a directory"):
        read(tmp_path)


def test_a_header_alone_is_no_rows(tmp_path: Path):
    assert read(a_file(tmp_path, "a,b\n")).height == 0


def test_parquet_columns_of_any_single_type_become_text(tmp_path: Path):
    at = datetime(2026, 1, 5, 12, tzinfo=UTC)
    pl.DataFrame(
        {
            "whole": [1, None],
            "share": [0.5, None],
            "text": ["x", None],
            "zoned": [at, None],
            "naive": [at.replace(tzinfo=None), None],
            "day": [date(2026, 1, 5), None],
        }
    ).write_parquet(tmp_path / "log.parquet")
    faults = RowFaults()
    frame = read_parquet(tmp_path / "log.parquet", names=all_columns, faults=faults)
    noon = str(int(at.timestamp() * 1000))
    midnight = str(int(at.timestamp() * 1000) - 12 * 3_600_000)
    assert frame.row(0) == (1, "1", "0.5", "x", noon, noon, midnight)
    assert frame.row(1) == (2, *[None] * 6)
    assert faults.rows_read == 2


def test_nested_parquet_columns_and_broken_parquet_are_refused(tmp_path: Path):
    pl.DataFrame({"a": [[1, 2]]}).write_parquet(tmp_path / "log.parquet")
    with pytest.raises(SourceError, match="column 'a' holds"):
        read_parquet(tmp_path / "log.parquet", names=all_columns, faults=RowFaults())
    with pytest.raises(SourceError, match="not readable as Parquet"):
        read_parquet(a_file(tmp_path, b"PAR1 and then nothing", "b.parquet"), names=all_columns, faults=RowFaults())
    with pytest.raises(SourceError, match="no such file"):
        read_parquet(tmp_path / "none.parquet", names=all_columns, faults=RowFaults())
