"""Bundles on disk: writing one so that it is there whole or not at all, copying, finding, opening.

A bundle lies at `<bundles>/<id>/`. Everything is written to a hidden sibling first, each file and
directory is forced to disk, what was written is verified, and one rename makes it appear. Opening
reads what is small and maps what is large; it trusts a directory that `verify` has passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path

from workloads.bundle import manifest as m
from workloads.bundle.tables import Array, open_tables
from workloads.bundle.verification import BundleFault, check_content, read_features, read_manifest, verify
from workloads.contract.tensors import FeatureSchema, Signature

__all__ = ["Bundle", "BundleFault", "copy_bundle", "find", "newest", "open_bundle", "verify", "write_bundle"]

_INCOMING = ".incoming-"


def write_bundle(bundles: Path, source: Path, facts: m.Facts) -> Path:
    """Make a bundle of every file under `source` and return its directory `<bundles>/<id>`.

    `source` is left as it is. Raises BundleFault when what it holds is no bundle; nothing is left
    behind then.
    """
    with _incoming(bundles) as incoming:
        files = _copy_files(source, incoming)
        if m.FEATURES not in files:
            raise BundleFault(source, m.FEATURES, "is missing")
        manifest = m.make(facts, files)
        data = m.encode(manifest)
        (incoming / m.MANIFEST).write_bytes(data)
        read_manifest(incoming)
        check_content(incoming, manifest)
        return _publish(incoming, bundles / m.identity(data))


def copy_bundle(source: Path, bundles: Path) -> Path:
    """Bring a bundle into another store; both ends are verified. Returns `<bundles>/<id>`.

    A good copy that is there already stays; a damaged one is replaced. Raises BundleFault when the
    source is not a bundle that may be opened.
    """
    verify(source)
    final = bundles / source.resolve().name
    if final.exists() and final.resolve() == source.resolve():
        return final
    with _incoming(bundles) as incoming:
        _copy_files(source.resolve(), incoming)
        return _publish(incoming, final)


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
    """An opened bundle. Lists and tables are indexed by item index: position 0 is padding and unknown."""

    path: Path
    id: str
    manifest: m.Manifest
    features: FeatureSchema
    tables: Mapping[str, Array]
    """`contract.tensors.ITEM_TABLES`, read-only maps of the file."""
    item_ids: list[str]
    """`item_ids[index]`; `item_ids[0]` is empty."""
    index: Mapping[str, int]
    """Item id to index; an unknown id is absent (its index is 0)."""

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
        return ["", *(value or "" for value in _column(self.path, column))]


def open_bundle(path: Path) -> Bundle:
    """Open a bundle for serving. Digests are not read again: `verify` it once, when it arrives.

    Raises BundleFault when the manifest, the feature schema, the tables or the catalogue cannot be
    read or do not agree.
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
    return Bundle(
        path=path,
        id=identity,
        manifest=manifest,
        features=features,
        tables=tables,
        item_ids=item_ids,
        index=index,
    )


def _column(bundle: Path, name: str) -> list[str]:
    # Late: nobody pays for Arrow who only writes or looks for bundles.
    import pyarrow as pa  # noqa: PLC0415
    import pyarrow.parquet as pq  # noqa: PLC0415

    try:
        table = pq.read_table(bundle / m.CATALOGUE, columns=[name], use_threads=False)
        values: list[str] = table.column(name).to_pylist()
    except (pa.ArrowException, OSError, KeyError) as error:
        raise BundleFault(bundle, m.CATALOGUE, str(error)) from None
    return values


def _readable(bundles: Path) -> Iterator[tuple[Path, m.Manifest]]:
    for path in sorted(bundles.iterdir()) if bundles.is_dir() else ():
        with contextlib.suppress(BundleFault):
            manifest, identity = read_manifest(path)
            if path.name == identity:
                yield path, manifest


@contextlib.contextmanager
def _incoming(bundles: Path) -> Iterator[Path]:
    """A hidden directory beside the bundles, gone at the end unless it was published.

    Leftovers of writers that were killed go first.
    """
    bundles.mkdir(parents=True, exist_ok=True)
    for leftover in bundles.glob(f"{_INCOMING}*"):
        if not _is_alive(leftover.name.removeprefix(_INCOMING).split("-")[0]):
            shutil.rmtree(leftover, ignore_errors=True)
    incoming = bundles / f"{_INCOMING}{os.getpid()}-{uuid.uuid4().hex[:8]}"
    incoming.mkdir()
    try:
        yield incoming
    finally:
        shutil.rmtree(incoming, ignore_errors=True)


def _is_alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _copy_files(source: Path, target: Path) -> dict[str, m.FileEntry]:
    """Copy everything below `source` and digest the copies; links stay links, to be refused."""
    shutil.copytree(source, target, symlinks=True, dirs_exist_ok=True)
    return {
        path.relative_to(target).as_posix(): _entry(path)
        for path in sorted(target.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


def _entry(path: Path) -> m.FileEntry:
    with path.open("rb") as file:
        return m.FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), size=path.stat().st_size)


def _publish(incoming: Path, final: Path) -> Path:
    """Force `incoming` to disk and let it appear as `final`, unless a good bundle is there already."""
    for path in (*incoming.rglob("*"), incoming):
        # A scratch directory's modes came along; a bundle is for every process of the site to read.
        path.chmod(0o755 if path.is_dir() else 0o644)
        _sync(path)
    if final.exists():
        try:
            verify(final)
        except BundleFault:
            # Moved into the hidden directory's place-to-be-removed, so that a reader never sees half of it.
            shutil.move(final, incoming.with_name(f"{incoming.name}-damaged"))
        else:
            return final
    incoming.rename(final)
    _sync(final.parent)
    shutil.rmtree(incoming.with_name(f"{incoming.name}-damaged"), ignore_errors=True)
    verify(final)
    return final


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
