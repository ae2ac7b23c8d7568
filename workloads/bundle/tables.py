"""Reading safetensors as numpy arrays that share the page cache, and refusing malformed ones.

The format (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length,
a JSON header {name: {dtype, shape, data_offsets}}, then the bytes. Arrays are read-only maps of the
file: several processes that open one bundle hold its tables in memory once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np

from workloads.contract.tensors import ITEM_TABLES, NEIGHBOURS, VECTOR_DIM

HEADER_MAX: Final = 1 << 20
"""Bytes; ours are below 2 KB."""

DTYPES: Final[Mapping[str, str]] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "|i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "|u1",
    "BOOL": "|b1",
}

Array = np.ndarray[Any, np.dtype[Any]]
Entry = tuple[str, tuple[int, ...], int]
"""numpy dtype, shape, offset of the first byte in the file."""


def read_header(path: Path) -> dict[str, Entry]:
    """Where each tensor of a safetensors file lies.

    Raises ValueError: a header that is cut short or not what the format says, an unknown type, a
    range that does not fit its shape, ranges that overlap, leave holes or end beyond the file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > HEADER_MAX or 8 + length > size:
            raise ValueError("the safetensors header is cut short or too long")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_once)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ValueError("the safetensors header is not an object")
    header.pop("__metadata__", None)
    start = 8 + length
    spans = sorted((*_entry(name, value), name) for name, value in header.items())
    end, before = 0, "the header"
    for begin, stop, _, _, name in spans:
        if begin < end:
            raise ValueError(f"tensor {name!r} overlaps {before!r}: bytes {begin} to {min(end, stop)} belong to both")
        if begin > end:
            raise ValueError(f"{begin - end} bytes between {before!r} and {name!r} belong to no tensor")
        end, before = stop, name
    if start + end != size:
        raise ValueError(f"tensors end at byte {start + end}, the file at {size}")
    return {name: (dtype, shape, start + begin) for begin, _, dtype, shape, name in spans}


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if len(names) != len(set(names)):
        raise ValueError("a name stands twice in the safetensors header")
    return dict(pairs)


def _entry(name: str, value: object) -> tuple[int, int, str, tuple[int, ...]]:
    """(begin, end, dtype, shape) of one tensor, relative to the data."""
    match value:
        case {"dtype": str(code), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise ValueError(f"tensor {name!r}: the header wants dtype, shape and data_offsets")
    if code not in DTYPES:
        raise ValueError(f"tensor {name!r} has the unknown type {code!r}")
    if not all(type(axis) is int and axis >= 0 for axis in shape):
        raise ValueError(f"tensor {name!r} has a shape that is not made of whole numbers: {shape}")
    dtype = DTYPES[code]
    if not 0 <= begin <= end or end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
        raise ValueError(f"tensor {name!r}: bytes {begin} to {end} do not fit {code} {shape}")
    return begin, end, dtype, tuple(shape)


def open_tables(path: Path) -> dict[str, Array]:
    """Every tensor of a safetensors file as a read-only map of it. Raises ValueError as `read_header`."""
    return {
        name: np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=shape)
        if math.prod(shape)
        else np.zeros(shape, dtype)
        for name, (dtype, shape, offset) in read_header(path).items()
    }


def item_values_fault(tables: Mapping[str, Array], last: Mapping[str, int]) -> str | None:
    """Why these item tables are not safe to compute and to index with, or None.

    `last` is the greatest index that a table may hold, by name.
    """
    for name, table in tables.items():
        if table.dtype.kind == "f" and not np.isfinite(table).all():
            return f"the table {name!r} has numbers that are not finite"
    for name, most in last.items():
        if tables[name].min(initial=0) < 0:
            return f"the table {name!r} has numbers below 0"
        if (found := tables[name].max(initial=0)) > most:
            return f"the table {name!r} goes up to {found}; the last is {most}"
    return None


def item_tables_fault(header: Mapping[str, Entry], rows: int) -> str | None:
    """Why these are not the contract's item tables with `rows` rows, or None: N + 1 in a bundle, its own in a delta."""
    axes = {"N+1": rows, "VECTOR_DIM": VECTOR_DIM, "NEIGHBOURS": NEIGHBOURS}
    for name, (dtype, shape) in ITEM_TABLES.items():
        if name not in header:
            return f"the table {name!r} is missing"
        wanted = tuple(axes[axis] for axis in shape)
        found = header[name]
        if np.dtype(found[0]) != np.dtype(dtype) or found[1] != wanted:
            return f"the table {name!r} is {np.dtype(found[0]).name}{list(found[1])}, not {dtype}{list(wanted)}"
    unknown = sorted(set(header) - set(ITEM_TABLES))
    return f"the contract knows no table {unknown[0]!r}" if unknown else None
