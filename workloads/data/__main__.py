"""`python -m workloads.data`: prepare a data set, with progress as JSON lines on stdout."""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import cast, get_args

from workloads.data.adapters import DEFAULT_MAX_BAD_SHARE
from workloads.data.events import TooManyFaultsError
from workloads.data.preparation import Request, SourceKind, fault_of, prepare, remedy_of
from workloads.data.reading import SourceError
from workloads.data.simulator import SimulatorConfig
from workloads.data.split import SplitError
from workloads.privacy.pseudonym import KeyFileError
from workloads.privacy.vault import VaultError
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
    defaults = SimulatorConfig()
    parser = argparse.ArgumentParser(prog="python -m workloads.data", description=__doc__)
    parser.add_argument(
        "--source",
        required=True,
        help="simulator | online-retail=PATH | sequences=PATH | events=PATH (CSV or Parquet) | lake[=ORIGIN]",
    )
    parser.add_argument("--home", type=Path, required=True, help="the product's state directory, .rankbridge")
    parser.add_argument("--users", type=int, default=defaults.users, help="simulator: number of people")
    parser.add_argument("--items", type=int, default=defaults.items, help="simulator: size of the catalogue")
    parser.add_argument("--events", type=int, default=defaults.events, help="simulator: number of events")
    parser.add_argument("--days", type=int, default=defaults.days, help="simulator: length of the log")
    parser.add_argument("--seed", type=int, default=defaults.seed, help="simulator: what all chance comes from")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        metavar="OURS=THEIRS",
        help="events: what a column is called in the file",
    )
    parser.add_argument(
        "--max-bad-share",
        type=float,
        default=DEFAULT_MAX_BAD_SHARE,
        help="largest share of bad rows that is put up with",
    )
    parser.add_argument("--again", action="store_true", help="prepare even what was prepared from this input before")
    return parser.parse_args(argv)


def _request(arguments: argparse.Namespace) -> Request:
    kind, _, path = arguments.source.partition("=")
    if kind not in get_args(SourceKind):
        raise SourceError(f"source {kind!r} is unknown", f"use one of {', '.join(get_args(SourceKind))}")
    if kind == "simulator" and path:
        raise SourceError(
            "the simulator takes no file", "say --source simulator, with --users, --items, --events, --seed"
        )
    if kind not in ("simulator", "lake") and not path:
        raise SourceError(f"source {kind} needs a file", f"say --source {kind}=PATH")
    share = arguments.max_bad_share
    if math.isnan(share) or not 0 <= share <= 1:
        raise SourceError(f"--max-bad-share {share}: must be 0 to 1", "0.05 allows five rows in a hundred")
    columns = {}
    for pair in arguments.column:
        ours, sign, theirs = pair.partition("=")
        if not (ours and sign and theirs):
            raise SourceError(f"--column {pair}: must be OURS=THEIRS", "for example --column user=customer_id")
        columns[ours] = theirs
    try:
        simulation = SimulatorConfig(
            users=arguments.users,
            items=arguments.items,
            events=arguments.events,
            days=arguments.days,
            seed=arguments.seed,
        )
    except ValueError as error:
        raise SourceError(str(error), "choose a size within the range") from None
    return Request(
        kind=cast("SourceKind", kind),
        path=arguments.home / "onprem" / "lake" if kind == "lake" else Path(path) if path else None,
        origin=path if kind == "lake" else "",
        simulation=simulation,
        columns=columns,
        max_bad_share=share,
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; the exit code is 0, 2 for a fault that was said on stdout, or 128 + signal."""
    arguments = _arguments(argv)
    progress = Progress()
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        made = prepare(_request(arguments), arguments.home, progress, again=arguments.again)
    except (SourceError, TooManyFaultsError, SplitError, KeyFileError, VaultError) as error:
        progress.fault(fault_of(error), remedy_of(error))
        return EXIT_FAULT
    except OSError as error:
        progress.fault(f"cannot write below {arguments.home}: {error}", "check free space and permissions there")
        return EXIT_FAULT
    except _StoppedError as stopped:
        return 128 + stopped.number
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    results = {
        "dataset": str(made.dataset),
        "profiles": str(made.profiles),
        "users_sample": str(made.users_sample),
        "vault": str(made.vault),
    }
    if made.fault_report is not None:
        results["fault_report"] = str(made.fault_report)
    progress.result(results, events=made.events, users=made.users, items=made.items, reused=float(made.reused))
    return 0


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the reader of the progress lines may go first
        sys.exit(main())
