"""`python -m workloads.gateway --site NAME --listen H:P --editions FILE ...`: be a site's gateway until SIGTERM.

It serves what the site's agent writes into the file, and goes on to the next edition without a restart; with
`--bundle DIR` it serves that one bundle for ever. At home it is given the pseudonym key and the profiles; a cloud site
must have neither. With `--peer` it ranks at the other site what this one cannot in time, and lends it as much.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter

from workloads.bundle.site import EditionsWatch, SiteDirectory
from workloads.bundle.store import Bundle, BundleFault, open_bundle
from workloads.contract.editions import Edition
from workloads.contract.sites import SITES, SiteKind, SiteName, site_name
from workloads.data.profiles import ProfileStoreError, open_profiles
from workloads.gateway.app import Gateway
from workloads.gateway.catalogue_sample import Sampler, UsersFileError, read_users
from workloads.gateway.doors import HttpIntake, HttpRetrieval, neighbour
from workloads.gateway.editions import Editions, Serving, follow
from workloads.gateway.identity import CloudEdge, Edge, HomeEdge
from workloads.gateway.ladder import Reason
from workloads.gateway.people import People
from workloads.gateway.pipeline import Pipeline
from workloads.gateway.ranking import Ranking
from workloads.gateway.router import Router
from workloads.gateway.routes import open_rankers, peer_of, price_of, route_facts, tell
from workloads.gateway.timing import SystemClock
from workloads.privacy.pseudonym import KeyFileError
from workloads.privacy.vault import SqliteVault, VaultError
from workloads.telemetry import log
from workloads.telemetry.beside import settle
from workloads.telemetry.metrics import RouteMetrics, StageMetrics, new_registry
from workloads.telemetry.service import CannotStartError, run

_GC_THRESHOLDS = (20_000, 20, 50)
"""What is loaded lives for ever and is frozen; what a request makes dies without the collector's help."""


_MISMATCHES = {Reason.RETRIEVAL_OTHER_BUNDLE: "retrieval", Reason.PEER_OTHER_BUNDLE: "peer"}
"""Who was met on another edition, as the metric names it."""


def main() -> int:
    """Exit code: 0 stopped when asked, 2 could not start."""
    parser = argparse.ArgumentParser(prog="python -m workloads.gateway", description=__doc__)
    parser.add_argument("--site", required=True, type=site_name, metavar="NAME")
    parser.add_argument(
        "--site-kind", choices=[kind.value for kind in SiteKind], help="needed for a site that the rehearsal has not"
    )
    parser.add_argument("--listen", required=True, metavar="HOST:PORT", help="loopback address to serve at")
    served = parser.add_mutually_exclusive_group(required=True)
    served.add_argument("--editions", type=Path, metavar="FILE", help="the site's editions.json, written by its agent")
    served.add_argument("--bundle", type=Path, metavar="DIR", help="one verified bundle, for ever")
    parser.add_argument("--retrieval", required=True, metavar="URL", help="the site's retrieval service")
    parser.add_argument("--triton", required=True, metavar="HOST:PORT", help="the site's Triton, HTTP")
    parser.add_argument("--intake", required=True, metavar="URL", help="the intake at home")
    parser.add_argument("--peer", type=peer_of, metavar="NAME=URL", help="the other site, and its gateway")
    parser.add_argument(
        "--price",
        type=price_of,
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="of ranking 1000 requests at a site, the way there included; any unit",
    )
    parser.add_argument("--profiles", metavar="WHERE", help="home only: profiles.sqlite, or redis://host:port/db")
    parser.add_argument("--vault", type=Path, metavar="PATH", help="home only: vault.sqlite, keys in key/ beside it")
    parser.add_argument("--users-sample", type=Path, metavar="PATH", help="home only: users-sample.json")
    options = parser.parse_args()
    if options.site_kind is None and options.site not in set(SiteName):
        parser.error(f"--site-kind: say what kind of site {options.site} is")
    known = options.site_kind is None
    kind = SITES[SiteName(options.site)].kind if known else SiteKind(options.site_kind)
    if fault := _home_fault(kind, options) or _peer_fault(options):
        parser.error(fault)
    return run("gateway", options.site, options.listen, lambda: _build(options, kind))


def _peer_fault(options: argparse.Namespace) -> str | None:
    """Why peer and prices do not fit together, or None."""
    sites = {options.site} | ({options.peer.name} if options.peer else set())
    if options.peer and options.peer.name == options.site:
        return f"--peer: {options.site} is this site itself"
    if strangers := {name for name, _ in options.price} - sites:
        return f"--price: {', '.join(sorted(strangers))} is neither this site nor its peer"
    return None


def _home_fault(kind: SiteKind, options: argparse.Namespace) -> str | None:
    """Why these options do not fit the kind of site, or None."""
    home_only = ("profiles", "vault", "users_sample")
    given = [f"--{name.replace('_', '-')}" for name in home_only if getattr(options, name) is not None]
    if kind is not SiteKind.HOME and given:
        return f"{', '.join(given)}: ids and profiles of people stay at home; {options.site} is a {kind.value} site"
    if kind is SiteKind.HOME and options.vault is None:
        return f"--vault: {options.site} is home and must map users to pseudonyms"
    return None


def _fault_counter(registry: CollectorRegistry, routes: RouteMetrics) -> Callable[[Reason], None]:
    """What counts calls to neighbours that gave no usable answer."""
    faults = Counter("rankbridge_neighbour_faults", "Calls that gave no usable answer", ("reason",), registry=registry)
    children = {reason: faults.labels(reason.value) for reason in Reason}

    def count(reason: Reason) -> None:
        children[reason].inc()
        if reason in _MISMATCHES:
            routes.mismatch(_MISMATCHES[reason])

    return count


def _build(options: argparse.Namespace, kind: SiteKind) -> Gateway:
    """Open everything. Raises CannotStartError."""
    metrics = StageMetrics(new_registry())
    routes = RouteMetrics(metrics.registry)
    dropped = Counter(
        "rankbridge_context_dropped",
        "Entries of events' contexts that the contract does not name",
        registry=metrics.registry,
    )
    on_fault = _fault_counter(metrics.registry, routes)
    clock = SystemClock()
    facts = route_facts(options.site, kind, options.peer, dict(options.price))
    router = Router(facts, random=random.random)
    tell(router, clock, metrics.registry)

    try:
        neighbour(options.triton)
        retrieval, intake = HttpRetrieval(options.retrieval), HttpIntake(options.intake)
        profiles = None if options.profiles is None else open_profiles(options.profiles, os.environ)
        people = None if profiles is None else People(profiles, clock)
        users = [] if options.users_sample is None else read_users(options.users_sample)
        edge: Edge = (
            CloudEdge(dropped.inc) if options.vault is None else HomeEdge(SqliteVault(options.vault), dropped.inc)
        )
    except VaultError as error:
        raise CannotStartError(error.fault, error.remedy) from None
    except (ProfileStoreError, KeyFileError, UsersFileError) as error:
        raise CannotStartError(str(error), "prepare the data set again") from None
    except ValueError as error:
        raise CannotStartError(str(error), "correct the address") from None

    def serve(bundle: Bundle, delta: int) -> Serving:
        edition = Edition(bundle=bundle.id, delta=delta)
        ranking = Ranking(
            site=options.site,
            router=router,
            doors=open_rankers(options.site, options.triton, options.peer, bundle, edition),
            clock=clock,
            on_fault=on_fault,
            watch=routes,
        )
        pipeline = Pipeline(
            site=options.site,
            bundle=bundle,
            delta=delta,
            ranking=ranking,
            retrieval=retrieval,
            people=people,
            clock=clock,
            on_fault=on_fault,
        )
        pipeline.warm_up()
        return Serving(edition, pipeline, Sampler(bundle, users, pipeline.best_rung))

    first: Serving | None = None
    following: Callable[[], Awaitable[None]] | None = None
    if options.bundle is not None:
        try:
            first = serve(open_bundle(options.bundle), 0)
        except BundleFault as error:
            raise CannotStartError(str(error), error.remedy) from None
        except ValueError as error:
            raise CannotStartError(str(error), "export the bundle again") from None
    editions = Editions(metrics.registry, first)
    if options.editions is not None:
        directory = SiteDirectory(options.editions.absolute().parent)
        watch = EditionsWatch(options.editions)
        following = functools.partial(
            follow, editions, watch, lambda edition: serve(directory.open(edition), edition.delta)
        )

    app = Gateway(
        site=options.site,
        editions=editions,
        retrieval=retrieval,
        intake=intake,
        edge=edge,
        people=people,
        forgetting=edge if isinstance(edge, HomeEdge) else None,
        metrics=metrics,
        follow=following,
        clock=clock,
        routes=routes,
    )
    settle()
    gc.set_threshold(*_GC_THRESHOLDS)
    log.get(component="gateway").info(
        "loaded", edition=None if first is None else str(first.edition), profiles=people is not None
    )
    return app


if __name__ == "__main__":
    sys.exit(main())
