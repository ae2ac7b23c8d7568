"""Which edition a gateway answers from, and how it goes to another without stopping.

The next one is built whole beside the one that serves; then one assignment makes it the one that new requests begin
on. Requests in flight hold theirs until they are answered. What cannot be built changes nothing. Knows no HTTP.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge

from workloads.bundle.site import LOOK_EVERY_S, EditionsFault, EditionsWatch
from workloads.bundle.store import BundleFault
from workloads.contract.editions import Edition
from workloads.gateway.catalogue_sample import Sampler
from workloads.gateway.pipeline import Pipeline
from workloads.telemetry import log
from workloads.telemetry.beside import beside, settle

AGAIN_AFTER_S: Final = 5.0
"""When an edition that could not be opened is tried again, if the site still names it."""

_logger = log.get(component="editions")


class Serving:
    """One edition as this gateway answers from it, and how many requests are on it."""

    def __init__(self, edition: Edition, pipeline: Pipeline, sampler: Sampler) -> None:
        self.edition = edition
        self.pipeline = pipeline
        self.sampler = sampler
        self.in_flight = 0


class Editions:
    """The edition that serves, and those that requests still finish on."""

    def __init__(self, registry: CollectorRegistry, first: Serving | None = None) -> None:
        self.current: Serving | None = None
        self.faults: dict[str, str] = {}
        self.revision = 0
        """Of the site's file as far as it is brought about."""
        self._leaving: list[Serving] = []
        self._closing: set[asyncio.Task[None]] = set()
        self._edition = Gauge("rankbridge_edition", "1 for the edition served", ("bundle", "delta"), registry=registry)
        self._flips = Counter("rankbridge_flips", "Changes of the edition served", registry=registry)
        draining = Gauge("rankbridge_draining", "Requests in flight on an earlier edition", registry=registry)
        draining.set_function(lambda: float(self.draining))
        if first is not None:
            self._begin(first)

    @property
    def draining(self) -> int:
        """Requests in flight that began on another edition than the current one."""
        return sum(serving.in_flight for serving in self._leaving)

    @contextmanager
    def on(self, serving: Serving | None) -> Iterator[None]:
        """Count a request as being on `serving` while inside; None is on none."""
        if serving is None:
            yield
            return
        serving.in_flight += 1
        try:
            yield
        finally:
            serving.in_flight -= 1
            if not serving.in_flight and serving in self._leaving:
                self._close(serving)

    def flip(self, fresh: Serving) -> None:
        """From now on requests begin on `fresh`."""
        old = self.current
        self._begin(fresh)
        if old is None:
            return
        self._flips.inc()
        self._leaving.append(old)
        if not old.in_flight:
            self._close(old)

    def _begin(self, fresh: Serving) -> None:
        self.current = fresh
        self._edition.clear()
        self._edition.labels(fresh.edition.bundle[:12], str(fresh.edition.delta)).set(1)

    def _close(self, serving: Serving) -> None:
        """Give back what an edition alone has; profiles, retrieval and intake are the gateway's."""
        self._leaving.remove(serving)
        task = asyncio.get_running_loop().create_task(serving.pipeline.ranking.close())
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def close(self) -> None:
        """The server stops: close what is left."""
        left = [*self._leaving, *([self.current] if self.current is not None else [])]
        await asyncio.gather(*(serving.pipeline.ranking.close() for serving in left))


async def follow(
    editions: Editions,
    watch: EditionsWatch,
    build: Callable[[Edition], Serving],
    *,
    period_s: float = LOOK_EVERY_S,
    again_after_s: float = AGAIN_AFTER_S,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Keep `editions` on what the site's file says, until cancelled.

    `build` is called in a thread; it raises BundleFault or OSError for an edition that cannot be served.
    """
    wanted: Edition | None = None
    revision, again_at = 0, 0.0
    fresh: Serving | None = None
    while True:
        try:
            if (found := watch.changed()) is not None:
                wanted, revision, again_at = found.serve, found.revision, 0.0
                editions.faults = {}
        except EditionsFault as error:
            _logger.error("the site's editions cannot be read", fault=str(error))
            editions.faults = {"editions": str(error)}
        serves = editions.current.edition if editions.current is not None else None
        if fresh is not None and fresh.edition == wanted:  # still, after the time that it took
            editions.flip(fresh)
            settle()
            _logger.info("serves", edition=str(wanted), before=None if serves is None else str(serves))
        elif wanted is not None and wanted != serves and clock() >= again_at:
            fresh = await _built(wanted, build, editions)
            if fresh is not None:
                continue  # the file may say something else by now
            again_at = clock() + again_after_s
        fresh = None  # or this frame would keep it beyond the next flip
        editions.revision = revision
        await asyncio.sleep(period_s)


async def _built(wanted: Edition, build: Callable[[Edition], Serving], editions: Editions) -> Serving | None:
    name = str(wanted)
    try:
        fresh = await beside(lambda: build(wanted))
    except (BundleFault, ValueError, OSError) as error:
        if editions.faults.get(name) != str(error):
            _logger.error("cannot serve an edition", edition=name, fault=str(error))
        editions.faults = {name: str(error)}
        return None
    except Exception as error:  # a bundle that was verified and still breaks us: what serves must serve on
        _logger.exception("cannot serve an edition", edition=name)
        editions.faults = {name: f"{type(error).__name__}: {error}"}
        return None
    editions.faults = {}
    return fresh
