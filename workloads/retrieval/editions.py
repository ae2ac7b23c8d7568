"""The editions that retrieval answers queries of: several at once, opened beside the answers, dropped when not wanted.

Item indices mean something within one edition only, so that a query names its edition and gets no other's answer.
While a site goes from one to the next, both are held. Knows no HTTP, and no edition's inside.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final, Protocol

from prometheus_client import CollectorRegistry, Gauge

from workloads.bundle.site import LOOK_EVERY_S, EditionsFault, EditionsWatch
from workloads.bundle.store import BundleFault
from workloads.contract.editions import Edition, SiteEditions
from workloads.contract.http import CandidatesAnswer, CandidatesQuery
from workloads.retrieval.dense import ModelFault
from workloads.telemetry import log
from workloads.telemetry.beside import beside, settle

AGAIN_AFTER_S: Final = 5.0
"""When an edition that could not be opened is tried again, if the site still names it."""

_logger = log.get(component="editions")


class Candidates(Protocol):
    """Answers queries of one edition."""

    bundle_id: str
    delta: int

    def candidates(self, query: CandidatesQuery) -> CandidatesAnswer:
        """The answer. Raises QueryFault."""
        ...


Open = Callable[[Edition], Candidates]
"""Opens an edition, warm. Raises BundleFault, ModelFault, ValueError or OSError. Called in a thread."""


class Editions:
    """What is held, by (bundle id, deltas), and what could not be opened."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.held: dict[tuple[str, int], Candidates] = {}
        self.faults: dict[str, str] = {}
        self.serve: Edition | None = None
        """What gateways answer from, as far as is known here."""
        self.revision = 0
        """Of the file as far as it is brought about."""
        self._held = Gauge("rankbridge_edition", "1 for each edition held", ("bundle", "delta"), registry=registry)

    def hold(self, retriever: Candidates) -> None:
        """Answer its queries from now on."""
        self.held[retriever.bundle_id, retriever.delta] = retriever
        self._held.labels(retriever.bundle_id[:12], str(retriever.delta)).set(1)

    def drop(self, edition: Edition) -> None:
        """Answer its queries no more. Answers are made one at a time on the event loop: none is under way."""
        del self.held[edition.bundle, edition.delta]
        self._held.remove(edition.bundle[:12], str(edition.delta))

    @property
    def names(self) -> list[str]:
        """Of what is held."""
        return sorted(str(Edition(bundle=bundle, delta=delta)) for bundle, delta in self.held)

    def missing(self) -> dict[str, str]:
        """What a gateway would ask for in vain; empty is ready."""
        if self.serve is None:
            return {} if self.held else {"editions": "the site's agent has brought nothing yet"}
        if (self.serve.bundle, self.serve.delta) in self.held:
            return {}
        name = str(self.serve)
        return {name: self.faults.get(name, "is being opened")}


async def follow(
    editions: Editions,
    watch: EditionsWatch,
    open_edition: Open,
    *,
    period_s: float = LOOK_EVERY_S,
    again_after_s: float = AGAIN_AFTER_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Keep `editions` on what the site's file says, until cancelled."""
    wanted: SiteEditions | None = None
    again_at: dict[Edition, float] = {}
    while True:
        try:
            if (found := watch.changed()) is not None:
                wanted, again_at, editions.faults = found, {}, {}
                editions.serve = found.serve
                _drop_unwanted(editions, found)
        except EditionsFault as error:
            _logger.error("the site's editions cannot be read", fault=str(error))
            editions.faults = {"editions": str(error)}
        if (edition := _next(editions, wanted, again_at, clock())) is not None:
            await _open(editions, edition, open_edition)
            if (edition.bundle, edition.delta) not in editions.held:
                again_at[edition] = clock() + again_after_s
            continue  # the file may have changed meanwhile
        if wanted is not None:
            editions.revision = wanted.revision
        await asyncio.sleep(period_s)


def _next(
    editions: Editions, wanted: SiteEditions | None, again_at: dict[Edition, float], now: float
) -> Edition | None:
    """What to open: what gateways answer from before anything else."""
    if wanted is None:
        return None
    for edition in (wanted.serve, *wanted.load):
        if (edition.bundle, edition.delta) not in editions.held and now >= again_at.get(edition, 0.0):
            return edition
    return None


def _drop_unwanted(editions: Editions, wanted: SiteEditions) -> None:
    kept = {(edition.bundle, edition.delta) for edition in wanted.load}
    leaving = [Edition(bundle=bundle, delta=delta) for bundle, delta in editions.held if (bundle, delta) not in kept]
    for edition in leaving:
        editions.drop(edition)
        _logger.info("edition dropped", edition=str(edition))
    if leaving:
        settle()


async def _open(editions: Editions, edition: Edition, open_edition: Open) -> None:
    name, begun = str(edition), time.perf_counter()
    try:
        editions.hold(await beside(lambda: open_edition(edition)))
    except (BundleFault, ModelFault, ValueError, OSError) as error:
        if editions.faults.get(name) != str(error):
            _logger.error("cannot open an edition", edition=name, fault=str(error))
        editions.faults[name] = str(error)
    except Exception as error:  # a bundle that was verified and still breaks us: the others must serve on
        _logger.exception("cannot open an edition", edition=name)
        editions.faults[name] = f"{type(error).__name__}: {error}"
    else:
        editions.faults.pop(name, None)
        settle()
        _logger.info("edition opened", edition=name, seconds=round(time.perf_counter() - begun, 3))
