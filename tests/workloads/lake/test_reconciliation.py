"""Differences between spool and lake are found, and told by day and type."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING

from workloads.lake import lake as lake_module
from workloads.lake.lake import Lake
from workloads.lake.reconciliation import DayCount, reconcile
from workloads.lake.schema import INTAKE, conform, with_day
from workloads.lake.spool import MemorySpool

if TYPE_CHECKING:
    from tests.workloads.lake.conftest import Shop


def test_counts_are_told_per_day_and_type(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(12), days=2)
    lake.ingest(spool)
    found = reconcile(lake, spool)
    assert found.agrees
    assert (found.taken, found.waiting) == (12, 0)
    assert found.days[0] == DayCount(datetime.date(2026, 3, 1), "purchase", 2, 2, 0, 0, 0, 0)
    assert sum(day.lake for day in found.days) == 12


def test_rows_that_nobody_took_yet_are_no_difference(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(5))
    lake.ingest(spool)
    shop.fill(spool, range(50, 58))
    found = reconcile(lake, spool)
    assert found.agrees
    assert found.waiting == 8


def test_a_trimmed_beginning_and_an_event_sent_again_are_no_difference(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(10))
    lake.ingest(spool)
    for seq in range(1, 6):
        del spool.rows[seq]
    spool.add(**shop.event(1, user=1))
    lake.ingest(spool)
    found = reconcile(lake, spool)
    assert found.agrees
    assert sum(day.again for day in found.days) == 1


def test_a_lost_row_is_missing(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(10), users=5)
    lake.ingest(spool)
    lake.erase([shop.user(3)])
    found = reconcile(lake, spool)
    assert not found.agrees
    assert sum(day.missing for day in found.days) == 2


def test_a_row_that_the_spool_never_had_is_extra_and_a_second_one_doubled(lake: Lake, spool: MemorySpool, shop: Shop):
    shop.fill(spool, range(10))
    lake.ingest(spool)
    table = lake.catalog.load_table(lake_module.TABLE)
    kept = spool.rows.pop(5)
    assert sum(day.extra for day in reconcile(lake, spool).days) == 1
    spool.rows[5] = kept
    rows = conform(with_day(spool.after(4, 1), INTAKE), table.schema())
    with table.transaction() as transaction:
        lake_module._append(transaction, lake._write(table, rows))
    found = reconcile(lake, spool)
    assert sum(day.doubled for day in found.days) == 2
    assert not found.agrees
