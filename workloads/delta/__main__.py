"""`python -m workloads.delta make|publish|add`: new items on top of a bundle, without training.

    make     --bundle DIR [--deltas DIR ...] --items FILE --out DIR
    publish  --delta DIR --channel NAME --models-bucket NAME --key FILE --trust DIR --actor NAME
    add      --items FILE --work DIR --channel NAME --models-bucket NAME --key FILE --trust DIR --actor NAME

`add` is all of it: fetch what the channel serves, make the delta, sign it, publish it, move the channel. AWS comes from
its standard configuration; the password of the key, where it has one, from $RANKBRIDGE_SIGNING_PASSWORD.

Progress as JSON lines on stdout; the last one is a result that names what was made, or a fault. Exit code 0,
2 for a fault, 128 + signal when it was asked to end: then nothing half-made is left, and the channel is as it was or
has moved.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from workloads.contract.storage import channel_key
from workloads.telemetry.progress import Progress

EXIT_FAULT = 2
PASSWORD = "RANKBRIDGE_SIGNING_PASSWORD"  # noqa: S105 - the variable's name


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m workloads.delta", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    jobs = parser.add_subparsers(dest="job", required=True)
    make = jobs.add_parser("make", help="a delta of the new items in a file")
    make.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle that it goes on top of")
    make.add_argument(
        "--deltas", type=Path, nargs="*", default=[], metavar="DIR", help="the deltas that are on it already, in order"
    )
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="writes <DIR>/<bundle id>/<n>-<delta id>")
    publish = jobs.add_parser("publish", help="sign a delta and put it on top of what a channel serves")
    publish.add_argument("--delta", type=Path, required=True, metavar="DIR")
    add = jobs.add_parser("add", help="new items on top of what a channel serves now")
    add.add_argument("--work", type=Path, required=True, metavar="DIR", help="keeps bundles, deltas and what is made")
    for one in (make, add):
        one.add_argument("--items", type=Path, required=True, metavar="FILE", help=".csv, .jsonl or .parquet")
    for one in (publish, add):
        one.add_argument("--channel", required=True, metavar="NAME")
        one.add_argument("--models-bucket", required=True, metavar="NAME")
        one.add_argument("--key", type=Path, required=True, metavar="FILE", help="private key of the publisher")
        one.add_argument("--trust", type=Path, required=True, metavar="DIR", help="public keys that count")
        one.add_argument("--actor", required=True, metavar="NAME", help="who does it, for the log and the channel")
        one.add_argument("--audit", type=Path, metavar="FILE", help="the audit log, where it is at hand")
    return parser.parse_args(argv)


def _now_ms() -> int:
    return int(time.time() * 1000)


def _make(arguments: argparse.Namespace, progress: Progress) -> dict[str, str]:
    from workloads.delta.making import make  # noqa: PLC0415 - as in main

    made = make(arguments.bundle, arguments.deltas, arguments.items, arguments.out, progress, now_ms=_now_ms)
    return {"delta": str(made)}


def _publish(arguments: argparse.Namespace, progress: Progress) -> dict[str, str]:
    from workloads.bundle.channels import RegistryFault  # noqa: PLC0415 - as in main
    from workloads.bundle.registry import Registry  # noqa: PLC0415
    from workloads.bundle.signature import Trust  # noqa: PLC0415
    from workloads.delta.publishing import Publisher  # noqa: PLC0415
    from workloads.objects.named import password  # noqa: PLC0415
    from workloads.objects.s3 import S3Objects  # noqa: PLC0415
    from workloads.privacy.audit import AuditLog  # noqa: PLC0415

    try:
        channel_key(arguments.channel)
    except ValueError as error:
        raise RegistryFault(str(error), "give the name of a channel that there is") from None
    audit = None if arguments.audit is None else AuditLog(arguments.audit).append
    publisher = Publisher(
        registry=Registry(S3Objects(arguments.models_bucket), Trust.read(arguments.trust), audit=audit),
        channel=arguments.channel,
        actor=arguments.actor,
        key=arguments.key,
        password=password(os.environ.get(PASSWORD)),
    )
    if arguments.job == "publish":
        delta, pointer = arguments.delta, publisher.publish(arguments.delta)
    else:
        delta, pointer = publisher.add(arguments.items, arguments.work, progress, now_ms=_now_ms)
    return {
        "delta": str(delta),
        "bundle": pointer.current.bundle,
        "deltas": str(len(pointer.current.deltas)),
        "channel": pointer.channel,
        "sequence": str(pointer.sequence),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    arguments = _arguments(argv)
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        # Late: ONNX Runtime and boto3 take a moment to load, in which a signal must end the job already.
        from workloads.bundle.channels import RegistryFault  # noqa: PLC0415
        from workloads.bundle.signature import SignatureFault  # noqa: PLC0415
        from workloads.bundle.verification import BundleFault  # noqa: PLC0415
        from workloads.delta.making import MakeFault  # noqa: PLC0415
        from workloads.objects.store import ObjectsError  # noqa: PLC0415
        from workloads.privacy.audit import AuditError  # noqa: PLC0415

        try:
            made = _make(arguments, progress) if arguments.job == "make" else _publish(arguments, progress)
        except (MakeFault, RegistryFault, ObjectsError, AuditError) as error:
            progress.fault(error.fault, error.remedy)
            return EXIT_FAULT
        except (BundleFault, SignatureFault) as error:
            progress.fault(str(error), error.remedy)
            return EXIT_FAULT
        except OSError as error:
            progress.fault(f"a file cannot be read or written: {error}", "check free space and permissions there")
            return EXIT_FAULT
    except _StoppedError as stopped:
        return 128 + stopped.number
    progress.result(made)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
