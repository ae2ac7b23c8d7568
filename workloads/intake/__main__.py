"""`python -m workloads.intake --listen H:P --store PATH`: be the intake of home until SIGTERM."""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

from workloads.contract.http import PATH_INTAKE
from workloads.contract.sites import HOME
from workloads.intake.app import create_app
from workloads.intake.pressure import LOG_SHARE, RESERVE_BYTES, free_bytes_beside
from workloads.intake.store import IDS_KEPT_MS, OVERDUE_BYTES, SqliteStore, StoreError
from workloads.intake.writer import Writer
from workloads.telemetry import log
from workloads.telemetry.metrics import StageMetrics, new_registry
from workloads.telemetry.service import CannotStartError, Service, run


def main() -> int:
    """Exit code: 0 stopped when asked, 2 could not start."""
    parser = argparse.ArgumentParser(prog="python -m workloads.intake", description=__doc__)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    parser.add_argument("--store", required=True, type=pathlib.Path, metavar="PATH", help="SQLite file of events")
    parser.add_argument(
        "--reserve-mib",
        default=RESERVE_BYTES >> 20,
        type=int,
        metavar="N",
        help="room on the disk below which events are turned away (429)",
    )
    parser.add_argument(
        "--ids-kept-hours",
        default=IDS_KEPT_MS / 3_600_000,
        type=float,
        metavar="H",
        help="how long ids of trimmed events are known, so that one sent again is no new one",
    )
    options = parser.parse_args()
    if options.reserve_mib < 1 or options.ids_kept_hours < 0:
        parser.error("--reserve-mib must be 1 or more, --ids-kept-hours 0 or more")
    reserve = options.reserve_mib << 20

    def open_store() -> SqliteStore:
        try:
            store = SqliteStore(
                options.store,
                ids_kept_ms=int(options.ids_kept_hours * 3_600_000),
                log_bytes=min(OVERDUE_BYTES, reserve // LOG_SHARE),
            )
            commits = [store.probe() for _ in range(7)]
        except (StoreError, OSError) as error:
            raise CannotStartError(
                str(error), "give a path on a local disk with free space, written by no other"
            ) from (error)
        log.get(component="store").info(
            "store opened",
            path=str(options.store),
            commit_ms=round(statistics.median(commits), 3),
            commit_ms_worst=round(max(commits), 3),
            **store.settings(),
        )
        return store

    def build() -> Service:
        metrics = StageMetrics(new_registry())
        writer = Writer(
            open_store,
            observe=lambda stage, ms: metrics.stage(PATH_INTAKE, stage, ms),
            free_bytes=free_bytes_beside(options.store),
            reserve_bytes=reserve,
        )
        return create_app(writer, metrics)

    return run("intake", HOME.name, options.listen, build)


if __name__ == "__main__":
    sys.exit(main())
