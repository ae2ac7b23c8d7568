"""A prepared data set on disk: written once, whole or not at all, named by its content.

`write_dataset` puts a directory together under a temporary name and renames it; `Dataset.load` reads
it back and checks it. Users in it are pseudonyms. How sources become events is not known here.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import msgspec
import polars as pl

from workloads.contract.http import PSEUDONYM_PATTERN
from workloads.data.cleaning import RuleCount, check_items
from workloads.data.events import EventLog, FaultTotal
from workloads.data.split import Boundaries, SplitReport

EVENTS: Final = "events.parquet"
ITEMS: Final = "items.parquet"
META: Final = "dataset.json"
SPLITS: Final = "splits.json"
TRUTH: Final = "truth"

SCHEMA_VERSION: Final = 1
Protocol = Literal["next_basket", "next_item"]


class DatasetError(ValueError):
    """A directory that is no complete data set; the message names the fault and the remedy."""


class FileEntry(msgspec.Struct, frozen=True, kw_only=True):
    """What a file must be for the data set to be whole."""

    sha256: str
    bytes: int


class FaultSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of the row-level fault report; the report itself stays outside the data set."""

    rows_read: int
    bad_rows: int
    max_bad_share: float
    totals: list[FaultTotal]


class ReplicaOrigin(msgspec.Struct, frozen=True, kw_only=True):
    """What a data set that came out of a bucket was at home, and under which column policy it left."""

    dataset: str
    """Its directory's name at home."""
    digest: str
    """Its content's digest at home; another one than here where the policy changed anything."""
    policy: str
    policy_digest: str
    """sha256 of the policy's file."""


class DatasetMeta(msgspec.Struct, frozen=True, kw_only=True):
    """`dataset.json`."""

    schema_version: int = SCHEMA_VERSION
    name: str
    digest: str
    """sha256 of the canonical content (see `content_digest`); its first 12 digits are in the directory's name."""
    source: str
    """What it was made of: `simulator`, or the adapter and the file's name."""
    input_digest: str
    """sha256 of input, configuration, home and code: equal inputs need no second preparation."""
    key_epoch: int
    protocol: Protocol
    boundaries: Boundaries
    users: int
    items: int
    events: dict[str, int]
    """Per event type."""
    rules: list[RuleCount]
    faults: FaultSummary
    parameters: dict[str, int | float | str]
    files: dict[str, FileEntry]
    replica: ReplicaOrigin | None = None
    """None for the data set itself."""

    @property
    def train_end_ms(self) -> int:
        """First moment after training data."""
        return self.boundaries.train_end_ms

    @property
    def validation_end_ms(self) -> int:
        """First moment of the test period."""
        return self.boundaries.validation_end_ms

    @property
    def end_ms(self) -> int:
        """First moment after the last event."""
        return self.boundaries.end_ms


@dataclass(frozen=True)
class Dataset:
    """A prepared data set in memory. Frames as in docs/architecture.md; events oldest first."""

    path: Path
    meta: DatasetMeta
    log: EventLog
    items: pl.DataFrame

    @property
    def events(self) -> pl.DataFrame:
        """The event log's frame."""
        return self.log.frame

    @property
    def splits(self) -> SplitReport:
        """The comparison of train, validation and test."""
        return msgspec.json.decode((self.path / SPLITS).read_bytes(), type=SplitReport)

    @property
    def truth(self) -> Path | None:
        """Folder of what the simulator planted, if this is a simulation. For tests, not for training."""
        folder = self.path / TRUTH
        return folder if folder.is_dir() else None

    def part(self, name: Literal["train", "validation", "test"]) -> EventLog:
        """Events of one part of the split."""
        return self.meta.boundaries.part(self.log, name)

    @classmethod
    def load(cls, path: Path, *, verify: bool = True) -> Dataset:
        """Read a data set; `verify` compares each file with its digest first. Raises DatasetError."""
        meta = read_meta(path)
        faults = damaged(path, meta, digests=verify)
        if faults:
            raise DatasetError(f"{path}: {'; '.join(faults)}; delete the directory and prepare the data again")
        log = EventLog(pl.read_parquet(path / EVENTS))
        return cls(path=path, meta=meta, log=log, items=check_items(pl.read_parquet(path / ITEMS)))


def read_meta(path: Path) -> DatasetMeta:
    """Read `dataset.json` alone. Raises DatasetError."""
    try:
        meta = msgspec.json.decode((path / META).read_bytes(), type=DatasetMeta)
    except FileNotFoundError:
        raise DatasetError(
            f"{path}: no {META} there; give the directory that `python -m workloads.data` made"
        ) from None
    except (msgspec.DecodeError, OSError) as error:
        raise DatasetError(f"{path / META}: cannot be read ({error}); prepare the data again") from None
    if meta.schema_version != SCHEMA_VERSION:
        raise DatasetError(
            f"{path}: schema version {meta.schema_version}, not {SCHEMA_VERSION}; prepare the data again"
        )
    return meta


def damaged(path: Path, meta: DatasetMeta, *, digests: bool) -> list[str]:
    """What is wrong with the files that `meta` lists, empty when nothing is."""
    faults = []
    for name, entry in meta.files.items():
        file = path / name
        if not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != entry.bytes:
            faults.append(f"{name} has {file.stat().st_size} bytes, not {entry.bytes}")
        elif digests and _file_entry(file).sha256 != entry.sha256:
            faults.append(f"{name} was changed")
    return faults


def find_prepared(folder: Path, input_digest: str) -> Path | None:
    """A whole data set under `folder` that was made of the same input, or None."""
    if not folder.is_dir():
        return None
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not (path / META).is_file():
            continue
        try:
            meta = read_meta(path)
        except DatasetError:
            continue
        if meta.input_digest == input_digest and not damaged(path, meta, digests=True):
            return path
    return None


def content_digest(log: EventLog, items: pl.DataFrame, facts: dict[str, object]) -> str:
    """sha256 over names, types and values of both tables and over `facts`, independent of file encoding."""
    digest = hashlib.sha256(msgspec.json.encode(facts, order="sorted"))
    for table, frame in (("events", log.frame), ("items", items)):
        digest.update(f"{table}:{frame.height}".encode())
        for name in frame.columns:
            series = frame[name].rechunk()
            digest.update(f"{name}:{series.dtype}".encode())
            _digest_series(series, digest.update)
    return digest.hexdigest()


def _digest_series(series: pl.Series, update: Callable[[bytes], None]) -> None:
    update(series.is_null().to_numpy().tobytes())
    if isinstance(series.dtype, pl.List):
        update(series.list.len().fill_null(0).to_numpy().tobytes())
        series = series.explode(empty_as_null=False, keep_nulls=False)
    if isinstance(series.dtype, pl.Enum):
        series = series.to_physical()
    if series.dtype == pl.String:
        filled = series.fill_null("")
        update(filled.str.len_bytes().to_numpy().tobytes())
        update("".join(filled.to_list()).encode())
    else:
        update(series.fill_null(0).to_numpy().tobytes())


def write_dataset(
    folder: Path,
    *,
    name: str,
    source: str,
    input_digest: str,
    key_epoch: int,
    protocol: Protocol,
    cut: Boundaries,
    log: EventLog,
    items: pl.DataFrame,
    splits: SplitReport,
    rules: Iterable[RuleCount],
    faults: FaultSummary,
    parameters: dict[str, int | float | str],
    write_truth: Callable[[Path], object] | None = None,
    replica: ReplicaOrigin | None = None,
) -> Dataset:
    """Write `<folder>/<name>-<digest12>/` in one step and return it read from memory.

    The same content that is already there whole is left alone. Raises DatasetError when a user is not
    a pseudonym.
    """
    frame = log.frame
    raw = frame.filter(~pl.col("user").str.contains(PSEUDONYM_PATTERN)).height
    if raw:
        raise DatasetError(f"{raw} events carry a user that is no pseudonym; map users before writing a data set")
    check_items(items)
    digest = content_digest(log, items, {"name": name, "protocol": protocol, "boundaries": cut})
    target = folder / f"{name}-{digest[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    _sweep(folder)
    draft = Path(tempfile.mkdtemp(prefix=f".draft-{os.getpid()}-", dir=folder))
    try:
        frame.write_parquet(draft / EVENTS, compression="zstd", compression_level=3)
        items.write_parquet(draft / ITEMS, compression="zstd", compression_level=3)
        (draft / SPLITS).write_bytes(msgspec.json.format(msgspec.json.encode(splits), indent=1))
        if write_truth is not None:
            (draft / TRUTH).mkdir()
            write_truth(draft / TRUTH)
        files = {str(f.relative_to(draft)): _file_entry(f) for f in sorted(draft.rglob("*")) if f.is_file()}
        meta = DatasetMeta(
            name=name,
            digest=digest,
            source=source,
            input_digest=input_digest,
            key_epoch=key_epoch,
            protocol=protocol,
            boundaries=cut,
            users=frame["user"].drop_nulls().n_unique(),
            items=items.height,
            events=log.counts(),
            rules=list(rules),
            faults=faults,
            parameters=parameters,
            files=files,
            replica=replica,
        )
        (draft / META).write_bytes(msgspec.json.format(msgspec.json.encode(meta), indent=1))
        for file in draft.rglob("*"):
            _sync(file)
        _sync(draft)
        draft.chmod(0o755)
        _settle(draft, target)
        _sync(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return Dataset(path=target, meta=meta, log=log, items=items)


def _settle(draft: Path, target: Path) -> None:
    """Give the finished draft its name; what stands there is replaced (it may be damaged, or of an older run)."""
    if target.exists():
        old = target.with_name(f".draft-{os.getpid()}-replaced-{target.name}")
        target.rename(old)
        draft.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        draft.rename(target)


def _sweep(folder: Path) -> None:
    """Remove drafts of processes that were killed before they could."""
    for path in folder.glob(".draft-*"):
        owner = path.name.split("-")[1]
        if owner.isdigit() and not _alive(int(owner)):
            shutil.rmtree(path, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _file_entry(path: Path) -> FileEntry:
    with path.open("rb") as file:
        return FileEntry(sha256=hashlib.file_digest(file, "sha256").hexdigest(), bytes=path.stat().st_size)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
