"""Bundles on disk: writing one so that it is there whole or not at all, copying, finding, opening.

A bundle lies at `<bundles>/<id>/`. Everything is written to a hidden sibling first, each file and
directory is forced to disk, what was written is verified, and one rename makes it appear. Opening
reads what is small and maps what is large; it trusts a directory that `verify` has passed. With deltas on
top, tables are one array each of bundle and new items: memory of this process, 689 bytes an item, no map.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from workloads.bundle import manifest as m
from workloads.bundle.delta import DELTA_MANIFEST, Delta, DeltaFacts, DeltaFault, mutual_neighbours, open_delta
from workloads.bundle.incoming import file_entry, incoming_directory, publish_directory
from workloads.bundle.tables import Array, open_tables
from workloads.bundle.verification import BundleFault, check_content, read_features, read_manifest, verify
from workloads.contract.tensors import FeatureSchema, Signature

__all__ = ["Bundle", "BundleFault", "copy_bundle", "find", "newest", "open_bundle", "verify", "write_bundle"]


def write_bundle(bundles: Path, source: Path, facts: m.Facts) -> Path:
    """Make a bundle of every file under `source` and return its directory `<bundles>/<id>`.

    `source` is left as it is. Raises BundleFault when what it holds is no bundle; nothing is left
    behind then.
    """
    with incoming_directory(bundles) as incoming:
        files = _copy_files(source, incoming)
        if m.FEATURES not in files:
            raise BundleFault(source, m.FEATURES, "is missing")
        manifest = m.make(facts, files)
        data = m.encode(manifest)
        (incoming / m.MANIFEST).write_bytes(data)
        read_manifest(incoming)
        check_content(incoming, manifest)
        return publish_directory(incoming, bundles / m.identity(data), verify)


def copy_bundle(source: Path, bundles: Path) -> Path:
    """Bring a bundle into another store; both ends are verified. Returns `<bundles>/<id>`.

    A good copy that is there already stays; a damaged one is replaced. Raises BundleFault when the
    source is not a bundle that may be opened.
    """
    verify(source)
    final = bundles / source.resolve().name
    if final.exists() and final.resolve() == source.resolve():
        return final
    with incoming_directory(bundles) as incoming:
        _copy_files(source.resolve(), incoming)
        return publish_directory(incoming, final, verify)


def newest(bundles: Path) -> Path | None:
    """The bundle of a store that was made last, by its manifest; None when there is none."""
    found = [(manifest.created_ms, path) for path, manifest in _readable(bundles)]
    return max(found)[1] if found else None


def find(bundles: Path, prefix: str) -> Path:
    """The one bundle whose id begins with `prefix`. Raises LookupError when there is none, or several."""
    found = [path for path, _ in _readable(bundles) if path.name.startswith(prefix)]
    if len(found) != 1:
        what = "no bundle" if not found else f"{len(found)} bundles"
        raise LookupError(f"{what} under {bundles} with an id that begins with {prefix!r}")
    return found[0]


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle and the deltas on top of it: one edition of what a site serves.

    Lists and tables are indexed by item index: position 0 is padding and unknown, 1 to `base_items` are the
    bundle's items, which its models know; those beyond came with deltas, and no model has a row for them.
    """

    path: Path
    id: str
    manifest: m.Manifest
    features: FeatureSchema
    tables: Mapping[str, Array]
    """`contract.tensors.ITEM_TABLES`, read-only; maps of the file where there are no deltas."""
    item_ids: list[str]
    """`item_ids[index]`; `item_ids[0]` is empty."""
    index: Mapping[str, int]
    """Item id to index; an unknown id is absent (its index is 0)."""
    deltas: tuple[Delta, ...] = ()
    """In order."""

    @property
    def delta(self) -> int:
        """Deltas on top of the bundle."""
        return len(self.deltas)

    @property
    def base_items(self) -> int:
        """Items of the bundle itself; the models' tables end there."""
        return self.features.items

    def next_delta(self, created_ms: int) -> DeltaFacts:
        """Where a delta on top of this edition stands."""
        return DeltaFacts(
            bundle=self.id,
            number=self.delta + 1,
            previous=self.deltas[-1].id if self.deltas else None,
            first_index=len(self.item_ids),
            created_ms=created_ms,
        )

    @property
    def short(self) -> str:
        """The first 12 hex digits of the id, as answers and Triton names carry it."""
        return self.id[: m.SHORT]

    @property
    def ann_path(self) -> Path:
        """The faiss index; its position r is item index r + 1."""
        return self.path / m.ANN

    def model_path(self, signature: Signature) -> Path:
        """The ONNX file of a model."""
        return self.path / f"{signature.role}.onnx"

    @functools.cached_property
    def titles(self) -> list[str]:
        """By item index; empty where the catalogue has none."""
        return self.text("title")

    @functools.cached_property
    def categories(self) -> list[str]:
        """Category name by item index; empty where the catalogue has none."""
        return self.text("category")

    def text(self, column: str) -> list[str]:
        """A text column of the catalogue by item index (`title`, `description`, `category`), read anew each time."""
        added = (value for delta in self.deltas for value in delta.text(column))
        return ["", *(value or "" for value in _column(self.path, column)), *added]

    def images(self) -> list[list[float]]:
        """Image features by item index, `IMAGE_DIM` numbers or none, read anew each time."""
        added = (value for delta in self.deltas for value in delta.images())
        return [[], *(value or [] for value in _column(self.path, "image")), *added]


def open_bundle(path: Path, deltas: Sequence[Path] = ()) -> Bundle:
    """Open a bundle for serving, with `deltas` on top of it: delta 1, delta 2 and so on.

    The bundle's digests are not read again: `verify` it once, when it arrives. Deltas are small, and are.
    Raises BundleFault when the manifest, the feature schema, the tables or the catalogue cannot be
    read or do not agree, and DeltaFault, which is one, when the deltas are not a chain on this bundle.
    """
    path = path.resolve()
    manifest, identity = read_manifest(path)
    if path.name != identity:
        raise BundleFault(path, m.MANIFEST, f"its digest is {identity}, which is not the directory's name")
    features = read_features(path)
    try:
        tables = open_tables(path / m.ITEM_TABLES_FILE)
    except (OSError, ValueError) as error:
        raise BundleFault(path, m.ITEM_TABLES_FILE, str(error)) from None
    item_ids = ["", *_column(path, "item")]
    if len(item_ids) != features.items + 1 or any(len(table) != len(item_ids) for table in tables.values()):
        raise BundleFault(path, m.CATALOGUE, "catalogue, feature schema and item tables differ in length")
    index = {item: place for place, item in enumerate(item_ids) if place}
    if len(index) != features.items:
        raise BundleFault(path, m.CATALOGUE, "an item id stands twice")
    bundle = Bundle(
        path=path,
        id=identity,
        manifest=manifest,
        features=features,
        tables=tables,
        item_ids=item_ids,
        index=index,
    )
    return _with_deltas(bundle, deltas) if deltas else bundle


def _with_deltas(bundle: Bundle, paths: Sequence[Path]) -> Bundle:
    """Raises DeltaFault at the first delta that does not stand on what is before it."""
    deltas: list[Delta] = []
    item_ids, index = list(bundle.item_ids), dict(bundle.index)
    for path in paths:
        delta = open_delta(path)
        if fault := _chain_fault(bundle, deltas, len(item_ids), delta):
            raise DeltaFault(path, DELTA_MANIFEST, fault)
        for item in delta.item_ids:
            if item in index:
                raise DeltaFault(path, m.CATALOGUE, f"the item {item!r} is there already")
            index[item] = len(item_ids)
            item_ids.append(item)
        for name, known in (("category", bundle.features.categories), ("price_band", bundle.features.price_edges)):
            most = len(known) + (name == "price_band")
            if delta.tables[name].max(initial=0) > most:
                raise DeltaFault(path, m.ITEM_TABLES_FILE, f"a {name} is beyond {most}, the bundle's last")
        deltas.append(delta)
    tables: dict[str, Array] = {}
    for name, table in bundle.tables.items():
        tables[name] = np.concatenate([one.view(np.ndarray) for one in (table, *(d.tables[name] for d in deltas))])
    mutual_neighbours(tables["neighbours"], tables["neighbour_scores"], bundle.base_items)
    for table in tables.values():
        table.flags.writeable = False
    return dataclasses.replace(bundle, tables=tables, item_ids=item_ids, index=index, deltas=tuple(deltas))


def _chain_fault(bundle: Bundle, before: Sequence[Delta], rows: int, delta: Delta) -> str | None:
    """Why a delta cannot stand on the bundle and the deltas `before`, or None."""
    facts = delta.manifest
    last = before[-1].id if before else None
    if facts.bundle != bundle.id:
        return f"is for bundle {facts.bundle[: m.SHORT]}, and this is {bundle.short}"
    if facts.number != len(before) + 1:
        return f"is delta {facts.number}, and delta {len(before) + 1} comes next"
    if facts.previous != last:
        return f"stands on delta {facts.previous}, and the one before it here is {last}: the chain forks"
    if facts.first_index != rows:
        return f"its first item has index {facts.first_index}, and {rows} comes next"
    return None


def _column(bundle: Path, name: str) -> list[Any]:
    # Late: nobody pays for Arrow who only writes or looks for bundles.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(bundle / m.CATALOGUE, columns=[name], use_threads=False)
        values: list[Any] = table.column(name).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BundleFault(bundle, m.CATALOGUE, str(error)) from None
    return values


def _readable(bundles: Path) -> Iterator[tuple[Path, m.Manifest]]:
    for path in sorted(bundles.iterdir()) if bundles.is_dir() else ():
        with contextlib.suppress(BundleFault):
            manifest, identity = read_manifest(path)
            if path.name == identity:
                yield path, manifest


def _copy_files(source: Path, target: Path) -> dict[str, m.FileEntry]:
    """Copy everything below `source` and digest the copies; links stay links, to be refused."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    return {
        path.relative_to(target).as_posix(): file_entry(path)
        for path in sorted(target.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }
