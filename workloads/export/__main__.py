"""`python -m workloads.export --training DIR --dataset DIR --home DIR`: make a bundle of a training run.

Progress as JSON lines on stdout; the last one is a result that names the bundle, or a fault. Exit code 0,
2 for a fault, 128 + signal when it was asked to end; then nothing half-made is left. With `--confine` the
process puts itself under Landlock before it loads anything, and reads and writes nothing but `--home`.
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

from workloads.privacy.confinement import ASKED, ConfinementError, confine_as_asked, within
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
    parser = argparse.ArgumentParser(prog="python -m workloads.export", description=__doc__)
    parser.add_argument(
        "--training", type=Path, required=True, metavar="DIR", help="directory of a finished training run"
    )
    parser.add_argument(
        "--dataset", type=Path, required=True, metavar="DIR", help="the data set that it was trained on"
    )
    parser.add_argument(
        "--home", type=Path, required=True, metavar="DIR", help="the product's state directory, .rankbridge"
    )
    parser.add_argument(
        "--confine",
        nargs="?",
        const="yes",
        choices=ASKED,
        help="read and write nothing but --home (Landlock); `try`: where the kernel can",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job and return its exit code."""
    arguments = _arguments(argv)
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if arguments.confine is not None:
            within(arguments.home, [arguments.training, arguments.dataset])
            confine_as_asked(arguments.confine, arguments.home, progress)
        # Late: torch takes seconds to load, in which a signal must end the job already, and starts threads, which a
        # confinement that comes after it would not hold.
        from workloads.export.job import ExportFault, export  # noqa: PLC0415

        try:
            bundle = export(
                arguments.training,
                arguments.dataset,
                arguments.home / "bundles",
                progress,
                now_ms=lambda: int(time.time() * 1000),
            )
        except ExportFault as error:
            progress.fault(error.fault, error.remedy)
            return EXIT_FAULT
        except OSError as error:
            progress.fault(f"cannot write below {arguments.home}: {error}", "check free space and permissions there")
            return EXIT_FAULT
    except ConfinementError as error:
        progress.fault(error.fault, error.remedy)
        return EXIT_FAULT
    except _StoppedError as stopped:
        return 128 + stopped.number
    progress.result({"bundle": str(bundle)})
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
