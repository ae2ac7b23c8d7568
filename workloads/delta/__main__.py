"""`python -m workloads.delta make --bundle DIR [--deltas DIR ...] --items FILE --out DIR`: new items without training.

Progress as JSON lines on stdout; the last one is a result that names what was made, or a fault. Exit code 0,
2 for a fault, 128 + signal when it was asked to end; then nothing half-made is left.
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


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workloads.delta", description=__doc__)
    jobs = parser.add_subparsers(dest="job", required=True)
    make = jobs.add_parser("make", help="a delta of the new items in a file")
    make.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle that it goes on top of")
    make.add_argument(
        "--deltas", type=Path, nargs="*", default=[], metavar="DIR", help="the deltas that are on it already, in order"
    )
    make.add_argument("--items", type=Path, required=True, metavar="FILE", help=".csv, .jsonl or .parquet")
    make.add_argument("--out", type=Path, required=True, metavar="DIR", help="writes <DIR>/<bundle id>/<n>-<delta id>")
    return parser.parse_args(argv)


def _make(arguments: argparse.Namespace, progress: Progress) -> dict[str, str]:
    # Late: ONNX Runtime takes a moment to load, in which a signal must end the job already.
    from workloads.delta.making import make  # noqa: PLC0415

    delta = make(
        arguments.bundle,
        arguments.deltas,
        arguments.items,
        arguments.out,
        progress,
        now_ms=lambda: int(time.time() * 1000),
    )
    return {"delta": str(delta)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    arguments = _arguments(argv)
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        from workloads.delta.making import MakeFault  # noqa: PLC0415 - as in _make

        try:
            made = _make(arguments, progress)
        except MakeFault as error:
            progress.fault(error.fault, error.remedy)
            return EXIT_FAULT
        except OSError as error:
            progress.fault(f"cannot write below {arguments.out}: {error}", "check free space and permissions there")
            return EXIT_FAULT
    except _StoppedError as stopped:
        return 128 + stopped.number
    progress.result(made)
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
