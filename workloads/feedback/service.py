"""The feedback process around its two loops: one thread follows the spool, another moves it into the lake.

They share nothing but numbers, so that a lake that is slow, or down, makes no profile wait. A kill at any moment is
a stop: profiles and lake know by themselves how far they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Final

from workloads.data.profiles import ProfileStore
from workloads.feedback.follower import Follower
from workloads.feedback.keeper import Keeper
from workloads.telemetry import log
from workloads.telemetry.beside import in_thread
from workloads.telemetry.metrics import StageMetrics
from workloads.telemetry.service import Service

POLL_S: Final = 0.1
"""Between two looks at a spool that has nothing new: about half of it is an event's way into its profile."""
RETRY_S: Final = 0.5
"""Between two tries of something that failed."""
STALE_MS: Final = 30_000
"""Profiles that are further behind than this are not ready."""
_STOP_WITHIN_S: Final = 2.0

_logger = log.get(component="feedback")


class Loops:
    """Both threads. The keeper is not waited for long: what it has begun, the next one finds undone or done."""

    def __init__(self, follower: Follower, keeper: Keeper | None, *, lake_every_s: float) -> None:
        self._follower = follower
        self._keeper = keeper
        self._lake_every_s = lake_every_s
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin."""
        self._thread("follower", self._follow)
        if self._keeper is not None:
            self._thread("keeper", self._keep)

    def stop(self) -> None:
        """End, within a few seconds."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(_STOP_WITHIN_S)

    def _thread(self, name: str, loop: Callable[[], None]) -> None:
        thread = threading.Thread(target=loop, name=name, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _follow(self) -> None:
        place = self._follower.position
        told: Mapping[str, str] = {}
        while not self._stopping.is_set():
            try:
                more = self._follower.step()
            except Exception as error:  # a bug of ours must not end the loop in silence
                _logger.exception("a batch failed")
                place.faults = {"profiles": f"a batch failed: {type(error).__name__}"}
                more = False
            if place.faults.keys() != told.keys():
                if place.faults:
                    _logger.warning("profiles wait", **place.faults)
                else:
                    _logger.info("profiles follow", applied=place.applied, last=place.last)
                told = dict(place.faults)
            if not more:
                self._stopping.wait(RETRY_S if place.faults else POLL_S)

    def _keep(self) -> None:
        keeper = self._keeper
        while keeper is not None and not self._stopping.is_set():
            try:
                keeper.round()
            except Exception as error:  # as above
                _logger.exception("a round of the lake failed")
                keeper.fault = f"a round failed: {type(error).__name__}"
            self._stopping.wait(self._lake_every_s)


def create_app(
    follower: Follower,
    keeper: Keeper | None,
    metrics: StageMetrics,
    *,
    store: ProfileStore,
    clock_ms: Callable[[], int],
    lake_every_s: float,
) -> Service:
    """The ASGI application around both loops."""
    loops = Loops(follower, keeper, lake_every_s=lake_every_s)

    def missing() -> Mapping[str, str]:
        found = dict(follower.position.faults)
        stale_ms = follower.position.staleness_ms(clock_ms())
        if not found and stale_ms > STALE_MS:
            found["freshness"] = f"the oldest event has waited for {stale_ms / 1000:.0f} s"
        if keeper is not None and keeper.fault is not None:
            found.setdefault("lake", keeper.fault)
        return found

    async def start() -> None:
        loops.start()

    async def stop() -> None:
        await in_thread(loops.stop)
        store.close()

    return Service(routes={}, metrics=metrics, missing=missing, start=start, stop=stop)
