"""`python -m workloads.lake ingest|load|compact|verify|query|erase|relocate`: work on the lake at home.

Progress as JSON lines on stdout. Exit code 0, 1 where `verify` finds a difference, 2 for a fault, 128 + signal.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Final

import duckdb
import msgspec
from pyiceberg.exceptions import CommitFailedException

from workloads.contract.http import PSEUDONYM_PATTERN, SESSION_PATTERN
from workloads.lake.faults import LakeError
from workloads.lake.lake import Lake
from workloads.lake.reconciliation import reconcile
from workloads.lake.relocation import relocate
from workloads.lake.schema import SchemaError
from workloads.lake.spool import SpoolError, SqliteSpool
from workloads.telemetry.progress import Progress

EXIT_DIFFERENCE: Final = 1
EXIT_FAULT: Final = 2
_ROWS_MAX: Final = 10_000


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workloads.lake", description=__doc__)
    work = parser.add_subparsers(dest="work", required=True)
    for name, (_, text) in _WORK.items():
        one = work.add_parser(name, help=text, description=text)
        one.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
        if name in ("ingest", "verify"):
            one.add_argument("--spool", type=Path, help="the intake's file; HOME/onprem/events.sqlite unless given")
        if name == "load":
            one.add_argument("--dataset", type=Path, required=True, help="folder of a prepared data set")
            one.add_argument("--origin", help="name it gets in the lake; the folder's name unless given")
        if name == "query":
            one.add_argument("--sql", required=True, help="DuckDB's SQL over the view events; the answer as JSON lines")
        if name == "erase":
            one.add_argument("--pseudonyms", type=Path, required=True, help="file with a pseudonym a line; - is stdin")
    return parser.parse_args(argv)


def _lake(arguments: argparse.Namespace) -> Path:
    return Path(arguments.home) / "onprem" / "lake"


def _spool(arguments: argparse.Namespace) -> SqliteSpool:
    return SqliteSpool(arguments.spool or Path(arguments.home) / "onprem" / "events.sqlite")


def _ingest(arguments: argparse.Namespace, progress: Progress) -> int:
    spool = _spool(arguments)
    spool.columns()  # a wrong path makes no empty lake
    with Lake.open(_lake(arguments)) as lake:
        done = lake.ingest(spool, progress=progress)
        progress.result(
            {"lake": str(lake.path)},
            events=done.events,
            duplicates=done.duplicates,
            taken=done.taken,
            commits=done.commits,
        )
    return 0


def _load(arguments: argparse.Namespace, progress: Progress) -> int:
    with Lake.open(_lake(arguments)) as lake:
        done = lake.load(arguments.dataset, origin=arguments.origin, progress=progress)
        made = {"lake": str(lake.path), "origin": done.origin}
        progress.result(made, events=done.events, duplicates=done.duplicates, reused=float(done.reused))
    return 0


def _compact(arguments: argparse.Namespace, progress: Progress) -> int:
    with Lake.open(_lake(arguments), create=False) as lake:
        done = lake.compact(progress=progress)
        figures = {"files_before": done.before, "files_after": done.after, "bytes_rewritten": done.bytes_rewritten}
        progress.result({"lake": str(lake.path)}, **figures)
    return 0


def _verify(arguments: argparse.Namespace, progress: Progress) -> int:
    with Lake.open(_lake(arguments), create=False) as lake:
        found = reconcile(lake, _spool(arguments), progress=progress)
        for day in found.days:
            text = f"{day.day} {day.type}: spool {day.spool}, lake {day.lake}" + ("" if day.agrees else ", DIFFERENT")
            figures = {
                name: float(getattr(day, name)) for name in _COUNTS if name in ("spool", "lake") or getattr(day, name)
            }
            progress.note("verify", text, **figures)
        if not found.agrees:
            wrong = sum(not day.agrees for day in found.days)
            lost, extra, doubled = (
                sum(getattr(day, name) for day in found.days) for name in ("missing", "extra", "doubled")
            )
            progress.fault(
                f"spool and lake differ on {wrong} of {len(found.days)} days and types: "
                f"{lost} missing, {extra} extra, {doubled} doubled",
                "see the notes; where an erasure is under way, finish it and verify again",
            )
            return EXIT_DIFFERENCE
        total = sum(day.spool for day in found.days)
        progress.result(
            {"lake": str(lake.path)}, events=total, taken=found.taken, waiting=found.waiting, days=len(found.days)
        )
    return 0


_COUNTS: Final = ("spool", "lake", "again", "missing", "extra", "doubled")


def _query(arguments: argparse.Namespace, progress: Progress) -> int:
    with Lake.open(_lake(arguments), create=False) as lake:
        try:
            answer = lake.query(arguments.sql)
            rows = answer.limit(_ROWS_MAX).fetchall()
        except duckdb.Error as error:
            raise LakeError(f"the question cannot be answered: {error}", "correct --sql") from error
        for row in rows:
            line = msgspec.json.encode(dict(zip(answer.columns, row, strict=True)), enc_hook=str)
            sys.stdout.write(line.decode() + "\n")
        progress.result({"lake": str(lake.path)}, rows=len(rows))
    return 0


def _erase(arguments: argparse.Namespace, progress: Progress) -> int:
    text = sys.stdin.read() if str(arguments.pseudonyms) == "-" else arguments.pseudonyms.read_text()
    names = {line.strip() for line in text.splitlines() if line.strip()}
    if not names or any(not (re.fullmatch(PSEUDONYM_PATTERN, n) or re.fullmatch(SESSION_PATTERN, n)) for n in names):
        raise LakeError("that is no list of pseudonyms", "give one a line, as in p1-<32 hex>")
    with Lake.open(_lake(arguments), create=False) as lake:
        done = lake.erase(names, progress=progress)
        figures = {"events": done.events, "files_rewritten": done.files_rewritten, "files_deleted": done.files_deleted}
        progress.result({"lake": str(lake.path)}, **figures)
    return 0


def _relocate(arguments: argparse.Namespace, progress: Progress) -> int:
    progress.result({"lake": str(_lake(arguments))}, files=relocate(_lake(arguments)))
    return 0


_WORK: Final[dict[str, tuple[Callable[[argparse.Namespace, Progress], int], str]]] = {
    "ingest": (_ingest, "take what is new in the spool, each event once"),
    "load": (_load, "load a prepared data set as one origin"),
    "compact": (_compact, "merge small files and clear away old ones"),
    "verify": (_verify, "count spool and lake per day and type; 1 where they differ"),
    "query": (_query, "ask the lake in SQL"),
    "erase": (_erase, "remove people by their pseudonyms, down to the bytes"),
    "relocate": (_relocate, "catalogue the files anew after the folder was moved"),
}


_FAULTS: Final = (LakeError, SpoolError, SchemaError, CommitFailedException, duckdb.Error, OSError)


def _told(error: Exception, lake: Path) -> tuple[str, str]:
    """What is wrong, and what to do about it."""
    if isinstance(error, LakeError):
        return error.fault, error.remedy
    if isinstance(error, SpoolError | SchemaError):
        return str(error), "correct the input; the lake is as it was"
    if isinstance(error, OSError):
        return f"cannot use {lake}: {error}", "check free space and permissions there"
    return f"the lake was not as it should be: {error}", "run it again, or restore the folder from a copy"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; see the module for its exit codes."""
    arguments = _arguments(argv)
    progress = Progress()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _WORK[arguments.work][0](arguments, progress)
    except _FAULTS as error:
        progress.fault(*_told(error, _lake(arguments)))
        return EXIT_FAULT
    except _StoppedError as stopped:
        return 128 + stopped.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
