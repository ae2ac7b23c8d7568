"""`python -m workloads.operators hygiene|spot ...`: keep a cluster's cloud nodes true to their instances.

`hygiene` removes Nodes, and their k3s node passwords, of EC2 instances that have ended. `spot` empties nodes whose end
AWS announces in a queue. Both are servers until SIGTERM. The cluster is the pod's own or that of KUBECONFIG; endpoint
and credentials of AWS are the standard configuration's.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from collections.abc import Callable

from workloads.contract.operators import Operator
from workloads.operators.aws import AwsCloud, LifecycleHooks, SqsNotices
from workloads.operators.cloud import CloudFault
from workloads.operators.cluster import ClusterFault
from workloads.operators.draining import Handler, Times
from workloads.operators.hygiene import Limits
from workloads.operators.kubernetes import LightkubeCluster
from workloads.operators.router import Services
from workloads.operators.service import hygiene_service, spot_service
from workloads.operators.sweeper import Sweeper
from workloads.telemetry.metrics import new_registry
from workloads.telemetry.service import CannotStartError, Service, run

PERIOD_S = 5.0


def _parser() -> argparse.ArgumentParser:
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--site", required=True, metavar="NAME", help="the cloud site whose nodes these are")
    shared.add_argument("--region", required=True, metavar="REGION", help="AWS region of the site")
    shared.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    parser = argparse.ArgumentParser(
        prog="python -m workloads.operators", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    limits, times = Limits(), Times()
    hygiene = commands.add_parser(Operator.HYGIENE, parents=[shared], help="remove Nodes of ended instances")
    hygiene.add_argument(
        "--group",
        required=True,
        action="append",
        metavar="NAME",
        help="an Auto Scaling group of the site; once for each",
    )
    hygiene.add_argument(
        "--period-s", type=float, default=PERIOD_S, metavar="S", help=_default("between rounds", PERIOD_S)
    )
    hygiene.add_argument(
        "--rounds", type=int, default=limits.rounds, metavar="N", help=_default("rounds that must agree", limits.rounds)
    )
    hygiene.add_argument(
        "--unknown-s",
        type=float,
        default=limits.unknown_s,
        metavar="S",
        help=_default("how long EC2 must not know an instance", limits.unknown_s),
    )
    hygiene.add_argument(
        "--per-round",
        type=int,
        default=limits.per_round,
        metavar="N",
        help=_default("deletions in one round at most", limits.per_round),
    )
    spot = commands.add_parser(Operator.SPOT, parents=[shared], help="empty nodes whose end is announced")
    spot.add_argument("--queue-url", required=True, metavar="URL", help="the site's queue of notices")
    spot.add_argument(
        "--serving",
        required=True,
        action="append",
        metavar="NAMESPACE",
        help="a namespace whose pods lose their weight first; once for each",
    )
    for name, what in (
        ("notice", "from an interruption notice to the instance's end"),
        ("drain", "from a lifecycle action until the instance may go anyway"),
        ("heartbeat", "between heartbeats of a lifecycle action"),
    ):
        default = getattr(times, f"{name}_s")
        spot.add_argument(f"--{name}-s", type=float, default=default, metavar="S", help=_default(what, default))
    return parser


def _default(what: str, value: float) -> str:
    return f"{what}; default {value:g}"


def main(arguments: list[str] | None = None) -> int:
    """Exit code: 0 stopped when asked, 2 on bad input or where it cannot start."""
    options = _parser().parse_args(arguments)
    build = _hygiene if options.command == Operator.HYGIENE else _spot
    for library in ("httpx2", "botocore"):  # a line for each request is nobody's news
        logging.getLogger(library).setLevel(logging.WARNING)
    return run(options.command, options.site, options.listen, lambda: _built(build, options))


def _built(build: Callable[[argparse.Namespace], Service], options: argparse.Namespace) -> Service:
    """Raises CannotStartError."""
    try:
        return build(options)
    except ClusterFault as error:
        raise CannotStartError(str(error), "run it with a ServiceAccount, or set KUBECONFIG to a file") from error
    except CloudFault as error:
        raise CannotStartError(str(error), "check AWS_PROFILE or the credentials, and AWS_ENDPOINT_URL") from error
    except ValueError as error:
        raise CannotStartError(str(error), "see `python -m workloads.operators --help`") from error


def _hygiene(options: argparse.Namespace) -> Service:
    if options.period_s < 1:
        raise ValueError(f"--period-s {options.period_s:g}: AWS is not asked more than once a second")
    registry = new_registry()
    sweeper = Sweeper(
        LightkubeCluster.open(),
        AwsCloud(options.region),
        site=options.site,
        region=options.region,
        groups=options.group,
        limits=Limits(options.rounds, options.unknown_s, options.per_round),
        clock=time.monotonic,
        registry=registry,
    )
    return hygiene_service(sweeper, registry, period_s=options.period_s)


def _spot(options: argparse.Namespace) -> Service:
    registry = new_registry()
    cluster = LightkubeCluster.open()
    notices = SqsNotices(options.queue_url, options.region)
    handler = Handler(
        cluster,
        Services(cluster, options.serving),
        notices,
        LifecycleHooks(options.region),
        site=options.site,
        region=options.region,
        times=Times(options.notice_s, options.drain_s, options.heartbeat_s),
        clock=time.time,
        registry=registry,
    )
    return spot_service(handler, notices, registry)


if __name__ == "__main__":
    sys.exit(main())
