"""A small shop at home, with its key, ready to be replicated."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
import polars as pl
import pytest

from workloads.contract.storage import replica_object_key
from workloads.data import dataset as datasets
from workloads.data.dataset import Dataset, DatasetMeta, FaultSummary, read_meta, write_dataset
from workloads.data.events import EventLog
from workloads.data.simulator import SimulatorConfig, simulate
from workloads.data.split import boundaries, compare
from workloads.privacy.columns import DEFAULT
from workloads.replication.transfer import Outgoing
from workloads.telemetry.progress import Progress


@dataclasses.dataclass(frozen=True)
class Shop:
    """A home with one prepared data set."""

    home: Path
    dataset: Path

    @property
    def meta(self) -> DatasetMeta:
        return read_meta(self.dataset)


@pytest.fixture
def quiet() -> Progress:
    return Progress(io.StringIO())


def as_pseudonyms(frame: pl.DataFrame) -> pl.DataFrame:
    """The simulator's users and sessions under names that have the form of pseudonyms."""

    def named(column: str, letter: str) -> pl.Expr:
        unique = frame[column].drop_nulls().unique()
        digests = [f"{letter}1-{hashlib.sha256(each.encode()).hexdigest()[:32]}" for each in unique.to_list()]
        return pl.col(column).replace_strict(unique, digests, default=None, return_dtype=pl.String)

    return frame.with_columns(named("user", "p"), named("session", "s"))


def write(folder: Path, log: EventLog, items: pl.DataFrame) -> Dataset:
    cut = boundaries(log, validation_share=0.1, test_share=0.1, basis="rows")
    return write_dataset(
        folder,
        name="shop",
        source="events of a file",
        input_digest="in",
        key_epoch=1,
        protocol="next_item",
        cut=cut,
        log=log,
        items=items,
        splits=compare(log, items, cut),
        rules=[],
        faults=FaultSummary(rows_read=len(log), bad_rows=0, max_bad_share=0.05, totals=[]),
        parameters={"path": "home"},
    )


def with_key(home: Path) -> Path:
    (home / "onprem" / "key").mkdir(parents=True, mode=0o700)
    key = home / "onprem" / "key" / "pseudonym-1.key"
    key.write_bytes(secrets.token_bytes(32))
    key.chmod(0o600)
    return home


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """12,000 events of 250 people on 150 items."""
    simulation = simulate(SimulatorConfig(users=250, items=150, events=12_000, seed=3))
    log = EventLog(as_pseudonyms(simulation.log.frame))
    return write(tmp_path_factory.mktemp("datasets"), log, simulation.items)


@pytest.fixture
def shop(made: Dataset, tmp_path: Path) -> Shop:
    return Shop(with_key(tmp_path / "home"), made.path)


@pytest.fixture(scope="session")
def open_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default policy, in which every column leaves as it is."""
    lines = [
        f'{line.split(" = ")[0]} = {{ do = "leave" }}' if " = {" in line and not line.startswith("#") else line
        for line in DEFAULT.read_text(encoding="utf-8").splitlines()
    ]
    path = tmp_path_factory.mktemp("policy") / "open.toml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def random_files(tmp_path: Path) -> Callable[[list[int]], list[Outgoing]]:
    """Files of random bytes, ready to be sent."""

    def make(sizes: list[int]) -> list[Outgoing]:
        files = []
        for size in sizes:
            data = secrets.token_bytes(size)
            digest = hashlib.sha256(data).hexdigest()
            path = tmp_path / f"{digest}.parquet"
            path.write_bytes(data)
            files.append(Outgoing(replica_object_key(digest), path, digest, size))
        return files

    return make


@pytest.fixture
def rewritten() -> Callable[[Path, Path, pl.DataFrame], Path]:
    return _rewritten


def _rewritten(dataset: Path, target: Path, frame: pl.DataFrame) -> Path:
    """A copy of a data set with another `events.parquet`, and a `dataset.json` that knows of it."""
    copy = target / dataset.name
    copy.mkdir(parents=True)
    for name in (datasets.ITEMS, datasets.SPLITS):
        (copy / name).write_bytes((dataset / name).read_bytes())
    frame.write_parquet(copy / datasets.EVENTS)
    meta = read_meta(dataset)
    data = (copy / datasets.EVENTS).read_bytes()
    entry = datasets.FileEntry(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
    meta = msgspec.structs.replace(meta, files={**meta.files, datasets.EVENTS: entry})
    (copy / datasets.META).write_bytes(msgspec.json.encode(meta))
    return copy
