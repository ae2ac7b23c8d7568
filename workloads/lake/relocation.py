"""A lake in another place: Iceberg names files by their whole path, so a moved folder is catalogued anew.

The newest snapshot is written once more with the names of today, properties and schema included; older snapshots are
left behind. The files themselves are not touched. Knows nothing of events.
"""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from pyiceberg.manifest import DataFile
from pyiceberg.table import StaticTable

from workloads.lake import durable
from workloads.lake.faults import LakeError
from workloads.lake.lake import TABLE, Lake
from workloads.lake.snapshots import Manifests


def relocate(path: Path, *, wait_s: float = 60.0) -> int:
    """Catalogue the files of a lake whose folder was moved or copied to `path`; the number of files.

    A lake that is where it was stays as it is. After a crash the old catalogue is still there: run it again. Raises
    LakeError when there is no lake, or files are missing.
    """
    path = path.resolve()
    catalogue = path / "catalog.sqlite"
    if not catalogue.is_file():
        raise LakeError(f"{path}: there is no lake", "give the folder that holds catalog.sqlite")
    with durable.locked(path / "writer.lock", wait_s):
        named = _metadata_location(catalogue)
        old = durable.path_of(named).parents[2]  # <lake>/events/metadata/<file>
        table = StaticTable.from_metadata(
            durable.rebased(named, old, path),
            {
                "py-io-impl": "workloads.lake.durable.MovedFileIO",
                durable.MOVED_FROM: str(old),
                durable.MOVED_TO: str(path),
            },
        )
        files = [_moved(file.entry, old, path) for file in Manifests().files(table)]
        if old == path:
            return len(files)
        if missing := [file for file in files if not durable.path_of(file.file_path).is_file()]:
            raise LakeError(f"{path}: {len(missing)} of {len(files)} files are missing", "copy the whole folder")
        own = {key: value for key, value in table.properties.items() if key.startswith("rankbridge.")}
        Lake.catalogue_anew(path, table.schema(), own, files)
        return len(files)


def _metadata_location(catalogue: Path) -> str:
    with contextlib.closing(sqlite3.connect(f"{catalogue.as_uri()}?mode=ro", uri=True)) as connection:
        try:
            row = connection.execute(
                "SELECT metadata_location FROM iceberg_tables WHERE table_namespace = ? AND table_name = ?", TABLE
            ).fetchone()
        except sqlite3.Error as error:
            raise LakeError(f"{catalogue}: is no catalogue: {error}", "restore the folder from a copy") from error
    if row is None:
        raise LakeError(f"{catalogue}: names no table", "restore the folder from a copy")
    return str(row[0])


def _moved(file: DataFile, old: Path, new: Path) -> DataFile:
    return DataFile.from_args(
        content=file.content,
        file_path=durable.rebased(file.file_path, old, new),
        file_format=file.file_format,
        partition=file.partition,
        record_count=file.record_count,
        file_size_in_bytes=file.file_size_in_bytes,
        column_sizes=file.column_sizes,
        value_counts=file.value_counts,
        null_value_counts=file.null_value_counts,
        nan_value_counts=file.nan_value_counts,
        lower_bounds=file.lower_bounds,
        upper_bounds=file.upper_bounds,
        key_metadata=None,
        split_offsets=file.split_offsets,
        equality_ids=None,
        sort_order_id=None,
        spec_id=0,
    )
