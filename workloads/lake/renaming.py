"""Other names for people in the lake: every file that has an old one is written anew, in one commit.

For a change of the pseudonym key. As after an erasure, no older snapshot stays and no file of one. Who gets which name
is the caller's.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.manifest import DataFile

from workloads.lake.lake import _NAME, Lake, _grouped, _tables
from workloads.telemetry.progress import Progress

_COLUMNS = ("user", "session", "context")


def rename(lake: Lake, change: Callable[[str], str], progress: Progress | None = None) -> int:
    """Give every pseudonym and session name in the lake its `change`; the number of files written anew.

    A call after a crash does what was left. Raises as `Lake` does.
    """
    cached: dict[str, str] = {}

    def of(found: re.Match[str]) -> str:
        name = found.group()
        if name not in cached:
            cached[name] = change(name)
        return cached[name]

    def renamed(text: str) -> str:
        return _NAME.sub(of, text)

    with lake._writing() as table:
        files = lake._manifests.files(table)
        old, made = [], list[DataFile]()
        for number, file in enumerate(files):
            if any(_has_other(piece, renamed) for piece in _tables([file], table.schema())):
                pieces = (_with(piece, renamed) for piece in _tables([file], table.schema()))
                made.append(lake._write_file(table, _grouped(pieces)))
                old.append(file)
            if progress is not None:
                progress.step("lake", number + 1, len(files), "files")
        if old:
            lake._replace(table, old, made, forget=True)
        lake._tidy(lake._table(), 0.0)
    return len(made)


def _distinct(column: pa.ChunkedArray) -> Iterator[str]:
    yield from (text for text in pc.unique(column).to_pylist() if text is not None)


def _has_other(piece: pa.Table, renamed: Callable[[str], str]) -> bool:
    return any(renamed(text) != text for name in _COLUMNS for text in _distinct(piece[name]))


def _with(piece: pa.Table, renamed: Callable[[str], str]) -> pa.Table:
    for name in _COLUMNS:
        column = piece[name]
        coded = pc.dictionary_encode(column.combine_chunks())
        if isinstance(coded, pa.ChunkedArray):
            coded = coded.combine_chunks()
        texts = [None if text is None else renamed(text) for text in coded.dictionary.to_pylist()]
        place = piece.schema.get_field_index(name)
        values = pa.array(texts, column.type).take(coded.indices)
        piece = piece.set_column(place, piece.schema.field(place), values)
    return piece
