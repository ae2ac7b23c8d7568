"""Rows that keep every rule become items; the others are reported with row, field and rule."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads.data.events import RowFaults
from workloads.data.reading import SourceError
from workloads.delta.items import FIELDS, NewItem, read_items


def read(path: Path, *taken: str) -> tuple[list[NewItem], list[tuple[int, str, str]], list[str]]:
    """Items, faults as (row, field, rule), and notes."""
    faults, notes = RowFaults(), list[str]()
    items = read_items(path, taken, faults, notes.append)
    assert faults.bad_rows == len({fault.row for fault in faults.samples})
    return items, [(fault.row, fault.field, fault.rule) for fault in faults.samples], notes


def jsonl(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


MUG = {
    "item": "m-1",
    "title": "Blue mug",
    "description": "Half a litre",
    "category": "Kitchen",
    "price": 4.5,
    "image": [float(number) for number in range(16)],
    "in_stock": False,
}


def test_the_same_item_comes_out_of_each_kind_of_file(tmp_path: Path):
    wanted = [NewItem(**MUG)]
    assert read(jsonl(tmp_path / "new.jsonl", MUG))[0] == wanted
    pq.write_table(pa.Table.from_pylist([MUG]), tmp_path / "new.parquet")
    assert read(tmp_path / "new.parquet")[0] == wanted
    row = {**MUG, "image": json.dumps(MUG["image"]), "in_stock": "no"}
    text = ";".join(FIELDS) + "\n" + ";".join(str(row[field]) for field in FIELDS) + "\n"
    (tmp_path / "new.csv.gz").write_bytes(gzip.compress(text.encode("cp1252")))
    assert read(tmp_path / "new.csv.gz")[0] == wanted


def test_what_is_left_out_is_empty_unknown_and_in_stock(tmp_path: Path):
    [item], faults, _ = read(jsonl(tmp_path / "new.jsonl", {"item": 17, "title": " Mug "}))
    assert item == NewItem(item="17", title="Mug", description="", category="", price=None, image=[], in_stock=True)
    assert not faults


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("item", None, "1 to 128 characters"),
        ("item", "", "1 to 128 characters"),
        ("item", "a\nb", "1 to 128 characters"),
        ("item", "x" * 129, "1 to 128 characters"),
        ("item", True, "1 to 128 characters"),
        ("item", "taken", "must be new"),
        ("title", "", "must have a word"),
        ("title", "!?", "must have a word"),
        ("title", 5, "must be text"),
        ("title", "x" * 1001, "at most 1000 characters"),
        ("description", ["x"], "must be text"),
        ("category", "x" * 201, "at most 200 characters"),
        ("price", -1, "a number above 0"),
        ("price", 0, "a number above 0"),
        ("price", "NaN", "a number above 0"),
        ("price", "inf", "a number above 0"),
        ("price", "four", "a number above 0"),
        ("price", True, "a number above 0"),
        ("price", 10**400, "a number above 0"),
        ("image", [1.0] * 15, "a list of 16 numbers"),
        ("image", [1.0] * 15 + ["x"], "a list of 16 numbers"),
        ("image", "[1, 2", "a list of 16 numbers"),
        ("image", {"a": 1}, "a list of 16 numbers"),
        ("in_stock", "perhaps", "true or false"),
        ("in_stock", 2, "true or false"),
    ],
)
def test_a_broken_rule_is_reported_with_row_and_field_and_costs_its_neighbours_nothing(
    tmp_path: Path, field: str, value: object, rule: str
):
    rows = [MUG | {"item": "m-0"}, MUG | {field: value}, MUG | {"item": "m-2"}]
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items, faults, _ = read(path, "taken")
    assert [item.item for item in items] == ["m-0", "m-2"]
    [(row, found, said)] = faults
    assert (row, found) == (2, field)
    assert rule in said


def test_an_id_that_stands_twice_is_reported_where_it_stands_again(tmp_path: Path):
    items, faults, _ = read(jsonl(tmp_path / "new.jsonl", MUG, MUG))
    assert [item.item for item in items] == ["m-1"]
    assert faults == [(2, "item", "must stand once in the file")]


def test_a_row_that_breaks_two_rules_is_one_bad_row(tmp_path: Path):
    items, faults, _ = read(jsonl(tmp_path / "new.jsonl", MUG | {"title": "", "price": -1}))
    assert items == []
    assert {field for _, field, _ in faults} == {"title", "price"}


def test_a_line_that_is_no_object_and_a_ragged_row_are_reported_by_their_lines(tmp_path: Path):
    (tmp_path / "new.jsonl").write_text('{"item": "a", "title": "b"}\n\n[1]\n{"item"\n')
    items, faults, _ = read(tmp_path / "new.jsonl")
    assert len(items) == 1
    assert [(row, field) for row, field, _ in faults] == [(3, "line"), (4, "line")]
    (tmp_path / "new.csv").write_text("item,title\na,b\nc,d,e\n")
    items, faults, _ = read(tmp_path / "new.csv")
    assert [item.item for item in items] == ["a"]
    assert faults == [(3, "line", "must have 2 fields like the header")]


def test_columns_that_are_not_read_are_named(tmp_path: Path):
    _, _, notes = read(jsonl(tmp_path / "new.jsonl", MUG | {"prize": 3}))
    assert any("prize" in note for note in notes)
    (tmp_path / "new.csv").write_text("item,title,prize\na,b,3\n")
    assert any("prize" in note for note in read(tmp_path / "new.csv")[2])


@pytest.mark.parametrize(
    ("name", "data", "fault"),
    [
        ("new.xlsx", b"PK", "of no known kind"),
        ("new.csv", b"", "is empty"),
        ("new.csv", b"item,title\n", "has no rows"),
        ("new.jsonl", b"\n", "has no rows"),
        ("new.csv", b"id,name\na,b\n", "has no column 'item'"),
        ("new.parquet", b"PAR1", "is not readable as Parquet"),
        ("new.csv", b"PAR1", "is a Parquet file, not text"),
    ],
)
def test_a_file_that_cannot_be_used_says_why_and_what_to_do(tmp_path: Path, name: str, data: bytes, fault: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(SourceError, match=fault) as caught:
        read(tmp_path / name)
    assert caught.value.remedy


@pytest.mark.parametrize("name", ["gone.csv", "gone.jsonl", "gone.parquet"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, name: str):
    with pytest.raises(SourceError, match="no such file"):
        read(tmp_path / name)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=17) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=18,
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, _json)))
def test_whatever_a_row_holds_it_is_an_item_or_a_fault(tmp_path_factory: pytest.TempPathFactory, row: dict[str, Any]):
    path = tmp_path_factory.mktemp("rows") / "new.jsonl"
    path.write_text(json.dumps(row) + "\n")
    items, faults, _ = read(path)
    assert bool(items) != bool(faults)
