"""`python -m workloads.training --dataset DIR --home DIR`: train, with progress as JSON lines on stdout.

With `--replica NAME --data-bucket B` the data set is first fetched from the bucket, by a process of its own; with
`--confine` this one then puts itself under Landlock and reads nothing but `--home`. Both come before any library that
starts threads is loaded, torch among them, so this module only knows where training happens, not what it is.
"""

from __future__ import annotations

import argparse
import contextlib
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from workloads.privacy.confinement import ASKED, ConfinementError, confine_as_asked, within
from workloads.telemetry.progress import FaultLine, Progress, ResultLine, parse

EXIT_FAULT = 2
REPLICA = "replica"
"""Folder in the home for data sets fetched from the bucket."""


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _FetchError(Exception):
    """The replica could not be fetched; its own lines have said why."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _place() -> argparse.ArgumentParser:
    """Options that say where the data comes from and where the job may go."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dataset", type=Path, help="a directory that `python -m workloads.data` made")
    source.add_argument("--replica", metavar="NAME", help="a replicated data set; fetched into <home>/replica")
    parser.add_argument("--data-bucket", metavar="BUCKET", help="the bucket that has the replica")
    parser.add_argument(
        "--confine",
        nargs="?",
        const="yes",
        choices=ASKED,
        help="read and write nothing but --home (Landlock); `try`: where the kernel can",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; 0, 2 for a fault (told as a `fault` line), 128 + the signal that ended it."""
    argv = sys.argv[1:] if argv is None else argv
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        if not {"-h", "--help"} & set(argv):
            place, _ = _place().parse_known_args(argv)
            dataset = place.dataset if place.replica is None else _fetch(place)
            if place.confine is not None:
                within(place.home, [dataset])
                confine_as_asked(place.confine, place.home, progress)
        else:
            dataset = Path()
        # Late: what is loaded here starts threads, which a confinement that comes after them would not hold.
        from workloads.training.command import run  # noqa: PLC0415

        return run(argv, dataset, progress, parent=_place())
    except _StoppedError as stopped:
        return 128 + stopped.number
    except _FetchError as error:
        return error.code
    except ConfinementError as error:
        progress.fault(error.fault, error.remedy)
        return EXIT_FAULT


def _fetch(place: argparse.Namespace) -> Path:
    """Have the replica fetched; its lines become ours, but for the result, which is where the data set lies."""
    if place.data_bucket is None:
        Progress().fault("--replica names a data set but no bucket", "say which with --data-bucket")
        raise _FetchError(EXIT_FAULT)
    command = [sys.executable, "-m", "workloads.replication", "fetch", "--dataset", place.replica]
    command += ["--data-bucket", place.data_bucket, "--into", str(place.home / REPLICA)]
    made: Path | None = None
    told = False
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            for text in process.stdout or ():
                line = parse(text)
                if isinstance(line, ResultLine):
                    made = Path(line.made["dataset"])
                else:
                    told = told or isinstance(line, FaultLine)
                    sys.stdout.write(text)
                    sys.stdout.flush()
        except BaseException:
            process.terminate()
            raise
    if process.returncode or made is None:
        if not told:
            Progress().fault(f"fetching the replica ended with {process.returncode}", "see what it said on stderr")
        raise _FetchError(process.returncode if process.returncode > 0 else EXIT_FAULT)
    return made


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
