"""Which routes to a ranker a gateway has: at which price, through which doors, and what is told of them when scraped.

The pieces that `__main__` puts together for `ranking`; it decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

from prometheus_client import CollectorRegistry

from workloads.bundle.store import Bundle
from workloads.contract.editions import Edition
from workloads.contract.sites import PRICE_OF_THE_WAY, PRICE_PER_1000, SiteKind, site_name
from workloads.contract.slo import Rung
from workloads.contract.tensors import STUDENT
from workloads.gateway.calibration import CalibrationRow
from workloads.gateway.doors import PeerRanker, Ranker, StudentRanker, TritonRanker, neighbour
from workloads.gateway.router import Route, RouteFacts, Router, RouteState
from workloads.gateway.timing import Clock
from workloads.telemetry.metrics import ReadWhenScraped


class Peer(NamedTuple):
    """The other site."""

    name: str
    url: str
    """Of its gateway."""


def peer_of(text: str) -> Peer:
    """`NAME=URL` as a command line has it. Raises ValueError."""
    name, _, url = text.partition("=")
    neighbour(url)
    return Peer(site_name(name), url)


def price_of(text: str) -> tuple[str, float]:
    """`NAME=NUMBER` as a command line has it. Raises ValueError."""
    name, _, number = text.partition("=")
    price = float(number)
    if not (math.isfinite(price) and price >= 0.0):
        raise ValueError(f"{number} is no price")
    return site_name(name), price


def route_facts(site: str, kind: SiteKind, peer: Peer | None, prices: Mapping[str, float]) -> list[RouteFacts]:
    """What the router may choose from. `prices` by site, the way there included; the contract's where none is given.

    Times are of before anything was measured: of the first few calls only.
    """
    own = prices.get(site, PRICE_PER_1000[kind])
    facts = [
        RouteFacts(Route(site, Rung.FULL_RANKER), price=own, prior_ms=10.0),
        RouteFacts(Route(site, Rung.DISTILLED_RANKER), price=own, prior_ms=1.0),
    ]
    if peer is not None:
        other = SiteKind.CLOUD if kind is SiteKind.HOME else SiteKind.HOME
        price = prices.get(peer.name, PRICE_PER_1000[other] + PRICE_OF_THE_WAY)
        facts.append(RouteFacts(Route(peer.name, Rung.FULL_RANKER), price=price, prior_ms=25.0))
    return facts


def open_rankers(site: str, triton: str, peer: Peer | None, bundle: Bundle, edition: Edition) -> dict[Route, Ranker]:
    """The doors of one edition. Raises ValueError when its student cannot be opened."""
    doors: dict[Route, Ranker] = {
        Route(site, Rung.FULL_RANKER): TritonRanker(triton, bundle.id),
        Route(site, Rung.DISTILLED_RANKER): StudentRanker(bundle.model_path(STUDENT)),
    }
    if peer is not None:
        doors[Route(peer.name, Rung.FULL_RANKER)] = PeerRanker(peer.name, peer.url, edition)
    return doors


def tell(router: Router, clock: Clock, registry: CollectorRegistry) -> None:
    """Add to `/metrics` what the router knows: of each route, and whether its predictions were kept."""

    def of_routes(name: str, text: str, read: Callable[[RouteState], float]) -> None:
        def rows() -> list[tuple[tuple[str, str], float]]:
            states = router.states(clock.now_s())
            return [((state.route.site, str(int(state.route.rung))), read(state)) for state in states]

        registry.register(ReadWhenScraped(f"rankbridge_{name}", text, ("site", "rung"), rows))

    def of_predictions(name: str, text: str, read: Callable[[CalibrationRow], float]) -> None:
        def rows() -> list[tuple[tuple[str], float]]:
            return [((f"{row.up_to_ms:g}",), read(row)) for row in router.calibration.rows()]

        registry.register(ReadWhenScraped(f"rankbridge_{name}", text, ("up_to_ms",), rows))

    of_routes("route_predicted_seconds", "Expected of a call that began now", lambda state: state.predicted_ms / 1000.0)
    of_routes("route_in_flight", "Calls to a ranker now", lambda state: state.in_flight)
    of_routes(
        "route_share", "Of requests that would take it; 0 drained, below 1 coming back", lambda state: state.share
    )
    of_routes("route_drains_total", "Times that a route was drained", lambda state: state.drains)
    of_routes("route_probes_total", "Calls that asked whether a route is back", lambda state: state.probes)
    of_predictions("predictions_total", "Calls by what was predicted of them", lambda row: row.calls)
    of_predictions("predictions_kept_total", "Calls that took no longer than predicted", lambda row: row.within)
