"""`python -m workloads.agent install|run ...`: bring a bundle to a site, and keep its models in Triton.

`install` is a job (progress lines on stdout, exit code 0, 2 with a fault line, 128 + signal). `run` does the same
and is then a server until SIGTERM: it loads the models whenever Triton does not have them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from workloads.agent.door import HttpTriton
from workloads.agent.installation import Installation, install
from workloads.agent.keeper import Keeper
from workloads.agent.repository import parse_injections
from workloads.agent.service import create_app
from workloads.bundle.store import BundleFault
from workloads.contract.sites import SiteClass, SiteName
from workloads.telemetry.metrics import new_registry
from workloads.telemetry.progress import Progress
from workloads.telemetry.service import CannotStartError, Service, run

BAD_INPUT = 2


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--site", required=True, choices=[name.value for name in SiteName], help="name of the site")
    shared.add_argument(
        "--site-class",
        required=True,
        type=SiteClass,
        choices=list(SiteClass),
        metavar="cpu|gpu",
        help="what Triton may use there",
    )
    shared.add_argument("--bundle", required=True, type=Path, metavar="DIR", help="directory of the bundle to serve")
    shared.add_argument("--site-dir", required=True, type=Path, metavar="DIR", help="the site's directory of state")
    shared.add_argument(
        "--inject", action="append", default=[], metavar="FAULT", help="plant a fault: ranker-delay=80ms"
    )
    parser = argparse.ArgumentParser(prog="python -m workloads.agent", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("install", parents=[shared], help="verify, copy and render the bundle, then end")
    server = commands.add_parser("run", parents=[shared], help="install, then keep the models loaded until SIGTERM")
    server.add_argument("--triton", required=True, metavar="HOST:PORT", help="HTTP address of the site's Triton")
    server.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 installed, or stopped when asked; 2 on bad input."""
    options = _parser().parse_args(arguments)

    def bring() -> Installation:
        """Raises CannotStartError with fault and remedy."""
        try:
            return install(options.bundle, options.site_dir, options.site_class, parse_injections(options.inject))
        except BundleFault as error:
            raise CannotStartError(f"not a bundle that may be served: {error}", error.remedy) from error
        except ValueError as error:
            raise CannotStartError(str(error), "see `python -m workloads.agent install --help`") from error
        except OSError as error:
            raise CannotStartError(
                f"cannot write {options.site_dir}: {error}", "make room, or give a --site-dir that can be written"
            ) from error

    if options.command == "install":
        return _install(bring)

    def build() -> Service:
        models = bring().models
        return create_app(lambda: HttpTriton.open(options.triton), lambda door: Keeper(door, models), new_registry())

    return run("agent", options.site, options.listen, build)


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise _StoppedError(number)


def _install(bring: Callable[[], Installation]) -> int:
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        installed = bring()
    except CannotStartError as error:
        progress.fault(error.fault, error.remedy)
        return BAD_INPUT
    except _StoppedError as stopped:
        return 128 + stopped.number
    progress.result(
        {
            "bundle": str(installed.bundle.path),
            "repository": str(installed.repository),
            "models": " ".join(installed.models),
        }
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
