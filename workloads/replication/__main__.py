"""`python -m workloads.replication push|fetch|remove|list`: data sets into the bucket, out of it, and away.

Progress as JSON lines on stdout; the last is a result or a fault. Exit code 0, 2 for a fault, 128 + signal. Endpoint,
region and credentials are the standard AWS configuration's.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from workloads.contract.storage import replica_manifest_key
from workloads.data import replica
from workloads.data.dataset import DatasetError
from workloads.data.replica import ReplicaError
from workloads.objects.s3 import S3Objects
from workloads.objects.store import ObjectsError
from workloads.privacy.audit import AuditError, AuditLog
from workloads.privacy.columns import DEFAULT, PolicyError
from workloads.privacy.pseudonym import KeyFileError
from workloads.replication.bandwidth import parse_bytes
from workloads.replication.push import ACTOR, Settings, push
from workloads.replication.transfer import CHUNK_MIN
from workloads.telemetry.progress import Progress

EXIT_FAULT = 2


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _bytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _rate(text: str) -> int:
    try:
        rate = parse_bytes(text, per_second=True)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    if rate <= 0:
        raise argparse.ArgumentTypeError(f"{text!r}: must be above 0")
    return rate


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m workloads.replication", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    bucket = argparse.ArgumentParser(add_help=False)
    bucket.add_argument(
        "--data-bucket",
        required=True,
        metavar="BUCKET",
        help="the bucket for what may leave home, or ssm:PARAMETER#ENTRY",
    )

    one = commands.add_parser("push", parents=[bucket], help="replicate a prepared data set")
    one.add_argument("--dataset", type=Path, required=True, metavar="DIR", help="made by `python -m workloads.data`")
    one.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
    one.add_argument("--policy", type=Path, default=DEFAULT, metavar="FILE", help="column policy (columns.toml)")
    one.add_argument("--bandwidth", type=_rate, metavar="RATE", help="at most this much, such as 10MB/s")
    one.add_argument("--part-size", type=_bytes, default=defaults.part_bytes, metavar="SIZE", help="of a packed part")
    one.add_argument("--chunk-size", type=_bytes, default=defaults.chunk, metavar="SIZE", help="of one request")
    one.add_argument("--parallel", type=int, default=defaults.parallel, metavar="N", help="requests at a time")
    one.add_argument(
        "--no-read-back",
        action="store_true",
        help="do not read back what was sent (for a role that may not read); a fetch verifies it anyway",
    )

    one = commands.add_parser("fetch", parents=[bucket], help="make a data set of a replica")
    one.add_argument("--dataset", required=True, metavar="NAME", help="the data set's name at home")
    one.add_argument("--into", type=Path, required=True, metavar="DIR", help="folder for fetched data sets")

    one = commands.add_parser("remove", parents=[bucket], help="take a replica out of the bucket")
    one.add_argument("--dataset", required=True, metavar="NAME", help="the data set's name at home")
    one.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")

    commands.add_parser("list", parents=[bucket], help="name the replicas in the bucket")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    arguments = _arguments(argv)
    progress = Progress()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        _run(arguments, progress)
    except _StoppedError as stopped:
        return 128 + stopped.number
    except (ObjectsError, ReplicaError, PolicyError, KeyFileError, AuditError) as error:
        progress.fault(error.fault, error.remedy)
        return EXIT_FAULT
    except DatasetError as error:
        progress.fault(str(error), "prepare the data again with `python -m workloads.data`")
        return EXIT_FAULT
    except OSError as error:
        progress.fault(f"{error.filename or 'a file'}: {error.strerror}", "check the path, its rights and the disk")
        return EXIT_FAULT
    return 0


def _run(arguments: argparse.Namespace, progress: Progress) -> None:
    store = S3Objects(arguments.data_bucket)
    if arguments.command == "push":
        _push(arguments, store, progress)
    elif arguments.command == "fetch":
        made = replica.fetch(store, arguments.dataset, arguments.into, progress)
        progress.result({"dataset": str(made)})
    elif arguments.command == "remove":
        parts = replica.remove(store, arguments.dataset, now_ms=time.time_ns() // 1_000_000)
        AuditLog(arguments.home / "onprem" / "audit.jsonl").append(
            action="replica.remove",
            actor=ACTOR,
            subject=arguments.dataset,
            detail={"bucket": store.bucket, "parts": parts},
        )
        progress.result({"removed": arguments.dataset}, parts=parts)
    else:
        names = replica.replicas(store)
        for name in names:
            manifest = replica.read_manifest(store, name)
            size = sum(part.bytes for part in manifest.parts)
            progress.note("list", f"{name} ({manifest.policy})", bytes=size, events=manifest.tables["events"].rows)
        progress.result({}, replicas=len(names))


def _push(arguments: argparse.Namespace, store: S3Objects, progress: Progress) -> None:
    # S3 takes at most 10,000 parts of an object, and none but the last below 5 MiB.
    if arguments.chunk_size < CHUNK_MIN:
        raise ReplicaError(f"--chunk-size {arguments.chunk_size}: S3 takes no part below 5 MiB", "say 5MiB or more")
    if not arguments.chunk_size <= arguments.part_size <= 10_000 * arguments.chunk_size:
        raise ReplicaError(f"--part-size {arguments.part_size}: out of range", "say 1 to 10,000 times --chunk-size")
    if not 1 <= arguments.parallel <= 64:
        raise ReplicaError(f"--parallel {arguments.parallel}: must be 1 to 64", "say a number in that range")
    pushed = push(
        arguments.dataset,
        arguments.home,
        store,
        store.bucket,
        progress,
        audit=AuditLog(arguments.home / "onprem" / "audit.jsonl"),
        settings=Settings(
            policy=arguments.policy,
            rate=arguments.bandwidth,
            part_bytes=arguments.part_size,
            chunk=arguments.chunk_size,
            parallel=arguments.parallel,
            verify=not arguments.no_read_back,
        ),
    )
    manifest = pushed.manifest
    progress.result(
        {"replica": manifest.dataset, "manifest": replica_manifest_key(manifest.dataset)},
        bytes=sum(part.bytes for part in manifest.parts),
        parts=len(manifest.parts),
        sent=pushed.sums.sent,
        found=pushed.sums.found,
        verified=pushed.sums.verified,
        events=manifest.tables["events"].rows,
        kept_home=manifest.tables["events"].kept_home,
    )


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
