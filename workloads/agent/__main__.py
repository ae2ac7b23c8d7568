"""`python -m workloads.agent install|fetch|run|rollback|resume ...`: bring bundles to a site, and keep them served.

`run` is a server until SIGTERM. It watches a channel of the models bucket (`--channel`, `--models-bucket`; endpoint,
region and credentials are the standard AWS configuration's) or serves one directory for ever (`--bundle`), and takes
the site from edition to edition through `<site-dir>/editions.json`. `install` is a job: verify, copy, render, end;
`fetch` is one that brings what a channel points to onto the disk, verified, and does nothing with it.
`rollback` asks the site's agent to go back to an edition that is on disk, and waits; it needs no cloud. `resume` lets
the site follow its channel again. Jobs write progress lines on stdout; exit code 0, 2 with a fault line, 128 + signal.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import importlib.metadata
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import FrameType
from typing import NoReturn

from prometheus_client import CollectorRegistry

from workloads.agent import memory
from workloads.agent.crash import POINTS, kill_at, nowhere
from workloads.agent.deployment import Deployment
from workloads.agent.door import HttpTriton
from workloads.agent.injection import parse_injections
from workloads.agent.installation import Installation, install
from workloads.agent.keeper import Keeper
from workloads.agent.neighbours import HttpNeighbours
from workloads.agent.refusal import Hindrance, Refusal
from workloads.agent.releases import ChannelReleases, FixedRelease, Releases
from workloads.agent.rollback import RollbackFault, resume, rollback
from workloads.agent.service import Work, create_app
from workloads.bundle.registry import Registry
from workloads.bundle.signature import SignatureFault, Trust
from workloads.bundle.site import SiteDirectory
from workloads.bundle.store import BundleFault
from workloads.contract.sites import SiteClass, site_name
from workloads.contract.storage import channel_key
from workloads.telemetry.metrics import new_registry
from workloads.telemetry.progress import Progress
from workloads.telemetry.service import CannotStartError, Service, run

BAD_INPUT = 2
WAIT_S = 60.0
LOCK_FILE = "agent.lock"
NICENESS = 10
"""Whoever answers requests goes before an agent that verifies a bundle on the same cores."""


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--site", required=True, type=site_name, metavar="NAME", help="name of the site")
    shared.add_argument(
        "--site-class",
        required=True,
        type=SiteClass,
        choices=list(SiteClass),
        metavar="cpu|gpu",
        help="what Triton may use there",
    )
    shared.add_argument(
        "--inject", action="append", default=[], metavar="FAULT", help="plant a fault: ranker-delay=80ms"
    )
    of_site = argparse.ArgumentParser(add_help=False)
    of_site.add_argument("--site-dir", required=True, type=Path, metavar="DIR", help="the site's directory of state")
    parser = argparse.ArgumentParser(
        prog="python -m workloads.agent", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    job = commands.add_parser("install", parents=[shared, of_site], help="verify, copy and render a bundle, then end")
    job.add_argument("--bundle", required=True, type=Path, metavar="DIR", help="directory of the bundle")
    bring = commands.add_parser("fetch", parents=[of_site], help="what a channel points to, verified, onto the disk")
    bring.add_argument("--channel", required=True, metavar="NAME", help="channel of the registry")
    bring.add_argument("--models-bucket", required=True, metavar="NAME", help="bucket, or ssm:PARAMETER#ENTRY")
    bring.add_argument("--trust", type=Path, metavar="DIR", help="as with `run`")
    server = commands.add_parser("run", parents=[shared, of_site], help="keep the site on its channel until SIGTERM")
    source = server.add_mutually_exclusive_group(required=True)
    source.add_argument("--channel", metavar="NAME", help="channel of the registry to follow")
    source.add_argument("--bundle", type=Path, metavar="DIR", help="one bundle to serve for ever")
    server.add_argument("--models-bucket", metavar="NAME", help="bucket of the registry; goes with --channel")
    server.add_argument(
        "--trust", type=Path, metavar="DIR", help="folder of the signers' public keys; default <site-dir>/trust"
    )
    server.add_argument("--triton", required=True, metavar="HOST:PORT", help="HTTP address of the site's Triton")
    server.add_argument("--retrieval", metavar="URL", help="the site's retrieval; without it, it is not waited for")
    server.add_argument(
        "--gateway", action="append", default=[], metavar="URL", help="a gateway of the site; once for each"
    )
    server.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    server.add_argument("--crash-at", choices=POINTS, help="for tests: die by SIGKILL at this point of a flip")
    back = commands.add_parser("rollback", parents=[of_site], help="go back to an edition that is on the site's disk")
    back.add_argument(
        "--to", metavar="ID", help="bundle id or its beginning, with +N for N deltas; default: the previous"
    )
    ahead = commands.add_parser("resume", parents=[of_site], help="follow the channel again after a rollback")
    for waiting in (back, ahead):
        waiting.add_argument(
            "--wait-s", type=float, default=WAIT_S, metavar="S", help=f"how long to wait for it; default {WAIT_S:g}"
        )
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 done, or stopped when asked; 2 on bad input."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command == "run":
        if (options.channel is None) != (options.models_bucket is None):
            parser.error("--channel and --models-bucket go together")
        os.nice(NICENESS)
        return run("agent", options.site, options.listen, lambda: _build(options))
    if options.command == "install":
        return _job(lambda progress: _install(options, progress))
    if options.command == "fetch":
        return _job(lambda progress: _fetch(options, progress))
    act = rollback if options.command == "rollback" else resume
    return _job(lambda progress: act(options, progress, clock=time.monotonic, sleep=time.sleep))


def _bring(options: argparse.Namespace) -> Installation:
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


def _alone(root: Path) -> None:
    """Be the one agent of this site; the kernel gives the lock back when the process ends. Raises CannotStartError."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(root / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise CannotStartError(f"cannot write {root}: {error}", "give a --site-dir that can be written") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise CannotStartError(
            f"another agent runs at {root}", "stop it first: one agent writes a site's editions"
        ) from None


def _build(options: argparse.Namespace) -> Service:
    """Raises CannotStartError."""
    _alone(options.site_dir)
    releases: Releases
    if options.channel is None:
        _bring(options)
        releases = FixedRelease(options.bundle)
        memory.write_hold(options.site_dir, None)  # whoever starts it with a bundle wants that one
    else:
        releases = _channel(options)
    try:
        injection = parse_injections(options.inject)
    except ValueError as error:
        raise CannotStartError(str(error), "see `python -m workloads.agent run --help`") from error
    reached = nowhere if options.crash_at is None else kill_at(options.crash_at)

    @contextlib.asynccontextmanager
    async def opened(registry: CollectorRegistry) -> AsyncIterator[Work]:
        async with (
            HttpTriton.open(options.triton) as door,
            HttpNeighbours.open(options.retrieval, options.gateway) as neighbours,
        ):
            keeper = Keeper(door, {})
            yield (
                keeper,
                Deployment(
                    SiteDirectory(options.site_dir),
                    options.site_class,
                    releases=releases,
                    door=door,
                    keeper=keeper,
                    neighbours=neighbours,
                    registry=registry,
                    injection=injection,
                    onnxruntime=_onnxruntime(),
                    reached=reached,
                ),
            )

    return create_app(opened, releases, new_registry())


def _onnxruntime() -> str | None:
    """Version of the ONNX Runtime beside this agent; None where it has an image of its own without one."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("onnxruntime")
    return None


def _channel(options: argparse.Namespace) -> ChannelReleases:
    """Raises CannotStartError."""
    from workloads.objects.s3 import S3Objects  # noqa: PLC0415 - boto takes memory that a fixed bundle needs not pay
    from workloads.objects.store import ObjectsError  # noqa: PLC0415 - as above

    trust = options.trust or options.site_dir / "trust"
    try:
        channel_key(options.channel)  # a name that cannot be is told now, and not at each look
        registry = Registry(S3Objects(options.models_bucket), Trust.read(trust), parallel=2)
        releases = ChannelReleases(registry, options.channel)
    except SignatureFault as error:
        raise CannotStartError(str(error), error.remedy) from error
    except ObjectsError as error:  # no such profile, a parameter that cannot be read
        raise CannotStartError(error.fault, error.remedy) from error
    except ValueError as error:
        raise CannotStartError(str(error), "see `python -m workloads.agent run --help`") from error
    return releases


class _StoppedError(BaseException):
    """A signal asked the job to end; a BaseException, so that clean-up runs and nothing swallows it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, _: FrameType | None) -> NoReturn:
    raise _StoppedError(number)


def _job(work: Callable[[Progress], None]) -> int:
    progress = Progress()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        work(progress)
    except (CannotStartError, RollbackFault) as error:
        progress.fault(error.fault, error.remedy)
        return BAD_INPUT
    except _StoppedError as stopped:
        return 128 + stopped.number
    return 0


def _fetch(options: argparse.Namespace, progress: Progress) -> None:
    releases = _channel(options)
    try:
        wanted = releases.wanted()
        if wanted is None:
            raise CannotStartError(
                f"channel {options.channel} points to nothing", "publish a bundle: `rankbridge bundle promote`"
            )
        site = SiteDirectory(options.site_dir)
        releases.fetch(wanted, site)
    except Hindrance as error:
        raise CannotStartError(str(error), "check the bucket, and that credentials let you read it") from error
    except Refusal as error:
        raise CannotStartError(str(error), "publish it anew, or trust its signer") from error
    progress.result({"bundle": str(site.bundles / wanted.bundle)}, deltas=len(wanted.deltas))


def _install(options: argparse.Namespace, progress: Progress) -> None:
    installed = _bring(options)
    progress.result(
        {
            "bundle": str(installed.bundle),
            "repository": str(installed.repository),
            "models": " ".join(installed.models),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
