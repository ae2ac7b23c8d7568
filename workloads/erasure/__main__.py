"""`python -m workloads.erasure run|rotate|finish|status --home DIR ...`: forget people everywhere, and change the key.

`run` takes the vault's queue and removes each person from every place; with `--watch` it goes on until SIGTERM.
`rotate` brings in the next key, `finish` renames everybody and destroys the old one (`workloads.erasure.rotation`).
Progress as JSON lines on stdout. Exit code 0, 2 for a fault, 128 + signal; whatever ends it, the next run goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

from workloads.data.custody import CustodyError, custody
from workloads.data.profiles import ProfilesDownError, ProfileStoreError, open_profiles
from workloads.erasure import rotation
from workloads.erasure.job import SETTLE_MS, run_pass
from workloads.erasure.places import EveryStore, PeopleStore, Place, PlaceError, Replicas, places_of
from workloads.objects.s3 import S3Objects
from workloads.objects.store import ObjectsError
from workloads.privacy.audit import AuditError, AuditLog
from workloads.privacy.pseudonym import KeyFileError
from workloads.privacy.vault import SqliteVault, VaultError
from workloads.telemetry.progress import Progress

EXIT_FAULT = 2
LOOK_EVERY_S = 2.0
"""How often `--watch` looks into the queue."""
AGAIN_AFTER_S = 15.0
"""When `--watch` tries a place again that could not be emptied."""


_FAULTS = (
    *(PlaceError, VaultError, KeyFileError, AuditError, ObjectsError),
    *(CustodyError, rotation.RotationError),
)


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    del frame
    raise _StoppedError(number)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m workloads.erasure", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
    shared.add_argument("--profiles", help="redis:// address or file, beside HOME/onprem/profiles.sqlite")

    replicas = argparse.ArgumentParser(add_help=False)
    bucket = replicas.add_mutually_exclusive_group(required=True)
    bucket.add_argument("--data-bucket", metavar="NAME", help="the bucket with replicas of data sets")
    bucket.add_argument("--no-replicas", action="store_true", help="nothing of this home was ever replicated")

    run = commands.add_parser("run", parents=[shared, replicas], help="remove everybody in the queue from every place")
    run.add_argument("--intake", metavar="URL", help="the intake; needed where there is a spool")
    run.add_argument("--watch", action="store_true", help="go on until SIGTERM")
    run.add_argument(
        "--settle",
        type=float,
        default=SETTLE_MS / 1000,
        metavar="SECONDS",
        help="how long a request that names a person may be on its way; the last pass is after that",
    )

    commands.add_parser("rotate", parents=[shared], help="make new names with a new key from now on")
    commands.add_parser("finish", parents=[shared, replicas], help="rename what has old names, and destroy the old key")

    commands.add_parser("status", parents=[shared], help="say who waits to be erased, and which keys are valid")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None, environ: Mapping[str, str] = os.environ) -> int:
    """Run the command and return its exit code."""
    arguments = _arguments(argv)
    progress = Progress()
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _stop)
        _run(arguments, environ, progress)
    except _StoppedError as stopped:
        return 128 + stopped.number
    except _FAULTS as error:
        progress.fault(error.fault, error.remedy)
        return EXIT_FAULT
    except (ProfileStoreError, ProfilesDownError) as error:
        progress.fault(str(error), "say where profiles are with --profiles, and see that they can be reached")
        return EXIT_FAULT
    except OSError as error:
        progress.fault(f"{error.filename or 'a file'}: {error.strerror}", "check the path, its rights and the disk")
        return EXIT_FAULT
    return 0


def _run(arguments: argparse.Namespace, environ: Mapping[str, str], progress: Progress) -> None:
    onprem = arguments.home / "onprem"
    audit = AuditLog(onprem / "audit.jsonl")
    with contextlib.closing(SqliteVault(onprem / "vault.sqlite")) as vault, _profiles(arguments, environ) as profiles:
        if arguments.command == "status":
            epochs = vault.epochs()
            progress.result(
                {erasure.ticket: "waits" for erasure in vault.queue()},
                people=sum(1 for _ in vault.all_users()),
                current=epochs.current,
                **({} if epochs.retiring is None else {"retiring": epochs.retiring}),
            )
        elif arguments.command == "rotate":
            with custody(arguments.home, alone=True):
                rotation.Rotation(arguments.home, vault, profiles, audit, progress=progress).begin()
        elif arguments.command == "finish":
            held = [] if arguments.no_replicas else [Replicas(arguments.home, S3Objects(arguments.data_bucket))]
            with custody(arguments.home, alone=True):
                rotation.Rotation(arguments.home, vault, profiles, audit, progress=progress, replicas=held).finish()
        else:
            places = places_of(
                arguments.home,
                intake=arguments.intake,
                profiles=profiles,
                bucket=None if arguments.no_replicas else S3Objects(arguments.data_bucket),
                knows=lambda user: vault.pseudonym(user) is not None,
            )
            _erase(arguments, vault, places, audit, progress)


def _erase(
    arguments: argparse.Namespace, vault: SqliteVault, places: Sequence[Place], audit: AuditLog, progress: Progress
) -> None:
    while True:
        waiting = len(vault.queue())
        settle_ms = round(arguments.settle * 1000)
        try:
            with custody(arguments.home, alone=True) if waiting else contextlib.nullcontext():
                left_ms = run_pass(vault, places, audit, progress, clock=_now_ms, settle_ms=settle_ms)
        except (PlaceError, AuditError, CustodyError) as error:
            if not arguments.watch:
                raise
            progress.note("erase", f"{error}; trying again")
            time.sleep(AGAIN_AFTER_S)
            continue
        if left_ms:
            progress.note("erase", "requests on their way may still name somebody; the last pass follows", ms=left_ms)
        elif not arguments.watch:
            progress.result({}, erased=waiting)
            return
        time.sleep(max(left_ms / 1000, LOOK_EVERY_S if arguments.watch else 0))


@contextlib.contextmanager
def _profiles(arguments: argparse.Namespace, environ: Mapping[str, str]) -> Iterator[PeopleStore | None]:
    """Every store of profiles; None for a home that has none and was told of none."""
    own = arguments.home / "onprem" / "profiles.sqlite"
    named = [] if arguments.profiles is None else [arguments.profiles]
    if own.exists() and str(own) not in named:
        named.append(str(own))
    with contextlib.ExitStack() as opened:
        stores = [opened.enter_context(contextlib.closing(open_profiles(where, environ))) for where in named]
        yield EveryStore(stores) if stores else None


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
