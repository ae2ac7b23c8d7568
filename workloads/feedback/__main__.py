"""`python -m workloads.feedback run|fill`: bring what people do into their profiles, within a second, until SIGTERM.

`run` follows the intake's spool, applies it to the profiles and moves it into the lake. `fill` puts the profiles of a
file into Redis, once, before gateways and `run` are pointed there.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Final, NoReturn

from workloads.contract.sites import HOME
from workloads.data.profiles import (
    Profile,
    ProfilesDownError,
    ProfileStoreError,
    SqliteProfiles,
    now_ms,
    open_profiles,
)
from workloads.feedback.archive import Archive
from workloads.feedback.follower import Follower, Position
from workloads.feedback.gauges import Gauges
from workloads.feedback.keeper import HttpTrimmer, Keeper
from workloads.feedback.service import create_app
from workloads.feedback.spool import SqliteSpool
from workloads.telemetry.metrics import StageMetrics, new_registry
from workloads.telemetry.progress import Progress
from workloads.telemetry.service import CannotStartError, Service, run

EXIT_FAULT: Final = 2


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workloads.feedback", description=__doc__)
    work = parser.add_subparsers(dest="work", required=True)
    follow = work.add_parser("run", help="follow the spool until SIGTERM")
    follow.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address of /readyz and /metrics")
    follow.add_argument("--spool", required=True, type=Path, metavar="PATH", help="the intake's events.sqlite")
    follow.add_argument("--profiles", required=True, metavar="WHERE", help="profiles.sqlite, or redis://host:port/db")
    follow.add_argument("--lake", type=Path, metavar="DIR", help="move events into this lake, too")
    follow.add_argument("--lake-every-s", type=float, default=30.0, metavar="S", help="seconds between two rounds")
    follow.add_argument("--trim", metavar="URL", help="the intake: trim its spool of what the lake has")
    follow.add_argument("--keep-hours", type=float, default=24.0, metavar="H", help="trim nothing younger")
    fill = work.add_parser("fill", help="put the profiles of a file into Redis")
    fill.add_argument("--profiles", required=True, metavar="URL", help="redis://host:port/db")
    fill.add_argument("--from", required=True, type=Path, dest="source", metavar="PATH", help="profiles.sqlite")
    options = parser.parse_args(argv)
    if options.work == "run":
        if options.trim is not None and options.lake is None:
            parser.error("--trim: only what the lake has may leave the spool; give --lake as well")
        if options.lake_every_s <= 0 or options.keep_hours < 0:
            parser.error("--lake-every-s must be above 0, --keep-hours 0 or more")
    return options


def _build(options: argparse.Namespace) -> Service:
    """Open everything. Raises CannotStartError."""
    metrics = StageMetrics(new_registry())
    try:
        store = open_profiles(options.profiles, os.environ)
    except ProfileStoreError as error:
        raise CannotStartError(str(error), "prepare a data set, or correct --profiles") from None
    position = Position()
    gauges = Gauges(metrics.registry, position, now_ms)
    past: Archive | None = None
    keeper: Keeper | None = None
    if options.lake is not None:
        try:
            trimmer = None if options.trim is None else HttpTrimmer(options.trim)
        except ValueError as error:
            raise CannotStartError(str(error), "correct --trim") from None
        from workloads.feedback.lake_archive import LakeArchive  # noqa: PLC0415 - seconds and memory, only with a lake

        past = LakeArchive(options.lake)
        keeper = Keeper(
            LakeArchive(options.lake),
            options.spool,
            trimmer,
            applied=lambda: position.applied,
            keep_ms=round(options.keep_hours * 3_600_000),
            clock_ms=now_ms,
            on_taken=gauges.lake,
            on_trimmed=gauges.trimmed,
        )
    follower = Follower(SqliteSpool(options.spool), store, past, meter=gauges, position=position, clock_ms=now_ms)
    return create_app(follower, keeper, metrics, store=store, clock_ms=now_ms, lake_every_s=options.lake_every_s)


def _fill(options: argparse.Namespace, progress: Progress) -> int:
    """`fill`; exit code."""
    try:
        store = open_profiles(options.profiles, os.environ)
        if isinstance(store, SqliteProfiles):
            store.close()
            raise ProfileStoreError(f"{options.profiles}: a file is filled by preparing data; give redis://host:port/0")
        with SqliteProfiles(options.source) as source:
            total = len(source)
            meta = {name: str(value) for name, value in source.meta.items() if name != "watermark"}
            told = _told(source.everybody(), lambda done: progress.step("fill", done, total, "profiles"))
            count = store.fill(told, meta, items=source.items(), watermark=source.watermark())
    except ProfileStoreError as error:
        progress.fault(str(error), "correct --profiles and --from")
        return EXIT_FAULT
    except ProfilesDownError as error:
        progress.fault(str(error), "see that Redis runs there and takes these credentials, and fill again")
        return EXIT_FAULT
    progress.step("fill", count, count, "profiles")
    progress.result({"profiles": options.profiles}, profiles=count)
    return 0


def _told(profiles: Iterable[Profile], tell: Callable[[int], None]) -> Iterator[Profile]:
    for done, profile in enumerate(profiles):
        yield profile
        if done % 1000 == 0:
            tell(done)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, or stopped when asked; 2 a fault; 130 or 143 `fill` was ended by a signal."""
    options = _arguments(argv)
    if options.work == "run":
        return run("feedback", HOME.name.value, options.listen, lambda: _build(options))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _leave)
    return _fill(options, Progress())


def _leave(number: int, _: FrameType | None) -> NoReturn:
    """A fill that is ended leaves Redis without a new watermark; the next one writes all of it."""
    raise SystemExit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
