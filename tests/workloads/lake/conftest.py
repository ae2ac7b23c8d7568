"""What the lake's tests share: events made by hand, and a disk that a test may stop at any step."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
from pyiceberg.catalog.sql import SqlCatalog

from workloads.lake import durable
from workloads.lake.lake import Lake
from workloads.lake.spool import MemorySpool

DAY = 86_400_000
START = 1_772_323_200_000  # 2026-03-01 00:00 UTC


class Killed(BaseException):
    """The process ended here."""


class Shop:
    """Makes events: number `n` is always the same one."""

    start = START
    day = DAY

    @staticmethod
    def user(number: int) -> str:
        return f"p1-{number:032x}"

    @staticmethod
    def session(number: int) -> str:
        return f"s1-{number:032x}"

    def event(
        self, number: int, *, day: int = 0, kind: str = "view", user: int | None = 1, **more: object
    ) -> dict[str, object]:
        moment = START + day * DAY + number
        return {
            "event_id": f"{moment >> 16:08x}-{moment & 0xFFFF:04x}-7{number & 0xFFF:03x}-8000-{number:012x}",
            "type": kind,
            "timestamp_ms": moment,
            "user": None if user is None else self.user(user),
            "item": f"item-{number % 7}",
            "schema_version": 1,
            **more,
        }

    def fill(self, spool: MemorySpool, numbers: range, *, days: int = 1, users: int = 3) -> None:
        for number in numbers:
            kind = "view" if number % 3 else "purchase"
            spool.add(**self.event(number, day=number % days, kind=kind, user=number % users))

    def dataset(self, folder: Path, numbers: range, *, users: int = 3) -> Path:
        """A prepared data set as the lake sees one."""
        folder.mkdir(parents=True)
        rows = [self.event(n, day=n % 2, user=n % users, price=1.5, position=n) for n in numbers]
        frame = pl.DataFrame(rows).with_columns(
            pl.col("type").cast(pl.Enum(["view"])), pl.col("position").cast(pl.Int32)
        )
        frame.drop("schema_version").sort("timestamp_ms").write_parquet(folder / "events.parquet")
        pl.DataFrame({"item": ["item-1"]}).write_parquet(folder / "items.parquet")
        (folder / "dataset.json").write_text("{}")
        return folder


class Disk:
    """Counts what changes the disk for good, and ends the process before or after one such step."""

    def __init__(self) -> None:
        self._counting = threading.Lock()
        self.steps = 0
        self.stop_at: int | None = None
        self.after = False

    def step(self, change: Callable[[], object]) -> object:
        with self._counting:
            number, self.steps = self.steps, self.steps + 1
        if number == self.stop_at and not self.after:
            raise Killed
        done = change()
        if number == self.stop_at:
            raise Killed
        return done

    def arm(self, stop_at: int | None, *, after: bool = False) -> None:
        self.steps, self.stop_at, self.after = 0, stop_at, after


@pytest.fixture
def shop() -> Shop:
    return Shop()


@pytest.fixture
def spool() -> MemorySpool:
    return MemorySpool()


@pytest.fixture
def lake(tmp_path: Path):
    with Lake.open(tmp_path / "lake") as opened:
        yield opened


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Renames, removals and commits of the catalogue, each a step."""
    made = Disk()
    place, remove, commit = durable.place, durable.remove, SqlCatalog.commit_table
    monkeypatch.setattr(durable, "place", lambda part, path: made.step(lambda: place(part, path)))
    monkeypatch.setattr(durable, "remove", lambda path: made.step(lambda: remove(path)))
    monkeypatch.setattr(SqlCatalog, "commit_table", lambda *given: made.step(lambda: commit(*given)))
    return made


@pytest.fixture
def killed() -> type[BaseException]:
    return Killed
