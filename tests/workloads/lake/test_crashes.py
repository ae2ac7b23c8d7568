"""The process ends before and after each rename, removal and commit: what is left is whole, a rerun completes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from workloads.lake import lake as lake_module
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.lake.reconciliation import reconcile
from workloads.lake.relocation import relocate
from workloads.lake.spool import MemorySpool

if TYPE_CHECKING:
    from tests.workloads.lake.conftest import Disk, Shop

EVERY = 1 if os.environ.get("RANKBRIDGE_LONG") else 3
"""Every step in the long form, before and after it; every third in the short one."""
SPARSE = EVERY * 2 - (EVERY == 1)


def each_step(
    disk: Disk,
    killed: type[BaseException],
    path: Path,
    act: Callable[[], object],
    check: Callable[[int], None],
    *,
    every: int = EVERY,
) -> int:
    """Run `act` on the same lake once per step, ended there, and `check` what is left; the number of steps."""
    kept = path.with_name("kept")
    shutil.copytree(path, kept)
    disk.arm(None)
    act()
    steps = disk.steps
    assert steps
    for number in range(steps):
        for after in (False, True):
            if (number + after) % every:
                continue
            shutil.rmtree(path)
            shutil.copytree(kept, path)
            disk.arm(number, after=after)
            with pytest.raises(killed):
                act()
            disk.arm(None)
            check(number)
    return steps


def litter(path: Path) -> list[Path]:
    """Data files that no snapshot names, and drafts."""
    with Lake.open(path, create=False) as lake:
        named = {file.path for file in lake.files()}
    return [
        file
        for file in path.rglob("*")
        if file.suffix == ".part" or (file.suffix == ".parquet" and "data" in file.parts and file not in named)
    ]


def test_an_ingest_that_ended_anywhere_lost_nothing_and_doubled_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, killed: type[BaseException], shop: Shop
):
    monkeypatch.setattr(lake_module, "MERGE_AT", 2)
    path, spool = tmp_path / "lake", MemorySpool()
    shop.fill(spool, range(10))
    with Lake.open(path) as lake:
        lake.ingest(spool)
    shop.fill(spool, range(10, 24))

    def act() -> None:
        with Lake.open(path) as lake:
            lake.ingest(spool)

    def check(number: int) -> None:
        with Lake.open(path) as lake:
            found = reconcile(lake, spool)
            assert found.agrees, (number, found)
            assert sum(day.lake for day in found.days) == found.taken
            assert found.taken in (10, 24)
            lake.ingest(spool)
            found = reconcile(lake, spool)
            assert found.agrees, (number, found)
            assert (found.taken, sum(day.lake for day in found.days)) == (24, 24)
        with Lake.open(path, grace_s=0) as lake:
            lake.compact()
        assert litter(path) == []

    assert each_step(disk, killed, path, act, check) > 10


def test_a_load_that_ended_anywhere_is_all_there_or_not_at_all(
    tmp_path: Path, disk: Disk, killed: type[BaseException], shop: Shop
):
    path, folder = tmp_path / "lake", shop.dataset(tmp_path / "shop-1", range(20))
    Lake.open(path).close()

    def act() -> None:
        with Lake.open(path) as lake:
            lake.load(folder)

    def check(number: int) -> None:
        with Lake.open(path) as lake:
            assert lake.events().read_all().num_rows == (20 if lake.origins() else 0), number
            assert lake.load(folder).events == 20
            assert lake.events().read_all().num_rows == 20
            assert (lake.origin_folder("shop-1") / "items.parquet").is_file()

    each_step(disk, killed, path, act, check)


def test_a_compaction_that_ended_anywhere_changed_no_row(
    tmp_path: Path, disk: Disk, killed: type[BaseException], shop: Shop
):
    path, spool = tmp_path / "lake", MemorySpool()
    with Lake.open(path) as lake:
        for start in range(0, 30, 10):
            shop.fill(spool, range(start, start + 10))
            lake.ingest(spool)

    def act() -> None:
        with Lake.open(path, grace_s=0) as lake:
            lake.compact()

    def check(number: int) -> None:
        with Lake.open(path) as lake:
            assert reconcile(lake, spool).agrees, number
        act()
        with Lake.open(path) as lake:
            assert reconcile(lake, spool).agrees, number
            assert len(lake.files()) == 2
        assert litter(path) == []

    each_step(disk, killed, path, act, check, every=SPARSE)


def test_an_erasure_that_ended_anywhere_is_completed_by_the_next(
    tmp_path: Path, disk: Disk, killed: type[BaseException], shop: Shop
):
    path, spool = tmp_path / "lake", MemorySpool()
    with Lake.open(path) as lake:
        for start in range(0, 20, 10):
            shop.fill(spool, range(start, start + 10))
            lake.ingest(spool)
    gone = shop.user(1)

    def act() -> None:
        with Lake.open(path) as lake:
            lake.erase([gone])

    def check(number: int) -> None:
        with Lake.open(path) as lake:
            users = lake.events(columns=["user"]).read_all()["user"].to_pylist()
            assert len(users) in (20, 20 - users.count(gone) - 7), number
            lake.erase([gone])
            users = lake.events(columns=["user"]).read_all()["user"].to_pylist()
            assert (len(users), users.count(gone)) == (13, 0)
        assert litter(path) == []
        assert not [file for file in path.rglob("*") if file.is_file() and gone.encode() in file.read_bytes()]

    each_step(disk, killed, path, act, check, every=SPARSE)


def test_a_lake_whose_making_ended_anywhere_is_made_by_the_next(
    tmp_path: Path, disk: Disk, killed: type[BaseException]
):
    path = tmp_path / "lake"
    path.mkdir()

    def act() -> None:
        Lake.open(path).close()

    def check(number: int) -> None:
        with Lake.open(path) as lake:
            assert lake.events().read_all().num_rows == 0, number

    each_step(disk, killed, path, act, check)


def test_a_relocation_that_ended_anywhere_is_completed_by_the_next(
    tmp_path: Path, disk: Disk, killed: type[BaseException], shop: Shop
):
    spool = MemorySpool()
    shop.fill(spool, range(12))
    with Lake.open(tmp_path / "old") as lake:
        lake.ingest(spool)
    path = tmp_path / "lake"
    (tmp_path / "old").rename(path)
    with pytest.raises(LakeError, match="relocate"):
        Lake.open(path)

    def check(number: int) -> None:
        assert relocate(path) == 2
        with Lake.open(path) as lake:
            assert reconcile(lake, spool).agrees, number
            assert lake.ingest(spool).events == 0

    each_step(disk, killed, path, lambda: relocate(path), check)
