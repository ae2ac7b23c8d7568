"""What an Iceberg table's snapshots name, and which of their files are worth merging. Reads metadata, changes nothing.

Manifests never change, so what was read of one is kept while the table still names it.
"""

from __future__ import annotations

import datetime
import itertools
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from pyiceberg.conversions import from_bytes
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile, ManifestFile
from pyiceberg.table import Table, Transaction
from pyiceberg.table.snapshots import Operation, Snapshot
from pyiceberg.table.update.snapshot import ExpireSnapshots
from pyiceberg.types import StringType

from workloads.lake.durable import path_of

PLANNING_S: Final = 30.0
"""Within this time a reader that looked at the catalogue has read the metadata that it was shown."""
_EPOCH: Final = datetime.date(1970, 1, 1)


@dataclass(frozen=True)
class LakeFile:
    """One Parquet file of a snapshot."""

    path: Path
    day: datetime.date
    type: str
    origin: str
    rows: int
    bytes: int
    entry: DataFile = field(repr=False, compare=False)


class Manifests:
    """Manifests of one table as they were read, each once."""

    def __init__(self) -> None:
        self._read: dict[str, list[LakeFile]] = {}

    def files(self, table: Table) -> list[LakeFile]:
        """Files of the newest snapshot, by day, type, origin and path. Raises FileNotFoundError where some went."""
        snapshot = table.current_snapshot()
        found = [] if snapshot is None else snapshot.manifests(table.io)
        files = [file for one in found for file in self._of(one, table.io)]
        if len(self._read) > 8 * len(found) + 64:  # a reader that lives long has seen many that are gone
            self._read = {one.manifest_path: self._read[one.manifest_path] for one in found}
        return sorted(files, key=lambda file: (file.day, file.type, file.origin, file.path))

    def named(self, table: Table) -> set[Path]:
        """Every file that the table needs: its metadata, manifest lists, manifests and data of all its snapshots."""
        named = {path_of(table.metadata_location)}
        manifests: dict[str, list[LakeFile]] = {}
        for snapshot in table.metadata.snapshots:
            named.add(path_of(snapshot.manifest_list))
            for one in snapshot.manifests(table.io):
                manifests[one.manifest_path] = self._of(one, table.io)
        self._read = manifests  # the others are gone
        named |= {path_of(name) for name in manifests}
        return named | {file.path for files in manifests.values() for file in files}

    def _of(self, manifest: ManifestFile, io: FileIO) -> list[LakeFile]:
        known = self._read.get(manifest.manifest_path)
        if known is None:
            known = self._read[manifest.manifest_path] = _read(manifest, io)
        return known


def _read(manifest: ManifestFile, io: FileIO) -> list[LakeFile]:
    files = []
    for entry in manifest.fetch_manifest_entry(io, discard_deleted=True):
        data = entry.data_file
        day, kind, origin = (data.partition[place] for place in range(3))
        files.append(
            LakeFile(
                path=path_of(data.file_path),
                day=day if isinstance(day, datetime.date) else _EPOCH + datetime.timedelta(days=day),
                type=kind,
                origin=origin,
                rows=data.record_count,
                bytes=data.file_size_in_bytes,
                entry=data,
            )
        )
    return files


def superseded(table: Table, now_ms: float, grace_s: float) -> list[int]:
    """Snapshots that nobody needs any more.

    What an append followed has its files in every later snapshot: it goes as soon as nobody can be planning with it.
    What a compaction followed keeps the files that were replaced, for the whole grace period.
    """
    ordered = sorted(table.metadata.snapshots, key=lambda one: one.sequence_number or 0)
    return [
        one.snapshot_id
        for one, successor in itertools.pairwise(ordered)
        if successor.timestamp_ms + 1000 * (min(grace_s, PLANNING_S) if _appends(successor) else grace_s) <= now_ms
    ]


def _appends(snapshot: Snapshot) -> bool:
    return snapshot.summary is not None and snapshot.summary.operation is Operation.APPEND


def expire(transaction: Transaction, snapshots: Sequence[int]) -> None:
    """Take these snapshots out of the metadata; their files are another's to delete."""
    ExpireSnapshots(transaction=transaction).by_ids(list(snapshots)).commit()


def may_hold(file: DataFile, field_id: int, ordered: Sequence[str]) -> bool:
    """Whether one of these strings, in order, lies within the column's bounds in the file's metadata."""
    low, high = (file.lower_bounds or {}).get(field_id), (file.upper_bounds or {}).get(field_id)
    if low is None or high is None:
        return True
    place = bisect_left(ordered, str(from_bytes(StringType(), low)))
    return place < len(ordered) and ordered[place] <= str(from_bytes(StringType(), high))


def mergeable(files: Sequence[LakeFile], target_bytes: int) -> Iterator[list[LakeFile]]:
    """Groups of small files of one partition that make a file of about the target size together."""
    partitions: dict[tuple[object, ...], list[LakeFile]] = defaultdict(list)
    for file in files:
        if file.bytes < target_bytes * 3 // 4:
            partitions[file.day, file.type, file.origin].append(file)
    for small in partitions.values():
        group: list[LakeFile] = []
        for file in sorted(small, key=lambda one: one.bytes):
            if group and sum(one.bytes for one in group) + file.bytes > target_bytes:
                if len(group) > 1:
                    yield group
                group = []
            group.append(file)
        if len(group) > 1:
            yield group
