"""New items as a shop hands them over: a CSV, JSON Lines or Parquet file to rows that a delta may hold.

A row either keeps every rule or is reported with its number, the field and the rule; nothing is guessed and
nothing is left out in silence. It knows which item ids are taken, and nothing else of a bundle.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from workloads.contract.events import ID_PATTERN
from workloads.contract.tensors import IMAGE_DIM
from workloads.data.events import ROW, RowFaults
from workloads.data.reading import SourceError, open_bytes, read_csv

FIELDS: Final = ("item", "title", "description", "category", "price", "image", "in_stock")
REQUIRED: Final = ("item", "title")
TEXT_MAX: Final[Mapping[str, int]] = {"title": 1000, "description": 20_000, "category": 200}
"""Characters."""
PRICE_MAX: Final = 1e9
ROWS_MAX: Final = 100_000
"""More new items at once are a new catalogue: prepare and train."""

_TRUE: Final = frozenset({"true", "1", "yes", "y"})
_FALSE: Final = frozenset({"false", "0", "no", "n"})
_WORD: Final = re.compile(r"[^\W_]")


class NewItem(msgspec.Struct, frozen=True, kw_only=True):
    """One item as the catalogue takes it."""

    item: str
    title: str
    description: str
    category: str
    price: float | None
    """None where unknown."""
    image: list[float]
    """`IMAGE_DIM` numbers, or none."""
    in_stock: bool


class _RuleError(ValueError):
    """The rule that a value breaks."""


def read_items(path: Path, taken: Collection[str], faults: RowFaults, note: Callable[[str], None]) -> list[NewItem]:
    """The rows of a file that keep every rule, in order; the others go to `faults`.

    `taken` are the ids that are items already. Columns beyond `FIELDS` are said once and not read. Raises
    SourceError for a file that cannot be read at all, has no rows or too many.
    """
    suffix = Path(path.name.lower().removesuffix(".gz")).suffix
    readers = {
        ".csv": _csv_rows,
        ".tsv": _csv_rows,
        ".jsonl": _json_rows,
        ".ndjson": _json_rows,
        ".parquet": _parquet_rows,
    }
    if suffix not in readers:
        raise SourceError(f"{path}: is of no known kind", "give a .csv, .jsonl or .parquet file")
    found: list[NewItem] = []
    seen: dict[str, int] = {}
    for number, row in _READERS[suffix](path, faults, note):
        checked: dict[str, Any] = {}
        sound = True
        for field, check in _CHECKS.items():
            try:
                checked[field] = check(row.get(field))
            except _RuleError as broken:
                faults.add(field, str(broken), [number], [row.get(field)], count=1)
                sound = False
        item = checked.get("item")
        if item is not None and (rule := _id_fault(item, taken, seen)):
            faults.add("item", rule, [number], [item], count=1)
            sound = False
        if item is not None:
            seen.setdefault(item, number)
        if sound:
            found.append(NewItem(**checked))
        else:
            faults.bad_rows += 1
        if len(seen) > ROWS_MAX:
            raise SourceError(
                f"{path}: has more than {ROWS_MAX} items", "prepare the catalogue anew and train, or split the file"
            )
    if not faults.rows_read:
        raise SourceError(f"{path}: has no rows", "give one row for each new item")
    return found


def _id_fault(item: str, taken: Collection[str], seen: Mapping[str, int]) -> str | None:
    if item in taken:
        return "must be new: the bundle or one of its deltas has it"
    return "must stand once in the file" if item in seen else None


def _named(path: Path, columns: Collection[str], note: Callable[[str], None]) -> list[str]:
    """The fields that a file has. Raises SourceError when a required one is not among its columns."""
    for name in REQUIRED:
        if name not in columns:
            raise SourceError(f"{path}: has no column {name!r}", f"name its columns {', '.join(FIELDS)}")
    if unread := sorted(set(columns) - set(FIELDS)):
        note(f"{path.name}: not read: {', '.join(unread)}; an item is {', '.join(FIELDS)}")
    return [name for name in FIELDS if name in columns]


def _csv_rows(path: Path, faults: RowFaults, note: Callable[[str], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    frame = read_csv(
        path, names=lambda header: {name: name for name in _named(path, header, note)}, faults=faults, note=note
    )
    for row in frame.iter_rows(named=True):
        yield row[ROW], row


def _json_rows(path: Path, faults: RowFaults, note: Callable[[str], None]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    unread: set[str] = set()
    with open_bytes(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            faults.rows_read += 1
            try:
                row = msgspec.json.decode(line, type=dict[str, Any])
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                faults.bad_rows += 1
                faults.add("line", f"must be one JSON object ({error})", [number], [None], count=1)
                continue
            unread |= set(row) - set(FIELDS)
            yield number, row
    if unread:
        note(f"{path.name}: not read: {', '.join(sorted(unread))}; an item is {', '.join(FIELDS)}")


def _parquet_rows(
    path: Path, faults: RowFaults, note: Callable[[str], None]
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    import pyarrow as pa  # noqa: PLC0415 - only for this kind of file
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        with pq.ParquetFile(path) as file:
            names = _named(path, file.schema_arrow.names, note)
            number = 0
            for batch in file.iter_batches(columns=names, use_threads=False):
                for row in batch.to_pylist():
                    number += 1
                    faults.rows_read += 1
                    yield number, row
    except FileNotFoundError:
        raise SourceError(f"{path}: no such file", "check the path that was given") from None
    except (pa.ArrowException, OSError) as error:
        raise SourceError(f"{path}: is not readable as Parquet ({error})", "write or fetch the file again") from None


_READERS: Final = {
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".parquet": _parquet_rows,
}


def _item(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)  # shops count their articles
    if not isinstance(value, str) or re.fullmatch(ID_PATTERN, value) is None:
        raise _RuleError("must be 1 to 128 characters, none of them a control character")
    return value


def _title(value: object) -> str:
    text = _text("title", value)
    if not _WORD.search(text):
        raise _RuleError("must have a word: what places and finds the item")
    return text


def _text(field: str, value: object) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise _RuleError("must be text")
    if len(value) > TEXT_MAX[field]:
        raise _RuleError(f"must have at most {TEXT_MAX[field]} characters")
    return value.strip()


def _price(value: object) -> float | None:
    if value is None:
        return None
    price = _number(value)
    if price is None or not 0 < price <= PRICE_MAX:
        raise _RuleError(f"must be a number above 0, up to {PRICE_MAX:g}, or be left empty where it is not known")
    return price


def _image(value: object) -> list[float]:
    if isinstance(value, str):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError:
            value = "no list"
    if value is None or value == []:
        return []
    numbers = [_number(one) for one in value] if isinstance(value, list) else []
    kept = [one for one in numbers if one is not None and abs(one) < 1e6]
    if len(kept) != IMAGE_DIM or len(numbers) != IMAGE_DIM:
        raise _RuleError(f"must be a list of {IMAGE_DIM} numbers, or be left empty")
    return kept


def _in_stock(value: object) -> bool:
    if value is None:
        return True
    if isinstance(value, bool):
        return value
    text = str(value).strip().casefold()
    if text not in _TRUE | _FALSE:
        raise _RuleError("must be true or false, or be left empty for true")
    return text in _TRUE


def _number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


_CHECKS: Final[Mapping[str, Callable[[object], Any]]] = {
    "item": _item,
    "title": _title,
    "description": lambda value: _text("description", value),
    "category": lambda value: _text("category", value),
    "price": _price,
    "image": _image,
    "in_stock": _in_stock,
}
